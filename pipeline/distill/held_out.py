"""How closely a student predicts its teachers' cached features of held-out images; no teacher runs."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import torch
import torch.nn.functional as F

from pipeline.cache.layout.cached_teacher import CachedTeacher, load_codecs
from pipeline.cache.layout.codec import FeatureCodec
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.read.reader import Batch, CacheReader
from pipeline.distill.distiller import Distiller
from pipeline.imaging.decoder_pool import decoder_count

MAX_IMAGES = 4096
"""Most held-out images that are compared after an epoch."""


class HeldOut:
    """A fixed sample of a dataset with every teacher's features, in a fixed order.

    Args:
        image_size: side of the student's input in pixels.
        batch_size: most images per forward pass.

    Attributes:
        codecs: decoders by teacher id and kind; each dataset has its own projections.

    Raises:
        UserError: if shards of a teacher are missing.
    """

    def __init__(self, dataset: Dataset, teachers: Sequence[CachedTeacher], image_size: int, batch_size: int) -> None:
        rows = sum(record.rows for record in dataset.records(dataset.images).values()) * dataset.policy.rows_per_image
        # Equal batches that leave out as few images as possible.
        self.batch_size = max(1, rows // -(-rows // batch_size))
        self.codecs = {teacher.id: load_codecs(dataset, teacher) for teacher in teachers}
        self.reader = CacheReader(
            dataset,
            teachers,
            image_size=image_size,
            batch_size=self.batch_size,
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
    """Mean cosine and loss of the predicted features, per teacher and kind.

    Args:
        codecs: decoders of the batches by teacher id and kind.

    Returns:
        ``val_cosine/<teacher>/<kind>`` in [-1, 1], the mean over patches or summaries of standardised features, and
        ``val_loss/<teacher>/<kind>``, the unweighted training losses that need no queue.
    """
    device = module.weights.device
    sums: defaultdict[str, float] = defaultdict(float)
    images = 0
    for batch in batches:
        output = module.student(batch.images.to(device))
        for label, target in module.labelled_targets():
            raw = {kind: rows.to(device) for kind, rows in batch.features[target.teacher.id].items()}
            predicted, wanted = target.predict(output), target.targets(raw, codecs[target.teacher.id])
            for kind, loss in target.image_losses(predicted, wanted).items():
                cosines = F.cosine_similarity(predicted[kind].float(), wanted[kind].float(), dim=-1)
                sums[f"val_cosine/{label}/{kind}"] += float(cosines.mean()) * len(batch.keys)
                sums[f"val_loss/{label}/{kind}"] += float(loss.sum())
        images += len(batch.keys)
    return {name: total / images for name, total in sums.items()}
