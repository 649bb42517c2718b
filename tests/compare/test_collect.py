import pytest

from pipeline.compare.collect import collect
from pipeline.errors import UserError
from pipeline.tracking.reading import Experiment
from tests.compare.experiments import CIFAR


def rows(read, only=""):
    return {entry.name.removesuffix("-distill"): entry for entry in collect(read(only)).entries}


def test_a_run_is_a_row_with_all_that_its_parts_logged(store, read):
    store.distil("regla_t", ["hog", "dinov2/vits14"], 4, 21.5, "teachers.1.weights=random", "views.crops=3", name="one")
    (row,) = rows(read).values()
    assert row.texts == {
        "status": "finished",
        "job": "distill",
        "data": "cifar",
        "student": "regla_t",
        "input": "64 px",
        "teachers": "hog + dinov2/vits14 (untrained)",
        "codec": "pca-int8-zstd",
        "views": "3 crops, area from 0.35",
        "seed": "4",
    }
    assert row.measures == {
        "samples_seen": 1000,
        "knn_before": 11.0,
        "knn": 21.5,
        "knn_raw": 21.1,
        "parameters": 2_692_640,
        "macs": 35e6,
        "cache_bytes": 1e6,
        "hours": 0.5,
    }
    assert [(point.epoch, point.knn, point.raw) for point in row.curve] == [
        (0.0, 11.0, 11.0),
        (1.0, 19.5, 20.0),
        (2.0, 21.5, pytest.approx(21.1)),
    ]
    assert row.held_out == CIFAR["val"][1]
    assert row.config["data.train"] == CIFAR["train"][1]


def test_gpu_hours_cost_what_the_plan_says_and_are_blank_without_gpus(store, read):
    store.distil("regla_t", ["hog"], 0, 20.0, "plan.gpu_hour_price=2.5", name="gpu", gpu_hours=4.0)
    store.distil("regla_t", ["hog"], 0, 20.0, name="cpu")
    found = rows(read)
    assert found["gpu"].measures["cost"] == 10.0
    assert not {"gpu_hours", "cost", "latency", "linear"} & found["cpu"].measures.keys()


def test_evaluations_are_joined_with_the_run_whose_student_they_judged(store, read):
    one, other = (store.distil("regla_t", ["hog"], seed, 20.0, name=f"run{seed}") for seed in (0, 1))
    store.judge("linear", one.run_id, {"top1": 30.0})
    store.judge("linear", one.run_id, {"top1": 31.0})
    store.judge("linear", one.run_id, {"top1": 99.0}, status="FAILED")
    store.judge("seg-probe", other.run_id, {"miou": 12.0})
    store.judge("finetune", other.run_id, {"box/AP": 0.25, "mask/AP": -1.0, "top1": 70.0}, "finetune.task=detect")
    store.judge("knn", other.run_id, {"knn": 55.0})
    found = rows(read)
    assert sorted(found) == ["run0", "run1"]
    assert found["run0"].measures["linear"] == 31.0  # the latest that came to its end
    judged = found["run1"].measures
    assert (judged["probe_miou"], judged["box_ap"], judged["top1"]) == (12.0, 25.0, 70.0)
    assert "mask_ap" not in judged
    assert judged["knn"] == 20.0  # its own
    assert len(found["run1"].evaluated_by) == 3


def test_the_filter_chooses_students_and_their_evaluations_come_along(store, read):
    one = store.distil("regla_t", ["hog"], 0, 20.0, name="small")
    store.judge("linear", one.run_id, {"top1": 30.0})
    tuned = store.judge("finetune", one.run_id, {"top1": 70.0})
    store.distil("regla_s", ["hog"], 0, 22.0, name="large")
    (row,) = rows(read, "tags.job = 'distill' and params.student.name = 'regla_t'").values()
    assert (row.name, row.measures["linear"], row.measures["top1"]) == ("small-distill", 30.0, 70.0)
    (alone,) = rows(read, "tags.job = 'finetune'").values()
    assert (alone.run_id, alone.measures) == (tuned.run_id, {"top1": 70.0})


def test_evaluations_of_a_student_without_a_run_are_one_row(store, read):
    for job, figures in (("knn", {"knn": 40.0}), ("linear", {"top1": 50.0})):
        store.judge(job, None, figures, "evaluate.student=timm/resnet18")
    store.judge("linear", None, {"top1": 60.0}, "evaluate.student=runs/a/student")
    first, second = collect(read()).entries
    assert first.texts["student"] == "resnet18"
    assert first.measures.items() >= {"knn": 40.0, "linear": 50.0, "parameters": 11_171_712}.items()
    assert (second.texts["student"], second.measures) == ("runs/a/student", {"linear": 60.0})


