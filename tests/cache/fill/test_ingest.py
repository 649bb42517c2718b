import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cache.fill.build import build_cache
from pipeline.cache.fill.ingest import check_quarantine
from pipeline.cache.fill.plan import plan_cache
from pipeline.cache.layout.part import image_key
from pipeline.errors import UserError
from pipeline.storage.store import Store
from tests.fakes import corrupt, fill_in_process, truncate, without_ray


@pytest.fixture
def damaged(tmp_path, photo_config):
    """150 training photos: one cut short, one with a damaged scan, one that is no image."""
    config = photo_config()
    photos = sorted(Path(config.data.train).rglob("*.jpg"))
    truncate(photos[5])
    corrupt(photos[70])
    photos[149].write_bytes(b"not an image at all")
    plan = plan_cache(config, Store.at(tmp_path / "cache"))
    names = {photo.relative_to(config.data.train).as_posix() for photo in (photos[5], photos[70], photos[149])}
    return plan, names


def test_a_bad_image_is_read_once_until_its_file_changes(tmp_path, photo_config, damaged):
    plan, names = damaged
    photos, store = Path(plan.split("train").dataset.location), plan.store
    fill_in_process(plan)
    assert plan_cache(photo_config(), store).split("train").new.num_rows == 0
    good = sorted(photos.rglob("*.jpg"))[0].read_bytes()
    repaired = sorted(names)[0]
    (photos / repaired).write_bytes(good)
    again = plan_cache(photo_config(), store)
    assert again.split("train").new["sample_id"].to_pylist() == [repaired]
    dataset = fill_in_process(again)[0].split("train").dataset
    assert {*dataset.bad_samples()["sample_id"].to_pylist()} == names - {repaired}
    assert dataset.count == 148


def test_a_file_that_cannot_be_read_is_tried_again_in_a_folder_that_has_not_changed(tmp_path, damaged, photo_config):
    plan, names = damaged
    photos = Path(plan.split("train").dataset.location)
    link = photos / "class0/link.jpg"
    link.symlink_to(tmp_path / "later.jpg")
    fill_in_process(plan_cache(photo_config(), plan.store))
    again = plan_cache(photo_config(), plan.store).split("train")
    assert again.new["sample_id"].to_pylist() == ["class0/link.jpg"]
    assert {*again.listing.bad["sample_id"].to_pylist()} == names
    shutil.copy(photos / sorted(names)[0], link)  # the digest differs again
    assert plan_cache(photo_config(), plan.store).split("train").new["version"].to_pylist() != [0]


def test_bad_images_are_quarantined_by_name_and_the_rest_goes_on(damaged):
    plan, names = damaged
    filled, _ = fill_in_process(plan)
    dataset = filled.split("train").dataset
    bad = check_quarantine(dataset, dataset.bad_samples(), 0.05)
    assert {sample["sample_id"] for sample in bad} == names
    assert all(sample["reason"] for sample in bad)
    assert dataset.count == 147
    assert sum(record.rows for part in dataset.parts for record in part.images.records().values()) == 147
    assert sum(record.rows for _, record in dataset.records(plan.teachers[0].id)) == 147


def test_more_than_the_threshold_stops_with_the_list(damaged):
    plan, names = damaged
    dataset = fill_in_process(plan)[0].split("train").dataset
    with pytest.raises(UserError, match=r"3 of 150 images .*data\.max_bad=0\.01") as error:
        check_quarantine(dataset, dataset.bad_samples(), 0.01)
    assert all(name in str(error.value) for name in names)


def test_the_cache_keeps_the_source_bytes_as_they_are(filled):
    (part,) = filled.train.parts
    images = part.images.read(part.images.records()[0], ["key", "image"]).to_pylist()
    samples = filled.train.samples(0).to_pylist()[: len(images)]
    for image, sample in zip(images, samples, strict=True):
        data = Path(filled.config.data.train, sample["sample_id"]).read_bytes()
        assert image == {"key": image_key(data), "image": data}
        assert sample["key"] == image["key"]
        assert sample["label"] == int(sample["sample_id"][5])


def test_indexing_loads_no_torch():
    code = "import sys, pipeline.cache.fill.ingest; print(sorted({'torch', 'mlflow', 'timm'} & sys.modules.keys()))"
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_a_source_without_one_image_that_can_be_read_is_refused(tmp_path, photo_config, monkeypatch):
    config = photo_config("data.max_bad=1", "cache.codec=pca-int8-zstd")
    for photo in (tmp_path / "photos/train").rglob("*.jpg"):
        photo.write_bytes(b"no image")
    without_ray(monkeypatch)
    with pytest.raises(UserError, match=r"photos/train: none of the images can be read"):
        build_cache(plan_cache(config, Store.at(tmp_path / "cache")), config)
