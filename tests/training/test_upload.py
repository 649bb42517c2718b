"""Batches on their way to a device."""

import torch

from pipeline.cache.read.reader import Batch
from pipeline.downstream.detect.task import ObjectsBatch
from pipeline.training.task import list_tensors, to_device


def test_all_tensors_of_a_batch_come_to_a_device_and_nothing_else_changes():
    targets = [
        {"boxes": torch.ones(2, 4), "labels": torch.ones(2)},
        {"boxes": torch.ones(0, 4), "labels": torch.ones(0)},
    ]
    objects = ObjectsBatch(["a", "b"], [torch.ones(3, 4, 5), torch.ones(3, 2, 2)], targets)
    images, labels = torch.ones(2, 3, 4, 4), torch.ones(2)
    cached = Batch(["a", "b"], images, labels, {"hog": {"patches": torch.ones(2, 8)}}, position=(1, 2))
    for batch, count in ((objects, 6), (cached, 3)):
        there = to_device(batch, torch.device("meta"))
        assert type(there) is type(batch)
        assert there.keys == batch.keys
        assert len(list_tensors(batch)) == len(list_tensors(there)) == count
        for a, b in zip(list_tensors(batch), list_tensors(there), strict=True):
            assert b.is_meta
            assert a.shape == b.shape
    assert there.position == (1, 2)
