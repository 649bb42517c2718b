"""Key points found again, on pairs whose answer is known, and the pairs themselves."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from jobs import evaluate
from pipeline.errors import UserError
from pipeline.voices.correspondence import key_point_accuracy
from pipeline.voices.pairs import Pair, _moved, open_pairs


class Positions:
    """In the place of a predictor: maps whose features tell where in the picture's own colours they are."""

    def features(self, images):
        pixels = [np.asarray(image.resize((32, 32), Image.Resampling.BOX), np.float32) for image in images]
        maps = torch.from_numpy(np.stack(pixels)) / 127.5 - 1
        maps[..., 2] = 1  # so that the direction tells the place
        return maps


def gradient(side, mirrored=False):
    """A picture in which each colour occurs once."""
    y, x = np.mgrid[:side, :side] / side
    x = 1 - x if mirrored else x
    return Image.fromarray((255 * np.stack([x, y, 0.5 + (x - y) / 2], axis=2)).astype(np.uint8))


def test_points_within_their_share_of_the_object_are_correct():
    # In the mirrored picture, the true place of (10, 40) is (90, 40).
    points = np.array(
        [[[10, 40], [90, 40]], [[60, 70], [40, 70]], [[30, 30], [70, 38]]], np.float32
    )  # the last is 8 px off
    pair = Pair(gradient(100), gradient(100, mirrored=True), points, 100.0)
    none = Pair(gradient(100), gradient(100), np.empty((0, 2, 2), np.float32), 100.0)
    single = Pair(gradient(100), gradient(100), points[:1, [0, 0]], 100.0)
    figures = key_point_accuracy(Positions(), [pair, none, single])
    assert figures["pck_0.05"] == pytest.approx((100 * 2 / 3 + 100) / 2)  # by pair
    assert figures["points_0.05"] == pytest.approx(100 * 3 / 4)
    assert figures["pck_0.15"] == figures["points_0.15"] == 100
    with pytest.raises(UserError, match="no pair has key points"):
        key_point_accuracy(Positions(), [none])


def test_generated_pairs_are_inside_and_those_of_their_seed():
    opened = open_pairs("samples", "test", 5, 96, 0)
    pairs = [*opened.pairs]
    assert opened.count == len(pairs) == 5
    for pair in pairs:
        assert pair.first.size == pair.second.size == (96, 96)
        assert 0 < pair.extent <= 96
        assert (pair.points >= 0).all()
        assert (pair.points < 96).all()
    again = [*open_pairs("samples", "test", 5, 96, 0).pairs]
    assert np.array_equal(again[3].points, pairs[3].points)
    assert again[3].second.tobytes() == pairs[3].second.tobytes()
    other = open_pairs("samples", "test", 1, 96, 1)
    assert next(other.pairs).second.tobytes() != pairs[0].second.tobytes()
    assert other.fingerprint != opened.fingerprint


def test_a_moved_scene_has_the_colours_of_its_key_points_where_they_went():
    image = Image.fromarray((60 + np.asarray(gradient(96)) // 2).astype(np.uint8))
    scene = SimpleNamespace(image=np.asarray(image), masks=np.ones((1, 96, 96), bool))
    for number in range(4):
        pair = _moved(SimpleNamespace(scene=lambda _: scene, size=96, seed=0), number)
        first, second = (np.asarray(part, np.float32) for part in (pair.first, pair.second))
        start, end = pair.points.astype(int).transpose(1, 2, 0)
        assert np.abs(start - end).max() > 2  # it did move
        for channel in (0, 1):  # in other colours: times a factor, and shifted
            assert np.corrcoef(first[start[1], start[0], channel], second[end[1], end[0], channel])[0, 1] > 0.99


@pytest.fixture
def spair(tmp_path):
    """A pair in SPair-71k's layout."""
    (tmp_path / "JPEGImages/cat").mkdir(parents=True)
    (tmp_path / "PairAnnotation/test").mkdir(parents=True)
    gradient(100).save(tmp_path / "JPEGImages/cat/a.jpg", quality=100)
    gradient(80, mirrored=True).save(tmp_path / "JPEGImages/cat/b.jpg", quality=100)
    annotation = {
        "src_imname": "a.jpg",
        "trg_imname": "b.jpg",
        "category": "cat",
        "src_kps": [[10, 40], [50, 50]],
        "trg_kps": [[72, 32], [40, 40]],
        "trg_bndbox": [10, 20, 70, 50],
    }
    (tmp_path / "PairAnnotation/test/000001.json").write_text(json.dumps(annotation))
    return tmp_path


def test_annotations_of_spair_are_read_and_odd_ones_are_named(spair):
    opened = open_pairs(str(spair), "test", 0, 0, 0)
    [pair] = opened.pairs
    assert (opened.count, pair.extent, pair.second.size) == (1, 60, (80, 80))
    assert pair.points.tolist() == [[[10, 40], [72, 32]], [[50, 50], [40, 40]]]
    assert key_point_accuracy(Positions(), [pair])["pck_0.1"] == 100
    with pytest.raises(UserError, match=r"there are no annotations .*PairAnnotation/trn/\*\.json"):
        open_pairs(str(spair), "trn", 0, 0, 0)
    (spair / "PairAnnotation/test/000000.json").write_text('{"src_kps": [[1, 2]]}')
    with pytest.raises(UserError, match=r"000000\.json is not an annotation of SPair-71k \(KeyError: 'trg_kps'\)"):
        open_pairs(str(spair), "test", 0, 0, 0)


def test_the_job_measures_a_backbone(ray_session, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["correspondence.student=timm/test_resnet", "correspondence.weights=random", "correspondence.samples=6"]
    evaluate.start(["correspondence", *given, "correspondence.input_size=96", f"work={tmp_path}/work"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= figures["pck_0.05"] <= figures["pck_0.1"] <= figures["pck_0.15"] <= 100
