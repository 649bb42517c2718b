"""Jobs whose disk, node or neighbour lets them down: no wrong row, no finished shard lost, one clear line."""

import random
import shutil
import signal
import subprocess
import threading
import time

import pytest

from jobs import precompute
from jobs._cli import DEFAULT_RECIPE
from pipeline.cache.fill.plan import plan_cache
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.storage.store import Store
from tests.cluster.nodes import cluster, running, start_precompute, wait_until
from tests.fakes import SMALL_JOB, colours_entry, fill_in_process
from tests.faults import content, listed
from tests.processes import kill

SHARDS = 4


@pytest.fixture
def calls(tmp_path):
    """Where the teacher writes down its calls."""
    return tmp_path / "calls"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Runs and MLflow's store of all jobs here, so that the store is created once."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def arguments(calls, work):
    """A job of four shards of half a second each."""
    teacher = colours_entry(calls, dim=16, delay=0.5)
    # A projection would be fitted on all of these few images before the first shard is committed.
    return [*SMALL_JOB, "cache.batch_size=48", "cache.codec=int8", f"work={work}", f"teachers=[{teacher}]"]


@pytest.fixture
def undisturbed(tmp_path, arguments):
    """Content of the cache that one process makes, one shard after the other."""
    plan = plan_cache(load_config(DistillJobConfig, DEFAULT_RECIPE, arguments), Store.at(tmp_path / "undisturbed"))
    assert fill_in_process(plan, batch_size=48)[1] == SHARDS
    (tmp_path / "calls").unlink()
    return content(tmp_path / "undisturbed")


def _mount(folder, options):
    mount = shutil.which("mount")
    command = [mount, "-t", "tmpfs", "-o", options, "tmpfs", folder]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    _mount(folder, "size=8m")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def _teacher_shards(cache):
    return list(cache.glob("parts/*/views/full/teachers/*/shard-*.json"))


def _fill_up(disk):
    with (disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            try:
                ballast.write(b"\0" * 4096)
            except OSError:
                return


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_disk_that_fills_up_or_is_read_only_is_named_and_loses_nothing(disk, arguments, undisturbed, job, refused):
    cache = disk / "cache"
    arguments = [*arguments, f"cache.uri={cache}"]
    other = threading.Thread(target=lambda: wait_until(lambda: _teacher_shards(cache)) and _fill_up(disk))
    other.start()
    line = refused(precompute.main, *arguments)
    other.join()
    assert line.startswith(f"error: cannot write {cache}/")
    assert line.endswith(": No space left on device")
    finished, left = listed(cache), SHARDS - len(_teacher_shards(cache))
    assert 0 < left < SHARDS

    (disk / "ballast").unlink()
    assert job(precompute.main, *arguments)[1]["shards_computed"] == left
    assert finished.items() <= listed(cache).items()
    assert content(cache) == undisturbed

    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert job(precompute.main, *arguments)[1]["shards_computed"] == 0
    line = refused(precompute.main, *arguments, "teachers=['tests.faults:unloadable']")
    assert line.startswith(f"error: cache.uri: cannot write {cache}/")
    assert line.endswith(": Read-only file system; name a writable location")


def test_a_cache_below_a_file_is_refused_before_a_teacher_is_loaded(tmp_path, arguments, refused):
    (tmp_path / "file").write_text("no folder")
    line = refused(
        precompute.main, *arguments, f"cache.uri={tmp_path}/file/cache", "teachers=['tests.faults:unloadable']"
    )
    assert line.startswith(f"error: cache.uri: cannot write {tmp_path}/file/cache/")
    assert line.endswith(": Not a directory; name a writable location")


@pytest.mark.slow
def test_two_jobs_on_one_cache_outlast_the_kill_of_worker_actor_node_and_driver(tmp_path, arguments, undisturbed):
    cache, logs, draw = tmp_path / "cache", [tmp_path / "log0", tmp_path / "log1"], random.Random(0)
    gate = tmp_path / "gate"  # closed, the teacher answers for one shard and no more
    arguments = [*arguments, f"teachers=[{colours_entry(tmp_path / 'calls', dim=16, gate=gate)}]"]
    with cluster(4, 4) as (head, second):
        jobs = [start_precompute([*arguments, f"cache.uri={cache}"], head.address, log) for log in logs]

        def seen(found):
            result = wait_until(lambda: found() or not all(job.is_alive() for job in jobs))
            assert all(job.is_alive() for job in jobs), "".join(log.read_text() for log in logs)
            return result

        kill(draw.choice(seen(lambda: running("(Ingest)", head, second))))
        seen(lambda: _teacher_shards(cache) and running("(Extract)", head, second))
        assert len(_teacher_shards(cache)) == 1
        finished = content(cache)
        kill(draw.choice(running("(Extract)", head, second)))
        for victim in draw.sample([second, jobs[0]], 2):
            time.sleep(draw.uniform(0, 0.2))
            victim.kill()
        gate.touch()
        jobs[0].join()
        assert jobs[0].exitcode == -signal.SIGKILL
        jobs[0] = start_precompute([*arguments, f"cache.uri={cache}"], head.address, logs[0])
        while any(job.is_alive() for job in jobs):
            now = content(cache)  # what is listed is whole at every moment, and stays
            assert finished.items() <= now.items()
            finished = now
    assert [job.exitcode for job in jobs] == [0, 0], "".join(log.read_text() for log in logs)
    assert content(cache) == undisturbed
