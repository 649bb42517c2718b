"""The store against a real S3 endpoint on loopback that fails on demand."""

import pickle
import subprocess
import sys
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from moto.core import set_initial_no_auth_action_count
from pyarrow import fs

from pipeline.cache.fill.plan import plan_cache
from pipeline.cache.read.reader import CacheReader
from pipeline.errors import UserError
from pipeline.storage import remote
from pipeline.storage.store import Store
from tests.conftest import REPOSITORY
from tests.fakes import fill_in_process
from tests.storage.s3_endpoint import S3Endpoint, use

LARGE = bytes(range(256)) * 4096 * 25  # 25 MiB: three parts


@pytest.fixture(scope="module")
def server():
    server = S3Endpoint()
    yield server
    server.close()


@pytest.fixture
def endpoint(server, monkeypatch):
    use(server, monkeypatch)
    return server


@pytest.fixture
def store(endpoint):
    """An empty folder of a bucket."""
    address = {"endpoint_override": endpoint.url.removeprefix("http://"), "scheme": "http"}
    fs.S3FileSystem(**address, allow_bucket_creation=True).create_dir("photos")
    endpoint.clear()
    return Store.at(f"s3://photos/{uuid.uuid4().hex}")


def test_round_trip_listing_and_deletion(store):
    store.check()
    store.put("index", b"12345")
    store.sub("shards/a").put("one", b"1")
    assert store.get("index") == b"12345"
    assert store.open("index").read() == b"12345"
    assert store.exists("index")
    assert not store.exists("shards")
    assert (store.size("index"), store.size("none")) == (5, None)
    assert (store.files(), store.folders()) == ({"index": 5}, ["shards"])
    assert store.sub("shards").folders() == ["a"]
    assert store.sub("nowhere").files() == {}
    assert store.free_bytes() is None
    store.delete("index")
    store.delete("index")
    assert not store.exists("index")
    store.sub("shards").delete_folder()
    store.sub("shards").delete_folder()
    assert store.folders() == []


def test_a_bucket_is_emptied_and_stays(store):
    bucket = Store.at("s3://photos")
    store.put("x", b"1")
    bucket.delete_folder()
    assert bucket.folders() == []
    bucket.check()


@pytest.mark.parametrize("name", ["a b", "50%25", "a+b&c=d", "ä~'(1)", "#1?x=2"])
def test_names_are_taken_literally(store, name):
    folder = store.sub(f"{name} folder")
    folder.put(name, b"here")
    assert folder.get(name) == b"here"
    assert folder.files() == {name: 4}
    assert f"{name} folder" in store.folders()


def test_a_store_travels_and_shares_its_connection(store, endpoint):
    store.put("x", b"1")
    again = pickle.loads(pickle.dumps(store))  # noqa: S301
    assert again.get("x") == b"1"
    assert remote.resolve(store.uri)[0] is remote.resolve(again.sub("y").uri)[0]


def test_requests_of_small_files(store, endpoint):
    store.put("record", b"1" * 1000)
    assert [method for method, _ in endpoint.requests] == ["PUT"]
    endpoint.clear()
    store.get("record")
    assert [method for method, _ in endpoint.requests] == ["HEAD", "GET"]


@pytest.mark.parametrize("fault", ["SlowDown", "InternalError", "TooManyRequests", "reset", "truncate"])
def test_operations_outlast_failures(store, endpoint, fault):
    store.put("x", LARGE[:300_000])
    operations = {
        "PUT": lambda: store.put("y", b"abc"),
        "GET": lambda: store.get("x") == LARGE[:300_000],
        "HEAD": lambda: store.exists("x"),
        "DELETE": lambda: store.delete("x"),
    }
    for method, operation in operations.items():
        endpoint.clear()
        endpoint.fail(fault, 4, method)
        assert operation() in (True, None)
        if fault != "truncate" or method == "GET":  # the others' answers have no body
            assert sum(m == method for m, _ in endpoint.requests) == 5
    endpoint.clear()
    assert (store.get("y"), store.files()) == (b"abc", {"y": 3})


def test_a_listing_outlasts_failures(store, endpoint):
    store.put("x", b"1")
    for fault in ("SlowDown", "reset", "truncate"):
        endpoint.fail(fault, 4, "GET", "list-type")
        assert store.files() == {"x": 1}


def test_an_answer_that_does_not_come_is_asked_for_again(store, endpoint, monkeypatch):
    store.put("x", b"1")
    monkeypatch.setattr(remote, "STALL_TIMEOUT_S", 1.0)
    remote._s3.cache_clear()
    endpoint.fail("stall", 1, "GET")
    assert store.get("x") == b"1"
    endpoint.released.set()


def test_giving_up_names_the_object_and_the_cause(store, endpoint):
    endpoint.fail("SlowDown", 1000)
    with pytest.raises(
        UserError, match=rf"cannot write {store.uri}/x: .*SLOW_DOWN.*; tried 6 times; check the network"
    ):
        store.put("x", b"1")
    assert len(endpoint.requests) == 18


def test_a_large_object_arrives_whole_though_parts_fail(store, endpoint):
    endpoint.fail("reset", 2, "PUT", "partNumber=2")
    store.put("large", LARGE)
    assert sum("partNumber" in path for _, path in endpoint.requests) == 5
    endpoint.fail("truncate", 1, "GET")
    assert store.get("large") == LARGE


