"""Fine-tuning data by URI is that of the same files by local path."""

from functools import partial

import numpy as np
import pytest
import torch

from pipeline.downstream.images import refuse_same_images
from pipeline.downstream.job import with_absolute_paths
from pipeline.downstream.sampling import Draw, prepare
from pipeline.errors import UserError
from pipeline.storage import remote
from pipeline.storage.remote import StoreError
from tests.downstream.drawings import locations
from tests.storage.s3_endpoint import S3Endpoint, use
from tests.storage.web_server import WebServer

TASKS = ("classify", "segment", "detect")


@pytest.fixture(scope="module")
def contents(drawings):
    return {path.relative_to(drawings).as_posix(): path.read_bytes() for path in drawings.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def server(contents):
    server = S3Endpoint()
    server.upload("drawn/set", contents)
    yield server
    server.close()


@pytest.fixture
def endpoint(server, monkeypatch):
    """An S3 endpoint that holds the drawings in s3://drawn/set."""
    use(server, monkeypatch)
    return server


@pytest.fixture
def web(contents, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.001)
    server = WebServer(dict(contents))
    yield server
    server.close()


@pytest.fixture
def job_at(make_job, drawings):
    """A job on the drawings below another root."""

    def make(task, root, *more):
        return make_job(task, *(item.replace(str(drawings), root) for item in locations(drawings, task)), *more)

    return make


def check_equal(task, expected, found):
    rows = [Draw(number, row) for number, row in enumerate([5, 0, 3, 7])]
    assert (len(found), found.classes, found.check()) == (len(expected), expected.classes, expected.check())
    assert [found.key(row) for row in range(8)] == [expected.key(row) for row in range(8)]
    mine, other = tensors(task.batch(found, rows)), tensors(task.batch(expected, rows))
    assert len(mine) > 1
    assert all(torch.equal(one, two) for one, two in zip(mine, other, strict=True))


def tensors(batch):
    if isinstance(batch, torch.Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else []
    return [tensor for part in parts for tensor in tensors(part)]


@pytest.mark.parametrize("task", TASKS)
def test_s3_gives_what_local_files_give(task, endpoint, job_at, drawings):
    local, job = job_at(task, str(drawings)).task, job_at(task, "s3://drawn/set")
    endpoint.fail_at_random(0.1, seed=0)
    check_equal(job.task, local.open("train"), job.task.open("train"))
    absolute = with_absolute_paths(job.config)
    assert absolute.data.train == job.config.data.train
    assert absolute.data.train.startswith("s3://drawn/set/")


def test_coco_images_of_a_web_server_need_no_listing(web, job_at, drawings):
    task = job_at("detect", web.url).task
    check_equal(task, job_at("detect", str(drawings)).task.open("train"), task.open("train"))


def test_processes_that_prepare_batches_read_from_a_store(endpoint, job_at):
    task = job_at("segment", "s3://drawn/set").task
    examples = task.open("train")
    draws = [[Draw(number, number)] for number in range(4)]
    expected = [task.batch(examples, part) for part in draws]
    found = list(prepare(partial(task.batch, examples), draws, 2))
    assert [batch.keys for batch in found] == [batch.keys for batch in expected]
    assert all(np.array_equal(a.images, b.images) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("task", TASKS)
def test_images_that_are_in_both_splits_are_refused(task, endpoint, job_at, drawings):
    opened = job_at(task, "s3://drawn/set").task
    with pytest.raises(UserError, match=r"8 of its 8 images are images of data.train too"):
        refuse_same_images(opened.open("train"), opened.open("train"))
    refuse_same_images(opened.open("train"), job_at(task, str(drawings)).task.open("train"))


def test_label_maps_of_a_web_server_are_refused(web, job_at):
    with pytest.raises(
        UserError, match=rf"^{web.url}/.*: a web server has no folders that can be listed; copy the folder"
    ):
        job_at("segment", web.url, f"segment.train_masks={web.url}/masks/train").task.open("train")


def test_what_is_missing_is_named(endpoint, web, job_at):
    for root in ("s3://drawn/none", "s3://no-such-bucket/set"):
        with pytest.raises(UserError, match=rf"{root}/.*: no such (file or )?folder"):
            job_at("classify", root).task.open("train")
        with pytest.raises(UserError, match=rf"{root}/images/train: no such folder of images"):
            job_at("detect", root).task.open("train")
    with pytest.raises(UserError, match=r"classes\.csv: cannot be read \(No such file or directory\)"):
        job_at("segment", "s3://drawn/set", "segment.classes=s3://drawn/set/classes.csv").task.open("train")
    with pytest.raises(UserError, match=r"credentials and options in an https:// address are refused"):
        job_at("segment", "s3://drawn/set", "segment.classes=https://host/x?sig=secret").task.open("train")
    with pytest.raises(UserError, match=r"none\.json: no such file; set detect.train_annotations"):
        job_at("detect", web.url, f"detect.train_annotations={web.url}/none.json").task.open("train")
    del web.files["images/train/drawing3.png"]
    with pytest.raises(UserError, match=r"drawing3\.png: no such file, but .*instances_train\.json lists it"):
        job_at("detect", web.url).task.open("train").check()


def test_a_store_that_fails_is_no_damaged_image(endpoint, job_at):
    examples = job_at("segment", "s3://drawn/set").task.open("train")
    endpoint.fail("SlowDown", 10_000)
    for call in (examples.check, lambda: examples.read(0)):
        with pytest.raises(StoreError, match="tried 6 times; check the network"):
            call()
