"""Class names and prompt templates, as users write them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError
from teachers.clip_text import TextTower

Template = Callable[[str], str]
"""Puts a class name into a sentence."""

AS_WRITTEN = ("{}",)
"""The template that leaves a class as it is."""


def read_classes(text: str) -> tuple[str, ...]:
    """Classes of `a cat, a dog`, of a text file (`*.txt`) with one on each line, or `imagenet`: the 1,000 that open_clip ships.

    Raises:
        UserError: for a file that cannot be read, fewer than two classes, or one that occurs twice.
    """
    if text == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        return tuple(IMAGENET_CLASSNAMES)
    parts = text.split(",")
    if text.endswith(".txt") and len(parts) == 1:
        try:
            parts = Path(text).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"classes: {text} cannot be read ({error})") from error
    classes = tuple(name for part in parts if (name := part.strip()))
    check_classes(classes)
    return classes


def check_classes(classes: Sequence[str]) -> None:
    """Raise a UserError for fewer than two classes, or one that occurs twice."""
    if len(classes) < 2:
        raise UserError(
            f'classes: {len(classes)} of at least 2: separate them with commas ("a cat, a dog"), or name a .txt file with '
            "one on each line"
        )
    if twice := [name for number, name in enumerate(classes) if name in classes[:number]]:
        raise UserError(f"classes: {twice[0]} occurs twice")


def make_templates(names: Sequence[str]) -> list[Template]:
    """Templates by name, or as texts with `{}` for the class.

    Args:
        names: `openai` are the 80 that OpenAI evaluated ImageNet with, `simple` is their subset of 7; both as open_clip ships
            them (Radford et al. 2021, section 3.1.4).

    Raises:
        UserError: for a text without exactly one `{}`, or no name at all.
    """
    from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    shipped = {"openai": OPENAI_IMAGENET_TEMPLATES, "simple": SIMPLE_IMAGENET_TEMPLATES}
    made: list[Template] = []
    for name in names:
        if name not in shipped and name.count("{}") != 1:
            raise UserError(
                f"templates: {name} is neither openai nor simple, and has not exactly one {{}} for the class"
            )
        made += shipped.get(name, [_filling(name)])
    if not made:
        raise UserError("templates: none is given; name openai, simple, or texts with {} for the class")
    return made


def _filling(text: str) -> Template:
    return lambda name: text.replace("{}", name)


def embed_classes(tower: TextTower, classes: Sequence[str], templates: Sequence[Template]) -> Tensor:
    """One embedding of length 1 for each class [K, D]: the mean over all templates, as OpenAI's and open_clip's."""
    embedded = tower.embed([template(name) for name in classes for template in templates])
    return F.normalize(embedded.view(len(classes), len(templates), -1).mean(dim=1), dim=1)
