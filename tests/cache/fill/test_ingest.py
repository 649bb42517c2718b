import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cache.fill.build import build_cache, plan_cache
from pipeline.cache.fill.ingest import check_quarantine
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


def test_bad_images_are_quarantined_by_name_and_the_rest_goes_on(damaged):
    plan, names = damaged
    fill_in_process(plan)
    dataset = plan.split("train").dataset
    records = dataset.images.records().values()
    bad = check_quarantine(dataset, records, 0.05)
    assert {sample["sample_id"] for sample in bad} == names
    assert all(sample["reason"] for sample in bad)
    assert sum(record.rows for record in records) == 147
    assert sum(record.rows for record in dataset.teacher(plan.teachers[0].id).records().values()) == 147


def test_more_than_the_threshold_stops_with_the_list(damaged):
    plan, names = damaged
    fill_in_process(plan)
    dataset = plan.split("train").dataset
    with pytest.raises(UserError, match=r"3 of 150 images .*data\.max_bad=0\.01") as error:
        check_quarantine(dataset, dataset.images.records().values(), 0.01)
    assert all(name in str(error.value) for name in names)


def test_the_cache_keeps_the_source_bytes_as_they_are(filled):
    images = filled.train.images
    rows = images.read(images.records()[0], ["sample_id", "image", "label"]).to_pylist()
    for row in rows:
        assert row["image"] == Path(filled.config.data.train, row["sample_id"]).read_bytes()
        assert row["label"] == int(row["sample_id"][5])


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
