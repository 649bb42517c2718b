"""The student: any timm backbone, giving a summary vector and a feature map, and the heads that predict a teacher's."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pipeline.student.regla  # noqa: F401  registers regla_* with timm
from pipeline.errors import UserError, did_you_mean, one_line
from pipeline.student.nearest import nearest_folders
from teachers.timm_backbone import LOADING

MAP_STRIDE = 16  # of the feature map, in pixels
TAPS = (16, 32)  # strides that the neck fuses by default


class StudentOutput(NamedTuple):
    """Summary [B, C], the average of the last level, and feature map [B, D, h, w] at stride 16, or the finest that exists."""

    summary: Tensor
    feature_map: Tensor


def create_backbone(name: str, args: Mapping[str, Any] | None = None) -> nn.Module:
    """A timm model without classifier: `regla_m`, or any backbone as `timm/<name>`.

    Raises:
        UserError: for an unknown name, arguments that timm refuses, or a model without intermediate features.
    """
    model_name = name.removeprefix("timm/")
    if not timm.is_model(model_name):
        hint = did_you_mean(model_name, timm.list_models(), most=3)
        raise UserError(f"student.name: timm has no model {model_name}{hint}")
    args = dict(args or {})
    if refused := ", ".join(sorted(LOADING & args.keys())):
        raise UserError(
            f"student.args must not contain {refused}, which make timm read files; set student.weights instead"
        )
    try:
        model: nn.Module = timm.create_model(model_name, pretrained=False, **{"num_classes": 0, **args})
    except (TypeError, ValueError, AssertionError, KeyError, RuntimeError) as error:
        raise UserError(f"student.args: {model_name} refuses {args}: {error}") from error
    if not hasattr(model, "forward_intermediates"):
        raise UserError(f"student.name: {model_name} gives no intermediate features (timm's forward_intermediates)")
    return model


class Encoder(nn.Module):
    """The exported part: normalisation and a timm model, giving one vector per image.

    Attributes:
        channels, strides: of every level of the pyramid.
        dim: channels C of the summary.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        levels: list[dict[str, Any]] = backbone.feature_info  # type: ignore[assignment]
        self.channels: list[int] = [level["num_chs"] for level in levels]
        self.strides: list[int] = [level["reduction"] for level in levels]
        self.dim = self.channels[-1]
        config: dict[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)

    def maps(self, images: Tensor, levels: Sequence[int]) -> list[Tensor]:
        """[B, 3, H, W] RGB in [0, 1] -> the feature maps [B, C_l, H_l, W_l] of these levels."""
        return self.pyramid((images - self.mean) / self.std, levels)

    def pyramid(self, normalised: Tensor, levels: Sequence[int]) -> list[Tensor]:
        """The same for normalised images."""
        maps: list[Tensor] = self.backbone.forward_intermediates(  # type: ignore[operator]
            normalised.contiguous(memory_format=torch.channels_last),
            indices=list(levels),
            intermediates_only=True,
            output_fmt="NCHW",
        )
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] float32 RGB in [0, 1] -> [B, C]: the average of the last map."""
        return self.maps(images, [len(self.channels) - 1])[0].mean(dim=(2, 3))


class FuseNeck(nn.Module):
    """Project each level to `dim` channels, resize it to the grid of stride `stride`, and add.

    Coarser levels are up-sampled, as in EdgeSAM (Zhou et al. 2023, section 3.2). The projection of a finer level down-samples
    it: its kernel is as large as its stride.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], stride: int, dim: int) -> None:
        super().__init__()
        self.grid = list(strides).index(stride)
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, dim, side, side, bias=False), nn.BatchNorm2d(dim))
            for width, side in ((width, max(1, stride // own)) for width, own in zip(channels, strides, strict=True))
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, channels_l, h_l, w_l] of the levels -> [B, dim, h, w], the size of the level of the grid."""
        projected = [project(part) for project, part in zip(self.projections, maps, strict=True)]
        fused: Tensor = projected.pop(self.grid)
        size = fused.shape[-2:]
        for part in projected:
            # A finer map of odd size down-samples to one row less than the grid has.
            if part.shape[-2:] != size:
                part = F.interpolate(part, size, mode="bilinear", align_corners=False)
            fused = fused + part
        return fused


class Student(nn.Module):
    """Encoder and neck.

    Args:
        token_dim: channels D of the feature map.
        taps: strides that the neck fuses on the grid of stride 16; 16 is always included. Each selects the deepest level of at
            most that stride, or the first level. Several taps may select one level, as in a ViT; it is fused once.

    Attributes:
        levels, tap_strides: the fused levels of the pyramid, in order, and their strides.
    """

    def __init__(self, encoder: Encoder, token_dim: int, taps: Sequence[int] = TAPS) -> None:
        super().__init__()
        self.encoder, self.token_dim = encoder, token_dim
        self.levels = sorted({level_at_stride(encoder.strides, tap) for tap in (MAP_STRIDE, *taps)})
        self.tap_strides = [encoder.strides[level] for level in self.levels]
        stride = encoder.strides[level_at_stride(encoder.strides, MAP_STRIDE)]
        self.neck = FuseNeck([encoder.channels[level] for level in self.levels], self.tap_strides, stride, token_dim)

    def forward(self, pixels: Tensor) -> StudentOutput:
        """[B, 3, H, W] uint8 RGB -> summary [B, C] and feature map [B, D, h, w]."""
        return self.encode(pixels.float() / 255)

    def encode(self, images: Tensor) -> StudentOutput:
        """The same for float32 RGB in [0, 1]."""
        last = len(self.encoder.channels) - 1
        maps = self.encoder.maps(images, sorted({*self.levels, last}))
        return StudentOutput(maps[-1].mean(dim=(2, 3)), self.neck(maps[: len(self.levels)]))


def distillation_head(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """LayerNorm, Linear, GELU, LayerNorm, Linear over the last dimension: [..., in_dim] -> [..., out_dim].

    Two layers as in UNIC (Sariyildiz et al. 2024) and EUPE; the norms keep large-scale teachers from dominating the hidden layer.
    """
    return nn.Sequential(
        nn.LayerNorm(in_dim),
        nn.Linear(in_dim, hidden_dim),
        nn.GELU(),
        nn.LayerNorm(hidden_dim),
        nn.Linear(hidden_dim, out_dim),
    )


@torch.enable_grad()
def freeze_unused(student: Student, image_size: int) -> None:
    """Freeze parameters that affect neither summary nor feature map, such as the norm of an absent classifier."""
    weights, training = [weight for weight in student.parameters() if weight.requires_grad], student.training
    output = student.eval()(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8))
    gradients = torch.autograd.grad(output.summary.sum() + output.feature_map.sum(), weights, allow_unused=True)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.requires_grad_(gradient is not None)
    student.train(training)


def level_at_stride(strides: Sequence[int], stride: int) -> int:
    """The deepest level of at most this stride, or of the finest stride."""
    return max(level for level, own in enumerate(strides) if own <= max(stride, strides[0]))


def save_encoder(encoder: Encoder, model: str, args: Mapping[str, Any], input_size: int, folder: Path) -> None:
    """Write the backbone as safetensors, and a description for :func:`load_encoder` and timm.

    Args:
        model, args: of :func:`create_backbone`.
        input_size: side in pixels at which it was trained.
    """
    description = {
        "model": model.removeprefix("timm/"),
        "args": {"num_classes": 0, **args},
        "input_size": input_size,
        "mean": encoder.mean.flatten().tolist(),
        "std": encoder.std.flatten().tolist(),
    }
    save_described(encoder.backbone.state_dict(), description, folder, "student")


def save_described(state: Mapping[str, Tensor], description: Mapping[str, Any], folder: Path, name: str) -> None:
    """Write `<name>.safetensors` and `<name>.json` into a folder, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(description, indent=2), encoding="utf-8")


def load_encoder(folder: Path) -> Encoder:
    """An exported student: `student.safetensors` and `student.json`.

    Raises:
        UserError: if the folder is not an exported student, or the weights do not fit.
    """
    try:
        described = json.loads((folder / "student.json").read_text(encoding="utf-8"))
        encoder = build_encoder(described)
        load_weights(encoder.backbone, folder / "student.safetensors")
    except Exception as error:  # timm's constructors raise various types for unsuitable arguments
        hint = "" if (folder / "student.json").is_file() else nearest_folders(str(folder))
        raise UserError(f"{folder} is not an exported student: {one_line(error)}{hint}") from error
    return encoder.eval()


def build_encoder(described: Mapping[str, Any]) -> Encoder:
    """The encoder of a description's ``model`` and ``args``, without its weights; errors as in :func:`create_backbone`."""
    return Encoder(create_backbone(described["model"], described["args"]))


def load_weights(module: nn.Module, file: Path) -> None:
    """Load safetensors; the keys of file and module must be the same.

    Raises:
        ValueError: for integers in place of floating-point weights or the reverse, which PyTorch would convert silently.
    """
    weights, expected = load_file(file), module.state_dict()
    for name in weights.keys() & expected.keys():
        if weights[name].is_floating_point() != expected[name].is_floating_point():
            raise ValueError(f"{name} is {weights[name].dtype} in the file, {expected[name].dtype} in the architecture")
    module.load_state_dict(weights)
