import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.cache.layout.codec import Codec, FeatureCodec
from pipeline.cache.layout.projection import fit_projections
from pipeline.errors import UserError
from tests.cache.layout.drawn import low_rank


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
    fitted = fit_projections(parsed, {"patches": patches}) if parsed.pca else {}
    feature_codec = parsed.build({"patches": (4, 4, 48)}, fitted)["patches"]
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
    kept = feature_codec.decode(torch.from_numpy(feature_codec.encode(features)))
    assert torch.nn.functional.cosine_similarity(features, kept, dim=-1).mean() > 0.999


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
