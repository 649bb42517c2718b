import os
import pickle
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.errors import UserError
from pipeline.imaging.decode import IMAGE_EXTENSIONS
from pipeline.sources.base import INDEX_SCHEMA
from pipeline.sources.image_folder import ImageFolder
from pipeline.sources.left_out import notes_of
from pipeline.sources.open import open_source
from pipeline.storage.files import describe, local_versions, stat_local
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


def test_the_version_of_an_image_is_that_of_its_file(animals: Path) -> None:
    index = open_source(str(animals), split="train").index()
    assert index["version"].to_pylist() == [describe(path).version for path in index["uri"].to_pylist()]


def test_names_that_sort_before_a_slash_are_sorted_by_id(tmp_path: Path) -> None:
    for name in ("ape/b.jpg", "ape/a/c.jpg", "ape 2/a.jpg"):
        write(tmp_path / "train" / name, encode(0))
    index = open_source(str(tmp_path / "train"), split="train").index()
    assert index["sample_id"].to_pylist() == ["ape 2/a.jpg", "ape/a/c.jpg", "ape/b.jpg"]
    assert index["label"].to_pylist() == [1, 0, 0]


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


def described(paths: list[str]) -> list[tuple[int, int]]:
    sizes, times = stat_local(paths)
    return [*zip(sizes.tolist(), local_versions(sizes, times).tolist(), strict=True)]


def test_files_are_described_together_as_one_by_one(animals: Path) -> None:
    paths = sorted(str(path) for path in animals.rglob("*") if path.is_file())
    (animals / "ape" / "link.jpg").symlink_to(paths[0])
    paths.append(str(animals / "ape" / "link.jpg"))
    expected = [(entry.size, entry.version) for entry in map(describe, paths)]
    assert described(paths) == expected
    loop = animals / "ape" / "loop.jpg"
    loop.symlink_to(loop)  # fails a call for several files
    assert described([*paths, str(loop)]) == [*expected, (0, 0)]
    assert described([]) == []


def test_linked_class_folders_are_followed_and_loops_are_not(animals: Path, tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "store" / "z.jpg", encode(5)).parent
    (animals / "zebra").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(animals)
    assert open_source(str(animals), split="train").index()["sample_id"].to_pylist()[-1] == "zebra/z.jpg"


def test_links_to_folders_elsewhere_are_followed_at_any_depth_and_each_folder_once(
    animals: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    for name in ("one/a.jpg", "one/deep/b.jpg", "two/c.jpg"):
        write(store / name, encode(7))
    (animals / "bird" / "batch1").symlink_to(store / "one")
    (animals / "bird" / "again").symlink_to(store / "one" / "deep")
    (store / "one" / "more").symlink_to(store / "two")
    (store / "two" / "back").symlink_to(store / "one")
    (animals / "bird" / "root").symlink_to(animals)
    (animals / "bird" / "apes").symlink_to(animals / "ape")
    index = open_source(str(animals), split="train").index()
    birds = [Path(name).name for name in index["sample_id"].to_pylist() if name.startswith("bird/")]
    assert sorted(birds) == ["a.jpg", "b.jpg", "c.jpg"]
    (note,) = (note for note in notes_of(index) if "links" in note)
    assert note.startswith("4 links back into the data: ")
    assert "bird/root" in note
    assert "bird/apes" in note


SYSTEM = ("__MACOSX", "@eaDir", "lost+found", "#recycle", "$RECYCLE.BIN", "System Volume Information")


@pytest.mark.parametrize("name", [*SYSTEM, ".ipynb_checkpoints", ".git", "@EADIR", "#snapshot"])
def test_what_systems_leave_behind_is_neither_class_nor_image(animals: Path, name: str) -> None:
    before = open_source(str(animals), split="train").index()
    for place in ("", "ape", "hund/nah"):
        write(animals / place / name / "ape" / "x.jpg", encode(3))
        write(animals / place / "._a.jpg", b"x")
        write(animals / place / "Thumbs.db", b"x")
        write(animals / place / ".DS_Store", b"x")
    source = open_source(str(animals), split="train")
    assert source.classes == ("ape", "bird", "hund")
    assert source.index().equals(before)
    assert notes_of(source.index()) == notes_of(before)


def test_other_files_and_empty_classes_are_named(animals: Path) -> None:
    for number, name in enumerate(("b.heic", "c.HEIC", "d.xyz", "e")):
        write(animals / "hund" / name, encode(number))
    assert notes_of(open_source(str(animals), split="train").index()) == [
        "1 classes without an image: bird",
        "5 files that are no images by their ending: .heic 2, .txt 1, .xyz 1, no ending 1",
    ]


@pytest.mark.parametrize("ending", IMAGE_EXTENSIONS)
def test_every_ending_of_an_image_is_found_in_any_case(tmp_path: Path, ending: str) -> None:
    for name in (f"a{ending}", f"b{ending.upper()}"):
        write(tmp_path / "c" / name, encode(0))
    assert open_source(str(tmp_path), split="train").index().num_rows == 2


def test_a_folder_without_images_says_what_it_has(tmp_path: Path) -> None:
    write(tmp_path / "a" / "x.heic", b"x")
    with pytest.raises(UserError, match=r"no images found; .*left out: 1 classes without .*ending: \.heic 1"):
        open_source(str(tmp_path), split="train").index()


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
    with pytest.raises(
        UserError, match=r"several splits \(train, val\); .* or .*/animals/\* if these folders are classes"
    ):
        open_source(str(animals.parent), split="train")


@pytest.mark.parametrize(
    "names",
    [
        ("test_tube", "bullet_train", "mug"),
        ("train-station", "test tube"),
        ("train", "test", "bus"),
        ("train", "training"),
        ("validation.set", "trains", "tests"),
    ],
)
def test_classes_may_be_called_like_splits(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write(tmp_path / name / "a.jpg", encode(0))
    assert open_source(str(tmp_path), split="train").classes == tuple(sorted(names))


@pytest.mark.parametrize(
    "names",
    [
        ("train/a", "val/a"),
        ("train", "test"),
        ("Training", "Validation"),
        ("train2017", "val2017"),
        ("train/a", "test/a", "notes"),
        ("valid", "test"),
    ],
)
def test_folders_of_splits_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write(tmp_path / name / "a.jpg", encode(0))
    with pytest.raises(UserError, match="several splits"):
        open_source(str(tmp_path), split="train")


def test_a_pattern_of_folders_names_the_classes(tmp_path: Path) -> None:
    for name in ("train", "test", "tram", "__MACOSX"):
        write(tmp_path / "rails" / name / "deep" / "a.jpg", encode(0))
    write(tmp_path / "rails" / "notes.txt", b"x")
    source = open_source(f"{tmp_path}/rails/*", split="train")
    assert source.classes == ("test", "train", "tram")
    assert source.name == "rails"
    index = source.index()
    assert index["sample_id"].to_pylist() == ["test/deep/a.jpg", "train/deep/a.jpg", "tram/deep/a.jpg"]
    assert list(source.read(index)) == [encode(0)] * 3
    some = open_source(f"{tmp_path}/rails/{{tram,train}}", split="train")
    assert some.classes == ("train", "tram")
    assert some.index()["label"].to_pylist() == [0, 1]


def test_a_pattern_of_folders_in_several_folders_is_refused(tmp_path: Path) -> None:
    for name in ("a/cat", "b/cat"):
        write(tmp_path / name / "a.jpg", encode(0))
    with pytest.raises(UserError, match=r"class folders must be in one folder, but these are in .*/a, .*/b"):
        open_source(f"{tmp_path}/*/cat", split="train")


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
