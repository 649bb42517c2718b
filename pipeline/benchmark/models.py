"""The compared networks, from the text that a user writes."""

from typing import Any

import timm
from torch import nn

import pipeline.student.regla  # noqa: F401  registers ReGLA
from pipeline.config.yaml_text import read_inline_yaml
from pipeline.errors import UserError


def create_model(text: str, **arguments: Any) -> nn.Module:
    """Create a timm model without weights, in eval mode; constructor arguments in ``text``, as for :func:`parse`, win."""
    name, own = parse(text)
    return timm.create_model(name, **{**arguments, **own}).eval()


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Name and constructor arguments from text such as ``regla_m {depths: [1, 2, 8, 3], gate_act: none}``.

    Raises:
        UserError: if timm does not know the name, or the arguments are not a mapping.
    """
    name, _, rest = text.partition(" ")
    if not timm.is_model(name):
        raise UserError(f"timm knows no model {name}")
    try:
        arguments = read_inline_yaml(rest) or {}
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise UserError(f"'{text}': the model's name must be followed by a mapping, such as {name} {{drop_path: 0.1}}")
    return name, arguments
