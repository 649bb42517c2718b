"""How the threads of an OpenMP loop wait for each other."""

import os
import sys
from collections.abc import Mapping

_WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def short_waits() -> Mapping[str, str]:
    """Environment variables for processes that have not loaded torch yet; none if the user has set how threads wait.

    A thread of GNU's libgomp, which torch's packages for Linux hold, turns 300,000 rounds before it lets the scheduler have
    its core. If another process has the core of the thread that it waits for, they are turned in vain at every loop of every
    layer, and a training takes many times as long (figures: docs/results.md, Shared cores).
    """
    return {} if any(name in os.environ for name in _WAITS) else {"GOMP_SPINCOUNT": "1000"}


def wait_shortly() -> None:
    """Set them for this process, and those that it starts; not if torch is imported already, whose threads wait as they did."""
    if "torch" not in sys.modules:
        os.environ.update(short_waits())
