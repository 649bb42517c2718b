import pytest

from pipeline.imaging.geometry import View


@pytest.mark.parametrize(
    "box", [(0.5, 0, 0.5, 1), (-0.1, 0, 1, 1), (0, 0, 1.01, 1), (0, 0.6, 1, 0.5), (float("nan"), 0, 1, 1)]
)
def test_a_box_that_is_empty_or_outside_is_refused(box: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="view box"):
        View(box)
