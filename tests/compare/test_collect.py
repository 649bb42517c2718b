from dataclasses import replace

import pytest
from mlflow import MlflowClient

from pipeline.compare.collect import collect
from pipeline.compare.group import group
from pipeline.errors import UserError
from pipeline.tracking.reading import Experiment
from tests.compare.experiments import CIFAR, FLOWERS


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


def test_what_students_do_with_the_heads_of_their_teachers_has_columns(store, read):
    one = store.distil("regla_t", ["clip"], 0, 20.0, name="small")
    store.judge("zero-shot", one.run_id, {"top1": 41.0, "teacher_top1": 60.0})
    store.judge("retrieval", one.run_id, {"text_to_image_r1": 12.0})
    store.judge("correspondence", one.run_id, {"pck_0.1": 33.0})
    (row,) = rows(read).values()
    assert {key: row.measures[key] for key in ("zero_shot", "text_to_image_r1", "pck")} == {
        "zero_shot": 41.0,
        "text_to_image_r1": 12.0,
        "pck": 33.0,
    }


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
    assert one.held_out == other.held_out == "samples-n300-s96"


@pytest.mark.parametrize("changed", ["data.samples.val=60", "data.samples.size=64"])
def test_generated_scenes_of_another_number_or_size_are_other_images(store, read, changed):
    data = dict.fromkeys(("train", "val"), ("samples", "samples-1"))
    for settings in ((), (changed,)):
        store.distil("regla_t", ["hog"], 0, 20.0, "data.train=samples", "data.val=null", *settings, data=data)
    one, other = collect(read()).entries
    assert one.held_out != other.held_out
    assert one.config["data.val"] == one.held_out
    assert not [key for key in one.config if key.startswith("data.samples")]  # told once


def test_an_experiment_with_nothing_to_compare_is_refused(store, read):
    store.start("precompute").finish()
    with pytest.raises(UserError, match=r"--experiment: experiment-\d+ has no run to compare; it holds 1 precompute"):
        collect(read())
    store.distil("regla_t", ["hog"], 0, 20.0)
    with pytest.raises(UserError, match=r"--filter: it leaves no run .* the experiment holds 1 precompute, 1 distill"):
        collect(read("tags.job = 'precompute'"))


JUDGED = [("linear", "top1", "linear"), ("seg-probe", "miou", "probe_miou"), ("finetune", "top1", "top1")]
JUDGED += [("promptable", "mask_iou", "prompts_mask_iou")]
"""Job, metric and measure of evaluations."""


@pytest.mark.parametrize(("job", "metric", "measure"), JUDGED)
def test_a_figure_on_other_images_than_the_rows_is_a_row_of_its_own(store, read, job, metric, measure):
    run = store.distil("regla_t", ["hog"], 0, 20.0)
    store.judge(job, run.run_id, {metric: 50.0}, val=FLOWERS)
    found = collect(read())
    own, other = found.entries
    assert (own.measures["knn"], own.held_out) == (20.0, CIFAR["val"][1])
    assert measure not in own.measures
    assert (other.measures[measure], other.held_out) == (50.0, FLOWERS[1])
    assert (other.texts["student"], other.measures["parameters"]) == ("regla_t", own.measures["parameters"])
    assert not {"knn", "knn_raw", "knn_before"} & other.measures.keys()
    assert found.places[FLOWERS[1]] == "data/flowers/val"


def test_a_row_knows_its_teachers_knn_and_its_report(store, read, tmp_path):
    parent = store.distil("regla_t", ["hog"], 0, 20.0, **{"teacher_knn/hog": 31.0}).parent
    report = tmp_path / "a report.html"
    report.touch()
    parent.set_tags({"report": str(report)})
    parent.flush()
    store.distil("regla_s", ["hog"], 0, 20.0, name="other").parent.set_tags({"report": str(tmp_path / "gone.html")})
    one, other = collect(read()).entries
    assert (one.teacher_knn, one.report) == ({"hog": 31.0}, report.as_uri())
    assert (other.teacher_knn, other.report) == ({}, None)
    served = replace(read(), uri="http://user:secret@host:5000/mlflow/")
    link = f"http://host:5000/mlflow/#/experiments/{served.experiment_id}/runs"
    tagged = next(run for run in served.runs if run.tags.get("report") == str(report))
    assert served.report(tagged) == f"{link}/{tagged.run_id}/artifacts/a report.html"


@pytest.mark.parametrize(("job", "metric", "measure"), JUDGED)
@pytest.mark.parametrize("order", [1, -1])
def test_the_figure_on_the_rows_own_images_stays_whatever_came_later(store, read, job, metric, measure, order):
    run = store.distil("regla_t", ["hog"], 0, 20.0)
    for value, val in [(50.0, CIFAR["val"]), (60.0, FLOWERS)][::order]:
        store.judge(job, run.run_id, {metric: value}, val=val, name=val[1])
    own, other = collect(read()).entries
    assert (own.measures[measure], own.held_out) == (50.0, CIFAR["val"][1])
    assert (other.measures[measure], other.held_out) == (60.0, FLOWERS[1])
    assert other.name == f"{FLOWERS[1]}-{job}"
    assert "knn" not in other.measures
    assert other.measures["cache_bytes"] == own.measures["cache_bytes"]
    assert own.config.keys() == other.config.keys()
    assert {key for key in own.config if own.config[key] != other.config[key]} == {"data.val"}


