"""Distillation as a task of the training engine. Imports neither Ray nor MLflow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.cache.layout.cached_teacher import CachedTeacher, load_codecs
from pipeline.cache.layout.codec import FeatureCodec
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.shares import PRESENT
from pipeline.cache.read.reader import Batch, CacheReader
from pipeline.cache.read.reader_process import ReaderProcess
from pipeline.distill.augment import augment
from pipeline.distill.balance import is_scheduled, teacher_weights
from pipeline.distill.config import DistillJobConfig
from pipeline.distill.distiller import Distiller
from pipeline.distill.figures import FigureWriter
from pipeline.distill.masks import draws_shape
from pipeline.distill.mixed import MixedBatch, MixedReader, divide_batch, first_batch, parts_of
from pipeline.distill.phases import PhaseState, transfer_weights
from pipeline.distill.sam_decoders import load_decoders, makes_masks
from pipeline.distill.standardise import make_standardisers
from pipeline.errors import UserError
from pipeline.evaluate.knn import student_knn
from pipeline.imaging.decoder_pool import decoder_count
from pipeline.imaging.gpu_decode import NO_GPU
from pipeline.student.model import Encoder, Student, StudentOutput, create_backbone, freeze_unused
from pipeline.training.task import History, Task
from teachers.sam_masks import SamMasks

MAX_IMAGES, MAX_MASKED = 4096, 256
"""Most held-out images that are compared after an epoch, and of which masks are."""


@dataclass(frozen=True)
class Resolution:
    """A further input size of the student in each step.

    Attributes:
        share: of the samples.
        teachers: as cached for this size in `train`, in the order of those of the job.
    """

    input_size: int
    share: float
    train: Dataset
    teachers: tuple[CachedTeacher, ...]


@dataclass(frozen=True)
class DistillJob:
    """What every training worker receives.

    Attributes:
        val: labelled held-out images for kNN.
        teachers: with complete shards in `train` and `held_out`.
        held_out: held-out images, labelled or not, on which student and teachers are compared.
        resolutions: further input sizes in each step.
    """

    config: DistillJobConfig
    train: Dataset
    val: Dataset | None
    teachers: tuple[CachedTeacher, ...]
    held_out: Dataset | None = None
    resolutions: tuple[Resolution, ...] = ()


def build_student(config: DistillJobConfig) -> Student:
    """The student of a configuration with its seeded initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone = create_backbone(config.student.name, config.student.args)
        return Student(Encoder(backbone), config.student.token_dim, config.student.taps)


def build_distiller(job: DistillJob, decoders: Mapping[str, SamMasks] = MappingProxyType({})) -> Distiller:
    """Student, heads and frozen statistics, with seeded initial weights; `decoders` as in :class:`Distiller`."""
    config, teachers = job.config, job.teachers
    student, size = build_student(config), config.student.input_size
    freeze_unused(student, size)
    standardisers = {
        teacher.id: make_standardisers(job.train, teacher, config.loss.standardise) for teacher in teachers
    }
    codecs = {teacher.id: load_codecs(job.train.cache, teacher) for teacher in teachers}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        hidden, loss = config.student.head_dim, config.loss
        distiller = Distiller(student, teachers, standardisers, codecs, size, hidden, loss, decoders)
    for further in job.resolutions:
        found = {teacher.id: load_codecs(further.train.cache, teacher) for teacher in further.teachers}
        distiller.add_size(further.input_size, further.teachers, found)
    return distiller


