import numpy as np
import pytest
import torch

from pipeline.cache.fill.second_moments import freeze_phi_s
from pipeline.cache.layout.cached_teacher import teacher_stats
from pipeline.cache.layout.codec import Codec, FeatureCodec
from pipeline.cache.layout.phi_s import PhiS
from pipeline.cache.layout.projection import fit_projections
from pipeline.cache.layout.stats import Moments
from pipeline.distill.standardise import MeanStd, Rotation, make_standardisers


@pytest.fixture
def features():
    """Of unlike scale by channel, correlated, and far from 0."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(600, 6)) @ rng.normal(size=(6, 6)) * np.logspace(-1, 1, 6) + 5


def test_mean_std_gives_zero_mean_and_unit_variance_and_silences_dead_channels(features):
    features[:, 3] = 7.0
    out = MeanStd(Moments.of(torch.tensor(features)))(torch.tensor(features, dtype=torch.float32)).numpy()
    expected = (features - features.mean(0)) / np.where(features.std(0) > 0, features.std(0), 1)
    np.testing.assert_allclose(out, expected, atol=1e-4)
    assert not out[:, 3].any()


def test_a_massive_channel_silences_no_other(features):
    features[:, 2] *= 1e8
    out = MeanStd(Moments.of(torch.tensor(features)))(torch.tensor(features)).numpy()
    np.testing.assert_allclose(out, (features - features.mean(0)) / features.std(0), atol=1e-4)


def test_statistics_that_are_loaded_are_those_that_are_used(features):
    given, other = torch.tensor(features, dtype=torch.float32), Moments.of(torch.tensor(features) * 3 + 1)
    standardiser, expected = MeanStd(Moments.of(given)), MeanStd(other)
    standardiser.load_state_dict(expected.state_dict())
    assert torch.equal(standardiser(given), expected(given))
    assert sorted(expected.state_dict()) == ["mean", "std"]


def test_phi_s_rotates_and_scales_to_unit_variance_of_every_channel(features):
    part = PhiS.of(Moments.of(torch.tensor(features), outer=True))
    out = Rotation(part)(torch.tensor(features, dtype=torch.float32)).numpy()
    covariance = np.cov(features.T, bias=True)
    np.testing.assert_allclose(out.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(out.std(0), 1, atol=1e-4)
    # One scale for all: distances keep their ratios, which a division by channel would not.
    distances = np.linalg.norm(features[:50] - features[50:100], axis=1) / np.sqrt(np.trace(covariance) / 6)
    np.testing.assert_allclose(np.linalg.norm(out[:50] - out[50:100], axis=1), distances, rtol=1e-4)


def test_both_can_be_undone(features):
    moments = Moments.of(torch.tensor(features), outer=True)
    given = torch.tensor(features, dtype=torch.float32).view(20, 5, 6, 6)
    for standardiser in (MeanStd(moments), Rotation(PhiS.of(moments))):
        torch.testing.assert_close(standardiser.inverse(standardiser(given)), given, rtol=1e-4, atol=1e-4)


def test_features_that_never_vary_become_nothing_and_come_back():
    constant = torch.full((10, 4), 3.0)
    moments = Moments.of(constant, outer=True)
    for standardiser in (MeanStd(moments), Rotation(PhiS.of(moments))):
        assert torch.equal(standardiser(constant), torch.zeros(10, 4))
        assert torch.equal(standardiser.inverse(torch.zeros(10, 4)), constant)
        assert all(torch.isfinite(value).all() for value in standardiser.state_dict().values())


def test_of_projected_features_the_decoder_standardises(features):
    patches = torch.tensor(features, dtype=torch.float32).view(24, 5, 5, 6)
    codec = Codec.parse("pca4-float32")
    feature_codec = codec.build({"patches": (5, 5, 6)}, fit_projections(codec, {"patches": patches}))["patches"]
    moments, rows = Moments.of(patches, outer=True), torch.from_numpy(feature_codec.encode(patches))
    for standardiser in (MeanStd(moments), Rotation(PhiS.of(moments))):
        folded = standardiser.fold(feature_codec)
        torch.testing.assert_close(folded.decode(rows), standardiser(feature_codec.decode(rows)), rtol=1e-4, atol=1e-4)
        assert standardiser.fold(FeatureCodec("float32", (5, 5, 6))) is None


def test_they_come_frozen_from_the_cache(filled):
    teacher = filled.plan.teachers[0]
    stats = teacher_stats(filled.train, teacher)
    freeze_phi_s(filled.train, teacher)
    for method, kind in (("mean_std", MeanStd), ("phi_s", Rotation)):
        made = make_standardisers(filled.train, teacher, method)
        assert made.keys() == {"summary", "patches"}
        for name, standardiser in made.items():
            assert isinstance(standardiser, kind)
            assert not list(standardiser.parameters())
            torch.testing.assert_close(standardiser.mean, torch.from_numpy(stats[name].mean).float())
