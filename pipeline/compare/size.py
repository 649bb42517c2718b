"""Parameters and MACs of students that no run has logged: both follow from the name and the input size."""

from __future__ import annotations

import logging
from functools import cache

from pipeline.compare.describe import input_size, timm_student
from pipeline.errors import UserError, one_line
from pipeline.student.cost import inference_cost
from pipeline.student.model import Encoder, create_backbone
from pipeline.tracking.reading import LoggedRun


def counted_size(run: LoggedRun) -> dict[str, float]:
    """Parameters and MACs by key; nothing where the student has arguments of its own, or is not known here."""
    name, side = timm_student(run), input_size(run)
    return _size(name, int(side)) if name and side else {}


@cache
def _size(name: str, side: int) -> dict[str, float]:
    try:
        counted = inference_cost(Encoder(create_backbone(name)), side)
    except (UserError, RuntimeError, AssertionError) as error:
        logging.getLogger(__name__).warning("the size of %s is not known: %s", name, one_line(error))
        return {}
    return {"parameters": counted.parameters, "macs": counted.macs}
