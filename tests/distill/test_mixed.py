"""Several input sizes in one step."""

from collections import Counter
from itertools import count

import pytest
import torch

from pipeline.cache.fill.plan import plan_cache
from pipeline.cache.layout.cached_teacher import load_codecs
from pipeline.cache.layout.shares import PRESENT
from pipeline.distill import mixed as module
from pipeline.distill.job import make_job
from pipeline.distill.mixed import MixedReader, divide_batch
from pipeline.distill.phases import plan_phases
from pipeline.distill.plan import training_plan
from pipeline.distill.task import DistillTask
from pipeline.errors import UserError
from pipeline.runs.folder import cache_store
from pipeline.storage.store import Store
from pipeline.training.loop import train
from pipeline.training.meter import StepTimer
from pipeline.training.step import Stepper
from pipeline.training.worker import Worker
from tests.fakes import fill_in_process

STUDENT = ["student.name=timm/test_resnet", "student.token_dim=16", "student.head_dim=32"]
HOG = "teachers=[{model: hog, input_size: 64}]"
MIX = "resolutions=[{input_size: 64, share: 0.25, teachers: {0: 96}}]"


@pytest.fixture
def mixed(tmp_path, photo_config):
    """A job whose steps are a quarter at 64 px, where HOG sees 96; overrides may be given."""

    def make(*overrides):
        config = photo_config(*STUDENT, HOG, MIX, *overrides)
        store = Store.at(tmp_path / "cache")
        plans = [fill_in_process(plan_cache(part, store))[0] for part in config.cache_configs()]
        return make_job(config, plans[0], plans[1:])

    return make


def test_a_batch_is_divided_by_the_shares():
    assert divide_batch(16, []) == [16]
    assert divide_batch(16, [0.25, 0.125]) == [10, 4, 2]
    assert divide_batch(10, [0.25]) == [8, 2]


def test_every_size_has_its_own_images_and_the_features_of_its_own_cache(mixed):
    task = DistillTask(mixed())
    batch = next(task.batches(0, 0))
    first, second = task.parts(batch)
    assert [len(part.keys) for part in (first, second)] == [12, 4]
    assert [part.images.shape[-1] for part in (first, second)] == [32, 64]
    assert first.features.keys() != second.features.keys()
    (target,) = task.module.targets
    assert target.at(32).rule.teacher == (4, 4)
    assert target.at(64).rule.teacher == (6, 6)
    further = task.job.resolutions[0]
    codec = load_codecs(further.train.cache, further.teachers[0])["patches"]
    raw = second.features[further.teachers[0].id]
    expected = target.standardisers["patches"](codec.decode(raw["patches"]))
    torch.testing.assert_close(target.targets(raw, stored=target.at(64))["patches"], expected)


def test_the_loss_of_a_teacher_with_a_share_is_the_mean_over_the_images_of_all_sizes(mixed):
    task = DistillTask(mixed("teachers.0.share=0.4", "loss.summary={cosine: 1}"))
    task.module.eval()
    batch = next(task.batches(0, 0))
    parts, (target,) = task.parts(batch), task.module.targets
    stored = [part.features[target.at(part.images.shape[-1]).teacher.id] for part in parts]
    counts = [int(kinds[PRESENT].sum()) for kinds in stored]
    assert 0 < sum(counts) < 16
    task.before_step([batch])
    assert float(task.scales["hog"]) == pytest.approx(16 / sum(counts))
    losses = [task.loss(task.module, part, torch.device("cpu"))[0] * len(part.keys) / 16 for part in parts]
    whole = 0.0
    for part, kinds in zip(parts, stored, strict=True):
        keep, at = kinds[PRESENT].bool(), target.at(part.images.shape[-1])
        if keep.any():
            raw = {kind: rows[keep] for kind, rows in kinds.items() if kind != PRESENT}
            found = target.losses(task.module.student(part.images[keep]), raw, stored=at)
            whole += float(sum(loss.detach().sum() for loss in found.values()))
    assert float(sum(losses)) == pytest.approx(whole / sum(counts), rel=1e-4)


def test_an_epoch_has_as_many_samples_as_without_and_every_size_sees_all_images_equally_often(mixed):
    task = DistillTask(mixed("train.epochs=8"))
    plain = 150 // 16
    assert task.steps(0) == pytest.approx(plain, abs=1)
    seen = [Counter(), Counter()]
    for epoch in range(8):
        for batch in task.batches(epoch, 0):
            for counter, part in zip(seen, batch.parts, strict=True):
                counter.update(part.keys)
    for counter in seen:
        assert len(counter) == 150
        # what does not fill the last batch of an epoch is left out, as without
        assert max(counter.values()) - min(counter.values()) <= 3


