"""`images` shards -> teacher shards: decode once, run every teacher whose shard is missing, commit each shard by itself.

Rendering runs ahead of the device (`pipeline/imaging/decoder_pool.py`), and an actor works on several shards concurrently
(`CONCURRENT_SHARDS`): while one is on the device, the others are decoded or written. Features are not sent anywhere: the
actor that computed a shard writes it. This module imports neither Ray nor MLflow.
"""

import json
import logging
import math
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

from pipeline.cache.fill.shard_builder import ShardBuilder
from pipeline.cache.layout.cached_teacher import CachedTeacher, projections_of
from pipeline.cache.layout.codec import Codec, Projection
from pipeline.cache.layout.part import Part, image_groups, teacher_home
from pipeline.cache.layout.projection import dump_projections, fit_projections
from pipeline.cache.layout.shards import ROW_GROUP_SIZE, RowGroup, add_projection, evenly_spaced, projection_in
from pipeline.cache.layout.shares import NONE_ASKED
from pipeline.cache.layout.view_rows import ViewRows, read_view_rows, views_of
from pipeline.errors import UserError, blame_field
from pipeline.imaging.decoder_pool import CropTask, DecoderPool, DecodeTasks, Partner, PendingDecode, chunk_size
from pipeline.imaging.geometry import View
from pipeline.imaging.gpu_decode import make_decoders
from pipeline.imaging.shared_arrays import ArrayHandle
from pipeline.runtime import logs
from pipeline.runtime.allocator import keep_freed_memory
from pipeline.runtime.interpreter import launch_promptly
from teachers.base import Teacher, TeacherError, TeacherOutput, TeacherSpec

Item = TypeVar("Item")

CONCURRENT_SHARDS = {"cpu": 2, "cuda": 4}
"""Shards that an actor works on, by its device; with a GPU, writing a shard takes longer than computing one."""
BATCHES_AHEAD = 2
"""Batches rendered ahead of the device."""
USER_ERRORS = (UserError, TeacherError, torch.OutOfMemoryError)
"""Failures whose cause the user can fix."""


