"""A fine-tuned model on disk: what earlier versions wrote still loads."""

import json

import pytest
from safetensors.torch import load_file, save_file

from pipeline.config.load import load_config
from pipeline.downstream.base import make_task
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.downstream.saved import load_model
from pipeline.student.model import build_encoder

BACKBONE = {"model": "regla_t", "args": {"dims": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "heads": 1}}
SETTINGS = {
    "classify": {"student": {"input_size": 64}, "classify": {"crop_share": 0.9}},
    "segment": {"segment": {"channels": 32, "size": 96, "inference": "slide"}, "student": {"input_size": 64}},
    "detect": {"detect": {"masks": False, "anchor": 8, "channels": 32, "max_size": 128, "sizes": [96]}},
}
"""As model.json held them before tasks were plug-ins; files with these keys are in users' folders and MLflow stores."""


@pytest.mark.parametrize("task", SETTINGS)
def test_a_model_json_written_before_tasks_were_plug_ins_still_loads(task, tmp_path):
    settings = SETTINGS[task]
    overrides = [f"{section}.{name}={value}" for section, fields in settings.items() for name, value in fields.items()]
    config = load_config(FinetuneJobConfig, None, [f"finetune.task={task}", *overrides])
    model = make_task(config).build(build_encoder(BACKBONE), ("ant", "bee"))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    described = {"task": task, "backbone": BACKBONE, "classes": ["ant", "bee"], "settings": settings}
    (tmp_path / "model.json").write_text(json.dumps(described))
    saved = load_model(tmp_path)
    assert (saved.task.name, saved.classes, dict(saved.backbone)) == (task, ("ant", "bee"), BACKBONE)
    saved.save(tmp_path / "again")
    assert json.loads((tmp_path / "again/model.json").read_text()) == described
    weights = load_file(tmp_path / "model.safetensors")
    assert all(value.equal(weights[name]) for name, value in saved.model.state_dict().items())
