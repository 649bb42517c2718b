import dataclasses
import math
from contextlib import nullcontext
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.cache.config import TeacherConfig
from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.codec import Codec
from pipeline.cache.layout.phi_s import PhiS
from pipeline.cache.layout.projection import fit_projections
from pipeline.cache.layout.stats import Moments
from pipeline.distill.config import LossConfig
from pipeline.distill.distiller import Distiller, feature_map_size
from pipeline.distill.grid import GridRule
from pipeline.distill.loss import image_loss, patch_relation, relation
from pipeline.distill.standardise import MeanStd, Rotation
from pipeline.errors import UserError
from pipeline.student.model import Encoder, Student, create_backbone
from teachers.base import TeacherSpec

SIZE, TOKEN_DIM = 64, 16


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _teacher(name, grid=(4, 4), dim=6, summary=5, variant="", **weights):
    spec = TeacherSpec(
        name=name,
        architecture=f"tests/{name}",
        weights="none",
        input_size=(32, 32),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bilinear",
        summary_dim=summary,
        patch_dim=dim,
        grid=grid,
        licence="none",
    )
    return CachedTeacher(TeacherConfig(model=name, **weights), spec, f"{name}-{variant}id", "float16", "float32")


def _features(teacher, count):
    """Features of unlike scale and offset by channel."""
    return {
        kind: torch.randn(count, *shape) * torch.logspace(-1, 1, shape[-1]) + torch.arange(shape[-1])
        for kind, shape in teacher.shapes.items()
    }


def _stored(teacher, features):
    codecs = teacher.codecs()
    return {kind: torch.from_numpy(codecs[kind].encode(values)) for kind, values in features.items()}


def _stats(teacher):
    return {kind: Moments.of(values) for kind, values in _features(teacher, 200).items()}


def _distiller(*teachers, stats=None, **loss):
    student = Student(Encoder(create_backbone("timm/test_resnet")), TOKEN_DIM)
    stats = stats or {t.id: _stats(t) for t in teachers}
    standardisers = {name: {kind: MeanStd(part) for kind, part in parts.items()} for name, parts in stats.items()}
    codecs = {t.id: t.codecs() for t in teachers}
    return Distiller(student, teachers, standardisers, codecs, SIZE, 32, LossConfig(**loss))


def _batch(teachers, count=4):
    pixels = torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8)
    return pixels, {teacher.id: _stored(teacher, _features(teacher, count)) for teacher in teachers}


class _OneDevice(TorchDispatchMode):
    """Refuses operations between devices, numbers apart."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        assert len({tensor.device for tensor in tensors}) < 2, function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "loss", [{}, {"max_patches": 4}, {"patches": {"patch_relation": 1.0}, "summary": {"cosine": 1.0, "relation": 1.0}}]
)
def test_forward_and_backward_need_nothing_of_another_device(monkeypatch, loss):
    """`meta` stands for a GPU; tests/pretended_gpu.py has values, and no backward."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which `meta` does not know
    teachers = [_teacher("a"), _teacher("b", grid=(2, 2), summary=None)]
    distiller, (pixels, stored) = _distiller(*teachers, **loss).to("meta"), _batch(teachers)
    moved = {name: {kind: rows.to("meta") for kind, rows in kinds.items()} for name, kinds in stored.items()}
    with _OneDevice():
        total, _ = distiller(pixels.to("meta"), moved, step=torch.tensor(0, device="meta"))
        total.backward()
    assert all(weight.grad.is_meta for weight in distiller.parameters())


