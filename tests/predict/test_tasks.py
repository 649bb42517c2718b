"""Fine-tuned models on your own images: what the API gives is what the model says, and what the job writes is that."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from jobs import predict
from pipeline.config.load import load_config
from pipeline.downstream.base import make_task
from pipeline.downstream.config import TASKS, FinetuneJobConfig
from pipeline.downstream.pictures import palette
from pipeline.downstream.saved import SavedModel
from pipeline.errors import UserError
from pipeline.imaging.decode import decode_image, decode_label_map
from pipeline.predict.images import find_images
from pipeline.predict.predictor import load_predictor
from pipeline.student.loading import load_student
from tests.downstream.conftest import SMALL
from tests.fakes import write_photos

CLASSES = ("ant", "bee", "cow")
ARGS = {"dims": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "heads": 1}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five photos of several widths."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 5)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, live):
    """The folder of a small model of each task, its weights at random."""
    torch.manual_seed(0)
    parent = tmp_path_factory.mktemp("models")
    for name in TASKS:
        task = make_task(load_config(FinetuneJobConfig, None, [*SMALL, f"finetune.task={name}"]))
        encoder = load_student("regla_t", weights="random", args=ARGS).encoder
        model = live(task.build(encoder, CLASSES))
        SavedModel(task, model, CLASSES, {"model": "regla_t", "args": ARGS}).save(parent / name)
    return parent


def run(capsys, *arguments):
    """The job's figures."""
    predict.main([str(argument) for argument in arguments])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def pictures(folder):
    return sorted(path.name for path in (folder / "pictures").iterdir())


@torch.inference_mode()
def test_a_classifier_gives_its_likeliest_classes_as_in_the_evaluation(photos, models, tmp_path, capsys):
    predictor = load_predictor(str(models / "classify"), device="cpu", batch_size=2)
    paths, _ = find_images([photos])
    steps = predictor.saved.task.held_out_transform()
    logits = predictor.model(torch.stack([steps(decode_image(path.read_bytes())) for path in paths]))
    found = list(predictor.classify(photos))
    assert [[name for name, _ in best] for best in found] == [
        [CLASSES[number] for number in order] for order in logits.argsort(1, descending=True).tolist()
    ]
    assert [best[0][1] for best in found] == pytest.approx(logits.softmax(1).max(1).values.tolist(), abs=1e-5)
    assert len(next(predictor.classify(np.array(Image.open(paths[0])), top=1))) == 1
    assert run(capsys, models / "classify", photos, "--to", tmp_path)["task"] == "classify"
    written = json.loads((tmp_path / "predictions.json").read_text())
    assert [row["path"] for row in written] == [str(path) for path in paths]
    assert written[0]["top"][0]["class"] == found[0][0][0]
    assert pictures(tmp_path) == [f"{number:05d}-{path.stem}.png" for number, path in enumerate(paths)]


def test_segmentation_gives_maps_at_the_images_own_size_and_writes_them_as_png(photos, models, tmp_path, capsys):
    predictor = load_predictor(str(models / "segment"), device="cpu")
    paths, _ = find_images([photos])
    image = torch.from_numpy(np.array(decode_image(paths[1].read_bytes()))).permute(2, 0, 1)
    maps = list(predictor.segment(photos))
    with torch.inference_mode():
        assert torch.equal(maps[1], predictor.saved.task.label_map(predictor.model, image))
    run(capsys, models / "segment", photos, "--to", tmp_path)
    written = json.loads((tmp_path / "predictions.json").read_text())
    assert written["classes"] == list(CLASSES)
    for row, expected in zip(written["images"], maps, strict=True):
        assert np.array_equal(decode_label_map((tmp_path / row["labels"]).read_bytes()), expected.numpy())
    with Image.open(tmp_path / written["images"][0]["labels"]) as labels:
        assert labels.getpalette()[:9] == palette(3).ravel().tolist()
    assert len(pictures(tmp_path)) == 5


