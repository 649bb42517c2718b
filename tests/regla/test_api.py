"""The jobs as functions: arrays and paths in, a student and its metrics out."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import regla
from pipeline.distill.config import DistillJobConfig
from regla.api import _configure
from regla.images import locate
from tests.fakes import write_photos


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40, 48, 3), dtype=np.uint8) for _ in range(6)]


def test_arrays_and_files_become_one_parquet_file_that_is_written_once(tmp_path, arrays):
    write_photos(tmp_path / "photos", 1)
    photo = tmp_path / "photos/class0/photo000.jpg"
    images = [*arrays, Image.fromarray(arrays[0]), photo, str(photo)]
    file = locate(images, tmp_path / "work")
    before = (tmp_path / "work").stat().st_mtime_ns
    assert locate(images, tmp_path / "work") == file
    assert (tmp_path / "work").stat().st_mtime_ns == before
    assert locate(arrays, tmp_path / "work") != file
    stored = pq.read_table(file)["image"].to_pylist()
    assert stored[-2:] == [photo.read_bytes()] * 2
    assert stored[0] == stored[6]


def test_a_folder_is_its_own_location(tmp_path):
    assert locate(tmp_path / "photos", tmp_path / "work") == str(tmp_path / "photos")
    assert not (tmp_path / "work").exists()


def test_what_is_no_image_is_named(tmp_path, arrays):
    with pytest.raises(regla.UserError, match="RGB uint8"):
        regla.write_images([arrays[0][..., 0]], tmp_path / "x.parquet")
    with pytest.raises(regla.UserError, match=r"nowhere\.jpg: No such file"):
        regla.write_images(["nowhere.jpg"], tmp_path / "x.parquet")
    with pytest.raises(regla.UserError, match="2 labels for 6 images"):
        regla.write_images(arrays, tmp_path / "x.parquet", [0, 1])


def test_an_evaluation_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(
        regla.UserError, match=r"choose one of knn, linear, seg-probe, zero-shot, retrieval, promptable$"
    ):
        regla.evaluate("guess")


def test_fields_are_nested_or_dotted_and_go_before_the_recipe(tmp_path):
    fields = {"work": str(tmp_path), "train": {"epochs": 3}, "student.input_size": 64}
    config = _configure(DistillJobConfig, "quickstart.yaml", "photos.yaml", tmp_path / "photos", None, fields)
    assert (config.train.epochs, config.student.input_size, config.data.train) == (3, 64, str(tmp_path / "photos"))
    plain = _configure(DistillJobConfig, "photos.yaml", None, None, None, {"work": tmp_path})
    assert config.train.batch_size == plain.train.batch_size
    tree = {"train.epochs": 7, "teachers": ["hog"]}
    assert _configure(DistillJobConfig, "quickstart.yaml", tree, None, None, {}).train.epochs == 7
    with pytest.raises(regla.UserError, match=r"did you mean train\.epochs"):
        _configure(DistillJobConfig, "quickstart.yaml", None, None, None, {"train": {"epoch": 3}})


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_arrays_are_distilled_in_five_lines(tmp_path, arrays):
    images = regla.write_images(arrays * 8, tmp_path / "train.parquet", [0, 1] * 24)
    held_out = regla.write_images(arrays[::-1], tmp_path / "val.parquet", [0, 1] * 3)
    small = {"student": {"name": "regla_t", "input_size": 32}, "cache.shard_size": 24, "work": str(tmp_path / "work")}
    small |= {"teachers": [{"model": "hog", "input_size": 32}], "images": images, "held_out": held_out}
    # The six images occur eight times, and once more in the other file: a teacher sees each once.
    assert regla.precompute(**small)["shards_computed"] == 1
    trained = regla.distill(train={"epochs": 1, "batch_size": 24}, **small)
    assert 0 <= trained.metrics["knn_after"] <= 100
    assert trained.model_uri == "models:/quickstart-student/1"
    assert len(trained.load().features(arrays)) == len(arrays)
    assert 0 <= regla.evaluate("knn", evaluate={"student": trained.folder}, **small)["knn"] <= 100
