"""The decoding of a GPU on torchvision's CPU decoder; tests/test_gpu.py asks a real one."""

from functools import partial

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import ExifTags, Image

from pipeline.errors import UserError
from pipeline.imaging import decoder_pool, gpu_decode
from pipeline.imaging.decoder_pool import CropTask, DecoderPool
from pipeline.imaging.geometry import FULL, View
from pipeline.imaging.gpu_decode import (
    NvjpegPool,
    accepted,
    check_nvjpeg,
    decode_on_device,
    decode_or_refuse,
    make_decoders,
)
from pipeline.imaging.photometric import Photometric
from tests.imaging.pictures import encode

VIEWS = (
    FULL,
    View((0.1, 0.2, 0.8, 0.9), photometric=Photometric(1.2, 0.8, 1.1, 0.05, 0.02)),
    View((0.3, 0.5, 0.5, 1.0), flip=True),
)
CPU = torch.device("cpu")


def _picture(width=150, height=110, seed=0, mode="RGB"):
    """Smooth in places and sharp in others, so that neither the resizing nor its rounding is trivial."""
    rng = np.random.default_rng(seed)
    cells = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.array(cells)
    pixels[height // 3 : height // 2] = rng.integers(0, 2, (height // 2 - height // 3, width, 1)) * 255
    return Image.fromarray(pixels).convert(mode)


def _turned(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encode(_picture(seed=orientation), "JPEG", exif=exif)


def _altered(data, marker, offset, value):
    at = data.index(bytes([0xFF, marker])) + offset
    return data[:at] + bytes([value]) + data[at + 1 :]


JPEG = encode(_picture(), "JPEG")
BY_A_CPU = {
    "grey": encode(_picture(mode="L"), "JPEG"),
    "CMYK": encode(_picture(mode="CMYK"), "JPEG"),
    "stored as RGB": encode(_picture(), "JPEG", keep_rgb=True),
    "PNG": encode(_picture(), "PNG"),
    "WebP": encode(_picture(), "WEBP"),
}
DAMAGED = {
    "12 bits": _altered(JPEG, 0xC0, 4, 12),
    "arithmetic coding": _altered(JPEG, 0xC0, 1, 0xC9),
    "extended": _altered(JPEG, 0xC0, 1, 0xC1),
    "header alone": JPEG[:30],
    "no frame": b"\xff\xd8\xff\xd9",
    "empty": b"",
}


def _drawn(decoders, files, size=(48, 64), channels=3, interpolation="bicubic"):
    """Pixels of all views of some files, by a pool."""
    pixels = decoders.arrays.empty(len(files) * len(VIEWS), channels, *size)
    pixels[:] = 77
    rows = decoders.arrays.row_targets(pixels)
    decoders.decode(
        [
            (data, [CropTask(view, interpolation, rows[i * len(VIEWS) + j]) for j, view in enumerate(VIEWS)])
            for i, data in enumerate(files)
        ]
    )
    return np.array(pixels)


def _apart(a, b):
    return np.abs(a.astype(int) - b.astype(int))


@pytest.fixture(scope="module")
def reference():
    return DecoderPool(2)


@pytest.fixture
def device():
    return NvjpegPool("cpu")


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("size", [(48, 64), (200, 200), (110, 150)])
def test_pixels_are_those_of_a_cpu_but_for_rounding(device, reference, size, channels, interpolation):
    files = [
        encode(_picture(*sides, seed), "JPEG") for seed, sides in enumerate([(150, 110), (80, 31), (150, 110), (1, 1)])
    ]
    expected, found = (_drawn(pool, files, size, channels, interpolation) for pool in (reference, device))
    apart = _apart(found, expected)
    assert apart.max() <= 2
    assert apart.mean() < 0.05
    if channels == 4:
        assert np.array_equal(found[:, 3], expected[:, 3])
        assert set(np.unique(found[:, 3])) == {0, 1}


@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9])
def test_an_image_is_turned_upright_before_it_is_cut(device, reference, orientation):
    data = _turned(orientation)
    assert accepted(data) == (110, 150, orientation if 1 <= orientation <= 8 else 1)
    assert _apart(_drawn(device, [data]), _drawn(reference, [data])).max() <= 2


def test_progressive_and_every_usual_subsampling_is_taken():
    assert accepted(encode(_picture(), "JPEG", progressive=True)) == (110, 150, 1)
    for subsampling in ("444", "422", "420", "440", "411"):
        assert accepted(simplejpeg.encode_jpeg(np.array(_picture()), colorsubsampling=subsampling)) == (110, 150, 1)


@pytest.mark.parametrize("kind", BY_A_CPU)
def test_what_nvjpeg_does_not_take_has_the_very_pixels_of_a_cpu(device, reference, kind, monkeypatch):
    assert accepted(BY_A_CPU[kind]) is None
    monkeypatch.setattr(gpu_decode, "_decode_jpegs", None)
    assert np.array_equal(_drawn(device, [BY_A_CPU[kind]]), _drawn(reference, [BY_A_CPU[kind]]))


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_of_another_process_or_without_a_header_is_not_taken(kind):
    assert accepted(DAMAGED[kind]) is None


def test_a_large_image_is_not_taken_however_much_memory_there_is(monkeypatch):
    monkeypatch.setattr(gpu_decode, "MOST_PIXELS", 110 * 150 - 1)
    assert accepted(JPEG) is None
    monkeypatch.setattr(gpu_decode, "MOST_PIXELS", 110 * 150)
    assert accepted(JPEG) is not None


