"""Tiny models that open_clip builds by name like its own, with the vocabulary of OpenAI's tokeniser and seeded weights."""

import copy
import json
import tempfile
from pathlib import Path

import open_clip
import torch

VISION = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
PLAIN, SIGMOID, COCA = "tiny-clip", "tiny-sigmoid", "tiny-coca"
NAMES = (PLAIN, SIGMOID, COCA)


def register():
    """Make open_clip know the models in this process."""
    if PLAIN in open_clip.list_models():
        return
    sigmoid = {"custom_text": True, "init_logit_bias": -10}
    text = {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    coca = copy.deepcopy(open_clip.get_model_config("coca_ViT-B-32"))
    coca["vision_cfg"] |= {**VISION, "attn_pooler_heads": 2}
    for part in ("text_cfg", "multimodal_cfg"):
        coca[part] |= {"width": 32, "heads": 2, "layers": 1}
    coca["multimodal_cfg"]["attn_pooler_heads"] = 2
    configs = {
        PLAIN: {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT},
        SIGMOID: {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": text, **sigmoid},
        COCA: {**coca, "embed_dim": 24},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, config in configs.items():
            file = Path(folder, f"{name}.json")
            file.write_text(json.dumps(config))
            open_clip.add_model_config(file)
        del open_clip.factory._MODEL_CONFIG_PATHS[-len(configs) :]  # the files go away


def build(name=PLAIN, seed=0):
    """open_clip's own model of both towers."""
    register()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return open_clip.create_model(name).eval()
