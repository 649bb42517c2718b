"""Ablation: the contribution of each part of the distillation, with equal student, samples and seeds.

    python benchmarks/proof.py recipes/photos.yaml data.train=train.parquet data.val=test.parquet data.name=cifar \
        teachers.1.weights=mobilenetv2.safetensors train.epochs=6 --seeds 0 1 2

Students of one seed start with equal weights and see equally many samples. Ray fills the caches, which the arms share; training
runs in this process, on its GPU if it has one. Without Ray (a bare GPU host) it fills the caches too. Scores are kNN and a linear
probe on frozen features of the averaged weights, and with `--masks` a linear segmentation probe on other images: mIoU, and the
accuracy of all pixels (aacc). Prints means and standard deviations over the seeds, and each arm's difference to `--base` with
its standard error over pairs of equal seed; then one line of JSON.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.results import mean_and_deviation, measure_once, study_parser
from benchmarks.segmentation_probe import segmentation_probe
from pipeline.cache.config import PhotometricConfig, ResolutionConfig, TeacherConfig
from pipeline.cache.fill.build import build_cache
from pipeline.cache.fill.plan import CachePlan, plan_cache
from pipeline.cache.layout.cached_teacher import teacher_labels
from pipeline.cache.layout.dataset import Dataset
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.distill.phases import PhaseState, transfer_weights
from pipeline.distill.plan import make_job
from pipeline.distill.task import DistillTask
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.evaluate.config import EvaluateConfig
from pipeline.evaluate.knn import embed, knn_accuracy
from pipeline.evaluate.linear import LinearHeads, accuracies, shuffled, train_heads
from pipeline.runs.folder import cache_store, work_folder
from pipeline.runtime.ray_session import connect
from pipeline.student.config import NamedBackboneConfig
from pipeline.student.model import Encoder, save_encoder
from pipeline.training.checkpoint import Snapshot
from pipeline.training.loop import train
from pipeline.training.task import Task
from pipeline.training.worker import Worker

MAPS_SIZE = 2
"""Side of the images of the segmentation probe, over that of training: a map of 64 px has 4x4 positions only."""

Arm = Callable[[DistillJobConfig], DistillJobConfig]
SCORES = ("knn", "linear", "miou", "aacc")


def changed(**sections: Any) -> Arm:
    """An arm that changes some fields of these sections of the recipe."""

    def change(config: DistillJobConfig) -> DistillJobConfig:
        return config.model_copy(
            update={name: getattr(config, name).model_copy(update=fields) for name, fields in sections.items()}
        )

    return change


def only(*numbers: int) -> Arm:
    """The recipe with some of its teachers."""
    return lambda config: config.model_copy(update={"teachers": [config.teachers[number] for number in numbers]})


def last_asked_about(share: float) -> Arm:
    """The last teacher is asked about a share of the images only."""

    def change(config: DistillJobConfig) -> DistillJobConfig:
        *others, last = config.teachers
        return config.model_copy(update={"teachers": [*others, last.model_copy(update={"share": share})]})

    return change


def last_joins_late(config: DistillJobConfig) -> DistillJobConfig:
    """The last teacher joins in the last third of the epochs, which is a phase of its own."""
    late = config.train.epochs // 3
    teachers = [teacher.model_dump() for teacher in config.teachers[:-1]]
    first = {"train": {"epochs": config.train.epochs - late}, "teachers": teachers}
    return config.model_copy(update={"phases": [first, {"train": {"epochs": late}}]})


def crops(count: int, **views: Any) -> Arm:
    """Cached crops, with other changes of the views, and fewer epochs, so that the number of samples stays the same."""

    def change(config: DistillJobConfig) -> DistillJobConfig:
        epochs, warmup = config.train.epochs, config.train.warmup_epochs
        if epochs % count:
            raise SystemExit(f"train.epochs={epochs} is not divisible by {count} crops per image")
        train = {"epochs": epochs // count, "warmup_epochs": warmup / count}
        return changed(views={"crops": count, **views}, train=train)(config)

    return change


def patch_relation(weight: float) -> Arm:
    """The relation of an image's patches beside the usual losses of patches."""
    return changed(loss={"patches": {"cosine": 0.9, "smooth_l1": 0.1, "patch_relation": weight}})


def mixed(share: float) -> Arm:
    """A share of the samples at one and a half times the input size; the first teacher (HOG) sees images of that size too."""

    def change(config: DistillJobConfig) -> DistillJobConfig:
        side = config.student.input_size * 3 // 2
        sizes = [ResolutionConfig(input_size=side, share=share, teachers={0: side})]
        return config.model_copy(update={"resolutions": sizes})

    return change


def together(*arms: Arm) -> Arm:
    """The changes of several arms."""
    return lambda config: reduce(lambda changing, arm: arm(changing), arms, config)


