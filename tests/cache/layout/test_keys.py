from dataclasses import replace

import pyarrow as pa
import pytest

from pipeline.cache.layout.keys import digest, fingerprint, teacher_id, teacher_identity
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
