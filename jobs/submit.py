"""Submit a job to a Ray cluster from this checkout, after a look at what would be uploaded.

python jobs/submit.py jobs/distill.py recipes/photos.yaml work=/mnt/regla/work

The cluster is that of RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265 (`ray dashboard cluster.yaml` forwards it). What
.gitignore and .rayignore name stays at home. The exit code is that of the job, and its log is printed as it comes.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.errors import UserError
from pipeline.ray_session import REPOSITORY

MAX_UPLOAD = 50 << 20
"""Bytes of the files of a checkout, at most: it has a few, and what is large belongs on the shared file system."""

ADDRESS = "http://127.0.0.1:8265"


def uploaded(folder: Path) -> dict[str, int]:
    """Bytes of every file that Ray would upload of a working directory, by its path in there; found by Ray's own rules."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    files: dict[str, int] = {}

    def take(path: Path) -> None:
        if path.is_file():
            files[str(path.relative_to(folder))] = path.stat().st_size

    excludes = [_get_excludes(folder, get_runtime_env_default_excludes())]
    _dir_travel(folder, excludes, take, include_gitignore=True, logger=logging.getLogger(__name__))
    return files


def check_upload(folder: Path) -> int:
    """Bytes of what would be uploaded.

    Raises:
        UserError: where that is more than `MAX_UPLOAD`, naming the biggest files.
    """
    files = uploaded(folder)
    total = sum(files.values())
    if total > MAX_UPLOAD:
        biggest = sorted(files, key=files.__getitem__, reverse=True)[:5]
        named = ", ".join(f"{name} ({files[name] / 2**20:.1f} MiB)" for name in biggest)
        raise UserError(
            f"{len(files)} files of {total / 2**20:.0f} MiB would be uploaded, more than the {MAX_UPLOAD >> 20} MiB allowed; "
            f"the biggest: {named}; move them out of {folder}, or name them in .rayignore"
        )
    return total


def command(arguments: list[str]) -> list[str]:
    """The command line of `ray job submit` for a job and its arguments.

    Raises:
        UserError: where the first argument is no job of this checkout.
    """
    jobs = sorted(f"jobs/{path.name}" for path in (REPOSITORY / "jobs").glob("[a-z]*.py") if path.stem != "submit")
    if not arguments or arguments[0] not in jobs:
        raise UserError(f"name the job first: {', '.join(jobs)}, as in `jobs/submit.py {jobs[0]} ...`")
    address = os.environ.get("RAY_API_SERVER_ADDRESS", ADDRESS)
    ray = str(Path(sys.executable).with_name("ray"))
    return [ray, "job", "submit", "--address", address, "--working-dir", str(REPOSITORY), "--", "python", *arguments]


def main(arguments: list[str]) -> None:
    """Check, say what is uploaded, and become `ray job submit`."""
    try:
        line = command(arguments)
        print(f"uploading {check_upload(REPOSITORY) / 2**20:.1f} MiB of {REPOSITORY}", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    os.execv(line[0], line)


if __name__ == "__main__":
    main(sys.argv[1:])
