"""Compare the runs of an MLflow experiment: tables, figures, and one HTML page.

python jobs/compare.py --experiment regla-distill
python jobs/compare.py --experiment regla-distill --filter "params.student.name LIKE 'regla%'" --to comparison
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs._cli import later, run_parser, table


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, compare, and print the tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", required=True, help="MLflow experiment (tracking.experiment of the jobs)")
    parser.add_argument("--filter", default="", help="selects runs, in MLflow's syntax; their evaluations are included")
    parser.add_argument(
        "--tracking-uri", help="MLflow store; none: MLFLOW_TRACKING_URI, else the SQLite file of ./work"
    )
    parser.add_argument("--to", type=Path, default=Path("comparison"), help="output folder; default: comparison")
    run_parser(parser, later("jobs.compare", "show"), arguments)


if __name__ == "__main__":
    main()
    sys.exit()

from pipeline.compare.job import compare
from pipeline.compare.tables import render_text


def show(options: argparse.Namespace) -> Mapping[str, Any]:
    """Compare, and print what was found."""
    comparison, figures = compare(options.experiment, options.filter, options.tracking_uri, options.to)
    print(render_text(comparison))
    rows = {"page": options.to / "comparison.html", "MLflow": f"{comparison.uri} run {figures['mlflow_run_id']}"}
    print(f"\n{table(rows)}")
    return figures
