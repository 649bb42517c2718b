"""What every teacher does alike: normalise, check its shapes, pool, and say who it is."""

import json
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from teachers.base import Teacher, TeacherError, TeacherOutput, TeacherSpec, digest_state, pool_grid

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
SPEC = TeacherSpec(
    name="echo",
    architecture="tests/echo",
    weights="none",
    input_size=(4, 6),
    mean=MEAN,
    std=STD,
    interpolation="bicubic",
    summary_dim=5,
    patch_dim=7,
    grid=(2, 3),
    model_args={"depth": 2},
    licence="mit",
)


class Echo(Teacher):
    """Keeps what it was shown, and answers with ones of whatever shapes it was told."""

    def __init__(self, spec=SPEC, summary=(5,), patches=(2, 3, 7), batch=None):
        self.spec, self.summary, self.patches, self.batch = spec, summary, patches, batch

    def load(self, device="cpu", dtype=torch.float32):
        self.device, self.dtype = torch.device(device), dtype

    def forward(self, images):
        self.seen = images
        batch = self.batch or len(images)
        summary = None if self.summary is None else images.new_ones(batch, *self.summary)
        return TeacherOutput(summary, images.new_ones(batch, *self.patches))


@pytest.fixture
def pixels():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, (3, 3, 4, 6), generator=generator, dtype=torch.uint8)
    drawn[0, :, 0, 0], drawn[0, :, 0, 1] = 0, 255
    return drawn


