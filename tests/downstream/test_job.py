"""What fine-tuning refuses before it starts, and that a saved model is evaluated as it was made."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import evaluate
from pipeline.config.load import load_config
from pipeline.downstream.base import load_task, make_task
from pipeline.downstream.config import EvaluateModelJobConfig, FinetuneJobConfig
from pipeline.downstream.job import as_saved, open_held_out, open_model, plan_finetune
from pipeline.downstream.saved import finished_model
from pipeline.downstream.training import FinetuneTask
from pipeline.errors import UserError
from pipeline.sources.base import odd_class
from pipeline.training.worker import ALONE
from tests.downstream.conftest import SMALL
from tests.downstream.drawings import locations

VIT = ["student.name=timm/vit_tiny_patch16_224", "student.args={depth: 1, embed_dim: 12, num_heads: 1}"]


@pytest.fixture
def save(make_job, tmp_path):
    """Save an untrained model of a task; gives the override that names it."""

    def write(task, *overrides):
        job = make_job(task, *overrides)
        training = FinetuneTask(job)
        finished_model(training.module, job, training.train.classes).save(tmp_path / "model")
        return f"evaluate.model={tmp_path}/model"

    return write


@pytest.fixture
def plan(drawings, tmp_path):
    """Plan a fine-tuning of the eight drawings."""

    def make(task, *overrides):
        settings = [*SMALL, *locations(drawings, task), f"finetune.task={task}", f"work={tmp_path}/work"]
        return plan_finetune(load_config(FinetuneJobConfig, None, [*settings, *overrides]))

    return make


def test_an_evaluation_goes_by_the_settings_of_the_model_and_the_command_line(save, drawings, tmp_path, capsys):
    model = save("classify", "student.input_size=32", "classify.crop_share=0.5")
    arguments = ["classify", model, f"data.val={drawings}/classes", f"work={tmp_path}/work", "--dry-run"]
    evaluate.start(arguments)
    assert "8 images" in (shown := capsys.readouterr().out)
    assert "student.input_size=32, classify.crop_share=0.5" in shown
    evaluate.start([*arguments, "student.input_size=40"])
    assert "student.input_size=40, classify.crop_share=0.5" in capsys.readouterr().out


@pytest.mark.parametrize("given", [[], ["detect.masks=true"]])
def test_a_detector_without_masks_is_evaluated_on_boxes(save, drawings, given):
    settings = [
        "finetune.task=detect",
        save("detect", "detect.masks=false"),
        *locations(drawings, "detect"),
        "finetune.data_workers=0",
        *given,
    ]
    config = load_config(EvaluateModelJobConfig, None, settings)
    saved = open_model(config)
    config = as_saved(config, saved, [item.partition("=")[0] for item in given])
    assert (config.detect.masks, config.detect.sizes) == (bool(given), [48])
    metrics = make_task(config).evaluate(saved.model, open_held_out(config, saved), ALONE).metrics
    assert {name.partition("/")[0] for name in metrics} == {"box"}


def test_one_class_is_enough_for_detection_alone(plan, drawings, tmp_path):
    (tmp_path / "one.txt").write_text("thing\n")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/disc").symlink_to(drawings / "classes/disc")
    one = {"classify": f"data.train={tmp_path}/photos", "segment": f"segment.classes={tmp_path}/one.txt"}
    for task, override in one.items():
        with pytest.raises(UserError, match=f"has only one class; finetune.task={task} needs 2"):
            plan(task, override)
    whole = json.loads((drawings / "annotations/instances_train.json").read_text())
    things = [entry | {"category_id": 7} for entry in whole["annotations"]]
    dataset = whole | {"categories": whole["categories"][:1], "annotations": things}
    (tmp_path / "one.json").write_text(json.dumps(dataset))
    files = [f"detect.{split}_annotations={tmp_path}/one.json" for split in ("train", "val")]
    assert plan("detect", *files).train.classes == ("square",)


def test_a_backbone_of_another_fixed_size_is_refused(plan):
    with pytest.raises(
        UserError, match=r"vit_tiny_patch16_224 takes no 48 x 48 images \(.*\): change student.input_size"
    ):
        plan("classify", *VIT)
    assert plan("classify", *VIT, "student.input_size=224").start.encoder.dim == 12


def test_mixing_refuses_an_odd_share_before_training_or_where_the_workers_are_counted(plan, make_job):
    with pytest.raises(UserError, match=r"train.batch_size: .* 3 images per worker is an odd number"):
        plan("classify", "train.batch_size=6", "train.workers=2")
    task = FinetuneTask(make_job("classify", "train.batch_size=6"), rank=0, world=2)
    with pytest.raises(UserError, match="3 images per worker is an odd number"):
        next(iter(task.batches(0, 0)))
    mixing = ["classify.mixup=0", "classify.cutmix=0"]
    unmixed = FinetuneTask(make_job("classify", "train.batch_size=6", *mixing), rank=0, world=2)
    assert len(next(iter(unmixed.batches(0, 0))).keys) == 3


def _linked(drawings, tmp_path, kind):
    """The training images again by another path, as class folders."""
    (tmp_path / "held").mkdir()
    if kind == "same":
        return drawings / "classes"
    if kind == "link to the folder":
        (tmp_path / "held/again").symlink_to(drawings / "classes")
        return tmp_path / "held/again"
    for name in ("disc", "square"):
        if kind == "links to class folders":
            (tmp_path / "held" / name).symlink_to(drawings / "classes" / name)
            continue
        (tmp_path / "held" / name).mkdir()
        for number, file in enumerate(sorted((drawings / "classes" / name).iterdir())):
            (tmp_path / "held" / name / f"renamed{number}.png").symlink_to(file)
    return tmp_path / "held"


@pytest.mark.parametrize("kind", ["same", "link to the folder", "links to class folders", "links to files"])
def test_held_out_images_that_are_training_images_are_refused(kind, plan, drawings, tmp_path):
    with pytest.raises(
        UserError, match=r"data\.val \(.*\): 8 of its 8 images are images of data\.train too, first disc/"
    ):
        plan("classify", f"data.val={_linked(drawings, tmp_path, kind)}")


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_a_single_training_image_among_the_held_out_ones_is_refused(task, plan, drawings, tmp_path):
    shutil.copytree(drawings / "held-out", tmp_path / "held")
    photo = tmp_path / "held/images/train/drawing3.png"
    photo.unlink()
    photo.symlink_to(drawings / "images/train/drawing3.png")
    held = [
        f"data.val={tmp_path}/held/images/train",
        f"detect.val_annotations={tmp_path}/held/annotations/instances_train.json",
    ]
    with pytest.raises(UserError, match=r"1 of its 8 images are images of data\.train too, first drawing3\.png"):
        plan(task, *held)
    photo.unlink()
    shutil.copy(drawings / "images/train/drawing3.png", photo)
    assert plan(task, *held).notes == []


def test_one_folder_of_images_may_have_two_files_of_annotations(plan, drawings, tmp_path):
    whole = json.loads((drawings / "annotations/instances_train.json").read_text())
    for split, part in {"train": slice(0, 5), "val": slice(5, 8)}.items():
        found = whole | {name: whole[name][part] for name in ("images", "annotations")}
        (tmp_path / f"{split}.json").write_text(json.dumps(found))
    files = [f"detect.{split}_annotations={tmp_path}/{split}.json" for split in ("train", "val")]
    made = plan("detect", f"data.val={drawings}/images/train", *files)
    assert (len(made.train), len(made.val)) == (5, 3)


def test_a_parquet_file_is_no_held_out_part_of_a_pattern_that_holds_it(plan, drawings, tmp_path):
    files = sorted((drawings / "classes").rglob("*.png"))
    for name, part in {"a": files[:4], "b": files[4:]}.items():
        images = [{"bytes": file.read_bytes(), "path": file.name} for file in part]
        labels = [int(file.parent.name == "square") for file in part]
        pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=r"4 of its 4 images are images of data\.train too"):
        plan("classify", f"data.train={tmp_path}/*.parquet", f"data.val={tmp_path}/b.parquet")


def test_classes_that_differ_are_named_on_both_sides(plan, drawings, tmp_path):
    shutil.copytree(drawings / "held-out/classes", tmp_path / "held")
    (tmp_path / "held/disc").rename(tmp_path / "held/disk")
    expected = r"differ in their classes \(2 each\): only the first has disc; only the second has disk"
    with pytest.raises(UserError, match=expected):
        plan("classify", f"data.val={tmp_path}/held")
    assert odd_class("ab", "ba") == "the same names in another order; class 0 is a in the first and b in the second"
    assert odd_class("abcdef", "a") == "only the first has b, c, d and 2 more"
    assert odd_class("ab", "abb") == "2 and 3 of the same names, some of them repeated"
    assert odd_class("ab", "ab") is None


def test_classes_without_an_image_are_noted(plan, drawings, tmp_path):
    shutil.copytree(drawings / "classes", tmp_path / "train")
    table = [{"bytes": file.read_bytes(), "path": file.name} for file in sorted((tmp_path / "train").rglob("*.png"))]
    pq.write_table(pa.table({"image": table, "label": [0, 2] * 4}), tmp_path / "train.parquet")
    notes = plan("classify", f"data.train={tmp_path}/train.parquet", "data.val=none").notes
    assert notes == ["train: 1 of 3 classes have no image: 1"]


def test_a_detector_without_large_objects_is_told_so_in_words(save, drawings, tmp_path, capsys):
    model = save("detect")
    arguments = ["detect", model, *locations(drawings, "detect"), f"work={tmp_path}/work", "--dry-run"]
    evaluate.start(arguments)
    assert "detect of" in capsys.readouterr().out
    task = load_task("detect")(load_config(FinetuneJobConfig, None, ["finetune.task=detect"]))
    assert task.in_words("box/AP_large", -1.0) == "no objects of that size"
    assert (task.score({"box/AP": -1.0}), task.score({"box/AP": 0.5}), task.score({})) == (None, 0.5, None)


def test_a_dry_run_of_coco_results_checks_both_files(drawings, tmp_path, capsys):
    truth = drawings / "annotations/instances_train.json"
    (tmp_path / "results.json").write_text(json.dumps([{"image_id": 1, "category_id": 7, "score": "0.9"}]))
    with pytest.raises(SystemExit) as exit_:
        evaluate.start(["coco-results", f"annotations={truth}", f"results={tmp_path}/results.json", "--dry-run"])
    assert exit_.value.code == 2
    assert 'detection 0 has score "0.9", which should be a valid number' in capsys.readouterr().err
