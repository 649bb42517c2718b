"""Whether a last phase with mask losses (`mask_weight`) makes a student's masks better than one without, at equal samples.

    python benchmarks/mask_losses.py --seeds 0 1 2 --to work/masks

A tiny SAM learns masks of generated scenes from boxes and points. Each student learns SAM's embedding in a first phase, which is
the same for all; the arms differ in the losses of the second. On unseen scenes, student and SAM get the ground-truth box of every
object, and a random point on it: `box` and `point` are mean IoU with the object, `box_agreement` and `point_agreement` with SAM's
own mask of the prompt, and `loop_agreement` the same under prompts as in training; all in percent. The last line is JSON.
"""

import json
import sys
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import regla
from benchmarks.results import mean_and_deviation, measure_once, study_parser
from benchmarks.scene_sam import ENCODER, SIDE, train_sam
from pipeline.config.load import load_config
from pipeline.distill.config import MasksConfig
from pipeline.distill.masks import MaskTarget, draws_shape
from pipeline.downstream.detect.task import Objects
from pipeline.runtime.ray_session import connect
from pipeline.sources.sample_scenes import SampleScenes
from pipeline.voices.config import PromptsJobConfig
from pipeline.voices.promptable import mask_iou, plan_promptable

SCENES, HELD_OUT, LABELLED = 3000, 400, 1500
"""Of the student, of the measurement, and those of the student's whose masks SAM learns."""
SAM_EPOCHS, EPOCHS = 12, (3, 2)
ARMS: dict[str, dict[str, float]] = {
    "embedding": {},
    "embedding and masks": {"mask_weight": 1.0},
    "embedding and masks, weight 5": {"mask_weight": 5.0},
    "masks": {"mask_weight": 5.0, "patch_weight": 0.0},
}
"""Weights of the teacher in the second phase."""
COLUMNS = ("box", "point", "box_agreement", "point_agreement", "loop_agreement")

Figures = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the results file lacks, then print the table."""
    parser = study_parser(__doc__, "masks")
    parser.add_argument("--to", type=Path, default=Path("work/masks"), help="folder of the teachers, caches and runs")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS], default=[*ARMS])
    options = parser.parse_args(arguments)
    rows: dict[str, list[Figures]] = {arm: [] for arm in options.arms}
    with connect():
        for seed in options.seeds:
            for arm in options.arms:
                run = {"arm": arm, "seed": seed, "scenes": SCENES, "epochs": [*EPOCHS], "sam": SAM_EPOCHS}
                study = partial(measure_arm, options.to.resolve() / f"seed{seed}", seed, ARMS[arm])
                rows[arm].append(measure_once(options.results, run, study))
    print(json.dumps(report(rows)))


def measure_arm(folder: Path, seed: int, weights: dict[str, float]) -> Figures:
    """Train SAM, unless its file is there, and one student; measure both."""
    folder.mkdir(parents=True, exist_ok=True)
    sam = folder / f"sam-points-n{LABELLED}-e{SAM_EPOCHS}.pth"
    if not sam.exists():
        train_sam(SampleScenes("train", LABELLED, SIDE, seed), SAM_EPOCHS, sam, points=True)
    fields: Figures = {
        "work": str(folder),
        "seed": seed,
        "data": {"samples": {"train": SCENES, "val": HELD_OUT, "size": SIDE}},
    }
    teacher = {"model": "sam/vit_b", "weights": sam, "input_size": SIDE, "pool": 1, "args": ENCODER}
    first, second = EPOCHS
    trained = regla.distill(
        name="masks",
        **fields,
        teachers=[teacher],
        student={"name": "regla_t", "input_size": SIDE, "head_dim": 512, "keep_heads": True},
        loss={"patches": {"cosine": 0.5, "smooth_l1": 0.5}},
        train={"batch_size": 32, "warmup_epochs": 0.5},
        knn={"bank": 1000},
        phases=[
            {"train": {"epochs": first, "lr": 2e-3}},
            {
                "train": {"epochs": second, "lr": 1e-3},
                **{f"teachers.0.{name}": value for name, value in weights.items()},
            },
        ],
    )
    prompts = {"sam": str(sam), "sam_size": SIDE, "sam_args": ENCODER}
    return {"student": str(trained.folder), **measure(fields, str(trained.folder), prompts)}


def measure(fields: Figures, student: str, prompts: Figures) -> Figures:
    """Mean IoU in percent of a student's and (`teacher_`) of SAM's masks, from boxes and from points."""
    config = load_config(PromptsJobConfig, {**fields, "evaluate": {"student": student}, "prompts": prompts})
    plan = plan_promptable(config)
    random = torch.Generator().manual_seed(0)
    settings = MasksConfig()
    compare = MaskTarget(deepcopy(plan.teacher.masks), settings)
    found: dict[str, list[torch.Tensor]] = {}
    for row in plan.rows:
        pixels, objects = plan.examples.read(row)
        truth, image = objects.masks.bool(), pixels.permute(1, 2, 0).numpy()
        places = torch.multinomial(truth.flatten(1).float(), 1, generator=random).squeeze(1)
        points = [(place % truth.shape[2] + 0.5, place // truth.shape[2] + 0.5) for place in places.tolist()]
        masks, embeddings = {}, []
        for name, model in (("", plan.student), ("teacher_", plan.teacher)):
            embedded = model.embed(image)
            embeddings.append(embedded.embedding)
            masks[f"{name}box"] = _masks(embedded.boxes(objects.boxes.tolist()))
            masks[f"{name}point"] = torch.cat([_masks(embedded.points([point])) for point in points])
        pairs = {name: (part, truth) for name, part in masks.items()}
        pairs |= {f"{name}_agreement": (masks[name], masks[f"teacher_{name}"]) for name in ("box", "point")}
        for name, pair in pairs.items():
            found.setdefault(name, []).append(mask_iou(*pair))
        with torch.no_grad():
            _, agreement = compare(*embeddings, torch.rand(1, *draws_shape(settings), generator=random))
        found.setdefault("loop_agreement", []).append(agreement)
    return {name: 100 * torch.cat(parts).mean().item() for name, parts in found.items()}


def _masks(found: Objects) -> torch.Tensor:
    assert found.masks is not None
    return found.masks


def report(rows: dict[str, list[Figures]]) -> Figures:
    """Print the table; returns the gain of each arm over the first, in points, means over the seeds."""
    print("| second phase | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (1 + len(COLUMNS)))
    first = next(iter(rows.values()))
    teacher = [mean_and_deviation([row[f"teacher_{name}"] for row in first]) for name in ("box", "point")]
    print("| (SAM itself) | " + " | ".join([*teacher, "", "", ""]) + " |")
    gains: Figures = {"seeds": [row["seed"] for row in first]}
    for arm, found in rows.items():
        print(f"| {arm} | " + " | ".join(mean_and_deviation([row[name] for row in found]) for name in COLUMNS) + " |")
        gains[arm] = {
            name: sum(row[name] - base[name] for row, base in zip(found, first, strict=True)) / len(found)
            for name in COLUMNS
        }
    return gains


if __name__ == "__main__":
    main()
