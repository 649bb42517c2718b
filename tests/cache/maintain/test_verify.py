"""Every way in which a cache can be damaged is found, with the file named, and just that is repaired."""

import json
import os
import shutil
import struct
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

from pipeline.cache.fill.build import build_cache
from pipeline.cache.fill.plan import plan_cache
from pipeline.cache.fill.second_moments import freeze_phi_s
from pipeline.cache.layout.arrays import dump_arrays, load_arrays
from pipeline.cache.layout.cached_teacher import projections_of
from pipeline.cache.layout.dataset import version_files
from pipeline.cache.layout.keys import sealed
from pipeline.cache.layout.part import teacher_home
from pipeline.cache.layout.part_stats import STATISTICS, PartStats, dump_part_stats
from pipeline.cache.layout.phi_s import dump_phi_s, load_phi_s
from pipeline.cache.layout.shards import ROW_GROUP_SIZE, fixed_width
from pipeline.cache.layout.stats import dump_moments, merge_all
from pipeline.cache.layout.view_rows import read_view_rows, views_of
from pipeline.cache.maintain.audit import check_begun, verify_cache
from pipeline.cache.maintain.inventory import delete_entry, find_entry
from pipeline.cache.maintain.repair import repair_cache
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.errors import UserError
from pipeline.imaging.crop import crop_and_resize
from pipeline.imaging.decode import decode_pixels
from pipeline.storage.store import Store
from tests.conftest import TEACHERS
from tests.fakes import corrupt, out_of_memory, without_ray, write_photos

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
        return _filled(plan, config)

    return give


def _filled(plan, config):
    train, val = (plan.split(name).dataset for name in ("train", "val"))
    return SimpleNamespace(plan=plan, config=config, train=train, val=val)


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
    moments = folder.moments([record])[0] if record.moments else None
    codec = json.loads(json.dumps(record.facts))
    folder.unlist(shard)
    folder.commit(shard, table, moments, codec, projection=record.projection)


def _write_record(folder, record):
    folder.store.put(f"shard-{record.shard:05d}.json", sealed(asdict(record)))
    folder.store.delete("records.json")


def _with_column(table, name, values):
    position = table.schema.get_field_index(name)
    field = table.schema.field(position)
    return table.set_column(position, field, pa.array(values, field.type))


