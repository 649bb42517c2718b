import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from pipeline.cache.read.reader import CacheReader
from pipeline.cache.read.reader_process import ReaderProcess
from pipeline.errors import UserError
from tests.conftest import REPOSITORY

SETTINGS = {"image_size": 32, "batch_size": 16, "window": 64}


@pytest.fixture
def readers(filled):
    """A reader in this process and one in another, with the same settings."""
    arguments = filled.train, filled.plan.teachers
    return CacheReader(*arguments, **SETTINGS), ReaderProcess(*arguments, **SETTINGS)


def _assert_equal(here, there):
    assert (here.keys, here.position) == (there.keys, there.position)
    assert torch.equal(here.images, there.images)
    assert torch.equal(here.labels, there.labels)
    assert here.features.keys() == there.features.keys()
    for teacher, kinds in here.features.items():
        for kind, rows in kinds.items():
            assert torch.equal(rows, there.features[teacher][kind])


def test_batches_equal_those_of_an_in_process_reader(readers):
    here, there = readers
    assert here.steps(0) == there.steps(0) == 9
    assert here.shuffle_quality(2) == there.shuffle_quality(2)
    for epoch, start in ((0, 0), (1, 0), (1, 4), (2, 8), (2, 9)):
        for ours, theirs in zip(here.batches(epoch, start), there.batches(epoch, start), strict=True):
            _assert_equal(ours, theirs)


def test_batches_still_in_use_do_not_change(readers):
    here, there = readers
    for ours, theirs in zip(list(here.batches(0)), list(there.batches(0)), strict=True):
        _assert_equal(ours, theirs)


def test_memory_is_reused(readers):
    _, there = readers
    for epoch in range(6):
        for batch in there.batches(epoch):
            places = {batch.images.data_ptr(), *(rows.data_ptr() for rows in batch.features.popitem()[1].values())}
            assert len(places) == 3
            del batch
    gc.collect()
    files = {file for _, file in there.attached.segments}
    assert len(files) <= 5 * (2 + 4 + 3)  # arrays per batch; batches sent, in the window, being decoded


def test_an_abandoned_iteration_does_not_disturb_the_next(readers):
    here, there = readers
    for _ in range(3):
        for number, _ in enumerate(there.batches(0)):
            if number == 2:
                break
        for ours, theirs in zip(here.batches(1), there.batches(1), strict=True):
            _assert_equal(ours, theirs)


def test_errors_are_raised_in_this_process(filled, readers):
    _, there = readers
    next(iter(there.batches(0)))
    teacher = filled.plan.teachers[0]
    (part,) = filled.train.parts
    folder = part.teacher(teacher.id)
    table = folder.read(folder.records()[0])
    folder.commit(0, table.take(list(range(len(table)))[::-1]))
    part.refresh()
    swapped = ReaderProcess(filled.train, filled.plan.teachers, **SETTINGS)
    with pytest.raises(UserError, match=r"shard 0 .* does not hold the keys of its images"):
        list(swapped.batches(0))
    with pytest.raises(UserError, match="too few for 1 training workers of 1000"):
        ReaderProcess(filled.train, filled.plan.teachers, **{**SETTINGS, "batch_size": 1000})


def test_a_killed_process_is_named_and_replaced(readers):
    here, there = readers
    batches = there.batches(0)
    kept = next(batches)
    os.kill(there.process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="ended with exit code -9; if memory ran out"):
        list(batches)
    for ours, theirs in zip(here.batches(0, 3), there.batches(0, 3), strict=True):
        kept = None  # its memory belonged to the killed process; the new one must not reuse it
        _assert_equal(ours, theirs)
    assert kept is None


def test_a_process_killed_between_its_message_and_its_memory_is_named(readers, monkeypatch):
    _, there = readers
    batches = there.batches(0)
    next(batches)
    assert there.pipe.poll(60)
    os.kill(there.process.pid, signal.SIGKILL)
    there.process.join()
    monkeypatch.setattr(there, "_send", lambda *_: None)  # the kernel closes the pipe a moment after the memory's files
    with pytest.raises(RuntimeError, match="ended with exit code -9; if memory ran out"):
        list(batches)


def _started_with(mark):
    """Processes with this in their environment, inherited from their parents."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("end", ["by itself", "killed"])
def test_it_exits_with_its_parent(filled, tmp_path, end):
    import cloudpickle

    file = tmp_path / "arguments"
    file.write_bytes(cloudpickle.dumps((filled.train, filled.plan.teachers)))
    script = (
        "import pickle, sys, time\n"
        "from pipeline.cache.read.reader_process import ReaderProcess\n"
        f"reader = ReaderProcess(*pickle.loads(open({str(file)!r}, 'rb').read()), **{SETTINGS})\n"
        "batches = reader.batches(0)\n"
        "next(batches)\n"
        "print(reader.process.pid, flush=True)\n"
        f"time.sleep({600 if end == 'killed' else 0})\n"
    )
    mark = f"READER_TEST={tmp_path}"
    environment = {**os.environ, "READER_TEST": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        reading = int(process.stdout.readline())
        if end == "killed":
            helpers = _started_with(mark)
            process.kill()
            assert reading in helpers
            assert len(helpers) >= 4  # with the decoders and the fork servers
        assert process.wait(60) == (-9 if end == "killed" else 0)
        said = process.stderr.read() if end == "by itself" else ""
    assert said == ""
    deadline = time.monotonic() + 30
    while _started_with(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _started_with(mark)


def test_no_process_starts_before_it_is_needed(readers):
    before = multiprocessing.active_children()
    readers[1].steps(3)
    assert multiprocessing.active_children() == before
