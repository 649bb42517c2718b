"""Metrics equal published numbers, torchmetrics, and independent NumPy."""

import json

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassJaccardIndex

from jobs import evaluate
from pipeline.downstream.classify.task import classification_metrics
from pipeline.downstream.detect.coco_eval import NUMBERS, average_precision, coco_index, read_files, score
from pipeline.downstream.detect.task import Objects, coco_results
from pipeline.downstream.segment.classes import IGNORE
from pipeline.downstream.segment.task import segmentation_metrics
from pipeline.errors import UserError


def _maps(classes, absent=()):
    rng = torch.Generator().manual_seed(3)
    truth = torch.randint(classes, (4, 40, 50), generator=rng)
    guess = torch.where(torch.rand(4, 40, 50, generator=rng) < 0.6, truth, torch.randint(classes, (4, 40, 50)))
    for label in absent:
        guess[guess == label], truth[truth == label] = 0, 0
    truth[:, :5] = IGNORE
    return truth, guess


def test_miou_equals_torchmetrics_and_numpy_on_random_maps():
    truth, guess = _maps(7)
    confusion = MulticlassConfusionMatrix(7, ignore_index=IGNORE)
    for one, other in zip(guess, truth, strict=True):
        confusion.update(one, other)
    metrics, table = segmentation_metrics(confusion.compute(), list("abcdefg"))
    reference = MulticlassJaccardIndex(7, ignore_index=IGNORE)(guess, truth)
    assert metrics["miou"] == pytest.approx(100 * float(reference), abs=1e-3)

    y, p = truth.numpy()[truth != IGNORE], guess.numpy()[truth != IGNORE]
    iou = [100 * np.sum((y == k) & (p == k)) / np.sum((y == k) | (p == k)) for k in range(7)]
    accuracy = [100 * np.mean(p[y == k] == k) for k in range(7)]
    assert metrics["miou"] == pytest.approx(np.mean(iou))
    assert metrics["macc"] == pytest.approx(np.mean(accuracy))
    assert metrics["aacc"] == pytest.approx(100 * np.mean(y == p))
    assert [row["iou"] for row in table] == pytest.approx(iou, abs=0.006)


def test_a_class_that_occurs_nowhere_is_left_out_of_the_mean():
    truth, guess = _maps(5, absent=[3])
    matrix = MulticlassConfusionMatrix(5, ignore_index=IGNORE)(guess, truth)
    metrics, table = segmentation_metrics(matrix, list("abcde"))
    present = [row["iou"] for row in table if row["class"] != "d"]
    assert metrics["miou"] == pytest.approx(np.mean(present), abs=0.01)
    assert np.isnan(table[3]["iou"])


