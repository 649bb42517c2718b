"""JPEGs decoded, cut and resized on a GPU: nvJPEG, through torchvision.

Its pixels are not those of a CPU: nvJPEG does not interpolate the colour planes of a subsampled JPEG, and a GPU resizes in
floating point. What decodes an image depends on its bytes alone: what nvJPEG does not take, `pipeline/imaging/decode.py` decodes.
Processes of their own decode, as on a CPU: launching kernels for single images would delay the thread that launches a network's.
Imports neither Ray nor MLflow; torchvision only once something is decoded.
"""

import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError, one_line
from pipeline.imaging.crop import box_in_pixels, fitted_size
from pipeline.imaging.decode import jpeg_orientation
from pipeline.imaging.decoder_pool import CropTask, DecoderPool, DecodeTasks, decode_tasks, encoded_bytes, target_array
from pipeline.imaging.photometric import Photometric
from pipeline.imaging.recolour import change_pixels
from teachers.base import Interpolation

Decoder = Literal["cpu", "nvjpeg"]
"""What decodes images: every format on a CPU, or JPEGs on a GPU."""

WORKERS = 2
"""Processes that decode on one GPU: while one parses headers and copies pixels, nvJPEG decodes for the other."""

MOST_PIXELS = 1 << 25
"""Pixels decoded at once, and resized at once: 100 MB, and 400 MB in floating point. A larger image is decoded on a CPU."""

SUBSAMPLINGS = ("444", "422", "420", "440", "411")
"""Of the colour planes, among those that nvJPEG documents."""

NO_GPU = "nvjpeg decodes on a GPU, and there is none here: set it to cpu"

NO_MIXUP = "nvjpeg decodes no views that are mixed (views.mixup): set it to cpu"

_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_BASELINE, _PROGRESSIVE = 0xC0, 0xC2
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD8)}
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9

_TURNS: dict[int, Callable[[Tensor], Tensor]] = {
    2: lambda planes: planes.flip(-1),
    3: lambda planes: planes.flip(-2, -1),
    4: lambda planes: planes.flip(-2),
    5: lambda planes: planes.mT,
    6: lambda planes: planes.mT.flip(-1),
    7: lambda planes: planes.mT.flip(-2, -1),
    8: lambda planes: planes.mT.flip(-2),
}
"""How [3, H, W] is turned upright, by EXIF's orientation."""

_STATUS = re.compile(r"Failed to [^:]*: (\d+)")
_REFUSALS = (3, 4, 9, 10)
"""nvJPEG's status codes about the file: bad JPEG, not supported, implementation not supported, incomplete bitstream."""
_ALLOCATOR_FAILURE = 5
_UNKNOWN_SUBSAMPLING = "Unknown chroma subsampling"


class NvjpegPool(DecoderPool):
    """Decodes and resizes JPEGs on a GPU into the arrays of its pool; what nvJPEG does not take, its processes decode.

    Args:
        device: ``cuda`` or ``cuda:<index>``. With ``cpu``, threads run the same code on torchvision's CPU decoder.
    """

    def __init__(self, device: str = "cuda") -> None:
        super().__init__(WORKERS, processes=device != "cpu")
        self.work = partial(decode_on_device, device)


def make_decoders(decoder: Decoder, workers: int, device: str) -> DecoderPool:
    """The pool of a decoder: `workers` threads, or processes beside a GPU; for ``nvjpeg``, `WORKERS` processes.

    Args:
        device: ``cpu``, or the GPU that is worked for.

    Raises:
        UserError: for ``nvjpeg`` without a GPU.
    """
    if decoder == "cpu":
        return DecoderPool(workers, processes=device != "cpu")
    if device == "cpu":
        raise UserError(NO_GPU)
    return NvjpegPool(device)


