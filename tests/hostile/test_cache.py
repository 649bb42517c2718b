"""Damaged and forged files in a cache and a work folder: recomputed, or refused by name; none leads out of its folder."""

import io
import json
import logging
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.cache.fill.plan import plan_cache
from pipeline.cache.fill.statistics import freeze_stats
from pipeline.cache.layout.cached_teacher import projections_of, teacher_stats
from pipeline.cache.layout.dataset import read_version, version_files
from pipeline.cache.layout.keys import sealed, unsealed
from pipeline.cache.layout.part import read_part, teacher_home
from pipeline.cache.layout.shards import ShardFolder
from pipeline.cache.read.reader import CacheReader
from pipeline.cache.read.scan import read_summaries, scan_images
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.errors import UserError
from pipeline.runs.folder import open_run
from pipeline.storage.store import DamagedError, Store

NOT_JSON = [b"", b"{", b"null", b"[]", b"3", b'"text"', b"\xff\xfe\x00", b"[" * 100_000, b"\x80\x04."]


def _forgeries(record):
    """A true record with one field changed."""
    for field, values in {
        "file": ["../../../secret.parquet", "/etc/passwd", "", "shard-00000-0.parquet/..", 3, None, ["a"]],
        "moments": ["../stats.npz", 7],
        "projection": ["../../x", {}],
        "rows": [-1, "many", None, 1.5],
        "bytes": [-1, "many", 2**80],
        "shard": [-1, "0", 5],
        "facts": [None, [], "text"],
        "unknown": [1],
    }.items():
        yield from ({**record, field: value} for value in values)
    yield from ({key: value for key, value in record.items() if key != name} for name in ("file", "shard", "rows"))


def _forged(record):
    """Files of such records, and of true ones that were changed without their checksum."""
    yield from map(sealed, _forgeries(record))
    yield json.dumps(record).encode()
    yield sealed(record).replace(b'"rows": 1', b'"rows": 2')


def test_every_bad_record_makes_its_shard_count_as_missing(filled, caplog):
    folder = filled.train.parts[0].images
    folder.store.delete("records.json")
    path = Path(folder.store.uri, "shard-00000.json")
    true = path.read_bytes()
    contents = [*NOT_JSON, *_forged(unsealed(true))]
    assert len(contents) > 30
    with caplog.at_level(logging.WARNING):
        for data in contents:
            path.write_bytes(data)
            caplog.clear()
            assert list(folder.records()) == [1], data
            assert folder.record(0) is None
            assert "will be computed again" in caplog.text
    path.write_bytes(true)
    assert list(folder.records()) == [0, 1]


def test_bad_records_that_were_written_together_are_passed_over(filled, caplog):
    folder = filled.train.parts[0].images
    path = Path(folder.store.uri, "records.json")
    true = unsealed(path.read_bytes())["records"]
    assert len(true) == 2
    forged = [sealed({"records": [item, true[1]]}) for item in _forgeries(true[0]) if item.get("shard") != 5]
    for data in [*NOT_JSON, *forged, sealed({}), sealed({"records": None}), sealed({"records": [1]})]:
        path.write_bytes(data)
        caplog.clear()
        assert list(folder.records()) == [0, 1], data
        assert "reading the record of every shard" in caplog.text or "its record says" in caplog.text


def test_taking_a_forged_shard_out_deletes_nothing_elsewhere(tmp_path):
    (tmp_path / "precious.parquet").write_text("kept")
    folder = ShardFolder(Store.at(tmp_path / "shards"))
    forged = {"shard": 0, "file": "../precious.parquet", "rows": 1, "bytes": 4, "sha256": ""}
    folder.store.put("shard-00000.json", sealed(forged))
    folder.unlist(0)
    assert (tmp_path / "precious.parquet").read_text() == "kept"


