import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline.cache.fill.plan import plan_cache
from pipeline.cache.layout.cached_teacher import load_codecs
from pipeline.distill.figures import FigureWriter, colours
from pipeline.distill.job import make_job
from pipeline.distill.loss import image_loss
from pipeline.distill.task import DistillTask, HeldOut, compare_with_teachers, make_distill_task
from pipeline.storage.store import Store
from pipeline.training.loop import train
from pipeline.training.worker import Worker
from tests.fakes import fill_in_process

STUDENT = ["student.name=timm/test_resnet", "student.token_dim=16", "student.head_dim=32", "train.epochs=1"]


@pytest.fixture(params=["float16", "pca4-int8"])
def job(tmp_path, photo_config, request):
    """On a complete cache, also of projected features."""
    config = photo_config(*STUDENT, f"cache.codec={request.param}")
    plan, _ = fill_in_process(plan_cache(config, Store.at(tmp_path / "cache")))
    return make_job(config, plan)


def test_the_held_out_sample_is_nearly_all_and_the_same_every_time(job):
    held_out = HeldOut(job.held_out, job.teachers, 32, batch_size=12)
    first, second = ([key for batch in held_out.batches() for key in batch.keys] for _ in range(2))
    assert first == second
    assert len(set(first)) == len(first) == 40
    assert held_out.batch_size == 10


def test_a_large_held_out_set_is_sampled(job, monkeypatch):
    monkeypatch.setattr("pipeline.distill.task.MAX_IMAGES", 25)
    held_out = HeldOut(job.held_out, job.teachers, 32, batch_size=10)
    assert sum(len(batch.keys) for batch in held_out.batches()) == 20


@torch.no_grad()
def test_nearness_is_the_mean_over_images_of_cosine_and_loss(job):
    task = DistillTask(job)
    module = task.module.eval()
    batches = list(task.held_out.batches())
    metrics = compare_with_teachers(module, iter(batches), task.held_out.codecs)
    images = torch.cat([batch.images for batch in batches])
    output = module.student(images)
    assert len(metrics) == 8
    for target, teacher in zip(module.targets, job.teachers, strict=True):
        label = module.labels[teacher.id]
        raw = {kind: torch.cat([batch.features[teacher.id][kind] for batch in batches]) for kind in teacher.shapes}
        predicted, decoders = target.predict(output), load_codecs(job.held_out.cache, teacher)
        for kind, values in predicted.items():
            wanted = target.standardisers[kind](decoders[kind].decode(raw[kind]))
            wanted = target.stored.rule.align_teacher(wanted) if kind == "patches" else wanted
            weights = {"patches": job.config.loss.patches, "summary": job.config.loss.summary}[kind]
            loss = image_loss(weights, values, wanted, job.config.loss.temperature)
            cosine = F.cosine_similarity(values, wanted, dim=-1).mean()
            assert metrics[f"val_cosine/{label}/{kind}"] == pytest.approx(float(cosine), abs=1e-5)
            assert metrics[f"val_loss/{label}/{kind}"] == pytest.approx(float(loss.mean()), rel=1e-4)


def test_perfect_heads_come_as_near_as_can_be(job):
    module = DistillTask(job).module.eval()
    held_out = HeldOut(job.held_out, job.teachers, 32, 40)
    batch = next(held_out.batches())
    for target in module.targets:
        raw, codecs = batch.features[target.teacher.id], held_out.codecs[target.teacher.id]
        target.predict = lambda _, target=target, raw=raw, codecs=codecs: target.targets(raw, codecs)
    metrics = compare_with_teachers(module, iter([batch]), held_out.codecs)
    for name, value in metrics.items():
        assert value == pytest.approx(1.0 if name.startswith("val_cosine") else 0.0, abs=1e-5)


def test_equal_features_have_equal_colours_whatever_the_sign_of_a_component():
    features = torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(8.0, 0, -1)
    (shown,) = colours(features, features)
    assert shown.shape == (2, 4, 4, 3)
    assert (float(shown.min()), float(shown.max())) == (0, 1)
    same, other = colours(features.flip(0), features, -features)
    torch.testing.assert_close(same, shown, rtol=0, atol=1e-4)
    assert float((other - shown).abs().mean()) > 0.2
    assert colours(features[..., :2], features[..., :2])[0].shape == (2, 4, 4, 3)


def test_an_outlier_does_not_decide_the_colours():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, 8, 8, 8, generator=generator) * torch.arange(8.0, 0, -1)
    (clean,) = colours(features, features)
    spoilt = features.clone()
    spoilt[0, 0, 0] = torch.tensor([0.0] * 7 + [1e4])
    (shown,) = colours(spoilt, spoilt)
    rest = torch.ones(4, 8, 8, dtype=torch.bool)
    rest[0, 0, 0] = False
    assert float((shown - clean)[rest].abs().mean()) < 0.05
    assert float(shown[rest].std()) > 0.2


def test_figures_are_drawn_after_every_evaluation_with_what_was_evaluated(job, tmp_path, monkeypatch):
    drawn, folder = [], tmp_path / "figures"
    draw = FigureWriter.draw

    def spy(self, module, evaluations, batch, tokens):
        draw(self, module, evaluations, batch, tokens)
        drawn.append(([step for step, _ in evaluations], batch.keys, sorted(p.name for p in folder.iterdir())))

    monkeypatch.setattr(FigureWriter, "draw", spy)
    task = make_distill_task({"job": job, "figures": FigureWriter(str(folder), {"colours8": 50.0})}, 0, 1)
    train(task, job.config.train, Worker(), None, lambda _: None)
    steps = task.steps(0)
    assert [seen for seen, _, _ in drawn] == [[0], [0, steps]]
    assert drawn[0][1] == drawn[1][1]
    assert [names for _, _, names in drawn] == [["curves.png", "features.png"]] * 2
    for name in ("curves.png", "features.png"):
        picture = np.asarray(Image.open(folder / name).convert("RGB"))
        assert min(picture.shape[:2]) > 300
        assert picture.std() > 10


def test_without_labels_or_held_out_images_there_are_figures_too(job, tmp_path):
    for number, changes in enumerate(({"val": None}, {"val": None, "held_out": None})):
        task = DistillTask(dataclasses.replace(job, **changes), figures=FigureWriter(str(tmp_path / str(number))))
        module = task.module.eval()
        task.draw(module, [(0, task.evaluate(module, None))])
        assert sorted(path.name for path in (tmp_path / str(number)).iterdir()) == ["curves.png", "features.png"]
