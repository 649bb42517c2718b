"""What a run is, read from its parameters: student, teachers, codec, views, data, and what its group goes by."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache

from pipeline.config.dotted import is_field, keys_of
from pipeline.config.jobs import all_roots, job_root
from pipeline.config.tree import iter_fields
from pipeline.downstream.config import TASKS
from pipeline.errors import UserError
from pipeline.tracking.reading import LoggedRun

NONE = ("", "None")
"""How MLflow holds what was not given."""

STUDENT_ARGUMENTS = "student.args."
"""What the fields of arguments of a student's constructor begin with; one without any has the field `student.args`."""
UNREAD_WITH_ANOTHER_STUDENT = ("student.name", "student.weights")
"""Fields that a job ignores where another one names its student."""


def given(run: LoggedRun, key: str) -> str | None:
    """A parameter, or None where it was not given."""
    value = run.params.get(key, "")
    return None if value in NONE else value


def describe(run: LoggedRun, data: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Text by :data:`~pipeline.compare.measures.TEXTS`; what is not known is left out."""
    job = run.tags.get("job", "")
    distils = job == "distill"
    found = {
        "status": run.status.lower(),
        "job": job,
        "data": _readable(held_by(run, data, "train")),
        "student": _student(run),
        "input": f"{side} px" if (side := input_size(run)) else None,
        "teachers": " + ".join(_teachers(run)) if distils else None,
        "codec": ", ".join(dict.fromkeys(_codecs(run))) if distils else None,
        "views": _views(run) if distils else None,
        "seed": given(run, "seed"),
        "device": run.tags.get("device"),
    }
    return {name: text for name, text in found.items() if text}


def judged_student(run: LoggedRun) -> str | None:
    """The student that a run evaluates or goes on with, as it was named; None where it trains its own."""
    fields = () if run.tags.get("job") == "distill" else ("evaluate.student", "finetune.student")
    return next((name for field in fields if (name := given(run, field))), None)


def timm_student(run: LoggedRun) -> str | None:
    """The name by which the student of a run is built without weights; None for a folder or a model in MLflow."""
    name = judged_student(run) or given(run, "student.name")
    return name if name and "/" not in name.removeprefix("timm/") and not student_arguments(run.params) else None


def input_size(run: LoggedRun) -> str | None:
    """Side of the student's input in pixels; None: as the student that is evaluated was exported."""
    judged = judged_student(run)
    side = given(run, "evaluate.input_size") if judged else None
    return side or (given(run, "student.input_size") if not judged or timm_student(run) else None)


def _student(run: LoggedRun) -> str | None:
    name = judged_student(run) or given(run, "student.name")
    return shortened(name).removeprefix("timm/") if name else None


def student_key(run: LoggedRun) -> str:
    """What evaluations of one student have in common where the run that made it is not known."""
    named = (run.params.get(field, "") for field in ("evaluate.weights", "evaluate.model"))
    return "\n".join([judged_student(run) or "", *named, *student_arguments(run.params)])


def student_arguments(fields: Mapping[str, str]) -> list[str]:
    """Arguments of a student's constructor among logged fields, as `<field>=<value>`, sorted."""
    return sorted(f"{key}={value}" for key, value in fields.items() if key.startswith(STUDENT_ARGUMENTS))


def _teachers(run: LoggedRun) -> Iterator[str]:
    for number, model in _listed(run, "model"):
        untrained = (given(run, f"teachers.{number}.weights") or "").startswith("random")
        yield shortened(model).removeprefix("timm/") + (" (untrained)" if untrained else "")


def _codecs(run: LoggedRun) -> Iterator[str]:
    for number, _ in _listed(run, "model"):
        yield given(run, f"teachers.{number}.codec") or given(run, "cache.codec") or ""


def _listed(run: LoggedRun, field: str) -> Iterator[tuple[int, str]]:
    number = 0
    while value := given(run, f"teachers.{number}.{field}"):
        yield number, value
        number += 1


def _views(run: LoggedRun) -> str | None:
    crops = given(run, "views.crops")
    if crops is None:
        return None
    return "whole image" if crops == "0" else f"{crops} crops, area from {given(run, 'views.min_area')}"


def held_by(run: LoggedRun, data: Mapping[str, tuple[str, str]], split: str) -> str | None:
    """The images of a split by what is in them; generated scenes, which the seed decides, by their name."""
    location, identity = data.get(split, (None, None))
    known = location or given(run, f"data.{split}")
    if known == "samples" or (split == "val" and known is None and given(run, "data.train") == "samples"):
        return "samples"
    return identity or (shortened(known) if known else None)


def _readable(identity: str | None) -> str | None:
    """Without the digest, which `data.train` keeps."""
    return re.sub(r"-[0-9a-f]{8}$", "", identity) if identity else None


def configuration(run: LoggedRun, data: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """The parameters that decide what a run computes, comparable between machines: no seed, names and paths."""
    own, known, operational = _fields(run.tags.get("job", ""), given(run, "finetune.task") or "")
    ignored = (*operational, "seed", *(UNREAD_WITH_ANOTHER_STUDENT if judged_student(run) else ()))
    kept = {
        key: shortened(value)
        for key, value in run.params.items()
        for field in [re.sub(r"^phases\.\d+\.", "", key)]
        # What no job declares is of a user's own task.
        if not is_field(field, ignored) and (is_field(key, own) or not is_field(key, known))
    }
    return kept | {f"data.{split}": held for split in ("train", "val") if (held := held_by(run, data, split))}


@cache
def _fields(job: str, task: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The fields that a job declares, those that any job does, and those of any job that change no number.

    Runs of earlier versions logged the fields of all jobs.
    """
    lines = list(iter_fields(*(variant for root in all_roots() for variant in root.variants())))
    known = tuple(line.key for line in lines)
    root, name = job_root(job), job.removeprefix("evaluate-")
    try:
        own = keys_of(root.select({"finetune": {"task": name if name in TASKS else task}})) if root else known
    except UserError:  # a user's own task that cannot be imported here
        own = known
    return own, known, tuple(line.key for line in lines if line.operational)


def shortened(value: str) -> str:
    """The last two parts of a path; anything else as it is."""
    if not value.startswith(("/", "~", "./", "../")) or "\n" in value:
        return value
    return "/".join([part for part in value.split("/") if part][-2:])
