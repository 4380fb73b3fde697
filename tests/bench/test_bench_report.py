"""The report says what was measured, and docs/benchmarks.md what is committed."""

import dataclasses
import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bench import plots, profile, report
from bench.__main__ import main
from bench.case import COMPILED, EAGER, SUBJECT
from bench.measure import AGAIN, Folder, Row
from bench.units import duration

ROOT = Path(__file__).parents[2]


def row(variant, median, case="attention fwd T 64", status="ok", note="wall clock", **facts):
    times = {} if median is None else dict(median=median, low=0.9 * median, high=1.2 * median, rounds=7)
    shape = dict(T=int(case.split()[-1]), D=64)
    found = dict(peak_bytes=2**20, first_call=1.0, error=1e-7, flops=1e9, bytes=1e6, floor=1e-3, bound="flops")
    times |= {} if median is None else dict(share=1e-3 / median)
    return Row(case, case.split(" T")[0], shape, "float32", variant, status, note, **{**found, **times, **facts})


MACHINE = {
    "device": "A CPU (2 cores), 2 threads",
    "kind": "cpu",
    "dtype": "float32",
    "torch": "2.13.0",
    "triton": "3.7.1",
    "python": "3.11.7",
    "commit": "abcdef123",
    "load_average": 1.5,
    "cpu_threads": 2,
    "changed": False,
    "sdpa": {"D 64": "flash_attention"},
    "roofs": {"bytes_a_second": 2e10, "flops_a_second": 1.5e11},
}
ROWS = [
    row(SUBJECT, 2e-3),
    row(EAGER, 1e-3),
    row("SDPA flash", 4e-3),
    row("SDPA cuDNN", None, status="skipped", note="not | here"),
    row("its matmuls alone", 5e-4),
    row(AGAIN, 2.1e-3),
    row(SUBJECT, 8e-3, "attention fwd T 128"),
    row(EAGER, 16e-3, "attention fwd T 128"),
    row("add", 1e-3, "add fwd T 128", flops=0.0),
    row(SUBJECT, 1e-3, "add fwd T 128", flops=0.0),
]


def test_the_summary_names_the_fastest_other_and_hides_no_loss():
    lines = report.Report(MACHINE, ROWS).summary().splitlines()
    assert lines[2] == "| attention fwd T 64 | 2 ms | 50% | PyTorch eager | 1 ms | 0.50x |"
    assert lines[3] == "| attention fwd T 128 | 8 ms | 12% | PyTorch eager | 16 ms | 2.00x |"


def test_the_conditions_name_machine_versions_roofs_and_noise():
    text = report.Report(MACHINE, ROWS).conditions()
    for fact in ("A CPU (2 cores), 2 threads", "PyTorch 2.13.0", "Triton 3.7.1", "abcdef123;"[:-1], "20 GB/s"):
        assert fact in text
    assert "0.15 TFLOP/s" in text and "differed by 5.0%" in text and "fallback" in text and "flash_attention" in text
    assert "load average was 1.5 when it began: its ratios" in text


def test_all_that_it_writes(tmp_path):
    whole = report.Report(MACHINE, ROWS)
    whole.write(tmp_path)
    again = report.Report.load(tmp_path / "results.json")
    assert again == whole
    text = (tmp_path / "report.md").read_text()
    assert "| attention fwd T 64 | SDPA cuDNN | skipped | not \\| here | | | | |" in text
    assert "| attention fwd T 64 | PyTorch eager | 0.50 | nothing: without a GPU fastgpt is PyTorch's own" in text
    for plot in ("bars.png", "sweep.png", "roofline.png", "memory.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG") and f"({plot})" in text


def test_each_row_says_whose_setting_it_is(tmp_path):
    whole = report.Report(MACHINE, [dataclasses.replace(ROWS[0], setting="all in float32"), *ROWS[1:]])
    whole.write(tmp_path)
    lines = (tmp_path / "report.md").read_text().replace("\\|", "").splitlines()
    assert any(line.startswith("| attention fwd T 64 | all in float32 | fastgpt | 2 ms |") for line in lines)
    table = [line.count("|") for line in lines if line.startswith(("| case | setting", "|---|---|---|", "| attention"))]
    assert set(table[-10:]) == {10}, "as many cells as the head has"
    assert "<td>all in float32</td>" in re.sub(r" class=\w+", "", (tmp_path / "report.html").read_text())


