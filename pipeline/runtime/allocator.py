"""What the C library does with memory that tensors have left."""

from __future__ import annotations

import ctypes

# /usr/include/malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
"""For processes that have threads before they can call :func:`keep_freed_memory`, as Ray's do.

Each thread gets an arena of its own, none of which holds more than 64 MiB in one piece: what is larger is mapped anew whatever
was asked for, and arenas that are there already are handed to new threads.
"""


def keep_freed_memory() -> None:
    """Let this process use freed memory again, in place of giving it back and asking for it anew; for glibc, else nothing.

    By default every tensor of more than some MiB is mapped into the process when it is made and taken out when it is freed, and
    each of its pages is faulted in again: a forward pass on a CPU may spend more time in the kernel than in convolutions
    (figures: docs/results.md, Extraction). The process stays as large as it was at its largest. Threads have their part in this
    where it is called before there are any, or in an environment with `ENVIRONMENT`.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20), (_M_ARENA_MAX, 1)):
        mallopt(parameter, value)
