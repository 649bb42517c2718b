"""The jobs train, evaluate and compare a task of the user's own, on the real Ray with a real MLflow store."""

import json

import pytest

from jobs import evaluate, finetune
from pipeline.compare.comparison import Comparison
from pipeline.tracking.reading import read_experiment
from tests.downstream.test_own_task import OWN, SCENES, TASK


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_the_jobs_train_evaluate_and_compare_it(tmp_path, job, capsys):
    work = f"work={tmp_path}/work"
    text, figures = job(finetune.main, *OWN, work, f"finetune.task={TASK}", "train.epochs=1", "name=own")
    assert ["task", TASK] in map(str.split, text.splitlines())
    assert figures["registered"] == "models:/own-mean_colour/1"
    assert {path.name for path in (tmp_path / "work/runs").glob("*/evaluation/*")} == {"pictures"}
    evaluate.start([TASK, *SCENES, work, "name=own", "evaluate.model=models:/own-mean_colour@best"])
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert evaluated["r2"] == pytest.approx(figures["r2"], abs=1e-3)
    experiment = read_experiment(f"sqlite:///{tmp_path}/work/mlflow.db", "regla-distill")
    measures = [entry.measures for entry in Comparison.of(experiment).entries]
    assert {round(found["colour_r2"], 3) for found in measures} == {round(figures["r2"], 3)}
