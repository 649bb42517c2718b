import numpy as np
import pytest
import torch

from pipeline.cache.layout.target import fidelity, inverse_deviations, keeps_target
from tests.cache.layout.drawn import decaying


def by_definition(features, kept):
    """Cosines in float64 of (x - mean) / deviation, by channel over all vectors, and of their decoded values."""
    x, y = (part.reshape(-1, part.shape[-1]).double().numpy() for part in (features, kept))
    mean, std = x.mean(axis=0), x.std(axis=0)
    x, y = (x - mean) / std, (y - mean) / std
    return (x * y).sum(axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1), mean, std


def test_fidelity_is_that_of_the_standardised_centred_vectors():
    features = decaying()
    kept = features + 0.1 * torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    cosines, mean, std = by_definition(features, kept)
    found = fidelity(features, kept, torch.from_numpy(mean), torch.from_numpy(std))
    assert found["target_cosine"] == pytest.approx(cosines.mean(), abs=1e-6)
    assert found["target_cosine_p1"] == pytest.approx(np.percentile(cosines, 1), abs=1e-6)
    assert found["relative_error"] == pytest.approx(float((kept - features).norm() / features.norm()), rel=1e-5)


def test_a_common_offset_hides_nothing():
    """What the raw cosine calls perfect has lost everything."""
    features = decaying() + 500
    lost = features.mean(dim=(0, 1, 2)).expand_as(features) + 0.01 * torch.randn(features.shape)
    raw = torch.nn.functional.cosine_similarity(features, lost, dim=-1).mean()
    cosines, mean, std = by_definition(features, lost)
    found = fidelity(features, lost, torch.from_numpy(mean), torch.from_numpy(std))
    assert raw > 0.999
    assert found["target_cosine"] == pytest.approx(cosines.mean(), abs=1e-4)
    assert abs(found["target_cosine"]) < 0.1
    assert not keeps_target(found)


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 1e9, 1e30])
def test_the_scale_of_the_features_cancels(scale):
    features = decaying(images=20)
    kept = features + 0.3 * torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    expected, _, _ = by_definition(features, kept)
    flat = features.double().flatten(0, -2)
    mean, std = flat.mean(dim=0) * scale, flat.std(dim=0, correction=0) * scale
    found = fidelity(features * scale, kept * scale, mean, std)
    assert found["target_cosine"] == pytest.approx(expected.mean(), abs=1e-4)


def test_constant_channels_count_nothing_and_massive_ones_silence_no_other():
    mean = torch.tensor([0.0, 1.0, 500.0, 7.0, 3.0], dtype=torch.float64)
    std = torch.tensor([1.0, 0.5, 3e-5, 0.0, 1e8], dtype=torch.float64)  # the third: rounding errors of 500 in float32
    torch.testing.assert_close(
        inverse_deviations(mean, std), torch.tensor([1.0, 2.0, 0.0, 0.0, 1e-8], dtype=torch.float64)
    )


def test_vectors_without_direction_have_no_cosine():
    features = torch.full((40, 3), 2.0)
    found = fidelity(features, features + 1, torch.full((3,), 2.0), torch.zeros(3))
    assert found == {"relative_error": pytest.approx(0.5)}
    assert keeps_target(found)
