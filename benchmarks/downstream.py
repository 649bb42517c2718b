"""Compare fine-tuning of a distilled backbone with training from scratch, with the frozen backbone, and with other networks.

    python benchmarks/downstream.py recipes/segment.yaml data.train=images/train data.val=images/val \
        --student work/runs/<run>/student --others iformer_t --seeds 0 1 2

Every run is a `jobs/finetune.py` of the recipe with equal schedule and samples; `scratch` is the student's own architecture, and
`slow` the distilled one with a tenth of the learning rate in the backbone.
Prints mean and standard deviation over the seeds of every metric on the held-out images, and one line of JSON.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.results import mean_and_deviation, measure_once, study_parser
from pipeline.config.load import load_config
from pipeline.downstream.config import FinetuneJobConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Fine-tune what the results file lacks, then print the table and the mean of every metric by start."""
    parser = study_parser(__doc__, "downstream")
    parser.add_argument("items", nargs="+", help="a recipe of jobs/finetune.py and overrides")
    parser.add_argument("--student", type=Path, required=True, help="an exported, distilled student")
    parser.add_argument("--others", nargs="*", default=[], help="further timm models, trained from scratch")
    options = parser.parse_args(arguments)
    rows = [
        _run(options.items, start, overrides, seed, options.results)
        for seed in options.seeds
        for start, overrides in starts(options.student, options.others).items()
    ]
    metrics = [name.removesuffix("_before") for name in rows[0]["figures"] if name.endswith("_before")]
    print(f"{'start':<12}" + "".join(f"{name:>22}" for name in metrics))
    means: dict[str, Any] = {}
    for start in dict.fromkeys(row["start"] for row in rows):
        values = {name: [row["figures"][name] for row in rows if row["start"] == start] for name in metrics}
        means[start] = {name: round(mean(found), 3) for name, found in values.items()}
        print(f"{start:<12}" + "".join(f"{mean_and_deviation(found):>22}" for found in values.values()))
    print(json.dumps(means))


def starts(student: Path, others: Sequence[str]) -> dict[str, list[str]]:
    """Overrides of the recipe for each start, by name."""
    described = json.loads((student / "student.json").read_text())
    built = [f"student.args.{name}={json.dumps(value)}" for name, value in described["args"].items()]
    exported = f"finetune.student={student.resolve()}"
    return {
        "scratch": [f"finetune.student={described['model']}", *built],
        "distilled": [exported],
        "slow": [exported, "finetune.backbone_lr=0.1"],
        "frozen": [exported, "finetune.frozen=true"],
        **{name: [f"finetune.student={name}"] for name in others},
    }


def _run(items: Sequence[str], start: str, overrides: Sequence[str], seed: int, results: Path) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        from jobs.finetune import main as finetune
        from pipeline.runtime.ray_session import connect

        recipe, *others = items
        config = load_config(FinetuneJobConfig, recipe, [*others, *overrides, f"seed={seed}", f"name={start}-{seed}"])
        started = time.perf_counter()
        with connect():
            figures = finetune(config, False)
        return {"figures": figures, "seconds": round(time.perf_counter() - started)}

    return measure_once(results, {"recipe": " ".join([*items, *overrides]), "start": start, "seed": seed}, measure)


if __name__ == "__main__":
    main()
