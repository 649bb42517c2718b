"""Masks that SAM's decoder makes of the student's embedding, compared with those of the cached one: prompts in the loop.

After EdgeSAM (Zhou et al. 2023, arXiv 2312.06660, section 3.2). A prompt is a random point, or the box around the mask that SAM
makes of it, with equal probability. Both embeddings are decoded under it; then a point is added where the two masks differ,
and they are decoded again. The loss of a mask is binary cross-entropy plus dice, in equal parts as there.

Two things differ from EdgeSAM. The decoder stays SAM's own; EdgeSAM trains it too. The target is the teacher's probability of
each pixel, not its thresholded mask, so that the loss is 0 where both embeddings give the same masks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.distill.config import MasksConfig
from teachers.sam_masks import INPUT_SIZE, SamMasks
from teachers.sam_prompts import BOTTOM_RIGHT, ON, PADDING, TOP_LEFT

PATCHES_AT_ONCE = 2**16
"""Most patches, times prompts, in one pass through the decoder: 16 prompts at SAM's 64 x 64 patches."""

Prompts = tuple[Tensor, Tensor]
"""Points [B, N, P, 2] as shares of the image, and their labels [B, N, P]."""


class MaskTarget(nn.Module):
    """The mask loss of one SAM teacher.

    Args:
        masks: SAM's prompt encoder and mask decoder. Their weights become buffers that no state dict holds, so that they are
            neither trained nor averaged nor saved.
    """

    point: Tensor
    box: Tensor

    def __init__(self, masks: SamMasks, settings: MasksConfig) -> None:
        super().__init__()
        _freeze(masks)
        self.masks, self.settings = masks, settings
        # Labels of the two kinds of prompts; made once, because each copy to a GPU waits for its pending work.
        self.register_buffer("point", torch.tensor([ON, PADDING]), persistent=False)
        self.register_buffer("box", torch.tensor([TOP_LEFT, BOTTOM_RIGHT]), persistent=False)

    def forward(self, predicted: Tensor, target: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Compare the masks of two embeddings; only `predicted` gets a gradient.

        If a batch has more than `PATCHES_AT_ONCE`, its images are decoded some at a time, and once more in the backward pass:
        so the activations of the decoder do not grow with the batch, only the target masks do.

        Args:
            predicted, target: [B, D, h, w] float32 in SAM's scale; the grids may differ.
            draws: [B, *shape] uniform in [0, 1), with the `shape` of :func:`draws_shape`.

        Returns:
            Loss and IoU of the two masks, [B] float32 each, means over prompts and iterations.
        """
        largest = max(maps.shape[2] * maps.shape[3] for maps in (predicted, target))
        some = max(1, PATCHES_AT_ONCE // (largest * draws.shape[1]))
        parts = zip(predicted.split(some), target.split(some), draws.split(some), strict=True)
        compared = [self._compare(*part, recompute=some < len(draws)) for part in parts]
        losses, ious = zip(*compared, strict=True)
        return torch.cat(losses), torch.cat(ious)

    def _compare(self, predicted: Tensor, target: Tensor, draws: Tensor, recompute: bool) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            prompts = self._first_prompts(target, draws)
        losses, ious = [], []
        for number in range(self.settings.iterations):
            with torch.no_grad():
                logits, scores = self.masks(target, *prompts)
                choice = _choose(prompts, scores)
                wanted = _pick(logits, choice)
            arguments = predicted, *prompts, choice, wanted
            if recompute and torch.is_grad_enabled():
                answer = checkpoint(self._student, *arguments, use_reentrant=False, preserve_rng_state=False)
                assert answer is not None
                loss, found = answer
            else:
                loss, found = self._student(*arguments)
            losses.append(loss)
            with torch.no_grad():
                ious.append(_iou(found, wanted > 0))
                if number + 1 < self.settings.iterations:
                    prompts = _with_point(prompts, found, wanted > 0, draws[..., 3 + number])
        return torch.stack(losses).mean(dim=(0, 2)), torch.stack(ious).mean(dim=(0, 2))

    def _first_prompts(self, target: Tensor, draws: Tensor) -> Prompts:
        """A point each, or the box around SAM's mask of it; without such a mask, the point stays."""
        points = F.pad(draws[..., None, :2], (0, 0, 0, 1))  # and the padding that stands for a missing box
        labels = self.point.expand(points.shape[:3])
        logits, scores = self.masks(target, points, labels)
        masks = _pick(logits, _choose((points, labels), scores)) > 0
        boxed = masks.any(dim=3).any(dim=2).logical_and(draws[..., 2] < 0.5)
        boxes = _boxes(masks) + 0.5 / INPUT_SIZE  # as teachers.sam_masks.to_shares
        return torch.where(boxed[..., None, None], boxes, points), torch.where(boxed[..., None], self.box, labels)

    def _student(
        self, predicted: Tensor, points: Tensor, labels: Tensor, choice: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss [B, N] of the chosen masks, and these: bool, as large as the wanted logits [B, N, H, W]."""
        found = _pick(self.masks(predicted, points, labels)[0], choice)
        if found.shape != wanted.shape:
            found = F.interpolate(found, wanted.shape[2:], mode="bilinear", align_corners=False)
        return mask_loss(found, wanted), found.detach() > 0


def draws_shape(settings: MasksConfig) -> tuple[int, int]:
    """Shape (N, 2 + iterations) of an image's random numbers: a point, its kind, and a place for every further point."""
    return settings.prompts, 2 + settings.iterations


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy above its least value, plus dice, of probabilities; 0 where both are equal: [..., H, W] -> [...].

    Cross-entropy with the probability of `target`, minus the entropy of it, is their Kullback-Leibler divergence. Dice has
    squares in its denominator (Milletari et al. 2016, "V-Net", section 3), so that it too is least for equal probabilities,
    and one added to both parts, so that empty masks agree. Both in float32.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits, target = logits.float(), target.float()
        found, wanted = logits.sigmoid(), target.sigmoid()
        entropies = (
            F.binary_cross_entropy_with_logits(values, wanted, reduction="none").mean(dim=(-2, -1))
            for values in (logits, target)
        )
        crossed, least = entropies
        both, squares = (found * wanted).sum(dim=(-2, -1)), (found.square() + wanted.square()).sum(dim=(-2, -1))
        return crossed - least + 1 - (2 * both + 1) / (squares + 1)


def _choose(prompts: Prompts, scores: Tensor) -> Tensor:
    """Numbers [B, N] of the masks that SAM itself would give: of a lone point the likeliest of several, else the first."""
    labels = prompts[1]
    lone = labels[..., 1] == PADDING if labels.shape[2] == 2 else torch.zeros_like(labels[..., 0], dtype=torch.bool)
    return torch.where(lone, scores[..., 1:].argmax(dim=2) + 1, 0)


def _pick(logits: Tensor, choice: Tensor) -> Tensor:
    """[B, N, M, H, W] -> [B, N, H, W]."""
    return logits.take_along_dim(choice[..., None, None, None], dim=2).squeeze(2)


def _iou(found: Tensor, wanted: Tensor) -> Tensor:
    """Of masks bool [..., H, W] -> [...] float32; 1 where both are empty."""
    both, either = ((part.sum(dim=(-2, -1))).float() for part in (found & wanted, found | wanted))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def _boxes(masks: Tensor) -> Tensor:
    """Corners [..., 2, 2] as shares around masks bool [..., H, W], right and bottom exclusive."""
    first, last = [], []
    for axis in (-2, -1):  # columns, then rows
        seen = masks.any(dim=axis)
        side = seen.shape[-1]
        places = torch.arange(side, device=masks.device)
        first.append(torch.where(seen, places, side).amin(dim=-1) / side)
        last.append(torch.where(seen, places + 1, 0).amax(dim=-1) / side)
    return torch.stack([torch.stack(first, dim=-1), torch.stack(last, dim=-1)], dim=-2)


def _with_point(prompts: Prompts, found: Tensor, wanted: Tensor, draws: Tensor) -> Prompts:
    """Add the centre of a random pixel where masks [B, N, H, W] differ, or of any pixel if they do not.

    It is on the object if it is in the wanted mask: what the student misses is added, what it has too much is taken away.
    """
    differ = (found != wanted).flatten(2)
    counts = torch.where(differ.any(dim=2, keepdim=True), differ, True).int().cumsum(dim=2, dtype=torch.int32)
    total = counts[..., -1:]
    ranks = (draws[..., None] * total).int().clamp(max=total - 1) + 1  # a draw just below 1 may round up
    pixels = torch.searchsorted(counts, ranks.to(counts.dtype))
    height, width = wanted.shape[2:]
    point = torch.stack([(pixels % width + 0.5) / width, (pixels // width + 0.5) / height], dim=-1)
    label = wanted.flatten(2).gather(2, pixels).long()  # ON is 1, OFF is 0
    points, labels = prompts
    return torch.cat([points, point], dim=2), torch.cat([labels, label], dim=2)


def _freeze(module: nn.Module) -> None:
    """Make buffers of all parameters, and keep all buffers out of the state dict."""
    for part in module.modules():
        for name, weight in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            delattr(part, name)
            part.register_buffer(name, weight.detach(), persistent=False)
