import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.cache.layout.part_stats import STATISTICS
from pipeline.cache.layout.shards import RECORDS, ROW_GROUP_SIZE, ShardFolder
from pipeline.cache.layout.stats import Moments, merge_all
from pipeline.errors import UserError
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
    folder = ShardFolder(Store.at(tmp_path))
    moments = {"patches": Moments.of(torch.randn(10, 4))}
    record = folder.commit(0, _table(), moments)
    (loaded,) = folder.moments([record])
    assert loaded["patches"].count == 10


def _statistics(folder):
    merged = merge_all(folder.moments(folder.records().values()))["patches"]
    return [merged.count, *merged.mean, *merged.std]


def test_the_statistics_of_all_shards_are_in_one_file_and_those_of_each_go(tmp_path):
    folder = ShardFolder(Store.at(tmp_path))
    drawn = [{"patches": Moments.of(torch.randn(50, 4) + 7)} for _ in range(4)]
    records = {n: folder.commit(n, _table(offset=n), drawn[n]) for n in range(3)}
    before = _statistics(folder)
    own = {record.moments: Path(tmp_path, record.moments).read_bytes() for record in records.values()}

    folder.merge_statistics(records)
    together = Path(tmp_path, STATISTICS).read_bytes()
    assert not [*tmp_path.glob("shard-*.npz")]
    assert folder.records() == records
    assert _statistics(folder) == pytest.approx(before)

    for name, data in own.items():  # a job was killed before it deleted them, or computed the shards again
        Path(tmp_path, name).write_bytes(data)
    assert _statistics(folder) == pytest.approx(before)
    folder.merge_statistics(records)
    assert not [*tmp_path.glob("shard-*.npz")]
    assert Path(tmp_path, STATISTICS).read_bytes() == together


@pytest.mark.parametrize("merged_again", [False, True])
def test_a_shard_that_is_computed_again_otherwise_brings_its_own_statistics(tmp_path, merged_again):
    folder = ShardFolder(Store.at(tmp_path))
    features = [torch.randn(50, 4) + n for n in range(3)]
    folder.merge_statistics(
        {n: folder.commit(n, _table(offset=n), {"patches": Moments.of(features[n])}) for n in range(3)}
    )
    features[1] = torch.randn(50, 4) + 20
    folder.unlist(1)
    folder.commit(1, _table(offset=20), {"patches": Moments.of(features[1])})
    if merged_again:
        folder.merge_statistics(folder.records())
        assert not [*tmp_path.glob("shard-*.npz")]
    (found,) = [merge_all(folder.moments(folder.records().values()))["patches"]]
    due = Moments.of(torch.cat(features))
    assert found.count == 150
    assert abs(found.mean - due.mean).max() < 0.01
    assert abs(found.std - due.std).max() < 0.05


def test_wrong_statistics_of_a_shard_give_way_to_those_that_are_taken_again(tmp_path):
    folder = ShardFolder(Store.at(tmp_path))
    features = [torch.randn(50, 4) + n for n in range(3)]
    wrong = {n: folder.commit(n, _table(offset=n), {"patches": Moments.of(features[n] + 9)}) for n in range(3)}
    folder.merge_statistics(wrong)
    records = {n: folder.commit(n, _table(offset=n), {"patches": Moments.of(features[n])}) for n in range(3)}
    assert records == wrong
    folder.merge_statistics(records)
    (found,) = folder.moments(records.values())
    assert abs(found["patches"].mean - Moments.of(torch.cat(features)).mean).max() < 1e-6


@pytest.mark.parametrize(
    "read", [ShardFolder.merge_statistics, lambda folder, records: folder.moments(records.values())]
)
def test_what_another_job_merges_meanwhile_is_not_taken_from_what_it_has_rounded(tmp_path, monkeypatch, read):
    features = [torch.randn(50, 4) + 7 * n for n in range(3)]
    folder = ShardFolder(Store.at(tmp_path))
    records = {n: folder.commit(n, _table(offset=n), {"patches": Moments.of(features[n])}) for n in range(3)}
    other, part_stats = ShardFolder(Store.at(tmp_path)), ShardFolder.part_stats

    def then_merged(self):
        found = part_stats(self)
        if found is None and self is folder:
            other.merge_statistics(records)
        return found

    monkeypatch.setattr(ShardFolder, "part_stats", then_merged)
    (merged,) = read(folder, records) or folder.moments(records.values())
    due = Moments.of(torch.cat(features))
    assert abs(merged["patches"].mean - due.mean).max() < 1e-6
    assert abs(merged["patches"].std - due.std).max() < 1e-6


def test_lost_and_damaged_statistics_are_named_with_the_remedy(tmp_path):
    folder = ShardFolder(Store.at(tmp_path))
    records = {n: folder.commit(n, _table(offset=n), {"patches": Moments.of(torch.randn(50, 4))}) for n in range(2)}
    folder.merge_statistics(records)
    data = Path(tmp_path, STATISTICS).read_bytes()
    for position in range(0, len(data), 7):
        Path(tmp_path, STATISTICS).write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        try:
            [*folder.moments(records.values())]
        except UserError as error:
            assert "--verify --repair" in str(error)  # noqa: PT017
    Path(tmp_path, STATISTICS).unlink()
    with pytest.raises(UserError, match=rf"{records[0].moments} is damaged .*--verify --repair"):
        [*folder.moments(records.values())]


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
