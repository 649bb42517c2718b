"""CLIP image towers (Radford et al. 2021) through open_clip: `clip[/<model>[@<tag>]]`.

`<model>` and `<tag>` are open_clip's names (`ViT-L-14@openai`, `ViT-B-16@laion2b_s34b_b88k`); even with `weights: <path>`
the tag selects the activation (QuickGELU for OpenAI's weights) and the preprocessing. The summary is the projected image
embedding; the patches are the last block's tokens (or map) after the final norm, before the projection.
"""

from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import _build_vision_tower, resize_pos_embed
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from teachers.base import Teacher, TeacherError, TeacherOptions, TeacherOutput, TeacherSpec, digest_state, pool_grid
from teachers.errors import one_line
from teachers.variants import check_input_size, choose_variant, pooled_grid
from teachers.weights import check_keys, conversion_errors, load_from_hub, parse_weights, read_checkpoint, seeded_init

DEFAULT = "ViT-L-14"
DEFAULT_TAG = "openai"


class CLIP(Teacher):
    """The image tower of an open_clip model; the text tower is never built.

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
        size = options.input_size or self.vision.get("image_size", 224)
        self.vision["image_size"] = size
        self.source = parse_weights(options.weights, name, tag)
        if self.source.kind == "hub" and not tag:
            raise TeacherError(f"teacher {name}: add a tag, as in clip/{model}@<tag>, or set weights")
        self.model_name, self.tag = model, tag
        summary_dim, patch_dim, grid = self._probe(name, size)
        self.pool = options.pool or 1
        self.spec = TeacherSpec(
            name=name,
            architecture=f"open_clip/{model}{'-quickgelu' if self._quick_gelu else ''}",
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
    def _quick_gelu(self) -> bool:
        return bool(self.config.get("quick_gelu") or self.published.get("quick_gelu"))

    def _create(self) -> nn.Module:
        try:
            tower: nn.Module = _build_vision_tower(self.config["embed_dim"], self.vision, self._quick_gelu)
        except (TypeError, ValueError, AssertionError, KeyError, RuntimeError) as error:
            raise TeacherError(f"teacher clip/{self.model_name}: args {self.vision}: {one_line(error)}") from error
        return tower.eval().requires_grad_(False)

    def _probe(self, name: str, size: int) -> tuple[int, int, tuple[int, int]]:
        check_input_size(name, size, self.vision.get("patch_size") or 1)
        with torch.device("meta"):
            try:
                summary, patches = self._features(self._create(), torch.empty(1, 3, size, size))
            except (RuntimeError, AssertionError, AttributeError) as error:
                reason = one_line(error)
                raise TeacherError(f"teacher {name}: its tower gives no patches at {size} px ({reason})") from error
        return summary.shape[-1], patches.shape[-1], (patches.shape[1], patches.shape[2])

    @staticmethod
    def _features(tower: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        # A final norm after pooling is not meant for single tokens.
        normalise = not isinstance(tower, VisionTransformer) or not tower.final_ln_after_pool
        output = tower.forward_intermediates(images, indices=1, normalize_intermediates=normalise)
        return output["image_features"], output["image_intermediates"][-1].permute(0, 2, 3, 1)

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Load the weights; see :meth:`teachers.base.Teacher.load`."""
        tower = self._load()
        self.weights_sha256 = digest_state(tower)
        self.device, self.dtype = torch.device(device), dtype
        self.tower = tower.to(self.device, dtype)

    def _load(self) -> nn.Module:
        if self.source.kind == "random":
            with seeded_init(int(self.source.value), self.spec.name):
                return self._create()
        path = self.source.value
        if self.source.kind == "hub":
            path = load_from_hub(self.spec.name, lambda: open_clip.download_pretrained(self.published))
        tower = self._create()
        holder = nn.Module()
        holder.visual = tower
        tensors: dict[str, Tensor] = convert_state_dict(holder, read_checkpoint(path, self.spec.name))
        # torch does not resample position tables in the half precision of OpenAI's files.
        tensors = {key: value.float() for key, value in tensors.items() if key.startswith("visual.")}
        with conversion_errors(path, self.spec.name):
            resize_pos_embed(tensors, holder)
        visual = {key.removeprefix("visual."): value for key, value in tensors.items()}
        tower.load_state_dict(check_keys(visual, tower.state_dict(), self.spec.name))
        return tower

    def forward(self, images: Tensor) -> TeacherOutput:
        """[B, 3, H, W] -> summary [B, embedding], patches [B, h, w, width]."""
        summary, patches = self._features(self.tower, images)
        return TeacherOutput(summary, pool_grid(patches, self.pool))


def clip(options: TeacherOptions) -> Teacher:
    """Factory of CLIP; the default model is ViT-L/14, the default tag `openai` if the model has it."""
    model, _, tag = options.variant.partition("@")
    model, _ = choose_variant("clip", model, {name: name for name in open_clip.list_models()}, DEFAULT)
    published = open_clip.list_pretrained_tags_by_model(model)
    return CLIP(model, tag or (DEFAULT_TAG if DEFAULT_TAG in published else ""), options)
