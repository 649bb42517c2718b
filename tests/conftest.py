"""One embedded Ray session for all tests, its environment set before Ray is imported; a small cache of real JPEGs."""

import logging
import os
from pathlib import Path
from types import SimpleNamespace

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

from pipeline.runtime.ray_session import import_ray  # noqa: E402

import_ray()  # before a test imports Ray, for sessions on loopback alone

TEACHERS = "teachers=[{model: 'tests.fakes:colours', args: {dim: 8}}, {model: 'tests.fakes:colours', args: {dim: 4}}]"


@pytest.fixture(scope="session")
def ray_session():
    """The session that jobs open for themselves, opened once."""
    from pipeline.runtime.ray_session import connect

    with connect():
        yield


@pytest.fixture(autouse=True)
def our_loggers_as_imported():
    """Workers and jobs configure their process's loggers; whoever ran here before must not decide what caplog sees."""
    for logger in map(logging.getLogger, ("pipeline", "teachers")):
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def no_tracking_uri():
    """MLflow puts the store that it was told of into the environment, where the next job would look for its own."""
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture
def shared_data():
    """Real photographs and weights beside the repository."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real photographs beside the repository")
    return folder


@pytest.fixture
def bucket(monkeypatch):
    """An S3 endpoint on loopback that this process uses, with the bucket `models`."""
    from pyarrow import fs

    from pipeline.storage import remote
    from tests.storage.s3_endpoint import S3Endpoint

    server = S3Endpoint()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    remote._s3.cache_clear()
    address = server.url.removeprefix("http://")
    fs.S3FileSystem(endpoint_override=address, scheme="http", allow_bucket_creation=True).create_dir("models")
    yield server
    server.close()
    remote._s3.cache_clear()


@pytest.fixture
def photo_config(tmp_path):
    """A configuration for 150 training and 40 held-out photos in shards of 100; more overrides may be given."""
    from pipeline.config.load import load_config
    from pipeline.distill.config import DistillJobConfig
    from tests.fakes import write_photos

    write_photos(tmp_path / "photos/train", 150)
    write_photos(tmp_path / "photos/val", 40, seed=1)

    def configure(*overrides: str, root=DistillJobConfig):
        paths = [f"data.train={tmp_path}/photos/train", f"data.val={tmp_path}/photos/val", f"work={tmp_path}/work"]
        small = [
            "cache.shard_size=100",
            "cache.codec=float16",
            "student.input_size=32",
            "train.batch_size=16",
            "train.shuffle_window=64",
        ]
        return load_config(root, None, [*paths, *small, TEACHERS, *overrides])

    return configure


@pytest.fixture
def filled(tmp_path, photo_config):
    """A complete cache: `plan`, `config`, and the `train` and `val` datasets."""
    from pipeline.cache.fill.plan import plan_cache
    from pipeline.storage.store import Store
    from tests.fakes import fill_in_process

    config = photo_config()
    plan, computed = fill_in_process(plan_cache(config, Store.at(tmp_path / "cache")))
    assert computed == 6
    return SimpleNamespace(plan=plan, config=config, train=plan.split("train").dataset, val=plan.split("val").dataset)


@pytest.fixture(scope="session")
def live():
    """Randomise weights, BatchNorm and layer scale, so that no term is 0 or 1 by accident, and go to eval mode.

    The scales keep activations of order one through the depth, as in a trained network.
    """
    from torch import nn

    def liven(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=fan_in**-0.5)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.uniform_(module.weight, 0.3, 0.9)
                nn.init.normal_(module.bias, std=0.3)
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                nn.init.uniform_(parameter, 0.2, 0.8)
        return model.eval()

    return liven
