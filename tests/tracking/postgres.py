"""A PostgreSQL of its own on loopback, and an MLflow server on it that a test may kill and start again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.processes import free_port

PASSWORD = "of-the-database"


def programs() -> Path:
    """Folder of PostgreSQL's programs; without them the test is skipped."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = shutil.which("initdb") or (str(debian[-1]) if debian else None)
    if found is None:
        pytest.skip("PostgreSQL is not installed here (apt-get install postgresql)")
    return Path(found).resolve().parent


def _unprivileged() -> dict[str, str]:
    """PostgreSQL refuses to run as root."""
    return {"user": "nobody", "group": "nogroup"} if os.getuid() == 0 else {}


@contextmanager
def postgres() -> Iterator[str]:
    """Address of an empty database, with its password."""
    binaries, who = programs(), _unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # short, since it holds a socket, and open to who runs the server
    try:
        password = folder / "password"
        password.write_text(PASSWORD)
        if who:
            for path in (folder, password):
                shutil.chown(path, **who)
        initdb = [binaries / "initdb", "-D", folder / "data", "-U", "mlflow", "--no-sync", "-A", "scram-sha-256"]
        subprocess.run([*initdb, f"--pwfile={password}"], check=True, capture_output=True, cwd=folder, **who)
        port = free_port()
        options = ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-p", str(port), "-k", folder]
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(
                [binaries / "postgres", "-D", folder / "data", *options], stdout=log, stderr=log, cwd=folder, **who
            )
        try:
            ready = [binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
            while subprocess.run(ready, check=False).returncode:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.05)
            yield f"postgresql://mlflow:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # disconnects clients and ends
            server.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class MlflowServer:
    """`mlflow server` on a database, artifacts served through it.

    Args:
        database: address of the store.
        folder: where artifacts and its log go.
    """

    def __init__(self, database: str, folder: Path) -> None:
        self.database, self.folder, self.port = database, folder, free_port()
        folder.mkdir()
        self.start()

    def start(self) -> None:
        """Start it; it answers some seconds later."""
        program = Path(sys.executable).parent / "mlflow"
        places = ["--backend-store-uri", self.database, "--artifacts-destination", self.folder / "artifacts"]
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1", "--serve-artifacts"]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [program, "server", *where, *places],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )

    def wait(self) -> None:
        """Until it answers."""
        while True:
            assert self.process.poll() is None, (self.folder / "log").read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1):
                    return
            except OSError:
                time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL it and its workers at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
