"""DINOv2 against a forward of the authors' checkpoint layout in plain torch."""

import pytest
import torch
import torch.nn.functional as F

from teachers.base import TeacherError
from teachers.registry import create_teacher
from tests.teachers.plain import attend, draw, draw_pixels, linear, norm, normalise, resample, resample_with_offset

WIDTH, DEPTH, HEADS, PATCH = 64, 2, 2, 14
ARGS = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
EPS = 1e-6


def shapes(side, registers=0, swiglu=False):
    """The authors' keys, with a position table of side x side."""
    table = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + side**2, WIDTH),
        "mask_token": (1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    if registers:
        table["register_tokens"] = (1, registers, WIDTH)
    hidden = 4 * WIDTH
    layers = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
    layers |= (
        {"mlp.w12": (hidden, WIDTH), "mlp.w3": (WIDTH, hidden // 2)}
        if swiglu
        else {"mlp.fc1": (hidden, WIDTH), "mlp.fc2": (WIDTH, hidden)}
    )
    for block in range(DEPTH):
        for name, shape in layers.items():
            table |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            table[f"blocks.{block}.{name}"] = (WIDTH,)
    return table


def forward(w, images):
    """Class token and patches after the final norm."""
    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH)
    batch, _, height, width = x.shape
    x = x.flatten(2).transpose(1, 2)
    table = w["pos_embed"][0, 1:]
    places = resample(table, height) if "register_tokens" in w else resample_with_offset(table, height, 0.1)
    positions = torch.cat([w["pos_embed"][0, :1], places])
    x = torch.cat([w["cls_token"].expand(batch, -1, -1), x], dim=1) + positions
    registers = w.get("register_tokens", torch.zeros(1, 0, WIDTH))
    x = torch.cat([x[:, :1], registers.expand(batch, -1, -1), x[:, 1:]], dim=1)
    for block in range(DEPTH):
        key = f"blocks.{block}"
        qkv = linear(w, f"{key}.attn.qkv", norm(w, f"{key}.norm1", x, EPS))
        x = x + w[f"{key}.ls1.gamma"] * linear(w, f"{key}.attn.proj", attend(qkv, HEADS))
        y = norm(w, f"{key}.norm2", x, EPS)
        if f"{key}.mlp.w12.weight" in w:
            gate, value = linear(w, f"{key}.mlp.w12", y).chunk(2, dim=-1)
            y = linear(w, f"{key}.mlp.w3", gate * gate.sigmoid() * value)
        else:
            y = linear(w, f"{key}.mlp.fc2", F.gelu(linear(w, f"{key}.mlp.fc1", y)))
        x = x + w[f"{key}.ls2.gamma"] * y
    x = norm(w, "norm", x, EPS)
    return x[:, 0], x[:, 1 + registers.shape[1] :].reshape(batch, height, width, WIDTH)


def build(variant, weights, side=4, **args):
    return create_teacher(f"dinov2/{variant}", weights=str(weights), input_size=PATCH * side, args={**ARGS, **args})


@pytest.mark.parametrize("table", [3, 4, 6, 9])
@pytest.mark.parametrize(("variant", "registers"), [("vits14", 0), ("vits14_reg", 4)])
def test_a_file_of_the_authors_gives_the_published_forward(tmp_path, variant, registers, table):
    tensors = draw(shapes(table, registers))
    torch.save(tensors, tmp_path / "authors.pth")
    teacher = build(variant, tmp_path / "authors.pth")
    teacher.load()
    pixels = draw_pixels(2, 56)
    summary, patches = teacher.encode(pixels)
    class_token, tokens = forward(tensors, normalise(pixels))
    assert patches.shape == (2, 4, 4, WIDTH)
    torch.testing.assert_close(summary, class_token, atol=2e-5, rtol=0)
    torch.testing.assert_close(patches, tokens, atol=2e-5, rtol=0)


def test_another_resampling_is_another_teacher_in_the_cache(tmp_path):
    # Up to version 0.3 timm resampled, with antialiasing; those features must not be mixed with these.
    torch.save(draw(shapes(4)), tmp_path / "authors.pth")
    changed = "positions: bicubic, offset 0.1"
    assert build("vits14", tmp_path / "authors.pth").spec.computation == changed
    assert create_teacher("dinov2/vits14").spec.computation == changed
    assert create_teacher("dinov2/vits14", input_size=518).spec.computation == ""
    assert create_teacher("dinov2/vits14", weights="random").spec.computation == ""
    assert create_teacher("dinov2/vits14_reg").spec.computation == ""


@pytest.mark.parametrize("suffix", ["", "_reg"])
def test_the_name_of_timm_is_the_same_teacher(tmp_path, suffix):
    torch.save(draw(shapes(6, 4 if suffix else 0)), tmp_path / "authors.pth")
    registers = "reg4_" if suffix else ""
    teachers = [
        create_teacher(name, weights=str(tmp_path / "authors.pth"), input_size=56, args=dict(ARGS))
        for name in (f"dinov2/vits14{suffix}", f"timm/vit_small_patch14_{registers}dinov2.lvd142m")
    ]
    assert teachers[0].spec.identity() == teachers[1].spec.identity()
    features = []
    for teacher in teachers:
        teacher.load()
        features.append(teacher.encode(draw_pixels(1, 56)).patches)
    assert torch.equal(*features)


@pytest.mark.parametrize("name", ["img_size", "dynamic_img_size"])
def test_arguments_that_resample_in_another_way_are_refused(name):
    with pytest.raises(TeacherError, match=rf"dinov2/vits14: args\.{name}: set input_size"):
        create_teacher("dinov2/vits14", args={name: 224})


@pytest.mark.parametrize("chunked", [False, True])
def test_a_checkpoint_of_their_training_is_the_published_network(tmp_path, chunked):
    tensors = draw(shapes(4))
    kept = {
        f"blocks.0.{key.removeprefix('blocks.')}" if chunked and "blocks." in key else key: value
        for key, value in tensors.items()
    }
    heads = {"dino_head.mlp.0.weight": torch.ones(8, WIDTH), "ibot_head.last_layer.weight_v": torch.ones(9, 8)}
    torch.save({"teacher": {f"backbone.{key}": value for key, value in kept.items()} | heads}, tmp_path / "teacher.pth")
    teacher = build("vits14", tmp_path / "teacher.pth")
    teacher.check()
    teacher.load()
    pixels = draw_pixels(1, 56)
    _, tokens = forward(tensors, normalise(pixels))
    torch.testing.assert_close(teacher.encode(pixels).patches, tokens, atol=2e-5, rtol=0)


def test_the_gated_layers_of_the_giant_are_those_of_the_authors(tmp_path):
    tensors = draw(shapes(4, swiglu=True))
    torch.save(tensors, tmp_path / "authors.pth")
    teacher = build("vitg14", tmp_path / "authors.pth", mlp_ratio=4)
    teacher.load()
    pixels = draw_pixels(2, 56)
    class_token, tokens = forward(tensors, normalise(pixels))
    summary, patches = teacher.encode(pixels)
    torch.testing.assert_close(summary, class_token, atol=2e-5, rtol=0)
    torch.testing.assert_close(patches, tokens, atol=2e-5, rtol=0)


def test_the_layout_of_the_file_does_not_matter(tmp_path):
    torch.save(draw(shapes(4, registers=4)), tmp_path / "authors.pth")
    first = build("vits14_reg", tmp_path / "authors.pth")
    first.load()
    timms = first.model.state_dict()
    assert "reg_token" in timms
    torch.save(timms, tmp_path / "timms.pth")
    second = build("vits14_reg", tmp_path / "timms.pth")
    second.load()
    assert first.weights_sha256 == second.weights_sha256 != ""
    pixels = draw_pixels(1, 56)
    assert torch.equal(first.encode(pixels).patches, second.encode(pixels).patches)


def test_registers_are_no_patches_and_tell_variants_apart(tmp_path):
    torch.save(draw(shapes(4, registers=4)), tmp_path / "authors.pth")
    assert build("vits14_reg", tmp_path / "authors.pth").spec.grid == (4, 4)
    with pytest.raises(TeacherError, match=r"looks like .*, 4 registers\), this architecture is .*: the file has"):
        build("vits14", tmp_path / "authors.pth").load()
    torch.save(draw(shapes(4)), tmp_path / "plain.pth")
    with pytest.raises(TeacherError, match="lacks reg_token"):
        build("vits14_reg", tmp_path / "plain.pth").load()


def test_a_position_table_that_is_no_square_names_the_file(tmp_path):
    tensors = draw(shapes(4))
    tensors["pos_embed"] = tensors["pos_embed"][:, :-2]
    torch.save(tensors, tmp_path / "damaged.pth")
    with pytest.raises(TeacherError, match=r"damaged\.pth does not fit this architecture"):
        build("vits14", tmp_path / "damaged.pth").load()


@pytest.mark.parametrize("refuse", ["check", "load"])
def test_weights_of_another_size_are_described(tmp_path, refuse):
    with torch.device("meta"):
        other = create_teacher("dinov2/vitb14", weights="random", input_size=56)._create().state_dict()
    torch.save({key: torch.empty(1).expand(value.shape) for key, value in other.items()}, tmp_path / "other.pth")
    teacher = create_teacher("dinov2/vits14_reg", weights=str(tmp_path / "other.pth"))
    looks = r"looks like ViT-B/14 \(width 768, 12 blocks, patches of 14 px\), this architecture is "
    with pytest.raises(TeacherError, match=looks + r"ViT-S/14 \(width 384, 12 blocks, patches of 14 px, 4 registers\)"):
        getattr(teacher, refuse)()


def test_a_file_of_another_depth_or_width_names_the_key(tmp_path):
    torch.save(draw(shapes(4)), tmp_path / "authors.pth")
    with pytest.raises(TeacherError, match=r"lacks blocks\.2\..*more keys"):
        build("vits14", tmp_path / "authors.pth", depth=3).load()
    with pytest.raises(TeacherError, match=r"has blocks\.1\..*which this architecture does not have"):
        build("vits14", tmp_path / "authors.pth", depth=1).load()
    with pytest.raises(TeacherError, match=r"has shape \(.*64.*\) in the file, \(.*32.*\) in the architecture"):
        build("vits14", tmp_path / "authors.pth", embed_dim=32).load()


@pytest.mark.parametrize("suffix", ["", "_reg"])
@pytest.mark.parametrize(("variant", "dim"), [("vits14", 384), ("vitb14", 768), ("vitl14", 1024), ("vitg14", 1536)])
def test_every_variant_has_its_published_size(variant, dim, suffix):
    spec = create_teacher(f"dinov2/{variant}{suffix}").spec
    assert (spec.summary_dim, spec.patch_dim) == (dim, dim)
    assert (spec.input_size, spec.grid, spec.pool) == ((224, 224), (16, 16), 1)
    assert spec.mean == (0.485, 0.456, 0.406)
    assert spec.std == (0.229, 0.224, 0.225)
    assert spec.interpolation == "bicubic"
    assert spec.weights == "hub:lvd142m"
    assert ("reg4" in spec.architecture) == bool(suffix)
    assert spec.licence == "apache-2.0"


def test_without_a_variant_it_is_the_base_model_with_registers():
    assert create_teacher("dinov2").spec.name == "dinov2/vitb14_reg"


def test_another_input_size_is_another_grid():
    assert create_teacher("dinov2/vits14", input_size=518).spec.grid == (37, 37)


def test_an_input_size_with_a_rest_of_a_patch_is_refused():
    with pytest.raises(
        TeacherError, match=r"input_size 225 is not divisible by its patch size of 14 px; the next is 238"
    ):
        create_teacher("dinov2/vits14", input_size=225)


def test_patches_are_averaged_when_asked(tmp_path):
    torch.save(draw(shapes(4)), tmp_path / "authors.pth")
    whole = build("vits14", tmp_path / "authors.pth")
    pooled = create_teacher(
        "dinov2/vits14", weights=str(tmp_path / "authors.pth"), input_size=56, pool=2, args=dict(ARGS)
    )
    assert pooled.spec.grid == (2, 2)
    assert pooled.spec.identity() != whole.spec.identity()
    whole.load()
    pooled.load()
    pixels = draw_pixels(1, 56)
    corner = whole.encode(pixels).patches[0, :2, 2:].mean(dim=(0, 1))
    torch.testing.assert_close(pooled.encode(pixels).patches[0, 0, 1], corner)
    with pytest.raises(TeacherError, match="pool 3 does not divide its grid of 16x16 patches"):
        create_teacher("dinov2/vits14", pool=3)


def test_an_unknown_variant_names_the_nearest():
    with pytest.raises(TeacherError, match=r"did you mean dinov2/vitb14\? known are vits14, vits14_reg"):
        create_teacher("dinov2/vitb16")


def test_arguments_that_timm_refuses_are_named():
    with pytest.raises(TeacherError, match=r"dinov2/vits14: args .*'nope'"):
        create_teacher("dinov2/vits14", args={"nope": 1})
    with pytest.raises(TeacherError, match=r"dinov2/vits14: args .*divisible by num_heads"):
        create_teacher("dinov2/vits14", args={"num_heads": 7})


def test_half_precision_stays_near_and_answers_in_float32(tmp_path):
    torch.save(draw(shapes(4)), tmp_path / "authors.pth")
    teacher = build("vits14", tmp_path / "authors.pth")
    teacher.load()
    exact = teacher.encode(draw_pixels(1, 56)).patches
    digest = teacher.weights_sha256
    teacher.load(dtype=torch.bfloat16)
    rough = teacher.encode(draw_pixels(1, 56)).patches
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert F.cosine_similarity(rough, exact, dim=-1).min() > 0.995
    assert teacher.weights_sha256 == digest