@pytest.mark.parametrize("loss", [{}, {"patches": {"cosine": 0.9, "smooth_l1": 0.1, "patch_relation": 0.5}}])
def test_a_fixed_batch_is_learnt(loss):
    teachers = [_teacher("a"), _teacher("b", grid=(2, 2), summary=None)]
    distiller, batch = _distiller(*teachers, **loss), _batch(teachers)
    optimizer = torch.optim.Adam(distiller.parameters(), lr=3e-3)
    totals = []
    for _ in range(40):
        total, _ = distiller(*batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.25 * totals[0]


def test_weights_scale_the_total_and_not_the_parts():
    plain = [_teacher("a"), _teacher("b", dim=3, summary=None), _teacher("c")]
    weights = [{"weight": 2.0, "summary_weight": 0.5, "patch_weight": 3.0}, {"weight": 0.25}, {"weight": 0.0}]
    weighted = [
        _teacher("a", **weights[0]),
        _teacher("b", dim=3, summary=None, **weights[1]),
        _teacher("c", **weights[2]),
    ]
    batch, stats = _batch(plain), {t.id: _stats(t) for t in plain}
    one, other = _distiller(*plain, stats=stats), _distiller(*weighted, stats=stats)
    other.load_state_dict(one.state_dict())
    (total, parts), (weighted_total, same_parts) = one(*batch), other(*batch)
    torch.testing.assert_close(same_parts, parts)
    torch.testing.assert_close(total, sum(parts.values()))
    expected = 6 * parts["a/patches"] + 1 * parts["a/summary"] + 0.25 * parts["b/patches"]
    torch.testing.assert_close(weighted_total, expected)


def test_a_teacher_without_summary_adds_none():
    teacher = _teacher("a", summary=None)
    distiller = _distiller(teacher)
    _, parts = distiller(*_batch([teacher]))
    assert list(parts) == ["a/patches"]
    assert not [name for name in distiller.state_dict() if "summary" in name]


def test_parts_carry_the_teachers_names_or_ids_where_names_meet():
    teachers = [_teacher("a", variant="x"), _teacher("a", variant="y"), _teacher("b", summary=None)]
    _, parts = _distiller(*teachers)(*_batch(teachers))
    assert sorted(parts) == ["a-xid/patches", "a-xid/summary", "a-yid/patches", "a-yid/summary", "b/patches"]
    assert not any(part.requires_grad for part in parts.values())


def test_statistics_are_frozen_and_kept_with_the_weights():
    teacher = _teacher("a")
    stats = _stats(teacher)
    distiller = _distiller(teacher, stats={teacher.id: stats})
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1.0)
    distiller(*_batch([teacher]))[0].backward()
    optimizer.step()
    for kind in ("summary", "patches"):
        for name in ("mean", "std"):
            kept = distiller.state_dict()[f"targets.0.standardisers.{kind}.{name}"]
            torch.testing.assert_close(kept, torch.from_numpy(getattr(stats[kind], name)).float(), rtol=0, atol=0)
    assert not [name for name, _ in distiller.named_parameters() if name.endswith((".mean", ".std"))]


