import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.cache.layout.codec import (
    MARGIN,
    TARGET_COSINE,
    Codec,
    FeatureCodec,
    Projection,
    dump_projection,
    fidelity,
    fit_projection,
    load_projection,
)
from pipeline.errors import UserError


def low_rank(images=40, grid=4, dim=48, rank=6, noise=0.02, seed=0):
    """Patches [N, h, w, D] near a plane of `rank` dimensions, off the origin."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(rank, dim, generator=torch.Generator().manual_seed(99))
    values = torch.randn(images, grid, grid, rank, generator=generator) @ plane
    return values + noise * torch.randn(images, grid, grid, dim, generator=generator) + 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("float16", Codec("float16")),
        ("int8-zstd", Codec("int8", zstd=True)),
        ("pca-int8", Codec("int8", pca=True)),
        ("pca192-bfloat16-zstd", Codec("bfloat16", pca=True, components=192, zstd=True)),
    ],
)
def test_names_are_taken_apart(name, expected):
    assert Codec.parse(name) == expected


@pytest.mark.parametrize("name", ["", "int4", "pca0-int8", "pca-", "int8-pca4", "float16-zip", "pca 8-int8"])
def test_a_name_outside_the_grammar_is_refused_with_what_there_is(name):
    with pytest.raises(UserError, match=r"there are float32, float16, bfloat16 and int8.*as in pca128-int8-zstd"):
        Codec.parse(name)


@pytest.mark.parametrize(
    ("scalar", "bytes_per_value", "tolerance"),
    [("float32", 4, 0.0), ("float16", 2, 2**-10), ("bfloat16", 2, 2**-8), ("int8", 1, 0.51 / 127)],
)
@pytest.mark.parametrize("shape", [(12,), (3, 5, 12)])
@pytest.mark.parametrize("by_channel", [False, True])
def test_a_round_trip_keeps_values_to_the_precision_of_the_format(
    scalar, bytes_per_value, tolerance, shape, by_channel
):
    features = torch.randn(7, *shape, generator=torch.Generator().manual_seed(1)) * 10
    feature_codec = FeatureCodec(scalar, shape, by_channel=by_channel)
    rows = feature_codec.encode(features)
    scales = 2 * features[0, ..., 0].numel() if scalar == "int8" else 0
    assert rows.dtype == np.uint8
    assert rows.shape == (7, feature_codec.row_bytes) == (7, features[0].numel() * bytes_per_value + scales)
    decoded = feature_codec.decode(torch.from_numpy(rows))
    assert decoded.dtype == torch.float32
    largest = features.abs().amax(dim=-1, keepdim=True)
    assert ((decoded - features).abs() <= tolerance * largest).all()


@pytest.mark.parametrize("codec", ["float32", "float16-zstd", "int8", "int8-zstd", "pca6-int8-zstd"])
def test_tokens_are_decoded_alone_as_they_are_among_all(codec):
    patches, places = low_rank(), torch.tensor([5, 0, 15, 5])
    parsed = Codec.parse(codec)
    feature_codec = parsed.build({"patches": (4, 4, 48)}, fit_projection(parsed, patches) if parsed.pca else None)[
        "patches"
    ]
    rows = torch.from_numpy(feature_codec.encode(patches))
    torch.testing.assert_close(feature_codec.decode(rows, places), feature_codec.decode(rows).flatten(1, 2)[:, places])


def test_compressed_rows_hold_the_same_values_in_an_order_that_compresses():
    features = torch.randn(16, 7, 7, 64, generator=torch.Generator().manual_seed(3))
    features *= torch.rand(16, 1, 1, 64, generator=torch.Generator().manual_seed(4)) > 0.8
    plain, ordered = (
        Codec.parse(name).build({"patches": (7, 7, 64)}, None)["patches"] for name in ("int8", "int8-zstd")
    )
    rows = [feature_codec.encode(features) for feature_codec in (plain, ordered)]
    decoded = [
        feature_codec.decode(torch.from_numpy(row)) for feature_codec, row in zip((plain, ordered), rows, strict=True)
    ]
    assert torch.equal(*decoded)
    sizes = [pa.compress(row.tobytes(), "zstd").size for row in rows]
    assert sizes[1] < 0.9 * sizes[0]


def test_int8_is_scaled_token_by_token():
    features = torch.stack([torch.linspace(-1e-3, 1e-3, 16), torch.linspace(-1e3, 1e3, 16), torch.zeros(16)])[None]
    feature_codec = FeatureCodec("int8", (3, 16))
    decoded = feature_codec.decode(torch.from_numpy(feature_codec.encode(features)))
    torch.testing.assert_close(decoded[0, :2], features[0, :2], rtol=0, atol=1e3)
    assert ((decoded - features).abs().amax(-1) <= features.abs().amax(-1) / 127).all()
    assert torch.equal(decoded[0, 2], torch.zeros(16))


def test_int8_takes_a_quarter_of_float32_and_keeps_a_cosine_of_999():
    features = torch.randn(32, 4, 4, 768)
    feature_codec = FeatureCodec("int8", (4, 4, 768))
    assert FeatureCodec("float32", (4, 4, 768)).row_bytes / feature_codec.row_bytes > 3.9
    assert feature_codec.fidelity(features, feature_codec.encode(features))["cosine"] > 0.999


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e-3, 1.0, 1e3, 2e6])
def test_int8_never_overflows_whatever_the_scale(size):
    features = torch.randn(50, 4, 64, generator=torch.Generator().manual_seed(2)).clamp(-3, 3) * size
    feature_codec = FeatureCodec("int8", (4, 64))
    decoded = feature_codec.decode(torch.from_numpy(feature_codec.encode(features)))
    step = features.abs().amax(dim=-1, keepdim=True) / 127 * 1.001 + 6e-8
    assert ((decoded - features).abs() <= step / 2 * 1.001).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scalar", ["float16", "int8"])
def test_features_that_are_not_finite_are_refused(scalar, value):
    features = torch.randn(2, 4)
    features[1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        FeatureCodec(scalar, (4,)).encode(features)


def test_features_beyond_half_precision_are_refused_with_their_size():
    with pytest.raises(ValueError, match=r"1e\+05, too large for the codec float16"):
        FeatureCodec("float16", (2,)).encode(torch.tensor([[1e5, 1.0]]))
    with pytest.raises(ValueError, match=r"1e\+07, too large for the codec int8"):
        FeatureCodec("int8", (2,)).encode(torch.tensor([[1e7, 1.0]]))


def test_a_projection_is_orthonormal_and_finds_the_plane():
    patches = low_rank(noise=0)
    projection = fit_projection(Codec.parse("pca6-float32"), patches)
    torch.testing.assert_close(projection.basis @ projection.basis.T, torch.eye(6), atol=1e-6, rtol=0)
    feature_codec = FeatureCodec("float32", (4, 4, 48), projection)
    torch.testing.assert_close(
        feature_codec.decode(torch.from_numpy(feature_codec.encode(patches))), patches, atol=1e-4, rtol=0
    )
    assert feature_codec.row_bytes == 16 * 6 * 4


def test_the_fitted_number_of_components_is_the_smallest_that_reaches_the_target_on_other_images():
    codec = Codec.parse("pca-int8")
    patches = low_rank(rank=20, noise=0.3)
    projection = fit_projection(codec, patches)
    fresh = low_rank(rank=20, noise=0.3, seed=5)

    def cosine(components):
        kept = Projection(projection.mean, projection.basis[:components])
        feature_codec = FeatureCodec("int8", (4, 4, 48), kept)
        return feature_codec.fidelity(fresh, feature_codec.encode(fresh))["cosine"]

    chosen = len(projection.basis)
    assert chosen % 8 == 0
    assert cosine(chosen) >= TARGET_COSINE
    assert cosine(chosen - 8) < TARGET_COSINE + MARGIN


@pytest.mark.parametrize("name", ["pca-int8", "pca-int8-zstd"])
def test_features_without_structure_are_not_projected(name):
    assert fit_projection(Codec.parse(name), torch.randn(60, 2, 2, 12)) is None


def test_sparse_features_are_left_to_zstd():
    patches = torch.relu(low_rank(noise=0) - 6)
    assert fit_projection(Codec.parse("pca-int8"), patches) is not None
    assert fit_projection(Codec.parse("pca-int8-zstd"), patches) is None


def test_only_patches_are_projected():
    codec = Codec.parse("pca6-int8")
    feature_codec = codec.build({"summary": (48,), "patches": (4, 4, 48)}, fit_projection(codec, low_rank()))
    assert feature_codec["summary"].row_bytes == 48 + 2
    assert feature_codec["patches"].row_bytes == 16 * (6 + 2)


def test_more_components_than_channels_are_refused():
    with pytest.raises(UserError, match="pca64: the patches have 48 channels"):
        fit_projection(Codec.parse("pca64-int8"), low_rank())


def test_a_projection_survives_its_file():
    projection = fit_projection(Codec.parse("pca6-int8"), low_rank())
    loaded = load_projection(dump_projection(projection))
    assert torch.equal(loaded.mean, projection.mean)
    assert torch.equal(loaded.basis, projection.basis)
    assert load_projection(dump_projection(None)) is None


def test_zero_tokens_have_no_cosine_but_an_error():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    figures = fidelity(features, torch.tensor([[0.0, 5.0], [3.0, 4.0]]))
    assert figures["cosine"] == pytest.approx(1)
    assert figures["relative_error"] == pytest.approx(1)


def test_fidelity_reports_mean_worst_percentile_and_error():
    features = torch.ones(200, 2)
    kept = features.clone()
    kept[0] = torch.tensor([1.0, -1.0])
    figures = fidelity(features, kept)
    assert figures["cosine"] == pytest.approx(1 - 1 / 200)
    assert figures["cosine_p1"] == pytest.approx(1.0, abs=0.02)
    assert figures["relative_error"] == pytest.approx((4 / 400) ** 0.5)
