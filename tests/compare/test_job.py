import json
import socket
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs.compare import main
from tests.compare.experiments import Store

FILES = ["comparison.html", "comparison.md", "curves.csv", "differences.csv", "groups.csv", "runs.csv"]
FIGURES = ["figure1.png", "figure3.png", "figure4.png"]


@pytest.fixture
def compare(capsys, tmp_path):
    """Run the job; gives its text and the figures of its last line."""

    def compare(store, *arguments):
        main(["--experiment", store.experiment, "--tracking-uri", store.uri, "--to", str(tmp_path / "to"), *arguments])
        text = capsys.readouterr().out
        return text, json.loads(text.splitlines()[-1])

    return compare


@pytest.fixture
def refused(capsys):
    """Run the job on what it must refuse; gives its one line."""

    def refused(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        assert exit_.value.code == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ")
        assert "\n" not in error
        return error

    return refused


def test_everything_is_written_and_logged_beside_the_runs(proof, compare, tmp_path):
    text, figures = compare(proof.store)
    assert (figures["runs"], len(figures["groups"])) == (13, 6)
    best = figures["groups"]["regla_s · hog + clip/ViT-B-32@openai"]
    assert (best["seeds"], best["knn"]["n"], best["linear"]["std"]) == (2, 2, None)
    assert "latency" in best["front"]
    assert sorted(file.name for file in (tmp_path / "to").iterdir()) == sorted(FILES + FIGURES)
    assert sorted(Path(file).name for file in figures["files"]) == sorted(FILES + FIGURES)
    client = MlflowClient(proof.uri)
    run = client.get_run(figures["mlflow_run_id"])
    assert (run.info.status, run.data.tags["job"], run.data.metrics["runs"]) == ("FINISHED", "compare", 13)
    logged = [Path(file.path).name for file in client.list_artifacts(run.info.run_id, "comparison")]
    assert sorted(logged) == sorted(FILES + FIGURES)
    assert f"run {figures['mlflow_run_id']}" in text


def test_comparisons_are_no_part_of_comparisons(store, compare):
    store.distil("regla_t", ["hog"], 0, 20.0)
    _, first = compare(store)
    text, second = compare(store)
    assert first["groups"] == second["groups"]
    assert "Runs without a student, not shown: 1 compare" in text


def test_figures_without_anything_in_them_are_not_drawn(store, compare, tmp_path):
    store.judge("linear", None, {"top1": 50.0}, "evaluate.student=runs/a/student")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "figure3.png").write_bytes(b"of another comparison")
    _, figures = compare(store)
    assert sorted(file.name for file in (tmp_path / "to").iterdir()) == FILES
    assert figures["groups"]["runs/a/student"]["linear"]["mean"] == 50.0


def test_an_experiment_that_is_not_there_is_refused_with_those_that_are(proof, refused):
    error = refused("--experiment", "prof", "--tracking-uri", proof.uri)
    assert "there is no prof at sqlite" in error
    assert proof.experiment in error


@pytest.mark.parametrize(
    ("filter_string", "expected"),
    [
        ("tags.job ~ 'distill'", "MLflow cannot parse"),
        ("metrics.knn_after > 'much'", "MLflow cannot parse"),
        ("metrics.knn_after > 1000", "it leaves no run"),
    ],
)
def test_a_filter_that_says_nothing_is_refused(proof, refused, tmp_path, filter_string, expected):
    where = ("--tracking-uri", proof.uri, "--to", tmp_path / "to")
    error = refused("--experiment", proof.experiment, "--filter", filter_string, *where)
    assert error.startswith("error: --filter: ")
    assert expected in error
    assert not (tmp_path / "to").exists()


def test_a_store_that_is_not_there_is_refused_and_not_made(refused, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    error = refused("--experiment", "a", "--tracking-uri", f"http://127.0.0.1:{port}")
    assert "cannot be used" in error
    assert "--tracking-uri" in error
    assert "there is no MLflow store" in refused("--experiment", "a", "--tracking-uri", f"sqlite:///{tmp_path}/none.db")
    assert not list(tmp_path.iterdir())
    (tmp_path / "text.db").write_text("no database " * 100)
    assert "cannot be used" in refused("--experiment", "a", "--tracking-uri", f"sqlite:///{tmp_path}/text.db")


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_read(refused, tmp_path):
    (tmp_path / "file").write_text("")
    error = refused("--experiment", "a", "--tracking-uri", Store(tmp_path).uri, "--to", tmp_path / "file")
    assert "--to: " in error
