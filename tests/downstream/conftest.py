import pytest

from pipeline.config import load_config
from pipeline.downstream.backbone import find_start
from pipeline.downstream.task import FinetuneJob

SMALL = ["data.samples.train=8", "data.samples.val=8", "data.samples.size=32", "student.input_size=32"]
SMALL += ["student.args={dims: [16, 16, 32, 32], depths: [1, 1, 1, 1], heads: 1}", "train.batch_size=4"]
SMALL += ["finetune.data_workers=0", "finetune.pictures=2", "segment.channels=32", "segment.size=32"]
SMALL += ["detect.channels=32", "detect.sizes=[32]", "detect.max_size=32", "detect.anchor=4", "train.ema_decay=0.9"]
SMALL += ["train.precision=float32", "train.epochs=2"]


@pytest.fixture
def make_job(tmp_path):
    """A fine-tuning job of a tiny ReGLA on eight generated scenes; more overrides may be given."""

    def make(task: str, *overrides: str, folder: str = "run") -> FinetuneJob:
        config = load_config(None, [*SMALL, f"finetune.task={task}", *overrides])
        job = FinetuneJob(config, tmp_path / folder / "start", tmp_path / folder)
        find_start(config).save(config.student.input_size, job.start)
        return job

    return make
