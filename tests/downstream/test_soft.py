"""Soft targets of classification: what is mixed, what it teaches, and what is refused."""

import pytest
import torch

from pipeline.config.load import load_config
from pipeline.downstream.base import make_task
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.downstream.job import TEACHER_FOLDER, make_finetune_task, plan_finetune
from pipeline.downstream.saved import finished_model, load_model
from pipeline.downstream.training import FinetuneTask, build_model
from pipeline.errors import UserError
from tests.downstream.conftest import SMALL
from tests.downstream.drawings import locations

CPU = torch.device("cpu")


@pytest.fixture
def taught(make_job, tmp_path):
    """Folder of a classifier of the drawings, sure of what it says."""
    job = make_job("classify", folder="taught")
    classes = FinetuneTask(job).train.classes
    model = build_model(job, classes)
    with torch.no_grad():
        model.head.weight.mul_(50)
        model.head.bias.copy_(torch.arange(len(classes)))
    finished_model(model, job, classes).save(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_targets_are_mixed_with_the_probabilities_of_the_same_pixels(make_job, taught):
    task = FinetuneTask(make_job("classify"))
    batch = next(iter(task.batches(0, 0)))
    softener = make_job("classify", "classify.teacher_share=0.25").task.make_softener(load_model(taught).model)
    probabilities = softener.model(batch.images).softmax(1)
    mixed = softener(batch, CPU)
    assert torch.equal(mixed.images, batch.images)
    torch.testing.assert_close(mixed.targets, 0.75 * batch.targets + 0.25 * probabilities)
    torch.testing.assert_close(mixed.targets.sum(1), torch.ones(len(batch.keys)))
    assert not mixed.targets.requires_grad


def test_the_loss_of_a_worker_is_least_where_the_student_says_the_same(make_job, taught):
    job = make_job("classify", f"classify.teacher={taught}", "classify.teacher_share=1.0")
    taught.rename(job.folder / TEACHER_FOLDER)
    task = make_finetune_task({"job": job}, 0, 1)
    batch = next(iter(task.batches(0, 0)))
    teacher = task.soften.model
    same, _ = task.loss(teacher, batch, CPU)
    other, _ = task.loss(task.module.eval(), batch, CPU)
    entropy = torch.distributions.Categorical(logits=teacher(batch.images)).entropy().mean()
    torch.testing.assert_close(same, entropy)
    assert other > same


def test_without_a_teacher_labels_are_all(make_job):
    job = make_job("classify")
    assert make_finetune_task({"job": job}, 0, 1).soften is None


def test_another_task_another_set_of_classes_and_no_model_are_refused(make_job, drawings, taught, tmp_path):
    settings = [*SMALL, *locations(drawings, "classify"), "finetune.task=classify", f"work={tmp_path}/work"]
    plan = plan_finetune(load_config(FinetuneJobConfig, None, [*settings, f"classify.teacher={taught}"]))
    assert plan.teacher.saved.classes == plan.train.classes
    with pytest.raises(UserError, match=r"classify\.teacher: .*nowhere is not a fine-tuned classifier"):
        plan_finetune(load_config(FinetuneJobConfig, None, [*settings, f"classify.teacher={tmp_path}/nowhere"]))
    config = load_config(FinetuneJobConfig, None, [*settings, f"classify.teacher={taught}"])
    with pytest.raises(UserError, match=r"differ in their classes: only the first has .*; only the second has "):
        make_task(config).find_teacher([*plan.train.classes[:-1], "zebra"], "")
