"""JPEGs decoded and resized by CPU cores, as everywhere in the pipeline, and by the device through torchvision (nvJPEG on a GPU).

    python benchmarks/jpeg_decode.py --device cuda --threads 14
    python benchmarks/jpeg_decode.py --device cpu --images 64 --rounds 1

Prints one line of JSON: images per second of both, microseconds per image that the device's decoder takes from the process that
launches, and the mean and largest difference of their pixels, of 255.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from benchmarks.card import synchronise
from benchmarks.synthetic_cache import jpegs, read_photos
from pipeline.imaging.decoder_pool import CropTask, DecoderPool
from pipeline.imaging.geometry import FULL


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = _parse(arguments)
    warnings.filterwarnings("ignore", message=".*TorchCodec")
    device = torch.device(options.device)
    files = read_photos(options.photos) if options.photos else jpegs(options.stored_side)
    images = [files[number % len(files)] for number in range(options.images)]
    pool = DecoderPool(options.threads, processes=device.type == "cuda")
    ways = {
        "cpu": lambda: by_cores(pool, images, options.side).to(device),
        "device": lambda: by_device(images, options.side, device),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(1 + options.rounds):
        for name, way in ways.items():
            times[name].append(_timed(way, device))
    rates = {f"{name}_images_per_s": round(options.images / median(s for s, _ in times[name][1:]), 1) for name in ways}
    own = 1e6 * median(cpu for _, cpu in times["device"][1:]) / options.images
    apart = (ways["cpu"]().short() - ways["device"]().short()).abs().float()
    pool.close()
    difference = {"mean_difference": round(float(apart.mean()), 3), "largest_difference": int(apart.max())}
    print(json.dumps({**rates, "device_own_us": round(own, 1), **difference}))


def by_cores(pool: DecoderPool, images: Sequence[bytes], side: int) -> Tensor:
    """[B, 3, side, side] uint8, by the pipeline's decoders."""
    pixels = pool.arrays.empty(len(images), 3, side, side)
    targets = pool.arrays.row_targets(pixels)
    pool.decode([(data, [CropTask(FULL, "bicubic", target)]) for data, target in zip(images, targets, strict=True)])
    return torch.from_numpy(pixels)


def by_device(images: Sequence[bytes], side: int, device: torch.device) -> Tensor:
    """[B, 3, side, side] uint8, decoded and resized on the device; in floating point, for a GPU resizes nothing else."""
    encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in images]
    resized = [
        F.interpolate(pixels[None].float(), (side, side), mode="bicubic", antialias=True)
        for pixels in decode_jpeg(encoded, ImageReadMode.RGB, device)
    ]
    return torch.cat(resized).round_().clamp_(0, 255).byte()


def _timed(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds by the clock, and of this process's processors."""
    clock, processor = time.perf_counter(), time.process_time()
    call()
    synchronise(device)
    return time.perf_counter() - clock, time.process_time() - processor


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--photos", type=Path, help="folder of JPEGs; default: synthetic images")
    parser.add_argument("--stored-side", type=int, default=256, help="of the synthetic images in pixels")
    parser.add_argument("--side", type=int, default=224, help="to resize to, in pixels")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2, help="decoders on CPU cores")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
