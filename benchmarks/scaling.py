"""Where do 8 to 256 GPUs saturate? Stage costs measured here, put into a model of a cluster.

    python benchmarks/scaling.py --photos photos/val
    python benchmarks/scaling.py --photos photos/val --store 5e9 --vcpus 32

Measured, as processor time of one core: decoding a photograph and resizing it for the teachers, the codec of their
features, and decoding and resizing for the student; features are taken apart on the GPU. Counted: multiply-accumulates
of teachers and student (torch's `FlopCounterMode`), bytes of features and of gradients. From data sheets, and named in
`SPECIFIED`: what a GPU computes, CPUs and network of a node, and what the store delivers; a core of a node is taken to be
as fast as one here. The model is a pipeline whose rate is that of its slowest part:

    extraction   min(GPUs x GPU rate, nodes x cores x core rate, store's write rate), the last round of shards being partial
    training     the longest of forward and backward, of preparing the batch on the node's cores, and of reading it;
                 plus the part of a ring all-reduce (2 (n - 1) / n x gradient bytes / network; Patarasuk and Yuan 2009) that
                 the backward pass does not hide

Prints two tables and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import pipeline.student.regla  # noqa: F401  registers the students with timm
from jobs._cli import grid
from pipeline.cache.layout.codec import Codec, fit_projection
from pipeline.cache.read.reader import STUDENT_INTERPOLATION
from pipeline.imaging.crop import crop_and_resize
from pipeline.imaging.decode import decode_pixels
from pipeline.imaging.geometry import FULL

GPUS = (8, 16, 32, 64, 128, 256)
TEACHERS = {
    "DINOv2 ViT-B/14": (224, 16, 768, 23.2),
    "CLIP ViT-L/14": (224, 16, 1024, 81.0),
    "SAM ViT-B": (1024, 16, 256, 486.0),
}
"""Side of the input, side of the stored grid, channels, GMACs of a view (docs/operations.md)."""
CODEC = "pca-int8-zstd"


@dataclass(frozen=True)
class Specified:
    """What is not measured.

    Attributes:
        macs: multiply-accumulates a second of a GPU: 40 % of an A100's bfloat16 peak for teachers.
        training_share: of that peak that a training step of a small network reaches, relative to 40 %.
        gpus, vcpus, network: of a node (AWS p4d.24xlarge: 8, 96, 400 Gbit/s).
        store: bytes a second of the object store for all nodes together.
        startup_s: to start an actor and load its weights.
    """

    macs: float = 62e12
    training_share: float = 0.5
    gpus: int = 8
    vcpus: int = 96
    network: float = 50e9
    store: float = 20e9
    startup_s: float = 60.0


@dataclass(frozen=True)
class Costs:
    """Of one image: core seconds, bytes, multiply-accumulates."""

    extract_core_s: float
    codec_core_s: float
    feature_bytes: float
    image_bytes: float
    teacher_macs: float
    train_core_s: float
    student_macs: float
    gradient_bytes: float


def core_seconds(call: Callable[[], Any], rounds: int = 3) -> float:
    """Processor time of the quickest of several rounds."""
    times = []
    for _ in range(rounds):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return min(times)


def measure(photos: list[bytes], student: str, side: int) -> Costs:
    """Costs of one image, on one core."""
    torch.set_num_threads(1)
    count = len(photos)

    def for_teachers() -> None:
        for data in photos:
            pixels = decode_pixels(data)
            for size, *_ in TEACHERS.values():
                crop_and_resize(pixels, FULL, (size, size), "bicubic")

    def for_student() -> None:
        for data in photos:
            crop_and_resize(decode_pixels(data), FULL, (side, side), STUDENT_INTERPOLATION)

    encode = size = 0.0
    for _, cells, channels, _ in TEACHERS.values():
        # Features whose channels depend on each other, as true ones do: half of their dimensions hold nearly all variance.
        basis = torch.randn(channels // 2, channels)
        features = torch.randn(16, cells, cells, channels // 2) @ basis + 0.1 * torch.randn(16, cells, cells, channels)
        codec = Codec.parse(CODEC)
        projection = fit_projection(codec, features.reshape(-1, cells, cells, channels))
        feature_codec = codec.build({"patches": (cells, cells, channels)}, projection)["patches"]
        encode += core_seconds(partial(feature_codec.encode, features)) / len(features)
        size += feature_codec.row_bytes
    network = timm.create_model(student, num_classes=0).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, side, side))
    return Costs(
        extract_core_s=core_seconds(for_teachers) / count,
        codec_core_s=encode,
        feature_bytes=size,
        image_bytes=sum(map(len, photos)) / count,
        teacher_macs=sum(gmacs for *_, gmacs in TEACHERS.values()) * 1e9,
        train_core_s=core_seconds(for_student) / count,
        student_macs=counter.get_total_flops() / 2,
        gradient_bytes=4.0 * sum(parameter.numel() for parameter in network.parameters()),
    )


def extraction(gpus: int, costs: Costs, given: Specified, images: int, shard: int) -> dict[str, Any]:
    """Images a second and hours of a cluster, and what limits it."""
    nodes = gpus / given.gpus
    rates = {
        "GPUs": gpus * given.macs / costs.teacher_macs,
        "CPUs (decoding)": nodes * given.vcpus / (costs.extract_core_s + costs.codec_core_s),
        "store (writing)": given.store / costs.feature_bytes,
    }
    limit = min(rates, key=lambda name: rates[name])
    shards = -(-images // shard)
    full = shards / gpus / -(-shards // gpus)  # how full the last round of shards leaves the actors, on the mean
    seconds = images / (rates[limit] * full) + given.startup_s
    if given.startup_s > seconds / 4:
        limit = f"starting ({given.startup_s:.0f} s), then {limit}"
    alone = images / min(rates["GPUs"], rates["CPUs (decoding)"]) * gpus
    return {"rate": images / seconds, "hours": seconds / 3600, "limit": limit, "efficiency": alone / gpus / seconds}


def training(gpus: int, costs: Costs, given: Specified, batch: int) -> dict[str, Any]:
    """Images a second of one training with a global batch, and what limits it."""
    nodes, each = gpus / given.gpus, batch / gpus
    compute = each * 3 * costs.student_macs / (given.macs * given.training_share)
    parts = {
        "GPUs": compute,
        "CPUs (decoding)": batch * costs.train_core_s / (nodes * given.vcpus),
        "store (reading)": batch * (costs.feature_bytes + costs.image_bytes) / given.store,
    }
    limit = max(parts, key=lambda name: parts[name])
    reduce = 2 * (gpus - 1) / gpus * costs.gradient_bytes / (given.network / given.gpus if nodes > 1 else 300e9)
    seconds = parts[limit] + max(0.0, reduce - compute * 2 / 3)
    if reduce > max(parts.values()):
        limit = "network (all-reduce)"
    return {"rate": batch / seconds, "limit": limit, "busy": compute / seconds}


def main() -> None:
    """Measure, and tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder with JPEGs")
    parser.add_argument("--student", default="regla_m")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--images", type=int, nargs="+", default=[1_281_167, 100_000_000])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--shard", type=int, default=512)
    parser.add_argument("--store", type=float, default=Specified.store, help="bytes a second of the object store")
    parser.add_argument("--vcpus", type=int, default=Specified.vcpus, help="of a node with eight GPUs")
    options = parser.parse_args()
    photos = [path.read_bytes() for path in sorted(options.photos.rglob("*.[jJ][pP]*[gG]"))[:32]]
    costs = measure(photos, options.student, options.side)
    given = Specified(store=options.store, vcpus=options.vcpus)
    shown = {**asdict(costs), "photos": len(photos)}
    print("\n".join(f"  {name:<16} {value:.4g}" for name, value in shown.items()))
    extracted = {
        images: {gpus: extraction(gpus, costs, given, images, options.shard) for gpus in GPUS}
        for images in options.images
    }
    trained = {gpus: training(gpus, costs, given, options.batch) for gpus in GPUS}
    for images, rows in extracted.items():
        print(f"extraction of {images:,} images\n{grid([_row(gpus, found) for gpus, found in rows.items()])}")
    print(f"training, {options.batch} images a step\n{grid([_row(gpus, found) for gpus, found in trained.items()])}")
    print(
        json.dumps({"costs": asdict(costs), "specified": asdict(given), "extraction": extracted, "training": trained})
    )


def _row(gpus: int, found: dict[str, Any]) -> dict[str, str]:
    hours = {"hours": f"{found['hours']:.2f}"} if "hours" in found else {}
    return {
        "GPUs": str(gpus),
        "images/s": f"{found['rate']:,.0f}",
        **hours,
        "limit": found["limit"],
        **(
            {"of linear": f"{found['efficiency']:.0%}"}
            if "efficiency" in found
            else {"GPU busy": f"{found['busy']:.0%}"}
        ),
    }


if __name__ == "__main__":
    main()
