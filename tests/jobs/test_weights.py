"""jobs/weights.py: which files a recipe's teachers need, and where they are."""

import argparse

import pytest
from huggingface_hub import constants

from jobs import weights
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_every_teacher_of_every_phase_is_listed_once(job, tmp_path):
    phases = "phases=[{train: {epochs: 1}}, {teachers: [hog, {model: dinov2/vits14, weights: random}]}]"
    text, figures = job(weights.main, "teachers=[hog, dinov2/vits14]", phases)
    assert [(row["teacher"], row["file"], row["here"]) for row in figures["teachers"]] == [
        ("hog", "none needed", True),
        (
            "dinov2/vits14",
            f"model.safetensors or pytorch_model.bin of {constants.ENDPOINT}/timm/vit_small_patch14_dinov2.lvd142m",
            False,
        ),
        ("dinov2/vits14", "none: untrained", True),
    ]
    assert figures["missing"] == 1
    assert "apache-2.0" in text
    assert "set that teacher's weights to its path" in text


def test_nothing_is_fetched_that_is_not_needed(job):
    text, figures = job(weights.main, "teachers=[hog]")
    assert figures["missing"] == 0
    assert "elsewhere" not in text
    config = load_config(DistillJobConfig, None, ["teachers=[hog]"])
    assert weights.fetch(config, argparse.Namespace())["missing"] == 0


def test_what_cannot_be_fetched_is_one_line(refused):
    def fetch(config: DistillJobConfig, dry_run: bool) -> dict:
        return dict(weights.fetch(config, argparse.Namespace()))

    line = refused(fetch, "teachers=[sam/vit_b]")
    assert line.startswith("error: teacher sam/vit_b: its pretrained weights are neither in the local hub cache")
    assert "HF_HUB_OFFLINE is set" in line
