import os
from pathlib import Path

import pytest

from pipeline.cache.store import Store
from pipeline.errors import UserError


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
