"""`images` shards -> teacher shards: decode once, run every teacher whose shard is missing, commit each shard by itself.

Rendering runs ahead of the device (`pipeline/imaging/decoder_pool.py`), and an actor works on several shards concurrently
(`CONCURRENT_SHARDS`): while one is on the device, the others are decoded or written. Features are not sent anywhere: the
actor that computed a shard writes it. This module imports neither Ray nor MLflow.
"""

import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.cache.fill.batches import BatchAssembler
from pipeline.cache.fill.device import TeacherDevice
from pipeline.cache.fill.shard_builder import ShardBuilder
from pipeline.cache.layout.cached_teacher import CachedTeacher, projection_of
from pipeline.cache.layout.codec import Codec, Projection, dump_projection, fit_projection
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.shards import ROW_GROUP_SIZE
from pipeline.cache.layout.view_rows import ViewRows, read_view_rows, views_of
from pipeline.errors import UserError
from pipeline.imaging.decoder_pool import DecoderPool, chunk_size
from pipeline.runtime import logs
from pipeline.runtime.allocator import keep_freed_memory
from teachers.base import Teacher, TeacherError, TeacherOutput

Item = TypeVar("Item")

CONCURRENT_SHARDS = {"cpu": 2, "cuda": 4}
"""Shards that an actor works on, by its device; with a GPU, writing a shard takes longer than computing one."""
BATCHES_AHEAD = 2
"""Batches rendered ahead of the device."""
USER_ERRORS = (UserError, TeacherError, torch.OutOfMemoryError)
"""Failures whose cause the user can fix."""


def out_of_memory(teachers: Iterable[CachedTeacher], batch_size: int) -> str:
    """The error message if a GPU has too little memory for these teachers."""
    wide = any(teacher.precision == "float32" for teacher in teachers)
    return (
        f"the GPU has too little memory for {batch_size} images at once: lower cache.batch_size"
        f"{', or set cache.precision=bfloat16' if wide else ''}"
    )


