"""The images that runs used: one name for equal images, and where each set lies."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from pipeline.compare.describe import parameter, shortened
from pipeline.tracking.reading import LoggedRun

DIGEST = 8
"""Characters of the digest at the end of the name of an image set."""


def unify(runs: Iterable[LoggedRun], probes: Iterable[str]) -> list[LoggedRun]:
    """The runs, with one name for equal images: `data.name`, which is part of the logged name, changes no number.

    Earlier versions logged no images for probes. Such a run gets the images of its path, if the others logged only one set
    for it.

    Args:
        probes: the jobs that evaluate cached features.
    """
    runs, probes = list(runs), (*probes,)
    names: dict[str, str] = {}
    at: dict[str, set[str]] = {}
    for run in runs:
        for location, name in run.data.values():
            names.setdefault(name[-DIGEST:], name)
            # Fine-tuning has digests of its own: equal images have another name there.
            if not run.tags.get("job", "").startswith(("finetune", "evaluate-")):
                at.setdefault(shortened(location), set()).add(name[-DIGEST:])

    def named(run: LoggedRun) -> dict[str, tuple[str, str]]:
        data = {split: (location, names[name[-DIGEST:]]) for split, (location, name) in run.data.items()}
        for split in ("train", "val") if run.tags.get("job") in probes and not data else ():
            location = parameter(run, f"data.{split}") or ""
            if len(known := at.get(shortened(location), set())) == 1:
                data[split] = (location, names[next(iter(known))])
        return data

    return [replace(run, data=named(run)) for run in runs]


def places(runs: Iterable[LoggedRun]) -> Mapping[str, str]:
    """The end of the path of each image set, by its name."""
    return {name: shortened(location) for run in runs for location, name in run.data.values()}
