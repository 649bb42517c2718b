"""Provenance of a student: a file in its folder, which MLflow and exports keep with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.distill.task import DistillJob


def provenance(
    phases: Sequence[DistillJob],
    run_id: str,
    samples: int,
    knn: Mapping[str, float | None],
    start: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run, teachers with their licences, data, budget and accuracy, JSON-ready.

    Args:
        samples: images seen.
        knn: accuracies in percent, ``knn`` of the student, the others by the teachers' labels.
        start: provenance of the initial weights; None: they were random.
    """
    # A teacher with two input sizes is listed once.
    specs = {(t.spec.name, t.spec.weights): t.spec for job in phases for t in job.teachers}
    datasets = {(job.train.id, job.train.policy.id): job.train for job in phases}
    described = ("name", "architecture", "weights", "licence")
    return {
        "run_id": run_id,
        "teachers": [{field: getattr(spec, field) for field in described} for spec in specs.values()],
        "data": [
            {
                "location": dataset.location,
                "fingerprint": dataset.fingerprint,
                "view": dataset.policy.id,
                "images": dataset.count,
                "classes": len(dataset.classes),
            }
            for dataset in datasets.values()
        ],
        "training": {"epochs": sum(job.config.train.epochs for job in phases), "samples_seen": samples},
        "knn": dict(knn),
        **({"start": dict(start)} if start else {}),
    }


def all_teachers(origin: Mapping[str, Any]) -> list[dict[str, str]]:
    """All teachers: of a provenance, of the student that it fine-tuned, and of their initial weights."""
    found = [teacher for part in _parts(origin) for teacher in part.get("teachers", [])]
    return [teacher for number, teacher in enumerate(found) if teacher not in found[:number]]


def all_licences(origin: Mapping[str, Any]) -> list[str]:
    """The licences of all teachers and of initial weights, sorted."""
    own = [part["licence"] for part in _parts(origin) if "licence" in part]
    return sorted({*own, *(teacher["licence"] for teacher in all_teachers(origin))})


def _parts(origin: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield origin
    for before in ("student", "start"):
        if before in origin:
            yield from _parts(origin[before])


def lineage(phases: Sequence[DistillJob], origin: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a registered student: teachers and licences, also of its initial weights, and the versions of its images."""
    read = dict.fromkeys(data.id for job in phases for data in (job.train, job.val) if data is not None)
    return {
        "student": phases[-1].config.student.name,
        "teachers": ", ".join(dict.fromkeys(teacher["name"] for teacher in all_teachers(origin))),
        "licences": ", ".join(all_licences(origin)),
        **({"start": origin["start"]["named"]} if "start" in origin else {}),
        "images": ", ".join(read),
    }
