"""Tars of a store: not opened for a plan, read once from front to back, whatever happens; the cache is that of local tars."""

import io
import json
import os
import shutil
import signal
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs._plan import cache_plan, uncounted
from pipeline.cache.fill import build, draft, staging, waves
from pipeline.cache.fill.estimate import check_space, missing_bytes
from pipeline.cache.fill.job import cache_bytes, image_bytes
from pipeline.cache.fill.plan import plan_cache
from pipeline.cache.maintain.garbage import FOLDER_AGE_S, find_garbage, remove_garbage
from pipeline.cache.maintain.inventory import delete_entry, find_entry, take_inventory
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.distill.job import distill
from pipeline.distill.phases import Phase
from pipeline.distill.plan import training_plan
from pipeline.errors import UserError
from pipeline.evaluate.job import check_labels
from pipeline.sources import base
from pipeline.storage import remote
from pipeline.storage.store import Store
from tests.cache.fill.test_growing import assert_features_of, assert_statistics, rows_read
from tests.fakes import colours_entry, fill_in_process, images_seen, without_ray, write_photos
from tests.faults import FORK, content, fill_and_die
from tests.storage.web_server import WebServer

TARS, PHOTOS = 3, 25
SLACK = 4096
"""Bytes of each tar that may be asked for twice."""


