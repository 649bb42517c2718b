"""Mask losses: SAM's decoder on the student's and the cached embedding, with prompts in the loop."""

import dataclasses
import math
from copy import deepcopy
from itertools import chain
from statistics import fmean

import numpy as np
import pytest
import torch

from pipeline.cache.fill.plan import plan_cache
from pipeline.distill import job as module
from pipeline.distill import masks
from pipeline.distill.config import MasksConfig
from pipeline.distill.job import distill, make_job
from pipeline.distill.masks import MaskTarget, draws_shape, mask_loss
from pipeline.distill.phases import plan_phases
from pipeline.distill.plan import training_plan
from pipeline.distill.sam_decoders import check_decoders, load_decoders
from pipeline.distill.task import DistillTask
from pipeline.errors import UserError
from pipeline.runs.folder import cache_store
from pipeline.training.loop import train
from pipeline.training.step import ModelEma
from pipeline.training.worker import Worker
from teachers.sam_masks import build_sam_masks
from teachers.sam_prompts import BOTTOM_RIGHT, OFF, ON, PADDING, TOP_LEFT
from tests.distill.test_phases import InProcess, Logged
from tests.fakes import fill_in_process
from tests.teachers.sam_files import DIM, ENCODER_ARGS, authors_file
from tests.training.engine import run_training

STUDENT = ["student.name=timm/test_resnet", "student.token_dim=16", "student.head_dim=32", "student.input_size=64"]


@pytest.fixture
def target():
    """The mask loss with seeded weights; more settings may be given."""
    return lambda **settings: MaskTarget(build_sam_masks(authors_file()), MasksConfig(**settings))


def _maps(seed, count=3, side=8):
    return torch.randn(count, DIM, side, side, generator=torch.Generator().manual_seed(seed))


def _draws(target, count=3, seed=0):
    return torch.rand(count, *draws_shape(target.settings), generator=torch.Generator().manual_seed(seed))


def test_equal_embeddings_have_no_loss_and_others_have(target):
    compare = target(prompts=6, iterations=3)
    same, iou = compare(_maps(0), _maps(0), _draws(compare))
    assert (same.tolist(), iou.tolist()) == ([0] * 3, [1] * 3)
    near, far = (compare(_maps(0) + share * _maps(1), _maps(0), _draws(compare)) for share in (0.05, 1.0))
    assert (near[0] > 0).all()
    assert (near[0] < far[0]).all()
    assert far[1].mean() < near[1].mean() < 1


def test_the_gradient_reaches_the_student_alone(target):
    compare = target()
    predicted, wanted = _maps(1).requires_grad_(), _maps(0).requires_grad_()
    compare(predicted, wanted, _draws(compare))[0].sum().backward()
    assert predicted.grad.abs().sum() > 0
    assert wanted.grad is None
    assert not [*compare.parameters()]


def test_the_decoder_is_neither_saved_nor_averaged_nor_copied(target):
    compare = target()
    assert not compare.state_dict()
    average = ModelEma(torch.nn.ModuleDict({"masks": compare, "own": torch.nn.Linear(2, 2)}), 0.9)
    assert len(average._averaged) == 2
    copy, own = (dict(part.named_buffers()) for part in (average.module["masks"], compare))
    assert len(own) > 50
    assert all(copy[name] is buffer for name, buffer in own.items())
    assert deepcopy(compare).state_dict() == {}


def test_a_step_towards_less_loss_makes_masks_more_alike(target):
    compare = target(prompts=8)
    wanted, draws = _maps(0), _draws(compare)
    predicted = (wanted + _maps(1)).requires_grad_()
    optimizer = torch.optim.Adam([predicted], lr=0.02)
    ious = []
    for _ in range(30):
        loss, iou = compare(predicted, wanted, draws)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        ious.append(float(iou.mean()))
    assert ious[-1] > ious[0] + 0.1


@pytest.mark.parametrize("side", [8, 4])
def test_images_decoded_in_parts_give_the_same(target, monkeypatch, side):
    compare = target(prompts=4)
    draws, wanted = _draws(compare), _maps(0)
    results = []
    for most in (2**16, 8 * 8 * 4):  # all, and one image at a time
        monkeypatch.setattr(masks, "PATCHES_AT_ONCE", most)
        decoded, predicted = [], _maps(1, side=side).requires_grad_()
        hook = compare.masks.register_forward_pre_hook(lambda _, given, seen=decoded: seen.append(len(given[0])))
        loss, iou = compare(predicted, wanted, draws)
        (loss * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        hook.remove()
        results.append((loss.detach(), iou, predicted.grad))
        assert set(decoded) == ({3} if most == 2**16 else {1})
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


def test_the_loss_of_an_image_is_its_own(target):
    compare = target()
    draws = _draws(compare)
    whole, _ = compare(_maps(1), _maps(0), draws)
    alone = torch.cat([compare(*(part[row : row + 1] for part in (_maps(1), _maps(0), draws)))[0] for row in range(3)])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-6)


