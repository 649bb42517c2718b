"""What is wrong with the data is named before anything is trained; what is merely odd is dealt with."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.config.load import load_config
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.downstream.detect.coco import CocoImages
from pipeline.downstream.images import LabelledImages, open_labelled
from pipeline.downstream.segment.classes import IGNORE, MaskValues
from pipeline.downstream.segment.masks import MaskedImages
from pipeline.errors import UserError
from pipeline.sources.open import open_source
from tests.downstream.drawings import CLASSES, SIDE, write_set
from tests.fakes import write_photos

CLASS_NAMES = ("background", *CLASSES)


@pytest.fixture
def drawn(tmp_path):
    """A set that may be changed."""
    write_set(tmp_path / "set", 4)
    return tmp_path / "set"


def masked(folder, reduce=False, names=CLASS_NAMES):
    values = MaskValues(dict(enumerate(names, start=int(reduce))), frozenset({IGNORE, *([0] if reduce else [])}))
    return MaskedImages(folder / "images/train", folder / "masks/train", values)


def coco(folder, training=True, masks=True, change=lambda dataset: None):
    path = folder / "annotations/instances_train.json"
    dataset = json.loads(path.read_text())
    change(dataset)
    path.write_text(json.dumps(dataset))
    return CocoImages(folder / "images/train", path, masks=masks, training=training)


def _drop_masks(dataset):
    for entry in dataset["annotations"]:
        entry.pop("segmentation")


def test_hidden_files_are_no_images(drawn):
    (drawn / "images/train/._drawing0.png").write_bytes(b"of macOS")
    (drawn / "images/train/.thumbnails").mkdir()
    (drawn / "images/train/.thumbnails/drawing0.png").write_bytes(b"small")
    assert masked(drawn).names == [f"drawing{number}.png" for number in range(4)]


def test_good_sets_pass_without_a_note(drawn):
    assert masked(drawn).check() == []
    assert coco(drawn).check() == []
    assert LabelledImages(open_source(str(drawn / "classes"), split="train")).check() == []


def test_an_image_without_a_label_map_is_named(drawn):
    (drawn / "masks/train/drawing2.png").unlink()
    with pytest.raises(UserError, match=r"masks/train/drawing2.png: there is no such label map"):
        masked(drawn).check()


def test_a_label_map_of_another_size_is_named_with_both_sizes(drawn):
    Image.new("L", (SIDE, SIDE + 1)).save(drawn / "masks/train/drawing1.png")
    with pytest.raises(UserError, match=rf"drawing1.png: is {SIDE} x {SIDE + 1} pixels, but .* {SIDE} x {SIDE}"):
        masked(drawn).check()


def test_a_label_map_in_colour_is_refused(drawn):
    Image.new("RGB", (SIDE, SIDE)).save(drawn / "masks/train/drawing1.png")
    with pytest.raises(UserError, match=r"drawing1.png: has RGB pixels"):
        masked(drawn).check()


def test_a_value_beyond_the_classes_is_named(drawn):
    with pytest.raises(UserError, match=r"drawing1.png: holds value 2, but segment.classes has 2 classes"):
        masked(drawn, names=CLASS_NAMES[:2]).check()


def test_zero_is_ignored_where_it_is_no_class(drawn):
    data = masked(drawn, reduce=True, names=CLASSES)
    assert data.check() == []
    _, labels = data.read(1)
    assert set(labels.unique().tolist()) == {1, IGNORE}
    assert (labels == IGNORE).sum() == (masked(drawn).read(1)[1] == 0).sum()


def test_ade20k_lies_as_it_is_published(shared_data, make_job):
    folder = shared_data / "seg_mini/ade150"
    names = ["data.val=null", f"segment.classes={folder}/object150_info.csv", "segment.reduce_zero_label=true"]
    data = make_job("segment", f"data.train={folder}/images/train", *names).task.open("train")
    assert len(data) == 7
    assert len(data.classes) == 150
    (note,) = data.check()
    assert "of 150 classes occur in no label map" in note


def test_an_image_that_the_annotations_list_must_be_there(drawn):
    (drawn / "images/train/drawing3.png").unlink()
    with pytest.raises(UserError, match=r"drawing3.png: no such file, but .*instances_train.json lists it"):
        coco(drawn).check()


def test_a_turned_photo_whose_annotations_are_not_turned_is_refused(drawn):
    photo = Image.new("RGB", (SIDE, SIDE * 2))
    exif = photo.getexif()
    exif[274] = 6
    photo.save(drawn / "images/train/drawing0.jpg", exif=exif)

    def say(width, height):
        return lambda d: d["images"][0].update(file_name="drawing0.jpg", width=width, height=height)

    coco(drawn, masks=False, change=_drop_masks)
    assert coco(drawn, masks=False, change=say(2 * SIDE, SIDE)).check() == []
    image, _ = coco(drawn, masks=False).read(0)
    assert image.shape == (3, SIDE, 2 * SIDE)
    with pytest.raises(UserError, match=rf"drawing0.jpg: is {2 * SIDE} x {SIDE} pixels \(upright"):
        coco(drawn, masks=False, change=say(SIDE, 2 * SIDE)).check()


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_photos_become_rgb(drawn, mode):
    Image.new(mode, (SIDE, SIDE), 200 if mode == "L" else (0, 0, 0, 55)).save(drawn / "images/train/drawing0.jpg")
    data = coco(drawn, change=lambda d: d["images"][0].update(file_name="drawing0.jpg"))
    assert data.check() == []
    image, _ = data.read(0)
    assert image.shape == (3, SIDE, SIDE)
    assert image.float().mean() == pytest.approx(200, abs=2)


def test_crowds_boxes_off_the_image_and_empty_images_are_passed_over_in_training_alone(drawn):
    def change(dataset):
        entries = dataset["annotations"]
        entries[0]["iscrowd"] = 1
        entries[1]["bbox"] = [SIDE - 10.0, 5.0, 30.0, 10.0]
        entries[2]["bbox"] = [SIDE + 1.0, 5.0, 30.0, 10.0]

    data = coco(drawn, change=change)
    assert [data.key(row) for row in range(len(data))] == ["drawing1.png", "drawing3.png"]
    assert data.read(0)[1].boxes.tolist() == [[SIDE - 10, 5, SIDE, 15]]
    notes = " ".join(data.check())
    for expected in ("1 crowd", "1 boxes reach beyond", "1 boxes of less", "2 images without"):
        assert expected in notes
    held_out = coco(drawn, training=False)
    assert len(held_out) == 4
    assert len(held_out.truth()["annotations"]) == 4


def test_a_missing_box_is_that_of_its_mask(drawn):
    whole = coco(drawn).read(0)[1]
    data = coco(drawn, change=lambda d: d["annotations"][0].pop("bbox"))
    assert torch.equal(data.read(0)[1].boxes, whole.boxes)
    assert torch.equal(data.read(0)[1].masks, masked(drawn).read(0)[1][None].clamp(max=1))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d["annotations"][1].pop("segmentation"), r"annotation 2 \(drawing1.png\) has no segmentation"),
        (lambda d: d["annotations"][1]["segmentation"].update(size=[9, 9]), r"annotation 2 .*of \[9, 9\] pixels"),
        (lambda d: d["annotations"][1].update(segmentation=[[1, 2, 3]]), "polygon of less than three points"),
        (lambda d: d["annotations"][1].update(category_id=99), r"annotation 2 .* has category 99"),
        (lambda d: d["annotations"][1].update(image_id=99), "annotation 2 is of image 99"),
        (lambda d: d["images"][1].pop("width"), "drawing1.png has no width"),
        (lambda d: d["images"][1].update(id="2"), 'drawing1.png has id "2", which should be a valid integer'),
        (lambda d: d["categories"][1].pop("name"), "instances_train.json: category .* has no name"),
        (lambda d: d.pop("categories"), "not COCO annotations"),
    ],
)
def test_annotations_that_cannot_be_used_are_named(drawn, change, expected):
    with pytest.raises(UserError, match=expected):
        coco(drawn, change=change)


def test_boxes_alone_need_no_masks(drawn):
    data = coco(drawn, masks=False, change=_drop_masks)
    assert len(data.read(0)[1].boxes) == 1


def test_an_image_without_a_label_and_an_empty_one_are_named(drawn, tmp_path):
    with pytest.raises(UserError, match=r"drawing0.png has no label"):
        LabelledImages(open_source(str(drawn / "images/train"), split="train"))
    (drawn / "classes/disc/drawing1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"disc/drawing1.png is empty"):
        LabelledImages(open_source(str(drawn / "classes"), split="train")).check()


def test_a_damaged_image_is_named_when_it_is_read(drawn):
    path = drawn / "classes/disc/drawing1.png"
    path.write_bytes(path.read_bytes()[:200])
    data = LabelledImages(open_source(str(drawn / "classes"), split="train"))
    with pytest.raises(UserError, match=r"disc/drawing1.png: cannot be decoded"):
        data.images(range(len(data)))


def test_rows_arrive_in_the_order_that_was_asked_for(drawn):
    data = LabelledImages(open_source(str(drawn / "classes"), split="train"))
    for row, image in zip([2, 0, 3], data.images([2, 0, 3]), strict=True):
        assert np.array_equal(np.array(image), np.array(Image.open(drawn / "classes" / data.key(row))))


def test_class_folders_tars_and_parquet_hold_the_same_labelled_images(tmp_path):
    write_photos(tmp_path / "folder", 12)
    files = sorted((tmp_path / "folder").rglob("*.jpg"))
    classes = sorted({file.parent.name for file in files})
    labels = [classes.index(file.parent.name) for file in files]
    with tarfile.open(tmp_path / "shard-0.tar", "w") as shard:
        for number, (file, label) in enumerate(zip(files, labels, strict=True)):
            for ending, content in (("jpg", file.read_bytes()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number:03d}.{ending}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    table = pa.table({"image": [{"bytes": file.read_bytes(), "path": file.name} for file in files], "label": labels})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=5)

    folder, tar, parquet = (
        open_labelled(load_config(FinetuneJobConfig, None, [f"data.train={tmp_path / name}"]), "train")
        for name in ("folder", "shard-0.tar", "rows.parquet")
    )
    rows = [7, 0, 11, 3]
    expected = [np.asarray(image) for image in folder.images(rows)]
    for other in (tar, parquet):
        assert other.labels.tolist() == folder.labels.tolist() == labels
        for image, pixels in zip(other.images(rows), expected, strict=True):
            assert np.array_equal(np.asarray(image), pixels)
