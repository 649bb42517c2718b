"""Batches that are split."""

import torch

from pipeline.cache.read.reader import Batch
from pipeline.downstream.detect.task import ObjectsBatch
from pipeline.training.task import split_batch


def test_a_batch_is_cut_with_all_that_it_holds():
    batch = Batch(
        ["a", "b", "c"],
        torch.arange(3),
        torch.arange(3) + 10,
        {"teacher": {"summary": torch.arange(6).reshape(3, 2)}},
        (0, 1),
    )
    first, second = split_batch(batch, 2)
    assert (first.keys, second.keys) == (["a"], ["b", "c"])
    assert second.images.tolist() == [1, 2]
    assert second.labels.tolist() == [11, 12]
    assert second.features["teacher"]["summary"].tolist() == [[2, 3], [4, 5]]
    assert first.position == second.position == batch.position
    assert [piece.keys for piece in split_batch(batch, 9)] == [["a"], ["b"], ["c"]]


def test_batches_of_fine_tuning_are_cut_too():
    boxes = [{"boxes": torch.full((2, 4), float(number))} for number in range(3)]
    first, second = split_batch(ObjectsBatch(["a", "b", "c"], list(torch.arange(3)), boxes), 2)
    assert (first.keys, second.keys) == (["a"], ["b", "c"])
    assert second.images == [torch.tensor(1), torch.tensor(2)]
    assert [target["boxes"][0, 0].item() for target in second.targets] == [1, 2]
