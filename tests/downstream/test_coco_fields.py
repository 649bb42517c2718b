"""Every field that is read from a COCO file, in every JSON type: read right, or refused in one line that names the entry."""

import json
import re

import numpy as np
import pytest
from pycocotools import mask as rle

from pipeline.downstream.detect.coco import CocoImages
from pipeline.downstream.detect.coco_eval import in_words, read_files, score
from pipeline.downstream.detect.shapes import run_lengths, wrong_shape
from pipeline.errors import UserError

WIDTH, HEIGHT = 30, 20
POLYGON = [[5, 5, 15, 5, 15, 12, 5, 12]]
RUNS = {"size": [HEIGHT, WIDTH], "counts": [100, 50, 450]}
VALUES = {
    "null": "null",
    "text": '"7"',
    "empty text": '""',
    "true": "true",
    "false": "false",
    "list": "[]",
    "list of null": "[null]",
    "list of text": '["a", "b", "c", "d"]',
    "mapping": "{}",
    "other mapping": '{"a": 1}',
    "integer": "7",
    "negative": "-7",
    "float": "7.25",
    "huge integer": "1" + "0" * 400,
    "longer integer than Python reads": "1" * 5000,
    "huge float": "1e308",
    "too large": "1e999",
    "NaN": "NaN",
    "infinite": "-Infinity",
}
"""JSON text of each type."""
GOOD = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT}],
    "categories": [{"id": 3, "name": "cat"}],
    "annotations": [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 3,
            "bbox": [5, 5, 10, 7],
            "area": 70,
            "iscrowd": 0,
            "segmentation": POLYGON,
        },
        {
            "id": 2,
            "image_id": 1,
            "category_id": 3,
            "bbox": [5, 5, 10, 7],
            "area": 70,
            "iscrowd": 0,
            "segmentation": RUNS,
        },
    ],
}
RESULTS = [{"image_id": 1, "category_id": 3, "score": 0.5, "bbox": [5, 5, 10, 7], "segmentation": RUNS}]


