"""A whole job from images in a bucket to a cache, checkpoints and a student there, which loads from there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.storage.store import Store
from regla import load_predictor
from tests.cache.fill.test_archives import tar_of
from tests.conftest import REPOSITORY
from tests.fakes import SMALL_JOB, colours_entry, images_seen, write_photos
from tests.storage.s3_endpoint import S3Endpoint, use

SLACK = 4096


@pytest.fixture
def server(monkeypatch):
    """An S3 endpoint that this process, and the jobs that it starts, take for their store."""
    server = S3Endpoint()
    use(server, monkeypatch)
    yield server
    server.close()


def _asked(server, name):
    """Bytes of an object that have been asked for."""
    ranges = [asked for (_, path), asked in zip(server.requests, server.ranges, strict=True) if path.endswith(name)]
    spans = [asked.removeprefix("bytes=").split("-") for asked in ranges if asked]
    return sum(int(last) - int(first) + 1 for first, last in spans)


def _run(name, arguments, folder):
    command = [sys.executable, REPOSITORY / "jobs" / name, *arguments]
    done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_job_from_a_bucket_to_a_bucket(server, tmp_path):
    write_photos(tmp_path / "photos", 192)
    photos = sorted((tmp_path / "photos").rglob("*.jpg"))
    tars = {}
    for number, some in enumerate((photos[:72], photos[72:144])):
        members = [(f"{photo.stem}.jpg", photo.read_bytes()) for photo in some]
        labels = [(f"{photo.stem}.cls", photo.parent.name[-1].encode()) for photo in reversed(some)]
        tars[f"train-{number}.tar"] = tar_of([*members, *labels])
    server.upload("images/shards", tars)
    held_out = {photo.relative_to(tmp_path / "photos").as_posix(): photo.read_bytes() for photo in photos[144:]}
    held_out |= {f"class{label}/first.jpg": photos[label].read_bytes() for label in range(3)}
    server.upload("images/val", held_out)
    server.upload("lake", {"here": b""})
    data = ["data.train=s3://images/shards/train-{0..1}.tar", "data.val=s3://images/val"]
    places = [f"work={tmp_path}/work", "cache.uri=s3://lake/cache", "outputs=s3://lake/results"]
    teachers = [f"teachers=[{colours_entry(tmp_path / 'calls')}]", "train.checkpoints=s3://lake/checkpoints"]
    arguments = [*SMALL_JOB, *data, *places, *teachers]

    text, _ = _run("distill.py", [*arguments, "--dry-run"], tmp_path)
    assert "an unknown number from s3://images/shards" in text
    assert "2 new tars, " in text
    assert [_asked(server, name) for name in tars] == [0, 0]

    _, first = _run("distill.py", arguments, tmp_path)
    assert images_seen(tmp_path / "calls") == len({*photos, *photos[144:]})
    assert all(0 < _asked(server, name) <= len(data) + SLACK for name, data in tars.items())
    assert not [path for method, path in server.requests if method == "PUT" and path.startswith("/images/")]
    assert first["knn_after"] is not None
    assert not list((tmp_path / "work").rglob("*.parquet"))
    assert not Store.at(f"s3://lake/checkpoints/{Path(first['student']).parent.name}/train").folders()

    server.clear()
    _, second = _run("distill.py", [*arguments, "train.epochs=1", "name=again"], tmp_path)
    assert second["shards_computed"] == 0
    assert [_asked(server, name) for name in tars] == [0, 0]
    assert not [path for method, path in server.requests if method == "GET" and path.endswith(".jpg")]

    student = f"s3://lake/results/{Path(first['student']).parent.name}/student"
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    copied, own = (load_predictor(address).features([picture]) for address in (student, first["student"]))
    assert np.array_equal(copied, own)
