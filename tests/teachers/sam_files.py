"""Seeded files of a small whole SAM, in the authors' layout and in that of transformers."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from tests.teachers.plain import draw

DIM, INNER, HIDDEN, MASKS, IOU_HIDDEN, BLOCKS = 32, 16, 48, 4, 24, 2
WIDTH, SIDE, DEPTH, HEADS, WINDOW = 64, 8, 2, 4, 4
ENCODER_ARGS = {
    "img_size": 16 * SIDE,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
    "neck_chans": DIM,
    "window_size": WINDOW,
    "global_attn_indexes": (1,),
}
"""Of timm's SAM encoder for these files."""


def encoder_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, SIDE, SIDE, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 16, 16),
        "patch_embed.proj.bias": (WIDTH,),
        "neck.0.weight": (DIM, WIDTH, 1, 1),
        "neck.2.weight": (DIM, DIM, 3, 3),
    }
    for number in (1, 3):
        shapes |= {f"neck.{number}.{kind}": (DIM,) for kind in ("weight", "bias")}
    for block in range(DEPTH):
        reach = 2 * (SIDE if block == 1 else WINDOW) - 1
        shapes |= {f"blocks.{block}.attn.rel_pos_{axis}": (reach, WIDTH // HEADS) for axis in "hw"}
        for name, width, out in (
            ("attn.qkv", WIDTH, 3 * WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.lin1", WIDTH, 4 * WIDTH),
            ("mlp.lin2", 4 * WIDTH, WIDTH),
        ):
            shapes |= {f"blocks.{block}.{name}.weight": (out, width), f"blocks.{block}.{name}.bias": (out,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{norm}.{kind}": (WIDTH,) for kind in ("weight", "bias")}
    return {f"image_encoder.{key}": shape for key, shape in shapes.items()}


def decoder_shapes() -> dict[str, tuple[int, ...]]:
    """Prompt encoder and mask decoder; every key of the published files."""
    shapes: dict[str, tuple[int, ...]] = {
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, DIM // 2),
        "mask_decoder.iou_token.weight": (1, DIM),
        "mask_decoder.mask_tokens.weight": (MASKS, DIM),
    }
    for name in (*(f"point_embeddings.{kind}" for kind in range(4)), "not_a_point_embed", "no_mask_embed"):
        shapes[f"prompt_encoder.{name}.weight"] = (1, DIM)

    def layer(key: str, inputs: int, outputs: int) -> None:
        shapes.update({f"{key}.weight": (outputs, inputs), f"{key}.bias": (outputs,)})

    def attention(key: str, inner: int) -> None:
        for name in "qkv":
            layer(f"{key}.{name}_proj", DIM, inner)
        layer(f"{key}.out_proj", inner, DIM)

    transformer = "mask_decoder.transformer"
    for block in range(BLOCKS):
        key = f"{transformer}.layers.{block}"
        attention(f"{key}.self_attn", DIM)
        for name in ("cross_attn_token_to_image", "cross_attn_image_to_token"):
            attention(f"{key}.{name}", INNER)
        layer(f"{key}.mlp.lin1", DIM, HIDDEN)
        layer(f"{key}.mlp.lin2", HIDDEN, DIM)
        for number in range(1, 5):
            shapes |= {f"{key}.norm{number}.{kind}": (DIM,) for kind in ("weight", "bias")}
    attention(f"{transformer}.final_attn_token_to_image", INNER)
    shapes |= {f"{transformer}.norm_final_attn.{kind}": (DIM,) for kind in ("weight", "bias")}
    for number, (inputs, outputs) in {0: (DIM, DIM // 4), 3: (DIM // 4, DIM // 8)}.items():
        shapes[f"mask_decoder.output_upscaling.{number}.weight"] = (inputs, outputs, 2, 2)
        shapes[f"mask_decoder.output_upscaling.{number}.bias"] = (outputs,)
    shapes |= {f"mask_decoder.output_upscaling.1.{kind}": (DIM // 4,) for kind in ("weight", "bias")}
    for mask in range(MASKS):
        for number, outputs in enumerate((DIM, DIM, DIM // 8)):
            layer(f"mask_decoder.output_hypernetworks_mlps.{mask}.layers.{number}", DIM, outputs)
    for number, (inputs, outputs) in enumerate(((DIM, IOU_HIDDEN), (IOU_HIDDEN, IOU_HIDDEN), (IOU_HIDDEN, MASKS))):
        layer(f"mask_decoder.iou_prediction_head.layers.{number}", inputs, outputs)
    return shapes


def mask_prompt_shapes() -> dict[str, tuple[int, ...]]:
    """What encodes masks as prompts, which this project does not build."""
    shapes: dict[str, tuple[int, ...]] = {}
    for number, shape in {0: (4, 1, 2, 2), 1: (4,), 3: (16, 4, 2, 2), 4: (16,), 6: (DIM, 16, 1, 1)}.items():
        shapes[f"prompt_encoder.mask_downscaling.{number}.weight"] = shape
        shapes[f"prompt_encoder.mask_downscaling.{number}.bias"] = shape[:1]
    return shapes


def authors_file(seed: int = 0) -> dict[str, Tensor]:
    """A whole SAM in the authors' layout; every weight shows in the output."""
    return draw(encoder_shapes() | decoder_shapes() | mask_prompt_shapes(), seed)


_LIBRARY = {
    "image_encoder.patch_embed.proj": "vision_encoder.patch_embed.projection",
    "image_encoder.neck.0": "vision_encoder.neck.conv1",
    "image_encoder.neck.1": "vision_encoder.neck.layer_norm1",
    "image_encoder.neck.2": "vision_encoder.neck.conv2",
    "image_encoder.neck.3": "vision_encoder.neck.layer_norm2",
    "image_encoder.blocks": "vision_encoder.layers",
    "image_encoder": "vision_encoder",
    "prompt_encoder.point_embeddings": "prompt_encoder.point_embed",
    "prompt_encoder.mask_downscaling.0": "prompt_encoder.mask_embed.conv1",
    "prompt_encoder.mask_downscaling.1": "prompt_encoder.mask_embed.layer_norm1",
    "prompt_encoder.mask_downscaling.3": "prompt_encoder.mask_embed.conv2",
    "prompt_encoder.mask_downscaling.4": "prompt_encoder.mask_embed.layer_norm2",
    "prompt_encoder.mask_downscaling.6": "prompt_encoder.mask_embed.conv3",
    "mask_decoder.transformer.norm_final_attn": "mask_decoder.transformer.layer_norm_final_attn",
    "mask_decoder.output_upscaling.0": "mask_decoder.upscale_conv1",
    "mask_decoder.output_upscaling.1": "mask_decoder.upscale_layer_norm",
    "mask_decoder.output_upscaling.3": "mask_decoder.upscale_conv2",
}


def library_file(authors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same SAM as transformers saves it; position frequencies occur twice."""
    matrix = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    copies = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")
    return {_library(key): value for key, value in authors.items() if key != matrix} | {
        key: authors[matrix].clone() for key in copies
    }


def _library(key: str) -> str:
    for own, theirs in _LIBRARY.items():
        if key.startswith(f"{own}."):
            key = theirs + key.removeprefix(own)
            break
    key = re.sub(r"(layers\.\d+)\.norm(\d)\.", r"\1.layer_norm\2.", key)
    if "output_hypernetworks" in key or "iou_prediction" in key:
        for number, name in enumerate(("proj_in", "layers.0", "proj_out")):
            key = re.sub(rf"(mlps\.\d|head)\.layers\.{number}\.(\w+)$", rf"\1.{name}.\2", key)
    return key


def small_library_model(eps: float = 1e-5, seed: int = 0):
    """A `SamModel` of transformers with seeded weights; skips without transformers."""
    import pytest

    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    vision = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "output_channels": DIM,
        "image_size": 16 * SIDE,
        "global_attn_indexes": [1],
        "window_size": WINDOW,
        "num_pos_feats": DIM // 2,
        "mlp_dim": 4 * WIDTH,
    }
    config = transformers.SamConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": DIM, "image_size": 16 * SIDE, "image_embedding_size": SIDE},
        mask_decoder_config={
            "hidden_size": DIM,
            "mlp_dim": HIDDEN,
            "iou_head_hidden_dim": IOU_HIDDEN,
            "layer_norm_eps": eps,
        },
    )
    model = transformers.SamModel(config).eval().requires_grad_(False)
    for weight in model.parameters():
        noise = torch.randn_like(weight)
        weight.copy_(noise * (weight.numel() / len(weight)) ** -0.5 if weight.ndim > 1 else weight + noise / 5)
    return model
