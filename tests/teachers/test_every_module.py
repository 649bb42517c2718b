"""A small model of every module of timm, and every tower of open_clip: the right grid and tokens, or one line."""

import open_clip
import pytest
import timm
import torch
from timm.models._registry import _model_to_module
from torch import nn

from teachers.base import TeacherError
from teachers.clip import CLIP
from teachers.registry import create_teacher
from teachers.timm_features import find_features
from tests.teachers.plain import draw_pixels

SMALL = ("test_", "atto", "femto", "pico", "nano", "tiny", "xxs", "_t0", "_xs", "_s0", "small", "18", "26", "b0", "050")
"""Parts of the names of small models."""
MOST_PARAMETERS = 120e6
REFUSED = {"gemma4_vit"}
"""Modules whose tokens and maps are no square of patches at the published size."""


def small_model(module):
    """A model of a module that is small by its name."""

    def rank(name):
        return next((place for place, part in enumerate(SMALL) if part in name), len(SMALL)), len(name), name

    return min((name for name, own in _model_to_module.items() if own == module), key=rank)


def check_features(name):
    """The spec of a teacher without weights, and that it keeps its word if it is small enough to be run."""
    teacher = create_teacher(name, weights="random")
    spec = teacher.spec
    height, width = spec.grid
    # 1x1 is a class token taken for a grid; no backbone has strides above 64.
    assert height == width >= max(2, spec.input_size[0] // 64)
    with torch.device("meta"):
        build = teacher.create_tower if isinstance(teacher, CLIP) else teacher._create
        numbers = sum(value.numel() for value in build().parameters())
    if numbers > MOST_PARAMETERS:
        return
    teacher.load()
    pixels = draw_pixels(2, spec.input_size[0])
    summary, patches = teacher.encode(pixels)  # compares the shapes with the spec
    assert patches.isfinite().all()
    assert summary is None or summary.isfinite().all()
    assert not torch.equal(patches[0], patches[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", sorted(timm.list_modules()))
def test_a_small_model_of_every_module_of_timm(module):
    name = f"timm/{small_model(module)}"
    if module not in REFUSED:
        check_features(name)
        return
    with pytest.raises(TeacherError, match="it gives no map of patches") as refused:
        create_teacher(name, weights="random")
    assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(name for name in timm.list_models() if not timm.get_pretrained_cfg(name).tag))
def test_models_without_published_weights(name):
    spec = create_teacher(f"timm/{name}", weights="random").spec
    assert spec.grid[0] > 1
    with pytest.raises(TeacherError, match="timm publishes no weights"):
        create_teacher(f"timm/{name}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", open_clip.list_models())
def test_every_tower_of_open_clip(model):
    check_features(f"clip/{model}")


@pytest.mark.parametrize(
    ("name", "grid", "dim"),
    [
        ("pit_xs_224", 7, 384),
        ("volo_d1_224", 14, 384),
        ("nf_seresnet26", 7, 2048),
        ("coat_lite_tiny", 7, 320),
        ("crossvit_tiny_240", 14, 192),
    ],
)
def test_maps_of_models_whose_features_are_tokens_of_another_kind(name, grid, dim):
    spec = create_teacher(f"timm/{name}", weights="random").spec
    assert (spec.grid, spec.patch_dim) == ((grid, grid), dim)


class Tokens(nn.Module):
    """A model whose features are a class token, or patches of no square; without `forward_intermediates`."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens

    def forward_features(self, images):
        return images.new_ones(len(images), self.tokens, 4)


@pytest.mark.parametrize("tokens", [1, 4, 50])
def test_tokens_that_no_grid_is_known_of_are_refused(tokens):
    with pytest.raises(ValueError, match="it gives no map of patches, but a class token or tokens of several sizes"):
        find_features(Tokens(tokens), torch.ones(1, 3, 8, 8))
