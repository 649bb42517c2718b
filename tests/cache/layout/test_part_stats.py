import numpy as np
import pytest
import torch

from pipeline.cache.layout.part_stats import PartStats, dump_part_stats, load_part_stats
from pipeline.cache.layout.stats import Moments, merge_all


def _shards(count=8, channels=64):
    """Statistics of shards of 50 images with 16 patches, whose channels differ in mean and deviation, and one is constant."""
    generator = torch.Generator().manual_seed(0)
    mean, std = 500 * torch.randn(channels, generator=generator), torch.rand(channels, generator=generator) * 10
    std[3] = 0
    return {
        f"shard-{n:05d}-0123abcd.parquet": {
            "summary": Moments.of(torch.randn(50, channels // 2, generator=generator)),
            "patches": Moments.of(torch.randn(50, 4, 4, channels, generator=generator) * std + mean),
        }
        for n in range(count)
    }


def test_all_shards_together_are_kept_as_exactly_as_features_and_each_to_a_thousandth_of_a_deviation():
    shards = _shards()
    loaded = load_part_stats(dump_part_stats(PartStats.of(shards)))
    due = merge_all(shards.values())
    assert [*loaded.shards] == [*shards]
    for kind, whole in due.items():
        assert loaded.together[kind].count == whole.count
        np.testing.assert_allclose(loaded.together[kind].mean, whole.mean, rtol=1e-7)
        np.testing.assert_allclose(loaded.together[kind].std, whole.std, rtol=1e-7)
        for file, exact in shards.items():
            found = loaded.shards[file][kind]
            assert found.count == exact[kind].count
            rounding = 4e-3 * whole.std + 1e-7 * abs(whole.mean)
            assert np.all(abs(found.mean - exact[kind].mean) <= rounding)
            assert np.all(abs(found.std - exact[kind].std) <= rounding)


def test_a_shard_takes_two_bytes_a_channel():
    few, many = (len(dump_part_stats(PartStats.of(_shards(count, 512)))) for count in (2, 32))
    assert many - few <= 30 * (2 * (512 + 256) + 100)


def test_statistics_of_a_shard_are_told_from_others():
    shards = _shards()
    loaded = load_part_stats(dump_part_stats(PartStats.of(shards)))
    (file, own), other = next(iter(shards.items())), _shards(9)["shard-00008-0123abcd.parquet"]
    assert loaded.says(file, own)
    assert not loaded.says(file, {**own, "patches": Moments.of(torch.randn(50, 4, 4, 64))})
    assert not loaded.says(file, {"patches": own["patches"]})
    assert not loaded.says(file, {**own, "summary": other["patches"]})


@pytest.mark.parametrize("missing", ["files", "patches_together", "patches_about", "summary_shards"])
def test_a_file_that_lacks_a_field_is_refused(missing):
    from pipeline.cache.layout.arrays import dump_arrays, load_arrays

    arrays = load_arrays(dump_part_stats(PartStats.of(_shards(2))))
    del arrays[missing]
    with pytest.raises((ValueError, KeyError)):
        load_part_stats(dump_arrays(arrays))
