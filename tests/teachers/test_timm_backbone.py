"""Any timm model as a teacher: convolutional, windowed and plain transformers; a real file where there is one."""

from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import teachers
from teachers.base import TeacherError
from teachers.registry import create_teacher
from tests.teachers.plain import draw_pixels, normalise

REAL = {
    "model": "timm/mobilenetv2_100",
    "args": {"pad_type": "same", "mean": [0.498, 0.498, 0.498], "std": [0.5, 0.5, 0.5]},
}
PHOTOS_PER_CLASS = 3
SMALL_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture
def weights(shared_data):
    """The one real pretrained network at hand."""
    return str(shared_data / "weights" / "mobilenetv2_100_tfsame_in1k_fp16.safetensors")


@pytest.fixture
def photos(shared_data):
    """A few real photographs a class, [N, 3, 224, 224], and their numbers among the 1,000 of ImageNet."""
    folder = shared_data / "imagenet_mini"
    lines = (folder / "imagenette_classes.tsv").read_text().splitlines()[1:]
    images, labels = [], []
    for wnid, _, number in (line.split("\t") for line in lines):
        for path in sorted((folder / "imagenette224" / "val" / wnid).iterdir())[:PHOTOS_PER_CLASS]:
            images.append(pil_to_tensor(Image.open(path).convert("RGB")))
            labels.append(int(number))
    return torch.stack(images), torch.tensor(labels)


def test_a_real_network_knows_what_is_on_photographs(weights, photos):
    teacher = create_teacher(weights=weights, **REAL)
    teacher.load()
    images, labels = photos
    summary, patches = teacher.encode(images)
    assert summary.shape == (30, 1280)
    assert patches.shape == (30, 7, 7, 1280)
    # 72 % among 1,000 classes over all photographs of this set.
    named = teacher.model.get_classifier()(summary).argmax(dim=1)
    assert (named == labels).float().mean() >= 0.6
    distance = torch.cdist(summary, summary)
    assert distance[~torch.eye(30, dtype=torch.bool)].min() > 0.1 * distance.max()
    same = labels[:, None] == labels[None, :]
    assert distance[same & ~torch.eye(30, dtype=torch.bool)].mean() < distance[~same].mean()


def test_the_summary_of_a_convolutional_network_is_the_mean_of_its_patches(weights, photos):
    teacher = create_teacher(weights=weights, **REAL)
    teacher.load()
    summary, patches = teacher.encode(photos[0][:2])
    torch.testing.assert_close(summary, patches.mean(dim=(1, 2)), atol=1e-4, rtol=0)


def test_the_recipe_for_photographs_names_a_teacher_that_loads(weights):
    recipe = Path(teachers.__file__).parents[1] / "recipes" / "photos.yaml"
    entry = yaml.safe_load(recipe.read_text())["teachers"][1]
    teacher = create_teacher(entry["model"], weights=weights, input_size=entry["input_size"], args=entry["args"])
    teacher.load()
    assert teacher.encode(draw_pixels(2, 128)).patches.shape == (2, 4, 4, 1280)
    assert teacher.spec.mean == (0.498, 0.498, 0.498)


def test_a_classifier_is_part_of_the_real_file(weights):
    # Without it the file holds two keys too many; nothing is dropped in silence.
    with pytest.raises(TeacherError, match=r"has classifier\.bias, classifier\.weight"):
        create_teacher(REAL["model"], weights=weights, args={**REAL["args"], "num_classes": 0}).load()


def load(name, **options):
    teacher = create_teacher(f"timm/{name}", weights="random", **options)
    teacher.load()
    return teacher


def test_maps_of_channels_first_are_turned():
    teacher = load("resnet18", input_size=96)
    pixels = draw_pixels(2, 96)
    summary, patches = teacher.encode(pixels)
    with torch.inference_mode():
        features = teacher.model.forward_features(normalise(pixels, teacher.spec.mean, teacher.spec.std))
    assert patches.shape == (2, 3, 3, 512)
    for row in range(3):
        for column in range(3):
            torch.testing.assert_close(patches[:, row, column], features[:, :, row, column], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(summary, features.mean(dim=(2, 3)), atol=1e-4, rtol=1e-4)


def test_maps_of_channels_last_stay_as_they_are():
    args = {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2)}
    teacher = load("swin_tiny_patch4_window7_224", args=args)
    pixels = draw_pixels(1, 224)
    patches = teacher.encode(pixels).patches
    with torch.inference_mode():
        features = teacher.model.forward_features(normalise(pixels))
    assert patches.shape == (1, 28, 28, 16)
    torch.testing.assert_close(patches, features, atol=1e-4, rtol=1e-4)


