"""A SQLite store and a real MLflow server, and runs in them."""

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from pipeline.tracking.address import resolve_uri
from pipeline.tracking.run import start_run

CONFIG = {
    "name": "tiny",
    "train": {"epochs": 3, "lr": 1e-3},
    "teachers": [{"model": "hog", "args": {}}, {"model": "sam", "weight": 0.5}],
    "note": "x" * 7000,
    "sizes": [1, 2],
}


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="session")
def server_process(tmp_path_factory):
    """One server for all modules: it takes seconds to start."""
    folder, port = tmp_path_factory.mktemp("server"), str(free_port())
    command = [
        Path(sys.executable).parent / "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--workers",
        "1",
    ]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", folder / "artifacts"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, *stores], stdout=log, stderr=log, cwd=folder)
    try:
        yield SimpleNamespace(process=process, uri=f"http://127.0.0.1:{port}", log=folder / "log")
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def server(server_process):
    """URI of the server, which answers."""
    for _ in range(1800):
        assert server_process.process.poll() is None, server_process.log.read_text()
        try:
            with urllib.request.urlopen(f"{server_process.uri}/health", timeout=1):
                return server_process.uri
        except OSError:
            time.sleep(0.1)
    raise AssertionError(server_process.log.read_text())


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work") / "deeper"


@pytest.fixture(scope="module", params=["sqlite", "server"])
def uri(request, work):
    """Both kinds of store; each is made once, since making one takes seconds."""
    return resolve_uri(None, work) if request.param == "sqlite" else request.getfixturevalue("server")


@pytest.fixture
def start(uri, work):
    def start(**changes):
        arguments = {"experiment": "tests", "name": "tiny-distill", "config": CONFIG, "tags": {"job": "distill"}}
        return start_run(uri, work=work, **{**arguments, **changes})

    return start


@pytest.fixture
def client(uri):
    return MlflowClient(uri)
