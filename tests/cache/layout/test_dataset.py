from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.cache.fill.build import BuildReport, read_images
from pipeline.cache.fill.plan import plan_cache
from pipeline.cache.layout.keys import sealed, unsealed
from pipeline.errors import UserError
from pipeline.storage.store import Store
from tests.fakes import without_ray


@pytest.fixture
def make_plan(tmp_path, photo_config):
    """Plans a cache in shards of this many images."""
    return lambda *overrides: plan_cache(photo_config("cache.shard_size=7", *overrides), Store.at(tmp_path / "cache"))


def _read(plan, monkeypatch):
    """The data set of the training images, once all images are read."""
    without_ray(monkeypatch)
    return read_images(plan.splits, plan.shard_size, BuildReport())[0].dataset


def test_planning_writes_nothing(tmp_path, make_plan):
    plan = make_plan()
    assert [split.new.num_rows for split in plan.splits] == [150, 40]
    assert not (tmp_path / "cache").exists()


def test_shards_cut_the_images_without_loss_and_mix_the_classes(make_plan, monkeypatch):
    dataset = _read(make_plan(), monkeypatch)
    (part,) = dataset.parts
    assert [part.shard_rows(shard) for _, shard in dataset.shards] == [7] * 21 + [3]
    samples = dataset.samples(0)
    assert samples["row"].to_pylist() == list(range(150))
    assert samples["key"].equals(part.index()["key"])
    assert sorted(samples["sample_id"].to_pylist()) == sorted(f"class{n % 3}/photo{n:03d}.jpg" for n in range(150))
    labels = samples["label"].to_pylist()
    assert sum(len(set(labels[first : first + 7])) > 1 for first in range(0, 147, 7)) >= 20
    for shard, record in part.images.records().items():
        keys = part.images.read(record, ["key"])["key"]
        assert keys.equals(samples["key"].slice(shard * 7, 7))


def test_parts_hold_32_shards_at_most(make_plan, monkeypatch):
    dataset = _read(make_plan("cache.shard_size=2"), monkeypatch)
    assert [part.count for part in dataset.parts] == [64, 64, 22]
    assert dataset.count == 150


def test_the_same_source_is_the_same_version_and_keeps_its_shard_size(make_plan, monkeypatch):
    dataset = _read(make_plan(), monkeypatch)
    again = _read(make_plan("cache.shard_size=1000"), monkeypatch)
    assert again == dataset
    assert again.parts[0].shard_size == 7
    assert len([name for name in dataset.store.files() if name.startswith("version-")]) == 1


def test_a_version_lists_names_labels_and_places(make_plan, monkeypatch):
    dataset = _read(make_plan(), monkeypatch)
    (name,) = [name for name in dataset.store.files() if name.startswith("rows-")]
    for row in pq.read_table(Path(dataset.store.uri, name)).to_pylist():
        assert row["uri"] == f"{dataset.location}/{row['sample_id']}"
        assert row["size"] == Path(row["uri"]).stat().st_size
        assert row["label"] == int(row["sample_id"][5])


def test_data_name_names_the_datasets(make_plan):
    assert [split.dataset.id.rsplit("-", 1)[0] for split in make_plan("data.name=pets").splits] == [
        "pets-train",
        "pets-val",
    ]


def test_a_newer_cache_format_is_refused(make_plan, monkeypatch):
    dataset = _read(make_plan(), monkeypatch)
    (name,) = [name for name in dataset.store.files() if name.startswith("version-")]
    dataset.store.put(name, sealed({**unsealed(dataset.store.get(name)), "format": 99}))
    with pytest.raises(UserError, match="cache format 99"):
        make_plan()


def test_a_teacher_listed_twice_is_refused(make_plan):
    with pytest.raises(UserError, match="listed 2 times"):
        make_plan("teachers=['tests.fakes:colours', 'tests.fakes:colours']")


def test_a_fingerprint_does_not_depend_on_parts_shards_and_places(tmp_path, photo_config, monkeypatch):
    """Figures on the same images are compared by it, also between caches."""

    def read(cache, *overrides):
        return _read(plan_cache(photo_config(*overrides), Store.at(tmp_path / cache)), monkeypatch)

    one = read("one")
    moved, aside = Path(one.location, "class0/photo000.jpg"), tmp_path / "aside.jpg"
    moved.rename(aside)
    assert read("two", "cache.shard_size=2").fingerprint != one.fingerprint
    aside.rename(moved)
    grown = read("two", "cache.shard_size=2")
    assert len(grown.parts) > len(one.parts)
    assert grown.fingerprint == one.fingerprint
    moved.rename(moved.with_name("other.jpg"))
    assert read("one").fingerprint != one.fingerprint
