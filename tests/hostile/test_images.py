"""Files that pretend to be images: every one is quarantined with its reason, and the good ones beside them stay."""

import gzip
import io
import json
import os
import pickle
import struct
import zlib

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.cache.fill.digest import Digest, keyed, slices
from pipeline.cache.layout.part import image_key
from pipeline.errors import UserError
from pipeline.sources.base import MAX_BYTES
from pipeline.sources.open import open_source

FORMATS = {
    **{"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "gif": "GIF"},
    **{"avif": "AVIF", "jp2": "JPEG2000", "ppm": "PPM"},
}
MAGIC = {
    "jpg": b"\xff\xd8\xff\xe0",
    "png": b"\x89PNG\r\n\x1a\n",
    "webp": b"RIFF\x10\x27\0\0WEBP",
    "bmp": b"BM",
    "tif": b"II*\0",
    "gif": b"GIF89a",
    "avif": b"\0\0\0\x1cftypavif",
    "jp2": b"\0\0\0\x0cjP  \r\n\x87\n",
    "ppm": b"P6 ",
}


def _encode(rng, kind, side=48):
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def _truncated(rng):
    for ending, kind in FORMATS.items():
        data = _encode(rng, kind)
        for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9):
            yield f"cut-{share}.{ending}", data[: int(len(data) * share)]


def _noise(rng):
    for ending, magic in MAGIC.items():
        for size in (0, 5, 300, 5000):
            yield f"noise-{size}.{ending}", magic + rng.bytes(size)


def _other_kinds(rng, harmful):
    jpeg = _encode(rng, "JPEG")
    contents = {
        "empty": b"",
        "zero": bytes(5000),
        "text": b"not an image\n" * 50,
        "html": b"<!doctype html><html><body>404</body></html>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "gzip": gzip.compress(jpeg),
        "json": json.dumps([1] * 1000).encode(),
        "pickle": pickle.dumps(harmful),
        "elf": b"\x7fELF" + rng.bytes(500),
        "pdf": b"%PDF-1.7\n" + rng.bytes(500),
        # A decoder of Pillow would start Ghostscript on this one.
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(somewhere) deletefile\n%%EOF\n",
        "psd": b"8BPS" + rng.bytes(600),
        "icns": b"icns" + rng.bytes(600),
    }
    return ((f"{name}.jpg", data) for name, data in contents.items())


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width, height, *chunks, depth=8, colour=2):
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + _chunk(b"IEND", b"")


def _bombs(rng):
    zeros = zlib.compress(bytes(64 << 20), 9)
    pixels = _chunk(b"IDAT", zlib.compress(bytes(4 * 13)))
    text, profile = _chunk(b"zTXt", b"Comment\0\0" + zeros), _chunk(b"iCCP", b"p\0\0" + zeros)
    yield "text.png", _png(4, 4, text, pixels)
    yield "texts.png", _png(4, 4, *[_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20)))] * 80, pixels)
    yield "international.png", _png(4, 4, _chunk(b"iTXt", b"a\0\1\0\0\0" + zeros), pixels)
    yield "profile.png", _png(4, 4, profile, pixels)
    for width, height in ((30_000, 30_000), (2**31 - 1, 1), (1, 2**31 - 1), (2**31 - 1, 2**31 - 1), (0, 0), (0, 5)):
        yield f"sides-{width}-{height}.png", _png(width, height, _chunk(b"IDAT", zlib.compress(bytes(1 << 20))))
    for width, height in ((65_535, 65_535), (65_500, 20_000), (0, 0)):
        frame = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, height, width, 3) + b"\1\x22\0\2\x11\1\3\x11\1"
        yield f"sides-{width}-{height}.jpg", b"\xff\xd8" + frame + b"\xff\xd9"
    for width, height in ((2**31 - 1, 1), (100_000, 100_000), (-5, 5), (5, -(2**31))):
        head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        yield f"sides{width}x{height}.bmp", b"BM" + struct.pack("<IHHI", 1000, 0, 0, 54) + head + rng.bytes(900)
    for offset in (0, 8, 2**32 - 1):  # a directory that is not there, or is its own successor
        entry = struct.pack("<HHHII", 1, 256, 4, 1, 2**31) + struct.pack("<I", 8)
        yield f"directory-{offset}.tif", b"II*\0" + struct.pack("<I", offset) + entry
    for width, height in ((100_000, 100_000), (2**31, 1), (0, 5)):
        yield f"sides{width}x{height}.ppm", b"P6 %d %d 255\n" % (width, height) + rng.bytes(300)
    jp2, avif = _encode(rng, "JPEG2000"), _encode(rng, "AVIF")
    size = jp2.index(b"ihdr") + 4
    yield "sides.jp2", jp2[:size] + struct.pack(">II", 100_000, 100_000) + jp2[size + 8 :]
    stream = jp2.index(b"\xff\x51") + 6
    yield "stream.jp2", jp2[:stream] + struct.pack(">II", 100_000, 100_000) + jp2[stream + 8 :]
    size = avif.index(b"ispe") + 8
    yield "sides.avif", avif[:size] + struct.pack(">II", 100_000, 100_000) + avif[size + 8 :]
    yield "sides.gif.jpg", b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b";"


def test_every_bad_image_is_quarantined_with_its_reason(tmp_path, harmful):
    rng, folder = np.random.default_rng(7), tmp_path / "photos"
    folder.mkdir()
    files = dict([*_truncated(rng), *_noise(rng), *_other_kinds(rng, harmful), *_bombs(rng)])
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "link.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.jpg")
    with (folder / "huge.jpg").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    good = {f"good.{ending}": _encode(rng, kind) for ending, kind in FORMATS.items()}
    for name, data in good.items():
        (folder / name).write_bytes(data)
    bad = {*files, "link.jpg", "pipe.jpg", "huge.jpg"}
    assert len(bad) > 80

    images, found = _read(folder)
    reasons = dict(zip(found["sample_id"].to_pylist(), found["reason"].to_pylist(), strict=True))
    assert reasons.keys() == bad
    assert all(reasons.values())
    assert all("\n" not in reason for reason in reasons.values())
    assert {*images["sample_id"].to_pylist()} == good.keys()
    assert {*images["key"].to_pylist()} == {image_key(data) for data in good.values()}


def _read(folder):
    """The images of a folder with their keys, and those that cannot be used."""
    source = open_source(str(folder), split="train")
    answers = [Digest({"train": source})(row) for row in slices("train", source.index())]
    assert not any(answer["error"] for answer in answers)
    return map(pa.concat_tables, zip(*map(keyed, answers), strict=True))


def test_a_file_that_is_too_large_is_told_by_its_size(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    with (folder / "huge.png").open("wb") as file:
        file.truncate(3 << 30)
    source = open_source(str(folder), split="train")
    (error,) = source.read(source.index())
    assert str(3 << 30) in str(error)


def test_a_name_that_would_forge_a_line_of_a_log_is_refused(tmp_path):
    for number, name in enumerate(("a\nerror: all is lost.jpg", "\x1b[2J.jpg", "tab\t.jpg", "\x7f.jpg")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_bytes(b"")
        with pytest.raises(UserError, match="contains a control character; rename it") as refused:
            open_source(str(folder), split="train").index()
        assert str(refused.value).isprintable()
