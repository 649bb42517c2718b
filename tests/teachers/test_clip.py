"""CLIP's image tower against a forward of OpenAI's checkpoint layout in plain torch."""

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from teachers.base import TeacherError
from teachers.registry import create_teacher
from tests.teachers.plain import attend, draw, draw_pixels, linear, norm, normalise, resample

WIDTH, DEPTH, HEADS, PATCH, EMBEDDING = 64, 2, 2, 16, 512
ARGS = {"width": WIDTH, "layers": DEPTH, "head_width": WIDTH // HEADS}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
EPS = 1e-5


def shapes(side):
    """OpenAI's keys of ViT-B/16, with a position table of side x side; text tower and sizes beside it."""
    table = {
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (1 + side**2, WIDTH),
        "visual.proj": (WIDTH, EMBEDDING),
        "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
        "token_embedding.weight": (16, 32),
        "positional_embedding": (8, 32),
        "text_projection": (32, EMBEDDING),
        "transformer.resblocks.0.attn.in_proj_weight": (96, 32),
        "ln_final.weight": (32,),
        "logit_scale": (),
    }
    layers = {
        "attn.in_proj_": (3 * WIDTH, WIDTH),
        "attn.out_proj.": (WIDTH, WIDTH),
        "mlp.c_fc.": (4 * WIDTH, WIDTH),
        "mlp.c_proj.": (WIDTH, 4 * WIDTH),
        "ln_1.": (WIDTH,),
        "ln_2.": (WIDTH,),
    }
    for block in range(DEPTH):
        for name, shape in layers.items():
            key = f"visual.transformer.resblocks.{block}.{name}"
            table |= {f"{key}weight": shape, f"{key}bias": shape[:1]}
    for name in ("visual.ln_pre", "visual.ln_post"):
        table |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    return table


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def forward(w, images, activation=quick_gelu):
    """The image embedding, and the tokens after the final norm."""
    w = {key.removeprefix("visual."): value.float() for key, value in w.items() if key.startswith("visual.")}
    x = F.conv2d(images, w["conv1.weight"], stride=PATCH)
    batch, _, height, width = x.shape
    positions = torch.cat([w["positional_embedding"][:1], resample(w["positional_embedding"][1:], height)])
    x = torch.cat([w["class_embedding"].expand(batch, 1, -1), x.flatten(2).transpose(1, 2)], dim=1) + positions
    x = norm(w, "ln_pre", x, EPS)
    for block in range(DEPTH):
        key = f"transformer.resblocks.{block}"
        y = norm(w, f"{key}.ln_1", x, EPS)
        qkv = y @ w[f"{key}.attn.in_proj_weight"].T + w[f"{key}.attn.in_proj_bias"]
        x = x + linear(w, f"{key}.attn.out_proj", attend(qkv, HEADS))
        y = linear(w, f"{key}.mlp.c_fc", norm(w, f"{key}.ln_2", x, EPS))
        x = x + linear(w, f"{key}.mlp.c_proj", activation(y))
    x = norm(w, "ln_post", x, EPS)
    return x[:, 0] @ w["proj"], x[:, 1:].reshape(batch, height, width, WIDTH)


def build(weights, side=4, model="ViT-B-16@openai", **options):
    return create_teacher(f"clip/{model}", weights=str(weights), input_size=PATCH * side, args=dict(ARGS), **options)


def assert_published(teacher, tensors, activation=quick_gelu):
    teacher.load()
    pixels = draw_pixels(2, teacher.spec.input_size[0])
    summary, patches = teacher.encode(pixels)
    embedding, tokens = forward(tensors, normalise(pixels, MEAN, STD), activation)
    assert summary.shape == (2, EMBEDDING)
    torch.testing.assert_close(summary, embedding, atol=5e-5, rtol=0)
    torch.testing.assert_close(patches, tokens, atol=2e-5, rtol=0)


def save_as_torchscript(tensors, path):
    """An archive of the kind that OpenAI publishes: modules nested as in the keys."""
    root = nn.Module()
    for key, value in tensors.items():
        module = root
        *parents, name = key.split(".")
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        module.register_buffer(name, value)
    torch.jit.script(root).save(path)


@pytest.mark.parametrize("table", [4, 6])
def test_a_file_of_openai_gives_the_published_forward(tmp_path, table):
    tensors = draw(shapes(table))
    torch.save(tensors, tmp_path / "openai.pt")
    assert_published(build(tmp_path / "openai.pt"), tensors)


@pytest.mark.parametrize("table", [4, 6])
def test_a_file_in_half_precision_is_computed_in_float32(tmp_path, table):
    tensors = {key: value.half() for key, value in draw(shapes(table)).items()}
    torch.save(tensors, tmp_path / "openai.pt")
    assert_published(build(tmp_path / "openai.pt"), tensors)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*TorchScript archive:UserWarning")
def test_a_torchscript_archive_of_openai_loads(tmp_path):
    tensors = {key: value.half() for key, value in draw(shapes(4)).items()}
    sizes = {name: torch.tensor(value) for name, value in {"input_resolution": 64, "vocab_size": 16}.items()}
    save_as_torchscript(tensors | sizes, tmp_path / "openai.pt")
    assert_published(build(tmp_path / "openai.pt"), tensors)


def test_a_safetensors_file_loads(tmp_path):
    tensors = draw(shapes(4))
    safetensors.torch.save_file(tensors, tmp_path / "openai.safetensors")
    assert_published(build(tmp_path / "openai.safetensors"), tensors)


def test_the_tag_decides_the_activation(tmp_path):
    tensors = draw(shapes(4))
    torch.save(tensors, tmp_path / "file.pt")
    quick = build(tmp_path / "file.pt")
    exact = build(tmp_path / "file.pt", model="ViT-B-16@laion2b_s34b_b88k")
    assert_published(exact, tensors, F.gelu)
    assert quick.spec.architecture == "open_clip/ViT-B-16-quickgelu"
    assert exact.spec.architecture == "open_clip/ViT-B-16"
    assert quick.spec.identity() != exact.spec.identity()


def test_a_norm_after_the_pooling_is_not_put_on_tokens(tmp_path):
    tensors = draw(shapes(4))
    torch.save(tensors, tmp_path / "openai.pt")
    args = {**ARGS, "final_ln_after_pool": True}
    teacher = create_teacher("clip/ViT-B-16", weights=str(tmp_path / "openai.pt"), input_size=64, args=args)
    teacher.load()
    pixels = draw_pixels(1, 64)
    summary, patches = teacher.encode(pixels)
    embedding, tokens = forward(tensors, normalise(pixels, MEAN, STD))
    torch.testing.assert_close(summary, embedding, atol=5e-5, rtol=0)
    torch.testing.assert_close(norm(tensors, "visual.ln_post", patches, EPS), tokens, atol=2e-5, rtol=0)
    assert not torch.allclose(patches, tokens, atol=0.1)


def test_patches_are_averaged_when_asked(tmp_path):
    tensors = draw(shapes(4))
    torch.save(tensors, tmp_path / "openai.pt")
    teacher = build(tmp_path / "openai.pt", pool=2)
    assert (teacher.spec.grid, teacher.spec.pool) == ((2, 2), 2)
    teacher.load()
    pixels = draw_pixels(1, 64)
    _, tokens = forward(tensors, normalise(pixels, MEAN, STD))
    square = tokens[0, :2, 2:].mean(dim=(0, 1))
    torch.testing.assert_close(teacher.encode(pixels).patches[0, 0, 1], square, atol=2e-5, rtol=0)
    with pytest.raises(TeacherError, match="pool 3 does not divide its grid of 16x16 patches"):
        create_teacher("clip", pool=3)


def test_a_missing_key_is_named(tmp_path):
    tensors = draw(shapes(4))
    del tensors["visual.ln_post.bias"]
    torch.save(tensors, tmp_path / "openai.pt")
    with pytest.raises(TeacherError, match=r"lacks ln_post\.bias"):
        build(tmp_path / "openai.pt").load()


def test_a_surplus_key_of_the_tower_is_named(tmp_path):
    tensors = draw(shapes(4)) | {"visual.ln_mid.weight": torch.ones(WIDTH)}
    torch.save(tensors, tmp_path / "openai.pt")
    with pytest.raises(TeacherError, match=r"has ln_mid\.weight, which this architecture does not have"):
        build(tmp_path / "openai.pt").load()


def test_a_wrong_shape_is_named(tmp_path):
    tensors = draw(shapes(4)) | {"visual.proj": torch.ones(WIDTH, 256)}
    torch.save(tensors, tmp_path / "openai.pt")
    with pytest.raises(TeacherError, match=r"proj has shape \(64, 256\) in the file, \(64, 512\) in the architecture"):
        build(tmp_path / "openai.pt").load()


def test_a_position_table_that_is_no_square_names_the_file(tmp_path):
    tensors = draw(shapes(4))
    tensors["visual.positional_embedding"] = tensors["visual.positional_embedding"][:-2]
    torch.save(tensors, tmp_path / "damaged.pt")
    with pytest.raises(TeacherError, match=r"damaged\.pt does not fit this architecture"):
        build(tmp_path / "damaged.pt").load()


def test_without_a_model_it_is_openais_large_one():
    spec = create_teacher("clip").spec
    assert spec.name == "clip/ViT-L-14@openai"
    assert spec.architecture == "open_clip/ViT-L-14-quickgelu"
    assert spec.weights == "hub:openai"
    assert (spec.summary_dim, spec.patch_dim, spec.grid, spec.input_size) == (768, 1024, (16, 16), (224, 224))
    assert (spec.mean, spec.std, spec.interpolation) == (MEAN, STD, "bicubic")
    assert spec.licence == "mit"


@pytest.mark.parametrize(
    ("model", "size", "summary_dim", "patch_dim", "grid"),
    [
        ("ViT-B-32@openai", 224, 512, 768, 7),
        ("ViT-B-16@laion2b_s34b_b88k", 224, 512, 768, 14),
        ("ViT-L-14-336@openai", 336, 768, 1024, 24),
        ("RN50@openai", 224, 1024, 2048, 7),
        ("convnext_base@laion400m_s13b_b51k", 224, 512, 1024, 7),
        ("ViT-B-16-SigLIP@webli", 224, 768, 768, 14),
        ("EVA02-B-16@merged2b_s8b_b131k", 224, 512, 768, 14),
    ],
)
def test_models_of_open_clip_have_their_published_sizes(model, size, summary_dim, patch_dim, grid):
    spec = create_teacher(f"clip/{model}").spec
    assert spec.name == f"clip/{model}"
    assert spec.weights == f"hub:{model.partition('@')[2]}"
    assert spec.input_size == (size, size)
    assert (spec.summary_dim, spec.patch_dim, spec.grid) == (summary_dim, patch_dim, (grid, grid))


def test_the_tag_decides_the_preprocessing():
    spec = create_teacher("clip/ViT-B-16-SigLIP@webli").spec
    assert (spec.mean, spec.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("model", "size", "args"),
    [
        ("RN50", 64, {"layers": (1, 1, 1, 1), "width": 16}),
        ("ViT-B-16-SigLIP", 224, {"timm_model_name": "vit_tiny_patch16_224"}),
    ],
)
def test_towers_that_are_no_vit_of_open_clip_give_what_their_spec_says(model, size, args):
    teacher = create_teacher(f"clip/{model}", weights="random", input_size=size, args=args)
    teacher.load()
    # encode compares the shapes with the spec.
    summary, patches = teacher.encode(draw_pixels(2, size))
    for features in (summary, patches):
        assert features.isfinite().all()
        assert not torch.allclose(features[0], features[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*TorchScript archive:UserWarning")
@pytest.mark.parametrize("packed", ["pytorch", "torchscript"])
def test_counters_of_batch_norm_stay_integers(tmp_path, packed):
    args = {"layers": (1, 1, 1, 1), "width": 16}
    first = create_teacher("clip/RN50", weights="random:3", input_size=64, args=args)
    first.load()
    tensors = {f"visual.{key}": value for key, value in first.tower.state_dict().items()}
    assert any(not value.is_floating_point() for value in tensors.values())
    half = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
    (save_as_torchscript if packed == "torchscript" else torch.save)(half, tmp_path / "resnet.pt")
    second = create_teacher("clip/RN50", weights=str(tmp_path / "resnet.pt"), input_size=64, args=args)
    second.check()
    second.load()
    pixels = draw_pixels(1, 64)
    torch.testing.assert_close(second.encode(pixels).patches, first.encode(pixels).patches, atol=2e-2, rtol=2e-2)


def test_a_mobile_tower_loads_from_a_file(tmp_path):
    first = create_teacher("clip/MobileCLIP-S1", weights="random:3", input_size=64)
    first.load()
    tensors = {f"visual.{key}": value for key, value in first.tower.state_dict().items()}
    safetensors.torch.save_file(tensors, tmp_path / "mobile.safetensors")
    second = create_teacher("clip/MobileCLIP-S1", weights=str(tmp_path / "mobile.safetensors"), input_size=64)
    second.check()
    second.load()
    assert second.weights_sha256 == first.weights_sha256


def test_tokens_before_an_attentional_pool_are_those_of_the_last_block():
    args = {"layers": 1, "width": 64, "head_width": 32, "attn_pooler_heads": 4}
    teacher = create_teacher("clip/coca_ViT-B-32", weights="random", input_size=96, args=args)
    assert teacher.spec.grid == (3, 3)
    teacher.load()
    pixels = draw_pixels(1, 96)
    summary, patches = teacher.encode(pixels)
    with torch.inference_mode():
        tower, images = teacher.tower, normalise(pixels, MEAN, STD)
        tokens = tower.transformer(tower._embeds(images))
        expected, _ = tower(images)
    torch.testing.assert_close(summary, expected)
    torch.testing.assert_close(patches.flatten(1, 2), tokens[:, 1:])


def test_a_tower_of_timm_takes_another_input_size(tmp_path):
    args = {"timm_model_name": "vit_tiny_patch16_224"}
    whole = create_teacher("clip/ViT-B-16-SigLIP", weights="random:1", args=args)
    whole.load()
    tensors = {f"visual.{key}": value for key, value in whole.tower.state_dict().items()}
    torch.save(tensors, tmp_path / "siglip.pt")
    teacher = create_teacher("clip/ViT-B-16-SigLIP", weights=str(tmp_path / "siglip.pt"), input_size=64, args=args)
    assert teacher.spec.grid == (4, 4)
    teacher.check()
    teacher.load()
    table = resample(tensors["visual.trunk.pos_embed"][0, 1:], 4)
    torch.testing.assert_close(teacher.tower.state_dict()["trunk.pos_embed"][0, 1:], table)
    assert teacher.encode(draw_pixels(1, 64)).patches.shape == (1, 4, 4, 192)


@pytest.mark.parametrize("refuse", ["check", "load"])
def test_weights_of_another_size_are_described(tmp_path, refuse):
    torch.save(draw(shapes(4)), tmp_path / "small.pt")
    teacher = create_teacher("clip/ViT-L-14@openai", weights=str(tmp_path / "small.pt"))
    looks = r"looks like a transformer \(width 64, 2 blocks, patches of 16 px\), this architecture is ViT-L/14 \(width 1024, 24"
    with pytest.raises(TeacherError, match=looks):
        getattr(teacher, refuse)()


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(TeacherError, match=r"did you mean clip/ViT-L-14\?"):
        create_teacher("clip/ViT-L14")


def test_an_unknown_tag_names_those_there_are():
    with pytest.raises(TeacherError, match="no such weights; the tags of ViT-B-32 are openai, laion400m_e31"):
        create_teacher("clip/ViT-B-32@nope")


def test_a_model_without_a_default_tag_asks_for_one_only_where_it_needs_it():
    with pytest.raises(TeacherError, match=r"add a tag, as in clip/ViT-B-16-SigLIP@<tag>"):
        create_teacher("clip/ViT-B-16-SigLIP")
    assert create_teacher("clip/ViT-B-16-SigLIP", weights="random").spec.weights == "random:0"


def test_an_input_size_with_a_rest_of_a_patch_is_refused():
    with pytest.raises(
        TeacherError, match="input_size 100 is not divisible by its patch size of 32 px; the next is 128"
    ):
        create_teacher("clip/ViT-B-32", input_size=100)


def test_arguments_that_open_clip_refuses_are_named():
    with pytest.raises(TeacherError, match=r"clip/ViT-B-32: args .*'nope'"):
        create_teacher("clip/ViT-B-32", args={"nope": 1})
