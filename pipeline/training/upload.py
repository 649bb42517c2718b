"""Batches brought to the training device while the step before is computed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.runtime.prefetch import map_ahead
from pipeline.training.task import map_parts

Batch = TypeVar("Batch")


def prefetch_to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches with all their tensors on `device`.

    On a GPU they are copy_to_cpu one batch ahead, on a thread and a CUDA stream of their own: from memory that is not
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
            for tensor in list_tensors(batch):
                tensor.record_stream(torch.cuda.current_stream(device))  # whose work is to end before it is used again
            yield batch


def to_device(batch: Any, device: torch.device) -> Any:
    """The like of a batch (`map_parts`) with all its tensors, and those in its lists, on a device."""

    def moved(part: Any) -> Any:
        if isinstance(part, list):
            return [to_device(item, device) for item in part]
        return part.to(device, non_blocking=True) if isinstance(part, Tensor) else part

    return map_parts(batch, moved)


def list_tensors(batch: Any) -> list[Tensor]:
    """All tensors that :func:`to_device` takes to a device."""
    found: list[Tensor] = []

    def note(part: Any) -> None:
        if isinstance(part, list):
            found.extend(tensor for item in part for tensor in list_tensors(item))
        elif isinstance(part, Tensor):
            found.append(part)

    map_parts(batch, note)
    return found
