"""Train networks of one size from scratch on the same images, with one schedule and several seeds.

    python benchmarks/learning.py train.parquet test.parquet --models regla_t iformer_t mobilevitv2_075 --seeds 0 1 2

A model may have constructor arguments, as in `regla_t {gate_act: none, local_kernel: 0}`. Prints top-1 on the held-out images
after the last epoch, mean and standard deviation over the seeds, and one line of JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from benchmarks.results import mean_and_deviation, measure_once, study_parser
from pipeline.benchmark.models import create_model
from pipeline.imaging.decode import decode_image
from pipeline.sources.open import open_source

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
SHIFT = 0.125  # largest translation in training, as a share of the side: 4 of 32 pixels


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what the results file lacks, then print the table."""
    parser = study_parser(__doc__, "learning")
    parser.add_argument("train", help="images to train on: folder, tar shards or Parquet, with labels")
    parser.add_argument("test", help="held-out images, in the same forms")
    parser.add_argument("--models", nargs="+", default=["regla_t", "iformer_t", "mobilevitv2_075", "starnet_s1"])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--size", type=int, default=64, help="side of the input in pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak of the cosine, after a tenth of linear warm-up")
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs, each on one thread")
    options = parser.parse_args(arguments)
    runs = [(model, seed) for seed in options.seeds for model in options.models]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        rows = dict(zip(runs, pool.map(_run, *zip(*runs, strict=True), repeat(options)), strict=True))
    _report({model: [rows[model, seed] for seed in options.seeds] for model in options.models})


def _run(model: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    settings = f"epochs={options.epochs} size={options.size} batch={options.batch_size} lr={options.lr:g}"
    key = f"{model} seed={seed} {settings} {options.train} {options.test}"
    row = measure_once(options.results, {"run": key}, lambda: train(model, seed, options))
    print(f"{key}  top-1 {row['top1']:.2f} %  {row['seconds']:.0f} s", flush=True)
    return row


def train(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train one model from scratch on one thread; returns its top-1 in percent, parameters and seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    start = time.perf_counter()
    images, labels = load(options.train, "train", options.size)
    model = create_model(name, num_classes=int(labels.max()) + 1).to(memory_format=torch.channels_last)
    batch, steps = options.batch_size, len(images) // options.batch_size
    total, warmup = steps * options.epochs, steps * options.epochs // 10
    optimizer = create_optimizer_v2(model, "adamw", lr=options.lr, weight_decay=0.05)
    parts = [LinearLR(optimizer, 1e-3, total_iters=warmup), CosineAnnealingLR(optimizer, total - warmup)]
    schedule = SequentialLR(optimizer, parts, [warmup])
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)
    model.train()
    for _ in range(options.epochs):
        for rows in torch.randperm(len(images))[: steps * batch].view(steps, batch):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(model(augment(images[rows]).contiguous(memory_format=torch.channels_last)), labels[rows])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    top1 = accuracy(model, *load(options.test, "val", options.size))
    parameters = sum(p.numel() for p in model.parameters())
    return {"top1": top1, "parameters": parameters, "seconds": time.perf_counter() - start}


def load(location: str, split: str, size: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, size, size) uint8 and labels (N,) int64, in the order of the source's index."""
    source = open_source(location, split=split)
    index = source.index()
    files = (data for data in source.read(index) if isinstance(data, bytes))
    images = np.stack([np.asarray(decode_image(data).resize((size, size))) for data in files])
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(index["label"].to_pylist())


def augment(images: Tensor) -> Tensor:
    """Normalise, flip half of the images, and translate each by up to an eighth of its side, padded with zeros."""
    x = normalise(images)
    count = len(x)
    x = torch.where((torch.rand(count) < 0.5).view(-1, 1, 1, 1), x.flip(3), x)
    theta = torch.eye(2, 3).repeat(count, 1, 1)
    theta[:, :, 2] = (torch.rand(count, 2) * 4 - 2) * SHIFT
    grid = nn.functional.affine_grid(theta, list(x.shape), align_corners=False)
    return nn.functional.grid_sample(x, grid, mode="nearest", align_corners=False)


def normalise(images: Tensor) -> Tensor:
    """ImageNet's mean and standard deviation; uint8 in, float32 out, same shape."""
    return (images.float() / 255 - MEAN) / STD


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    model.eval()
    predicted = torch.cat([model(normalise(part)).argmax(1) for part in images.split(100)])
    return 100 * int((predicted == labels).sum()) / len(labels)


def _report(results: dict[str, list[dict[str, float]]]) -> None:
    width = max(map(len, results))
    print(f"\n{'model':<{width}}  parameters  top-1 %           seconds per run")
    figures = {}
    for model, runs in results.items():
        tops, seconds = [run["top1"] for run in runs], mean(run["seconds"] for run in runs)
        millions = runs[0]["parameters"] / 1e6
        print(f"{model:<{width}}  {millions:8.2f} M  {mean_and_deviation(tops):<14}  {seconds:12.0f}")
        std = stdev(tops) if len(tops) > 1 else 0.0
        figures[model] = {"top1_mean": round(mean(tops), 2), "top1_std": round(std, 2), "top1": tops}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
