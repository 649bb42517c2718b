import pytest
import torch

from pipeline.downstream.lettering import (
    GAP,
    LEAST_WIDTH,
    MOST_HEIGHT,
    MOST_NAMES,
    draw_boxes,
    legend_below,
    lines_below,
    side_by_side,
    text_size,
)

RED, NAVY = (200, 0, 0), (0, 0, 128)


def grey(height, width):
    return torch.full((3, height, width), 90, dtype=torch.uint8)


def is_colour(picture, colour):
    """Where a picture has a colour, bool [H, W]."""
    return (picture == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(0)


def test_lines_stand_below_the_picture_and_are_broken_where_they_are_too_wide():
    picture = grey(256, 256)
    short, long = (
        lines_below(picture, [text]) for text in ("cat", "true: German short-haired pointer of Bavaria (12 %)")
    )
    for found in (short, long):
        assert torch.equal(found[:, :256], picture)
        assert found.shape[2] == 256
        assert (found[:, 256:, -3:] == 255).all()  # no letter is cut off
    assert long.shape[1] - 256 > 1.5 * (short.shape[1] - 256)
    assert (short[:, 256:] < 100).any()


def test_letters_grow_with_the_picture():
    assert text_size(grey(3000, 4000)) > 4 * text_size(grey(300, 400))
    strips = [lines_below(grey(side, side), ["cat"]).shape[1] / side for side in (1000, 3000)]
    assert strips[0] == pytest.approx(strips[1], rel=0.1)


@pytest.mark.parametrize(
    "add", [lambda picture: lines_below(picture, ["a cat"]), lambda picture: legend_below(picture, {"cat": RED})]
)
def test_a_narrow_picture_gets_room_for_text_and_one_of_huge_height_stays_narrow(add):
    assert add(grey(300, 20)).shape[2] == LEAST_WIDTH
    assert (add(grey(300, 20))[:, :300, 20:] == 255).all()
    assert add(grey(MOST_HEIGHT + 1, 2)).shape[2] == 2


def test_a_legend_has_every_colour_and_breaks_into_rows():
    names = {f"class number {number}": (number * 9, 0, 255 - number * 9) for number in range(MOST_NAMES)}
    found = legend_below(grey(256, 300), names)
    assert all(is_colour(found[:, 256:], colour).sum() > 50 for colour in names.values())
    assert found.shape[1] > legend_below(grey(256, 300), {"one": RED}).shape[1] + 100
    more = legend_below(grey(256, 300), {**names, "one too many": (1, 2, 3)})
    assert not is_colour(more, (1, 2, 3)).any()
    assert (more[:, 256:] < 100).sum() > (found[:, 256:] < 100).sum()  # it says how many


def test_pictures_stand_below_their_titles():
    first, second = grey(256, 300), torch.zeros(3, 256, 300, dtype=torch.uint8)
    found = side_by_side({"annotated": first, "predicted": second})
    assert found.shape[2] == 600 + GAP
    assert torch.equal(found[:, -256:, :300], first)
    assert torch.equal(found[:, -256:, 300 + GAP :], second)
    for columns in (found[:, :-256, :300], found[:, :-256, 300 + GAP :]):
        assert (columns < 100).any()


@pytest.mark.parametrize("box", [(2, 40, 30, 80), (270, 40, 298, 80), (270, 0, 299, 20), (100, 240, 120, 255)], ids=str)
def test_a_name_is_whole_wherever_its_box_is(box):
    found = draw_boxes(grey(256, 300), torch.tensor([box], dtype=torch.float32), ["crescent"], [NAVY])
    assert found.shape == (3, 256, 300)
    letters = is_colour(found, (255, 255, 255)).nonzero()
    height, width = (letters.max(0).values - letters.min(0).values).tolist()
    assert height >= 6
    assert width > 50


def test_a_name_is_black_or_white_on_the_colour_of_its_box():
    for colour, ink in ((NAVY, (255, 255, 255)), ((224, 224, 64), (0, 0, 0))):
        found = draw_boxes(grey(256, 300), torch.tensor([[50.0, 60, 200, 200]]), ["disc"], [colour])
        assert is_colour(found, ink).sum() > 10


def test_the_first_box_is_on_top():
    boxes = torch.tensor([[50.0, 60, 200, 200], [50.0, 60, 200, 200]])
    found = draw_boxes(grey(256, 300), boxes, ["a", "b"], [RED, NAVY])
    assert is_colour(found, RED).sum() > 4 * is_colour(found, NAVY).sum()
