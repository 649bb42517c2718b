import importlib.util
import os
import shutil
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs

from pipeline.errors import UserError
from pipeline.storage import remote
from pipeline.storage.store import LEFTOVER_AGE_S, Store, report_damage
from tests.faults import blinking


def test_put_then_get_list_and_size(tmp_path):
    store = Store.at(tmp_path / "cache")
    store.put("a/b.bin", b"12345")
    assert store.get("a/b.bin") == b"12345"
    assert store.size("a/b.bin") == 5
    assert store.size("a/none") is None
    assert store.exists("a/b.bin")
    assert not store.exists("a")
    assert store.folders() == ["a"]
    assert store.sub("a").files() == {"b.bin": 5}
    assert store.sub("nowhere").files() == {}


def test_a_folder_that_comes_and_goes_is_listed_or_empty(tmp_path):
    folder, seen = Store.at(tmp_path / "a"), set()
    with blinking(tmp_path / "a"):
        for _ in range(20000):
            seen.add(tuple(folder.files()))
    assert seen == {(), ("x",)}  # whole, or not there


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    store = Store.at(tmp_path)
    store.put("kept", b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*/kept: No space left on device"):
        store.put("kept", b"new and longer")
    assert store.get("kept") == b"old"
    assert os.listdir(tmp_path) == ["kept"]


def test_a_destination_that_is_a_file_is_named(tmp_path):
    Path(tmp_path, "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*cache/x\.bin"):
        Store.at(tmp_path / "cache").put("x.bin", b"1")


def test_relative_paths_become_absolute_and_uris_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Store.at("cache").uri == str(tmp_path / "cache")
    assert Store.at("s3://bucket/cache/").uri == "s3://bucket/cache"
    assert not Store.at("s3://bucket/cache").is_local


def test_a_file_address_is_its_path(tmp_path):
    assert Store.at(f"file://{tmp_path}/a%20b").uri == str(tmp_path / "a b")


def test_a_write_below_a_file_is_an_error(tmp_path):
    Path(tmp_path, "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*cache/x\.bin"):
        Store.at(tmp_path / "cache").put("x.bin", b"1")


def test_temporary_files_are_no_files_and_become_leftovers(tmp_path):
    store = Store.at(tmp_path)
    store.put("shard.json", b"{}")
    for name in (".shard.json.0123abcd", ".hidden"):
        Path(tmp_path, name).write_bytes(b"123")
    assert store.files() == {"shard.json": 2, ".hidden": 3}
    assert store.leftovers() == {}
    past = os.stat(tmp_path).st_mtime - LEFTOVER_AGE_S - 60
    for name in os.listdir(tmp_path):
        os.utime(tmp_path / name, (past, past))
    assert store.leftovers() == {".shard.json.0123abcd": 3}


def test_deletion(tmp_path):
    store = Store.at(tmp_path / "cache")
    store.put("a/b/x", b"1")
    store.put("y", b"1")
    store.delete("y")
    store.delete("y")
    assert store.files() == {}
    store.sub("a").delete_folder()
    store.sub("a").delete_folder()
    assert store.folders() == []


@pytest.mark.parametrize(("writes", "fails"), [(2, False), (9, True)])
def test_a_folder_into_which_another_process_writes_is_deleted_again(tmp_path, monkeypatch, writes, fails):
    (tmp_path / "a").mkdir()
    kept, left = fs.LocalFileSystem(), iter(range(writes))

    class Written:
        """Its folder has a new file at each of the first deletions."""

        def delete_dir(self, folder):
            if next(left, None) is not None:
                os.rmdir(tmp_path)  # the system's own error
            kept.delete_dir(folder)

    monkeypatch.setattr(fs, "LocalFileSystem", Written)
    with pytest.raises(UserError, match="Directory not empty") if fails else nullcontext():
        Store.at(tmp_path / "a").delete_folder()
    assert (tmp_path / "a").exists() == fails


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path):
    total = shutil.disk_usage(tmp_path).total
    assert 0 < Store.at(tmp_path / "not/yet").free_bytes() <= total


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pa, "OSFile", refuse)
    with pytest.raises(UserError, match=r"cannot read .*/x: Permission denied"):
        Store.at(tmp_path).open("x")


