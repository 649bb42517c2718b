"""Checkpoints that carry code, lie about their size or hold other numbers: refused by name, and nothing of them runs."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from pipeline.errors import UserError
from pipeline.student.model import create_backbone, load_encoder
from pipeline.training.checkpoint import STATE_FILE, load_state
from teachers.base import TeacherError
from teachers.checkpoint import read_checkpoint
from teachers.fit import check_keys


def _torch_bytes(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


class _Evaluated:
    """Unpickled, it evaluates an expression."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({str(self.marker)!r})",)


class _Restored:
    """Unpickled, it restores itself through a function of another module."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.makedirs, (str(self.marker),), {"a": 1}


class Script(nn.Module):
    """TorchScript that computes while it is loaded."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.training = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight

    @torch.jit.export
    def __getstate__(self):
        return (self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        self.weight = state[0] * 2
        self.training = state[1]


def _script():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Script()), buffer)
    return buffer.getvalue()


def _zip_bomb(tensors):
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_torch_bytes(tensors))) as whole, zipfile.ZipFile(packed, "w") as bomb:
        for name in whole.namelist():
            data = whole.read(name)
            bomb.writestr(name, bytes(32 << 20) if "/data/" in name else data, zipfile.ZIP_DEFLATED, 9)
    return packed.getvalue()


def _pickles(harmful):
    """Every way in which a pickle reaches a checkpoint."""
    objects = {"plain": harmful, "evaluated": _Evaluated(harmful.marker), "restored": _Restored(harmful.marker)}
    for name, item in objects.items():
        state = OrderedDict(a=torch.ones(2), b=[{"c": item}])
        yield f"zip-{name}.pth", _torch_bytes(state)
        yield f"legacy-{name}.pt", _torch_bytes(state, _use_new_zipfile_serialization=False)
        for protocol in range(6):
            yield f"pickle{protocol}-{name}.bin", pickle.dumps({"a": item}, protocol)
        yield f"key-{name}.pth", _torch_bytes({item: torch.ones(2)})
        yield f"named-{name}.safetensors", _torch_bytes(state)


def _safetensors(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _tensor(shape=(2,), offsets=(0, 8), kind="F32"):
    return {"dtype": kind, "shape": list(shape), "data_offsets": list(offsets)}


def _lies():
    body = bytes(16)
    yield from {
        "size": struct.pack("<Q", 2**63) + b"{}",
        "size-of-all": struct.pack("<Q", 2**64 - 1),
        "no-json": _safetensors(b"not json"),
        "list": _safetensors([1]),
        "deep": _safetensors(b'{"a":' * 50_000),
        "beyond": _safetensors({"a": _tensor(offsets=(0, 2**40), shape=(2**38,))}, body),
        "backwards": _safetensors({"a": _tensor(offsets=(8, 0))}, body),
        "negative": _safetensors({"a": _tensor(shape=(-2,))}, body),
        "overlap": _safetensors({"a": _tensor(), "b": _tensor(offsets=(4, 12))}, body),
        "product": _safetensors({"a": _tensor(shape=(2**33, 2**33))}, body),
        "kind": _safetensors({"a": _tensor(kind="PICKLE")}, body),
        "shape": _safetensors({"a": _tensor(shape=(3,))}, body),
        "hole": _safetensors({"a": _tensor(offsets=(4, 12))}, body),
    }.items()


def _checkpoints(rng, harmful):
    tensors = {"a": torch.ones(2000), "b": torch.zeros(3, dtype=torch.int64)}
    yield from _pickles(harmful)
    yield from ((f"{name}.safetensors", data) for name, data in _lies())
    for ending, whole in ((".pth", _torch_bytes(tensors)), (".safetensors", save(tensors))):
        for share in (0, 0.01, 0.3, 0.7, 0.99):
            yield f"cut-{share}{ending}", whole[: int(len(whole) * share)]
        yield f"noise{ending}", rng.bytes(3000)
        yield f"text{ending}", b"version https://git-lfs.github.com/spec/v1\n"
    yield "bomb.pth", _zip_bomb(tensors)
    yield "script.pt", _script()
    yield "list.pth", _torch_bytes([torch.ones(1)])
    yield "number.pth", _torch_bytes(3)


def test_every_bad_checkpoint_of_a_teacher_is_refused_by_name_and_none_is_run(tmp_path, harmful):
    files = dict(_checkpoints(np.random.default_rng(1), harmful))
    assert len(files) > 50
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(TeacherError) as refused:
            read_checkpoint(tmp_path / name, "mine")
        assert name in str(refused.value)
        assert "\n" not in str(refused.value)
        assert not harmful.marker.exists()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("integers", torch.ones(4, 3, dtype=torch.int8)),
        ("booleans", torch.ones(4, 3, dtype=torch.bool)),
        ("complex", torch.ones(4, 3, dtype=torch.complex64)),
        ("turned", torch.ones(3, 4)),
        ("more", torch.ones(4, 3, 1)),
        ("scalar", torch.ones(())),
        ("none", torch.ones(0, 3)),
    ],
)
def test_tensors_of_another_shape_or_kind_are_not_taken_for_weights(name, tensor):
    with pytest.raises(TeacherError, match="weight"):
        check_keys({"weight": tensor}, {"weight": torch.ones(4, 3)}, "mine")
    assert check_keys({"weight": torch.ones(4, 3).half()}, {"weight": torch.ones(4, 3)}, "mine")


