"""How Ray Data's actors get their arguments."""

import pytest
import ray
from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

from pipeline.cache.fill import inline_arguments


@pytest.fixture
def put(monkeypatch):
    """What is put into the object store, with the class of Ray Data as it was afterwards."""
    found: list[object] = []
    monkeypatch.setattr(ray, "put", lambda value: found.append(value) or "reference")
    yield found
    for name in inline_arguments._VALUES:
        if name in vars(ActorPoolMapOperator):
            delattr(ActorPoolMapOperator, name)


def operator(transformer, context):
    made = ActorPoolMapOperator.__new__(ActorPoolMapOperator)
    made._map_transformer, made._data_context = transformer, context
    made._warn_large_udf = lambda _: None
    return made


def test_small_arguments_go_with_the_call_and_large_ones_through_the_object_store(put):
    large = b"x" * inline_arguments.MAX_BYTES
    inline_arguments.inline_small_arguments()
    inline_arguments.inline_small_arguments()  # once for every extraction
    mixed = operator("small", large)
    assert mixed._map_transformer_ref == "small"
    assert mixed._data_context_ref == mixed._data_context_ref == "reference"
    assert operator(large, "small")._map_transformer_ref == "reference"
    assert put == [large, large]


def test_another_version_keeps_its_own_way(monkeypatch, put):
    monkeypatch.setattr(inline_arguments, "_VALUES", {"_another_ref": "_another"})
    inline_arguments.inline_small_arguments()
    assert operator("small", "small")._map_transformer_ref == "reference"
    assert put == ["small"]
