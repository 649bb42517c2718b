"""The loss where a teacher has features of some images only: the mean over these, however a step is divided."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from jobs._plan import cost_plan, left_to_some_caches
from pipeline.cache.fill.estimate import Probe, estimate_cache
from pipeline.cache.fill.plan import plan_cache
from pipeline.cache.layout.shares import PRESENT
from pipeline.distill.balance import drop_coefficients
from pipeline.distill.figures import features_columns
from pipeline.distill.job import evaluate_teachers, make_job
from pipeline.distill.task import DistillTask, compare_with_teachers
from pipeline.storage.store import Store
from pipeline.training.loop import train
from pipeline.training.meter import StepTimer
from pipeline.training.step import Stepper
from pipeline.training.task import split_batch
from pipeline.training.worker import Worker
from tests.fakes import fill_in_process

STUDENT = ["student.name=timm/test_resnet", "student.token_dim=16", "student.head_dim=32"]
TEACHERS = (
    "teachers=[{model: 'tests.fakes:colours', args: {dim: 8}}, "
    "{model: 'tests.fakes:colours', share: 0.4, weight: 0.7, args: {dim: 12}}]"
)


@pytest.fixture
def made(photo_config, tmp_path):
    """A job whose second teacher has features of 0.4 of the images; overrides may be given."""
    store, plans = Store.at(tmp_path / "shared"), []

    def make(*overrides):
        config = photo_config(*STUDENT, TEACHERS, *overrides)
        plans[:] = plans or [fill_in_process(plan_cache(config, store))[0]]
        return make_job(config, plans[0])

    return make


def _task(job, **changes):
    task = DistillTask(job, **changes)
    task.module.eval()  # the same statistics of BatchNorm for every division, and nothing is drawn
    return task


def _gradient(task, pieces, images):
    """Loss, parts and gradient of all parameters of a step in these pieces, weighted as the engine weights them."""
    task.module.zero_grad()
    totals = {}
    for piece in pieces:
        loss, parts = task.loss(task.module, piece, torch.device("cpu"))
        (loss * len(piece.keys) / images).backward()
        for name, part in {"loss": loss.detach(), **parts}.items():
            totals[name] = totals.get(name, 0) + part * len(piece.keys) / images
    gradients = [weight.grad.clone() for weight in task.module.parameters() if weight.grad is not None]
    return totals, torch.cat([gradient.flatten() for gradient in gradients])


def _alone(task, batch, teacher):
    """The batch without the images that a teacher lacks, and without its other teachers' say."""
    keep = batch.features[teacher.id][PRESENT].bool()
    features = {
        name: {kind: rows[keep] for kind, rows in kinds.items() if kind != PRESENT}
        for name, kinds in batch.features.items()
    }
    return task.module(batch.images[keep], features)[1]


def test_the_loss_of_a_teacher_is_the_mean_over_the_images_that_it_has(made):
    task = _task(made())
    shared = task.job.teachers[1]
    batch = next(iter(task.batches(0, 0)))
    present = batch.features[shared.id][PRESENT]
    assert 0 < int(present.sum()) < len(batch.keys)
    task.before_step([batch])
    loss, parts = task.loss(task.module, batch, torch.device("cpu"))
    alone = _alone(task, batch, shared)
    for kind in ("summary", "patches"):
        torch.testing.assert_close(parts[f"colours12/{kind}"], alone[f"colours12/{kind}"])
    batch.features[shared.id][PRESENT] = torch.ones(16)
    _, everywhere = task.module(batch.images, batch.features)
    torch.testing.assert_close(parts["colours8/patches"], everywhere["colours8/patches"])
    assert not torch.isclose(parts["colours12/patches"], everywhere["colours12/patches"], rtol=1e-3)
    expected = sum(parts[f"colours8/{kind}"] + 0.7 * parts[f"colours12/{kind}"] for kind in ("summary", "patches"))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("pieces", [2, 5])
