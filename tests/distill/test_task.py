import dataclasses
import pickle
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pipeline.cache.layout.cached_teacher import teacher_stats
from pipeline.cache.layout.dataset import Dataset
from pipeline.distill import task as module
from pipeline.distill.job import make_job
from pipeline.distill.task import DistillTask, build_student, compare_with_teachers, make_distill_task
from pipeline.errors import UserError
from pipeline.evaluate.knn import student_knn
from pipeline.imaging.crop import crop_and_resize
from pipeline.imaging.decode import decode_image
from pipeline.imaging.decoder_pool import DecoderPool
from pipeline.imaging.geometry import FULL
from pipeline.imaging.gpu_decode import NvjpegPool
from pipeline.training.checkpoint import load_state
from pipeline.training.loop import train
from pipeline.training.ray_train import make_tasks
from pipeline.training.worker import Worker
from tests.training.tiny_task import compile_with

STUDENT = ["student.name=timm/test_resnet", "student.token_dim=16", "student.head_dim=32"]


@pytest.fixture
def job(photo_config, filled):
    """A distillation job on the small cache; overrides may be given."""
    return lambda *overrides: make_job(photo_config(*STUDENT, *overrides), filled.plan)


def _features(job, key):
    """Every teacher's features of one image, computed from its pixels."""
    image = decode_image(Path(job.config.data.train, key).read_bytes())
    for teacher in job.teachers:
        source = teacher.create()
        source.load()
        pixels = torch.from_numpy(crop_and_resize(image, FULL, (32, 32), "bilinear"))[None]
        yield teacher, source.encode(pixels)


def test_batches_hold_the_features_of_their_images(job):
    task = DistillTask(job())
    batches = list(task.batches(0, 0))
    assert len(batches) == task.steps(0) == 150 // 16
    for batch in (batches[0], batches[-1]):
        assert batch.images.shape == (16, 3, 32, 32)
        assert batch.images.dtype == torch.uint8
        for row in (0, 7, 15):
            for teacher, expected in _features(task.job, batch.keys[row]):
                for kind in teacher.shapes:
                    stored = teacher.codecs()[kind].decode(batch.features[teacher.id][kind][row : row + 1])
                    torch.testing.assert_close(stored, getattr(expected, kind), rtol=1e-2, atol=1e-2)


def test_ranks_take_equal_steps_of_the_batch_together_and_start_with_equal_weights(job):
    tasks = [DistillTask(job(), rank, 2) for rank in (0, 1)]
    assert tasks[0].steps(0) == tasks[1].steps(0) > 0
    batches = [list(task.batches(0, 0)) for task in tasks]
    assert [len(own) for own in batches] == [tasks[0].steps(0)] * 2
    keys = [key for own in batches for batch in own for key in batch.keys]
    assert len(keys) == len(set(keys)) == tasks[0].steps(0) * 16
    first, second = (task.module.state_dict() for task in tasks)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_start_in_mid_epoch_gives_the_rest_of_it(job):
    task = DistillTask(job())
    every = [batch.keys for batch in task.batches(1, 0)]
    assert [batch.keys for batch in task.batches(1, 5)] == every[5:]


def test_the_seed_decides_the_weights_whatever_was_drawn_before(job):
    tasks = []
    for noise in range(2):
        torch.manual_seed(noise)
        tasks.append(DistillTask(job()))
    tasks.append(DistillTask(job("seed=1")))
    first, second, other = (task.module.student.encoder.state_dict()["backbone.conv1.0.weight"] for task in tasks)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    alone = build_student(tasks[0].job.config).encoder.state_dict()["backbone.conv1.0.weight"]
    assert torch.equal(first, alone)


def test_building_a_student_leaves_the_random_state_alone(job):
    config = job().config
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_student(config)
    assert torch.equal(torch.rand(3), expected)


def test_targets_are_standardised_by_the_statistics_of_the_training_split(job):
    task = DistillTask(job())
    for target, teacher in zip(task.module.targets, task.job.teachers, strict=True):
        stats = teacher_stats(task.job.train, teacher)
        assert target.teacher == teacher
        torch.testing.assert_close(
            target.standardisers["patches"].mean, torch.from_numpy(stats["patches"].mean).float()
        )
        torch.testing.assert_close(target.standardisers["summary"].std, torch.from_numpy(stats["summary"].std).float())


def test_the_loss_of_a_batch_is_that_of_the_module(job):
    task = DistillTask(job())
    batch = next(iter(task.batches(0, 0)))
    total, parts = task.loss(task.module.eval(), batch, torch.device("cpu"))
    expected, same = task.module(batch.images, batch.features)
    assert torch.equal(total, expected)
    assert parts.keys() == same.keys() == {f"colours{d}/{kind}" for d in (8, 4) for kind in ("summary", "patches")}
    assert total.requires_grad


