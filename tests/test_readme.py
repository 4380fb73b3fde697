"""The README does what it says."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_readmes_test_command():
    command = next(line for line in README.splitlines() if line.startswith("pip install") and "pytest" in line)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_ten_lines_run(capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    small = snippet.replace('"gpt2-124M", ', '"gpt2-124M", n_layer=1, n_embd=24, ')
    assert small != snippet
    exec(compile(small, "README.md", "exec"), {})
    assert "layer_norm runs on PyTorch" in capsys.readouterr().out


def test_the_map_names_every_file():
    (listing,) = re.findall(r"```\n(fastgpt/\n.*?)```", README, re.DOTALL)
    for folder in ("fastgpt", "kernels"):
        for file in (ROOT / folder).glob("*.py"):
            assert file.name in listing or file.name.startswith("__"), f"{folder}/{file.name} is not on the map"
