"""A task of the user's own, which lives in the tests alone: every job treats it like a built-in one."""

import json
import pickle

import pytest
import torch
from PIL import Image

from jobs import evaluate, export, finetune, predict
from pipeline.compare.comparison import Comparison
from pipeline.compare.tables import render_text
from pipeline.config.load import load_config
from pipeline.config.tree import describe_fields
from pipeline.downstream.backbone import find_start
from pipeline.downstream.base import load_task
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.downstream.job import with_absolute_paths
from pipeline.downstream.saved import finished_model, load_model
from pipeline.downstream.training import FinetuneJob, FinetuneTask
from pipeline.errors import UserError
from pipeline.predict.predictor import load_predictor
from pipeline.student.model import save_encoder
from pipeline.tracking.reading import read_experiment
from pipeline.training.loop import train
from pipeline.training.worker import ALONE
from tests.compare.experiments import Store
from tests.downstream.conftest import SMALL
from tests.fakes import write_photos

TASK = "tests.downstream.toy_task:MeanColour"
SCENES = [override for override in SMALL if override.startswith("data.samples")]
OWN = [item for item in SMALL if not item.startswith(("segment.", "detect."))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a fine-tuned model of the task."""
    folder = tmp_path_factory.mktemp("own")
    overrides = [*OWN, f"finetune.task={TASK}", "mean_colour.hidden=4", "mean_colour.notes=notes.txt", "train.epochs=1"]
    config = load_config(FinetuneJobConfig, None, overrides)
    job = FinetuneJob(with_absolute_paths(config), folder / "start", folder)
    start = find_start(config)
    save_encoder(start.encoder, start.name, start.args, config.student.input_size, job.start)
    task = FinetuneTask(pickle.loads(pickle.dumps(job)))  # noqa: S301  as it travels to a worker
    snapshots = []
    train(task, job.config.train, ALONE, None, snapshots.append)
    assert snapshots[-1].history
    task.module.load_state_dict(snapshots[-1].state["ema"])
    finished_model(task.module, job, task.train.classes).save(folder / "model")
    return folder / "model"


def test_paths_of_its_section_are_made_absolute_and_its_settings_are_kept(model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = load_config(FinetuneJobConfig, None, [f"finetune.task={TASK}", "mean_colour.notes=notes.txt"])
    assert with_absolute_paths(config).mean_colour.notes == f"{tmp_path}/notes.txt"
    assert json.loads((model / "model.json").read_text())["task"] == TASK
    saved = load_model(model)
    assert (saved.task.settings.hidden, saved.task.settings.notes, saved.task.config.student.input_size) == (
        4,
        None,
        48,
    )
    assert (saved.model[1].out_features, saved.classes) == (4, ())


def test_it_predicts_as_the_model_says_and_writes_json_and_pictures(model, tmp_path, capsys):
    write_photos(tmp_path / "photos", 3)
    predictor = load_predictor(str(model), device="cpu")
    found = list(predictor.predict(tmp_path / "photos"))
    assert [colour.shape for colour in found] == [(3,)] * 3
    with pytest.raises(UserError, match="was fine-tuned for mean_colour, not for detect"):
        predictor.detect(tmp_path / "photos")
    predict.main([str(model), str(tmp_path / "photos"), "--task", TASK, "--to", str(tmp_path / "out")])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["task"] == "mean_colour"
    rows = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [row["colour"] for row in rows] == [pytest.approx(colour.tolist()) for colour in found]
    pictures = list((tmp_path / "out/pictures").iterdir())
    assert len(pictures) == 3
    assert Image.open(pictures[0]).mode == "RGB"


def test_it_is_evaluated_with_its_settings(model, tmp_path, capsys):
    arguments = [TASK, *SCENES, f"work={tmp_path}/work", f"evaluate.model={model}", "--dry-run"]
    evaluate.start(arguments)
    assert "mean_colour of" in (shown := capsys.readouterr().out)
    assert "student.input_size=48, mean_colour.hidden=4" in shown
    with pytest.raises(SystemExit):
        evaluate.start(["segment", *arguments[1:]])
    assert "was made for mean_colour, not for segment" in capsys.readouterr().err


def test_it_is_exported_or_refused_in_a_line(model, tmp_path, capsys):
    arguments = ["--format", "torch_export", "safetensors", "--rounds", "1", "--to", str(tmp_path / "out")]
    export.main([str(model), *arguments])
    described = json.loads((tmp_path / "out/export.json").read_text())
    assert (described["outputs"][0]["name"], described["outputs"][0]["shape"]) == ("colour", ["batch", 3])
    program = torch.export.load(tmp_path / "out/student.pt2").module()
    images = torch.rand(2, 3, 48, 48)
    torch.testing.assert_close(program(images), load_model(tmp_path / "out").model(images), rtol=1e-4, atol=1e-5)
    assert "A fine-tuned model: RGB in [0, 1]" in (tmp_path / "out/README.md").read_text()
    described = json.loads((model / "model.json").read_text()) | {"task": "tests.downstream.toy_task:WithoutExport"}
    for name, format_, expected in (
        ("MeanColour", "hf", "hf: timm's layout cannot hold the head of regla_t mean_colour; leave hf out"),
        ("WithoutExport", "safetensors", "fine-tuned for mean_colour cannot be exported: its task has no export form"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(model / "model.safetensors")
        (folder / "model.json").write_text(json.dumps(described | {"task": f"tests.downstream.toy_task:{name}"}))
        with pytest.raises(SystemExit) as ended:
            export.main([str(folder), "--format", format_, "--to", str(tmp_path / "out")])
        assert ended.value.code == 2
        assert expected in capsys.readouterr().err


def test_its_metrics_are_columns_of_a_comparison(tmp_path):
    store = Store(tmp_path)
    for seed, figures in enumerate(({"r2": -0.5, "error": 0.1}, {"r2": 0.25, "error": 0.02})):
        run = store.start("finetune", f"seed={seed}", f"finetune.task={TASK}", f"mean_colour.hidden={seed + 1}")
        run.log_metric_dict(figures)
        run.finish()
    found = Comparison.of(read_experiment(store.uri, store.experiment))
    assert [entry.measures["colour_r2"] for entry in found.entries] == [-0.5, 0.25]
    assert [entry.measures["colour_error"] for entry in found.entries] == [pytest.approx(25.5), pytest.approx(5.1)]
    assert (found.main_accuracy, found.changed) == ("colour_r2", ["mean_colour.hidden"])
    assert found.differences_to_best()[0].startswith(
        "regla_t · hidden=2 (0.25) is 0.75 above regla_t · hidden=1 (-0.50)."
    )
    assert "colour error, levels" in render_text(found)


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("segmnt", "there is no task segmnt; did you mean segment?"),
        ("no.such:Task", "no.such:Task cannot be imported"),
        ("tests.downstream.toy_task:Nothing", "module tests.downstream.toy_task has no Nothing"),
        ("tests.downstream.toy_task:ColourBatch", "tests.downstream.toy_task:ColourBatch is not a subclass"),
        ("tests.downstream.toy_task:Clash", "is called train, which is another section"),
    ],
)
def test_what_is_no_task_is_named(task, expected):
    with pytest.raises(UserError, match=f"finetune.task: .*{expected}"):
        load_config(FinetuneJobConfig, None, [f"finetune.task={task}"])


def test_help_lists_the_fields_of_its_section(capsys):
    arguments = [f"finetune.task={TASK}", "--help"]
    assert "mean_colour.hidden" in describe_fields(*finetune.listed_configs(arguments))
    assert finetune.listed_configs(arguments[:1]) == finetune.listed_configs(["--help"]) == ()
    with pytest.raises(SystemExit):
        finetune.listed_configs(["finetune.task=no.such:Task", "--help"])
    assert "finetune.task: no.such:Task cannot be imported" in capsys.readouterr().err


def test_an_unknown_field_of_its_section_is_named():
    with pytest.raises(UserError, match=r"unknown key mean_colour\.hiden; did you mean mean_colour\.hidden"):
        load_config(FinetuneJobConfig, None, [f"finetune.task={TASK}", "mean_colour.hiden=3"])
    assert load_task(TASK).name == "mean_colour"
