"""Masks in ADE20K's layout, and what is wrong with them named before anything is computed."""

import re

import fsspec
import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.sources.label_maps import IGNORE, open_label_maps
from pipeline.sources.open import open_source
from pipeline.sources.sample_scenes import SampleScenes

VALUES = np.array([[0, 1, 150], [2, 2, 0]], np.uint8)


@pytest.fixture
def layout(tmp_path):
    """Write images and masks; gives the label maps of the images' folder."""

    def write(masks="annotations", mask=None, turned=False, mode=None):
        images = tmp_path / "ade/images/training"
        for folder in (images, tmp_path / "ade" / masks / "training"):
            folder.mkdir(parents=True)
        for number in range(2):
            image = Image.new("RGB", (2, 3) if turned else (3, 2))
            exif = image.getexif()
            exif[0x0112] = 6 if turned else 1
            image.save(images / f"photo{number}.jpg", exif=exif)
            values = Image.fromarray(VALUES if mask is None or number == 0 else mask)
            values = values.convert(mode) if mode and number else values
            values.save(tmp_path / "ade" / masks / "training" / f"photo{number}.png")
        return opened(images)

    def opened(folder):
        source = open_source(str(folder), split="train")
        return open_label_maps(source, source.index()["sample_id"].to_pylist())

    write.opened = opened
    return write


@pytest.mark.parametrize("masks", ["annotations", "masks"])
def test_zero_is_ignored_and_classes_count_from_one(layout, masks):
    maps = layout(masks)
    assert maps.read("photo1.jpg").tolist() == [[IGNORE, 0, 149], [1, 1, IGNORE]]
    assert maps.check() == 150


def test_255_is_ignored_as_in_fine_tuning(layout):
    maps = layout(mask=np.array([[255, 1, 0], [2, 255, 255]], np.uint8))
    assert maps.read("photo1.jpg").tolist() == [[IGNORE, 0, IGNORE], [1, IGNORE, IGNORE]]
    assert maps.check() == 150


def test_an_image_turned_by_exif_has_an_upright_mask(layout):
    assert layout(turned=True).check() == 150


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mask": np.ones((4, 6), np.uint8)}, "photo1.png: the mask is 6x4 pixels, its image 3x2"),
        ({"mode": "RGB"}, "photo1.png: no readable mask"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(layout, options, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        layout(**options).check()


def test_a_missing_or_broken_mask_is_named(layout, tmp_path):
    maps, mask = layout(), tmp_path / "ade/annotations/training/photo1.png"
    mask.write_bytes(mask.read_bytes()[:20])
    with pytest.raises(UserError, match=r"photo1.png: no readable mask of .*photo1.jpg"):
        maps.check()
    mask.unlink()
    with pytest.raises(UserError, match=r"photo1.png: no readable mask of .*photo1.jpg"):
        maps.check()


def test_folders_that_cannot_have_masks_are_refused_with_the_layout(layout, tmp_path):
    layout()
    (tmp_path / "ade/annotations").rename(tmp_path / "ade/labels")
    with pytest.raises(UserError, match=r"ade/images/training: found no label maps; .*annotations"):
        layout.opened(tmp_path / "ade/images/training")
    (tmp_path / "ade/images").rename(tmp_path / "ade/photos")
    with pytest.raises(UserError, match="ade20k/images/training and ade20k/annotations/training"):
        layout.opened(tmp_path / "ade/photos/training")


def test_masks_without_any_class_are_refused(layout, tmp_path):
    maps = layout()
    for mask in (tmp_path / "ade/annotations/training").iterdir():
        Image.fromarray(VALUES * 0).save(mask)
    with pytest.raises(UserError, match="every pixel is 0 or 255"):
        maps.check()


def test_generated_scenes_bring_their_own():
    source = SampleScenes("train", 3, 32)
    maps = open_label_maps(source, [])
    assert maps.check() == 11
    assert np.array_equal(maps.read("scene-00000002"), source.scene(2).semantic)


def test_real_photographs_in_this_layout(shared_data):
    folder = shared_data / "seg_mini/ade150/images/val"
    source = open_source(str(folder), split="val")
    maps = open_label_maps(source, source.index()["sample_id"].to_pylist())
    assert maps.check() <= 150


def test_label_maps_of_a_store_are_those_of_a_folder(layout, tmp_path):
    local = layout()
    system = fsspec.filesystem("memory")
    system.put(str(tmp_path / "ade"), "/ade", recursive=True)
    try:
        maps = layout.opened("memory://ade/images/training")
        assert maps.check() == local.check()
        assert np.array_equal(maps.read("photo1.jpg"), local.read("photo1.jpg"))
        system.rm("/ade/annotations/training/photo1.png")
        with pytest.raises(
            UserError, match=r"^memory://ade/annotations/training/photo1.png: no readable mask of memory://ade"
        ):
            maps.read("photo1.jpg")
    finally:
        system.rm("/ade", recursive=True)
