"""Order, schedule, starting weights, resume and workers of fine-tuning."""

import colorsys
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import tv_tensors

from pipeline.config.load import load_config
from pipeline.downstream.backbone import FrozenEncoder, encoder_name, find_start, load_start
from pipeline.downstream.classify.task import Classification
from pipeline.downstream.config import TASKS, FinetuneJobConfig
from pipeline.downstream.sampling import Sampler, prepare, seeded
from pipeline.downstream.saved import load_model
from pipeline.downstream.segment.task import Segmentation, slide
from pipeline.downstream.training import FinetuneTask, epoch_steps, make_schedule
from pipeline.errors import UserError
from pipeline.student.model import save_encoder
from pipeline.training.loop import train
from pipeline.training.worker import Worker


def rows(sampler, *numbers):
    return [draw.row for number in numbers for draw in sampler.batch(number)]


def test_a_pass_takes_every_image_once_in_another_order_each_time():
    sampler = Sampler(23, 4, seed=1)
    first, second = rows(sampler, *range(5)), rows(sampler, *range(5, 10))
    assert len(set(first)) == len(set(second)) == 20
    assert first != second
    assert rows(Sampler(23, 4, seed=1), *range(5)) == first
    assert rows(Sampler(23, 4, seed=2), *range(5)) != first


def test_passes_follow_without_a_gap_where_an_epoch_counts_steps():
    sampler = Sampler(10, 4, seed=1, whole_passes=False)
    stream = rows(sampler, *range(5))
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))


def test_workers_share_the_batches_of_one():
    whole = Sampler(40, 8, seed=0)
    parts = [Sampler(40, 8, seed=0, rank=rank, world=2) for rank in range(2)]
    assert all(parts[0].batch(n) + parts[1].batch(n) == whole.batch(n) for n in range(12))


def test_a_worker_of_several_shares_builds_one_model(make_job):
    job = make_job("classify", "train.batch_size=4")
    first = FinetuneTask(job, 0, 2)
    second = first.with_share(1)
    assert second.module is first.module
    for share, task in enumerate((first, second)):
        own = [batch.keys for batch in FinetuneTask(job, share, 2).batches(0, 0)]
        assert [batch.keys for batch in task.batches(0, 0)] == own