def test_a_start_in_mid_epoch_gives_the_rest_of_it(mixed):
    task = DistillTask(mixed())
    every = [batch.keys for batch in task.batches(3, 0)]
    assert [batch.keys for batch in task.batches(3, 5)] == every[5:]
    assert [batch.parts[1].position for batch in task.batches(3, 5)] == [(3, number) for number in range(5, len(every))]


def test_a_reader_goes_on_where_the_epoch_before_stopped():
    class Numbers:
        def steps(self, epoch):
            return 3 + epoch % 2

        def batches(self, epoch, start=0):
            yield from range(10 * epoch + start, 10 * epoch + self.steps(epoch))

    stream = module._endless(Numbers(), 5)
    assert [next(stream) for _ in range(6)] == [12, 13, 20, 21, 22, 30]
    assert MixedReader([Numbers(), Numbers()], [1, 1]).steps(0) == 1


def test_the_loss_of_a_step_is_the_mean_over_all_of_its_images(mixed):
    task = DistillTask(mixed())
    batch = next(task.batches(0, 0))
    stepper = Stepper(task, task.job.config.train, Worker(), [task.steps(0)])
    stepper.module.train()
    found = stepper._accumulate([batch], 0, StepTimer(torch.device("cpu")))
    gradients = [weight.grad.clone() for weight in stepper.module.parameters()]
    stepper.module.zero_grad()
    losses = [task.loss(task.module, part, torch.device("cpu"))[0] for part in batch.parts]
    mean = (12 * losses[0] + 4 * losses[1]) / 16
    mean.backward()
    torch.testing.assert_close(found["loss"], mean.detach())
    for weight, gradient in zip(stepper.module.parameters(), gradients, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [[], ["train.micro_batch=2"], ["loss.summary={cosine: 1, relation: 0.1}"]])
def test_it_trains_and_resumes_to_the_same_weights(mixed, settings):
    def run(stop=None, state=None):
        task, kept, steps = DistillTask(mixed("train.epochs=2", "train.checkpoint_steps=5", *settings)), [], count()
        task.evaluate = lambda averaged, raw: {}

        def commit(snapshot):
            kept.append(snapshot.state)
            if stop is not None and next(steps) == stop:
                raise InterruptedError

        try:
            train(task, task.job.config.train, Worker(), state, commit)
        except InterruptedError:
            return kept[-1]
        return [state for state in kept if state][-1]

    whole, begun = run(), run(stop=1)
    assert begun["position"]["step"] == 5
    resumed = run(state=begun)
    assert whole["position"] == resumed["position"]
    for name, value in whole["ema"].items():
        assert torch.equal(value, resumed["ema"][name]), name


def test_micro_batches_do_not_change_which_images_count(mixed):
    task = DistillTask(mixed())
    batch = next(task.batches(0, 0))
    stepper = Stepper(task, task.job.config.train, Worker(), [task.steps(0)])
    for cuts in ((1, 1), (3, 1), (8, 5)):
        pieces = list(stepper._pieces(batch, cuts))
        assert len(pieces) == sum(cuts)
        assert [key for piece, counted in pieces if counted for key in piece.keys] == batch.keys
        assert sum(counted for _, counted in pieces) == 16


def test_the_plan_names_the_sizes_and_fills_every_cache(photo_config):
    config = photo_config(*STUDENT, HOG, MIX)
    (phase,) = plan_phases(config, cache_store(config))
    assert [part.teachers[0].input_size for part, _ in phase.caches] == [64, 96]
    assert training_plan(phase)["at 64 px"].startswith("25% of the samples of a step; hog student 4x4")
    same = photo_config(*STUDENT, HOG, "resolutions=[{input_size: 64, share: 0.25}]")
    (phase,) = plan_phases(same, cache_store(same))
    assert len(phase.caches) == 1  # the teacher is the same


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ("[{input_size: 64, share: 0.6}, {input_size: 96, share: 0.4}]", "resolutions: the shares add up to 1,"),
        ("[{input_size: 64, share: 0.1}, {input_size: 64, share: 0.1}]", "two of them have the same input_size"),
        ("[{input_size: 32, share: 0.1}]", "resolutions.0.input_size: 32 is student.input_size already"),
        (
            "[{input_size: 64, share: 0.1, teachers: {1: 96}}]",
            "resolutions.0.teachers: there is no teacher 1, only 0 to 0",
        ),
        ("[{input_size: 64, share: 1.0}]", "resolutions.0.share: input should be less than 1"),
    ],
)
def test_resolutions_that_cannot_be_are_refused(photo_config, items, message):
    with pytest.raises(UserError, match=message):
        photo_config(*STUDENT, HOG, f"resolutions={items}")


def test_a_share_without_an_image_is_refused_before_anything_is_read(photo_config):
    config = photo_config(*STUDENT, HOG, "resolutions=[{input_size: 64, share: 0.01}]")
    (phase,) = plan_phases(config, cache_store(config))
    with pytest.raises(UserError, match=r"resolutions: 16 images a worker are too few to divide into \[16, 0\]"):
        training_plan(phase)
