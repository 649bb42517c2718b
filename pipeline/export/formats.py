"""Export formats; imports nothing, so that command lines are parsed quickly."""

from typing import Literal

Format = Literal["safetensors", "torch_export", "onnx", "hf", "coreml"]
FORMATS: tuple[Format, ...] = ("safetensors", "torch_export", "onnx", "hf", "coreml")

GRAPHS: tuple[Format, ...] = ("torch_export", "onnx")
"""Formats that do not run eagerly and can be timed here."""

ROUNDS = 15
"""Rounds of the latency measurement; each round times every format once."""