def test_tokens_of_a_vit_are_its_patches_without_the_prefix():
    teacher = load("vit_tiny_patch16_224", input_size=64, args={**SMALL_VIT, "reg_tokens": 3})
    pixels = draw_pixels(2, 64)
    summary, patches = teacher.encode(pixels)
    half = (0.5, 0.5, 0.5)
    assert (teacher.spec.mean, teacher.spec.std) == (half, half)
    with torch.inference_mode():
        tokens = teacher.model.forward_features(normalise(pixels, half, half))
    assert tokens.shape[1] == 1 + 3 + 16
    torch.testing.assert_close(summary, tokens[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(patches.flatten(1, 2), tokens[:, 4:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_a_patch_sees_its_own_place(name):
    args = SMALL_VIT if name.startswith("vit") else {}
    teacher = load(name, input_size=128, args=args)
    pixels = draw_pixels(1, 128)
    changed = pixels.clone()
    changed[:, :, 100:124, 4:28] = 255 - changed[:, :, 100:124, 4:28]
    before, after = teacher.encode(pixels).patches[0], teacher.encode(changed).patches[0]
    moved = (after - before).norm(dim=-1)
    side = len(moved)
    lower_left = moved[side // 2 :, : side // 2].mean()
    assert lower_left > 2 * moved[: side // 2].mean()
    assert lower_left > 2 * moved[side // 2 :, side // 2 :].mean()


@pytest.mark.parametrize(
    ("name", "options", "dim", "grid"),
    [
        ("mobilenetv2_100", {}, 1280, 7),
        ("mobilenetv2_100", {"input_size": 128}, 1280, 4),
        ("convnext_tiny", {}, 768, 7),
        ("vit_tiny_patch16_224", {}, 192, 14),
        ("vit_tiny_patch16_224", {"input_size": 256}, 192, 16),
        ("vit_base_patch14_reg4_dinov2.lvd142m", {}, 768, 37),
        ("swin_tiny_patch4_window7_224", {}, 768, 7),
    ],
)
def test_models_of_timm_have_their_published_sizes(name, options, dim, grid):
    spec = create_teacher(f"timm/{name}", **options).spec
    assert (spec.summary_dim, spec.patch_dim, spec.grid) == (dim, dim, (grid, grid))
    assert spec.architecture == f"timm/{name.partition('.')[0]}"


def test_the_published_preprocessing_holds_unless_it_is_replaced():
    plain = create_teacher("timm/resnet18").spec
    assert (plain.mean, plain.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    changes = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    assert plain.interpolation != "bilinear"
    spec = create_teacher("timm/resnet18", args=changes).spec
    assert (spec.mean, spec.std, spec.interpolation) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    assert spec.identity() != plain.identity()
    # They are not the network's.
    assert spec.model_args == plain.model_args


def test_a_replaced_preprocessing_is_what_the_network_sees():
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    teacher = load("resnet18", input_size=64, args={"mean": mean, "std": std})
    pixels = draw_pixels(1, 64)
    with torch.inference_mode():
        features = teacher.model.forward_features(normalise(pixels, mean, std))
    torch.testing.assert_close(teacher.encode(pixels).patches, features.permute(0, 2, 3, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"mean": [0.5]}, r"args\.mean must be three numbers, not \[0\.5\]"),
        ({"std": 0.5}, r"args\.std must be three numbers, not 0\.5"),
        ({"interpolation": "nearest"}, r"args\.interpolation must be bicubic or bilinear, not 'nearest'"),
        ({"pretrained": True}, r"args must not contain pretrained; set weights instead"),
        ({"nope": 1}, r"teacher timm/resnet18: args \{'nope': 1\}: .*'nope'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(args, message):
    with pytest.raises(TeacherError, match=message):
        create_teacher("timm/resnet18", args=args)


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(
        TeacherError, match=r"timm/mobilenetv2_10: timm has no such model; did you mean .*mobilenetv2_100"
    ):
        create_teacher("timm/mobilenetv2_10")
    with pytest.raises(TeacherError, match=r"timm/xyzzy: timm has no such model$"):
        create_teacher("timm/xyzzy")
    with pytest.raises(TeacherError, match="add a model, as in timm/mobilenetv2_100"):
        create_teacher("timm")


def test_an_unknown_tag_names_those_there_are():
    with pytest.raises(
        TeacherError, match=r"timm/resnet18\.nope: timm has no weights nope; for resnet18 it has .*a1_in1k"
    ):
        create_teacher("timm/resnet18.nope")


def test_the_tag_is_part_of_the_identity_and_the_default_has_a_name():
    assert create_teacher("timm/resnet18").spec.weights == "hub:a1_in1k"
    assert create_teacher("timm/resnet18.tv_in1k").spec.weights == "hub:tv_in1k"


def test_an_input_size_with_a_rest_of_a_patch_is_refused():
    with pytest.raises(
        TeacherError, match="input_size 230 is not divisible by its patch size of 16 px; the next is 240"
    ):
        create_teacher("timm/vit_tiny_patch16_224", input_size=230)


def test_a_pool_that_leaves_a_rest_is_refused():
    with pytest.raises(TeacherError, match="pool 2 does not divide its grid of 7x7 patches"):
        create_teacher("timm/resnet18", pool=2)


def test_networks_are_frozen_and_in_evaluation_mode():
    model = load("resnet18", input_size=32).model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
