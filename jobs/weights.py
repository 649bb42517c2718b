"""List the weights that a recipe's teachers need: file, size, licence, and whether they are on this machine.

python jobs/weights.py recipes/own_images.yaml              lists
python jobs/weights.py recipes/own_images.yaml --fetch      also downloads what is missing, and loads it once
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs._cli import Mode, grid, later, run
from pipeline.distill.config import DistillJobConfig


def add_modes(parser: argparse.ArgumentParser, group: Any) -> Callable[[argparse.Namespace], Mode | None]:
    """Add `--fetch`."""
    group.add_argument("--fetch", action="store_true", help="download the files that are missing, and load them once")
    return lambda options: later("jobs.weights", "fetch") if options.fetch else None


if __name__ == "__main__":
    run(DistillJobConfig, later("jobs.weights"), __doc__, add_modes=add_modes)
    sys.exit()

from pipeline.cache.config import TeacherConfig
from pipeline.cache.layout.cached_teacher import make_teacher
from pipeline.runtime.units import size
from teachers.base import Teacher

KINDS = {"file": "its own file", "random": "none: untrained", "none": "none needed"}
"""What a teacher loads, by the beginning of its spec's `weights`, if not a published file."""


def main(config: DistillJobConfig, dry_run: bool = False) -> dict[str, Any]:
    """List the weights of all teachers of all phases."""
    rows = [_row(teacher) for _, teacher in _teachers(config)]
    shown = [{**row, "size": "unknown" if row["size"] is None else size(row["size"])} for row in rows]
    print(grid([{**row, "here": "yes" if row["here"] else "no"} for row in shown]))
    if missing := [row["file"] for row in rows if not row["here"]]:
        print(
            "what is not here is downloaded when a job needs it, or by --fetch; without a network, download it elsewhere and "
            "set that teacher's weights to its path"
        )
    return {"teachers": rows, "missing": len(missing)}


def fetch(config: DistillJobConfig, options: argparse.Namespace) -> Mapping[str, Any]:
    """Download what is missing, check that each network loads it, and list."""
    for chosen, teacher in _teachers(config):
        if not _row(teacher)["here"]:
            print(f"fetching {teacher.hub_file} for {chosen.model}", flush=True)
            teacher.load()
    return main(config)


def _teachers(config: DistillJobConfig) -> Iterator[tuple[TeacherConfig, Teacher]]:
    """Each teacher of the recipe once, with what configures it."""
    chosen = [teacher for phase in config.phase_configs() for teacher in phase.teachers]
    seen = set()
    for one in chosen:
        teacher = make_teacher(one)
        identity = (teacher.spec.name, teacher.spec.weights)
        if identity not in seen:
            seen.add(identity)
            yield one, teacher


def _row(teacher: Teacher) -> dict[str, Any]:
    spec, kind = teacher.spec, teacher.spec.weights.partition(":")[0]
    file = teacher.hub_file if kind == "hub" else None
    return {
        "teacher": spec.name,
        "file": str(file or KINDS.get(kind, spec.weights)),
        "size": file.size() if file else 0,
        "licence": spec.licence,
        "here": file is None or file.cached() is not None,
    }
