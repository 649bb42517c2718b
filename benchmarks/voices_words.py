"""How much of its CLIP teacher's words a student keeps, with a teacher trained on the spot: no published weights are needed.

    python benchmarks/voices_words.py --to work-words --seed 0

A tiny open_clip model learns captions of generated scenes ("a ring above a small star"), is cached, and distilled with HOG into
one ReGLA-T that keeps its heads. Both then name the dominant object of unseen scenes ("a ring", chance is 10 %). The last line is
JSON: `words_ratio` is the student's top-1 over the teacher's.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regla
from pipeline.runtime.progress import Progress
from pipeline.sources.sample_scenes import SampleScenes, Scene
from pipeline.sources.shapes import CLASSES
from teachers.base import Teacher, TeacherOptions
from teachers.clip import clip

SIZE = 96
NAME = "scene-clip"
CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 24, "patch_size": None, "head_width": 48},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 96, "heads": 4, "layers": 2},
}
TEMPLATE = "a {}"
FILE = "clip.pt"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the teacher unless its file exists, distil, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("work-words"), help="folder of the teacher, cache and runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=2000, help="training scenes of the teacher, and of the student")
    parser.add_argument("--held-out", type=int, default=400, help="unseen scenes")
    parser.add_argument("--clip-epochs", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=12, help="of the distillation")
    options = parser.parse_args(arguments)
    folder = options.to.resolve() / f"seed{options.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE
    register(folder)
    if not file.exists():
        train_clip(options, file)
    data = {"samples": {"train": options.scenes, "val": options.held_out, "size": SIZE}}
    common: dict[str, Any] = {"work": folder, "seed": options.seed, "data": data, "student": {"input_size": SIZE}}
    student = {"name": "regla_t", "input_size": SIZE, "keep_heads": True}
    teachers = [{"model": "benchmarks.voices_words:scene_clip", "weights": file}, {"model": "hog", "input_size": SIZE}]
    fields = {**common, "student": student, "teachers": teachers, "train": {"epochs": options.epochs}}
    trained = regla.distill(name="voices-words", **fields)
    words = {"text_weights": str(file), "templates": [TEMPLATE]}
    found = regla.evaluate("zero-shot", **common, evaluate={"student": trained.folder}, words=words)
    figures = {
        "seed": options.seed,
        "teacher_top1": found["teacher_top1"],
        "student_top1": found["top1"],
        "words_ratio": found["top1"] / found["teacher_top1"],
        "knn_after": trained.metrics["knn_after"],
    }
    print(json.dumps(figures))


def register(folder: Path) -> None:
    """Make open_clip know the model in this process, by a file in the folder of its weights."""
    file = folder / f"{NAME}.json"
    if not file.exists():
        file.write_text(json.dumps(CONFIG))
    if NAME not in open_clip.list_models():
        open_clip.add_model_config(file)


def scene_clip(options: TeacherOptions) -> Teacher:
    """Factory of the teacher, `benchmarks.voices_words:scene_clip`, in any process."""
    register(Path(options.weights).parent)
    return clip(TeacherOptions(NAME, options.weights, options.input_size, options.pool, options.args))


def captions(scene: Scene) -> list[str]:
    """What is true of a scene: its dominant object, and where the others lie."""
    first, *others = (CLASSES[number] for number in scene.classes)
    centres = (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2
    told = [f"a {first}"]
    for other, (x, y) in zip(others, centres[1:] - centres[0], strict=True):
        place = "beside" if abs(x) > abs(y) else "below" if y < 0 else "above"
        told.append(f"a {first} {place} a small {other}")
    return told


def train_clip(options: argparse.Namespace, file: Path) -> None:
    """Train both towers by the contrastive loss, in which equal captions are all positives (Yang et al. 2022, UniCL)."""
    torch.manual_seed(options.seed)
    random = np.random.default_rng(options.seed)
    scenes = SampleScenes("train", options.scenes, SIZE, options.seed)
    rendered = [scenes.scene(number) for number in range(options.scenes)]
    images = torch.from_numpy(np.stack([scene.image for scene in rendered])).permute(0, 3, 1, 2)
    told = [captions(scene) for scene in rendered]
    known = {text: number for number, text in enumerate(sorted({text for texts in told for text in texts}))}
    tokens = open_clip.get_tokenizer(NAME)([*known])
    model = open_clip.create_model(NAME).to(memory_format=torch.channels_last).train()
    batch, steps = 100, options.scenes // 100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps * options.clip_epochs, pct_start=0.1
    )
    with Progress(steps * options.clip_epochs, "step", "train CLIP") as progress:
        for _ in range(options.clip_epochs):
            for rows in torch.randperm(len(images))[: steps * batch].view(steps, batch):
                chosen = torch.tensor([known[told[row][random.integers(len(told[row]))]] for row in rows.tolist()])
                loss = contrastive(model, augmented(images[rows]), tokens[chosen], chosen)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    model.logit_scale.clamp_(0, np.log(100))
                progress.update()
    torch.save(model.eval().state_dict(), file)


def contrastive(model: Any, images: Tensor, texts: Tensor, numbers: Tensor) -> Tensor:
    """The loss of images [B, 3, H, W] and texts [B, L], equal where their `numbers` [B] are."""
    logits = (
        model.logit_scale.exp()
        * model.encode_image(images, normalize=True)
        @ model.encode_text(texts, normalize=True).T
    )
    right = (numbers[:, None] == numbers).float()
    right = right / right.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def augmented(images: Tensor) -> Tensor:
    """Pixels as the teacher takes them, mirrored and shifted at random: no caption says left or right."""
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    pixels = (images / 255 - mean) / std
    pixels = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(3), pixels)
    shift = tuple(torch.randint(-8, 9, (2,)).tolist())
    return pixels.roll(shift, (2, 3)).contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
