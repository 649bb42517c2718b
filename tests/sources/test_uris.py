"""Sources by URI give what the same files give by local path, also from stores that fail, and read little more than those."""

import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfFileSystem
from pyarrow import fs

from pipeline.errors import UserError
from pipeline.sources.base import Source
from pipeline.sources.left_out import notes_of
from pipeline.sources.open import open_source
from pipeline.storage import remote
from pipeline.storage.remote import StoreError
from tests.conftest import REPOSITORY
from tests.sources.noise_images import encode
from tests.storage.s3_endpoint import S3Endpoint, use
from tests.storage.web_server import WebServer

LOCATIONS = {
    "classes": ("folder", "folder/[ac]*", "folder/{cat,ape}"),
    "flat": ("folder/ape",),
    "tars": (
        "tars",
        "tars/train-{000..002}.tar",
        "tars/train-00{0,2}.tar",
        "tars/train-*.tar",
        "tars/train-001.tar",
        "t*/*2.tar",
    ),
    "Parquet": ("parquet", "parquet/{a,b}.parquet", "parquet/*.parquet", "parquet/a.parquet"),
}


def tar_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def parquet_of(first: int) -> bytes:
    images = [{"bytes": encode(n), "path": None} for n in range(first, first + 20)]
    table = pa.table({"image": images, "label": [n % 3 for n in range(20)], "unused": [bytes(50_000)] * 20})
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=6, use_dictionary=False, compression="none")
    return file.getvalue()


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders, tars and Parquet files."""
    root = tmp_path_factory.mktemp("local")
    files = {f"folder/{name}/{n}.jpg": encode(n) for name in ("ape", "cat") for n in range(5)}
    files |= {
        "folder/cat/deep/ä b+c#1.png": encode(9, "PNG"),
        "folder/cat/.hidden.jpg": b"x",
        "folder/cat/notes.txt": b"x",
    }
    files |= {"folder/.git/x.jpg": b"x", "folder/ape/empty.jpg": b""}
    for shard in range(3):
        members = {
            f"{shard}{n:03d}{ending}": data for n in range(30) for ending, data in ((".jpg", encode(n)), (".cls", b"2"))
        }
        files[f"tars/train-{shard:03d}.tar"] = tar_of({**members, f"{shard}999.txt": b"no image", "readme": b"x"})
    files |= {"parquet/a.parquet": parquet_of(0), "parquet/b.parquet": parquet_of(100)}
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def contents(tree: Path) -> dict[str, bytes]:
    return {path.relative_to(tree).as_posix(): path.read_bytes() for path in sorted(tree.rglob("*")) if path.is_file()}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.001)


@pytest.fixture(scope="module")
def server(tree: Path) -> Iterator[S3Endpoint]:
    server = S3Endpoint()
    server.upload("photos/data", contents(tree))
    yield server
    server.close()


@pytest.fixture
def endpoint(server: S3Endpoint, monkeypatch: pytest.MonkeyPatch) -> S3Endpoint:
    """An S3 endpoint that holds the tree in s3://photos/data."""
    use(server, monkeypatch)
    return server


@pytest.fixture
def web(tree: Path) -> Iterator[WebServer]:
    server = WebServer(contents(tree))
    yield server
    server.close()


@pytest.fixture
def memory(tree: Path) -> Iterator[str]:
    """The tree in a store of fsspec."""
    system = fsspec.filesystem("memory")
    for name, data in contents(tree).items():
        system.pipe(f"/data/{name}", data)
    yield "memory://data"
    system.rm("/data", recursive=True)


