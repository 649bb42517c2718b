"""Masks of prompts: the student's head feeds SAM's decoder, in Python and on the command line."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as rle

import regla
from jobs import predict
from pipeline.distill.kept_heads import load_heads
from pipeline.errors import UserError
from pipeline.imaging.crop import crop_and_resize
from pipeline.imaging.geometry import FULL
from pipeline.student.loading import load_student
from pipeline.voices import prompts as module
from pipeline.voices.promptable import sam_itself
from pipeline.voices.prompts import load_prompts, make_prompts, tight_boxes
from pipeline.voices.sam_head import sam_embeddings
from teachers.registry import create_teacher
from teachers.sam_masks import box_prompts, load_sam_masks, point_prompts, to_shares
from tests.fakes import write_photos
from tests.teachers.sam_files import ENCODER_ARGS, SIDE
from tests.voices.conftest import SIZE, keep_heads


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three photos of several widths."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 3)
    return folder


@pytest.fixture(scope="module")
def loaded(prompted_student, sam_file):
    return load_prompts(str(prompted_student), sam=str(sam_file), device="cpu")


def square(side=80, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


@torch.no_grad()
def test_the_head_answers_in_the_scale_of_sam(prompted_student, loaded):
    pixels = square(SIZE)
    whole = load_heads(prompted_student)
    expected = whole(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)["sam/vit_b"]["patches"]
    torch.testing.assert_close(loaded.embed(pixels).embedding, expected.permute(0, 3, 1, 2), atol=1e-4, rtol=1e-4)
    assert loaded.embed(pixels).embedding.shape[-2:] == (SIZE // 16, SIZE // 16)


@torch.no_grad()
def test_with_its_own_features_sam_gives_its_own_masks(sam_file):
    """The teacher in the student's place: logits as of the decoder on its features, at every prompt."""
    teacher = create_teacher("sam/vit_b", weights=str(sam_file), input_size=16 * SIDE, pool=1, args=ENCODER_ARGS)
    masks = load_sam_masks(str(sam_file))
    sam = sam_itself(teacher, masks, torch.device("cpu"))
    pixels = square(96)
    resized = crop_and_resize(pixels, FULL, (16 * SIDE, 16 * SIDE), "bilinear")
    embedding = teacher.encode(torch.from_numpy(resized)[None]).patches.permute(0, 3, 1, 2)
    box = [10.0, 20.0, 70.0, 60.0]
    corners, kinds = box_prompts(torch.tensor([box]))
    logits, iou = masks(embedding, to_shares(corners, 96, 96)[None], kinds[None])
    found = sam.embed(pixels).boxes([box])
    expected = F.interpolate(logits[0, :, :1], (96, 96), mode="bilinear", align_corners=False)[0, 0] > 0
    assert torch.equal(found.masks[0], expected)
    assert found.scores.item() == pytest.approx(iou[0, 0, 0].clamp(0, 1).item(), abs=1e-5)


@torch.no_grad()
def test_one_point_takes_the_likeliest_of_three_masks_and_several_the_single_one(loaded):
    image = loaded.embed(Image.fromarray(square(70)).resize((90, 70)))
    assert image.size == (90, 70)
    for points, labels in (([(30, 40)], None), ([(30, 40), (60, 20)], [1, 0])):
        kinds = torch.tensor([labels or [1]])
        shares = to_shares(torch.tensor([points], dtype=torch.float32), 90, 70)
        given = point_prompts(shares, kinds)
        logits, iou = (part[0, 0] for part in loaded.masks(image.embedding, *(part[None] for part in given)))
        best = 1 + int(iou[1:].argmax()) if len(points) == 1 else 0
        expected = F.interpolate(logits[None, best : best + 1], (70, 90), mode="bilinear", align_corners=False)[0] > 0
        found = image.points(points, labels)
        assert torch.equal(found.masks, expected)
        assert found.names == ["object"]
        assert torch.equal(found.boxes, tight_boxes(expected))


