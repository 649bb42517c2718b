from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.student.model import save_encoder
from pipeline.student.regla import ReGLA

TINY: dict[str, Any] = {
    "dims": (8, 16, 24, 32),
    "depths": (1, 1, 2, 1),
    "heads": (2, 4),
    "qk_dim": 8,
    "num_classes": 10,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> Callable[..., ReGLA]:
    """Factory of a ReGLA that is small enough for every option to be tried; keyword arguments override ``TINY``."""
    return lambda **options: ReGLA(**{**TINY, **options})


def export_student(encoder, config, folder):
    """Write the backbone of a distillation's configuration, as its job does."""
    student = config.student
    save_encoder(encoder, student.name, student.args, student.input_size, folder)