def check_equal(local: Source, source: Source, root: str, tree: Path) -> None:
    source = pickle.loads(pickle.dumps(source))  # noqa: S301
    expected, found = local.index(), source.index()
    assert (source.classes, notes_of(found)) == (local.classes, notes_of(expected))
    for name in ("sample_id", "label", "offset", "size"):
        assert found[name].to_pylist() == expected[name].to_pylist()
    assert found["uri"].to_pylist() == [uri.replace(str(tree), root) for uri in expected["uri"].to_pylist()]
    versions = found["version"].to_numpy()
    assert (versions != 0).all()
    assert np.array_equal(versions, source.index()["version"].to_numpy())
    order = np.random.default_rng(0).permutation(len(found))
    assert list(source.read(found)) == list(local.read(expected))
    assert list(source.read(found.take(order))) == list(local.read(expected.take(order)))


ALL = [location for locations in LOCATIONS.values() for location in locations]


@pytest.mark.parametrize("location", ALL)
def test_s3_gives_what_local_files_give(endpoint: S3Endpoint, tree: Path, location: str) -> None:
    endpoint.fail_at_random(0.1, seed=0)
    source = open_source(f"s3://photos/data/{location}", split="train")
    check_equal(open_source(str(tree / location), split="train"), source, "s3://photos/data", tree)


@pytest.mark.parametrize("location", ALL)
def test_a_driver_of_fsspec_gives_what_local_files_give(memory: str, tree: Path, location: str) -> None:
    source = open_source(f"{memory}/{location}", split="train")
    check_equal(open_source(str(tree / location), split="train"), source, memory, tree)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("location", [where for where in ALL if not {"*", "["} & {*where} and "." in where])
def test_a_web_server_gives_what_local_files_give(web: WebServer, tree: Path, location: str, ranges: bool) -> None:
    web.ranges = ranges
    web.faults = ["", "unavailable", "cut", "", "cut"] * 4
    local = open_source(str(tree / location), split="train")
    if location.startswith("parquet") and not ranges:
        with pytest.raises(StoreError, match=r"does not answer range requests.*name \.tar files, or copy it"):
            open_source(f"{web.url}/{location}", split="train")
        return
    check_equal(local, open_source(f"{web.url}/{location}", split="train"), web.url, tree)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_tar_is_read_once_to_index_it_and_once_to_ingest_it(web: WebServer, tree: Path, ranges: bool) -> None:
    web.ranges = ranges
    size = (tree / "tars/train-000.tar").stat().st_size
    source = open_source(f"{web.url}/tars/train-000.tar", split="train")
    index = source.index()
    assert web.sent <= size
    assert not source.random_access
    web.clear()
    assert len([*source.read(index)]) == 30
    assert web.sent <= size


def test_shards_in_any_order_read_a_tar_once_in_total(web: WebServer) -> None:
    members = {f"{n:04d}.jpg": bytes([n % 256]) * 200_000 for n in range(120)}
    web.files["large.tar"] = tar_of(members)
    source = open_source(f"{web.url}/large.tar", split="train")
    index = source.index()
    web.clear()
    order = np.random.default_rng(0).permutation(len(index))
    for rows in np.array_split(order, 6):
        assert [data[0] for data in source.read(index.take(rows))] == [row % 256 for row in rows]  # type: ignore[index]
    assert web.sent <= len(web.files["large.tar"])


def test_large_members_are_passed_over_when_a_tar_is_indexed(web: WebServer) -> None:
    web.files["large.tar"] = tar_of({f"{n}.jpg": bytes(40 << 20) for n in range(2)})
    assert open_source(f"{web.url}/large.tar", split="train").index().num_rows == 2
    assert web.sent < 20 << 20


def test_parquet_reads_the_columns_that_it_needs(web: WebServer, tree: Path) -> None:
    source = open_source(f"{web.url}/parquet/a.parquet", split="train")
    index = source.index()
    assert web.sent < (tree / "parquet/a.parquet").stat().st_size / 2  # the column that nobody needs is the largest
    web.clear()
    assert list(source.read(index.slice(0, 6))) == [encode(n) for n in range(6)]
    assert web.sent < 80_000


