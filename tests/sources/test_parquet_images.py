import io
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.imaging.decode import decode_image
from pipeline.sources.left_out import notes_of
from pipeline.sources.open import open_source
from pipeline.sources.parquet_images import ParquetImages
from tests.sources.noise_images import encode

STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def write(path: Path, columns: dict[str, pa.Array | list], rows_per_group: int = 4, **metadata: str) -> Path:
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata or None), path, row_group_size=rows_per_group)
    return path


def structs(count: int, paths: list[str | None]) -> pa.Array:
    return pa.array([{"bytes": encode(n), "path": path} for n, path in zip(range(count), paths, strict=True)], STRUCT)


def test_hugging_face_layout_with_paths_labels_and_class_names(tmp_path: Path) -> None:
    feature = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    info = json.dumps({"info": {"features": feature}})
    images = structs(10, [f"{n:02d}.jpg" for n in range(10)])
    path = write(tmp_path / "a.parquet", {"image": images, "label": [0, 1] * 4 + [-1, None]}, huggingface=info)
    source = pickle.loads(pickle.dumps(open_source(str(path), split="train")))  # noqa: S301
    assert isinstance(source, ParquetImages)
    index = source.index()
    assert source.classes == ("cat", "dog")
    assert index["sample_id"].to_pylist() == [f"{n:02d}.jpg" for n in range(10)]
    assert index["label"].to_pylist() == [0, 1] * 4 + [None, None]
    assert index["size"].to_pylist() == [len(encode(n)) for n in range(10)]
    assert list(source.read(index)) == [encode(n) for n in range(10)]
    assert list(source.read(index.take([9, 1, 4]))) == [encode(9), encode(1), encode(4)]


@pytest.mark.parametrize("paths", [["a", "a", "b", "c", "d"], ["a", None, "b", "c", "d"], ["e", "b", "d", "a", "c"]])
def test_rows_are_numbered_where_paths_repeat_or_scatter_over_row_groups(tmp_path: Path, paths: list) -> None:
    path = write(tmp_path / "a.parquet", {"image": structs(5, paths)}, rows_per_group=2)
    source = open_source(str(path), split="train")
    index = source.index()
    assert index["sample_id"].to_pylist() == [f"a.parquet#{n:08d}" for n in range(5)]
    assert list(source.read(index)) == [encode(n) for n in range(5)]


def test_shuffled_paths_in_one_row_group_are_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": structs(3, ["b", "c", "a"])})
    source = open_source(str(path), split="train")
    assert source.index()["sample_id"].to_pylist() == ["a", "b", "c"]
    assert list(source.read(source.index())) == [encode(2), encode(0), encode(1)]


def test_a_folder_of_files_is_one_source_and_splits_in_it_are_refused(tmp_path: Path) -> None:
    for number in range(3):
        images = pa.array([encode(number * 5 + n) for n in range(5)])
        write(tmp_path / f"train-{number:05d}-of-00003.parquet", {"jpg": images}, rows_per_group=2)
    source = open_source(str(tmp_path), split="train")
    assert list(source.read(source.index())) == [encode(n) for n in range(15)]
    write(tmp_path / "test-00000-of-00001.parquet", {"jpg": pa.array([encode(0)])})
    with pytest.raises(
        UserError, match=r"several splits \(test, train\); name one of them, such as .*/test\*\.parquet"
    ):
        open_source(str(tmp_path), split="train")
    assert open_source(f"{tmp_path}/train*.parquet", split="train").index().num_rows == 15


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
PLANES = PIXELS.transpose(0, 3, 1, 2).reshape(5, -1)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([row.tobytes() for row in PLANES], pa.binary()),
        pa.array([row.tobytes() for row in PLANES], pa.binary(192)),
        pa.array(list(PLANES), pa.list_(pa.uint8())),
        pa.array(list(PLANES), pa.list_(pa.uint8(), 192)),
        pa.array(PIXELS.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8())))),
        pa.array(PIXELS.tolist(), pa.list_(pa.list_(pa.list_(pa.int64(), 3)))),
    ],
    ids=["binary", "fixed-binary", "list", "fixed-list", "nested", "nested-int64"],
)
def test_raw_arrays_arrive_as_lossless_png(tmp_path: Path, column: pa.Array) -> None:
    path = write(tmp_path / "cifar.parquet", {"data": column, "fine_label": list(range(5))}, rows_per_group=2)
    source = open_source(str(path), split="train")
    index = source.index()
    assert index["size"].to_pylist() == [192] * 5
    assert index["label"].to_pylist() == list(range(5))
    for pixels, data in zip(PIXELS[::-1], source.read(index.take([4, 3, 2, 1, 0])), strict=True):
        assert isinstance(data, bytes)
        assert Image.open(io.BytesIO(data)).format == "PNG"
        assert np.array_equal(np.asarray(decode_image(data)), pixels)


