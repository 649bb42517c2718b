"""Semantic segmentation with a Semantic FPN head: jittered crops, mIoU, whole-image and sliding-window inference."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision import tv_tensors
from torchvision.ops import FeaturePyramidNetwork
from torchvision.transforms import v2

from pipeline.downstream.backbone import pyramid_levels
from pipeline.downstream.base import Column, DownstreamTask, Report, Split, device_of, evenly
from pipeline.downstream.images import read_rows
from pipeline.downstream.lettering import Colour, legend_below, side_by_side
from pipeline.downstream.pictures import enlarge, palette
from pipeline.downstream.sampling import Draw, prepare, seeded
from pipeline.downstream.segment.classes import IGNORE
from pipeline.downstream.segment.config import SegmentConfig
from pipeline.downstream.segment.masks import MaskedImages, SceneMasks, open_masked
from pipeline.imaging.crop import THIN
from pipeline.student.model import Encoder
from pipeline.training.segmentation_scores import segmentation_scores
from pipeline.training.worker import Worker

MOST_DOMINANT = 0.75
"""Largest share of one class in a training crop, if ten tries find such a crop; as in mmsegmentation's recipes."""
LONGEST = 4
"""Largest long side in multiples of `segment.size`: 2048 x 512 in mmsegmentation's recipes."""

Examples = MaskedImages | SceneMasks


class MaskedBatch(NamedTuple):
    """images uint8 [B, 3, S, S] RGB; labels uint8 [B, S, S], `IGNORE` where they do not count."""

    keys: list[str]
    images: Tensor
    labels: Tensor