def proxy(name: str) -> Arm:
    """A larger student, distilled by the same recipe, as the only teacher (EUPE's proxy)."""

    def change(config: DistillJobConfig) -> DistillJobConfig:
        larger = changed(student={"name": name})(config)
        folder = _kept(larger)
        if not folder.exists():
            _distilled(larger)
        teacher = TeacherConfig(
            model="student", weights=str(folder.resolve()), input_size=2 * config.student.input_size
        )
        return config.model_copy(update={"teachers": [teacher]})

    return change


ARMS: dict[str, Arm] = {
    "labels": changed(),
    "teacher-0": only(0),
    "teacher-1": only(1),
    "teacher-2": only(2),
    "first-two": only(0, 1),
    "first-last": only(0, 2),
    "last-two": only(1, 2),
    "all": changed(),
    "last-0.25": last_asked_about(0.25),
    "last-late": last_joins_late,
    "drop": changed(loss={"drop": 0.5}),
    "phi_s": changed(loss={"standardise": "phi_s"}),
    **{f"patch-relation-{weight:g}": patch_relation(weight) for weight in (0.1, 0.5, 1.0)},
    "phi_s-mse": changed(loss={"standardise": "phi_s", "patches": {"mse": 1.0}}),
    "augment": changed(augment={"jitter": 0.8, "grey": 0.2}),
    "no-relation": changed(loss={"summary": {"cosine": 1.0}}),
    "relation-0.5": changed(loss={"summary": {"cosine": 1.0, "relation": 0.5}}),
    "angle": changed(loss={"summary": {"benchmarks.losses:angle": 1.0, "relation": 0.1}}),
    "queue-8192": changed(loss={"queue": 8192}),
    "mixed-0.25": mixed(0.25),
    "proxy-s": proxy("regla_s"),
    "proxy-m": proxy("regla_m"),
    "crops-1": crops(1),
    "crops-2": crops(2),
    "crops-8": crops(8),
    "crops-2-colours": crops(2, photometric=PhotometricConfig(jitter=0.8, grey=0.2)),
    "crops-2-mixup": crops(2, mixup=0.5),
    "crops-8-mixup": crops(8, mixup=0.5),
    "crops-8-mixed": together(crops(8), mixed(0.25)),
    **{codec: changed(cache={"codec": codec}) for codec in ("int8", "float16", "float32", "pca-int8-zstd")},
    **{f"patches-{count}": changed(loss={"max_patches": count}) for count in (4, 8, 16)},
    "patches-all": changed(loss={"max_patches": None}),
    "heads-256": changed(student={"head_dim": 256}),
    "heads-1024": changed(student={"head_dim": 1024}),
    **{name: changed(student={"name": name}) for name in ("regla_s", "regla_m", "regla_l")},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what the results file lacks, then print the table."""
    parser = study_parser(__doc__, "proof")
    parser.add_argument("items", nargs="+", help="a recipe and overrides, as for the jobs")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--masks", type=Path, help="folder with images/{train,val} and masks/{train,val}")
    parser.add_argument("--base", default="all", choices=ARMS, metavar="ARM", help="arm that others are compared with")
    options = parser.parse_args(arguments)
    rows = [
        _run(options.items, arm, seed, options.results, options.masks) for seed in options.seeds for arm in options.arms
    ]
    print(json.dumps(_report(rows, options.base)))


def _run(items: Sequence[str], arm: str, seed: int, results: Path, masks: Path | None) -> dict[str, Any]:
    def measure() -> dict[str, float]:
        started = time.perf_counter()
        recipe, *overrides = items
        config = ARMS[arm](load_config(DistillJobConfig, recipe, [*overrides, f"seed={seed}"]))
        plan = _plan_of(config)
        encoder = _labels_alone(config) if arm == "labels" else _distilled(config)
        datasets = {split.split: split.dataset for split in plan.splits}
        scores = _score(encoder, datasets["train"], datasets["val"], config)
        if masks:
            probed = segmentation_probe(encoder, masks, MAPS_SIZE * config.student.input_size, seed)
            scores |= {name: probed[name] for name in ("miou", "aacc")}
        seconds, shown = (
            time.perf_counter() - started,
            "  ".join(f"{name} {score:.2f} %" for name, score in scores.items()),
        )
        print(f"{arm} seed {seed}  {shown}  {seconds:.0f} s", flush=True)
        return {**scores, "seconds": round(seconds)}

    return measure_once(results, {"recipe": " ".join(items), "arm": arm, "seed": seed}, measure)


def _plan_of(config: DistillJobConfig) -> CachePlan:
    """Plan of a complete cache with the same views for all seeds; Ray computes missing features."""
    config = config.model_copy(update={"seed": 0})
    plan = plan_cache(config, cache_store(config))
    missing = any(split.missing_views(teacher) for split in plan.splits for teacher in plan.teachers)
    with connect(in_process=find_spec("ray") is None) if missing else nullcontext():
        return build_cache(plan, config)[0]


def _train(task: Task, config: DistillJobConfig) -> Any:
    """Train in this process without evaluations; returns the module with its averaged weights, in eval mode."""
    task.evaluate = lambda averaged, raw: {}  # type: ignore[method-assign]
    snapshots: list[Snapshot] = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    worker = Worker(device=device, wrap=lambda module, _: module.to(device))
    train(task, config.train, worker, None, snapshots.append)
    state = snapshots[-1].state
    assert state is not None
    task.module.load_state_dict(state["ema"])
    return task.module.cpu().eval()


def _distilled(config: DistillJobConfig) -> Encoder:
    """The backbone of a student distilled from random weights, which is also kept, for example for `benchmarks/downstream.py`."""
    if config.student.weights != "random":
        raise SystemExit("student.weights: this benchmark compares students from random weights")
    before = PhaseState()
    for phase in config.phase_configs():
        further = [_plan_of(phase.at_resolution(found)) for found in phase.resolutions]
        task = DistillTask(make_job(phase, _plan_of(phase), further))
        transfer_weights(task.module, before)
        distiller = _train(task, phase)
        before = PhaseState(teachers=tuple(teacher_labels(task.job.teachers).values()), weights=distiller.state_dict())
    encoder: Encoder = distiller.student.encoder
    save_encoder(encoder, config.student.name, config.student.args, config.student.input_size, _kept(config))
    return encoder


def _kept(config: DistillJobConfig) -> Path:
    """Folder of a student that was distilled."""
    return Path(work_folder(config), "students", f"{config.fingerprint()[:12]}-{config.seed}")


def _labels_alone(config: DistillJobConfig) -> Encoder:
    """The backbone of a classifier, trained with the augmentation of recipes/classify.yaml."""
    from pipeline.downstream.job import plan_finetune, with_absolute_paths  # imports MLflow
    from pipeline.downstream.training import FinetuneJob, FinetuneTask

    mild = {"augment": None, "min_area": 0.5, "mixup": 0.0, "cutmix": 0.0, "erase": 0.0}
    root = FinetuneJobConfig.of_task("classify")
    shared = config.model_dump(include=set(root.model_fields))
    student = config.student.model_dump(include=set(NamedBackboneConfig.model_fields))
    settings = with_absolute_paths(root.model_validate({**shared, "student": student, "classify": mild}))
    with TemporaryDirectory() as folder:
        start = plan_finetune(settings).start
        save_encoder(start.encoder, start.name, start.args, config.student.input_size, Path(folder, "start"))
        task = FinetuneTask(FinetuneJob(settings, Path(folder, "start"), Path(folder)))
        encoder: Encoder = _train(task, config).encoder
        return encoder


def _score(encoder: Encoder, train: Dataset, val: Dataset, config: DistillJobConfig) -> dict[str, float]:
    """kNN and the best linear probe in percent, with all training images as the bank."""
    settings, size = EvaluateConfig(), config.student.input_size
    ([bank], labels), ([queries], expected) = (
        embed([encoder.eval()], split, size, config.knn.batch_size) for split in (train, val)
    )
    knn = knn_accuracy(bank, labels, queries, expected, config.knn.k, config.knn.temperature)
    heads = LinearHeads(bank.mean(0), bank.std(0), int(labels.max()) + 1, settings.lrs, config.seed)
    batches, steps = shuffled(bank, labels, settings.batch_size, config.seed), -(-len(bank) // settings.batch_size)
    with TemporaryDirectory() as folder, torch.enable_grad():
        train_heads(heads, batches, steps, settings.epochs, Path(folder, "linear.pt"), lambda epoch, losses: None)
    return {"knn": knn, "linear": max(accuracies(heads, queries, expected)["top1"])}


def _report(rows: Sequence[dict[str, Any]], base: str) -> dict[str, Any]:
    """Print the table; returns the figures of every arm."""
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {})[row["seed"]] = row
    figures: dict[str, Any] = {}
    measured = [name for name in SCORES if all(name in row for row in rows)]
    print(f"{'arm':<19}" + "".join(f"{f'{name}, %':>16}{f'minus {base}':>20}" for name in measured) + f"{'seeds':>7}")
    for arm, seeds in by_arm.items():
        line, figures[arm] = f"{arm:<19}", {"seeds": len(seeds)}
        for name in measured:
            values = [row[name] for row in seeds.values()]
            pairs = [(row[name], by_arm[base][seed][name]) for seed, row in seeds.items() if base in by_arm]
            gaps = [] if arm == base else [value - other for value, other in pairs]
            line += f"{mean_and_deviation(values):>16}{mean_and_deviation(gaps, len(gaps) ** 0.5):>20}"
            figures[arm][name] = round(mean(values), 2)
        print(f"{line}{len(seeds):>7}")
    return figures


if __name__ == "__main__":
    main()
