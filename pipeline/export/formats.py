"""What a model can be written as; imports nothing, so that a command line is read at once."""

from typing import Literal

Format = Literal["safetensors", "torch_export", "onnx", "hf", "coreml"]
FORMATS: tuple[Format, ...] = ("safetensors", "torch_export", "onnx", "hf", "coreml")

ROUNDS = 15
"""Rounds in which latencies are measured, each format once a round."""
