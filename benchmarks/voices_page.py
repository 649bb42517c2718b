"""One HTML page with what students say about photographs of your own: words, prompts, and correspondences of their patches.

    python benchmarks/voices_page.py photos --to voices.html \\
        --maps '{model: timm/tf_efficientnet_lite2, weights: efficientnet_lite2.safetensors}' \\
        --student work/voices/seed0/runs/<run>/student --clip <clip>.pt --sam <sam>.pth

Takes the first eight images of a folder, or those that are named, in this order; matches are drawn between the first and the
second, the third and the fourth, and so on. `--maps` names the models whose patches are shown, each as a mapping: `model` (a name
in timm or an exported student), `weights` and `args` as in `predict`, and `teacher`, the head to take (`backbone` unless given).
Words and prompts need a student with heads of CLIP and SAM. The page holds the photographs; mind their licences.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import yaml
from jinja2 import Environment
from PIL import Image, ImageDraw
from torch import Tensor

import regla
from benchmarks.scene_clip import TEMPLATE, register
from pipeline.errors import UserError
from pipeline.predict.images import list_images, opened
from pipeline.report.html import policy, style
from pipeline.report.pictures import Picture, picture
from pipeline.sources.shapes import CLASSES
from pipeline.student.loading import load_student
from pipeline.voices.drawing import draw_matches, palette
from pipeline.voices.matches import Matches, mutual_nearest
from pipeline.voices.parts import find_parts
from pipeline.voices.patches import BACKBONE, load_patches
from pipeline.voices.principal import principal_colours
from pipeline.voices.prompts import Prompts
from pipeline.voices.words import Words

COUNT, HEIGHT = 8, 220
"""Photographs, and the height of every picture of them in pixels."""
MATCHES = 30
"""Drawn of each pair, those of largest cosine."""
BOX = (0.2, 0.2, 0.8, 0.8)
"""The box that is the prompt of every photograph, as shares of its sides; the point is its centre."""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<title>Voices of students</title>
<style>{{ style }}
.row { display: flex; flex-wrap: wrap; gap: 12px; }
.row figure { margin: 0; width: min-content; }
.row img { display: block; width: auto; height: {{ height }}px; border-radius: 6px; }
.row small { display: block; }
</style>
</head>
<body>
<header><h1>Voices of students</h1></header>
<main>
{% for section in sections %}
<section class="panel">
  <h2>{{ section.title }}</h2>
  <p class="lead">{{ section.lead }}</p>
  <div class="row">
  {% for picture in section.pictures %}<figure><img src="{{ picture.source }}" alt="{{ picture.caption }}">
  <figcaption>{{ picture.caption }}<small>{{ picture.detail }}</small></figcaption></figure>
  {% endfor %}
  </div>
</section>
{% endfor %}
</main>
</body>
</html>
"""


class Section(NamedTuple):
    """A part of the page."""

    title: str
    lead: str
    pictures: Sequence[Picture]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=Path, help="a folder, or files")
    parser.add_argument("--maps", action="append", type=yaml.safe_load, default=[], help="a model with patches")
    parser.add_argument("--size", type=int, default=448, help="side in pixels at which patches are computed")
    parser.add_argument(
        "--parts", type=int, default=5, help="parts that the patches of all photographs are divided into"
    )
    parser.add_argument("--student", type=Path, help="exported folder of a student with heads of CLIP and SAM")
    parser.add_argument("--clip", type=Path, help="weights of its CLIP teacher")
    parser.add_argument("--sam", type=Path, help="weights of its SAM teacher")
    parser.add_argument("--classes", default=",".join(CLASSES), help="of the words, separated by commas")
    parser.add_argument("--template", default=TEMPLATE, help="of a class in a sentence")
    parser.add_argument("--to", type=Path, default=Path("voices.html"))
    options = parser.parse_args(arguments)
    listed = list_images(options.photos[0] if len(options.photos) == 1 else options.photos)
    paths = [path for path in listed if isinstance(path, Path)][:COUNT]
    photos = {f"{number} {path.stem}": opened(path) for number, path in enumerate(paths, 1)}
    sections = [Section("Photographs", "", [_shown(photo, name) for name, photo in photos.items()])]
    if options.student and options.clip:
        register(options.clip.parent)
        words = regla.load_words(options.student, text_weights=str(options.clip))
        sections.append(
            words_section(words, photos, [name.strip() for name in options.classes.split(",")], options.template)
        )
    if options.student and options.sam:
        sections.append(prompts_section(regla.load_prompts(options.student, sam=str(options.sam)), photos))
    for entry in options.maps:
        sections += maps_sections(entry, photos, options.size, options.parts)
    page = Environment(autoescape=True).from_string(PAGE)
    html = page.render(sections=sections, style=style(), policy=policy(), height=HEIGHT)
    options.to.write_text(html, encoding="utf-8")
    print(f"{options.to}: {len(photos)} photographs, {', '.join(section.title for section in sections)}")


def words_section(words: Words, photos: dict[str, Image.Image], classes: Sequence[str], template: str) -> Section:
    """The two likeliest classes of each photograph."""
    named = words.classify([*photos.values()], classes, [template], top=2)
    captions = [", ".join(f"{name} {share:.0%}" for name, share in found) for found in named]
    lead = f"The two likeliest of {len(classes)} classes: {', '.join(classes)}. One of them must be right."
    pairs = zip(photos.items(), captions, strict=True)
    return Section("Words", lead, [_shown(photo, caption, name) for (name, photo), caption in pairs])


