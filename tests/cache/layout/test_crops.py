"""Crops: the student is handed the very pixels that the teacher saw, and nothing else can be mirrored."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.cache.fill.plan import plan_cache
from pipeline.cache.layout.cached_teacher import teacher_stats
from pipeline.cache.layout.view_rows import ROWS_SCHEMA, views_of
from pipeline.cache.read.reader import CacheReader
from pipeline.cache.read.scan import read_summaries, scan_images
from pipeline.errors import UserError
from pipeline.imaging.decode import image_size
from pipeline.imaging.geometry import WHOLE, ViewPolicy
from pipeline.imaging.photometric import UNCHANGED, PhotometricPolicy
from pipeline.storage.store import Store
from tests.fakes import fill_in_process

POLICY = ViewPolicy(crops=2, min_area=0.3, seed=3)


PHOTOMETRIC = "views.photometric={jitter: 0.8, grey: 0.2, blur: 0.5}"


@pytest.fixture(params=[(), (PHOTOMETRIC,)], ids=["geometry", "photometric"])
def cropped(tmp_path, photo_config, request):
    """A complete cache of two crops of each image, stored as float32, with one teacher at the student's size."""
    crops = ["views.crops=2", "views.min_area=0.3", "seed=3", "cache.codec=float32", *request.param]
    config = photo_config(*crops, "teachers=[{model: 'tests.fakes:colours', args: {dim: 8}}]")
    plan, computed = fill_in_process(plan_cache(config, Store.at(tmp_path / "cache")))
    assert computed == 3
    return SimpleNamespace(plan=plan, config=config, train=plan.split("train").dataset, val=plan.split("val").dataset)


def _reader(cropped, **changes):
    settings = {"image_size": 32, "batch_size": 32, "window": 128, **changes}
    return CacheReader(cropped.train, cropped.plan.teachers, **settings)


def test_replay_gives_the_stored_features_of_256_rows(cropped, monkeypatch):
    """The teacher, asked again about the pixels that the reader hands out, says what is stored."""
    from pipeline.imaging import decoder_pool as module
    from pipeline.imaging.crop import crop_and_resize

    # The student's own interpolation is bicubic; rendered as this teacher's input, the pixels are to be equal.
    monkeypatch.setattr(
        module, "crop_and_resize", lambda image, view, size, _: crop_and_resize(image, view, size, "bilinear")
    )
    teacher = cropped.plan.teachers[0]
    source = teacher.create()
    source.load()
    codecs, rows = teacher.codecs(), 0
    for batch in _reader(cropped).batches(0):
        expected = source.encode(batch.images)
        for kind in ("summary", "patches"):
            stored = codecs[kind].decode(batch.features[teacher.id][kind])
            torch.testing.assert_close(stored, getattr(expected, kind), rtol=1e-5, atol=1e-5)
        rows += len(batch.keys)
    assert rows >= 256


def test_every_view_of_every_image_comes_once_an_epoch(cropped):
    keys = [key for batch in _reader(cropped, batch_size=10).batches(0) for key in batch.keys]
    assert len(keys) == 300
    assert all(keys.count(key) == 2 for key in set(keys))