def check_nvjpeg(device: str = "cuda") -> str:
    """Decode a small JPEG on this process's GPU, and return what decides the pixels: the GPU's name and torchvision's version.

    Raises:
        UserError: if there is no GPU, or torchvision has no nvJPEG.
    """
    if not torch.cuda.is_available():
        raise UserError(NO_GPU)
    import torchvision

    (planes,) = decode_or_refuse([simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))], torch.device(device))
    if planes is None or planes.shape != (3, 16, 16):
        raise UserError(
            f"torchvision {torchvision.__version__} does not decode a plain JPEG on this GPU: set it to cpu"
        )
    return f"{torch.cuda.get_device_name(device)}, torchvision {torchvision.__version__}"


class Header(NamedTuple):
    """What must be known of a JPEG that nvJPEG takes: its size in pixels as stored, and its EXIF orientation."""

    height: int
    width: int
    orientation: int


def accepted(data: bytes) -> Header | None:
    """The header of a JPEG for nvJPEG; None for an image that a CPU must decode.

    nvJPEG takes baseline and progressive JPEGs of 8 bits and three components, Huffman-coded and in YCbCr. Grey is left out
    because what nvJPEG writes to three planes of it is not documented.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours, subsampling = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    fits = 0 < height * width <= MOST_PIXELS and colours == "YCbCr" and subsampling in SUBSAMPLINGS
    if not fits or _frame(data) not in ((_BASELINE, 8), (_PROGRESSIVE, 8)):
        return None
    orientation = jpeg_orientation(data)
    return None if orientation is None else Header(height, width, orientation)


def _frame(data: bytes) -> tuple[int, int] | None:
    """Marker and bits per sample of a JPEG's frame header (ITU-T T.81, table B.1)."""
    at = 2
    while at + 4 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _START_OF_FRAME:
            return marker, data[at + 4]
        if marker in (_START_OF_SCAN, _END_OF_IMAGE):
            return None
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in _WITHOUT_LENGTH:
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def decode_on_device(device: str, tasks: DecodeTasks) -> None:
    """Run tasks on a device, in a worker.

    Raises:
        ValueError: for the first image that cannot be decoded.
        UserError: if the GPU's memory runs out; which decoder an image gets must not depend on that.
    """
    images = [(encoded_bytes(data), crops) for data, crops in tasks]
    headers = [accepted(data) for data, _ in images]
    taken = [(header, *image) for header, image in zip(headers, images, strict=True) if header]
    left = [image for header, image in zip(headers, images, strict=True) if not header]
    try:
        for some in _pieces(taken):
            left += _decode_piece(torch.device(device), some)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU has too little memory to decode JPEGs beside its other work: set the decoder to cpu, or lower the batch size"
        ) from error
    decode_tasks(left)


_Image = tuple[bytes, Sequence[CropTask]]
_Taken = tuple[Header, bytes, Sequence[CropTask]]


def _pieces(taken: Sequence[_Taken]) -> Iterator[list[_Taken]]:
    """The images in pieces of at most `MOST_PIXELS`."""
    piece: list[_Taken] = []
    pixels = 0
    for image in taken:
        pixels += image[0].height * image[0].width
        if pixels > MOST_PIXELS:
            yield piece
            piece, pixels = [], image[0].height * image[0].width
        piece.append(image)
    if piece:
        yield piece


def _decode_piece(device: torch.device, piece: Sequence[_Taken]) -> list[_Image]:
    """Decode, cut and resize images; returns those that nvJPEG has refused."""
    refused: list[_Image] = []
    groups: defaultdict[_Kind, list[_Member]] = defaultdict(list)
    found = decode_or_refuse([data for _, data, _ in piece], device)
    for (header, data, crops), planes in zip(piece, found, strict=True):
        if planes is None:
            refused.append((data, crops))
            continue
        upright = _TURNS[header.orientation](planes) if header.orientation in _TURNS else planes
        for view, interpolation, target, partner in crops:
            if partner:
                raise UserError(NO_MIXUP)
            pixels = target_array(target)
            box = upright[:, *box_in_pixels(view, *upright.shape[1:])]
            size = pixels.shape[1:] if len(pixels) == 3 else fitted_size(box.shape[1:], pixels.shape[1:])
            groups[_Kind(box.shape[1:], size, interpolation, view.flip)].append((box, pixels, view.photometric))
    for kind, members in groups.items():
        _resize(kind, members)
    return refused


