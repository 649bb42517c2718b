from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.cache.read.reader import CacheReader
from pipeline.errors import UserError
from pipeline.imaging.crop import crop_and_resize
from pipeline.imaging.decode import decode_image
from pipeline.imaging.geometry import FULL


def _reader(filled, **changes):
    settings = {"image_size": 32, "batch_size": 16, "seed": 0, "window": 64, **changes}
    return CacheReader(filled.train, filled.plan.teachers, **settings)


def test_an_epoch_has_every_image_once_and_epochs_differ(filled):
    reader = _reader(filled, batch_size=10)
    first, second = (list(reader.batches(epoch)) for epoch in (0, 1))
    keys = [key for batch in first for key in batch.keys]
    assert len(keys) == len(set(keys)) == 150
    assert sorted(keys) == sorted(key for batch in second for key in batch.keys)
    assert keys != [key for batch in second for key in batch.keys]


def test_starting_mid_epoch_yields_the_rest_of_that_epoch(filled):
    reader = _reader(filled)
    every = list(reader.batches(3))
    for start in (0, 1, 5, len(every) - 1, len(every)):
        rest = list(reader.batches(3, start))
        assert [batch.keys for batch in rest] == [batch.keys for batch in every[start:]]
    assert torch.equal(next(iter(reader.batches(3, 5))).images, every[5].images)


def test_a_batch_still_in_use_is_not_overwritten(filled):
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


def test_row_groups_of_earlier_batches_are_not_read(filled, monkeypatch):
    reader, read = _reader(filled, window=1024, batch_size=1), []
    original = reader.images.read
    monkeypatch.setattr(reader.images, "read", lambda unit, columns: read.append(unit) or original(unit, columns))
    list(reader.batches(0, reader.steps(0)))
    assert not read
    assert len(list(reader.batches(0, reader.steps(0) - 1))) == 1
    assert len(read) == 1


def test_features_match_their_images(filled):
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


def test_only_the_teachers_in_use_are_read(filled):
    reader = CacheReader(filled.train, filled.plan.teachers[:1], image_size=32, batch_size=16)
    assert next(reader.batches(0)).features.keys() == {filled.plan.teachers[0].id}


def test_mismatched_keys_are_refused_with_shard_and_key(filled):
    teacher = filled.plan.teachers[0]
    (part,) = filled.train.parts
    folder = part.teacher(teacher.id)
    record = folder.records()[1]
    table = folder.read(record)
    swapped = table.take([1, 0, *range(2, table.num_rows)]).replace_schema_metadata(table.schema.metadata)
    folder.commit(1, swapped)
    part.refresh()
    expected, found = (table["key"][i].as_py().hex() for i in (0, 1))
    with pytest.raises(UserError) as error:
        list(_reader(filled).batches(0))
    assert f"shard 1 of {teacher.id} does not hold the keys of its images" in str(error.value)
    assert expected in str(error.value)
    assert found in str(error.value)


@pytest.mark.parametrize("which", ["images", "teacher"])
def test_a_flipped_bit_on_disk_never_yields_another_row(filled, which):
    (part,) = filled.train.parts
    folder = part.images if which == "images" else part.teacher(filled.plan.teachers[0].id)
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


def test_a_missing_shard_is_named(filled):
    (part,) = filled.train.parts
    Path(part.teacher(filled.plan.teachers[1].id).store.uri, "shard-00000.json").unlink()
    part.refresh()
    with pytest.raises(UserError, match=r"colours4-\w+ lacks shard 0 in .*: run jobs/precompute\.py"):
        list(_reader(filled).batches(0))


def test_too_few_images_for_a_batch_are_refused(filled):
    with pytest.raises(UserError, match=r"150 readable images .*lower train\.batch_size"):
        _reader(filled, batch_size=151)


def test_images_decoded_by_the_device_are_those_of_a_cpu_but_for_rounding(filled):
    # torchvision's CPU decoder stands for the GPU's
    for here, there in zip(_reader(filled).batches(0), _reader(filled, nvjpeg="cpu").batches(0), strict=True):
        assert here.keys == there.keys
        assert (here.images.short() - there.images.short()).abs().max() <= 2
        for name, kinds in here.features.items():
            assert all(torch.equal(rows, there.features[name][kind]) for kind, rows in kinds.items())
