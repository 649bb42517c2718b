"""Submit a job to a Ray cluster from this checkout, after a look at what would be uploaded.

python jobs/submit.py jobs/distill.py recipes/own_images.yaml work=/mnt/regla/work

The cluster is that of RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265 (`ray dashboard cluster.yaml` forwards it). What
.gitignore and .rayignore name stays at home. The job's log is printed as it comes, and its exit code is given: 130 where it
was stopped. Its environment is that of Ray on the head node, and nothing of this terminal's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.errors import UserError, one_line
from pipeline.runtime.ray_session import REPOSITORY

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

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


def entrypoint(arguments: list[str]) -> str:
    """The command line that the cluster runs for a job and its arguments.

    Raises:
        UserError: where the first argument is no job of this checkout.
    """
    jobs = sorted(f"jobs/{path.name}" for path in (REPOSITORY / "jobs").glob("[a-z]*.py") if path.stem != "submit")
    if not arguments or arguments[0] not in jobs:
        raise UserError(f"name the job first: {', '.join(jobs)}, as in `jobs/submit.py {jobs[0]} ...`")
    return shlex.join(["python", *arguments])


def submit(command: str) -> int:
    """Run a command on the cluster, print its log, and give its exit code: 130 where the job was stopped.

    Raises:
        UserError: where the cluster does not answer.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    address = os.environ.get("RAY_API_SERVER_ADDRESS", ADDRESS)
    with _answering(f"RAY_API_SERVER_ADDRESS: no cluster can be used at {address}"):
        client = JobSubmissionClient(address)
        job = client.submit_job(entrypoint=command, runtime_env={"working_dir": str(REPOSITORY)})
    print(f"submitted as {job}: it goes on without this terminal, until `ray job stop {job}`", flush=True)
    with _answering(f"{address} does not answer any longer; `ray job logs --follow {job}` shows how the job goes on"):
        asyncio.run(_print_log(client, job))
        ended = client.get_job_info(job)
    # Where the job's own process never ended, its log does not tell why.
    why = f" ({ended.message})" if ended.driver_exit_code is None else ""
    print(f"{job}: {ended.status}{why}", flush=True)
    codes = {JobStatus.SUCCEEDED: 0, JobStatus.STOPPED: 130}
    return codes.get(ended.status, ended.driver_exit_code or 1)


@contextmanager
def _answering(problem: str) -> Iterator[None]:
    """While the cluster is asked: what it does not answer is one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise UserError(f"{problem} ({one_line(error)})") from error


async def _print_log(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


def main(arguments: list[str]) -> None:
    """Check, say what is uploaded, submit, and end as the job ends."""
    try:
        command = entrypoint(arguments)
        print(f"uploading {check_upload(REPOSITORY) / 2**20:.1f} MiB of {REPOSITORY}", flush=True)
        code = submit(command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