class _Kind(NamedTuple):
    """What crops that are resized together have in common; sizes are (height, width) in pixels."""

    box: tuple[int, ...]
    size: tuple[int, ...]
    interpolation: Interpolation
    flip: bool


_Member = tuple[Tensor, np.ndarray, Photometric | None]
"""A box [3, h, w] on the device, the array that its pixels go to, and the changes of its colours."""


def _resize(kind: _Kind, members: Sequence[_Member]) -> None:
    """Resize boxes of one kind, and write them to their arrays: [3, H, W], or [4, H, W] with the mask.

    Colours are changed on the CPU, by the same function as everywhere.
    """
    together = max(1, MOST_PIXELS // max(kind.box[0] * kind.box[1], kind.size[0] * kind.size[1]))
    for first in range(0, len(members), together):
        some = members[first : first + together]
        boxes = torch.stack([box for box, *_ in some])
        for sides in ((kind.box[0], kind.size[1]), kind.size):
            boxes = _resize_to_levels(boxes, sides, kind.interpolation)
        # Waits for the device: nvJPEG, in a stream of its own, writes next to memory that these kernels have read.
        rows = (boxes.flip(-1) if kind.flip else boxes).cpu().numpy()
        height, width = kind.size
        for row, (_, pixels, changes) in zip(rows, some, strict=True):
            if len(pixels) == 4:
                pixels[:] = 0
                pixels[3, :height, :width] = 1
            pixels[:3, :height, :width] = change_pixels(row, changes)


def _resize_to_levels(boxes: Tensor, sides: tuple[int, ...], interpolation: Interpolation) -> Tensor:
    """Resize [N, 3, h, w] uint8, rounded to whole levels.

    torch resizes 8-bit pixels on a CPU only, and there rounds the rows before it resizes the columns. Resizing both at once in
    floating point differs from that by up to 25 levels, in two such steps by up to 2 (docs/results.md).
    """
    if boxes.shape[2:] == sides:
        return boxes
    resized = F.interpolate(boxes.float(), sides, mode=interpolation, align_corners=False, antialias=True)
    return resized.round_().clamp_(0, 255).byte()


def decode_or_refuse(images: Sequence[bytes], device: torch.device) -> list[Tensor | None]:
    """[3, H, W] uint8 on the device of every JPEG; None for one that nvJPEG refuses.

    A call fails as a whole, so its images are then tried one by one.

    Raises:
        torch.OutOfMemoryError: if the GPU has no memory for one of them.
        UserError: for another failure that is not the file's.
    """
    try:
        return [*_decode_jpegs(images, device)]
    except RuntimeError as error:
        if len(images) > 1:
            return [planes for data in images for planes in decode_or_refuse([data], device)]
        message = str(error)
        status = _STATUS.search(message)
        code = int(status[1]) if status else None
        if code in _REFUSALS or _UNKNOWN_SUBSAMPLING in message:
            return [None]
        if code == _ALLOCATOR_FAILURE or "out of memory" in message:
            raise torch.OutOfMemoryError(one_line(error)) from error
        raise UserError(
            f"torchvision decodes no JPEG on this GPU ({one_line(error)}): install a build of torchvision for CUDA, or set the "
            "decoder to cpu"
        ) from error


def _decode_jpegs(images: Sequence[bytes], device: torch.device) -> list[Tensor]:
    decode_jpeg, mode = _torchvision()
    # Copied, because torch takes no memory that it must not write to.
    encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in images]
    decoded: list[Tensor] = decode_jpeg(encoded, mode, device)
    return decoded


@cache
def _torchvision() -> tuple[Callable[..., list[Tensor]], object]:
    """torchvision's function, and its mode for RGB; it has deprecated them in 0.29."""
    warnings.filterwarnings("ignore", message=".*TorchCodec", category=DeprecationWarning)
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError as error:
        raise UserError("this torchvision has no decode_jpeg: set the decoder to cpu, or install 0.29") from error
    return decode_jpeg, ImageReadMode.RGB
