import pytest
import torch

from pipeline.distill.grid import GridRule


@pytest.mark.parametrize(
    ("student", "teacher", "grid", "words"),
    [
        ((16, 16), (16, 16), (16, 16), "16x16 on both sides"),
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
