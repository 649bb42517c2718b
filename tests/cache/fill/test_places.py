"""Rows of an index are found in other tables by their places."""

import numpy as np
import pyarrow as pa

from pipeline.cache.fill import places
from pipeline.cache.fill.places import PLACE, Places, string_hashes
from pipeline.sources.base import INDEX_SCHEMA


def _index(count: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    names = [f"{'å' * int(rng.integers(0, 9))}{number}" for number in range(count)]
    labels = [None if number % 3 == 0 else number % 5 for number in range(count)]
    columns = [names, labels, [f"/photos/{name[:-1]}" for name in names], [*range(count)], [9] * count, [7] * count]
    return pa.table(columns, schema=INDEX_SCHEMA)


def test_places_are_found_in_tables_in_pieces_and_changed_files_are_not(monkeypatch):
    monkeypatch.setattr(places, "ROWS_HASHED", 7)
    whole, rng = _index(200), np.random.default_rng(1)
    index = pa.concat_tables([whole.slice(0, 3), whole.slice(3, 0), whole.slice(3, 90), whole.slice(93)])
    order = rng.permutation(200)[:150]
    known = index.take(pa.array(order))
    version = known["version"].to_numpy().copy()
    version[::10] += 1
    known = known.set_column(5, INDEX_SCHEMA.field("version"), pa.array(version))
    found = Places(index)
    at, rows = found.find(known.select(PLACE))
    kept = np.flatnonzero(np.arange(150) % 10)
    assert at.tolist() == order[kept].tolist()
    assert rows.tolist() == kept.tolist()
    assert found.rows(at).equals(whole.take(pa.array(at)))


def test_nulls_are_equal_to_nulls_alone():
    index = _index(30)
    at = np.random.default_rng(2).permutation(30)
    names = index.select(["sample_id", "label"]).take(pa.array(at))
    assert Places(index).equal(at, names).all()
    labels = names["label"].fill_null(0)
    changed = names.set_column(1, "label", labels)
    assert Places(index).equal(at, changed).tolist() == [number % 3 != 0 for number in at.tolist()]


def test_nothing_is_found_where_there_is_nothing():
    for index, known in ((_index(0), _index(3)), (_index(3), _index(0))):
        assert [len(some) for some in Places(index).find(known)] == [0, 0]
    assert Places(_index(3)).rows(np.empty(0, np.int64)).schema == INDEX_SCHEMA


def test_the_hash_of_a_string_is_the_same_in_every_array():
    texts = ["", "a", "b", "aa", "a" * 8, "a" * 9, "a" * 7 + "b", "x" * 64, "a" * 64, "\0", "\0\0", "b" * 8 + "a"]
    hashes = string_hashes(pa.array(texts))
    assert len({*hashes.tolist()}) == len(texts)
    for number, text in enumerate(texts):
        assert string_hashes(pa.array([text])).tolist() == [hashes[number]]
    assert string_hashes(pa.array(texts).slice(3, 5)).tolist() == hashes[3:8].tolist()
