"""A data set that grows, shrinks, moves or is named anew: a teacher runs on the images whose bytes the cache does not have."""

import io
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.cache.fill import build, draft, places, waves
from pipeline.cache.fill.plan import plan_cache
from pipeline.cache.fill.second_moments import freeze_phi_s
from pipeline.cache.layout.cached_teacher import load_codecs, teacher_stats
from pipeline.cache.layout.dataset import dataset_store, version_files
from pipeline.cache.layout.keys import sealed, unsealed
from pipeline.cache.layout.phi_s import load_phi_s
from pipeline.cache.read.reader import CacheReader
from pipeline.cache.read.scan import PatchReader, read_summaries, scan_images
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.sources.image_folder import ImageFolder
from pipeline.storage.store import Store
from tests.fakes import colours_entry, fill_in_process, images_seen, write_photos
from tests.faults import FORK

PHOTOS = 80
TEACHERS = 2


class Job:
    """Fills one cache from folders of photographs, and counts the images that its two teachers see."""

    def __init__(self, root: Path) -> None:
        self.root, self.photos, self.log = root, root / "photos", root / "calls"
        write_photos(self.photos, PHOTOS)
        self.store = Store.at(root / "cache")

    def plan(self, *overrides, data="photos", codec="float32"):
        teachers = ", ".join(colours_entry(self.log, dim) for dim in (8, 4))
        settings = [f"data.train={self.root}/{data}", f"work={self.root}/work", f"teachers=[{teachers}]"]
        small = ["cache.shard_size=16", f"cache.codec={codec}", "student.input_size=32"]
        return plan_cache(load_config(DistillJobConfig, None, [*settings, *small, *overrides]), self.store)

    def fill(self, *overrides, **data):
        """The filled plan; `seen` is the number of images that each teacher saw."""
        before = images_seen(self.log)
        plan, _ = fill_in_process(self.plan(*overrides, **data))
        seen = images_seen(self.log) - before
        assert seen % TEACHERS == 0
        self.seen = seen // TEACHERS
        assert fill_in_process(self.plan(*overrides, **data))[1] == 0
        return plan

    def photo(self, number):
        return self.photos / f"class{number % 3}/photo{number:03d}.jpg"


@pytest.fixture
def job(tmp_path):
    """A complete cache of 80 photographs in shards of 16."""
    job = Job(tmp_path)
    job.fill()
    assert job.seen == PHOTOS
    return job


def rows_read(dataset, teachers=(), **settings):
    """Every row of an epoch: name, label, the student's pixels, and the stored features by teacher and token type."""
    settings = {"image_size": 32, "batch_size": 1, "window": 64, **settings}
    return [
        (
            key,
            int(label),
            image,
            {t: {kind: rows[i] for kind, rows in kinds.items()} for t, kinds in b.features.items()},
        )
        for b in CacheReader(dataset, teachers, **settings).batches(0)
        for i, (key, label, image) in enumerate(zip(b.keys, b.labels, b.images, strict=True))
    ]


