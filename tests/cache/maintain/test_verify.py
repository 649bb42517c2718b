"""Every way in which a cache can be damaged is found, with the file named, and just that is repaired."""

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.cache.fill.build import build_cache, plan_cache
from pipeline.cache.fill.second_moments import freeze_phi_s
from pipeline.cache.layout.arrays import dump_arrays, load_arrays
from pipeline.cache.layout.cached_teacher import projections_of
from pipeline.cache.layout.phi_s import dump_phi_s, load_phi_s
from pipeline.cache.layout.shards import ROW_GROUP_SIZE, fixed_width
from pipeline.cache.layout.view_rows import read_view_rows, views_of
from pipeline.cache.maintain.audit import check_begun, verify_cache
from pipeline.cache.maintain.repair import repair_cache
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.errors import UserError
from pipeline.imaging.crop import crop_and_resize
from pipeline.imaging.decode import decode_pixels
from pipeline.storage.store import Store
from tests.conftest import TEACHERS
from tests.fakes import out_of_memory, without_ray, write_photos

PROJECTED = ["cache.codec=pca8-int8", "views.crops=2", "teachers.1.args.dim=24"]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """tests/jobs/test_precompute.py goes through Ray."""
    without_ray(monkeypatch)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Photos, and below `caches` what was made of them; tests take copies."""
    folder = tmp_path_factory.mktemp("originals")
    write_photos(folder / "photos/train", 150)
    write_photos(folder / "photos/val", 40, seed=1)
    return folder


@pytest.fixture
def cache_of(originals, tmp_path):
    """A complete cache of its own, as the job makes it; made once for equal overrides."""

    def give(*overrides, photos=originals / "photos"):
        data = [f"data.train={photos}/train", f"data.val={photos}/val", f"work={tmp_path}/work"]
        config = load_config(
            DistillJobConfig,
            None,
            [*data, "cache.shard_size=100", "cache.codec=float16", TEACHERS, *overrides],
        )
        made = originals / "caches" / str(abs(hash((*overrides, photos))))
        if not made.exists():
            build_cache(plan_cache(config, Store.at(made)), config)
        copy = tmp_path / made.name
        shutil.copytree(made, copy)
        plan = plan_cache(config, Store.at(copy))
        train, val = (plan.split(name).dataset for name in ("train", "val"))
        return SimpleNamespace(plan=plan, config=config, train=train, val=val)

    return give


@pytest.fixture
def filled(cache_of):
    """Two teachers on whole images."""
    return cache_of()


@pytest.fixture
def projected(cache_of):
    """Two crops an image, in a codec that projects."""
    return cache_of(*PROJECTED)


def _path(folder, name):
    return Path(folder.store.uri, name)


def _state(cache):
    """Content and time of every file of a cache."""
    files = [path for path in Path(cache.plan.store.uri).rglob("*") if path.is_file()]
    return {p.relative_to(cache.plan.store.uri).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def _rewrite(folder, shard, change):
    """Replace a shard's rows and make its record agree, as a writer with a mistake would."""
    record = folder.read_record(shard)
    table = change(folder.read(record))
    moments = next(folder.moments([record])) if record.moments else None
    codec = json.loads(json.dumps(record.facts))
    folder.unlist(shard)
    folder.commit(shard, table, moments, codec, projection=record.projection)


def _with_column(table, name, values):
    position = table.schema.get_field_index(name)
    field = table.schema.field(position)
    return table.set_column(position, field, pa.array(values, field.type))


