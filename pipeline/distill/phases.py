"""Training in phases: each is a run of the engine in its own folder, from the weights of the one before.

    train/                     the only phase
    train/phase-<n>/           one of several
    train/phase-<n>.pt         what it ended with; where it is there, the phase is over
    start.pt                   what the first one goes on from, where `student.weights` names something

A phase starts both the student and its average from the averaged weights of the last one, with a fresh optimiser and
schedule. Heads go on for teachers of the same name and width; statistics are those of the phase's own cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.cache.fill.build import CachePlan, plan_cache
from pipeline.cache.layout.snapshot import RecordSnapshot
from pipeline.distill.config import DistillJobConfig
from pipeline.distill.distiller import Distiller, TeacherTarget
from pipeline.evaluate.knn import check_splits
from pipeline.runs.addresses import fetch_student
from pipeline.runs.folder import open_run, work_folder
from pipeline.storage.atomic import atomic_write
from pipeline.storage.store import Store
from pipeline.student.loading import LoadedStudent, load_initial_student
from pipeline.student.model import Student
from pipeline.tracking.address import resolve_uri

STUDENT = "student."
"""What the names of the student's weights begin with among those of a distiller."""


@dataclass(frozen=True)
class Phase:
    """What a phase trains with.

    Attributes:
        config: the recipe with the changes of the phase.
        plan: of its cache.
        start: the backbone that the first one starts from; None: random weights, those of the phase before, or those that an
            interrupted run has already taken in.
    """

    config: DistillJobConfig
    plan: CachePlan
    start: LoadedStudent | None = None


def plan_phases(config: DistillJobConfig, store: Store) -> tuple[Phase, ...]:
    """The phases of a recipe, one where it names none.

    Raises:
        UserError, TeacherError: as :func:`~pipeline.cache.fill.build.plan_cache`; where the splits differ in their classes, and
            where `student.weights` cannot be had.
    """
    start = _find_start(config)
    snapshot = RecordSnapshot()
    plans = [(phase, plan_cache(phase, store, snapshot=snapshot)) for phase in config.phase_configs()]
    first, *others = (Phase(phase, plan) for phase, plan in plans)
    phases = replace(first, start=start), *others
    for phase in phases:
        train, val = phase.plan.split("train"), phase.plan.split("val")
        if train is not None and val is not None:
            check_splits(train.dataset, val.dataset)
    return phases


def _find_start(config: DistillJobConfig) -> LoadedStudent | None:
    student = config.student
    if student.weights == "random" or start_file(open_run(config, "distill").folder).exists():
        return None
    fetch = partial(fetch_student, tracking_uri=resolve_uri(config.tracking.uri, work_folder(config)))
    return load_initial_student(student.name, student.weights, student.args, fetch)


def start_file(folder: Path) -> Path:
    """What the first phase of a run goes on from, where `student.weights` names something."""
    return folder / "start.pt"


@dataclass(frozen=True)
class PhaseState:
    """What a phase ended with, counted from the start of the run.

    Attributes:
        epochs, steps, samples: done.
        knn: first and last accuracy in percent, or None without labels.
        teachers: labels, in the order of the distiller's targets.
        weights: averaged, of the distiller.
        evaluations: of all phases.
        origin: what is known of the weights that the run started from, JSON-ready; None: they were random.
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
        """What the first phase goes on from.

        Args:
            student: takes on the weights of `start`.
            weights: how `student.weights` names them.
        """
        student.encoder.load_state_dict(start.encoder.state_dict())
        state = {f"{STUDENT}{name}": value for name, value in student.state_dict().items()}
        # Of what was not distilled here nobody but its maker knows under which licence it may be used.
        unknown = {} if "teachers" in start.provenance else {"weights": weights, "licence": "unknown"}
        return cls(weights=state, origin={"named": weights, **unknown, **start.provenance})

    def then(self, state: dict[str, Any], epochs: int, teachers: Sequence[str]) -> PhaseState:
        """With a phase that went on from here, and whose last checkpoint holds this state."""
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
            (*self.evaluations, *self.shift(state["evaluations"])),
            self.origin,
        )

    def shift(self, history: Sequence[tuple[int, dict[str, float]]]) -> list[tuple[int, dict[str, float]]]:
        """A history that counts from the start of the phase, counted from that of the run."""
        offsets = {"epoch": self.epochs, "samples_seen": self.samples}
        return [
            (step + self.steps, {name: value + offsets.get(name, 0) for name, value in metrics.items()})
            for step, metrics in history
        ]

    def save(self, file: Path) -> None:
        """Write it as a whole or not at all."""
        with atomic_write(file) as out:
            torch.save(vars(self), out)

    @classmethod
    def load(cls, file: Path) -> PhaseState:
        """The inverse of `save`; nothing is unpickled but tensors and plain values."""
        return cls(**torch.load(file, map_location="cpu", weights_only=True))


def transfer_weights(distiller: Distiller, ending: PhaseState) -> None:
    """Bring the weights that a phase ended with into the distiller of the next one."""
    if ending.weights is None:
        return
    distiller.student.load_state_dict(
        {name.removeprefix(STUDENT): value for name, value in ending.weights.items() if name.startswith(STUDENT)}
    )
    for target in distiller.targets:
        assert isinstance(target, TeacherTarget)
        label = distiller.labels[target.teacher.id]
        if label in ending.teachers:
            prefix = f"targets.{ending.teachers.index(label)}.heads."
            own = target.heads.state_dict()
            kept = {name: ending.weights.get(prefix + name, value) for name, value in own.items()}
            target.heads.load_state_dict(
                {name: value if value.shape == own[name].shape else own[name] for name, value in kept.items()}
            )