def _flip_byte(path, position=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 0x10
    path.write_bytes(data)


def _flip_array(path):
    """Change a byte of the first array of an .npz file; some others are only dates."""
    name, extra = struct.unpack("<HH", path.read_bytes()[26:30])
    _flip_byte(path, (30 + name + extra + 20) / path.stat().st_size)


def _part(cache, split="train"):
    return getattr(cache, split).parts[0]


def _teacher(cache, number=0, split="train"):
    return _part(cache, split).teacher(cache.plan.teachers[number].id)


def _home(cache, number=0):
    return teacher_home(cache.plan.store, cache.plan.teachers[number].id)


def _statistics(cache, number=0, split="train"):
    return getattr(cache, split).statistics(cache.plan.teachers[number].id)


def _planned_again(cache):
    """The cache as the next process finds it."""
    return _filled(plan_cache(cache.config, cache.plan.store), cache.config)


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
    folder = _part(cache).images
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
    _write_record(folder, replace(folder.read_record(1), facts={}))
    return "shard-00001.json", "lacks fidelity.summary.relative_error"


def _swapped_teachers(cache):
    """The shards of two teachers change places, records and all."""
    one, two = _teacher(cache, 0), _teacher(cache, 1)
    kept = one.read_record(0), two.read_record(0)
    for source, record, target in ((one, kept[0], two), (two, kept[1], one)):
        shutil.copyfile(_path(source, record.file), _path(target, record.file))
        target.store.put(record.moments, dump_moments(source.shard_moments(record)))
        _write_record(target, record)
    return kept[1].file, "columns"


def _swapped_shards(cache):
    """Two shards of one teacher change places."""
    folder = _teacher(cache)
    first, second = folder.read_record(0), folder.read_record(1)
    for number, record in ((0, second), (1, first)):
        _write_record(folder, replace(record, shard=number))
    return second.file, "rows instead of 100"


def _wrong_keys(cache):
    folder = _teacher(cache)
    _rewrite(folder, 0, lambda t: _with_column(t, "key", [b"x" * 16, *t["key"].to_pylist()[1:]]))
    return folder.read_record(0).file, f"has key ('{'78' * 16}', 0) in row 0"


def _missing_rows(cache):
    folder = _teacher(cache)
    _rewrite(folder, 0, lambda table: table.slice(1))
    return folder.read_record(0).file, "has 99 rows instead of 100"


def _missing_images(cache):
    folder = _part(cache, "val").images
    _rewrite(folder, 0, lambda table: table.slice(1))
    return folder.read_record(0).file, "has 39 rows instead of 40"


def _swapped_images(cache):
    """Two images of a shard change places, but not their keys."""
    folder = _part(cache, "val").images

    def swap(table):
        one, two, *others = table["image"].to_pylist()
        return _with_column(table, "image", [two, one, *others])

    _rewrite(folder, 0, swap)
    return folder.read_record(0).file, "holds other bytes than the key"


def _damaged_record_of_several(cache):
    folder = _teacher(cache)
    _flip_byte(_path(folder, "records.json"))
    return "records.json", "cannot be read"


def _foreign_records(cache):
    """Records that were written together, as of other shards."""
    one, two = _teacher(cache, 0), _teacher(cache, 1)
    shutil.copyfile(_path(two, "records.json"), _path(one, "records.json"))
    return "records.json", "has another record of shard 0 than the shard itself"


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
    """Those of a shard that was computed again; the others are in one file."""
    folder = _teacher(cache)
    record = folder.read_record(1)
    folder.store.put(record.moments, dump_moments(folder.shard_moments(record)))
    _flip_array(_path(folder, folder.read_record(1).moments))
    return folder.read_record(1).moments, "cannot be read"


def _foreign_statistics(cache):
    store = _statistics(cache)
    arrays = load_arrays(store.get("stats.npz"))
    store.put("stats.npz", dump_arrays({**arrays, "patches_mean": arrays["patches_mean"] + 1}))
    return "stats.npz", "statistics of the shards' patches"


def _damaged_rotation(cache):
    store = _statistics(cache, 1, "val")
    freeze_phi_s(cache.val, cache.plan.teachers[1])
    turned = load_phi_s(store.get("phi_s.npz"))
    turned["patches"] = replace(turned["patches"], rotation=turned["patches"].rotation * 1.1)
    store.put("phi_s.npz", dump_phi_s(turned))
    return "phi_s.npz", "is no rotation with the mean and scale of the patches"


def _flipped_statistics(cache):
    _flip_array(_path(SimpleNamespace(store=_statistics(cache)), "stats.npz"))
    return "stats.npz", "cannot be read"


def _missing_statistics(cache):
    _statistics(cache).delete("stats.npz")
    return "stats.npz", "is missing"


def _flipped_rotation(cache):
    freeze_phi_s(cache.train, cache.plan.teachers[0])
    _flip_array(_path(SimpleNamespace(store=_statistics(cache)), "phi_s.npz"))
    return "phi_s.npz", "cannot be read"


def _shortened_index(cache):
    path = _path(_part(cache), "index.parquet")
    pq.write_table(pq.read_table(path).slice(1), path)
    return "index.parquet", "has keys of the part"


def _damaged_index(cache):
    _flip_byte(_path(_part(cache), "index.parquet"), 0.1)
    return "index.parquet", "is no Parquet file of keys and sizes"


def _missing_index(cache):
    _part(cache).store.delete("index.parquet")
    return "index.parquet", "is missing"


def _damaged_part(cache):
    _flip_byte(_path(_part(cache), "part.json"))
    return "part.json", "cannot be read"


def _missing_part(cache):
    _part(cache).store.delete("part.json")
    return "part.json", "is missing"


def _foreign_part(cache):
    shutil.copyfile(_path(_part(cache, "val"), "part.json"), _path(_part(cache), "part.json"))
    return "part.json", "does not say"


def _damaged_description(cache):
    _flip_byte(_path(SimpleNamespace(store=_home(cache)), "teacher.json"))
    return "teacher.json", "cannot be read"


def _missing_description(cache):
    _home(cache).delete("teacher.json")
    return "teacher.json", "is missing"


def _damaged_version(cache):
    (file,) = version_files(cache.train.store)
    _flip_byte(_path(cache.train, file))
    return file, "cannot be read"


def _damaged_samples(cache):
    file = cache.train.selections[0].file
    _flip_byte(_path(cache.train, file), 0.3)
    return file, ""  # its content or its form, as the byte falls


def _foreign_samples(cache):
    file = cache.train.selections[0].file
    table = pq.read_table(_path(cache.train, file))
    pq.write_table(_with_column(table, "label", [1] * len(table)), _path(cache.train, file))
    return file, "does not have the content that its name says"


def _missing_samples(cache):
    file = cache.train.selections[0].file
    cache.train.store.delete(file)
    return file, "is missing"


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
    _swapped_images,
    _damaged_record_of_several,
    _foreign_records,
    _nan_rows,
    _rows_of_other_images,
    _empty_past_the_first_batch,
    _large_row_groups,
    _damaged_statistics_of_a_shard,
    _foreign_statistics,
    _damaged_rotation,
    _flipped_statistics,
    _missing_statistics,
    _flipped_rotation,
    _shortened_index,
    _damaged_index,
    _missing_index,
    _damaged_part,
    _missing_part,
    _foreign_part,
    _damaged_description,
    _missing_description,
    _damaged_version,
    _damaged_samples,
    _foreign_samples,
    _missing_samples,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_damage_is_found_and_just_that_is_repaired(filled, damage):
    before = _state(filled)
    file, problem = damage(filled)
    damaged = {name for name, state in _state(filled).items() if state != before.get(name)}
    filled = _planned_again(filled)
    found = verify_cache(filled.plan, filled.config)
    named = next(item for item in found.findings if item.file.endswith(f"/{file}"))
    assert problem in named.problem
    assert len(found.findings) == (2 if damage in (_swapped_teachers, _swapped_shards) else 1)

    assert repair_cache(filled.plan, filled.config, found)[1].findings == []
    after = _state(filled)
    for name, (content, _) in before.items():
        assert name.endswith(".json") or after[name][0] == content, name
    changed = {name for name, state in after.items() if state != before.get(name)} - damaged
    assert not [name for name in changed if not any(_concerned(name, item) for item in found.findings)]
    assert not [name for name in set(after) - set(before) if not name.endswith(".json")]


def _concerned(name, item):
    """Whether a file goes with one that is broken."""
    folder, _, file = name.rpartition("/")
    if item.what in ("version", "samples"):
        return (folder == item.file.rpartition("/")[0] and file == item.file.rpartition("/")[2]) or file.startswith(
            "version-"
        )
    with_all = ("stats.npz", "statistics.npz", "phi_s.npz", "records.json", item.file.rpartition("/")[2])
    own = file.startswith(f"shard-{item.shard:05d}") if item.shard is not None else file in with_all
    return (own or file == "records.json") and item.file.startswith(f"{folder}/")


def _features(dataset, teacher, kind):
    """By row group: exact features, from pixels cropped here, and stored ones, both float64 [vectors, D]."""
    (part,) = dataset.parts
    source, folder = teacher.create(), part.teacher(teacher.id)
    source.load()
    codec, size = (
        teacher.codecs(projections_of(part.cache, teacher))[kind],
        ROW_GROUP_SIZE * dataset.policy.rows_per_image,
    )
    for shard, record in folder.records().items():
        images, rows, *_ = read_view_rows(part, shard)
        decoded = [decode_pixels(data) for data in images["image"].to_pylist() for _ in range(len(rows) // len(images))]
        crops = map(crop_and_resize, decoded, views_of(rows), repeat(source.spec.input_size), repeat("bilinear"))
        exact = getattr(source.encode(torch.from_numpy(np.stack(list(crops)))), kind)
        stored = codec.decode(torch.from_numpy(fixed_width(folder.read(record, [kind])[kind]).copy()))
        for parts in zip(exact.split(size), stored.split(size), strict=True):
            yield tuple(part.flatten(0, -2).double().numpy() for part in parts)


def _bits_of_merged_statistics(cache):
    _flip_array(_path(_teacher(cache), STATISTICS))
    return "cannot be read"


def _no_merged_statistics(cache):
    _path(_teacher(cache), STATISTICS).unlink()
    return "is missing, and with it the statistics of shard-00000-"


def _statistics_without_a_shard(cache):
    folder = _teacher(cache)
    whole = folder.part_stats()
    file = folder.read_record(1).file
    some = {name: moments for name, moments in whole.shards.items() if name != file}
    folder.store.put(STATISTICS, dump_part_stats(PartStats.of(some)))
    return f"lacks the statistics of {file}"


@pytest.mark.parametrize("damage", [_bits_of_merged_statistics, _no_merged_statistics, _statistics_without_a_shard])
def test_merged_statistics_are_taken_from_the_stored_features_without_the_teacher(filled, monkeypatch, damage):
    folder, before = _teacher(filled), _state(filled)
    whole = merge_all(folder.moments(folder.records().values()))
    problem = damage(filled)
    filled = _planned_again(filled)
    found = verify_cache(filled.plan, filled.config)
    assert [(item.what, item.shard, item.file.rpartition("/")[2]) for item in found.findings] == [
        (filled.plan.teachers[0].id, None, STATISTICS)
    ]
    assert problem in found.findings[0].problem
    assert repair_cache(filled.plan, filled.config, found)[1].findings == []
    after, name = _state(filled), _path(folder, STATISTICS).relative_to(filled.plan.store.uri).as_posix()
    assert {path for path in before if after[path] != before[path]} == {name}
    assert after.keys() == before.keys()
    for kind, again in merge_all(folder.moments(folder.records().values())).items():
        assert again.count == whole[kind].count
        np.testing.assert_allclose(again.mean, whole[kind].mean, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(again.std, whole[kind].std, rtol=1e-3, atol=1e-3)


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
    _home(projected).delete(name)
    projected = _planned_again(projected)
    found = verify_cache(projected.plan, projected.config)
    assert [(item.shard, item.file.rpartition("/")[2]) for item in found.findings] == [(None, "projection")]
    assert "cannot be decoded" in found.findings[0].problem
    assert repair_cache(projected.plan, projected.config, found)[1].findings == []
    assert folder.projection == name
    assert {shard: record.sha256 for shard, record in folder.records().items()} == before


def test_a_changed_projection_is_found(projected):
    folder = _teacher(projected)
    home = _home(projected)
    arrays = load_arrays(home.get(folder.projection))
    turned = {"patches_components": arrays["patches_components"][::-1]}
    home.put(folder.projection, dump_arrays({**arrays, **turned}))
    found = verify_cache(projected.plan, projected.config)
    assert [item.problem for item in found.findings] == ["does not have the content that its name says"]
    before = {shard: record.sha256 for shard, record in folder.records().items()}
    assert repair_cache(projected.plan, projected.config, found)[1].findings == []
    assert {shard: record.sha256 for shard, record in folder.records().items()} == before


def test_a_teacher_that_changed_is_found_and_its_shards_are_left_alone(filled, monkeypatch):
    from tests.fakes import ColourGrid

    before = _state(filled)
    monkeypatch.setattr(ColourGrid, "weights_sha256", "1" * 64)
    found = verify_cache(filled.plan, filled.config)
    assert {item.file.rpartition("/")[2] for item in found.findings} == {"teacher.json"}
    assert len(found.findings) == 2
    assert "other weights" in found.findings[0].problem
    assert found.recomputed == 0
    assert len(repair_cache(filled.plan, filled.config, found)[1].findings) == 2
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
    (left,) = repair_cache(filled.plan, filled.config, found)[1].findings
    assert left.file.endswith(file)
    assert left.what == filled.plan.teachers[1].id


@pytest.fixture
def own_photos(cache_of, originals, tmp_path):
    """Two teachers on photos that a test may change."""
    shutil.copytree(originals / "photos", tmp_path / "photos")
    return cache_of(photos=tmp_path / "photos")


def _sample(cache, shard, split="train"):
    """A sample whose image is in this shard: its name and its file."""
    dataset, first = getattr(cache, split), shard * _part(cache, split).shard_size
    rows = dataset.samples(0).filter(pc.equal(dataset.samples(0)["row"], first))
    return rows["sample_id"][0].as_py(), Path(rows["uri"][0].as_py())


def _change_photo(cache, tmp_path, shard=1):
    """Other pixels in a photo of a shard, whose file has the size and the time that it had; gives its name."""
    name, photo = _sample(cache, shard)
    state = photo.stat()
    write_photos(tmp_path / "other", 1, seed=9)
    data = (tmp_path / "other/class0/photo000.jpg").read_bytes()
    data = data[: state.st_size] + bytes(max(0, state.st_size - len(data)))
    photo.write_bytes(data)
    os.utime(photo, ns=(state.st_atime_ns, state.st_mtime_ns))
    return name


def _images_of(cache, split="train"):
    """The image that every sample of a data set has in the cache, by name."""
    found, dataset = {}, getattr(cache, split)
    for number, part in enumerate(dataset.parts):
        rows = pa.concat_tables([part.images.read(record, ["image"]) for record in part.images.records().values()])
        samples = dataset.samples(number)
        images = rows["image"].take(samples["row"]).to_pylist()
        found |= dict(zip(samples["sample_id"].to_pylist(), images, strict=True))
    return found


def _files_of(cache, split="train"):
    """The bytes of every file of a split's source that is an image, by name."""
    folder = Path(getattr(cache, split).location)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.jpg")}


def test_photos_that_were_replaced_unnoticed_are_found_and_only_they_are_computed(own_photos, tmp_path):
    filled = own_photos
    name = _change_photo(filled, tmp_path)
    before = _state(filled)
    filled = _planned_again(filled)
    (item,) = verify_cache(filled.plan, filled.config).findings
    assert (item.what, item.shard) == ("source", None)
    assert item.problem == f"names images that {filled.train.location} gives otherwise: 1, first {name}"
    plan, left = repair_cache(filled.plan, filled.config, verify_cache(filled.plan, filled.config))
    assert left.findings == []
    repaired = _planned_again(SimpleNamespace(plan=plan, config=filled.config))
    assert _images_of(repaired) == _files_of(repaired)
    assert [part.count for part in repaired.train.parts] == [150, 1]
    after = _state(repaired)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("way", ["missing", "damaged"])
def test_a_shard_of_images_of_which_the_source_lost_one_is_read_again_without_it(own_photos, tmp_path, way):
    """Also where that photo was replaced, unnoticed or not, or cannot be read."""
    filled = own_photos
    part, (name, photo) = _part(filled), _sample(filled, 1)
    if way == "missing":
        photo.unlink()
    else:
        corrupt(photo)
    _flip_byte(_path(part.images, part.images.read_record(1).file))
    filled.config = filled.config.model_copy(update={"data": filled.config.data.model_copy(update={"max_bad": 0.1})})
    filled = _planned_again(filled)
    found = verify_cache(filled.plan, filled.config)
    assert [(item.what, item.shard) for item in found.findings] == [("images", 1)]
    before = {path: state for path, state in _state(filled).items() if "shard-00000" in path}
    plan, left = repair_cache(filled.plan, filled.config, found)
    assert left.findings == []
    repaired = _planned_again(SimpleNamespace(plan=plan, config=filled.config))
    images = _images_of(repaired)
    assert name not in images
    assert images == {other: data for other, data in _files_of(repaired).items() if other != name}
    assert [(chosen.images, chosen.samples) for chosen in repaired.train.selections] == [(150, 100), (49, 49)]
    after = _state(repaired)
    assert {path: after[path] for path in before} == before


def test_a_job_without_repair_does_the_same_for_a_shard_that_is_missing(own_photos, tmp_path):
    filled = own_photos
    name, photo = _sample(filled, 1)
    photo.unlink()
    _part(filled).images.unlist(1)
    filled = _planned_again(filled)
    plan, report = build_cache(filled.plan, filled.config)
    assert (report.images_ingested, report.images_extracted) == (49, 2 * 49)
    assert verify_cache(plan, filled.config).findings == []
    assert name not in _images_of(_planned_again(filled))


def test_a_job_refuses_a_shard_whose_photo_was_replaced_unnoticed_and_repair_does_without_it(own_photos, tmp_path):
    filled = own_photos
    name = _change_photo(filled, tmp_path)
    _part(filled).images.unlist(1)
    filled = _planned_again(filled)
    with pytest.raises(UserError, match=rf"first {name} \(other bytes than before\): .* --verify --repair") as refused:
        build_cache(filled.plan, filled.config)
    assert "\n" not in str(refused.value)
    filled = _planned_again(filled)
    found = verify_cache(filled.plan, filled.config)
    assert {item.what for item in found.findings} == {"images", "source"}
    plan, left = repair_cache(filled.plan, filled.config, found)
    assert left.findings == []
    assert plan.split("train").dataset.count == 150
    repaired = _planned_again(filled)
    assert _images_of(repaired) == _files_of(repaired)


def test_an_index_and_images_that_are_lost_together_are_restored_from_the_samples(filled):
    part = _part(filled)
    part.store.delete("index.parquet")
    part.images.unlist(0)
    filled = _planned_again(filled)
    before = [_teacher(filled, number).read_record(0) for number in (0, 1)]
    found = verify_cache(filled.plan, filled.config)
    assert {item.what for item in found.findings} == {"images", "index"}
    assert repair_cache(filled.plan, filled.config, found)[1].findings == []
    assert [_teacher(filled, number).read_record(0) for number in (0, 1)] == before


def test_an_index_that_cannot_be_restored_is_refused_and_the_remedy_works(own_photos, tmp_path):
    filled = own_photos
    part, (_, photo) = _part(filled), _sample(filled, 0)
    photo.unlink()
    part.store.delete("index.parquet")
    part.images.unlist(0)
    filled = _planned_again(filled)
    found = verify_cache(filled.plan, filled.config)
    with pytest.raises(
        UserError, match=rf"index.parquet cannot be restored.*: delete {part.store.uri} and run the job again"
    ):
        repair_cache(filled.plan, filled.config, found)
    part.store.delete_folder()
    filled = _planned_again(filled)
    plan, _ = build_cache(filled.plan, filled.config)
    assert verify_cache(plan, filled.config).findings == []
    repaired = _planned_again(filled)
    assert _images_of(repaired) == _files_of(repaired)


@pytest.mark.parametrize("damage", [_damaged_version, _damaged_samples, _missing_samples])
def test_a_job_reads_the_images_of_a_damaged_file_of_samples_again_and_finds_them_in_the_cache(filled, damage, caplog):
    file, _ = damage(filled)
    expected, before = filled.train, _state(filled)
    filled = _planned_again(filled)
    assert [record.message for record in caplog.records if file in record.message and "read again" in record.message]
    plan, report = build_cache(filled.plan, filled.config)
    assert (report.images_read, report.images_ingested, report.shards_computed) == (150, 0, 0)
    assert plan.split("train").dataset == expected
    after = _state(filled)
    assert {name: after[name] for name in before if not name.endswith(file)} == {
        name: state for name, state in before.items() if not name.endswith(file)
    }
    caplog.clear()
    again = _planned_again(filled)
    assert again.train.count == 150
    assert not again.plan.split("train").new.num_rows


def test_a_damaged_file_of_bad_samples_is_found_and_written_again(own_photos, tmp_path):
    filled = own_photos
    name, photo = _sample(filled, 0)
    corrupt(photo)
    filled.config = filled.config.model_copy(update={"data": filled.config.data.model_copy(update={"max_bad": 0.1})})
    filled = _planned_again(filled)
    build_cache(filled.plan, filled.config)
    filled = _planned_again(filled)
    file = filled.train.bad
    content = _path(filled.train, file).read_bytes()
    _flip_byte(_path(filled.train, file), 0.1)
    filled = _planned_again(filled)
    (item,) = verify_cache(filled.plan, filled.config).findings
    assert (item.what, item.file.rpartition("/")[2]) == ("samples", file)
    plan, left = repair_cache(filled.plan, filled.config, verify_cache(filled.plan, filled.config))
    assert left.findings == []
    assert _path(filled.train, file).read_bytes() == content
    assert plan.split("train").listing.bad["sample_id"].to_pylist() == [name]


def test_what_only_an_earlier_version_names_is_found_and_the_remedy_named(own_photos, tmp_path):
    filled = own_photos
    file, earlier = filled.train.selections[0].file, filled.train.fingerprint[:8]
    _sample(filled, 0)[1].unlink()
    filled = _planned_again(filled)
    plan, _ = build_cache(filled.plan, filled.config)
    _flip_byte(_path(filled.train, file), 0.1)
    (item,) = verify_cache(plan, filled.config).findings
    remedy = f"{filled.train.store.uri.rpartition('/')[2]}/{earlier}"
    assert item.problem.endswith(f"if --repair cannot restore it, --delete {remedy}")
    assert len(repair_cache(plan, filled.config, verify_cache(plan, filled.config))[1].findings) == 1
    delete_entry(find_entry(filled.plan.store, remedy))
    assert verify_cache(plan, filled.config).findings == []


def test_broken_crops_are_drawn_again_and_are_the_same(projected):
    folder = _part(projected).rows
    record = folder.read_record(0)
    _flip_byte(_path(folder, record.file))
    before = _state(projected)
    found = verify_cache(projected.plan, projected.config)
    assert [item.what for item in found.findings] == ["rows"]
    assert repair_cache(projected.plan, projected.config, found)[1].findings == []
    assert folder.read_record(0).sha256 == record.sha256
    changed = {name for name, state in _state(projected).items() if state != before[name]}
    assert all("/rows/shard-00000" in name or name.endswith("/records.json") for name in changed)


def test_views_whose_colours_are_changed_verify_and_are_repaired(cache_of):
    changed = cache_of(*PROJECTED, "views.photometric={jitter: 0.8, grey: 0.2, blur: 0.5}")
    found = verify_cache(changed.plan, changed.config)
    assert (found.findings, found.recomputed > 0) == ([], True)
    rows, teacher = _part(changed).rows, _part(changed).teacher(changed.plan.teachers[0].id)
    record = rows.read_record(0)
    _rewrite(rows, 0, lambda table: _with_column(table, "brightness", [0.5] * table.num_rows))
    _rewrite(teacher, 1, lambda table: _with_column(table, "patches", table["patches"].to_pylist()[::-1]))
    found = verify_cache(changed.plan, changed.config)
    assert {(item.what, item.shard) for item in found.findings} >= {(changed.plan.teachers[0].id, 0)}
    rows.unlist(0)
    found = verify_cache(changed.plan, changed.config)
    assert repair_cache(changed.plan, changed.config, found)[1].findings == []
    assert rows.read_record(0).sha256 == record.sha256


def test_a_gpu_of_too_little_memory_is_said_in_a_line(filled, monkeypatch):
    monkeypatch.setattr("pipeline.cache.fill.extract.TeacherDevice.encode", out_of_memory)
    with pytest.raises(UserError, match=r"^the GPU has too little memory for 32 images at once"):
        verify_cache(filled.plan, filled.config)


def test_statistics_made_of_wrong_shards_are_taken_again(filled):
    store = _statistics(filled)
    stats = store.get("stats.npz")
    _foreign_statistics(filled)
    _bits(filled)
    found = verify_cache(filled.plan, filled.config)
    assert len(found.findings) == 2
    assert repair_cache(filled.plan, filled.config, found)[1].findings == []
    assert store.get("stats.npz") == stats


def test_an_empty_cache_is_no_sound_one(tmp_path, filled):
    check_begun(filled.plan)
    with pytest.raises(UserError, match=r"holds nothing yet: run jobs/precompute.py"):
        check_begun(plan_cache(filled.config, Store.at(tmp_path / "empty")))
