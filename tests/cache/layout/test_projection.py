"""What a projection keeps of the standardised features, against the definition in float64 (`test_target.by_definition`)."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.cache.layout.codec import Codec, FeatureCodec, Projection
from pipeline.cache.layout.projection import MARGIN, dump_projections, fit_projections, load_projections
from pipeline.errors import UserError
from tests.cache.layout.drawn import decaying, low_rank
from tests.cache.layout.test_target import by_definition


def fit(name, patches):
    return fit_projections(Codec.parse(name), {"patches": patches})["patches"]


def stored(name, projection, patches):
    """Decoded patches, and their bytes in the codec."""
    codec = Codec.parse(name)
    feature_codec = FeatureCodec(codec.scalar, tuple(patches.shape[1:]), projection, codec.zstd)
    rows = feature_codec.encode(patches)
    size = pa.compress(rows.tobytes(), "zstd").size if codec.zstd else rows.nbytes
    return feature_codec.decode(torch.from_numpy(rows)), size


def massive(patches):
    patches = patches.clone()
    patches[..., 3] *= 1000
    patches[..., 5] += 500
    return patches


def constant(patches):
    patches = patches.clone()
    patches[..., 2] = 500.0
    return torch.cat([patches, torch.zeros_like(patches[..., :4])], dim=-1)


def sparse(patches):
    return torch.relu(patches - patches.mean(dim=(0, 1, 2)) - 0.5 * patches.std(dim=(0, 1, 2)))


FEATURES = {
    "as they are": lambda x: x,
    "an offset of 500 in one channel and a massive one": massive,
    "constant channels": constant,
    "after a ReLU": sparse,
    "tiny": lambda x: x * 1e-9,
    "very tiny": lambda x: x * 1e-30,
    "huge": lambda x: x * 1e20,
    "a common offset": lambda x: x + 1e4,
    "white noise": torch.randn_like,
}


@pytest.mark.parametrize("case", FEATURES)
@pytest.mark.parametrize("name", ["pca-int8-zstd", "pca-int8", "pca-float16"])
def test_the_chosen_form_keeps_the_standardised_features_of_other_images(name, case):
    change = FEATURES[case]
    projection = fit(name, change(decaying(seed=0)))
    fresh = change(decaying(seed=1))
    kept, _ = stored(name, projection, fresh)
    varies = fresh.double().flatten(0, -2).std(dim=0).numpy() > 0
    cosines, _, _ = by_definition(fresh[..., varies], kept[..., varies])
    assert cosines.mean() >= 0.99
    assert np.percentile(cosines, 1) >= 0.95
    assert torch.allclose(kept[..., ~varies], fresh[..., ~varies], rtol=1e-6)


def test_the_components_are_the_fewest_that_keep_the_target():
    patches = low_rank(rank=20, noise=0.3)
    projection, fresh = fit("pca-int8", patches), low_rank(rank=20, noise=0.3, seed=5)
    chosen = len(projection.components)
    assert chosen % 8 == 0

    def cosine(components):
        part = replace(projection, components=projection.components[:components])
        return by_definition(fresh, stored("pca-int8", part, fresh)[0])[0].mean()

    assert cosine(chosen) >= 0.99
    assert cosine(chosen - 8) < 0.992


def test_principal_components_of_raw_features_lose_what_is_trained_on():
    """The reason to standardise: with as many components, the raw cosine is as good and the target is lost."""
    patches, fresh = massive(decaying(seed=0)), massive(decaying(seed=1))
    projection = fit("pca8-int8", patches)
    tokens = patches.double().flatten(0, -2)
    mean = tokens.mean(dim=0)
    vectors = torch.linalg.eigh((tokens - mean).T @ (tokens - mean)).eigenvectors.flip(1)[:, :8]
    raw = Projection(mean.float(), torch.ones(64), vectors.T.float().contiguous())
    before, now = (by_definition(fresh, stored("pca8-int8", part, fresh)[0])[0].mean() for part in (raw, projection))
    assert torch.nn.functional.cosine_similarity(fresh, stored("pca8-int8", raw, fresh)[0], dim=-1).mean() > 0.99
    assert before < now - 0.05


def test_a_coarser_step_saves_space_where_zstd_compresses():
    patches = decaying(seed=0)
    projection = fit("pca-int8-zstd", patches)
    assert projection.step > 0
    fine = fit("pca-int8", patches)
    assert fine.step == 0
    sizes = [stored("pca-int8-zstd", part, decaying(seed=1))[1] for part in (projection, fine)]
    assert sizes[0] < 0.8 * sizes[1]


def test_components_are_orthonormal_and_find_the_plane():
    patches = low_rank(noise=0)
    projection = fit("pca6-float32", patches)
    torch.testing.assert_close(projection.components @ projection.components.T, torch.eye(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(stored("pca6-float32", projection, patches)[0], patches, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["pca-int8", "pca-int8-zstd"])
def test_features_without_structure_are_not_projected(name):
    assert fit(name, torch.randn(60, 2, 2, 12)).components is None


def test_sparse_features_are_left_to_zstd_with_their_zeros():
    patches = torch.relu(low_rank(noise=0) - 6)
    assert fit("pca-int8", patches).components is not None
    projection = fit("pca-int8-zstd", patches)
    assert projection.components is None
    assert torch.equal(
        stored("pca-int8-zstd", projection, patches)[0][patches == 0], torch.zeros(int((patches == 0).sum()))
    )


def test_summaries_are_standardised_and_not_projected():
    codec, drawn = Codec.parse("pca6-int8"), torch.randn(300, 48, generator=torch.Generator().manual_seed(0))
    drawn[:, 0] += 500
    fitted = fit_projections(codec, {"summary": drawn, "patches": low_rank()})
    codecs = codec.build({"summary": (48,), "patches": (4, 4, 48)}, fitted)
    assert codecs["summary"].row_bytes == 48 + 2
    assert codecs["patches"].row_bytes == 16 * (6 + 2)
    kept = codecs["summary"].decode(torch.from_numpy(codecs["summary"].encode(drawn)))
    assert by_definition(drawn, kept)[0].min() > 0.999


def test_more_components_than_channels_are_refused():
    with pytest.raises(UserError, match="pca64: the patches have 48 channels"):
        fit("pca64-int8", low_rank())


def test_what_no_form_keeps_is_refused(monkeypatch):
    monkeypatch.setattr("pipeline.cache.layout.target.TARGET_COSINE", 0.9999999)
    with pytest.raises(UserError, match=r"int8 cannot keep a mean cosine of .* set cache.codec=float16"):
        fit("pca-int8", decaying())


@pytest.mark.parametrize("kinds", [("patches",), ("patches", "summary")])
@pytest.mark.parametrize(("name", "loss"), [("pca6-int8", 1 / 254), ("pca6-float16", 2**-11), ("pca6-float32", 2**-11)])
def test_projections_survive_their_file(kinds, name, loss):
    drawn, codec = {"patches": low_rank(), "summary": torch.randn(40, 48)}, Codec.parse(name)
    fitted = fit_projections(codec, {kind: drawn[kind] for kind in kinds})
    loaded = load_projections(dump_projections(codec, fitted))
    assert loaded.keys() == set(kinds)
    for kind, part in fitted.items():
        assert torch.equal(loaded[kind].mean, part.mean)
        assert torch.equal(loaded[kind].scale, part.scale)
        assert loaded[kind].step == part.step
    kept, components = loaded["patches"].components, fitted["patches"].components
    assert torch.all((kept - components).abs() <= loss * components.abs().amax(dim=1, keepdim=True) * 1.001 + 1e-7)


def test_components_take_a_byte_a_value_where_features_do():
    patches = torch.randn(64, 8, 8, 128)
    size = {
        name: len(dump_projections(Codec.parse(name), fit_projections(Codec.parse(name), {"patches": patches})))
        for name in ("pca128-int8", "pca128-float16")
    }
    assert size["pca128-int8"] <= 128 * (128 + 4 + 8) + 2000
    assert size["pca128-int8"] < 0.6 * size["pca128-float16"]


def test_components_of_eight_bits_cost_the_standardised_features_less_than_a_tenth_of_the_margin():
    codec, patches = Codec.parse("pca-int8"), decaying(seed=0)
    fitted = fit_projections(codec, {"patches": patches})
    loaded = load_projections(dump_projections(codec, fitted))
    fresh = decaying(seed=1)
    cosines = [
        by_definition(fresh, stored("pca-int8", projection["patches"], fresh)[0])[0].mean()
        for projection in (fitted, loaded)
    ]
    assert fitted["patches"].components is not None
    assert cosines[0] - cosines[1] < MARGIN / 10
