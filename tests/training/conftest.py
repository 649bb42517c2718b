import pytest

from tests.training.engine import run_training, train_config
from tests.training.tiny_task import TinyTask


@pytest.fixture(scope="module")
def whole():
    """Snapshots of a run that nothing interrupted, with the checkpoints of `CHECKPOINTS`."""
    return run_training(TinyTask(), train_config(checkpoint_steps=4))