def _forged_versions(true):
    chosen = true["selections"][0]
    for field in ("name", "location", "classes", "files", "bad", "selections", "made", "format"):
        yield sealed({key: value for key, value in true.items() if key != field})
    for changes in (
        {"selections": None},
        {"selections": [chosen[:3]]},
        {"selections": [[*chosen[:-1], None]]},
        {"selections": [["../../elsewhere", *chosen[1:]]]},
        {"selections": [[*chosen[:3], "../../../secret.parquet", *chosen[4:]]]},
        {"selections": [[chosen[0], -1, *chosen[2:]]]},
        {"selections": [[*chosen[:2], 0, *chosen[3:]]]},
        {"selections": [[*chosen[:-1], [7]]]},
        {"bad": "/etc/passwd"},
        {"bad": 3},
        {"classes": 3},
        {"classes": [1]},
        {"files": [1]},
        {"made": "today"},
        {"made": None},
    ):
        yield sealed({**true, **changes})
    yield json.dumps(true).encode()  # without a checksum


def test_every_bad_version_of_a_data_set_is_named_and_its_images_are_read_again(filled, caplog):
    store = filled.train.store
    (file,) = version_files(store)
    true = unsealed(store.get(file))
    for data in [*NOT_JSON, *_forged_versions(true)]:
        store.put(file, data)
        with pytest.raises(DamagedError, match=re.escape(f"{store.uri}/{file} cannot be read")) as refused:
            read_version(filled.plan.store, "photos-train", file)
        assert "\n" not in str(refused.value)
        caplog.clear()
        assert plan_cache(filled.config, filled.plan.store).split("train").new.num_rows == 150, data
        assert f"{file} cannot be read" in caplog.text
    store.put(file, sealed({**true, "format": 99}))
    with pytest.raises(UserError, match=f"{store.uri} has cache format 99"):
        plan_cache(filled.config, filled.plan.store)


def test_every_bad_description_of_a_part_is_refused_by_name(filled):
    part = filled.train.parts[0]
    true = unsealed(part.store.get("part.json"))
    forged = [{**true, "count": -1}, {**true, "shard_size": 0}, {**true, "count": "many"}, {**true, "format": None}]
    forged += [{key: value for key, value in true.items() if key != field} for field in true] + [{**true, "format": 99}]
    for data in [*NOT_JSON, *map(sealed, forged), json.dumps(true).encode()]:
        part.store.put("part.json", data)
        with pytest.raises(UserError, match=part.store.uri) as refused:
            read_part(filled.plan.store, part.id)
        assert "\n" not in str(refused.value)
        assert plan_cache(filled.config, filled.plan.store).split("train").dataset == filled.train


