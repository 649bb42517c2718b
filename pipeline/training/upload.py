"""Batches brought to the training device while the step before is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.prefetch import map_ahead

Batch = TypeVar("Batch")


def upload_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches with all their tensors on `device`.

    On a GPU they are copied one batch ahead, on a thread and a CUDA stream of their own: from memory that is not
    page-locked, a copy on the stream of the training would wait for the step before, and the next step for the copy.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)

    def upload(batch: Batch) -> Batch:
        with torch.cuda.stream(stream):
            moved: Batch = to_device(batch, device)
        stream.synchronize()
        return moved

    with ThreadPoolExecutor(1) as pool:
        for batch in map_ahead(pool, upload, batches, ahead=1):
            for tensor in tensors_of(batch):
                tensor.record_stream(torch.cuda.current_stream(device))  # whose work is to end before it is used again
            yield batch


def to_device(value: Any, device: torch.device) -> Any:
    """A tensor on a device, or the like of a dataclass, tuple, list or mapping with all its tensors there."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{part.name: to_device(getattr(value, part.name), device) for part in fields(value)})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, Mapping):
        return {name: to_device(item, device) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors of what :func:`to_device` takes."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from tensors_of(getattr(value, part.name))
    elif isinstance(value, Mapping):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