def test_bad_rows_do_not_stop_the_others(tmp_path: Path) -> None:
    ragged = [PIXELS[0].tolist(), PIXELS[1, :5].tolist(), None, PIXELS[2].tolist()]
    nested = pa.array(ragged, pa.list_(pa.list_(pa.list_(pa.int64()))))
    planes = pa.array([PLANES[0], PLANES[1][:-1], None, PLANES[2]], pa.list_(pa.uint8()))
    structs = pa.array([{"bytes": encode(0)}, {"path": "b"}, None, {"bytes": encode(1)}], STRUCT)
    for name, column in {"nested": nested, "planes": planes, "structs": structs}.items():
        source = open_source(str(write(tmp_path / f"{name}.parquet", {"image": column})), split="train")
        kinds = [type(data) for data in source.read(source.index())]
        assert kinds == [bytes, ValueError, ValueError, bytes], name


def test_out_of_range_pixels_are_refused(tmp_path: Path) -> None:
    loud = PIXELS.astype(int) + 200
    path = write(tmp_path / "a.parquet", {"image": pa.array(loud.tolist(), pa.list_(pa.list_(pa.list_(pa.int64()))))})
    source = open_source(str(path), split="train")
    assert all(isinstance(data, ValueError) for data in source.read(source.index()))


def test_without_an_image_column_the_columns_and_the_flag_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": ["x"], "label": [1], "tokens": [[1, 2, 3]]})
    for named in (None, "text", "missing"):
        with pytest.raises(UserError, match=r"data\.image_column .*text: string, label: int64, tokens"):
            open_source(str(path), split="train", image_column=named)


def test_several_candidates_need_a_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"left": pa.array([encode(0)]), "right": pa.array([encode(1)])})
    with pytest.raises(UserError, match=r"data\.image_column"):
        open_source(str(path), split="train")
    source = open_source(str(path), split="train", image_column="right")
    assert list(source.read(source.index())) == [encode(1)]


def test_the_label_column_can_be_named_and_must_hold_labels(tmp_path: Path) -> None:
    columns = {"image": pa.array([encode(0)]), "label": [1], "coarse": [2], "boxes": [[1, 2]]}
    path = str(write(tmp_path / "a.parquet", columns))
    assert open_source(path, split="train", label_column="coarse").index()["label"].to_pylist() == [2]
    remedy = r"set data\.label_column to one of: label, coarse"
    with pytest.raises(UserError, match=rf"column 'boxes' holds list.*int64.*not class numbers or names; {remedy}"):
        open_source(path, split="train", label_column="boxes")
    with pytest.raises(UserError, match=rf"no column 'word'.*; {remedy}"):
        open_source(path, split="train", label_column="word")


WORDS = ["dog", "cat", None, "dog", " cat "]


@pytest.mark.parametrize(
    ("column", "labels", "classes"),
    [
        (pa.array(WORDS), [1, 0, None, 1, 0], ("cat", "dog")),
        (pa.array(WORDS, pa.large_string()), [1, 0, None, 1, 0], ("cat", "dog")),
        (pa.array(WORDS, pa.string_view()), [1, 0, None, 1, 0], ("cat", "dog")),
        (pa.array(WORDS).dictionary_encode(), [1, 0, None, 1, 0], ("cat", "dog")),
        (pa.array(["10", "9", "", "-1", "10"]), [10, 9, None, None, 10], ()),
        (pa.array(["10", "9", "x", "9", "10"]), [0, 1, 2, 1, 0], ("10", "9", "x")),
        (pa.array([3.0, 0.0, float("nan"), None, -1.0]), [3, 0, None, None, None], ()),
        (pa.array([3, 0, 1, 2, 1], pa.uint8()), [3, 0, 1, 2, 1], ()),
        (pa.array([3, 0, 1, 2, 1], pa.float16()), [3, 0, 1, 2, 1], ()),
        (pa.array([3, 0, 1, 2, 1]).dictionary_encode(), [3, 0, 1, 2, 1], ()),
        (pa.array([True, False, None, True, True]), [1, 0, None, 1, 1], ("false", "true")),
    ],
    ids=str,
)
def test_labels_of_every_type(tmp_path: Path, column: pa.Array, labels: list, classes: tuple[str, ...]) -> None:
    path = write(tmp_path / "a.parquet", {"image": [encode(n) for n in range(5)], "label": column}, rows_per_group=2)
    source = pickle.loads(pickle.dumps(open_source(str(path), split="train")))  # noqa: S301
    assert source.classes == classes
    assert source.index()["label"].to_pylist() == labels


