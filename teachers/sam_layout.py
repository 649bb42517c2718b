"""The tensors of a whole SAM in the authors' layout, from the layout in which transformers saves them.

authors         image_encoder.*, prompt_encoder.*, mask_decoder.*
transformers    vision_encoder.*, shared_image_embedding.*, prompt_encoder.*, mask_decoder.*
"""

import re
from collections.abc import Mapping

from torch import Tensor

RENAMED = (
    (r"^vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"^vision_encoder\.layers\.(\d+)\.layer_norm([12])\.", r"image_encoder.blocks.\1.norm\2."),
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
    (r"^vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
    (r"^vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
    (r"^vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
    (r"^vision_encoder\.", "image_encoder."),
    (
        r"^(?:shared_image_embedding|prompt_encoder\.shared_embedding)\.positional_embedding$",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
    (r"^(mask_decoder\.transformer\.layers\.\d+)\.layer_norm(\d)\.", r"\1.norm\2."),
    (r"^mask_decoder\.transformer\.layer_norm_final_attn\.", "mask_decoder.transformer.norm_final_attn."),
    (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
)
_PERCEPTRON = re.compile(r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.(.*)\.(\w+)$")


def to_authors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the authors' keys; a file of any other layout as it is."""
    if not any(key.startswith(("vision_encoder.", "shared_image_embedding.")) for key in tensors):
        return dict(tensors)
    renamed = {_renamed(key): value for key, value in tensors.items()}
    between: dict[str, int] = {}
    for key in renamed:
        if (found := _PERCEPTRON.match(key)) and found[2].startswith("layers."):
            between[found[1]] = max(between.get(found[1], 0), int(found[2].removeprefix("layers.")) + 1)
    return {_perceptron(key, between): value for key, value in renamed.items()}


def _renamed(key: str) -> str:
    for pattern, name in RENAMED:
        found, count = re.subn(pattern, name, key)
        if count:
            return found
    return key


def _perceptron(key: str, between: Mapping[str, int]) -> str:
    """The authors number all layers of a perceptron; transformers names the first and the last, and numbers those between."""
    found = _PERCEPTRON.match(key)
    if not found:
        return key
    owner, layer, kind = found.groups()
    ends = {"proj_in": 0, "proj_out": between.get(owner, 0) + 1}
    number = ends[layer] if layer in ends else int(layer.removeprefix("layers.")) + 1
    return f"{owner}.layers.{number}.{kind}"