def _flip_byte(path, position=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 0x10
    path.write_bytes(data)


def _teacher(cache, number=0, split="train"):
    return getattr(cache, split).teacher(cache.plan.teachers[number].id)


def test_a_sound_cache_verifies_in_every_codec(filled, projected):
    for cache, files, rows in ((filled, 3 * 3, 2 * 190), (projected, 3 * 3 + 2, 2 * 340)):
        found = verify_cache(cache.plan, cache.config)
        assert found.findings == []
        assert found.files == files
        assert found.recomputed == rows
        assert found.skipped == {}


def _bits(cache):
    folder = _teacher(cache)
    _flip_byte(_path(folder, folder.read_record(1).file))
    return folder.read_record(1).file, "SHA-256"


def _footer(cache):
    folder = cache.train.images
    _flip_byte(_path(folder, folder.read_record(0).file), 0.999)
    return folder.read_record(0).file, "SHA-256"


def _truncation(cache):
    folder = _teacher(cache, 1)
    path = _path(folder, folder.read_record(0).file)
    path.write_bytes(path.read_bytes()[:-100])
    return path.name, "its record says"


def _missing_file(cache):
    folder = _teacher(cache, 0, "val")
    _path(folder, folder.read_record(0).file).unlink()
    return folder.read_record(0).file, "is missing"


def _missing_record(cache):
    folder = _teacher(cache)
    _path(folder, "shard-00001.json").unlink()
    return "shard-00001.json", "is missing"


def _damaged_record(cache):
    folder = _teacher(cache)
    _path(folder, "shard-00001.json").write_text("{")
    return "shard-00001.json", "is not a record"


def _record_without_facts(cache):
    folder = _teacher(cache)
    _path(folder, "shard-00001.json").write_text(json.dumps(asdict(replace(folder.read_record(1), facts={}))))
    return "shard-00001.json", "lacks fidelity.summary.relative_error"


def _swapped_teachers(cache):
    """The shards of two teachers change places, records and all."""
    one, two = _teacher(cache, 0), _teacher(cache, 1)
    kept = one.read_record(0), two.read_record(0)
    for source, record, target in ((one, kept[0], two), (two, kept[1], one)):
        for name in (record.file, record.moments):
            shutil.copyfile(_path(source, name), _path(target, name))
        _path(target, "shard-00000.json").write_text(json.dumps(asdict(record)))
    return kept[1].file, "columns"


def _swapped_shards(cache):
    """Two shards of one teacher change places."""
    folder = _teacher(cache)
    first, second = folder.read_record(0), folder.read_record(1)
    for number, record in ((0, second), (1, first)):
        _path(folder, f"shard-{number:05d}.json").write_text(json.dumps(asdict(replace(record, shard=number))))
    return second.file, "rows instead of 100"


def _wrong_keys(cache):
    folder = _teacher(cache)
    _rewrite(folder, 0, lambda t: _with_column(t, "sample_id", ["x.jpg", *t["sample_id"].to_pylist()[1:]]))
    return folder.read_record(0).file, "has key ('x.jpg', 0) in row 0"


def _missing_rows(cache):
    folder = _teacher(cache)
    _rewrite(folder, 0, lambda table: table.slice(1))
    return folder.read_record(0).file, "has 99 rows instead of 100"


def _missing_images(cache):
    folder = cache.val.images
    _rewrite(folder, 0, lambda table: table.slice(1))
    return folder.read_record(0).file, "has 39 rows instead of 40"


def _wrong_labels(cache):
    folder = cache.val.images
    _rewrite(folder, 0, lambda table: _with_column(table, "label", pc.add(table["label"], 1).to_pylist()))
    return folder.read_record(0).file, "has label"


def _nan_rows(cache):
    folder = _teacher(cache)

    def poison(table):
        rows = table["patches"].to_pylist()
        rows[70] = np.full(4 * 4 * 8, np.nan, np.float16).tobytes()
        return _with_column(table, "patches", rows)

    _rewrite(folder, 0, poison)
    return folder.read_record(0).file, "patches that are not finite"


def _rows_of_other_images(cache):
    """Values that are true of other images: hash, keys and statistics are all right."""
    folder = _teacher(cache)
    _rewrite(folder, 0, lambda table: _with_column(table, "patches", table["patches"].to_pylist()[::-1]))
    return folder.read_record(0).file, "holds other patches than the teacher computes: "


def _empty_past_the_first_batch(cache):
    folder = _teacher(cache)

    def empty(table):
        rows = table["patches"].to_pylist()
        return _with_column(table, "patches", rows[:32] + [bytes(4 * 4 * 8 * 2)] * (len(rows) - 32))

    _rewrite(folder, 0, empty)
    return folder.read_record(0).file, "patches unlike their statistics"


def _large_row_groups(cache):
    folder = _teacher(cache)
    _rewrite(replace(folder, row_group_size=100), 0, lambda table: table)
    return folder.read_record(0).file, "row groups of [100] rows"


def _damaged_statistics_of_a_shard(cache):
    folder = _teacher(cache)
    _flip_byte(_path(folder, folder.read_record(1).moments))
    return folder.read_record(1).moments, "cannot be read"


def _foreign_statistics(cache):
    folder = _teacher(cache)
    arrays = load_arrays(folder.store.get("stats.npz"))
    folder.store.put("stats.npz", dump_arrays({**arrays, "patches_mean": arrays["patches_mean"] + 1}))
    return "stats.npz", "statistics of the shards' patches"


def _damaged_rotation(cache):
    folder = _teacher(cache, 1, "val")
    freeze_phi_s(cache.val, cache.plan.teachers[1])
    turned = load_phi_s(folder.store.get("phi_s.npz"))
    turned["patches"] = replace(turned["patches"], rotation=turned["patches"].rotation * 1.1)
    folder.store.put("phi_s.npz", dump_phi_s(turned))
    return "phi_s.npz", "is no rotation with the mean and scale of the patches"


def _damaged_index(cache):
    path = Path(cache.train.store.uri, "index.parquet")
    pq.write_table(pq.read_table(path).slice(1), path, row_group_size=100)
    return "index.parquet", "fingerprint"


def _damaged_description(cache):
    _path(_teacher(cache), "teacher.json").write_text("{}")
    return "teacher.json", "cannot be read"


DAMAGES = [
    _bits,
    _footer,
    _truncation,
    _missing_file,
    _missing_record,
    _damaged_record,
    _record_without_facts,
    _swapped_teachers,
    _swapped_shards,
    _wrong_keys,
    _missing_rows,
    _missing_images,
    _wrong_labels,
    _nan_rows,
    _rows_of_other_images,
    _empty_past_the_first_batch,
    _large_row_groups,
    _damaged_statistics_of_a_shard,
    _foreign_statistics,
    _damaged_rotation,
    _damaged_index,
    _damaged_description,
]
CHANGES_IMAGES = (_missing_images, _wrong_labels)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_damage_is_found_and_just_that_is_repaired(filled, damage):
    before = _state(filled)
    file, problem = damage(filled)
    damaged = {name for name, state in _state(filled).items() if state != before.get(name)}
    found = verify_cache(filled.plan, filled.config)
    named = next(item for item in found.findings if item.file.endswith(f"/{file}"))
    assert problem in named.problem
    assert len(found.findings) == (2 if damage in (_swapped_teachers, _swapped_shards) else 1)

    assert repair_cache(filled.plan, filled.config, found).findings == []
    after = _state(filled)
    for name, (content, _) in before.items():
        assert after[name][0] == content or name.endswith(".json"), name
    changed = {name for name, state in after.items() if state != before.get(name)} - damaged
    images = damage in CHANGES_IMAGES
    assert not [name for name in changed if not any(_concerned(name, item, images) for item in found.findings)]
    assert not [name for name in set(after) - set(before) if not name.endswith(".json")]


def _concerned(name, item, all_of_shard):
    """Whether a file goes with one that is broken; all of a shard goes with images that were others."""
    if all_of_shard:
        return name.startswith(item.dataset)
    folder, _, file = name.rpartition("/")
    own = file.startswith(f"shard-{item.shard:05d}") if item.shard is not None else file in ("stats.npz", "phi_s.npz")
    return own and item.file.startswith(f"{folder}/")


def _features(dataset, teacher, kind):
    """By row group: exact features, from pixels cropped here, and stored ones, both float64 [vectors, D]."""
    source, folder = teacher.create(), dataset.teacher(teacher.id)
    source.load()
    codec, size = teacher.codecs(projections_of(folder))[kind], ROW_GROUP_SIZE * dataset.policy.rows_per_image
    for shard, record in folder.records().items():
        images, rows, _ = read_view_rows(dataset, shard)
        decoded = [decode_pixels(data) for data in images["image"].to_pylist() for _ in range(len(rows) // len(images))]
        crops = map(crop_and_resize, decoded, views_of(rows), repeat(source.spec.input_size), repeat("bilinear"))
        exact = getattr(source.encode(torch.from_numpy(np.stack(list(crops)))), kind)
        stored = codec.decode(torch.from_numpy(fixed_width(folder.read(record, [kind])[kind]).copy()))
        for parts in zip(exact.split(size), stored.split(size), strict=True):
            yield tuple(part.flatten(0, -2).double().numpy() for part in parts)


@pytest.mark.parametrize("kind", ["summary", "patches"])
@pytest.mark.parametrize("number", [0, 1])
def test_the_fidelity_is_the_cosine_of_the_standardised_features_of_all_splits(cache_of, kind, number):
    lossy = cache_of("cache.codec=pca2-int8", *PROJECTED[1:])
    teacher, cosines = lossy.plan.teachers[number], []
    for dataset in (lossy.train, lossy.val):
        groups = list(_features(dataset, teacher, kind))
        exact = np.concatenate([group for group, _ in groups])
        mean, std = exact.mean(axis=0), exact.std(axis=0)
        for group in groups:
            target, kept = ((part - mean) / std for part in group)
            lengths = np.linalg.norm(target, axis=1) * np.linalg.norm(kept, axis=1)
            cosines.append((target * kept).sum(axis=1) / lengths)
    found = verify_cache(lossy.plan, lossy.config)
    assert found.findings == []
    assert found.recomputed == 2 * (2 * 150 + 40)
    assert len(cosines) == 4  # of 64, 36, 50 and 40 images; the held-out ones are not cropped
    low = min(np.percentile(group, 1) for group in cosines)
    expected = np.concatenate(cosines).mean(), low
    assert found.fidelity[f"{teacher.spec.name}/{kind}"] == pytest.approx(expected, abs=5e-7)
    assert low < (0.99 if kind == "patches" else 0.99999)  # summaries are not projected


def test_a_lost_projection_is_fitted_again_and_the_shards_count_again(projected):
    folder = _teacher(projected)
    before = {shard: record.sha256 for shard, record in folder.records().items()}
    name = folder.projection
    _path(folder, name).unlink()
    found = verify_cache(projected.plan, projected.config)
    assert [(item.shard, item.file.rpartition("/")[2]) for item in found.findings] == [(None, name)]
    assert "cannot be decoded" in found.findings[0].problem
    assert repair_cache(projected.plan, projected.config, found).findings == []
    assert folder.projection == name
    assert {shard: record.sha256 for shard, record in folder.records().items()} == before


def test_a_changed_projection_is_found(projected):
    folder = _teacher(projected)
    arrays = load_arrays(folder.store.get(folder.projection))
    turned = {"patches_components": arrays["patches_components"][::-1]}
    folder.store.put(folder.projection, dump_arrays({**arrays, **turned}))
    found = verify_cache(projected.plan, projected.config)
    assert [item.problem for item in found.findings] == ["does not have the content that its name says"]


def test_a_teacher_that_changed_is_found_and_its_shards_are_left_alone(filled, monkeypatch):
    from tests.fakes import ColourGrid

    before = _state(filled)
    monkeypatch.setattr(ColourGrid, "weights_sha256", "1" * 64)
    found = verify_cache(filled.plan, filled.config)
    assert {item.file.rpartition("/")[2] for item in found.findings} == {"teacher.json"}
    assert len(found.findings) == 4
    assert "other weights" in found.findings[0].problem
    assert found.recomputed == 0
    assert len(repair_cache(filled.plan, filled.config, found).findings) == 4
    assert _state(filled) == before


def test_weights_that_changed_unnoticed_are_found_by_recomputing(filled, monkeypatch):
    from tests.fakes import ColourGrid

    make = ColourGrid.__init__

    def changed(self, **settings):
        make(self, **settings)
        self.projection = self.projection + 0.2

    monkeypatch.setattr(ColourGrid, "__init__", changed)
    found = verify_cache(filled.plan, filled.config)
    assert len(found.findings) == 6
    assert all("than the teacher computes" in item.problem for item in found.findings)


def test_without_weights_the_rest_is_verified_and_repaired(filled, monkeypatch):
    from teachers.base import WeightsNotFoundError
    from tests.fakes import ColourGrid

    loads = ColourGrid.load

    def load(self, *arguments, **keywords):
        if self.spec.patch_dim == 4:
            raise WeightsNotFoundError("teacher colours4: no weights")
        loads(self, *arguments, **keywords)

    monkeypatch.setattr(ColourGrid, "load", load)
    _bits(filled)
    file, _ = _truncation(filled)
    found = verify_cache(filled.plan, filled.config)
    assert found.skipped == {"colours4": "teacher colours4: no weights"}
    assert found.recomputed == 190 - 50
    assert len(found.findings) == 2
    (left,) = repair_cache(filled.plan, filled.config, found).findings
    assert left.file.endswith(file)
    assert left.part == filled.plan.teachers[1].id


@pytest.fixture
def own_photos(cache_of, originals, tmp_path):
    """Two teachers on photos that a test may change."""
    shutil.copytree(originals / "photos", tmp_path / "photos")
    return cache_of(photos=tmp_path / "photos")


def _change_photo(filled, tmp_path):
    """Other pixels under the same name, in as many bytes, in a photo of shard 1; gives the shard's record."""
    folder = filled.train.images
    record = folder.read_record(1)
    source = Path(filled.train.location, folder.read(record)["sample_id"][3].as_py())
    size = source.stat().st_size
    write_photos(tmp_path / "other", 1, seed=9)
    data = (tmp_path / "other/class0/photo000.jpg").read_bytes()
    source.write_bytes(data[:size] if len(data) > size else data + bytes(size - len(data)))
    return record


def test_images_that_come_back_with_other_bytes_take_their_features_with_them(own_photos, tmp_path, caplog):
    filled = own_photos
    folder = filled.train.images
    record = _change_photo(filled, tmp_path)
    _flip_byte(_path(folder, record.file))
    digests = {t.id: filled.train.teacher(t.id).read_record(1).sha256 for t in filled.plan.teachers}
    found = verify_cache(filled.plan, filled.config)
    assert len(found.findings) == 1
    assert repair_cache(filled.plan, filled.config, found).findings == []
    assert "was derived from other images than the present ones" in caplog.text
    assert hashlib.sha256(_path(folder, folder.read_record(1).file).read_bytes()).hexdigest() != record.sha256
    for teacher, digest in digests.items():
        assert filled.train.teacher(teacher).read_record(1).sha256 != digest


def test_a_job_computes_again_what_was_made_of_images_that_came_back_as_others(own_photos, tmp_path):
    filled = own_photos
    record = _change_photo(filled, tmp_path)
    _path(filled.train.images, record.file).unlink()
    teachers = [filled.train.teacher(teacher.id) for teacher in filled.plan.teachers]
    before = [(folder.read_record(0), folder.read_record(1)) for folder in teachers]
    _, report = build_cache(filled.plan, filled.config)
    assert (report.images_ingested, report.shards_computed) == (50, 2)
    for folder, (kept, changed) in zip(teachers, before, strict=True):
        assert folder.read_record(0) == kept
        assert folder.read_record(1).sha256 != changed.sha256
    assert verify_cache(filled.plan, filled.config).findings == []


def test_a_repair_that_is_killed_before_it_lists_images_leaves_no_features_of_the_old_ones(
    own_photos, tmp_path, monkeypatch
):
    filled = own_photos
    folder = filled.train.images
    record = _change_photo(filled, tmp_path)
    _flip_byte(_path(folder, record.file))
    found = verify_cache(filled.plan, filled.config)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.cache.layout.shards.asdict", _killed)  # of the record, when all else is done
        with pytest.raises(KeyboardInterrupt):
            repair_cache(filled.plan, filled.config, found)
    assert folder.record(1) is None
    build_cache(filled.plan, filled.config)
    assert folder.record(1).sha256 != record.sha256
    assert verify_cache(filled.plan, filled.config).findings == []


def _killed(*_):
    raise KeyboardInterrupt


def test_features_of_images_that_were_replaced_meanwhile_are_found(own_photos, tmp_path):
    filled = own_photos
    folder = _teacher(filled)
    old = folder.read_record(1)
    features = _path(folder, old.file).read_bytes()
    moments = _path(folder, old.moments).read_bytes()
    images = _change_photo(filled, tmp_path)
    filled.train.images.unlist(1)
    build_cache(filled.plan, filled.config)
    for name, data in ((old.file, features), (old.moments, moments)):  # as an actor would that read the images before
        folder.store.put(name, data)
    folder.store.put("shard-00001.json", json.dumps(asdict(old)).encode())
    found = verify_cache(filled.plan, filled.config)
    problems = [item.problem for item in found.findings if item.file.endswith(old.file)]
    assert problems == [f"was derived from other images ({images.file}) than the present ones"]
    assert repair_cache(filled.plan, filled.config, found).findings == []
    assert folder.read_record(1).sha256 != old.sha256


def test_images_whose_source_is_gone_are_not_replaced_by_less(own_photos):
    filled = own_photos
    folder = filled.train.images
    record = folder.read_record(1)
    name = folder.read(record)["sample_id"][3].as_py()
    Path(filled.train.location, name).unlink()
    _flip_byte(_path(folder, record.file))
    found = verify_cache(filled.plan, filled.config)
    with pytest.raises(UserError, match=f"no longer provides 1 of its images, first {name}"):
        repair_cache(filled.plan, filled.config, found)
    assert folder.record(1) is None
    assert all(filled.train.teacher(teacher.id).record(1) for teacher in filled.plan.teachers)


def test_broken_crops_are_drawn_again_and_are_the_same(projected):
    folder = projected.train.rows
    record = folder.read_record(0)
    _flip_byte(_path(folder, record.file))
    before = _state(projected)
    found = verify_cache(projected.plan, projected.config)
    assert [item.part for item in found.findings] == ["rows"]
    assert repair_cache(projected.plan, projected.config, found).findings == []
    assert folder.read_record(0).sha256 == record.sha256
    changed = {name for name, state in _state(projected).items() if state != before[name]}
    assert all("/rows/shard-00000" in name for name in changed)


def test_a_gpu_of_too_little_memory_is_said_in_a_line(filled, monkeypatch):
    monkeypatch.setattr("pipeline.cache.fill.extract.TeacherDevice.encode", out_of_memory)
    with pytest.raises(UserError, match=r"^the GPU has too little memory for 32 images at once"):
        verify_cache(filled.plan, filled.config)


def test_statistics_made_of_wrong_shards_are_taken_again(filled):
    folder = _teacher(filled)
    stats = folder.store.get("stats.npz")
    _foreign_statistics(filled)
    _bits(filled)
    found = verify_cache(filled.plan, filled.config)
    assert len(found.findings) == 2
    assert repair_cache(filled.plan, filled.config, found).findings == []
    assert folder.store.get("stats.npz") == stats


def test_an_empty_cache_is_no_sound_one(tmp_path, filled):
    check_begun(filled.plan)
    with pytest.raises(UserError, match=r"holds nothing yet: run jobs/precompute.py"):
        check_begun(plan_cache(filled.config, Store.at(tmp_path / "empty")))
