import numpy as np
import pytest

from pipeline.cache.read.reader import CacheReader
from pipeline.cache.read.scan import scan_images


def _reader(filled, **changes):
    settings = {"image_size": 32, "batch_size": 16, "seed": 0, "window": 64, **changes}
    return CacheReader(filled.train, filled.plan.teachers, **settings)


def test_the_seed_determines_the_order(filled):
    orders = [[b.keys for b in _reader(filled, seed=seed).batches(0)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_shuffle_quality_grows_with_the_window(filled):
    narrow, wide = (_reader(filled, window=window).shuffle_quality() for window in (1, 1024))
    # A window of one row group: a batch of 16 is from one of 64, 36 or 50 rows, or lies across two.
    assert narrow.same_group > 0.75
    assert wide.same_group == pytest.approx(wide.same_group_full, abs=0.05)
    assert wide.same_group_full == narrow.same_group_full
    assert wide.same_group_full == pytest.approx((64 * 63 + 36 * 35 + 50 * 49) / (150 * 149))


def test_rank_correlation_matches_the_keys_as_read(filled):
    reader = _reader(filled, batch_size=2, window=1)
    stored = [key for batch in scan_images(filled.train, 16, 50) for key in batch.keys]
    read = [stored.index(key) for batch in reader.batches(4) for key in batch.keys]
    # In a batch the keys are grouped, so that it is no more than near.
    expected = np.corrcoef(read, np.arange(150))[0, 1]
    assert reader.shuffle_quality(4).rank_correlation == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_split_an_epoch_into_equal_steps_without_overlap(filled, world):
    readers = [_reader(filled, batch_size=4, rank=rank, world=world) for rank in range(world)]
    assert len({reader.steps(0) for reader in readers}) == 1
    keys = [key for reader in readers for batch in reader.batches(0) for key in batch.keys]
    assert len(keys) == len(set(keys)) == readers[0].steps(0) * 4 * world
