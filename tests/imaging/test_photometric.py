"""Photometric changes: what they do to pixels, how they are drawn, and that nothing but the values decides the result."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.imaging.crop import crop_and_pad, crop_and_resize
from pipeline.imaging.geometry import FULL, View, ViewPolicy
from pipeline.imaging.photometric import BLUR, UNCHANGED, Photometric, PhotometricPolicy
from pipeline.imaging.recolour import LUMA, change_pixels

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 40, 56), dtype=np.uint8)
ALL = PhotometricPolicy(jitter=0.8, grey=0.2, blur=0.5)


def _luma(pixels):
    return np.tensordot(LUMA, pixels.astype(np.float64), 1)


def test_no_change_gives_the_pixels_themselves():
    assert change_pixels(PIXELS, None) is PIXELS
    assert change_pixels(PIXELS, UNCHANGED) is PIXELS


def test_brightness_multiplies_and_clips():
    changed = change_pixels(PIXELS, UNCHANGED._replace(brightness=1.5))
    assert np.abs(changed - np.clip(1.5 * PIXELS.astype(float), 0, 255)).max() <= 0.55
    assert changed.dtype == np.uint8


def test_contrast_is_relative_to_the_mean_luma():
    soft = PIXELS // 2 + 64
    changed = change_pixels(soft, UNCHANGED._replace(contrast=0.5))
    expected = 0.5 * soft + 0.5 * _luma(soft).mean()
    assert np.abs(changed - expected).max() <= 0.6
    flat = change_pixels(soft, UNCHANGED._replace(contrast=0.0))
    assert np.ptp(flat) == 0


def test_saturation_0_is_grey_and_keeps_the_luma():
    grey = change_pixels(PIXELS, UNCHANGED._replace(saturation=0.0))
    assert np.abs(grey[0].astype(int) - grey[1]).max() == np.abs(grey[0].astype(int) - grey[2]).max() == 0
    assert np.abs(grey[0] - _luma(PIXELS)).max() <= 0.6


def test_the_hue_turns_colours_and_leaves_grey():
    soft = PIXELS // 4 + 96
    turned = change_pixels(soft, UNCHANGED._replace(hue=0.5))
    assert np.abs(_luma(turned) - _luma(soft)).max() <= 1
    opposite = 2 * _luma(soft) - soft  # half a turn mirrors the chroma about the grey axis
    assert np.abs(turned - opposite).max() <= 1
    back = change_pixels(turned, UNCHANGED._replace(hue=-0.5))
    assert np.abs(back.astype(int) - soft).max() <= 1
    grey = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (3, 16, 16))
    assert np.array_equal(change_pixels(grey, UNCHANGED._replace(hue=0.13)), grey)


def test_the_blur_is_a_gaussian_whose_width_follows_the_picture():
    values = UNCHANGED._replace(blur=0.03)
    changed = change_pixels(PIXELS, values)

    def kernel(sigma):
        offsets = torch.arange(-math.ceil(2 * sigma), math.ceil(2 * sigma) + 1)
        weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
        return weights / weights.sum()

    along, down = kernel(0.03 * 56), kernel(0.03 * 40)
    planes = F.pad(
        torch.from_numpy(PIXELS).float()[:, None], (len(along) // 2,) * 2 + (len(down) // 2,) * 2, mode="replicate"
    )
    expected = F.conv2d(F.conv2d(planes, along.view(1, 1, 1, -1)), down.view(1, 1, -1, 1))[:, 0]
    assert np.abs(changed - expected.numpy()).max() <= 1.2


@pytest.mark.parametrize("side", [1, 2, 5])
def test_the_smallest_views_can_be_blurred(side):
    pixels = PIXELS[:, :side, :1]
    assert change_pixels(pixels, UNCHANGED._replace(blur=BLUR[1])).shape == pixels.shape


def test_a_flip_commutes_with_all_changes_and_padding_stays_empty():
    values = Photometric(1.2, 0.7, 1.3, 0.07, 0.05)
    image = np.ascontiguousarray(PIXELS.transpose(1, 2, 0))
    plain = crop_and_resize(image, View(FULL.box, photometric=values), (24, 24), "bicubic")
    mirrored = crop_and_resize(image, View(FULL.box, True, values), (24, 24), "bicubic")
    assert np.array_equal(plain[..., ::-1], mirrored)
    assert np.array_equal(plain, change_pixels(crop_and_resize(image, FULL, (24, 24), "bicubic"), values))
    padded = crop_and_pad(image, View(FULL.box, photometric=values._replace(contrast=0.0)), (28, 28), "bicubic")
    assert not padded[:3, 20:].any()
    assert padded[3].sum() == 20 * 28
    assert padded[:3, :20].any()


def test_pixels_do_not_depend_on_the_order_of_sums():
    """The map in float64, and with threads, gives every level alike: the sums are exact."""
    values = Photometric(1.3, 1.2, 1.4, -0.08, 0.0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = change_pixels(PIXELS, values)
        torch.set_num_threads(2)
        assert np.array_equal(alone, change_pixels(PIXELS, values))
    finally:
        torch.set_num_threads(threads)
    from pipeline.imaging.recolour import _colour_map

    matrix, offset = _colour_map(values, PIXELS)
    exact = np.einsum("ij,jhw->ihw", matrix, PIXELS.astype(np.float64)) + offset
    assert np.array_equal(alone, np.clip(np.round(exact), 0, 255).astype(np.uint8))


def test_values_are_drawn_once_for_an_image_as_often_as_asked():
    drawn = ALL.draw(0, "a", 4000)
    assert drawn[:3] == ALL.draw(0, "a", 3)
    assert drawn[:3] != ALL.draw(1, "a", 3)
    assert drawn[:3] != ALL.draw(0, "b", 3)
    values = np.array(drawn)
    assert np.array_equal(values, values.astype(np.float32))
    columns = dict(zip(Photometric._fields, values.T, strict=True))
    grey = columns["saturation"] == 0
    assert abs(grey.mean() - 0.2) < 0.03
    assert abs((columns["blur"] > 0).mean() - 0.5) < 0.03
    assert abs((columns["brightness"] != 1).mean() - 0.8) < 0.03
    for name, change in (("brightness", 0.4), ("contrast", 0.4)):
        assert 1 - change <= columns[name].min() < columns[name].max() <= 1 + change
    assert 0.8 <= columns["saturation"][~grey].min() < columns["saturation"].max() <= 1.2
    assert -0.1 <= columns["hue"].min() < 0 < columns["hue"].max() <= 0.1
    assert BLUR[0] <= columns["blur"][columns["blur"] > 0].min() < columns["blur"].max() <= BLUR[1]


def test_boxes_do_not_depend_on_the_changes():
    plain, changed = ViewPolicy(crops=3, seed=2), ViewPolicy(crops=3, seed=2, photometric=ALL)
    views = changed.views("x", 60, 40)
    assert [(view.box, view.flip) for view in views] == [(view.box, view.flip) for view in plain.views("x", 60, 40)]
    assert all(view.photometric for view in views)
    assert len({plain.id, changed.id, ViewPolicy(crops=3, seed=2, photometric=PhotometricPolicy(blur=0.5)).id}) == 3


def test_a_policy_without_changes_has_the_name_that_it_always_had():
    policy = ViewPolicy(crops=2, min_area=0.3, seed=3)
    assert policy.id == "crops2-5fe8d65b"  # as it was before colours could change
