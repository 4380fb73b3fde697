"""What the tests of runs share: a small model, a short training, and a folder that it goes on in."""

import dataclasses

from fastgpt import GPTConfig
from fastgpt.data.tokenizer import encoding
from fastgpt.training import fit, monitor
from fastgpt.training.checkpoint import Checkpoint
from fastgpt.training.settings import TrainConfig

MODEL = GPTConfig(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.2)
SHORT = TrainConfig(
    max_iters=6,
    batch_size=2,
    gradient_accumulation_steps=2,
    eval_interval=100,
    eval_iters=2,
    checkpoint_interval=1,
    log_interval=2,
    sample_tokens=0,
    device="cpu",
)


class Runs:
    """Called, it trains with SHORT as changed, into `out` of the test's folder; no plot is drawn."""

    def __init__(self, tmp_path, monkeypatch):
        monkeypatch.setattr(monitor, "plot_losses", lambda rows, path: None)
        self.folder, self.out = tmp_path, tmp_path / "out"
        self.text = tmp_path / "fox.txt"
        self.text.write_text("the quick brown fox jumps over the lazy dog. " * 50)

    def __call__(
        self, out="out", model=MODEL, source=None, overwrite=False, resume=False, strict_resume=False, **changes
    ):
        config = dataclasses.replace(SHORT, **changes)
        source = source or self.text
        return fit(model, config, encoding("byte"), source, self.folder / out, overwrite, resume, strict_resume)


def digests(folder, step=6):
    """SHA-256 of all that a checkpoint holds but for its JSON, which tells times."""
    files = Checkpoint(folder / f"checkpoints/step-{step:08d}", step).verify()["files"]
    return {name: said["sha256"] for name, said in files.items() if not name.endswith("state.json")}
