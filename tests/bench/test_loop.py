"""What the trainer's loop costs beside its steps, and what `fastgpt train` does before the first one."""

import re

import pytest

from bench.__main__ import main


def test_what_the_loop_adds_and_when_the_first_step_is_done(capsys):
    assert main(["loop", "--preset", "byte-0.1M", "--batch_size", "2", "--steps", "2", "--device", "cpu"]) == 0
    pairs, host, first = capsys.readouterr().out.splitlines()
    assert re.search(r"ms in the loop, [\d.]+ ms bare, [+-][\d.]+% \(median of 2 pairs\)", pairs)
    assert float(re.search(r"beside the step's own: ([\d.]+) ms", host)[1]) > 0
    whole, *parts = map(float, re.findall(r"(\d+\.\d)(?= s after|,|$)", first))
    assert len(parts) == 5 and whole == pytest.approx(sum(parts), abs=0.3) and whole > parts[0] > 0


@pytest.mark.gpu
def test_the_loop_on_a_gpu(capsys):
    """Both steps are graphs: a shape that a graph was not captured for would be an error."""
    assert main(["loop", "--preset", "byte-0.1M", "--steps", "8"]) == 0
    assert "ms in the loop" in capsys.readouterr().out
