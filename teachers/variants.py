"""Named variants of a teacher, and its valid input sizes."""

from collections.abc import Mapping

from teachers.base import TeacherError
from teachers.errors import did_you_mean


def choose_variant(teacher: str, variant: str, known: Mapping[str, str], default: str) -> tuple[str, str]:
    """The chosen variant (or the default) and its value in `known`; TeacherError, listing those known, for another."""
    chosen = variant or default
    if chosen in known:
        return chosen, known[chosen]
    hint = did_you_mean(chosen, known, f"did you mean {teacher}/{{}}? ")
    raise TeacherError(f"teacher {teacher}/{chosen}: there is no such variant; {hint}known are {', '.join(known)}")


def check_input_size(teacher: str, input_size: int, unit: int) -> None:
    """Raise a TeacherError, naming the next valid size, if the patch size `unit` does not divide `input_size`."""
    if input_size % unit:
        raise TeacherError(
            f"teacher {teacher}: input_size {input_size} is not divisible by its patch size of {unit} px; "
            f"the next is {-(-input_size // unit) * unit}"
        )


def pooled_grid(teacher: str, grid: tuple[int, int], pool: int) -> tuple[int, int]:
    """The grid after averaging squares of `pool` x `pool` patches; raises a TeacherError if `pool` does not divide it."""
    if any(side % pool for side in grid):
        raise TeacherError(f"teacher {teacher}: pool {pool} does not divide its grid of {grid[0]}x{grid[1]} patches")
    return grid[0] // pool, grid[1] // pool
