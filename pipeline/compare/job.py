"""Compare the runs of an experiment, write everything there is to see, and log it to a run beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.compare.comparison import Comparison
from pipeline.compare.write import write
from pipeline.errors import UserError
from pipeline.tracking.address import resolve_uri
from pipeline.tracking.reading import read_experiment
from pipeline.tracking.run import start_run

FOLDER = "comparison"
"""Of the artifacts."""


@dataclass(frozen=True)
class Result:
    """A comparison, its files, and the MLflow run that holds them."""

    comparison: Comparison
    files: list[Path]
    run_id: str

    def figures(self) -> dict[str, Any]:
        """What scripts want to know, JSON-ready."""
        comparison, chief = self.comparison, self.comparison.chief
        groups = {
            group.label: {
                "seeds": len(group.counted),
                **{key: vars(group.measures[key]) for key in comparison.accuracies if key in group.measures},
                "front": comparison.on_fronts(number, chief),
            }
            for number, group in enumerate(comparison.groups)
        }
        files = [str(file.resolve()) for file in self.files]
        return {"runs": len(comparison.entries), "groups": groups, "files": files, "mlflow_run_id": self.run_id}


def compare(experiment: str, only: str, uri: str | None, folder: Path) -> Result:
    """Read, judge, write into the folder, and log.

    Args:
        only: MLflow filter of the runs, or nothing.
        uri: of the store; None: as the jobs find it.

    Raises:
        UserError: where the store, the experiment or the filter is not as it must be, nothing is there to compare, or
            the folder cannot be written.
    """
    work = Path("work").resolve()
    store = resolve_uri(uri, work, "--tracking-uri")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--to: {folder} is a file; name a folder")
    comparison = Comparison.of(read_experiment(store, experiment, only), only)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = write(comparison, folder)
    except OSError as error:
        raise UserError(f"--to: {folder} cannot be written ({error.strerror}); name another folder") from error
    settings = {"experiment": experiment, "filter": only}
    run = start_run(store, experiment=experiment, name="compare", config=settings, tags={"job": "compare"}, work=work)
    run.log_metric_dict({"runs": len(comparison.entries), "groups": len(comparison.groups)})
    for file in files:
        run.log_file(file, FOLDER)
    run.finish()
    return Result(comparison, files, run.run_id)
