import numpy as np
import pytest
import torch

from pipeline.cache.layout.phi_s import PhiS, dump_phi_s, hadamard, load_phi_s
from pipeline.cache.layout.stats import Moments


def correlated(dim: int, count: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(dim)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) * torch.logspace(0, 2, dim)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing + 5


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 96, 192, 256, 320, 384, 512, 768, 1024, 1280, 1408, 1536])
def test_hadamard_matrices_have_orthogonal_rows_of_ones(size):
    matrix = hadamard(size).astype(np.float32)
    assert set(np.unique(matrix)) <= {-1, 1}
    np.testing.assert_array_equal(matrix @ matrix.T, size * np.eye(size))


@pytest.mark.parametrize("size", [3, 6, 27, 100])
def test_sizes_without_a_construction_are_said_to_have_none(size):
    assert hadamard(size) is None


@pytest.mark.parametrize("dim", [1, 2, 5, 12, 27, 36, 64])
def test_every_channel_has_unit_variance_and_shape_is_kept(dim):
    rows = correlated(dim)
    phi = PhiS.of(Moments.of(rows, outer=True))
    np.testing.assert_allclose(phi.rotation @ phi.rotation.T, np.eye(dim), atol=1e-10)
    y = (rows.numpy() - phi.mean) @ phi.rotation.T / phi.scale
    np.testing.assert_allclose(y.var(axis=0), np.ones(dim), rtol=1e-8)
    distances = (rows[:50] - rows[50:100]).norm(dim=1).numpy()
    np.testing.assert_allclose(np.linalg.norm(y[:50] - y[50:100], axis=1) * phi.scale, distances, rtol=1e-10)


def test_channels_that_never_vary_do_no_harm():
    rows = correlated(12)
    rows[:, 3] = 7
    phi = PhiS.of(Moments.of(rows, outer=True))
    y = (rows.numpy() - phi.mean) @ phi.rotation.T / phi.scale
    np.testing.assert_allclose(y.var(axis=0), np.ones(12), rtol=1e-8)


def test_it_survives_the_file_with_a_float32_rotation():
    phi = PhiS.of(Moments.of(correlated(12), outer=True))
    loaded = load_phi_s(dump_phi_s({"patches": phi}))["patches"]
    assert loaded.scale == phi.scale
    assert loaded.rotation.dtype == np.float32
    np.testing.assert_allclose(loaded.rotation, phi.rotation, atol=1e-7)
