"""What a user can mend is one clear line and exit code 2, before anything is computed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from jobs import distill, evaluate, export, precompute
from jobs._cli import DEFAULT_RECIPE
from pipeline.cache.fill.plan import plan_cache
from pipeline.config.load import load_config
from pipeline.config.tree import iter_fields
from pipeline.distill.config import DistillJobConfig
from pipeline.downstream.base import load_task
from pipeline.downstream.config import TASKS
from pipeline.runs.folder import cache_store
from teachers.registry import create_teacher
from tests.fakes import SMALL_JOB, fill_in_process, write_photos

REPOSITORY = Path(__file__).resolve().parent.parent.parent
HOG = ["teachers=[hog]", "teachers.0.input_size=32"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train.epoch=5"], "unknown key train.epoch; did you mean train.epochs?"),
        (["train.epochs=many"], "train.epochs: "),
        (["train.epochs=0"], "train.epochs: "),
        (["epochs"], "'epochs' is neither a recipe"),
        (["recipes/nowhere.yaml"], "recipe recipes/nowhere.yaml does not exist"),
        (["data.train=no/such/folder"], "error: data.train: "),
        (["data.train=samples", "data.val=no/such/folder"], "error: data.val: "),
        (["teachers=[dinov9]"], "dinov9"),
        (["teachers=[hog, hog]"], "list each teacher once"),
        (["teachers=[hog]", "teachers.0.weights=/no/file.pth"], "hog"),
        (["teachers=[dinov2/vits14]", "teachers.0.weights=/no/file.pth"], "/no/file.pth"),
        (["teachers=[no_such_module:factory]"], "no_such_module"),
        (["student.name=regla_x"], "regla_xl"),
        (["student.name=timm/mobilenetv5"], "mobilenetv5"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(tmp_path, refused, arguments, expected):
    assert expected in refused(distill.main, f"work={tmp_path}/work", *arguments)
    assert not (tmp_path / "work").exists()


def test_an_empty_folder_is_named(tmp_path, refused):
    (tmp_path / "photos").mkdir()
    line = refused(distill.main, f"work={tmp_path}/work", f"data.train={tmp_path}/photos")
    assert f"{tmp_path}/photos" in line
    assert not (tmp_path / "work").exists()


def test_splits_with_other_classes_are_refused_before_anything_is_computed(tmp_path, refused):
    write_photos(tmp_path / "train", 20, classes=3)
    write_photos(tmp_path / "val", 20, classes=2)
    data = [f"data.{split}={tmp_path}/{split}" for split in ("train", "val")]
    line = refused(distill.main, *SMALL_JOB, *HOG, *data, f"work={tmp_path}/work")
    assert "differ in their classes: only the first has class2" in line
    assert not list((tmp_path / "work").rglob("*.parquet"))


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_computed(tmp_path, refused):
    line = refused(distill.main, *SMALL_JOB, *HOG, f"work={tmp_path}/work", "train.batch_size=500")
    assert "train.batch_size" in line
    assert not (tmp_path / "work").exists()


@pytest.mark.usefixtures("ray_session")
def test_pretrained_weights_that_no_hub_gives_stop_the_job_first(tmp_path, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    line = refused(precompute.main, *SMALL_JOB, "teachers=[dinov2/vits14]", f"work={tmp_path}/work")
    assert "dinov2/vits14" in line
    assert "set weights=<path of the file>" in line
    assert not list((tmp_path / "work/cache").rglob("*.parquet"))


@pytest.mark.parametrize("main", [distill.main, precompute.main])
def test_a_dry_run_finds_out_that_weights_cannot_be_had(tmp_path, refused, monkeypatch, main):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    line = refused(main, *SMALL_JOB, "teachers=[hog, dinov2/vits14]", f"work={tmp_path}/work", "--dry-run")
    assert "timm/vit_small_patch14_dinov2.lvd142m" in line
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("main", [distill.main, precompute.main])
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_weights_of_another_network_are_refused_in_the_plan(tmp_path, refused, main, dry):
    small = "{embed_dim: 64, depth: 2, num_heads: 2}"
    teacher = create_teacher("dinov2/vits14", weights="random", input_size=56, args=yaml.safe_load(small))
    teacher.load()
    torch.save(teacher.model.state_dict(), tmp_path / "other.pth")
    entry = f"teachers=[{{model: dinov2/vits14, weights: {tmp_path}/other.pth, input_size: 56}}]"
    line = refused(main, *SMALL_JOB, entry, f"work={tmp_path}/work", *dry)
    assert "the file looks like a transformer (width 64, 2 blocks" in line
    assert "this architecture is ViT-S/14 (width 384, 12 blocks" in line
    assert not (tmp_path / "work").exists()


def test_data_that_shrank_is_known_and_a_dry_run_says_so_and_writes_nothing(tmp_path, job):
    write_photos(tmp_path / "photos", 24)
    arguments = [*HOG, f"work={tmp_path}/work", f"data.train={tmp_path}/photos", "data.val=none", "data.name=mine"]
    config = load_config(DistillJobConfig, DEFAULT_RECIPE, arguments)
    fill_in_process(plan_cache(config, cache_store(config)))
    cached = sorted((tmp_path / "work/cache").rglob("*"))
    (tmp_path / "photos/class0/photo000.jpg").unlink()
    text, _ = job(precompute.main, *arguments, "--dry-run")
    assert f"23 from {tmp_path}/photos; view full; version " in text
    assert "23 of 23 views cached" in text
    (tmp_path / "photos/class1/photo001.jpg").touch()
    text, _ = job(precompute.main, *arguments, "--dry-run")
    assert f"23 from {tmp_path}/photos; view full; 1 new or changed, still to be read" in text
    assert sorted((tmp_path / "work/cache").rglob("*")) == cached


def test_help_lists_every_field_with_its_default(capsys):
    from jobs._cli import run

    with pytest.raises(SystemExit) as exit_:
        run(DistillJobConfig, distill.main, distill.__doc__, ["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for key, _, default, meaning, *_ in iter_fields(DistillJobConfig):
        line = next(line for line in text.splitlines() if line.split()[:1] == [key])
        assert meaning in line
        assert f"= {'none' if default is None else default}]" in line


HELP = """import runpy, sys
sys.argv[1:] = {arguments}
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    heavy = ("torch", "mlflow", "ray", "timm", "pyarrow", "numpy")
    print(end.code, [name for name in heavy if name in sys.modules], file=sys.stderr)"""


MISTYPED = {
    **{script: ["train.epohcs=3"] for script in ("distill", "finetune", "precompute", "benchmark")},
    "evaluate": ["knn", "train.epohcs=3"],
    "export": ["student", "--format", "tflite"],
    "predict": ["student", "photos", "--task", "detekt"],
    "compare": ["--experimnt", "regla-distill"],
}


@pytest.mark.parametrize("script", MISTYPED)
def test_help_and_what_is_mistyped_wait_for_no_torch(script):
    for arguments, code in (["--help"], 0), (MISTYPED[script], 2):
        text = HELP.format(arguments=arguments, script=f"jobs/{script}.py")
        done = subprocess.run([sys.executable, "-c", text], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert done.stderr.splitlines()[-1] == f"{code} []"


def test_every_evaluation_and_task_is_known_before_it_is_imported():
    assert {*evaluate.EVALUATIONS, *TASKS} == {*evaluate.ROOTS}
    for name, (section, _) in TASKS.items():
        task = load_task(name)
        assert (task.name, task.section) == (name, section)


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, job):
    text, figures = job(distill.main, *SMALL_JOB, *HOG, f"work={tmp_path}/work", "--dry-run")
    assert figures == {"dry_run": True}
    for expected in ("144 from samples", "0 of 192 views cached", "2 epochs of 6 steps", "grid hog", "total"):
        assert expected in text
    assert not (tmp_path / "work").exists()


def test_every_recipe_is_valid():
    recipes = sorted((REPOSITORY / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        assert load_config(DistillJobConfig, recipe).name == yaml.safe_load(recipe.read_text())["name"]


def test_evaluate_asks_for_its_student_and_refuses_what_is_none(tmp_path, refused):
    assert "evaluate.student" in refused(evaluate.knn, *SMALL_JOB)
    assert "is not an exported student" in refused(evaluate.knn, *SMALL_JOB, f"evaluate.student={tmp_path}")


def test_a_process_ends_with_code_2_and_no_traceback():
    command = [sys.executable, "jobs/distill.py", "train.epoch=5"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == "error: unknown key train.epoch; did you mean train.epochs?\n"


def test_evaluate_without_a_task_says_which_there_are():
    command = [sys.executable, "jobs/evaluate.py"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "knn" in ended.stderr


def test_an_export_to_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        export.main(["timm/resnet18", "--to", f"{tmp_path}/file"])
    assert ended.value.code == 2
    assert f"error: --to: {tmp_path}/file is a file; name a folder" in capsys.readouterr().err