def test_a_checkpoint_of_a_training_run_with_code_in_it_is_not_run(tmp_path, harmful):
    for name, data in _pickles(harmful):
        (tmp_path / STATE_FILE).write_bytes(data)
        with pytest.raises(UserError, match=r"the checkpoint .* cannot be read"):
            load_state(tmp_path)
        assert not harmful.marker.exists(), name


@pytest.fixture(scope="module")
def student():
    """Weights and description of an exported student."""
    weights = create_backbone("timm/test_resnet").state_dict()
    return weights, {"model": "test_resnet", "args": {"num_classes": 0}}


def _descriptions(harmful):
    name = "test_resnet"
    for arguments in (
        {"checkpoint_path": "weights.pth"},
        {"pretrained": True},
        {"pretrained_cfg": {"file": "weights.pth"}},
        {"pretrained_cfg_overlay": {"custom_load": True}},
        {"cache_dir": "elsewhere"},
        {"no_such_argument": 1},
        {"num_classes": "many"},
        {"num_classes": 10},
        {"in_chans": -1},
        {"layers": []},
        {"block": "os.system"},
    ):
        yield json.dumps({"model": name, "args": arguments}).encode()
    for model in ("no_such_model", "hf-hub:someone/model", "local-dir:weights", "../../weights", "", 3, None, ["a"]):
        yield json.dumps({"model": model, "args": {}}).encode()
    yield from (
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": "test_resnet"}',
        pickle.dumps(harmful),
    )
    yield json.dumps({"model": name, "args": [1]}).encode()


def test_every_bad_description_of_a_student_is_refused_by_name(tmp_path, student, harmful):
    save_file(student[0], tmp_path / "student.safetensors")
    (tmp_path / "weights.pth").write_bytes(_torch_bytes({"a": harmful}))
    for data in _descriptions(harmful):
        (tmp_path / "student.json").write_bytes(data)
        with pytest.raises(UserError) as refused:
            load_encoder(tmp_path)
        assert str(refused.value).startswith(f"{tmp_path} is not an exported student: ")
        assert not harmful.marker.exists()


def test_every_bad_weight_of_a_student_is_refused_by_name(tmp_path, student, harmful):
    weights, description = student
    (tmp_path / "student.json").write_text(json.dumps(description))
    first = next(iter(weights))
    changed = {
        "missing": {k: v for k, v in weights.items() if k != first},
        "more": {**weights, "extra": torch.ones(1)},
        "integers": {**weights, first: weights[first].to(torch.int32)},
        "shape": {**weights, first: weights[first][:1].contiguous()},
        "nothing": {"extra": torch.ones(1)},
    }
    contents = [save(tensors) for tensors in changed.values()]
    contents += [data for _, data in _lies()] + [data for _, data in _pickles(harmful)]
    for data in contents:
        (tmp_path / "student.safetensors").write_bytes(data)
        with pytest.raises(UserError) as refused:
            load_encoder(tmp_path)
        assert str(refused.value).startswith(f"{tmp_path} is not an exported student: ")
        assert not harmful.marker.exists()