class SemanticFPN(nn.Module):
    """A feature pyramid; its levels are upsampled to stride 4, summed, and classified pixel by pixel.

    Kirillov et al. 2019, Panoptic Feature Pyramid Networks, section 3.1 and figure 3.

    Args:
        encoder: with maps at strides 4, 8, 16 and 32.
        channels: of the branches (128 in the paper); the pyramid has twice as many.
    """

    def __init__(self, encoder: Encoder, classes: int, channels: int) -> None:
        super().__init__()
        self.encoder, self.levels = encoder, pyramid_levels(encoder)
        self.pyramid = FeaturePyramidNetwork([encoder.channels[level] for level in self.levels], 2 * channels)
        self.branches = nn.ModuleList(
            nn.ModuleList(_block(width, channels) for width in [2 * channels] + [channels] * (depth - 1))
            for depth in (1, 1, 2, 3)
        )
        self.dropout = nn.Dropout2d(0.1)  # as in mmsegmentation's FPNHead
        self.classify = nn.Conv2d(channels, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] RGB in [0, 1] -> logits [B, K, H, W]."""
        maps = self.encoder.maps(images, self.levels)
        pyramid = list(self.pyramid(OrderedDict(zip("abcd", maps, strict=True))).values())
        sizes = [level.shape[-2:] for level in pyramid]
        total = pyramid[0].new_zeros(())
        for level, branch in enumerate(self.branches):
            x = pyramid[level]
            for step, block in enumerate(branch.children(), start=1):
                x = F.interpolate(block(x), size=sizes[max(0, level - step)], mode="bilinear", align_corners=False)
            total = total + x
        logits = self.classify(self.dropout(total))
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


def _block(inputs: int, channels: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(min(32, channels // 2), channels), nn.ReLU(inplace=True))


class Segmentation(DownstreamTask[SegmentConfig]):
    """Semantic segmentation."""

    name, headline, section = "segment", "miou", SegmentConfig
    locations = ("classes", "train_masks", "val_masks")
    columns = (Column("miou", "miou", "mIoU"),)
    min_classes = 2
    folders = ("labels", "pictures")

    def open(self, split: Split, classes: Sequence[str] = ()) -> Examples | None:
        """Images with label maps."""
        return open_masked(self.config, self.settings, split)

    def build(self, encoder: Encoder, classes: Sequence[str]) -> SemanticFPN:
        """Semantic FPN on a hierarchical backbone."""
        return SemanticFPN(encoder, len(classes), self.settings.channels)

    def image_size(self) -> tuple[int, int]:
        """A square training crop, or a whole image that is not square."""
        side = self.config.student.input_size
        return side, side if self.settings.inference == "slide" else side + 32

    def saved_settings(self) -> Mapping[str, Mapping[str, Any]]:
        """Width of the head, how it sees whole images, and which values of a label map are ignored, if any is named."""
        kept = self.settings.model_dump(include={"channels", "size", "inference"})
        ignored = self.settings.model_dump(include={"reduce_zero_label", "ignore"})
        kept |= {name: value for name, value in ignored.items() if value}
        return {"segment": kept, "student": {"input_size": self.config.student.input_size}}

    def batch(self, examples: Examples, draws: Sequence[Draw]) -> MaskedBatch:
        """Crops of images that are resized, flipped and distorted at random, each by its own seed."""
        augment, crops = self.training_transform(), []
        found = read_rows(examples, [draw.row for draw in draws])
        for draw, (image, labels) in zip(draws, found, strict=True):
            with seeded(self.config.seed, draw.number):
                crops.append(augment(tv_tensors.Image(image), tv_tensors.Mask(labels)))
        images, masks = zip(*crops, strict=True)
        keys = [examples.key(draw.row) for draw in draws]
        return MaskedBatch(keys, _plain(images), _plain(masks))

    def loss(self, module: nn.Module, batch: MaskedBatch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy over the labelled pixels; 0 if there are none."""
        logits = module(batch.images.to(device, non_blocking=True).float() / 255).float()
        labels = batch.labels.to(device, non_blocking=True).long()
        total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        return total / (labels != IGNORE).sum().clamp(min=1), {}

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, examples: Examples, worker: Worker) -> Report:
        """mIoU, mAcc and aAcc in percent at the images' own sizes."""
        device = device_of(model)
        count = len(examples.classes)
        confusion = MulticlassConfusionMatrix(count, ignore_index=IGNORE, validate_args=False).to(device)
        rows = worker.own_rows(len(examples))
        for image, labels in prepare(examples.read, rows, self.config.finetune.data_workers):
            confusion.update(self.label_map(model, image), labels.to(device).long())
        matrix = confusion.compute().cpu()
        metrics, table = segmentation_metrics(matrix, examples.classes)
        return Report(metrics, table, matrix, {} if worker.rank else self._pictures(model, examples))

    def predict(self, model: nn.Module, images: Sequence[Tensor], classes: Sequence[str]) -> list[Tensor]:
        """Class number by pixel, int64 [H, W] at the image's own size."""
        return [self.label_map(model, image).cpu() for image in images]

    def draw(self, image: Tensor, result: Tensor, classes: Sequence[str]) -> Tensor:
        """The image under the colours of its classes, and their names."""
        return legend_below(enlarge(overlay(image, result, len(classes))), class_colours(result, classes))

    def describe(
        self, image: Tensor, result: Tensor, classes: Sequence[str], folder: Path, stem: str
    ) -> dict[str, Any]:
        """The file of the label map, a PNG of class numbers."""
        numbers = Image.fromarray(result.numpy().astype(np.uint8), mode="P")
        numbers.putpalette(palette(len(classes)).ravel().tolist())
        numbers.save(folder / "labels" / f"{stem}.png")
        return {"labels": f"labels/{stem}.png"}

    def documents(self, rows: list[dict[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
        """The names of the classes with the label maps."""
        return {"predictions.json": {"classes": list(classes), "images": rows}}

    def training_transform(self) -> v2.Compose:
        """Scale jitter, crop, flip and colour changes of an image uint8 [3, H, W] and its mask; of a thin image a part."""
        low, high = (round(scale * self.settings.size) for scale in self.settings.scales)
        fill = {tv_tensors.Image: (124, 116, 104), tv_tensors.Mask: IGNORE}  # the mean colour of ImageNet
        return v2.Compose(
            [
                _Part(),
                v2.RandomResize(low, high + 1, antialias=True),
                _Crop(self.config.student.input_size, pad_if_needed=True, fill=fill),
                v2.RandomHorizontalFlip(),
                _Colours(),
            ]
        )

    def label_map(self, model: nn.Module, image: Tensor) -> Tensor:
        """Labels int64 [H, W] of an image uint8 [3, H, W], on the model's device, by `segment.inference`."""
        height, width = image.shape[-2:]
        size = self.settings.size
        factor = min(size / min(height, width), LONGEST * size / max(height, width))
        resized = [max(1, round(side * factor)) for side in (height, width)]
        pixels = v2.functional.resize(image.to(device_of(model)), resized, antialias=True)[None].float() / 255
        sliding = self.settings.inference == "slide"
        logits = slide(model, pixels, self.config.student.input_size) if sliding else model(pixels).float()
        return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False).argmax(1)[0]

    def _pictures(self, model: nn.Module, examples: Examples) -> dict[str, Tensor]:
        """Image, ground truth and prediction side by side, with the names of the colours; ignored pixels are black in both."""
        pictures: dict[str, Tensor] = {}
        for row in evenly(len(examples), self.config.finetune.pictures):
            image, labels = examples.read(row)
            guess = self.label_map(model, image).cpu()
            guess[labels == IGNORE] = IGNORE
            maps = {"annotated": labels, "predicted": guess}
            columns = {title: overlay(image, part, len(examples.classes)) for title, part in maps.items()}
            shown = side_by_side({title: enlarge(part) for title, part in {"image": image, **columns}.items()})
            colours = class_colours(torch.stack([*maps.values()]), examples.classes)
            pictures[examples.key(row)] = legend_below(shown, colours)
        return pictures


def _plain(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.as_subclass(Tensor) for tensor in tensors])


class _Part(v2.Transform):
    """A random part of an image whose long side is over `THIN` times its short one, which resizing would make huge."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        sides = [*v2.functional.get_size(flat_inputs[0])]
        kept = [min(side, THIN * min(sides)) for side in sides]
        # Other images draw no random number.
        starts = [
            int(torch.randint(side - part + 1, ())) if side > part else 0
            for side, part in zip(sides, kept, strict=True)
        ]
        return {"top": starts[0], "left": starts[1], "height": kept[0], "width": kept[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.crop, inpt, **params)


class _Crop(v2.RandomCrop):
    """A crop that no class dominates, if ten tries find one."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = next(item for item in flat_inputs if isinstance(item, tv_tensors.Mask))
        for _ in range(10):
            params: dict[str, Any] = super().make_params(flat_inputs)
            if params["needs_pad"]:
                return params  # the crop holds the whole image
            top, left = params["top"], params["left"]
            crop = mask[top : top + params["height"], left : left + params["width"]]
            counts = crop[crop != IGNORE].int().bincount()
            if counts.sum() and counts.max() < MOST_DOMINANT * counts.sum():
                return params
        return params


class _Colours(v2.RandomPhotometricDistort):
    """mmsegmentation's PhotoMetricDistortion: hue shifts of up to 18 of 180 steps, and no permuted channels."""

    def __init__(self) -> None:
        super().__init__(hue=(-0.1, 0.1))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {**super().make_params(flat_inputs), "channel_permutation": None}


def slide(model: nn.Module, pixels: Tensor, side: int) -> Tensor:
    """Float [1, 3, H, W] -> mean logits [1, K, H, W] over windows of `side` pixels, or less, that overlap by a third."""
    total: Tensor | None = None
    counts = torch.zeros_like(pixels[:, :1])
    for top in _starts(pixels.shape[2], side):
        for left in _starts(pixels.shape[3], side):
            place = (..., slice(top, top + side), slice(left, left + side))
            logits = model(pixels[place]).float()
            if total is None:
                total = logits.new_zeros(1, logits.shape[1], *pixels.shape[2:])
            total[place] += logits
            counts[place] += 1
    assert total is not None
    return total / counts


def _starts(length: int, side: int) -> list[int]:
    if length <= side:
        return [0]
    return [*range(0, length - side, max(1, side * 2 // 3)), length - side]


def segmentation_metrics(
    matrix: Tensor, classes: Sequence[str]
) -> tuple[dict[str, float], list[dict[str, str | float]]]:
    """The means of :func:`segmentation_scores`, and the scores of every class."""
    metrics, iou, accuracy = segmentation_scores(matrix)
    table: list[dict[str, str | float]] = [
        {"class": name, "pixels": int(pixels), "iou": round(float(i), 2), "accuracy": round(float(a), 2)}
        for name, pixels, i, a in zip(classes, matrix.sum(1), iou, accuracy, strict=True)
    ]
    return metrics, table


def class_colours(labels: Tensor, classes: Sequence[str]) -> dict[str, Colour]:
    """The colours of the classes in label maps, by name, those of most pixels first."""
    numbers, counts = labels[labels < len(classes)].unique(return_counts=True)
    colours = palette(len(classes)).tolist()
    return {classes[number]: tuple(colours[number]) for number in numbers[counts.argsort(descending=True)].tolist()}


def overlay(image: Tensor, labels: Tensor, classes: int) -> Tensor:
    """An image uint8 [3, H, W] under the colours of its labels [H, W]; ignored pixels are black."""
    colours = torch.zeros(256, 3, dtype=torch.uint8)
    colours[:classes] = torch.from_numpy(palette(classes))
    return image // 2 + colours[labels.long()].permute(2, 0, 1) // 2
