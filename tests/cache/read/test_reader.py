from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.cache.read.reader import CacheReader
from pipeline.cache.read.scan import read_summaries, scan_images
from pipeline.errors import UserError
from pipeline.imaging.crop import crop_and_resize
from pipeline.imaging.decode import decode_image
from pipeline.imaging.geometry import FULL


def _reader(filled, **changes):
    settings = {"image_size": 32, "batch_size": 16, "seed": 0, "window": 64, **changes}
    return CacheReader(filled.train, filled.plan.teachers, **settings)


def test_every_image_comes_once_an_epoch_and_epochs_differ(filled):
    reader = _reader(filled, batch_size=10)
    first, second = (list(reader.batches(epoch)) for epoch in (0, 1))
    keys = [key for batch in first for key in batch.keys]
    assert len(keys) == len(set(keys)) == 150
    assert sorted(keys) == sorted(key for batch in second for key in batch.keys)
    assert keys != [key for batch in second for key in batch.keys]


def test_a_start_in_mid_epoch_gives_the_rest_of_the_same_epoch(filled):
    reader = _reader(filled)
    every = list(reader.batches(3))
    for start in (0, 1, 5, len(every) - 1, len(every)):
        rest = list(reader.batches(3, start))
        assert [batch.keys for batch in rest] == [batch.keys for batch in every[start:]]
    assert torch.equal(next(iter(reader.batches(3, 5))).images, every[5].images)


