"""Parquet files of a store: their footers for a plan, the image column once for a job; the cache is that of local files."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs._plan import cache_plan
from pipeline.cache.fill.estimate import missing_bytes
from pipeline.cache.fill.plan import plan_cache
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.errors import UserError
from pipeline.storage.store import Store
from tests.fakes import colours_entry, fill_in_process, images_seen
from tests.faults import content
from tests.storage.web_server import WebServer

ROWS, FOOTER = 40, 1 << 16
"""Rows of a file; bytes that pyarrow asks for to read a footer."""


def _image(number):
    pixels = np.random.default_rng(number).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _file(first, paths=lambda number: None, labels=lambda number: number % 3, images=_image):
    numbers = range(first, first + ROWS)
    columns = {
        "image": [{"bytes": images(number), "path": paths(number)} for number in numbers],
        "label": pa.array([labels(number) for number in numbers]),
        "unused": [bytes(30_000)] * ROWS,
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, row_group_size=16, use_dictionary=False, compression="none")
    return sink.getvalue().to_pybytes()


class Job:
    def __init__(self, root):
        self.root, self.log, self.web = root, root / "calls", WebServer({})

    def plan(self, data, cache="cache"):
        settings = [f"data.train={data}", f"work={self.root}/work", f"teachers=[{colours_entry(self.log)}]"]
        small = ["data.name=rows", "cache.shard_size=8", "cache.codec=float32", "student.input_size=32"]
        self.config = load_config(DistillJobConfig, None, [*settings, *small])
        return plan_cache(self.config, Store.at(self.root / cache))

    def fill(self, *arguments):
        return fill_in_process(self.plan(*arguments))[0].split("train")

    @property
    def location(self):
        names = [name.removesuffix(".parquet") for name in self.web.files]
        pattern = names[0] if len(names) == 1 else f"{{{','.join(names)}}}"
        return f"{self.web.url}/{pattern}.parquet"

    def local(self):
        for name, data in self.web.files.items():
            (self.root / "local").mkdir(exist_ok=True)
            (self.root / "local" / name).write_bytes(data)
        return self.root / "local"

    def image_bytes(self, *names):
        files = [data for name, data in self.web.files.items() if not names or name in names]
        tables = [pq.read_table(pa.BufferReader(data), columns=["image"]) for data in files]
        return sum(len(image["bytes"]) for table in tables for image in table["image"].to_pylist())


@pytest.fixture
def job(tmp_path):
    job = Job(tmp_path)
    yield job
    job.web.close()


def _samples(split):
    rows = (row for part in split.dataset.parts for row in split.listing.samples(part.id).to_pylist())
    return sorted((row["sample_id"], row["label"], row["offset"], row["size"], row["key"]) for row in rows)


@pytest.mark.parametrize(
    "paths", [lambda number: None, lambda number: f"{number:04d}.jpg", lambda number: f"{number % ROWS:04d}.jpg"]
)
def test_the_image_column_is_read_once_and_the_cache_is_that_of_local_files(job, paths):
    job.web.files = {"a.parquet": _file(0, paths), "b.parquet": _file(100, paths)}
    local = job.fill(job.local(), "local-cache")
    plan = job.plan(job.location)
    assert job.web.sent <= 6 * FOOTER
    assert plan.split("train").images == 2 * ROWS
    text = cache_plan(plan, job.config)
    assert f"{2 * ROWS} from" in text
    assert "2 new Parquet files, " in text
    assert f"not read before the job stores them: {2 * ROWS} images" in text
    assert missing_bytes(plan) >= job.image_bytes()
    job.web.clear()
    remote = fill_in_process(plan)[0].split("train")
    assert job.image_bytes() < job.web.sent <= job.image_bytes() + 8 * FOOTER
    assert images_seen(job.log) == 2 * 2 * ROWS
    assert content(job.root / "cache") == content(job.root / "local-cache")
    assert _samples(remote) == _samples(local)
    assert remote.dataset.fingerprint == local.dataset.fingerprint
    job.web.clear()
    assert job.fill(job.location).dataset == remote.dataset
    assert job.web.sent <= 2 * FOOTER


def test_a_file_that_adds_a_class_changes_labels_and_is_read_alone(job):
    job.web.files = {"a.parquet": _file(0, labels=lambda number: ["cat", "dog"][number % 2])}
    job.fill(job.location)
    seen = images_seen(job.log)
    job.web.files["b.parquet"] = _file(100, labels=lambda number: ["ape", "dog"][number % 2])
    split = job.fill(job.location)
    assert split.dataset.classes == ("ape", "cat", "dog")
    assert images_seen(job.log) - seen == ROWS
    labels = {row[0]: row[1] for row in _samples(split)}
    assert labels == {f"a.parquet#{n:08d}": 1 + n % 2 for n in range(ROWS)} | {
        f"b.parquet#{n:08d}": 2 * (n % 2) for n in range(ROWS)
    }


def test_another_label_column_of_a_file_that_is_staged_is_not_taken_for_it(job, monkeypatch):
    from pipeline.cache.fill import build

    job.web.files = {"a.parquet": _file(0)}
    with monkeypatch.context() as patch:
        patch.setattr(build, "read_wave", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            job.fill(job.location)
    job.web.files = {"a.parquet": _file(0, labels=lambda number: float(number % 3))}
    split = job.fill(job.location)
    assert {row[1] for row in _samples(split)} == {0, 1, 2}


def test_images_that_cannot_be_used_are_those_of_local_files(job):
    broken = {3: b"no image", 5: None}
    job.web.files = {"a.parquet": _file(0, images=lambda number: broken.get(number, _image(number)))}
    local, remote = job.plan(job.local(), "local-cache"), job.plan(job.location)
    found = [fill_in_process(plan, max_bad=0.1)[0].split("train").listing.bad for plan in (local, remote)]
    columns = ["sample_id", "label", "offset", "size", "reason", "read"]
    assert found[0].num_rows == 2
    assert found[0].select(columns).sort_by("offset") == found[1].select(columns).sort_by("offset")


def test_a_file_of_another_schema_or_a_damaged_one_is_named(job):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": ["text"], "label": [1]}), sink)
    job.web.files = {"a.parquet": _file(0), "b.parquet": sink.getvalue().to_pybytes()}
    with pytest.raises(UserError, match=r"b\.parquet: the types of its columns differ"):
        job.plan(job.location)
    data = bytearray(_file(100))
    data[4:40] = b"\xff" * 36  # the header of the first page
    job.web.files["b.parquet"] = bytes(data)
    with pytest.raises(UserError, match=r"b\.parquet: not a readable Parquet file"):
        job.fill(job.location)
