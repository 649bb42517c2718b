import pytest
import torch

from pipeline.cache.read.scan import read_summaries, scan_images


def test_with_a_gpu_processes_decode_the_same_images(filled, monkeypatch):
    here = list(scan_images(filled.val, 16, 20))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    there = list(scan_images(filled.val, 16, 20))
    assert [batch.keys for batch in there] == [batch.keys for batch in here]
    assert torch.equal(torch.cat([batch.images for batch in there]), torch.cat([batch.images for batch in here]))


def test_scan_gives_images_and_labels_in_stored_order(filled):
    batches = list(scan_images(filled.train, 16, 20))
    assert sum(len(batch.keys) for batch in batches) == 150
    assert batches[0].images.shape == (20, 3, 16, 16)
    assert [int(label) for label in batches[0].labels] == [int(key[5]) for key in batches[0].keys]


@pytest.mark.parametrize("limit", [None, 64])
def test_ranks_together_scan_every_row_group(filled, limit):
    whole = [key for batch in scan_images(filled.train, 16, 50, limit) for key in batch.keys]
    parts = [
        [key for batch in scan_images(filled.train, 16, 50, limit, rank, 2) for key in batch.keys] for rank in (0, 1)
    ]
    assert sorted(parts[0] + parts[1]) == sorted(whole)
    assert bool(parts[1]) == (limit is None)  # one row group leaves nothing for the second


def test_summaries_are_in_the_order_of_the_scanned_images(filled):
    teacher = filled.plan.teachers[0]
    for limit in (None, 64):
        summaries, labels = read_summaries(filled.train, teacher, limit)
        batches = list(scan_images(filled.train, 16, 50, limit))
        assert torch.equal(labels, torch.cat([batch.labels for batch in batches]))
        assert summaries.shape == (len(labels), 8)
    assert len(labels) == 64
