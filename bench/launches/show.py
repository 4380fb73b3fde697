"""The account as text: a table of rows, of parts, of one row's launches, and the page that is committed."""

from collections.abc import Iterable, Iterator

from bench.launches import predict
from bench.launches.parts import PARTS
from bench.launches.rows import Line

Rates = tuple[float, float]


def summed(lines: Iterable[Line], rates: Rates) -> tuple[int, float, float, float]:
    """Launches, TFLOP, GB and the sum of floors in ms."""
    lines = list(lines)
    floors = 1e3 * sum(line.floor(rates) for line in lines)
    return (
        sum(line.launches for line in lines),
        sum(line.flops for line in lines) / 1e12,
        sum(line.bytes for line in lines) / 1e9,
        floors,
    )


def rows(accounts: dict[str, list[Line]], rates: Rates) -> Iterator[list[str]]:
    """Of each row its sums, and its time as predicted for an H100 beside what was measured there."""
    yield ["a training step", "launches", "TFLOP", "GB", "floor ms", "predicted ms", "measured ms"]
    known, measured = _shares(accounts), predict.measured()
    for name, lines in accounts.items():
        launches, tflop, gigabytes, floor = summed(lines, rates)
        numbers = [f"{launches}", f"{tflop:.2f}", f"{gigabytes:.1f}", f"{floor:.1f}"]
        seconds = None if known is None else predict.seconds(lines, known)
        there = measured.get(name, {})
        told = [
            f"{1e3 * time:.1f}{', one CUDA graph' if 'graph' in what else ''}"
            + (" with more launches" if name in predict.CHANGED else "")
            + ("" if seconds is None or name in predict.CHANGED else f" ({100 * (seconds / time - 1):+.0f}%)")
            for what, time in there.items()
        ]
        yield [name, *numbers, "" if seconds is None else f"{1e3 * seconds:.1f}", "; ".join(told)]


def parts(accounts: dict[str, list[Line]], rates: Rates) -> Iterator[list[str]]:
    """Of each part in each row the sum of floors in ms, and how many launches."""
    yield ["part", *accounts]
    for part in PARTS:
        found = [summed((line for line in lines if line.part == part), rates) for lines in accounts.values()]
        yield [part, *(f"{floor:.2f} ({launches})" if launches else "" for launches, _, _, floor in found)]


def profiled(accounts: dict[str, list[Line]]) -> Iterator[list[str]]:
    """The parts of the step that was profiled: what is accounted for, and what was measured."""
    yield ["part", "launches", "floor ms", "measured ms", "floor / measured"]
    lines = predict.without_clipping(accounts[predict.PROFILED])
    for part, ms in predict.PROFILE.items():
        launches, _, _, floor = summed((line for line in lines if line.part == part), predict.RATES)
        gone = 1e3 * predict.GONE.get(part, 0) / predict.RATES[1]
        said = f"{floor:.2f}" + (f" + {gone:.2f} gone" if gone else "")
        yield [part, str(launches), said, f"{ms:.2f}", f"{100 * (floor + gone) / ms:.0f}%"]
    launches, _, _, floor = summed((line for line in lines if line.part not in predict.PROFILE), predict.RATES)
    yield ["everything else", str(launches), f"{floor:.2f}", f"{predict.OTHERS:.2f} ({predict.OTHER_LAUNCHES})", ""]
    total = summed(lines, predict.RATES)
    measured = sum(predict.PROFILE.values()) + predict.OTHERS
    then = total[3] + 1e3 * sum(predict.GONE.values()) / predict.RATES[1]
    yield ["together", str(total[0]), f"{then:.2f}", f"{measured:.1f}", f"{100 * then / measured:.0f}%"]


def launches(lines: list[Line], rates: Rates) -> Iterator[list[str]]:
    """All of a row, the largest floor first."""
    yield ["launches", "a layer", "a step", "MB each", "GFLOP each", "floor ms", "part", "phase", "name", "tensors"]
    for line in sorted(lines, key=lambda line: -line.floor(rates)):
        each = [f"{line.bytes / line.launches / 1e6:.2f}", f"{line.flops / line.launches / 1e9:.2f}"]
        counts = [f"{line.launches}", f"{line.a_layer}", f"{line.a_step}"]
        yield [*counts, *each, f"{1e3 * line.floor(rates):.3f}", line.part, line.phase, line.name, line.tensors]


def aligned(table: Iterable[list[str]], left: int = 1, right: int = 0) -> str:
    """In columns; the first `left` and the last `right` begin at their left edge."""
    table = list(table)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    last = len(widths) - right

    def line(row: list[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(
            cell.ljust(width) if place < left or place >= last else cell.rjust(width)
            for place, (cell, width) in enumerate(cells)
        ).rstrip()

    return "\n".join(map(line, table))


def markdown(table: Iterable[list[str]]) -> str:
    header, *body = table
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def page(accounts: dict[str, list[Line]], missing: dict[str, str], conditions: str) -> str:
    """What is committed: for people; the lists themselves lie beside it."""
    flops, moved = predict.RATES
    left_out = [f"Not here: {name} ({reason})." for name, reason in missing.items()]
    return "\n\n".join(
        [
            "# What a training step launches",
            conditions,
            f"Floors at {flops / 1e12:.0f} TFLOP/s and {moved / 1e12:.1f} TB/s, an H100's own in the sitting in which "
            "the measured figures were taken. Launches are kernels. Predicted is what the account's launches would "
            "take there: each its floor over its part's share of the floor in the profile below, the shortest "
            f"{1e6 * predict.SHORTEST:.1f} µs. No row's own time is in it, nor any wait for the host. What "
            "`torch.compile` makes is not recorded, so the compiled rows have no account.",
            *left_out,
            markdown(rows(accounts, predict.RATES)),
            "## Beside a profile",
            predict.PROFILE_WORDS + ". Attention's backward is two kernels here, which both read q, k and v; the "
            "embedding's measured time is what the profile's other rows leave of its 58.3 ms. What was profiled and is "
            "not recorded: memsets before sums that several blocks share, and kernels that cuBLAS adds to a product. "
            "Gone are twelve passes over dqkv, whose columns attention's backward sums since then.",
            markdown(profiled(accounts)),
            "## Parts: ms of floor, and how many launches",
            markdown(parts(accounts, predict.RATES)),
            "",
        ]
    )


def _shares(accounts: dict[str, list[Line]]) -> dict[str, float] | None:
    profile = accounts.get(predict.PROFILED)
    return None if profile is None else predict.shares(predict.without_clipping(profile))
