import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile

from pipeline.imaging import decode
from pipeline.imaging.crop import crop_and_resize
from pipeline.imaging.decode import decode_image, decode_pixels, image_size, to_rgb
from pipeline.imaging.geometry import View
from tests.imaging.pictures import encode, photo

DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.parametrize("kind", decode.FORMATS)
def test_truncated_files_are_never_accepted(kind: str) -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encode(image, kind)
    decode_image(data)
    for share in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(ValueError, match=r"."):
            decode_image(data[: int(len(data) * share)])


def test_every_ending_of_a_decoded_format_is_listed_and_no_other() -> None:
    Image.init()
    registered = {ending for ending, kind in Image.registered_extensions().items() if kind in decode.FORMATS}
    assert registered - {*decode.IMAGE_EXTENSIONS} == {".pfm"}  # floating point, which is always refused
    assert {*decode.IMAGE_EXTENSIONS} - registered == set()


def _turned(kind: str, orientation: int, **options: object) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encode(photo(), kind, exif=exif, **options)


UPRIGHT = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels[::-1].transpose(1, 0, 2),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: pixels[:, ::-1].transpose(1, 0, 2),
}
"""What the orientations of the Exif standard say: where the stored first row and column belong."""


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 100, "subsampling": 0}, 6),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 6),
    ],
)
def test_size_and_pixels_of_every_format_are_turned_once(kind, options, tolerance, orientation) -> None:
    stored = np.asarray(photo())[:40]  # 64 x 40 pixels
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(Image.fromarray(stored), kind, exif=exif, **options)
    expected = UPRIGHT[orientation](stored)
    assert image_size(data) == expected.shape[1::-1]
    assert decode_image(data).size == expected.shape[1::-1]
    assert np.abs(decode_pixels(data).astype(int) - expected).max() <= tolerance


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


def _tiff(values: np.ndarray, bits: int, photometric: int = 1, order: str = "<", sample_format: int = 1) -> bytes:
    """An uncompressed grey TIFF written by hand: `values` [H, W] in their own bytes, or already packed in bytes [H, n]."""
    strip = values.tobytes()
    height, width = values.shape[0], values.shape[1] * values.itemsize * 8 // bits
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1), (278, height)]
    tags += [(279, len(strip)), (339, sample_format)]
    offset = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
        if tag in (258, 259, 262, 277, 339)
        else struct.pack(f"{order}HHII", tag, 4, 1, offset if tag == 273 else value)
        for tag, value in tags
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return head + entries + struct.pack(f"{order}I", 0) + strip


LEVELS = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)