def test_an_upload_that_fails_leaves_the_old_object(store, endpoint, monkeypatch):
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    store.put("large", b"old")
    endpoint.fail("InternalError", 1000, "PUT", "partNumber=3")
    with pytest.raises(UserError, match="cannot write"):
        store.put("large", LARGE)
    endpoint.clear()
    assert store.files() == {"large": 3}


def test_a_writer_killed_in_an_upload_leaves_no_object(store, endpoint):
    endpoint.fail("stall", 1, "PUT", "partNumber=2")
    code = "import sys; from pipeline.storage.store import Store; Store.at(sys.argv[1]).put('large', bytes(25 << 20))"
    with subprocess.Popen([sys.executable, "-c", code, store.uri], cwd=REPOSITORY) as writer:
        assert endpoint.stalled.wait(30)
        writer.kill()
    endpoint.released.set()
    assert writer.returncode == -9
    assert store.files() == {}


def test_what_is_missing_is_not_looked_for_again(store, endpoint):
    for read in (store.get, store.open):
        endpoint.clear()
        with pytest.raises(FileNotFoundError):
            read("none")
        assert len(endpoint.requests) == 1


def test_a_missing_bucket_is_named(endpoint):
    missing = Store.at("s3://no-such-bucket/cache")
    with pytest.raises(UserError, match="s3://no-such-bucket does not exist: create the bucket"):
        missing.check()
    endpoint.clear()
    with pytest.raises(UserError, match=r"cannot write s3://no-such-bucket/cache/x: .*create the bucket"):
        missing.put("x", b"1")
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("code", ["AccessDenied", "SignatureDoesNotMatch", "ExpiredToken"])
def test_a_refusal_is_not_tried_again(store, endpoint, code):
    store.put("x", b"1")
    for operation in (lambda: store.put("x", b"2"), lambda: store.get("x"), store.files, lambda: store.exists("x")):
        endpoint.clear()
        endpoint.fail(code, 1000)
        with pytest.raises(UserError, match=f"{store.uri}.*check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"):
            operation()
        assert len(endpoint.requests) == 1


def test_unknown_credentials_are_refused_and_not_shown(store):
    with_authentication = set_initial_no_auth_action_count(0)
    with pytest.raises(UserError, match=r"INVALID_ACCESS_KEY_ID.*check AWS_ACCESS_KEY_ID") as raised:
        with_authentication(store.check)()
    assert "a-secret-of-tests" not in str(raised.value)


def test_an_endpoint_that_is_no_address_is_named(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL is no address of the form"):
        Store.at("s3://photos/cache").check()


def test_an_endpoint_where_nothing_listens_is_given_up(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.001)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(
        UserError, match=r"cannot list s3://photos/cache: .*connect.*; tried 6 times; check the network"
    ):
        Store.at("s3://photos/cache").check()


def test_a_row_group_takes_one_request_of_its_own_bytes(store, endpoint):
    columns = {name: pa.array([bytes([i]) * 5000 for i in range(256)], pa.binary(5000)) for name in "abcd"}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, row_group_size=64, compression="none", use_dictionary=False)
    store.put("shard", sink.getvalue())
    endpoint.clear()
    with pq.ParquetFile(store.open("shard")) as file:
        assert [method for method, _ in endpoint.requests] == ["HEAD", "GET"]  # its size, its footer
        endpoint.clear()
        group = file.read_row_group(2)
    assert [method for method, _ in endpoint.requests] == ["GET"]
    first, last = map(int, endpoint.ranges[0].removeprefix("bytes=").split("-"))
    assert 64 * 4 * 5000 <= last - first < 64 * 4 * 5000 * 1.1
    assert group["d"].to_pylist() == [bytes([i]) * 5000 for i in range(128, 192)]


def test_a_read_that_is_given_up_names_the_object(store, endpoint):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [bytes(100_000)]}), sink, compression="none")
    store.put("shard", sink.getvalue())
    with pq.ParquetFile(store.open("shard")) as file:
        endpoint.fail("InternalError", 1000)
        with pytest.raises(UserError, match=f"cannot read {store.uri}/shard: .*tried 6 times"):
            file.read_row_group(0)


def test_a_cache_filled_through_failures_equals_a_local_one(store, endpoint, photo_config, tmp_path):
    def fill(place: Store):
        plan, computed = fill_in_process(plan_cache(photo_config(), place))
        assert computed == 6
        return list(CacheReader(plan.split("train").dataset, plan.teachers, image_size=32, batch_size=16).batches(0))

    expected = fill(Store.at(tmp_path / "cache"))
    endpoint.fail_at_random(0.2, seed=0)
    got = fill(store)
    assert endpoint.failed > 10
    assert len(got) == len(expected) == 9
    for mine, other in zip(got, expected, strict=True):
        assert mine.keys == other.keys
        assert torch.equal(mine.images, other.images)
        assert torch.equal(mine.labels, other.labels)
        assert mine.features.keys() == other.features.keys()
        for teacher, kinds in other.features.items():
            assert all(torch.equal(mine.features[teacher][kind], values) for kind, values in kinds.items())
