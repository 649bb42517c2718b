import sys

import pytest

from pipeline.cache.fill.extract import TeacherDevice
from pipeline.runtime.interpreter import SWITCH_INTERVAL


@pytest.mark.parametrize(("device", "turn"), [("cpu", 0.005), ("cuda", SWITCH_INTERVAL)])
def test_a_thread_that_feeds_a_gpu_soon_gets_its_turn(device, turn):
    before = sys.getswitchinterval()
    try:
        TeacherDevice(device)
        assert sys.getswitchinterval() == pytest.approx(turn)
    finally:
        sys.setswitchinterval(before)
