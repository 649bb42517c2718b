"""`kill -9` between any two steps, two writers at once, a full disk, damaged files: no wrong row, no finished shard lost."""

import random
import resource
import shutil
import signal
from contextlib import contextmanager

import pytest

from pipeline.cache.fill.ingest import Ingest, ingest_row
from pipeline.cache.fill.plan import plan_cache
from pipeline.cache.read.reader import CacheReader
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.storage.store import Store
from tests.fakes import fill_in_process, write_photos
from tests.faults import FORK, content, fill_and_die, listed

PHOTOS = 20
KILLED = -signal.SIGKILL
NEVER = 0
COLOURS = "{model: 'tests.fakes:colours', args: {dim: 16}}"  # enough channels for pca to project them


@pytest.fixture
def crops():
    """Crops of an image; 0: the whole image."""
    return 0


@pytest.fixture
def make_plan(tmp_path, crops):
    """Plans two shards of ten photos and one teacher."""
    write_photos(tmp_path / "photos", PHOTOS)
    data = [
        f"data.train={tmp_path}/photos",
        f"work={tmp_path}/work",
        "cache.shard_size=10",
        f"views.crops={crops}",
        f"teachers=[{COLOURS}]",
    ]
    return lambda: plan_cache(load_config(DistillJobConfig, None, data), Store.at(tmp_path / "cache"))


@pytest.fixture
def plan(make_plan):
    """Nothing is computed."""
    return make_plan()


@pytest.fixture
def undisturbed(tmp_path, make_plan, crops):
    """Content of the cache that one process makes, which is then removed."""
    fill_in_process(make_plan())
    expected = content(tmp_path / "cache")
    assert len(expected) == (6 if crops else 4)
    shutil.rmtree(tmp_path / "cache")
    return expected


def _start(plan, step, lag=0.0):
    process = FORK.Process(target=fill_and_die, args=(plan, step, lag))
    process.start()
    return process


def _ended(process):
    process.join()
    assert process.exitcode in (0, KILLED)
    return process.exitcode


def _keys_read(plan):
    filled, computed = fill_in_process(plan)
    assert computed == 0
    reader = CacheReader(filled.splits[0].dataset, plan.teachers, image_size=32, batch_size=PHOTOS)
    return sorted(key for batch in reader.batches(0) for key in batch.keys)


@pytest.mark.slow
@pytest.mark.parametrize("crops", [0, 2])
def test_killed_at_every_single_write_the_next_start_does_the_rest(tmp_path, plan, undisturbed):
    step = 2  # before its first file has its name; every second step is such a moment
    while _ended(_start(plan, step)) == KILLED:
        finished = listed(tmp_path / "cache")
        assert _ended(_start(plan, NEVER)) == 0
        assert finished.items() <= listed(tmp_path / "cache").items()
        assert content(tmp_path / "cache") == undisturbed
        shutil.rmtree(tmp_path / "cache")
        step += 2
    assert step > 4 * len(undisturbed)


@pytest.mark.slow
def test_killed_at_random_moments_nothing_finished_is_lost_or_done_again(tmp_path, make_plan, plan, undisturbed):
    kills = 0
    for seed in range(20):
        draw, finished = random.Random(seed), {}
        while _ended(_start(plan, draw.randint(1, 36), draw.uniform(0, 0.005))) == KILLED:
            now = listed(tmp_path / "cache")
            assert finished.items() <= now.items()
            finished, kills = now, kills + 1
        assert finished.items() <= listed(tmp_path / "cache").items()
        assert content(tmp_path / "cache") == undisturbed
        assert _keys_read(make_plan()) == sorted(plan.splits[0].sample_ids())
        shutil.rmtree(tmp_path / "cache")
    assert kills >= 20


@pytest.mark.slow
def test_two_writers_that_are_killed_at_random_moments_leave_the_same_cache(tmp_path, plan, undisturbed):
    for seed in range(6):
        draw, finished, codes = random.Random(seed), {}, [KILLED]
        while KILLED in codes:
            both = [_start(plan, draw.randint(1, 48), draw.uniform(0, 0.005)) for _ in range(2)]
            while any(process.is_alive() for process in both):
                content(tmp_path / "cache")  # what is listed is whole at every moment
            codes = [_ended(process) for process in both]
            now = content(tmp_path / "cache")
            assert finished.items() <= now.items()
            finished = now
        assert finished == undisturbed
        shutil.rmtree(tmp_path / "cache")


@contextmanager
def _largest_file(size):
    """The kernel refuses to let a file of this process grow larger, as a quota or a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_kernel_refuses_is_named_and_nothing_of_it_stays(tmp_path, plan, undisturbed):
    split = fill_in_process(plan)[0].splits[0]
    (part,) = split.dataset.parts
    part.images.unlist(1)
    finished = listed(tmp_path / "cache")
    everything = sorted((tmp_path / "cache").rglob("*"))
    with _largest_file(8192):
        refused = Ingest({part.key: part}, {"train": split.source})(
            ingest_row("train", part, 1, split.dataset.samples(0))
        )
    assert refused["error"].startswith(f"cannot write {part.images.store.uri}/shard-00001-")
    assert refused["error"].endswith(": File too large")
    assert sorted((tmp_path / "cache").rglob("*")) == everything
    part.refresh()
    fill_in_process(plan)
    assert finished.items() <= listed(tmp_path / "cache").items()
    assert content(tmp_path / "cache") == undisturbed
