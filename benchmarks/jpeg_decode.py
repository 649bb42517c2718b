"""JPEGs decoded and resized by the pipeline's two pools: by CPU cores, and by a GPU (nvJPEG).

    python benchmarks/jpeg_decode.py --device cuda --threads 14
    python benchmarks/jpeg_decode.py --device cpu --images 64 --rounds 1

Both write to host memory. Prints one line of JSON: images per second of both, microseconds per image that each takes from the
process that launches, and the mean and largest difference of their pixels, of 255. With `--device cpu`, torchvision's CPU decoder
stands for nvJPEG: the difference is then that of the resizing alone.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.synthetic_cache import jpegs, read_photos
from pipeline.imaging.decoder_pool import CropTask, DecoderPool
from pipeline.imaging.geometry import FULL
from pipeline.imaging.gpu_decode import NvjpegPool

BATCH = 256
"""Images that are waited for together."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = _parse(arguments)
    files = read_photos(options.photos) if options.photos else jpegs(options.stored_side)
    images = [files[number % len(files)] for number in range(options.images)]
    pools = {
        "cpu": DecoderPool(options.threads, processes=options.device == "cuda"),
        "nvjpeg": NvjpegPool(options.device),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pools}
    for _ in range(1 + options.rounds):
        for name, pool in pools.items():
            times[name].append(_timed(pool, images, options.side))
    found: dict[str, float] = {}
    for name, measured in times.items():
        clocks, processors = zip(*measured[1:], strict=True)
        found[f"{name}_images_per_s"] = round(options.images / median(clocks), 1)
        found[f"{name}_own_us"] = round(1e6 * median(processors) / options.images, 1)
    expected, decoded = (rendered(pool, images, options.side).short() for pool in pools.values())
    apart = (expected - decoded).abs().float()
    for pool in pools.values():
        pool.close()
    difference = {"mean_difference": round(float(apart.mean()), 3), "largest_difference": int(apart.max())}
    print(json.dumps({**found, **difference}))


def rendered(pool: DecoderPool, images: Sequence[bytes], side: int) -> Tensor:
    """[B, 3, side, side] uint8 in host memory."""
    pixels = pool.arrays.empty(len(images), 3, side, side)
    targets = pool.arrays.row_targets(pixels)
    pool.decode([(data, [CropTask(FULL, "bicubic", target)]) for data, target in zip(images, targets, strict=True)])
    return torch.from_numpy(pixels)


def _timed(pool: DecoderPool, images: Sequence[bytes], side: int) -> tuple[float, float]:
    """Seconds by the clock, and of this process's processors."""
    clock, processor = time.perf_counter(), time.process_time()
    for first in range(0, len(images), BATCH):
        rendered(pool, images[first : first + BATCH], side)
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
