"""A share of the training images is held out by their names: none changes sides, and nothing is computed twice."""

import io
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache.fill.plan import plan_cache
from pipeline.config.load import load_config
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.downstream.images import open_labelled, refuse_same_images, split_location
from pipeline.downstream.job import with_absolute_paths
from pipeline.errors import UserError
from pipeline.sources.config import DataConfig
from pipeline.sources.hold_out import HoldOut
from pipeline.sources.open import open_images, open_source
from pipeline.storage.store import Store
from tests.fakes import fill_in_process, write_photos
from tests.storage.web_server import WebServer

COUNT = 120


@pytest.fixture
def photos(tmp_path):
    write_photos(tmp_path / "all", COUNT)
    return tmp_path / "all"


def as_folder(photos, target):
    return str(photos)


def as_tar(photos, target):
    with tarfile.open(target / "photos.tar", "w") as tar:
        for photo in sorted(photos.rglob("*.jpg")):
            tar.add(photo, photo.name)
    return str(target / "photos.tar")


def as_parquet(photos, target):
    files = sorted(photos.rglob("*.jpg"))
    columns = {"path": [file.name for file in files], "bytes": [file.read_bytes() for file in files]}
    pq.write_table(pa.table(columns), target / "photos.parquet")
    return str(target / "photos.parquet")


def ids(location, share, split):
    return set(open_images(DataConfig(train=location, val=share), split, 0).index()["sample_id"].to_pylist())


@pytest.mark.parametrize("form", [as_folder, as_tar, as_parquet])
def test_the_sides_are_all_images_and_share_none(tmp_path, photos, form):
    location = form(photos, tmp_path)
    train, val = (ids(location, "0.25", split) for split in ("train", "val"))
    assert not train & val
    assert len(train) + len(val) == COUNT
    assert 15 < len(val) < 45


def test_no_image_changes_sides_when_others_come_or_go_or_the_folder_moves(tmp_path, photos):
    before = ids(str(photos), "0.25", "val")
    gone = sorted(before)[0]
    (photos / gone).unlink()
    for photo in sorted(photos.rglob("*.jpg"))[:30]:
        photo.with_name(f"more-{photo.name}").write_bytes(photo.read_bytes())
    moved = photos.rename(tmp_path / "moved")
    after = ids(str(moved), "0.25", "val")
    assert {name for name in after if "more-" not in name} == before - {gone}
    assert before <= ids(str(moved), "0.5", "val") | {gone}  # a larger share holds a smaller one


def test_teachers_run_once_whatever_is_held_out(tmp_path, photo_config):
    def filled(*overrides):
        config = photo_config("data.name=photos", *overrides)
        plan = plan_cache(config, Store.at(tmp_path / "cache"))
        pairs = sum(split.missing_views(teacher) for split in plan.splits for teacher in plan.teachers)
        return fill_in_process(plan)[0], pairs, sum(split.new.num_rows for split in plan.splits)

    plan, pairs, _ = filled("data.val=0.2")
    assert [split.dataset.name for split in plan.splits] == ["photos-train-without-0.2", "photos-val-0.2-held-out"]
    train, val = (set(split.sample_ids()) for split in plan.splits)
    assert pairs == 2 * 150
    assert len(train | val) == len(train) + len(val) == 150
    assert filled("data.val=0.2")[1:] == (0, 0)
    other, _, _ = filled("data.val=0.4")  # read again, since their names are in no list, but not computed
    assert val < set(other.splits[1].sample_ids())
    assert all(not split.missing(teacher) for split in other.splits for teacher in other.teachers)
    stored = {path.name for path in (tmp_path / "cache").rglob("images/*.parquet")}
    whole, _, _ = filled("data.val=none")
    assert len(whole.splits) == 1
    assert {path.name for path in (tmp_path / "cache").rglob("images/*.parquet")} == stored


def test_an_equal_listing_means_an_equal_side(photos):
    whole = open_source(str(photos), split="train")
    sides = [HoldOut(whole, share, split) for share in (0.3, 0.3 + 1e-9, 0.5) for split in ("train", "val")]
    assert len({side.listed().digest for side in sides}) == len(sides)
    assert whole.listed().digest not in {side.listed().digest for side in sides}
    assert sides[0].listed().digest == HoldOut(open_source(str(photos), split="train"), 0.3, "train").listed().digest
    assert sides[1].listed().index().equals(sides[1].index())


def test_archives_of_a_store_are_divided_too(tmp_path, photos, photo_config):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for photo in sorted(photos.rglob("*.jpg")):
            tar.add(photo, photo.name)
    web = WebServer({"photos.tar": data.getvalue()})
    config = photo_config(f"data.train={web.url}/photos.tar", "data.val=0.25")
    plan, _ = fill_in_process(plan_cache(config, Store.at(tmp_path / "cache")))
    train, val = (set(split.sample_ids()) for split in plan.splits)
    local = as_tar(photos, tmp_path)
    assert (train, val) == (ids(local, "0.25", "train"), ids(local, "0.25", "val"))


def test_a_classifier_is_tuned_on_one_side_and_measured_on_the_other(photos):
    config = load_config(FinetuneJobConfig, None, [f"data.train={photos}", "data.val=0.25"])
    train, val = (open_labelled(with_absolute_paths(config), split) for split in ("train", "val"))
    assert len(train) + len(val) == COUNT
    assert train.classes == val.classes
    refuse_same_images(train, val)
    with pytest.raises(UserError, match=r"data\.val=0\.25: a share is held out of labelled images only; name held-out"):
        split_location(config, "train")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["data.train=photos", "data.val=1.5"],
            r"data.val: a share .* between 0 and 1.*; a folder of this name is ./1.5",
        ),
        (["data.train=photos", "data.val=0.0"], "data.val: a share of data.train lies between 0 and 1"),
        (["data.val=0.1"], "data: generated scenes have held-out ones of their own; leave data.val out"),
        (["data.train=cache://photos/1234", "data.val=0.1"], "cache://photos/1234 is not divided; name its images"),
    ],
)
def test_what_cannot_be_divided_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        load_config(FinetuneJobConfig, None, given)


def test_a_share_may_be_a_number_in_a_recipe_and_a_year_is_a_folder(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {train: photos, val: 0.1}\n")
    assert load_config(FinetuneJobConfig, recipe).data.share == 0.1
    assert load_config(FinetuneJobConfig, None, ["data.train=photos", "data.val=2012"]).data.share is None


def test_a_side_without_images_is_refused(photos):
    for photo in sorted(photos.rglob("*.jpg"))[3:]:
        photo.unlink()
    with pytest.raises(UserError, match=r"all \(0.0001 held out\): none of the 3 images there; give another share"):
        ids(str(photos), "0.0001", "val")
