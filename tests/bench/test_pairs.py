"""Pairs of steps on a CPU: their ratio, how sure it is, and what is said of a promise."""

import itertools

import pytest
import torch

from bench.__main__ import main
from bench.steps import pairs


class Clock:
    """Of two calls whose seconds are told."""

    def __init__(self, **seconds):
        self.seconds, self.order = {name: itertools.cycle(each) for name, each in seconds.items()}, []

    def once(self, call):
        self.order.append(call())
        return next(self.seconds[call()])


def ratio(ours, other, width=0.03, most=60):
    clock = Clock(ours=ours, other=other)
    return pairs.in_turns(lambda: "ours", lambda: "other", clock, width, most), clock.order


def test_turns_end_when_the_interval_is_narrow():
    found, order = ratio([1.0, 1.01], [2.0, 2.02])
    assert found.turns == 8 and found.low <= found.mean <= found.high < 1.015 * found.mean
    assert found.mean == pytest.approx(2.0, rel=0.01) and found.seconds == pytest.approx((1.0, 2.0), rel=0.02)
    assert order[:4] == ["other", "ours", "ours", "other"], "neither is always the first"
    found, _ = ratio([1.0, 2.0, 1.5], [2.0], most=20)
    assert found.turns == 20 and found.high - found.low > 0.03 * found.mean


@pytest.mark.parametrize(
    ("low", "mean", "high", "said"),
    [
        (0.99, 1.0, 1.01, "kept"),
        (0.97, 0.98, 0.99, "kept"),
        (0.965, 0.975, 0.985, "missed"),
        (0.5, 1.2, 2.5, "not decided"),
        (0.5, 0.7, 0.9, "missed"),
        (1.1, 1.5, 2.0, "kept"),
        (0.5, 0.9, 1.5, "not decided"),
    ],
)
def test_what_is_said_of_a_promise(low, mean, high, said):
    assert pairs.Ratio(mean, low, high, 9, (1.0, 1.0)).verdict(0.98, 0.03) == said


@pytest.fixture
def run(tmp_path, capsys):
    def run(*arguments):
        command = ["pairs", "--preset", "byte-0.1M", "--time", "128", "--most", "2", "--dtype", "float32"]
        code = main([*command, "--out", str(tmp_path), *arguments])
        return code, capsys.readouterr().out, tmp_path

    return run


@pytest.mark.slow
def test_a_pair_is_held_to_the_reference_and_written_down(run):
    pytest.importorskip("transformers")
    code, said, folder = run("--only", "Hugging Face, accelerate /", "--only", "prompt")
    assert said.count("| none | Hugging Face, accelerate | Hugging Face, eager |") == 2, "at once, and in the table"
    assert "a prompt of 128 tokens" in said and code in (0, 1)
    assert "Hugging Face, eager" in (folder / "pairs.md").read_text() and (folder / pairs.FILE).exists()


def test_a_wrong_one_has_no_ratio(run, monkeypatch):
    monkeypatch.setattr(pairs.Decoder, "logits", lambda self, x: 1.5 * torch.ones(1, 257))
    code, said, _ = run("--only", "fastgpt.GPT: a prompt")
    assert code == 1 and "WRONG" in said
