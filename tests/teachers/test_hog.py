"""HOG against scikit-image, cell by cell."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.feature import hog as reference_hog

from teachers.base import TeacherError
from teachers.hog import cell_histograms
from teachers.registry import create_teacher
from tests.teachers.plain import draw_pixels

SIZE = 64


def smooth_pixels():
    """Photograph-like: gradients of every angle and most of them faint."""
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    image = Image.fromarray(cells).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def edge_pixels():
    """Steps along rows, columns and diagonals: angles of exactly 0, 45, 90 and 135 degrees, and flat cells."""
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    channels = [(rows > 20) * 200, (columns > 37) * 130 + (rows + columns > 90) * 100, (rows - columns > 3) * 255]
    return torch.stack(channels)[None].to(torch.uint8)


def reference(image):
    """[8, 8, 3, 9] histograms of a [3, H, W] uint8 image, by scikit-image, one channel after another."""
    options = {"orientations": 9, "pixels_per_cell": (8, 8), "cells_per_block": (1, 1), "block_norm": "L2"}
    channels = [reference_hog(channel.numpy() / 255, feature_vector=False, **options) for channel in image]
    return np.stack([cells[:, :, 0, 0] for cells in channels], axis=2)


def make(**options):
    teacher = create_teacher("hog", **options)
    teacher.load()
    return teacher


@pytest.mark.parametrize(
    "pixels", [draw_pixels(1, SIZE), smooth_pixels(), edge_pixels()], ids=["noise", "smooth", "edges"]
)
def test_every_cell_is_that_of_scikit_image(pixels):
    patches = make(input_size=SIZE, pool=1).encode(pixels).patches
    assert patches.shape == (1, 8, 8, 27)
    expected = reference(pixels[0])
    assert expected.max() > 0.5
    np.testing.assert_allclose(patches[0].unflatten(-1, (3, 9)).numpy(), expected, atol=1e-5)


def test_a_patch_is_its_cells_row_by_row_then_channels_then_orientations():
    pixels = draw_pixels(1, SIZE, seed=1)
    patches = make(input_size=SIZE, pool=2).encode(pixels).patches
    assert patches.shape == (1, 4, 4, 2 * 2 * 3 * 9)
    cells = reference(pixels[0])
    for row in range(4):
        for column in range(4):
            square = cells[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_allclose(patches[0, row, column].numpy(), square.reshape(-1), atol=1e-5)


def test_the_summary_is_the_mean_histogram_of_sixteen_areas():
    pixels = draw_pixels(1, SIZE, seed=2)
    summary = make(input_size=SIZE).encode(pixels).summary
    areas = reference(pixels[0]).reshape(4, 2, 4, 2, 27).mean(axis=(1, 3))
    assert summary.shape == (1, 432)
    np.testing.assert_allclose(summary[0].unflatten(0, (27, 4, 4)).permute(1, 2, 0).numpy(), areas, atol=1e-5)


@pytest.mark.parametrize("level", [0, 77, 255])
def test_a_flat_image_gives_zeros(level):
    output = make(input_size=SIZE).encode(torch.full((1, 3, SIZE, SIZE), level, dtype=torch.uint8))
    assert torch.equal(output.patches, torch.zeros_like(output.patches))
    assert torch.equal(output.summary, torch.zeros_like(output.summary))


def test_a_step_along_the_rows_falls_into_the_bin_of_ninety_degrees():
    pixels = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    pixels[:, 1, SIZE // 2 :] = 200
    patches = make(input_size=SIZE, pool=1).encode(pixels).patches[0].unflatten(-1, (3, 9)).clone()
    above, below = patches[3, :, 1], patches[4, :, 1]
    assert torch.allclose(above[:, 4], torch.ones(8), atol=1e-4)
    assert torch.allclose(below[:, 4], torch.ones(8), atol=1e-4)
    patches[3:5, :, 1, 4] = 0
    assert torch.equal(patches, torch.zeros_like(patches))


def test_images_of_a_batch_do_not_mix():
    teacher = make(input_size=SIZE)
    pixels = draw_pixels(3, SIZE)
    together = teacher.encode(pixels)
    for number in range(3):
        alone = teacher.encode(pixels[number : number + 1])
        torch.testing.assert_close(alone.patches[0], together.patches[number])
        torch.testing.assert_close(alone.summary[0], together.summary[number])


def test_histograms_take_maps_that_are_not_square():
    image = draw_pixels(1, SIZE)[0]
    histograms = cell_histograms(image[None, :, :16, :40].float() / 255)
    assert histograms.shape == (1, 3, 9, 2, 5)
    np.testing.assert_allclose(histograms[0].permute(2, 3, 0, 1).numpy(), reference(image[:, :16, :40]), atol=1e-5)


def test_half_precision_is_not_used():
    exact, asked = make(input_size=SIZE), create_teacher("hog", input_size=SIZE)
    asked.load(dtype=torch.bfloat16)
    pixels = draw_pixels(1, SIZE)
    assert torch.equal(asked.encode(pixels).patches, exact.encode(pixels).patches)


@pytest.mark.parametrize(
    ("options", "grid", "dim"), [({}, 14, 108), ({"input_size": 64}, 4, 108), ({"input_size": 64, "pool": 4}, 2, 432)]
)
def test_the_spec_follows_size_and_pool(options, grid, dim):
    spec = create_teacher("hog", **options).spec
    assert (spec.grid, spec.patch_dim, spec.summary_dim) == ((grid, grid), dim, 432)
    assert spec.input_size == (options.get("input_size", 224),) * 2
    assert (spec.weights, spec.mean, spec.std) == ("none", (0, 0, 0), (1, 1, 1))


def test_another_pool_is_another_identity():
    assert create_teacher("hog", pool=1).spec.identity() != create_teacher("hog", pool=2).spec.identity()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hog/fast", {}),
        ("hog", {"args": {"orientations": 12}}),
        ("hog", {"weights": "random"}),
        ("hog", {"weights": "hog.pth"}),
    ],
)
def test_what_it_has_not_is_refused(name, options):
    with pytest.raises(TeacherError, match="no variants, weights or args, only input_size and pool"):
        create_teacher(name, **options)


def test_weights_may_be_said_to_be_none():
    assert create_teacher("hog", weights="none").spec.identity() == create_teacher("hog").spec.identity()


def test_an_input_size_with_a_rest_of_a_patch_is_refused():
    with pytest.raises(TeacherError, match="input_size 72 is not divisible by its patch size of 16 px; the next is 80"):
        create_teacher("hog", input_size=72)
    assert create_teacher("hog", input_size=72, pool=1).spec.grid == (9, 9)
