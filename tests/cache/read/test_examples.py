import pytest

from pipeline.cache.read.examples import read_examples
from pipeline.imaging.decode import decode_image


@pytest.mark.parametrize("count", [1, 5, 12])
def test_examples_are_spread_over_the_data_with_their_classes_and_images(filled, tmp_path, count):
    found = read_examples(filled.train, count)
    assert len(found) == count
    assert len({example.name for example in found}) == count
    for example in found:
        assert example.label == example.name.partition("/")[0]
        assert example.image == (tmp_path / "photos/train" / example.name).read_bytes()
        assert decode_image(example.image).height == 48


def test_examples_are_of_as_many_classes_as_there_are(filled):
    classes = filled.train.classes
    assert {example.label for example in read_examples(filled.train, len(classes))} == {*classes}


def test_a_small_set_is_shown_whole(filled):
    assert sorted(example.name for example in read_examples(filled.val, 100)) == sorted(
        name for part in range(len(filled.val.selections)) for name in filled.val.samples(part)["sample_id"].to_pylist()
    )
