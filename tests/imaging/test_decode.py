from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile

from pipeline.imaging import decode
from pipeline.imaging.crop import crop_and_resize
from pipeline.imaging.decode import decode_image, decode_pixels, image_size
from pipeline.imaging.geometry import View
from tests.imaging.pictures import encode, photo

DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_truncated_files_are_never_accepted(kind: str) -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encode(image, kind)
    decode_image(data)
    for share in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(ValueError, match=r"."):
            decode_image(data[: int(len(data) * share)])


def _turned(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encode(photo(), kind, exif=exif)


@pytest.mark.parametrize(
    "data",
    [
        encode(photo(), "JPEG"),
        encode(photo(), "JPEG", progressive=True, subsampling=0),
        encode(photo().convert("L"), "JPEG"),
        encode(photo().convert("CMYK"), "JPEG"),
        encode(photo().convert("RGBA"), "PNG"),
        *(_turned("JPEG", orientation) for orientation in range(1, 9)),
        encode(photo(), "JPEG", xmp=b"http://ns.adobe.com/xap/1.0/\0 tiff:Orientation='6'"),
    ],
)
def test_pixels_equal_those_of_pillow(data: bytes) -> None:
    pixels = decode_pixels(data)
    assert np.array_equal(pixels, np.asarray(decode_image(data)))
    assert pixels.flags.writeable


def test_damaged_files_are_refused_as_pixels_too() -> None:
    data = encode(photo(), "JPEG")
    for share in (0, 0.02, 0.3, 0.6, 0.9):
        with pytest.raises(ValueError, match=r"."):
            decode_pixels(data[: int(len(data) * share)])


@pytest.mark.parametrize(("data", "reason"), [(b"", "empty file"), (b"no image at all", "known format")])
def test_other_data_is_refused_with_a_short_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_image(data)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="64 x 64 pixels is over the 1000 allowed"):
        decode_image(encode(photo(), "PNG"))


@pytest.mark.parametrize(("mode", "kind"), [("L", "JPEG"), ("1", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG")])
def test_every_mode_becomes_rgb_as_pillow_converts_it(mode: str, kind: str) -> None:
    stored = photo().convert(mode)
    decoded = decode_image(encode(stored, kind, **({"quality": 100} if kind == "JPEG" else {})))
    assert decoded.mode == "RGB"
    difference = np.abs(np.asarray(decoded, int) - np.asarray(stored.convert("RGB"), int))
    assert difference.max() <= 2


def test_cmyk_keeps_its_colours() -> None:
    decoded = decode_image(encode(photo().convert("CMYK"), "JPEG", quality=95))
    assert np.abs(np.asarray(decoded, int) - np.asarray(photo(), int)).mean() < 6


def test_transparent_palette_becomes_rgb_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    decoded = decode_image(encode(photo().convert("P"), "PNG", transparency=bytes(range(256))))
    assert decoded.mode == "RGB"
    assert not recwarn.list


def test_16_bit_grey_keeps_its_range() -> None:
    levels = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    decoded = np.asarray(decode_image(encode(Image.fromarray(levels), "PNG")))
    assert np.array_equal(decoded[..., 0], levels >> 8)


def test_pixels_of_unknown_range_are_refused() -> None:
    for levels in (np.full((8, 8), 0.5, np.float32), np.full((8, 8), 1 << 20, np.int32)):
        with pytest.raises(ValueError, match="no known range"):
            decode_image(encode(Image.fromarray(levels), "TIFF"))


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode_image(encode(photo().crop((0, 0, 64, 32)), "PNG", exif=exif))
    assert decoded.size == (32, 64)
    assert np.array_equal(np.asarray(decoded), np.rot90(np.asarray(photo().crop((0, 0, 64, 32))), -1))


@pytest.mark.skipif(not DATA.is_dir(), reason="no real photographs beside the repository")
def test_real_photographs_decode_and_their_truncations_do_not() -> None:
    for path in sorted((DATA / "coco_mini" / "val2017").iterdir())[:15]:
        data = path.read_bytes()
        image = decode_image(data)
        assert crop_and_resize(image, View((0.1, 0.1, 0.9, 0.9)), (224, 224), "bicubic").shape == (3, 224, 224)
        with pytest.raises(ValueError, match="truncated"):
            decode_image(data[: len(data) // 2])


@pytest.mark.parametrize(("orientation", "size"), [(6, (50, 70)), (9, (70, 50))])
def test_the_size_is_that_of_the_upright_image(orientation, size):
    """Pillow turns by the numbers 5 to 8 alone, and cameras write others."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(Image.new("RGB", (70, 50)), "JPEG", exif=exif)
    assert image_size(data) == size
    assert decode_pixels(data).shape[:2] == size[::-1]
