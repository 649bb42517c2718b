import numpy as np
import pytest
import torch

from pipeline.cache.layout.stats import Moments, MomentSums, dump_moments, load_moments, merge_all


def test_merged_moments_equal_those_of_all_rows_at_once():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 7, 5, generator=generator, dtype=torch.float64) * 3 + 100 for n in (1, 4, 13)]
    merged = merge_all({"patches": Moments.of(part)} for part in parts)["patches"]
    rows = np.concatenate([part.reshape(-1, 5).numpy() for part in parts])
    assert merged.count == 18 * 7
    np.testing.assert_allclose(merged.mean, rows.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(merged.std, rows.std(axis=0), rtol=1e-11)


def test_sums_over_batches_are_the_moments_of_all_vectors_also_where_the_first_batch_lies_apart():
    generator, sums, squares = torch.Generator().manual_seed(0), MomentSums(outer=True), MomentSums()
    parts = [torch.randn(n, 7, 5, generator=generator) + far for n, far in ((1, 0), (4, 100), (13, 101))]
    for part in parts:
        sums.add(part)
        squares.add(part)
    rows = np.concatenate([part.reshape(-1, 5).double().numpy() for part in parts])
    found, deviations = sums.moments(), rows - rows.mean(axis=0)
    assert found.count == 18 * 7
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.scatter, deviations.T @ deviations, rtol=1e-11)
    np.testing.assert_allclose(squares.moments().scatter, (deviations**2).sum(axis=0), rtol=1e-11)
    np.testing.assert_allclose(squares.moments().std, rows.std(axis=0), rtol=1e-11)


def test_vectors_that_wait_do_not_hold_the_tensor_that_they_are_a_part_of():
    sums, tokens = MomentSums(outer=True), torch.randn(2, 257, 384)
    sums.add(tokens[:, 0])
    (waiting,) = sums.pending
    assert waiting.untyped_storage().nbytes() == 2 * 384 * 4
    assert sums.moments().count == 2


@pytest.mark.parametrize("outer", [False, True])
def test_merge_in_any_order_agrees_to_float64_accuracy(outer):
    parts = [{"patches": Moments.of(torch.randn(9, 4) * 10**power, outer)} for power in range(4)]
    forward, backward = (merge_all(order)["patches"] for order in (parts, parts[::-1]))
    np.testing.assert_allclose(forward.scatter, backward.scatter, rtol=1e-13)


def test_large_mean_does_not_cancel_the_variance():
    rows = torch.tensor([[1e4 + 0.25], [1e4 - 0.25]], dtype=torch.float32)
    merged = Moments.of(rows[:1]).merge(Moments.of(rows[1:]))
    np.testing.assert_allclose(merged.std, [0.25], rtol=1e-6)


def test_moments_survive_the_file_in_float32():
    moments = {"summary": Moments.of(torch.randn(6, 3)), "patches": Moments.of(torch.randn(6, 2, 2, 4) * 1e25)}
    loaded = load_moments(dump_moments(moments))
    assert loaded.keys() == moments.keys()
    for kind, expected in moments.items():
        assert loaded[kind].count == expected.count
        np.testing.assert_allclose(loaded[kind].mean, expected.mean, rtol=1e-7)
        np.testing.assert_allclose(loaded[kind].std, expected.std, rtol=1e-7)


def test_shards_merge_from_their_files_as_exactly_as_their_features_are_known():
    """An offset of a thousand deviations, in 50 shards; against all vectors at once in float64."""
    rows = torch.randn(50, 64, 8, generator=torch.Generator().manual_seed(0)) + 1000
    merged = merge_all(load_moments(dump_moments({"patches": Moments.of(part)})) for part in rows)["patches"]
    expected = rows.double().flatten(0, 1).numpy()
    np.testing.assert_allclose(merged.mean, expected.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(merged.std, expected.std(axis=0), rtol=1e-6)


def test_statistics_take_eight_bytes_a_channel():
    moments = {kind: Moments.of(torch.randn(4, 1280)) for kind in ("summary", "patches")}
    assert len(dump_moments(moments)) < 2 * 8 * 1280 + 3000
