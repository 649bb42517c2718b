"""Get a worker of Ray from a fork server, or become one: ``fork_client.py ADDRESS COMMAND...`` (see fork_server.py).

A raylet starts this script in place of the command. It runs without site-packages, and ends after some hundredths of a second.
"""

import json
import os
import resource
import socket
import sys

_SETUP, _WORKER = "setup_worker.py", "default_worker.py"
"""Ray's scripts: one sets up a runtime environment, and then runs the other."""
_CONTEXT, _LANGUAGE = "--serialized-runtime-env-context=", "--language="


def main(address: str, command: list[str]) -> None:
    """Ask the server; run the command if that has no answer, or cannot be asked of it."""
    request = make_request(command)
    if request is None or not _ask(address, json.dumps(request).encode()):
        os.execv(command[0], command)


def make_request(command: list[str]) -> dict[str, object] | None:
    """What a fork needs to be the worker that the command starts.

    None if a fork cannot be it: its runtime environment is more than variables, or its working directory is deleted.
    """
    executable, *arguments = command
    if arguments and os.path.basename(arguments[0]) == _SETUP:
        del arguments[0]
    contexts = [json.loads(one.removeprefix(_CONTEXT)) for one in arguments if one.startswith(_CONTEXT)]
    arguments = [one for one in arguments if not one.startswith((_CONTEXT, _LANGUAGE))]
    if not arguments or os.path.basename(arguments[0]) != _WORKER:
        return None
    environment = dict(os.environ)
    for context in contexts:
        variables = context.pop("env_vars", None) or {}
        is_other = context.pop("py_executable", executable) != executable or any(context.values())
        if is_other or any("$" in value for value in variables.values()):  # Ray replaces those
            return None
        environment |= variables
    try:
        folder = os.getcwd()
    except OSError:  # it is deleted
        return None
    return {
        "command": command,
        "arguments": arguments,
        "environment": environment,
        "folder": folder,
        "nice": os.nice(0),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
    }


def _ask(address: str, request: bytes) -> bool:
    """Send a request, with this process's streams; whether there is a fork."""
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(address)
            socket.send_fds(server, [b"\n"], [0, 1, 2])
            server.sendall(request)
            server.shutdown(socket.SHUT_WR)
            return server.recv(1) != b""
    except OSError:
        return False


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