def test_knn_on_two_sets_of_images_is_two_rows(store, read):
    run = store.distil("regla_t", ["hog"], 0, 20.0)
    store.judge("knn", run.run_id, {"knn": 33.0}, val=FLOWERS)
    for value, val in ((40.0, CIFAR["val"]), (70.0, FLOWERS), (41.0, CIFAR["val"])):
        store.judge("knn", None, {"knn": value}, "evaluate.student=timm/resnet18", val=val)
    found = [(row.texts["student"], row.held_out, row.measures["knn"]) for row in collect(read()).entries]
    assert found == [
        ("regla_t", CIFAR["val"][1], 20.0),
        ("regla_t", FLOWERS[1], 33.0),
        ("resnet18", CIFAR["val"][1], 41.0),
        ("resnet18", FLOWERS[1], 70.0),
    ]


def test_a_run_without_held_out_images_has_those_of_its_evaluation(store, read):
    run = store.distil("regla_t", ["hog"], 0, 20.0, "data.val=null", data={"train": CIFAR["train"]})
    store.judge("linear", run.run_id, {"top1": 50.0}, val=FLOWERS)
    (row,) = collect(read()).entries
    assert row.held_out == FLOWERS[1]


def test_equal_images_have_one_name_whatever_the_user_called_them(store, read):
    run = store.distil("regla_t", ["hog"], 0, 20.0)
    store.judge("linear", run.run_id, {"top1": 50.0}, val=("elsewhere", "renamed-33334444"))
    (row,) = collect(read()).entries
    assert row.held_out == CIFAR["val"][1]


def test_as_many_other_images_of_a_fine_tuning_are_others(store, read):
    for number, digest in enumerate(("1" * 36, "2" * 36)):
        run = store.judge("finetune", None, {"top1": 50.0}, f"seed={number}", "evaluate.student=null", val=None)
        run.log_dataset("val-40", "photos/val", digest, "val")
        run.finish()
    found = collect(read())
    assert [row.held_out for row in found.entries] == ["val-40-11111111", "val-40-22222222"]
    assert len({row.config["data.val"] for row in found.entries}) == 2


def test_a_probe_of_an_earlier_version_has_the_images_of_its_path(store, read):
    run = store.distil("regla_t", ["hog"], 0, 20.0)
    store.judge("linear", run.run_id, {"top1": 50.0}, "data.val=photos/test.parquet", val=None)
    store.judge("seg-probe", run.run_id, {"miou": 9.0}, "data.val=photos/other.parquet", val=None)
    own, other = collect(read()).entries
    assert (own.held_out, own.measures["linear"]) == (CIFAR["val"][1], 50.0)
    assert (other.held_out, other.measures["probe_miou"]) == ("photos/other.parquet", 9.0)


def test_an_evaluation_that_has_not_finished_is_named_and_not_counted(store, read):
    run = store.distil("regla_t", ["hog"], 0, 20.0)
    for name, status in (("good", "FINISHED"), ("broken", "FAILED"), ("on-its-way", "RUNNING")):
        store.judge("linear", run.run_id, {"top1": 50.0}, name=name, status=status)
    (row,) = collect(read()).entries
    assert (row.evaluated_by, row.unfinished) == (("good-linear",), ("broken-linear", "on-its-way-linear"))


def test_a_run_that_was_resumed_counts_once_and_keeps_its_evaluations(store, read):
    part = store.distil("regla_t", ["hog"], 0, 20.0, status="FAILED")
    client = MlflowClient(store.uri)
    parent = client.get_run(part.run_id).data.tags["mlflow.parentRunId"]
    # A second start opens the same runs, as pipeline.runs does with the ids in run.json.
    for run_id, metrics in ((part.run_id, {"knn": 25.0}), (parent, {"knn_after": 25.0})):
        for key, value in metrics.items():
            client.log_metric(run_id, key, value, step=30)
        client.set_terminated(run_id, "FINISHED")
    store.judge("linear", part.run_id, {"top1": 50.0})
    (row,) = collect(read()).entries
    assert (row.run_id, row.finished, row.measures["knn"], row.measures["linear"]) == (parent, True, 25.0, 50.0)
    assert len(group([row])[0].counted) == 1


def test_an_evaluation_of_one_of_several_runs_of_a_configuration_is_joined_with_its_own(store, read):
    first, again = (store.distil("regla_t", ["hog"], 0, 20.0, name=name) for name in ("first", "again"))
    store.judge("linear", first.run_id, {"top1": 50.0})
    store.judge("linear", again.run_id, {"top1": 60.0})
    found = rows(read)
    assert [found[name].measures["linear"] for name in ("first", "again")] == [50.0, 60.0]
