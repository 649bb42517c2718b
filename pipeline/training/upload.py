"""Copies of batches to the training device, during the previous step."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.runtime.prefetch import map_ahead
from pipeline.training.task import map_tensors

Batch = TypeVar("Batch")


def prefetch_to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches with all their tensors on `device`.

    A thread copies them to a GPU one batch ahead on a side stream: on the training stream, a copy from pageable memory
    would wait for the previous step, and the next step for the copy.
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
    """A copy of a batch with all tensors on a device."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def list_tensors(batch: Any) -> list[Tensor]:
    """All tensors of a batch that :func:`to_device` moves."""
    found: list[Tensor] = []
    map_tensors(batch, found.append)
    return found
