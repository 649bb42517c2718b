"""Patches in colours, matches and parts: by planted structure, by a loop, and as files of a real student."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from jobs import predict
from pipeline.errors import UserError
from pipeline.student.loading import load_student
from pipeline.student.model import level_at_stride
from pipeline.voices.matches import mutual_nearest, transfer
from pipeline.voices.parts import find_parts
from pipeline.voices.patches import find_patches, load_patches
from pipeline.voices.principal import otsu, principal_colours
from tests.fakes import write_photos


def planted(shift=0.0):
    """Maps [2, 8, 8, 16] with a background, and an object of two halves at another place in each image."""
    generator = torch.Generator().manual_seed(0)
    ground, left, right = F.normalize(torch.randn(3, 16, generator=generator), dim=1) * 5
    maps = ground + 0.05 * torch.randn(2, 8, 8, 16, generator=generator) + shift
    truth = torch.zeros(2, 8, 8, dtype=torch.int64)
    for image, (row, column) in enumerate(((1, 1), (4, 3))):
        for part, feature in enumerate((left, right)):
            place = (image, slice(row, row + 3), slice(column + 2 * part, column + 2 * part + 2))
            maps[place] += feature - ground
            truth[place] = part + 1
    return maps, truth


def test_the_foreground_is_found_and_its_halves_have_one_colour_in_both_images():
    maps, truth = planted()
    for given in (maps, -maps):  # the sign of the first component says nothing
        colours, foreground = principal_colours(given)
        assert torch.equal(foreground, truth > 0)
        assert torch.all(colours[truth == 0] == 0)
        assert 0 <= colours.min() <= colours.max() <= 1
        means = {(n, part): colours[n][truth[n] == part].mean(dim=0) for n in (0, 1) for part in (1, 2)}
        for part in (1, 2):  # of the first component; the others are noise
            assert abs(means[0, part][0] - means[1, part][0]) < 0.2
        assert abs(means[0, 1][0] - means[0, 2][0]) > 0.6


def test_colours_of_few_channels_and_of_equal_patches_are_finite():
    for maps in (torch.rand(1, 4, 4, 2), torch.ones(2, 3, 3, 8)):
        colours, foreground = principal_colours(maps)
        assert colours.shape == (*maps.shape[:3], 3)
        assert torch.isfinite(colours).all()
        assert foreground.any()


def test_the_threshold_has_the_largest_variance_between_its_sides():
    values = torch.cat([torch.linspace(0, 1, 200), torch.linspace(5, 6, 50)]).double()
    assert 1 < otsu(values) < 5
    assert otsu(torch.ones(5).double()) == 1


def test_matches_are_each_others_nearest_as_in_a_loop():
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(3, 4, 6, generator=generator), torch.randn(5, 2, 6, generator=generator)
    found = mutual_nearest(first, second)
    expected = {}
    for row in range(3):
        for column in range(4):
            cosines = F.cosine_similarity(first[row, column], second, dim=2)
            there = divmod(int(cosines.argmax()), 2)
            back = divmod(int(F.cosine_similarity(second[there], first, dim=2).argmax()), 4)
            if back == (row, column):
                expected[(column + 0.5) / 4, (row + 0.5) / 3] = (there[1] + 0.5) / 2, (there[0] + 0.5) / 5
    assert len(found.cosines) == len(expected) > 0
    for start, end in zip(found.first.tolist(), found.second.tolist(), strict=True):
        near = min(expected, key=lambda point: abs(point[0] - start[0]) + abs(point[1] - start[1]))
        assert near == pytest.approx(start)
        assert expected[near] == pytest.approx(end)
    assert found.cosines.tolist() == sorted(found.cosines.tolist(), reverse=True)


def test_a_shifted_map_carries_points_by_its_shift():
    maps = torch.randn(10, 12, 8, generator=torch.Generator().manual_seed(2))
    smooth = F.avg_pool2d(maps.permute(2, 0, 1)[None], 3, 1, 1)[0].permute(1, 2, 0)
    first, second = smooth[:, :10], smooth[:, 2:]  # the second lies two patches further right
    points = torch.tensor([[0.45, 0.35], [0.75, 0.55], [0.65, 0.25]])
    carried = transfer(first, second, points)
    torch.testing.assert_close(carried, points - torch.tensor([0.2, 0.0]), atol=0.06, rtol=0)
    assert transfer(first, second, torch.empty(0, 2)).shape == (0, 2)


def test_parts_are_the_planted_ones_in_all_images_and_the_largest_comes_first():
    maps, truth = planted()
    assert torch.equal(find_parts(maps, 3) == 0, truth == 0)
    for part in (1, 2):
        assert len(find_parts(maps, 3)[truth == part].unique()) == 1
    assert torch.equal(find_parts(maps, 3, seed=5), find_parts(maps, 3, seed=5))
    assert find_parts(torch.ones(1, 2, 2, 4), 3).max() <= 2  # all alike


@pytest.mark.parametrize("student", ["timm/test_resnet", "timm/test_vit", "timm/regla_t"])
@torch.no_grad()
def test_maps_are_those_of_a_teachers_head_or_of_the_backbone_at_any_size(student, taught):
    size = 160 if student == "timm/test_vit" else 32
    made = taught(f"student.name={student}", f"student.input_size={size}")
    loaded = load_student(str(made.folder))
    images = torch.rand(2, 3, size, size)
    model, whose = find_patches(loaded, "colours4")
    output = made.distiller.student.encode(images)
    target = next(t for t in made.distiller.targets if t.teacher.spec.name == "colours4")
    tokens = target.heads["patches"](output.feature_map.permute(0, 2, 3, 1))
    torch.testing.assert_close(target.standardisers["patches"](model(images)), tokens, atol=1e-4, rtol=1e-4)
    assert whose == "the head of colours4"
    model, whose = find_patches(loaded, "backbone")
    encoder = loaded.encoder
    expected = encoder.maps(images, [level_at_stride(encoder.strides, 16)])[0].permute(0, 2, 3, 1)
    assert torch.equal(model(images), expected)
    if student != "timm/test_vit":  # which takes one size
        predictor, _ = load_patches(loaded, "colours4", input_size=96, device="cpu")
        assert predictor.features(np.zeros((40, 60, 3), np.uint8)).shape == (1, 6, 6, 4)


def test_a_student_without_a_dino_head_is_refused_with_the_remedies(taught):
    loaded = load_student(str(taught().folder))
    remedy = "distil it with a DINOv2 .dinov2/vitb14. teacher and student.keep_heads=true; --teacher backbone takes"
    with pytest.raises(UserError, match=f"keeps no head of DINOv2.*, only of clip/tiny-clip, colours4: {remedy}"):
        find_patches(loaded)


@pytest.fixture
def photos(tmp_path):
    write_photos(tmp_path / "found", 4, seed=5)
    return tmp_path / "found"


def run(capsys, *arguments):
    try:
        predict.main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as ended:
        code = ended.code
    printed = capsys.readouterr()
    return code, printed.err if code == 2 else json.loads(printed.out.splitlines()[-1])


def test_predict_writes_colours_parts_and_matches(photos, tmp_path, capsys):
    model = ["timm/test_resnet", photos, "--weights", "random", "--size", "64"]
    (photos / "class0/broken.jpg").write_bytes(b"no image")
    code, figures = run(capsys, *model, "--pca", "--to", tmp_path / "colours")
    assert (code, figures["images"], len(figures["unreadable"])) == (1, 4, 1)
    assert len([*(tmp_path / "colours/pictures").glob("*.png")]) == 4

    code, figures = run(capsys, *model, "--parts", "3", "--to", tmp_path / "parts")
    rows = json.loads((tmp_path / "parts/parts.json").read_text())
    for row in rows:
        labels = Image.open(tmp_path / "parts" / row["labels"])
        assert labels.size == Image.open(row["path"]).size
        assert {*np.unique(np.asarray(labels))} <= {0, 1, 2}
        assert sum(row["shares"]) == pytest.approx(1)
    (photos / "class0/broken.jpg").unlink()

    one, other, *_ = sorted(photos.rglob("*.jpg"))
    pair = ["timm/test_resnet", one, other, "--weights", "random", "--size", "64", "--match"]
    code, figures = run(capsys, *pair, "--keypoints", "10,20", "30,40", "--to", tmp_path / "match")
    document = json.loads((tmp_path / "match/match.json").read_text())
    assert (code, len(document["matches"])) == (0, figures["matches"])
    assert [carried["from"] for carried in document["keypoints"]] == [[10, 20], [30, 40]]
    width, height = Image.open(other).size
    assert all(0 <= x <= width and 0 <= y <= height for x, y in (row["to"] for row in document["keypoints"]))
    code, figures = run(capsys, "timm/test_resnet", one, one, *pair[3:], "--to", tmp_path / "same")
    document = json.loads((tmp_path / "same/match.json").read_text())
    assert all(row["from"] == row["to"] for row in document["matches"])
    assert figures["matches"] == 16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pca", "--match"], "--pca and --match: give one of them"),
        (["--pca", "--classes", "a, b"], "ask for one of them at a time"),
        (["--match"], "--match: needs two images, not 4"),
        (["--parts", "1"], "--parts=1: from 2 to 64"),
        (["--keypoints", "1,1"], "--keypoints: needs --match"),
        (["--pca", "--task", "features"], "--task=features: cannot be asked for with --pca"),
        (["--teacher", "backbone"], "--teacher: needs one of --classes, --find, --like, --pca, --match, --parts"),
        (["--text-weights", "clip.pt"], "--text-weights: needs one of --classes, --find"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(flags, message, photos, tmp_path, capsys):
    code, error = run(
        capsys, "timm/test_resnet", photos, "--weights", "random", "--size", "64", *flags, "--to", tmp_path / "made"
    )
    assert code == 2
    assert message in error


def test_earlier_files_are_not_mixed_with_new_ones(photos, tmp_path, capsys):
    (tmp_path / "made").mkdir()
    (tmp_path / "made/old.png").touch()
    code, error = run(capsys, "timm/test_resnet", photos, "--weights", "random", "--pca", "--to", tmp_path / "made")
    assert (code, "made: is not empty: name another folder with --to" in error) == (2, True)


def test_images_of_which_none_can_be_read_are_refused(tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    code, error = run(
        capsys, "timm/test_resnet", tmp_path / "broken.jpg", "--weights", "random", "--pca", "--to", tmp_path / "made"
    )
    assert (code, "there are no images that can be read" in error) == (2, True)
