"""Lists of class names as editors and spreadsheets write them, and what the values of label maps say."""

import numpy as np
import pytest
from PIL import Image

from jobs import finetune
from pipeline.config.load import load_config
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.downstream.segment.classes import IGNORE, MaskValues, ranges, read_classes
from pipeline.downstream.segment.masks import MaskedImages
from pipeline.errors import UserError
from tests.downstream.conftest import SMALL
from tests.downstream.drawings import locations


def names(path, first=0):
    return tuple(read_classes(path, first).names.values())


def test_classes_come_from_lines_or_from_tables(tmp_path):
    (tmp_path / "names.txt").write_text("wall\nsky, or none\n\n")
    (tmp_path / "ade.csv").write_text("Idx,Ratio,Name\n1,0.1,wall\n2,0.1,building;edifice\n")
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t0.1\twall, walls\n2\t0.1\tsky\n")
    (tmp_path / "coco.tsv").write_text("index\tname\n0\tunlabeled\n1\tperson\n2\tcar\n")
    assert names(tmp_path / "ade.csv", 1) == ("wall", "building;edifice")
    assert names(tmp_path / "objectInfo150.txt", 1) == ("wall, walls", "sky")
    assert names(tmp_path / "coco.tsv", 1) == ("person", "car")
    assert names(tmp_path / "coco.tsv") == ("unlabeled", "person", "car")
    assert names(tmp_path / "names.txt") == ("wall", "sky, or none")
    with pytest.raises(UserError, match="leaves gaps"):
        names(tmp_path / "ade.csv")


