import pytest
import torch

from pipeline.cache.codec import decode, encode, fidelity, row_bytes


def test_float16_round_trip_keeps_shape_and_values_to_half_precision():
    features = torch.randn(5, 4, 4, 8)
    rows = encode("float16", features)
    assert rows.shape == (5, row_bytes("float16", (4, 4, 8)))
    assert rows.dtype.name == "uint8"
    decoded = decode("float16", torch.from_numpy(rows), (4, 4, 8))
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, features.half().float(), rtol=0, atol=0)


def test_fidelity_of_float16_is_a_cosine_near_one():
    assert 0.999999 < fidelity("float16", torch.randn(16, 3, 3, 32)) <= 1.0001


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(value):
    features = torch.randn(2, 4)
    features[1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        encode("float16", features)


def test_features_beyond_half_precision_are_refused_with_their_size():
    with pytest.raises(ValueError, match=r"1e\+05, too large for the codec float16"):
        encode("float16", torch.tensor([[1e5, 1.0]]))


def test_unknown_codec_is_named():
    with pytest.raises(ValueError, match="unknown codec int3"):
        row_bytes("int3", (4,))
