"""A version stays what it was: by its address, and for an interrupted run."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.cache.fill.plan import plan_cache, versions_of
from pipeline.cache.maintain.audit import verify_cache
from pipeline.cache.maintain.repair import repair_cache
from pipeline.cache.read.scan import read_summaries
from pipeline.distill.phases import plan_phases
from pipeline.errors import UserError
from pipeline.runs.folder import open_run
from pipeline.storage.store import Store
from tests.fakes import fill_in_process, without_ray, write_photos


def _grown(config):
    """A plan of 150 photos, filled, and one of 153."""
    store = Store.at(Path(config.work) / "cache")
    first, _ = fill_in_process(plan_cache(config, store))
    write_photos(Path(config.data.train) / "class0", 3, seed=7)
    second, _ = fill_in_process(plan_cache(config, store))
    assert [plan.split("train").dataset.count for plan in (first, second)] == [150, 153]
    return first, second, store


def test_a_version_by_its_address_is_what_it_was_when_the_source_has_grown_or_is_gone(photo_config):
    config = photo_config()
    first, _, store = _grown(config)
    dataset = first.split("train").dataset
    vectors, labels = read_summaries(dataset, first.teachers[0])
    shutil.rmtree(config.data.train)
    name, version = dataset.id.rsplit("-", 1)
    pinned = photo_config(f"data.train=cache://{name}/{version}", "data.val=null")
    plan, computed = fill_in_process(plan_cache(pinned, store))
    assert computed == 0
    again = plan.split("train").dataset
    assert (again.fingerprint, again.location, again.classes) == (
        dataset.fingerprint,
        dataset.location,
        dataset.classes,
    )
    found = read_summaries(again, plan.teachers[0])
    assert found[0].equal(vectors)
    assert found[1].equal(labels)


def test_a_new_teacher_is_computed_from_the_images_in_the_cache(photo_config):
    config = photo_config()
    first, _, store = _grown(config)
    shutil.rmtree(config.data.train)
    address = "cache://" + first.split("train").dataset.id.replace("-train-", "-train/")
    other = photo_config(
        f"data.train={address}", "data.val=null", "teachers=['tests.fakes:colours']", "cache.codec=int8"
    )
    plan, computed = fill_in_process(plan_cache(other, store))
    assert computed == 2
    assert read_summaries(plan.split("train").dataset, plan.teachers[0])[0].shape == (150, 8)


@pytest.mark.parametrize(
    "address", ["photos-train/00000000", "photos-train/", "photos-train", "other/1234", "../photos-train/1"]
)
def test_a_version_that_the_cache_does_not_hold_is_refused_in_a_line(photo_config, address):
    config = photo_config()
    _, _, store = _grown(config)
    with pytest.raises(UserError, match=r"data\.train: cache://.* holds no such version; jobs/precompute\.py --list"):
        plan_cache(photo_config(f"data.train=cache://{address}", "data.val=null"), store)


def test_an_interrupted_run_goes_on_with_the_version_that_it_began_with(photo_config):
    config = photo_config()
    first, second, store = _grown(config)
    state = open_run(config, "distill")
    state.folder.mkdir(parents=True)
    state.data = versions_of(first)
    state.save()
    (phase,) = plan_phases(config, store)
    assert phase.plan.split("train").dataset.fingerprint == first.split("train").dataset.fingerprint
    saved = json.loads((state.folder / "run.json").read_text())
    (state.folder / "run.json").write_text(json.dumps({**saved, "finished": True}))
    (phase,) = plan_phases(config, store)
    assert phase.plan.split("train").dataset.fingerprint == second.split("train").dataset.fingerprint


def test_a_pinned_version_is_verified_and_repaired_without_its_source(photo_config, monkeypatch):
    config = photo_config()
    first, _, store = _grown(config)
    dataset = first.split("train").dataset
    shutil.rmtree(config.data.train)
    pinned = photo_config(f"data.train=cache://{dataset.id.replace('-train-', '-train/')}", "data.val=null")
    without_ray(monkeypatch)
    plan = plan_cache(pinned, store)
    assert verify_cache(plan, pinned).findings == []
    part, shard = dataset.shards[0]
    part.teacher(plan.teachers[0].id).unlist(shard)
    found = verify_cache(plan, pinned)
    assert [item.what for item in found.findings if item.shard == shard] == [plan.teachers[0].id]
    repaired, left = repair_cache(plan, pinned, found)
    assert left.findings == []
    assert repaired.split("train").dataset.fingerprint == dataset.fingerprint
