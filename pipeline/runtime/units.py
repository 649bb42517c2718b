"""Numbers as people read them."""


def size(count: float) -> str:
    """Bytes, for people."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = next((power for power in range(4) if count < 1024 ** (power + 1)), 4)
    return f"{count / 1024**power:.{min(power, 1)}f} {units[power]}"


def time_span(seconds: float) -> str:
    """A span of time with two or three digits: ``3.2 s``, ``5 min``, ``2.5 h``, ``12 days``."""
    if 0 < seconds < 0.1:
        return "under 0.1 s"
    for limit, length, unit in ((60, 1, "s"), (3600, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds / 86400:.3g} days"


def counted(value: float) -> str:
    """A large count: ``980``, ``12.5 k``, ``2.69 M``, ``35.2 G``."""
    for limit, length, unit in ((1e3, 1, ""), (1e6, 1e3, " k"), (1e9, 1e6, " M")):
        if value < limit:
            return f"{value / length:.3g}{unit}"
    return f"{value / 1e9:.3g} G"
