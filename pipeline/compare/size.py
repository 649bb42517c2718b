"""Parameters and MACs of students for which no run has logged them, from name and input size."""

from __future__ import annotations

import logging
from functools import cache

from pipeline.compare.describe import input_size, timm_student
from pipeline.errors import UserError, one_line
from pipeline.student.cost import inference_cost
from pipeline.student.model import Encoder, create_backbone
from pipeline.tracking.reading import LoggedRun


def compute_size(run: LoggedRun) -> dict[str, float]:
    """Parameters and MACs by key; empty if the student has constructor arguments or is unknown here."""
    name, side = timm_student(run), input_size(run)
    return _size(name, int(side)) if name and side else {}


@cache
def _size(name: str, side: int) -> dict[str, float]:
    try:
        counted = inference_cost(Encoder(create_backbone(name)), side)
    except (UserError, RuntimeError, AssertionError) as error:
        logging.getLogger(__name__).warning("the size of %s is unknown: %s", name, one_line(error))
        return {}
    return {"parameters": counted.parameters, "macs": counted.macs}