def test_training_draws_augmentation_and_dropping_and_takes_the_weights_of_now(job):
    task = DistillTask(_scheduled(job(*EVERYTHING_RANDOM, "train.epochs=8")))
    seen = []
    task.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    first, second = list(task.batches(0, 0))[:2]
    assert (first.position, second.position) == ((0, 0), (0, 1))
    for seed, batch in ((0, first), (1, first), (0, dataclasses.replace(first, position=(2, 0)))):
        torch.manual_seed(seed)
        task.loss(task.module.train(), batch, torch.device("cpu"))
    (images, _, weights, draws, *_), other, again = seen
    assert torch.equal(images, again[0])
    assert torch.equal(draws, again[3])
    assert draws.shape == (16, 2)
    assert not torch.equal(draws, other[3])
    assert not torch.equal(images, other[0])
    assert not torch.equal(images, first.images)
    torch.testing.assert_close(weights[:, 1], torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(again[2][:, 1], torch.tensor([0.55, 1.0]))
    task.loss(task.module.eval(), first, torch.device("cpu"))
    assert torch.equal(seen[3][0], first.images)
    assert seen[3][2:] == (None, None, None, None)


def test_evaluation_is_knn_of_the_given_weights_and_nearness_to_the_teachers(job):
    tasks = [DistillTask(job(f"seed={seed}", "knn.k=1")) for seed in (0, 1)]
    judge, scores = tasks[0], []
    for task in tasks:
        module = task.module.eval()
        [expected] = student_knn([module.student.encoder], judge.job.train, judge.job.val, 32, judge.job.config.knn)
        near = compare_with_teachers(module, judge.held_out.batches(), judge.held_out.codecs)
        assert judge.evaluate(module, None) == {"knn": expected, "knn_raw": expected, **near}
        scores.append((expected, near))
    (first, near), (second, _) = scores
    assert first != second
    averaged, raw = (task.module for task in tasks)
    assert judge.evaluate(averaged, raw) == {"knn": first, "knn_raw": second, **near}


def test_without_held_out_images_there_is_nothing_to_evaluate(job):
    task = DistillTask(dataclasses.replace(job(), val=None, held_out=None))
    assert task.evaluate(task.module, task.module) == {}


def test_held_out_images_without_labels_are_compared_with_the_teachers_alone(job):
    task = DistillTask(dataclasses.replace(job(), val=None))
    metrics = task.evaluate(task.module.eval(), task.module)
    assert {name.split("/")[0] for name in metrics} == {"val_cosine", "val_loss"}


def test_there_is_no_knn_where_labels_are_missing(job, monkeypatch, caplog):
    assert job().val is not None
    monkeypatch.setattr(Dataset, "labelled", property(lambda _: 0))
    assert (job().val, job().held_out is None) == (None, False)
    assert "no kNN" in caplog.text


def test_a_worker_makes_its_task_from_a_job_that_travelled(job):
    payload = pickle.loads(pickle.dumps({"job": job()}))  # noqa: S301
    task = make_distill_task(payload, 1, 2)
    assert isinstance(task, DistillTask)
    assert (task.reader.order.rank, task.reader.order.world, task.reader.batch_size) == (1, 2, 8)
    assert next(iter(task.batches(0, 0))).images.shape[0] == 8


EVERYTHING_RANDOM = [
    "loss={standardise: phi_s, summary: {cosine: 1, relation: 0.5}, queue: 40, drop: 0.5, max_patches: 2}",
    "augment={jitter: 0.8, grey: 0.2, blur: 0.5}",
]


def test_a_step_is_known_by_its_number_over_all_epochs(job):
    task = DistillTask(job())
    seen = []
    task.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[4]))
    batch, steps = next(iter(task.batches(0, 0))), task.steps(0)
    for place in [*((0, number) for number in range(steps)), (1, 0), (1, 1)]:
        task.loss(task.module.train(), dataclasses.replace(batch, position=place), torch.device("cpu"))
    assert [int(turn) for turn in seen] == list(range(steps + 2))


def test_a_worker_of_several_shares_builds_one_distiller(job, monkeypatch):
    built, build = [], module.build_distiller
    monkeypatch.setattr(
        module, "build_distiller", lambda given, decoders: built.append(given) or build(given, decoders)
    )
    payload = {"job": job()}
    tasks = make_tasks(make_distill_task, payload, Worker(shares=2))
    assert len(built) == 1
    assert all(task.module is tasks[0].module for task in tasks)
    for share, task in enumerate(tasks):
        own = [batch.keys for batch in make_distill_task(payload, share, 2).batches(0, 0)]
        assert [batch.keys for batch in task.batches(0, 0)] == own


