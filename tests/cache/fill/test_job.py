"""What filling the cache tells MLflow, on a real SQLite store."""

from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipeline.cache.config import CacheJobConfig, PrecomputeJobConfig, TeacherConfig
from pipeline.cache.fill.estimate import all_bytes, missing_bytes
from pipeline.cache.fill.job import cache_bytes, image_bytes, precompute, warn_of_losses
from pipeline.cache.fill.plan import plan_cache
from pipeline.cache.fill.shard_builder import ShardBuilder
from pipeline.cache.layout.cached_teacher import CachedTeacher, make_teacher, projections_of, teacher_fidelity
from pipeline.cache.layout.keys import sealed, unsealed
from pipeline.cache.layout.part import KEY, image_key, teacher_home
from pipeline.cache.layout.shards import RECORDS, ShardFolder
from pipeline.cache.layout.view_rows import ViewRows
from pipeline.cache.maintain.audit import verify_cache
from pipeline.config.load import load_config
from pipeline.errors import UserError
from pipeline.storage.store import Store
from pipeline.tracking.run import start_run
from teachers.base import TeacherOutput
from tests.fakes import fill_in_process, without_ray, write_photos


def test_a_start_that_computes_nothing_leaves_what_an_earlier_one_logged(photo_config, tmp_path, monkeypatch):
    without_ray(monkeypatch)
    config, uri = photo_config(), f"sqlite:///{tmp_path}/mlflow.db"
    run = start_run(uri, experiment="e", name="r", config={"a": 1}, tags={}, work=tmp_path)
    logged = []
    for _ in range(2):
        _, report = precompute(config, plan_cache(config, Store.at(tmp_path / "cache")), run)
        run.flush()
        logged.append((report.shards_computed, run.client.get_run(run.run_id).data.metrics))
    (first, metrics), (second, later) = logged
    assert second == 0 < first == metrics["shards_computed"]
    assert metrics == later
    assert metrics.keys() >= {"images_extracted", "images_per_second", "seconds", "quarantined", "cache_bytes"}


TEACHERS = "teachers=[{model: 'tests.fakes:colours', args: {dim: 24}}, {model: 'tests.fakes:colours', args: {dim: 8}}]"


@pytest.mark.parametrize("codec", ["pca-int8-zstd", "int8", "float32"])
def test_every_figure_of_size_counts_all_files_below_the_folder(photo_config, tmp_path, codec):
    config, store = photo_config(f"cache.codec={codec}", TEACHERS), Store.at(tmp_path / "cache")
    bound = missing_bytes(plan_cache(config, store))
    fill_in_process(plan_cache(config, store))
    plan = plan_cache(config, store)
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    disk = {path: path.stat().st_size for path in files}
    features = sum(size for path, size in disk.items() if {"teachers", "statistics"} & {*path.parts})
    assert cache_bytes(plan) == features
    assert image_bytes(plan) == sum(disk.values()) - features
    assert features <= bound
    total = sum(
        all_bytes(split, teacher, teacher.row_bytes(projections_of(store, teacher)))
        for split in plan.splits
        for teacher in plan.teachers
    )
    assert features <= total


def test_what_lies_beside_the_features_of_a_shard_is_below_two_percent(tmp_path):
    """A shard of 512 images of the feature maps of MobileNetV2 at 224 px, with zstd, all files counted."""
    spec = replace(make_teacher(TeacherConfig(model="hog")).spec, grid=(7, 7), patch_dim=1280, summary_dim=1280)
    teacher = CachedTeacher(TeacherConfig(model="hog"), spec, "wide", "int8-zstd", "float32")
    builder, generator = ShardBuilder(teacher, "", None), torch.Generator().manual_seed(0)
    for _ in range(16):
        patches = torch.relu(torch.randn(32, 7, 7, 1280, generator=generator) - 1)
        builder.add(TeacherOutput(patches.mean(dim=(1, 2)), patches), 0.0)
    keys = [image_key(str(number).encode()) for number in range(512)]
    rows = pa.table({"key": pa.array(keys, KEY), "view": pa.array([0] * 512, pa.int16())})
    folder = ShardFolder(Store.at(tmp_path))
    record = builder.commit(folder, 0, ViewRows(rows, rows, {"images": "shard-00000-00000000.parquet"}), "cpu")
    assert folder.store.bytes_below() - record.bytes < 0.02 * record.bytes


