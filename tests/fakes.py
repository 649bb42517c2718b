"""A small real teacher for tests: it computes true features of the pixels, and writes down every call."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teachers.base import Teacher, TeacherOptions, TeacherOutput, TeacherSpec


class ColourGrid(Teacher):
    """Mean colour of each of 4 x 4 cells, and of the image, seen through a fixed random projection.

    Args:
        dim: channels of the features.
        log: file that gets one line a forward with the number of images, or "".
        delay: seconds that every forward takes longer.
        poison: brightness (mean of the pixels in [0, 255]) above which an image gives NaN; 0: never.
        gate: file for which every forward waits but the first one of all processes, or "".
    """

    def __init__(self, dim: int, log: str, delay: float, poison: float, gate: str = "") -> None:
        self.log, self.delay, self.gate, self.poison = log, delay, gate, poison
        self.spec = TeacherSpec(
            name=f"colours{dim}",
            architecture=f"tests/colours{dim}",
            weights="none",
            input_size=(32, 32),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            interpolation="bilinear",
            summary_dim=dim,
            patch_dim=dim,
            grid=(4, 4),
            licence="none",
        )
        self.projection = torch.randn(3, dim, generator=torch.Generator().manual_seed(dim))

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = torch.device(device), dtype

    def forward(self, images: Tensor) -> TeacherOutput:
        if self.log:
            with Path(self.log).open("a") as file:
                file.write(f"{len(images)}\n")
        time.sleep(self.delay)
        if self.gate and not _is_first(Path(f"{self.gate}.first")):
            while not Path(self.gate).exists():
                time.sleep(0.02)
        patches = F.adaptive_avg_pool2d(images, 4).permute(0, 2, 3, 1) @ self.projection
        if self.poison:
            bright = (images.mean(dim=(1, 2, 3)) * 0.5 + 0.5) * 255 > self.poison
            patches[bright] = float("nan")
        return TeacherOutput(patches.mean(dim=(1, 2)), patches)


def colours(options: TeacherOptions) -> Teacher:
    """Factory of `ColourGrid`, as `tests.fakes:colours`."""
    settings = {"dim": 8, "log": "", "delay": 0.0, "gate": "", "poison": 0.0, **options.args}
    return ColourGrid(**settings)


def _is_first(file: Path) -> bool:
    """Whether no process has asked this before."""
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def images_seen(log: Path) -> int:
    """Images over all calls that a `ColourGrid` wrote down."""
    return sum(int(line) for line in log.read_text().split()) if log.exists() else 0


def write_photos(folder: Path, count: int, classes: int = 3, size: int = 48, seed: int = 0) -> None:
    """Real JPEGs of smooth random colours in class folders."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    for number in range(count):
        cells = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        target = folder / f"class{number % classes}" / f"photo{number:03d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(cells).resize((size + number % 5, size), Image.Resampling.BICUBIC).save(target, quality=95)


def corrupt(photo: Path) -> None:
    """Damage the compressed data of a JPEG late in the file."""
    data = photo.read_bytes()
    middle = len(data) * 3 // 4
    photo.write_bytes(data[:middle] + bytes([0xFF, 0xD8] * 20) + data[middle + 40 :])


def truncate(photo: Path) -> None:
    """Cut a file in half."""
    data = photo.read_bytes()
    photo.write_bytes(data[: len(data) // 2])


def fill_in_process(plan: Any, batch_size: int = 16, max_bad: float = 0.05) -> tuple[Any, int]:
    """Fill a planned cache without Ray, shard by shard; returns the plan of the filled cache, and the teacher shards computed."""
    from pipeline.cache.config import CacheJobConfig
    from pipeline.cache.fill.build import build_cache
    from pipeline.config.load import load_config

    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        settings = [f"cache.batch_size={batch_size}", f"data.max_bad={max_bad}"]
        filled, report = build_cache(plan, load_config(CacheJobConfig, None, settings))
    return filled, report.shards_computed


def out_of_memory(*_: Any) -> None:
    """What a GPU does whose memory does not suffice."""
    raise torch.OutOfMemoryError("CUDA out of memory")


def without_ray(monkeypatch: Any) -> None:
    """Hand shards to the classes of the actors and tasks in this process."""
    from pipeline.cache.fill import build
    from pipeline.cache.fill.extract import Extract
    from pipeline.cache.maintain import audit

    def run(actor: Any, rows: Any, arguments: Any, batch_size: int) -> Any:
        return map(actor(*arguments, "cpu", 2, batch_size), rows) if rows else ()

    monkeypatch.setattr(audit, "run_in_actors", run)
    monkeypatch.setattr(build, "extract_shards", lambda *arguments: run(Extract, *arguments))
    monkeypatch.setattr(build, "run_tasks", lambda rows, task: map(task, rows))


SMALL_JOB = [
    "data.samples.train=144",
    "data.samples.val=48",
    "data.samples.size=32",
    "cache.shard_size=48",
    "student.input_size=32",
    "student.head_dim=32",
    "train.epochs=2",
    "train.batch_size=24",
    "train.shuffle_window=64",
]
"""Overrides of a job of seconds: 3 training shards and 1 held-out one, 6 steps an epoch."""


def colours_entry(log: Path, dim: int = 8, delay: float = 0.0, gate: Path | str = "") -> str:
    """A `ColourGrid` that writes down its calls, as an entry of `teachers`."""
    return f"{{model: 'tests.fakes:colours', args: {{log: '{log}', dim: {dim}, delay: {delay}, gate: '{gate}'}}}}"
