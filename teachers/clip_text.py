"""The text towers of CLIP teachers, through open_clip: `load_text_tower("clip/ViT-B-16@openai", weights)`.

The embedding of a text has the space and the scale of the summary of the same CLIP teacher (`teachers/clip.py`).
"""

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Self

import open_clip
import torch
import torch.nn.functional as F
from open_clip.convert import convert_state_dict
from open_clip.model import _build_text_tower
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from teachers.base import TeacherError
from teachers.checkpoint import read_checkpoint
from teachers.clip import CLIP
from teachers.errors import one_line
from teachers.fit import check_keys, conversion_errors
from teachers.registry import create_teacher
from teachers.weights import seeded_init

BATCH = 256
"""Texts per forward pass."""
INITIAL_SCALE = 1 / 0.07
"""Factor of the cosines before training (Radford et al. 2021, section 2.5)."""

log = logging.getLogger(__name__)


class TextTower:
    """A text tower with its tokeniser, and the scale of its logits.

    Attributes:
        name: of the CLIP teacher.
        dim: channels D of an embedding.
        logit_scale, logit_bias: of logits = logit_scale * cosine + logit_bias. Only towers trained by the sigmoid loss
            (Zhai et al. 2023, arXiv 2303.15343) have a bias: their probability of a text is the sigmoid of its logit.
        sigmoid: whether it is such a tower.
    """

    def __init__(self, name: str, tower: nn.Module, tokenizer: Any, dim: int, scale: float, bias: float | None) -> None:
        self.name, self.dim, self.logit_scale, self.logit_bias = name, dim, scale, bias or 0.0
        self.sigmoid = bias is not None
        self._device = torch.device("cpu")
        self._tower, self._tokenizer = tower.eval().requires_grad_(False), tokenizer

    def to(self, device: torch.device | str) -> Self:
        """Move the tower to a device, where it computes from now on; returns itself."""
        self._device = torch.device(device)
        self._tower.to(self._device)
        return self

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [N, D] float32 of length 1, on the CPU. A text longer than the tower's context is cut, with a warning."""
        self._warn_of_cut(texts)
        parts = [self._forward(texts[first : first + BATCH]) for first in range(0, len(texts), BATCH)]
        return torch.cat(parts) if parts else torch.empty(0, self.dim)

    def _forward(self, texts: Sequence[str]) -> Tensor:
        output = self._tower(self._tokenizer(list(texts)).to(self._device))
        return F.normalize(
            output[0] if isinstance(output, tuple) else output, dim=-1
        ).cpu()  # CoCa also returns its tokens

    def _warn_of_cut(self, texts: Sequence[str]) -> None:
        if not isinstance(self._tokenizer, SimpleTokenizer):  # those of the hub do not tell
            return
        most = self._tokenizer.context_length - 2  # start and end
        cut = [text for text in texts if len(self._tokenizer.encode(text)) > most]
        if cut:
            log.warning(
                "%d of %d texts have more than the %d tokens that the text tower of %s reads, and are cut: the first is %r",
                len(cut),
                len(texts),
                most,
                self.name,
                cut[0],
            )


def load_text_tower(name: str, weights: str = "pretrained") -> TextTower:
    """The text tower of a CLIP teacher, float32 on the CPU.

    Args:
        name: of the teacher, `clip/<model>[@<tag>]`.
        weights: `pretrained`, `random[:seed]`, or a checkpoint file with the text tower, in OpenAI's or open_clip's layout.

    Raises:
        WeightsNotFoundError, TeacherError: if the weights or the tokeniser cannot be had, or are those of another network.
    """
    teacher = create_teacher(name, weights=weights)
    if not isinstance(teacher, CLIP):
        raise TeacherError(f"teacher {name}: has no text tower: it is not a CLIP teacher (clip/<model>[@<tag>])")
    config = teacher.config
    tower, tokenizer = _build(teacher)
    scale, bias = torch.tensor(config.get("init_logit_scale", math.log(INITIAL_SCALE))), config.get("init_logit_bias")
    if teacher.source.kind != "random":
        tensors = _read(teacher, tower, ["logit_scale", *([] if bias is None else ["logit_bias"])])
        scale, bias = tensors.pop("logit_scale"), tensors.pop("logit_bias", None)
        tower.load_state_dict(tensors)
    shift = None if bias is None else float(bias)
    return TextTower(teacher.spec.name, tower, tokenizer, config["embed_dim"], float(scale.exp()), shift)


def _build(teacher: CLIP) -> tuple[nn.Module, Any]:
    """The tower, with random weights, and its tokeniser."""
    settings = {**teacher.config["text_cfg"], "hf_model_pretrained": False}
    seeded = teacher.source.kind == "random"
    try:
        with seeded_init(int(teacher.source.value), teacher.spec.name) if seeded else nullcontext():
            tower = _build_text_tower(teacher.config["embed_dim"], settings, teacher.quick_gelu)
        return tower, open_clip.get_tokenizer(teacher.model_name)
    except Exception as error:  # transformers and the hub's client raise various types
        raise TeacherError(
            f"teacher {teacher.spec.name}: its text tower or tokeniser cannot be had ({one_line(error)})"
        ) from error


def _read(teacher: CLIP, tower: nn.Module, scales: Sequence[str]) -> dict[str, Tensor]:
    """The text tower of the teacher's file in open_clip's keys and float32, and these scales of the logits."""
    path, name = teacher.weights_file(), teacher.spec.name
    tensors, expected, holder = read_checkpoint(path, name), tower.state_dict(), nn.Module()
    with torch.device("meta"), conversion_errors(path, name, tensors, expected):
        holder.visual = teacher.create_tower()  # converters of some authors' layouts look at it
        tensors = convert_state_dict(holder, tensors)
    own = {key.partition(".")[0] for key in expected}
    text = {key.removeprefix("text."): value for key, value in tensors.items() if key.startswith("text.")}
    text = text or {key: value for key, value in tensors.items() if key.partition(".")[0] in own}
    if lacking := ["a text tower"] * (not text) + [key for key in scales if key not in tensors]:
        raise TeacherError(
            f"teacher {name}: weights: {path} lacks {lacking[0]}: name a file of the whole CLIP model, with both towers"
        )
    found = {**check_keys(text, expected, name), **{key: tensors[key] for key in scales}}
    return {key: value.float() if value.is_floating_point() else value for key, value in found.items()}
