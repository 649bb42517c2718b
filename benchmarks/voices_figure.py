"""Draw what a student of `benchmarks/voices.py` says and cuts out: docs/figures/voices.png.

    python benchmarks/voices_figure.py work/voices/seed0/runs/<run>/student --clip <clip>.pt --sam <sam>.pth --to voices.png

Eight unseen scenes: the student's two likeliest classes, and its masks from ground-truth boxes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import regla
from benchmarks.scene_clip import TEMPLATE, register
from benchmarks.scene_sam import SIDE
from pipeline.sources.sample_scenes import SampleScenes, Scene
from pipeline.sources.shapes import CLASSES
from pipeline.voices.drawing import palette

COUNT = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path, help="exported folder")
    parser.add_argument("--clip", type=Path, required=True, help="weights of its CLIP teacher")
    parser.add_argument("--sam", type=Path, required=True, help="weights of its SAM teacher")
    parser.add_argument("--to", type=Path, default=Path("voices.png"))
    options = parser.parse_args(arguments)
    register(options.clip.parent)
    source = SampleScenes("val", COUNT, SIDE)
    scenes = [source.scene(number) for number in range(COUNT)]
    images = [scene.image for scene in scenes]
    words = regla.load_words(options.student, text_weights=str(options.clip))
    named = words.classify(images, CLASSES, [TEMPLATE], top=2)
    prompts = regla.load_prompts(options.student, sam=str(options.sam))
    masks = [prompts.embed(scene.image).boxes(scene.boxes.tolist()).masks for scene in scenes]
    figure = Figure(figsize=(2 * COUNT, 4.4), layout="constrained")
    rows = figure.subplots(2, COUNT)
    for number, scene in enumerate(scenes):
        (first, share), (second, rest) = named[number]
        rows[0, number].set_title(f"{first} {share:.0%}, {second} {rest:.0%}", fontsize=10)
        found = masks[number]
        assert found is not None
        _show(rows[0, number], scene.image)
        _show(rows[1, number], _painted(scene, found.numpy()))
    for axes, label in zip(rows[:, 0], ("words", "masks from boxes"), strict=True):
        axes.set_ylabel(label)
    figure.savefig(options.to, dpi=60)


def _show(axes: Axes, pixels: np.ndarray) -> None:
    axes.imshow(pixels)
    axes.set_xticks([])
    axes.set_yticks([])


def _painted(scene: Scene, masks: np.ndarray) -> np.ndarray:
    """The image, grey, with every mask [n, H, W] in a colour of its own."""
    grey = np.repeat(scene.image.mean(axis=2, keepdims=True), 3, axis=2) / 255
    for mask, colour in zip(masks, palette(len(masks)), strict=True):
        grey[mask] = 0.4 * grey[mask] + 0.6 * colour
    return grey


if __name__ == "__main__":
    main()