def test_several_views_of_an_image_lie_together_in_a_step_and_are_decoded_once(cropped, monkeypatch):
    from pipeline.imaging import decoder_pool as module

    apart: dict[str, list[torch.Tensor]] = {}
    for batch in _reader(cropped, batch_size=10).batches(0):
        for key, image in zip(batch.keys, batch.images, strict=True):
            apart.setdefault(key, []).append(image.clone())
    decoded = []
    decode = module.decode_pixels
    monkeypatch.setattr(module, "decode_pixels", lambda data: decoded.append(data) or decode(data))
    batches = list(_reader(cropped, per_step=2, batch_size=30).batches(0))
    assert len(decoded) == len(set(decoded)) == 150
    keys = [key for batch in batches for key in batch.keys]
    assert keys[::2] == keys[1::2]
    assert len(keys) == 300
    assert len(set(keys)) == 150
    assert sorted(keys[::2]) != keys[::2]
    for batch in batches:
        for key, image in zip(batch.keys, batch.images, strict=True):
            assert sum(torch.equal(image, other) for other in apart[key]) == 1
        for pair in batch.images.split(2):
            assert not torch.equal(*pair)
    orders = [[b.images[0].sum() for b in _reader(cropped, per_step=2, batch_size=30).batches(e)] for e in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_features_stay_with_their_view_when_views_lie_together(cropped, monkeypatch):
    from pipeline.imaging import decoder_pool as module
    from pipeline.imaging.crop import crop_and_resize

    monkeypatch.setattr(
        module, "crop_and_resize", lambda image, view, size, _: crop_and_resize(image, view, size, "bilinear")
    )
    teacher = cropped.plan.teachers[0]
    source, codecs = teacher.create(), teacher.codecs()
    source.load()
    for batch in _reader(cropped, per_step=2).batches(1):
        stored = codecs["patches"].decode(batch.features[teacher.id]["patches"])
        torch.testing.assert_close(stored, source.encode(batch.images).patches, rtol=1e-5, atol=1e-5)


def test_photometric_values_are_stored_row_by_row_and_change_what_teacher_and_student_see(cropped):
    (part,) = cropped.train.parts
    rows = pa.concat_tables(part.rows.read(record) for record in part.rows.records().values())
    if cropped.train.policy.photometric is None:
        assert rows.schema.names == ROWS_SCHEMA.names
        return
    stored, plain = views_of(rows), POLICY
    keys = [key.hex() for key in rows["key"].to_pylist()]
    data = {key.hex(): image for record in part.images.records().values() for key, image in _images(part, record)}
    drawn = {key: cropped.train.policy.views(key, *image_size(image)) for key, image in data.items()}
    assert stored == [drawn[key][view] for key, view in zip(keys, rows["view"].to_pylist(), strict=True)]
    assert [(view.box, view.flip) for view in drawn[keys[0]]] == [
        (view.box, view.flip) for view in plain.views(keys[0], *image_size(data[keys[0]]))
    ]
    changed = sum(view.photometric != UNCHANGED for view in stored)
    assert 0.8 * len(stored) < changed < len(stored)


def _images(part, record):
    table = part.images.read(record, ["key", "image"])
    return zip(table["key"].to_pylist(), table["image"].to_pylist(), strict=True)


def test_a_resumed_epoch_gives_the_same_pixels(cropped):
    whole = list(_reader(cropped, batch_size=50).batches(1))
    resumed = list(_reader(cropped, batch_size=50).batches(1, start=4))
    assert len(resumed) == len(whole) - 4
    for before, after in zip(whole[4:], resumed, strict=True):
        assert before.keys == after.keys
        assert torch.equal(before.images, after.images)


def test_another_photometric_policy_is_another_view(cropped, photo_config, tmp_path):
    settings = ["views.crops=2", "views.min_area=0.3", "seed=3", "views.photometric.grey=1.0"]
    plan = plan_cache(photo_config(*settings), Store.at(tmp_path / "cache"))
    train = plan.split("train")
    assert train.dataset.policy.id not in (cropped.train.policy.id, POLICY.id)
    assert not train.new.num_rows
    assert train.missing_views(plan.teachers[0]) == 300


def test_photometric_changes_of_whole_images_are_refused(photo_config, tmp_path):
    with pytest.raises(UserError, match=r"views\.photometric changes crops, and views\.crops is 0: set views\.crops"):
        plan_cache(photo_config("views.photometric.blur=0.5"), Store.at(tmp_path / "cache"))


def test_a_crop_of_all_of_the_area_is_the_whole_image():
    policy = ViewPolicy(crops=2, min_area=1.0, flip=0.0, photometric=PhotometricPolicy(jitter=1.0))
    assert [view.box for view in policy.views("x", 60, 45)] == [(0, 0, 1, 1)] * 2


@pytest.mark.parametrize("settings", [{"per_step": 3}, {"per_step": 2, "batch_size": 15}])
def test_views_in_a_step_that_do_not_divide_are_refused(cropped, settings):
    with pytest.raises(
        UserError, match=r"views\.per_step=\d must divide the 2 views .*views\.crops.* and the \d+ images"
    ):
        _reader(cropped, **settings)


def test_labels_belong_to_the_images(cropped):
    for batch in _reader(cropped).batches(0):
        assert batch.labels.tolist() == [int(key[5]) for key in batch.keys]


def test_geometry_is_stored_row_by_row_and_some_rows_are_mirrored(cropped):
    (part,) = cropped.train.parts
    rows = pa.concat_tables(part.rows.read(record) for record in part.rows.records().values())
    assert rows.num_rows == 300
    area = (rows["right"].to_numpy() - rows["left"].to_numpy()) * (rows["bottom"].to_numpy() - rows["top"].to_numpy())
    assert area.min() > 0.29
    assert area.max() <= 1
    assert len(np.unique(area)) > 290
    assert 90 < np.sum(rows["flip"].to_numpy(zero_copy_only=False)) < 210
    assert rows["view"].to_pylist() == [0, 1] * 150


def test_images_are_stored_once_and_held_out_images_stay_whole(cropped):
    (part,), (held_out,) = cropped.train.parts, cropped.val.parts
    assert sum(record.rows for record in part.images.records().values()) == 150
    assert cropped.val.policy == WHOLE
    policy = cropped.train.policy
    assert (policy == POLICY) == (policy.photometric is None)
    assert Path(part.store.uri, "views", policy.id).exists()
    assert not Path(held_out.store.uri, "views", policy.id).exists()


def test_another_policy_is_another_view_of_the_same_images(cropped, photo_config, tmp_path):
    config = photo_config("views.crops=1", "seed=3", "teachers=[{model: 'tests.fakes:colours', args: {dim: 8}}]")
    plan = plan_cache(config, Store.at(tmp_path / "cache"))
    train = plan.split("train")
    (part,), (known,) = train.dataset.parts, cropped.train.parts
    assert part.view.uri != known.view.uri
    assert not train.new.num_rows
    assert not train.dataset.missing_images()
    assert train.missing(plan.teachers[0]) == [(part, 0), (part, 1)]


def test_a_row_group_of_crops_belongs_to_one_of_images(cropped):
    import pyarrow.parquet as pq

    (part,) = cropped.train.parts
    folders = part.images, part.rows, part.teacher(cropped.plan.teachers[0].id)
    files = [(folder, folder.records()[0]) for folder in folders]
    counts = [
        [pq.ParquetFile(folder.store.open(record.file)).metadata.row_group(g).num_rows for g in (0, 1)]
        for folder, record in files
    ]
    assert counts == [[64, 36], [128, 72], [128, 72]]


def test_statistics_and_summaries_are_those_of_the_views(cropped):
    teacher = cropped.plan.teachers[0]
    assert teacher_stats(cropped.train, teacher)["summary"].count == 300
    summaries, labels = read_summaries(cropped.train, teacher)
    assert summaries.shape == (150, 8)
    scanned = torch.cat([batch.labels for batch in scan_images(cropped.train, 32, 64)])
    assert torch.equal(labels, scanned)


def test_rows_of_other_images_are_refused(cropped):
    (part,) = cropped.train.parts
    table = part.rows.read(part.rows.records()[1])
    keys = table["key"].to_pylist()
    swapped = table.set_column(0, table.schema.field(0), pa.array([keys[-1], *keys[1:]], table.schema.field(0).type))
    part.rows.commit(1, swapped)
    part.refresh()
    with pytest.raises(UserError, match=r"shard 1 of .* does not hold the views of its images"):
        list(_reader(cropped).batches(0))


def test_a_policy_draws_the_same_crops_again_and_others_for_other_samples_and_seeds():
    views = POLICY.views("a.jpg", 640, 480)
    assert views == POLICY.views("a.jpg", 640, 480)
    assert views[0] != views[1]
    assert views != POLICY.views("b.jpg", 640, 480)
    assert views != ViewPolicy(crops=2, min_area=0.3, seed=4).views("a.jpg", 640, 480)


@pytest.mark.parametrize(("width", "height"), [(640, 480), (33, 500), (4000, 10), (1, 1)])
def test_crops_of_any_image_keep_area_and_sides_within_bounds(width, height):
    policy = ViewPolicy(crops=200, min_area=0.3)
    for view in policy.views("x", width, height):
        left, top, right, bottom = view.box
        wide, high = (right - left) * width, (bottom - top) * height
        assert wide * high >= 0.3 * width * height * (1 - 1e-5)
        assert view.box == (0, 0, 1, 1) or max(wide / high, high / wide) <= 4 / 3 * (1 + 1e-4)
