"""Submit a job to a Ray cluster and print its log.

python jobs/submit.py jobs/distill.py recipes/own_images.yaml work=/mnt/regla/work
regla submit distill own_images.yaml work=/mnt/regla/work           from an installed package

The first command uploads the checkout. The second uploads the current folder; the nodes need the package installed. Neither
uploads what .gitignore and .rayignore name. RAY_API_SERVER_ADDRESS names the cluster; default: http://127.0.0.1:8265, which
`ray dashboard cluster.yaml` forwards. The job has the environment of Ray on the head node, not that of this terminal. The
exit code is that of the job; 130 if the job was stopped.
"""

import argparse
import asyncio
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs._cli import complete
from pipeline.errors import UserError, one_line
from pipeline.runtime.ray_session import IS_INSTALLED, REPOSITORY

MAX_UPLOAD = 50 << 20
"""Largest upload in bytes; large files belong on the shared file system."""


def uploaded_files(folder: Path) -> dict[str, int]:
    """Bytes of every file that Ray would upload from a working directory, by relative path."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    files: dict[str, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            files[str(path.relative_to(folder))] = path.stat().st_size

    excludes = [_get_excludes(folder, get_runtime_env_default_excludes())]
    _dir_travel(folder, excludes, add, include_gitignore=True, logger=logging.getLogger(__name__))
    return files


def check_upload(folder: Path) -> int:
    """Bytes of the upload; a UserError names the largest files if it exceeds `MAX_UPLOAD`."""
    files = uploaded_files(folder)
    total = sum(files.values())
    if total > MAX_UPLOAD:
        largest = sorted(files, key=files.__getitem__, reverse=True)[:5]
        names = ", ".join(f"{name} ({files[name] / 2**20:.1f} MiB)" for name in largest)
        raise UserError(
            f"{len(files)} files of {total / 2**20:.0f} MiB would be uploaded, more than the {MAX_UPLOAD >> 20} MiB allowed; "
            f"the largest: {names}; move them out of {folder}, or name them in .rayignore"
        )
    return total


def job_names() -> list[str]:
    """Names of the jobs that can be submitted."""
    return sorted(path.stem for path in (REPOSITORY / "jobs").glob("[a-z]*.py") if path.stem != "submit")


def entrypoint(arguments: Sequence[str]) -> str:
    """Command line that the cluster runs, from the job (`jobs/distill.py` or `distill`; others: UserError) and its arguments."""
    first = arguments[0] if arguments else ""
    name = first.removeprefix("jobs/").removesuffix(".py")
    if name not in job_names() or first not in (name, f"jobs/{name}.py"):
        scripts = ", ".join(f"jobs/{name}.py" for name in job_names())
        raise UserError(f"name the job first: {scripts}, as in `jobs/submit.py jobs/distill.py ...`")
    program = ["regla", name] if IS_INSTALLED else ["python", f"jobs/{name}.py"]
    return shlex.join([*program, *arguments[1:]])


def submit(command: str, folder: Path) -> int:
    """Run a command on the cluster in an upload of `folder`, print its log, and return its exit code; 130: stopped."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    address = os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    with _connection_errors(f"RAY_API_SERVER_ADDRESS: no cluster can be used at {address}"):
        client = JobSubmissionClient(address)
        job = client.submit_job(entrypoint=command, runtime_env={"working_dir": str(folder)})
    print(f"submitted as {job}; it runs without this terminal, `ray job stop {job}` stops it", flush=True)

    async def print_log() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    with _connection_errors(
        f"{address} no longer answers; `ray job logs --follow {job}` shows the progress of the job"
    ):
        asyncio.run(print_log())
        details = client.get_job_info(job)
    # If the driver has no exit code, its log does not say why the job ended.
    reason = f" ({details.message})" if details.driver_exit_code is None else ""
    print(f"{job}: {details.status}{reason}", flush=True)
    codes = {JobStatus.SUCCEEDED: 0, JobStatus.STOPPED: 130}
    return codes.get(details.status, details.driver_exit_code or 1)


@contextmanager
def _connection_errors(problem: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise UserError(f"{problem} ({one_line(error)})") from error


def main(arguments: Sequence[str]) -> None:
    """Check the upload, submit the job, and exit with its code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=job_names(), help="as `distill` or `jobs/distill.py`; its arguments follow")
    complete(parser)
    if list(arguments) in (["-h"], ["--help"]):
        parser.parse_args(arguments)
    folder = Path.cwd() if IS_INSTALLED else REPOSITORY
    try:
        command = entrypoint(arguments)
        print(f"uploading {check_upload(folder) / 2**20:.1f} MiB of {folder}", flush=True)
        code = submit(command, folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
