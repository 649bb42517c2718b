"""What a user writes for a network."""

import pytest

from pipeline.benchmark.models import create_model
from pipeline.errors import UserError


def test_a_name_alone_and_with_arguments():
    assert create_model("regla_t").num_classes == 1000
    model = create_model("regla_t {depths: [1, 1, 2, 1], num_classes: 7}", num_classes=5)
    assert not model.training
    assert model.num_classes == 7
    assert [len(stage.blocks) for stage in model.stages] == [1, 1, 2, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet_of_mine", "timm knows no model resnet_of_mine"),
        ("regla_t depths", "must be followed by a mapping"),
        ("regla_t {a: [", "must be followed by a mapping"),
    ],
)
def test_what_is_no_model_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        create_model(text)