def test_prompts_are_points_and_boxes_and_their_masks_those_that_sam_chooses(target):
    compare = target(prompts=4, iterations=1)
    draws, wanted = _draws(compare, count=1, seed=3), _maps(0, count=1)
    draws[..., 2] = torch.tensor([[0.9, 0.1, 0.7, 0.3]])  # point, box, point, box
    seen = []
    compare.masks.register_forward_hook(lambda _, given, found: seen.append((*given, *found)))
    compare(wanted, wanted, draws)
    (_, _, first, of_points, scores), (_, points, labels, logits, _), _ = seen
    assert first.tolist() == [[[ON, PADDING]] * 4]
    assert labels.tolist() == [[[ON, PADDING], [TOP_LEFT, BOTTOM_RIGHT]] * 2]
    assert torch.equal(points[0, ::2, 0], draws[0, ::2, :2])
    likeliest = scores[0, :, 1:].argmax(dim=1) + 1
    for number in (1, 3):
        rows, columns = np.nonzero(of_points[0, number, likeliest[number]].numpy() > 0)
        corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        found = (points[0, number].flatten() - 0.5 / 1024) * of_points.shape[-1]
        assert found.tolist() == pytest.approx(corners)
    chosen = masks._choose((points, labels), seen[1][4])
    assert chosen.tolist() == [[likeliest[0], 0, likeliest[2], 0]]
    assert torch.equal(masks._pick(logits, chosen)[0, 3], logits[0, 3, 0])
    assert masks._choose((points, torch.cat([labels, labels[..., :1]], dim=2)), seen[1][4]).tolist() == [[0] * 4]


def test_a_point_without_a_mask_stays_a_point(target):
    compare = target(prompts=4, iterations=1)
    compare.masks.mask_decoder.output_upscaling[3].bias.fill_(0)
    for perceptron in compare.masks.mask_decoder.output_hypernetworks_mlps:
        perceptron.layers[-1].weight.zero_()
        perceptron.layers[-1].bias.zero_()  # logits of 0: no mask anywhere
    seen = []
    compare.masks.register_forward_pre_hook(lambda _, given: seen.append(given))
    draws = _draws(compare) * torch.tensor([1, 1, 0])  # all are to be boxes
    loss, iou = compare(_maps(1), _maps(0), draws)
    _, points, labels = seen[1]
    assert (labels == torch.tensor([ON, PADDING])).all()
    assert torch.equal(points[..., 0, :], draws[..., :2])
    assert (loss.tolist(), iou.tolist()) == ([0] * 3, [1] * 3)


def test_further_points_lie_where_the_masks_differ_and_tell_what_the_teacher_has():
    found, wanted = torch.zeros(1, 2, 3, 4, dtype=torch.bool), torch.zeros(1, 2, 3, 4, dtype=torch.bool)
    wanted[0, 0, 2, 1], found[0, 0, 0, 3] = True, True  # missed, and too much
    found[0, 1, 0], wanted[0, 1, 0] = True, True  # alike
    prompts = torch.zeros(1, 2, 2, 2), torch.tensor([[[ON, PADDING], [TOP_LEFT, BOTTOM_RIGHT]]])
    seen = [set(), set()]
    for draw in (*torch.arange(24) / 24, torch.tensor(1 - 2**-24)):
        points, labels = masks._with_point(prompts, found, wanted, draw.expand(1, 2))
        assert torch.equal(points[:, :, :2], prompts[0])
        assert torch.equal(labels[:, :, :2], prompts[1])
        for number, (point, label) in enumerate(zip(points[0, :, 2].tolist(), labels[0, :, 2].tolist(), strict=True)):
            seen[number].add((math.floor(point[0] * 4), math.floor(point[1] * 3), label))
    assert seen[0] == {(1, 2, ON), (3, 0, OFF)}
    assert seen[1] == {(x, y, ON if y == 0 else OFF) for x in range(4) for y in range(3)}


def test_the_loss_of_a_mask_by_hand():
    logits, target = torch.randn(2, 3, 5, 4).unbind()
    p, t = (1 / (1 + np.exp(-part.double().numpy())) for part in (logits, target))
    divergence = (t * np.log(t / p) + (1 - t) * np.log((1 - t) / (1 - p))).mean(axis=(1, 2))
    dice = 1 - (2 * (p * t).sum(axis=(1, 2)) + 1) / ((p**2 + t**2).sum(axis=(1, 2)) + 1)
    np.testing.assert_allclose(mask_loss(logits, target).numpy(), divergence + dice, rtol=1e-4)