def test_everything_keeps_sure_masks_once_and_in_the_order_of_their_scores(loaded, monkeypatch):
    image = loaded.embed(square(64))
    for name, value in {"LEAST_IOU": -9.0, "LEAST_STABILITY": 0.0, "AT_ONCE": 5}.items():
        monkeypatch.setattr(module, name, value)
    found = image.everything(side=4)
    assert len(found.scores)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    low = image._decode(*point_prompts(torch.rand(3, 1, 2), torch.ones(3, 1, dtype=torch.int64)))[0]
    assert low.shape[0] == 3
    monkeypatch.setattr(module, "MOST_OVERLAP", 1.0)
    assert len(image.everything(side=4).scores) > len(found.scores)
    monkeypatch.setattr(module, "LEAST_IOU", 99.0)
    nothing = image.everything(side=4)
    assert nothing.masks.shape == (0, 64, 64)
    assert nothing.boxes.shape == (0, 4)


def test_boxes_are_tight_around_masks():
    masks = torch.zeros(3, 6, 9, dtype=torch.bool)
    masks[0, 2:4, 5:8] = True
    masks[1, 0, 0] = masks[1, 5, 8] = True
    assert tight_boxes(masks).tolist() == [[5, 2, 8, 4], [0, 0, 9, 6], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (lambda image: image.points([(20, 90)]), r"point 20,90 lies outside of its image of 64 x 64 pixels"),
        (lambda image: image.points([(20, 30)], [0]), r"labels must be one of 0 and 1 .* with a 1; not \[0\]"),
        (lambda image: image.points([(20, 30, 1)]), r"point 20,30,1: must be two numbers"),
        (lambda image: image.points([(20, float("nan"))]), r"point 20,nan lies outside"),
        (lambda image: image.boxes([(30, 10, 20, 40)]), r"box 30,10,20,40: must be left, top, right, bottom"),
        (lambda image: image.boxes([(-1, 10, 20, 40)]), r"box -1,10,20,40 lies outside"),
    ],
)
def test_prompts_that_name_nothing_are_refused(loaded, prompt, message):
    with pytest.raises(UserError, match=message):
        prompt(loaded.embed(square(64)))


def test_no_box_gives_no_object(loaded):
    assert loaded.embed(square(64)).boxes([]).masks.shape == (0, 64, 64)


def test_a_student_without_the_head_is_told_the_remedy(tmp_path, sam_file):
    remedy = r"distil it with a SAM teacher \(sam/vit_b\) and student\.keep_heads=true"
    bare, other = (keep_heads(tmp_path / name, labels) for name, labels in (("bare", []), ("other", ["hog"])))
    with pytest.raises(UserError, match=rf"bare keeps no heads of its teachers: {remedy}"):
        load_prompts(str(bare), sam=str(sam_file))
    with pytest.raises(UserError, match=rf"other keeps no head of SAM, only of hog: {remedy}"):
        load_prompts(str(other), sam=str(sam_file))
    with pytest.raises(UserError, match=rf"is not a distilled student, so it has no head of SAM: {remedy}"):
        sam_embeddings(load_student("timm/test_resnet", weights="random"))


def test_a_decoder_of_another_sam_is_refused(tmp_path, prompted_student, sam_file):
    wide = keep_heads(tmp_path / "wide", ["sam/vit_b"], dim=48)
    with pytest.raises(UserError, match=r"reads 32 channels, but the head of sam/vit_b gives 48"):
        load_prompts(str(wide), sam=str(sam_file))
    tensors = torch.load(sam_file)
    tensors["image_encoder.pos_embed"] = torch.zeros(1, 8, 8, 1024)
    torch.save(tensors, tmp_path / "large.pth")
    with pytest.raises(UserError, match=r"large\.pth: is the SAM vit_l, but sam/vit_b taught the student"):
        load_prompts(str(prompted_student), sam=str(tmp_path / "large.pth"))


