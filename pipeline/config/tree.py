"""The base of every configuration section, and the types that fields share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
)


class Section(BaseModel):
    """A group of fields; unknown keys are refused and values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Share = Annotated[float, Field(ge=0, le=1)]
"""In [0, 1]."""


def _some_points(value: Any) -> Any:
    if value == {}:
        raise ValueError("a schedule has one point at least, such as {0: 1}")
    return value


Schedule = Annotated[NonNegativeFloat | dict[Share, NonNegativeFloat], AfterValidator(_some_points)]
"""A weight, or weights by the share of the training that is behind them, linear in between: {0: 1, 0.5: 0.2}."""
