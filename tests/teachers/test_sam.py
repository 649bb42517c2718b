"""SAM's image encoder against a forward of the authors' checkpoint layout in plain torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import horizontal_flip, resize

from pipeline.imaging.crop import crop_and_pad, crop_and_resize
from pipeline.imaging.geometry import FULL, View
from teachers import sam
from teachers.base import TeacherError
from teachers.registry import create_teacher
from tests.teachers.plain import attend, draw, draw_pixels, linear, norm, normalise, resample, split_heads

WIDTH, HEADS, NECK, PATCH, WINDOW = 64, 2, 32, 16, 4
GLOBAL_BLOCKS = (1,)
DEPTH = 3
ARGS = {
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
    "neck_chans": NECK,
    "window_size": WINDOW,
    "global_attn_indexes": GLOBAL_BLOCKS,
}
EPS = 1e-6


def shapes(side):
    """The authors' keys, with tables for a grid of side x side."""
    table = {
        "pos_embed": (1, side, side, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "neck.0.weight": (NECK, WIDTH, 1, 1),
        "neck.1.weight": (NECK,),
        "neck.1.bias": (NECK,),
        "neck.2.weight": (NECK, NECK, 3, 3),
        "neck.3.weight": (NECK,),
        "neck.3.bias": (NECK,),
    }
    layers = {
        "attn.qkv": (3 * WIDTH, WIDTH),
        "attn.proj": (WIDTH, WIDTH),
        "mlp.lin1": (4 * WIDTH, WIDTH),
        "mlp.lin2": (WIDTH, 4 * WIDTH),
    }
    for block in range(DEPTH):
        for name, shape in layers.items():
            table |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            table[f"blocks.{block}.{name}"] = (WIDTH,)
        reach = 2 * (side if block in GLOBAL_BLOCKS else WINDOW) - 1
        table |= {f"blocks.{block}.attn.rel_pos_{axis}": (reach, WIDTH // HEADS) for axis in "hw"}
    return table


def draw_file(side):
    """A whole published file: the encoder under its prefix, and what masks are made with."""
    other = {
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 8),
        "mask_decoder.iou_token.weight": (1, 16),
        "mask_decoder.transformer.layers.0.self_attn.q_proj.weight": (16, 16),
    }
    tensors = draw({f"image_encoder.{key}": shape for key, shape in shapes(side).items()} | other)
    for key in tensors:
        # Faint patches, so that the norms' epsilon shows.
        if "patch_embed" in key or key.endswith("encoder.pos_embed"):
            tensors[key] *= 0.02
        if "rel_pos" in key:
            tensors[key] *= 2
    return tensors


def relative_bias(w, key, qkv, side):
    """[B, heads, N, N]: what every query says of the rows and of the columns between it and a key."""
    tables = {}
    for axis in "hw":
        table = w[f"{key}.rel_pos_{axis}"]
        if len(table) != 2 * side - 1:
            table = F.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
        tables[axis] = table
    rows, columns = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    down = tables["h"][rows[:, None] - rows[None, :] + side - 1]
    right = tables["w"][columns[:, None] - columns[None, :] + side - 1]
    return torch.stack([((q[:, :, None] * (down + right)).sum(dim=-1)) for q, _, _ in split_heads(qkv, HEADS)], dim=1)


def attention(w, key, x):
    """Of a square map [B, side, side, WIDTH] with itself."""
    side = x.shape[1]
    qkv = linear(w, f"{key}.qkv", x.flatten(1, 2))
    return linear(w, f"{key}.proj", attend(qkv, HEADS, relative_bias(w, key, qkv, side))).view_as(x)


def windowed(w, key, x):
    """Attention within windows; the last of a row or column reach beyond the map, into zeros."""
    batch, side, _, width = x.shape
    padded = torch.zeros(batch, -(-side // WINDOW) * WINDOW, -(-side // WINDOW) * WINDOW, width)
    padded[:, :side, :side] = x
    for top in range(0, side, WINDOW):
        for left in range(0, side, WINDOW):
            window = padded[:, top : top + WINDOW, left : left + WINDOW].clone()
            padded[:, top : top + WINDOW, left : left + WINDOW] = attention(w, key, window)
    return padded[:, :side, :side]


def forward(tensors, images):
    """The neck's map, [B, side, side, NECK]."""
    prefix = "image_encoder."
    w = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH).permute(0, 2, 3, 1)
    side = x.shape[1]
    x = x + resample(w["pos_embed"][0].flatten(0, 1), side).reshape(1, side, side, WIDTH)
    for block in range(DEPTH):
        key = f"blocks.{block}"
        attended = attention if block in GLOBAL_BLOCKS else windowed
        x = x + attended(w, f"{key}.attn", norm(w, f"{key}.norm1", x, EPS))
        y = F.gelu(linear(w, f"{key}.mlp.lin1", norm(w, f"{key}.norm2", x, EPS)))
        x = x + linear(w, f"{key}.mlp.lin2", y)
    x = norm(w, "neck.1", x @ w["neck.0.weight"][:, :, 0, 0].T, EPS)
    x = F.conv2d(x.permute(0, 3, 1, 2), w["neck.2.weight"], padding=1).permute(0, 2, 3, 1)
    return norm(w, "neck.3", x, EPS)


def build(weights, side, table=None, pool=None, **args):
    return create_teacher(
        "sam/vit_b",
        weights=str(weights),
        input_size=PATCH * side,
        pool=pool,
        args={**ARGS, "img_size": PATCH * (table or side), **args},
    )


@pytest.mark.parametrize("way", ["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize(("side", "table"), [(8, 8), (6, 6), (6, 8)], ids=["whole windows", "padding", "resampled"])
def test_a_file_of_the_authors_gives_the_published_forward(tmp_path, monkeypatch, side, table, way):
    monkeypatch.setattr(sam, "_use_fused", lambda x: way == "as on a GPU")
    tensors = draw_file(table)
    torch.save(tensors, tmp_path / "authors.pth")
    teacher = build(tmp_path / "authors.pth", side, table)
    teacher.load()
    pixels = draw_pixels(2, PATCH * side)
    summary, patches = teacher.encode(pixels)
    assert summary is None
    assert patches.shape == (2, side, side, NECK)
    torch.testing.assert_close(patches, forward(tensors, normalise(pixels)), atol=2e-5, rtol=0)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_in_half_precision_values_are_padded_and_nothing_changes(monkeypatch, qk_norm):
    plain = sam.Attention(32, num_heads=2, qk_norm=qk_norm, use_rel_pos=True, input_size=(5, 6))
    for table in (plain.rel_pos_h, plain.rel_pos_w):
        torch.nn.init.normal_(table)
    attention = sam.FusedAttention(plain).requires_grad_(False)
    x = torch.randn(3, 5, 6, 32)
    expected = attention(x)
    monkeypatch.setattr(sam, "_use_fused", lambda x: True)
    torch.testing.assert_close(attention(x), expected)
    torch.testing.assert_close(attention.bfloat16()(x.bfloat16()).float(), expected, atol=0.03, rtol=0.03)


def test_patches_are_pooled_by_plain_averages(tmp_path):
    tensors = draw_file(6)
    torch.save(tensors, tmp_path / "authors.pth")
    teacher = build(tmp_path / "authors.pth", 6, pool=2)
    teacher.load()
    pixels = draw_pixels(1, 96)
    patches = teacher.encode(pixels).patches
    whole = forward(tensors, normalise(pixels))
    assert patches.shape == (1, 3, 3, NECK)
    for row in range(3):
        for column in range(3):
            square = whole[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            torch.testing.assert_close(patches[0, row, column], square.mean(dim=(0, 1)), atol=2e-5, rtol=0)


def test_the_default_pool_averages_to_sixteen_by_sixteen(tmp_path):
    tensors = draw_file(32)
    torch.save(tensors, tmp_path / "authors.pth")
    teacher = build(tmp_path / "authors.pth", 32)
    assert (teacher.spec.pool, teacher.spec.grid) == (2, (16, 16))
    teacher.load()
    pixels = draw_pixels(1, 512)
    pooled = teacher.encode(pixels).patches
    whole = build(tmp_path / "authors.pth", 32, pool=1)
    assert whole.spec.grid == (32, 32)
    whole.load()
    squares = F.avg_pool2d(whole.encode(pixels).patches.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    torch.testing.assert_close(pooled, squares, atol=1e-6, rtol=0)


def padded_forward(tensors, image, side, grid):
    """The authors' features [grid, grid, NECK] of an image [3, h, w] uint8, averaged over cells of the image alone."""
    long = max(image.shape[1:])
    height, width = (max(1, int(extent * (PATCH * side / long) + 0.5)) for extent in image.shape[1:])
    padded = torch.zeros(1, 3, PATCH * side, PATCH * side)
    padded[:, :, :height, :width] = normalise(resize(image, [height, width], antialias=True)[None])
    features = forward(tensors, padded)[0]
    # Every pixel split into `grid` parts, so that cells begin between two of them.
    cells = torch.empty(grid, grid, NECK)
    for row in range(grid):
        for column in range(grid):
            ys, xs = (
                torch.arange(cell * extent, (cell + 1) * extent) // (PATCH * grid)
                for cell, extent in ((row, height), (column, width))
            )
            cells[row, column] = features[ys][:, xs].mean(dim=(0, 1))
    return cells


@pytest.mark.parametrize(
    ("size", "view"),
    [
        ((90, 240), FULL),
        ((200, 150), FULL),
        ((128, 128), FULL),
        ((40, 30), FULL),
        ((1, 300), FULL),
        ((120, 90), View((0.0, 0.25, 1.0, 0.75), flip=True)),
    ],
    ids=["wide", "tall", "square", "enlarged", "thin", "mirrored crop"],
)
@pytest.mark.parametrize(("side", "pool"), [(8, 2), (6, 1)])
def test_padded_images_are_encoded_as_by_the_authors_and_no_padding_is_averaged(tmp_path, size, view, side, pool):
    tensors = draw_file(side)
    torch.save(tensors, tmp_path / "authors.pth")
    teacher = build(tmp_path / "authors.pth", side, pool=pool, resize_mode="pad")
    assert teacher.spec.grid == (side // pool, side // pool)
    teacher.load()
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    pixels = torch.from_numpy(crop_and_pad(image, view, teacher.spec.input_size, teacher.spec.interpolation))
    top, bottom = (round(share * size[0]) for share in view.box[1::2])
    cut = torch.from_numpy(image[top:bottom].copy()).permute(2, 0, 1)
    expected = padded_forward(tensors, horizontal_flip(cut) if view.flip else cut, side, side // pool)
    together = teacher.encode(torch.stack([torch.ones_like(pixels), pixels])).patches[
        1
    ]  # beside an image of another extent
    torch.testing.assert_close(together, expected, atol=5e-5, rtol=0)


def test_a_square_image_has_the_same_features_padded_or_squashed(tmp_path):
    torch.save(draw_file(8), tmp_path / "authors.pth")
    image, features = np.random.default_rng(0).integers(0, 256, (70, 70, 3), np.uint8), []
    for mode, crop in (("squash", crop_and_resize), ("pad", crop_and_pad)):
        teacher = build(tmp_path / "authors.pth", 8, pool=2, resize_mode=mode)
        teacher.load()
        pixels = crop(image, FULL, teacher.spec.input_size, teacher.spec.interpolation)
        features.append(teacher.encode(torch.from_numpy(pixels)[None]).patches)
    torch.testing.assert_close(*features, atol=1e-5, rtol=0)


def test_squashing_is_the_default_and_leaves_the_identity_of_older_caches():
    spec, padded = (create_teacher("sam", args=args).spec for args in ({}, {"resize_mode": "pad"}))
    assert (spec.resize_mode, padded.resize_mode) == ("squash", "pad")
    assert padded.identity() == {**spec.identity(), "resize_mode": "pad"}
    assert create_teacher("sam", args={"resize_mode": "squash"}).spec.identity() == spec.identity()


@pytest.mark.parametrize(
    ("model", "mode", "reason"),
    [
        ("sam", "crop", "teacher sam/vit_b: args.resize_mode must be squash or pad, not 'crop'"),
        ("sam", True, "must be squash or pad, not True"),
        (
            "dinov2/vits14",
            "pad",
            "teacher dinov2/vits14: args.resize_mode=pad is for SAM: the padding would change this",
        ),
    ],
)
def test_other_ways_to_resize_are_refused(model, mode, reason):
    with pytest.raises(TeacherError, match=reason):
        create_teacher(model, weights="random", args={"resize_mode": mode})


@pytest.mark.parametrize(("variant", "size"), [("vit_b", "base"), ("vit_l", "large"), ("vit_h", "huge")])
def test_every_variant_has_its_published_size(variant, size):
    spec = create_teacher(f"sam/{variant}").spec
    assert spec.architecture == f"timm/samvit_{size}_patch16"
    assert (spec.summary_dim, spec.patch_dim) == (None, 256)
    assert (spec.input_size, spec.grid, spec.pool) == ((1024, 1024), (16, 16), 4)
    assert spec.mean == (0.485, 0.456, 0.406)
    assert spec.std == (0.229, 0.224, 0.225)
    assert spec.weights == "hub:sa1b"
    assert spec.licence == "apache-2.0"


def test_without_a_variant_it_is_the_base_model():
    assert create_teacher("sam").spec.name == "sam/vit_b"


@pytest.mark.parametrize(
    ("size", "grid", "pool"), [(1024, 16, 4), (512, 16, 2), (256, 16, 1), (192, 12, 1), (640, 40, 1)]
)
def test_the_grid_stays_sixteen_as_long_as_it_can(size, grid, pool):
    spec = create_teacher("sam", input_size=size).spec
    assert (spec.grid, spec.pool) == ((grid, grid), pool)


def test_the_tables_are_of_the_published_size_whatever_the_input():
    args = {key: value for key, value in ARGS.items() if key != "window_size"}
    teacher = create_teacher("sam", weights="random", input_size=128, args=args)
    teacher.load()
    state = teacher.model.state_dict()
    assert state["pos_embed"].shape == (1, 64, 64, WIDTH)
    assert state["blocks.1.attn.rel_pos_h"].shape == (127, WIDTH // HEADS)
    assert state["blocks.0.attn.rel_pos_h"].shape == (27, WIDTH // HEADS)
    assert teacher.encode(draw_pixels(1, 128)).patches.shape == (1, 8, 8, NECK)


@pytest.mark.parametrize("key", ["blocks.2.attn.rel_pos_w", "neck.3.bias", "pos_embed"])
def test_a_missing_key_is_named(tmp_path, key):
    tensors = draw_file(4)
    del tensors[f"image_encoder.{key}"]
    torch.save(tensors, tmp_path / "authors.pth")
    with pytest.raises(TeacherError, match=f"lacks {key}"):
        build(tmp_path / "authors.pth", 4).load()


def test_a_surplus_key_of_the_encoder_is_named(tmp_path):
    tensors = draw_file(4) | {"image_encoder.blocks.7.norm1.weight": torch.ones(WIDTH)}
    torch.save(tensors, tmp_path / "authors.pth")
    with pytest.raises(TeacherError, match=r"has blocks\.7\.norm1\.weight, which this architecture does not have"):
        build(tmp_path / "authors.pth", 4).load()


def test_tables_of_another_grid_are_named(tmp_path):
    torch.save(draw_file(6), tmp_path / "authors.pth")
    with pytest.raises(TeacherError, match=r"has shape \(.*11, .*\) in the file, \(.*7, .*\)|pos_embed has shape"):
        build(tmp_path / "authors.pth", 4).load()


def test_the_layout_of_the_file_does_not_matter(tmp_path):
    torch.save(draw_file(4), tmp_path / "authors.pth")
    first = build(tmp_path / "authors.pth", 4)
    first.load()
    timms = first.model.state_dict()
    assert "blocks.0.mlp.fc1.weight" in timms
    torch.save(timms, tmp_path / "timms.pth")
    second = build(tmp_path / "timms.pth", 4)
    second.load()
    assert first.weights_sha256 == second.weights_sha256 != ""


def test_an_input_size_with_a_rest_of_a_patch_is_refused():
    with pytest.raises(
        TeacherError, match="input_size 1000 is not divisible by its patch size of 16 px; the next is 1008"
    ):
        create_teacher("sam", input_size=1000)


def test_a_pool_that_leaves_a_rest_is_refused():
    with pytest.raises(TeacherError, match="pool 3 does not divide its grid of 64x64 patches"):
        create_teacher("sam", pool=3)


def test_an_unknown_variant_names_the_nearest():
    with pytest.raises(TeacherError, match=r"did you mean sam/vit_b\? known are vit_b, vit_l, vit_h"):
        create_teacher("sam/vitb")