def test_class_folders_are_listed_in_one_go_without_a_look_at_any_file(endpoint: S3Endpoint) -> None:
    source = open_source("s3://photos/data/folder", split="train")
    endpoint.clear()
    assert source.index().num_rows == 12
    assert [method for method, _ in endpoint.requests] == ["GET"] * 2
    assert all("list-type=2" in path for _, path in endpoint.requests)


def test_an_image_that_is_gone_is_an_exception_in_its_place(endpoint: S3Endpoint, memory: str, web: WebServer) -> None:
    for root, location in ((memory, "folder"), ("s3://photos/data", "folder")):
        source = open_source(f"{root}/{location}", split="train")
        index = source.index().slice(0, 3)
        uris = pa.array([index["uri"][0].as_py(), f"{root}/folder/ape/gone.jpg", index["uri"][2].as_py()])
        found = list(source.read(index.set_column(2, index.schema.field("uri"), uris)))
        assert [type(data) for data in found] == [bytes, FileNotFoundError, bytes]
    source = open_source(f"{web.url}/tars/train-000.tar", split="train")
    index = source.index()
    web.files["tars/train-000.tar"] = web.files["tars/train-000.tar"][: index["offset"][20].as_py() + 5]
    found = list(source.read(index))
    assert [type(data) for data in found] == [bytes] * 20 + [OSError] * 10
    assert "ends after 5 of" in str(found[20])
    del web.files["tars/train-000.tar"]
    assert [type(data) for data in source.read(index)] == [FileNotFoundError] * 30


@pytest.mark.parametrize("location", ["folder", "tars/train-000.tar", "parquet/a.parquet"])
def test_a_store_that_fails_says_nothing_about_an_image(endpoint: S3Endpoint, location: str) -> None:
    source = open_source(f"s3://photos/data/{location}", split="train")
    index = source.index()
    endpoint.fail("SlowDown", 10_000)
    with pytest.raises(
        StoreError, match=r"^cannot read s3://photos/data/.*(503|SLOW_DOWN).*; tried 6 times; check the network"
    ):
        list(source.read(index))


@pytest.mark.parametrize(
    "location", ["data/folder", "data/tars/train-000.tar", "data/tars/*.tar", "data/parquet/a.parquet"]
)
def test_a_refusal_names_the_credentials(endpoint: S3Endpoint, location: str) -> None:
    endpoint.fail("AccessDenied", 10_000)
    with pytest.raises(UserError, match=r"^cannot (read|list) s3://photos/data.*check AWS_ACCESS_KEY_ID"):
        open_source(f"s3://photos/{location}", split="train")


@pytest.mark.parametrize(
    "location", ["nowhere/x.tar", "nowhere/x-{0..3}.tar", "nowhere", "nowhere/*.tar", "no*/*/x.tar"]
)
def test_what_is_missing_is_named(endpoint: S3Endpoint, memory: str, location: str) -> None:
    for root in ("s3://photos", "s3://no-such-bucket", memory):
        with pytest.raises(UserError, match=rf"{root}.*: (no such (file or )?folder|.*create the bucket)") as raised:
            open_source(f"{root}/{location}", split="train")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "location", ["tars", "tars/*.tar", "folder/{cat,ape}", "folder/cat/0.jpg", "tars/train-{003..004}.tar"]
)
def test_a_web_server_has_no_folders(web: WebServer, location: str) -> None:
    web.files |= {"tars": b"<html>", "folder/cat": b"<html>", "folder/ape": b"<html>"}
    remedy = (
        r"no such file" if "003" in location else r"a web server has no folders.*name \.tar or \.parquet files, several"
    )
    with pytest.raises(UserError, match=rf"^{web.url}/.*: {remedy}"):
        open_source(f"{web.url}/{location}", split="train")