@pytest.mark.parametrize(
    "data",
    [
        encode(Image.fromarray(LEVELS), "PNG"),
        encode(Image.fromarray(LEVELS), "TIFF"),
        encode(Image.fromarray(LEVELS), "TIFF", compression="tiff_lzw"),
        encode(Image.fromarray(LEVELS), "PPM"),
        encode(Image.fromarray(LEVELS), "JPEG2000", irreversible=False),
        _tiff(LEVELS.astype("<u2"), 16),
        _tiff(LEVELS.astype(">u2"), 16, order=">"),
        _tiff((65535 - LEVELS).astype("<u2"), 16, photometric=0),
    ],
    ids=["png", "tiff", "tiff-lzw", "pgm", "jp2", "little", "big", "white-is-zero"],
)
def test_16_bit_grey_keeps_its_upper_byte(data: bytes) -> None:
    assert np.array_equal(np.asarray(decode_image(data))[..., 0], LEVELS // 256)


def test_12_bit_grey_whose_header_says_so_keeps_its_range() -> None:
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    pairs = values.reshape(64, 32, 2)
    packed = np.stack([pairs[..., 0] >> 4, (pairs[..., 0] & 15) << 4 | pairs[..., 1] >> 8, pairs[..., 1] & 255], -1)
    decoded = np.asarray(decode_image(_tiff(packed.reshape(64, 96).astype(np.uint8), 12)))
    assert np.array_equal(decoded[..., 0], values // 16)
    scaled = np.asarray(decode_image(b"P5 64 64 4095\n" + values.astype(">u2").tobytes()))
    assert np.abs(scaled[..., 0] - values / 4095 * 255).max() <= 1


@pytest.mark.parametrize("scale", [16, 17, 1000])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF big-endian"])
def test_16_bit_grey_that_fits_into_12_bits_is_read_as_12_bits(kind: str, scale: int) -> None:
    values = LEVELS // scale
    data = encode(Image.fromarray(values), kind) if " " not in kind else _tiff(values.astype(">u2"), 16, order=">")
    assert np.array_equal(decode_pixels(data)[..., 0], values // 16)


def test_a_value_over_4095_makes_16_bits() -> None:
    values = LEVELS // 16
    values[0, 0] = 4096
    assert np.array_equal(decode_pixels(encode(Image.fromarray(values), "PNG"))[..., 0], values // 256)


def test_formats_that_say_their_depth_are_not_guessed() -> None:
    values = LEVELS // 17
    data = b"P5 64 64 65535\n" + values.astype(">u2").tobytes()
    assert np.array_equal(decode_pixels(data)[..., 0], values // 256)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            encode(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF"),
            "floating-point pixels have no known range",
        ),
        (encode(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF"), "floating-point pixels"),
        (b"Pf 8 8 -1.0\n" + np.full((8, 8), 0.5, "<f4").tobytes(), "floating-point pixels"),
        (encode(Image.fromarray(np.full((8, 8), 200, np.int32)), "TIFF"), "integer pixels of 32 bits.* no known range"),
        (encode(Image.fromarray(np.full((8, 8), 1 << 20, np.int32)), "TIFF"), "no known range"),
        (_tiff(np.full((8, 8), 200, "<u4"), 32), "no known range"),
        (_tiff(np.full((8, 8), -200, "<i2"), 16, sample_format=2), "with a sign"),
    ],
    ids=["float", "nan", "pfm", "int32", "large-int32", "uint32", "int16"],
)
def test_pixels_of_unknown_range_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    for read in (decode_image, decode_pixels):
        with pytest.raises(ValueError, match=reason):
            read(data)


def test_black_of_16_bits_is_black() -> None:
    assert decode_pixels(encode(Image.fromarray(LEVELS * 0), "PNG")).max() == 0


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def _grey(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels[..., None], 3, 2)


def _modes() -> dict[str, tuple[Image.Image, str, np.ndarray]]:
    """By mode: an image, a format that stores it, and its pixels by the mode's definition."""
    rng = np.random.default_rng(0)
    colours, ink = rng.integers(0, 256, (8, 8, 3), np.uint8), rng.integers(0, 256, (8, 8, 4), np.uint8)
    indexed = Image.fromarray(GREY // 4, "P")
    indexed.putpalette(rng.integers(0, 256, 768, np.uint8).tolist())
    table = np.array(indexed.getpalette(), np.uint8).reshape(-1, 3)
    with_alpha = np.dstack([colours, GREY])
    # Pillow's own formula for CMYK without a profile: what neither ink nor black covers.
    uncovered = (255 - ink[..., :3].astype(int)) * (255 - ink[..., 3:].astype(int)) / 255
    return {
        "1": (Image.fromarray(GREY > 100), "PNG", _grey((GREY > 100) * np.uint8(255))),
        "L": (Image.fromarray(GREY), "PNG", _grey(GREY)),
        "LA": (Image.fromarray(np.dstack([GREY, 255 - GREY]), "LA"), "PNG", _grey(GREY)),
        "P": (indexed, "PNG", table[GREY // 4]),
        "PA": (indexed.convert("PA"), "TIFF", table[GREY // 4]),
        "RGB": (Image.fromarray(colours), "TIFF", colours),
        "RGBA": (Image.fromarray(with_alpha), "PNG", colours),
        "RGBX": (Image.fromarray(with_alpha, "RGBX"), "TIFF", colours),
        "CMYK": (Image.fromarray(ink, "CMYK"), "TIFF", uncovered),
        "1-white-is-zero": (Image.fromarray(GREY > 100), "TIFF", _grey((GREY > 100) * np.uint8(255))),
    }


@pytest.mark.filterwarnings("ignore:.*mode.* parameter:DeprecationWarning")
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "1-white-is-zero"])
def test_every_mode_becomes_the_colours_that_it_means(mode: str) -> None:
    image, kind, expected = _modes()[mode]
    decoded = np.asarray(decode_image(encode(image, kind)), int)
    assert decoded.shape == (8, 8, 3)
    assert np.abs(decoded - expected).max() <= 1


def test_ycbcr_becomes_the_colours_of_jfif() -> None:
    y, cb, cr = (np.full((8, 8), value, np.uint8) for value in (120, 90, 160))
    data = encode(Image.merge("YCbCr", [Image.fromarray(plane) for plane in (y, cb, cr)]), "JPEG", quality=100)
    expected = (120 + 1.402 * 32, 120 - 0.344136 * -38 - 0.714136 * 32, 120 + 1.772 * -38)
    assert np.abs(decode_pixels(data)[4, 4] - expected).max() <= 2


def test_lab_becomes_srgb() -> None:
    """L* = 53.6 without colour has (69.6 / 116)^3 = 0.2155 of the white's luminance, which sRGB writes as 128."""
    decoded = decode_pixels(encode(Image.new("LAB", (8, 8), (137, 128, 128)), "TIFF"))
    assert np.abs(decoded.astype(int) - 128).max() <= 2


def test_hue_saturation_and_value_become_colours() -> None:
    image = Image.new("HSV", (2, 2), (85, 255, 200))  # a third of the circle: green
    assert to_rgb(image).getpixel((0, 0)) == (0, 200, 0)


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
