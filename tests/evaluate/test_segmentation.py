import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.evaluate.linear import LinearHeads, train_heads
from pipeline.evaluate.segmentation import _at_pixels, confusions, count_batches, pixel_batches
from pipeline.training.segmentation_scores import segmentation_scores

CLASSES, GRID = 4, 6


class Groups:
    """Maps in memory, as `PatchReader` gives them: the classes of each cell, one-hot, in noise."""

    def __init__(self, cells):
        one_hot = F.one_hot(torch.tensor(cells), CLASSES).float()
        self.patches = torch.cat([one_hot, torch.randn(one_hot.shape, generator=torch.Generator().manual_seed(0))], -1)
        self.sizes = [5, len(cells) - 5]

    def __len__(self):
        return 2

    def read(self, number):
        rows = range(5) if number == 0 else range(5, len(self.patches))
        return [str(row) for row in rows], self.patches[rows.start : rows.stop]


class Maps:
    """Label maps of unlike sizes with coarse cells; the first column of each is ignored, one map as a whole."""

    def __init__(self, cells):
        self.cells = cells

    def read(self, sample_id):
        number = int(sample_id)
        labels = np.kron(self.cells[number], np.ones((8 + number % 3, 10), np.int64))
        labels[:, : labels.shape[1] if number == 3 else 1] = -1
        return labels


@pytest.fixture
def probe():
    cells = np.random.default_rng(0).integers(0, CLASSES, (12, GRID, GRID))
    return Groups(cells), Maps(cells), LinearHeads(torch.zeros(8), torch.ones(8), CLASSES, [0.1, 1.0])


def test_logits_at_pixels_are_those_of_the_whole_map_interpolated(probe):
    groups, _, heads = probe
    features = groups.patches[:1].permute(0, 3, 1, 2)
    height, width = 23, 41
    y, x = np.divmod(np.arange(height * width), width)
    places = np.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], 1).astype(np.float32)
    at_pixels, labels = _at_pixels(features, [(places, np.arange(height * width))])
    assert labels.tolist() == list(range(height * width))
    logits = heads(groups.patches[0].flatten(0, 1)).permute(1, 2, 0).unflatten(2, (GRID, GRID))
    full = F.interpolate(logits, size=(height, width), mode="bilinear")
    assert torch.allclose(heads(at_pixels), full.flatten(2).permute(2, 0, 1), atol=1e-5)


def test_a_probe_learns_what_a_linear_layer_can(probe, tmp_path):
    groups, maps, heads = probe
    batches, steps = pixel_batches(groups, maps, 4, 0, "cpu"), count_batches(groups, 4)
    assert len(list(batches(0))) == steps == 4
    train_heads(heads, batches, steps, 10, tmp_path / "state.pt", lambda *_: None)
    scores, _, _ = segmentation_scores(confusions(heads, groups, maps, CLASSES, "cpu")[1])
    assert scores["aacc"] > 80
    known = sum((maps.read(str(number)) >= 0).sum() for number in range(12))
    assert confusions(heads, groups, maps, CLASSES, "cpu").sum(dim=(1, 2)).tolist() == [known, known]


def test_confusions_equal_an_independent_computation(probe):
    groups, maps, heads = probe
    expected = np.zeros((2, CLASSES, CLASSES), int)
    for number in range(12):
        labels = maps.read(str(number))
        logits = heads(groups.patches[number].flatten(0, 1)).detach().permute(1, 2, 0).unflatten(2, (GRID, GRID))
        classes = F.interpolate(logits, size=labels.shape, mode="bilinear").argmax(dim=1).numpy()
        for head in range(2):
            np.add.at(expected[head], (labels[labels >= 0], classes[head][labels >= 0]), 1)
    assert confusions(heads, groups, maps, CLASSES, "cpu").tolist() == expected.tolist()


def test_the_pixels_are_a_function_of_seed_and_epoch(probe):
    groups, maps, _ = probe
    first, again, later = (list(pixel_batches(groups, maps, 4, 0, "cpu")(epoch)) for epoch in (0, 0, 1))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not all(a[1].shape == b[1].shape and torch.equal(a[1], b[1]) for a, b in zip(first, later, strict=True))
