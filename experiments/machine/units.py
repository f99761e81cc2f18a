"""Seconds, bytes and operations as a reader likes them."""


def shown_time(seconds: float) -> str:
    """Formats seconds."""
    if seconds >= 0.1:
        return f"{seconds:.3g} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-4 else f"{1e6 * seconds:.3g} µs"


def shown_bytes(size: float) -> str:
    """Formats bytes, in powers of 1,000."""
    return _scaled(size, "B")


def shown_operations(count: float) -> str:
    """Formats floating-point operations."""
    return _scaled(count, "FLOP")


def _scaled(value, unit):
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value / 1e3:.3g} k{unit}"
