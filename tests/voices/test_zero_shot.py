import json

import pytest
import torch
import torch.nn.functional as F

from jobs import evaluate, export
from pipeline.cache.read.scan import read_summaries
from pipeline.config.load import load_config
from pipeline.errors import UserError
from pipeline.student.loading import load_student
from pipeline.voices.config import WordsJobConfig
from pipeline.voices.measured import compute_vectors, plan_words, teacher_embeddings
from pipeline.voices.words import load_words
from pipeline.voices.zero_shot import accuracy, class_names, zero_shot
from tests.fakes import without_ray, write_photos
from tests.teachers import tiny_clip

ORIGIN = {
    "run_id": "0123",
    "teachers": [{"name": "clip", "architecture": "a", "weights": "w", "licence": "mit"}],
    "data": [{"location": "photos", "view": "full", "images": 7, "classes": 3}],
    "training": {"epochs": 2, "samples_seen": 14},
    "knn": {"knn": None},
}


@pytest.fixture
def planned(taught, tmp_path, monkeypatch):
    """The configuration of an evaluation of the taught student on the held-out photos, and its plan."""

    def plan(*overrides):
        made = taught()
        paths = [f"data.val={tmp_path}/photos/val", f"work={tmp_path}/work", f"evaluate.student={made.folder}"]
        given = [*paths, f"words.text_weights={made.file}", "words.templates=['{}']", *overrides]
        config = load_config(WordsJobConfig, None, given)
        without_ray(monkeypatch)
        return made, config, plan_words(config)

    return plan


def test_the_figures_are_those_of_the_words_and_of_the_cached_teacher(planned, tmp_path):
    made, config, plan = planned()
    plan = compute_vectors(plan, config)
    classes = class_names(plan, config.words)
    assert classes == ("class0", "class1", "class2")
    figures = zero_shot(plan, classes, config.words.templates)
    words = load_words(str(made.folder), text_weights=str(made.file), device="cpu")
    names = sorted((tmp_path / "photos/val").rglob("*.jpg"))
    labels = torch.tensor([int(path.parent.name[-1]) for path in names])
    weights = words.embed_classes(classes)
    expected = accuracy(words.embed(tmp_path / "photos/val") @ weights.T, labels)
    assert figures["top1"] == pytest.approx(expected["top1"])
    assert figures["top5"] == 100  # of three classes
    own, known = read_summaries(made.plan.split("val").dataset, made.plan.teachers[0])
    assert figures["teacher_top1"] == accuracy(F.normalize(own, dim=1) @ weights.T, known)["top1"]


def test_without_cached_features_there_is_no_figure_of_the_teacher(planned, tmp_path):
    write_photos(tmp_path / "new/val", 12, seed=9)
    _, config, plan = planned(f"data.val={tmp_path}/new/val", "words.classes='a, b, c'")
    plan = compute_vectors(plan, config)
    assert teacher_embeddings(plan) is None
    assert zero_shot(plan, ("a", "b", "c"), ["{}"]).keys() == {"top1", "top5"}


def test_classes_that_do_not_fit_the_labels_are_refused(planned, tmp_path):
    _, config, plan = planned("words.classes='a, b'")
    with pytest.raises(UserError, match=r"words.classes: 2 names for the 3 classes"):
        class_names(plan, config.words)
    with pytest.raises(UserError, match=r"words.classes: 2 names, but an image has label 2"):
        zero_shot(compute_vectors(plan, config), ("a", "b"), ["{}"])


def test_accuracy_counts_the_best_and_the_five_best():
    scores = torch.eye(6)[[0, 1, 2, 3]] + torch.linspace(0, 0.1, 6)
    assert accuracy(scores, torch.tensor([0, 1, 0, 1])) == {"top1": 50.0, "top5": 75.0}


def test_the_job_says_what_the_teacher_reaches_and_so_does_the_model_card(
    taught, ray_session, tmp_path, capsys, monkeypatch
):
    made = taught()
    (made.folder / "provenance.json").write_text(json.dumps(ORIGIN))
    monkeypatch.chdir(tmp_path)
    given = [f"data.val={tmp_path}/photos/val", f"work={tmp_path}/work", f"evaluate.student={made.folder}"]
    arguments = ["zero-shot", *given, f"words.text_weights={made.file}", "words.templates=[simple]"]
    evaluate.start(arguments)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"top1", "top5", "teacher_top1", "teacher_top5", "mlflow_run_id"} == figures.keys()
    store = f"sqlite:///{tmp_path}/work/mlflow.db"
    export.main([str(made.folder), "--heads", "--format", "safetensors", "--to", "out", "--tracking-uri", store])
    (row,) = [line for line in (tmp_path / "out/README.md").read_text().splitlines() if "| zero-shot |" in line]
    assert f"the head of clip/{tiny_clip.PLAIN}" in row
    assert f"teacher_top1 {figures['teacher_top1']:.1f} %" in row
    again = load_student(str(tmp_path / "out"))
    assert [entry["evaluation"] for entry in again.provenance["evaluations"]] == ["zero-shot"]
    export.main(
        [str(tmp_path / "out"), "--format", "safetensors", "--to", "twice", "--tracking-uri", "sqlite:///no.db"]
    )
    assert "the model card has no new evaluations: --tracking-uri: there is no MLflow store" in capsys.readouterr().out
    assert row in (tmp_path / "twice/README.md").read_text().splitlines()
