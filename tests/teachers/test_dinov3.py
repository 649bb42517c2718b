"""DINOv3 against a forward of the authors' checkpoint layout in plain torch."""

import pytest
import torch
import torch.nn.functional as F

from teachers.base import TeacherError
from teachers.registry import create_teacher
from tests.teachers.plain import draw, draw_pixels, linear, norm, normalise

WIDTH, DEPTH, HEADS, PATCH, REGISTERS = 64, 2, 2, 16, 4
ARGS = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
EPS = 1e-5
MODEL = "timm/vit_small_patch16_dinov3"


def shapes():
    """The authors' keys."""
    table = {
        "cls_token": (1, 1, WIDTH),
        "storage_tokens": (1, REGISTERS, WIDTH),
        "mask_token": (1, WIDTH),
        "rope_embed.periods": (WIDTH // HEADS // 4,),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    layers = {
        "attn.qkv": (3 * WIDTH, WIDTH),
        "attn.proj": (WIDTH, WIDTH),
        "mlp.fc1": (4 * WIDTH, WIDTH),
        "mlp.fc2": (WIDTH, 4 * WIDTH),
    }
    for block in range(DEPTH):
        for name, shape in layers.items():
            table |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            table[f"blocks.{block}.{name}"] = (WIDTH,)
        table[f"blocks.{block}.attn.qkv.bias_mask"] = (3 * WIDTH,)
    return table


def draw_file(biases):
    """A published file; keys have no bias, and in most files queries and values have none either."""
    tensors = draw(shapes())
    for key in tensors:
        if key.endswith("qkv.bias"):
            tensors[key][WIDTH : 2 * WIDTH] = 0
            tensors[key] *= biases
    return tensors


def rotate(x, side):
    """Rotate the tokens [B, side^2, C] of one head by their places: C / 4 periods for the row, as many for the column."""
    channels = x.shape[-1]
    centres = (torch.arange(side) + 0.5) / side * 2 - 1
    rows, columns = centres.repeat_interleave(side), centres.repeat(side)
    periods = 100 ** (torch.arange(channels // 4) / (channels // 4))
    angles = torch.cat([2 * torch.pi * place[:, None] / periods for place in (rows, columns)], dim=1)
    first, second = x[..., : channels // 2], x[..., channels // 2 :]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def attention(w, key, x, side):
    prefix, outputs = 1 + REGISTERS, []
    q, k, v = linear(w, f"{key}.qkv", x).chunk(3, dim=-1)
    for query, key_, value in zip(*(part.chunk(HEADS, dim=-1) for part in (q, k, v)), strict=True):
        query, key_ = (torch.cat([part[:, :prefix], rotate(part[:, prefix:], side)], dim=1) for part in (query, key_))
        outputs.append((query @ key_.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(dim=-1) @ value)
    return linear(w, f"{key}.proj", torch.cat(outputs, dim=-1))


def forward(w, images):
    """Class token and patches after the final norm."""
    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH)
    batch, _, side, _ = x.shape
    tokens = [w["cls_token"].expand(batch, -1, -1), w["storage_tokens"].expand(batch, -1, -1)]
    x = torch.cat([*tokens, x.flatten(2).transpose(1, 2)], dim=1)
    for block in range(DEPTH):
        key = f"blocks.{block}"
        x = x + w[f"{key}.ls1.gamma"] * attention(w, f"{key}.attn", norm(w, f"{key}.norm1", x, EPS), side)
        y = linear(w, f"{key}.mlp.fc1", norm(w, f"{key}.norm2", x, EPS))
        x = x + w[f"{key}.ls2.gamma"] * linear(w, f"{key}.mlp.fc2", F.gelu(y))
    x = norm(w, "norm", x, EPS)
    return x[:, 0], x[:, 1 + REGISTERS :].reshape(batch, side, side, WIDTH)


def build(path, model=MODEL):
    return create_teacher(model, weights=str(path), input_size=64, args=dict(ARGS))


@pytest.mark.parametrize(("model", "biases"), [(MODEL, 0), (f"{MODEL}_qkvb", 0), (f"{MODEL}_qkvb", 1)])
def test_a_file_of_the_authors_gives_the_published_forward(tmp_path, model, biases):
    tensors = draw_file(biases)
    torch.save(tensors, tmp_path / "authors.pth")
    teacher = build(tmp_path / "authors.pth", model)
    teacher.check()
    teacher.load()
    pixels = draw_pixels(2, 64)
    class_token, tokens = forward(tensors, normalise(pixels))
    summary, patches = teacher.encode(pixels)
    torch.testing.assert_close(summary, class_token, atol=5e-5, rtol=0)
    torch.testing.assert_close(patches, tokens, atol=5e-5, rtol=0)


def test_biases_that_the_model_would_drop_are_refused(tmp_path):
    torch.save(draw_file(1), tmp_path / "authors.pth")
    with pytest.raises(TeacherError, match=r"qkv\.bias is not zero, and this model has no biases .*: use its _qkvb"):
        build(tmp_path / "authors.pth").load()


def test_the_class_token_is_part_of_the_identity():
    spec = create_teacher(f"{MODEL}.lvd1689m").spec
    assert spec.model_args["global_pool"] == "token"
    averaged = create_teacher(f"{MODEL}.lvd1689m", args={"global_pool": "avg"}).spec
    assert spec.identity() != averaged.identity()
    assert (spec.summary_dim, spec.patch_dim, spec.grid) == (384, 384, (16, 16))


def test_patches_of_a_convnext_are_normalised_as_its_mean_is():
    teacher = create_teacher("timm/convnext_tiny.dinov3_lvd1689m", weights="random", input_size=64)
    assert teacher.spec.computation == "patches: after the final norm"
    teacher.load()
    final = teacher.model.head.norm
    torch.nn.init.normal_(final.weight)
    torch.nn.init.normal_(final.bias)
    pixels = draw_pixels(1, 64)
    with torch.inference_mode():
        maps = teacher.model.forward_features(normalise(pixels)).permute(0, 2, 3, 1)
    w = {"norm.weight": final.weight, "norm.bias": final.bias}
    summary, patches = teacher.encode(pixels)
    torch.testing.assert_close(patches, norm(w, "norm", maps, 1e-6), atol=1e-4, rtol=0)
    torch.testing.assert_close(summary, norm(w, "norm", maps.mean(dim=(1, 2)), 1e-6), atol=1e-4, rtol=0)
