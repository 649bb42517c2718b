import json

import pytest

from pipeline.cache.fill.build import plan_cache
from pipeline.cache.layout.dataset import create_dataset, plan_dataset
from pipeline.errors import UserError
from pipeline.imaging.geometry import WHOLE
from pipeline.sources.open import open_source
from pipeline.storage.store import Store
from tests.fakes import write_photos


@pytest.fixture
def photos(tmp_path):
    write_photos(tmp_path / "photos", 30)
    return tmp_path / "photos"


def _plan(tmp_path, photos, shard_size=7, name=None):
    source = open_source(str(photos), split="train")
    return plan_dataset(Store.at(tmp_path / "cache"), source, name or source.name, shard_size, WHOLE)


def test_planning_writes_nothing(tmp_path, photos):
    _plan(tmp_path, photos)
    assert not (tmp_path / "cache").exists()


def test_shards_cut_the_index_without_loss_and_mix_the_classes(tmp_path, photos):
    dataset, index = _plan(tmp_path, photos)
    create_dataset(dataset, index)
    assert dataset.shards == 5
    parts = [dataset.shard_index(shard) for shard in range(5)]
    assert [part.num_rows for part in parts] == [7, 7, 7, 7, 2] == [dataset.shard_rows(s) for s in range(5)]
    ids = [sample for part in parts for sample in part["sample_id"].to_pylist()]
    assert sorted(ids) == sorted(f"class{n % 3}/photo{n:03d}.jpg" for n in range(30))
    assert all(len(set(part["label"].to_pylist())) > 1 for part in parts[:4])


def test_the_same_source_is_the_same_dataset_and_keeps_its_shard_size(tmp_path, photos):
    dataset, index = _plan(tmp_path, photos)
    create_dataset(dataset, index)
    again, _ = _plan(tmp_path, photos, shard_size=1000)
    assert again == dataset
    assert json.loads(dataset.store.get("dataset.json"))["shard_size"] == 7


def test_a_cache_made_for_other_data_is_refused_with_the_remedy(tmp_path, photos):
    dataset, index = _plan(tmp_path, photos)
    create_dataset(dataset, index)
    (photos / "class0/photo000.jpg").unlink()
    with pytest.raises(UserError) as error:
        _plan(tmp_path, photos)
    assert f"cache {dataset.store.uri} was made for other data: 30 images" in str(error.value)
    assert "now gives 29" in str(error.value)
    assert "data.name" in str(error.value)
    other, _ = _plan(tmp_path, photos, name="second")
    assert other.count == 29


def test_data_name_names_the_datasets(tmp_path, photo_config):
    plan = plan_cache(photo_config("data.name=pets"), Store.at(tmp_path / "cache"))
    assert [split.dataset.id.rsplit("-", 1)[0] for split in plan.splits] == ["pets-train", "pets-val"]


def test_a_newer_cache_format_is_refused(tmp_path, photos):
    dataset, index = _plan(tmp_path, photos)
    create_dataset(dataset, index)
    meta = json.loads(dataset.store.get("dataset.json"))
    dataset.store.put("dataset.json", json.dumps({**meta, "format": 99}).encode())
    with pytest.raises(UserError, match="cache format 99"):
        _plan(tmp_path, photos)


def test_a_teacher_listed_twice_is_refused(tmp_path, photo_config):
    config = photo_config("teachers=['tests.fakes:colours', 'tests.fakes:colours']")
    with pytest.raises(UserError, match="listed 2 times"):
        plan_cache(config, Store.at(tmp_path / "cache"))
