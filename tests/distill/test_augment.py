"""Photometric augmentation against torchvision's, one image at a time."""

import dataclasses

import pytest
import torch
import torchvision.transforms.v2.functional as TF

from pipeline.distill.augment import BLUR_SIDE, Draws, apply_draws, augment
from pipeline.distill.config import AugmentConfig

ALL = AugmentConfig(jitter=0.8, grey=0.2, blur=0.5)


@pytest.fixture
def images():
    """Smooth and noisy colours, pure ones among them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 20, 24, generator=generator)
    images[3] = 0.5
    images[4, 1:] = 0
    images[5] = (images[5] > 0.5).float()
    return images


def _neutral(count=6):
    one, nothing = torch.ones(count, 1, 1, 1), torch.zeros(count, 1, 1, 1)
    return Draws(one, one, one, nothing, nothing, nothing)


def _column(*values):
    return torch.tensor(values).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("field", "values", "reference"),
    [
        ("brightness", (0.6, 0.8, 1.0, 1.2, 1.4, 1.3), TF.adjust_brightness),
        ("contrast", (0.6, 0.8, 1.0, 1.2, 1.4, 1.3), TF.adjust_contrast),
        ("saturation", (0.0, 0.8, 1.0, 1.2, 1.4, 2.0), TF.adjust_saturation),
        ("hue", (-0.5, -0.1, 0.05, 0.1, 0.3, 0.5), TF.adjust_hue),
        ("grey", (1.0,) * 6, lambda image, _: TF.rgb_to_grayscale(image, 3)),
        (
            "sigma",
            (0.1, 0.5, 1.0, 1.5, 2.0, 0.7),
            lambda image, sigma: TF.gaussian_blur(image, [BLUR_SIDE] * 2, [sigma] * 2),
        ),
    ],
)
def test_each_operation_is_that_of_torchvision_with_a_draw_of_its_own_for_every_image(images, field, values, reference):
    changed = apply_draws(images, dataclasses.replace(_neutral(), **{field: _column(*values)}))
    expected = torch.stack([reference(image, value) for image, value in zip(images, values, strict=True)])
    torch.testing.assert_close(changed, expected, atol=2e-5, rtol=0)


def test_neutral_draws_change_nothing(images):
    torch.testing.assert_close(apply_draws(images, _neutral()), images, atol=1e-6, rtol=0)


def test_draws_keep_their_ranges_and_probabilities():
    torch.manual_seed(0)
    draws = Draws.of(4000, ALL)
    jittered = draws.brightness != 1
    assert float(jittered.float().mean()) == pytest.approx(0.8, abs=0.03)
    assert float(draws.grey.mean()) == pytest.approx(0.2, abs=0.03)
    assert float((draws.sigma > 0).float().mean()) == pytest.approx(0.5, abs=0.03)
    for name, strength, centre in (
        ("brightness", 0.4, 1),
        ("contrast", 0.4, 1),
        ("saturation", 0.2, 1),
        ("hue", 0.1, 0),
    ):
        values = getattr(draws, name)
        assert torch.equal(values != centre, jittered)
        assert float(values.min()) == pytest.approx(centre - strength, abs=0.01)
        assert float(values.max()) == pytest.approx(centre + strength, abs=0.01)
    assert 0.1 <= float(draws.sigma[draws.sigma > 0].min()) < float(draws.sigma.max()) <= 2


def test_a_seed_decides_what_is_drawn():
    pixels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    images = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        images.append(augment(pixels, ALL))
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    assert (images[0].dtype, images[0].shape) == (torch.uint8, pixels.shape)


def test_autocast_changes_nothing():
    pixels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    images = []
    for enabled in (False, True):
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            images.append(augment(pixels, ALL))
    assert torch.equal(*images)


def test_by_default_the_images_stay_as_they_are():
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert augment(pixels, AugmentConfig()) is pixels
