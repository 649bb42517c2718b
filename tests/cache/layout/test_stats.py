import numpy as np
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
    generator, sums = torch.Generator().manual_seed(0), MomentSums()
    parts = [torch.randn(n, 7, 5, generator=generator) + far for n, far in ((1, 0), (4, 100), (13, 101))]
    for part in parts:
        sums.add(part)
    rows = np.concatenate([part.reshape(-1, 5).double().numpy() for part in parts])
    found, deviations = sums.moments(), rows - rows.mean(axis=0)
    assert found.count == 18 * 7
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.scatter, deviations.T @ deviations, rtol=1e-11)


def test_vectors_that_wait_do_not_hold_the_tensor_that_they_are_a_part_of():
    sums, tokens = MomentSums(), torch.randn(2, 257, 384)
    sums.add(tokens[:, 0])
    (waiting,) = sums.pending
    assert waiting.untyped_storage().nbytes() == 2 * 384 * 4
    assert sums.moments().count == 2


def test_merge_in_any_order_agrees_to_float64_accuracy():
    parts = [{"patches": Moments.of(torch.randn(9, 4) * 10**power)} for power in range(4)]
    forward, backward = (merge_all(order)["patches"] for order in (parts, parts[::-1]))
    np.testing.assert_allclose(forward.scatter, backward.scatter, rtol=1e-13)


def test_large_mean_does_not_cancel_the_variance():
    rows = torch.tensor([[1e4 + 0.25], [1e4 - 0.25]], dtype=torch.float32)
    merged = Moments.of(rows[:1]).merge(Moments.of(rows[1:]))
    np.testing.assert_allclose(merged.std, [0.25], rtol=1e-6)


def test_moments_survive_the_file():
    moments = {"summary": Moments.of(torch.randn(6, 3)), "patches": Moments.of(torch.randn(6, 2, 2, 4))}
    loaded = load_moments(dump_moments(moments))
    assert loaded.keys() == moments.keys()
    for kind, expected in moments.items():
        assert loaded[kind].count == expected.count
        np.testing.assert_array_equal(loaded[kind].mean, expected.mean)
        np.testing.assert_array_equal(loaded[kind].scatter, expected.scatter)
