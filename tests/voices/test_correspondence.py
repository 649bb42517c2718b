"""Key points found again, on pairs whose answer is known, and the pairs themselves."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from jobs import evaluate
from pipeline.errors import UserError
from pipeline.voices.correspondence import key_point_accuracy
from pipeline.voices.pairs import Pair, open_pairs


class Positions:
    """In the place of a predictor: maps whose features tell where in the picture's own colours they are."""

    def features(self, images):
        maps = [torch.from_numpy(np.asarray(image.resize((32, 32), Image.Resampling.BOX)).copy()) for image in images]
        return torch.stack(maps).float() - 127.5


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


def test_generated_pairs_show_the_same_places():
    opened = open_pairs("samples", "test", 5, 96, 0)
    pairs = [*opened.pairs]
    assert opened.count == len(pairs) == 5
    errors = []
    for pair in pairs:
        assert pair.first.size == pair.second.size == (96, 96)
        assert 0 < pair.extent <= 96
        assert (pair.points >= 0).all()
        assert (pair.points < 96).all()
        # The colours differ by a factor and a shift, so grey values at the points go together.
        greys = [np.asarray(image.convert("L"), np.float32) for image in (pair.first, pair.second)]
        values = [[grey[int(y), int(x)] for x, y in pair.points[:, n]] for n, grey in enumerate(greys)]
        errors.append(np.corrcoef(*values)[0, 1])
    assert np.median(errors) > 0.5
    again = [*open_pairs("samples", "test", 5, 96, 0).pairs]
    assert np.array_equal(again[3].points, pairs[3].points)
    assert again[3].second.tobytes() == pairs[3].second.tobytes()
    other = open_pairs("samples", "test", 1, 96, 1)
    assert next(other.pairs).second.tobytes() != pairs[0].second.tobytes()
    assert other.fingerprint != opened.fingerprint


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
