import os
import pickle
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.errors import UserError
from pipeline.sources.base import INDEX_SCHEMA
from pipeline.sources.image_folder import ImageFolder
from pipeline.sources.open import open_source
from tests.sources.noise_images import encode


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    root = tmp_path / "animals" / "train"
    write(root / "hund" / "b.JPG", encode(0))
    write(root / "hund" / "nah" / "ä 日本.png", encode(1, "PNG"))
    write(root / "hund" / ".hidden.jpg", b"x")
    write(root / "hund" / "notes.txt", b"x")
    write(root / "ape" / "a.webp", encode(2, "WEBP"))
    write(root / ".cache" / "c.jpg", b"x")
    (root / "bird").mkdir()
    return root


def test_class_folders_become_labels_and_relative_ids(animals: Path) -> None:
    source = open_source(str(animals), split="train")
    index = source.index()
    assert index.schema == INDEX_SCHEMA
    assert source.name == "animals-train"
    assert source.classes == ("ape", "bird", "hund")
    assert index["sample_id"].to_pylist() == ["ape/a.webp", "hund/b.JPG", "hund/nah/ä 日本.png"]
    assert index["label"].to_pylist() == [0, 2, 2]
    assert index["size"].to_pylist() == [os.path.getsize(path) for path in index["uri"].to_pylist()]


def test_reads_rows_in_their_order_after_a_trip_to_a_worker(animals: Path) -> None:
    source = pickle.loads(pickle.dumps(open_source(str(animals), split="train")))  # noqa: S301
    rows = source.index().take([2, 0])
    assert list(source.read(rows)) == [encode(1, "PNG"), encode(2, "WEBP")]


def test_a_relative_location_is_found_from_another_working_folder(
    animals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(animals.parent)
    source = open_source("train", split="train")
    index = source.index()
    monkeypatch.chdir("/")
    assert all(isinstance(data, bytes) for data in source.read(index))


def test_an_unreadable_image_does_not_stop_the_others(animals: Path) -> None:
    source = open_source(str(animals), split="train")
    index = source.index()
    (animals / "hund" / "b.JPG").unlink()
    first, second, third = source.read(index)
    assert isinstance(first, bytes)
    assert isinstance(second, FileNotFoundError)
    assert "b.JPG" in str(second)
    assert isinstance(third, bytes)


def test_a_broken_link_is_an_unreadable_sample(animals: Path) -> None:
    (animals / "ape" / "gone.jpg").symlink_to(animals / "nowhere.jpg")
    source = open_source(str(animals), split="train")
    index = source.index()
    assert index["size"][index["sample_id"].index("ape/gone.jpg").as_py()].as_py() == 0
    assert sum(isinstance(data, OSError) for data in source.read(index)) == 1


def test_linked_class_folders_are_followed_and_loops_are_not(animals: Path, tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "store" / "z.jpg", encode(5)).parent
    (animals / "zebra").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(animals)
    assert open_source(str(animals), split="train").index()["sample_id"].to_pylist()[-1] == "zebra/z.jpg"


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "flat" / f"{number}.jpg", encode(number))
    source = open_source(str(tmp_path / "flat"), split="train")
    assert source.classes == ()
    assert source.index()["label"].null_count == 3


def test_an_empty_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path}: no images found; looked for .*\.jpg.*\.tar or \.parquet"):
        open_source(str(tmp_path), split="train").index()


def test_images_beside_class_folders_are_refused(animals: Path) -> None:
    write(animals / "stray.jpg", encode(0))
    with pytest.raises(UserError, match=r"stray\.jpg"):
        open_source(str(animals), split="train")


def test_split_folders_are_not_taken_for_classes(animals: Path) -> None:
    (animals.parent / "val").mkdir()
    with pytest.raises(UserError, match=r"several splits \(train, val\)"):
        open_source(str(animals.parent), split="train")


def test_a_file_name_that_is_not_utf8_is_named(animals: Path) -> None:
    name = os.fsencode(animals / "ape") + b"/\xff.jpg"
    try:
        with open(name, "wb") as file:
            file.write(encode(0))
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    with pytest.raises(UserError, match=r"xff\.jpg.*UTF-8"):
        open_source(str(animals), split="train").index()


def test_real_photographs(photographs: Path) -> None:
    source = open_source(str(photographs / "imagenet_mini/imagenette224/val"), split="val")
    assert isinstance(source, ImageFolder)
    index = source.index()
    assert source.name == "imagenette224-val"
    assert len(source.classes) == 10
    assert index.num_rows == 400
    assert index["label"].value_counts().field("counts").to_pylist() == [40] * 10
    sizes = pa.array([len(data) for data in source.read(index.slice(0, 20)) if isinstance(data, bytes)])
    assert sizes.equals(index["size"].slice(0, 20).combine_chunks())
