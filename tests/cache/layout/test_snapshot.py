"""A job reads the records of a folder once."""

import pickle
from collections import Counter
from unittest.mock import MagicMock

import pyarrow as pa
import pytest

from jobs._plan import cache_plan
from pipeline.cache.fill.estimate import check_space
from pipeline.cache.fill.job import cache_bytes, precompute
from pipeline.cache.fill.plan import plan_cache
from pipeline.cache.layout.shards import RECORD, RECORDS, ShardFolder
from pipeline.cache.layout.snapshot import RecordSnapshot
from pipeline.cache.read.reader import CacheReader
from pipeline.cache.read.scan import read_summaries
from pipeline.distill.task import HeldOut
from pipeline.storage.store import Store
from tests.fakes import fill_in_process, without_ray


@pytest.fixture
def reads(monkeypatch):
    """How often each record was read from the store."""
    counts, get = Counter(), Store.get

    def count(self, path):
        data = get(self, path)
        counts[f"{self.uri}/{path}"] += path == RECORDS or RECORD.fullmatch(path) is not None
        return data

    monkeypatch.setattr(Store, "get", count)
    return counts


def _commit(folder, shard, first=0):
    return folder.commit(shard, pa.table({"key": [str(first), str(first + 1)]}))


def test_plan_filling_and_the_start_of_training_read_the_records_of_a_folder_once(
    tmp_path, photo_config, monkeypatch, reads
):
    config = photo_config("views.crops=2", "cache.codec=pca-int8-zstd")
    fill_in_process(plan_cache(config, Store.at(tmp_path / "cache")))
    without_ray(monkeypatch)
    reads.clear()
    plan = plan_cache(config, Store.at(tmp_path / "cache"))
    cache_plan(plan, config)
    check_space(plan)
    plan, report = precompute(config, plan, MagicMock())
    assert cache_bytes(plan)
    train, val = plan.split("train").dataset, plan.split("val").dataset
    for dataset in (train, val):
        assert dataset.labelled
        read_summaries(dataset, plan.teachers[0])
    CacheReader(train, plan.teachers, image_size=32, batch_size=16)
    HeldOut(val, plan.teachers, 32, 16)
    assert report.shards_computed == 0
    # One file of each complete folder: of images, of crops (training images alone), and of two teachers.
    assert sorted(count for count in reads.values() if count) == [1] * (2 + 1 + 2 * 2)


def test_a_refresh_lets_all_records_below_be_read_again(tmp_path, reads):
    near, far = (ShardFolder(Store.at(tmp_path / name)) for name in ("a", "ab"))
    first, snapshot = [_commit(near, 0), _commit(near, 1)], RecordSnapshot()
    _commit(far, 0)
    assert snapshot.records(near) == dict(enumerate(first))
    assert snapshot.records(far)
    reads.clear()
    again = _commit(near, 1, first=5)
    assert snapshot.records(near)[1] == first[1]
    assert snapshot.summary(near).shards == {0, 1}
    near.store.delete(first[0].file)
    snapshot.refresh(near.store.uri)
    assert snapshot.records(near) == {1: again}
    assert snapshot.summary(near).shards == {1}
    assert snapshot.records(far)
    assert sum(reads.values()) == 2


def test_another_process_starts_with_an_empty_snapshot(tmp_path):
    folder, snapshot = ShardFolder(Store.at(tmp_path / "a")), RecordSnapshot()
    _commit(folder, 0)
    assert len(snapshot.records(folder)) == 1
    _commit(folder, 1)
    copy = pickle.loads(pickle.dumps(snapshot))  # noqa: S301  as it travels to a worker
    assert len(copy.records(folder)) == 2


def test_folders_that_are_read_ahead_are_read_once(tmp_path, reads):
    folders = [ShardFolder(Store.at(tmp_path / str(number))) for number in range(20)]
    for number, folder in enumerate(folders[1:], 1):
        _commit(folder, 0, first=number)
    reads.clear()
    snapshot = RecordSnapshot()
    snapshot.read_ahead(folders)
    snapshot.read_ahead(folders)
    assert [len(snapshot.summary(folder).shards) for folder in folders] == [0] + [1] * 19
    assert {*reads.values()} == {1}
