import contextlib
import json
from dataclasses import replace

import pyarrow as pa
import pytest

from pipeline.cache.layout.keys import digest, fingerprint, sealed, teacher_id, teacher_identity, unsealed
from tests.fakes import ColourGrid

SPEC = ColourGrid(8, "", 0, 0).spec


def test_same_inputs_give_the_same_teacher_id_and_an_alias_changes_nothing():
    alias = replace(SPEC, name="another name", licence="another licence")
    assert teacher_id(SPEC, "float16", "float32") == teacher_id(alias, "float16", "float32")


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "random:1"},
        {"input_size": (64, 64)},
        {"mean": (0.1, 0.5, 0.5)},
        {"interpolation": "bicubic"},
        {"pool": 2},
        {"grid": (2, 2)},
        {"model_args": {"depth": 2}},
        {"architecture": "tests/other"},
    ],
)
def test_whatever_decides_the_numbers_changes_the_teacher_id(change):
    assert teacher_id(replace(SPEC, **change), "float16", "float32") != teacher_id(SPEC, "float16", "float32")


def test_a_basis_changes_the_teacher_id_and_none_leaves_it_as_it_was():
    plain = teacher_id(SPEC, "pca-int8-zstd", "float32")
    assert plain == teacher_id(SPEC, "pca-int8-zstd", "float32", None) == "colours8-3af02ceba1"
    assert len({plain, *(teacher_id(SPEC, "pca-int8-zstd", "float32", basis) for basis in ("1", "2"))}) == 3


def test_codec_and_precision_change_the_teacher_id():
    ids = {
        teacher_id(SPEC, "float16", "float32"),
        teacher_id(SPEC, "float16", "bfloat16"),
        teacher_id(SPEC, "x", "float32"),
    }
    assert len(ids) == 3


def test_a_decoder_changes_the_teacher_id_unless_it_is_the_reference():
    assert teacher_id(SPEC, "float16", "float32", decoder="nvjpeg") != teacher_id(SPEC, "float16", "float32")
    assert teacher_id(SPEC, "float16", "float32", decoder="cpu") == teacher_id(SPEC, "float16", "float32")
    assert "decoder" not in teacher_identity(SPEC, "float16", "float32")


def test_digest_ignores_the_order_of_keys():
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})


def _samples(**columns):
    base = {"sample_id": ["a", "b"], "key": [b"10", b"20"], "label": [0, None]}
    return pa.table({**base, **columns})


def test_a_fingerprint_depends_on_every_value_and_their_order_not_on_their_chunks():
    prints = [
        fingerprint(_samples()),
        fingerprint(_samples(sample_id=["a", "c"])),
        fingerprint(_samples(key=[b"10", b"21"])),
        fingerprint(_samples(label=[0, 1])),
        fingerprint(_samples().take([1, 0])),
    ]
    assert len(set(prints)) == 5
    assert prints[0] == fingerprint(_samples())
    assert prints[0] == fingerprint(pa.concat_tables([_samples().slice(0, 1), _samples().slice(1)]))


@pytest.mark.parametrize("indent", [2, None])
def test_what_is_sealed_comes_back_and_a_changed_byte_is_found(indent):
    meta = {"rows": [1, 2], "a": {"z": 0.5, "b": "ä"}}
    data = sealed(meta, indent)
    assert unsealed(data) == meta == {name: value for name, value in json.loads(data).items() if name != "checksum"}
    for place in range(len(data)):
        for byte in (0, data[place] ^ 1):
            changed = data[:place] + bytes([byte]) + data[place + 1 :]
            with contextlib.suppress(ValueError):
                assert unsealed(changed) == meta, changed
