import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache.layout.shards import RECORDS, ROW_GROUP_SIZE, ShardFolder
from pipeline.cache.layout.stats import Moments
from pipeline.storage.store import Store


def _table(count=150, offset=0):
    return pa.table({"key": [f"s{i + offset}" for i in range(count)], "value": list(range(count))})


def test_a_committed_shard_is_listed_with_its_hash_and_reads_back(tmp_path):
    import hashlib

    folder = ShardFolder(Store.at(tmp_path))
    record = folder.commit(3, _table(), facts={"seconds": 1.5})
    assert folder.records() == {3: record}
    assert folder.record(3) == record
    data = Path(tmp_path, record.file).read_bytes()
    assert record.sha256 == hashlib.sha256(data).hexdigest()
    assert record.file == f"shard-00003-{record.sha256[:8]}.parquet"
    assert folder.read(record).equals(_table())
    assert pq.ParquetFile(tmp_path / record.file).metadata.row_group(0).num_rows == ROW_GROUP_SIZE


def test_a_file_without_a_record_is_not_listed(tmp_path):
    folder = ShardFolder(Store.at(tmp_path))
    folder.commit(0, _table())
    Path(tmp_path, "shard-00000.json").unlink()
    assert folder.records() == {}
    assert folder.record(0) is None


def test_a_truncated_or_missing_file_is_said_and_not_listed(tmp_path, caplog):
    folder = ShardFolder(Store.at(tmp_path))
    short, gone, good = (folder.commit(number, _table(offset=number)) for number in range(3))
    path = Path(tmp_path, short.file)
    path.write_bytes(path.read_bytes()[:-1])
    Path(tmp_path, gone.file).unlink()
    with caplog.at_level(logging.WARNING):
        assert folder.records() == {2: good}
    assert f"{short.file} has {short.bytes - 1} bytes, its record says {short.bytes}" in caplog.text
    assert f"{gone.file} is missing" in caplog.text
    assert folder.record(0) is None


def test_two_writers_of_one_shard_leave_one_whole_record(tmp_path):
    first, second = ShardFolder(Store.at(tmp_path)), ShardFolder(Store.at(tmp_path))
    first.commit(0, _table())
    record = second.commit(0, _table(offset=1))
    assert first.records() == {0: record}
    assert first.read(record)["key"][0].as_py() == "s1"


def test_the_same_rows_give_the_same_bytes(tmp_path):
    one = ShardFolder(Store.at(tmp_path / "a")).commit(0, _table())
    two = ShardFolder(Store.at(tmp_path / "b")).commit(0, _table())
    assert one.sha256 == two.sha256


def test_moments_are_committed_with_the_shard(tmp_path):
    import torch

    folder = ShardFolder(Store.at(tmp_path))
    moments = {"patches": Moments.of(torch.randn(10, 4))}
    record = folder.commit(0, _table(), moments)
    (loaded,) = folder.moments([record])
    assert loaded["patches"].count == 10


def test_the_records_of_all_shards_are_read_from_one_file_as_long_as_it_says_the_truth(tmp_path, monkeypatch):
    folder = ShardFolder(Store.at(tmp_path))
    records = {number: folder.commit(number, _table(offset=number)) for number in range(3)}
    folder.write_together(records)
    with monkeypatch.context() as patch:
        patch.setattr(ShardFolder, "read_record", lambda *_: pytest.fail("one record was read"))
        assert folder.records() == records
    again = folder.commit(1, _table(offset=9))
    assert folder.records() == {**records, 1: again}
    Path(tmp_path, records[1].file).unlink()
    folder.write_together(folder.records())
    Path(tmp_path, "shard-00002.json").unlink()  # as a message may advise
    assert folder.records() == {0: records[0], 1: again}
    Path(tmp_path, RECORDS).write_text("damaged")
    assert folder.records() == {0: records[0], 1: again}
