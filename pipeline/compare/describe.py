"""What a run's logged parameters say: student, teachers, codec, views, data, and the configuration that defines its group."""

import re
from collections.abc import Mapping
from functools import cache

from pipeline.config.dotted import is_field, keys_of
from pipeline.config.jobs import all_roots, job_root
from pipeline.config.tree import iter_fields
from pipeline.downstream.config import TASKS
from pipeline.errors import UserError
from pipeline.sources.config import scenes_of_any_seed
from pipeline.tracking.reading import LoggedRun


def parameter(run: LoggedRun, key: str) -> str | None:
    """A logged parameter, or None if it has no value."""
    value = run.params.get(key)
    return None if value in ("", "None") else value  # MLflow stores text only


def describe(run: LoggedRun, data: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Text by :data:`~pipeline.compare.measures.TEXTS`; unknown ones are missing."""
    job, student = run.tags.get("job", ""), evaluated_student(run) or parameter(run, "student.name")
    data_set, distils, crops = image_set(run, data, "train"), job == "distill", parameter(run, "views.crops")
    views = (
        "whole image" if crops == "0" else f"{crops} crops, area from {parameter(run, 'views.min_area')}{_changes(run)}"
    )
    teachers = _teachers(run) if distils else []
    found = {
        "status": run.status.lower(),
        "job": job,
        "data": re.sub(r"-[0-9a-f]{8}$", "", data_set) if data_set else None,  # without the digest
        "student": shortened(student).removeprefix("timm/") if student else None,
        "input": f"{side} px" if (side := input_size(run)) else None,
        "teachers": " + ".join(name for name, _ in teachers),
        "codec": ", ".join(dict.fromkeys(codec for _, codec in teachers)),
        "views": views if distils and crops else None,
        "seed": parameter(run, "seed"),
        "device": run.tags.get("device"),
    }
    return {name: text for name, text in found.items() if text}


def _changes(run: LoggedRun) -> str:
    """The probabilities of changes of the cached views; a run of an earlier version has no such parameters."""
    shares = {name: parameter(run, f"views.photometric.{name}") for name in ("jitter", "grey", "blur")}
    shares["mixup"] = parameter(run, "views.mixup")
    return "".join(f", {name} {share}" for name, share in shares.items() if share and float(share))


def evaluated_student(run: LoggedRun) -> str | None:
    """The student that a run evaluates or fine-tunes, as the user named it; None if the run trains its own."""
    fields = () if run.tags.get("job") == "distill" else ("evaluate.student", "finetune.student")
    return next((name for field in fields if (name := parameter(run, field))), None)


def timm_student(run: LoggedRun) -> str | None:
    """timm name of the student of a run; None for a folder or a model in MLflow."""
    name = evaluated_student(run) or parameter(run, "student.name")
    return name if name and "/" not in name.removeprefix("timm/") and not student_arguments(run.params) else None


def input_size(run: LoggedRun) -> str | None:
    """Side of the student's input in pixels; None: that of the exported student."""
    judged = evaluated_student(run)
    side = parameter(run, "evaluate.input_size") if judged else None
    return side or (parameter(run, "student.input_size") if not judged or timm_student(run) else None)


def student_key(run: LoggedRun) -> str:
    """Key of a student whose training run is unknown; equal for all of its evaluations."""
    named = (run.params.get(field, "") for field in ("evaluate.weights", "evaluate.model"))
    return "\n".join([evaluated_student(run) or "", *named, *student_arguments(run.params)])


def student_arguments(fields: Mapping[str, str]) -> list[str]:
    """Constructor arguments of a student among logged fields, as `<field>=<value>`, sorted."""
    return sorted(f"{key}={value}" for key, value in fields.items() if key.startswith("student.args."))


def _teachers(run: LoggedRun) -> list[tuple[str, str]]:
    """Name and codec of each teacher."""
    found: list[tuple[str, str]] = []
    while model := parameter(run, f"teachers.{len(found)}.model"):
        teacher = f"teachers.{len(found)}"
        untrained = " (untrained)" if run.params.get(f"{teacher}.weights", "").startswith("random") else ""
        codec = parameter(run, f"{teacher}.codec") or parameter(run, "cache.codec") or ""
        found.append((shortened(model).removeprefix("timm/") + untrained, codec))
    return found


def image_set(run: LoggedRun, data: Mapping[str, tuple[str, str]], split: str) -> str | None:
    """Identity of the images of a split; that of generated scenes is their number and size, since the seed decides the rest."""
    location, identity = data.get(split, (None, None))
    known = location or parameter(run, f"data.{split}")
    if known == "samples" or (split == "val" and known is None and parameter(run, "data.train") == "samples"):
        count, size = (parameter(run, f"data.samples.{name}") for name in (split, "size"))
        return scenes_of_any_seed(count, size) if count and size else "samples"
    return identity or (shortened(known) if known else None)


def configuration(run: LoggedRun, data: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """The parameters that decide what a run computes, comparable between machines: without seed, names and paths."""
    own, known, operational = _declared_fields(run.tags.get("job", ""), parameter(run, "finetune.task") or "")
    unread = ("student.name", "student.weights") if evaluated_student(run) else ()  # another field names the student
    ignored = (*operational, "seed", "data.samples", *unread)  # the names of scenes hold their number and size
    kept = {
        key: shortened(value)
        for key, value in run.params.items()
        for field in [re.sub(r"^phases\.\d+\.", "", key)]
        # Fields that no job declares belong to a user's own task.
        if not is_field(field, ignored) and (is_field(key, own) or not is_field(key, known))
    }
    return kept | {f"data.{split}": held for split in ("train", "val") if (held := image_set(run, data, split))}


@cache
def _declared_fields(job: str, task: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The fields that a job declares, those of all jobs (which earlier versions logged), and the operational ones."""
    lines = list(iter_fields(*(variant for root in all_roots() for variant in root.variants())))
    known = tuple(line.key for line in lines)
    root, name = job_root(job), job.removeprefix("evaluate-")
    try:
        own = keys_of(root.select({"finetune": {"task": name if name in TASKS else task}})) if root else known
    except UserError:  # a user's own task that cannot be imported here
        own = known
    return own, known, tuple(line.key for line in lines if line.operational)


def shortened(value: str) -> str:
    """The last two parts of a path; any other text unchanged."""
    if not value.startswith(("/", "~", "./", "../")) or "\n" in value:
        return value
    return "/".join([part for part in value.split("/") if part][-2:])
