"""A folder in the Hugging Face hub's layout for timm, which loads it without this project.

config.json, model.safetensors    as timm writes them
regla.py                          the network, where timm does not have it: `import regla` registers it
README.md                         the model card, with the hub's front matter
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.export.bundle import ExportBundle, preprocessing
from pipeline.student import blocks, layers, regla
from pipeline.student.layers import NormLinear
from pipeline.student.model import create_backbone

LEAVE_OUT = "leave hf out: --format safetensors torch_export onnx"
MAPS = "model.forward_intermediates(images, intermediates_only=True)"
"""Python expression for the maps of a model's stages."""
_POOLED = f"{MAPS}[-1].mean((2, 3))"


def write_hub(bundle: ExportBundle, folder: Path) -> str:
    """Write everything but the card; returns the Python expression for the output of normalised `images`.

    Raises:
        UserError: if timm's form of the network has no place for the head.
    """
    model = _with_classifier(bundle) if bundle.saved else bundle.encoder.backbone
    args = {**bundle.args, "num_classes": len(bundle.classes)}
    steps = preprocessing(bundle)
    config: dict[str, Any] = {
        "pretrained_cfg": {
            "input_size": [3, *steps["resize"]],
            "interpolation": "bicubic",
            **{name: steps[name] for name in ("mean", "std", "crop_pct", "crop_mode")},
        }
    }
    if bundle.classes:
        config["label_names"] = list(bundle.classes)
    save_for_hf(model, str(folder), config, args, safe_serialization=True)
    if is_ours(bundle):
        (folder / "regla.py").write_text(one_file(), encoding="utf-8")
    return "model(images)" if bundle.saved or _pools(model, bundle.size) else _POOLED


def load_hub(folder: Path, bundle: ExportBundle, expression: str) -> Callable[[Tensor], Tensor]:
    """The model as timm loads it from the folder, as a function of images in [0, 1]."""
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    encoder = bundle.encoder

    def run(images: Tensor) -> Tensor:
        images = (images - encoder.mean) / encoder.std
        output: Tensor = _last_map_mean(model, images) if expression == _POOLED else model(images)
        return output

    return run


def _last_map_mean(model: Any, images: Tensor) -> Tensor:
    maps: list[Tensor] = model.forward_intermediates(images, intermediates_only=True)
    return maps[-1].mean((2, 3))


def is_ours(bundle: ExportBundle) -> bool:
    """Whether the network is not part of timm."""
    return bundle.timm_name in regla.SIZES


def one_file() -> str:
    """ReGLA with its blocks and layers as one module that imports only torch and timm."""
    parts = (Path(str(module.__file__)).read_text(encoding="utf-8") for module in (layers, blocks, regla))
    code = re.sub(r"^from pipeline\.student\.\w+ import .*\n", "", "\n\n".join(parts), flags=re.MULTILINE)
    return f'"""ReGLA for timm: `import regla` registers {", ".join(regla.SIZES)}."""\n\n{code}'


@torch.no_grad()
def _pools(model: nn.Module, size: int) -> bool:
    """Whether the network's own head averages the last map and does nothing else."""
    images = torch.rand(1, 3, size, size)
    pooled, output = _last_map_mean(model, images), model(images)
    return output.shape == pooled.shape and torch.allclose(output, pooled, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def _with_classifier(bundle: ExportBundle) -> nn.Module:
    """timm's network whose classifier holds our norm and linear layer."""
    if bundle.classifier is None:
        raise UserError(f"hf: timm's layout cannot hold the head of {bundle.name}; {LEAVE_OUT}")
    norm, head = bundle.classifier
    encoder, images = bundle.encoder, torch.rand(2, 3, bundle.size, bundle.size)
    model = create_backbone(bundle.timm_name, {**bundle.args, "num_classes": len(bundle.classes)}).eval()
    model.load_state_dict(encoder.backbone.state_dict(), strict=False)
    own: Any = model.get_classifier()  # type: ignore[operator]
    if isinstance(own, regla.Classifier):
        own.main.bn.load_state_dict(norm.state_dict())
        own.main.linear.load_state_dict(head.state_dict())
    elif isinstance(own, nn.Linear) and own.in_features == head.in_features:
        both = NormLinear(head.in_features, head.out_features)
        both.bn, both.linear = norm, head
        weight, bias = both.folded()
        own.weight.copy_(weight)
        own.bias.copy_(bias)
    found, expected = model((images - encoder.mean) / encoder.std), bundle.model(images)
    # timm may have a norm or an attention pool before its classifier.
    if found.shape != expected.shape or not (found - expected).abs().max() <= 1e-3 * expected.abs().max():
        raise UserError(
            f"hf: timm's {bundle.timm_name} has other layers between its last map and its classes than this "
            f"classifier; {LEAVE_OUT}"
        )
    return model