def test_students_with_arguments_are_others_than_the_plain_one(store, read):
    narrow, wide = (f"student.args={{width: {width}}}" for width in (32, 64))
    store.distil("regla_t", ["hog"], 0, 20.0, name="plain")
    store.distil("regla_t", ["hog"], 0, 20.0, narrow, name="narrow")
    store.benchmark({"regla_t/fused/float32/1x64/ms": 3.0})
    for arguments, figures in ((narrow, {"top1": 30.0}), (wide, {"top1": 40.0})):
        store.judge("linear", None, figures, "evaluate.student=timm/resnet18", arguments)
    found = collect(read()).entries
    assert [entry.measures.get("latency") for entry in found] == [3.0, None, None, None]
    assert [entry.measures["linear"] for entry in found[2:]] == [30.0, 40.0]
    assert not any("parameters" in entry.measures for entry in found[2:])


def test_where_results_and_checkpoints_go_makes_no_other_run(store, read):
    store.distil("regla_t", ["hog"], 0, 20.0, "outputs=results", "train.checkpoints=s3://models/checkpoints")
    store.distil("regla_t", ["hog"], 1, 20.0)
    one, other = collect(read()).entries
    assert one.config == other.config


def test_trainings_from_scratch_are_rows_of_their_own(store, read):
    for seed in (0, 1):
        run = store.judge(
            "finetune", None, {"top1": 50.0 + seed, "hours": 0.25}, f"seed={seed}", "evaluate.student=null"
        )
        run.child("finetune").log_metric_dict({"samples_seen": 640.0})
    first, second = collect(read()).entries
    assert first.measures.items() >= {"top1": 50.0, "hours": 0.25, "samples_seen": 640.0}.items()
    assert second.measures["top1"] == 51.0


def test_an_evaluation_that_failed_does_not_hide_one_that_did_not(store, read):
    store.judge("linear", None, {}, "evaluate.student=runs/a/student", status="FAILED")
    last = store.judge("linear", None, {"top1": 50.0}, "evaluate.student=runs/a/student")
    (row,) = collect(read()).entries
    assert (row.run_id, row.finished, row.measures) == (last.run_id, True, {"linear": 50.0})


def test_a_run_links_to_its_page_on_a_server_without_a_password():
    page = Experiment("https://me:secret@host:5000/mlflow/", "7", "a", (), frozenset()).link("abc")
    assert page == "https://host:5000/mlflow/#/experiments/7/runs/abc"
    assert Experiment("sqlite:///a.db", "7", "a", (), frozenset()).link("abc") is None


def test_runs_without_a_student_are_counted_and_left_out(store, read):
    store.distil("regla_t", ["hog"], 0, 20.0)
    for job in ("compare", "precompute", "precompute"):
        store.start(job).finish()
    found = collect(read())
    assert len(found.entries) == 1
    assert found.left_out == {"compare": 1, "precompute": 2}


def test_a_running_run_is_a_row_with_what_there_is(store, read):
    store.distil("regla_t", ["hog"], 0, 20.0, status="RUNNING")
    (row,) = rows(read).values()
    assert (row.finished, row.measures["knn"]) == (False, 20.0)
    assert "knn_before" not in row.measures
    assert len(row.curve) == 3


def test_the_size_of_a_student_that_was_not_logged_is_counted(store, read):
    store.distil("regla_t", ["hog"], 0, 20.0, status="RUNNING")
    store.distil("timm/no_such_net", ["hog"], 1, 20.0, status="RUNNING")
    known, unknown = collect(read()).entries
    assert known.measures["parameters"] == 2_692_640
    assert not {"parameters", "macs"} & unknown.measures.keys()


def test_generated_scenes_are_the_same_data_whatever_the_seed(store, read):
    for seed in (0, 1):
        data = dict.fromkeys(("train", "val"), ("samples", f"samples-{seed}{seed}"))
        store.distil("regla_t", ["hog"], seed, 20.0, "data.train=samples", "data.val=null", data=data)
    one, other = collect(read()).entries
    assert one.config == other.config
    assert one.held_out == other.held_out == "samples"


def test_an_experiment_with_nothing_to_compare_is_refused(store, read):
    store.start("precompute").finish()
    with pytest.raises(UserError, match=r"--experiment: experiment-\d+ has no run to compare; it holds 1 precompute"):
        collect(read())
    store.distil("regla_t", ["hog"], 0, 20.0)
    with pytest.raises(UserError, match=r"--filter: it leaves no run .* the experiment holds 1 precompute, 1 distill"):
        collect(read("tags.job = 'precompute'"))