def test_detections_are_written_in_cocos_results_format_beside_their_images(photos, models, tmp_path, capsys):
    predictor = load_predictor(str(models / "detect"), device="cpu")
    found = list(predictor.detect(photos))
    assert sum(len(objects.names) for objects in found) > 0
    run(capsys, models / "detect", photos, "--to", tmp_path)
    truth = COCO(tmp_path / "images.json")
    loaded = truth.loadRes(str(tmp_path / "predictions.json"))
    for image, path, objects in zip(truth.dataset["images"], find_images([photos])[0], found, strict=True):
        assert image["file_name"] == str(path)
        width, height = Image.open(path).size
        assert (image["width"], image["height"]) == (width, height)
        assert objects.masks.shape == (len(objects.names), height, width)
        results = loaded.loadAnns(loaded.getAnnIds(imgIds=image["id"]))
        assert [truth.cats[entry["category_id"]]["name"] for entry in results] == objects.names
        assert [entry["score"] for entry in results] == pytest.approx(objects.scores.tolist())
        for entry, box, mask in zip(results, objects.boxes.tolist(), objects.masks, strict=True):
            left, top, right, bottom = box
            assert entry["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=1e-3)
            assert np.array_equal(truth.annToMask({**entry, "image_id": image["id"]}), mask.numpy())
    assert len(pictures(tmp_path)) == 5


def test_objects_below_the_smallest_score_are_neither_written_nor_drawn(photos, models, tmp_path, capsys):
    found = list(load_predictor(str(models / "detect"), device="cpu").detect(photos))
    scores = torch.cat([objects.scores for objects in found])
    least = float(scores.median())
    run(capsys, models / "detect", photos, "--to", tmp_path, "--min-score", least)
    written = json.loads((tmp_path / "predictions.json").read_text())
    assert len(written) == int((scores >= least).sum()) < len(scores)
    objects = found[0].at_least(least)
    image = torch.zeros(3, *objects.masks.shape[1:], dtype=torch.uint8)
    task = load_predictor(str(models / "detect"), device="cpu").saved.task
    assert len(objects.names) == len(objects.masks) == len(objects.boxes) > 0
    assert task.draw(image, objects, CLASSES).any()  # all of them, though a detection is drawn from 0.5 on otherwise
    assert task.draw(image, found[0].at_least(1.1), CLASSES).sum() == 0


@pytest.mark.parametrize(
    ("model", "score", "message"),
    [("classify", "0.5", "only the objects of a detector have scores"), ("detect", "1.5", "between 0 and 1")],
)
def test_a_smallest_score_suits_objects_and_is_a_score(model, score, message, photos, models, tmp_path, capsys):
    with pytest.raises(SystemExit):
        predict.main([str(models / model), str(photos), "--to", str(tmp_path / "out"), "--min-score", score])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_earlier_prediction_is_named_and_replaced_and_other_files_stay(photos, models, tmp_path, capsys):
    paths, out = find_images([photos])[0], tmp_path / "out"
    predict.main([str(models / "detect"), str(photos), "--to", str(out)])
    assert "replacing" not in capsys.readouterr().out
    (out / "notes.txt").write_text("mine")
    (out / "pictures/own.png").write_bytes(b"mine")
    predict.main([str(models / "segment"), *map(str, paths[:2]), "--to", str(out)])
    assert f"replacing the 7 files of an earlier prediction in {out}" in capsys.readouterr().out
    assert len(list((out / "labels").iterdir())) == 2
    assert sorted(path.name for path in out.iterdir()) == ["labels", "notes.txt", "pictures", "predictions.json"]
    assert len(list((out / "pictures").iterdir())) == 3


def test_a_prediction_that_fails_leaves_the_earlier_one(photos, models, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    run(capsys, models / "classify", photos, "--to", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.downstream.classify.task.Classification.describe", fail)
    with pytest.raises(SystemExit):
        predict.main([str(models / "classify"), str(photos), "--to", str(out)])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_pictures_that_are_no_known_predictions_are_not_replaced(photos, models, tmp_path, capsys):
    (tmp_path / "out/pictures").mkdir(parents=True)
    shutil.copy(find_images([photos])[0][0], tmp_path / "out/pictures/00000-mine.png")
    arguments = [str(models / "classify"), str(tmp_path / "out"), "--to", str(tmp_path / "out")]
    for expected in ("pictures without a predictions.json", "is an earlier prediction that would be replaced"):
        with pytest.raises(SystemExit) as exit_:
            predict.main(arguments)
        assert exit_.value.code == 2
        assert expected in capsys.readouterr().err
        (tmp_path / "out/predictions.json").write_text("[]")
    assert (tmp_path / "out/pictures/00000-mine.png").is_file()


def test_an_earlier_file_of_features_is_named(photos, models, tmp_path, capsys):
    for expected in (False, True):
        predict.main([str(models / "detect"), str(photos), "--to", str(tmp_path / "features.json")])
        assert (f"replacing {tmp_path}/features.json" in capsys.readouterr().out) == expected


@pytest.mark.parametrize("task", TASKS)
def test_images_that_cannot_be_read_are_left_out_of_the_predictions(task, photos, models, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    paths, _ = find_images([tmp_path / "photos"])
    for path in (broken := [paths[0], paths[3]]):
        path.write_bytes(b"none")
    readable, whole, part = [path for path in paths if path not in broken], tmp_path / "whole", tmp_path / "part"
    run(capsys, models / task, *readable, "--to", whole)
    with pytest.raises(SystemExit) as exit_:
        run(capsys, models / task, tmp_path / "photos", "--to", part)
    printed = capsys.readouterr()
    assert (exit_.value.code, printed.err.count("not an image in a known format")) == (1, 2)
    figures = json.loads(printed.out.splitlines()[-1])
    assert (figures["images"], figures["unreadable"]) == (3, [str(path) for path in broken])
    assert (part / "predictions.json").read_text() == (whole / "predictions.json").read_text()
    assert pictures(part) == pictures(whole)


def test_features_of_a_fine_tuned_model_are_those_of_its_backbone(photos, models, tmp_path, capsys):
    predictor = load_predictor(str(models / "segment"), device="cpu")
    assert predictor.features(photos).shape == (5, 32)
    figures = run(capsys, models / "segment", photos, "--to", tmp_path / "features.json")
    assert (figures["images"], figures["channels"]) == (5, 32)


def test_a_model_of_another_task_is_refused_with_the_remedy(photos, models, tmp_path, capsys):
    detector = load_predictor(str(models / "detect"), device="cpu")
    with pytest.raises(UserError, match=r"was fine-tuned for detect, not for segment"):
        detector.segment(photos)
    with pytest.raises(SystemExit) as exit_:
        predict.main([str(models / "classify"), str(photos), "--task", "detect", "--to", str(tmp_path / "out")])
    assert exit_.value.code == 2
    assert "was fine-tuned for classify, not for detect" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    backbone = load_predictor("timm/test_resnet", weights="random", device="cpu")
    with pytest.raises(UserError, match=r"is a backbone and cannot detect: .*finetune\.task=detect"):
        backbone.detect(photos)


def test_another_input_size_is_for_classifiers_alone(models):
    assert load_predictor(str(models / "classify"), input_size=96).saved.task.config.student.input_size == 96
    with pytest.raises(UserError, match=r"of the size that it was fine-tuned at \(detect\)"):
        load_predictor(str(models / "detect"), input_size=96)
