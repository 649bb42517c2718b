import pytest
import torch

from pipeline.distill.grid import GridRule, patch_subsets


@pytest.mark.parametrize(
    ("student", "teacher", "grid", "words"),
    [
        ((16, 16), (16, 16), (16, 16), "16x16 for both"),
        ((4, 4), (16, 16), (4, 4), "teacher 16x16 averaged exactly to the student's 4x4"),
        ((16, 16), (8, 8), (8, 8), "student 16x16 averaged exactly to the teacher's 8x8"),
        ((6, 6), (7, 7), (7, 7), "student 6x6 resized (bilinear) to the teacher's 7x7"),
        ((6, 9), (2, 3), (2, 3), "student 6x9 averaged exactly to the teacher's 2x3"),
    ],
)
def test_the_rule_is_declared_and_both_sides_meet_on_its_grid(student, teacher, grid, words):
    rule = GridRule(student, teacher)
    assert rule.grid == grid
    assert str(rule) == words
    assert rule.align_student(torch.randn(2, 5, *student)).shape == (2, *grid, 5)
    assert rule.align_teacher(torch.randn(2, *teacher, 3)).shape == (2, *grid, 3)


def test_averaging_is_exact():
    patches = torch.randn(2, 8, 4, 3)
    pooled = GridRule((4, 2), (8, 4)).align_teacher(patches)
    torch.testing.assert_close(pooled[:, 1, 1], patches[:, 2:4, 2:4].mean(dim=(1, 2)))


def test_equal_grids_are_left_untouched():
    patches, tokens = torch.randn(2, 4, 4, 3), torch.randn(2, 5, 4, 4)
    rule = GridRule((4, 4), (4, 4))
    assert torch.equal(rule.align_teacher(patches), patches)
    assert torch.equal(rule.align_student(tokens), tokens.permute(0, 2, 3, 1))


def test_two_turns_are_the_colours_of_a_chessboard():
    colours = torch.zeros(16, dtype=torch.int64)
    for turn, places in enumerate(patch_subsets((4, 4), 8)):
        colours[places] = turn
    assert colours.view(4, 4).tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]] * 2


@pytest.mark.parametrize("grid", [(16, 16), (14, 14), (7, 7), (4, 6)])
@pytest.mark.parametrize("every", [2, 3, 4])
def test_a_turn_has_its_share_of_the_places_and_no_neighbours(grid, every):
    places = grid[0] * grid[1]
    found = patch_subsets(grid, -(-places // every))
    assert found.shape == (every, -(-places // every))
    assert set(found.flatten().tolist()) == set(range(places))
    if places % every == 0:
        for turn in found:
            rows, columns = turn // grid[1], turn % grid[1]
            steps = (rows[:, None] - rows).abs() + (columns[:, None] - columns).abs()
            assert steps[steps > 0].min() > 1


@pytest.mark.parametrize(
    ("most", "shape"), [(None, (1, 6)), (9, (1, 6)), (6, (1, 6)), (5, (2, 3)), (4, (2, 3)), (1, (6, 1))]
)
def test_there_are_as_few_turns_as_the_most_places_allow(most, shape):
    found = patch_subsets((2, 3), most)
    assert found.shape == shape
    assert sorted(found.flatten().tolist()) == list(range(6))
