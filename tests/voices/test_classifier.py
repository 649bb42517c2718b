"""A classifier from words needs neither the text tower nor this project."""

import json

import numpy as np
import onnxruntime
import pytest
import torch

from jobs import export
from pipeline.voices.words import load_words

CLASSES = ["a red wall", "the blue sea", "green grass"]


@torch.no_grad()
def test_its_graphs_give_the_logits_of_the_words(taught, tmp_path, capsys):
    made = taught("student.name=timm/mobilenetv4_conv_small_035")
    target = tmp_path / "classifier"
    flags = ["--classes", ", ".join(CLASSES), "--templates", "simple", "--text-weights", str(made.file)]
    export.main([str(made.folder), *flags, "--size", "64", "--rounds", "1", "--to", str(target)])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [*figures["formats"]] == ["torch_export", "onnx"]

    images = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    words = load_words(str(made.folder), text_weights=str(made.file), device="cpu")
    embedded = torch.nn.functional.normalize(words.model(images), dim=1)
    expected = words.logits(embedded, words.embed_classes(CLASSES, ["simple"]))
    torch.testing.assert_close(
        torch.export.load(target / "student.pt2").module()(images), expected, atol=1e-3, rtol=1e-3
    )
    session = onnxruntime.InferenceSession(str(target / "student.onnx"))
    [logits] = session.run(["logits"], {"image": images.numpy()})
    np.testing.assert_allclose(logits, expected, atol=1e-3, rtol=1e-3)

    described = json.loads((target / "export.json").read_text())
    assert described["classes"] == CLASSES
    assert "token_embedding" not in (target / "student.onnx").read_bytes().decode("latin-1")
    card = (target / "README.md").read_text()
    assert (
        "The classes are texts: their embeddings by the text tower of clip/tiny-clip (in the templates simple)" in card
    )
    assert "An image classifier" in card


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "hf"], "a classifier from words can be written as torch_export, onnx, coreml"),
        (["--heads"], "--heads: the classifier from words has logits alone"),
    ],
)
def test_what_it_cannot_be_is_refused(flags, message, taught, tmp_path, capsys):
    made = taught()
    with pytest.raises(SystemExit) as ended:
        export.main([str(made.folder), "--classes", "a, b", *flags, "--to", str(tmp_path / "classifier")])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_card_of_a_student_with_heads_says_what_it_can_do(taught, tmp_path):
    made = taught()
    flags = ["--heads", "--format", "safetensors", "--rounds", "1"]
    export.main([str(made.folder), *flags, "--to", str(tmp_path / "whole")])
    card = (tmp_path / "whole/README.md").read_text()
    assert "- words: `jobs/predict.py <folder> photos --classes" in card
    assert "correspondences" not in card  # the teacher of colours is none of DINO's
    words = load_words(str(tmp_path / "whole"), text_weights=str(made.file), device="cpu")  # heads.json came along
    assert words.embed_classes(CLASSES).shape == (3, 24)
    export.main([str(made.folder), *flags[1:], "--to", str(tmp_path / "bare")])
    assert "With its heads" not in (tmp_path / "bare/README.md").read_text()
