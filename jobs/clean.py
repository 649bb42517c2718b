"""Show what a work folder takes on disk, and remove the checkpoints of its finished runs.

python jobs/clean.py                             runs, cache, MLflow; removes nothing
python jobs/clean.py --checkpoints               also removes checkpoints that no run resumes from
python jobs/precompute.py --list                 what the cache holds; --delete and --gc remove from it

Students, models, figures and copies of the best checkpoints stay.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs._cli import confirm, grid, run_parser, table
from pipeline.errors import UserError
from pipeline.runs.config import JobConfig
from pipeline.runs.disk import bytes_of, remove_checkpoints, runs_of
from pipeline.runs.folder import work_folder
from pipeline.runtime.units import size


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, show, remove, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", help="work folder; default: as of the jobs")
    parser.add_argument("--checkpoints", action="store_true", help="remove the checkpoints of finished runs")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    run_parser(parser, clean, arguments)


def clean(options: argparse.Namespace) -> Mapping[str, Any]:
    """Show the work folder, and remove what is asked."""
    work = work_folder(JobConfig(work=options.work))
    if not work.is_dir():
        raise UserError(f"--work: {work} is not a folder")
    runs = runs_of(work)
    if runs:
        print(
            grid([_row(run.folder.name, run.state, bytes_of(*run.checkpoints), bytes_of(run.folder)) for run in runs])
        )
    sizes = {path.name: bytes_of(path) for path in work.iterdir()}
    figures = {
        "runs": sizes.get("runs", 0),
        "cache": sizes.get("cache", 0),
        "mlflow": sum(count for name, count in sizes.items() if name.startswith("mlflow.db") or name == "mlartifacts"),
        "total": sum(sizes.values()),
    }
    removable = sum(bytes_of(*run.removable) for run in runs)
    names = {"cache": "cache", "mlflow": "MLflow", "total": "in all"}
    print(
        table({**{name: size(figures[key]) for key, name in names.items()}, "removable": size(removable)}), flush=True
    )
    freed = 0
    if options.checkpoints and removable and confirm(f"remove {size(removable)} of checkpoints?", options.yes):
        freed = sum(map(remove_checkpoints, runs))
        print(f"removed {size(freed)} of checkpoints")
    return {"work": str(work), **figures, "removable": removable - freed, "freed": freed}


def _row(name: str, state: str, checkpoints: int, total: int) -> dict[str, str]:
    return {"run": name, "state": state, "checkpoints": size(checkpoints), "other": size(total - checkpoints)}


if __name__ == "__main__":
    main()
