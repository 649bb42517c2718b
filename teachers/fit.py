"""Whether the tensors of a file are those of an architecture; if not, which architecture they look like."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from teachers.base import TeacherError
from teachers.errors import one_line

KeyFilter = Callable[[dict[str, Tensor], nn.Module], Mapping[str, Tensor]]
"""Turns the keys and position tables of a published file into the library's, given the model."""

SIZES = {
    (192, 12): "Ti",
    (384, 12): "S",
    (768, 12): "B",
    (1024, 24): "L",
    (1280, 32): "H",
    (1408, 40): "g",
    (1536, 40): "g",
    (1664, 48): "G",
    (4096, 40): "7B",
}
"""Letters of plain vision transformers by width and depth."""
SMALLEST_PATCH = 8
"""Side in pixels of the first convolution from which it is taken for the patches of a plain transformer."""

_BLOCK = re.compile(r"\b(?:blocks|resblocks|layers|layer)\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:embeddings?\.|patch_embed|conv1\b)")


@dataclass(frozen=True)
class Network:
    """A plain vision transformer, as the shapes of its tensors tell it.

    Attributes:
        width: channels of a token.
        depth: blocks.
        patch: side of a patch in pixels.
        registers: tokens besides the class token.
    """

    width: int
    depth: int
    patch: int
    registers: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Network | None":
        """The transformer, whatever the keys are called; None for another kind of network."""
        for key, value in tensors.items():
            if value.ndim == 4 and value.shape[1] == 3 and value.shape[-1] == value.shape[-2] >= SMALLEST_PATCH:
                beside = _EMBEDDING.split(key)[0]  # the image tower, of a file with other networks
                own = {name: tensor for name, tensor in tensors.items() if name.startswith(beside)}
                blocks = {found.group(1) for name in own if (found := _BLOCK.search(name))}
                tokens = ("register_tokens", "reg_token", "storage_tokens")
                registers = [tensor.shape[-2] for name, tensor in own.items() if name.endswith(tokens)]
                return cls(value.shape[0], len(blocks), value.shape[-1], sum(registers)) if blocks else None
        return None

    def __str__(self) -> str:
        letter = SIZES.get((self.width, self.depth))
        registers = f", {self.registers} registers" if self.registers else ""
        name = f"ViT-{letter}/{self.patch}" if letter else "a transformer"
        return f"{name} (width {self.width}, {self.depth} blocks, patches of {self.patch} px{registers})"


def describe(tensors: Mapping[str, Tensor]) -> str:
    """The network that tensors belong to, in words."""
    numbers = sum(value.numel() for value in tensors.values())
    return str(Network.of(tensors) or f"a network of {len(tensors)} tensors and {numbers / 1e6:.1f} M numbers")


def fit(
    tensors: Mapping[str, Tensor], model: nn.Module, path: str | Path, teacher: str, convert: KeyFilter | None = None
) -> dict[str, Tensor]:
    """The tensors of the file `path` as the model's state dict, converted from the authors' layout if `convert` is given.

    Raises:
        TeacherError: if they are of another architecture, which the message describes.
    """
    expected = model.state_dict()
    if convert:
        with conversion_errors(path, teacher, tensors, expected):
            tensors = convert(dict(tensors), model)
    return check_keys(tensors, expected, teacher)


@contextmanager
def conversion_errors(
    path: str | Path, teacher: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Iterator[None]:
    """Report failed conversions of a file's keys and position tables as a :class:`TeacherError`."""
    try:
        yield
    except (RuntimeError, KeyError, ValueError, IndexError) as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise TeacherError(
            f"teacher {teacher}: weights: {_unlike(tensors, expected)}{path} does not fit this architecture ({reason})"
        ) from error


def check_keys(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], teacher: str, ignored: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The expected tensors, none missing or surplus, all of the expected shape, and floating-point where expected.

    Args:
        expected: the model's own state dict.
        ignored: prefixes of keys of other parts of the published file.

    Raises:
        TeacherError: naming the first keys, and both networks where they differ in kind or size.
    """
    other = _unlike(tensors, expected)
    where, shown = f"teacher {teacher}: weights: {other}", 1 if other else 5
    if missing := sorted(expected.keys() - tensors.keys()):
        raise TeacherError(f"{where}the file lacks {_some(missing, shown)}: does it have this architecture?")
    surplus = sorted(key for key in tensors.keys() - expected.keys() if not key.startswith(tuple(ignored)))
    if surplus:
        raise TeacherError(f"{where}the file has {_some(surplus, shown)}, which this architecture does not have")
    for key, tensor in expected.items():
        if tensors[key].shape != tensor.shape:
            shapes = f"{tuple(tensors[key].shape)} in the file, {tuple(tensor.shape)} in the architecture"
            raise TeacherError(f"{where}{key} has shape {shapes}: is it another size?")
        if tensors[key].is_floating_point() != tensor.is_floating_point():
            types = f"{tensors[key].dtype} in the file, {tensor.dtype} in the architecture"
            raise TeacherError(f"{where}{key} is {types}: is it quantised?")
    return {key: tensors[key] for key in expected}


def _unlike(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Both networks, if at least one is a plain transformer and they differ; else ""."""
    found, own = Network.of(tensors), Network.of(expected)
    return (
        "" if found == own else f"the file looks like {describe(tensors)}, this architecture is {describe(expected)}: "
    )


def _some(keys: list[str], shown: int) -> str:
    return f"{', '.join(keys[:shown])}{f' and {len(keys) - shown} more keys' if len(keys) > shown else ''}"
