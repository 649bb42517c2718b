"""Each task reaches near-perfect scores on the eight images that it is trained on, and its saved model keeps them."""

import pytest
import torch
from torch import nn

from pipeline.downstream.base import Part
from pipeline.downstream.task import FinetuneTask, load_model, save_model
from pipeline.training import Worker, train

OVERFIT = ["train.batch_size=8", "train.warmup_epochs=2", "train.ema_decay=0", "train.weight_decay=0"]
PLAIN = ["classify.augment=null", "classify.min_area=1", "classify.mixup=0", "classify.cutmix=0", "classify.erase=0"]
CASES = {
    "classify": ([*PLAIN, "classify.crop_share=1", "train.epochs=30", "train.lr=0.003"], {"top1": 100, "top5": 100}),
    "segment": (["segment.scales=[1, 1]", "train.epochs=60", "train.lr=0.01"], {"miou": 90, "aacc": 97}),
    "detect": (["train.epochs=80", "train.lr=0.005"], {"box/AP": 0.8, "mask/AP": 0.6}),
}


class _AtTheEnd(FinetuneTask):
    """Evaluates once, on the training images."""

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        return {}


@pytest.mark.parametrize("name", CASES)
def test_eight_images_are_learned_by_heart(name, make_job, tmp_path):
    overrides, expected = CASES[name]
    job = make_job(name, *OVERFIT, *overrides)
    task = _AtTheEnd(job)
    snapshots = []
    train(task, job.config.train, Worker(), None, snapshots.append)
    task.module.load_state_dict(snapshots[-1].state["ema"])
    save_model(task.module, job, task.train.classes, tmp_path / "model")
    saved = load_model(tmp_path / "model")
    seen = task.kind.open(job.config.model_copy(update={"data": job.config.data}), "train")
    report = saved.kind.evaluate(saved.model, seen, job.config, Part())
    print(report.metrics)
    for metric, least in expected.items():
        assert report.metrics[metric] >= least, report.metrics
    assert saved.classes == task.train.classes
    assert len(report.pictures) == 2
    assert all(picture.dtype == torch.uint8 and len(picture) == 3 for picture in report.pictures.values())
    assert [row["class"] for row in report.per_class] == list(saved.classes)