def test_micro_batches_and_shares_of_workers_give_the_gradient_of_the_whole_step(made, pieces):
    task = _task(made("train.batch_size=32"))
    shares = [_task(task.job, rank=rank, world=2) for rank in (0, 1)]
    batches = [next(iter(share.batches(0, 0))) for share in shares]
    counts = [int(batch.features[task.job.teachers[1].id][PRESENT].sum()) for batch in batches]
    assert counts[0] != counts[1]
    task.before_step(batches)
    whole = _gradient(task, batches, 32)
    divided = _gradient(task, [piece for batch in batches for piece in split_batch(batch, pieces)], 32)
    for name, value in whole[0].items():
        torch.testing.assert_close(divided[0][name], value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(divided[1], whole[1], rtol=1e-3, atol=1e-6)
    # Not the mean of the means of the pieces, which weighs images by how many of their piece have the teacher.
    task.scales.clear()
    apart = _gradient(task, batches, 32)
    assert not torch.isclose(apart[0]["colours12/patches"], whole[0]["colours12/patches"], rtol=1e-4)


def test_what_the_features_of_absent_images_hold_changes_nothing(made):
    task = _task(made())
    name = task.job.teachers[1].id
    batch = next(iter(task.batches(0, 0)))
    absent = ~batch.features[name][PRESENT].bool()
    assert not batch.features[name]["patches"][absent].any()
    before = _gradient(task, [batch], 16)
    batch.features[name]["patches"][absent] = 60  # a small number in float16
    batch.features[name]["summary"][absent] = 60
    after = _gradient(task, [batch], 16)
    assert torch.equal(before[0]["loss"], after[0]["loss"])
    assert torch.equal(before[1], after[1])


def test_a_step_without_an_image_of_the_teacher_has_a_loss_of_0_for_it(made):
    task = _task(made())
    name = task.job.teachers[1].id
    batch = next(iter(task.batches(0, 0)))
    batch.features[name][PRESENT][:] = 0
    task.before_step([batch])
    totals, gradient = _gradient(task, [batch], 16)
    assert float(totals["colours12/patches"]) == 0
    assert torch.isfinite(gradient).all()


def test_dropping_weighs_every_image_by_the_teachers_that_it_has():
    generator = torch.Generator().manual_seed(0)
    losses, draws = (torch.rand(4000, 3, generator=generator) for _ in range(2))
    weights, asked = torch.tensor([1.0, 2.0, 0.5]), torch.ones(4000, 3)
    asked[:, 2] = torch.where(torch.rand(4000, generator=generator) < 0.25, 4.0, 0.0)
    found = drop_coefficients(losses * weights, weights, draws, 0.5, asked)
    has = asked[:, 2] > 0
    kept = found > 0
    assert not kept[~has, 2].any()
    own = weights * asked
    torch.testing.assert_close((found * own).sum(dim=1), own.sum(dim=1))  # as much as without dropping
    hardest = (losses * weights).masked_fill(asked == 0, -1).argmax(dim=1)
    assert kept.gather(1, hardest[:, None]).all()
    others = torch.ones_like(kept).scatter_(1, hardest[:, None], False) & (asked > 0)
    assert abs(float(kept[others].float().mean()) - 0.5) < 0.02
    whole = drop_coefficients(losses * weights, weights, draws, 0.5, torch.ones(4000, 3))
    assert torch.equal(whole, drop_coefficients(losses * weights, weights, draws, 0.5))
    alone = drop_coefficients(losses[:1], weights, draws[:1], 0.5, torch.zeros(1, 3))
    assert not alone.any()


def test_a_distiller_that_drops_scales_with_the_images_that_have_the_teacher(made):
    task = _task(made("loss.drop=0.5"))
    batch = next(iter(task.batches(0, 0)))
    features, draws = task._features(batch), torch.rand(16, 2)
    loss, parts = task.module(batch.images, features, draws=torch.ones(16, 2))
    plain, _ = task.module(batch.images, features)
    torch.testing.assert_close(loss, plain)  # all are kept
    torch.testing.assert_close(parts["colours12/kept"], torch.tensor(1.0))
    loss, parts = task.module(batch.images, features, draws=draws)
    assert 0 < float(parts["colours12/kept"]) <= 1 + 1e-6
    loss.backward()
    assert all(torch.isfinite(w.grad).all() for w in task.module.parameters() if w.grad is not None)


@pytest.mark.parametrize("micro_batch", [8, 3])
def test_the_queue_takes_the_summaries_that_there_are(made, micro_batch):
    changes = ["train.epochs=1", f"train.micro_batch={micro_batch}", "loss={summary: {relation: 1}, queue: 64}"]
    job = made(*changes)
    tasks = [DistillTask(job, share, 2) for share in (0, 1)]
    shared = job.teachers[1]
    counted = sum(int(batch.features[shared.id][PRESENT].sum()) for task in tasks for batch in list(task.batches(0, 0)))
    whole, target = tasks[0].module.targets_with_queue()
    snapshots = []
    train(tasks[0], job.config.train, Worker(shares=2), None, snapshots.append, tasks[1:])
    assert int(target.queue.count) == counted < int(whole.queue.count) == 8 * 16
    losses = [metrics for snapshot in snapshots for _, metrics in snapshot.history if "loss" in metrics]
    assert losses
    assert all(torch.isfinite(torch.tensor(metrics["loss/colours12/relation"])) for metrics in losses)


def test_training_with_a_share_resumes_as_if_it_had_not_stopped(made, tmp_path):
    job = made("train.epochs=2", "train.checkpoint_steps=4", "train.precision=float32", "loss.drop=0.3")

    def run(state):
        snapshots = []
        train(DistillTask(job), job.config.train, Worker(), state, lambda one: snapshots.append(deepcopy(one.state)))
        return snapshots

    whole = run(None)
    rest = run(whole[2])
    assert all(torch.equal(value, rest[-1]["model"][name]) for name, value in whole[-1]["model"].items())


def test_the_engine_counts_before_the_step_is_divided(made):
    task = DistillTask(made("train.micro_batch=5"))
    seen = []
    task.before_step = lambda batches: seen.append([len(batch.keys) for batch in batches])
    stepper = Stepper(task, task.job.config.train, Worker(), [9, 9])
    stepper([next(iter(task.batches(0, 0)))], 0, StepTimer(torch.device("cpu")))
    assert seen == [[16]]


def test_held_out_images_are_compared_where_there_are_features(made):
    task = _task(made())
    batches = list(task.held_out.batches())
    found = compare_with_teachers(task.module, iter(batches), task.held_out.codecs)
    name, sums, count = task.job.teachers[1].id, 0.0, 0
    target = task.module.targets[1]
    with torch.inference_mode():
        for batch in batches:
            keep = batch.features[name][PRESENT].bool()
            raw = {kind: rows[keep] for kind, rows in batch.features[name].items() if kind != PRESENT}
            predicted = target.predict(task.module.student(batch.images[keep]))
            wanted = target.targets(raw, task.held_out.codecs[name])
            sums += float(target.image_losses(predicted, wanted)["patches"].sum())
            count += int(keep.sum())
    assert 0 < count < 40
    assert found["val_loss/colours12/patches"] == pytest.approx(sums / count, rel=1e-4)
    assert set(found) == {
        f"val_{what}/colours{dim}/{kind}"
        for what in ("loss", "cosine")
        for dim in (8, 12)
        for kind in ("summary", "patches")
    }
    scores = evaluate_teachers(task.job, SimpleNamespace(log_metrics=lambda _: None), 0)
    assert scores.keys() == {"colours8", "colours12"}


def test_figures_are_white_where_the_teacher_was_not_asked(made):
    task = _task(made())
    batch = task.shown
    columns = features_columns(task.module, batch, task.held_out.codecs)
    known = batch.features[task.job.teachers[1].id][PRESENT][:6].bool()
    for picture, there in zip(columns["colours12"], known, strict=True):
        assert bool((picture == 1).all()) != bool(there)


def _probe(teacher, batch_size):
    return Probe("NVIDIA Pretended", 2.0, 10**9, True)


def test_the_plan_shows_what_a_share_saves(photo_config, tmp_path):
    config = photo_config(*STUDENT, TEACHERS)
    plan = plan_cache(config, Store.at(tmp_path / "shared"))
    whole, shared = estimate_cache(plan, config, _probe)
    assert (whole.views, shared.views, shared.missing) == (190, 76, 76)
    assert shared.gpu_hours == pytest.approx(0.4 * whole.gpu_hours)
    text = cost_plan(plan, config, [whole, shared])
    row = plan.teachers[1].row_bytes()
    (line,) = [line.split() for line in text.splitlines() if line.strip().startswith("share of ")]
    assert line[:6] == ["share", "of", "colours12", "0.4", "saves", "114"]
    assert f"57 s on a GPU, {114 * row / 2**10:.1f} KiB" in text


def test_the_plan_shows_what_a_teacher_saves_that_only_the_last_phase_has(photo_config, tmp_path):
    later = "{model: 'tests.fakes:colours', args: {dim: 8}}, {model: 'tests.fakes:colours', args: {dim: 12}}"
    phases = f"phases=[{{views: {{crops: 2}}}}, {{teachers: [{later}]}}]"
    config = photo_config(*STUDENT, "teachers=[{model: 'tests.fakes:colours', args: {dim: 8}}]", phases)
    store = Store.at(tmp_path / "phases")
    planned = [(phase, plan_cache(phase, store)) for phase in config.phase_configs()]
    assert [len(plan.teachers) for _, plan in planned] == [1, 2]
    rows = left_to_some_caches([(phase, plan, estimate_cache(plan, phase, _probe)) for phase, plan in planned])
    (name,) = rows
    assert name == "colours12, not in cache 1"
    assert rows[name].startswith("saves 300 views, 2.5 min on a GPU, ")
    same = [(planned[1][0], planned[1][1], estimate_cache(planned[1][1], planned[1][0], _probe))] * 2
    assert left_to_some_caches(same) == {}
