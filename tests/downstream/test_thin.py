"""Images of an extreme ratio of sides: nothing is resized to more than is used."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import _geometry

from pipeline.downstream.backbone import find_start
from pipeline.downstream.base import make_task
from pipeline.downstream.pictures import MOST_SIDE, enlarge
from pipeline.downstream.segment.classes import IGNORE
from pipeline.downstream.training import FinetuneTask
from pipeline.imaging.crop import THIN, is_thin, resized_centre
from tests.downstream.drawings import locations, write_set

SIZES = [(1, 3000), (3000, 1), (3, 100), (100, 3), (7, 300), (300, 7), (20, 1), (300, 200), (64, 64), (33, 90)]
LARGEST = 1 << 24
"""Pixels of the largest picture that may be made of a thin image of 65,000 pixels."""


def noise(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def resized(monkeypatch):
    """Sizes in pixels of all that Pillow and torchvision resize."""
    sizes, pillow, tensor = [], Image.Image.resize, torch.nn.functional.interpolate

    def resize(self, size, *arguments, **settings):
        sizes.append(math.prod(size))
        return pillow(self, size, *arguments, **settings)

    def interpolate(*arguments, **settings):
        made = tensor(*arguments, **settings)
        sizes.append(made.shape[-1] * made.shape[-2])
        return made

    monkeypatch.setattr(Image.Image, "resize", resize)
    for module in (torch.nn.functional, _geometry):
        monkeypatch.setattr(module, "interpolate", interpolate)
    return sizes


@pytest.mark.parametrize("sides", SIZES, ids=str)
@pytest.mark.parametrize("share", [0.875, 0.95, 1.0])
def test_the_centre_is_that_of_the_whole_image_resized(sides, share):
    image, size = noise(*sides), 32
    short = math.floor(size / share)
    whole = v2.CenterCrop(size)(v2.Resize(short, v2.InterpolationMode.BICUBIC)(image))
    difference = np.asarray(resized_centre(image, short, size), int) - np.asarray(whole, int)
    assert np.abs(difference).max() <= 2


@pytest.mark.parametrize("sides", [(1, 65_000), (65_000, 1)], ids=str)
def test_no_task_resizes_a_thin_image_to_a_huge_one(make_job, resized, sides):
    pixels = v2.functional.pil_to_tensor(noise(*sides))
    for name in ("classify", "segment", "detect"):
        config = make_job(name).config
        task, encoder = make_task(config), find_start(config).encoder
        model = task.build(encoder, ("a", "b")).eval()
        ((result),) = task.predict(model, [pixels], ("a", "b"))
        shown = task.draw(pixels, result, ("a", "b"))
        assert shown.shape[-1] * shown.shape[-2] < LARGEST, name
    assert max(resized) < LARGEST


def test_ordinary_images_are_prepared_by_timm_alone(make_job, monkeypatch):
    monkeypatch.setattr("pipeline.downstream.classify.task.resized_centre", None)
    steps = make_task(make_job("classify").config).held_out_transform()
    assert steps(noise(THIN * 10, 10)).shape[-1] == steps(noise(30, 20)).shape[-1]
    with pytest.raises(TypeError):
        steps(noise(THIN * 10 + 1, 10))


def test_training_on_label_maps_crops_a_part_of_a_thin_image_first(make_job, resized):
    augment = make_task(make_job("segment").config).training_transform()
    image = tv_tensors.Image(torch.randint(0, 256, (3, 2, 30_000), dtype=torch.uint8))
    mask = tv_tensors.Mask(torch.arange(30_000).repeat(2, 1) % 200)
    pixels, labels = augment(image, mask)
    assert pixels.shape[1:] == labels.shape
    assert (labels != IGNORE).any()
    assert max(resized) < 1 << 20


def make_thin(folder, width, height):
    """Replace half of the drawings of a set by images of this size that one object fills."""
    file = folder / "annotations/instances_train.json"
    dataset = json.loads(file.read_text())
    for image, entry in list(zip(dataset["images"], dataset["annotations"], strict=True))[::2]:
        image |= {"width": width, "height": height}
        entry |= {"bbox": [0, 0, width, height], "area": width * height}
        entry["segmentation"] = {"size": [height, width], "counts": [0, width * height]}
        for path in folder.rglob(image["file_name"]):
            mode = "L" if "masks" in path.parts else "RGB"
            Image.new(mode, (width, height), 1).save(path)
    file.write_text(json.dumps(dataset))


@pytest.mark.parametrize("sides", [(1, 20_000), (20_000, 1), (3, 144), (144, 3)], ids=str)
@pytest.mark.parametrize("task", ["classify", "segment", "detect"])
def test_tasks_train_and_evaluate_on_thin_images(make_job, tmp_path, task, sides):
    for part in ("set", "set/held-out"):
        write_set(tmp_path / part, 4)
        make_thin(tmp_path / part, *sides)
    job = make_job(task, *locations(tmp_path / "set", task))
    trained = FinetuneTask(job)
    batch = next(iter(trained.batches(0, 0)))
    loss, _ = trained.loss(trained.module.train(), batch, torch.device("cpu"))
    loss.backward()
    assert loss.isfinite()
    assert all(math.isfinite(value) for value in trained.evaluate(trained.module.eval(), None).values())


def test_pictures_of_thin_images_are_not_enlarged_without_bound():
    assert enlarge(torch.zeros(3, 1, 65_000, dtype=torch.uint8)).shape == (3, 1, 65_000)
    assert max(enlarge(torch.zeros(3, 3, 500, dtype=torch.uint8)).shape) <= MOST_SIDE
    assert enlarge(torch.zeros(3, 100, 100, dtype=torch.uint8)).shape == (3, 300, 300)


@pytest.mark.parametrize(("sides", "thin"), [((10, 100), False), ((10, 101), True), ((101, 10), True), ((1, 1), False)])
def test_thin(sides, thin):
    assert is_thin(Image.new("RGB", sides)) is thin
