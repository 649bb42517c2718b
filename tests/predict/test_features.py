import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from jobs import export, predict
from pipeline.errors import UserError
from pipeline.imaging.crop import crop_and_resize
from pipeline.imaging.decode import decode_image
from pipeline.imaging.geometry import FULL
from pipeline.predict import images
from pipeline.predict.predictor import load_predictor
from pipeline.student.loading import load_student
from tests.fakes import write_photos

NAME = "timm/mobilenetv4_conv_small_035"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 7)
    return folder


@pytest.fixture(scope="module")
def predictor():
    return load_predictor(NAME, weights="random", input_size=64, device="cpu", batch_size=3)


@pytest.fixture
def command(capsys):
    """Run a job's `main`; gives its exit code, and the figures of its last line, or beside code 2 its error."""

    def start(job, *arguments):
        try:
            job.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code
        else:
            code = 0
        printed = capsys.readouterr()
        start.error = printed.err.strip()
        return code, start.error if code == 2 else json.loads(printed.out.splitlines()[-1])

    return start


@torch.no_grad()
def expected_features(paths, size=64):
    encoder = load_student(NAME, weights="random").encoder
    pixels = [crop_and_resize(decode_image(path.read_bytes()), FULL, (size, size), "bicubic") for path in paths]
    return encoder(torch.from_numpy(np.stack(pixels)) / 255)


def test_files_folders_arrays_and_lists_give_the_features_of_the_encoder(photos, predictor):
    paths = sorted(photos.rglob("*.jpg"))
    expected = expected_features(paths)
    assert torch.allclose(predictor.features(photos), expected, atol=1e-5)
    assert torch.allclose(predictor.features(str(paths[2])), expected[2:3], atol=1e-5)
    array = np.array(Image.open(paths[0]))
    mixed = predictor.features([array, paths[1], [Image.open(paths[2]), photos / "class1"]])
    assert torch.allclose(mixed, expected[[0, 1, 2, 3, 4]], atol=1e-5)


@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_a_pil_image_is_turned_upright_and_keeps_its_high_byte_as_its_file_does(predictor, tmp_path, mode):
    levels = np.linspace(0, 60000, 40 * 60).reshape(40, 60).astype(np.uint16)
    image = (
        Image.fromarray(levels) if mode == "I;16" else Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
    )
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as opened:
        assert np.array_equal(np.array(images.opened(opened)), np.array(images.opened(tmp_path / "photo.png")))
        assert opened.size == (60, 40)
    assert images.opened(tmp_path / "photo.png").size == (40, 60)
    with pytest.raises(UserError, match="floating-point pixels have no known range"):
        predictor.features(Image.new("F", (8, 8)))


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ("no/such.jpg", "no/such.jpg: no such file or folder"),
        ([], "the list is empty"),
        (np.zeros((3, 8, 8), np.uint8), r"RGB uint8 \[H, W, 3\], not uint8 \[3, 8, 8\]"),
        (np.zeros((8, 8, 3)), "not float64"),
    ],
)
def test_what_is_no_image_is_named(predictor, images, expected):
    with pytest.raises(UserError, match=expected):
        predictor.features(images)


def test_an_unreadable_file_a_folder_without_images_and_a_missing_device_are_named(predictor, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"none")
    with pytest.raises(UserError, match=r"broken\.jpg: not an image"):
        predictor.features(tmp_path)
    (tmp_path / "broken.jpg").unlink()
    with pytest.raises(UserError, match=r"no images found; looked for \.jpg"):
        predictor.features(tmp_path)
    with pytest.raises(UserError, match="device nonsense"):
        load_predictor(NAME, weights="random", device="nonsense")


@pytest.mark.parametrize("ending", ["parquet", "json"])
def test_the_job_writes_paths_and_features(photos, tmp_path, command, ending):
    file, paths = tmp_path / "out" / f"features.{ending}", sorted(photos.rglob("*.jpg"))
    arguments = [NAME, photos, "--weights", "random", "--size", 64, "--to", file, "--device", "cpu"]
    assert command(predict, *arguments) == (0, {"file": str(file), "images": 7, "channels": 336})
    rows = pq.read_table(file).to_pylist() if ending == "parquet" else json.loads(file.read_text())
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    assert torch.allclose(torch.tensor([row["features"] for row in rows]), expected_features(paths), atol=1e-5)


def test_the_job_leaves_out_and_names_what_cannot_be_read(photos, tmp_path, command):
    shutil.copytree(photos, tmp_path / "photos")
    paths = sorted((tmp_path / "photos").rglob("*.jpg"))
    (tmp_path / "photos/._photo.jpg").write_bytes(b"of macOS")
    for path in (broken := [paths[0], paths[4]]):
        path.write_bytes(path.read_bytes()[:300])
    readable, file = [path for path in paths if path not in broken], tmp_path / "features.parquet"
    arguments = [NAME, tmp_path / "photos", "--weights", "random", "--size", 64, "--to", file, "--device", "cpu"]
    code, figures = command(predict, *arguments)
    assert (code, figures["images"], figures["unreadable"]) == (1, 5, [str(path) for path in broken])
    for path in broken:
        assert f"left out: {path}: cannot be decoded" in command.error
    rows = pq.read_table(file).to_pylist()
    assert [row["path"] for row in rows] == [str(path) for path in readable]
    assert torch.allclose(torch.tensor([row["features"] for row in rows]), expected_features(readable), atol=1e-5)
    for path in readable:
        path.write_bytes(b"")
    assert command(predict, *arguments)[1]["images"] == 0
    assert pq.read_table(file).num_rows == 0


def test_the_export_job_writes_a_folder_that_predict_takes(photos, tmp_path, command):
    arguments = [NAME, "--weights", "random", "--size", 64, "--format", "safetensors", "--to", tmp_path / "exported"]
    code, figures = command(export, *arguments)
    assert (code, figures["formats"]["safetensors"]["parity"]["relative_error"]) == (0, 0)
    code, figures = command(predict, tmp_path / "exported", photos, "--to", tmp_path / "f.parquet")
    assert (code, figures["images"]) == (0, 7)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere", "."], "error: nowhere: neither an exported student folder"),
        ([NAME, "no/such.jpg"], "error: no/such.jpg: no such file or folder"),
        ([NAME, ".", "--to", "features.csv"], "error: features.csv: the name must end in .parquet or .json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(command, photos, arguments, expected, monkeypatch):
    monkeypatch.chdir(photos)
    code, error = command(predict, *arguments)
    assert code == 2
    assert error.startswith(expected)
