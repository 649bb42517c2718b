"""`images` shards -> teacher shards: decode once, ask every teacher that is missing, commit each on its own.

Rendering runs ahead of the device (`pipeline/imaging/decoder_pool.py`), and an actor works on several shards at once
(`SHARDS_AT_ONCE`): while one is on the device the others are decoded or written. Features never travel: the actor that
computed a shard writes it. This module imports neither Ray nor MLflow.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.cache.fill.device import TeacherDevice
from pipeline.cache.layout.cached_teacher import CachedTeacher, projection_of
from pipeline.cache.layout.codec import Codec, Projection, dump_projection, fit_projection
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.shards import ROW_GROUP_SIZE, ShardFolder, ShardRecord
from pipeline.cache.layout.stats import MomentSums
from pipeline.cache.layout.view_rows import ViewRows, read_view_rows, views_of
from pipeline.errors import UserError
from pipeline.imaging.decoder_pool import CropTask, DecoderPool, DecodeTasks, PendingDecode, chunk_size
from pipeline.imaging.geometry import View
from pipeline.imaging.shared_arrays import ArrayHandle
from pipeline.runtime import logs
from pipeline.runtime.allocator import keep_freed_memory
from teachers.base import Teacher, TeacherError, TeacherOutput, TeacherSpec

Item = TypeVar("Item")

SHARDS_AT_ONCE = {"cpu": 2, "cuda": 4}
"""Shards that an actor works on, by its device: beside a GPU, writing a shard takes longer than the forwards of one."""

JUDGED = 32
"""Images of a shard by which the fidelity of its codec is judged."""

AHEAD = 2
"""Batches that are rendered ahead of the device."""

USER_ERRORS = (UserError, TeacherError, torch.OutOfMemoryError)
"""Failures whose cause the user can fix."""


def out_of_memory(teachers: Iterable[CachedTeacher], batch_size: int) -> str:
    """What to say where a GPU's memory does not suffice for these teachers."""
    wide = any(teacher.precision == "float32" for teacher in teachers)
    return (
        f"the GPU has too little memory for {batch_size} images at once: lower cache.batch_size"
        f"{', or set cache.precision=bfloat16' if wide else ''}"
    )


