"""The report of a fine-tuning, from the files that it leaves."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.config.load import load_config
from pipeline.downstream import report as module
from pipeline.downstream.base import Report, make_task
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.downstream.job import FinetunePlan, FinetuneResult
from pipeline.downstream.pictures import write_report
from pipeline.downstream.report import finetune_report
from pipeline.report.report import render
from tests.report.pages import Page

HOSTILE = "<img src=x onerror=alert(1)>"


class Images(SimpleNamespace):
    def __len__(self):
        return self.count


@pytest.fixture
def page(tmp_path, monkeypatch):
    config = load_config(
        FinetuneJobConfig, None, ["finetune.task=classify", f"name={HOSTILE}", "finetune.backbone_lr=0.1"]
    )
    monkeypatch.setattr(module, "devices", lambda: (0.0, "CPU"))
    started = SimpleNamespace(
        name="finetune",
        run=SimpleNamespace(run_id="abc"),
        tracking_uri="sqlite:///m.db",
        state=SimpleNamespace(folder=tmp_path, hours=0.0, gpu_hours=0.0),
    )

    def page(val, after):
        train = Images(count=100, classes=("cat", HOSTILE), location="photos/train")
        plan = FinetunePlan(train, val, SimpleNamespace(name="regla_t"), None, 5, [f"train: {HOSTILE}"])
        before = {name: value / 2 for name, value in after.items()}
        result = FinetuneResult(before, after, 10, 200, "models:/m-1", tmp_path / "model", "", {})
        shown = Page(render(finetune_report(started, config, plan, result, 75.0)))
        shown.check()
        return shown

    return page


def test_it_shows_curves_predictions_and_classes(page, tmp_path):
    lines = [{"step": 0, "top1": 30.0}, {"step": 10, "epoch": 1.0, "loss": 0.5}, {"step": 10, "top1": 60.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    pictures = {f"{HOSTILE}{number}.jpg": torch.zeros(3, 400, 300, dtype=torch.uint8) for number in range(20)}
    rows = [{"class": HOSTILE, "images": 40, "top1": 61.23456}]
    report = Report({"top1": 60.0}, rows, torch.from_numpy(np.eye(2, dtype=np.int64)), pictures)
    write_report(report, tmp_path / "evaluation", ("cat", "dog"))
    shown = page(Images(count=40, classes=("cat", HOSTILE), location="photos/val"), {"top1": 60.0})
    assert shown.titles == ["Recipe", "Data", "Curves", "On held-out images", "By class", "Cost", "Load the model"]
    assert shown.points("top1") == [(0.0, 30.0), (1.0, 60.0)]
    assert len(shown.elements["img"]) == 12 + 1
    figures = [figure["style"] for figure in shown.elements["figure"] if "style" in figure]
    assert figures[0] == "--width: 300px"  # as large as the picture
    assert f"{HOSTILE} 40 61.23" in shown.text
    assert "40 held-out images" in shown.text
    assert "time of this start 1.2 min" in shown.text
    assert "backbone regla_t from scratch" in shown.text
    assert "rate of the backbone 0.1 of the learning rate" in shown.text
    assert "load_predictor(" in shown.text


def test_a_detectors_numbers_share_charts_without_those_that_no_object_has():
    task = make_task(load_config(FinetuneJobConfig, None, ["finetune.task=detect"]))
    numbers = {"box/AP": 0.1, "box/AP50": 0.2, "box/AP_large": -1.0, "box/AR1": 0.2, "mask/AP": 0.0}
    assert task.charts(numbers) == {"box/AP": ["box/AP", "box/AP50"], "box/AR": ["box/AR1"], "mask/AP": ["mask/AP"]}


def test_without_held_out_images_there_is_a_report_too(page):
    shown = page(None, {})
    assert shown.titles == ["Recipe", "Data", "Cost", "Load the model"]
    assert f"notes train: {HOSTILE}" in shown.text
