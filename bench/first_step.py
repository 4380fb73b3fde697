"""`fastgpt train` in a process of its own until its first step is done, and what each part before it took.

python -m bench.first_step BEGAN ARGUMENTS…: the arguments are those of `fastgpt train`, BEGAN is what time.time() said
before the process was started. bench.loop starts it.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time

PARTS = ("imports", "the tokens", "the model", "the run", "the step")


def parts(preset: str, batch_size: int, device: str) -> dict[str, float]:
    """Seconds from the command to the first step's loss on the host, by PARTS: of the built-in corpus, in bytes."""
    sizes = ["--preset", preset, "--batch_size", str(batch_size), "--device", device]
    few = ["--encoding", "byte", "--max_iters", "1", "--sample_tokens", "0"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.first_step", str(time.time()), "--out", f"{folder}/out", *sizes, *few]
        found = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if found.returncode:
        raise RuntimeError(f"fastgpt train ended with {found.returncode}: {found.stderr[-500:]}")
    marks = [0.0, *json.loads(found.stdout.splitlines()[-1])]
    return dict(zip(PARTS, (late - early for early, late in itertools.pairwise(marks)), strict=True))


def main(began: float, arguments: list[str]) -> None:
    """Prints the marks of PARTS, in seconds since `began`, as the last line."""
    from fastgpt import cli

    marks = [time.time() - began]
    from fastgpt.training import fitting, run

    def marked(owner, name):
        call = getattr(owner, name)

        def timed(*given, **named):
            result = call(*given, **named)
            marks.append(time.time() - began)
            return result

        setattr(owner, name, timed)

    step = run.Run.step

    def first(self):
        step(self)[0].item()
        marks.append(time.time() - began)
        print(json.dumps(marks))
        raise SystemExit(0)

    marked(fitting.data, "load_corpus")
    marked(fitting, "_made")
    marked(run.Run, "__init__")
    run.Run.step = first  # type: ignore[method-assign, assignment]
    cli.main(["train", *arguments])


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