class Page(HTMLParser):
    """What a browser would ask for, and which tags are still open at the end."""

    def __init__(self, text):
        super().__init__()
        self.asked, self.open, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.asked += [value for name, value in attributes if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_needs_nothing_else(tmp_path):
    """One file: its plots inside, nothing from elsewhere, no script; and what it says is escaped."""
    odd = row("<script>alert(1)</script>", 3e-3, note="a & b")
    report.Report(MACHINE, [*ROWS, odd]).write(tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == [] and "script" not in re.findall(r"<(\w+)", text)
    assert len(page.asked) == len(list(tmp_path.glob("*.png"))) >= 4
    assert all(source.startswith("data:image/png;base64,") for source in page.asked)
    assert not re.search(r"url\(|@import|https?:", text)
    assert {"<script>alert(1)</script>", "not | here", "attention fwd T 64"} <= set(page.words)
    assert "1 of 3" in page.words, "cases that another was faster in"


def test_where_a_steps_time_goes_and_how_its_memory_grows(tmp_path):
    steps = []
    for T in (128, 256, 512):
        for variant, slope in ((SUBJECT, 1), ("Hugging Face", 3)):
            shape = dict(B=1, T=T, L=2, C=64)
            found = row(variant, 1e-3 * T, f"training step B 1 T {T}", peak_bytes=slope * T * 2**20)
            steps.append(dataclasses.replace(found, op="training step", shape=shape))
    parts = [
        dict(part=name, calls=1, seconds=s, share=s, floor=s / 2) for name, s in (("matmuls", 0.8), ("AdamW", 0.2))
    ]
    folder = Folder(tmp_path / "run")
    folder.start(MACHINE, resume=False)
    folder.add(steps)
    kept = {"machine": MACHINE, "case": "training step", "seconds": 1.0, "parts": parts}
    (tmp_path / "profile.json").write_text(json.dumps(kept))
    whole = report.Report.of(folder)
    assert whole.profile == kept
    whole.write(tmp_path / "report")
    assert {"growth.png", "profile.png"} <= {file.name for file in (tmp_path / "report").iterdir()}
    cases = {case: list(variants.values()) for case, variants in whole.by_case().items()}
    figure = plots._growth(cases, {SUBJECT: "red", "Hugging Face": "blue"}, MACHINE)
    (axis,) = figure.axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}
    assert lines == {SUBJECT: ([128, 256, 512], [128, 256, 512]), "Hugging Face": ([128, 256, 512], [384, 768, 1536])}
    (tmp_path / "profile.json").write_text(json.dumps({**kept, "machine": {**MACHINE, "commit": "another"}}))
    assert report.Report.of(folder).profile is None


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("_attention_fwd_kernel", "attention, forward"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention, forward"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention, backward"),
        ("_attention_dq_kernel", "attention, backward"),
        ("aten::native_layer_norm", "LayerNorms, forward"),
        ("aten::native_layer_norm_backward", "LayerNorms, backward"),
        ("_gelu_fwd_kernel", "GELU, forward"),
        ("aten::sigmoid_", "GELU, forward"),
        ("aten::sigmoid_backward", "GELU, backward"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_TNN", "matmuls"),
        ("aten::addmm", "matmuls"),
        ("aten::_fused_adamw_", "AdamW"),
        ("aten::copy_", "everything else"),
    ],
)
def test_the_part_of_a_step_that_a_kernel_is(kernel, part):
    assert profile.part_of(kernel) == part


def test_what_is_done_where_another_is_faster():
    assert "cuBLAS" in report.dispatch("gelu_mlp fwd", COMPILED, "cuda")
    assert "asks for SDPA" in report.dispatch("attention bwd", "SDPA cuDNN", "cuda")
    assert report.dispatch("block fwd+bwd", COMPILED, "cuda") == "nothing of its own yet"
    assert "this one all of them" in report.dispatch("linear_cross_entropy", "all logits", "cpu")
    assert "nothing" in report.dispatch("linear_cross_entropy", "PyTorch, chunked", "cpu")
    assert "tanh" in report.dispatch("training step", "nanoGPT", "cpu")
    assert "tanh" not in report.dispatch("training step", "Hugging Face", "cpu")


def test_a_grid_shows_its_panels_and_no_empty_ones():
    cases = {f"a T {t}": [row(SUBJECT, 1e-3, f"a T {t}"), row(EAGER, 2e-3, f"a T {t}")] for t in range(5)}
    figure = plots._grid(cases, MACHINE, "heading", lambda axis, rows: None)
    assert [axis.get_visible() for axis in figure.axes] == [True] * 5 + [False] * 3
    assert [label.get_text() for label in figure.axes[4].get_yticklabels()] == [SUBJECT, EAGER]