LISTS = {
    "byte order mark": ("a.txt", b"\xef\xbb\xbfroad\r\nsky\r\n"),
    "table with a mark": ("a.csv", b"\xef\xbb\xbfname,r\nroad,1\nsky,2\n"),
    "quoted header with a mark": ("a.csv", b'\xef\xbb\xbf"idx","name"\r\n"0","road"\r\n"1","sky"\r\n'),
    "semicolons": ("a.csv", b"idx;name\r\n0;road\r\n1;sky\r\n"),
    "semicolons in text": ("a.txt", b"idx;name\n0;road\n1;sky\n"),
    "tabs": ("a.csv", b"name\tidx\nroad\t0\nsky\t1\n"),
    "out of order": ("a.csv", b"id,name\n1,sky\n0,road\n"),
    "separator stated": ("a.csv", b"sep=;\r\nidx;name\r\n0;road\r\n1;sky\r\n"),
    "trailing separators": ("a.csv", b"idx;name;;\r\n0;road;;\r\n1;sky;;\r\n;;;\r\n"),
    "one column": ("a.csv", b"name\r\nroad\r\nsky\r\n"),
    "UTF-16": ("a.txt", "road\r\nsky\r\n".encode("utf-16")),
    "UTF-16 table": ("a.csv", "idx\tname\r\n0\troad\r\n1\tsky\r\n".encode("utf-16")),
    "UTF-32": ("a.txt", "road\nsky\n".encode("utf-32")),
    "old Mac": ("a.txt", b"road\rsky\r"),
    "quoted lines": ("a.txt", b'"road"\r\nsky\r\n'),
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_is_read_as_spreadsheets_write_it(kind, tmp_path):
    file, data = LISTS[kind]
    (tmp_path / file).write_bytes(data)
    assert names(tmp_path / file) == ("road", "sky")


def test_names_keep_separators_and_quotes(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'idx,name\r\n0,"sky, or ""none"""\r\n1,building;edifice\r\n')
    assert names(tmp_path / "a.csv") == ('sky, or "none"', "building;edifice")
    (tmp_path / "a.txt").write_bytes('"sky, or ""none"""\r\nStraße\r\n'.encode())
    assert names(tmp_path / "a.txt") == ('sky, or "none"', "Straße")


BAD_LISTS = {
    "repeated index": (b"idx,name\n0,road\n1,sky\n1,tree\n", r"line 4 \(`tree`\) repeats 1, which is `sky` in line 3"),
    "no number": (b"idx,name\n0,road\none,sky\n", "line 3 has `one` in `idx`, which must be a whole number"),
    "fraction": (b"idx,name\n0,road\n1.5,sky\n", "line 3 has `1.5` in `idx`"),
    "negative": (b"idx,name\n-1,road\n", "line 2 has `-1` in `idx`"),
    "comma without quotes": (b"idx,name\n0,road\n1,sky, or none\n", "line 3 has more cells than the first line"),
    "short row": (b"idx,name\n0,road\n1\n", "line 3 has no name"),
    "empty name": (b"idx,name\n0,\n", "line 2 has no name"),
    "open quote": (b'idx,name\n0,"road\n1,sky\n', "line 3: unexpected end of data"),
    "gap": (b"idx,name\n0,road\n2,sky\n", "leaves gaps between 0 and 2"),
    "no name column": (b"idx,label\n0,road\n", r"has no column `name` in its first line \(idx,label\)"),
    "only a header": (b"idx,name\n", "has 0 classes"),
    "empty": (b"", "no column `name`|has 0 classes"),
    "Latin-1": ("idx,name\n0,r\xf6ad\n".encode("latin-1"), "line 2 is not UTF-8 text .*save it as UTF-8"),
    "UTF-16 without a mark": ("idx,name\n0,road\n".encode("utf-16-le"), "not UTF-8 text"),
    "huge index": (b"idx,name\n70000,road\n", "leaves gaps"),
}


@pytest.mark.parametrize("kind", BAD_LISTS)
def test_a_list_that_leaves_doubt_is_refused_with_its_line(kind, tmp_path):
    data, expected = BAD_LISTS[kind]
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(UserError, match=expected) as error:
        read_classes(tmp_path / "a.csv", 0)
    assert f"segment.classes: {tmp_path}/a.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_line_between_names_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("road\n\nsky\n")
    with pytest.raises(UserError, match="an empty line before `sky` leaves doubt"):
        read_classes(tmp_path / "a.txt", 0)


@pytest.fixture
def maps(tmp_path):
    """Label maps of these values, one image each, and their class list; gives the opened set."""

    def make(values, listed, *, reduce=False, ignore=(), training=True, dtype=np.uint8, file="classes.txt"):
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        for part in ("images", "masks"):
            (folder / part).mkdir(parents=True)
        for number, held in enumerate(values):
            Image.new("RGB", (8, 8)).save(folder / f"images/{number}.png")
            mask = np.resize(np.array(held, dtype), (8, 8))
            Image.fromarray(mask).save(folder / f"masks/{number}.png")
        (folder / file).write_text(listed)
        known = MaskValues.of(folder / file, zero_ignored=reduce, ignore=ignore)
        return MaskedImages(folder / "images", folder / "masks", known, training=training)

    return make


def test_two_classes_of_0_and_255_are_refused_with_the_remedy(maps):
    with pytest.raises(UserError) as error:
        maps([[0, 255], [0]], "background\nlesion\n").check()
    for expected in ("only `background` (0)", "`lesion` (1)", "values seen: 0, 255 (ignored)", "always means ignored"):
        assert expected in str(error.value)


def test_classes_that_occur_nowhere_are_noted_with_the_values_seen(maps):
    (note,) = maps([[0, 1], [1, 255]], "a\nb\nc\n").check()
    assert note == "1 of 3 classes occur in no label map: `c` (2); values seen: 0-1, 255 (ignored)"
    assert maps([[0, 1, 2]], "a\nb\nc\n").check() == []
    assert len(maps([[1]], "a\nb\nc\n", training=False).check()) == 1


@pytest.mark.parametrize(("values", "reduce"), [([[255]], False), ([[0]], True), ([[0, 255], [255]], True)])
@pytest.mark.parametrize("training", [True, False])
def test_maps_without_a_labelled_pixel_are_refused(maps, values, reduce, training):
    with pytest.raises(UserError, match=r"every pixel is ignored \(values seen: "):
        maps(values, "a\nb\n", reduce=reduce, training=training).check()


@pytest.mark.parametrize(
    ("values", "reduce", "expected"),
    [
        ([0, 1, 2], False, r"holds value 2, .* for the values 0-1 \(values seen: 0-2\): if 2 means no class, set "
         r"segment\.ignore=\[2\]; if 0 does, segment\.reduce_zero_label=true; else a name is missing"),
        ([1, 2], False, r"holds value 2, .*: if they count from 1, set segment\.reduce_zero_label=true"),
        ([0, 1, 2, 7], False, r"add their names to segment\.classes, or set segment\.ignore=\[2, 7\]"),
        ([0, 1, 2, 3], True, r"holds value 3, .* for the values 1-2 .*set segment\.ignore=\[3\]"),
    ],
)  # fmt: skip
def test_the_remedy_for_a_value_beyond_the_classes_follows_from_all_values(maps, values, reduce, expected):
    with pytest.raises(UserError, match=expected) as error:
        maps([values], "a\nb\n", reduce=reduce).check()
    if "7" in expected or reduce:
        assert "reduce_zero_label" not in str(error.value)


def test_names_are_not_shifted_by_reduce_zero_label(maps):
    with pytest.raises(
        UserError, match=r"3 names .* to the values 1 to 3, but .* hold 0 to 2, so that every name would"
    ):
        maps([[0, 1, 2]], "background\na\nb\n", reduce=True).check()
    assert maps([[0, 1, 2, 3]], "a\nb\nc\n", reduce=True).check() == []
    assert len(maps([[0, 1, 2]], "idx,name\n1,a\n2,b\n3,c\n", reduce=True, file="table.csv").check()) == 1
    assert len(maps([[0, 1, 2]], "a\nb\nc\n", reduce=True, training=False).check()) == 1


@pytest.mark.parametrize("ignore", [["void"], [1], ["void", 9, 300]])
def test_ignored_values_and_names_leave_the_other_classes_their_names(maps, ignore):
    held = [[0, 1, 2, 255], [9, 300, 2]] if 9 in ignore else [[0, 1, 2, 255]]
    data = maps(held, "road\nvoid\ncar\n", ignore=ignore, dtype=np.uint16)
    assert data.check() == []
    assert data.classes == ("road", "car")
    assert [*dict.fromkeys(data.read(0)[1].flatten().tolist())] == [0, IGNORE, 1]
    if 9 in ignore:
        assert set(data.read(1)[1].unique().tolist()) == {1, IGNORE}


def test_a_void_value_behind_the_classes_is_ignored(maps):
    data = maps([[0, 1, 2]], "a\nb\n", ignore=[2])
    assert data.check() == []
    assert set(data.read(0)[1].unique().tolist()) == {0, 1, IGNORE}


@pytest.mark.parametrize(
    ("ignore", "expected"),
    [(["viod"], r"names no class viod; did you mean void\?"), (["a", "void"], "every class of .* is ignored")],
)
def test_what_cannot_be_ignored_is_named(maps, ignore, expected):
    with pytest.raises(UserError, match=f"segment.ignore: .*{expected}"):
        maps([[0, 1]], "a\nvoid\n", ignore=ignore)


def test_a_class_of_value_255_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"class{number}" for number in range(255)))
    assert len(MaskValues.of(tmp_path / "a.txt", zero_ignored=False, ignore=[]).classes) == 255
    with pytest.raises(UserError, match=r"names value 255 \(class254\), which always means ignored"):
        MaskValues.of(tmp_path / "a.txt", zero_ignored=True, ignore=[])


