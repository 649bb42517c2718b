"""An embedded Ray session without the servers that nobody asks: each takes a second of a processor, and 50 to 120 MiB.

No argument or variable of Ray 2.60 prevents them, so what starts them is replaced, which lets workers be forks too; where another
version has none of these names, all start as they do there.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.runtime.replaced import replaced

_AGENT, _WORKER = "--dashboard_agent_command", "--python_worker_command"
_CLIENT = Path(__file__).with_name("fork_client.py")


@contextmanager
def light_session(forks: str | None = None) -> Iterator[None]:
    """Start neither the autoscaler's monitor, nor the process and the agent that stay of the dashboard when it is off.

    Args:
        forks: address of a fork server, for the workers.
    """
    from ray._private import services
    from ray._private.node import Node

    with ExitStack() as stack:
        for name in ("start_monitor", "start_api_server"):
            stack.enter_context(replaced((Node, name, lambda *_, **__: None)))
        start: Any = getattr(services, "start_ray_process", None)
        stack.enter_context(replaced((services, "start_ray_process", partial(_start, start, forks))))
        yield


def _start(start: Callable[..., Any], forks: str | None, command: list[str], *arguments: Any, **named: Any) -> Any:
    """Start a process of Ray; a raylet gets `cat` in place of the dashboard's agent, because it must start one.

    Given a fork server, it gets a client of that before the command of its workers.

    A port of -1 says that there is no such service, as the agent says where the dashboard's packages are missing. `cat` ends
    when the raylet closes its input, which is how the agent learns that the raylet has died.
    """
    flags = dict(one.split("=", 1) for one in command if "=" in one)
    changed = {}
    if _AGENT in flags and shutil.which("cat") and _without_ports(flags):
        changed[_AGENT] = "cat"
    if _WORKER in flags and forks:
        client = [sys.executable, "-I", "-S", str(_CLIENT), forks]
        changed[_WORKER] = f"{subprocess.list2cmdline(client)} {flags[_WORKER]}"
    for name, value in changed.items():
        command = [f"{name}={value}" if one.startswith(f"{name}=") else one for one in command]
    return start(command, *arguments, **named)


def _without_ports(flags: dict[str, str]) -> bool:
    """Whether the files with the agent's ports could be written, for which the raylet waits."""
    names = ("METRICS_AGENT_PORT_NAME", "METRICS_EXPORT_PORT_NAME", "DASHBOARD_AGENT_LISTEN_PORT_NAME")
    try:
        core: Any = import_module("ray._raylet")
        for name in names:
            core.persist_port(flags["--session_dir"], flags["--node_id"], getattr(core, name), -1)
    except (ImportError, AttributeError, KeyError):
        return False
    return True
