import io
import time
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from skimage.feature import hog

from pipeline.errors import UserError
from pipeline.imaging.decode import decode_image
from pipeline.sources.open import open_source
from pipeline.sources.sample_scenes import SEGMENTATION_CLASSES, SampleScenes, SceneSettings


def test_open_source_gives_scenes_by_the_settings() -> None:
    source = open_source("samples", split="val", samples=SceneSettings(count=30, size=64, seed=3))
    assert source.name == "samples-val-n30-s64-seed3"
    assert len(source.classes) == 10
    index = source.index()
    assert index["sample_id"].to_pylist()[-1] == "scene-00000029"
    assert index["label"].value_counts().field("counts").to_pylist() == [3] * 10


def test_scenes_have_one_version_as_long_as_they_look_the_same() -> None:
    first = SampleScenes("train", 5)
    alike, others = SampleScenes("train", 50), (("val", 5, 96, 0), ("train", 5, 64, 0), ("train", 5, 96, 1))
    (version,) = set(first.index()["version"].to_pylist())
    assert set(alike.index()["version"].to_pylist()) == {version}
    assert len({version, *(SampleScenes(*other).index()["version"][0].as_py() for other in others)}) == 4


def test_a_scene_depends_on_seed_split_and_number_alone() -> None:
    short, long = SampleScenes("train", 5), SampleScenes("train", 50)
    assert np.array_equal(short.scene(3).image, long.scene(3).image)
    for other in (SampleScenes("val", 5), SampleScenes("train", 5, seed=1)):
        assert not np.array_equal(short.scene(3).image, other.scene(3).image)


def test_pixels_are_the_same_on_every_machine() -> None:
    image = SampleScenes("train", 5).scene(3).image
    assert image[::24, ::24].sum(-1).tolist() == [
        [281, 261, 249, 254],
        [333, 276, 71, 270],
        [334, 344, 132, 109],
        [406, 349, 218, 355],
    ]


def test_read_gives_exactly_the_scene() -> None:
    source = SampleScenes("train", 4, size=48)
    rows = source.index().take([3, 1])
    for number, data in zip((3, 1), source.read(rows), strict=True):
        assert isinstance(data, bytes)
        assert Image.open(io.BytesIO(data)).format == "PNG"
        assert np.array_equal(np.asarray(decode_image(data)), source.scene(number).image)


@pytest.mark.parametrize("size", [32, 96, 130])
def test_annotations_agree_with_each_other(size: int) -> None:
    source = SampleScenes("train", 40, size=size)
    labels = source.index()["label"].to_pylist()
    for number in range(40):
        scene = source.scene(number)
        assert scene.image.shape == (size, size, 3)
        assert scene.image.dtype == scene.semantic.dtype == np.uint8
        assert scene.boxes.dtype == np.float32
        assert scene.classes.dtype == np.int64
        assert scene.label == labels[number] == scene.classes[0]
        areas = scene.masks.sum((1, 2))
        assert areas.argmax() == 0
        assert areas[0] > 2 * areas[1:].max(initial=0)
        assert areas.min() >= size * size / 400
        assert scene.masks.sum(0).max() == 1
        painted = np.einsum("nhw,n->hw", scene.masks, scene.classes + 1)
        assert np.array_equal(scene.semantic, painted)
        assert scene.semantic.max() < len(SEGMENTATION_CLASSES)
        for mask, box in zip(scene.masks, scene.boxes, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize(
    ("settings", "named"),
    [((0, 96, 0), r"data\.samples\.val=0"), ((10, 16, 0), r"data\.samples\.size=16"), ((10, 96, -1), "seed=-1")],
)
def test_impossible_settings_are_named(settings: tuple[int, int, int], named: str) -> None:
    with pytest.raises(UserError, match=named):
        SampleScenes("val", *settings)


def knn_accuracy(bank: np.ndarray, queries: np.ndarray, labels: tuple[np.ndarray, np.ndarray]) -> float:
    """Weighted kNN (k=20, temperature 0.07) on cosine similarity."""
    bank, queries = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (bank, queries))
    similarity = queries @ bank.T
    nearest = np.argsort(-similarity, 1)[:, :20]
    weights = np.exp(np.take_along_axis(similarity, nearest, 1) / 0.07)
    votes = np.stack([(weights * (labels[0][nearest] == label)).sum(1) for label in range(10)], 1)
    return float((votes.argmax(1) == labels[1]).mean())


@pytest.mark.slow
def test_shape_tells_the_class_and_colour_does_not() -> None:
    start = time.process_time()
    scenes = [
        [SampleScenes(split, count).scene(i) for i in range(count)] for split, count in (("train", 800), ("val", 200))
    ]
    assert 1000 / (time.process_time() - start) > 60
    labels = tuple(np.array([scene.label for scene in part]) for part in scenes)

    def colours(image: np.ndarray) -> np.ndarray:
        return np.concatenate([np.histogram(image[..., channel], 16, (0, 256))[0] for channel in range(3)])

    def shape(image: np.ndarray) -> np.ndarray:
        return hog(image, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2), channel_axis=-1)

    def accuracy(describe: Callable[[np.ndarray], np.ndarray]) -> float:
        bank, queries = ([describe(scene.image) for scene in part] for part in scenes)
        return knn_accuracy(np.stack(bank), np.stack(queries), labels)  # type: ignore[arg-type]

    assert accuracy(colours) < 0.2
    assert accuracy(shape) > 0.65
