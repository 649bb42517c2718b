"""Any timm backbone as a teacher: `timm/<model>`; the base of DINOv2 and SAM.

    teachers:
      - model: timm/mobilenetv2_100
        weights: mobilenetv2.safetensors
        args: {pad_type: same, mean: [0.498, 0.498, 0.498], std: [0.5, 0.5, 0.5]}

`args` are passed to `timm.create_model`, except `mean`, `std` and `interpolation`, which override the published preprocessing,
and `resize_mode`: `squash`, or, where there is no summary, `pad`.
"""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from teachers.base import (
    Interpolation,
    ResizeMode,
    Teacher,
    TeacherError,
    TeacherOptions,
    TeacherOutput,
    TeacherSpec,
    digest_state,
    pool_grid,
)
from teachers.checkpoint import read_checkpoint
from teachers.errors import did_you_mean, one_line
from teachers.fit import KeyFilter, fit
from teachers.hub import HubFile, check_available, load_from_hub
from teachers.timm_features import Read, find_features
from teachers.variants import check_input_size, pooled_grid
from teachers.weights import parse_weights, seeded_init

PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")

LOADING = {"checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
"""Arguments of timm.create_model that make it read files or a hub, which only `weights` may."""


class TimmTeacher(Teacher):
    """A timm model: patches are its last features, the summary is the input of its classifier.

    Subclasses change what their authors compute otherwise, and name it in the specification's `computation`.

    Args:
        name, model_name: in the configuration, and in timm, with or without a pretrained tag.
        has_summary: whether the summary is meaningful.
        pool, input_size: defaults of the options; None: the published size.
        key_filter: for files with the original authors' keys.
    """

    model: nn.Module
    read: Read

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
        self.source = parse_weights(options.weights, name, published.get("tag") or "default")
        self.hub_file = HubFile.of_timm(published)
        if self.source.kind == "hub" and not self.hub_file:
            raise TeacherError(
                f"teacher {name}: timm publishes no weights of {self.model_name}; set weights=<path of a file>, or "
                "weights=random for an untrained network"
            )
        summary_dim, patch_dim, grid = self._probe(size)
        self.pool = options.pool or pool
        chosen = {**published, "resize_mode": "squash", **options.args}
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
            computation=self._computation(),
            resize_mode=_resize_mode(name, chosen["resize_mode"], has_summary),
        )

    def _computation(self) -> str:
        """See :attr:`~teachers.base.TeacherSpec.computation`."""
        return ""

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
        except (TypeError, ValueError, AssertionError, KeyError, RuntimeError, AttributeError) as error:
            raise TeacherError(f"teacher {self.name}: args {self.model_args}: {one_line(error)}") from error
        return model.eval().requires_grad_(False)

    def _probe(self, size: int) -> tuple[int | None, int, tuple[int, int]]:
        """Channels of summary and patch, and the encoder's own grid."""
        with torch.device("meta"):
            model, images = self._create(), torch.empty(1, 3, size, size)
            check_input_size(self.name, size, _patch_size(model))
            try:
                self.read = find_features(model, images)
                summary, patches = self.read(model, images)
            except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
                reason = one_line(error)
                raise TeacherError(f"teacher {self.name}: no patches at input_size {size} ({reason})") from error
        return None if summary is None else summary.shape[-1], patches.shape[-1], (patches.shape[1], patches.shape[2])

    def check(self) -> None:
        """See :meth:`teachers.base.Teacher.check`."""
        if self.source.kind == "hub" and self.hub_file:
            check_available(self.name, self.hub_file)
        elif self.source.kind == "file":
            with torch.device("meta"):
                model = self._create()
            self._read_file(model, self.source.value, "meta")

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Load the weights; see :meth:`teachers.base.Teacher.load`."""
        model = self._load()
        self.weights_sha256 = digest_state(model)
        self.device, self.dtype = torch.device(device), dtype
        self.model = model.to(self.device, dtype)

    def _load(self) -> nn.Module:
        source = self.source
        if source.kind == "hub":
            return load_from_hub(self.name, self._create_published, self.hub_file)
        if source.kind == "random":
            with seeded_init(int(source.value), self.name):
                return self._create()
        model = self._create()
        model.load_state_dict(self._read_file(model, source.value, "cpu"))
        return model

    def _create_published(self) -> nn.Module:
        """The model with timm's own weights, from the hub or its cache."""
        return self._create(pretrained=True)

    def _read_file(self, model: nn.Module, path: str, device: str) -> dict[str, Tensor]:
        return fit(read_checkpoint(path, self.name, device), model, path, self.name, self.key_filter)

    def forward(self, images: Tensor) -> TeacherOutput:
        """[B, 3, H, W] -> summary [B, D_s] or None, patches [B, h, w, D]."""
        summary, patches = self.read(self.model, images)
        pool = 1 if self.spec.resize_mode == "pad" else self.pool
        return TeacherOutput(summary if self.has_summary else None, pool_grid(patches, pool))


def _known_model(name: str) -> str:
    if timm.is_model(name):
        return name
    raise TeacherError(f"teacher timm/{name}: timm has no such model{did_you_mean(name, timm.list_models(), most=3)}")


def _published(model_name: str) -> dict[str, Any]:
    try:
        config = timm.get_pretrained_cfg(model_name)
    except RuntimeError as error:
        architecture, _, tag = model_name.partition(".")
        tags = [name.partition(".")[2] for name in timm.list_pretrained(architecture)]
        raise TeacherError(
            f"teacher timm/{model_name}: timm has no weights {tag}; for {architecture} it has {', '.join(tags) or 'none'}"
        ) from error
    return (config or timm.models.PretrainedCfg()).to_dict()  # old names of models have none


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


def _resize_mode(name: str, value: Any, has_summary: bool) -> ResizeMode:
    if value == "squash" or (value == "pad" and not has_summary):
        return value
    if value == "pad":
        raise TeacherError(
            f"teacher {name}: args.resize_mode=pad is for SAM: the padding would change this teacher's summary"
        )
    raise TeacherError(f"teacher {name}: args.resize_mode must be squash or pad, not {value!r}")