def test_a_file_that_is_cut_short_while_it_is_open_is_an_error(tmp_path):
    pq.write_table(pa.table({"a": range(10**5)}), tmp_path / "x.parquet")
    with pq.ParquetFile(Store.at(tmp_path).open("x.parquet")) as file:
        os.truncate(tmp_path / "x.parquet", 100)
        with pytest.raises(UserError, match=r"x\.parquet is damaged \("), report_damage(f"{tmp_path}/x.parquet"):
            file.read()


def test_a_store_that_only_fsspec_knows():
    store = Store.at("memory://cache")
    store.check()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [1, 2, 3]}), sink)
    store.sub("d").put("x.parquet", sink.getvalue())
    store.put("y", b"123")
    assert (store.files(), store.folders(), store.size("y")) == ({"y": 3}, ["d"], 3)
    with pq.ParquetFile(store.sub("d").open("x.parquet")) as file:
        assert file.read()["a"].to_pylist() == [1, 2, 3]
    with pytest.raises(FileNotFoundError):
        store.get("none")
    assert store.free_bytes() is None
    assert (store.files(age=3600), store.leftovers()) == ({}, {})
    MemoryFileSystem.store["/cache/y"].created -= timedelta(hours=2)
    assert store.files(age=3600) == {"y": 3}
    store.delete("y")
    store.delete("y")
    store.delete_folder()
    store.delete_folder()
    assert (store.files(), store.folders()) == ({}, [])


def test_a_driver_that_finds_deeper_than_it_is_asked_to_lists_a_folder_alone(monkeypatch):
    find = MemoryFileSystem.find
    monkeypatch.setattr(
        MemoryFileSystem, "find", lambda self, path, maxdepth=None, **how: find(self, path, **how)
    )  # as adlfs
    store = Store.at("memory://deep")
    for name in ("x", "a/y", "a/b/z"):
        store.put(name, b"123")
    assert (store.folders(), store.files(), store.sub("a").folders()) == (["a"], {"x": 3}, ["b"])
    assert store.bytes_below() == 9
    store.delete_folder()


def test_a_driver_that_fails_is_called_again(monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.001)
    store, info, failures = Store.at("memory://flaky"), MemoryFileSystem.info, iter([TimeoutError("slow")] * 3)
    store.put("x", b"1")

    def fail_first(*args, **kwargs):
        for failure in failures:
            raise failure
        return info(*args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "info", fail_first)
    assert store.size("x") == 1
    failures = iter([TimeoutError("slow")] * 100)
    with pytest.raises(UserError, match=r"cannot read memory://flaky/x: slow; tried 6 times"):
        store.size("x")


def test_a_missing_driver_is_named():
    if importlib.util.find_spec("adlfs"):
        pytest.skip("adlfs is there")
    with pytest.raises(UserError, match="az://photos/cache needs a driver that is not installed: Install adlfs"):
        Store.at("az://photos/cache").check()


def test_an_unknown_scheme_is_named():
    with pytest.raises(UserError, match=r"s4://photos.*: Protocol not known: s4; use a local folder, s3://, gs://"):
        Store.at("s4://photos").check()


@pytest.mark.parametrize("scheme", ["s3", "gs", "sftp"])
def test_credentials_in_an_address_are_refused_and_not_shown(scheme):
    with pytest.raises(UserError, match=r"credentials in an address are refused.*check") as raised:
        Store.at(f"{scheme}://key:hid/den@photos/cache")
    assert "hid" not in str(raised.value)


def test_options_in_an_address_are_refused_and_not_shown():
    with pytest.raises(UserError, match=r"options after \? in an s3:// address are not read") as raised:
        Store.at("s3://photos/cache?secret_key=hidden")
    assert "hidden" not in str(raised.value)