def test_pixels_are_normalised_channel_by_channel(pixels):
    teacher = Echo()
    teacher.encode(pixels)
    for channel in range(3):
        expected = (pixels[:, channel].double() / 255 - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(teacher.seen[:, channel].double(), expected, atol=1e-6, rtol=0)


def test_the_pixels_themselves_are_left_alone(pixels):
    before = pixels.clone()
    Echo().encode(pixels)
    assert torch.equal(pixels, before)


def test_the_network_computes_in_its_dtype_and_features_are_float32(pixels):
    teacher = Echo()
    teacher.load(dtype=torch.bfloat16)
    output = teacher.encode(pixels)
    assert teacher.seen.dtype == torch.bfloat16
    assert output.summary.dtype == output.patches.dtype == torch.float32


def test_normalisation_is_done_in_float32_and_rounded_once(pixels):
    exact, rounded = Echo(), Echo()
    rounded.load(dtype=torch.bfloat16)
    exact.encode(pixels)
    rounded.encode(pixels)
    assert torch.equal(rounded.seen, exact.seen.bfloat16())


def test_no_gradient_is_recorded(pixels):
    assert Echo().encode(pixels).patches.is_inference()


def test_features_of_the_promised_shapes_pass(pixels):
    output = Echo().encode(pixels)
    assert output.summary.shape == (3, 5)
    assert output.patches.shape == (3, 2, 3, 7)


def test_a_teacher_without_a_summary_gives_none(pixels):
    output = Echo(replace(SPEC, summary_dim=None), summary=None).encode(pixels)
    assert output.summary is None
    assert output.patches.shape == (3, 2, 3, 7)


@pytest.mark.parametrize(
    "echo",
    [
        Echo(summary=(6,)),
        Echo(summary=(1, 5)),
        Echo(summary=None),
        Echo(replace(SPEC, summary_dim=None)),
        Echo(patches=(3, 2, 7)),
        Echo(patches=(6, 7)),
        Echo(patches=(2, 3, 8)),
        Echo(batch=2),
    ],
    ids=[
        "wider summary",
        "summary of another rank",
        "no summary",
        "unpromised summary",
        "transposed grid",
        "flat grid",
        "wider patches",
        "an image lost",
    ],
)
def test_features_of_other_shapes_are_refused(pixels, echo):
    with pytest.raises(TeacherError, match=r"teacher echo: returned summary and patches of shape .*, its spec says"):
        echo.encode(pixels)


@pytest.mark.parametrize(("resize_mode", "channels"), [("squash", 4), ("pad", 3)])
def test_pixels_need_a_mask_where_they_are_padded_and_there_alone(resize_mode, channels):
    echo = Echo(replace(SPEC, resize_mode=resize_mode))
    with pytest.raises(TeacherError, match=f"teacher echo: encodes {7 - channels} channels, not {channels}"):
        echo.encode(torch.zeros(1, channels, 4, 6, dtype=torch.uint8))


@pytest.mark.parametrize("pool", [1, 2, 4])
def test_pooling_is_the_exact_average_of_each_square(pool):
    # Whole numbers below 2^24: every sum is exact.
    patches = torch.randint(0, 1000, (2, 4, 8, 3), generator=torch.Generator().manual_seed(0)).float()
    pooled = pool_grid(patches, pool)
    assert pooled.shape == (2, 4 // pool, 8 // pool, 3)
    for row in range(4 // pool):
        for column in range(8 // pool):
            square = patches[:, row * pool : (row + 1) * pool, column * pool : (column + 1) * pool]
            assert torch.equal(pooled[:, row, column], square.sum(dim=(1, 2)) / pool**2)


def test_pooling_takes_maps_that_are_not_contiguous():
    patches = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0)).permute(0, 2, 3, 1)
    assert torch.equal(pool_grid(patches, 2), pool_grid(patches.contiguous(), 2))


def hold(**tensors):
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


VALUES = torch.arange(6, dtype=torch.float32)


def test_equal_content_gives_an_equal_digest_whatever_the_order_and_the_strides():
    digest = digest_state(hold(a=VALUES.view(2, 3), b=torch.tensor(1)))
    assert len(digest) == 64
    assert digest == digest_state(hold(b=torch.tensor(1), a=VALUES.view(2, 3).clone()))
    assert digest == digest_state(hold(a=VALUES.view(2, 3).T.contiguous().T, b=torch.tensor(1)))


@pytest.mark.parametrize(
    "other",
    [
        {"a": VALUES + torch.tensor([0, 0, 0, 0, 0, 1e-6])},
        {"b": VALUES},
        {"a": VALUES.view(2, 3)},
        {"a": VALUES.view(torch.int32)},
        {"a": VALUES, "b": torch.zeros(0)},
        {"a": VALUES[:5]},
    ],
    ids=["value", "name", "shape", "dtype", "another tensor", "one value less"],
)
def test_other_content_gives_another_digest(other):
    assert digest_state(hold(**other)) != digest_state(hold(a=VALUES))


def test_the_digest_takes_scalars_flags_and_half_precision():
    module = hold(a=torch.tensor(3), b=torch.tensor([True, False]), c=VALUES.bfloat16())
    assert digest_state(module) != digest_state(hold(a=torch.tensor(4), b=module.b, c=module.c))


def test_the_digest_covers_parameters_and_buffers():
    norm = nn.BatchNorm1d(2)
    before = digest_state(norm)
    norm.running_var += 1
    between = digest_state(norm)
    with torch.no_grad():
        norm.weight += 1
    assert len({before, between, digest_state(norm)}) == 3


def test_identity_ignores_the_readable_name_and_the_licence():
    assert replace(SPEC, name="alias", licence="other").identity() == SPEC.identity()
    assert {field.name for field in fields(TeacherSpec)} - SPEC.identity().keys() == {
        "name",
        "licence",
        "computation",
        "resize_mode",
    }


def test_the_librarys_own_way_of_computing_and_squashing_are_no_part_of_the_identity():
    # Caches of versions without the fields stay valid.
    assert SPEC.identity().keys().isdisjoint({"computation", "resize_mode"})


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "tests/other"},
        {"weights": "random:0"},
        {"input_size": (6, 4)},
        {"mean": (0.1, 0.2, 0.4)},
        {"std": (0.5, 0.25, 1.0)},
        {"interpolation": "bilinear"},
        {"summary_dim": None},
        {"patch_dim": 8},
        {"grid": (3, 2)},
        {"pool": 2},
        {"model_args": {"depth": 3}},
        {"computation": "positions: bicubic"},
        {"resize_mode": "pad"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_identity_tells_apart_what_decides_the_numbers(change):
    assert replace(SPEC, **change).identity() != SPEC.identity()


def test_identity_is_ready_for_json():
    assert json.loads(json.dumps(SPEC.identity()))["model_args"] == {"depth": 2}