def test_a_damaged_remote_file_is_named(web: WebServer) -> None:
    web.files["tars/train-001.tar"] = web.files["tars/train-001.tar"][:50_000]
    web.files["parquet/a.parquet"] = web.files["parquet/a.parquet"][:-100]
    with pytest.raises(UserError, match=rf"^{web.url}/tars/train-001.tar: truncated, compressed or not a tar file"):
        open_source(f"{web.url}/tars/train-{{000..002}}.tar", split="train").index()
    with pytest.raises(UserError, match=rf"^{web.url}/parquet/a.parquet: not a readable Parquet file"):
        open_source(f"{web.url}/parquet/a.parquet", split="train")


def test_splits_in_a_store_are_refused_as_in_a_folder(memory: str) -> None:
    system = fsspec.filesystem("memory")
    for name in ("splits/train/cat/1.jpg", "splits/val/cat/1.jpg", "files/train-0.tar", "files/val-0.tar"):
        system.pipe(f"/data/{name}", b"x")
    for folder in ("splits", "files"):
        with pytest.raises(UserError, match=rf"^{memory}/{folder}: contains several splits \(train, val\)"):
            open_source(f"{memory}/{folder}", split="train")


@pytest.mark.parametrize("scheme", ["az", "abfs"])
def test_a_missing_driver_is_named(scheme: str) -> None:
    with pytest.raises(UserError, match=rf"^{scheme}://box/x.tar needs a driver that is not installed: .*adlfs"):
        open_source(f"{scheme}://box/x.tar", split="train")


def test_a_bucket_without_a_region_is_a_missing_one() -> None:
    def call() -> None:
        raise OSError("Bucket 'photos' not found")

    with pytest.raises(StoreError, match=r"^cannot list s3://photos: .*; create the bucket, or correct its name$"):
        remote.attempt("list", "s3://photos", call)


def test_gs_asks_googles_driver_for_credentials() -> None:
    assert isinstance(remote.resolve("gs://bucket/x")[0], fs.GcsFileSystem)
    refused = OSError("google::cloud::Status(PERMISSION_DENIED: no access) error_info={reason=...}")

    def call() -> None:
        raise refused

    with pytest.raises(
        StoreError, match=r"cannot read gs://bucket/x: .*no access\); check GOOGLE_APPLICATION_CREDENTIALS"
    ):
        remote.attempt("read", "gs://bucket/x", call)


def test_a_hub_address_keeps_its_revision_and_a_malformed_one_is_refused_at_once() -> None:
    system, path = remote.resolve("hf://datasets/me/photos@refs/convert/parquet/train/0.parquet")
    assert isinstance(system.handler.fs, HfFileSystem)
    assert path == "datasets/me/photos@refs/convert/parquet/train/0.parquet"
    with pytest.raises(StoreError, match=r"^cannot read hf://datasets/photos: Invalid HF URI .*; correct the address$"):
        open_source("hf://datasets/photos", split="train")


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (
            "offline",
            r"cannot read hf://datasets/me/photos/train-0.tar: .*unset the `HF_HUB_OFFLINE`.*; or read a local copy",
        ),
        ("unauthorized", r"cannot read hf://datasets/me/photos/train-0.tar: .*401.*; check the name and HF_TOKEN"),
        ("unavailable", r"cannot read hf://datasets/me/photos/train-0.tar: .*503.*; tried 6 times"),
    ],
)
def test_a_hub_that_refuses_or_fails_is_named(fault: str, line: str) -> None:
    """In a process of its own, since the hub's client reads its address when it is imported."""
    code = """
import sys
from pipeline.errors import UserError
from pipeline.sources.open import open_source
from pipeline.storage import remote
remote.FIRST_DELAY_S = 0.001
try:
    open_source(sys.argv[1], split="train")
except UserError as error:
    print(error)
"""
    web = WebServer({})
    web.faults = [fault] * 1000
    environment = {**os.environ, "HF_ENDPOINT": web.url, "HF_HUB_OFFLINE": str(int(fault == "offline"))}
    command = [sys.executable, "-c", code, "hf://datasets/me/photos/train-0.tar"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    web.close()
    assert done.stdout.count("\n") == 1, done.stderr
    assert re.search(line, done.stdout), done.stdout