def test_top_1_and_mean_class_accuracy_equal_torchmetrics():
    rng = torch.Generator().manual_seed(0)
    truth, guess = torch.randint(6, (300,), generator=rng), torch.randint(6, (300,), generator=rng)
    metrics, _ = classification_metrics(MulticlassConfusionMatrix(6)(guess, truth), list("abcdef"))
    assert metrics["top1"] == pytest.approx(100 * float(MulticlassAccuracy(6, average="micro")(guess, truth)))
    assert metrics["mean_class_accuracy"] == pytest.approx(100 * float(MulticlassAccuracy(6)(guess, truth)), abs=1e-3)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_published_example_results_give_the_published_numbers(kind, shared_data, capsys):
    folder = shared_data / "references/coco_eval"
    results = folder / f"instances_val2014_fake{kind}100_results.json"
    evaluate.start(["coco-results", f"annotations={folder}/instances_val2014_100.json", f"results={results}"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    published = json.loads((folder / "expected.json").read_text())["published"][kind]
    assert list(published) == list(NUMBERS)
    for name, value in published.items():
        assert figures[f"{kind}/{name}"] == pytest.approx(value, abs=5.1e-4)


SHEET = {"id": 1, "width": 60, "height": 40}


def _truth(boxes):
    annotations = []
    for number, (left, top, width, height) in enumerate(boxes):
        mask = np.zeros((40, 60), np.uint8)
        mask[top : top + height, left : left + width] = 1
        annotations.append(
            {"id": number + 1, "image_id": 1, "category_id": 4, "bbox": [left, top, width, height], "iscrowd": 0}
            | {"area": width * height, "segmentation": rle.encode(np.asfortranarray(mask))}
        )
    return coco_index({"images": [SHEET], "annotations": annotations, "categories": [{"id": 4, "name": "thing"}]})


def test_a_perfect_detector_scores_one_on_boxes_and_masks():
    masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    masks[0, 5:15, 10:30] = True
    masks[1, 20:38, 40:55] = True
    boxes = torch.tensor([[10.0, 5, 30, 15], [40, 20, 55, 38]])
    found = Objects(boxes, torch.tensor([0, 0]), ["thing", "thing"], torch.tensor([0.9, 0.8]), masks)
    results = coco_results(found, 1, [4])
    truth = _truth([(10, 5, 20, 10), (40, 20, 15, 18)])
    for kind in ("bbox", "segm"):
        scores = average_precision(truth, results, kind)
        assert scores.numbers["AP"] == pytest.approx(1)
        assert scores.per_category == {4: pytest.approx(1)}


SQUARE = {"image_id": 1, "category_id": 4, "bbox": [10, 5, 20, 10]}
POLYGON = {"segmentation": [[10, 5, 30, 5, 30, 15, 10, 15]]}


@pytest.mark.parametrize("entry", [SQUARE | {"id": 0}, SQUARE, SQUARE | POLYGON], ids=["id 0", "box alone", "polygon"])
def test_annotations_match_whatever_they_are_numbered_and_leave_out(entry):
    dataset = {"images": [SHEET], "annotations": [entry], "categories": [{"id": 4, "name": "thing"}]}
    given = dict(entry)
    scores = average_precision(coco_index(dataset), [SQUARE | {"score": 0.9}], "bbox")
    assert scores.numbers["AP"] == pytest.approx(1)
    assert scores.numbers["AP_small"] == pytest.approx(1)  # by an area of 200
    assert entry == given


@pytest.mark.parametrize(
    ("truth", "results", "expected"),
    [
        ({"annotations": [SQUARE | {"category_id": 5}]}, [], r"truth.json: annotation 1 \(1\) has category 5"),
        ({"categories": [{"id": 4}]}, [], "truth.json: category 4 has no name"),
        (
            {"categories": [{"id": "4", "name": "thing"}]},
            [],
            'category thing has id "4", which should be a valid integer',
        ),
        ({"images": [SHEET, SHEET]}, [], "repeats id 1"),
        (
            {"annotations": [SQUARE]},
            [SQUARE | POLYGON | {"score": 1}],
            r"annotation 1 \(1\) has no segmentation, which .* is compared",
        ),
    ],
)
def test_annotations_that_results_cannot_be_held_against_are_named(truth, results, expected, tmp_path):
    whole = {"images": [SHEET], "annotations": [], "categories": [{"id": 4, "name": "thing"}], **truth}
    (tmp_path / "truth.json").write_text(json.dumps(whole))
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=expected):
        score(*read_files(tmp_path / "truth.json", tmp_path / "results.json"))


def test_results_are_scored_against_annotations_without_crowd_flags_and_areas(tmp_path):
    truth = {"images": [SHEET], "annotations": [SQUARE | POLYGON], "categories": [{"id": 4, "name": "thing"}]}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (runs,) = rle.frPyObjects(POLYGON["segmentation"], 40, 60)
    mask = {"segmentation": {**runs, "counts": runs["counts"].decode()}}
    (tmp_path / "results.json").write_text(json.dumps([SQUARE | mask | {"score": 0.9}]))
    scores = score(*read_files(tmp_path / "truth.json", tmp_path / "results.json"))
    assert {kind: score.numbers["AP"] for kind, score in scores.items()} == pytest.approx({"bbox": 1, "segm": 1})


def test_no_detections_score_zero():
    assert average_precision(_truth([(10, 5, 20, 10)]), [], "bbox").numbers["AP"] == 0


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ({}, "not COCO results: expected a list of detections"),
        ([{"image_id": 1, "category_id": 4, "bbox": [0, 0, 1, 1]}], "detection 0 has no score"),
        ([{"image_id": 1, "category_id": 4, "score": 1}], "detection 0 has no bbox or segmentation"),
        ([{"image_id": 9, "category_id": 4, "score": 1, "bbox": [0, 0, 1, 1]}], "detection 0 is of image 9"),
    ],
)
def test_a_results_file_that_does_not_fit_is_refused(results, expected, tmp_path, capsys):
    (tmp_path / "truth.json").write_text(
        json.dumps({"images": [SHEET], "annotations": [], "categories": [{"id": 4, "name": "thing"}]})
    )
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit):
        evaluate.start(["coco-results", f"annotations={tmp_path}/truth.json", f"results={tmp_path}/results.json"])
    assert expected in capsys.readouterr().err
