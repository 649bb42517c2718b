import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs._plan import cache_plan
from pipeline.cache.fill.build import build_cache
from pipeline.cache.fill.extract import Extract
from pipeline.cache.fill.plan import plan_cache
from pipeline.cache.layout.cached_teacher import teacher_labels, teacher_stats
from pipeline.cache.layout.part import teacher_home
from pipeline.cache.layout.part_stats import STATISTICS
from pipeline.cache.layout.stats import dump_moments
from pipeline.cache.layout.view_rows import read_view_rows, views_of
from pipeline.errors import UserError
from pipeline.imaging.crop import crop_and_pad, crop_and_resize
from pipeline.imaging.decode import decode_pixels
from pipeline.imaging.gpu_decode import NvjpegPool
from pipeline.storage.store import Store
from tests.fakes import fill_in_process, images_seen, out_of_memory, without_ray


def test_teacher_shards_hold_the_keys_of_the_images_in_their_order(filled):
    for split in filled.plan.splits:
        (part,) = split.dataset.parts
        for teacher in filled.plan.teachers:
            folder = part.teacher(teacher.id)
            for shard, record in folder.records().items():
                keys = part.images.read(part.images.records()[shard], ["key", "view"])
                assert folder.read(record, ["key", "view"]).equals(keys)


def test_files_say_what_they_hold_in_standard_types(filled):
    teacher = filled.plan.teachers[0]
    folder = filled.train.parts[0].teacher(teacher.id)
    table = pq.read_table(Path(folder.store.uri, folder.records()[0].file))
    assert table.schema.metadata[b"teacher"].decode() == teacher.id
    assert table.schema.metadata[b"patches.shape"] == b"[4, 4, 8]"
    assert str(table.schema.field("patches").type) == f"fixed_size_binary[{4 * 4 * 8 * 2}]"
    assert str(table.schema.field("key").type) == "fixed_size_binary[16]"


def test_what_is_there_is_not_computed_again(tmp_path, photo_config):
    log = tmp_path / "calls"
    config = photo_config("teachers=[{model: 'tests.fakes:colours'}]", f"teachers.0.args={{log: {log}}}")
    store = Store.at(tmp_path / "cache")
    assert fill_in_process(plan_cache(config, store))[1] == 3
    assert images_seen(log) == 190
    plan, computed = fill_in_process(plan_cache(config, store))
    assert computed == 0
    assert images_seen(log) == 190
    folder = plan.split("train").dataset.parts[0].teacher(plan.teachers[0].id)
    Path(folder.store.uri, "shard-00001.json").unlink()
    assert fill_in_process(plan_cache(config, store))[1] == 1
    assert images_seen(log) == 190 + 50


def test_recomputed_shards_are_byte_identical(filled):
    (part,) = filled.train.parts
    folder = part.teacher(filled.plan.teachers[0].id)
    before = folder.records()
    for record in before.values():
        Path(folder.store.uri, record.file).unlink()
    part.refresh()
    assert fill_in_process(filled.plan)[1] == 2
    assert {s: r.sha256 for s, r in folder.records().items()} == {s: r.sha256 for s, r in before.items()}


def test_a_gpu_of_too_little_memory_is_said_in_a_line_with_the_remedy(filled, monkeypatch):
    (part,) = filled.train.parts
    extract = Extract({part.key: part}, [(part.key, n) for n in range(part.shards)], [], "cpu", 1, 64)

    monkeypatch.setattr(extract, "teachers", {teacher.id: None for teacher in filled.plan.teachers})
    monkeypatch.setattr(type(part.images), "record", lambda *_: None)
    monkeypatch.setattr(extract, "_extract", out_of_memory)
    answer = extract({"part": part.key, "shard": 0})
    assert answer["error"].startswith("the GPU has too little memory for 64 images at once: lower cache.batch_size")
    assert answer["computed"] == 0


def test_features_that_are_not_finite_stop_the_shard_and_name_the_teacher(tmp_path, photo_config):
    config = photo_config("teachers=[{model: 'tests.fakes:colours', args: {poison: 1}}]")
    store = Store.at(tmp_path / "cache")
    with pytest.raises(UserError, match="teacher colours8 computed summary features that are not finite"):
        fill_in_process(plan_cache(config, store))
    plan = plan_cache(config, store)
    assert plan.split("train").dataset.count == 150
    assert not [*plan.split("train").dataset.records(plan.teachers[0].id)]


def test_other_weights_than_planned_are_refused(filled):
    from dataclasses import replace

    from teachers.base import TeacherError

    teacher = replace(filled.plan.teachers[0], weights_sha256="0" * 64)
    with pytest.raises(TeacherError, match="other weights than the one that planned the job"):
        Extract({part.key: part for part in filled.train.parts}, [], [teacher], "cpu", 1, 8)


