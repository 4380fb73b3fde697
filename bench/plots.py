"""The report's plots: times against the floor, attention over T, the roofline, peak memory and how it grows, where a
step's time goes."""

import io
import itertools
import math
from collections.abc import Callable
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image  # matplotlib brings it

from bench.case import COMPILED, EAGER, SUBJECT
from bench.measure import AGAIN, Row
from bench.steps.rows import Steps

_COLOURS = {SUBJECT: "#c0392b", EAGER: "#7f8c8d", COMPILED: "#2e86c1", "its matmuls alone": "#d5d8dc"}
_OTHERS = tuple(to_hex(colour) for colour in colormaps["tab20"].colors)


def draw(report, folder: Path) -> list[str]:
    """The names of the files that were written."""
    cases = {case: _timed(variants) for case, variants in report.by_case().items()}
    cases = {case: rows for case, rows in cases.items() if rows}
    colour = _colours(cases)
    figures = {
        "bars.png": _bars(cases, colour, report.machine),
        "sweep.png": _sweep(cases, colour, report.machine),
        "roofline.png": _roofline(cases, report.machine),
        "memory.png": _memory(cases, colour, report.machine),
        "growth.png": _growth(cases, colour, report.machine),
        "profile.png": _profile(report.profile) if report.profile else None,
    }
    for name, figure in figures.items():
        if figure is not None:
            _save(figure, folder / name)
    return [name for name, figure in figures.items() if figure is not None]


def steps(table: Steps, file: Path) -> None:
    """Draw a table of training steps: time and memory of each row that was measured. Those that run fastgpt's functions
    have fastgpt's colour."""
    rows = [row for row in table.rows if row.median is not None and row.peak_bytes is not None]
    models = [row.what.partition(",")[0] for row in rows]
    colours = [_COLOURS[SUBJECT if row.ours else EAGER] for row in rows]
    places = [number + 0.6 * len(set(models[: number + 1])) for number in range(len(rows))]
    figure = Figure(figsize=(11, 0.7 + 0.3 * len(rows)), layout="constrained")
    panels = (
        ([1e3 * (row.median or 0) for row in rows], "ms a step; shorter is better", "{:.1f}"),
        ([(row.peak_bytes or 0) / 2**30 for row in rows], "GiB of GPU memory; shorter is better", "{:.1f}"),
    )
    for axis, (values, label, digits) in zip(
        figure.subplots(1, 2, sharey=True, width_ratios=(2, 1)), panels, strict=True
    ):
        axis.barh(places, values, color=colours)
        for place, value in zip(places, values, strict=True):
            _label(axis, place, value, digits.format(value))
        axis.set_xlim(0, 1.12 * max(values))
        axis.set_xlabel(label, fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    first = figure.axes[0]
    first.set_yticks(places, [row.what for row in rows], fontsize=9)
    first.invert_yaxis()
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    """With a palette, for fewer bytes: the results are kept in the repository."""
    whole = io.BytesIO()
    figure.savefig(whole, dpi=100)
    Image.open(whole).convert("RGB").quantize(128).save(file, optimize=True)


def _timed(variants: dict[str, Row]) -> list[Row]:
    return [row for name, row in variants.items() if row.median and name != AGAIN]


def _colours(cases: dict[str, list[Row]]) -> dict[str, str]:
    names = dict.fromkeys(row.variant for rows in cases.values() for row in rows)
    others = [name for name in names if name not in _COLOURS]
    return _COLOURS | {name: _OTHERS[place % len(_OTHERS)] for place, name in enumerate(others)}


def _title(rows: list[Row]) -> str:
    return f"{rows[0].op}\n{'  '.join(f'{key} {value}' for key, value in rows[0].shape.items())}"


def _grid(
    cases: dict[str, list[Row]],
    machine: dict,
    heading: str,
    panel: Callable[[Axes, list[Row]], None],
) -> Figure | None:
    """A panel for each case, four in a row, each with its variants from top to bottom."""
    if not cases:
        return None
    columns = min(4, len(cases))
    lines = math.ceil(len(cases) / columns)
    tallest = max(len(rows) for rows in cases.values())
    figure = Figure(figsize=(4.4 * columns, (0.9 + 0.26 * tallest) * lines + 0.8), layout="constrained")
    figure.suptitle(f"{heading}\n{machine['device']}, {machine['dtype']}, PyTorch {machine['torch']}", fontsize=12)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, rows in zip(axes, cases.values(), strict=False):
        panel(axis, rows)
        axis.set_title(_title(rows), fontsize=9)
        axis.set_yticks(range(len(rows)), [row.variant for row in rows], fontsize=8)
        axis.invert_yaxis()
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(cases) :]:
        axis.set_visible(False)
    return figure


