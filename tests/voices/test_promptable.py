"""The measurement of prompts: masks from ground-truth boxes, of the student and of SAM beside it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

from jobs import evaluate
from pipeline.config.load import load_config
from pipeline.downstream.detect.task import Objects
from pipeline.errors import UserError
from pipeline.sources.sample_scenes import SampleScenes
from pipeline.voices import promptable
from pipeline.voices.config import PromptsJobConfig
from pipeline.voices.promptable import PromptsPlan, mask_iou, measure, open_examples, plan_promptable
from tests.teachers.sam_files import ENCODER_ARGS, SIDE
from tests.voices.conftest import keep_heads

SCENES = ["data.samples.val=6", "data.samples.size=48"]


def config(*overrides):
    return load_config(PromptsJobConfig, None, [*SCENES, *overrides])


def test_iou_counts_pixels():
    found, truth = torch.zeros(3, 4, 4, dtype=torch.bool), torch.zeros(3, 4, 4, dtype=torch.bool)
    found[0, :2], truth[0, 1:] = True, True
    found[1, 0, 0] = True
    assert mask_iou(found, truth).tolist() == [0.25, 0.0, 1.0]


class Told:
    """Stands for a model: gives the true masks of scenes, the lower part of each cut off by a share."""

    def __init__(self, scenes, lost):
        self.scenes, self.lost, self.calls, self.input_size = scenes, lost, 0, 48

    def embed(self, image):
        (scene,) = (scene for scene in self.scenes if np.array_equal(scene.image, image))
        self.calls += 1
        return type("Image", (), {"boxes": lambda _, boxes: self.answer(scene, boxes)})()

    def answer(self, scene, boxes):
        assert np.allclose(boxes, scene.boxes)
        masks = torch.from_numpy(scene.masks).clone()
        for mask in masks:
            rows = mask.any(1).nonzero()[:, 0]
            mask[rows[len(rows) - int(self.lost * len(rows)) :]] = False
        count = len(masks)
        return Objects(
            torch.from_numpy(scene.boxes),
            torch.zeros(count, dtype=torch.int64),
            ["object"] * count,
            torch.ones(count),
            masks,
        )


def test_true_masks_score_in_full_and_others_by_their_iou():
    settings = config()
    scenes = [SampleScenes("val", 6, 48).scene(row) for row in range(6)]
    examples = open_examples(settings)
    student, teacher = Told(scenes, 0.5), Told(scenes, 0.0)
    figures = measure(PromptsPlan(student, teacher, "sam/vit_b", examples, [0, 2, 4]))
    assert (figures["teacher_mask_iou"], figures["teacher_mask_ap"]) == (100, pytest.approx(100))
    shares = []
    for row in (0, 2, 4):
        masks = torch.from_numpy(scenes[row].masks)
        shares += mask_iou(student.answer(scenes[row], scenes[row].boxes).masks, masks).tolist()
    assert figures["mask_iou"] == pytest.approx(100 * np.mean(shares), abs=1e-4)
    assert figures["prompts_ratio"] == pytest.approx(figures["mask_iou"], abs=1e-4)
    assert figures["mask_ap"] < 100
    assert (figures["images"], figures["objects"], student.calls) == (3, len(shares), 3)


@pytest.fixture
def coco(tmp_path):
    """Two scenes as files with COCO annotations, one of them also with a crowd."""
    scenes = SampleScenes("val", 2, 48)
    images, annotations = [], []
    (tmp_path / "val").mkdir()
    for row in range(2):
        scene = scenes.scene(row)
        Image.fromarray(scene.image).save(tmp_path / f"val/{row}.png")
        images.append({"id": row + 7, "file_name": f"{row}.png", "width": 48, "height": 48})
        for mask, label in zip(scene.masks, scene.classes.tolist(), strict=True):
            shape = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
            shape["counts"] = shape["counts"].decode()
            entry = {"id": len(annotations) + 1, "image_id": row + 7, "category_id": label + 1, "segmentation": shape}
            annotations.append({**entry, "area": int(mask.sum()), "iscrowd": 0})
    annotations.append({**annotations[-1], "id": 99, "iscrowd": 1})
    categories = [{"id": number + 1, "name": str(number)} for number in range(10)]
    file = tmp_path / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return tmp_path / "val", file, len(annotations) - 1


def test_coco_annotations_are_prompted_for_without_crowds(coco, prompted_student, sam_file):
    folder, file, count = coco
    given = [f"data.val={folder}", f"prompts.annotations={file}", f"evaluate.student={prompted_student}"]
    args = json.dumps({**ENCODER_ARGS, "global_attn_indexes": [1]})
    given += [f"prompts.sam={sam_file}", f"prompts.sam_size={16 * SIDE}", f"prompts.sam_args={args}"]
    plan = plan_promptable(config(*given))
    figures = measure(plan)
    assert (figures["images"], figures["objects"]) == (2, count)
    assert 0 <= figures["mask_iou"] < 100
    with pytest.raises(UserError, match=r"prompts\.annotations must be given for data\.val"):
        open_examples(config(f"data.val={folder}"))


def test_the_job_prints_both_figures_and_logs_them(prompted_student, sam_file, tmp_path, capsys, ray_session):
    args = json.dumps({**ENCODER_ARGS, "global_attn_indexes": [1]})
    words = [
        "promptable",
        f"evaluate.student={prompted_student}",
        f"prompts.sam={sam_file}",
        *SCENES,
        f"work={tmp_path}",
    ]
    words += [f"prompts.sam_size={16 * SIDE}", f"prompts.sam_args={args}", "prompts.limit=3"]
    evaluate.start(words)
    text = capsys.readouterr().out
    figures = json.loads(text.splitlines()[-1])
    assert figures["images"] == 3
    assert {"mask_iou", "mask_ap", "teacher_mask_iou", "teacher_mask_ap", "prompts_ratio"} <= figures.keys()
    assert "boxes of 3 images from samples as prompts" in text


def test_the_images_that_are_measured_are_logged():
    logged = []
    run = type("Run", (), {"log_dataset": lambda _, *given: logged.append(given)})()
    examples = open_examples(config())
    for rows in ([0, 2], [0, 2], [0, 3]):
        promptable.log_images(PromptsPlan(None, None, "sam/vit_b", examples, rows), run)
    assert logged[0][0] == "val-2"
    assert logged[0] == logged[1] != logged[2]


def test_a_student_without_the_head_is_refused_before_sam_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(promptable, "create_teacher", None)
    student = keep_heads(tmp_path / "student", ["hog"])
    with pytest.raises(UserError, match=r"keeps no head of SAM, only of hog: .*student\.keep_heads=true"):
        plan_promptable(config(f"evaluate.student={student}"))
    with pytest.raises(UserError, match=r"evaluate\.student must be given"):
        plan_promptable(config())
