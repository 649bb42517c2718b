"""Each task reaches near-perfect scores on the eight images that it is trained on, and its saved model keeps them."""

import pytest
import torch

from pipeline.downstream.saved import finished_model, load_model
from pipeline.downstream.training import FinetuneTask
from pipeline.training.loop import train
from pipeline.training.worker import ALONE

OVERFIT = ["train.batch_size=8", "train.warmup_epochs=2", "train.ema_decay=0", "train.weight_decay=0"]
PLAIN = ["classify.augment=null", "classify.min_area=1", "classify.mixup=0", "classify.cutmix=0", "classify.erase=0"]
CASES = {
    "classify": ([*PLAIN, "classify.crop_share=1", "train.epochs=25", "train.lr=0.01"], {"top1": 100}),
    "segment": (["segment.scales=[1, 1]", "train.epochs=60", "train.lr=0.01"], {"miou": 88, "macc": 90, "aacc": 97}),
    "detect": (["train.epochs=80", "train.lr=0.003", "train.warmup_epochs=10"], {"box/AP50": 0.9, "mask/AP50": 0.9}),
}


class _Unjudged(FinetuneTask):
    def evaluate(self, averaged, raw):
        return {}


@pytest.mark.parametrize("name", ["classify", "segment", pytest.param("detect", marks=pytest.mark.slow)])
def test_eight_images_are_learned_by_heart(name, make_job, tmp_path):
    overrides, expected = CASES[name]
    job = make_job(name, *OVERFIT, *overrides)
    task = _Unjudged(job)
    snapshots = []
    train(task, job.config.train, ALONE, None, snapshots.append)
    task.module.load_state_dict(snapshots[-1].state["ema"])
    finished_model(task.module, job, task.train.classes).save(tmp_path / "model")
    saved = load_model(tmp_path / "model")
    report = job.task.evaluate(saved.model, task.val, ALONE)
    assert {metric: report.metrics[metric] >= least for metric, least in expected.items()} == dict.fromkeys(
        expected, True
    ), report.metrics
    assert saved.classes == task.train.classes
    assert len(report.pictures) == 2
    assert all(picture.dtype == torch.uint8 and len(picture) == 3 for picture in report.pictures.values())
    assert [row["class"] for row in report.per_class] == list(saved.classes)
