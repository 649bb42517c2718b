"""The teachers of benchmarks/voices.py: what they are told, and that their files load by the path of published weights."""

import numpy as np
import open_clip
import pytest
import torch

from benchmarks.scene_clip import NAME, captions, contrastive_loss, register
from benchmarks.scene_sam import DIM, ENCODER, SIDE, TinySam, _loss, _points
from pipeline.sources.sample_scenes import Scene
from pipeline.sources.shapes import CLASSES
from teachers.clip_text import load_text_tower
from teachers.registry import create_teacher
from teachers.sam_masks import load_sam_masks


@pytest.mark.parametrize(("at", "place"), [((0, 30), "above"), ((0, -30), "below"), ((30, 5), "beside")])
def test_captions_tell_what_is_true_of_a_scene(at, place):
    boxes = np.array([[40, 40, 60, 60], [45 + at[0], 45 + at[1], 55 + at[0], 55 + at[1]]], np.float32)
    disc, ring = CLASSES.index("disc"), CLASSES.index("ring")
    scene = Scene(
        np.zeros((96, 96, 3), np.uint8), disc, boxes, np.array([disc, ring]), np.zeros((2, 96, 96), bool), None
    )
    assert captions(scene) == ["a disc", f"a disc {place} a small ring"]


def test_every_caption_that_is_true_of_an_image_is_right():
    class Fixed:
        logit_scale = torch.tensor(3.0)

        def encode_image(self, images, normalize):
            return images

        def encode_text(self, texts, normalize):
            return texts

    own = torch.eye(4)[[0, 0, 1, 2]]
    right, alone = (own[:, None] == own).all(dim=2), torch.eye(4, dtype=torch.bool)
    assert contrastive_loss(Fixed(), own, own, right) < contrastive_loss(Fixed(), own, own.roll(1, 0), right)
    assert contrastive_loss(Fixed(), own, own, right) == pytest.approx(
        contrastive_loss(Fixed(), own, own, alone).item()
    )


def test_points_lie_on_their_objects_and_all_kinds_of_prompts_teach():
    torch.manual_seed(0)
    masks = torch.zeros(2, 3, 16, 16)
    for number in range(6):
        masks.view(6, 16, 16)[number, number : number + 3, 2 * number : 2 * number + 2] = 1
    at = (_points(masks.flatten(0, 1), 50) * 16).long()
    assert masks.flatten(0, 1)[torch.arange(6)[:, None], at[..., 1], at[..., 0]].eq(1).all()
    boxes, images, model, seen = (
        torch.tensor([8.0, 8, 40, 40]).expand(2, 3, 4),
        torch.rand(2, 3, SIDE, SIDE),
        TinySam(),
        set(),
    )
    model.masks.register_forward_pre_hook(lambda _, given: seen.add(given[2].shape[2]))
    for _ in range(30):
        model.zero_grad()
        _loss(model, images, boxes, masks, points=True).backward()
        assert model.image_encoder.patch_embed.proj.weight.grad.abs().sum() > 0
    assert seen == {2, 3, 4}  # a box or a point, and one or two further points


@torch.no_grad()
def test_the_files_load_as_published_ones_do(tmp_path):
    torch.manual_seed(0)
    images = torch.rand(2, 3, SIDE, SIDE)
    model = TinySam().eval()
    model.save(tmp_path / "sam.pth")
    sam = create_teacher("sam/vit_b", weights=str(tmp_path / "sam.pth"), input_size=SIDE, pool=1, args=ENCODER)
    sam.load()
    found = sam.forward(images).patches.permute(0, 3, 1, 2)
    torch.testing.assert_close(found, model.image_encoder.forward_features(images), atol=1e-3, rtol=0)  # SAM's epsilon
    assert load_sam_masks(str(tmp_path / "sam.pth")).dim == DIM
    register(tmp_path)
    whole = open_clip.create_model(NAME).eval()
    torch.save(whole.state_dict(), tmp_path / "clip.pt")
    clip = create_teacher("benchmarks.scene_clip:scene_clip", weights=str(tmp_path / "clip.pt"))
    clip.load()
    torch.testing.assert_close(clip.forward(images).summary, whole.encode_image(images))
    found = load_text_tower(clip.spec.name, str(tmp_path / "clip.pt")).embed(["a disc"])
    expected = whole.encode_text(open_clip.get_tokenizer(NAME)(["a disc"]), normalize=True)
    torch.testing.assert_close(found, expected)
