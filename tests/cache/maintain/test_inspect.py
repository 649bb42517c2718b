"""What a cache holds, what is garbage in it, and what it will take to fill one."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.cache.fill.estimate import (
    check_space,
    count_macs,
    estimate_cache,
    missing_bytes,
    probe_teacher,
    view_bytes,
)
from pipeline.cache.fill.plan import plan_cache
from pipeline.cache.layout.dataset import record_use, version_files
from pipeline.cache.layout.keys import sealed, teacher_id
from pipeline.cache.layout.part import teacher_home, write_index
from pipeline.cache.maintain.garbage import FILE_AGE_S, FOLDER_AGE_S, find_garbage, remove_garbage
from pipeline.cache.maintain.inventory import delete_entry, find_entry, take_inventory
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.errors import UserError
from pipeline.storage.names import folder_name
from pipeline.storage.store import Store
from tests.fakes import fill_in_process, out_of_memory, write_photos


@pytest.fixture
def cache(filled):
    """The store of a complete cache, in which everything was written two days ago."""
    _age(Path(filled.plan.store.uri), 2 * FOLDER_AGE_S)
    return filled.plan.store


def _age(folder, seconds):
    then = time.time() - seconds
    for path in folder.rglob("*"):
        os.utime(path, (then, then))


def _files(store):
    return {path.relative_to(store.uri).as_posix() for path in Path(store.uri).rglob("*") if path.is_file()}


def _teacher(filled, number=0, split="train"):
    return getattr(filled, split).parts[0].teacher(filled.plan.teachers[number].id)


def _address(dataset):
    return f"{folder_name(dataset.name)}/{dataset.fingerprint[:8]}"


def test_the_inventory_has_versions_images_and_teachers_with_shards_sizes_fidelity_and_licence(cache, filled):
    entries = {entry.address: entry for entry in take_inventory(cache)}
    teachers = [teacher.id for teacher in filled.plan.teachers]
    assert [*entries] == [_address(filled.train), _address(filled.val), "images", *sorted(teachers)]
    train, images, one = entries[_address(filled.train)], entries["images"], entries[teachers[0]]
    assert (train.shards, train.of) == (2, 2)
    assert train.what.startswith(f"150 images of {filled.train.location}, ")
    assert (images.shards, images.of, images.what) == (3, 3, "190 images in 2 parts")
    assert (one.shards, one.of) == (3, 3)
    assert one.licence == "none"
    assert 0.999 < one.fidelity <= 1.0001
    folders = [teacher_home(cache, teachers[0]), *(_teacher(filled, 0, split).store for split in ("train", "val"))]
    assert one.bytes == sum(sum(folder.files().values()) for folder in folders)
    assert images.bytes > sum(path.stat().st_size for path in Path(filled.train.location).parent.rglob("*.jpg"))


def test_the_inventory_says_how_a_data_set_has_changed_and_who_has_used_it(cache, filled):
    record_use(filled.train, "a-run")
    (Path(filled.train.location) / "class0/photo000.jpg").unlink()
    write_photos(Path(filled.train.location) / "more", 2, seed=5)
    plan, computed = fill_in_process(plan_cache(filled.config, cache))
    assert computed == 2
    before, after = (entry for entry in take_inventory(cache) if entry.address.startswith("photos-train/"))
    assert before.what.endswith("used by a-run")
    assert ", 2 added, 1 removed, " in after.what
    assert after.address == _address(plan.split("train").dataset)


def test_a_shard_that_does_not_count_is_not_counted(cache, filled):
    Path(_teacher(filled).store.uri, "shard-00001.json").unlink()
    Path(_teacher(filled).store.uri, "records.json").unlink()
    entry = find_entry(cache, filled.plan.teachers[0].id)
    assert (entry.shards, entry.of) == (2, 3)


def test_what_is_deleted_is_gone_and_nothing_else(cache, filled):
    teacher = filled.plan.teachers[0].id
    left = _files(cache)
    for address, of_it in (
        (teacher, lambda name: teacher in name.split("/") and not name.startswith("datasets/")),
        (_address(filled.val), lambda name: name.startswith("datasets/photos-val/version-")),
        ("images", lambda name: "/views/full/images/" in name),
    ):
        gone = {name for name in left if of_it(name)}
        assert gone
        delete_entry(find_entry(cache, address))
        left -= gone
        assert _files(cache) == left


def test_a_probe_that_a_gpu_has_no_memory_for_says_what_to_lower(filled, monkeypatch):
    monkeypatch.setattr("pipeline.cache.fill.estimate.count_macs", out_of_memory)
    with pytest.raises(UserError, match=r"teacher colours8: the GPU has too little memory for 512 images .*=bfloat16$"):
        probe_teacher(filled.plan.teachers[0], 512)


def test_only_what_is_listed_can_be_deleted(cache, filled):
    for address in ("", "/", "..", "full", "photos-train", "photos-train/..", filled.train.selections[0].part):
        with pytest.raises(UserError, match="--list prints the addresses"):
            find_entry(cache, address)


def test_a_near_address_is_named(cache, filled):
    with pytest.raises(UserError, match=f"did you mean {_address(filled.train)}"):
        find_entry(cache, _address(filled.train)[:-1])


def test_crops_have_an_address_of_their_own(tmp_path, photo_config):
    config = photo_config("views.crops=2", "teachers=[{model: 'tests.fakes:colours'}]")
    plan, _ = fill_in_process(plan_cache(config, Store.at(tmp_path / "cache")))
    (part,) = plan.split("train").dataset.parts
    entry = find_entry(plan.store, part.policy.id)
    assert (entry.what, entry.shards, entry.of) == ("crops", 2, 2)
    delete_entry(entry)
    assert part.images.records()
    assert not part.rows.records()
    _, computed = fill_in_process(plan_cache(config, plan.store))
    assert computed == 0
    assert part.rows.records()


def test_a_complete_cache_has_no_garbage(cache):
    assert find_garbage(cache) == []


def test_garbage_is_found_and_only_that_is_removed(cache, filled):
    folder = Path(_teacher(filled).store.uri)
    before = _files(cache)
    garbage = {
        folder / "shard-00000-00000000.parquet": "no record names it",
        folder / "shard-00000-00000000.npz": "no record names it",
        folder / ".shard-00001.json.0123abcd": "left by a killed writer",
        folder.parent / "gone-0123456789/teacher.json": "its folder has no shard",
        Path(cache.uri, f"parts/{20 * 'd'}/views/full/images/shard-00000.json"): "no data set has its images",
        Path(filled.train.store.uri, f"rows-{16 * '0'}.parquet"): "no version names it",
        Path(filled.train.store.uri, f"bad-{16 * '0'}.parquet"): "no version names it",
        Path(filled.train.store.uri, f"statistics/{16 * '0'}/full/colours/stats.npz"): "its version is gone",
        Path(teacher_home(cache, filled.plan.teachers[0].id).uri, "projection-ffffffff.npz"): "no record names it",
        Path(teacher_home(cache, filled.plan.teachers[0].id).uri, "projection-00000000.npz"): None,
    }
    for path in garbage:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1234")
    kept = {path for path, why in garbage.items() if why is None}
    garbage = {path: why for path, why in garbage.items() if path not in kept}
    mine = Path(cache.uri, "notes.txt"), folder / "notes.txt", *kept
    for path in mine:
        path.write_text("not to be removed")
    _age(Path(cache.uri), 2 * FOLDER_AGE_S)
    found = find_garbage(cache)
    assert {Path(item.path): item.why for item in found} == garbage
    assert sum(item.bytes for item in found) == 4 * len(garbage)
    remove_garbage(found)
    assert _files(cache) == before | {path.relative_to(cache.uri).as_posix() for path in mine}
    assert not (folder.parent / "gone-0123456789").exists()


def test_parts_and_statistics_of_versions_that_are_deleted_are_garbage_and_what_another_needs_is_not(cache, filled):
    (Path(filled.train.location) / "class0/photo000.jpg").unlink()
    plan, computed = fill_in_process(plan_cache(filled.config, cache))
    assert computed == 0
    _age(Path(cache.uri), 2 * FOLDER_AGE_S)
    assert find_garbage(cache) == []
    delete_entry(find_entry(cache, _address(filled.train)))
    found = {item.path.removeprefix(f"{cache.uri}/"): item.why for item in find_garbage(cache)}
    assert {why for path, why in found.items() if "/statistics/" in path} == {"its version is gone"}
    assert {path for path in found if "/statistics/" not in path} == {
        f"datasets/photos-train/{filled.train.selections[0].file}"
    }
    delete_entry(find_entry(cache, _address(plan.split("train").dataset)))
    delete_entry(find_entry(cache, _address(filled.val)))
    remove_garbage(find_garbage(cache))
    assert {path.rpartition("/")[2] for path in _files(cache)} == {"teacher.json"}


def test_a_version_that_cannot_be_read_protects_what_it_may_need(cache, filled):
    (file,) = version_files(filled.train.store)
    filled.train.store.put(file, b"{")
    with pytest.raises(
        UserError, match=rf"{file} cannot be read .*--verify --repair, or forget it with --delete photos-train/"
    ):
        find_garbage(cache)
    entry = find_entry(cache, f"photos-train/{file}")
    assert "damaged" in entry.what
    delete_entry(entry)
    assert version_files(filled.train.store) == []


def test_files_of_a_running_job_are_left_alone(cache, filled):
    folder = Path(_teacher(filled).store.uri)
    young = [folder / "shard-00000-00000000.parquet", folder / ".shard-00001.json.0123abcd"]
    waiting = folder.parent / "next-0123456789/teacher.json"
    waiting.parent.mkdir()
    for path in (*young, waiting):
        path.write_bytes(b"1234")
    for path, age in ((young[0], FILE_AGE_S - 60), (young[1], FILE_AGE_S - 60), (waiting, FOLDER_AGE_S - 60)):
        os.utime(path, (time.time() - age,) * 2)
    assert find_garbage(cache) == []


def test_what_a_damaged_record_may_name_is_left_for_verify(cache, filled):
    folder = Path(_teacher(filled).store.uri)
    (folder / "shard-00001.json").write_text("{")
    (folder / "records.json").unlink()
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
    assert [(teacher.missing, teacher.views, teacher.hours) for teacher in before] == [(0, 190, 0.0)] * 2
    _teacher(filled).unlist(1)
    first, second = estimate_cache(plan_cache(filled.config, filled.plan.store), filled.config)
    assert (first.missing, second.missing) == (50, 0)
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
    plan, _ = fill_in_process(plan)
    assert missing_bytes(plan) == 0
    parts = [part for split in plan.splits for part in split.dataset.parts]
    folders = [f for part in parts for f in (part.images, *(part.teacher(teacher.id) for teacher in plan.teachers))]
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


def test_a_version_of_another_format_is_listed_and_refused_and_can_be_deleted(cache, filled):
    (file,) = version_files(filled.val.store)
    filled.val.store.put(file, sealed({"format": 1}))
    with pytest.raises(UserError, match="has cache format 1, this version reads"):
        plan_cache(filled.config, cache)
    entry = find_entry(cache, f"photos-val/{file}")
    assert "another version" in entry.what
    delete_entry(entry)
    assert plan_cache(filled.config, cache).split("val").new.num_rows == 40


def test_a_data_set_of_the_format_before_is_listed_and_can_be_deleted(cache):
    cache.sub("photos-train-01234567/views/full").put("shard-00000.parquet", b"1234")
    cache.sub("photos-train-01234567").put("dataset.json", b'{"format": 2}')
    entry = find_entry(cache, "photos-train-01234567")
    assert "cache format 2" in entry.what
    delete_entry(entry)
    assert "photos-train-01234567" not in cache.folders()


def test_a_part_that_a_killed_job_began_is_no_image_of_a_data_set(cache, filled):
    began = replace(filled.train.parts[0], id=20 * "e")
    write_index(began, filled.train.parts[0].index())
    assert find_entry(cache, "images").what == "190 images in 2 parts"


def test_attention_that_pytorch_fuses_is_counted():
    """CLIP's towers are built on it: its projections and products would otherwise be left out."""
    attention = torch.nn.MultiheadAttention(64, 4, batch_first=True).eval()

    class Attending:
        @torch.inference_mode()
        def encode(self, tokens):
            attention(tokens, tokens, tokens, need_weights=False)

    assert count_macs(Attending(), torch.rand(1, 10, 64)) == 4 * 10 * 64 * 64 + 2 * 10 * 10 * 64