def test_the_loss_compares_heads_with_standardised_targets_on_the_common_grid():
    teacher = _teacher("a", grid=(8, 8))
    stats = _stats(teacher)
    distiller = _distiller(teacher, stats={teacher.id: stats}).eval()
    unit = {kind: torch.randn(4, *shape) for kind, shape in teacher.shapes.items()}
    raw = {
        kind: values * torch.from_numpy(stats[kind].std).float() + torch.from_numpy(stats[kind].mean).float()
        for kind, values in unit.items()
    }
    pixels, _ = _batch([teacher])
    with torch.no_grad():
        _, parts = distiller(pixels, {teacher.id: _stored(teacher, raw)})
        output, heads = distiller.student(pixels), distiller.targets[0].heads
        assert output.feature_map.shape[-2:] == (4, 4)
        pooled = F.avg_pool2d(unit["patches"].permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        weights = {"cosine": 0.9, "smooth_l1": 0.1}
        patches = image_loss(weights, heads["patches"](output.feature_map.permute(0, 2, 3, 1)), pooled, 0.07).mean()
        summary = image_loss({"cosine": 1}, heads["summary"](output.summary), unit["summary"], 0.07).mean()
    torch.testing.assert_close(parts["a/patches"], patches, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(parts["a/summary"], summary, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (2, 2), (3, 3)])
def test_every_teacher_meets_the_student_by_the_declared_rule(grid):
    teacher = _teacher("a", grid=grid)
    distiller = _distiller(teacher)
    assert distiller.targets[0].stored.rule == GridRule((4, 4), grid)
    total, _ = distiller(*_batch([teacher]))
    assert torch.isfinite(total)


def test_every_head_and_the_whole_student_get_gradients():
    teachers = [_teacher("a"), _teacher("b", grid=(3, 3), summary=None)]
    distiller = _distiller(*teachers)
    distiller(*_batch(teachers))[0].backward()
    assert [name for name, parameter in distiller.named_parameters() if parameter.grad is None] == []
    assert all(
        layer.weight.grad.any()
        for target in distiller.targets
        for head in target.heads.values()
        for layer in head[1::3]
    )


def test_the_loss_is_float32_under_autocast():
    teacher = _teacher("a")
    distiller, batch = _distiller(teacher, summary={"cosine": 1, "relation": 1}), _batch([teacher])
    distiller.targets[0].push_summaries(_batch([teacher])[1]["a-id"]["summary"])  # something to be related to
    same = deepcopy(distiller)
    with torch.autocast("cpu", torch.bfloat16):
        total, parts = distiller(*batch)
    assert {value.dtype for value in (total, *parts.values())} == {torch.float32}
    torch.testing.assert_close(total, same(*batch)[0], rtol=0.05, atol=0.05)


def test_the_token_grid_is_found_without_touching_the_student():
    student = Student(Encoder(create_backbone("timm/test_resnet")), TOKEN_DIM)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    assert feature_map_size(student, 96) == (6, 6)
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("name", "args"),
    [("timm/vit_tiny_patch16_224", {"depth": 1}), ("timm/test_resnet", {"in_chans": 4})],
)
def test_a_student_that_does_not_take_the_images_is_named(name, args):
    student = Student(Encoder(create_backbone(name, args)), TOKEN_DIM)
    with pytest.raises(UserError, match=r"student\.input_size: the student takes no 32 x 32 images: ") as error:
        feature_map_size(student, 32)
    assert "\n" not in str(error.value)


def test_a_dropped_teacher_costs_nothing_and_all_images_weigh_the_same():
    teachers = [_teacher("a", weight=2.0), _teacher("b", dim=3, summary=None), _teacher("c", summary_weight=0.5)]
    batch, draws = _batch(teachers, count=16), torch.rand(16, 3)
    distiller = _distiller(*teachers, drop=0.5).eval()
    with torch.no_grad():
        total, parts = distiller(*batch, draws=draws)
        output = distiller.student(batch[0])
        losses = [t.losses(output, batch[1][t.teacher.id]) for t in distiller.targets]
    per_teacher = np.stack(
        [
            2 * (losses[0]["summary"] + losses[0]["patches"]).double().numpy(),
            losses[1]["patches"].double().numpy(),
            (0.5 * losses[2]["summary"] + losses[2]["patches"]).double().numpy(),
        ],
        axis=1,
    )
    weights, expected, kept_by = np.array([4.0, 1.0, 1.5]), 0.0, np.zeros(3)
    for row, image in enumerate(per_teacher):
        kept = (draws[row].numpy() >= 0.5) | (np.arange(3) == image.argmax())
        expected += (image[kept].sum() * weights.sum() / weights[kept].sum()) / 16
        kept_by += kept / 16
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert [float(parts[f"{name}/kept"]) for name in "abc"] == pytest.approx(kept_by.tolist())
    assert kept_by.min() < 1


def test_nothing_is_dropped_at_probability_nought():
    teachers = [_teacher("a", weight=2.0), _teacher("b")]
    batch = _batch(teachers)
    distiller = _distiller(*teachers).eval()
    torch.testing.assert_close(distiller(*batch, draws=torch.rand(4, 2))[0], distiller(*batch)[0])


