"""What a student keeps of its CLIP and SAM teachers, end to end: no published weights are needed.

    python benchmarks/voices.py --seeds 0 1 2 --to work/voices

A tiny open_clip model learns captions of generated scenes, a tiny SAM their instance masks. Both are cached, and distilled
with HOG into one ReGLA-T that keeps its heads. On unseen scenes, teachers and student name the dominant object by words
(`top1`; chance is 10 %), and cut out objects from ground-truth boxes (`mask_iou`). `blank_mask_iou` is that of the decoder on
SAM's mean embedding: what a box alone gives. kNN is compared with that of students that learned equally long from one of the
two alone. The last line is JSON: `words_ratio` and `prompts_ratio` are student over teacher, means over the seeds. Trained
teachers are kept.
"""

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import regla
from benchmarks.results import mean_and_deviation, measure_once, study_parser
from benchmarks.scene_clip import TEMPLATE, train_clip
from benchmarks.scene_sam import ENCODER, SIDE, train_sam
from pipeline.config.load import load_config
from pipeline.runtime.ray_session import connect
from pipeline.sources.sample_scenes import SampleScenes
from pipeline.voices.config import PromptsJobConfig
from pipeline.voices.promptable import PromptsPlan, measure, plan_promptable
from pipeline.voices.prompts import Prompts

SCENES, HELD_OUT = 4000, 400
"""Of the student; the teachers learned from the first `LABELLED` of them."""
LABELLED = 1500
TOWER_EPOCHS, CLIP_EPOCHS, SAM_EPOCHS, EPOCHS = 10, 5, 12, 4
ARMS = {"both": ("hog", "clip", "sam"), "CLIP alone": ("clip",), "SAM alone": ("sam",)}
"""Teachers by arm."""
COLUMNS = ("top1", "teacher_top1", "mask_iou", "teacher_mask_iou", "blank_mask_iou", "knn")

Figures = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the results file lacks, then print the table."""
    parser = study_parser(__doc__, "voices")
    parser.add_argument("--to", type=Path, default=Path("work/voices"), help="folder of the teachers, caches and runs")
    options = parser.parse_args(arguments)
    studies = [Study(options.to.resolve() / f"seed{seed}", seed) for seed in options.seeds]
    rows: dict[str, list[Figures]] = {arm: [] for arm in ARMS}
    with connect():
        for study in studies:
            for arm in ARMS:
                run = {"arm": arm, "seed": study.seed, "scenes": SCENES, "epochs": EPOCHS}
                row = measure_once(options.results, {**run, "part": "student"}, partial(study.distil, arm))
                if arm == "both":
                    heads = partial(study.measure_heads, row["student"])
                    row |= measure_once(options.results, {**run, "part": "heads"}, heads)
                rows[arm].append(row)
    print(json.dumps(report(rows)))


class Study:
    """Teachers and students of one seed, in a folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        data = {"samples": {"train": SCENES, "val": HELD_OUT, "size": SIDE}}
        self.fields: Figures = {"work": str(folder), "seed": seed, "data": data}
        self.clip = folder / f"clip-n{LABELLED}-e{TOWER_EPOCHS}-{CLIP_EPOCHS}.pt"
        self.sam = folder / f"sam-n{LABELLED}-e{SAM_EPOCHS}.pth"
        self.folder, self.seed, self.source = folder, seed, SampleScenes("train", LABELLED, SIDE, seed)

    def train_teachers(self) -> None:
        """Train CLIP and SAM unless their files are there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.clip.exists():
            train_clip(self.source, TOWER_EPOCHS, CLIP_EPOCHS, self.clip)
        if not self.sam.exists():
            train_sam(self.source, SAM_EPOCHS, self.sam)

    def distil(self, arm: str) -> Figures:
        """The folder of a student, and its kNN in percent."""
        started = time.perf_counter()
        self.train_teachers()
        teachers = {
            "hog": {"model": "hog", "input_size": SIDE, "weight": 0.5},
            "clip": {"model": "benchmarks.scene_clip:scene_clip", "weights": self.clip},
            "sam": {"model": "sam/vit_b", "weights": self.sam, "input_size": SIDE, "pool": 1, "args": ENCODER},
        }
        trained = regla.distill(
            name=f"voices-{arm.replace(' ', '-')}",
            **self.fields,
            teachers=[teachers[name] for name in ARMS[arm]],
            student={"name": "regla_t", "input_size": SIDE, "head_dim": 512, "keep_heads": True},
            loss={"patches": {"cosine": 0.5, "smooth_l1": 0.5}},
            train={"epochs": EPOCHS, "warmup_epochs": 0.5, "batch_size": 32, "lr": 2e-3},
            knn={"bank": 1000},
        )
        seconds = round(time.perf_counter() - started)
        return {"student": str(trained.folder), "knn": trained.metrics["knn_after"], "seconds": seconds}

    def measure_heads(self, student: str) -> Figures:
        """Words and prompts of a student beside its teachers, in percent."""
        fields = {**self.fields, "evaluate": {"student": student}}
        words = {"text_weights": str(self.clip), "templates": [TEMPLATE]}
        found = regla.evaluate("zero-shot", **fields, words=words)
        figures = {name: found[name] for name in ("top1", "teacher_top1")}
        prompts = {"sam": str(self.sam), "sam_size": SIDE, "sam_args": ENCODER}
        found = regla.evaluate("promptable", **fields, prompts=prompts)
        figures |= {name: found[name] for name in ("mask_iou", "teacher_mask_iou", "mask_ap", "teacher_mask_ap")}
        blank = with_blank_student(plan_promptable(load_config(PromptsJobConfig, {**fields, "prompts": prompts})))
        return figures | {"blank_mask_iou": measure(blank)["mask_iou"]}


def with_blank_student(plan: PromptsPlan) -> PromptsPlan:
    """The plan with the mean of SAM's embeddings, over images and places, in the student's place."""
    images = [plan.examples.read(row)[0].permute(1, 2, 0).numpy() for row in plan.rows[:32]]
    found = torch.cat([plan.teacher.embed(image).embedding for image in images])
    mean = found.mean(dim=(0, 2, 3), keepdim=True).expand_as(found[:1])
    blank = Prompts(lambda pixels: mean, plan.teacher.masks, "blank", SIDE, plan.teacher.device)
    return PromptsPlan(blank, plan.teacher, plan.label, plan.examples, plan.rows)


def report(rows: dict[str, list[Figures]]) -> Figures:
    """Print the table; returns the ratios of the student of both, and how far its kNN is ahead of the better of the others."""
    print("| student taught by | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (1 + len(COLUMNS)))
    for arm, found in rows.items():
        cells = [mean_and_deviation([row[name] for row in found if name in row]) for name in COLUMNS]
        print(f"| {arm} | " + " | ".join(cells) + " |")
    figures: Figures = {"seeds": [row["seed"] for row in rows["both"]]}
    for name, part in {"words_ratio": "top1", "prompts_ratio": "mask_iou"}.items():
        figures[name] = mean(row[part] / row[f"teacher_{part}"] for row in rows["both"])
    alone = [[row["knn"] for row in found] for arm, found in rows.items() if arm != "both"]
    gaps = [row["knn"] - max(others) for row, *others in zip(rows["both"], *alone, strict=True)]
    return figures | {"knn_minus_alone": mean(gaps)}


if __name__ == "__main__":
    main()
