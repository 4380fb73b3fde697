"""The report as one HTML page that needs nothing else: no network, no script, its plots inside."""

import base64
import math
from html import escape
from pathlib import Path

from bench.measure import Row
from bench.units import duration, size

CAPTIONS = {
    "bars.png": "Every case: median time with quartiles, the floor as a dashed line.",
    "sweep.png": "Causal attention over the length of a row.",
    "roofline.png": "fastgpt's own rows under what this machine reached in the same run.",
    "memory.png": "The most memory that one call held beyond its inputs.",
    "growth.png": "How a training step's memory grows with the batch and with the length of a row.",
    "profile.png": "One training step by its parts, over the floors of the same parts.",
}

_STYLE = """
:root { --ink: #1c2833; --dim: #5d6d7e; --line: #d5d8dc; --paper: #ffffff; --ours: #c0392b; --win: #1e8449; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e8e8; --dim: #99a3a4; --line: #3b444b; --paper: #17202a; --ours: #e57368; --win: #58d68d; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.2rem 4rem; max-width: 72rem; color: var(--ink); background: var(--paper);
       font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.9rem; margin: 0; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; }
p { max-width: 48rem; } .dim, figcaption { color: var(--dim); }
.facts { display: flex; flex-wrap: wrap; gap: .6rem 2.4rem; margin: 1.4rem 0; padding: 0; list-style: none; }
.facts b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--dim); font-weight: 600; } th:first-child, td:first-child, .left { text-align: left; }
.left { white-space: normal; min-width: 14rem; }
.win { color: var(--win); } .loss { color: var(--ours); }
.bar { display: inline-block; height: .7em; background: currentColor; border-radius: 2px; vertical-align: middle; }
figure { margin: 1.4rem 0; } img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
summary { cursor: pointer; padding: .3rem 0; font-weight: 600; }
"""


def page(report, folder: Path, drawn: list[str]) -> str:
    """report: a bench.report.Report. drawn: the plots that lie in `folder`."""
    machine = report.machine
    title = f"fastgpt on {machine['device']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p class=dim>{escape(report.conditions())}</p>",
        _facts(report),
        "<h2>fastgpt and the fastest of the others</h2>",
        _summary(report),
        *_losses(report),
        "<h2>Plots</h2>" if drawn else "",
        *(_figure(folder / name) for name in drawn),
        "<h2>All rows</h2>",
        *_all_rows(report),
        "<h2>Machine</h2>",
        _table(("", ""), [(escape(str(k)), escape(str(v))) for k, v in machine.items() if v is not None]),
    ]
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{escape(title)}</title>"
    return f"<!doctype html>\n<html lang=en><head>{head}<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(
        [*filter(None, parts), "</body></html>\n"]
    )


def _facts(report) -> str:
    """A few numbers that tell the whole."""
    ratios = [best.median / ours.median for _, ours, best in report.against_the_best() if ours.median and best]
    facts = {"cases": str(len(report.by_case())), "rows": str(len(report.rows))}
    if ratios:
        lost = len(report.losses())
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        facts["the fastest other's time over fastgpt's, geometric mean"] = f"{mean:.2f}"
        facts["cases where another is faster beyond noise"] = f"{lost} of {len(ratios)}"
    items = (f"<li><b>{escape(value)}</b>{escape(name)}</li>" for name, value in facts.items())
    return f"<ul class=facts>{''.join(items)}</ul>"


def _summary(report) -> str:
    rows = []
    for case, ours, best in report.against_the_best():
        if not ours.median:
            rows.append((escape(case), escape(ours.status), "", "", "", ""))
            continue
        cells = [escape(case), duration(ours.median), f"{ours.share:.0%}"]
        if best:
            ratio = best.median / ours.median
            kind = "win" if ratio > 1 + report.slack else "loss" if ratio < 1 - report.slack else "dim"
            bar = f"<span class='bar {kind}' style='width:{min(ratio, 4) * 2.5:.2f}rem'></span>"
            cells += [escape(best.variant), duration(best.median), f"{ratio:.2f} {bar}"]
        rows.append((*cells, *[""] * (6 - len(cells))))
    return _table(("case", "fastgpt", "of its floor", "fastest other", "its time", "over fastgpt's"), rows, left=(5,))


def _losses(report) -> list[str]:
    lost = report.losses()
    if not lost:
        return ["<p>No other was faster than fastgpt by more than this run's noise.</p>"]
    rows = [
        (escape(case), escape(best.variant), f"{best.median / ours.median:.2f}", escape(why))
        for case, ours, best, why in lost
    ]
    head = ("case", "the fastest", "its time over fastgpt's", "what is done about it")
    return ["<h2>Where another is faster</h2>", _table(head, rows, left=(3,))]


def _figure(file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    caption = CAPTIONS.get(file.name, file.stem)
    image = f"<img alt='{escape(caption, quote=True)}' src='data:image/png;base64,{data}'>"
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _all_rows(report) -> list[str]:
    """A fold for each operation."""
    ops: dict[str, list[tuple[str, dict[str, Row]]]] = {}
    for case, variants in report.by_case().items():
        ops.setdefault(next(iter(variants.values())).op, []).append((case, variants))
    head = ("case", "setting", "variant", "median", "quartiles", "of its floor", "peak memory", "first call")
    folds = []
    for op, cases in ops.items():
        rows = [_row(case, row) for case, variants in cases for row in variants.values()]
        folds.append(f"<details><summary>{escape(op)}</summary>{_table(head, rows, left=(1, 2))}</details>")
    return folds


def _row(case: str, row: Row) -> tuple[str, ...]:
    names = escape(case), escape(row.setting), f"<b>{escape(row.variant)}</b>" if row.ours else escape(row.variant)
    if row.median is None:
        return *names, escape(row.status), f"<span class=left>{escape(row.note)}</span>", "", "", ""
    quartiles = f"{duration(row.low)} to {duration(row.high)}"
    memory, first = size(row.peak_bytes), duration(row.first_call)
    return *names, duration(row.median), quartiles, f"{row.share:.0%}", memory, first


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]], left: tuple[int, ...] = ()) -> str:
    """Of cells that are HTML already; `left`: columns of words."""
    kinds = [" class=left" if place in left else "" for place in range(len(head))]
    first = "".join(f"<th{kind}>{text}</th>" for kind, text in zip(kinds, head, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{cell}</td>' for kind, cell in zip(kinds, row, strict=True))}</tr>" for row in rows
    )
    return f"<div class=scroll><table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div>"
