"""Tar and Parquet files that lie: each is refused by name, or its rows fail one by one; nothing is unpacked to a path."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.imaging.decode import decode_image
from pipeline.sources import parquet_images
from pipeline.sources.locations import below
from pipeline.sources.open import open_source
from tests.sources.noise_images import encode
from tests.storage.web_server import WebServer


def _tar(members, kind=tarfile.GNU_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _header(name=b"a.jpg", size=b"%011o\0" % 0, kind=b"0"):
    """One header with a true checksum, whatever it says."""
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0") + b"%011o\0" % 0)
    block += b" " * 8 + kind + bytes(100) + b"ustar\x0000"
    block += bytes(512 - len(block))
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _binary(number):
    """A size beyond octal digits, as GNU tar writes it."""
    return (0xFF if number < 0 else 0x80).to_bytes(1, "big") + number.to_bytes(11, "big", signed=True)


def _octal(number):
    return b"%011o\0" % number


def _pax(**fields):
    text = b""
    for key, value in fields.items():
        line = f" {key}={value}\n".encode()
        length = len(line) + len(str(len(line) + 2))
        text += str(length).encode() + line
    return _header(b"pax", _octal(len(text)), b"x") + text.ljust(512, b"\0")


def _tars(rng, harmful):
    """Name and bytes of tars that are refused."""
    end, image = bytes(1024), encode(0)
    whole = _tar({f"{n}.jpg": encode(n) for n in range(4)})
    used = 4 * 512 + sum(-(-len(encode(n)) // 512) * 512 for n in range(4))  # beyond it there is padding alone
    for share in np.linspace(0.02, 0.98, 12):
        yield f"cut-{share:.2f}", whole[: int(used * share)]
    for number in range(8):
        damaged = bytearray(whole)
        damaged[rng.integers(0, 156)] ^= 0xFF  # within the first header
        yield f"header-{number}", bytes(damaged)
    for name, pack in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("pickle", pickle.dumps)):
        yield name, pack(whole if name != "pickle" else harmful)
    yield from {
        "empty": b"",
        "noise": rng.bytes(5000),
        "html": b"<html>404</html>" * 100,
        "zip": b"PK\3\4" + image,
    }.items()
    for size in (-1, -512, -(10**6), 10**6, 2**40, 2**62, 2**63, 2**80):
        yield f"size{size}", _header(size=_binary(size)) + image.ljust(1024, b"\0") + end
        for kind in b"LKxg":
            yield f"extended-{chr(kind)}{size}", _header(b"x", _binary(size), bytes([kind])) + bytes(1024) + end
    for size in ("-512", "-1024", str(2**70), "9" * 30):
        yield f"pax-size{size}", _pax(size=size) + _header(size=_octal(len(image))) + image.ljust(1024, b"\0") + end
    # Two that would come back to their second header for ever.
    yield "loop", _header() + _header(b"b.jpg", _binary(-512)) + image.ljust(1024, b"\0") + end
    yield "pax-loop", _header() + _pax(size="-1536") + _header(b"b.jpg") + image.ljust(1024, b"\0") + end
    yield "pax-chain", _pax(comment="x") * 3000 + end
    for name, text in {
        "words": b"cat",
        "float": b"1.5",
        "long": b"9" * 5000,
        "large": str(2**70).encode(),
        "binary": b"\xff\xfe",
        "megabytes": b" " * (2 << 20),
    }.items():
        yield f"label-{name}", _tar({"a.jpg": image, "a.cls": text})
    for name, text in {
        "words": b'{"label": "cat"}',
        "cut": b'{"label": ',
        "deep": b"[" * 100_000,
        "float": b'{"label": 1.5}',
        "large": json.dumps({"label": 2**70}).encode(),
        "list": b'{"label": [1]}',
    }.items():
        yield f"json-{name}", _tar({"a.jpg": image, "a.json": text})
    yield "twice", _tar({"a.jpg": image, "b.jpg": image, "a.JPG": image})
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
        yield f"kind-{kind.decode()}", _header(kind=kind) + end


@pytest.fixture(params=["path", "web"])
def place(request, tmp_path):
    """A function that puts a file into a folder or on a web server, and gives its location."""
    server = WebServer({})

    def put(name, data):
        server.files[name] = data
        (tmp_path / name).write_bytes(data)
        return f"{server.url}/{name}" if request.param == "web" else str(tmp_path / name)

    yield put
    server.close()


def test_every_bad_tar_is_refused_by_name(place, harmful):
    files = dict(_tars(np.random.default_rng(3), harmful))
    assert len(files) > 80
    for name, data in files.items():
        location = place(f"{name}.tar", data)
        with pytest.raises(UserError) as refused:
            open_source(location, split="train").index()
        assert f"{name}.tar" in str(refused.value)
        assert "\n" not in str(refused.value)


def test_names_that_lead_out_of_a_tar_lead_nowhere(tmp_path):
    names = ["../../up", "/absolute", "a/../../b", "..", "c:\\d", "e\0f"]
    members = {f"{name}.jpg": encode(number) for number, name in enumerate(names)}
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    (folder / "x.tar").write_bytes(_tar(members, tarfile.PAX_FORMAT))
    before = sorted(tmp_path.rglob("*"))
    source = open_source(str(folder / "x.tar"), split="train")
    index = source.index()
    assert all(name.startswith("x.tar/") for name in index["sample_id"].to_pylist())
    assert all(isinstance(data, bytes) for data in source.read(index))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_in_an_annotation_cannot_leave_its_folder(tmp_path):
    for name in ("../a.jpg", "a/../../b.jpg", "/a.jpg", "..", "", "a\\..\\..\\b.jpg", "a\0.jpg"):
        with pytest.raises(UserError, match="the annotations name"):
            below(str(tmp_path), name)
    assert below(str(tmp_path), "train/..a/b..jpg") == f"{tmp_path}/train/..a/b..jpg"


def _parquet(table, **options):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def _images(count=40):
    return pa.table({"image": [encode(n, "PNG") for n in range(count)], "label": list(range(count))})


def _parquets(rng, harmful):
    """Name and bytes of Parquet files that are refused."""
    whole = _parquet(_images(), row_group_size=10)
    for share in np.linspace(0.01, 0.99, 12):
        yield f"cut-{share:.2f}", whole[: int(len(whole) * share)]
        yield f"tail-{share:.2f}", whole[int(len(whole) * share) :]
    footer = int.from_bytes(whole[-8:-4], "little")
    for number in range(20):
        damaged = bytearray(whole)
        start = len(whole) - 8 - footer
        damaged[start : start + 40] = rng.bytes(40)
        yield f"footer-{number}", bytes(damaged)
    for size in (0, 1, 2**31 - 1, 2**32 - 1):
        yield f"footer-size-{size}", whole[:-8] + size.to_bytes(4, "little") + b"PAR1"
    yield from {"empty": b"", "magic": b"PAR1", "twice": b"PAR1PAR1", "noise": rng.bytes(5000)}.items()
    yield "pickle", pickle.dumps(harmful)
    image = encode(0)
    for name, columns in {
        "text": {"image": ["a", "b"]},
        "numbers": {"image": [1, 2]},
        "no-column": {"other": [1.5]},
        "flat-struct": {"image": [{"path": "a"}]},
        "floats": {"image": [[0.5] * 12]},
        "two": {"first": [image], "second": [image]},
        "no-rows": {"image": pa.array([], pa.binary())},
    }.items():
        yield f"column-{name}", _parquet(pa.table(columns))


def test_every_bad_parquet_file_is_refused_by_name(place, harmful):
    files = dict(_parquets(np.random.default_rng(5), harmful))
    assert len(files) > 50
    for name, data in files.items():
        location = place(f"{name}.parquet", data)
        with pytest.raises(UserError) as refused:
            open_source(location, split="train").index()
        assert f"{name}.parquet" in str(refused.value)
        assert "\n" not in str(refused.value)


def _fails(path: Path) -> bool:
    """Whether a file is refused, or one of its rows is."""
    try:
        source = open_source(str(path), split="train")
        for data in source.read(source.index()):
            if isinstance(data, Exception):
                return True
            decode_image(data)
    except (UserError, ValueError):
        return True
    return False


@pytest.mark.parametrize("compression", ["none", "zstd", "snappy"])
def test_damage_within_parquet_pages_is_found_in_the_file_or_in_a_row(tmp_path, compression):
    rng, whole = np.random.default_rng(11), _parquet(_images(10), compression=compression)
    path = tmp_path / "x.parquet"
    for _ in range(12):
        damaged = bytearray(whole)
        start = int(rng.integers(4, len(whole) // 2))
        damaged[start : start + 200] = rng.bytes(200)
        path.write_bytes(damaged)
        assert _fails(path)


def test_other_columns_in_a_second_file_are_refused_by_name(tmp_path):
    (tmp_path / "a.parquet").write_bytes(_parquet(_images()))
    for columns in ({"image": ["text"], "label": [1]}, {"image": [b""], "label": ["x"]}, {"label": [1]}):
        (tmp_path / "b.parquet").write_bytes(_parquet(pa.table(columns)))
        with pytest.raises(UserError, match=r"b\.parquet"):
            open_source(str(tmp_path), split="train").index()


def test_rows_that_unpack_to_too_much_are_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_images, "_MAX_GROUP", 1 << 20)
    rng = np.random.default_rng(0)
    for compression in ("zstd", "gzip", "snappy"):
        rows = [bytes(600_000) + rng.bytes(1) for _ in range(9)]
        path = tmp_path / f"{compression}.parquet"
        path.write_bytes(_parquet(pa.table({"image": rows}), compression=compression))
        assert path.stat().st_size < 1 << 20
        with pytest.raises(UserError, match=rf"{compression}\.parquet: the images of row group 0 take .* uncompressed"):
            open_source(str(path), split="train").index()
