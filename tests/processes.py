"""Processes of this machine, from /proc: Linux only."""

from __future__ import annotations

import os
import signal
import socket
from collections import defaultdict
from contextlib import suppress
from pathlib import Path


def descendants(pid: int) -> dict[int, str]:
    """Title of every process below `pid`."""
    children: dict[int, list[int]] = defaultdict(list)
    for folder in Path("/proc").glob("[0-9]*"):
        parent = read_proc(int(folder.name), "stat").rpartition(")")[2].split()[1:2]
        children[int(parent[0]) if parent else 0].append(int(folder.name))
    found: dict[int, str] = {}
    left = [pid]
    while left:
        below = children[left.pop()]
        left += below
        found |= {child: read_proc(child, "cmdline") for child in below}
    return found


def read_proc(pid: int, name: str) -> str:
    """Text of a file in /proc/<pid>; "" if the process has ended."""
    try:
        return Path(f"/proc/{pid}", name).read_text(errors="replace").replace("\0", " ").strip()
    except OSError:
        return ""


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal; a process that has ended is ignored."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return each.getsockname()[1]
