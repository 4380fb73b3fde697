"""`python -m bench fp8-loss`: pairs of runs over seeds, kept as they are done, and what may be said of a mode."""

import json
import math

import pytest

from bench import fp8_loss
from bench.__main__ import main

SMALL = ["--dry-run", "--steps", "1", "--batch_size", "1", "--device", "cpu", "--modes", "all"]


def test_a_dry_run_goes_on_from_what_is_there(tmp_path, capsys):
    where = ["fp8-loss", *SMALL, "--out", str(tmp_path)]
    assert main([*where, "--seeds", "1"]) == 0
    first = json.loads((tmp_path / fp8_loss.FILE).read_text(encoding="utf-8"))["runs"]
    assert [(run["seed"], run["mode"]) for run in first] == [(1, "none"), (1, "all")]
    assert first[0]["loss"] != first[1]["loss"] and abs(first[0]["loss"] - first[1]["loss"]) < 0.01
    assert main([*where, "--seeds", "2", "--seconds", "0"]) == 1, "no time left"
    assert main([*where, "--seeds", "2"]) == 0
    again = json.loads((tmp_path / fp8_loss.FILE).read_text(encoding="utf-8"))["runs"]
    assert again[:2] == first and len(again) == 4
    table = (tmp_path / fp8_loss.TABLE).read_text(encoding="utf-8")
    assert table in capsys.readouterr().out and "simulated in float32" in table and "fewer than 8" in table
    assert main([*where, "--steps", "2"]) == 2
    assert "has train = " in capsys.readouterr().err


def test_the_mean_of_pairs_and_its_error():
    runs = [{"seed": seed, "mode": "none", "loss": 3.0 + seed} for seed in range(9)]
    runs += [{"seed": seed, "mode": "head", "loss": 3.0 + seed + (0.001 if seed % 2 else 0.002)} for seed in range(8)]
    apart = fp8_loss.differences(runs, "head")
    assert len(apart) == 8 and sum(apart) / 8 == pytest.approx(0.0015)
    assert fp8_loss.verdict(apart) == "loses at most 0.002"
    assert fp8_loss.verdict([each + 0.001 for each in apart]) == "loses more than 0.002"
    assert fp8_loss.verdict([each + 0.01 * math.sin(i) for i, each in enumerate(apart)]).startswith("not decided")
    assert fp8_loss.verdict(apart[:7]).startswith("not decided: 7 seeds")
