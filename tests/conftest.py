"""One embedded Ray session for all tests; its environment is set before Ray is imported anywhere."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

os.environ |= {
    "PYTHONPATH": str(REPOSITORY),  # Ray's workers import tests.fakes
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "120",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
}
for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def ray_session():
    """The session that jobs open for themselves, opened once."""
    from pipeline.ray_session import connect

    with connect():
        yield


@pytest.fixture
def shared_data():
    """Real photographs and weights beside the repository."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real photographs beside the repository")
    return folder
