"""The task of docs/howto/own-task.md trains, evaluates and predicts."""

import re
import sys

import pytest
import torch

from pipeline.config.load import load_config
from pipeline.downstream.base import make_task
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.downstream.sampling import Sampler
from pipeline.student.loading import load_student
from pipeline.training.worker import ALONE
from tests.docs.commands import REPOSITORY

SCENES = ["data.samples.train=6", "data.samples.val=4", "data.samples.size=32", "student.input_size=32"]


def test_the_task_of_the_how_to_is_one(tmp_path, monkeypatch):
    page = (REPOSITORY / "docs/howto/own-task.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "my_tasks.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_tasks", raising=False)
    overrides = [*SCENES, "finetune.task=my_tasks:Brightness", "brightness.tolerance=1"]
    task = make_task(load_config(FinetuneJobConfig, None, overrides))
    train, val = task.open("train"), task.open("val")
    model = task.build(load_student("timm/test_resnet", weights="random").encoder, train.classes)
    batch = task.batch(train, Sampler(len(train), 4, 0).batch(0))
    loss, _ = task.loss(model, batch, torch.device("cpu"))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model[1].parameters())
    assert task.evaluate(model.eval(), val, ALONE).metrics == {"within": 100}
    image = torch.full((3, 20, 30), 128, dtype=torch.uint8)
    with torch.inference_mode():
        (result,) = task.predict(model, [image], ())
    assert task.describe(image, result, (), tmp_path, "0") == {"brightness": pytest.approx(result)}
    assert task.draw(image, result, ()).dtype == torch.uint8