@pytest.mark.parametrize("facts", [{"target_cosine": 0.97, "target_cosine_p1": 0.9}, {}])
def test_features_that_keep_too_little_are_named(photo_config, tmp_path, caplog, facts):
    plan, _ = fill_in_process(plan_cache(photo_config(TEACHERS), Store.at(tmp_path / "cache")))
    (part,) = plan.split("train").dataset.parts
    folder = part.teacher(plan.teachers[0].id)
    for number, record in folder.records().items():
        fidelity = {kind: {**facts, "relative_error": 0.0} for kind in ("summary", "patches")}
        changed = asdict(replace(record, facts={**record.facts, "fidelity": fidelity}))
        folder.store.put(f"shard-{number:05d}.json", sealed(changed))
    folder.store.delete(RECORDS)
    part.refresh()
    warn_of_losses(plan)
    assert ("a cosine of 0.970 of the standardised patches" in caplog.text) == bool(facts)
    assert "on which it was not chosen" not in caplog.text
    assert bool(caplog.records) == bool(facts)


def test_images_of_another_kind_that_a_codec_was_not_chosen_on_are_named(tmp_path, caplog, monkeypatch):
    """Grey images need one component; coloured ones that are added need three."""
    folder = tmp_path / "photos/a"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(96):
        cells = rng.integers(0, 256, (6, 6), dtype=np.uint8)
        Image.fromarray(cells).convert("RGB").resize((48, 48), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    teacher = "teachers=[{model: 'tests.fakes:colours', args: {dim: 24}}]"
    settings = [f"data.train={tmp_path}/photos", "cache.codec=pca-int8-zstd", teacher]
    config, store = load_config(PrecomputeJobConfig, None, settings), Store.at(tmp_path / "cache")
    plan, _ = fill_in_process(plan_cache(config, store))
    warn_of_losses(plan)
    assert not caplog.text
    write_photos(tmp_path / "photos", 30)
    plan, _ = fill_in_process(plan_cache(config, store))
    warn_of_losses(plan)
    (line,) = [
        record.message
        for record in caplog.records
        if "keeps a cosine" in record.message and "patches" in record.message
    ]
    assert line.endswith(
        "that is 30 of 126 views, on which it was not chosen: a new name in teachers.0.basis fits it on today's images and "
        "stores all features anew, beside these"
    )

    before = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("teachers/**/*") if path.is_file()}
    settings = [*settings, "teachers.0.basis=with colours"]
    again, computed = fill_in_process(plan_cache(load_config(PrecomputeJobConfig, None, settings), store))
    (old,), (new,) = plan.teachers, again.teachers
    kept = [
        teacher_fidelity(given.splits[0].dataset, teacher)["patches"]["target_cosine"]
        for given, teacher in ((plan, old), (again, new))
    ]
    assert kept[0] < 0.95 < kept[1]
    assert new.id != old.id
    assert computed == sum(part.shards for part in again.splits[0].dataset.parts)
    assert all(path.read_bytes() == data for path, data in before.items())
    fitted = [projections_of(store, teacher)["patches"].components for teacher in (old, new)]
    assert not torch.equal(*fitted)
    assert unsealed(teacher_home(store, new.id).get("teacher.json"))["basis"] == "with colours"
    without_ray(monkeypatch)
    assert verify_cache(again, load_config(CacheJobConfig)).findings == []


def test_a_basis_without_a_projection_is_refused_by_the_plan(tmp_path, photo_config):
    config = photo_config("teachers.0.basis=mine", "teachers.0.codec=int8")
    with pytest.raises(UserError, match=r"teachers\.0\.basis: int8 has no projection; .*a codec that begins with pca"):
        plan_cache(config, Store.at(tmp_path / "cache"))
