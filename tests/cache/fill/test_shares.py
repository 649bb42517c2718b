"""A teacher that is asked about a share of the images: which ones, what is stored of them, and what reads it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.cache.fill.estimate import all_bytes, missing_bytes, view_bytes
from pipeline.cache.fill.plan import plan_cache
from pipeline.cache.fill.second_moments import freeze_phi_s
from pipeline.cache.fill.statistics import dataset_moments
from pipeline.cache.layout.cached_teacher import load_codecs, projections_of, teacher_stats
from pipeline.cache.layout.keys import teacher_id
from pipeline.cache.layout.part import KEY
from pipeline.cache.layout.part_stats import STATISTICS
from pipeline.cache.layout.phi_s import load_phi_s
from pipeline.cache.layout.shards import ROW_GROUP_SIZE
from pipeline.cache.layout.shares import PRESENT, in_share, with_features
from pipeline.cache.layout.stats import merge_all
from pipeline.cache.maintain.audit import verify_cache
from pipeline.cache.maintain.garbage import find_garbage
from pipeline.cache.maintain.inventory import take_inventory
from pipeline.cache.maintain.repair import repair_cache
from pipeline.cache.read.reader import CacheReader
from pipeline.cache.read.reader_process import ReaderProcess
from pipeline.cache.read.scan import PatchReader, read_summaries, scan_images
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.errors import UserError
from pipeline.evaluate.knn import teacher_knn
from pipeline.storage.store import Store
from tests.fakes import fill_in_process, images_seen, without_ray, write_photos

SHARE = 0.3
PHOTOS = 150


class Job:
    """A cache of photographs with two teachers, the second of which is asked about a share and counts what it sees."""

    def __init__(self, root: Path) -> None:
        self.root, self.log, self.store = root, root / "calls", Store.at(root / "cache")
        write_photos(root / "photos", PHOTOS)

    def config(self, *overrides, share=SHARE, codec="float32"):
        own = f"model: 'tests.fakes:colours', share: {share}, args: {{dim: 16, log: '{self.log}'}}"
        teachers = f"teachers=[{{model: 'tests.fakes:colours', args: {{dim: 12}}}}, {{{own}}}]"
        settings = [f"data.train={self.root}/photos", f"work={self.root}/work", teachers]
        small = ["cache.shard_size=100", f"cache.codec={codec}", "student.input_size=32"]
        return load_config(DistillJobConfig, None, [*settings, *small, *overrides])

    def fill(self, *overrides, **settings):
        """The filled plan; `seen` is the number of images that the teacher saw."""
        before, self.settings = images_seen(self.log), self.config(*overrides, **settings)
        plan, _ = fill_in_process(plan_cache(self.settings, self.store))
        self.seen = images_seen(self.log) - before
        assert fill_in_process(plan_cache(self.settings, self.store))[1] == 0
        return plan


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def chosen_of(dataset, share=SHARE):
    """Names of the samples in a share."""
    tables = [dataset.samples(number) for number in range(len(dataset.parts))]
    return {
        name
        for table in tables
        for name, asked in zip(table["sample_id"].to_pylist(), in_share(table["key"], share), strict=True)
        if asked
    }


def batches_of(plan, reader=CacheReader, **settings):
    settings = {"image_size": 32, "batch_size": 10, "window": 64, **settings}
    return list(reader(plan.split("train").dataset, plan.teachers, **settings).batches(0))


def test_a_share_is_chosen_by_the_last_half_of_the_key_and_contains_every_smaller_one():
    rng = np.random.default_rng(0)
    keys = sorted(rng.bytes(16) for _ in range(20_000))
    column = pa.chunked_array([pa.array(keys[:7000], KEY), pa.array(keys[7000:], KEY)])
    chosen = in_share(column, 0.25)
    assert abs(chosen.mean() - 0.25) < 0.01
    assert not (chosen & ~in_share(column, 0.5)).any()
    groups = (
        chosen[:19_968].reshape(-1, 64).mean(axis=1)
    )  # a row group of a part, whose keys are in order, is like another
    assert 0.03 < groups.std() < 0.08
    assert in_share(column.slice(5, 1), 0.25).tolist() == chosen[5:6].tolist()
    known = pa.chunked_array([pa.array([bytes(15) + b"\x3f", b"\xff" * 8 + bytes(7) + b"\x40"], KEY)])
    assert in_share(known, 0.25).tolist() == [True, False]


def test_a_share_of_all_is_no_other_teacher(job):
    plan = plan_cache(job.config(share=1.0), job.store)
    for teacher in plan.teachers:
        assert teacher.id == teacher_id(teacher.spec, "float32", "float32")
    (_, other) = plan_cache(job.config(), job.store).teachers
    assert other.id != plan.teachers[1].id
    assert other.id == teacher_id(other.spec, "float32", "float32", share=SHARE)
    with pytest.raises(UserError, match=r"teachers\.1\.share"):
        job.config(share=0.0)


@pytest.mark.parametrize("views", [(), ("views.crops=2",)])
def test_the_teacher_sees_its_share_alone_and_rows_align(job, views):
    plan = job.fill(*views)
    dataset, teacher = plan.split("train").dataset, plan.teachers[1]
    count = 1 + bool(views)
    assert 30 < len(chosen_of(dataset)) < 60
    assert job.seen == count * len(chosen_of(dataset))
    (part,) = dataset.parts
    whole, shared = part.teacher(plan.teachers[0].id), part.teacher(teacher.id)
    for shard, record in shared.records().items():
        expected, table = whole.read(whole.records()[shard]), shared.read(record)
        assert table.select(["key", "view"]).equals(expected.select(["key", "view"]))
        for kind in ("summary", "patches"):
            assert np.array_equal(with_features(table[kind]), in_share(table["key"], SHARE))
        groups = pq.ParquetFile(shared.store.open(record.file)).metadata
        assert groups.row_group(0).num_rows == count * min(ROW_GROUP_SIZE, part.shard_rows(shard))
    sizes = {name: sum(r.bytes for r in part.teacher(name).records().values()) for name in (teacher.id,)}
    per_view, exact = view_bytes(plan, teacher, "float32")
    assert exact
    assert per_view == pytest.approx(sizes[teacher.id] / (SHARE * count * PHOTOS))
    assert 0.7 * teacher.row_bytes() < per_view < 1.4 * teacher.row_bytes()


def test_a_data_set_that_grows_asks_about_the_share_of_what_is_new(job):
    before = chosen_of(job.fill().split("train").dataset)
    write_photos(job.root / "photos/more", 40, seed=5)
    after = chosen_of(job.fill().split("train").dataset)
    assert before <= after
    assert job.seen == len(after - before) > 0
    assert all(name.startswith("more") for name in after - before)
    (job.root / "photos" / next(iter(before))).unlink()
    plan = job.fill()
    assert job.seen == 0
    assert_features(plan, len(after) - 1)


def assert_features(plan, count, **settings):
    """Rows have features of their own image where they are said to have any, and zeros elsewhere."""
    dataset, teacher, found = plan.split("train").dataset, plan.teachers[1], 0
    source, codecs = teacher.create(), load_codecs(plan.store, teacher)
    source.log = ""
    source.load()
    names = chosen_of(dataset)
    for batch in batches_of(plan, batch_size=1, **settings):
        stored = batch.features[teacher.id]
        (name,) = batch.keys
        assert stored[PRESENT].tolist() == [name in names]
        assert PRESENT not in batch.features[plan.teachers[0].id]
        if name not in names:
            assert not stored["patches"].any()
            assert not stored["summary"].any()
            continue
        found += 1
        expected = source.encode(batch.images)  # both teachers and student have 32 pixels, but resize differently
        torch.testing.assert_close(codecs["summary"].decode(stored["summary"]), expected.summary, rtol=0, atol=0.05)
    assert found == count


def test_the_reader_says_which_images_have_the_teacher(job):
    plan = job.fill()
    assert_features(plan, len(chosen_of(plan.split("train").dataset)))


@pytest.mark.skipif(not Path("/proc").exists(), reason="shared memory of Linux")
def test_a_reader_in_another_process_says_the_same(job):
    plan = job.fill()
    for here, there in zip(batches_of(plan), batches_of(plan, ReaderProcess), strict=True):
        assert here.keys == there.keys
        for name, kinds in here.features.items():
            assert kinds.keys() == there.features[name].keys()
            assert all(torch.equal(rows, there.features[name][kind]) for kind, rows in kinds.items())


@pytest.mark.parametrize("codec", ["float32", "pca8-int8", "pca-int8-zstd"])
def test_statistics_are_those_of_the_share(job, codec):
    plan = job.fill(codec=codec)
    dataset, teacher = plan.split("train").dataset, plan.teachers[1]
    codecs, found = load_codecs(plan.store, teacher), teacher_stats(dataset, teacher)
    stored = [batch.features[teacher.id] for batch in batches_of(plan)]
    present = torch.cat([kinds[PRESENT] for kinds in stored]).bool()
    freeze_phi_s(dataset, teacher)
    rotations = load_phi_s(dataset.statistics(teacher.id).get("phi_s.npz"))
    for kind, codec_of in codecs.items():
        rows = torch.cat([kinds[kind] for kinds in stored])[present]
        values = codec_of.decode(rows).double().flatten(0, -2).numpy()
        assert found[kind].count == len(values)
        scale = values.std(axis=0).max()
        np.testing.assert_allclose(found[kind].mean, values.mean(axis=0), atol=0.02 * scale)
        np.testing.assert_allclose(rotations[kind].mean, values.mean(axis=0), atol=0.02 * scale)


def test_statistics_of_a_part_with_left_out_rows_are_those_of_the_share(job):
    plan = job.fill()
    for name in sorted(chosen_of(plan.split("train").dataset))[::4]:
        (job.root / "photos" / name).unlink()
    plan = job.fill()
    dataset, teacher = plan.split("train").dataset, plan.teachers[1]
    assert teacher_stats(dataset, teacher)["summary"].count == len(chosen_of(dataset))


def test_evaluation_uses_what_there_is(job):
    write_photos(job.root / "val", 60, seed=3)
    plan = job.fill(f"data.val={job.root}/val", share=0.5)
    train, val = plan.split("train").dataset, plan.split("val").dataset
    teacher, names = plan.teachers[1], chosen_of(train, 0.5)
    summaries, labels = read_summaries(train, teacher)
    assert len(summaries) == len(labels) == len(names)
    known = [
        int(label)
        for batch in scan_images(train, 32, 64)
        for name, label in zip(batch.keys, batch.labels, strict=True)
        if name in names
    ]
    assert labels.tolist() == known
    assert 0 < len(read_summaries(val, teacher)[0]) < 60
    assert 0 <= teacher_knn(teacher, train, val, job.settings.knn) <= 100
    reader = PatchReader(train, teacher)
    read = [reader.read(number) for number in range(len(reader))]
    assert {name for some, _ in read for name in some} == names
    assert all(len(some) == len(patches) for some, patches in read)


def test_verification_recomputes_the_share_and_repair_computes_it_again(job, monkeypatch):
    without_ray(monkeypatch)
    plan = job.fill("cache.batch_size=16", codec="pca8-int8")
    dataset, teacher = plan.split("train").dataset, plan.teachers[1]
    found = verify_cache(plan, job.settings)
    assert found.findings == []
    assert found.recomputed == PHOTOS + len(chosen_of(dataset))
    assert not find_garbage(job.store)
    (entry,) = [item for item in take_inventory(job.store) if item.address == teacher.id]
    assert "0.3 of the images" in entry.what
    (part,) = dataset.parts
    folder = part.teacher(teacher.id)
    record = folder.read_record(0)
    path = Path(folder.store.uri, record.file)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    folder.store.delete(STATISTICS)
    found = verify_cache(plan, job.settings)
    assert {(item.what, item.shard) for item in found.findings} >= {(teacher.id, 0), (teacher.id, None)}
    assert repair_cache(plan, job.settings, found)[1].findings == []
    assert folder.read_record(0).sha256 == record.sha256


@pytest.mark.parametrize("change", ["one more", "one less"])
def test_features_of_other_images_than_the_share_are_found(job, monkeypatch, change):
    without_ray(monkeypatch)
    plan = job.fill()
    teacher = plan.teachers[1]
    (part,) = plan.split("train").dataset.parts
    folder = part.teacher(teacher.id)
    record = folder.read_record(0)
    table = folder.read(record)
    values = table["patches"].to_pylist()
    empty = [number for number, value in enumerate(values) if (value is None) == (change == "one more")]
    values[empty[0]] = next(value for value in values if value is not None) if change == "one more" else None
    position = table.schema.get_field_index("patches")
    field = table.schema.field(position)
    moments = folder.moments([record])[0]
    folder.unlist(0)
    folder.commit(0, table.set_column(position, field, pa.array(values, field.type)), moments, record.facts)
    found = verify_cache(plan, job.settings)
    assert [item.what for item in found.findings] == [teacher.id]
    assert "patches of other images than those of its share" in found.findings[0].problem


def test_shards_without_an_image_of_the_share_are_complete(job, monkeypatch):
    without_ray(monkeypatch)
    plan = job.fill("cache.shard_size=3", share=0.1)
    dataset, teacher = plan.split("train").dataset, plan.teachers[1]
    records = [record for _, record in dataset.records(teacher.id)]
    assert any(not record.moments for record in records)
    assert teacher_stats(dataset, teacher)["summary"].count == len(chosen_of(dataset, 0.1)) > 0
    assert merge_all(dataset_moments(dataset, teacher))["summary"].count == len(chosen_of(dataset, 0.1))
    found = verify_cache(plan, job.settings)
    assert found.findings == []
    for part in dataset.parts:
        part.teacher(teacher.id).store.delete(STATISTICS)
    found = verify_cache(plan, job.settings)
    assert repair_cache(plan, job.settings, found)[1].findings == []


@pytest.mark.parametrize("codec", ["float32", "pca-int8-zstd"])
def test_a_share_without_any_image_is_refused(job, codec):
    with pytest.raises(UserError, match=r"none of the images is in its share of 1e-09: raise the share, or add images"):
        job.fill(share=1e-9, codec=codec)


def test_the_plan_counts_the_share(job):
    plan, whole = plan_cache(job.config(), job.store), plan_cache(job.config(share=1.0), job.store)
    (split,), teacher = plan.splits, plan.teachers[1]
    assert split.missing_views(teacher) == split.views(teacher) == round(SHARE * PHOTOS)
    assert split.missing_views(plan.teachers[0]) == PHOTOS
    row = teacher.row_bytes()
    saved = row * (PHOTOS - round(SHARE * PHOTOS))
    assert missing_bytes(whole) - missing_bytes(plan) == saved
    (all_of,) = whole.splits
    assert all_bytes(all_of, whole.teachers[1], row) - all_bytes(split, teacher, row) == saved
    filled = job.fill()
    (split,) = filled.splits
    assert split.missing_views(filled.teachers[1]) == 0
    stored = sum(record.bytes for _, record in split.dataset.records(teacher.id))
    assert 0.6 * stored < all_bytes(split, teacher, row) < 2.5 * stored
    assert projections_of(filled.store, teacher) is None
