"""Python imports this when it starts: its clock then jumps by the seconds that the file REGLA_CLOCK holds, once there is one.

What Python code reads through `time` jumps; Ray's C++ and the kernel's file times do not.
"""

import os
import time

_file = os.environ.get("REGLA_CLOCK", "")
if _file:
    _time, _time_ns = time.time, time.time_ns

    def _offset() -> float:
        try:
            with open(_file) as content:
                return float(content.read() or 0)
        except OSError:
            return 0.0

    time.time = lambda: _time() + _offset()
    time.time_ns = lambda: _time_ns() + int(_offset() * 1e9)
