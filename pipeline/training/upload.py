"""Copies of batches to the training device, during the previous step."""

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

    To a GPU they are copied one batch ahead, by a thread on a side stream: a copy from pageable memory on the training
    stream would wait for the previous step, and the next step for the copy.
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
                tensor.record_stream(torch.cuda.current_stream(device))  # or its memory is reused too early
            yield batch


def to_device(batch: Any, device: torch.device) -> Any:
    """A copy of a batch (`map_parts`) with all tensors, also those in lists, on a device."""

    def moved(part: Any) -> Any:
        if isinstance(part, list):
            return [to_device(item, device) for item in part]
        return part.to(device, non_blocking=True) if isinstance(part, Tensor) else part

    return map_parts(batch, moved)


def list_tensors(batch: Any) -> list[Tensor]:
    """All tensors of a batch that :func:`to_device` moves."""
    found: list[Tensor] = []

    def note(part: Any) -> None:
        if isinstance(part, list):
            found.extend(tensor for item in part for tensor in list_tensors(item))
        elif isinstance(part, Tensor):
            found.append(part)

    map_parts(batch, note)
    return found
