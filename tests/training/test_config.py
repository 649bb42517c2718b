"""What a plan says about the training."""

import logging

import pytest

from pipeline.training.config import TrainConfig


@pytest.mark.parametrize(
    ("images", "batch", "line", "remedy"),
    [
        (300, 256, "5 epochs of 1 steps of 256 images; 44 images, others in every epoch, fill no batch", 16),
        (300, 16, "5 epochs of 18 steps of 16 images; 12 images, others in every epoch, fill no batch", None),
        (640, 64, "5 epochs of 10 steps of 64 images", None),
        (639, 64, "5 epochs of 9 steps of 64 images; 63 images, others in every epoch, fill no batch", 32),
        (20, 16, "5 epochs of 1 steps of 16 images; 4 images, others in every epoch, fill no batch", 2),
    ],
)
def test_a_plan_says_what_fills_no_batch_and_warns_of_short_epochs(images, batch, line, remedy, caplog):
    with caplog.at_level(logging.WARNING):
        assert TrainConfig(epochs=5, batch_size=batch).describe_epochs(images, images // batch) == line
    assert (f"set train.batch_size={remedy}, or" in caplog.text) if remedy else not caplog.records
    if remedy:
        assert images // remedy >= 10


def test_steps_that_do_not_follow_from_the_images_leave_none_out():
    assert TrainConfig(epochs=2, batch_size=8).describe_epochs(100, 500) == "2 epochs of 500 steps of 8 images"


@pytest.mark.parametrize(
    ("images", "workers", "expected"),
    [(100_000, 0, 256), (5120, 0, 256), (5119, 0, 128), (1000, 0, 32), (300, 0, 16), (40, 0, 16), (300, 3, 18)],
)
def test_few_images_have_small_batches_unless_a_size_is_given(images, workers, expected):
    assert TrainConfig(workers=workers).for_images(images).batch_size == expected
    assert TrainConfig(batch_size=64).for_images(images).batch_size == 64


def test_a_batch_of_one_image_is_refused():
    with pytest.raises(ValueError, match="2 or more, or 0 for a size that suits the data, not 1"):
        TrainConfig(batch_size=1)