def test_neighbours_in_a_parquet_file_stay_in_a_window():
    order = rows(Sampler(1000, 100, seed=0, block=50, window=200), *range(10))
    assert sorted(order) == list(range(1000))
    for first in range(0, 1000, 200):
        assert len({row // 50 for row in order[first : first + 200]}) == 4


def _seen(job, processes, start=0):
    job = type(job)(
        job.config.model_copy(update={"finetune": job.config.finetune.model_copy(update={"data_workers": processes})}),
        job.start,
        job.folder,
    )
    return [(batch.keys, batch.images) for batch in FinetuneTask(job).batches(1, start)]


def test_batches_depend_on_the_seed_alone(make_job):
    job = make_job("classify", "train.batch_size=2")
    here, there = _seen(job, 0), _seen(job, 2)
    assert [keys for keys, _ in here] == [keys for keys, _ in there]
    for (_, images), (_, others) in zip(here, there, strict=True):
        assert torch.equal(images, others)
    (_, resumed), *_ = _seen(job, 0, start=2)
    assert torch.equal(resumed, here[2][1])


def test_seeding_leaves_the_generators_as_they_were():
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    with seeded(1, 2):
        first = torch.rand(2), np.random.rand()
    with seeded(1, 2):
        assert (torch.rand(2).equal(first[0]), np.random.rand()) == (True, first[1])
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_forward_draws_by_the_seed_as_the_starting_weights_do(make_job):
    first, other = (FinetuneTask(make_job("classify", f"seed={seed}", folder=f"seed{seed}")) for seed in (0, 5))
    assert (first.seed, other.seed) == (0, 5)
    assert not torch.equal(first.module.head.weight, other.module.head.weight)


def test_colours_are_distorted_as_in_mmsegmentation():
    fields = ["finetune.task=segment", "segment.size=32", "student.input_size=32", "segment.scales=[1, 1]"]
    config = load_config(FinetuneJobConfig, None, fields)
    augment, red = Segmentation(config).training_transform(), torch.zeros(3, 32, 32, dtype=torch.uint8)
    red[0] = 200
    hues = []
    for seed in range(40):
        with seeded(seed):
            image, _ = augment(tv_tensors.Image(red), tv_tensors.Mask(torch.zeros(32, 32)))
        assert image.float().mean((1, 2)).argmax() == 0  # channels that change places would make it green or blue
        hues.append(colorsys.rgb_to_hsv(*(image[:, 0, 0] / 255).tolist())[0])
    turned = [min(hue, 1 - hue) for hue in hues]
    assert 0.06 < max(turned) < 0.102


def _refuse(item):
    raise UserError(f"{item} is wrong")


def test_an_error_of_a_data_process_arrives_as_it_is():
    with pytest.raises(UserError, match=r"^photo is wrong$"):
        list(prepare(_refuse, ["photo"], 1))


def _rates(steps, *overrides):
    config = load_config(
        FinetuneJobConfig,
        None,
        ["train.lr=1", "train.min_lr=0", "train.warmup_epochs=0.5", *overrides],
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(optimizer, config.train, config.finetune, steps)
    rates = []
    for step in range(sum(steps)):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_multistep_divides_by_ten_after_its_milestones():
    rates = _rates([4] * 12, "finetune.schedule=multistep", "finetune.milestones=[8, 11]")
    assert rates == pytest.approx([0, 0.5, *[1] * 30, *[0.1] * 12, *[0.01] * 4])


def test_poly_falls_with_power_point_nine():
    rates = _rates([10] * 4, "finetune.schedule=poly")
    assert rates[5:] == pytest.approx([(1 - step / 40) ** 0.9 for step in range(5, 40)])


def test_a_batch_larger_than_the_data_is_refused_unless_steps_are_counted():
    with pytest.raises(UserError, match=r"train.batch_size=16 is more than the 8"):
        epoch_steps(load_config(FinetuneJobConfig, None), 8)
    assert epoch_steps(load_config(FinetuneJobConfig, None, ["finetune.epoch_steps=7"]), 8) == 7


@pytest.mark.parametrize("name", ["segment"])
def test_an_interrupted_run_ends_as_one_that_was_not(name, make_job):
    def finish(state, folder):
        snapshots = []

        def keep(snapshot):
            file = io.BytesIO()
            torch.save(snapshot.state, file)
            snapshots.append(torch.load(io.BytesIO(file.getvalue()), weights_only=True))

        job = make_job(name, "train.checkpoint_steps=1", "finetune.schedule=poly", folder=folder)
        train(FinetuneTask(job), job.config.train, Worker(), state, keep)
        return snapshots

    whole = finish(None, "whole")
    assert len(whole) == 7
    resumed = finish(whole[1], "resumed")[-1]
    for part in ("model", "ema"):
        assert all(torch.equal(value, resumed[part][key]) for key, value in whole[-1][part].items())
    assert resumed["evaluations"] == whole[-1]["evaluations"]


def test_a_frozen_backbone_stays_as_it_was(make_job):
    job = make_job("classify", "finetune.frozen=true", "train.epochs=1")
    before = load_start(job.start, True).state_dict()
    task = FinetuneTask(job)
    assert isinstance(task.module.encoder, FrozenEncoder)
    head = task.module.head.weight.detach().clone()
    train(task, job.config.train, Worker(), None, lambda snapshot: None)
    assert not torch.equal(task.module.head.weight, head)
    assert all(torch.equal(value, before[key]) for key, value in task.module.encoder.state_dict().items())


@pytest.mark.parametrize("name", TASKS)
def test_a_backbone_may_learn_more_slowly_than_its_head(make_job, name):
    def moved(factor):
        task = FinetuneTask(make_job(name, f"finetune.backbone_lr={factor}", "train.epochs=1", folder=f"at-{factor}"))
        before = {key: weight.detach().clone() for key, weight in task.module.named_parameters()}
        train(task, task.job.config.train, Worker(), None, lambda snapshot: None)
        changes = {key: (weight - before[key]).abs().max() for key, weight in task.module.named_parameters()}
        own = f"{encoder_name(task.module)}."
        return (max(change for key, change in changes.items() if key.startswith(own) is mine) for mine in (True, False))

    (backbone, head), (slow, other) = moved(1), moved(0.001)
    assert slow < 0.01 * backbone
    assert other > 0.3 * head


def test_training_starts_from_the_exported_student(make_job, tmp_path):
    student = find_start(make_job("classify", "seed=5").config)
    save_encoder(student.encoder, "regla_t", student.args, 64, tmp_path / "student")
    job = make_job("classify", f"finetune.student={tmp_path}/student", folder="second")
    task = FinetuneTask(job)
    for key, value in task.module.encoder.backbone.state_dict().items():
        assert torch.equal(value, student.encoder.backbone.state_dict()[key])


def test_the_start_of_a_distillation_is_not_that_of_a_fine_tuning():
    with pytest.raises(
        UserError,
        match=r"student\.weights sets the initial weights of a distillation: set finetune\.student=models:/x/1 in",
    ):
        find_start(load_config(FinetuneJobConfig, None, ["student.weights=models:/x/1"]))


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ("no/such/folder", "no/such/folder: neither an exported student folder"),
        ("regla_x", "regla_xl"),
        ("timm/resnet18.no_such_tag", "resnet18.no_such_tag"),
    ],
)
def test_a_student_that_is_none_is_refused(student, expected):
    with pytest.raises(UserError, match=expected):
        find_start(load_config(FinetuneJobConfig, None, [f"finetune.student={student}"]))


def test_dense_tasks_refuse_a_backbone_without_a_pyramid(make_job):
    job = make_job("segment", "student.name=timm/vit_tiny_patch16_224", "student.args={img_size: 48, depth: 2}")
    with pytest.raises(UserError, match="maps at strides 16; segmentation and detection need 4, 8, 16, 32"):
        FinetuneTask(job)


def test_anchors_and_proposals_stay_in_float32_under_autocast(make_job):
    task = FinetuneTask(make_job("detect"))
    rpn, seen = task.module.rpn, []
    rpn.anchor_generator.register_forward_hook(lambda module, inputs, anchors: seen.extend(anchors))
    rpn.register_forward_hook(lambda module, inputs, output: seen.extend(output[0]))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = task.loss(task.module.train(), next(iter(task.batches(0, 0))), torch.device("cpu"))
    assert [boxes.dtype for boxes in seen] == [torch.float32] * 8
    loss.backward()
    assert all(p.grad.isfinite().all() for p in task.module.parameters() if p.grad is not None)


def test_evaluation_writes_tables_and_pictures(make_job):
    job = make_job("segment")
    task = FinetuneTask(job)
    metrics = task.evaluate(task.module.eval(), None)
    assert set(metrics) == {"miou", "macc", "aacc"}
    written = {str(path.relative_to(job.folder)) for path in (job.folder / "evaluation").rglob("*.*")}
    pictures = {"evaluation/pictures/00-drawing0.png", "evaluation/pictures/01-drawing4.png"}
    assert written == {"evaluation/per_class.csv", "evaluation/confusion.png", *pictures}


def test_two_ranks_evaluate_all_images_between_them():
    assert sorted([*Worker(0, 2).own_rows(7), *Worker(1, 2).own_rows(7)]) == list(range(7))


def test_windows_cover_the_image_and_agree_with_the_whole_on_a_pointwise_model():
    model = nn.Conv2d(3, 4, 1)
    pixels = torch.rand(1, 3, 50, 71)
    with torch.no_grad():
        torch.testing.assert_close(slide(model, pixels, 24), model(pixels))
        torch.testing.assert_close(slide(model, pixels, 64), model(pixels))


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"task": "classify"}))
    with pytest.raises(UserError, match="is not a fine-tuned model"):
        load_model(tmp_path)


def test_the_strongest_augmentation_of_timm_takes_an_image_to_its_end():
    config = load_config(FinetuneJobConfig, None, ["classify.augment=rand-m10-n9-inc1", "student.input_size=32"])
    transform = Classification(config).training_transform()
    image = Image.new("RGB", (40, 40), (10, 120, 240))
    for seed in range(30):  # each draws Posterize to 0 bits, which Pillow 13 refuses, with a probability of one half
        with seeded(seed):
            assert transform(image).shape == (3, 32, 32)


def test_bfloat16_trains_as_float32_within_a_fiftieth_of_the_loss(make_job):
    def losses(precision):
        found = {}
        job = make_job("classify", f"train.precision={precision}", "train.epochs=4", folder=precision)
        train(
            FinetuneTask(job),
            job.config.train,
            Worker(),
            None,
            lambda snapshot: found.update({step: row["loss"] for step, row in snapshot.history if "loss" in row}),
        )
        return list(found.values())

    assert len(losses("float32")) == 8
    assert losses("bfloat16") == pytest.approx(losses("float32"), rel=0.02)
