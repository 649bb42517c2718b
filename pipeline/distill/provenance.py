"""What a student comes from: a file beside it, which travels with it to MLflow and into exports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.cache.dataset import Dataset
    from pipeline.distill.task import DistillJob
    from teachers.base import TeacherSpec


def provenance(
    phases: Sequence[DistillJob],
    run_id: str,
    samples: int,
    knn: Mapping[str, float | None],
    start: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run, teachers with their licences, data, budget and accuracy, JSON-ready.

    Args:
        phases: the jobs of all phases, in order.
        run_id: of MLflow.
        samples: seen in all of them.
        knn: in percent, ``knn`` of the student, the others by the teachers' labels.
        start: what is known of the weights that the student started from; None: they were random.
    """
    # One that was asked at two sizes is one origin.
    specs = {(t.spec.name, t.spec.weights): t.spec for job in phases for t in job.teachers}
    datasets = {(job.train.id, job.train.policy.id): job.train for job in phases}
    return {
        "run_id": run_id,
        "teachers": [_teacher(spec) for spec in specs.values()],
        "data": [_data(dataset) for dataset in datasets.values()],
        "training": {"epochs": sum(job.config.train.epochs for job in phases), "samples_seen": samples},
        "knn": dict(knn),
        **({"start": dict(start)} if start else {}),
    }


def _teacher(spec: TeacherSpec) -> dict[str, str]:
    return {"name": spec.name, "architecture": spec.architecture, "weights": spec.weights, "licence": spec.licence}


def _data(dataset: Dataset) -> dict[str, Any]:
    return {
        "location": dataset.location,
        "fingerprint": dataset.fingerprint,
        "view": dataset.policy.id,
        "images": dataset.count,
        "classes": len(dataset.classes),
    }


def all_teachers(origin: Mapping[str, Any]) -> list[dict[str, str]]:
    """The teachers of a provenance, those of the student that was fine-tuned, and of whatever it started from."""
    before = [all_teachers(origin[part]) for part in ("student", "start") if part in origin]
    found = [*origin.get("teachers", []), *(teacher for some in before for teacher in some)]
    return [teacher for number, teacher in enumerate(found) if teacher not in found[:number]]


def lineage(phases: Sequence[DistillJob], start: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Tags of a registered student: teachers, their licences and those of the start's, and what was read in the cache."""
    teachers = {t.spec.name: t.spec for job in phases for t in job.teachers}
    licences = {spec.licence for spec in teachers.values()} | {t["licence"] for t in all_teachers(start or {})}
    read = dict.fromkeys(
        f"{dataset.id}/{dataset.policy.id}/{t.id}"
        for job in phases
        for dataset in (job.train, job.val)
        if dataset is not None
        for t in job.teachers
    )
    return {
        "student": phases[-1].config.student.name,
        "teachers": ", ".join(teachers),
        "licences": ", ".join(sorted(licences)),
        **({"start": start["weights"]} if start else {}),
        "cache": "\n".join(read),
    }