def out_of_memory(teachers: Iterable[CachedTeacher], batch_size: int) -> str:
    """The error message if a GPU has too little memory for these teachers."""
    teachers = [*teachers]
    wide = any(teacher.precision == "float32" for teacher in teachers)
    decodes = any(teacher.decoder != "cpu" for teacher in teachers)
    return (
        f"the GPU has too little memory for {batch_size} images at once: lower cache.batch_size"
        f"{', or set cache.precision=bfloat16' if wide else ''}{', or set cache.decoder=cpu' if decodes else ''}"
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


class TeacherDevice:
    """The device ``cuda`` or ``cpu`` that teachers run on: forwards one after the other, a thread's other work in parallel.

    On a GPU each thread has a CUDA stream of its own, so that the codec, statistics and copies of one shard overlap the
    forward of another, and the next forward is queued while one runs. Forwards share the default stream and so reuse its
    memory: the GPU memory needed does not grow with the number of threads.
    """

    def __init__(self, name: str) -> None:
        if name == "cuda":
            launch_promptly()
        self.name = name
        self.forward_lock = threading.Lock()
        self.local = threading.local()

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """In this block, the thread's work on the device overlaps the forwards."""
        if self.name != "cuda":
            yield
            return
        if not hasattr(self.local, "stream"):
            self.local.stream = torch.cuda.Stream()
        with torch.cuda.stream(self.local.stream):
            yield

    def encode(self, teacher: Teacher, pixels: Tensor) -> tuple[TeacherOutput, float]:
        """A teacher's output, ready for any stream, and the seconds that the device took."""
        if self.name == "cuda":
            return self._encode_on_gpu(teacher, pixels)
        with self.forward_lock:
            started = time.perf_counter()
            return teacher.encode(pixels), time.perf_counter() - started

    def _encode_on_gpu(self, teacher: Teacher, pixels: Tensor) -> tuple[TeacherOutput, float]:
        pixels, copied = pixels.to(self.name), torch.cuda.current_stream()
        start = torch.cuda.Event(enable_timing=True)
        # A blocking event: a waiting thread must not take a core from decoding.
        end = torch.cuda.Event(enable_timing=True, blocking=True)
        with self.forward_lock, torch.cuda.stream(torch.cuda.default_stream()):
            torch.cuda.default_stream().wait_stream(copied)
            start.record()
            output = teacher.encode(pixels)
            end.record()
        end.synchronize()
        return output, start.elapsed_time(end) / 1000


class BatchAssembler:
    """Batches of `size` out of `rows` rows, partially rendered; a chunk of images fills rows of one or several batches."""

    def __init__(self, decoders: DecoderPool, specs: Mapping[str, TeacherSpec], rows: int, size: int) -> None:
        self.decoders, self.specs, self.rows, self.size = decoders, specs, rows, size
        self.pixels: dict[int, dict[str, np.ndarray]] = {}
        self.targets: dict[int, dict[str, Sequence[np.ndarray | ArrayHandle]]] = {}
        self.pending: dict[int, list[PendingDecode]] = {}

    def render(self, images: pa.ChunkedArray, views: Sequence[View], partners: Sequence[Any], first: int) -> None:
        """Start rendering a chunk of images, whose views and partners (`ViewRows.partners`) are the rows from `first` on."""
        count = len(views) // len(images)
        work: DecodeTasks = [
            (data, [t for row in range(i, i + count) for t in self._crop_tasks(views[row], partners[row], first + row)])
            for i, data in zip(range(0, len(views), count), images.to_pylist(), strict=True)
        ]
        pending = self.decoders.submit(work)
        for number in range(first // self.size, (first + len(views) - 1) // self.size + 1):
            self.pending.setdefault(number, []).append(pending)

    def _crop_tasks(self, view: View, mixed: tuple[pa.Scalar, View, float] | None, row: int) -> list[CropTask]:
        number, position = divmod(row, self.size)
        if number not in self.pixels:
            # All of one size, so that their memory is reused; the rows that a short batch leaves over are never touched.
            self.pixels[number] = {
                name: self.decoders.arrays.empty(self.size, spec.channels, *spec.input_size)
                for name, spec in self.specs.items()
            }
            self.targets[number] = {
                name: self.decoders.arrays.row_targets(pixels) for name, pixels in self.pixels[number].items()
            }
        targets = self.targets[number]
        partner = mixed and Partner(mixed[0].as_py(), *mixed[1:])
        return [
            CropTask(view, spec.interpolation, targets[name][position], partner) for name, spec in self.specs.items()
        ]

    def pop(self, number: int) -> dict[str, Tensor]:
        """Wait for a batch and return its pixels by teacher id, as `Teacher.encode` takes them."""
        self.decoders.finish(self.pending[number])
        del self.pending[number], self.targets[number]
        count = min(self.size, self.rows - number * self.size)
        return {name: torch.from_numpy(pixels)[:count] for name, pixels in self.pixels.pop(number).items()}

    def wait_for_unused(self) -> None:
        """Wait for rendering that nobody will use, so that its arrays can be reused."""
        wait([pending.future for some in self.pending.values() for pending in some])


class Extract:
    """Commits one shard of every teacher that lacks it per call; a Ray Data row is a shard.

    Args:
        parts: by part and view, with complete `images` shards.
        basis: shards (part, number) on whose images projections are fitted that do not exist yet.
        teachers: of one decoder.
        device: ``cuda`` or ``cpu``.
        threads: number of decoders on CPU cores; with a GPU they are processes.

    Raises:
        UserError: if the teachers' images are to be decoded on a GPU, and the device is none.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        basis: Sequence[tuple[str, int]],
        teachers: Sequence[CachedTeacher],
        device: str,
        threads: int,
        batch_size: int,
    ) -> None:
        keep_freed_memory()
        logging.getLogger("teachers").setLevel(logging.ERROR)  # the driver has logged their warnings
        self.parts, self.basis = parts, [*dict.fromkeys(parts[key] for key, _ in basis)]
        self.basis_shards = {*basis}
        self.batch_size = batch_size
        (decoder,) = {teacher.decoder for teacher in teachers} or {"cpu"}
        with blame_field("cache.decoder"):
            self.decoders = make_decoders(decoder, threads, device)
        self.device = TeacherDevice(device)
        self.cached = {teacher.id: teacher for teacher in teachers}
        self.teachers = {teacher.id: self._load(teacher) for teacher in teachers}
        self.projection_lock = threading.Lock()
        self.projections: dict[str, tuple[str, dict[str, Projection] | None]] = {}
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
        """Compute what `row["shard"]` of `row["part"]` lacks.

        Returns:
            The row with ``images`` (rows encoded, over all teachers), ``computed`` (teacher shards), ``stages`` (JSON of
            `Stages`) and ``error`` (a user-fixable failure in one line, or "").
        """
        part, shard = self.parts[row["part"]], int(row["shard"])
        stages = Stages()
        try:
            with logs.shard_context(row, "extract"), self.device.side_stream():
                missing = [name for name in self.teachers if part.teacher(name).record(shard) is None]
                images = self._extract(part, shard, missing, stages) if missing else 0
        except USER_ERRORS as error:
            return {**row, "images": 0, "computed": 0, "stages": "{}", "error": self.error_message(error)}
        return {**row, "images": images, "computed": len(missing), "stages": json.dumps(stages), "error": ""}

    def error_message(self, error: Exception) -> str:
        """One of the `USER_ERRORS` in one line."""
        if isinstance(error, torch.OutOfMemoryError):
            return f"{out_of_memory(self.cached.values(), self.batch_size)}; finished shards are kept"
        return str(error)

    def _extract(self, part: Part, shard: int, names: list[str], stages: Stages) -> int:
        with stages.measure("read"):
            views = read_view_rows(part, shard)
        writers = {name: ShardBuilder(self.cached[name], *self._projections(name)) for name in names}
        encoded = 0
        for some in by_share(self.cached[name] for name in names).values():
            asked = some[0].asked(views.images["key"])
            self._encode(part, shard, views, asked, {teacher.id: writers[teacher.id] for teacher in some}, stages)
            encoded += len(some) * int(asked.sum()) * part.policy.rows_per_image
        for name, writer in writers.items():
            with stages.measure("write"):
                writer.commit(part.teacher(name), shard, views, self.device.name)
        return encoded

    def _encode(
        self,
        part: Part,
        shard: int,
        views: ViewRows,
        asked: np.ndarray,
        writers: Mapping[str, ShardBuilder],
        stages: Stages,
    ) -> None:
        """Compute the features of the images that are `asked` about ([N] bool)."""
        fitted = {name: self._fitted_groups(part, name, shard) for name in writers}
        groups = np.repeat(np.flatnonzero(asked) // ROW_GROUP_SIZE, part.policy.rows_per_image)
        rendered = self.rendered(views if asked.all() else views.of_images(asked), [*writers])
        for number, pixels in enumerate(stages.measure_each("render", rendered)):
            for name, batch in pixels.items():
                sampled = self.sampled.pop((part.teacher(name).store.uri, shard, number), None)
                output, seconds = (sampled.to(self.device.name), 0.0) if sampled else self.encode(name, batch)
                stages["teacher"] += seconds
                with stages.measure("encode"):
                    first = number * self.batch_size
                    own = {*groups[first : first + len(batch)].tolist()}
                    writers[name].add(output, seconds, held_out=fitted[name].isdisjoint(own))

    def features(self, views: ViewRows, names: list[str]) -> Iterator[dict[str, TeacherOutput]]:
        """Features of these teachers for `views`: batches by teacher id, in order."""
        for pixels in self.rendered(views, names):
            yield {name: self.encode(name, batch)[0] for name, batch in pixels.items()}

    def encode(self, name: str, pixels: Tensor) -> tuple[TeacherOutput, float]:
        """A teacher's output, and the seconds that the device took."""
        return self.device.encode(self.teachers[name], pixels)

    def rendered(self, shard: ViewRows, names: list[str]) -> Iterator[dict[str, Tensor]]:
        """Batches of pixels by teacher id, rendered `BATCHES_AHEAD` batches ahead of the device."""
        images, rows = shard.images, shard.rows
        specs = {name: self.teachers[name].spec for name in names}
        assembler = BatchAssembler(self.decoders, specs, rows.num_rows, self.batch_size)
        views, partners, count = views_of(rows), shard.partners(), rows.num_rows // max(1, images.num_rows)
        started, chunk = 0, chunk_size(self.batch_size)
        try:
            for number in range(-(-rows.num_rows // self.batch_size)):
                while started < images.num_rows and started * count < (number + 1 + BATCHES_AHEAD) * self.batch_size:
                    part = images["image"][started : started + chunk]
                    some = slice(started * count, (started + len(part)) * count)
                    assembler.render(part, views[some], partners[some], some.start)
                    started += len(part)
                yield assembler.pop(number)
        finally:
            assembler.wait_for_unused()

    def _sample(self, name: str) -> list[RowGroup]:
        """Row groups of images, evenly spaced over the parts of the basis, that the projections of a teacher are fitted on."""
        shards, parts = self.basis_shards, self.basis
        groups = [group for group in image_groups(parts) if (parts[group.part].key, group.shard) in shards]
        return evenly_spaced(
            groups, math.ceil(_sample_size(self.cached[name]) / self.cached[name].share / ROW_GROUP_SIZE)
        )

    def _fitted_groups(self, part: Part, name: str, shard: int) -> set[int]:
        """Row groups of a shard's images that the projections of a teacher are fitted on."""
        if part not in self.basis or not Codec.parse(self.cached[name].codec).pca:
            return set()
        return {group.group for group in self._sample(name) if self.basis[group.part] == part and group.shard == shard}

    def _projections(self, name: str) -> tuple[str, dict[str, Projection] | None]:
        """File and content of a teacher's projections, which are fitted here if they do not exist yet."""
        if not Codec.parse(self.cached[name].codec).pca:
            return "", None
        cache = self.basis[0].cache
        home = teacher_home(cache, name)
        with self.projection_lock:
            if name not in self.projections:
                if not projection_in(home):
                    fitted = dump_projections(Codec.parse(self.cached[name].codec), self._fit(name))
                    if not projection_in(home):  # another actor may have been faster
                        add_projection(home, fitted)
                self.projections[name] = projection_in(home), projections_of(cache, self.cached[name])
            return self.projections[name]

    def _fit(self, name: str) -> dict[str, Projection]:
        """The projections of a sample of images.

        Outputs of batches that the sample shares with their shards are kept until then: no teacher runs twice on an image. A
        teacher with a share does on its sample.
        """
        cached = self.cached[name]
        parts: dict[str, list[Tensor]] = {kind: [] for kind in cached.shapes}
        for sample in self._sample(name):
            part = self.basis[sample.part]
            shard, start = read_view_rows(part, sample.shard), sample.group * ROW_GROUP_SIZE
            is_last = start + sample.rows == shard.images.num_rows
            first, rest = divmod(start * part.policy.rows_per_image, self.batch_size)
            chosen = shard.slice(start, sample.rows)
            if cached.share < 1:  # its batches begin elsewhere
                chosen, rest = chosen.of_images(cached.asked(chosen.images["key"])), self.batch_size
            for number, output in enumerate(self.features(chosen, [name]), first):
                for kind, features in parts.items():
                    features.append(getattr(output[name], kind).cpu())
                if not rest and (is_last or len(parts["patches"][-1]) == self.batch_size):
                    self.sampled[part.teacher(name).store.uri, sample.shard, number] = output[name].to("cpu")
        if not parts["patches"]:
            raise UserError(f"teacher {cached.spec.name}: {NONE_ASKED.format(share=cached.share)}")
        together = {kind: torch.cat(features).float() for kind, features in parts.items()}
        for kind, values in together.items():
            if not torch.isfinite(values).all():
                raise TeacherError(
                    f"teacher {cached.spec.name} computed {kind} with features that are not finite (NaN or infinity)"
                )
        try:
            return fit_projections(Codec.parse(cached.codec), together)
        except UserError as error:
            raise UserError(f"teacher {cached.spec.name}: {error}") from error


def by_share(teachers: Iterable[CachedTeacher]) -> dict[float, list[CachedTeacher]]:
    """Teachers that are asked about the same images, by their share."""
    found: dict[float, list[CachedTeacher]] = {}
    for teacher in teachers:
        found.setdefault(teacher.share, []).append(teacher)
    return found


def _sample_size(teacher: CachedTeacher) -> int:
    """Images that a projection is fitted on: 16 patches per channel, and at least 256 images."""
    height, width, channels = teacher.shapes["patches"]
    return max(256, -(-16 * channels // (height * width)))
