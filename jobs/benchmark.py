"""Compare networks: parameters, MACs, activations, memory, latency.

python jobs/benchmark.py                                                ReGLA-M and its rivals at 512 px on one CPU thread
python jobs/benchmark.py 'benchmark.models=[regla_m,iformer_m]' 'benchmark.sizes=[256,512,1024]' benchmark.threads=4
"""

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs._cli import later, run, table
from pipeline.benchmark.config import BenchmarkJobConfig

if __name__ == "__main__":
    run(BenchmarkJobConfig, later("jobs.benchmark"), __doc__)
    sys.exit()

from pipeline.benchmark.benchmark import benchmark, check, render
from pipeline.benchmark.figures import accuracy_figure, latency_figure
from pipeline.runs.folder import work_folder


def main(config: BenchmarkJobConfig, dry_run: bool) -> dict[str, Any]:
    """Print the table, write it and its figures into the work folder, and log them to MLflow if it is installed."""
    settings = config.benchmark
    check(settings)
    print(
        f"{len(settings.models)} models x {settings.forms} x {settings.sizes} px, {settings.rounds} rounds", flush=True
    )
    if dry_run:
        return {"dry_run": True}
    measured = benchmark(settings)
    folder = work_folder(config) / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "benchmark.csv", folder / "latency.png", folder / "accuracy.png"]
    measured.to_csv(files[0], index=False)
    latency_figure(measured, files[1])
    accuracy_figure(files[2])
    figures = {
        f"{row['model']}/{row['form']}/{row['precision']}/{row['batch']}x{row['size']}": {
            "ms": round(row["milliseconds"], 3),
            "ratio": round(row["ratio"], 4),
        }
        for row in measured.to_dict("records")
    }
    print(f"{render(measured)}\n{table({'files': ', '.join(map(str, files))})}", flush=True)
    print(table({"MLflow": track(config, figures, files)}))
    return {"reference": settings.reference, "latency": figures}


def track(config: BenchmarkJobConfig, figures: dict[str, dict[str, float]], files: list[Path]) -> str:
    """Log the figures and files as one MLflow run; benchmarks also run on machines without MLflow."""
    if find_spec("mlflow") is None:
        return "not logged: mlflow is not installed here"
    from pipeline.tracking.address import resolve_uri
    from pipeline.tracking.run import start_run

    work = work_folder(config)
    uri = resolve_uri(config.tracking.uri, work)
    tags, tree = {"job": "benchmark"}, config.model_dump(mode="json")
    name = f"{config.name}-benchmark"
    job = start_run(uri, experiment=config.tracking.experiment, name=name, config=tree, tags=tags, work=work)
    # MLflow allows no brackets or braces in names; models with arguments have them.
    named = {re.sub(r"[^\w\-. :/]", "", key): values for key, values in figures.items()}
    job.log_metric_dict({f"{key}/{what}": value for key, values in named.items() for what, value in values.items()})
    for file in files:
        job.log_file(file, "benchmark")
    job.finish()
    return f"{uri} run {job.run_id}"