def test_nothing_that_was_timed_is_no_crash(tmp_path):
    report.Report(MACHINE, [row(SUBJECT, None, status="WRONG", note="off")]).write(tmp_path)
    assert "| WRONG | off |" in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.34, "12.3 s"), (0.1234, "123 ms"), (5.6e-5, "56 µs"), (2e-9, "0.002 µs")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_keeping_writes_by_device_day_and_commit(tmp_path, monkeypatch, capsys):
    results, docs = tmp_path / "bench" / "results", tmp_path / "docs" / "benchmarks.md"
    monkeypatch.setattr(report, "RESULTS", results)
    docs.parent.mkdir()
    docs.write_text(f"# x\n\n{report.BEGIN}\nold\n{report.END}\n\nrest\n")
    monkeypatch.setattr(report.renew_docs, "__defaults__", (docs, results))
    folder = Folder(tmp_path / "run")
    folder.start(MACHINE, resume=False)
    folder.add(ROWS)
    assert main(["report", str(folder.path), "--keep"]) == 0
    (kept,) = results.glob("*/*/results.json")
    assert kept.parent.parent.name == "a-cpu-2-cores-2-threads" and kept.parent.name.endswith("-abcdef123")
    text = docs.read_text()
    assert text.startswith("# x\n\n") and text.endswith("\n\nrest\n") and "old" not in text
    assert report.NO_GPU in text and "| attention fwd T 64 | 2 ms |" in text
    link = f"../bench/results/{kept.parent.parent.name}/{kept.parent.name}/report.md"
    assert f"({link})" in text and (docs.parent / link).exists()

    later = kept.parent.with_name("2999-01-01-fffffff")
    report.Report({**MACHINE, "kind": "cuda", "commit": "fffffff"}, ROWS).write(later)
    block = report.generated_block(results)
    assert "fffffff" in block and "abcdef123" not in block and report.NO_GPU not in block

    some = {**MACHINE, "kind": "cuda", "commit": "eeeeeee", "command": "pytest bench/ -k loss", "measured": "3000"}
    report.Report(some, ROWS).write(kept.parent.with_name("3000-01-01-eeeeeee"))
    block = report.generated_block(results)
    assert "commit fffffff" in block and "commit eeeeeee" not in block
    assert (
        "Some cases again, later: [3000-01-01-eeeeeee](../bench/results/" in block
        and "3000-01-01-eeeeeee/report.md)" in block
    )

    folder.start({**MACHINE, "kind": "dry"}, resume=True)
    assert main(["report", str(folder.path), "--keep"]) == 2
    assert "mean nothing" in capsys.readouterr().err


def test_no_rows_are_an_error(tmp_path, capsys):
    assert main(["report", str(tmp_path / "gone")]) == main(["history", str(tmp_path / "gone")]) == 2
    assert capsys.readouterr().err.count("No such file or directory") == 2
    folder = Folder(tmp_path)
    folder.start(MACHINE, resume=False)
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no rows" in capsys.readouterr().err


def test_a_table_of_training_steps_is_drawn(tmp_path):
    table = max((table for _, table in report.committed_steps()), key=lambda table: len(table.rows))
    plots.steps(table, tmp_path / "steps.png")
    from PIL import Image

    with Image.open(tmp_path / "steps.png") as image:
        counts = {colour: count for count, colour in image.convert("RGB").getcolors(2**16)}
    reds = sum(count for (r, g, b), count in counts.items() if r > 150 and max(g, b) < 90)
    greys = sum(count for (r, g, b), count in counts.items() if 110 < r < 150 and abs(r - g) < 20 and abs(g - b) < 20)
    assert reds > greys > 10_000  # the bars with fastgpt, and those without


def test_the_committed_results_are_whole():
    """Measured on a named machine at a commit, by all of what they were compared with."""
    found = report.committed()
    assert found
    for file, kept in found:
        assert {"device", "torch", "triton", "python", "commit", "roofs", "command"} <= set(kept.machine)
        assert kept.machine["kind"] in ("cpu", "cuda")
        assert not [row.label for row in kept.rows if row.status == "FAILED" or (row.status == "WRONG" and row.ours)]
        assert {row.variant for row in kept.rows if row.case.startswith("training step")} >= {SUBJECT, AGAIN}
        shapes = {tuple(row.shape.items()) for row in kept.rows if row.op == "attention fwd"}
        swept = ["sweep.png"] if len(shapes) > 1 else []  # --bench-tier may have left the others out
        for name in ("report.md", "bars.png", "roofline.png", "memory.png", *swept):
            assert (file.parent / name).exists(), name
        assert json.loads(file.read_text())["machine"] == kept.machine
    tracked = subprocess.run(["git", "ls-files", "bench/results"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0 and tracked.stdout:
        assert all(str(file.relative_to(ROOT)) in tracked.stdout for file, _ in found)