@pytest.mark.parametrize("micro_batch", [8, 3])
def test_all_shares_and_pieces_of_a_step_are_compared_with_the_steps_before(job, micro_batch):
    changes = ["train.epochs=1", f"train.micro_batch={micro_batch}", "loss={summary: {relation: 1}, queue: 64}"]
    given = job(*changes)
    tasks = [DistillTask(given, share, 2) for share in (0, 1)]
    target, *_ = tasks[0].module.targets_with_queue()
    shares = [list(task.batches(0, 0)) for task in tasks]
    rows = [batch.features[target.teacher.id]["summary"] for step in zip(*shares, strict=True) for batch in step]
    summaries = F.normalize(torch.cat([target._decode("summary", each, target.stored) for each in rows]), dim=-1)
    counts = []
    entries = target.queue.entries
    target.queue.entries = lambda: counts.append(int(entries()[1].sum())) or entries()
    train(tasks[0], given.config.train, Worker(shares=2), None, lambda snapshot: None, tasks[1:])
    each = -(-8 // micro_batch) * 2
    assert counts == [min(16 * step, 64) for step in range(len(shares[0])) for _ in range(each)]
    assert int(target.queue.count) == len(summaries)
    kept, filled = target.queue.entries()
    assert filled.all()
    torch.testing.assert_close(kept, summaries[-64:].roll(len(summaries) % 64, 0))


def _scheduled(given):
    """The job with a weight of the first teacher that falls to 0.1 in the first half."""
    first, *others = given.teachers
    config = first.config.model_copy(update={"weight": {0: 1, 0.5: 0.1}})
    return dataclasses.replace(given, teachers=(dataclasses.replace(first, config=config), *others))


COMPILED = ["train.compile=true", "train.micro_batch=6"]  # pieces of 5 and of 6 images


@pytest.mark.parametrize(
    "more",
    [[], EVERYTHING_RANDOM, pytest.param(EVERYTHING_RANDOM + COMPILED, marks=pytest.mark.slow)],
    ids=["plain", "everything", "compiled"],
)
def test_an_interrupted_distillation_ends_as_one_that_was_not(job, tmp_path, more):
    given = job("train.epochs=2", "train.checkpoint_steps=4", "train.precision=float32", *more)
    given = _scheduled(given) if more else given

    def run(state):
        snapshots = []

        def commit(snapshot):
            torch.save(snapshot.state, tmp_path / "state.pt")
            snapshots.append(SimpleNamespace(state=load_state(tmp_path), history=snapshot.history))

        torch.compiler.reset()
        task = DistillTask(given)
        compile_with(task.module, "aot_eager")
        train(task, given.config.train, Worker(), state, commit)
        return snapshots

    whole = run(None)
    assert whole[5].state["position"] == {"epoch": 1, "batch": 3, "step": 12, "samples": 12 * 16}
    rest = run(whole[5].state)
    assert len(rest) == len(whole) - 6
    for part in ("model", "ema"):
        assert all(torch.equal(value, rest[-1].state[part][name]) for name, value in whole[-1].state[part].items())
    assert rest[-1].state["evaluations"] == whole[-1].state["evaluations"]
    # An empty queue makes the first relation cheap, and with it the first total.
    for name in ("loss/colours8/patches",) if more else ("loss", "loss/colours8/patches"):
        losses = [metrics[name] for snapshot in whole for _, metrics in snapshot.history if name in metrics]
        assert len(losses) == 18
        assert fmean(losses[9:]) < fmean(losses[:9])


def test_what_decodes_the_training_images_is_part_of_the_run_and_needs_a_gpu(job, monkeypatch):
    decoded = job("train.decoder=nvjpeg")
    assert decoded.config.fingerprint() != job().config.fingerprint()
    assert job("train.decoder=cpu").config.fingerprint() == job().config.fingerprint()
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"train\.decoder: nvjpeg decodes on a GPU, and there is none here"):
            DistillTask(decoded)
    # torchvision's CPU decoder stands for the GPU's
    monkeypatch.setattr(module, "decoding_gpu", lambda config: "cpu" if config.train.decoder == "nvjpeg" else None)
    here, there = DistillTask(job()), DistillTask(decoded).with_share(0)
    for a, b in zip(here.batches(0, 0), there.batches(0, 0), strict=True):
        assert a.keys == b.keys
        assert (a.images.short() - b.images.short()).abs().max() <= 2
    assert isinstance(there.reader.decoders, NvjpegPool)
    assert type(here.reader.decoders) is DecoderPool
