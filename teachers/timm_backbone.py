"""Any timm backbone as a teacher: `timm/<model>`; the base of DINOv2 and SAM.

    teachers:
      - model: timm/mobilenetv2_100
        weights: mobilenetv2.safetensors
        args: {pad_type: same, mean: [0.498, 0.498, 0.498], std: [0.5, 0.5, 0.5]}

`args` are passed to `timm.create_model`, except `mean`, `std` and `interpolation`, which override the published preprocessing.
"""

import difflib
from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

import timm
import torch
from torch import Tensor, nn

from teachers.base import (
    Interpolation,
    Teacher,
    TeacherError,
    TeacherOptions,
    TeacherOutput,
    TeacherSpec,
    digest_state,
    pool_grid,
)
from teachers.errors import one_line
from teachers.variants import check_input_size, pooled_grid
from teachers.weights import check_keys, conversion_errors, load_from_hub, parse_weights, read_checkpoint, seeded_init

PREPROCESSING = ("mean", "std", "interpolation")

LOADING = {"checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
"""Arguments of timm.create_model that make it read files or a hub, which only `weights` may."""

KeyFilter = Callable[[dict[str, Tensor], nn.Module], Mapping[str, Tensor]]
"""Turns the keys of a published file into timm's, given the model."""


class TimmTeacher(Teacher):
    """A timm model: patches are its last features, the summary is the input of its classifier.

    Args:
        name, model_name: in the configuration, and in timm, with or without a pretrained tag.
        has_summary: whether the summary is meaningful.
        pool, input_size: defaults of the options; None: the published size.
        key_filter: for files with the original authors' keys.
    """

    model: nn.Module

    def __init__(
        self,
        name: str,
        model_name: str,
        options: TeacherOptions,
        *,
        has_summary: bool = True,
        pool: int = 1,
        input_size: int | None = None,
        key_filter: KeyFilter | None = None,
    ) -> None:
        self.name, self.model_name = name, _known_model(model_name)
        self.has_summary, self.key_filter = has_summary, key_filter
        published = _published(self.model_name)
        size = options.input_size or input_size or published["input_size"][-1]
        self.model_args = self._model_args(options.args, published, size)
        self.source = parse_weights(options.weights, name, published["tag"] or "default")
        summary_dim, patch_dim, grid = self._probe(size)
        self.pool = options.pool or pool
        chosen = {key: options.args.get(key, published[key]) for key in PREPROCESSING}
        self.spec = TeacherSpec(
            name=name,
            architecture=f"timm/{self.model_name.partition('.')[0]}",
            weights=self.source.identity,
            input_size=(size, size),
            mean=_triple(name, "mean", chosen["mean"]),
            std=_triple(name, "std", chosen["std"]),
            interpolation=_interpolation(name, chosen["interpolation"]),
            summary_dim=summary_dim if has_summary else None,
            patch_dim=patch_dim,
            grid=pooled_grid(name, grid, self.pool),
            pool=self.pool,
            model_args=self.model_args,
            licence=published.get("license") or "unknown",
        )

    def _model_args(self, args: Mapping[str, Any], published: Mapping[str, Any], size: int) -> dict[str, Any]:
        if refused := ", ".join(sorted(LOADING & args.keys())):
            raise TeacherError(f"teacher {self.name}: args must not contain {refused}; set weights instead")
        passed = {key: value for key, value in args.items() if key not in PREPROCESSING}
        if published.get("fixed_input_size") and size != published["input_size"][-1]:
            passed.setdefault("img_size", size)
        return passed

    def _create(self, **changes: Any) -> nn.Module:
        try:
            model: nn.Module = timm.create_model(self.model_name, **{**self.model_args, **changes})
        except (TypeError, ValueError, AssertionError, KeyError) as error:
            raise TeacherError(f"teacher {self.name}: args {self.model_args}: {one_line(error)}") from error
        return model.eval().requires_grad_(False)

    def _probe(self, size: int) -> tuple[int, int, tuple[int, int]]:
        """Channels of summary and patch, and the encoder's own grid."""
        with torch.device("meta"):
            model = self._create()
            check_input_size(self.name, size, _patch_size(model))
            try:
                summary, patches = self._features(model, torch.empty(1, 3, size, size))
            except (RuntimeError, AssertionError, ValueError) as error:
                reason = one_line(error)
                raise TeacherError(f"teacher {self.name}: it does not accept input_size {size} ({reason})") from error
        return summary.shape[-1], patches.shape[-1], (patches.shape[1], patches.shape[2])

    @staticmethod
    def _features(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        features = model.forward_features(images)
        summary = model.forward_head(features, pre_logits=True)
        if features.ndim == 3:
            tokens = features[:, getattr(model, "num_prefix_tokens", 0) :]
            side = isqrt(tokens.shape[1])
            return summary, tokens.reshape(len(tokens), side, side, -1)
        channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        return summary, features if channels_last else features.permute(0, 2, 3, 1)

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Load the weights; see :meth:`teachers.base.Teacher.load`."""
        model = self._load()
        self.weights_sha256 = digest_state(model)
        self.device, self.dtype = torch.device(device), dtype
        self.model = model.to(self.device, dtype)

    def _load(self) -> nn.Module:
        source = self.source
        if source.kind == "hub":
            return load_from_hub(self.name, lambda: self._create(pretrained=True))
        if source.kind == "random":
            with seeded_init(int(source.value), self.name):
                return self._create()
        model = self._create()
        tensors: Mapping[str, Tensor] = read_checkpoint(source.value, self.name)
        if self.key_filter:
            with conversion_errors(source.value, self.name):
                tensors = self.key_filter(dict(tensors), model)
        model.load_state_dict(check_keys(tensors, model.state_dict(), self.name))
        return model

    def forward(self, images: Tensor) -> TeacherOutput:
        """[B, 3, H, W] -> summary [B, D_s] or None, patches [B, h, w, D]."""
        summary, patches = self._features(self.model, images)
        return TeacherOutput(summary if self.has_summary else None, pool_grid(patches, self.pool))


def timm_backbone(options: TeacherOptions) -> Teacher:
    """Factory of `timm/<model>`."""
    if not options.variant:
        raise TeacherError("teacher timm: add a model, as in timm/mobilenetv2_100")
    return TimmTeacher(f"timm/{options.variant}", options.variant, options)


def _known_model(name: str) -> str:
    if timm.is_model(name):
        return name
    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    raise TeacherError(
        f"teacher timm/{name}: timm has no such model{'; did you mean ' if near else ''}{', '.join(near)}"
    )


def _published(model_name: str) -> dict[str, Any]:
    try:
        config = timm.get_pretrained_cfg(model_name)
    except RuntimeError as error:
        architecture, _, tag = model_name.partition(".")
        tags = [name.partition(".")[2] for name in timm.list_pretrained(architecture)]
        raise TeacherError(
            f"teacher timm/{model_name}: timm has no weights {tag}; for {architecture} it has {', '.join(tags) or 'none'}"
        ) from error
    return config.to_dict() if config else {}


def _patch_size(model: nn.Module) -> int:
    size = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    return int(size[0] if isinstance(size, tuple) else size)


def _triple(name: str, field: str, value: Any) -> tuple[float, float, float]:
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise TeacherError(f"teacher {name}: args.{field} must be three numbers, not {value!r}")
    red, green, blue = (float(channel) for channel in value)
    return red, green, blue


def _interpolation(name: str, value: Any) -> Interpolation:
    if value == "bicubic" or value == "bilinear":
        return value
    raise TeacherError(f"teacher {name}: args.interpolation must be bicubic or bilinear, not {value!r}")