def test_names_of_classes_are_those_of_all_files_and_numbers_may_be_floats_in_some(tmp_path: Path) -> None:
    for file, words in {"a": ["cat", "owl"], "b": ["dog", "cat"]}.items():
        columns = {"image": [encode(n) for n in range(2)], "label": words, "number": pa.array([1, 2])}
        if file == "b":
            columns["number"] = pa.array([3.0, float("nan")])
        write(tmp_path / f"{file}.parquet", columns)
    source = open_source(str(tmp_path), split="train")
    assert source.classes == ("cat", "dog", "owl")
    assert source.index()["label"].to_pylist() == [0, 2, 1, 0]
    numbers = open_source(str(tmp_path), split="train", label_column="number").index()
    assert numbers["label"].to_pylist() == [1, 2, 3, None]
    write(tmp_path / "c.parquet", {"image": [encode(0)], "label": [1], "number": [1]})
    with pytest.raises(UserError, match=r"c\.parquet: the types of its columns differ"):
        open_source(str(tmp_path), split="train").index()


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (pa.array([0.5]), r"column 'label' holds 0\.5; labels are whole numbers"),
        (pa.array([float("inf")]), r"column 'label' holds inf"),
        (pa.array([1e300]), r"column 'label' holds 1e\+300"),
        (pa.array([2**64 - 1], pa.uint64()), r"column 'label' holds a number of more than 64 bits"),
    ],
)
def test_numbers_that_are_no_labels_are_named(tmp_path: Path, values: pa.Array, problem: str) -> None:
    path = write(tmp_path / "a.parquet", {"image": [encode(0)], "label": values})
    with pytest.raises(UserError, match=rf"a\.parquet: {problem}"):
        open_source(str(path), split="train").index()


def test_a_usual_column_that_cannot_hold_labels_is_noted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": [encode(0)], "labels": [[1, 2]]})
    index = open_source(str(path), split="train").index()
    assert index["label"].to_pylist() == [None]
    (note,) = notes_of(index)
    assert note.startswith("columns that hold no class numbers or names: labels: list")


@pytest.mark.parametrize(
    ("kind", "nested"),
    [  # pyarrow cannot write views within a struct, nor read a dictionary there
        *((kind, nested) for kind in (pa.binary(), pa.large_binary()) for nested in (False, True)),
        (pa.binary_view(), False),
        (pa.dictionary(pa.int32(), pa.binary()), False),
    ],
    ids=str,
)
def test_image_columns_of_every_binary_type(tmp_path: Path, kind: pa.DataType, nested: bool) -> None:
    images = [encode(n) for n in range(4)] + [encode(0), None]
    column = pa.array(images, pa.binary()).cast(kind) if pa.types.is_dictionary(kind) else pa.array(images, kind)
    if nested:
        column = pa.StructArray.from_arrays([column], ["bytes"])
    source = open_source(str(write(tmp_path / "a.parquet", {"image": column})), split="train")
    index = source.index()
    assert index["size"].to_pylist() == [len(image or b"") for image in images]
    *read, missing = source.read(index)
    assert read == images[:-1]
    assert isinstance(missing, ValueError)


def test_damaged_and_mismatched_files_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": pa.array([encode(0)]), "label": [1]})
    write(tmp_path / "b.parquet", {"image": pa.array([encode(1)])})
    with pytest.raises(UserError, match=r"b\.parquet: has no column 'label'"):
        open_source(str(tmp_path), split="train").index()
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"b\.parquet: not a readable Parquet file"):
        open_source(str(tmp_path), split="train").index()


def test_a_file_that_shrank_after_indexing_fails_only_its_own_rows(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.parquet", {"image": pa.array([encode(n) for n in range(6)])})
    source = open_source(str(tmp_path), split="train")
    index = source.index()
    write(tmp_path / "b.parquet", {"image": pa.array([encode(n) for n in range(3)])})
    kinds = [isinstance(data, bytes) for data in source.read(index)]
    assert kinds[:6] == [True] * 6
    assert kinds[-1] is False


def test_each_row_group_is_read_once_however_the_rows_are_scattered(tmp_path: Path, monkeypatch) -> None:
    pictures = [encode(number) for number in range(12)]
    path = write(tmp_path / "x.parquet", {"image": pictures}, rows_per_group=3)
    source = open_source(str(path), split="train")
    index, groups = source.index(), []
    read = pq.ParquetFile.read_row_group

    def count(self, group: int, **settings: object) -> pa.Table:
        groups.append(group)
        return read(self, group, **settings)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", count)
    order = [7, 0, 10, 3, 1, 8, 11, 4]
    assert list(source.read(index.take(order))) == [pictures[row] for row in order]
    assert groups == [0, 1, 2, 3]


def test_real_cifar100(photographs: Path) -> None:
    source = open_source(str(photographs / "cifar100_mini/train.parquet"), split="train")
    index = source.index()
    assert source.name == "cifar100_mini-train"
    assert index.num_rows == 4000
    assert index["label"].value_counts().field("counts").to_pylist() == [40] * 100
    row = index["sample_id"].index("baby_train_196.png").as_py()
    (data,) = source.read(index.slice(row, 1))
    assert isinstance(data, bytes)
    assert decode_image(data).size == (32, 32)
    assert index["label"][row].as_py() == 2


def test_real_tiny_imagenet(photographs: Path) -> None:
    with pytest.raises(UserError, match="several splits"):
        open_source(str(photographs / "imagenet_mini/tiny200"), split="val")
    source = open_source(str(photographs / "imagenet_mini/tiny200/val.parquet"), split="val")
    index = source.index()
    assert index["sample_id"][0].as_py() == "val.parquet#00000000"
    data = list(source.read(index.slice(1990, 10)))
    assert all(isinstance(part, bytes) and decode_image(part).size == (64, 64) for part in data)
