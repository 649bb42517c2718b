"""SAM's prompt encoder and mask decoder with their weights: what makes masks of an image's embedding and prompts.

    masks = load_sam_masks("sam_vit_b_01ec64.pth")
    logits, iou = masks(embedding, points, labels)  # [B, 256, h, w] at any grid

Only the encoder of a SAM is large; these two networks have 4 M parameters. Files may have the authors' layout or transformers'.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from teachers.base import TeacherError
from teachers.checkpoint import read_checkpoint
from teachers.fit import check_keys
from teachers.hub import HubFile, load_from_hub
from teachers.sam_decoder import MaskDecoder
from teachers.sam_layout import to_authors
from teachers.sam_prompts import BOTTOM_RIGHT, PADDING, TOP_LEFT, PromptEncoder
from teachers.weights import parse_weights, seeded_init

PUBLISHED = {f"vit_{size[0]}": f"facebook/sam-vit-{size}" for size in ("base", "large", "huge")}
"""Repositories of the whole SAM, by variant; timm's has the encoder alone."""
WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
"""Variants by the width of their image encoder."""
DIM = 256
"""Channels of every published embedding."""
INPUT_SIZE = 1024
"""Side in pixels of the authors' input, to which they count the centre of a pixel."""

_PARTS = ("prompt_encoder.", "mask_decoder.")
_IGNORED = ("image_encoder.", "prompt_encoder.mask_downscaling.")


class SamMasks(nn.Module):
    """Prompt encoder and mask decoder; evaluation mode changes nothing in them."""

    def __init__(self, prompt_encoder: PromptEncoder, mask_decoder: MaskDecoder) -> None:
        super().__init__()
        self.prompt_encoder, self.mask_decoder = prompt_encoder, mask_decoder

    @property
    def dim(self) -> int:
        """Channels D of an embedding."""
        return self.mask_decoder.mask_tokens.embedding_dim

    def forward(self, embeddings: Tensor, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Masks of N prompts for each of B images.

        Args:
            embeddings: [B, D, h, w] float32, of any grid.
            points: (x, y) [B, N, P, 2] as shares of the image, see :func:`to_shares`.
            labels: [B, N, P] int64, as in :meth:`teachers.sam_prompts.PromptEncoder.forward`.

        Returns:
            Logits [B, N, M, 4 h, 4 w], positive on the object, and predicted IoU [B, N, M]. Mask 0 is for prompts without
            doubt, such as boxes; the others are the whole, a part and a part of the part.
        """
        batch, count = labels.shape[:2]
        height, width = embeddings.shape[-2:]
        tokens = self.prompt_encoder(points, labels).flatten(0, 1)
        image = embeddings + self.prompt_encoder.no_mask_embed.weight[0, :, None, None]
        repeated = image[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1)
        logits, iou = self.mask_decoder(repeated, self.prompt_encoder.grid(height, width), tokens)
        return logits.unflatten(0, (batch, count)), iou.unflatten(0, (batch, count))


def to_shares(points: Tensor, width: int, height: int, input_size: int = INPUT_SIZE) -> Tensor:
    """(x, y) [..., 2] in pixels of an image -> shares of it, at the centre of a pixel of SAM's input, as by the authors."""
    return points / torch.tensor([width, height], dtype=points.dtype) + 0.5 / input_size


def point_prompts(points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Points [N, P, 2] and labels [N, P], with the padding that stands for a missing box."""
    padding = torch.zeros_like(points[:, :1]), torch.full_like(labels[:, :1], PADDING)
    return torch.cat([points, padding[0]], dim=1), torch.cat([labels, padding[1]], dim=1)


def box_prompts(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [N, 4] (left, top, right, bottom) -> points [N, 2, 2] and labels [N, 2]."""
    return boxes.unflatten(1, (2, 2)), torch.tensor([TOP_LEFT, BOTTOM_RIGHT]).expand(len(boxes), -1)


def load_sam_masks(weights: str = "pretrained", variant: str = "vit_b") -> SamMasks:
    """Build prompt encoder and mask decoder, in evaluation mode, on the CPU.

    Args:
        weights: path of a whole SAM in the authors' or transformers' layout, `pretrained` for the published one of `variant`,
            or `random[:seed]`.

    Raises:
        WeightsNotFoundError: if there is no such file, or the published one cannot be had.
        TeacherError: if the file lacks one of the two networks.
    """
    name = f"sam/{variant}"
    source = parse_weights(weights, name, "sa1b")
    if source.kind == "random":
        with seeded_init(int(source.value), name):
            return SamMasks(PromptEncoder(DIM), MaskDecoder(DIM)).eval().requires_grad_(False)
    return build_sam_masks(read_sam(weights, variant), name)


def read_sam(weights: str, variant: str = "vit_b") -> dict[str, Tensor]:
    """The tensors of a whole SAM, from a file or the hub, in the authors' layout; raises as :func:`load_sam_masks`."""
    name = f"sam/{variant}"
    source = parse_weights(weights, name, "sa1b")
    file = HubFile(PUBLISHED[variant], ("model.safetensors",))
    path = load_from_hub(name, file.fetch, file) if source.kind == "hub" else source.value
    return to_authors(read_checkpoint(path, name))


def encoder_variant(tensors: Mapping[str, Tensor]) -> str | None:
    """The published variant whose image encoder a file has, by its width; None for another, or none."""
    table = tensors.get("image_encoder.pos_embed")
    return None if table is None else WIDTHS.get(table.shape[-1])


def build_sam_masks(tensors: Mapping[str, Tensor], name: str = "sam") -> SamMasks:
    """The two networks of tensors in the authors' layout, sized by them; TeacherError if they do not fit together."""
    own = {key: value for key, value in tensors.items() if key.startswith(_PARTS) and not key.startswith(_IGNORED)}
    needed = {
        "tokens": "mask_decoder.mask_tokens.weight",
        "inner": "mask_decoder.transformer.final_attn_token_to_image.q_proj.weight",
        "hidden": "mask_decoder.transformer.layers.0.mlp.lin1.weight",
        "iou": "mask_decoder.iou_prediction_head.layers.0.weight",
    }
    if lacking := next((key for key in needed.values() if key not in own), None):
        raise TeacherError(
            f"teacher {name}: weights: the file lacks {lacking}: it must be a whole SAM with prompt encoder and mask decoder, "
            "such as the authors' sam_vit_b_01ec64.pth; files for timm have the image encoder alone"
        )
    shapes = {part: tuple(own[key].shape) for part, key in needed.items()}
    masks, dim = shapes["tokens"]
    decoder = MaskDecoder(
        dim,
        inner=shapes["inner"][0],
        hidden=shapes["hidden"][0],
        depth=_count(own, "mask_decoder.transformer.layers."),
        masks=masks,
        iou_hidden=shapes["iou"][0],
        iou_depth=_count(own, "mask_decoder.iou_prediction_head.layers."),
    )
    built = SamMasks(PromptEncoder(dim), decoder)
    built.load_state_dict(check_keys(own, built.state_dict(), name))
    return built.eval().requires_grad_(False)


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Layers under a prefix."""
    return len({key.removeprefix(prefix).partition(".")[0] for key in tensors if key.startswith(prefix)})
