"""Compare the runs of an experiment, write all outputs, and log them to an MLflow run in the experiment."""

from pathlib import Path
from typing import Any

from pipeline.compare.comparison import Comparison
from pipeline.compare.figures import write_figures
from pipeline.compare.html import render_page
from pipeline.compare.tables import curves_frame, differences_frame, groups_frame, render_markdown, runs_frame
from pipeline.errors import UserError
from pipeline.tracking.address import resolve_uri
from pipeline.tracking.reading import read_experiment
from pipeline.tracking.run import start_run

CSV_FILES = {
    "runs.csv": runs_frame,
    "groups.csv": groups_frame,
    "differences.csv": differences_frame,
    "curves.csv": curves_frame,
}


def compare(experiment: str, filter_string: str, uri: str | None, folder: Path) -> tuple[Comparison, dict[str, Any]]:
    """Read, compare, write into the folder, and log; returns the comparison and the figures of the job's JSON line.

    Args:
        filter_string: MLflow filter of the runs, or "".
        uri: of the store; None: the default of the jobs.

    Raises:
        UserError: if the store, the experiment or the filter is invalid, there is nothing to compare, or the folder
            cannot be written.
    """
    work = Path("work").resolve()
    store = resolve_uri(uri, work, "--tracking-uri")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--to: {folder} is a file; name a folder")
    comparison = Comparison.of(read_experiment(store, experiment, filter_string), filter_string)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = _write(comparison, folder)
    except OSError as error:
        raise UserError(f"--to: {folder} cannot be written ({error.strerror}); name another folder") from error
    settings = {"experiment": experiment, "filter": filter_string}
    run = start_run(store, experiment=experiment, name="compare", config=settings, tags={"job": "compare"}, work=work)
    run.log_metric_dict({"runs": len(comparison.entries), "groups": len(comparison.groups)})
    for file in files:
        run.log_file(file, "comparison")
    run.finish()
    groups = {
        group.label: {
            "seeds": len(group.counted),
            **{
                key: {**vars(group.measures[key]), "held_out": group.held_out}
                for key in comparison.accuracies
                if key in group.measures
            },
            "front": comparison.pareto_costs(number),
        }
        for number, group in enumerate(comparison.groups)
    }
    paths = [str(file.resolve()) for file in files]
    return comparison, {"runs": len(comparison.entries), "groups": groups, "files": paths, "mlflow_run_id": run.run_id}


def _write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the page, the report, the CSV tables and the figures, replacing those of an earlier comparison."""
    for name, frame in CSV_FILES.items():
        frame(comparison).to_csv(folder / name, index=False)
    figures = write_figures(comparison, folder)
    (folder / "comparison.md").write_text(render_markdown(comparison, figures), encoding="utf-8")
    (folder / "comparison.html").write_text(render_page(comparison), encoding="utf-8")
    return [folder / name for name in ("comparison.html", "comparison.md", *CSV_FILES, *(file for _, file in figures))]
