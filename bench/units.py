"""Seconds and bytes as a person reads them."""


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    unit, factor = next(((u, f) for u, f in (("s", 1), ("ms", 1e3)) if seconds * f >= 1), ("µs", 1e6))
    return f"{seconds * factor:.3g} {unit}" if seconds * factor < 1000 else f"{seconds * factor:.0f} {unit}"


def size(bytes_: int | None) -> str:
    return "" if bytes_ is None else f"{bytes_ / 2**20:.3g} MiB" if bytes_ < 2**30 else f"{bytes_ / 2**30:.3g} GiB"
