"""The guess of a folder that holds no model, and what stands there or beside it."""

import json

import pytest

from pipeline.downstream.config import EvaluateModelJobConfig
from pipeline.downstream.job import open_model
from pipeline.errors import UserError
from pipeline.predict.predictor import load_predictor
from pipeline.student.loading import load_student
from pipeline.student.nearest import nearest_folders


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Run folders: one with a student, one with a fine-tuned model, one unfinished, and one of an evaluation."""
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "work" / "runs"
    for name, model, finished in (
        ("photos-distill-11", "student", True),
        ("photos-finetune-22", "model", True),
        ("flowers-distill-33", None, False),
        ("photos-linear-44", None, True),
    ):
        (runs / name).mkdir(parents=True)
        (runs / name / "run.json").write_text(json.dumps({"mlflow": {}, "finished": finished}))
        if model:
            (runs / name / model).mkdir()
            (runs / name / model / f"{model}.json").write_text("{}")
    return runs


STUDENT = "work/runs/photos-distill-11/student"
UNFINISHED = (
    "; work/runs/flowers-distill-33 is the folder of an unfinished run and holds no model yet; the command that"
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("work/runs/photos-distill-11", f"; did you mean {STUDENT}?"),
        ("work/runs/photos-finetune-22", "; did you mean work/runs/photos-finetune-22/model (a fine-tuned model)?"),
        ("work/runs/photos-distill-11/model", f"; did you mean {STUDENT}?"),
        (f"{STUDENT}/student.safetensors", f"; did you mean {STUDENT}?"),
        (
            "work/runs/photos-distill-12",
            f"; did you mean {STUDENT} or work/runs/photos-finetune-22/model (a fine-tuned model)?",
        ),
        ("work/runs/photos-distil-11/student", f"; did you mean {STUDENT} or"),
        ("work/runs", f"; did you mean work/runs/photos-finetune-22/model (a fine-tuned model) or {STUDENT}?"),
        ("work/runs/flowers-distill-33", UNFINISHED),
        ("work/runs/flowers-distill-33/student", UNFINISHED),
        ("work/runs/photos-linear-44", "; work/runs/photos-linear-44 is the folder of a run that made no such model"),
        ("work/runs/photos-finetune-22/model", "; it is a fine-tuned model"),
    ],
)
@pytest.mark.parametrize("load", [load_student, load_predictor])
def test_the_message_points_to_what_is_there(runs, load, given, expected):
    if given.endswith("22/model") and load is load_predictor:
        pytest.skip("a predictor takes it")
    with pytest.raises(UserError) as error:
        load(given)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("work/runs/photos-finetune-22", "; did you mean work/runs/photos-finetune-22/model (a fine-tuned model)?"),
        (STUDENT, "; it is an exported student"),
        ("work/runs/photos-distill-11", "photos-distill-11 is the folder of a run that made no such model"),
        ("work/runs/photos-distil-11/model", "; did you mean work/runs/photos-finetune-22/model (a fine-tuned model)?"),
        ("work/runs/flowers-distill-33", UNFINISHED),
    ],
)
def test_an_evaluation_of_a_model_points_there_too(runs, given, expected):
    config = EvaluateModelJobConfig.of_task("classify").model_validate({"evaluate": {"model": given}})
    with pytest.raises(UserError, match=r"evaluate\.model: .* is not a fine-tuned model") as error:
        open_model(config)
    assert expected in str(error.value)


def test_a_damaged_state_is_an_unfinished_run(runs):
    (runs / "flowers-distill-33" / "run.json").write_text("[")
    assert UNFINISHED in nearest_folders("work/runs/flowers-distill-33")


@pytest.mark.parametrize("given", ["regla_x", "s3://bucket/student", "no/such/folder"])
def test_nothing_is_made_up(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    assert nearest_folders(given) == ""
