import numpy as np
import pytest
from PIL import Image

from pipeline.imaging.crop import crop_and_pad, crop_and_resize
from pipeline.imaging.geometry import FULL, View
from teachers.base import Interpolation
from tests.imaging.pictures import photo, planes


def test_full_view_at_its_own_size_is_the_image() -> None:
    assert np.array_equal(crop_and_resize(photo(), FULL, (64, 64), "bicubic"), planes(photo()))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_box_is_cut_from_the_original_pixels_and_resized_once(interpolation: Interpolation) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    got = crop_and_resize(image, View((0.1, 0.2, 0.75, 0.95)), (40, 56), interpolation)
    method = Image.Resampling[interpolation.upper()]
    expected = planes(image.crop((12, 18, 90, 86)).resize((56, 40), method))  # 85.5 goes to the even 86
    assert got.shape == (3, 40, 56)
    assert got.dtype == np.uint8
    assert np.abs(got.astype(int) - expected).max() <= 1
    assert np.array_equal(crop_and_resize(np.array(image), View((0.1, 0.2, 0.75, 0.95)), (40, 56), interpolation), got)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 300)])
def test_a_box_smaller_than_a_pixel_yields_one_pixel(size: tuple[int, int]) -> None:
    image = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(*size, 3)
    for box in ((0.0, 0.0, 0.001, 0.001), (0.999, 0.999, 1.0, 1.0), (0.4, 0.4, 0.401, 0.401)):
        assert crop_and_resize(image, View(box), (4, 4), "bicubic").shape == (3, 4, 4)
    assert np.array_equal(
        crop_and_resize(image, View((0.999, 0.999, 1.0, 1.0)), (1, 1), "bilinear")[:, 0, 0], image[-1, -1]
    )


def test_flip_mirrors_the_view() -> None:
    box = (0.25, 0.0, 1.0, 0.5)
    plain = crop_and_resize(photo(), View(box), (24, 32), "bicubic")
    flipped = crop_and_resize(photo(), View(box, flip=True), (24, 32), "bicubic")
    assert np.array_equal(flipped, plain[:, :, ::-1])
    assert flipped.flags.c_contiguous


@pytest.mark.parametrize(
    ("size", "box", "kept"),
    [
        ((300, 100), FULL.box, (64, 21)),  # 21.3
        ((100, 120), FULL.box, (53, 64)),
        ((90, 90), FULL.box, (64, 64)),
        ((40, 30), FULL.box, (64, 48)),
        ((120, 90), (0.25, 0.0, 0.75, 1.0), (43, 64)),  # 42.7
        ((5000, 2), FULL.box, (64, 1)),
    ],
    ids=["wide", "tall", "square", "enlarged", "crop", "thin"],
)
@pytest.mark.parametrize("flip", [False, True])
def test_a_padded_view_keeps_its_ratio_and_says_where_it_lies(
    size: tuple[int, int], box: tuple[float, float, float, float], kept: tuple[int, int], flip: bool
) -> None:
    """As `ResizeLongestSide` of SAM's authors, with Pillow."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    got = crop_and_pad(image, View(box, flip), (64, 64), "bilinear")
    cut = image.crop(tuple(round(share * size[axis % 2]) for axis, share in enumerate(box)))
    expected = planes(cut.resize(kept, Image.Resampling.BILINEAR))[:, :, :: -1 if flip else 1]
    width, height = kept
    assert (got.shape, got.dtype) == ((4, 64, 64), np.uint8)
    assert np.abs(got[:3, :height, :width].astype(int) - expected).max() <= 1
    assert got[3, :height, :width].min() == 1
    assert got.sum() == got[:, :height, :width].sum()


def test_a_square_view_is_the_same_padded_or_squashed() -> None:
    view = View((0.25, 0.0, 0.75, 0.5), flip=True)
    padded = crop_and_pad(photo(), view, (48, 48), "bicubic")
    assert np.array_equal(padded[:3], crop_and_resize(photo(), view, (48, 48), "bicubic"))
    assert padded[3].min() == 1
