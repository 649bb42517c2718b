"""Proxy distillation end to end in this process: a student is exported, cached as a teacher, and learnt from."""

import pytest
import torch

from pipeline.cache.fill.build import build_cache
from pipeline.cache.fill.plan import plan_cache
from pipeline.distill.job import make_job
from pipeline.distill.task import DistillTask, build_student
from pipeline.imaging.crop import crop_and_resize
from pipeline.imaging.decode import decode_image
from pipeline.imaging.geometry import FULL
from pipeline.storage.store import Store
from pipeline.student.model import load_encoder
from pipeline.training.loop import train
from pipeline.training.worker import Worker
from teachers.base import digest_state
from tests.fakes import without_ray
from tests.student.conftest import export_student

STUDENT = ["student.name=timm/test_resnet", "student.token_dim=16", "student.head_dim=32", "train.precision=float32"]


@pytest.fixture
def proxy(photo_config, tmp_path):
    """Gives a recipe that learns from the student of a seed."""

    def export(seed):
        folder = tmp_path / f"student{seed}"
        config = photo_config(*STUDENT, f"seed={seed}")
        export_student(build_student(config).encoder, config, folder)
        return photo_config(*STUDENT, "train.epochs=1", f"teachers=[{{model: student, weights: '{folder}'}}]"), folder

    return export


def test_a_student_learns_from_a_student_by_way_of_the_cache(proxy, tmp_path, monkeypatch):
    config, folder = proxy(3)
    without_ray(monkeypatch)
    plan, report = build_cache(plan_cache(config, Store.at(tmp_path / "cache")), config)
    assert report.shards_computed == 3
    (teacher,) = plan.teachers
    assert teacher.id.startswith("test_resnet-")
    assert teacher.weights_sha256 == digest_state(load_encoder(folder).backbone)
    task = DistillTask(make_job(config, plan))
    batch = next(iter(task.batches(0, 0)))
    encoder = load_encoder(folder)
    for key, stored in zip(batch.keys, batch.features[teacher.id]["summary"], strict=True):
        image = decode_image((tmp_path / "photos/train" / key).read_bytes())
        pixels = torch.from_numpy(crop_and_resize(image, FULL, (32, 32), "bicubic"))[None]
        with torch.no_grad():
            expected = encoder(pixels / 255)
        torch.testing.assert_close(teacher.codecs()["summary"].decode(stored[None]), expected, rtol=1e-2, atol=1e-2)
    losses = []
    train(task, config.train, Worker(), None, lambda snapshot: losses.extend(snapshot.history))
    curve = [metrics["loss"] for _, metrics in losses if "loss" in metrics]
    assert curve[-1] < curve[0]


def test_another_student_is_another_teacher_in_the_cache(proxy, tmp_path):
    ids = {plan_cache(proxy(seed)[0], Store.at(tmp_path / "cache")).teachers[0].id for seed in (3, 4, 3)}
    assert len(ids) == 2
