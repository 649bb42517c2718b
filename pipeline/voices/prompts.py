"""Prompts: a student that SAM has taught cuts out what points and boxes name, or everything in an image.

    from pipeline.voices.prompts import load_prompts

    prompts = load_prompts("work/runs/<run>/student", sam="sam_vit_b_01ec64.pth")
    image = prompts.embed("photo.jpg")  # the only pass through the student
    objects = image.boxes([[10, 20, 200, 180]])  # masks bool [1, H, W], scores, boxes
    objects = image.points([(120, 80), (30, 30)], labels=[1, 0])
    objects = image.everything()

The student gives SAM's embedding of the image; prompt encoder and mask decoder are SAM's own (`teachers/sam_masks.py`). Images
are resized to a square whatever the ratio of their sides, as those that SAM has embedded for the student to learn from.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.ops import nms
from torchvision.transforms.v2.functional import pil_to_tensor

from pipeline.downstream.detect.task import Objects
from pipeline.errors import UserError
from pipeline.imaging.crop import crop_and_resize
from pipeline.imaging.geometry import FULL
from pipeline.predict.images import Images, One, decoded, list_images, opened
from pipeline.runs.addresses import fetch_student
from pipeline.student.loading import LoadedStudent, load_student
from pipeline.voices.sam_head import sam_embeddings
from teachers.base import Interpolation, TeacherError
from teachers.sam_masks import (
    PUBLISHED,
    SamMasks,
    box_prompts,
    encoder_variant,
    load_sam_masks,
    point_prompts,
    read_sam,
    to_shares,
)
from teachers.weights import parse_weights

Embed = Callable[[Tensor], Tensor]
"""Images [B, 3, S, S] uint8 RGB on any device -> SAM's embeddings [B, D, h, w] float32."""

NAME = "object"
"""The class of every mask: SAM knows none."""
POINTS_PER_SIDE = 32
AT_ONCE = 64
"""Prompts per pass through the mask decoder."""
LEAST_IOU, LEAST_STABILITY, MOST_OVERLAP, OFFSET = 0.88, 0.95, 0.7, 1.0
"""SAM's own thresholds of `everything`: predicted IoU, stability of a mask when its logits change by this, IoU of two boxes."""