def _unit(largest: float, units: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    return next(((factor, name) for factor, name in units if largest >= factor), units[-1])


def _label(axis: Axes, place: int, value: float, text: str) -> None:
    box = dict(facecolor="white", edgecolor="none", pad=0.5, alpha=0.8)
    axis.annotate(text, (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7, bbox=box)


def _bars(cases, colour, machine) -> Figure | None:
    def panel(axis: Axes, rows: list[Row]) -> None:
        factor, name = _unit(max(row.median for row in rows), ((1, "s"), (1e-3, "ms"), (1e-6, "µs")))
        for place, row in enumerate(rows):
            spread = [[(row.median - row.low) / factor], [(row.high - row.median) / factor]]
            axis.barh(place, row.median / factor, color=colour[row.variant], xerr=spread, error_kw=dict(lw=0.8))
            _label(axis, place, row.high / factor, f"{row.median / factor:.3g}")
        axis.axvline(rows[0].floor / factor, color="black", ls="--", lw=1)
        axis.set_xlim(0, 1.18 * max(max(row.high for row in rows), rows[0].floor) / factor)
        axis.set_xlabel(f"{name}; dashed: the floor ({rows[0].bound})", fontsize=8)

    return _grid(cases, machine, "Median time, with quartiles; shorter is better", panel)


def _memory(cases, colour, machine) -> Figure | None:
    wanted = {}
    for case, rows in cases.items():
        kept = [row for row in rows if row.peak_bytes is not None and not row.variant.endswith("alone")]
        if len(kept) > 1 and max(row.peak_bytes for row in kept) > 0:
            wanted[case] = kept

    def panel(axis: Axes, rows: list[Row]) -> None:
        factor, name = _unit(max(row.peak_bytes for row in rows), ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")))
        for place, row in enumerate(rows):
            axis.barh(place, row.peak_bytes / factor, color=colour[row.variant])
            _label(axis, place, row.peak_bytes / factor, f"{row.peak_bytes / factor:.3g}")
        axis.set_xlim(0, 1.18 * max(row.peak_bytes for row in rows) / factor)
        axis.set_xlabel(name, fontsize=8)

    return _grid(wanted, machine, "Peak memory of one call beyond its inputs; shorter is better", panel)


def _sweep(cases, colour, machine) -> Figure | None:
    """Attention's rate over T, a panel for each phase and head width that has more than one T."""
    panels: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for rows in cases.values():
        if rows[0].op.startswith("attention "):
            lines = panels.setdefault((rows[0].op, rows[0].shape["D"]), {})
            for row in rows:
                lines.setdefault(row.variant, []).append(row)
    panels = {key: lines for key, lines in panels.items() if max(len(rows) for rows in lines.values()) > 1}
    if not panels:
        return None
    unit, factor = ("TFLOP/s", 1e12) if machine["kind"] == "cuda" else ("GFLOP/s", 1e9)
    figure = Figure(figsize=(5.2 * len(panels), 4.4), layout="constrained")
    figure.suptitle(f"Causal attention over T; higher is better\n{machine['device']}, {machine['dtype']}", fontsize=12)
    axes = figure.subplots(1, len(panels), squeeze=False).flat
    for axis, ((op, dim), lines) in zip(axes, panels.items(), strict=True):
        times = sorted({row.shape["T"] for rows in lines.values() for row in rows})
        for variant, rows in lines.items():
            rows = sorted(rows, key=lambda row: row.shape["T"])
            rates = [row.flops / row.median / factor for row in rows]
            style = dict(marker="o", ms=4, color=colour[variant], label=variant)
            style |= dict(lw=2.2, zorder=3) if variant == SUBJECT else dict(lw=1.2)
            axis.plot([row.shape["T"] for row in rows], rates, **style)
        axis.axhline(machine["roofs"]["flops_a_second"] / factor, color="black", ls="--", lw=1, label="matmul roof")
        axis.set_xscale("log", base=2)
        axis.set_xticks(times, [str(time) for time in times])
        axis.minorticks_off()
        axis.set_ylim(0, None)
        axis.set(title=f"{op}, D {dim}", xlabel="T (tokens a row)", ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def _roofline(cases, machine) -> Figure | None:
    """fastgpt's own rows: those with flops under the two roofs, those without as bandwidth."""
    mine = [row for rows in cases.values() for row in rows if row.variant == SUBJECT]
    flops, bandwidth = machine["roofs"]["flops_a_second"], machine["roofs"]["bytes_a_second"]
    computing, moving = [row for row in mine if row.flops > 0], [row for row in mine if row.flops == 0]
    if not mine:
        return None
    figure = Figure(figsize=(14, 6), layout="constrained")
    figure.suptitle(f"fastgpt under this machine's own roofs\n{machine['device']}, {machine['dtype']}", fontsize=12)
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    if computing:
        intensity = [row.flops / row.bytes for row in computing]
        lowest, highest = min(*intensity, flops / bandwidth) / 2, max(*intensity, flops / bandwidth) * 2
        edge = [lowest, flops / bandwidth, highest]
        left.plot(edge, [min(flops, x * bandwidth) / 1e9 for x in edge], color="black", lw=1.5)
        left.set(xscale="log", yscale="log", xlim=(lowest, highest))
        for ticks in (left.xaxis, left.yaxis):
            ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ticks.set_major_formatter("{x:g}")
            ticks.set_minor_formatter(NullFormatter())
    for place, row in enumerate(computing):
        style = dict(marker="osD^vP*X<>hp"[place % 12], color=f"C{place % 10}", ms=8, ls="", label=row.case)
        left.plot(row.flops / row.bytes, row.flops / row.median / 1e9, **style)
    left.set(xlabel="flops a byte, as counted", ylabel="GFLOP/s", title="work with flops")
    left.grid(alpha=0.3, which="both")
    left.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for place, row in enumerate(moving):
        right.barh(place, row.bytes / row.median / 1e9, color=_COLOURS[SUBJECT])
        _label(right, place, row.bytes / row.median / 1e9, f"{row.share:.0%}")
    right.axvline(bandwidth / 1e9, color="black", ls="--", lw=1)
    right.set_yticks(range(len(moving)), [row.case for row in moving], fontsize=8)
    right.invert_yaxis()
    right.set(xlabel="GB/s; dashed: a copy", title="work that only moves bytes")
    right.spines[["top", "right"]].set_visible(False)
    return figure


def _growth(cases, colour, machine) -> Figure | None:
    """Peak memory of training steps over T and over the batch, at whatever else is the same."""
    sweeps: dict[tuple, dict[str, dict[int, int]]] = {}
    for rows in cases.values():
        for row in rows:
            if row.op != "training step" or row.peak_bytes is None:
                continue
            for over in ("T", "B"):
                rest = tuple((name, value) for name, value in row.shape.items() if name != over)
                sweeps.setdefault((over, rest), {}).setdefault(row.variant, {})[row.shape[over]] = row.peak_bytes
    sweeps = {key: lines for key, lines in sweeps.items() if max(len(points) for points in lines.values()) > 2}
    if not sweeps:
        return None
    figure = Figure(figsize=(5.2 * len(sweeps), 4.4), layout="constrained")
    figure.suptitle(
        f"Peak memory of a training step beyond weights and moments\n{machine['device']}, {machine['dtype']}",
        fontsize=12,
    )
    for axis, ((over, rest), lines) in zip(
        figure.subplots(1, len(sweeps), squeeze=False).flat, sweeps.items(), strict=True
    ):
        for marker, (variant, points) in zip(itertools.cycle("osD^vP*X"), lines.items()):
            places = sorted(points)
            style = dict(marker=marker, lw=2.2, zorder=3) if variant == SUBJECT else dict(marker=marker, lw=1.2)
            values = [points[place] / 2**20 for place in places]
            axis.plot(places, values, ms=5, color=colour[variant], label=variant, **style)
        axis.set_xticks(sorted({place for points in lines.values() for place in points}))
        axis.set(xlabel=f"{over} (with {', '.join(f'{k} {v}' for k, v in rest)})", ylabel="MiB", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def _profile(profile: dict) -> Figure:
    """A training step's time by part, stacked, over the floors of the same parts."""
    parts = [part for part in profile["parts"] if part["seconds"] > 0]
    figure = Figure(figsize=(14, 3.6), layout="constrained")
    unit, factor = ("s", 1.0) if profile["seconds"] >= 1 else ("ms", 1e3)
    figure.suptitle(
        f"Where a training step's time goes: {profile['case']}\n{profile['machine']['device']}", fontsize=12
    )
    axis = figure.subplots()
    for place, key in enumerate(("seconds", "floor")):
        left = 0.0
        for number, part in enumerate(parts):
            width = part[key] * factor
            label = part["part"] if place == 0 else None
            axis.barh(place, width, left=left, color=f"C{number % 10}", alpha=1 - 0.4 * (number >= 10), label=label)
            if width > 0.04 * sum(p["seconds"] for p in parts) * factor:
                axis.annotate(f"{width:.3g}", (left + width / 2, place), ha="center", va="center", fontsize=7)
            left += width
    axis.set_yticks((0, 1), ("measured", "its floor"), fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel(f"{unit}, of one step", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
