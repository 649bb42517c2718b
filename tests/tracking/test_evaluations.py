"""What a model card takes from a store, in a SQLite file and on a real MLflow server."""

import pytest

from pipeline.errors import UserError
from pipeline.tracking.evaluations import evaluations, latest


def test_the_evaluations_of_a_student_are_found_in_every_experiment(start, uri):
    trained = start()

    def judge(job, figures, experiment="tests", student=trained.run_id, status="FINISHED", **tags):
        run = start(experiment=experiment, name=job, tags={"job": job, **tags})
        run.set_student_run(student)
        run.log_dataset("val-3", "photos/val", "0123456789", "val")
        run.log_metric_dict({**figures, "hours": 0.1, "top1/lr_0.1": 3.0})
        run.finish(status)
        return run.run_id

    judge("zero-shot", {"top1": 40.0}, teacher="clip/tiny")
    again = judge("zero-shot", {"top1": 41.0, "teacher_top1": 60.0}, "elsewhere", teacher="clip/tiny")
    moved = judge("correspondence", {"pck_0.1": 12.5}, features="the backbone regla_t")
    plain = judge("knn", {"knn": 50.0})
    judge("zero-shot", {"top1": 1.0}, student="another")
    judge("zero-shot", {"top1": 2.0}, status="FAILED")
    judge("evaluate-classify", {"top1": 99.0})
    trained.finish()
    found = evaluations(uri, trained.run_id)
    assert [entry["evaluation"] for entry in found] == ["zero-shot", "zero-shot", "correspondence", "knn"]
    where = {"images": "photos/val", "set": "val-3-01234567"}
    assert latest(found) == [
        {
            "evaluation": "zero-shot",
            "features": "the head of clip/tiny",
            **where,
            "figures": {"teacher_top1": 60.0, "top1": 41.0},
            "run_id": again,
        },
        {
            "evaluation": "correspondence",
            "features": "the backbone regla_t",
            **where,
            "figures": {"pck_0.1": 12.5},
            "run_id": moved,
        },
        {"evaluation": "knn", "features": "the backbone", **where, "figures": {"knn": 50.0}, "run_id": plain},
    ]
    assert evaluations(uri, "nobody") == []


def test_a_store_that_does_not_exist_is_named_and_not_made(tmp_path):
    with pytest.raises(UserError, match=r"there is no MLflow store at sqlite:///.*none.db"):
        evaluations(f"sqlite:///{tmp_path}/none.db", "0123")
    assert not [*tmp_path.iterdir()]
