"""A few samples of a data set with their images as they are stored, to be shown."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.shards import RowGroup, evenly_spaced
from pipeline.cache.read.shard_reader import NO_LABEL, SampleReader, image_reader


class Example(NamedTuple):
    """A sample: its name, the name of its class or "", and the encoded image."""

    name: str
    label: str
    image: bytes


def read_examples(dataset: Dataset, count: int) -> list[Example]:
    """About `count` samples, spaced in stored order, and of different classes as far as there are; UserError if images are
    missing.
    """
    samples, reader = SampleReader(dataset), image_reader(dataset)
    groups = evenly_spaced([RowGroup(*group) for group in dataset.row_groups().tolist()], count)
    found, shown = list[Example](), Counter[int]()
    for number, group in enumerate(groups):
        chosen = samples.read(group)
        # As many of every row group, one more of the first ones if they do not divide.
        wanted = count // len(groups) + (number < count % len(groups))
        for at in _varied(chosen.labels, wanted, shown):
            label = int(chosen.labels[at])
            name = dataset.classes[label] if label != NO_LABEL and dataset.classes else ""
            image = reader.read(group, ["image"])["image"][int(chosen.rows[at])].as_py()
            found.append(Example(chosen.names[at], name, image))
    return found


def _varied(labels: np.ndarray, wanted: int, shown: Counter[int]) -> list[int]:
    """Rows of the labels that are `shown` least, which they are then; evenly spaced ones where they are shown equally."""
    classes = labels.tolist()
    spaced = np.unique(np.linspace(0, len(labels) - 1, wanted).round().astype(int)).tolist()
    left = [*spaced, *sorted({*range(len(classes))} - {*spaced})]
    chosen = []
    for _ in spaced:
        row = min(left, key=lambda row: shown[classes[row]])
        left.remove(row)
        shown[classes[row]] += 1
        chosen.append(row)
    return sorted(chosen)
