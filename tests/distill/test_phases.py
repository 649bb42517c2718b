"""Phases one after the other, with the engine in this process: what continues, what starts afresh, and what a kill costs."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.distill import job as module
from pipeline.distill.job import distill, make_job
from pipeline.distill.phases import PhaseState, plan_phases, transfer_weights
from pipeline.distill.plan import check_session, training_plan
from pipeline.distill.provenance import all_teachers
from pipeline.distill.task import build_distiller, build_student
from pipeline.errors import UserError
from pipeline.runs.folder import open_run
from pipeline.storage.store import Store
from pipeline.student.loading import LoadedStudent
from pipeline.student.model import load_encoder
from pipeline.training.checkpoint import STATE_FILE, load_state
from pipeline.training.loop import train
from pipeline.training.worker import Worker
from tests.fakes import fill_in_process, write_photos

STUDENT = ["student.name=timm/test_resnet", "student.token_dim=16", "student.head_dim=32", "train.precision=float32"]
PHASES = "phases=[{train.epochs: 2}, {train: {epochs: 1, lr: 5.0e-4}, student.input_size: 48, teachers: [TWO, ONE]}]"
ONE, TWO = (f"{{model: 'tests.fakes:colours', codec: float32, args: {{dim: {dim}}}}}" for dim in (8, 12))


class KilledError(Exception):
    pass


class InProcess:
    """Ray Train's part of the engine without Ray.

    Args:
        stop_after: commits after which it is interrupted, or None.
    """

    def __init__(self, stop_after=None):
        self.stop_after, self.commits, self.started = stop_after, 0, []

    def __call__(self, make_task, payload, config, folder, on_commit):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.started.append(folder.name)
        state = load_state(folder) if (folder / STATE_FILE).exists() else None

        def commit(snapshot):
            torch.save(snapshot.state, folder / STATE_FILE)
            on_commit(snapshot.history, str(folder))
            self.commits += 1
            if self.commits == self.stop_after:
                raise KilledError

        train(make_task(payload, 0, 1), config, Worker(), state, commit)
        return self._checkpoint(folder)

    @staticmethod
    def _checkpoint(folder):
        class Checkpoint:
            path = str(folder)

            @contextmanager
            def as_directory(self):
                yield folder

        return Checkpoint()


class Logged:
    """An MLflow run that remembers its metrics."""

    run_id = "run"

    def __init__(self):
        self.history = []

    def log_metrics(self, history):
        self.history += list(history)

    def log_metric_dict(self, metrics, step=0):
        self.history.append((step, metrics))

    def log_picture(self, file, folder): ...

    def log_folder(self, source, folder): ...

    def log_reference(self, file, place, path): ...

    def set_tags(self, tags): ...

    def points(self, name):
        return [(step, metrics[name]) for step, metrics in self.history if name in metrics]


@pytest.fixture
def unfilled(tmp_path, photo_config):
    """Gives the plans of two phases for a recipe with these overrides."""
    changes = PHASES.replace("ONE", ONE).replace("TWO", TWO)
    return lambda *given: plan_phases(photo_config(*STUDENT, changes, *given), Store.at(tmp_path / "cache"))


@pytest.fixture
def planned(unfilled, monkeypatch):
    """The same with filled caches."""
    monkeypatch.setattr(module, "log_student", lambda *_, **__: "models:/m-0")

    def plan(*overrides):
        return [replace(phase, plan=fill_in_process(phase.plan)[0]) for phase in unfilled(*overrides)]

    return plan


def _run(phases, folder, monkeypatch, engine=None):
    logged, engine = Logged(), engine or InProcess()
    monkeypatch.setattr(module, "fit", engine)
    result = distill(phases, logged, folder)
    return result, logged, engine


def test_phases_go_on_from_each_other_in_one_curve(planned, tmp_path, monkeypatch):
    phases = planned("student.keep_heads=true")
    result, logged, engine = _run(phases, tmp_path / "run", monkeypatch)
    assert engine.started == ["phase-1", "phase-2"]
    assert (result.steps, result.samples) == (27, 27 * 16)
    losses = logged.points("loss")
    assert [step for step, _ in losses] == list(range(1, 28))
    assert logged.points("samples_seen")[-1] == (27, 27 * 16)
    assert logged.points("epoch")[-1] == (27, 3)
    assert [step for step, _ in logged.points("knn")] == [0, 9, 18, 18, 27]
    assert (result.knn_before, result.knn_after) == (logged.points("knn")[0][1], logged.points("knn")[-1][1])
    rates = dict(logged.points("learning_rate"))
    assert max(rate for step, rate in rates.items() if step <= 18) > 5e-4
    assert rates[18] < 1e-4 < max(rate for step, rate in rates.items() if step > 18) <= 5e-4
    assert [logged.points(f"loss/{name}/patches")[-1][0] for name in ("colours12", "colours8")] == [27, 27]
    ending = PhaseState.load(tmp_path / "run/train/phase-2.pt")
    encoder = load_encoder(result.student)
    expected = {name: v for name, v in ending.weights.items() if name.startswith("student.encoder.")}
    assert all(torch.equal(v, expected[f"student.encoder.{name}"]) for name, v in encoder.state_dict().items())
    assert sorted(file.name for file in result.student.iterdir()) == [
        "heads.json",
        "heads.safetensors",
        "provenance.json",
        "student.json",
        "student.safetensors",
    ]
    origin = json.loads((result.student / "provenance.json").read_text())
    assert [teacher["name"] for teacher in origin["teachers"]] == ["colours8", "colours4", "colours12"]
    assert origin["training"] == {"epochs": 3, "samples_seen": 27 * 16}


def test_the_student_and_known_heads_are_taken_over_and_statistics_are_those_of_the_phase(
    planned, tmp_path, monkeypatch
):
    phases = planned()
    _run(phases, tmp_path / "run", monkeypatch)
    ending = PhaseState.load(tmp_path / "run/train/phase-1.pt")
    assert ending.teachers == ("colours8", "colours4")
    job = module.make_job(phases[1].config, phases[1].plan)
    fresh, taken = build_distiller(job), build_distiller(job)
    transfer_weights(taken, ending)
    fresh_state = fresh.state_dict()
    for name, value in taken.state_dict().items():
        if name.startswith("student."):
            assert torch.equal(value, ending.weights[name])
        elif name.startswith("targets.1.heads."):  # colours8, the first teacher of phase 1
            assert torch.equal(value, ending.weights[name.replace("targets.1", "targets.0")])
        else:
            assert torch.equal(value, fresh_state[name])


def test_a_student_starts_from_one_that_was_distilled_before(planned, tmp_path, monkeypatch):
    earlier, _, _ = _run(planned("phases=[]", "train.epochs=2"), tmp_path / "earlier", monkeypatch)
    assert [phase.start is None for phase in planned(f"student.weights={earlier.student}")] == [False, True]
    known = json.loads((earlier.student / "provenance.json").read_text())
    known["teachers"][0]["licence"] = "non-commercial"
    (earlier.student / "provenance.json").write_text(json.dumps(known))
    overrides = f"student.weights={earlier.student}", "phases=[]", "train.epochs=2"
    phases = planned(*overrides)
    assert training_plan(phases[0])["start"] == f"weights of {earlier.student}"
    run = open_run(phases[0].config, "distill").folder
    monkeypatch.setattr(module, "fit", InProcess(stop_after=1))
    with pytest.raises(KilledError):
        distill(phases, Logged(), run)
    weights = PhaseState.load(run / "start.pt").weights
    encoder = load_encoder(earlier.student)
    assert all(torch.equal(v, weights[f"student.encoder.{name}"]) for name, v in encoder.state_dict().items())
    shutil.rmtree(earlier.student)  # what an interrupted run started from is not needed again
    result, logged, _ = _run(planned(*overrides), run, monkeypatch)
    assert logged.points("knn")[0] == (0, earlier.knn_after)
    assert result.knn_before == earlier.knn_after
    origin = json.loads((result.student / "provenance.json").read_text())
    assert origin["start"] == known | {"named": str(earlier.student)}
    assert result.lineage["start"] == str(earlier.student)
    assert result.lineage["licences"] == ", ".join(sorted(["non-commercial", *earlier.lineage["licences"].split(", ")]))


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, {"weights": "w", "licence": "unknown"}),
        ({"weights": "random"}, {"weights": "random", "licence": "unknown"}),
        ({"weights": "hub:x.y", "licence": "MIT"}, {"weights": "hub:x.y", "licence": "MIT"}),
        ({"teachers": [], "run_id": "0"}, {"teachers": [], "run_id": "0"}),
    ],
)
def test_a_licence_that_nobody_told_is_unknown(photo_config, known, expected):
    student = build_student(photo_config(*STUDENT))
    start = LoadedStudent(student.encoder, "test_resnet", None, {}, known)
    assert PhaseState.before(student, start, "w").origin == {"named": "w", **expected}


def test_weights_that_are_nowhere_are_refused_with_the_plan(unfilled):
    with pytest.raises(
        UserError, match=r"student\.weights=nowhere: timm/test_resnet: weights: there is no file .*/nowhere; put the"
    ):
        unfilled("student.weights=nowhere")


def test_teachers_and_licences_are_those_of_all_that_a_student_started_from():
    first = {"teachers": [{"name": "a", "licence": "non-commercial"}, {"name": "b", "licence": "MIT"}]}
    second = {"teachers": [{"name": "b", "licence": "MIT"}], "start": first}
    tuned = {"student": {"teachers": [{"name": "c", "licence": "BSD"}], "start": second}}
    assert [teacher["name"] for teacher in all_teachers(tuned)] == ["c", "b", "a"]


@pytest.mark.slow
def test_a_kill_in_either_phase_costs_nothing_that_was_committed(planned, tmp_path, monkeypatch):
    phases = planned("loss={summary: {cosine: 1, relation: 1}, drop: 0.5}", "train.checkpoint_steps=5")
    whole, uninterrupted, _ = _run(phases, tmp_path / "whole", monkeypatch)
    for stop_after, started in ((2, ["phase-1", "phase-2"]), (10, ["phase-2"])):
        folder, first = tmp_path / f"run-{stop_after}", Logged()
        monkeypatch.setattr(module, "fit", InProcess(stop_after))
        with pytest.raises(KilledError):
            distill(phases, first, folder)
        result, second, engine = _run(phases, folder, monkeypatch)
        assert engine.started == started
        # What was committed last is said again, for MLflow to leave out.
        said = sorted({*first.points("loss"), *second.points("loss")})
        assert said == uninterrupted.points("loss")
        assert (result.steps, result.samples, result.knn_before) == (whole.steps, whole.samples, whole.knn_before)
        ends = [PhaseState.load(run / "train/phase-2.pt").weights for run in (tmp_path / "whole", folder)]
        assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_every_phase_has_a_plan(planned):
    first, second = (training_plan(phase) for phase in planned())
    assert first["student"] == "timm/test_resnet at 32 px, feature maps of strides 16, 32"
    assert first["training"].startswith("2 epochs of 9 steps of 16 images; 6 images")
    assert second["student"].startswith("timm/test_resnet at 48 px")
    assert second["training"].startswith("1 epochs of 9 steps")
    assert list(second)[2:] == ["learning rate", "kNN", "grid colours12", "grid colours8"]


@pytest.mark.parametrize(
    ("codec", "standardise", "warned"),
    [("pca-int8-zstd", "phi_s", True), ("pca-int8-zstd", "mean_std", False), ("float16", "phi_s", False)],
)
def test_a_codec_that_was_chosen_for_other_targets_is_named(unfilled, caplog, codec, standardise, warned):
    training_plan(unfilled(f"cache.codec={codec}", f"loss.standardise={standardise}")[0])
    message = "phi_s: what the cache keeps of colours8, colours4 was chosen for mean_std"
    assert (message in caplog.text) is warned


def test_the_best_metric_is_one_that_the_held_out_images_allow(photo_config, tmp_path):
    def plan(metric, val):
        config = photo_config(*STUDENT, f"train.best_metric={metric}", f"data.val={val}")
        return [training_plan(phase) for phase in plan_phases(config, Store.at(tmp_path / "cache"))]

    write_photos(tmp_path / "flat", 20, classes=1)
    labelled, flat = tmp_path / "photos/val", tmp_path / "flat/class0"
    for metric in ("knn", "knn_raw", "val_loss/colours8/summary"):
        assert plan(metric, labelled)[0]["kNN"] == "20 neighbours"
    assert plan("val_cosine/colours4/patches", flat)[0]["kNN"] == "none: the images have no labels"
    assert plan("null", "null")[0]["kNN"] == "none: data.val names no held-out images"
    with pytest.raises(UserError, match=r"best_metric=knn is not an evaluated metric: val_cosine/colours8/"):
        plan("knn", flat)
    with pytest.raises(UserError, match=r"best_metric=knn needs held-out images to evaluate on: set data\.val"):
        plan("knn", "null")


def test_a_batch_that_the_gpus_of_the_session_do_not_share_is_refused_before_extraction(unfilled, monkeypatch):
    monkeypatch.setattr("pipeline.training.ray_train._gpus", lambda: 3)
    with pytest.raises(UserError, match=r"train\.batch_size=16 .*3"):
        check_session(unfilled()[0])
    monkeypatch.setattr("pipeline.training.ray_train._gpus", lambda: 8)
    check_session(unfilled()[0])
    with pytest.raises(UserError, match=r"views\.per_step=4 must divide .* the 2 images of a worker's step"):
        check_session(unfilled("views={crops: 4, per_step: 4}")[0])


def test_held_out_images_that_are_those_of_the_training_are_refused(photo_config, tmp_path):
    config = photo_config(*STUDENT, f"data.val={tmp_path}/photos/train/.")
    with pytest.raises(UserError, match=r"data\.val \(.*/photos/train\) are the images of data\.train"):
        plan_phases(config, Store.at(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("phases.1.loss={patches: {mze: 1}}", r"loss\.patches: there is no loss mze; did you mean mse\?"),
        ("phases.1.views={per_step: 2}", r"views\.per_step=2 must divide the 1 views of an image"),
        (
            "phases.1={views: {crops: 4, per_step: 4}, train: {workers: [2, 8]}}",
            r"views\.per_step=4 must divide the 4 views of an image \(views.crops\) and the 2 images of a worker's step",
        ),
        (
            "phases.1.train.best_metric=kn",
            r"train\.best_metric=kn is not an evaluated metric: knn, knn_raw, val_cosine/colours12/",
        ),
    ],
)
def test_what_training_would_refuse_is_refused_with_the_plan(unfilled, override, message):
    with pytest.raises(UserError, match=message):
        [training_plan(phase) for phase in unfilled(override)]


def test_the_batch_size_that_suits_the_data_is_planned_and_trained_with(tmp_path, photo_config):
    config = photo_config("train.batch_size=0", "train.epochs=1")
    (phase,) = plan_phases(config, Store.at(tmp_path / "cache"))
    assert training_plan(phase)["training"].startswith("1 epochs of 9 steps of 16 images")
    filled = replace(phase, plan=fill_in_process(phase.plan)[0])
    assert make_job(filled.settled, filled.plan).config.train.batch_size == 16
