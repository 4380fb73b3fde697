"""Every way to lay a run out over processes computes the same, and goes on from what any other saved."""

import json
import sys

import pytest

from tests.training.ranks import launch, said

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows can't fork")
LAYOUTS = {
    "one": (1, {}),
    "ddp": (2, {}),
    "fsdp": (4, dict(fsdp=True)),
    "hsdp": (4, dict(fsdp=True, fsdp_shard=2, fsdp_reshard=True)),
}
# Each layout goes on from each other one, once.
CIRCUIT = ["one", "ddp", "one", "fsdp", "ddp", "fsdp", "hsdp", "one", "hsdp", "ddp", "hsdp", "fsdp", "one"]
MODEL = dict(block_size=5)  # of 5 positions over 4 processes the last one has none


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 50)
    return path


def losses(out, step):
    """(training, validation) at each step, to the last digit."""
    rows = json.loads((out / f"checkpoints/step-{step:08d}/state.json").read_text())["rows"]
    return [(row["train_loss"], row["val_loss"]) for row in rows]


def relay(layouts, text, out):
    """A step by each layout in turn; the losses of all."""
    for step, name in enumerate(layouts, 1):
        size, changes = LAYOUTS[name]
        options = dict(max_iters=step, lr_decay_iters=len(layouts), eval_interval=1, checkpoint_interval=1, **changes)
        codes = launch(size, text, out, resume=step > 1, model=MODEL, **options)
        assert codes == [0] * size, said(out, 0)
        assert step == 1 or f"resuming from {out}/checkpoints/step-{step - 1:08d}" in said(out, 0)
    return losses(out, len(layouts))


@pytest.mark.parametrize(
    "layouts", [["one", "hsdp", "ddp", "fsdp"], pytest.param(CIRCUIT, marks=pytest.mark.slow)], ids=["four", "all"]
)
def test_each_goes_on_from_what_another_saved(text, tmp_path, layouts):
    """With the losses of one process that was never stopped, to 1e-6."""
    found = relay(layouts, text, tmp_path / "out")
    options = dict(max_iters=len(layouts), eval_interval=1, checkpoint_interval=len(layouts))
    assert launch(1, text, tmp_path / "whole", model=MODEL, **options) == [0]
    for ours, theirs in zip(found, losses(tmp_path / "whole", len(layouts)), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.slow
def test_weights_that_are_gathered_in_bfloat16(text, tmp_path):
    """By FSDP2's policy, where autocast would cast each: nearly the same losses, of weights and moments in float32."""
    found = {}
    for name in ("ddp", "hsdp"):
        size, changes = LAYOUTS[name]
        out = tmp_path / name
        assert launch(size, text, out, dtype="bfloat16", eval_interval=1, **changes) == [0] * size, said(out, 0)
        found[name] = losses(out, 6)
    assert found["ddp"] != found["hsdp"]
    for ours, theirs in zip(found["hsdp"], found["ddp"], strict=True):
        assert ours == pytest.approx(theirs, rel=5e-3)