def _arrays(harmful):
    """Bytes that are no honest .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, patches_mean=np.array([harmful], dtype=object), allow_pickle=True)
    yield buffer.getvalue()
    plain = io.BytesIO()
    np.save(plain, np.array([harmful], dtype=object), allow_pickle=True)
    yield plain.getvalue()
    whole = io.BytesIO()
    np.savez(whole, patches_count=1, patches_mean=np.zeros(8), patches_std=np.zeros(8))
    data = whole.getvalue()
    yield from (data[: int(len(data) * share)] for share in (0, 0.1, 0.5, 0.9))
    header = data.replace(b"'shape': (8,), ", b"'shape': (9**9,)")
    yield from (header, data.replace(b"'<f8'", b"'|O8'"), pickle.dumps(harmful), b"PK\5\6" + bytes(18), b"text")


def test_every_bad_array_file_is_refused_by_name_and_not_unpickled(filled, harmful):
    teacher = filled.plan.teachers[0]
    folder, statistics = filled.train.parts[0].teacher(teacher.id), filled.train.statistics(teacher.id)
    home = teacher_home(filled.plan.store, teacher.id)
    moments = folder.records()[0].moments
    for data in _arrays(harmful):
        statistics.put("stats.npz", data)
        with pytest.raises(UserError, match=r"stats\.npz is damaged"):
            teacher_stats(filled.train, teacher)
        if data[:2] == b"PK" and len(data) < 100:
            continue  # an archive without members says that nothing is projected
        home.put("projection-00000000.npz", data)
        with pytest.raises(UserError, match=r"projection-00000000\.npz is damaged"):
            projections_of(filled.plan.store, teacher)
        home.delete("projection-00000000.npz")
        statistics.delete("stats.npz")
        folder.store.put(moments, data)
        with pytest.raises(UserError, match=rf"{moments} is damaged"):
            freeze_stats(filled.train, teacher)
        assert not harmful.marker.exists()


def _spoilt(data, rng):
    """Bytes of the same length, as the record demands, that are no such Parquet file."""
    yield rng.bytes(len(data))
    yield bytes(len(data))
    yield data[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1"
    footer = int.from_bytes(data[-8:-4], "little")
    for _ in range(4):
        start = len(data) - 8 - footer
        yield data[:start] + rng.bytes(60) + data[start + 60 :]


def test_every_bad_shard_is_refused_by_name_where_it_is_read(filled):
    rng = np.random.default_rng(2)
    teacher = filled.plan.teachers[0]

    def train():
        reader = CacheReader(filled.train, [teacher], image_size=32, batch_size=16)
        return list(reader.batches(0))

    for folder, readers in (
        (filled.train.parts[0].images, [train, lambda: list(scan_images(filled.train, 32, 16))]),
        (filled.train.parts[0].teacher(teacher.id), [train, lambda: read_summaries(filled.train, teacher)]),
    ):
        name = folder.records()[0].file
        path = Path(folder.store.uri, name)
        whole = path.read_bytes()
        for data in _spoilt(whole, rng):
            replace = path.with_suffix(".new")
            replace.write_bytes(data)
            os.replace(replace, path)  # a file that is mapped into memory is not to be written to
            for read in readers:
                with pytest.raises(UserError, match=rf"{name} is damaged .*--verify --repair"):
                    read()
        replace.write_bytes(whole)
        os.replace(replace, path)
    assert train()


def test_a_bad_index_is_refused_by_name(filled):
    rng = np.random.default_rng(4)
    part = filled.train.parts[0]
    whole = part.store.get("index.parquet")
    for data in (b"", b"PAR1", rng.bytes(500), whole[:-100], *_spoilt(whole, rng)):
        part.store.put("index.parquet", data)
        with pytest.raises(UserError, match=r"index\.parquet is damaged .*--verify --repair"):
            part.index()


def test_a_bad_file_of_samples_is_refused_by_name_where_it_is_read(filled):
    rng = np.random.default_rng(5)
    file = filled.train.selections[0].file
    whole = filled.train.store.get(file)
    for data in (b"", b"PAR1", rng.bytes(500), whole[:-100], *_spoilt(whole, rng)):
        filled.train.store.put(file, data)
        with pytest.raises(UserError, match=rf"{file} is damaged .*--verify --repair"):
            filled.train.samples(0)


def test_every_bad_run_state_is_refused_by_name(tmp_path):
    config = load_config(DistillJobConfig, None, [f"work={tmp_path}"])
    state = open_run(config, "distill")
    state.save()
    path = state.folder / "run.json"
    forged = [{"mlflow": {}}, {"finished": False}, {"mlflow": [], "finished": False}, {"mlflow": {}, "finished": "no"}]
    forged += [{"mlflow": {"job": 3}, "finished": False}, {"mlflow": None, "finished": True}]
    for data in [*NOT_JSON, *(json.dumps(tree).encode() for tree in forged)]:
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"run\.json cannot be read"):
            open_run(config, "distill")


def test_every_bad_recipe_is_refused_by_name_and_not_run(tmp_path, harmful):
    call = f"!!python/object/apply:os.mkdir [{harmful.marker}]"
    recipes = [call, f"name: {call}", "a: &a [*a]", "train: {epochs: !!python/name:os.system }", "- 1", "3", "train: ["]
    for number, text in enumerate(
        [*map(str.encode, recipes), b"\xff\xfe\x00", b"\0", b"[" * 1000, b"name: " + b"[" * 1000]
    ):
        path = tmp_path / f"recipe{number}.yaml"
        path.write_bytes(text)
        with pytest.raises(UserError):
            load_config(DistillJobConfig, path)
        assert not harmful.marker.exists()
