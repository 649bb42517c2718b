"""A plain web server on loopback, with or without range requests, whose answers can be made to fail."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

STATUSES = {"unavailable": 503, "busy": 429, "forbidden": 403, "unauthorized": 401, "missing": 404}


class WebServer:
    """Serves `files` (bytes by path without the leading slash) at `url` until closed.

    Attributes:
        ranges: whether range requests are answered; else the whole file is sent.
        says_so: whether its answers tell that (`Accept-Ranges`).
        sizes: whether they tell the size of a file (`Content-Length`); else the end of the connection is the end of the file.
        tags: ETags by path.
        requests: method, path and asked range ("" for none) of each request so far.
        sent: bytes of bodies sent so far.
        faults: faults of the next GET requests, first to last: a key of `STATUSES`, ``cut`` (half of the body), ``slow`` (the
            body comes until `released` is set no further than its first half), or "" for none.
    """

    def __init__(self, files: dict[str, bytes], *, ranges: bool = True, says_so: bool = True) -> None:
        self.files, self.ranges, self.says_so = files, ranges, says_so
        self.sizes = True
        self.tags: dict[str, str] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.sent = 0
        self.faults: list[str] = []
        self.released = threading.Event()
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"web": self}))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *args: None  # type: ignore[method-assign]  # connections that break on purpose
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def clear(self) -> None:
        self.requests.clear()
        self.faults.clear()
        self.sent = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else an answer waits 40 ms between head and body
    web: WebServer

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(None)

    def do_GET(self) -> None:
        self._answer(self.headers.get("Range", ""))

    def _answer(self, asked: str | None) -> None:
        web, path = self.web, unquote(urlsplit(self.path).path).lstrip("/")
        with web.lock:
            web.requests.append((self.command, path, asked or ""))
            fault = web.faults.pop(0) if asked is not None and web.faults else ""
        if fault in STATUSES or path not in web.files:
            self._head(STATUSES.get(fault, 404), 0)
            return
        body, status, where = web.files[path], 200, ""
        if asked and web.ranges:
            first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups())  # type: ignore[union-attr]
            body, status, where = body[first : last + 1], 206, f"bytes {first}-{last}/{len(body)}"
        self._head(status, len(body), path, where)
        if asked is not None:
            self._send(body, fault)

    def _head(self, status: int, size: int, path: str = "", where: str = "") -> None:
        self.send_response(status)
        if self.web.sizes:
            self.send_header("Content-Length", str(size))
        else:
            self.close_connection = True
        if self.web.says_so:
            self.send_header("Accept-Ranges", "bytes" if self.web.ranges else "none")
        if where:
            self.send_header("Content-Range", where)
        if path in self.web.tags:
            self.send_header("ETag", self.web.tags[path])
        self.end_headers()

    def _send(self, body: bytes, fault: str) -> None:
        half = len(body) // 2 if fault else len(body)
        for start in range(0, half, 1 << 16):
            part = body[start : min(half, start + (1 << 16))]
            self.wfile.write(part)
            with self.web.lock:
                self.web.sent += len(part)
        if fault == "slow":
            self.web.released.wait(30)
        if fault:
            self.close_connection = True