def build_reader(
    job: DistillJob, rank: int = 0, world: int = 1, nvjpeg: str | None = None
) -> CacheReader | ReaderProcess | MixedReader:
    """Training images and features in the order of one rank; with a GPU, a process of its own reads them.

    Args:
        nvjpeg: the GPU that decodes JPEGs, if one does.
    """
    config = job.config
    make = ReaderProcess if torch.cuda.is_available() else CacheReader
    sources = [(job.train, job.teachers, config.student.input_size)]
    sources += [(further.train, further.teachers, further.input_size) for further in job.resolutions]
    sizes = divide_batch(config.train.batch_size // world, [further.share for further in job.resolutions])
    readers = [
        make(
            dataset,
            teachers,
            image_size=side,
            batch_size=size,
            seed=config.seed + number,  # the sizes of a step have different images
            window=config.train.shuffle_window,
            rank=rank,
            world=world,
            threads=decoder_count(),
            nvjpeg=nvjpeg,
            per_step=config.views.per_step,
        )
        for number, ((dataset, teachers, side), size) in enumerate(zip(sources, sizes, strict=True))
    ]
    return MixedReader(readers, sizes) if job.resolutions else readers[0]


def decoding_gpu(config: DistillJobConfig) -> str | None:
    """The GPU of this process if it decodes the training images; UserError if it is to, and there is none."""
    if config.train.decoder == "cpu":
        return None
    if not torch.cuda.is_available():
        raise UserError(f"train.decoder: {NO_GPU}")
    return f"cuda:{torch.cuda.current_device()}"


class HeldOut:
    """A fixed sample of a dataset with every teacher's features, in a fixed order.

    Args:
        image_size: side of the student's input in pixels.
        batch_size: most images per forward pass.

    Attributes:
        codecs: decoders by teacher id and kind.

    Raises:
        UserError: if shards of a teacher are missing.
    """

    def __init__(self, dataset: Dataset, teachers: Sequence[CachedTeacher], image_size: int, batch_size: int) -> None:
        rows = dataset.count * dataset.policy.rows_per_image
        # Equal batches that leave out as few images as possible.
        self.batch_size = max(1, rows // -(-rows // batch_size))
        self.codecs = {teacher.id: load_codecs(dataset.cache, teacher) for teacher in teachers}
        self.reader = CacheReader(
            dataset,
            teachers,
            image_size=image_size,
            batch_size=self.batch_size,
            threads=decoder_count(),
            processes=torch.cuda.is_available(),
        )

    def batches(self) -> Iterator[Batch]:
        """The same batches every time."""
        yield from islice(self.reader.batches(0), max(1, MAX_IMAGES // self.batch_size))


@torch.inference_mode()
def compare_with_teachers(
    module: Distiller, batches: Iterator[Batch], codecs: Mapping[str, Mapping[str, FeatureCodec]]
) -> dict[str, float]:
    """Mean cosine and loss of the predicted features, per teacher and kind; `codecs` as in :class:`HeldOut`.

    Returns:
        ``val_cosine/<teacher>/<kind>`` in [-1, 1], the mean over patches or summaries of standardised features, and
        ``val_loss/<teacher>/<kind>``, the unweighted training losses that need no queue. Where masks are compared also
        ``val_mask_iou/<teacher>`` in [0, 1], that of the student's and the teacher's masks under the same prompts every time.
    """
    device = module.weights.device
    sums: defaultdict[str, float] = defaultdict(float)
    images: defaultdict[str, int] = defaultdict(int)
    masked: defaultdict[str, int] = defaultdict(int)
    random = torch.Generator().manual_seed(0)
    for batch in batches:
        output = module.student(batch.images.to(device))
        for label, target in module.labelled_targets():
            raw = {kind: rows.to(device) for kind, rows in batch.features[target.teacher.id].items()}
            seen = output
            if PRESENT in raw:
                known = raw.pop(PRESENT).bool()
                if not known.any():
                    continue
                seen = StudentOutput(*(part[known] for part in output))
                raw = {kind: rows[known] for kind, rows in raw.items()}
            predicted, wanted = target.predict(seen), target.targets(raw, codecs[target.teacher.id])
            images[label] += len(seen.summary)
            for kind, loss in target.image_losses(predicted, wanted).items():
                cosines = F.cosine_similarity(predicted[kind].float(), wanted[kind].float(), dim=-1)
                sums[f"val_cosine/{label}/{kind}"] += float(cosines.mean()) * len(seen.summary)
                sums[f"val_loss/{label}/{kind}"] += float(loss.sum())
            if target.masks is not None and masked[label] < MAX_MASKED:
                draws = torch.rand(len(seen.summary), *draws_shape(module.loss.masks), generator=random).to(device)
                _, iou = target.masks(*target.embeddings(seen, raw, codecs[target.teacher.id]), draws)
                sums[f"val_mask_iou/{label}"] += float(iou.sum())
                masked[label] += len(iou)
    means = {}
    for name, total in sums.items():
        measure, label = name.split("/", 1)
        means[name] = total / (masked[label] if measure == "val_mask_iou" else images[label.rsplit("/", 1)[0]])
    return means


class DistillTask(Task):
    """Distils on one rank.

    Args:
        before: file with the state of the phase before.
        figures: draws after evaluations.
    """

    module: Distiller
    uses_all_parameters = compiles_by_default = True

    def __init__(
        self,
        job: DistillJob,
        rank: int = 0,
        world: int = 1,
        before: str | None = None,
        figures: FigureWriter | None = None,
    ) -> None:
        self.job, self.figures, self.world = job, figures, world
        config = job.config
        self.seed = config.seed
        self.module = build_distiller(job, load_decoders(job.teachers))
        if before:
            transfer_weights(self.module, PhaseState.load(Path(before)))
        self.scales: dict[str, Tensor] = {}
        self.nvjpeg = decoding_gpu(config)
        self.reader = build_reader(job, rank, world, self.nvjpeg)
        self._steps = cache(self.reader.steps)

    def steps(self, epoch: int) -> int:
        """Steps of an epoch."""
        return self._steps(epoch)

    def batches(self, epoch: int, start: int) -> Iterator[Batch | MixedBatch]:
        """This rank's batches of an epoch."""
        return self.reader.batches(epoch, start)

    def parts(self, batch: Batch | MixedBatch) -> Sequence[Batch]:
        """The batch of each input size."""
        return parts_of(batch)

    def with_share(self, share: int) -> DistillTask:
        """This task with the batches of another share."""
        other = copy(self)
        other.reader = build_reader(self.job, share, self.world, self.nvjpeg)
        return other

    def loss(self, module: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """The distillation loss of a batch; module and batch are on `device`.

        In training, augmentation, teacher dropping and prompts use torch's CPU generator, which the engine seeds.
        """
        config, teachers = self.job.config, self.job.teachers
        images, weights, draws, step, prompts = batch.images, None, None, None, None
        if module.training:
            images = augment(images, config.augment)
            if config.loss.drop:
                draws = torch.rand(len(batch.keys), len(teachers)).to(device, non_blocking=True)
            epoch, number = batch.position
            steps = self.steps(epoch)
            if is_scheduled(teachers):
                progress = (epoch + number / steps) / config.train.epochs
                weights = teacher_weights(teachers, progress).to(device, non_blocking=True)
            step = torch.tensor(epoch * steps + number).to(device, non_blocking=True)
            if any(makes_masks(teacher.config) for teacher in teachers):
                shape = draws_shape(config.loss.masks)
                prompts = torch.rand(len(batch.keys), *shape).to(device, non_blocking=True)
        result: tuple[Tensor, dict[str, Tensor]] = module(images, self._features(batch), weights, draws, step, prompts)
        return result

    def _features(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """The features of a batch, in which ``present`` makes the loss of each teacher the mean over the images that it has."""
        features = dict(batch.features)
        for label, target in self.module.labelled_targets():
            name = target.at(batch.images.shape[-1]).teacher.id
            if PRESENT in (kinds := batch.features[name]):
                scale = self.scales[label] if label in self.scales else _scale(kinds[PRESENT])
                features[name] = {**kinds, PRESENT: kinds[PRESENT] * scale}
        return features

    def before_step(self, batches: Sequence[Batch | MixedBatch]) -> None:
        """Count the images of the global batch, of all input sizes, that each teacher has if it lacks some."""
        for label, target in self.module.labelled_targets():
            present = []
            for parts in zip(*map(parts_of, batches), strict=True):
                name = target.at(parts[0].images.shape[-1]).teacher.id
                if PRESENT in parts[0].features[name]:
                    present.append(self.worker.all_gather([part.features[name][PRESENT] for part in parts]))
            if present:
                self.scales[label] = _scale(torch.cat(present))

    def after_step(self, batches: Sequence[Batch | MixedBatch]) -> None:
        """Append the summaries of the global batch to the queues, identically on all ranks."""
        for parts in zip(*map(parts_of, batches), strict=True):
            for target in self.module.targets_with_queue():
                stored = target.at(parts[0].images.shape[-1])
                own = [part.features[stored.teacher.id] for part in parts]
                rows = self.worker.all_gather([kinds["summary"] for kinds in own])
                present = self.worker.all_gather([kinds[PRESENT] for kinds in own]) if PRESENT in own[0] else None
                target.push_summaries(rows, stored, present)

    def evaluate(self, averaged: nn.Module, raw: nn.Module | None) -> dict[str, float]:
        """kNN accuracy in percent of averaged and raw weights on labelled held-out images, and the averaged weights compared
        with the teachers on all held-out images.
        """
        assert isinstance(averaged, Distiller)
        job, config = self.job, self.job.config
        metrics: dict[str, float] = {}
        if job.val is not None:
            encoders = [module.student.encoder for module in (averaged, raw) if isinstance(module, Distiller)]
            scores = student_knn(encoders, job.train, job.val, config.student.input_size, config.knn, self.worker)
            metrics = {"knn": scores[0], "knn_raw": scores[-1]}
        if not self.worker.rank and self.held_out:
            metrics |= compare_with_teachers(averaged, self.held_out.batches(), self.held_out.codecs)
        return metrics

    @cached_property
    def held_out(self) -> HeldOut | None:
        """The held-out images with features; opened on first use, on rank 0 only."""
        job, config = self.job, self.job.config
        if job.held_out is None:
            return None
        return HeldOut(job.held_out, job.teachers, config.student.input_size, config.knn.batch_size)

    @cached_property
    def shown(self) -> Batch:
        """Images whose features are drawn: held-out ones if there are any."""
        return next(self.held_out.batches()) if self.held_out else first_batch(self.reader)

    def draw(self, module: nn.Module, evaluations: History) -> None:
        """Draw curves, and features as colours."""
        if self.figures is not None:
            assert isinstance(module, Distiller)
            self.figures.draw(module, evaluations, self.shown, self.held_out.codecs if self.held_out else None)


def _scale(present: Tensor) -> Tensor:
    """Factor that turns a mean over all of a batch, 0 for absent images, into one over those that are `present` [B] uint8."""
    return len(present) / present.sum().clamp_min(1).float()


def make_distill_task(payload: dict[str, Any], rank: int, world: int) -> DistillTask:
    """The task of one Ray Train worker; `payload` has ``job``, and optionally ``before`` and ``figures``."""
    return DistillTask(payload["job"], rank, world, payload.get("before"), payload.get("figures"))
