"""What a run is, read from its parameters: student, teachers, codec, views, data, and what its group goes by."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from pipeline.tracking import LoggedRun

NONE = ("", "None")
"""How MLflow holds what was not given."""

SET_ASIDE = {"name", "seed", "work", "cache.uri", "data.name"}
"""Fields by which runs that do the same differ."""
OTHER_SECTIONS = ("tracking", "benchmark", "plan")
UNREAD = {
    "distill": (*OTHER_SECTIONS, "evaluate", "finetune", "classify", "segment", "detect"),
    "finetune": (*OTHER_SECTIONS, "evaluate", "teachers", "cache", "views", "loss", "augment", "knn"),
}
"""Sections that a job does not go by."""


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
        "student": student(run),
        "input": f"{side} px" if (side := _input_size(run)) else None,
        "teachers": " + ".join(_teachers(run)) if distils else None,
        "codec": ", ".join(dict.fromkeys(_codecs(run))) if distils else None,
        "views": _views(run) if distils else None,
        "seed": given(run, "seed"),
        "device": run.tags.get("device"),
    }
    return {name: text for name, text in found.items() if text}


def _named(run: LoggedRun) -> str:
    """Section whose field `student` names the student, or nothing."""
    return next((section for section in ("evaluate", "finetune") if given(run, f"{section}.student")), "")


def _input_size(run: LoggedRun) -> str | None:
    if run.tags.get("job") != "distill" and _named(run) == "evaluate":
        return given(run, "evaluate.input_size")  # not given: as the student was exported
    return given(run, "student.input_size")


def student(run: LoggedRun) -> str | None:
    """The student's name."""
    section = _named(run) if run.tags.get("job") != "distill" else ""
    name = given(run, f"{section}.student") if section else given(run, "student.name")
    return shortened(name).removeprefix("timm/") if name else None


def student_key(run: LoggedRun) -> str:
    """What evaluations of one student have in common where the run that made it is not known."""
    fields = (f"{_named(run)}.student", "evaluate.weights", "evaluate.model", "student.args")
    return "\n".join(run.params.get(field, "") for field in fields)


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
    unread = UNREAD.get(run.tags.get("job", ""), OTHER_SECTIONS)
    kept = {
        key: shortened(value)
        for key, value in run.params.items()
        if key not in SET_ASIDE and key.partition(".")[0] not in unread
    }
    return kept | {f"data.{split}": held for split in ("train", "val") if (held := held_by(run, data, split))}


def shortened(value: str) -> str:
    """The last two parts of a path; anything else as it is."""
    if not value.startswith(("/", "~", "./", "../")) or "\n" in value:
        return value
    return "/".join([part for part in value.split("/") if part][-2:])
