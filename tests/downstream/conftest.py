import pytest

from pipeline.config.load import load_config
from pipeline.downstream.backbone import find_start
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.downstream.training import FinetuneJob
from pipeline.student.model import save_encoder
from tests.downstream.drawings import SIDE, locations, write_set

SMALL = [f"student.input_size={SIDE}", "train.batch_size=4", "train.epochs=2", "train.ema_decay=0.9"]
SMALL += ["student.args={dims: [16, 16, 32, 32], depths: [1, 1, 1, 1], heads: 1}", "train.precision=float32"]
SMALL += ["finetune.data_workers=0", "finetune.pictures=2", "segment.channels=32", f"segment.size={SIDE}"]
SMALL += ["detect.channels=32", f"detect.sizes=[{SIDE}]", f"detect.max_size={SIDE}", "detect.anchor=8"]
SMALL += ["data.samples.train=8", "data.samples.val=4", f"data.samples.size={SIDE}"]


@pytest.fixture(scope="session")
def drawings(tmp_path_factory):
    """A set of eight drawings, and the same again in `held-out`; not to be changed."""
    folder = tmp_path_factory.mktemp("drawings")
    write_set(folder)
    write_set(folder / "held-out")
    return folder


@pytest.fixture
def make_job(tmp_path, drawings):
    """A fine-tuning job of a tiny ReGLA on the eight drawings; more overrides may be given."""

    def make(task: str, *overrides: str, folder: str = "run") -> FinetuneJob:
        config = load_config(
            FinetuneJobConfig,
            None,
            [*SMALL, f"finetune.task={task}", *locations(drawings, task), *overrides],
        )
        job = FinetuneJob(config, tmp_path / folder / "start", tmp_path / folder)
        start = find_start(config)
        save_encoder(start.encoder, start.name, start.args, config.student.input_size, job.start)
        return job

    return make