def test_weights_of_now_replace_those_of_the_start():
    teachers = [_teacher("a"), _teacher("b", summary=None)]
    batch = _batch(teachers)
    distiller = _distiller(*teachers).eval()
    total, parts = distiller(*batch, weights=torch.tensor([[0.5, 3.0, 0.0], [0.0, 0.25, 0.0]]))
    torch.testing.assert_close(total, 0.5 * parts["a/summary"] + 3 * parts["a/patches"] + 0.25 * parts["b/patches"])


def test_relation_compares_with_the_targets_of_the_steps_before():
    teachers = [_teacher("a", summary_weight=0.5), _teacher("b", summary=None)]
    distiller = _distiller(*teachers, summary={"cosine": 1, "relation": 3}, queue=6, temperature=0.2).train()
    assert distiller.targets[1].queue is None
    first, second = _batch(teachers), _batch(teachers)
    total, parts = distiller(*first)
    assert float(parts["a/relation"]) == 0
    (queued,) = distiller.targets_with_queue()
    assert queued is distiller.targets[0]
    queued.push_summaries(first[1]["a-id"]["summary"])
    entries = distiller.targets[0].queue.entries()
    target = distiller.targets[0].targets(first[1]["a-id"])["summary"]
    torch.testing.assert_close(entries[0][:4], F.normalize(target, dim=-1))
    assert entries[1].tolist() == [True] * 4 + [False] * 2
    seen = []
    distiller.targets[0].heads["summary"].register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    total, parts = distiller(*second)
    expected = relation(seen[0], distiller.targets[0].targets(second[1]["a-id"])["summary"], *entries, 0.2).mean()
    torch.testing.assert_close(parts["a/relation"], expected)
    assert float(expected) > 0
    others = 0.5 * parts["a/summary"] + parts["a/patches"] + parts["b/patches"]
    torch.testing.assert_close(total, others + 0.5 * 3 * parts["a/relation"])
    total.backward()
    assert int(distiller.targets[0].queue.count) == 4
    assert "targets.0.queue.rows" in distiller.state_dict()


def test_evaluation_has_no_relation_and_leaves_the_queue_alone():
    teacher = _teacher("a")
    distiller = _distiller(teacher, summary={"cosine": 1, "relation": 3}).eval()
    _, parts = distiller(*_batch([teacher]))
    assert sorted(parts) == ["a/patches", "a/summary"]
    assert int(distiller.targets[0].queue.count) == 0


