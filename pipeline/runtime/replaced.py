"""Attributes of other packages, replaced for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Replace attributes (owner, name, value) in this block if all of them exist, else none: they are not a public interface."""
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in changes if name in vars(owner)]
    if len(before) < len(changes):
        yield
        return
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
