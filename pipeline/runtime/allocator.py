"""How the C library handles memory that tensors have freed."""

import ctypes
from collections.abc import Mapping

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8

ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
"""For processes whose threads start before they can call :func:`keep_freed_memory`, such as Ray workers.

By default each thread gets an arena of its own. An arena cannot hold more than 64 MiB in one piece, so larger tensors are
mapped anew whatever `mallopt` says, and new threads reuse existing arenas.
"""


def keep_freed_memory() -> None:
    """Make this process reuse freed memory instead of returning it to the system. No effect without glibc.

    By default a tensor of more than a few MiB is mapped when it is created and unmapped when it is freed, and each of its
    pages is faulted in again: a forward pass on a CPU may spend more time in the kernel than in convolutions (figures:
    docs/results.md, Extraction). The price is that the process stays at its peak size. Covers all threads only if it is
    called before they start, or if the process runs with `ENVIRONMENT`.
    """
    _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 << 20, _M_ARENA_MAX: 1})


def one_arena() -> None:
    """Limit this process, and its forks, as `ENVIRONMENT` does, which glibc reads only when a program starts."""
    _set({_M_ARENA_MAX: 1})


def _set(parameters: Mapping[int, int]) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    for parameter, value in parameters.items():
        mallopt(parameter, value)
