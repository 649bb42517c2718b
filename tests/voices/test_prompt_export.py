"""A student for prompts in ONNX: a program without this project gets the same masks."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from jobs import export
from pipeline.errors import UserError
from pipeline.imaging.crop import crop_and_resize
from pipeline.imaging.geometry import FULL
from pipeline.student.loading import load_student
from pipeline.voices import prompt_export
from pipeline.voices.prompt_export import export_prompts
from pipeline.voices.prompts import load_prompts
from tests.voices.conftest import SIZE, keep_heads


def test_both_files_give_the_masks_of_eager(prompted_student, sam_file, tmp_path, capsys):
    export.main(
        [
            str(prompted_student),
            "--format",
            "safetensors",
            "--sam",
            str(sam_file),
            "--to",
            str(tmp_path),
            "--rounds",
            "1",
        ]
    )
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    described = json.loads((tmp_path / "prompts.json").read_text())
    assert figures["prompts"] == described
    assert described["input_size"] == SIZE
    assert max(described[name]["relative_error"] for name in ("sam_encoder.onnx", "sam_decoder.onnx")) <= 1e-4
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    run = {
        name: onnxruntime.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"])
        for name in ("sam_encoder.onnx", "sam_decoder.onnx")
    }
    image = crop_and_resize(pixels, FULL, (SIZE, SIZE), "bicubic")[None].astype(np.float32) / 255
    (embedding,) = run["sam_encoder.onnx"].run(None, {"image": image})
    box = [10.0, 5.0, 80.0, 50.0]
    points = np.array([[[[10 / 90, 5 / 60], [80 / 90, 50 / 60]]]], np.float32) + np.float32(0.5 / 1024)
    feeds = {"embedding": embedding, "points": points, "labels": np.array([[[2, 3]]])}
    logits, iou = run["sam_decoder.onnx"].run(None, feeds)
    mask = F.interpolate(torch.from_numpy(logits[0, :, :1]), (60, 90), mode="bilinear", align_corners=False)[0, 0] > 0
    found = load_prompts(str(prompted_student), sam=str(sam_file), device="cpu").embed(pixels).boxes([box])
    assert (mask != found.masks[0]).float().mean() < 0.001
    assert found.scores.item() == pytest.approx(float(iou[0, 0, 0].clip(0, 1)), abs=1e-3)


def test_a_file_that_differs_from_eager_is_refused(prompted_student, sam_file, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_export, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match=r"sam_encoder\.onnx: differs from eager by .* of the largest output"):
        export_prompts(load_student(str(prompted_student)), str(sam_file), tmp_path)


def test_a_student_without_the_head_is_refused(tmp_path, sam_file, capsys):
    student = keep_heads(tmp_path / "student", ["hog"])
    with pytest.raises(SystemExit):
        export.main([str(student), "--sam", str(sam_file), "--to", str(tmp_path / "out")])
    assert "keeps no head of SAM, only of hog" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
