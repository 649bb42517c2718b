"""Ray Data's actors get small arguments with the call that creates them, and a restart of them depends on no object.

Ray Data puts them into the object store, and Ray then prints an error, although a restart needs nothing that could be lost
while the job lives: its driver holds the objects.
"""

from functools import cached_property
from typing import Any

MAX_BYTES = 100 << 10
"""Size from which Ray puts an argument into the object store in any case (its `max_direct_call_object_size`)."""
_VALUES = {"_map_transformer_ref": "_map_transformer", "_data_context_ref": "data_context"}


def inline_small_arguments() -> None:
    """Prepare Ray Data's pools of actors in this process; without effect where another version has none of these names."""
    try:
        from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator as Pool
    except ImportError:
        return
    for reference, value in _VALUES.items():
        original = getattr(Pool, reference, None)
        if isinstance(original, cached_property) and reference not in vars(Pool):
            chosen = cached_property(_chosen(original, value))
            chosen.__set_name__(Pool, reference)
            setattr(Pool, reference, chosen)


def _chosen(original: cached_property[Any], value: str) -> Any:
    """A function of an operator: the value if it is small, else the reference that Ray Data makes."""
    from ray import cloudpickle

    def choose(operator: Any) -> Any:
        found = getattr(operator, value)
        return found if len(cloudpickle.dumps(found)) < MAX_BYTES else original.func(operator)

    return choose