class Stages(dict[str, float]):
    """Seconds spent on one shard by stage: read, render (waiting), teacher (on the device), encode, write."""

    def __missing__(self, name: str) -> float:
        return 0.0

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time spent in the block to this stage."""
        started = time.perf_counter()
        yield
        self[name] += time.perf_counter() - started

    def measure_each(self, name: str, items: Iterator[Item]) -> Iterator[Item]:
        """The items; the time spent waiting for each is added to this stage."""
        while True:
            with self.measure(name):
                item = next(items, None)
            if item is None:
                return
            yield item


class Extract:
    """Commits one shard of every teacher that lacks it per call; a Ray Data row is a shard.

    Args:
        datasets: by split (``train``, ``val``), with complete `images` shards.
        device: ``cuda`` or ``cpu``.
        threads: number of decoders; with a GPU they are processes.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        teachers: Sequence[CachedTeacher],
        device: str,
        threads: int,
        batch_size: int,
    ) -> None:
        keep_freed_memory()
        logging.getLogger("teachers").setLevel(logging.ERROR)  # the driver has logged their warnings
        self.datasets = datasets
        self.batch_size = batch_size
        self.decoders = DecoderPool(threads, processes=device == "cuda")
        self.device = TeacherDevice(device)
        self.cached = {teacher.id: teacher for teacher in teachers}
        self.teachers = {teacher.id: self._load(teacher) for teacher in teachers}
        self.projection_lock = threading.Lock()
        self.projections: dict[str, tuple[str, Projection | None]] = {}
        self.sampled: dict[tuple[str, int, int], TeacherOutput] = {}

    def _load(self, cached: CachedTeacher) -> Teacher:
        teacher = cached.create()
        teacher.load(self.device.name, getattr(torch, cached.precision))
        if teacher.weights_sha256 != cached.weights_sha256:
            raise TeacherError(
                f"teacher {cached.spec.name}: this machine has other weights than the one that planned the job"
            )
        return teacher

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Compute what `row["shard"]` of `row["split"]` lacks.

        Returns:
            The row with ``images`` (rows encoded), ``computed`` (teacher shards), ``stages`` (JSON of `Stages`) and
            ``error`` (a user-fixable failure in one line, or "").
        """
        dataset, shard = self.datasets[row["split"]], int(row["shard"])
        stages = Stages()
        try:
            with logs.shard_context(row, "extract"), self.device.side_stream():
                missing = [name for name in self.teachers if dataset.teacher(name).record(shard) is None]
                images = self._extract(dataset, shard, missing, stages) if missing else 0
        except USER_ERRORS as error:
            return {**row, "images": 0, "computed": 0, "stages": "{}", "error": self.error_message(error)}
        return {**row, "images": images, "computed": len(missing), "stages": json.dumps(stages), "error": ""}

    def error_message(self, error: Exception) -> str:
        """One of the `USER_ERRORS` in one line."""
        if isinstance(error, torch.OutOfMemoryError):
            return f"{out_of_memory(self.cached.values(), self.batch_size)}; finished shards are kept"
        return str(error)

    def _extract(self, dataset: Dataset, shard: int, names: list[str], stages: Stages) -> int:
        with stages.measure("read"):
            views = read_view_rows(dataset, shard)
        writers = {name: ShardBuilder(self.cached[name], *self._projection(dataset, name)) for name in names}
        for number, pixels in enumerate(stages.measure_each("render", self.rendered(views, names))):
            for name, batch in pixels.items():
                sampled = self.sampled.pop((dataset.teacher(name).store.uri, shard, number), None)
                output, seconds = (sampled.to(self.device.name), 0.0) if sampled else self.encode(name, batch)
                stages["teacher"] += seconds
                with stages.measure("encode"):
                    writers[name].add(output, seconds)
        for name, writer in writers.items():
            with stages.measure("write"):
                writer.commit(dataset.teacher(name), shard, views, self.device.name)
        return views.rows.num_rows

    def features(self, views: ViewRows, names: list[str]) -> Iterator[dict[str, TeacherOutput]]:
        """Features of these teachers for `views`: batches by teacher id, in order."""
        for pixels in self.rendered(views, names):
            yield {name: self.encode(name, batch)[0] for name, batch in pixels.items()}

    def encode(self, name: str, pixels: Tensor) -> tuple[TeacherOutput, float]:
        """A teacher's output for [B, 3, H, W] uint8 pixels, and the seconds that the device took."""
        return self.device.encode(self.teachers[name], pixels)

    def rendered(self, shard: ViewRows, names: list[str]) -> Iterator[dict[str, Tensor]]:
        """Batches of [B, 3, H, W] uint8 pixels by teacher id, rendered `BATCHES_AHEAD` batches ahead of the device."""
        images, rows, _ = shard
        specs = {name: self.teachers[name].spec for name in names}
        assembler = BatchAssembler(self.decoders, specs, rows.num_rows, self.batch_size)
        views, count = views_of(rows), rows.num_rows // max(1, images.num_rows)
        started, chunk = 0, chunk_size(self.batch_size)
        try:
            for number in range(-(-rows.num_rows // self.batch_size)):
                while started < images.num_rows and started * count < (number + 1 + BATCHES_AHEAD) * self.batch_size:
                    part = images["image"][started : started + chunk]
                    assembler.render(part, views[started * count : (started + len(part)) * count], started * count)
                    started += len(part)
                yield assembler.pop(number)
        finally:
            assembler.wait_for_unused()

    def _projection(self, dataset: Dataset, name: str) -> tuple[str, Projection | None]:
        """Name and content of a teacher's projection over a dataset, which is fitted here if it does not exist yet."""
        if not Codec.parse(self.cached[name].codec).pca:
            return "", None
        folder = dataset.teacher(name)
        with self.projection_lock:
            if folder.store.uri not in self.projections:
                if not folder.projection:
                    fitted = dump_projection(self._fit(dataset, name))
                    if not folder.projection:  # another actor may have been faster
                        folder.add_projection(fitted)
                self.projections[folder.store.uri] = folder.projection, projection_of(folder)
            return self.projections[folder.store.uri]

    def _fit(self, dataset: Dataset, name: str) -> Projection | None:
        """The projection of a sample of images.

        Outputs of batches that the sample shares with their shards are kept until then: no teacher runs twice on an image.
        """
        cached, uri = self.cached[name], dataset.teacher(name).store.uri
        patches = []
        for sample in dataset.sample_images(_sample_size(cached)):
            shard, start = read_view_rows(dataset, sample.shard), sample.group * ROW_GROUP_SIZE
            is_last = start + sample.rows == shard.images.num_rows
            first, rest = divmod(start * dataset.policy.rows_per_image, self.batch_size)
            for number, output in enumerate(self.features(shard.slice(start, sample.rows), [name]), first):
                patches.append(output[name].patches.cpu())
                if not rest and (is_last or len(patches[-1]) == self.batch_size):
                    self.sampled[uri, sample.shard, number] = output[name].to("cpu")
        features = torch.cat(patches).float()
        if not torch.isfinite(features).all():
            raise TeacherError(
                f"teacher {cached.spec.name} computed patches with features that are not finite (NaN or infinity)"
            )
        try:
            return fit_projection(Codec.parse(cached.codec), features)
        except UserError as error:
            raise UserError(f"teacher {cached.spec.name}: {error}") from error


def _sample_size(teacher: CachedTeacher) -> int:
    """Images that a projection is fitted on: 16 patches per channel, and at least 256 images."""
    height, width, channels = teacher.shapes["patches"]
    return max(256, -(-16 * channels // (height * width)))
