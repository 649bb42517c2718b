"""Weighted k-nearest-neighbour classification of frozen features, as in Wu et al. 2018 and DINO (Caron et al. 2021).

Imports neither Ray nor MLflow.
"""

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.read.scan import read_summaries, scan_images
from pipeline.cache.read.shard_reader import NO_LABEL
from pipeline.errors import UserError
from pipeline.evaluate.config import KnnConfig
from pipeline.sources.base import odd_class
from pipeline.sources.locations import SAMPLES
from pipeline.training.worker import ALONE, Worker

QUERY_CHUNK, BANK_CHUNK = 1024, 65_536
"""Chunk sizes of queries and bank vectors."""


class Neighbours(NamedTuple):
    """Nearest bank vectors of M queries: cosines [M, k] in descending order, and labels [M, k] int64."""

    similarity: Tensor
    labels: Tensor


def nearest(bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int) -> Neighbours:
    """The k vectors of a bank [N, D] with labels [N] int64 with the largest cosine to each of the queries [M, D].

    Fewer if N < k. Additional memory: a normalised copy of the bank (4 N D bytes), and at most 256 MiB for the cosines of
    1024 queries to 65,536 bank vectors.

    Raises:
        UserError: if a vector is not finite; it would be compared as if it were similar to nothing, or to anything.
    """
    bank = _normalised(bank, "the bank (data.train)")
    parts = list(zip(bank.split(BANK_CHUNK), bank_labels.split(BANK_CHUNK), strict=True))
    found = []
    for chunk in queries.split(QUERY_CHUNK):
        normalised = _normalised(chunk, "the queries (data.val)")
        best = None
        for vectors, labels in parts:
            similarity, index = (normalised @ vectors.T).topk(min(k, len(vectors)), dim=1)
            near = Neighbours(similarity, labels[index])
            best = near if best is None else merge([best, near], k)
        assert best is not None
        found.append(best)
    return Neighbours(*(torch.cat(column) for column in zip(*found, strict=True)))


def _normalised(vectors: Tensor, whose: str) -> Tensor:
    """Vectors [N, D] at length 1, float32; a zero vector stays zero."""
    lengths = vectors.float().norm(dim=1, keepdim=True)
    if not torch.isfinite(lengths).all():
        odd = int((~torch.isfinite(lengths)).sum())
        raise UserError(
            f"kNN: {odd} of {len(vectors)} vectors of {whose} are not finite (NaN, infinity, or a length beyond float32): the "
            "model that computed them is broken, or needs float32"
        )
    return vectors.float() / lengths.clamp_min(1e-12)


def merge(parts: Sequence[Neighbours], k: int) -> Neighbours:
    """The k nearest among the neighbours found in several parts of a bank for the same queries."""
    similarity, labels = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    best, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
    return Neighbours(best, labels.gather(1, index))


def vote(found: Iterable[tuple[Neighbours, Tensor]], ks: Sequence[int], temperature: float) -> dict[int, float]:
    """Top-1 accuracy in percent for every k, from chunks of (neighbours, labels [M]).

    A neighbour votes with weight exp((cosine - largest cosine) / temperature); the difference avoids overflow in float32.
    """
    correct, queries = dict.fromkeys(ks, 0), 0
    for near, labels in found:
        weights = ((near.similarity - near.similarity[:, :1]) / temperature).exp()
        queries += len(labels)
        for k in ks:
            votes = torch.zeros(len(labels), int(near.labels.max()) + 1, device=weights.device)
            votes.scatter_add_(1, near.labels[:, :k], weights[:, :k])
            correct[k] += int((votes.argmax(dim=1) == labels).sum())
    return {k: 100 * count / queries for k, count in correct.items()}


def knn_accuracies(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, ks: Sequence[int], temperature: float
) -> dict[int, float]:
    """Top-1 accuracy in percent for every k of queries [M, D] by a bank [N, D], from one search for the largest k.

    Samples with label `NO_LABEL` are left out. Memory: see :func:`nearest`.

    Raises:
        UserError: if no sample of the bank, or no query, has a label.
    """
    bank, bank_labels = labelled(bank, bank_labels)
    queries, query_labels = labelled(queries, query_labels)
    near = nearest(bank, bank_labels, queries, max(ks))
    chunks = zip(*(part.split(QUERY_CHUNK) for part in (*near, query_labels)), strict=True)
    return vote(((Neighbours(*found), labels) for *found, labels in chunks), ks, temperature)


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """:func:`knn_accuracies` for one k."""
    return knn_accuracies(bank, bank_labels, queries, query_labels, [k], temperature)[k]


def labelled(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The samples that have a label; UserError if none has."""
    known = labels != NO_LABEL
    if not known.any():
        raise UserError("kNN needs labels on both sides: data.train and data.val have none; leave data.val out")
    return features[known], labels[known]


def check_splits(train: Dataset, val: Dataset) -> None:
    """Raise a UserError if splits have the same location, or a class that only one of them has."""
    if val.location != SAMPLES and os.path.realpath(train.location) == os.path.realpath(val.location):
        raise UserError(
            f"data.val ({val.location}) are the images of data.train; name other images, or none (data.val=none)"
        )
    if train.classes and val.classes and (odd := odd_class(train.classes, val.classes)) is not None:
        raise UserError(
            f"data.train ({train.location}) and data.val ({val.location}) differ in their classes: {odd}; "
            "use splits of one data set; distillation also works without held-out images (data.val=none)"
        )


@torch.inference_mode()
def embed(
    encoders: Sequence[nn.Module],
    dataset: Dataset,
    image_size: int,
    batch_size: int,
    limit: int | None = None,
    worker: Worker = ALONE,
) -> tuple[list[Tensor], Tensor]:
    """Vectors [N, C] float32 of each encoder and labels [N], from one pass over the images of a dataset.

    Args:
        encoders: [B, 3, H, W] float32 RGB in [0, 1] -> [B, C]; in evaluation mode, on one device.
        limit: approximate number of images, evenly spaced; None: all.
        worker: the images are divided among its ranks, and every rank gets all vectors.
    """
    device = next(iter(encoders[0].state_dict().values())).device
    found = []
    for batch in scan_images(dataset, image_size, batch_size, limit, worker.rank, worker.world):
        images = batch.images.to(device).float() / 255
        found.append((batch.labels, *(encoder(images).float().cpu() for encoder in encoders)))
    labels, *features = (torch.cat(parts).to(device) for parts in zip(*worker.all_gather_objects(found), strict=True))
    return features, labels


def student_knn(
    encoders: Sequence[nn.Module],
    train: Dataset,
    val: Dataset,
    image_size: int,
    config: KnnConfig,
    worker: Worker = ALONE,
) -> list[float]:
    """kNN accuracy in percent of each encoder on held-out images; `config.bank` training images are the bank."""
    banks, known = embed(encoders, train, image_size, config.batch_size, config.bank, worker)
    queries, labels = embed(encoders, val, image_size, config.batch_size, worker=worker)
    pairs = zip(banks, queries, strict=True)
    return [knn_accuracy(bank, known, wanted, labels, config.k, config.temperature) for bank, wanted in pairs]


def teacher_knn(teacher: CachedTeacher, train: Dataset, val: Dataset, config: KnnConfig) -> float:
    """kNN accuracy in percent of a teacher, from its cached features."""
    bank = read_summaries(train, teacher, config.bank)
    queries = read_summaries(val, teacher)
    return knn_accuracy(*bank, *queries, config.k, config.temperature)