def tar_of(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


class Job:
    """Fills a cache from tars on a web server, whose images come first and whose labels come last, in another order."""

    def __init__(self, root):
        self.root, self.log, self.web = root, root / "calls", WebServer({})
        self.store = Store.at(root / "cache")
        write_photos(root / "photos", TARS * PHOTOS)
        self.photos = sorted((root / "photos").rglob("*.jpg"))
        for number in range(TARS):
            self.put(number, self.photos[number * PHOTOS : (number + 1) * PHOTOS])

    def put(self, number, photos, *more):
        members = [(f"{photo.stem}.jpg", photo.read_bytes()) for photo in photos]
        labels = [(f"{photo.stem}.cls", photo.parent.name[-1].encode()) for photo in reversed(photos)]
        self.web.files[f"{number:03d}.tar"] = tar_of([*members, *more, *labels])

    def config(self, *overrides, data=None):
        last = len(self.web.files) - 1
        data = data or f"{self.web.url}/{{000..{last:03d}}}.tar"
        settings = [f"data.train={data}", f"work={self.root}/work", f"teachers=[{colours_entry(self.log)}]"]
        small = ["data.name=tars", "cache.shard_size=8", "cache.codec=float32", "student.input_size=32"]
        return load_config(DistillJobConfig, None, [*settings, *small, *overrides])

    def plan(self, *overrides, **data):
        return plan_cache(self.config(*overrides, **data), self.store)

    def fill(self, *overrides, **data):
        return fill_in_process(self.plan(*overrides, **data))[0]

    def sent(self):
        """Bytes of bodies since this was asked last."""
        sent = self.web.sent
        self.web.clear()
        return sent

    def size(self, *names):
        return sum(len(data) for name, data in self.web.files.items() if not names or name in names)

    def staged(self):
        return sorted(path for path in (self.root / "cache/staging").rglob("*") if path.is_file())


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Nothing is read yet."""
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.001)
    job = Job(tmp_path)
    yield job
    job.web.close()


def assert_complete(job, plan):
    """Every photograph comes once an epoch, with its own name, label and features."""
    named = {photo.stem: photo for photo in job.photos}
    rows = rows_read(plan.split("train").dataset, plan.teachers)
    found = Counter((key.partition("/")[2], label) for key, label, *_ in rows)
    assert found == Counter((photo.stem, int(photo.parent.name[-1])) for photo in job.photos)
    assert_features_of(rows, plan, lambda key: named[key.partition("/")[2]].read_bytes())
    assert_statistics(plan)


def test_a_plan_opens_no_tar_and_a_job_reads_each_once(job):
    plan = job.plan()
    assert job.sent() == 0
    assert not (job.root / "cache").exists()
    assert [archive.path for archive in plan.split("train").unopened] == [
        f"{job.web.url}/{n:03d}.tar" for n in range(3)
    ]
    plan = fill_in_process(plan)[0]
    assert job.sent() <= job.size() + TARS * SLACK
    assert_complete(job, plan)
    assert images_seen(job.log) == TARS * PHOTOS
    assert job.staged() == []
    job.sent()
    again, computed = fill_in_process(job.plan())
    assert (job.sent(), computed) == (0, 0)
    assert again.split("train").dataset == plan.split("train").dataset


@pytest.mark.parametrize("ranges", [True, False])
def test_the_cache_is_that_of_local_tars(job, ranges):
    job.web.ranges = ranges
    job.put(
        2,
        job.photos[2 * PHOTOS :],
        ("bad.jpg", b"no image"),
        ("bad.cls", b"1"),
        ("readme.txt", b"x"),
        ("lonely.cls", b"1"),
    )
    (job.root / "local").mkdir()
    for name, data in job.web.files.items():
        (job.root / "local" / name).write_bytes(data)
    local = job.fill(
        "data.max_bad=0.1",
        data=f"{job.root}/local",
    )
    cache = content(job.root / "cache")
    (job.root / "cache").rename(job.root / "local-cache")
    plan = job.fill("data.max_bad=0.1")
    assert job.sent() <= job.size() + TARS * SLACK
    assert content(job.root / "cache") == cache
    one, two = (found.split("train") for found in (local, plan))
    assert one.dataset.fingerprint == two.dataset.fingerprint
    assert [part.id for part in one.dataset.parts] == [part.id for part in two.dataset.parts]
    for number in range(TARS):
        columns = ["sample_id", "label", "offset", "size", "key", "row"]
        tables = [
            pq.read_table(
                job.root / where / "datasets/tars-train" / split.dataset.selections[number].file, columns=columns
            )
            for where, split in (("local-cache", one), ("cache", two))
        ]
        assert tables[0] == tables[1]
    bad = [split.listing.bad.select(["sample_id", "label", "offset", "size", "reason", "read"]) for split in (one, two)]
    assert bad[0].num_rows == 1
    assert bad[0] == bad[1]
    assert set(two.left_out) == set(one.left_out)


def test_the_plan_counts_what_it_knows_and_says_what_not(job):
    assert uncounted(job.plan()).startswith("the images of data.train, whose tars")
    text = cache_plan(job.plan(), job.config())
    assert "an unknown number from" in text
    assert "3 new tars, " in text
    assert "not read before the job stores them\n" in text
    job.fill()
    job.put(3, job.photos[:10])
    plan = job.plan()
    split = plan.split("train")
    assert (len(split.unopened), split.dataset.count) == (1, TARS * PHOTOS)
    assert 10 <= split.expected <= 40
    text = cache_plan(plan, job.config())
    assert f"about {split.images} from" in text
    assert f"not read before the job stores them: about {split.expected} images" in text
    assert missing_bytes(plan) >= job.size("003.tar")
    assert uncounted(plan) is None


def test_training_is_planned_without_numbers_and_checked_once_they_are_known(job, tmp_path):
    config = job.config(f"train.batch_size={TARS * PHOTOS + 1}")
    phase = Phase(config, job.plan())
    assert "an unknown number of steps" in training_plan(phase)["training"]
    filled = Phase(config, fill_in_process(phase.plan)[0])
    for refused in (lambda: training_plan(filled), lambda: distill([filled], None, tmp_path)):
        with pytest.raises(
            UserError, match=rf"train.batch_size={TARS * PHOTOS + 1} is more than the {TARS * PHOTOS} views"
        ):
            refused()


def test_labels_are_looked_for_once_the_tars_are_read(job):
    members = [(f"{photo.stem}.jpg", photo.read_bytes()) for photo in job.photos]
    job.web.files = {"000.tar": tar_of(members)}
    plan = job.plan()
    check_labels(plan.splits)
    with pytest.raises(UserError, match=r"data.train: .* has no labels, which this evaluation needs"):
        check_labels(fill_in_process(plan)[0].splits)


def test_a_tar_that_is_added_is_read_alone_and_what_it_shares_is_not_computed(job):
    job.fill()
    job.sent()
    seen = images_seen(job.log)
    job.put(3, job.photos[:10])
    plan = job.fill()
    assert job.sent() <= job.size("003.tar") + SLACK
    assert images_seen(job.log) == seen
    assert plan.split("train").dataset.count == TARS * PHOTOS + 10
    job.web.files["000.tar"] = job.web.files.pop("003.tar")
    plan = job.fill(data=f"{job.web.url}/{{000..002}}.tar")
    assert images_seen(job.log) == seen
    assert plan.split("train").dataset.count == 2 * PHOTOS + 10


def test_train_and_val_of_the_same_tars_read_them_once(job):
    data = f"{job.web.url}/{{000..002}}.tar"
    plan = job.fill(f"data.val={data}")
    assert job.sent() <= job.size() + TARS * SLACK
    assert [split.dataset.count for split in plan.splits] == [TARS * PHOTOS] * 2
    assert images_seen(job.log) == TARS * PHOTOS


def test_waves_bound_what_is_staged_and_held_and_change_nothing(job, monkeypatch):
    whole = job.fill().split("train").dataset
    expected = content(job.root / "cache")
    (job.root / "cache").rename(job.root / "before")
    most, held = [0], [0]
    monkeypatch.setattr(waves, "WAVE_BYTES", job.size("000.tar") + 1)
    for module in (waves, draft):
        monkeypatch.setattr(module, "WAVE_IMAGES", PHOTOS)
    drop, make = staging.Staging.drop_images, draft.make_dataset
    images = lambda: sum(path.stat().st_size for path in job.staged() if path.name.startswith("images-"))  # noqa: E731

    def watch(self):
        most.append(images())
        drop(self)

    def count(empty, parts, samples, *more):
        held.append(sum(table.num_rows for table in samples.values()))
        return make(empty, parts, samples, *more)

    monkeypatch.setattr(staging.Staging, "drop_images", watch)
    monkeypatch.setattr(draft, "make_dataset", count)
    plan = job.fill()
    assert 0 < max(most) <= job.size("000.tar")
    assert max(held) <= PHOTOS
    assert plan.split("train").dataset.fingerprint == whole.fingerprint
    assert plan.split("train").dataset.selections == whole.selections
    assert content(job.root / "cache") == expected
    assert_complete(job, plan)


def test_images_of_later_waves_join_the_parts_of_earlier_ones(job, monkeypatch):
    for module in (waves, draft):
        monkeypatch.setattr(module, "WAVE_IMAGES", PHOTOS)
    for number in range(1, TARS):
        names = [photo.with_name(f"{number}-{photo.name}") for photo in job.photos[:PHOTOS]]
        for old, new in zip(job.photos, names, strict=False):
            new.write_bytes(old.read_bytes())
        job.put(number, names)
    plan = job.fill()
    dataset = plan.split("train").dataset
    assert images_seen(job.log) == PHOTOS
    assert (len(dataset.parts), dataset.count) == (1, TARS * PHOTOS)
    assert fill_in_process(job.plan())[1] == 0
    assert {*job.plan().split("train").sample_ids()} == {*plan.split("train").sample_ids()}
    assert len(plan.split("train").sample_ids()) == TARS * PHOTOS


def test_a_tar_that_cannot_be_read_is_named_and_the_others_are_not_read_again(job):
    job.web.files["001.tar"], whole = job.web.files["001.tar"][:9000], job.web.files["001.tar"]
    with pytest.raises(UserError, match=rf"^{job.web.url}/001.tar: truncated, compressed or not a tar file") as error:
        job.fill()
    assert "\n" not in str(error.value)
    job.web.files["001.tar"] = whole
    job.sent()
    plan = job.fill()
    assert job.sent() <= job.size("001.tar") + SLACK
    assert_complete(job, plan)


@pytest.mark.parametrize(
    ("members", "line"),
    [
        ([("a.jpg", b"x"), ("a.JPG", b"x")], "differ only in upper and lower case"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], "the label in member 'a.cls' is not a class number"),
    ],
)
def test_a_bad_member_is_named(job, members, line):
    job.put(2, job.photos[2 * PHOTOS :], *members)
    with pytest.raises(UserError, match=rf"^{job.web.url}/002.tar: .*{line}.*; correct or remove that member$"):
        job.fill()


def test_a_tar_that_changes_under_the_job_is_named_and_the_next_start_reads_it(job):
    plan = job.plan()
    job.put(1, job.photos[PHOTOS : 2 * PHOTOS - 1])
    job.web.tags["001.tar"] = '"another"'
    with pytest.raises(
        UserError, match=rf"^{job.web.url}/001.tar has changed since it was listed: run the same command"
    ):
        fill_in_process(plan)
    job.photos.pop(2 * PHOTOS - 1)
    job.sent()
    filled = job.fill()
    assert job.sent() <= job.size("001.tar") + SLACK
    assert_complete(job, filled)
    assert {item.why for item in _old_garbage(job)} <= {"no job has come back for it"}


def test_a_tar_that_changes_while_it_is_read_is_not_used(job, monkeypatch):
    stream = staging._Pieces.flush

    def change(self):
        job.web.files["001.tar"] += bytes(512)
        stream(self)

    monkeypatch.setattr(staging._Pieces, "flush", change)
    with pytest.raises(UserError, match=rf"^{job.web.url}/001.tar has changed since it was listed"):
        job.fill()


def test_a_tar_that_is_gone_is_named(job):
    plan = job.plan()
    del job.web.files["001.tar"]
    with pytest.raises(UserError, match=rf"^{job.web.url}/001.tar: cannot be found"):
        fill_in_process(plan)


def test_a_store_that_fails_stops_the_job_with_its_line(job):
    plan = job.plan()
    job.web.faults = ["unavailable"] * 1000
    with pytest.raises(UserError, match=r"^cannot read .*503.*; tried 6 times"):
        fill_in_process(plan)
    job.web.clear()
    assert_complete(job, fill_in_process(plan)[0])


def test_answers_that_break_off_are_asked_for_again(job):
    plan = job.plan()
    job.web.faults = ["unavailable", "", "cut", "unavailable", "cut"]
    assert_complete(job, fill_in_process(plan)[0])
    assert job.web.faults == []


def test_tars_without_an_image_are_refused(job):
    for number in range(TARS):
        job.put(number, [], ("readme.txt", b"x"))
    with pytest.raises(
        UserError, match=rf"{job.web.url}.*: no images found in 3 files; left out: 3 members that are no"
    ):
        job.fill()
    job.put(1, job.photos)
    assert job.fill().split("train").dataset.count == TARS * PHOTOS


def test_samples_of_one_name_in_two_tars_of_one_name_are_refused(job):
    one = job.web.files["000.tar"]
    job.web.files = {"a/000.tar": one, "b/000.tar": one}
    data = f"{job.web.url}/{{a,b}}/000.tar"
    with pytest.raises(
        UserError, match=r"^sample id '000.tar/.*' occurs more than once \(in .*/a/000.tar and .*/b/000.tar\)"
    ):
        job.fill(data=data)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["images-", "samples-", "bad-", "archive.json"])
@pytest.mark.parametrize("damage", [_flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:100])])
def test_damage_in_what_is_staged_is_noticed_and_read_again(job, monkeypatch, caplog, name, damage):
    with monkeypatch.context() as patch:
        patch.setattr(build, "read_wave", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            job.fill()
    (path,) = [path for path in job.staged() if path.name.startswith(name) and "001.tar" in _seal_beside(path)["uri"]]
    damage(path)
    job.sent()
    plan = job.fill()
    shards = -(-PHOTOS // 8) if name == "images-" else 1  # each asks for its own images, and for what is between them
    assert 0 < job.sent() <= shards * (job.size("001.tar") + SLACK)
    assert "again" in caplog.text or (damage is Path.unlink and name != "images-")
    assert_complete(job, plan)
    assert job.staged() == []


def _seal_beside(path):
    return json.loads(path.with_name("archive.json").read_text())


def _ended(process):
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode


@pytest.mark.slow
def test_killed_at_any_moment_no_tar_that_was_read_is_read_again(job):
    """A tar is staged in 4 files, each of which is opened, then renamed: every such moment; later ones in larger steps."""
    fill_in_process(job.plan())
    expected = content(job.root / "cache")
    (job.root / "cache").rename(job.root / "undisturbed")
    step, code = 1, -signal.SIGKILL
    while code:
        plan = job.plan()
        job.sent()
        process = FORK.Process(target=fill_and_die, args=(plan, step))
        process.start()
        code = _ended(process)
        assert job.sent() <= job.size() + TARS * SLACK
        sealed = {_seal_beside(path)["uri"].rpartition("/")[2] for path in job.staged() if path.name == "archive.json"}
        versions = [*(job.root / "cache").glob("datasets/*/version-*.json")]
        plan = job.fill()
        known = job.size(*sealed) if sealed else 0
        assert job.sent() <= (0 if versions else job.size() - known + (TARS - len(sealed)) * SLACK)
        assert content(job.root / "cache") == expected
        assert plan.split("train").dataset.count == TARS * PHOTOS
        os.rename(job.root / "cache", job.root / f"killed{step}")
        step += 1 if step < 3 * 8 + 4 else 12
    assert step > 60


@pytest.mark.slow
def test_two_jobs_at_once_that_are_killed_and_started_again_make_the_same_cache(job):
    fill_in_process(job.plan())
    expected = content(job.root / "cache")
    (job.root / "cache").rename(job.root / "undisturbed")
    for first, second in ((7, 60), (20, 21), (33, 12), (0, 0)):
        plans = [job.plan(), job.plan()]
        processes = [FORK.Process(target=fill_and_die, args=item) for item in zip(plans, (first, second), strict=True)]
        for process in processes:
            process.start()
        [_ended(process) for process in processes]
        plan = job.fill()
        assert content(job.root / "cache") == expected
        assert_complete(job, plan)
        os.rename(job.root / "cache", job.root / f"both{first}")


def test_held_out_images_some_of_which_the_tars_hold_are_stored_once(job):
    write_photos(job.root / "val", 20, seed=1)
    for photo in job.photos[::4]:
        shutil.copy(photo, job.root / f"val/class0/again-{photo.name}")
    plan, _ = fill_in_process(job.plan(f"data.val={job.root}/val"))
    train, val = (split.dataset for split in plan.splits)
    assert (train.count, val.count) == (TARS * PHOTOS, 20 + len(job.photos[::4]))
    assert images_seen(job.log) == TARS * PHOTOS + 20
    assert_complete(job, plan)


def test_two_jobs_that_stage_the_same_tars_at_once_do_no_harm(job, monkeypatch):
    without_ray(monkeypatch)
    plans, both = [job.plan(), job.plan()], threading.Barrier(2)
    write, errors = staging.Staging.write, []

    def together(self, source):
        write(self, source)
        both.wait(30)

    monkeypatch.setattr(staging.Staging, "write", together)

    def fill(plan):
        try:
            build.build_cache(plan, job.config())
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=fill, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert job.sent() <= 2 * job.size() + 2 * TARS * SLACK
    assert_complete(job, job.fill())
    assert job.staged() == []


def test_what_another_job_has_removed_is_staged_again(job, monkeypatch):
    stage = build._stage

    def and_remove(*arguments):
        stage(*arguments)
        shutil.rmtree(job.root / "cache/staging")

    monkeypatch.setattr(build, "_stage", and_remove)
    assert_complete(job, job.fill())


def test_what_another_job_has_read_meanwhile_is_not_read(job):
    plan = job.plan()
    job.fill()
    job.sent()
    filled, computed = fill_in_process(plan)
    assert (job.sent(), computed) == (0, 0)
    assert_complete(job, filled)


def test_an_image_that_is_too_large_is_left_out_and_stays_so(job, monkeypatch):
    largest = max(photo.stat().st_size for photo in job.photos)
    monkeypatch.setattr(base, "MAX_BYTES", largest - 1)
    plan = job.plan()
    first = job.fill("data.max_bad=0.1").split("train").listing.bad
    assert 0 < first.num_rows < 4
    assert not any(first["read"].to_pylist())
    for again in (plan, job.plan()):
        split = fill_in_process(again, max_bad=0.1)[0].split("train")
        assert split.listing.bad == first
        assert split.dataset.count == TARS * PHOTOS - first.num_rows


def _old_garbage(job):
    then = time.time() - 2 * FOLDER_AGE_S
    for path in (job.root / "cache").rglob("*"):
        os.utime(path, (then, then))
    return find_garbage(job.store)


def test_what_a_job_leaves_staged_is_listed_counted_and_removed_once_it_is_old(job, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(build, "read_wave", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            job.fill()
    size = sum(path.stat().st_size for path in job.staged())
    assert size > 0.5 * job.size()
    entry = find_entry(job.store, "staging")
    assert (entry.bytes, entry.what.split(",")[0]) == (size, "images of 3 archives")
    plan = job.plan()
    assert cache_bytes(plan) + image_bytes(plan) == sum(
        path.stat().st_size for path in (job.root / "cache").rglob("*") if path.is_file()
    )
    assert find_garbage(job.store) == []
    garbage = _old_garbage(job)
    assert {item.path for item in garbage if "/staging/" in item.path} == {*map(str, job.staged())}
    remove_garbage(garbage)
    assert job.staged() == []
    assert_complete(job, job.fill())
    assert "staging" not in {entry.address for entry in take_inventory(job.store)}


def test_what_is_staged_can_be_deleted(job, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(build, "read_wave", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            job.fill()
    delete_entry(find_entry(job.store, "staging"))
    assert job.staged() == []


def test_features_that_cannot_fit_are_refused_once_the_images_are_counted(job, monkeypatch):
    monkeypatch.setattr(Store, "free_bytes", lambda self: 4 * job.size())
    plan = job.plan("teachers=[{model: 'tests.fakes:colours', args: {dim: 5000}}]")
    check_space(plan)
    with pytest.raises(UserError, match="the missing shards take up to"):
        fill_in_process(plan)
    assert job.staged() == []
