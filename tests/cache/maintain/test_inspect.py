"""What a cache holds, what is garbage in it, and what it will take to fill one."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.cache.fill.build import plan_cache
from pipeline.cache.fill.estimate import (
    check_space,
    count_macs,
    estimate_cache,
    missing_bytes,
    probe_teacher,
    view_bytes,
)
from pipeline.cache.layout.dataset import create_dataset
from pipeline.cache.layout.keys import teacher_id
from pipeline.cache.maintain.garbage import FILE_AGE_S, FOLDER_AGE_S, find_garbage, remove_garbage
from pipeline.cache.maintain.inventory import delete_entry, find_entry, take_inventory
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.errors import UserError
from pipeline.storage.store import Store
from tests.fakes import fill_in_process, out_of_memory


@pytest.fixture
def cache(filled):
    """The store of a complete cache, in which everything was written two days ago."""
    for split in filled.plan.splits:
        for teacher in filled.plan.teachers:
            split.dataset.teacher(teacher.id).store.put("teacher.json", b'{"name": "colours", "licence": "mit"}')
    _age(Path(filled.plan.store.uri), 2 * FOLDER_AGE_S)
    return filled.plan.store


def _age(folder, seconds):
    then = time.time() - seconds
    for path in folder.rglob("*"):
        os.utime(path, (then, then))


def _files(store):
    return {path.relative_to(store.uri).as_posix() for path in Path(store.uri).rglob("*") if path.is_file()}


def test_the_inventory_has_datasets_and_teachers_with_shards_sizes_fidelity_and_licence(cache, filled):
    train, one, two, val = take_inventory(cache)[:4]
    assert (train.address, train.shards, train.of) == (filled.train.id, 2, 2)
    assert "150 images" in train.what
    assert {one.address, two.address} == {f"{filled.train.id}/full/{teacher.id}" for teacher in filled.plan.teachers}
    assert one.licence == "mit"
    assert 0.999 < one.fidelity <= 1.0001
    assert one.bytes == sum(filled.train.teacher(one.address.rpartition("/")[2]).store.files().values())
    assert train.bytes > one.bytes + two.bytes
    assert val.address == filled.val.id


def test_a_shard_that_does_not_count_is_not_counted(cache, filled):
    Path(filled.train.teacher(filled.plan.teachers[0].id).store.uri, "shard-00001.json").unlink()
    entry = find_entry(cache, f"{filled.train.id}/full/{filled.plan.teachers[0].id}")
    assert (entry.shards, entry.of) == (1, 2)


def test_what_is_deleted_is_gone_and_nothing_else(cache, filled):
    teacher = filled.plan.teachers[0].id
    before = _files(cache)
    delete_entry(find_entry(cache, f"{filled.train.id}/full/{teacher}"))
    gone = {name for name in before if name.startswith(f"{filled.train.id}/views/full/teachers/{teacher}/")}
    assert gone
    assert _files(cache) == before - gone
    delete_entry(find_entry(cache, filled.val.id))
    assert _files(cache) == {name for name in before - gone if not name.startswith(filled.val.id)}


def test_a_probe_that_a_gpu_has_no_memory_for_says_what_to_lower(filled, monkeypatch):
    monkeypatch.setattr("pipeline.cache.fill.estimate.count_macs", out_of_memory)
    with pytest.raises(UserError, match=r"teacher colours8: the GPU has too little memory for 512 images .*=bfloat16$"):
        probe_teacher(filled.plan.teachers[0], 512)


def test_only_what_is_listed_can_be_deleted(cache, filled):
    for address in ("", "/", "..", "full", f"{filled.train.id}/full", f"{filled.train.id}/.."):
        with pytest.raises(UserError, match="--list prints the addresses"):
            find_entry(cache, address)


def test_a_near_address_is_named(cache, filled):
    with pytest.raises(UserError, match=f"did you mean {filled.train.id}"):
        find_entry(cache, filled.train.id[:-1])


def test_crops_have_an_address_of_their_own(tmp_path, photo_config):
    config = photo_config("views.crops=2", "teachers=[{model: 'tests.fakes:colours'}]")
    plan = plan_cache(config, Store.at(tmp_path / "cache"))
    fill_in_process(plan)
    train = plan.split("train").dataset
    view = f"{train.id}/{train.policy.id}"
    delete_entry(find_entry(plan.store, view))
    assert train.images.records()
    assert view not in {entry.address for entry in take_inventory(plan.store)}


def test_a_complete_cache_has_no_garbage(cache):
    assert find_garbage(cache) == []


def test_garbage_is_found_and_only_that_is_removed(cache, filled):
    folder = Path(filled.train.teacher(filled.plan.teachers[0].id).store.uri)
    before = _files(cache)
    garbage = {
        folder / "shard-00000-00000000.parquet": "no record names it",
        folder / "shard-00000-00000000.npz": "no record names it",
        folder / ".shard-00001.json.0123abcd": "left by a killed writer",
        folder.parent / "gone-0123456789/teacher.json": "its folder has no shard",
        Path(cache.uri, "dead-01234567/views/full/images/shard-00000.json"): "it belongs to no dataset",
    }
    for path in garbage:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1234")
    mine = Path(cache.uri, "notes.txt"), folder / "notes.txt"
    for path in mine:
        path.write_text("not of the cache")
    _age(Path(cache.uri), 2 * FOLDER_AGE_S)
    found = find_garbage(cache)
    assert {Path(item.path): item.why for item in found} == garbage
    assert sum(item.bytes for item in found) == 4 * len(garbage)
    remove_garbage(found)
    assert _files(cache) == before | {path.relative_to(cache.uri).as_posix() for path in mine}
    assert not (folder.parent / "gone-0123456789").exists()


def test_files_of_a_running_job_are_left_alone(cache, filled):
    folder = Path(filled.train.teacher(filled.plan.teachers[0].id).store.uri)
    young = [folder / "shard-00000-00000000.parquet", folder / ".shard-00001.json.0123abcd"]
    waiting = folder.parent / "next-0123456789/teacher.json"
    waiting.parent.mkdir()
    for path in (*young, waiting):
        path.write_bytes(b"1234")
    for path, age in ((young[0], FILE_AGE_S - 60), (young[1], FILE_AGE_S - 60), (waiting, FOLDER_AGE_S - 60)):
        os.utime(path, (time.time() - age,) * 2)
    assert find_garbage(cache) == []


def test_what_a_damaged_record_may_name_is_left_for_verify(cache, filled):
    folder = Path(filled.train.teacher(filled.plan.teachers[0].id).store.uri)
    (folder / "shard-00001.json").write_text("{")
    _age(folder, 2 * FOLDER_AGE_S)
    assert find_garbage(cache) == []


def test_bytes_of_a_view_are_those_of_the_codec_and_measured_once_shards_are_there(filled, photo_config, tmp_path):
    plan = plan_cache(photo_config(), Store.at(tmp_path / "empty"))
    teacher = plan.teachers[0]
    assert view_bytes(plan, teacher, "float32") == (4 * 8 * 17, True)
    assert view_bytes(plan, teacher, "float16") == (2 * 8 * 17, True)
    assert view_bytes(plan, teacher, "pca-int8-zstd") == (view_bytes(plan, teacher, "int8")[0], False)
    measured, exact = view_bytes(filled.plan, filled.plan.teachers[0], "float16")
    assert exact
    assert 2 * 8 * 17 < measured < 2 * 8 * 17 + 100
    assert teacher.id == teacher_id(teacher.spec, "float16", "float32")


def test_the_estimate_counts_what_is_missing(filled):
    before = estimate_cache(filled.plan, filled.config)
    assert [(teacher.missing, teacher.shards, teacher.hours) for teacher in before] == [(0, 3, 0.0)] * 2
    filled.train.teacher(filled.plan.teachers[0].id).unlist(1)
    filled.train.refresh()
    first, second = estimate_cache(filled.plan, filled.config)
    assert (first.missing, second.missing) == (1, 0)
    assert first.hours == pytest.approx(50 / first.probe.views_per_second / 3600)
    assert first.probe.device == "cpu"
    assert first.probe.trained


def test_multiply_accumulates_of_a_teacher_are_counted_and_weights_are_not_needed(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    entry = "teachers=[{model: dinov2/vits14, input_size: 56, args: {embed_dim: 64, depth: 1, num_heads: 2}}]"
    plan = plan_cache(
        load_config(DistillJobConfig, None, ["data.samples.train=20", entry]), Store.at(tmp_path / "cache")
    )
    probe = probe_teacher(plan.teachers[0], 4)
    assert not probe.trained
    tokens, width = 16 + 1, 64
    block = tokens * width * width * 12 + 2 * tokens * tokens * width
    assert probe.macs == 16 * 3 * 14 * 14 * width + block


def test_the_bound_of_what_is_missing_holds(tmp_path, photo_config):
    plan = plan_cache(photo_config("cache.shard_size=150"), Store.at(tmp_path / "cache"))
    bound = missing_bytes(plan)
    fill_in_process(plan)
    for split in plan.splits:
        split.dataset.refresh()
    assert missing_bytes(plan) == 0
    folders = [f for s in plan.splits for f in (s.dataset.images, *(s.dataset.teacher(t.id) for t in plan.teachers))]
    written = sum(sum(folder.store.files().values()) for folder in folders)
    assert 0.5 * bound < written
    parquet = sum(record.bytes for folder in folders for record in folder.records().values())
    assert parquet <= bound


def test_what_cannot_fit_is_refused_with_need_free_and_remedy(tmp_path, photo_config, monkeypatch):
    plan = plan_cache(photo_config(), Store.at(tmp_path / "cache"))
    monkeypatch.setattr(Store, "free_bytes", lambda self: missing_bytes(plan))
    check_space(plan)
    monkeypatch.setattr(Store, "free_bytes", lambda self: missing_bytes(plan) - 1)
    with pytest.raises(
        UserError, match=r"take up to 0.00 GiB, but 0.00 GiB are free: free space, set cache.uri"
    ) as error:
        check_space(plan)
    assert plan.store.uri in str(error.value)
    monkeypatch.setattr(Store, "free_bytes", lambda self: None)
    check_space(plan)


def test_a_dataset_of_another_version_is_listed_and_can_be_deleted(cache, filled):
    filled.val.store.put("dataset.json", b'{"format": 1}')
    entry = find_entry(cache, filled.val.id)
    assert "another version" in entry.what
    delete_entry(entry)
    assert not Path(filled.val.store.uri).exists()


def test_a_damaged_description_of_a_dataset_is_one_clear_line(filled):
    filled.train.store.put("dataset.json", b"{")
    with pytest.raises(UserError, match=r"dataset.json cannot be read"):
        plan_cache(filled.config, filled.plan.store)


def test_a_dataset_that_a_killed_job_began_is_no_entry(tmp_path, filled):
    begun = replace(filled.train, store=Store.at(tmp_path / "other/begun-01234567"))
    create_dataset(begun, filled.plan.split("train").index)
    Path(begun.store.uri, "dataset.json").unlink()
    assert take_inventory(Store.at(tmp_path / "other")) == []


def test_attention_that_pytorch_fuses_is_counted():
    """CLIP's towers are built on it: its projections and products would otherwise be left out."""
    attention = torch.nn.MultiheadAttention(64, 4, batch_first=True).eval()

    class Attending:
        @torch.inference_mode()
        def encode(self, tokens):
            attention(tokens, tokens, tokens, need_weights=False)

    assert count_macs(Attending(), torch.rand(1, 10, 64)) == 4 * 10 * 64 * 64 + 2 * 10 * 10 * 64