def test_values_that_appear_after_the_check_are_refused(maps):
    data = maps([[0, 1], [0, 1]], "a\nb\n")
    assert data.check() == []
    Image.fromarray(np.full((8, 8), 4, np.uint8)).save(data.mask_path(1))
    with pytest.raises(UserError, match=r"masks/1\.png: holds value 4, which is neither a class nor ignored"):
        data.read(1)


def test_ranges_of_values_are_short():
    assert ranges([3, 1, 2, 7, 255, 0], [0, 255]) == "0 (ignored), 1-3, 7, 255 (ignored)"
    assert ranges(range(0, 100, 2)).endswith("and 38 more ranges")


def test_a_dry_run_tells_what_the_label_maps_hold(drawings, tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("background\nsquare\ndisc\nstar\n")
    settings = [*SMALL, *locations(drawings, "segment"), "finetune.task=segment", f"work={tmp_path}/work"]
    settings += [f"segment.classes={tmp_path}/classes.txt"]
    finetune.main(load_config(FinetuneJobConfig, None, settings), True)
    text = capsys.readouterr().out
    assert "segment, 4 classes" in text
    assert "train: 1 of 4 classes occur in no label map: `star` (3); values seen: 0-2; val: 1 of 4" in text
    finetune.main(load_config(FinetuneJobConfig, None, [*settings, "segment.ignore=[background, star]"]), True)
    text = capsys.readouterr().out
    assert "segment, 2 classes" in text
    assert "notes" not in text
    assert not (tmp_path / "work").exists()
