"""Images that are replaced by others of the same name and size, and images that only moved or were written again."""

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.cache.fill import compare
from pipeline.cache.fill.build import build_cache, plan_cache
from pipeline.cache.layout.dataset import write_index
from pipeline.cache.maintain.audit import verify_cache
from pipeline.cache.maintain.repair import repair_cache
from pipeline.errors import UserError
from pipeline.storage.store import Store
from tests.fakes import without_ray

COUNT = 30


def _pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (COUNT, 16, 16, 3), np.uint8)


def _files(ending):
    def write(folder: Path, pixels: np.ndarray) -> Path:
        for number, image in enumerate(pixels):
            file = folder / f"class{number % 2}" / f"{number:02d}{ending}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
        return folder

    return write


def _arrays(folder: Path, pixels: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    planes = [image.transpose(2, 0, 1).tobytes() for image in pixels]
    table = pa.table({"image": pa.array(planes, pa.binary()), "label": [n % 2 for n in range(COUNT)]})
    pq.write_table(table, folder / "arrays.parquet", row_group_size=7)
    return folder


def _tar(folder: Path, pixels: np.ndarray) -> Path:
    _files(".bmp")(folder / "files", pixels)
    with tarfile.open(folder / "images.tar", "w") as tar:
        for file in sorted((folder / "files").rglob("*.bmp")):
            tar.add(file, file.name)
    shutil.rmtree(folder / "files")
    return folder


KINDS = {"bmp": _files(".bmp"), "tiff": _files(".tif"), "arrays": _arrays, "tar": _tar}


@pytest.fixture(params=KINDS)
def images(request, tmp_path, photo_config, monkeypatch):
    """Writes images into a folder, plans a cache for them, and fills it without Ray."""
    without_ray(monkeypatch)

    class Images:
        write = staticmethod(KINDS[request.param])
        folder = tmp_path / "data/images"

        def plan(self, folder=None, compare=True):
            config = photo_config(
                f"data.train={folder or self.folder}", "data.val=none", "cache.shard_size=10", "data.name=set"
            )
            return plan_cache(config, Store.at(tmp_path / "cache"), compare=compare), config

        def replace_one(self, keep_times=False):
            files = [file for file in self.folder.rglob("*") if file.is_file()]
            before = {file: (file.stat(), file.read_bytes()) for file in files}
            pixels = _pixels(0)
            pixels[3] = 255 - pixels[3]
            self.write(self.folder, pixels)
            for file, (info, content) in before.items():
                assert file.stat().st_size == info.st_size
                if keep_times or file.read_bytes() == content:
                    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))

    made = Images()
    made.write(made.folder, _pixels(0))
    assert build_cache(*made.plan())[1].shards_computed == 6
    return made


def _touch(folder: Path) -> None:
    for file in folder.rglob("*"):
        os.utime(file)


def _not_compared(*_):
    raise AssertionError("images were compared that nobody touched")


def test_a_replaced_image_is_refused_with_its_name_and_the_remedies(images):
    images.replace_one()
    with pytest.raises(
        UserError, match=r"images.*: 1 images differ from those that .* holds .*, first .*3.*: restore"
    ) as refused:
        images.plan()
    assert "data.name" in str(refused.value)
    assert "--verify --repair" in str(refused.value)


def test_files_that_were_written_again_or_moved_lose_no_features(images, tmp_path, monkeypatch):
    _touch(images.folder)
    plan, config = images.plan()
    assert build_cache(plan, config)[1].shards_computed == 0
    with monkeypatch.context() as patch:
        patch.setattr(compare, "differing_images", _not_compared)
        images.plan()
    moved = shutil.move(images.folder, tmp_path / "elsewhere/images")
    plan, config = images.plan(moved)
    dataset = plan.split("train").dataset
    dataset.images.unlist(1)
    report = build_cache(images.plan(moved)[0], config)[1]  # reads the images where they are now
    assert (report.images_ingested, report.shards_computed) == (10, 0)
    monkeypatch.setattr(compare, "differing_images", _not_compared)
    images.plan(moved)


def test_verify_compares_the_images_even_where_their_times_are_the_old_ones(images):
    images.replace_one(keep_times=True)
    plan, config = images.plan(compare=False)
    found = verify_cache(plan, config)
    (finding,) = found.findings
    assert finding.part == "images"
    assert finding.problem.startswith(f"differs from {plan.split('train').dataset.location} in 1 images, first ")
    before = {teacher.id: plan.split("train").dataset.teacher(teacher.id).records() for teacher in plan.teachers}
    assert repair_cache(plan, config, found).findings == []
    for name, records in before.items():
        now = plan.split("train").dataset.teacher(name).records()
        assert [shard for shard in now if now[shard] != records[shard]] == [finding.shard]
    assert verify_cache(images.plan()[0], config).findings == []


def test_a_cache_of_an_older_version_is_compared_once(images, monkeypatch):
    plan, config = images.plan()
    dataset = plan.split("train").dataset
    write_index(dataset, plan.split("train").index.drop_columns("version"))
    plan, config = images.plan()
    assert build_cache(plan, config)[1].shards_computed == 0
    monkeypatch.setattr(compare, "differing_images", _not_compared)
    images.plan()
    write_index(dataset, plan.split("train").index.drop_columns("version"))
    monkeypatch.undo()
    images.replace_one(keep_times=True)
    with pytest.raises(UserError, match="1 images differ"):
        images.plan()


def test_an_image_that_could_not_be_read_and_now_can_is_found(tmp_path, photo_config, monkeypatch):
    without_ray(monkeypatch)
    folder = _files(".bmp")(tmp_path / "data/images", _pixels(0))
    file = folder / "class1/03.bmp"
    whole = file.read_bytes()
    file.write_bytes(bytes(len(whole)))
    config = photo_config(f"data.train={folder}", "data.val=none", "cache.shard_size=10")
    plan = plan_cache(config, Store.at(tmp_path / "cache"))
    build_cache(plan, config)
    file.write_bytes(whole)
    with pytest.raises(UserError, match=r"1 images differ .*first class1/03\.bmp"):
        plan_cache(config, Store.at(tmp_path / "cache"))
    plan = plan_cache(config, Store.at(tmp_path / "cache"), compare=False)
    assert repair_cache(plan, config, verify_cache(plan, config)).findings == []
    assert sum(record.rows for record in plan.split("train").dataset.images.records().values()) == COUNT