def places(value, path=()):
    """The path of every field and item, and the root's."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def with_text(document, path, text):
    """JSON text of a document with another text at a path."""
    if not path:
        return text
    copy = json.loads(json.dumps(document))
    owner = copy
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = "@@"
    return json.dumps(copy).replace('"@@"', text)


def named(path):
    return ".".join(map(str, path)) or "whole"


def refusal(call):
    """The one line of a refusal, or None."""
    try:
        call()
    except UserError as error:
        line = str(error)
        assert "\n" not in line
        assert len(re.sub(r"/\S*/", "", line)) < 400, "without folders, whose names are as long as they are"
        return line
    return None


NOUNS = {"images": r"image (a\.jpg|\S+)", "categories": r"category \S+", "annotations": r"annotation \S+"}


@pytest.mark.parametrize("path", [*places(GOOD)], ids=named)
@pytest.mark.parametrize("masks", [True, False])
def test_a_field_of_annotations_of_any_type_is_read_or_named(path, masks, tmp_path):
    file = tmp_path / "truth.json"
    for kind, text in VALUES.items():
        file.write_text(with_text(GOOD, path, text))
        for training in (True, False):
            line = refusal(lambda t=training: CocoImages(tmp_path, file, masks=masks, training=t))
            if line is None:
                continue
            assert str(file) in line, kind
            if len(path) > 1 and kind not in ("integer", "negative", "longer integer than Python reads"):
                assert re.search(NOUNS[path[0]], line) or "no image has an object" in line, (kind, line)


@pytest.mark.parametrize("path", [*places(RESULTS)], ids=named)
def test_a_field_of_results_of_any_type_is_read_or_named(path, tmp_path):
    truth, file = tmp_path / "truth.json", tmp_path / "results.json"
    truth.write_text(json.dumps(GOOD))
    for kind, text in VALUES.items():
        file.write_text(with_text(RESULTS, path, text))
        line = refusal(lambda: score(*read_files(truth, file)))
        if line is not None:
            assert str(file) in line
            if len(path) > 1 and "cannot be read as JSON" not in line:
                assert "detection 0" in line, (kind, line)


def test_a_field_that_is_missing_is_named(tmp_path):
    file = tmp_path / "truth.json"
    for part, entries in GOOD.items():
        for field in entries[0]:
            copy = json.loads(json.dumps(GOOD))
            del copy[part][0][field]
            file.write_text(json.dumps(copy))
            line = refusal(lambda: CocoImages(tmp_path, file, masks=True, training=True))
            optional = part == "annotations" and field in ("id", "bbox", "area", "iscrowd")
            assert line is None if optional else f"has no {field}" in line


@pytest.mark.parametrize("field", ["bbox", "area", "iscrowd", "segmentation", "id"])
def test_null_in_an_optional_field_means_that_it_is_missing(field, tmp_path):
    copy = json.loads(json.dumps(GOOD))
    for entry in copy["annotations"]:
        entry[field] = None
    (tmp_path / "truth.json").write_text(json.dumps(copy))
    (tmp_path / "results.json").write_text(json.dumps([{**RESULTS[0], "segmentation": None}]))
    scores = score(*read_files(tmp_path / "truth.json", tmp_path / "results.json"))
    assert [*scores] == ["bbox"]
    if field == "segmentation":
        assert len(CocoImages(tmp_path, tmp_path / "truth.json", masks=False, training=True)) == 1


def test_whole_numbers_may_be_written_as_floats_and_names_as_numbers(tmp_path):
    copy = json.loads(json.dumps(GOOD))
    copy["images"][0] |= {"id": 1.0, "width": float(WIDTH)}
    copy["categories"][0]["name"] = 7
    copy["annotations"][0] |= {"image_id": 1.0, "iscrowd": False}
    (tmp_path / "truth.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(copy).encode())
    data = CocoImages(tmp_path, tmp_path / "truth.json", masks=True, training=True)
    assert (data.classes, data.image_id(0)) == (("7",), 1)


FAULTS = {
    "far": ([[-1e9, 5, 15, 5, 15, 12]], r"a point at \(-1e\+09, 5\), far outside of its image of 30 x 20 pixels"),
    "far below": ([[5, 5, 15, 5, 15, 50.5]], r"a point at \(15, 50\.5\), far outside"),
    "not a number": ([[float("nan"), 5, 15, 5, 15, 12]], "coordinate that should be a finite number, but is nan"),
    "infinite": ([[5, 5, 15, float("inf"), 15, 12]], "coordinate that should be a finite number, but is inf"),
    "text": ([["5", 5, 15, 5, 15, 12]], "coordinate that should be a valid number, but is 5"),
    "two points": ([[5, 5, 15, 5]], "less than three points"),
    "half a point": ([[5, 5, 15, 5, 15, 12, 3]], "half a point"),
    "short list": (
        {"size": [HEIGHT, WIDTH], "counts": [100, 200]},
        "add up to 300 pixels, but the image has 20 x 30 = 600",
    ),
    "long list": ({"size": [HEIGHT, WIDTH], "counts": [100, 2**31]}, "add up to 2147483748 pixels"),
    "negative": ({"size": [HEIGHT, WIDTH], "counts": [700, -100]}, "`counts` are damaged"),
    "fraction": ({"size": [HEIGHT, WIDTH], "counts": [599.5, 0.5]}, "`counts` are damaged"),
    "garbage": ({"size": [HEIGHT, WIDTH], "counts": "zzzz!!"}, "`counts` are damaged"),
    "not ASCII": ({"size": [HEIGHT, WIDTH], "counts": "öö"}, "`counts` are damaged"),
    "empty text": ({"size": [HEIGHT, WIDTH], "counts": ""}, "`counts` are damaged"),
    "unfinished": ({"size": [HEIGHT, WIDTH], "counts": "P"}, "`counts` are damaged"),
    "endless number": ({"size": [HEIGHT, WIDTH], "counts": "o" * 40 + "0"}, "`counts` are damaged"),
    "short text": ({"size": [HEIGHT, WIDTH], "counts": "33"}, "add up to 6 pixels"),
    "other size": ({"size": [WIDTH, HEIGHT], "counts": [600]}, r"of \[30, 20\] pixels"),
    "odd size": ({"size": ["20", 30], "counts": [600]}, "`size` is not two whole numbers"),
    "neither": ({"counts": [600]}, "neither polygons nor run lengths"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_segmentation_that_cannot_be_decoded_is_named_with_its_annotation(name, tmp_path):
    shape, expected = FAULTS[name]
    copy = json.loads(json.dumps(GOOD))
    copy["annotations"][1]["segmentation"] = shape
    (tmp_path / "truth.json").write_text(json.dumps(copy))
    with pytest.raises(UserError, match=rf"annotation 2 \(a\.jpg\) has a segmentation .*{expected}"):
        CocoImages(tmp_path, tmp_path / "truth.json", masks=True, training=True)
    boxes = CocoImages(tmp_path, tmp_path / "truth.json", masks=False, training=True)
    assert len(boxes.objects) == 1
    (tmp_path / "truth.json").write_text(json.dumps(GOOD))
    (tmp_path / "results.json").write_text(json.dumps([RESULTS[0] | {"segmentation": shape}]))
    with pytest.raises(UserError, match=f"detection 0 has a segmentation .*{expected}"):
        score(*read_files(tmp_path / "truth.json", tmp_path / "results.json"))


def test_points_a_little_outside_are_cut_off():
    outside = [[-8.0, -3.0, 40.0, -3.0, 40.0, 25.0, -8.0, 25.0]]
    assert wrong_shape(outside, HEIGHT, WIDTH) is None
    assert rle.decode(rle.merge(rle.frPyObjects(outside, HEIGHT, WIDTH))).all()
    assert wrong_shape([[-WIDTH, 0, WIDTH * 2, 0, 5, HEIGHT + WIDTH]], HEIGHT, WIDTH) is None
    assert "far outside" in wrong_shape([[-WIDTH - 1, 0, WIDTH * 2, 0, 5, HEIGHT]], HEIGHT, WIDTH)


def test_compressed_run_lengths_are_read_as_pycocotools_writes_them():
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 5), (64, 64), (300, 400), (2000, 3000)):
        for share in (0.0, 0.001, 0.5, 1.0):
            mask = (rng.random((height, width)) < share).astype(np.uint8)
            if height > 100:
                mask[height // 3 :, width // 4 :] = 1
            flat = mask.flatten(order="F")
            edges = np.flatnonzero(np.diff(flat, prepend=0))
            expected = np.diff(edges, prepend=0, append=flat.size)
            text = rle.encode(np.asfortranarray(mask))["counts"].decode()
            assert run_lengths(text).tolist() == expected.tolist()
            assert wrong_shape({"size": [height, width], "counts": text}, height, width) is None
            assert wrong_shape({"size": [height, width], "counts": expected.tolist()}, height, width) is None


def test_results_in_polygons_and_lists_score_as_compressed_ones(tmp_path):
    (tmp_path / "truth.json").write_text(json.dumps(GOOD))
    found = []
    for shape in (POLYGON, dict(rle.merge(rle.frPyObjects(POLYGON, HEIGHT, WIDTH)))):
        if isinstance(shape, dict):
            shape["counts"] = shape["counts"].decode()
        (tmp_path / "results.json").write_text(json.dumps([RESULTS[0] | {"segmentation": shape, "caption": "ignored"}]))
        found.append(score(*read_files(tmp_path / "truth.json", tmp_path / "results.json")))
    assert found[0] == found[1]
    assert found[0]["segm"].numbers["AP"] > 0


def test_numbers_without_an_object_are_said_in_words():
    assert in_words("box/AP_large", -1.0) == in_words("AR_small", -1.0) == "no objects of that size"
    assert in_words("AP", -1.0) == "no objects"
    assert in_words("mask/AP_small", 0.25) == "0.250"
