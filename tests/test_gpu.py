"""What differs on a GPU, on one; skipped where there is none. Needs neither Ray nor MLflow."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.synthetic_cache import jpegs, write_dataset, write_features
from benchmarks.train_step import DistillStep, make_distiller, make_student, train_config
from benchmarks.train_step import _parse as step_options
from pipeline.cache.config import TeacherConfig
from pipeline.cache.fill.extract import CONCURRENT_SHARDS, Extract
from pipeline.cache.fill.placement import measure
from pipeline.cache.layout.cached_teacher import CachedTeacher, make_teacher
from pipeline.cache.layout.codec import Codec
from pipeline.cache.layout.keys import teacher_id
from pipeline.cache.layout.phi_s import PhiS
from pipeline.cache.layout.projection import fit_projections
from pipeline.cache.layout.shards import ROW_GROUP_SIZE
from pipeline.cache.layout.stats import PIECE, Moments, MomentSums
from pipeline.cache.layout.target import fidelity
from pipeline.cache.read.reader import CacheReader
from pipeline.distill.augment import augment
from pipeline.distill.config import AugmentConfig, LossConfig
from pipeline.distill.distiller import Distiller
from pipeline.distill.standardise import MeanStd, Rotation
from pipeline.imaging.decoder_pool import CropTask, decode_tasks
from pipeline.imaging.geometry import FULL, View
from pipeline.imaging.gpu_decode import check_nvjpeg, decode_on_device
from pipeline.training.config import TrainConfig
from pipeline.training.loop import prefetch_to_device, train
from pipeline.training.meter import StepTimer
from pipeline.training.step import Stepper
from pipeline.training.task import list_tensors
from pipeline.training.worker import Worker
from tests.training.tiny_task import TinyTask

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    """float32 is float32: cuDNN's convolutions use TF32 unless told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)