def test_sixteen_bits_do_not_move_prompts(target):
    encode = target().masks.prompt_encoder
    points, labels = torch.rand(3, 2, 2), torch.ones(3, 2, dtype=torch.int64)
    exact = encode(points, labels)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(encode(points, labels), exact)
        torch.testing.assert_close(encode.grid(8, 8), encode.grid(8, 8).float())


@pytest.fixture
def sam_file(tmp_path):
    """A whole SAM in the authors' layout, its own or given tensors."""

    def write(tensors=None):
        file = tmp_path / "sam.pth"
        torch.save(authors_file() if tensors is None else tensors, file)
        return file

    return write


def _teachers(file, **changes):
    args = {**ENCODER_ARGS, "global_attn_indexes": [1]}
    fields = {"model": "sam/vit_b", "weights": str(file), "input_size": 128, "pool": 1, "args": args, "mask_weight": 5}
    shown = {**fields, **changes}
    return f"teachers=[{shown}]"


@pytest.fixture
def job(photo_config, sam_file):
    """A distillation of a small SAM with mask losses, on a filled cache; overrides may be given."""
    file = sam_file()

    def make(*overrides, **changes):
        config = photo_config(*STUDENT, _teachers(file, **changes), "train.precision=float32", *overrides)
        filled, _ = fill_in_process(plan_cache(config, cache_store(config)))
        return dataclasses.replace(make_job(config, filled), val=None)  # kNN would take most of the time

    return make


def test_the_same_seed_and_step_compare_the_same_masks(job):
    given = job("train.micro_batch=5")
    task = DistillTask(given)
    batch = next(iter(task.batches(0, 0)))
    parts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        total, found = task.loss(task.module.train(), batch, torch.device("cpu"))
        torch.testing.assert_close(total, found["sam/vit_b/patches"] + 5 * found["sam/vit_b/masks"])
        parts.append(float(found["sam/vit_b/masks"]))
        assert 0 <= found["sam/vit_b/mask_iou"] <= 1
    assert parts[0] == parts[1] != parts[2]
    assert [*DistillTask(job(mask_weight=0)).module.state_dict()] == [*task.module.state_dict()]


def test_the_teachers_embedding_is_that_of_sam_in_its_own_scale(job):
    for standardise, codec in (("mean_std", "float16"), ("phi_s", "float16"), ("mean_std", "pca16-int8")):
        given = job(f"loss.standardise={standardise}", f"cache.codec={codec}")
        task = DistillTask(given)
        teacher, target = given.teachers[0].create(), task.module.targets[0]
        teacher.load()
        batch = next(iter(task.batches(0, 0)))
        raw = batch.features[given.teachers[0].id]
        predicted, wanted = target.embeddings(task.module.student(batch.images), raw)
        assert (predicted.shape, wanted.shape) == ((16, DIM, 4, 4), (16, DIM, 8, 8))
        stored = target.standardisers["patches"].inverse(target._decode("patches", raw["patches"], target.stored))
        torch.testing.assert_close(wanted, stored.permute(0, 3, 1, 2))
        if codec == "float16":
            decoded = given.teachers[0].codecs()["patches"].decode(raw["patches"])
            torch.testing.assert_close(wanted, decoded.permute(0, 3, 1, 2), rtol=1e-3, atol=1e-3)


def test_training_makes_the_masks_of_held_out_images_more_like_sams(job):
    """Those of an untrained SAM are alike for all images, and so for any student."""
    settings = "train={epochs: 3, warmup_epochs: 0.5, batch_size: 16, lr: 5.0e-3, ema_decay: 0.9}"
    given = job(settings, "student.input_size=128", "loss.masks.prompts=4", patch_weight=0)
    snapshots = run_training(DistillTask(given), given.config.train)
    last = snapshots[-1].state
    ious = [metrics["val_mask_iou/sam/vit_b"] for _, metrics in last["evaluations"]]
    assert 1 - ious[-1] < 0.9 * (1 - ious[0])
    assert not [name for name in last["model"] if "mask_decoder" in name or "prompt_encoder" in name]
    history = [metrics for snapshot in snapshots for _, metrics in snapshot.history]
    assert {"loss/sam/vit_b/masks", "loss/sam/vit_b/mask_iou", "val_mask_iou/sam/vit_b"} <= {*chain(*history)}
    losses = [metrics["loss/sam/vit_b/masks"] for metrics in history if "loss/sam/vit_b/masks" in metrics]
    assert fmean(losses[-9:]) < 0.7 * fmean(losses[:9])


