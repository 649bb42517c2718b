"""Batches of rendered pixels for several teachers, assembled from images that are decoded once."""

from collections.abc import Mapping, Sequence
from concurrent.futures import wait

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.imaging.decoder_pool import CropTask, DecoderPool, DecodeTasks, PendingDecode
from pipeline.imaging.geometry import View
from pipeline.imaging.shared_arrays import ArrayHandle
from teachers.base import TeacherSpec


class BatchAssembler:
    """Batches of `size` out of `rows` rows, partially rendered; a chunk of images fills rows of one or several batches."""

    def __init__(self, decoders: DecoderPool, specs: Mapping[str, TeacherSpec], rows: int, size: int) -> None:
        self.decoders, self.specs, self.rows, self.size = decoders, specs, rows, size
        self.pixels: dict[int, dict[str, np.ndarray]] = {}
        self.targets: dict[int, dict[str, Sequence[np.ndarray | ArrayHandle]]] = {}
        self.pending: dict[int, list[PendingDecode]] = {}

    def render(self, images: pa.ChunkedArray, views: Sequence[View], first: int) -> None:
        """Start rendering a chunk of images, whose views are the rows from `first` on."""
        count = len(views) // len(images)
        work: DecodeTasks = [
            (data, [task for row in range(i, i + count) for task in self._crop_tasks(views[row], first + row)])
            for i, data in zip(range(0, len(views), count), images.to_pylist(), strict=True)
        ]
        pending = self.decoders.submit(work)
        for number in range(first // self.size, (first + len(views) - 1) // self.size + 1):
            self.pending.setdefault(number, []).append(pending)

    def _crop_tasks(self, view: View, row: int) -> list[CropTask]:
        number, position = divmod(row, self.size)
        if number not in self.pixels:
            # All of one size, so that their memory is reused; the rows that a short batch leaves over are never touched.
            self.pixels[number] = {
                name: self.decoders.empty(self.size, 3, *spec.input_size) for name, spec in self.specs.items()
            }
            self.targets[number] = {
                name: self.decoders.row_targets(pixels) for name, pixels in self.pixels[number].items()
            }
        targets = self.targets[number]
        return [CropTask(view, spec.interpolation, targets[name][position]) for name, spec in self.specs.items()]

    def pop(self, number: int) -> dict[str, Tensor]:
        """Wait for a batch and return its pixels by teacher id, [B, 3, H, W] uint8."""
        self.decoders.finish(self.pending[number])
        del self.pending[number], self.targets[number]
        count = min(self.size, self.rows - number * self.size)
        return {name: torch.from_numpy(pixels)[:count] for name, pixels in self.pixels.pop(number).items()}

    def wait_for_unused(self) -> None:
        """Wait for rendering that nobody will use, so that its arrays can be reused."""
        wait([pending.future for some in self.pending.values() for pending in some])