class Stages(dict[str, float]):
    """Seconds of one shard by stage: read, render (waiting for it), teacher (on the device), encode, write."""

    def __missing__(self, name: str) -> float:
        return 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done within belongs to this stage."""
        started = time.perf_counter()
        yield
        self[name] += time.perf_counter() - started

    def each(self, name: str, items: Iterator[Item]) -> Iterator[Item]:
        """The items; the time that each is waited for belongs to this stage."""
        while True:
            with self.part(name):
                item = next(items, None)
            if item is None:
                return
            yield item


class Extract:
    """Commits the missing teachers of one shard a call; a Ray Data row is a shard.

    Args:
        datasets: by split (``train``, ``val``); their `images` shards are complete.
        teachers: loaded once, kept for all shards.
        device: ``cuda`` or ``cpu``.
        threads: that decode and resize; beside a GPU they are processes.
        batch_size: images per forward.
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
        logging.getLogger("teachers").setLevel(logging.ERROR)  # the driver has said what there is to say
        self.datasets = datasets
        self.batch_size = batch_size
        self.decoders = DecoderPool(threads, processes=device == "cuda")
        self.device = TeacherDevice(device)
        self.cached = {teacher.id: teacher for teacher in teachers}
        self.teachers = {teacher.id: self._load(teacher) for teacher in teachers}
        self.projection_lock = threading.Lock()
        self.projections: dict[str, tuple[str, Projection | None]] = {}

    def _load(self, cached: CachedTeacher) -> Teacher:
        teacher = cached.create()
        teacher.load(self.device.name, getattr(torch, cached.precision))
        if teacher.weights_sha256 != cached.weights_sha256:
            raise TeacherError(
                f"teacher {cached.spec.name}: this machine has other weights than the one that planned the job"
            )
        return teacher

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Compute what is missing of `row["shard"]` of `row["split"]`.

        A failure that the user can mend comes back as ``error``, so that it stays one clear line.
        """
        with logs.shard_context(row, "extract"), self.device.beside():
            return self._answer(row)

    def _answer(self, row: dict[str, Any]) -> dict[str, Any]:
        dataset, shard = self.datasets[row["split"]], int(row["shard"])
        stages = Stages()
        try:
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
        with stages.part("read"):
            views = read_view_rows(dataset, shard)
        writers = {name: ShardBuilder(self.cached[name], *self._projection(dataset, name)) for name in names}
        for pixels in stages.each("render", self.rendered(views, names)):
            for name, batch in pixels.items():
                output, seconds = self.encode(name, batch)
                stages["teacher"] += seconds
                with stages.part("encode"):
                    writers[name].add(output, seconds)
        for name, writer in writers.items():
            with stages.part("write"):
                writer.commit(dataset.teacher(name), shard, views, self.device.name)
        return views.rows.num_rows

    def features(self, views: ViewRows, names: list[str]) -> Iterator[dict[str, TeacherOutput]]:
        """Features of these teachers for `views`: batches by teacher id, in order."""
        for pixels in self.rendered(views, names):
            yield {name: self.encode(name, batch)[0] for name, batch in pixels.items()}

    def encode(self, name: str, pixels: Tensor) -> tuple[TeacherOutput, float]:
        """What a teacher says of [B, 3, H, W] uint8, and the seconds of the device for it."""
        return self.device.encode(self.teachers[name], pixels)

    def rendered(self, shard: ViewRows, names: list[str]) -> Iterator[dict[str, Tensor]]:
        """Batches of [B, 3, H, W] uint8 pixels by teacher id, rendered `AHEAD` batches ahead of the device."""
        images, rows, _ = shard
        specs = {name: self.teachers[name].spec for name in names}
        stack = _Batches(self.decoders, specs, rows.num_rows, self.batch_size)
        views, count = views_of(rows), rows.num_rows // max(1, images.num_rows)
        given, piece = 0, chunk_size(self.batch_size)
        try:
            for number in range(-(-rows.num_rows // self.batch_size)):
                while given < images.num_rows and given * count < (number + 1 + AHEAD) * self.batch_size:
                    part = images["image"][given : given + piece]
                    stack.render(part, views[given * count : (given + len(part)) * count], given * count)
                    given += len(part)
                yield stack.pop(number)
        finally:
            stack.wait_for_unused()

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
        """The projection of a sample of images, which the teacher encodes once more when their shards are computed."""
        cached = self.cached[name]
        patches = []
        for sample in dataset.sample_images(_sample_size(cached)):
            views = read_view_rows(dataset, sample.shard).slice(sample.group * ROW_GROUP_SIZE, sample.rows)
            patches += [output[name].patches.cpu() for output in self.features(views, [name])]
        features = torch.cat(patches).float()
        if not torch.isfinite(features).all():
            raise TeacherError(
                f"teacher {cached.spec.name} gave patches features that are not finite (NaN or infinity)"
            )
        try:
            return fit_projection(Codec.parse(cached.codec), features)
        except UserError as error:
            raise UserError(f"teacher {cached.spec.name}: {error}") from error


def _sample_size(teacher: CachedTeacher) -> int:
    """Images that a projection is fitted on: 16 patches per channel, and at least 256 images."""
    height, width, channels = teacher.patches_shape
    return max(256, -(-16 * channels // (height * width)))


class _Batches:
    """Batches in the making, of which pieces of work fill their share.

    Args:
        specs: of the teachers, by id.
        rows: in all.
        size: of a batch.
    """

    def __init__(self, decoders: DecoderPool, specs: Mapping[str, TeacherSpec], rows: int, size: int) -> None:
        self.decoders, self.specs, self.rows, self.size = decoders, specs, rows, size
        self.pixels: dict[int, dict[str, np.ndarray]] = {}
        self.places: dict[int, dict[str, Sequence[np.ndarray | ArrayHandle]]] = {}
        self.pending: dict[int, list[PendingDecode]] = {}

    def render(self, images: pa.ChunkedArray, views: Sequence[View], first: int) -> None:
        """Hand over images, whose views are the rows from `first` on."""
        count = len(views) // len(images)
        work: DecodeTasks = [
            (data, [drawing for row in range(i, i + count) for drawing in self._crop_tasks(views[row], first + row)])
            for i, data in zip(range(0, len(views), count), images.to_pylist(), strict=True)
        ]
        pending = self.decoders.submit(work)
        for number in range(first // self.size, (first + len(views) - 1) // self.size + 1):
            self.pending.setdefault(number, []).append(pending)

    def _crop_tasks(self, view: View, row: int) -> list[CropTask]:
        number, place = divmod(row, self.size)
        if number not in self.pixels:
            # Of one size, so that their memory is lent again; what a short batch leaves of it is never touched.
            self.pixels[number] = {
                name: self.decoders.empty(self.size, 3, *spec.input_size) for name, spec in self.specs.items()
            }
            self.places[number] = {
                name: self.decoders.row_targets(pixels) for name, pixels in self.pixels[number].items()
            }
        places = self.places[number]
        return [CropTask(view, spec.interpolation, places[name][place]) for name, spec in self.specs.items()]

    def pop(self, number: int) -> dict[str, Tensor]:
        """A batch, when it is done."""
        self.decoders.finish(self.pending[number])
        del self.pending[number], self.places[number]
        count = min(self.size, self.rows - number * self.size)
        return {name: torch.from_numpy(pixels)[:count] for name, pixels in self.pixels.pop(number).items()}

    def wait_for_unused(self) -> None:
        """Wait for what nobody will use: its arrays may be lent again only then."""
        wait([pending.future for some in self.pending.values() for pending in some])


class ShardBuilder:
    """Gathers the encoded features of one teacher and shard, and their statistics."""

    def __init__(self, teacher: CachedTeacher, projection_name: str, projection: Projection | None) -> None:
        self.teacher = teacher
        self.projection_name = projection_name
        self.codecs = teacher.codecs(projection)
        self.encoded: dict[str, list[np.ndarray]] = {kind: [] for kind in teacher.shapes}
        self.sums = {kind: MomentSums() for kind in teacher.shapes}
        self.seconds = 0.0
        self.fidelity: dict[str, dict[str, float]] = {}

    def add(self, output: TeacherOutput, seconds: float) -> None:
        """The features of the next batch, on any device, and the seconds that they took.

        Raises:
            TeacherError: where they are not finite, or too large for the codec.
        """
        self.seconds += seconds
        for kind in self.encoded:
            features: Tensor = getattr(output, kind)
            codec = self.codecs[kind].to(features.device)
            try:
                rows = codec.encode(features)
            except ValueError as error:
                raise TeacherError(f"teacher {self.teacher.spec.name} gave {kind} {error}") from error
            self.encoded[kind].append(rows)
            self.sums[kind].add(features)
            if kind not in self.fidelity:
                self.fidelity[kind] = codec.fidelity(features[:JUDGED], rows[:JUDGED])

    def commit(self, folder: ShardFolder, shard: int, views: ViewRows, device: str) -> ShardRecord:
        """Write the shard of features of these views."""
        table = views.rows.select(["sample_id", "view"])
        for kind, parts in self.encoded.items():
            column = self._column(kind, parts)
            table = table.append_column(pa.field(kind, column.type, nullable=False), column)
        facts = {
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "device_seconds": round(self.seconds, 3),
            "fidelity": self.fidelity,
            "torch": torch.__version__,
            **views.files,
        }
        return folder.commit(
            shard,
            table.replace_schema_metadata(self._metadata()),
            {kind: sums.moments() for kind, sums in self.sums.items() if sums.count},
            facts,
            projection=self.projection_name,
            compression="zstd" if Codec.parse(self.teacher.codec).zstd else "none",
        )

    def _column(self, kind: str, parts: list[np.ndarray]) -> pa.FixedSizeBinaryArray:
        width = self.codecs[kind].row_bytes
        rows = np.concatenate(parts) if parts else np.empty((0, width), np.uint8)
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(rows)])

    def _metadata(self) -> dict[str, str]:
        shapes = {f"{kind}.shape": json.dumps(shape) for kind, shape in self.teacher.shapes.items()}
        codec = {"codec": self.teacher.codec, "projection": self.projection_name}
        return {"teacher": self.teacher.id, **codec, **shapes}
