"""A real S3 endpoint on loopback, moto's server, in front of which requests can be made to fail."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moto.moto_server.werkzeug_app import MotoRequestHandler
from moto.server import DomainDispatcherApplication, create_backend_app
from pyarrow import fs
from werkzeug.serving import make_server

from pipeline.storage import remote

ERRORS = {
    "SlowDown": "503 Slow Down",
    "InternalError": "500 Internal Server Error",
    "TooManyRequests": "429 Too Many Requests",
    "AccessDenied": "403 Forbidden",
    "SignatureDoesNotMatch": "403 Forbidden",
    "ExpiredToken": "400 Bad Request",
}
PASSING_FAULTS = ("SlowDown", "InternalError", "reset", "truncate")

Fault = Callable[[str, str], str | None]


class _Handler(MotoRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *args: Any) -> None:
        pass


class S3Endpoint:
    """Serves at `url` until closed.

    Attributes:
        requests: method and path with query of each request so far.
        ranges: the byte range that each of them asked for, or "".
        failed: how many of them were made to fail.
        fault: gives the fault of a request, by method and path with query: a key of `ERRORS`, ``reset`` (the connection),
            ``truncate`` (the body), ``stall`` (until `released` is set), or None.
        stalled: set once a request is held by ``stall``.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self.failed = 0
        self.fault: Fault = lambda method, path: None
        self.stalled, self.released = threading.Event(), threading.Event()
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=_Handler)
        self._server.handle_error = lambda *args: None  # connections that break on purpose
        self.url = f"http://127.0.0.1:{self._server.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which a client finds it and may use it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "a-secret-of-tests",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def clear(self) -> None:
        self.requests.clear()
        self.ranges.clear()
        self.failed = 0
        self.fault = lambda method, path: None
        self.stalled.clear()
        self.released.clear()

    def upload(self, folder: str, files: Mapping[str, bytes]) -> None:
        """Put files into `<bucket>/<path>`; a missing bucket is created."""
        keys = {name: self.environment[f"AWS_{name.upper()}"] for name in ("access_key_id", "secret_access_key")}
        address = {"endpoint_override": self.url.removeprefix("http://"), "scheme": "http"}
        system = fs.S3FileSystem(
            access_key=keys["access_key_id"],
            secret_key=keys["secret_access_key"],
            allow_bucket_creation=True,
            **address,
        )
        system.create_dir(folder.split("/")[0])
        for name, data in files.items():
            with system.open_output_stream(f"{folder}/{name}") as file:
                file.write(data)
        self.clear()

    def fail(self, fault: str, times: int, method: str = "", within: str = "") -> None:
        """Let the next `times` requests of this method, with this text in path or query, fail."""
        left = iter([fault] * times)
        self.fault = lambda verb, path: next(left, None) if verb.startswith(method) and within in path else None

    def fail_at_random(self, share: float, seed: int) -> None:
        """Let this share of all requests fail, each in a way that passes."""
        rng = random.Random(seed)
        self.fault = lambda verb, path: rng.choice(PASSING_FAULTS) if rng.random() < share else None

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if environ["QUERY_STRING"]:
            path += "?" + environ["QUERY_STRING"]
        with self._lock:
            self.requests.append((method, path))
            self.ranges.append(environ.get("HTTP_RANGE", ""))
            fault = self.fault(method, path)
            self.failed += fault is not None
        if fault in ERRORS:
            return _error(fault, environ, start_response)
        if fault == "reset":
            _reset(environ["werkzeug.socket"])
        if fault == "stall":
            self.stalled.set()
            self.released.wait(30)
        body = self._app(environ, start_response)
        return _truncated(b"".join(body), environ["werkzeug.socket"]) if fault == "truncate" else body


def use(server: S3Endpoint, monkeypatch: Any) -> None:
    """Let this process take the endpoint for its store, and try again at once."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.001)
    remote._s3.cache_clear()
    server.clear()


def _error(code: str, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    body = f"<Error><Code>{code}</Code><Message>injected {code}</Message></Error>".encode()
    start_response(ERRORS[code], [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    socket.close(connection.detach())
    raise ConnectionResetError


def _truncated(body: bytes, connection: socket.socket) -> Iterable[bytes]:
    yield body[: len(body) // 2]
    connection.shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError
