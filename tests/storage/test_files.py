"""Files by local path and by URI, also from stores that fail."""

import hashlib
import io
from pathlib import Path

import fsspec
import pytest

from pipeline.errors import UserError
from pipeline.storage import remote
from pipeline.storage.files import describe, exists, is_folder, list_folder, open_binary, read_bytes
from pipeline.storage.remote import StoreError, check_address
from pipeline.storage.remote_file import RemoteFile, read_extents
from tests.storage.web_server import WebServer

LARGE = b"".join(hashlib.blake2b(bytes([n % 256, n // 256])).digest() for n in range(1 << 14)) * 10  # 10 MiB
FILES = {"large.bin": LARGE, "empty": b"", "a b+ä.txt": b"text"}


@pytest.fixture(params=["ranges", "no ranges", "no ranges, silent"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.001)
    server = WebServer(dict(FILES), ranges=request.param == "ranges", says_so="silent" not in request.param)
    yield server
    server.close()


@pytest.fixture
def memory():
    """A store of fsspec that lists."""
    system = fsspec.filesystem("memory")
    for name in ("top", "a/one", "a/b/two"):
        system.pipe(f"/store/{name}", name.encode())
    yield "memory://store"
    system.rm("/store", recursive=True)


def test_a_file_is_read_in_one_pass_over_its_bytes(server: WebServer) -> None:
    url = f"{server.url}/large.bin"
    digest = hashlib.sha256()
    with open_binary(url) as file:
        while part := file.read(100_000):
            digest.update(part)
    assert digest.digest() == hashlib.sha256(LARGE).digest()
    if server.says_so:
        assert server.sent <= len(LARGE)
    else:  # it is asked for ranges before it is known to ignore them
        assert sum(method == "GET" for method, *_ in server.requests) == 3
    server.clear()
    assert read_bytes(url) == LARGE
    assert read_bytes(f"{server.url}/empty") == b""
    assert read_bytes(f"{server.url}/a b+ä.txt") == b"text"


@pytest.mark.parametrize("fault", ["unavailable", "busy", "cut"])
def test_reading_outlasts_failures_and_goes_on_where_it_was(server: WebServer, fault: str) -> None:
    server.faults = ["", fault, fault, "", fault]
    with open_binary(f"{server.url}/large.bin", 1 << 20) as file:
        assert b"".join(iter(lambda: file.read(1 << 20), b"")) == LARGE
    if server.ranges:
        assert server.sent <= len(LARGE) + 3 * (1 << 20)


def test_an_answer_that_stalls_is_asked_for_again(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "STALL_TIMEOUT_S", 0.5)
    server.faults = ["slow"]
    assert read_bytes(f"{server.url}/large.bin") == LARGE


def test_a_file_that_ends_early_is_an_error_and_no_short_file(server: WebServer) -> None:
    server.faults = ["cut"] * 100
    with pytest.raises(StoreError, match=rf"^cannot read {server.url}/large.bin: .*; tried 6 times; check the network"):
        read_bytes(f"{server.url}/large.bin")


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [
        ("unavailable", "503.*; tried 6 times; check the network"),
        ("forbidden", "403.*; name a file that anybody may read"),
        ("unauthorized", "401.*; name a file that anybody may read"),
    ],
)
def test_giving_up_names_address_status_and_remedy(server: WebServer, fault: str, remedy: str) -> None:
    server.faults = [fault] * 100
    with pytest.raises(StoreError, match=f"^cannot read {server.url}/large.bin: {remedy}") as raised:
        read_bytes(f"{server.url}/large.bin")
    assert "\n" not in str(raised.value)
    if fault != "unavailable":
        assert sum(method == "GET" for method, *_ in server.requests) == 1


def test_a_file_of_unknown_size_is_refused_since_its_end_could_be_lost(server: WebServer) -> None:
    server.sizes = False
    with pytest.raises(StoreError, match=r"does not tell the size of the file; copy it to another store"):
        read_bytes(f"{server.url}/large.bin")


def test_what_is_missing_is_asked_for_once(server: WebServer) -> None:
    with pytest.raises(FileNotFoundError):
        read_bytes(f"{server.url}/none")
    assert not exists(f"{server.url}/none")
    assert exists(f"{server.url}/large.bin")
    assert len(server.requests) <= 5


def test_a_server_that_is_down_is_no_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.001)
    with pytest.raises(
        StoreError, match=r"^cannot read http://127.0.0.1:1/x.tar: .*; tried 6 times; check the network"
    ):
        exists("http://127.0.0.1:1/x.tar")


def test_extents_that_are_close_share_a_request(server: WebServer) -> None:
    extents = [(0, 10), (100, 50), (1 << 20, 1000), ((1 << 20) + 2000, 5), (9 << 20, 1 << 20), (len(LARGE) - 5, 10)]
    found = list(read_extents(f"{server.url}/large.bin", extents))
    assert found == [LARGE[offset : offset + size] for offset, size in extents]
    if server.ranges:
        assert sum(method == "GET" for method, *_ in server.requests) == 3
        assert server.sent < (1 << 20) + 5000
    elif server.says_so:
        assert server.sent <= len(LARGE)


def test_reads_anywhere_are_those_of_the_file(server: WebServer) -> None:
    with RemoteFile(f"{server.url}/large.bin") as file:
        assert file.size == len(LARGE)
        assert file.ranges == server.ranges
        for offset, size in [(5_000_000, 10), (0, 3), (4_999_999, 100), (len(LARGE) - 3, 100)]:
            file.seek(offset)
            assert file.read(size) == LARGE[offset : offset + size]
        assert file.seek(-4, io.SEEK_END) == len(LARGE) - 4
        assert file.read() == LARGE[-4:]
        file.seek(len(LARGE) + 100)
        assert file.read(1) == b""


def test_versions_follow_etag_and_size(server: WebServer) -> None:
    url = f"{server.url}/large.bin"
    server.tags["large.bin"] = '"1"'
    first = describe(url)
    assert (first.size, first.is_folder) == (len(LARGE), False)
    assert describe(url).version == first.version != 0
    server.tags["large.bin"] = '"2"'
    assert describe(url).version != first.version
    assert not is_folder(server.url)
    with pytest.raises(
        UserError, match=r"a web server has no folders.*name \.tar or \.parquet files, several with braces"
    ):
        list_folder(server.url)


def test_local_files_are_described_as_ever(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"123")
    found = describe(str(file))
    assert (found.size, found.is_folder) == (3, False)
    assert read_bytes(str(file)) == b"123"
    assert is_folder(str(tmp_path))
    file.write_bytes(b"1234")
    assert describe(str(file)).version != found.version
    assert not exists(str(tmp_path / "none"))


def test_a_store_lists_one_level_or_all_files(memory: str) -> None:
    assert [(entry.path, entry.is_folder) for entry in list_folder(memory)] == [
        (f"{memory}/a", True),
        (f"{memory}/top", False),
    ]
    below = list_folder(memory, recursive=True)
    assert [(entry.path, entry.size) for entry in below] == [
        (f"{memory}/a/b/two", 7),
        (f"{memory}/a/one", 5),
        (f"{memory}/top", 3),
    ]
    assert is_folder(f"{memory}/a")
    for recursive in (False, True):
        with pytest.raises(UserError, match=r"^memory://store/none: no such folder; correct the address"):
            list_folder(f"{memory}/none", recursive=recursive)


@pytest.mark.parametrize(
    "uri", ["https://me:secret@host/x.tar", "https://token@host/x.tar", "https://host/x?sig=secret"]
)
def test_credentials_in_a_web_address_are_refused_and_not_shown(uri: str) -> None:
    with pytest.raises(UserError, match="refused, since addresses are logged") as raised:
        check_address(uri)
    assert "secret" not in str(raised.value)


def test_a_revision_of_a_hub_repository_is_no_credential() -> None:
    check_address("hf://datasets/somebody/photos@refs/train-{000..127}.tar")
    check_address("https://host/package@1.2/x.tar")