def samples_of(folder):
    """Names and labels of the photographs in a folder of classes, as the cache is to have them."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and any(path.glob("*.jpg")))
    return {path.relative_to(folder).as_posix(): classes.index(path.parent.name) for path in folder.rglob("*.jpg")}


def assert_reads(plan, folder, split="train"):
    """Every photograph comes once an epoch, with its own name, label, pixels and features."""
    dataset, expected = plan.split(split).dataset, samples_of(folder)
    rows = rows_read(dataset, plan.teachers)
    assert Counter((key, label) for key, label, *_ in rows) == Counter(expected.items())
    assert_features_of(rows, plan, lambda key: (folder / key).read_bytes())


def assert_features_of(rows, plan, data_of):
    """The stored features are those that the teacher computes of the image of that name, now."""
    from pipeline.imaging.crop import crop_and_resize
    from pipeline.imaging.decode import decode_image
    from pipeline.imaging.geometry import FULL

    for teacher in plan.teachers:
        source, codecs = teacher.create(), load_codecs(plan.store, teacher)
        source.log = ""
        source.load()
        images = [crop_and_resize(decode_image(data_of(key)), FULL, (32, 32), "bilinear") for key, *_ in rows]
        expected = source.encode(torch.from_numpy(np.stack(images)))
        for kind in codecs:
            stored = codecs[kind].decode(torch.stack([features[teacher.id][kind] for *_, features in rows]))
            torch.testing.assert_close(stored, getattr(expected, kind), rtol=1e-4, atol=1e-4)


def assert_statistics(plan, split="train"):
    """Mean, deviation, PHI-S and the passes of evaluation, against the features that the reader gives, in float64."""
    dataset = plan.split(split).dataset
    rows = rows_read(dataset, plan.teachers)
    for teacher in plan.teachers:
        found, codecs = teacher_stats(dataset, teacher), load_codecs(plan.store, teacher)
        freeze_phi_s(dataset, teacher)
        rotations = load_phi_s(dataset.statistics(teacher.id).get("phi_s.npz"))
        for kind, codec in codecs.items():
            stored = torch.stack([features[teacher.id][kind] for *_, features in rows])
            values = codec.decode(stored).double().flatten(0, -2).numpy()
            assert found[kind].count == len(values)
            np.testing.assert_allclose(found[kind].mean, values.mean(axis=0), atol=1e-5)
            np.testing.assert_allclose(found[kind].std, values.std(axis=0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(rotations[kind].mean, values.mean(axis=0), atol=1e-5)
            covariance = np.cov(values.T, bias=True)
            assert rotations[kind].scale == pytest.approx(np.sqrt(np.trace(covariance) / len(covariance)), rel=1e-4)


def test_an_unchanged_folder_keeps_its_version_as_it_is(job):
    (split,) = job.plan().splits
    assert (split.new.num_rows, split.listing.known, split.dataset.draft) == (0, {}, {})
    assert split.dataset == job.fill().splits[0].dataset


def test_what_has_not_changed_is_known_by_its_digest_alone(job, monkeypatch):
    dataset = job.fill().splits[0].dataset
    (job.photos / "class0/notes.txt").write_text("x")
    monkeypatch.setattr(ImageFolder, "_index", lambda *_: pytest.fail("makes an index"))
    (split,) = job.plan().splits
    assert (split.new.num_rows, split.dataset, split.dataset.listed) == (0, dataset, dataset.listed)
    assert split.left_out == ("1 files that are no images by their ending: .txt 1",)
    assert split.dataset.listed[1] == PHOTOS


def test_a_held_out_share_that_has_not_changed_is_known_by_its_digest_too(job, monkeypatch):
    plan = job.fill("data.val=0.2")
    monkeypatch.setattr(ImageFolder, "_index", lambda *_: pytest.fail("makes an index"))
    again = job.plan("data.val=0.2")
    assert [split.dataset for split in again.splits] == [split.dataset for split in plan.splits]
    assert sum(split.dataset.listed[1] for split in again.splits) == PHOTOS


def _touch(job):
    info = job.photo(3).stat()
    os.utime(job.photo(3), ns=(info.st_atime_ns, info.st_mtime_ns + 1))


def _change_size(job):
    info = job.photo(3).stat()
    job.photo(3).write_bytes(job.photo(3).read_bytes() + b"x")
    os.utime(job.photo(3), ns=(info.st_atime_ns, info.st_mtime_ns))


def _move_deeper(job):
    (job.photos / "class0/deeper").mkdir()
    job.photo(3).rename(job.photos / "class0/deeper/photo003.jpg")


def _break_a_link(job):
    (job.photos / "class0/broken.jpg").symlink_to(job.root / "nowhere.jpg")


CHANGES = {
    "touched": _touch,
    "of another size, with its old time": _change_size,
    "renamed": lambda job: job.photo(3).rename(job.photos / "class0/other.jpg"),
    "in another class": lambda job: job.photo(3).rename(job.photos / "class1/photo003.jpg"),
    "deeper": _move_deeper,
    "removed": lambda job: job.photo(3).unlink(),
    "one more": lambda job: shutil.copy2(job.photo(3), job.photos / "class0/copy.jpg"),
    "a broken link more": _break_a_link,
    "another class": lambda job: (job.photos / "class9").mkdir(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_of_a_folder_is_compared_file_by_file(job, change):
    """As without the digest, which older versions do not have."""
    known = job.plan().splits[0].dataset
    CHANGES[change](job)
    (found,) = job.plan().splits
    assert found.dataset.listed[0] != known.listed[0]
    forget_listing(job)
    (expected,) = job.plan().splits
    assert found.new.equals(expected.new)
    assert (found.dataset, found.listing.known) == (expected.dataset, expected.listing.known)


def forget_listing(job):
    """Make the latest version one that does not say what its source listed."""
    store = dataset_store(job.store, job.plan().splits[0].dataset.name)
    file = version_files(store)[0]
    meta = unsealed(store.get(file))
    del meta["listed"]
    store.put(file, sealed(meta))


def test_a_version_that_does_not_say_what_its_source_listed_is_compared_file_by_file(job):
    dataset = job.fill().splits[0].dataset
    forget_listing(job)
    plan = job.fill()
    assert (job.seen, plan.splits[0].dataset) == (0, dataset)
    (job.photos / "class0/photo003.jpg").unlink()
    assert job.fill().splits[0].dataset.listed[1] == PHOTOS - 1


def test_a_version_that_lacks_rows_of_its_listing_is_compared_file_by_file(job):
    store = dataset_store(job.store, job.plan().splits[0].dataset.name)
    (file,) = version_files(store)
    meta = unsealed(store.get(file))
    store.put(file, sealed({**meta, "listed": [meta["listed"][0], PHOTOS + 1]}))
    (split,) = job.plan().splits
    assert (split.new.num_rows, split.dataset.listed[1]) == (0, PHOTOS)


def test_samples_are_compared_in_pieces_too(job, monkeypatch):
    monkeypatch.setattr(places, "ROWS_HASHED", 7)
    whole = job.fill().splits[0].dataset
    write_photos(job.root / "more", 1, seed=9)
    shutil.copy(job.root / "more/class0/photo000.jpg", job.photos / "class2/another.jpg")
    (split,) = job.plan().splits
    assert split.new["sample_id"].to_pylist() == ["class2/another.jpg"]
    assert split.dataset.selections == whole.selections


def test_waves_bound_what_is_read_at_a_time_and_every_part_mixes_all_classes(tmp_path, monkeypatch):
    for module in (build, draft, waves):
        monkeypatch.setattr(module, "WAVE_IMAGES", 32)
    job, digest, read = Job(tmp_path), build._digest, []

    def watch(wave):
        read.append(sum(listed.num_rows for _, listed in wave))
        return digest(wave)

    monkeypatch.setattr(build, "_digest", watch)
    plan = job.fill()
    assert (job.seen, read) == (PHOTOS, [27, 27, 26, 0])  # then nothing is new
    dataset = plan.split("train").dataset
    assert [selection.samples for selection in dataset.selections] == [27, 27, 26]
    for number in range(3):
        assert {*dataset.samples(number)["label"].to_pylist()} == {0, 1, 2}
    assert_reads(plan, job.photos)
    assert_statistics(plan)


def test_a_photograph_more_is_one_image_for_a_teacher(job):
    shutil.copy(job.photo(0), job.photos / "class0/again.jpg")  # known bytes: no image at all
    job.fill()
    assert job.seen == 0
    write_photos(job.root / "more", 1, seed=9)
    shutil.copy(job.root / "more/class0/photo000.jpg", job.photos / "class2/another.jpg")
    plan = job.fill()
    assert job.seen == 1
    assert plan.split("train").dataset.count == PHOTOS + 2
    assert_reads(plan, job.photos)
    assert_statistics(plan)


def test_ten_photographs_less_are_left_out(job):
    for number in range(0, 20, 2):
        job.photo(number).unlink()
    plan = job.fill()
    assert job.seen == 0
    dataset = plan.split("train").dataset
    assert dataset.count == PHOTOS - 10
    assert not any(selection.whole for selection in dataset.selections)
    assert_reads(plan, job.photos)
    assert_statistics(plan)


def test_a_folder_that_moved_is_the_same(job):
    shutil.move(job.photos, job.root / "elsewhere")
    plan = job.fill(data="elsewhere")
    assert job.seen == 0
    assert_reads(plan, job.root / "elsewhere")


def test_a_file_of_another_name_keeps_its_features(job):
    job.photo(7).rename(job.photos / "class1/renamed.jpg")
    plan = job.fill()
    assert job.seen == 0
    assert_reads(plan, job.photos)


@pytest.mark.parametrize("name", ["class0b", "zebra"])  # the second comes last: all labels change
def test_a_class_of_another_name_keeps_its_features(job, name):
    (job.photos / "class0").rename(job.photos / name)
    plan = job.fill()
    assert job.seen == 0
    assert plan.split("train").dataset.classes == tuple(sorted(["class1", "class2", name]))
    assert_reads(plan, job.photos)


def test_a_label_is_corrected_without_a_teacher(job):
    shutil.move(job.photo(3), job.photos / "class2/photo003.jpg")
    plan = job.fill()
    assert job.seen == 0
    assert_reads(plan, job.photos)


def test_other_bytes_of_the_same_name_and_size_are_another_image(job):
    photo = job.photo(5)
    size = photo.stat().st_size
    write_photos(job.root / "other", 1, seed=11, size=24)
    other = (job.root / "other/class0/photo000.jpg").read_bytes()
    assert len(other) <= size
    photo.write_bytes(other.ljust(size, b"\0"))  # what follows the end of a JPEG is passed over
    plan = job.fill()
    assert job.seen == 1
    assert_reads(plan, job.photos)
    assert_statistics(plan)


def test_a_second_data_set_computes_the_half_that_it_does_not_share(job):
    write_photos(job.root / "second", 40, seed=5)
    for number in range(40):
        target = job.root / f"second/class{number % 3}/shared{number:03d}.jpg"
        shutil.copy(job.photo(number), target)
    plan = job.fill(data="second")
    assert job.seen == 40
    assert_reads(plan, job.root / "second")
    assert_statistics(plan)
    first = job.fill()
    assert job.seen == 0
    assert_reads(first, job.photos)
    assert_statistics(first)


def test_one_more_tar_is_as_many_images_as_it_holds(job):
    def write_tar(number, photos):
        with tarfile.open(job.root / f"tars/{number:03d}.tar", "w") as tar:
            for photo in photos:
                data = photo.read_bytes()
                for name, content in ((photo.name, data), (f"{photo.stem}.cls", str(len(photo.stem) % 3).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))

    (job.root / "tars").mkdir()
    write_tar(0, [job.photo(number) for number in range(40)])
    write_photos(job.root / "new", 12, seed=7)
    plan = job.fill(data="tars/*.tar")
    assert (job.seen, plan.split("train").dataset.count) == (0, 40)
    write_tar(1, sorted((job.root / "new").rglob("*.jpg")))
    plan = job.fill(data="tars/*.tar")
    assert (job.seen, plan.split("train").dataset.count) == (12, 52)
    assert_statistics(plan)


def test_images_that_occur_twice_are_computed_once(tmp_path):
    job = Job(tmp_path)
    write_photos(tmp_path / "val", 10, seed=3)
    for number in range(6):
        shutil.copy(job.photo(number), job.photos / f"class{(number + 1) % 3}/twin{number}.jpg")
        shutil.copy(job.photo(number), tmp_path / f"val/class{number % 3}/shared{number}.jpg")
    plan = job.fill(f"data.val={tmp_path}/val")
    assert job.seen == PHOTOS + 10
    assert [split.dataset.count for split in plan.splits] == [PHOTOS + 6, 16]
    for split, folder in (("train", job.photos), ("val", tmp_path / "val")):
        assert_reads(plan, folder, split)
        assert_statistics(plan, split)


def test_another_view_or_codec_is_computed_beside_what_there_is(job):
    first = job.plan()
    files = {path for path in (job.root / "cache").rglob("*.parquet") if "teachers" in path.parts}
    cropped = job.fill("views.crops=2")
    assert job.seen == 2 * PHOTOS
    assert [teacher.id for teacher in cropped.teachers] == [teacher.id for teacher in first.teachers]
    assert cropped.split("train").dataset.parts[0].view.uri != first.split("train").dataset.parts[0].view.uri
    coded = job.fill(codec="float16")
    assert job.seen == PHOTOS
    assert not {teacher.id for teacher in coded.teachers} & {teacher.id for teacher in first.teachers}
    assert all(path.exists() for path in files)
    job.fill()
    assert job.seen == 0


def test_views_whose_colours_are_changed_grow_by_the_new_images_alone(job):
    settings = ("views.crops=2", "views.photometric={jitter: 0.8, grey: 0.2, blur: 0.5}")
    job.fill(*settings)
    assert job.seen == 2 * PHOTOS
    write_photos(job.photos / "more", 3, seed=9)
    plan = job.fill(*settings)
    assert job.seen == 2 * 3
    assert plan.split("train").dataset.count == PHOTOS + 3
    job.fill("views.crops=2")  # the clean crops are another view
    assert job.seen == 2 * (PHOTOS + 3)


@pytest.mark.parametrize("changes", [(), ("views.photometric={jitter: 0.8, grey: 0.2, blur: 0.5}",)])
def test_crops_of_a_data_set_that_grew_and_shrank_are_those_of_its_images(job, changes):
    job.fill("views.crops=2", *changes)
    shutil.copy(job.photo(0), job.photos / "class1/twin.jpg")
    for number in range(1, 30, 3):
        job.photo(number).unlink()
    plan = job.fill("views.crops=2", *changes)
    assert job.seen == 0
    dataset, expected = plan.split("train").dataset, samples_of(job.photos)
    for settings in ({}, {"batch_size": 2, "per_step": 2}):
        rows = rows_read(dataset, plan.teachers, **settings)
        assert Counter((key, label) for key, label, *_ in rows) == Counter(dict.fromkeys(expected.items(), 2))
    assert [key for key, *_ in rows[::2]] == [key for key, *_ in rows[1::2]]
    by_name = {}
    for key, _, image, features in rows:
        stored = next(iter(features.values()))["patches"]
        by_name.setdefault(key, set()).add((image.numpy().tobytes(), stored.numpy().tobytes()))
    assert all(len(views) == 2 for views in by_name.values())
    assert by_name["class1/twin.jpg"] == by_name["class0/photo000.jpg"]
    assert_statistics(plan)


def test_evaluation_reads_the_samples_of_a_data_set_alone(job):
    shutil.copy(job.photo(0), job.photos / "class1/twin.jpg")
    for number in range(1, 50, 4):
        job.photo(number).unlink()
    plan = job.fill()
    dataset, teacher, expected = plan.split("train").dataset, plan.teachers[0], samples_of(job.photos)
    scanned = [
        (key, int(label)) for b in scan_images(dataset, 32, 7) for key, label in zip(b.keys, b.labels, strict=True)
    ]
    assert Counter(scanned) == Counter(expected.items())
    summaries, labels = read_summaries(dataset, teacher)
    assert labels.tolist() == [label for _, label in scanned]
    codec = load_codecs(plan.store, teacher)["summary"]
    features = {key: found[teacher.id]["summary"] for key, _, _, found in rows_read(dataset, [teacher])}
    torch.testing.assert_close(summaries, codec.decode(torch.stack([features[key] for key, _ in scanned])))
    reader = PatchReader(dataset, teacher)
    read = [reader.read(number) for number in range(len(reader))]
    assert [key for keys, _ in read for key in keys] == [key for key, _ in scanned]
    assert [len(patches) for _, patches in read] == reader.sizes


def test_two_processes_that_add_different_images_leave_both(job):
    plans = []
    for seed, name in ((21, "left"), (22, "right")):
        shutil.copytree(job.photos, job.root / name)
        write_photos(job.root / "fresh", 10, seed=seed)
        for photo in (job.root / "fresh").rglob("*.jpg"):
            shutil.copy(photo, job.root / name / photo.parent.name / f"{name}-{photo.name}")
        plans.append(job.plan("data.name=both", data=name))
    processes = [FORK.Process(target=fill_in_process, args=(plan,)) for plan in plans]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for name in ("left", "right"):
        plan = job.fill("data.name=both", data=name)
        assert job.seen == 0
        assert plan.split("train").dataset.count == PHOTOS + 10
        assert_reads(plan, job.root / name)
        assert_statistics(plan)


def test_what_is_filled_is_a_file_of_rows_per_part_that_unchanged_parts_keep(job):
    versions = sorted((job.root / "cache/datasets").rglob("rows-*.parquet"))
    before = {path: pq.read_table(path).num_rows for path in versions}
    write_photos(job.root / "more", 4, seed=9)
    for photo in (job.root / "more").rglob("*.jpg"):
        shutil.copy(photo, job.photos / photo.parent.name / f"more-{photo.name}")
    plan = job.fill()
    chosen = plan.split("train").dataset.selections
    assert [selection.samples for selection in chosen] == [*before.values(), 4]
    assert {path.name for path in before} < {selection.file for selection in chosen}