def test_weights_that_are_not_there_are_named_with_the_flag(prompted_student, tmp_path):
    with pytest.raises(UserError, match=r"weights of SAM \(--sam, prompts\.sam, .*there is no file .*none\.pth"):
        load_prompts(str(prompted_student), sam=str(tmp_path / "none.pth"))


def run(capsys, *arguments):
    try:
        predict.main([str(argument) for argument in arguments])
    except SystemExit as end:
        if end.code == 2:
            return capsys.readouterr().err.strip()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("flags", [["--boxes", "4,6,30,28", "2,2,20,20"], ["--points", "20,20", "3,3,0"]], ids=str)
def test_the_command_writes_masks_as_coco_and_pictures(
    prompted_student, sam_file, loaded, photos, tmp_path, capsys, flags
):
    figures = run(
        capsys, prompted_student, photos, *flags, "--sam", sam_file, "--to", tmp_path / "out", "--device", "cpu"
    )
    count = 2 if flags[0] == "--boxes" else 1
    assert (figures["images"], figures["objects"]) == (3, 3 * count)
    results = json.loads((tmp_path / "out/predictions.json").read_text())
    images = json.loads((tmp_path / "out/images.json").read_text())
    assert [entry["name"] for entry in images["categories"]] == ["object"]
    for number, described in enumerate(images["images"], start=1):
        image = loaded.embed(described["file_name"])
        assert image.size == (described["width"], described["height"])
        own = [entry for entry in results if entry["image_id"] == number]
        expected = (
            image.boxes([[4, 6, 30, 28], [2, 2, 20, 20]]) if count == 2 else image.points([(20, 20), (3, 3)], [1, 0])
        )
        for entry, mask, score in zip(own, expected.masks, expected.scores.tolist(), strict=True):
            assert np.array_equal(rle.decode(entry["segmentation"]).astype(bool), mask.numpy())
            assert entry["score"] == pytest.approx(score, abs=1e-6)
    assert len([*(tmp_path / "out/pictures").iterdir()]) == 3
    again = run(
        capsys, prompted_student, photos, *flags, "--sam", sam_file, "--to", tmp_path / "out", "--device", "cpu"
    )
    assert again["objects"] == figures["objects"]


def test_the_command_cuts_out_everything(prompted_student, sam_file, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "LEAST_IOU", -9.0)
    monkeypatch.setattr(module, "LEAST_STABILITY", 0.0)
    monkeypatch.setattr(module.PromptedImage.everything, "__defaults__", (3,))
    figures = run(capsys, prompted_student, photos, "--everything", "--sam", sam_file, "--to", tmp_path / "all")
    assert figures["objects"] == len(json.loads((tmp_path / "all/predictions.json").read_text())) >= 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--points", "1,1", "--boxes", "1,1,9,9"], "error: --points and --boxes: give one of them"),
        (["--boxes", "1,1,9,9", "--task", "detect"], "error: --task=detect: cannot be asked for with --boxes"),
        (["--sam", "sam.pth"], "error: --sam: needs --points, --boxes or --everything"),
        (["--everything", "--to", "masks.json"], "error: --to: masks.json: masks are written into a folder"),
        (["--boxes", "1,1,9"], "1,1,9 is not left,top,right,bottom"),
        (["--points", "1,1,7"], "1,1,7 is not x,y, or x,y,1"),
    ],
)
def test_flags_that_do_not_fit_are_named(prompted_student, photos, capsys, flags, message):
    assert message in run(capsys, prompted_student, photos, *flags)


def test_python_has_it_too(prompted_student, sam_file):
    found = (
        regla.load_prompts(prompted_student, sam=str(sam_file), device="cpu").embed(square()).boxes([[1, 1, 50, 50]])
    )
    assert found.masks.shape == (1, 80, 80)


def test_any_student_and_resolution(prompted_student, sam_file):
    loaded = load_student(str(prompted_student))
    larger = make_prompts(loaded, str(sam_file), input_size=192, device="cpu").embed(square())
    assert larger.embedding.shape[-2:] == (12, 12)
    assert larger.boxes([[1, 1, 50, 50]]).masks.shape == (1, 80, 80)
