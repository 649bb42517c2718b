"""Training in phases: each trains in its own folder and starts from the weights of the one before.

    train/                     the only phase
    train/phase-<n>/           one of several
    train/phase-<n>.pt         state at its end; if the file exists, the phase is complete
    start.pt                   state before the first phase, if `student.weights` is not random

A phase starts both the student and its average from the averaged weights of the phase before, with a fresh optimiser and
schedule. Heads keep their weights for teachers of the same label and width; statistics are those of the phase's own cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.cache.fill.plan import CachePlan, plan_cache
from pipeline.cache.layout.snapshot import RecordSnapshot
from pipeline.distill.commits import Start
from pipeline.distill.config import DistillJobConfig
from pipeline.distill.distiller import Distiller
from pipeline.evaluate.knn import check_splits
from pipeline.runs.addresses import fetch_student
from pipeline.runs.folder import open_run, work_folder
from pipeline.storage.atomic import atomic_write
from pipeline.storage.store import Store
from pipeline.student.loading import LoadedStudent, load_initial_student
from pipeline.student.model import Student
from pipeline.tracking.address import resolve_uri

STUDENT = "student."
"""Prefix of the student's weights in the state dict of a distiller."""


@dataclass(frozen=True)
class Phase:
    """The recipe with the changes of one phase, and the plan of its cache.

    Attributes:
        start: backbone that the first phase starts from; None: random weights, those of the phase before, or those that an
            interrupted run has already loaded.
        further: plans of the caches for `resolutions`; None: that of the phase serves.
    """

    config: DistillJobConfig
    plan: CachePlan
    start: LoadedStudent | None = None
    further: tuple[CachePlan | None, ...] = ()

    @property
    def caches(self) -> list[tuple[DistillJobConfig, CachePlan]]:
        """Every cache that the phase reads, with the configuration that fills it."""
        others = zip(self.config.resolutions, self.further, strict=True)
        return [
            (self.config, self.plan),
            *((self.config.at_resolution(resolution), plan) for resolution, plan in others if plan is not None),
        ]

    def filled(self, plans: Iterator[CachePlan]) -> Phase:
        """The phase with the plans of filled caches, taken in the order of `caches`."""
        own = next(plans)
        return replace(self, plan=own, further=tuple(plan and next(plans) for plan in self.further))

    @property
    def views(self) -> int:
        """Views of an epoch, if no image is quarantined, as far as known."""
        train = self.plan.split("train")
        assert train is not None
        return train.images * train.dataset.policy.rows_per_image

    @property
    def settled(self) -> DistillJobConfig:
        """The configuration with the batch size that suits the data, as far as known, if none is given."""
        return self.config.model_copy(update={"train": self.config.train.for_images(self.views)})


def plan_phases(config: DistillJobConfig, store: Store) -> tuple[Phase, ...]:
    """The phases of a recipe, or one phase if it lists none.

    Raises:
        UserError, TeacherError: as :func:`~pipeline.cache.fill.plan.plan_cache`; if the splits have different classes; if
            `student.weights` cannot be loaded.
    """
    student, start, run = config.student, None, open_run(config, "distill")
    if student.weights != "random" and not start_file(run.folder).exists():
        fetch = partial(fetch_student, tracking_uri=resolve_uri(config.tracking.uri, work_folder(config)))
        start = load_initial_student(student.name, student.weights, student.args, fetch)
    snapshot = RecordSnapshot()

    def plan(part: DistillJobConfig) -> CachePlan:
        return plan_cache(part, store, snapshot, run.data)

    first, *others = (
        Phase(
            phase,
            plan(phase),
            None,
            tuple(plan(phase.at_resolution(r)) if r.teachers else None for r in phase.resolutions),
        )
        for phase in config.phase_configs()
    )
    phases = replace(first, start=start), *others
    for phase in phases:
        train, val = phase.plan.split("train"), phase.plan.split("val")
        if train is not None and val is not None:
            check_splits(train.dataset, val.dataset)
    return phases


def start_file(folder: Path) -> Path:
    """The state before the first phase of a run whose `student.weights` are not random."""
    return folder / "start.pt"


@dataclass(frozen=True)
class PhaseState:
    """The state of a run at the end of a phase, or before the first.

    Attributes:
        epochs, steps, samples: completed since the start of the run.
        knn: first and last accuracy in percent, or None without labels.
        teachers: labels, in the order of the distiller's targets.
        weights: averaged weights of the distiller.
        origin: provenance of the run's initial weights, JSON-ready; None: they were random.
    """

    epochs: int = 0
    steps: int = 0
    samples: int = 0
    knn: tuple[float, float] | None = None
    teachers: tuple[str, ...] = ()
    weights: dict[str, Tensor] | None = None
    evaluations: tuple[tuple[int, dict[str, float]], ...] = ()
    origin: dict[str, Any] | None = None

    @classmethod
    def before(cls, student: Student, start: LoadedStudent, weights: str) -> PhaseState:
        """The state before the first phase; `student` gets the weights of `start`, which `student.weights` names `weights`."""
        student.encoder.load_state_dict(start.encoder.state_dict())
        state = {f"{STUDENT}{name}": value for name, value in student.state_dict().items()}
        # Only the author of weights that were not distilled here knows their licence.
        unknown = {} if "teachers" in start.provenance else {"weights": weights, "licence": "unknown"}
        return cls(weights=state, origin={"named": weights, **unknown, **start.provenance})

    def then(self, state: dict[str, Any], epochs: int, teachers: Sequence[str]) -> PhaseState:
        """The state after a further phase, whose last checkpoint holds `state`."""
        curve = [metrics["knn"] for _, metrics in state["evaluations"] if "knn" in metrics]
        first = self.knn[:1] if self.knn else tuple(curve[:1])
        last = curve[-1] if curve else self.knn and self.knn[1]
        position = state["position"]
        return PhaseState(
            self.epochs + epochs,
            self.steps + position["step"],
            self.samples + position["samples"],
            (first[0], last) if first and last is not None else None,
            tuple(teachers),
            state["ema"],
            (*self.evaluations, *self.start.shift(state["evaluations"])),
            self.origin,
        )

    @property
    def start(self) -> Start:
        """What the next phase starts after."""
        return Start(self.epochs, self.steps, self.samples)

    def save(self, file: Path) -> None:
        """Write it atomically."""
        with atomic_write(file) as out:
            torch.save(vars(self), out)

    @classmethod
    def load(cls, file: Path) -> PhaseState:
        """The inverse of `save`; only tensors and plain values are unpickled."""
        return cls(**torch.load(file, map_location="cpu", weights_only=True))


def transfer_weights(distiller: Distiller, state: PhaseState) -> None:
    """Load the student, and the heads of teachers with the same label and width, from the phase before."""
    if state.weights is None:
        return
    distiller.student.load_state_dict(
        {name.removeprefix(STUDENT): value for name, value in state.weights.items() if name.startswith(STUDENT)}
    )
    for label, target in distiller.labelled_targets():
        if label in state.teachers:
            prefix = f"targets.{state.teachers.index(label)}.heads."
            heads = target.heads.state_dict()
            for name, own in heads.items():
                earlier = state.weights.get(prefix + name, own)
                heads[name] = earlier if earlier.shape == own.shape else own
            target.heads.load_state_dict(heads)