def test_a_teacher_of_padded_images_is_cached_beside_one_of_squashed_ones(tmp_path, photo_config, monkeypatch):
    without_ray(monkeypatch)
    tiny = "embed_dim: 32, depth: 1, num_heads: 2, neck_chans: 16, window_size: 0, img_size: 64, resize_mode: pad"
    sam = f"{{model: sam, weights: random, input_size: 64, args: {{{tiny}}}}}"
    config = photo_config(f"teachers=[{sam}, {{model: 'tests.fakes:colours'}}]", "views.crops=2", "cache.codec=float32")
    plan = plan_cache(config, Store.at(tmp_path / "cache"))
    assert "longest side resized, padded to a square, bilinear" in cache_plan(plan, config)
    plan, _ = build_cache(plan, config)
    (part,) = plan.split("train").dataset.parts
    images, rows, *_ = read_view_rows(part, 0)
    views, decoded = views_of(rows), [decode_pixels(data) for data in images["image"].to_pylist()]
    assert len({image.shape for image in decoded}) > 1
    for teacher, crop in zip(plan.teachers, (crop_and_pad, crop_and_resize), strict=True):
        source, folder, spec = teacher.create(), part.teacher(teacher.id), teacher.spec
        source.load()
        pixels = [crop(decoded[i // 2], view, spec.input_size, spec.interpolation) for i, view in enumerate(views)]
        stored = folder.read(folder.records()[0])["patches"].to_pylist()
        patches = torch.frombuffer(bytearray(b"".join(stored)), dtype=torch.float32).view(len(stored), 4, 4, -1)
        expected = source.encode(torch.from_numpy(np.stack(pixels))).patches
        torch.testing.assert_close(patches, expected, rtol=1e-4, atol=1e-4)


def test_a_decoder_on_the_gpu_makes_a_teacher_of_its_own(tmp_path, photo_config, monkeypatch):
    store, plans = Store.at(tmp_path / "cache"), {}
    settings = "teachers=[{model: 'tests.fakes:colours', args: {dim: 8}}]", "views.crops=2"
    for decoder in ("cpu", "nvjpeg"):
        config = photo_config(*settings, f"cache.decoder={decoder}", "cache.codec=float32")
        plan = plan_cache(config, store)
        assert ("decoded by nvjpeg" in cache_plan(plan, config)) == (decoder == "nvjpeg")
        if decoder == "nvjpeg":
            with pytest.raises(UserError, match=r"cache\.decoder: nvjpeg decodes on a GPU, and there is none here"):
                fill_in_process(plan)
            assert not [*plan.split("train").dataset.records(plan.teachers[0].id)]
            # torchvision's CPU decoder stands for the GPU's
            monkeypatch.setattr("pipeline.cache.fill.extract.make_decoders", lambda *_: NvjpegPool("cpu"))
        plans[decoder], computed = fill_in_process(plan)
        assert computed == 3
    ids = [plan.teachers[0].id for plan in plans.values()]
    assert len({*ids}) == 2
    stored = []
    for plan in plans.values():
        ((folder, record), *_) = [
            (part.teacher(plan.teachers[0].id), r)
            for part, r in plan.split("train").dataset.records(plan.teachers[0].id)
        ]
        table = folder.read(record)
        stored.append((table["key"], np.frombuffer(b"".join(table["patches"].to_pylist()), np.float32)))
    (keys, expected), (same, found) = stored
    assert keys.equals(same)
    assert not np.array_equal(found, expected)
    np.testing.assert_allclose(found, expected, atol=0.05)
    described = [json.loads(teacher_home(store, name).get("teacher.json")) for name in ids]
    assert [meta.get("decoder") for meta in described] == [None, "nvjpeg"]


def test_statistics_equal_those_of_the_stored_features(filled):
    teacher = filled.plan.teachers[0]
    folder = filled.train.parts[0].teacher(teacher.id)
    stored = []
    for record in folder.records().values():
        rows = folder.read(record)["patches"].to_pylist()
        raw = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), -1)
        stored.append(teacher.codecs()["patches"].decode(raw))
    flat = torch.cat(stored).reshape(-1, 8).double()
    moments = teacher_stats(filled.train, teacher)["patches"]
    assert moments.count == len(flat)
    torch.testing.assert_close(torch.from_numpy(moments.mean), flat.mean(0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(torch.from_numpy(moments.std), flat.std(0, correction=0), atol=1e-3, rtol=1e-3)


def test_statistics_that_a_killed_job_left_by_shard_are_merged_by_the_next(filled):
    dataset, teacher = filled.train, filled.plan.teachers[0]
    folder, exact = dataset.parts[0].teacher(teacher.id), teacher_stats(filled.train, teacher)
    assert [name for name in folder.store.files() if name.endswith(".npz")] == [STATISTICS]
    for record in folder.records().values():
        folder.store.put(record.moments, dump_moments(folder.shard_moments(record)))
    folder.store.delete(STATISTICS)
    dataset.statistics(teacher.id).delete("stats.npz")
    fill_in_process(plan_cache(filled.config, filled.plan.store))
    assert [name for name in folder.store.files() if name.endswith(".npz")] == [STATISTICS]
    for kind, again in teacher_stats(dataset, teacher).items():
        assert again.count == exact[kind].count
        np.testing.assert_allclose(again.mean, exact[kind].mean, atol=1e-2)


def test_labels_are_names_unless_two_teachers_share_one(filled):
    one, two = filled.plan.teachers
    assert teacher_labels([one, two]) == {one.id: "colours8", two.id: "colours4"}
    from dataclasses import replace

    twin = replace(two, spec=replace(two.spec, name="colours8"))
    assert teacher_labels([one, twin]) == {one.id: one.id, twin.id: twin.id}


@pytest.fixture
def projected(tmp_path, photo_config):
    """A complete cache in the default codec, of features that lie in three dimensions of 24."""
    config = photo_config("cache.codec=pca-int8-zstd", "teachers=[{model: 'tests.fakes:colours', args: {dim: 24}}]")
    plan, computed = fill_in_process(plan_cache(config, Store.at(tmp_path / "cache")))
    assert computed == 3
    return plan


def test_the_default_codec_finds_the_components_and_says_how_much_it_keeps(projected):
    from pipeline.cache.layout.cached_teacher import load_codecs, projections_of, teacher_fidelity

    teacher = projected.teachers[0]
    for split in projected.splits:
        folder = split.dataset.parts[0].teacher(teacher.id)
        projections = projections_of(projected.store, teacher)
        assert projections["patches"].components.shape == (8, 24)
        codecs = load_codecs(projected.store, teacher)
        assert codecs["patches"].row_bytes == 16 * (8 + 2)
        schema = pq.read_schema(Path(folder.store.uri, folder.records()[0].file))
        assert str(schema.field("patches").type) == f"fixed_size_binary[{16 * 10}]"
        assert schema.metadata[b"projection"].decode() == folder.projection
        fidelity = teacher_fidelity(split.dataset, teacher)
        patches = fidelity["patches"]
        assert 0.95 < patches["target_cosine_p1"] <= patches["target_cosine"] <= 1.0001
        assert patches["target_cosine"] > 0.99
        assert fidelity["summary"]["target_cosine"] > 0.999


@pytest.mark.parametrize("crops", [0, 2])
def test_fitting_a_projection_runs_no_teacher_twice_and_changes_no_value(tmp_path, photo_config, monkeypatch, crops):
    monkeypatch.setattr("pipeline.cache.fill.extract._sample_size", lambda teacher: 64)
    log = tmp_path / "calls"
    config = photo_config(
        "cache.codec=pca-int8-zstd",
        f"views.crops={crops}",
        f"teachers=[{{model: 'tests.fakes:colours', args: {{dim: 24, log: '{log}'}}}}]",
    )
    plan, _ = fill_in_process(plan_cache(config, Store.at(tmp_path / "cache")))
    assert images_seen(log) == 150 * max(1, crops) + 40

    (part,) = plan.split("train").dataset.parts
    folder = part.teacher(plan.teachers[0].id)
    first = {shard: (folder.read(record), [*folder.moments([record])]) for shard, record in folder.records().items()}
    for shard in first:
        folder.unlist(shard)
    part.refresh()
    fill_in_process(plan)  # the projection is there: nothing is sampled
    for shard, record in folder.records().items():
        table, (moments,) = first[shard]
        assert folder.read(record).equals(table)
        for kind, again in folder.moments([record])[0].items():
            assert again.count == moments[kind].count
            np.testing.assert_allclose(again.mean, moments[kind].mean, atol=1e-6)


def test_shards_of_another_projection_do_not_count(projected):
    train, val = (projected.split(name) for name in ("train", "val"))
    teacher = projected.teachers[0]
    (part,), (held_out,) = train.dataset.parts, val.dataset.parts
    folder = part.teacher(teacher.id)
    first = folder.projection
    Path(folder.home.uri, "projection-00000000.npz").write_bytes(folder.home.get(first))
    assert folder.projection == "projection-00000000.npz"
    assert not folder.records()
    assert folder.record(0) is None
    part.refresh()
    held_out.refresh()
    assert train.missing(teacher) == [(part, 0), (part, 1)]
    assert val.missing(teacher) == [(held_out, 0)]
    assert fill_in_process(projected)[1] == 3
    assert {record.projection for record in folder.records().values()} == {folder.projection}


def test_shards_of_another_projection_are_computed_again_by_the_same_job(projected, monkeypatch):
    from pipeline.cache.fill import build

    parts = [part for split in projected.splits for part in split.dataset.parts]
    folders = [part.teacher(projected.teachers[0].id) for part in parts]
    for part, folder in zip(parts, folders, strict=True):
        for shard in folder.records():
            folder.unlist(shard)
        part.refresh()
    without_ray(monkeypatch)
    extract, passes = build.extract_shards, []

    def two_actors(rows, *arguments):
        """The first pass ends with another actor's projection, fitted in the same moment."""
        yield from extract(rows, *arguments)
        passes.append(len(rows))
        if len(passes) == 1:
            home = folders[0].home
            Path(home.uri, "projection-00000000.npz").write_bytes(home.get(folders[0].projection))

    monkeypatch.setattr(build, "extract_shards", two_actors)
    build._extract(projected, 16, build.BuildReport())
    assert passes == [3, 3]
    assert [len(folder.records()) for folder in folders] == [2, 1]


def test_a_codec_per_teacher_gives_folders_of_their_own(tmp_path, photo_config):
    teachers = "{model: 'tests.fakes:colours', args: {dim: 8}, codec: %s}"
    one, two = (
        plan_cache(photo_config(f"teachers=[{teachers % codec}]"), Store.at(tmp_path / "cache"))
        for codec in ("int8", "int8-zstd")
    )
    assert one.teachers[0].id != two.teachers[0].id
    (one, first), (two, second) = fill_in_process(one), fill_in_process(two)
    assert first == second == 3
    files = [
        pq.ParquetFile(Path(folder.store.uri, folder.records()[0].file)).metadata.row_group(0).column(3).compression
        for folder in (plan.split("train").dataset.parts[0].teacher(plan.teachers[0].id) for plan in (one, two))
    ]
    assert files == ["UNCOMPRESSED", "ZSTD"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cache.codec=int4", r"cache.codec: unknown codec int4; there are float32"),
        ("teachers.0.codec=int4", r"teachers.0.codec: unknown codec int4"),
        ("teachers.0.codec=pca64-int8", r"teachers.0.codec: pca64-int8 keeps more components than the 8 channels"),
    ],
)
def test_a_codec_that_cannot_be_is_refused_by_the_plan(tmp_path, photo_config, override, message):
    with pytest.raises(UserError, match=message):
        plan_cache(photo_config(override), Store.at(tmp_path / "cache"))


def test_fidelity_is_measured_on_images_that_no_projection_was_fitted_on(tmp_path, photo_config, monkeypatch):
    monkeypatch.setattr("pipeline.cache.fill.extract._sample_size", lambda teacher: 64)
    config = photo_config("cache.codec=pca-int8-zstd", "teachers=[{model: 'tests.fakes:colours', args: {dim: 24}}]")
    plan = plan_cache(config, Store.at(tmp_path / "cache"))
    from pipeline.cache.fill.shard_builder import ShardBuilder

    seen, add = [], ShardBuilder.add
    monkeypatch.setattr(
        ShardBuilder, "add", lambda self, *a, held_out: seen.append(held_out) or add(self, *a, held_out=held_out)
    )
    fill_in_process(plan)
    # Shards of 100, 50 and 40 images in batches of 16; the first row group of 64 training images is fitted on.
    assert seen == [False] * 4 + [True] * 3 + [True] * 4 + [True] * 3


@pytest.mark.parametrize(("change", "codec"), [((1e-9, 0), "int8"), ((1e-9, 0), "float16"), ((1, 1e5), "int8")])
def test_a_codec_that_loses_the_target_is_refused_in_a_line(tmp_path, photo_config, monkeypatch, change, codec):
    from teachers.base import TeacherError, TeacherOutput
    from tests.fakes import ColourGrid

    forward = ColourGrid.forward

    def changed(self, images):
        output = forward(self, images)
        return TeacherOutput(*(part * change[0] + change[1] for part in (output.summary, output.patches)))

    monkeypatch.setattr(ColourGrid, "forward", changed)
    name = f"cache.codec={codec}"
    plan = plan_cache(photo_config(name, "teachers=['tests.fakes:colours']"), Store.at(tmp_path / "a"))
    with pytest.raises((UserError, TeacherError), match=rf"{codec} keeps a cosine of only .* set cache.codec=pca-int8"):
        fill_in_process(plan)
    plan = plan_cache(
        photo_config("cache.codec=pca-int8-zstd", "teachers=['tests.fakes:colours']"), Store.at(tmp_path / "b")
    )
    plan, _ = fill_in_process(plan)
    from pipeline.cache.layout.cached_teacher import teacher_fidelity

    assert teacher_fidelity(plan.split("train").dataset, plan.teachers[0])["patches"]["target_cosine"] > 0.99