@contextmanager
def _never_waiting():
    """What waits for the device within is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "name", ["float32", "float16", "bfloat16", "int8", "int8-zstd", "pca8-int8-zstd", "pca8-float16"]
)
def test_codecs_store_and_read_the_same_as_on_a_cpu(name):
    features = torch.randn(64, 5, 7, 24) * torch.logspace(-1, 1, 24)
    codec = Codec.parse(name)
    fitted = fit_projections(codec, {"patches": features}) if codec.pca else {}
    here, there = (codec.build({"patches": features.shape[1:]}, fitted)["patches"].to(where) for where in ("cpu", CUDA))
    rows = torch.from_numpy(here.encode(features))
    torch.testing.assert_close(there.decode(rows.to(CUDA)).cpu(), here.decode(rows), rtol=1e-5, atol=1e-4)
    stored = torch.from_numpy(there.encode(features.to(CUDA)))
    step = features.abs().amax() / 127 if codec.scalar == "int8" else 0
    torch.testing.assert_close(here.decode(stored), here.decode(rows), rtol=1e-2, atol=1e-4 + float(step))
    std, mean = torch.std_mean(features.flatten(0, -2).double(), dim=0)
    likeness = fidelity(features.to(CUDA), there.decode(stored.to(CUDA)), mean.to(CUDA), std.to(CUDA))
    assert likeness == pytest.approx(fidelity(features, here.decode(rows), mean, std), rel=1e-2)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_sam_says_what_it_says_on_a_cpu_and_keeps_no_table_of_biases(dtype, error):
    args = {"embed_dim": 128, "depth": 2, "num_heads": 2, "global_attn_indexes": (1,)}
    here, there = (make_teacher(TeacherConfig(model="sam", weights="random", args=args)) for _ in range(2))
    here.load()
    there.load(CUDA, dtype)
    pixels = torch.randint(0, 256, (1, 3, 1024, 1024), dtype=torch.uint8)
    torch.cuda.reset_peak_memory_stats()
    patches = there.encode(pixels).patches.cpu()
    expected = here.encode(pixels).patches
    assert (patches - expected).norm() < error * expected.norm()
    table = 2 * 4096**2 * dtype.itemsize
    assert torch.cuda.max_memory_allocated() < 2 * table


@pytest.mark.parametrize("model", ["dinov2/vits14", "clip/ViT-B-32"])
def test_a_teacher_never_waits_for_the_device(model):
    teacher = make_teacher(TeacherConfig(model=model, weights="random"))
    teacher.load(CUDA, torch.bfloat16)
    pixels = torch.randint(0, 256, (2, 3, *teacher.spec.input_size), dtype=torch.uint8, device=CUDA)
    teacher.encode(pixels)  # what is made once may be waited for
    with _never_waiting():
        patches = teacher.encode(pixels).patches
    assert torch.isfinite(patches).all()


@pytest.mark.parametrize("outer", [False, True])
def test_statistics_are_those_of_a_cpu(outer):
    features = torch.randn(PIECE // 64 + 3, 64, 12) + torch.arange(12) * 100
    here, there = Moments.of(features, outer), Moments.of(features.to(CUDA), outer)
    assert here.count == there.count
    np.testing.assert_allclose(there.mean, here.mean, rtol=1e-12)
    np.testing.assert_allclose(there.scatter, here.scatter, rtol=1e-9, atol=1e-6)


def test_summing_up_statistics_never_waits_for_the_device():
    sums, features = MomentSums(), torch.randn(PIECE // 64 + 3, 64, 12, device=CUDA)
    with _never_waiting():
        sums.add(features)
        sums.add(features)
    assert sums.moments().count == 2 * features[..., 0].numel()


def _teacher(model, codec="float32", precision="float32", **config):
    made = make_teacher(TeacherConfig(model=model, weights="random", **config))
    made.load()
    name = teacher_id(made.spec, codec, precision)
    return CachedTeacher(
        TeacherConfig(model=model, weights="random", **config), made.spec, name, codec, precision, made.weights_sha256
    )


def _stored(part, teacher):
    folder = part.teacher(teacher.id)
    codecs = teacher.codecs()
    columns = {kind: [] for kind in codecs}
    for record in folder.records().values():
        table = folder.read(record)
        for kind in columns:
            rows = np.frombuffer(b"".join(table[kind].to_pylist()), np.uint8).reshape(len(table), -1)
            columns[kind].append(codecs[kind].decode(torch.from_numpy(rows.copy())))
        folder.unlist(record.shard)
    return {kind: torch.cat(parts) for kind, parts in columns.items()}


def test_the_sample_of_a_projection_joins_the_rest_of_its_shard(tmp_path):
    count = 8 * ROW_GROUP_SIZE  # of which the sample is six row groups
    (part,) = write_dataset(str(tmp_path), count, jpegs(72), count).parts
    teacher = _teacher("dinov2/vits14", "pca8-int8", input_size=56)
    extract = Extract({part.key: part}, [(part.key, n) for n in range(part.shards)], [teacher], "cuda", 4, 64)
    answer = extract({"part": part.key, "shard": 0})
    assert (answer["computed"], answer["error"]) == (1, "")
    folder = part.teacher(teacher.id)
    (moments,) = folder.moments(folder.records().values())
    assert {kind: found.count for kind, found in moments.items()} == {"summary": count, "patches": 16 * count}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_shards_worked_on_at_once_hold_the_features_of_each_alone(tmp_path, precision):
    (part,) = write_dataset(str(tmp_path), 200, jpegs(72), 20).parts
    teacher = _teacher("dinov2/vits14", input_size=56, precision=precision)

    def features(device, at_once):
        extract = Extract({part.key: part}, [(part.key, n) for n in range(part.shards)], [teacher], device, 4, 8)
        rows = [{"part": part.key, "shard": shard} for shard in range(part.shards)]
        with ThreadPoolExecutor(at_once) as pool:
            assert all(row["computed"] == 1 for row in pool.map(extract, rows))
        return _stored(part, teacher)

    alone, at_once = features("cuda", 1), features("cuda", CONCURRENT_SHARDS["cuda"])
    for kind, values in alone.items():
        torch.testing.assert_close(at_once[kind], values)
    if precision == "float32":
        for kind, values in features("cpu", 1).items():
            torch.testing.assert_close(alone[kind], values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("channels", [3, 4])
def test_pixels_of_nvjpeg_on_the_gpu_are_near_those_of_a_cpu(channels):
    files, views = jpegs(256), (FULL, View((0.1, 0.2, 0.7, 0.9), flip=True))
    found, expected = (np.zeros((len(files), len(views), channels, 96, 112), np.uint8) for _ in range(2))
    for pixels, decode in ((found, partial(decode_on_device, "cuda")), (expected, decode_tasks)):
        crops = [[CropTask(view, "bicubic", row) for view, row in zip(views, rows, strict=True)] for rows in pixels]
        decode(list(zip(files, crops, strict=True)))
    apart = np.abs(found.astype(int) - expected)
    assert apart.mean() < 2  # nvJPEG does not interpolate the colour planes
    assert np.percentile(apart, 99) <= 16
    assert np.array_equal(found[:, :, 3:], expected[:, :, 3:])


def test_shards_of_images_decoded_by_the_gpu_are_near_those_of_a_cpu(tmp_path):
    (part,) = write_dataset(str(tmp_path), 40, jpegs(256), 20).parts
    by_cpu = _teacher("dinov2/vits14", input_size=56)
    name = teacher_id(by_cpu.spec, by_cpu.codec, by_cpu.precision, decoder="nvjpeg")
    teachers = [by_cpu, replace(by_cpu, id=name, decoder="nvjpeg")]
    stored = []
    for teacher in teachers:
        extract = Extract({part.key: part}, [], [teacher], "cuda", 4, 8)
        answers = [extract({"part": part.key, "shard": shard}) for shard in range(part.shards)]
        assert [answer["error"] for answer in answers] == [""] * part.shards
        stored.append(_stored(part, teacher)["patches"])
    assert not torch.equal(*stored)
    assert torch.nn.functional.cosine_similarity(*stored, dim=-1).mean() > 0.9
    assert check_nvjpeg().startswith(torch.cuda.get_device_name())


def test_what_an_actor_takes_is_measured(tmp_path):
    (part,) = write_dataset(str(tmp_path), 40, jpegs(72), 20).parts
    teacher = _teacher("dinov2/vits14", input_size=56)
    measured = measure({part.key: part}, [(part.key, 0)], [teacher], 8, {"part": part.key, "shard": 0}, "cuda")
    assert 22e6 * 4 < measured.memory < measured.total == torch.cuda.mem_get_info()[1]
    assert measured.device_s > 0


@pytest.fixture
def cached(tmp_path):
    """Options, a small dataset with three teachers, and its reader."""
    options = step_options(["--student", "regla_t", "--image-size", "64", "--head-dim", "32", "--codec", "float16"])
    dataset = write_dataset(str(tmp_path), 64, jpegs(64), 32)
    teachers = [
        write_features(dataset, model, options.codec) for model in ("dinov2/vits14", "clip/ViT-B-16", "sam/vit_b")
    ]
    return options, teachers, CacheReader(dataset, teachers, image_size=64, batch_size=16)


def _losses(options, teachers, batches, device, precision):
    config = train_config(options).model_copy(update={"precision": precision})
    stepper = Stepper(DistillStep(make_distiller(options, teachers)), config, Worker(device=device), [100])
    stepper.wrapped.train()
    steps = enumerate(prefetch_to_device(iter(batches), device))
    return torch.tensor([float(stepper([batch], step, StepTimer(device))["loss"]) for step, batch in steps])


@pytest.mark.parametrize(("precision", "bound"), [("float32", 2e-3), ("bfloat16", 3e-2), ("float16", 2e-2)])
def test_losses_of_steps_are_those_of_a_cpu(cached, precision, bound):
    options, teachers, reader = cached
    batches = [*reader.batches(0), *reader.batches(1)]
    here = _losses(options, teachers, batches, torch.device("cpu"), "float32")
    there = _losses(options, teachers, batches, CUDA, precision)
    torch.testing.assert_close(there, here, rtol=bound, atol=0)


@pytest.mark.parametrize("standardise", [MeanStd, lambda moments: Rotation(PhiS.of(moments))])
@pytest.mark.parametrize(
    ("codec", "loss"), [("float16", {"summary": {"relation": 1.0}}), ("pca8-int8-zstd", {"max_patches": 8})]
)
def test_the_loss_of_a_batch_is_that_of_a_cpu(codec, loss, standardise):
    teacher = _teacher("dinov2/vits14", codec, input_size=56)
    drawn = {kind: torch.randn(64, *shape) * 3 + 1 for kind, shape in teacher.shapes.items()}
    codecs = teacher.codecs(fit_projections(Codec.parse(codec), drawn))
    standardisers = {kind: standardise(Moments.of(values, outer=True)) for kind, values in drawn.items()}
    here = Distiller(
        make_student("regla_t"),
        [teacher],
        {teacher.id: standardisers},
        {teacher.id: codecs},
        64,
        32,
        LossConfig(**loss),
    )
    there = copy.deepcopy(here).to(CUDA)
    pixels = torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8)
    stored = {kind: torch.from_numpy(codecs[kind].encode(values)) for kind, values in drawn.items()}
    with torch.no_grad():
        for step in torch.arange(3):
            expected, parts = here(pixels, {teacher.id: stored}, step=step)
            for target in here.targets_with_queue():
                target.push_summaries(stored["summary"])
            moved = pixels.to(CUDA), {teacher.id: {kind: rows.to(CUDA) for kind, rows in stored.items()}}
            moved_step = step.to(CUDA)
            with _never_waiting() if step else nullcontext():  # what is made once may be waited for
                found, found_parts = there(*moved, step=moved_step)
                for target in there.targets_with_queue():
                    target.push_summaries(moved[1][teacher.id]["summary"])
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=0)
            assert {name: part.item() for name, part in found_parts.items()} == pytest.approx(
                {name: part.item() for name, part in parts.items()}, rel=1e-3, abs=1e-5
            )


class _Augmented(DistillStep):
    def loss(self, module, batch, device):
        images = augment(batch.images, AugmentConfig(jitter=0.8, grey=0.2, blur=0.5))
        return super().loss(module, replace(batch, images=images), device)


def test_a_step_never_waits_for_the_device(cached):
    options, teachers, reader = cached
    options.max_patches = 8  # of 16: the step decides which
    stepper = Stepper(_Augmented(make_distiller(options, teachers)), train_config(options), Worker(device=CUDA), [100])
    stepper.wrapped.train()
    batches, clock = list(prefetch_to_device(reader.batches(0), CUDA)), StepTimer(CUDA)
    stepper(batches[:1], 0, clock)  # what is made once may be waited for
    with _never_waiting():
        losses = [stepper([batch], step, clock)["loss"] for step, batch in enumerate(batches[1:], 1)]
    assert torch.isfinite(torch.stack(losses)).all()


def test_batches_come_to_the_device_in_order_and_whole(cached):
    _, _, reader = cached
    pairs = zip(reader.batches(0), prefetch_to_device(reader.batches(0), CUDA), strict=True)
    for number, (here, there) in enumerate(pairs):
        assert there.keys == here.keys
        assert there.position == (0, number)
        for a, b in zip(list_tensors(here), list_tensors(there), strict=True):
            assert b.is_cuda
            assert torch.equal(a, b.cpu())
    assert number == 3


class _OnGPU(TinyTask):
    @torch.no_grad()
    def evaluate(self, averaged, raw):
        return {"score": float(averaged(torch.ones(2, 3, 8, 8, device=CUDA)).abs().mean())}


def test_a_resumed_run_has_the_losses_of_the_uninterrupted_one():
    config = TrainConfig(
        epochs=3, batch_size=2, lr=0.05, ema_decay=0.9, precision="bfloat16", workers=1, checkpoint_steps=4
    )

    def run(state=None):
        snapshots = []

        def keep(shot):
            snapshots.append(replace(shot, state=copy.deepcopy(shot.state)))

        train(_OnGPU(), config, Worker(device=CUDA), state, keep)
        losses = {step: metrics["loss"] for shot in snapshots for step, metrics in shot.history if "loss" in metrics}
        return snapshots, losses

    snapshots, whole = run()
    middle = next(shot for shot in snapshots if shot.name == "checkpoint-0001-000002")
    _, rest = run(middle.state)
    assert rest == {step: loss for step, loss in whole.items() if step > 8}