def test_an_image_has_the_same_pixels_alone_as_in_any_company(device, monkeypatch):
    files = [_turned(1 + seed % 8) for seed in range(9)] + [*BY_A_CPU.values()] + [JPEG, JPEG]
    together = _drawn(device, files)
    pieces, decode = [], gpu_decode._decode_jpegs
    monkeypatch.setattr(gpu_decode, "MOST_PIXELS", 2 * 110 * 150)
    monkeypatch.setattr(gpu_decode, "_decode_jpegs", lambda some, at: pieces.append(len(some)) or decode(some, at))
    assert np.array_equal(_drawn(device, files), together)
    assert max(pieces) == 2
    assert sum(pieces) == 11
    alone = np.concatenate([_drawn(device, [data]) for data in files])
    assert np.array_equal(alone, together)


def _refusing(refused, message, monkeypatch):
    """torchvision's decoder, which fails as a whole if one of these images is among those it is given."""
    decode, calls = gpu_decode._decode_jpegs, []

    def failing(images, device):
        calls.append(len(images))
        if refused & {*images}:
            raise RuntimeError(f"Error while decoding JPEG images: {message}")
        return decode(images, device)

    monkeypatch.setattr(gpu_decode, "_decode_jpegs", failing)
    return calls


@pytest.mark.parametrize(
    "message", ["Failed to parse jpeg stream: 4", "Failed to decode batch: 9", "Unknown chroma subsampling"]
)
def test_an_image_that_nvjpeg_refuses_has_the_pixels_of_a_cpu_and_the_others_keep_theirs(
    device, reference, message, monkeypatch
):
    files = [encode(_picture(seed=seed), "JPEG") for seed in range(6)]
    before = _drawn(device, files)
    _refusing({files[2]}, message, monkeypatch)
    decoded = []
    by_cpu = decoder_pool.decode_pixels
    monkeypatch.setattr(decoder_pool, "decode_pixels", lambda data: decoded.append(data) or by_cpu(data))
    after = _drawn(device, files)
    assert decoded == [files[2]]
    rows = np.arange(len(after)) // len(VIEWS) == 2
    assert np.array_equal(after[~rows], before[~rows])
    assert np.array_equal(after[rows], _drawn(reference, files)[rows])


@pytest.mark.parametrize("message", ["Failed to decode batch: 5", "CUDA out of memory. Tried to allocate 2 GiB"])
def test_memory_that_runs_out_changes_no_pixels_but_is_said_with_the_remedy(device, message, monkeypatch):
    calls = _refusing({JPEG}, message, monkeypatch)
    other = encode(_picture(seed=1), "JPEG")
    assert [planes is None for planes in decode_or_refuse([other, other], CPU)] == [False, False]
    with pytest.raises(UserError, match=r"too little memory to decode JPEGs .* set the decoder to cpu"):
        _drawn(device, [other, JPEG])
    assert calls == [2, 2, 1, 1]  # before it gives up, it tries the images one by one


def test_another_failure_is_not_taken_for_that_of_a_file(device, monkeypatch):
    _refusing({JPEG}, "torchvision not compiled with nvJPEG support", monkeypatch)
    with pytest.raises(
        UserError, match=r"no JPEG on this GPU \(.*nvJPEG support\): install .* or set the decoder to cpu"
    ):
        _drawn(device, [JPEG])


def test_an_image_that_no_decoder_can_read_is_reported_after_the_rest_is_done(device):
    pixels = device.arrays.empty(2, 3, 8, 8)
    pixels[:] = 77
    rows = device.arrays.row_targets(pixels)
    with pytest.raises(UserError, match=r"an image in the cache .*; an earlier version accepted it"):
        device.decode(
            [(b"\xff\xd8 nothing", [CropTask(FULL, "bicubic", rows[0])]), (JPEG, [CropTask(FULL, "bicubic", rows[1])])]
        )
    assert (pixels[1] != 77).any()


def test_processes_decode_into_shared_memory(device):
    pool = NvjpegPool("cuda")  # asks nothing of the GPU before it decodes
    pool.work = partial(decode_on_device, "cpu")
    files = [JPEG, *BY_A_CPU.values(), _turned(6)]
    assert np.array_equal(_drawn(pool, files), _drawn(device, files))
    pool.close()


def test_without_a_gpu_it_is_refused_before_anything_is_decoded():
    with pytest.raises(UserError, match="nvjpeg decodes on a GPU, and there is none here: set it to cpu"):
        make_decoders("nvjpeg", 1, "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="there is none here"):
            check_nvjpeg()
    assert type(make_decoders("cpu", 1, "cpu")) is DecoderPool
    assert isinstance(make_decoders("nvjpeg", 1, "cuda:1"), NvjpegPool)


def test_a_torchvision_without_the_decoder_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    monkeypatch.setattr(gpu_decode, "_decode_jpegs", lambda *_: [torch.zeros(3, 16, 16)])
    assert check_nvjpeg().startswith("GPU, torchvision 0.")

    def without(images, device):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    monkeypatch.setattr(gpu_decode, "_decode_jpegs", without)
    with pytest.raises(
        UserError, match=r"decodes no JPEG on this GPU \(.*not compiled.*\): install a build of torchvision"
    ):
        check_nvjpeg()
