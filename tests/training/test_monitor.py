"""What can be seen of a run."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastgpt import GPT, GPTConfig, generate
from fastgpt.data.tokenizer import encoding
from fastgpt.training import monitor
from fastgpt.training.monitor import Monitor, flops_per_token, peak_flops, plot_losses, sample
from fastgpt.training.tracking import trackers

SHAPE = GPTConfig.preset("byte-0.1M", n_layer=1, block_size=16)
ROW = dict(step=2, train_loss=1.0, val_loss=1.5, learning_rate=0.1, tokens_per_second=1e6, seconds=1.0, grad_norm=0.5)


def test_flops_are_those_that_pytorch_counts():
    """Of the blocks' linear layers: it does not see the head's, which are written into memory that is given, and counts
    attention by the causal half or not, as its version does."""
    from torch.utils.flop_counter import FlopCounterMode

    model = GPT(SHAPE)
    idx = torch.randint(257, (2, 16))
    with FlopCounterMode(display=False) as counter:
        model(idx, idx).backward()
    products = sum(
        flops
        for name, flops in counter.get_flop_counts()["Global"].items()
        if any(kind in str(name) for kind in ("mm", "addmm"))
    )
    attention = 12 * SHAPE.block_size * SHAPE.n_embd * SHAPE.n_layer
    head = 6 * SHAPE.vocab_size * SHAPE.n_embd
    assert products == 32 * (flops_per_token(SHAPE) - attention - head)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla T4", 65e12),
        ("NVIDIA Quadro 9", None),
    ],
)
def test_the_peak_is_the_cards(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_mfu_is_of_all_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "peak_flops", lambda device: 1e12)
    watch = Monitor(tmp_path, SHAPE, torch.device("cpu"), 2)
    speed = 1e12 / flops_per_token(SHAPE)
    assert watch.use(speed) == ", 1.0 TFLOP/s, MFU 50.0%"
    watch.peak = None
    assert watch.use(speed) == ""


def test_tensorboard_gets_losses(tmp_path, monkeypatch):
    """PyTorch's SummaryWriter, here a list."""
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            pass

        close = flush

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    watch = Monitor(tmp_path, SHAPE, torch.device("cpu"), 1, trackers(True, False))
    watch.start(0, 4)
    watch.stepped(2, 2, 1.25, 0.5, 0.1, 1e6)
    watch.evaluated([ROW])
    watch.close()
    assert written == [
        str(tmp_path / "tensorboard"),
        ("train/loss", 1.25, 2),
        ("train/grad_norm", 0.5, 2),
        ("train/learning_rate", 0.1, 2),
        ("train/tokens_per_second", 1e6, 2),
        ("val/loss", 1.5, 2),
    ]


def test_without_tensorboard_its_option_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="needs `pip install tensorboard`"):
        trackers(True, False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="needs `pip install wandb`"):
        trackers(False, True)


def test_wandb_gets_the_same_and_a_resumed_run_goes_on_there(tmp_path, monkeypatch):
    told, begun, ended = [], [], []

    class Run:
        def log(self, scalars, step):
            told.append((scalars, step))

        def finish(self):
            ended.append(True)

    module = ModuleType("wandb")
    module.init = lambda **given: (begun.append(given), Run())[1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_PROJECT", "plays")
    for _ in range(2):
        watch = Monitor(tmp_path, SHAPE, torch.device("cpu"), 1, trackers(False, True))
        watch.start(0, 4)
        watch.stepped(2, 2, 1.25, 0.5, 0.1, 1e6)
        watch.evaluated([ROW])
        watch.close()
    first, again = begun
    assert first == again and len(first["id"]) == 12 and first["resume"] == "allow"
    assert (first["project"], first["name"], first["dir"]) == ("plays", tmp_path.name, str(tmp_path))
    assert first["config"]["n_layer"] == SHAPE.n_layer and ended == [True, True]
    assert told[:2] == [
        ({"train/loss": 1.25, "train/grad_norm": 0.5, "train/learning_rate": 0.1, "train/tokens_per_second": 1e6}, 2),
        ({"val/loss": 1.5}, 2),
    ]


def test_a_sample_of_no_prompt_begins_a_document():
    """As generate does with the end of text for a prompt; a line is written, not the error of an empty prompt."""
    model = GPT(GPTConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=16)).eval()
    byte = encoding("byte")
    options = dict(temperature=0.8, seed=7, encoding=byte, stop_ids=256)
    assert sample(model, byte, "", 9, 7) == generate(model, [[256]], 9, **options).texts[0] != ""


def test_a_sample_is_repeatable_and_leaves_the_generators_alone():
    torch.manual_seed(3)
    model, before = GPT(SHAPE), torch.get_rng_state()
    first, again = (sample(model, encoding("byte"), "fox", 20, 7) for _ in range(2))
    assert first == again and first.startswith("fox") and len(first) > 3
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_samples_are_kept_by_step(tmp_path):
    monitor.keep_sample(tmp_path, 2, "é one")
    monitor.keep_sample(tmp_path, 4, "two")
    assert (tmp_path / "samples.txt").read_text("utf-8") == "--- step 2\né one\n--- step 4\ntwo\n"


@pytest.mark.parametrize(("norms", "scale"), [((0.5, 0.7), "linear"), ((0.5, 30.0), "log"), ((None, 0.7), "linear")])
def test_the_plot_has_losses_rate_norm_and_speed_by_steps(tmp_path, monkeypatch, norms, scale):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    rows = [{**ROW, "step": step, "grad_norm": norm} for step, norm in zip((2, 4), norms, strict=True)]
    plot_losses(rows, Path(tmp_path, "loss.png"))
    lines = [list(line.get_ydata()) for axes in drawn[0].axes for line in axes.lines]
    known = [norm for norm in norms if norm is not None]  # a run's that was begun before norms were kept
    assert lines == [[1.0, 1.0], [1.5, 1.5], [0.1, 0.1], known, [ROW["tokens_per_second"]] * 2]
    assert drawn[0].axes[0].get_xlim()[0] == 0 and drawn[0].axes[2].get_yscale() == scale
