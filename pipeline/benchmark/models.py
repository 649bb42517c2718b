"""The networks that are compared, by what a user writes."""

from __future__ import annotations

from typing import Any

import timm
import yaml
from torch import nn

import pipeline.student.regla  # noqa: F401  registers ReGLA
from pipeline.errors import UserError


def create_model(text: str, **arguments: Any) -> nn.Module:
    """A timm model without weights, in eval mode.

    Args:
        text: name of the model, and after a space arguments of its constructor as a YAML mapping, as in
            ``regla_m {depths: [1, 2, 8, 3], gate_act: none}``.
        **arguments: more of them; those in ``text`` win.

    Raises:
        UserError: timm does not know the name, or what follows it is not a mapping.
    """
    name, given = parse(text)
    return timm.create_model(name, **{**arguments, **given}).eval()


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the constructor arguments in ``text``; see :func:`create_model`."""
    name, _, rest = text.partition(" ")
    if not timm.is_model(name):
        raise UserError(f"timm knows no model {name}")
    try:
        arguments = yaml.safe_load(rest) or {}
    except yaml.YAMLError:
        arguments = None
    if not isinstance(arguments, dict):
        raise UserError(f"'{text}': after the name of the model comes a mapping, such as {name} {{drop_path: 0.1}}")
    return name, arguments
