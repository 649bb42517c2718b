"""CLIP image towers (Radford et al. 2021) through open_clip: `clip[/<model>[@<tag>]]`.

`<model>` and `<tag>` are open_clip's names (`ViT-L-14@openai`, `ViT-B-16@laion2b_s34b_b88k`); even with `weights: <path>`
the tag selects the activation (QuickGELU for OpenAI's weights) and the preprocessing. The summary is the projected image
embedding; the patches are the last block's tokens (or map) after the final norm, before the projection. Towers whose norm
follows an attentional pool (CoCa) have none for tokens: theirs are the last block's.
"""

from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import _build_vision_tower, resize_pos_embed
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from teachers.base import Teacher, TeacherError, TeacherOptions, TeacherOutput, TeacherSpec, digest_state, pool_grid
from teachers.checkpoint import read_checkpoint
from teachers.errors import one_line
from teachers.fit import fit
from teachers.hub import HubFile, check_available, load_from_hub
from teachers.variants import check_input_size, choose_variant, pooled_grid
from teachers.weights import parse_weights, seeded_init

DEFAULT = "ViT-L-14"
DEFAULT_TAG = "openai"


class CLIP(Teacher):
    """The image tower of an open_clip model; `teachers/clip_text.py` has the text tower.

    Args:
        model, tag: open_clip's names; tag "" for no published weights.
        options: of the user; `args` override fields of open_clip's vision configuration (`layers`, `width`, ...).
    """

    tower: nn.Module

    def __init__(self, model: str, tag: str, options: TeacherOptions) -> None:
        name = f"clip/{model}{f'@{tag}' if tag else ''}"
        self.config: dict[str, Any] = open_clip.get_model_config(model)
        self.published: dict[str, Any] = open_clip.get_pretrained_cfg(model, tag) if tag else {}
        if tag and not self.published:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
            raise TeacherError(f"teacher {name}: open_clip has no such weights; the tags of {model} are {tags}")
        self.vision = {**self.config["vision_cfg"], **options.args, "timm_model_pretrained": False}
        self.published_size = self.vision.get("image_size", 224)
        size = options.input_size or self.published_size
        self.vision["image_size"] = size
        self.source = parse_weights(options.weights, name, tag)
        if self.source.kind == "hub" and not tag:
            raise TeacherError(f"teacher {name}: add a tag, as in clip/{model}@<tag>, or set weights")
        self.hub_file = HubFile.of_open_clip(self.published)
        self.model_name, self.tag = model, tag
        summary_dim, patch_dim, grid = self._probe(name, size)
        self.pool = options.pool or 1
        self.spec = TeacherSpec(
            name=name,
            architecture=f"open_clip/{model}{'-quickgelu' if self.quick_gelu else ''}",
            weights=self.source.identity,
            input_size=(size, size),
            mean=tuple(self.published.get("mean", open_clip.OPENAI_DATASET_MEAN)),
            std=tuple(self.published.get("std", open_clip.OPENAI_DATASET_STD)),
            interpolation=self.published.get("interpolation", "bicubic"),
            summary_dim=summary_dim,
            patch_dim=patch_dim,
            grid=pooled_grid(name, grid, self.pool),
            pool=self.pool,
            model_args=dict(options.args),
            licence="mit" if tag == "openai" else "unknown",
        )

    @property
    def quick_gelu(self) -> bool:
        """Whether its towers use QuickGELU, as OpenAI's do."""
        return bool(self.config.get("quick_gelu") or self.published.get("quick_gelu"))

    def create_tower(self) -> nn.Module:
        """The image tower before its weights, in evaluation mode; TeacherError if open_clip refuses its configuration."""
        try:
            tower: nn.Module = _build_vision_tower(self.config["embed_dim"], self.vision, self.quick_gelu)
        except (TypeError, ValueError, AssertionError, KeyError, RuntimeError) as error:
            raise TeacherError(f"teacher clip/{self.model_name}: args {self.vision}: {one_line(error)}") from error
        return tower.eval().requires_grad_(False)

    def _probe(self, name: str, size: int) -> tuple[int, int, tuple[int, int]]:
        check_input_size(name, size, self.vision.get("patch_size") or 1)
        with torch.device("meta"):
            try:
                summary, patches = self._features(self._resize(self.create_tower()), torch.empty(1, 3, size, size))
            except (RuntimeError, AssertionError, AttributeError, TypeError, ValueError) as error:
                reason = one_line(error)
                raise TeacherError(f"teacher {name}: its tower gives no patches at {size} px ({reason})") from error
        return summary.shape[-1], patches.shape[-1], (patches.shape[1], patches.shape[2])

    def _resize(self, tower: Any) -> nn.Module:
        """A tower of timm at the input size; open_clip builds and loads it at the published one."""
        size = self.vision["image_size"]
        if isinstance(tower, TimmModel) and size != self.published_size:
            tower.set_input_size(size)
        return tower.eval().requires_grad_(False)

    @staticmethod
    def _features(tower: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        output = tower.forward_intermediates(images, indices=1, normalize_intermediates=_has_norm_of_tokens(tower))
        return output["image_features"], output["image_intermediates"][-1].permute(0, 2, 3, 1)

    def check(self) -> None:
        """See :meth:`teachers.base.Teacher.check`."""
        if self.source.kind == "hub" and self.hub_file:
            check_available(self.spec.name, self.hub_file)
        elif self.source.kind == "file":
            with torch.device("meta"):
                tower = self.create_tower()
            self._read(tower, self.source.value, "meta")

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Load the weights; see :meth:`teachers.base.Teacher.load`."""
        tower = self._resize(self._load())
        self.weights_sha256 = digest_state(tower)
        self.device, self.dtype = torch.device(device), dtype
        self.tower = tower.to(self.device, dtype)

    def _load(self) -> nn.Module:
        if self.source.kind == "random":
            with seeded_init(int(self.source.value), self.spec.name):
                return self.create_tower()
        path = self.weights_file()
        tower = self.create_tower()
        tower.load_state_dict(self._read(tower, path, "cpu"))
        return tower

    def weights_file(self) -> str:
        """The path of the file of its weights, both towers', downloaded if need be; not for random weights."""
        if self.source.kind != "hub":
            return self.source.value
        return load_from_hub(self.spec.name, lambda: open_clip.download_pretrained(self.published), self.hub_file)

    def _read(self, tower: nn.Module, path: str, device: str) -> dict[str, Tensor]:
        return fit(read_checkpoint(path, self.spec.name, device), tower, path, self.spec.name, _to_open_clip)

    def forward(self, images: Tensor) -> TeacherOutput:
        """[B, 3, H, W] -> summary [B, embedding], patches [B, h, w, width]."""
        summary, patches = self._features(self.tower, images)
        return TeacherOutput(summary, pool_grid(patches, self.pool))


def _has_norm_of_tokens(tower: Any) -> bool:
    """Whether the final norm is one of tokens: not where it follows the pooling, which an attentional pool may precede."""
    if not isinstance(tower, VisionTransformer):
        return True
    pool_first = tower.attn_pool is not None and tower.attn_pool_contrastive is None
    return not (pool_first or tower.final_ln_after_pool)


def _to_open_clip(tensors: dict[str, Tensor], tower: nn.Module) -> dict[str, Tensor]:
    """The image tower of a file, in open_clip's keys and float32, with the position table resampled to the tower's grid."""
    holder = nn.Module()
    holder.visual = tower
    tensors = convert_state_dict(holder, tensors)
    # torch does not resample position tables in the half precision of OpenAI's files; counters of BatchNorm are integers.
    visual = {
        key: value.float() if value.is_floating_point() else value
        for key, value in tensors.items()
        if key.startswith("visual.")
    }
    resize_pos_embed(visual, holder)
    return {key.removeprefix("visual."): value for key, value in visual.items()}


def clip(options: TeacherOptions) -> Teacher:
    """Factory of CLIP; the default model is ViT-L/14, the default tag `openai` if the model has it."""
    model, _, tag = options.variant.partition("@")
    model, _ = choose_variant("clip", model, {name: name for name in open_clip.list_models()}, DEFAULT)
    published = open_clip.list_pretrained_tags_by_model(model)
    return CLIP(model, tag or (DEFAULT_TAG if DEFAULT_TAG in published else ""), options)