def prompts_section(prompts: Prompts, photos: dict[str, Image.Image]) -> Section:
    """The masks of a box and of its centre, with the prompts drawn."""
    pictures = []
    for name, photo in photos.items():
        embedded, (width, height) = prompts.embed(photo), photo.size
        box = [share * side for share, side in zip(BOX, (width, height) * 2, strict=True)]
        for kind, found in (
            ("box", embedded.boxes([box])),
            ("point", embedded.points([(width / 2, height / 2)])),
        ):
            assert found.masks is not None
            painted = _painted(photo, found.masks[0].numpy(), box if kind == "box" else None)
            pictures.append(_shown(painted, f"{kind}: predicted IoU {float(found.scores[0]):.2f}", name))
    lead = "What a box over the middle of each photograph cuts out, and a point at its centre; the prompt is white."
    return Section("Prompts", lead, pictures)


def maps_sections(entry: dict[str, Any], photos: dict[str, Image.Image], size: int, parts: int) -> Iterator[Section]:
    """Principal components, parts and matches of a model's patches."""
    unknown = sorted(entry.keys() - {"model", "weights", "args", "teacher"})
    if "model" not in entry or unknown:
        raise UserError(f"--maps: {entry}: needs model, and may have weights, args and teacher, not {unknown}")
    student = load_student(entry["model"], weights=entry.get("weights", "pretrained"), args=entry.get("args"))
    predictor, whose = load_patches(student, entry.get("teacher", BACKBONE), input_size=size)
    maps = predictor.features([*photos.values()])
    grid = "x".join(map(str, maps.shape[1:3]))
    found = principal_colours(maps)
    seen = found.foreground.flatten(1).float().mean(dim=1).tolist()
    yield Section(
        f"Principal components: {whose}",
        f"{grid} patches at {size} px. One basis for all photographs: equal colours mean alike patches. Black is what the first "
        "component of all patches sets apart as background.",
        [
            _over(photo, colours, Image.Resampling.BICUBIC, name, f"{share:.0%} foreground")
            for (name, photo), colours, share in zip(photos.items(), found.colours, seen, strict=True)
        ],
    )
    colours = torch.from_numpy(palette(parts)).float()
    yield Section(
        f"Parts: {whose}",
        f"k-means of the patches of all photographs by cosine into {parts} parts, a colour each, over the photograph in grey.",
        [
            _over(photo, colours[labels], Image.Resampling.NEAREST, name, opacity=0.6)
            for (name, photo), labels in zip(photos.items(), find_parts(maps, parts), strict=True)
        ],
    )
    names, pictures = [*photos], []
    for first in range(0, len(names) - 1, 2):
        pair = names[first : first + 2]
        matches = mutual_nearest(maps[first], maps[first + 1])
        best = Matches(*(part[:MATCHES] for part in matches))
        drawn = draw_matches(photos[pair[0]], photos[pair[1]], best)
        least = float(matches.cosines[:MATCHES].min()) if len(matches.cosines) else 0.0
        text = f"{len(matches.cosines)} matches; cosine of those drawn at least {least:.2f}"
        pictures.append(_shown(drawn, " and ".join(pair), text))
    lead = f"Mutual nearest patches of two photographs: the {MATCHES} of largest cosine, coloured by their place in the first."
    yield Section(f"Matches: {whose}", lead, pictures)


def _shown(photo: Image.Image, caption: str, detail: str = "") -> Picture:
    """At twice the height of the page, for sharp screens."""
    width = max(1, round(photo.width * 2 * HEIGHT / photo.height))
    return picture(photo.resize((width, 2 * HEIGHT), Image.Resampling.LANCZOS), caption, detail)


def _over(
    photo: Image.Image,
    colours: Tensor,
    resample: Image.Resampling,
    name: str,
    detail: str = "",
    opacity: float = 1.0,
) -> Picture:
    """Colours [h, w, 3] in [0, 1] over a photograph in grey."""
    pixels = Image.fromarray((colours.numpy() * 255).round().astype(np.uint8)).resize(photo.size, resample)
    return _shown(Image.blend(photo.convert("L").convert("RGB"), pixels, opacity), name, detail)


def _painted(photo: Image.Image, mask: np.ndarray, box: Sequence[float] | None) -> Image.Image:
    """The photograph in grey, a mask [H, W] in colour, and the box or its centre."""
    grey = np.repeat(np.asarray(photo.convert("L"))[..., None], 3, axis=2).astype(np.float32)
    grey[mask] = 0.4 * grey[mask] + 0.6 * 255 * palette(3)[1]
    painted = Image.fromarray(grey.round().astype(np.uint8))
    draw, thick = ImageDraw.Draw(painted), max(2, max(photo.size) // 150)
    if box:
        draw.rectangle(tuple(box), outline="white", width=thick)
    else:
        x, y = photo.width / 2, photo.height / 2
        draw.ellipse((x - 2 * thick, y - 2 * thick, x + 2 * thick, y + 2 * thick), fill="white", outline="black")
    return painted


if __name__ == "__main__":
    main()