@dataclass(frozen=True)
class PromptedImage:
    """An image and SAM's embedding of it, ready for any number of prompts.

    Attributes:
        pixels: uint8 [3, H, W].
        embedding: float32 [1, D, h, w] on the device of `masks`.
    """

    pixels: Tensor
    embedding: Tensor
    masks: SamMasks

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.pixels.shape[2], self.pixels.shape[1]

    def points(self, points: Sequence[Sequence[float]], labels: Sequence[int] | None = None) -> Objects:
        """The one object that points name.

        With one point, the likeliest of SAM's three masks (whole, part, part of the part); with several, its single mask.

        Args:
            points: (x, y) in pixels of the image.
            labels: 1 on the object, 0 not on it; None: all on it.

        Raises:
            UserError: for a point outside of the image, other labels, or none on the object.
        """
        kinds = [1] * len(points) if labels is None else [*labels]
        if len(kinds) != len(points) or not {*kinds} <= {0, 1} or 1 not in kinds:
            raise UserError(
                f"points: labels must be one of 0 and 1 for each of {len(points)} points, with a 1; not {kinds}"
            )
        for point in points:
            if len(point) != 2:
                raise UserError(f"point {_text(point)}: must be two numbers, x and y")
            self._check("point", point)
        given = torch.tensor([[*map(list, points)]], dtype=torch.float32)
        logits, iou = self._decode(*point_prompts(to_shares(given, *self.size), torch.tensor([kinds])))
        choice = int(iou[0, 1:].argmax()) + 1 if len(points) == 1 else 0
        return self._objects(logits[:, choice], iou[:, choice])

    def boxes(self, boxes: Sequence[Sequence[float]]) -> Objects:
        """The object in each box (left, top, right, bottom) in pixels, in their order; UserError for a box that is none."""
        for box in boxes:
            self._check("box", box)
            if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
                raise UserError(
                    f"box {_text(box)}: must be left, top, right, bottom with left < right and top < bottom"
                )
        given = torch.tensor([*map(list, boxes)], dtype=torch.float32).reshape(-1, 4)
        corners, kinds = box_prompts(given)
        logits, iou = self._decode(to_shares(corners, *self.size), kinds)
        return self._objects(logits[:, 0], iou[:, 0])

    def everything(self, side: int = POINTS_PER_SIDE) -> Objects:
        """All objects that a grid of `side` x `side` points finds, without repetitions, the best predicted IoU first.

        As SAM's automatic mask generator without its crops: masks of low predicted IoU or stability are left out, then those
        whose box is that of a better one. Stability and boxes are measured at the resolution of the decoder.
        """
        centres = (torch.arange(side) + 0.5) / side
        rows, columns = torch.meshgrid(centres, centres, indexing="ij")
        points = torch.stack([columns, rows], dim=-1).reshape(-1, 1, 2) * torch.tensor(self.size)
        found, scores = [], []
        for part in to_shares(points, *self.size).split(AT_ONCE):
            shares, kinds = point_prompts(part, torch.ones(len(part), 1, dtype=torch.int64))
            logits, iou = (both[:, 1:].flatten(0, 1) for both in self._decode(shares, kinds))
            sure, whole = ((logits > cut).sum(dim=(1, 2)) for cut in (OFFSET, -OFFSET))
            kept = (iou >= LEAST_IOU) & (sure > 0) & (sure / whole.clamp(min=1) >= LEAST_STABILITY)
            found.append(logits[kept])
            scores.append(iou[kept])
        logits, iou = torch.cat(found), torch.cat(scores)
        kept = nms(tight_boxes(logits > 0), iou, MOST_OVERLAP)
        return self._objects(logits[kept], iou[kept])

    def _decode(self, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts [N, P, 2] and [N, P] -> logits [N, M, h, w] and predicted IoU [N, M], on the CPU."""
        device = self.embedding.device
        found, scores = [], []
        with torch.inference_mode():
            for some, kinds in zip(points.split(AT_ONCE), labels.split(AT_ONCE), strict=True):
                logits, iou = self.masks(self.embedding, some[None].to(device), kinds[None].to(device))
                found.append(logits[0].cpu())
                scores.append(iou[0].cpu())
        return torch.cat(found), torch.cat(scores)

    def _objects(self, logits: Tensor, iou: Tensor) -> Objects:
        """Logits [n, h, w] as masks of the image's size."""
        width, height = self.size
        masks = torch.zeros(len(logits), height, width, dtype=torch.bool)
        for place, map_ in enumerate(logits):  # one at a time: a mask of a large photograph takes 50 MB in float32
            masks[place] = (
                F.interpolate(map_[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0] > 0
            )
        labels = torch.zeros(len(masks), dtype=torch.int64)
        return Objects(tight_boxes(masks), labels, [NAME] * len(masks), iou.float().clamp(0, 1), masks)

    def _check(self, kind: str, numbers: Sequence[float]) -> None:
        width, height = self.size
        if not all(0 <= x <= width for x in numbers[::2]) or not all(0 <= y <= height for y in numbers[1::2]):
            raise UserError(f"{kind} {_text(numbers)} lies outside of its image of {width} x {height} pixels")


def _text(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


class Prompts:
    """SAM's decoder on the embeddings of a student, or of SAM itself.

    Args:
        embed: gives the embeddings; on `device`.
        masks: SAM's prompt encoder and mask decoder; moved to the device.
        name: of the student, for messages.
        input_size: side S in pixels to which images are resized.
        device: of torch.

    Attributes:
        unreadable: reason by file for images that were skipped as unreadable; None, the default: the first one raises.
    """

    def __init__(
        self,
        embed: Embed,
        masks: SamMasks,
        name: str,
        input_size: int,
        device: torch.device,
        interpolation: Interpolation = "bicubic",
    ) -> None:
        self._embed, self.masks, self.name = embed, masks.to(device), name
        self.input_size, self.device, self.interpolation = input_size, device, interpolation
        self.unreadable: dict[Path, str] | None = None

    def embed(self, image: One | str) -> PromptedImage:
        """Embed an image: a file, an RGB array uint8 [H, W, 3] or a PIL image; UserError if it cannot be read."""
        return self._embedded(opened(Path(image) if isinstance(image, str) else image))

    def embed_all(self, images: Images) -> Iterator[PromptedImage]:
        """Embed all images of :func:`~pipeline.predict.images.list_images`, in their order."""
        return map(self._embedded, decoded(list_images(images), 4, self.unreadable))

    def _embedded(self, image: Image.Image) -> PromptedImage:
        size = (self.input_size, self.input_size)
        squared = torch.from_numpy(crop_and_resize(image, FULL, size, self.interpolation))
        with torch.inference_mode():
            embedding = self._embed(squared[None].to(self.device)).float()
        return PromptedImage(pil_to_tensor(image), embedding, self.masks)


def tight_boxes(masks: Tensor) -> Tensor:
    """Boxes float32 [n, 4] around masks bool [n, H, W], right and bottom exclusive; zeros around an empty mask."""
    edges = []
    for axis in (1, 2):  # columns, then rows
        seen = masks.any(dim=axis)
        length = seen.shape[1]
        first = seen.int().argmax(dim=1)
        last = length - seen.flip(1).int().argmax(dim=1)
        edges += [first, torch.where(seen.any(dim=1), last, 0)]
    left, right, top, bottom = edges
    return torch.stack([left, top, right, bottom], dim=1).float()


def load_prompts(
    student: str,
    *,
    sam: str = "pretrained",
    input_size: int | None = None,
    device: str | None = None,
    tracking_uri: str = "",
) -> Prompts:
    """A student with the head of a SAM teacher, beside SAM's prompt encoder and mask decoder.

    Args:
        student: exported folder, address or MLflow URI, distilled with `student.keep_heads=true`.
        sam: weights of the SAM that taught it, as in :func:`teachers.sam_masks.load_sam_masks`; `pretrained`: the published
            ones of its variant.
        input_size: in pixels; None: as the student was trained.
        device: of torch; None: a GPU if there is one.
        tracking_uri: MLflow store in which a URI is looked up.

    Raises:
        UserError: if the student has no such head, the weights cannot be had or are those of another SAM, or there is no such
            device.
    """
    return make_prompts(load_student(fetch_student(student, tracking_uri)), sam, input_size, device)


def make_prompts(
    loaded: LoadedStudent, sam: str = "pretrained", input_size: int | None = None, device: str | None = None
) -> Prompts:
    """As :func:`load_prompts`, for a student that is loaded."""
    model = sam_embeddings(loaded)
    masks = fitting_masks(sam, model.label, model.dim, loaded.provenance.get("teachers", []))
    place = find_device(device)
    model.to(place)
    size = input_size or loaded.input_size or 1024
    return Prompts(lambda pixels: model(pixels.float() / 255), masks, loaded.name, size, place)


def find_device(device: str | None) -> torch.device:
    """A device of torch, by default a GPU if there is one; UserError if it does not exist."""
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device}: {str(error).splitlines()[0]}") from error
    return found


def variant_of(label: str) -> str:
    """The variant in the label of a SAM teacher, the published base if it names none."""
    return next((variant for variant in PUBLISHED if variant in label), "vit_b")


def fitting_masks(sam: str, label: str, dim: int, teachers: Sequence[dict[str, Any]]) -> SamMasks:
    """Prompt encoder and mask decoder for embeddings of `dim` channels.

    Args:
        teachers: of the student's provenance, with the identity of their weights.

    Raises:
        UserError: if the weights cannot be had, or are those of another SAM than the student's teacher: all have embeddings of
            one shape, so a decoder of another would give wrong masks.
    """
    variant = variant_of(label)
    try:
        masks = load_sam_masks(sam, variant)
    except TeacherError as error:
        raise UserError(f"weights of SAM (--sam, prompts.sam, or sam= in Python): {error}") from error
    if masks.dim != dim:
        raise UserError(
            f"{sam}: its mask decoder reads {masks.dim} channels, but the head of {label} gives {dim}: name the SAM "
            "that taught the student"
        )
    source = parse_weights(sam, label, "sa1b")
    same = any(teacher.get("weights") == source.identity for teacher in teachers)
    if source.kind == "file" and not same and (other := encoder_variant(read_sam(sam, variant))) not in (None, variant):
        raise UserError(f"{sam}: is the SAM {other}, but sam/{variant} taught the student: name its checkpoint")
    return masks
