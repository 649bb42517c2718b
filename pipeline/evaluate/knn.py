"""Weighted k-nearest-neighbour classification of frozen features, as in Wu et al. 2018 and DINO (Caron et al. 2021).

Imports neither Ray nor MLflow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.cache.dataset import Dataset
from pipeline.cache.extract import CachedTeacher
from pipeline.cache.reader import NO_LABEL, read_summaries, scan_images
from pipeline.config import KnnConfig
from pipeline.errors import UserError


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Top-1 accuracy in percent: the k bank vectors of largest cosine vote with weight exp(cosine / temperature).

    Args:
        bank: [N, D], with labels [N] int64.
        queries: [M, D], with labels [M] int64.

    Samples whose label is `NO_LABEL` are left out. Memory is bounded: queries are compared 1024 at a time.

    Raises:
        UserError: where no sample of the bank, or no query, has a label.
    """
    bank, bank_labels = bank[bank_labels != NO_LABEL], bank_labels[bank_labels != NO_LABEL]
    queries, query_labels = queries[query_labels != NO_LABEL], query_labels[query_labels != NO_LABEL]
    if not len(bank) or not len(queries):
        raise UserError("kNN needs labels on both sides: data.train and data.val have none; leave data.val out")
    bank = F.normalize(bank.float(), dim=1)
    classes = int(bank_labels.max()) + 1
    correct = 0
    for chunk, labels in zip(queries.split(1024), query_labels.split(1024), strict=True):
        similarity, index = (F.normalize(chunk.float(), dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(chunk), classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[index], (similarity / temperature).exp())
        correct += int((votes.argmax(dim=1) == labels).sum())
    return 100 * correct / len(queries)


def has_labels(dataset: Dataset) -> bool:
    """Whether the first samples of a dataset carry labels."""
    return bool((next(scan_images(dataset, 16, 64, limit=1)).labels != NO_LABEL).any())


def check_classes(train: Dataset, val: Dataset) -> None:
    """Refuse two splits whose labels mean different classes.

    Raises:
        UserError: naming the first class that only one of them has.
    """
    if train.classes and val.classes and train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes)) or ["the order of the classes"]
        raise UserError(
            f"data.train ({train.location}) and data.val ({val.location}) differ in their classes: {odd[0]}"
        )


@torch.inference_mode()
def embed(
    encoder: nn.Module, dataset: Dataset, image_size: int, batch_size: int, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """Vectors [N, C] float32 and labels [N] of a dataset.

    Args:
        encoder: [B, 3, H, W] float32 RGB in [0, 1] -> [B, C]; in evaluation mode.
        limit: about how many images, evenly spaced; None: all.
    """
    device = next(iter(encoder.state_dict().values())).device
    features, labels = [], []
    for batch in scan_images(dataset, image_size, batch_size, limit):
        features.append(encoder(batch.images.to(device).float() / 255).float())
        labels.append(batch.labels.to(device))
    return torch.cat(features), torch.cat(labels)


def student_knn(encoder: nn.Module, train: Dataset, val: Dataset, image_size: int, config: KnnConfig) -> float:
    """kNN accuracy in percent of an encoder on held-out images, with (a subset of) the training images as the bank."""
    bank = embed(encoder, train, image_size, config.batch_size, config.bank)
    queries = embed(encoder, val, image_size, config.batch_size)
    return knn_accuracy(*bank, *queries, config.k, config.temperature)


def teacher_knn(teacher: CachedTeacher, train: Dataset, val: Dataset, config: KnnConfig) -> float:
    """kNN accuracy in percent of a teacher, from its cached features: no teacher runs."""
    bank = read_summaries(train, teacher, config.bank)
    queries = read_summaries(val, teacher)
    return knn_accuracy(*bank, *queries, config.k, config.temperature)