def test_another_seed_gives_another_order_and_the_same_seed_the_same(filled):
    orders = [[b.keys for b in _reader(filled, seed=seed).batches(0)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_the_quality_of_the_shuffle_grows_with_the_window(filled):
    narrow, wide = (_reader(filled, window=window).shuffle_quality() for window in (1, 1024))
    # A window of one row group: a batch of 16 is from one of 64, 36 or 50 rows, or lies across two.
    assert narrow.same_group > 0.75
    assert wide.same_group == pytest.approx(wide.same_group_full, abs=0.05)
    assert wide.same_group_full == narrow.same_group_full
    assert wide.same_group_full == pytest.approx((64 * 63 + 36 * 35 + 50 * 49) / (150 * 149))


def test_rank_correlation_is_that_of_the_keys_as_read(filled):
    reader = _reader(filled, batch_size=2, window=1)
    stored = [key for batch in scan_images(filled.train, 16, 50) for key in batch.keys]
    read = [stored.index(key) for batch in reader.batches(4) for key in batch.keys]
    # In a batch the keys are grouped, so that it is no more than near.
    expected = np.corrcoef(read, np.arange(150))[0, 1]
    assert reader.shuffle_quality(4).rank_correlation == pytest.approx(expected, abs=0.01)


def test_a_batch_that_is_kept_is_not_overwritten(filled):
    reader = _reader(filled)
    batches = reader.batches(0)
    kept = next(batches)
    teacher = filled.plan.teachers[0].id
    image, features = kept.images[0], kept.features[teacher]["patches"]
    copies = image.clone(), features.clone()
    del kept
    for _ in range(3):
        list(reader.batches(1))
    assert torch.equal(image, copies[0])
    assert torch.equal(features, copies[1])


def test_row_groups_of_batches_that_are_past_are_not_read(filled, monkeypatch):
    reader, read = _reader(filled, window=1024, batch_size=1), []
    original = reader.images.read
    monkeypatch.setattr(reader.images, "read", lambda unit, columns: read.append(unit) or original(unit, columns))
    list(reader.batches(0, reader.steps(0)))
    assert not read
    assert len(list(reader.batches(0, reader.steps(0) - 1))) == 1
    assert len(read) == 1


def test_features_belong_to_the_images_they_come_with(filled):
    for batch in _reader(filled).batches(0):
        for teacher in filled.plan.teachers:
            source = teacher.create()
            source.load()
            rows = [Path(filled.config.data.train, key).read_bytes() for key in batch.keys]
            pixels = np.stack([crop_and_resize(decode_image(row), FULL, (32, 32), "bilinear") for row in rows])
            expected = source.encode(torch.from_numpy(pixels))
            stored, codecs = batch.features[teacher.id], teacher.codecs()
            torch.testing.assert_close(
                codecs["patches"].decode(stored["patches"]), expected.patches, rtol=1e-2, atol=1e-2
            )
            torch.testing.assert_close(
                codecs["summary"].decode(stored["summary"]),
                expected.summary,
                rtol=1e-2,
                atol=1e-2,
            )


def test_the_student_sees_the_source_pixels_resized_once(filled):
    batch = next(_reader(filled).batches(0))
    for key, image, label in zip(batch.keys, batch.images, batch.labels, strict=True):
        expected = crop_and_resize(
            decode_image(Path(filled.config.data.train, key).read_bytes()), FULL, (32, 32), "bicubic"
        )
        assert np.array_equal(image.numpy(), expected)
        assert int(label) == int(key[5])


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_an_epoch_in_equal_steps_without_overlap(filled, world):
    readers = [_reader(filled, batch_size=4, rank=rank, world=world) for rank in range(world)]
    assert len({reader.steps(0) for reader in readers}) == 1
    keys = [key for reader in readers for batch in reader.batches(0) for key in batch.keys]
    assert len(keys) == len(set(keys)) == readers[0].steps(0) * 4 * world


def test_only_the_teachers_in_use_are_read(filled):
    reader = CacheReader(filled.train, filled.plan.teachers[:1], image_size=32, batch_size=16)
    assert next(reader.batches(0)).features.keys() == {filled.plan.teachers[0].id}


def test_keys_that_do_not_match_are_refused_naming_shard_and_key(filled):
    teacher = filled.plan.teachers[0]
    folder = filled.train.teacher(teacher.id)
    record = folder.records()[1]
    table = folder.read(record)
    swapped = table.take([1, 0, *range(2, table.num_rows)]).replace_schema_metadata(table.schema.metadata)
    folder.commit(1, swapped)
    expected, found = (table["sample_id"][i].as_py() for i in (0, 1))
    with pytest.raises(UserError) as error:
        list(_reader(filled).batches(0))
    assert f"shard 1 of {teacher.id} does not hold the keys of its images" in str(error.value)
    assert expected in str(error.value)
    assert found in str(error.value)


@pytest.mark.parametrize("part", ["images", "teacher"])
def test_a_bit_that_flips_on_disk_is_never_read_as_another_row(filled, part):
    folder = filled.train.images if part == "images" else filled.train.teacher(filled.plan.teachers[0].id)
    path = Path(folder.store.uri, folder.records()[0].file)
    data, rng, refused = path.read_bytes(), np.random.default_rng(0), []
    expected = _values(filled)
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for position in [*rng.integers(0, footer, 12), *rng.integers(footer, len(data), 12)]:
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try:
            assert _values(filled) == expected
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 12
    assert all(line.startswith(f"{path} is damaged (") and "--verify --repair" in line for line in refused)


def _values(filled):
    """All that a reader of the dataset gives."""
    return [
        (
            batch.keys,
            batch.images.tolist(),
            [rows.tolist() for kinds in batch.features.values() for rows in kinds.values()],
        )
        for batch in _reader(filled, image_size=4).batches(0)
    ]


def test_missing_shards_are_named_before_training(filled):
    folder = filled.train.teacher(filled.plan.teachers[1].id)
    Path(folder.store.uri, "shard-00000.json").unlink()
    with pytest.raises(UserError, match=r"has 1 of 2 shards .*: run jobs/precompute\.py"):
        _reader(filled)


def test_too_few_images_for_a_batch_are_refused(filled):
    with pytest.raises(UserError, match=r"150 readable images .*lower train\.batch_size"):
        _reader(filled, batch_size=151)


def test_beside_a_gpu_processes_render_the_same(filled, monkeypatch):
    here = list(scan_images(filled.val, 16, 20))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    there = list(scan_images(filled.val, 16, 20))
    assert [batch.keys for batch in there] == [batch.keys for batch in here]
    assert torch.equal(torch.cat([batch.images for batch in there]), torch.cat([batch.images for batch in here]))


def test_scan_gives_images_and_labels_in_stored_order(filled):
    batches = list(scan_images(filled.train, 16, 20))
    assert sum(len(batch.keys) for batch in batches) == 150
    assert batches[0].images.shape == (20, 3, 16, 16)
    assert [int(label) for label in batches[0].labels] == [int(key[5]) for key in batches[0].keys]


@pytest.mark.parametrize("limit", [None, 64])
def test_ranks_scan_every_row_group_between_them(filled, limit):
    whole = [key for batch in scan_images(filled.train, 16, 50, limit) for key in batch.keys]
    parts = [
        [key for batch in scan_images(filled.train, 16, 50, limit, rank, 2) for key in batch.keys] for rank in (0, 1)
    ]
    assert sorted(parts[0] + parts[1]) == sorted(whole)
    assert bool(parts[1]) == (limit is None)  # one row group leaves nothing for the second


def test_summaries_line_up_with_the_scanned_images(filled):
    teacher = filled.plan.teachers[0]
    for limit in (None, 64):
        summaries, labels = read_summaries(filled.train, teacher, limit)
        batches = list(scan_images(filled.train, 16, 50, limit))
        assert torch.equal(labels, torch.cat([batch.labels for batch in batches]))
        assert summaries.shape == (len(labels), 8)
    assert len(labels) == 64
