"""How near a student comes to its teachers on held-out images, from their cached features: no teacher runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import torch
import torch.nn.functional as F

from pipeline.cache.layout.cached_teacher import CachedTeacher, load_codecs
from pipeline.cache.layout.codec import FeatureCodec
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.read.reader import Batch, CacheReader
from pipeline.distill.distiller import Distiller, TeacherTarget
from pipeline.distill.loss import vector_loss
from pipeline.imaging.decoder_pool import decoder_count

MAX_IMAGES = 4096
"""Held-out images that are compared after an epoch, at most."""


class HeldOut:
    """A fixed sample of a dataset with every teacher's features, in a fixed order.

    Args:
        dataset: whose shards are complete for the teachers.
        image_size: side of the student's input in pixels.
        batch_size: images per forward, at most.

    Attributes:
        codecs: decoders by teacher id and token type; a projection is fitted on each dataset by itself.

    Raises:
        UserError: where a teacher's shards are missing.
    """

    def __init__(self, dataset: Dataset, teachers: Sequence[CachedTeacher], image_size: int, batch_size: int) -> None:
        rows = sum(record.rows for record in dataset.images.records().values()) * dataset.policy.rows_per_image
        # As near to all of the images as equal batches come.
        size = max(1, rows // -(-rows // batch_size))
        self.batch_size = size
        self.codecs = {teacher.id: load_codecs(dataset, teacher) for teacher in teachers}
        self.reader = CacheReader(
            dataset,
            teachers,
            image_size=image_size,
            batch_size=size,
            threads=decoder_count(),
            processes=torch.cuda.is_available(),
        )

    def batches(self) -> Iterator[Batch]:
        """The same batches every time."""
        yield from islice(self.reader.batches(0), max(1, MAX_IMAGES // self.batch_size))


@torch.inference_mode()
def compare_with_teachers(
    module: Distiller, batches: Iterator[Batch], codecs: Mapping[str, Mapping[str, FeatureCodec]]
) -> dict[str, float]:
    """Mean cosine and loss of what the heads predict, per teacher and token type.

    Args:
        codecs: decoders of the batches, by teacher id and token type.

    Returns:
        ``val_cosine/<teacher>/<token type>`` in [-1, 1], per patch token or summary, of standardised features; and
        ``val_loss/...``, the unweighted losses of training.
    """
    device = module.weights.device
    sums: defaultdict[str, float] = defaultdict(float)
    images = 0
    for batch in batches:
        output = module.student(batch.images.to(device))
        for target in module.targets:
            assert isinstance(target, TeacherTarget)
            label = module.labels[target.teacher.id]
            terms = {"patches": target.loss.patches, "summary": target.loss.summary}
            predicted = target.predict(output)
            raw = {kind: rows.to(device) for kind, rows in batch.features[target.teacher.id].items()}
            wanted = target.targets(raw, codecs[target.teacher.id])
            for kind, values in predicted.items():
                cosine = F.cosine_similarity(values.float(), wanted[kind].float(), dim=-1)
                sums[f"val_cosine/{label}/{kind}"] += float(
                    cosine.flatten(1).mean(1).sum() if cosine.ndim > 1 else cosine.sum()
                )
                sums[f"val_loss/{label}/{kind}"] += float(vector_loss(terms[kind], values, wanted[kind]).sum())
        images += len(batch.keys)
    return {name: total / images for name, total in sums.items()}