def test_an_interrupted_training_ends_as_one_that_was_not(job):
    given = job("train.epochs=2", "train.checkpoint_steps=4", "train.micro_batch=6", "loss.masks.prompts=2")
    whole = run_training(DistillTask(given), given.config.train)
    rest = run_training(DistillTask(given), given.config.train, whole[5].state)
    for part in ("model", "ema"):
        assert all(torch.equal(value, rest[-1].state[part][name]) for name, value in whole[-1].state[part].items())
    assert rest[-1].state["evaluations"] == whole[-1].state["evaluations"]


def test_workers_of_two_shares_take_the_step_of_one(job):
    given = job("train.epochs=1", "loss.masks.prompts=2")
    tasks = [DistillTask(given, share, 2) for share in (0, 1)]
    history = []
    train(tasks[0], given.config.train, Worker(shares=2), None, lambda s: history.extend(s.history), tasks[1:])
    losses = [metrics["loss/sam/vit_b/masks"] for _, metrics in history if "loss/sam/vit_b/masks" in metrics]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)


def test_masks_are_compared_at_every_input_size_of_a_step(photo_config, sam_file, tmp_path):
    mix = "resolutions=[{input_size: 128, share: 0.25, teachers: {0: 64}}]"
    config = photo_config(*STUDENT, _teachers(sam_file()), mix, "train.epochs=1", "loss.masks.prompts=2")
    (phase,) = plan_phases(config, cache_store(config))
    assert "at 128 px" in training_plan(phase)
    filled = phase.filled(iter([fill_in_process(plan)[0] for _, plan in phase.caches]))
    given = dataclasses.replace(make_job(config, filled.plan, filled.further), val=None, held_out=None)
    grids = []
    task = DistillTask(given)
    task.module.targets[0].masks.register_forward_pre_hook(
        lambda _, found: grids.append(tuple(part.shape[2] for part in found[:2]))
    )
    run_training(task, given.config.train)
    assert set(grids) == {(4, 8), (8, 4)}  # student and teacher


def test_a_last_phase_may_compare_masks(photo_config, sam_file, tmp_path, monkeypatch):
    config = photo_config(
        *STUDENT,
        _teachers(sam_file(), mask_weight=0),
        "student.keep_heads=true",
        "phases=[{train.epochs: 1}, {train: {epochs: 1}, teachers.0.mask_weight: 5, loss.masks: {prompts: 2}}]",
    )
    phases = plan_phases(config, cache_store(config))
    assert "masks" not in training_plan(phases[0])
    assert training_plan(phases[1])["masks"] == "of sam/vit_b: 2 prompts per image, 2 times each"
    assert phases[0].plan.teachers[0].id == phases[1].plan.teachers[0].id
    filled = [dataclasses.replace(phase, plan=fill_in_process(phase.plan)[0]) for phase in phases]
    monkeypatch.setattr(module, "log_student", lambda *_, **__: "models:/m-0")
    monkeypatch.setattr(module, "fit", InProcess())
    logged = Logged()
    result = distill(filled, logged, tmp_path / "run")
    steps = [step for step, _ in logged.points("loss/sam/vit_b/masks")]
    assert steps
    assert min(steps) > result.steps // 2
    assert (result.student / "heads.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "hog", "weights": "pretrained", "args": {}},
            r"teachers\.0\.mask_weight: .* cannot read features of hog",
        ),
        ({"pool": 2}, r"teachers\.0\.mask_weight: .* averages squares of 2 x 2: set teachers\.0\.pool=1"),
    ],
)
def test_teachers_without_masks_are_refused_with_the_plan(photo_config, sam_file, changes, message):
    config = photo_config(*STUDENT, _teachers(sam_file(), **changes))
    with pytest.raises(UserError, match=message):
        training_plan(*plan_phases(config, cache_store(config)))


def test_a_decoder_that_is_not_there_is_refused_before_anything_is_computed(photo_config, sam_file):
    def check(tensors, **changes):
        config = photo_config(*STUDENT, _teachers(sam_file(tensors), **changes))
        check_decoders(plan_cache(config, cache_store(config)).teachers)

    whole = authors_file()
    encoder = {key: value for key, value in whole.items() if key.startswith("image_encoder.")}
    check(whole)
    check(encoder, mask_weight=0)
    with pytest.raises(UserError, match=r"^teachers\.0\.mask_weight: needs SAM's mask decoder: .* must be a whole SAM"):
        check(encoder)
    with pytest.raises(
        UserError, match=r"^teachers\.0\.mask_weight: the mask decoder in random reads 256 channels, but .* 32"
    ):
        check(whole, weights="random")


def test_decoders_are_loaded_only_for_masks(job):
    assert [*load_decoders(job().teachers)] == [job().teachers[0].id]
    assert load_decoders(job(mask_weight=0).teachers) == {}
    assert [*load_decoders(job(mask_weight={0: 0, 0.5: 1}).teachers)] == [job().teachers[0].id]
