"""Named sizes of a teacher, and the input sizes that suit it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from teachers.base import TeacherError


def choose_variant(teacher: str, variant: str, known: Mapping[str, str], default: str) -> tuple[str, str]:
    """The variant that was asked for (or the default) and what it stands for.

    Raises:
        TeacherError: for an unknown one, naming those there are.
    """
    chosen = variant or default
    if chosen in known:
        return chosen, known[chosen]
    near = difflib.get_close_matches(chosen, known, n=1)
    hint = f"did you mean {teacher}/{near[0]}? " if near else ""
    raise TeacherError(f"teacher {teacher}/{chosen}: there is no such variant; {hint}known are {', '.join(known)}")


def check_input_size(teacher: str, input_size: int, unit: int) -> None:
    """Refuse an input size that leaves a rest of a patch.

    Raises:
        TeacherError: naming the next size that fits.
    """
    if input_size % unit:
        raise TeacherError(
            f"teacher {teacher}: input_size {input_size} is no multiple of its {unit} px patches; "
            f"the next is {-(-input_size // unit) * unit}"
        )


def pooled_grid(teacher: str, grid: tuple[int, int], pool: int) -> tuple[int, int]:
    """The grid whose patches are averages of squares of `pool` x `pool`.

    Raises:
        TeacherError: where they do not divide it.
    """
    if any(side % pool for side in grid):
        raise TeacherError(f"teacher {teacher}: pool {pool} does not divide its grid of {grid[0]}x{grid[1]} patches")
    return grid[0] // pool, grid[1] // pool
