"""Google's store as pyarrow lists it: a server on loopback answers its two questions about names."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from pyarrow import fs

from pipeline.errors import UserError
from pipeline.sources.open import open_source
from pipeline.storage import remote
from pipeline.storage.files import is_folder, list_folder
from pipeline.storage.store import Store
from pipeline.training.checkpoint import delete_previous_best

OBJECTS = {
    "photos/ape/a.jpg": 5,
    "photos/ape/deep/b.jpg": 6,
    "photos/hund/c.jpg": 7,
    "photos/list.txt": 8,
    "photos2/x.jpg": 9,
}
"""Sizes by name; no object marks a folder, as after an upload."""


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        query = parse_qs(asked.query)
        name = unquote(asked.path.partition("/o/")[2])
        prefix, delimiter = (query.get(key, [""])[0] for key in ("prefix", "delimiter"))
        if name:
            self.answer(_described(name) if name in OBJECTS else None)
            return
        below = [one for one in OBJECTS if one.startswith(prefix)]
        cut = {one: one[len(prefix) :].partition(delimiter)[1] if delimiter else "" for one in below}
        folders = sorted({prefix + one[len(prefix) :].split("/")[0] + "/" for one in below if cut[one]})
        self.answer({"items": [_described(one) for one in below if not cut[one]], "prefixes": folders})

    def do_DELETE(self) -> None:
        self.server.deleted.append(unquote(self.path.partition("/o/")[2].partition("?")[0]))  # type: ignore[attr-defined]
        self.answer({})

    def answer(self, content: dict[str, object] | None) -> None:
        body = json.dumps(content or {"error": {"code": 404, "message": "Not Found"}}).encode()
        self.send_response(200 if content is not None else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _described(name: str) -> dict[str, object]:
    times = dict.fromkeys(("timeCreated", "updated"), "2026-11-01T00:00:00Z")
    return {"bucket": "data", "name": name, "size": str(OBJECTS[name]), "generation": "1", **times}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.deleted = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    system = fs.GcsFileSystem(anonymous=True, endpoint_override=f"127.0.0.1:{server.server_port}", scheme="http")
    monkeypatch.setattr(remote, "_gcs", lambda process: system)
    yield server
    server.shutdown()
    server.server_close()


def test_folders_that_no_object_marks_are_listed(server: ThreadingHTTPServer) -> None:
    entries = list_folder("gs://data/photos")
    assert [(entry.path, entry.is_folder, entry.size) for entry in entries] == [
        ("gs://data/photos/ape", True, 0),
        ("gs://data/photos/hund", True, 0),
        ("gs://data/photos/list.txt", False, 8),
    ]
    store = Store.at("gs://data/photos")
    assert (store.folders(), store.files(), store.bytes_below()) == (["ape", "hund"], {"list.txt": 8}, 5 + 6 + 7 + 8)
    assert store.files(age=60) == {"list.txt": 8}
    assert Store.at("gs://data").folders() == ["photos", "photos2"]
    assert Store.at("gs://data/none").folders() == []
    assert is_folder("gs://data/photos/ape")
    with pytest.raises(UserError, match=r"^gs://data/none: no such folder; correct the address"):
        list_folder("gs://data/none")


def test_class_folders_are_those_of_a_local_folder(server: ThreadingHTTPServer) -> None:
    source = open_source("gs://data/photos", split="train")
    index = source.index()
    assert source.classes == ("ape", "hund")
    assert index["sample_id"].to_pylist() == ["ape/a.jpg", "ape/deep/b.jpg", "hund/c.jpg"]
    assert (index["label"].to_pylist(), index["size"].to_pylist()) == ([0, 0, 1], [5, 6, 7])
    assert open_source("gs://data/photos/[ah]*", split="train").index()["sample_id"].equals(index["sample_id"])


def test_an_earlier_best_checkpoint_is_deleted(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTS, "run/best/one/state.pt", 3)
    monkeypatch.setitem(OBJECTS, "run/best/two/state.pt", 3)
    system, path = remote.resolve("gs://data/run/two")
    delete_previous_best(system, path)
    assert {*server.deleted} == {"run/best/one/state.pt", "run/best/one/"}  # type: ignore[attr-defined]
