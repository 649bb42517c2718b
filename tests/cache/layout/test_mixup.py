"""Views that are mixed with views of other images: drawn once, the same for teacher and student, and never with a stranger."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.cache.fill.plan import plan_cache
from pipeline.cache.layout.cached_teacher import teacher_stats
from pipeline.cache.layout.shards import ROW_GROUP_SIZE
from pipeline.cache.layout.shares import PRESENT
from pipeline.cache.layout.view_rows import read_view_rows, views_of
from pipeline.cache.maintain.audit import verify_cache
from pipeline.cache.maintain.repair import repair_cache
from pipeline.cache.read import reader as reader_module
from pipeline.cache.read.reader import CacheReader
from pipeline.cache.read.reader_process import ReaderProcess
from pipeline.cache.read.scan import read_summaries
from pipeline.distill.phases import Phase
from pipeline.distill.plan import make_job, training_plan
from pipeline.distill.task import DistillTask
from pipeline.errors import UserError
from pipeline.imaging.crop import crop_and_pad, crop_and_resize
from pipeline.imaging.decode import decode_pixels
from pipeline.imaging.decoder_pool import CropTask, DecoderPool, Partner
from pipeline.imaging.geometry import FULL, View, ViewPolicy
from pipeline.imaging.gpu_decode import NvjpegPool
from pipeline.imaging.mixup import blend, draw_mixes
from pipeline.storage.store import Store
from tests.fakes import fill_in_process, images_seen, without_ray, write_photos

VIEWS = ["views.crops=3", "views.min_area=0.3", "views.mixup=0.5", "seed=3", "cache.codec=float32"]


@pytest.fixture
def mixed(tmp_path, photo_config):
    """A complete cache of three crops of each image, half of the last two mixed; `fill` fills it again after a change."""
    log = tmp_path / "calls"
    teachers = f"teachers=[{{model: 'tests.fakes:colours', args: {{dim: 8, log: '{log}'}}}}]"
    config = photo_config(*VIEWS, teachers)
    made = SimpleNamespace(config=config, photos=tmp_path / "photos/train", store=Store.at(tmp_path / "cache"))

    def fill():
        before = images_seen(log)
        made.plan, _ = fill_in_process(plan_cache(config, made.store))
        made.train, made.teacher = made.plan.split("train").dataset, made.plan.teachers[0]
        return images_seen(log) - before

    made.fill = fill
    assert fill() == 3 * 150 + 40
    return made


def rows_of(dataset):
    return [read_view_rows(part, shard) for part in dataset.parts for shard in range(part.shards)]


def batches_of(mixed, reader=CacheReader, epoch=0, start=0, **settings):
    settings = {"image_size": 32, "batch_size": 30, "window": 128, **settings}
    made = reader(mixed.train, mixed.plan.teachers, **settings)
    return list(made.batches(epoch, start))


def test_blends_are_exact_and_ends_are_the_images():
    first, second = (np.random.default_rng(seed).integers(0, 256, (3, 9, 7), dtype=np.uint8) for seed in (0, 1))
    assert np.array_equal(blend(first, second, 1.0), first)
    assert np.array_equal(blend(first, second, 0.0), second)
    for level in (1, 77, 128, 255):
        share = level / 256
        exact = np.floor(share * first.astype(float) + (1 - share) * second + 0.5)
        assert np.array_equal(blend(first, second, share), exact)


def test_partners_are_other_images_and_the_first_view_is_never_mixed():
    drawn = [draw_mixes(0.5, 0, f"{place}", place, 64, 4) for place in range(64)]
    assert drawn[5] == draw_mixes(0.5, 0, "5", 5, 64, 4)
    assert drawn[5] != draw_mixes(0.5, 1, "5", 5, 64, 4)
    assert all(mixes[0] is None for mixes in drawn)
    found = [(place, mix) for place, mixes in enumerate(drawn) for mix in mixes if mix]
    assert 70 < len(found) < 122
    assert all(mix.partner != place and 0 <= mix.partner < 64 for place, mix in found)
    assert len({mix.partner for _, mix in found}) > 40
    assert all(mix.share * 256 == round(mix.share * 256) for _, mix in found)
    shares = [mix.share for _, mix in found]
    assert min(shares) < 0.1 < 0.9 < max(shares)
    assert draw_mixes(1.0, 0, "a", 0, 1, 3) == [None] * 3


def test_partners_lie_in_the_row_group_and_are_stored_with_the_row(mixed):
    policy = mixed.train.policy
    assert policy.id != ViewPolicy(crops=3, min_area=0.3, seed=3).id
    for views in rows_of(mixed.train):
        keys, partners = views.images["key"].to_pylist(), views.rows["partner"].to_pylist()
        assert 0.2 < np.mean([partner is not None for partner in partners]) < 0.5
        assert partners[::3] == [None] * len(keys)
        for row, partner in enumerate(partners):
            place = row // 3
            group = place // ROW_GROUP_SIZE * ROW_GROUP_SIZE
            assert partner is None or partner in {*keys[group : group + ROW_GROUP_SIZE]} - {keys[place]}


def test_the_teacher_asked_about_the_pixels_of_the_student_says_what_is_stored(mixed, monkeypatch):
    monkeypatch.setattr(reader_module, "STUDENT_INTERPOLATION", "bilinear")
    source, codecs = mixed.teacher.create(), mixed.teacher.codecs()
    source.log = ""
    source.load()
    rows = 0
    for batch in batches_of(mixed):
        stored, expected = batch.features[mixed.teacher.id], source.encode(batch.images)
        assert stored[PRESENT].all()
        for kind in ("summary", "patches"):
            torch.testing.assert_close(codecs[kind].decode(stored[kind]), getattr(expected, kind), rtol=1e-5, atol=1e-5)
        rows += len(batch.keys)
    assert rows == 450


def test_a_mixed_view_is_the_blend_of_the_two_views(mixed):
    views = rows_of(mixed.train)[0]
    data = dict(zip(views.images["key"].to_pylist(), views.images["image"].to_pylist(), strict=True))
    geometry = dict(
        zip(
            zip(views.rows["key"].to_pylist(), views.rows["view"].to_pylist(), strict=True),
            views_of(views.rows),
            strict=True,
        )
    )
    row = next(n for n, partner in enumerate(views.rows["partner"].to_pylist()) if partner)
    values = views.rows.slice(row, 1).to_pylist()[0]
    own, other = (
        crop_and_resize(decode_pixels(data[key]), geometry[key, values["view"]], (24, 24), "bicubic")
        for key in (values["key"], values["partner"])
    )
    expected = blend(own, other, values["mix"])
    image, view, share = views.partners()[row]
    for processes in (False, True):
        pool = DecoderPool(2, processes)
        pixels = pool.arrays.empty(1, 3, 24, 24)
        (target,) = pool.arrays.row_targets(pixels)
        task = CropTask(geometry[values["key"], values["view"]], "bicubic", target, Partner(image.as_py(), view, share))
        pool.decode([(data[values["key"]], [task])])
        assert np.array_equal(pixels[0], expected)
        pool.close()


def test_a_padded_view_is_mixed_inside_its_box():
    pool = DecoderPool(1)
    photos = [np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8) for seed in (0, 1)]
    encoded = [_png(photo) for photo in photos]
    pixels = pool.arrays.empty(1, 4, 32, 32)
    (target,) = pool.arrays.row_targets(pixels)
    mixed = View((0.0, 0.0, 0.5, 1.0), flip=True)
    pool.decode([(encoded[0], [CropTask(FULL, "bilinear", target, Partner(encoded[1], mixed, 0.25))])])
    own, size = crop_and_pad(photos[0], FULL, (32, 32), "bilinear"), (21, 32)
    assert np.array_equal(pixels[0, 3], own[3])
    assert not pixels[0, :3, 21:].any()
    expected = blend(own[:3, :21], crop_and_resize(photos[1], mixed, size, "bilinear"), 0.25)
    assert np.array_equal(pixels[0, :3, :21], expected)


def _png(pixels):
    import io

    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "png")
    return sink.getvalue()


def test_a_resumed_epoch_and_another_process_give_the_same(mixed):
    whole = batches_of(mixed, epoch=1)
    for some in (batches_of(mixed, epoch=1, start=5), batches_of(mixed, ReaderProcess, epoch=1, start=5)):
        for before, after in zip(whole[5:], some, strict=True):
            assert before.keys == after.keys
            assert torch.equal(before.images, after.images)
            for kind, rows in before.features[mixed.teacher.id].items():
                assert torch.equal(rows, after.features[mixed.teacher.id][kind])


def test_growing_computes_the_new_images_and_leaves_the_partners_of_the_others(mixed):
    (part,) = mixed.train.parts
    before = [part.rows.read(record) for record in part.rows.records().values()]
    write_photos(mixed.photos / "more", 6, seed=8)
    assert mixed.fill() == 3 * 6
    assert len(mixed.train.parts) == 2
    after = [part.rows.read(record) for record in part.rows.records().values()]
    assert all(one.equals(other) for one, other in zip(before, after, strict=True))
    assert all(batch.features[mixed.teacher.id][PRESENT].all() for batch in batches_of(mixed))


def test_what_was_mixed_with_an_image_that_is_gone_has_no_features_and_shows_none_of_it(mixed, monkeypatch):
    gone = sorted(mixed.photos.rglob("*.jpg"))[::10]
    keys = {}
    for number in range(len(mixed.train.parts)):
        table = mixed.train.samples(number)
        keys |= dict(zip(table["sample_id"].to_pylist(), table["key"].to_pylist(), strict=True))
    strangers = {keys[path.relative_to(mixed.photos).as_posix()] for path in gone}
    rows = pa.concat_tables(views.rows for views in rows_of(mixed.train)).to_pylist()
    names = {key: name for name, key in keys.items()}
    lost = [row for row in rows if row["partner"] in strangers and row["key"] not in strangers]
    assert lost
    for path in gone:
        path.unlink()
    assert mixed.fill() == 0
    decoded = []
    decode = decode_pixels
    monkeypatch.setattr(
        "pipeline.imaging.decoder_pool.decode_pixels", lambda data: decoded.append(data) or decode(data)
    )
    batches = batches_of(mixed, batch_size=1)
    absent = [batch for batch in batches if not batch.features[mixed.teacher.id][PRESENT].all()]
    assert sorted(batch.keys[0] for batch in absent) == sorted(names[row["key"]] for row in lost)
    assert not any(batch.features[mixed.teacher.id]["patches"].any() for batch in absent)
    images = [image for views in rows_of(mixed.train) for image in views.images.select(["key", "image"]).to_pylist()]
    assert not {image["image"] for image in images if image["key"] in strangers} & {*decoded}


def test_a_teacher_with_a_share_has_mixed_views_of_its_images(mixed, photo_config, monkeypatch):
    monkeypatch.setattr(reader_module, "STUDENT_INTERPOLATION", "bilinear")
    config = photo_config(*VIEWS, "teachers=[{model: 'tests.fakes:colours', share: 0.4, args: {dim: 8}}]")
    plan, _ = fill_in_process(plan_cache(config, mixed.store), batch_size=7)
    (teacher,), dataset = plan.teachers, plan.split("train").dataset
    source, codecs = teacher.create(), teacher.codecs()
    source.load()
    for batch in CacheReader(dataset, plan.teachers, image_size=32, batch_size=30).batches(0):
        stored = batch.features[teacher.id]
        present = stored[PRESENT].bool()
        expected = source.encode(batch.images[present]).patches
        torch.testing.assert_close(codecs["patches"].decode(stored["patches"][present]), expected, rtol=1e-5, atol=1e-5)


def test_verification_and_repair_mix_again(mixed, monkeypatch):
    without_ray(monkeypatch)
    assert verify_cache(mixed.plan, mixed.config).findings == []
    (part,) = mixed.train.parts
    record, features = part.rows.read_record(0), part.teacher(mixed.teacher.id).read_record(0)
    part.rows.unlist(0)
    part.teacher(mixed.teacher.id).unlist(0)
    found = verify_cache(mixed.plan, mixed.config)
    assert repair_cache(mixed.plan, mixed.config, found)[1].findings == []
    assert part.rows.read_record(0).sha256 == record.sha256
    assert part.teacher(mixed.teacher.id).read_record(0).sha256 == features.sha256


def test_rows_with_a_partner_from_elsewhere_are_refused(mixed):
    (part,) = mixed.train.parts
    table = part.rows.read(part.rows.records()[1])
    partners = [partner and bytes(16) for partner in table["partner"].to_pylist()]
    position = table.schema.get_field_index("partner")
    part.rows.commit(1, table.set_column(position, table.schema.field(position), pa.array(partners, pa.binary(16))))
    part.refresh()
    with pytest.raises(UserError, match=r"shard 1 of .* does not hold the views of its images"):
        batches_of(mixed)


def test_knn_uses_views_that_are_not_mixed_and_statistics_all(mixed):
    summaries, _ = read_summaries(mixed.train, mixed.teacher)
    assert len(summaries) == 150
    assert teacher_stats(mixed.train, mixed.teacher)["summary"].count == 450


def test_a_distillation_trains_on_mixed_views(mixed, photo_config):
    student = ["student.name=timm/test_resnet", "student.token_dim=16", "student.head_dim=32", "views.per_step=3"]
    config = photo_config(*VIEWS, *student, "train.batch_size=30")
    for path in sorted(mixed.photos.rglob("*.jpg"))[::10]:
        path.unlink()
    mixed.fill()
    task = DistillTask(make_job(config, mixed.plan))
    batch = next(iter(task.batches(0, 0)))
    task.before_step([batch])
    loss, _ = task.loss(task.module, batch, torch.device("cpu"))
    assert torch.isfinite(loss)
    count = int(batch.features[mixed.teacher.id][PRESENT].sum())
    assert task.scales["colours8"] == pytest.approx(30 / count)


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        (["views.crops=1"], r"views\.mixup mixes all crops of an image but the first: set views\.crops to 2 or more"),
        (["views.crops=0"], r"views\.mixup mixes all crops"),
        (["cache.decoder=nvjpeg"], r"cache\.decoder: nvjpeg decodes no views that are mixed"),
    ],
)
def test_mixing_that_cannot_be_done_is_refused(photo_config, tmp_path, changes, refusal):
    with pytest.raises(UserError, match=refusal):
        plan_cache(photo_config(*VIEWS, *changes), Store.at(tmp_path / "cache"))


def test_a_gpu_decodes_no_mixed_views_for_the_student(mixed, photo_config):
    config = photo_config(*VIEWS, "train.decoder=nvjpeg")
    with pytest.raises(UserError, match=r"train\.decoder: nvjpeg decodes no views that are mixed"):
        training_plan(Phase(config, mixed.plan))
    pool, data = NvjpegPool("cpu"), next(mixed.photos.rglob("*.jpg")).read_bytes()
    (target,) = pool.arrays.row_targets(pool.arrays.empty(1, 3, 8, 8))
    with pytest.raises(UserError, match="nvjpeg decodes no views that are mixed"):
        pool.decode([(data, [CropTask(FULL, "bilinear", target, Partner(data, FULL, 0.5))])])
