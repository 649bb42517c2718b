"""Where SAM spends its time, beside the time of its matrix products at the rate that this card reaches.

    python benchmarks/sam_attention.py --device cuda
    python benchmarks/sam_attention.py --device cpu --side 256 --batches 1 --width 96 --heads 2

Prints a line of JSON per measurement, all in milliseconds per image: whole forward passes by batch size, with their ratio to the
matrix products; forward passes by kernel of scaled dot-product attention (null: it refuses), with timm's own attention, which
adds biases to weights in memory, and with FlexAttention, which adds them within a kernel; parts of a layer with global attention
and of one in windows. On a GPU also a table of the most expensive kernels.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from timm.models.vision_transformer_sam import get_rel_pos
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.card import matmul_rate, seconds_per_call
from benchmarks.roofline import operators
from pipeline.cache.config import TeacherConfig
from pipeline.cache.layout.cached_teacher import make_teacher
from teachers import sam
from teachers.base import Teacher

KERNELS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")

COMPILED_FLEX = torch.compile(flex_attention, dynamic=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = _parse(arguments)
    device = torch.device(options.device)
    args = {"embed_dim": options.width, "num_heads": options.heads}
    teacher = make_teacher(TeacherConfig(model="sam/vit_b", weights="random", input_size=options.side, args=args))
    assert isinstance(teacher, sam.SAM)
    teacher.load(device, torch.bfloat16)
    products = count_products(copy.deepcopy(teacher.model).float().to("meta"), options.side)
    products_ms = 1e3 * products / matmul_rate(device, 8192 if device.type == "cuda" else 256)
    _show({"gflops": round(products / 1e9, 1), "products_ms": round(products_ms, 3)})
    for batch in options.batches:
        milliseconds = _whole(teacher, options, batch)
        _show({"batch": batch, "ms": milliseconds, "over_products": round(milliseconds / products_ms, 2)})
    batch = options.batches[-1]
    for kernel in KERNELS:
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            _show({"kernel": kernel, "batch": batch, "ms": _unless_refused(teacher, options, batch)})
    with patch.object(sam, "_use_fused", lambda x: False):
        _show({"kernel": "timm", "batch": batch, "ms": _unless_refused(teacher, options, batch)})
    with patch.object(sam.FusedAttention, "forward", flex_forward):
        _show({"kernel": "flex", "batch": batch, "ms": _unless_refused(teacher, options, batch)})
    for name, parts in _parts(teacher, options, batch).items():
        _show({"layer": name, "batch": batch, "ms": parts})
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            _whole(teacher, options, batch)
        print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=15, max_name_column_width=90))


def count_products(model: nn.Module, side: int) -> float:
    """Operations of an image's matrix products and convolutions, without the positions that fused attention adds."""
    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), operators() as found:
        model(torch.empty(1, 3, side, side))
    return sum(one.flops for one in found)


def flex_forward(layer: sam.FusedAttention, x: Tensor) -> Tensor:
    """The forward of `FusedAttention`, with biases that a kernel of FlexAttention adds to its scores; compiled on a GPU."""
    batch, height, width, _ = x.shape
    qkv = layer.qkv(x).view(batch, height * width, 3, layer.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    grid = q.unflatten(2, (height, width))
    rows, columns = get_rel_pos(height, height, layer.rel_pos_h), get_rel_pos(width, width, layer.rel_pos_w)
    of_rows = torch.einsum("bnhwc,hkc->bnhwk", grid, rows).flatten(2, 3)
    of_columns = torch.einsum("bnhwc,wkc->bnhwk", grid, columns).flatten(2, 3)

    def biased(score: Tensor, image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + of_rows[image, head, query, key // width] + of_columns[image, head, query, key % width]

    attend: Any = COMPILED_FLEX if x.is_cuda else flex_attention
    out: Tensor = attend(q, k, v, score_mod=biased)
    projected: Tensor = layer.proj(out.transpose(1, 2).reshape(batch, height, width, -1))
    return projected


def _whole(teacher: Teacher, options: argparse.Namespace, batch: int) -> float:
    pixels = torch.randint(0, 256, (batch, 3, options.side, options.side), dtype=torch.uint8).to(teacher.device)
    return _milliseconds(lambda: teacher.encode(pixels), teacher, options, batch)


def _unless_refused(teacher: Teacher, options: argparse.Namespace, batch: int) -> float | None:
    try:
        return _whole(teacher, options, batch)
    except RuntimeError:
        return None


def _parts(teacher: sam.SAM, options: argparse.Namespace, batch: int) -> dict[str, dict[str, float]]:
    """Attention with its linear layers, attention alone, and the feed-forward part, by kind of layer."""
    found = {}
    for layer in teacher.model.blocks:  # type: ignore[union-attr]
        grid = options.side // sam.PATCH
        side = layer.window_size or grid
        windows = batch * (-(-grid // side)) ** 2
        patches = torch.randn(windows, side, side, options.width, device=teacher.device, dtype=torch.bfloat16)
        heads = patches.view(windows, side * side, options.heads, -1).transpose(1, 2)
        calls = {
            "attention": partial(layer.attn, patches),
            "without_positions": partial(nn.functional.scaled_dot_product_attention, heads, heads, heads),
            "feed_forward": partial(layer.mlp, patches),
        }
        name = f"{windows} windows of {side} x {side}"
        if name not in found:
            found[name] = {part: _milliseconds(call, teacher, options, batch) for part, call in calls.items()}
    return found


def _milliseconds(call: Callable[[], object], teacher: Teacher, options: argparse.Namespace, batch: int) -> float:
    with torch.inference_mode():
        return round(1e3 * seconds_per_call(call, teacher.device, options.calls) / batch, 3)


def _show(line: Mapping[str, object]) -> None:
    print(json.dumps(line), flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--side", type=int, default=1024, help="of the image in pixels")
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[1, 16, 4], help="the last one for all but whole passes"
    )
    parser.add_argument("--width", type=int, default=768, help="channels; SAM-B's by default")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--calls", type=int, default=10, help="measured calls")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