def test_phi_s_gives_the_same_targets_whether_features_are_projected_or_not():
    teacher = _teacher("a", grid=(8, 8))
    features = _features(teacher, 50)
    moments = {kind: Moments.of(values, outer=True) for kind, values in features.items()}
    student = Student(Encoder(create_backbone("timm/test_resnet")), TOKEN_DIM)
    targets = []
    for codec in ("float32", "pca6-float32"):  # all six channels: nothing is lost
        cached = dataclasses.replace(teacher, codec=codec)
        codecs = cached.codecs(fit_projections(Codec.parse(codec), features) if "pca" in codec else None)
        standardisers = {kind: Rotation(PhiS.of(part)) for kind, part in moments.items()}
        one = Distiller(student, [cached], {cached.id: standardisers}, {cached.id: codecs}, SIZE, 32, LossConfig())
        raw = {kind: torch.from_numpy(codecs[kind].encode(values)) for kind, values in features.items()}
        targets.append(one.targets[0].targets(raw))
    assert targets[0]["patches"].shape == (50, 4, 4, 6)
    for kind in ("summary", "patches"):
        torch.testing.assert_close(targets[1][kind], targets[0][kind], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(targets[0]["summary"].std(0), torch.full((6 - 1,), 1.0), atol=0.05, rtol=0)


def test_a_step_on_a_part_of_the_patches_reads_no_number_of_the_device():
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function == torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    teachers = [_teacher("a"), _teacher("b", grid=(2, 2), summary=None)]
    distiller, batch = _distiller(*teachers, max_patches=2, drop=0.5), _batch(teachers)
    with Reads() as reads:
        torch.arange(3)[torch.tensor(1)]
        assert reads.count == 1
        distiller(*batch, draws=torch.rand(4, 2), step=torch.tensor(5))[0].backward()
    assert reads.count == 1


def test_patch_relation_compares_the_patches_of_the_step_at_the_same_positions():
    teacher = _teacher("a", grid=(8, 8))
    distiller = _distiller(teacher, patches={"patch_relation": 2.0}, max_patches=8, temperature=0.3).eval()
    pixels, stored = _batch([teacher])
    with torch.no_grad():
        _, parts = distiller(pixels, stored, step=torch.tensor(3))
        target, positions = distiller.targets[0], distiller.targets[0].stored.patch_subsets[3 % 2]
        predicted = target.predict(distiller.student(pixels))["patches"].flatten(1, 2)[:, positions]
        wanted = target.targets(stored["a-id"])["patches"].flatten(1, 2)[:, positions]
        expected = 2 * patch_relation(predicted, wanted, 0.3).mean()
    assert predicted.shape == (4, 8, 6)
    torch.testing.assert_close(parts["a/patches"], expected)


@pytest.mark.parametrize(
    "grid", [(4, 4), (8, 8), (2, 2), (3, 3)]
)  # equal, averaged, and the student's averaged, resized
@pytest.mark.parametrize("codec", ["float32", "int8", "int8-zstd", "pca4-float16"])
def test_the_turns_of_a_batch_compare_every_patch_and_together_are_the_whole_loss(grid, codec):
    teacher = dataclasses.replace(_teacher("a", grid=grid), codec=codec)
    features = _features(teacher, 40)
    codecs = teacher.codecs(fit_projections(Codec.parse(codec), features) if "pca" in codec else None)
    standardisers = {kind: MeanStd(Moments.of(values)) for kind, values in features.items()}
    student = Student(Encoder(create_backbone("timm/test_resnet")), TOKEN_DIM)
    places = math.prod(GridRule((4, 4), grid).grid)
    loss = LossConfig(max_patches=-(-places // 2))
    distiller = Distiller(student, [teacher], {"a-id": standardisers}, {"a-id": codecs}, SIZE, 32, loss).eval()
    raw = {kind: torch.from_numpy(codecs[kind].encode(values)) for kind, values in features.items()}
    pixels = torch.randint(0, 256, (40, 3, SIZE, SIZE), dtype=torch.uint8)
    seen = []
    distiller.targets[0].heads["patches"].register_forward_hook(lambda _, given, __: seen.append(given[0].shape))
    with torch.no_grad():
        whole, *halves = (
            distiller(pixels, {"a-id": raw}, step=step)[1] for step in (None, torch.tensor(6), torch.tensor(7))
        )
    assert [shape[1] for shape in seen[1:]] == [-(-places // 2)] * 2
    assert {float(half["a/summary"]) for half in halves} == {float(whole["a/summary"])}
    assert float(halves[0]["a/patches"]) != float(halves[1]["a/patches"])
    if places % 2 == 0:
        together = torch.stack([half["a/patches"] for half in halves]).mean()
        torch.testing.assert_close(together, whole["a/patches"])


@pytest.mark.slow
@pytest.mark.parametrize("loss", [{"drop": 0.5}, {"summary": {"cosine": 1.0, "relation": 1.0}, "max_patches": 4}])
def test_a_step_is_captured_as_one_graph_with_the_gradients_of_eager(loss):
    torch.compiler.reset()
    teachers = [_teacher("a"), _teacher("b", (2, 2))]
    eager = _distiller(*teachers, **loss).train()
    compiled = deepcopy(eager)
    compiled.compile(backend="aot_eager", fullgraph=True)
    pixels, features = _batch(teachers)
    for target in (*eager.targets_with_queue(), *compiled.targets_with_queue()):
        target.push_summaries(features[target.teacher.id]["summary"].roll(1, 0))
    draws = torch.rand(len(pixels), len(teachers)) if "drop" in loss else None
    gradients = []
    for module in (eager, compiled):
        total, parts = module(pixels, features, None, draws, torch.tensor(3))
        total.backward()
        gradients.append([total.detach(), *parts.values(), *(parameter.grad for parameter in module.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)
