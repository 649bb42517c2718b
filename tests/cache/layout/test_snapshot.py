"""A job reads the record of a shard once."""

from collections import Counter
from unittest.mock import MagicMock

import pyarrow as pa
import pytest

from jobs._plan import cache_plan
from pipeline.cache.fill.build import plan_cache
from pipeline.cache.fill.estimate import check_space
from pipeline.cache.fill.job import cache_bytes, precompute
from pipeline.cache.layout.shards import RECORD, ShardFolder
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
        counts[f"{self.uri}/{path}"] += RECORD.fullmatch(path) is not None
        return data

    monkeypatch.setattr(Store, "get", count)
    return counts


def _commit(folder, shard, first=0):
    return folder.commit(shard, pa.table({"sample_id": [str(first), str(first + 1)]}))


def test_plan_filling_and_the_start_of_training_read_each_record_once(tmp_path, photo_config, monkeypatch, reads):
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
    # Two shards and one: of images, of crops (training images alone), and of two teachers.
    assert sorted(reads[name] for name in reads if RECORD.fullmatch(name.rpartition("/")[2])) == [1] * (3 + 2 + 2 * 3)


def test_a_refresh_reads_the_named_shards_and_sees_what_is_gone(tmp_path, reads):
    folder = ShardFolder(Store.at(tmp_path / "a"))
    for shard in range(3):
        _commit(folder, shard)
    snapshot = RecordSnapshot()
    before = snapshot.records(folder)
    assert list(before) == [0, 1, 2]
    reads.clear()
    again = _commit(folder, 1, first=5)
    assert snapshot.records(folder)[1] == before[1]
    folder.store.delete(before[2].file)
    snapshot.refresh(Store.at(tmp_path).uri, [1])
    assert snapshot.records(folder) == {0: before[0], 1: again}
    assert sum(reads.values()) == 1
    folder.unlist(0)
    reads.clear()
    snapshot.refresh(folder.store.uri, [])
    assert snapshot.records(folder) == {1: again}
    assert sum(reads.values()) == 0


def test_a_refresh_leaves_other_folders_alone(tmp_path, reads):
    near, far = (ShardFolder(Store.at(tmp_path / name)) for name in ("a", "ab"))
    for folder in (near, far):
        _commit(folder, 0)
    snapshot = RecordSnapshot()
    assert snapshot.records(near)
    assert snapshot.records(far)
    reads.clear()
    snapshot.refresh(near.store.uri)
    assert sum(reads.values()) == 1
