"""What fine-tuning refuses before it starts, and that a saved model is evaluated as it was made."""

import json

import pytest

from jobs import evaluate
from pipeline.config.load import load_config
from pipeline.downstream.base import make_task
from pipeline.downstream.config import EvaluateModelJobConfig, FinetuneJobConfig
from pipeline.downstream.job import as_saved, open_held_out, open_model, plan_finetune
from pipeline.downstream.saved import finished_model
from pipeline.downstream.training import FinetuneTask
from pipeline.errors import UserError
from pipeline.training.worker import ALONE
from tests.downstream.conftest import SMALL
from tests.downstream.drawings import locations

VIT = ["student.name=timm/vit_tiny_patch16_224", "student.args={depth: 1, embed_dim: 12, num_heads: 1}"]


@pytest.fixture
def save(make_job, tmp_path):
    """Save an untrained model of a task; gives the override that names it."""

    def write(task, *overrides):
        job = make_job(task, *overrides)
        training = FinetuneTask(job)
        finished_model(training.module, job, training.train.classes).save(tmp_path / "model")
        return f"evaluate.model={tmp_path}/model"

    return write


@pytest.fixture
def plan(drawings, tmp_path):
    """Plan a fine-tuning of the eight drawings."""

    def make(task, *overrides):
        settings = [*SMALL, *locations(drawings, task), f"finetune.task={task}", f"work={tmp_path}/work"]
        return plan_finetune(load_config(FinetuneJobConfig, None, [*settings, *overrides]))

    return make


def test_an_evaluation_goes_by_the_settings_of_the_model_and_the_command_line(save, drawings, tmp_path, capsys):
    model = save("classify", "student.input_size=32", "classify.crop_share=0.5")
    arguments = ["classify", model, f"data.val={drawings}/classes", f"work={tmp_path}/work", "--dry-run"]
    evaluate.start(arguments)
    assert "8 images" in (shown := capsys.readouterr().out)
    assert "student.input_size=32, classify.crop_share=0.5" in shown
    evaluate.start([*arguments, "student.input_size=40"])
    assert "student.input_size=40, classify.crop_share=0.5" in capsys.readouterr().out


@pytest.mark.parametrize("given", [[], ["detect.masks=true"]])
def test_a_detector_without_masks_is_evaluated_on_boxes(save, drawings, given):
    settings = [
        "finetune.task=detect",
        save("detect", "detect.masks=false"),
        *locations(drawings, "detect"),
        "finetune.data_workers=0",
        *given,
    ]
    config = load_config(EvaluateModelJobConfig, None, settings)
    saved = open_model(config)
    config = as_saved(config, saved, [item.partition("=")[0] for item in given])
    assert (config.detect.masks, config.detect.sizes) == (bool(given), [48])
    metrics = make_task(config).evaluate(saved.model, open_held_out(config, saved), ALONE).metrics
    assert {name.partition("/")[0] for name in metrics} == {"box"}


def test_one_class_is_enough_for_detection_alone(plan, drawings, tmp_path):
    (tmp_path / "one.txt").write_text("thing\n")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/disc").symlink_to(drawings / "classes/disc")
    one = {"classify": f"data.train={tmp_path}/photos", "segment": f"segment.classes={tmp_path}/one.txt"}
    for task, override in one.items():
        with pytest.raises(UserError, match=f"has only one class; finetune.task={task} needs 2"):
            plan(task, override)
    whole = json.loads((drawings / "annotations/instances_train.json").read_text())
    things = [entry | {"category_id": 7} for entry in whole["annotations"]]
    dataset = whole | {"categories": whole["categories"][:1], "annotations": things}
    (tmp_path / "one.json").write_text(json.dumps(dataset))
    files = [f"detect.{split}_annotations={tmp_path}/one.json" for split in ("train", "val")]
    assert plan("detect", *files).train.classes == ("square",)


def test_a_backbone_of_another_fixed_size_is_refused(plan):
    with pytest.raises(
        UserError, match=r"vit_tiny_patch16_224 takes no 48 x 48 images \(.*\): change student.input_size"
    ):
        plan("classify", *VIT)
    assert plan("classify", *VIT, "student.input_size=224").start.encoder.dim == 12


def test_mixing_refuses_an_odd_share_before_training_or_where_the_workers_are_counted(plan, make_job):
    with pytest.raises(UserError, match=r"train.batch_size: .* 3 images per worker is an odd number"):
        plan("classify", "train.batch_size=6", "train.workers=2")
    task = FinetuneTask(make_job("classify", "train.batch_size=6"), rank=0, world=2)
    with pytest.raises(UserError, match="3 images per worker is an odd number"):
        next(iter(task.batches(0, 0)))
    mixing = ["classify.mixup=0", "classify.cutmix=0"]
    unmixed = FinetuneTask(make_job("classify", "train.batch_size=6", *mixing), rank=0, world=2)
    assert len(next(iter(unmixed.batches(0, 0))).keys) == 3
