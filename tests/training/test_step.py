"""One step of the trainer: accumulation, document masks, precisions, compilation, fine-tuning."""

import dataclasses

import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.data.tokenizer import encoding
from fastgpt.training import fit, monitor, pretrained
from fastgpt.training import run as running
from fastgpt.training.distributed import World
from fastgpt.training.optimizer import adamw
from fastgpt.training.settings import TrainConfig, autocast_dtype
from fastgpt.training.step import Step
from fastgpt.weights import save_model, save_pretrained

MODEL = GPTConfig(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=16)
FEW = TrainConfig(max_iters=3, batch_size=4, eval_interval=100, eval_iters=2, sample_tokens=0, device="cpu")
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 50)
    return path


@pytest.fixture
def train(text, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "plot_losses", lambda rows, path: None)

    def train(out="out", model=MODEL, **changes):
        return fit(model, dataclasses.replace(FEW, **changes), encoding("byte"), text, tmp_path / out)

    return train


def metrics(folder):
    row = (folder / "metrics.csv").read_text().splitlines()[-1].split(",")
    return [float(row[column]) for column in (1, 6)]  # the loss and the norm


def close(a, b, **tolerance):
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, **tolerance, msg=name)


@pytest.mark.parametrize(
    "changes",
    [dict(batch_size=2, gradient_accumulation_steps=2), dict(batch_size=3, total_batch_size=64)],
    ids=["accumulated", "in tokens"],
)
def test_accumulation_is_the_large_batch(train, tmp_path, changes):
    """4 windows of 16 tokens, also as 2 x 2, for 3 do not divide them."""
    close(train("small", **changes), train("large"), rtol=1e-4, atol=1e-6)
    small, large = (metrics(tmp_path / name) for name in ("small", "large"))
    assert small == pytest.approx(large, rel=1e-4), "losses, and the gradients' norm, which AdamW would not tell"


@pytest.mark.parametrize("checkpointing", ["mlp", "block"])
def test_activation_checkpointing_changes_nothing(train, checkpointing):
    again = dataclasses.replace(MODEL, activation_checkpointing=checkpointing)
    close(train("again", model=again), train("kept"), rtol=1e-5, atol=1e-7)


def test_compiled_is_eager(train, monkeypatch):
    calls = []
    compiled = torch.compile
    monkeypatch.setattr(
        running.torch, "compile", lambda model: (calls.append(model), compiled(model, backend="aot_eager"))[1]
    )
    close(train("compiled", compile=True), train("eager"), rtol=1e-4, atol=1e-6)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_float32(train, dtype):
    half, full = train("half", dtype=dtype), train("full")
    close(half, full, rtol=0.05, atol=2e-3)
    assert not torch.equal(half.wte.weight, full.wte.weight)
    assert half.wte.weight.dtype == torch.float32


def test_float16_skips_what_overflows_and_goes_on(train, monkeypatch):
    """The first scale, 65536 here made 2^60, must come down step by step; each of those changes nothing."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, 2.0**60, enabled=enabled))
    steps = []
    step = running.Run.step

    def watched(self):
        before = self.model.wte.weight.clone()
        result = step(self)
        steps.append((bool(result[1].isfinite()), not torch.equal(before, self.model.wte.weight)))
        return result

    monkeypatch.setattr(running.Run, "step", watched)
    train(dtype="float16", max_iters=70)
    assert all(finite == changed for finite, changed in steps)
    assert not steps[0][0] and steps[-1][0]


@pytest.mark.parametrize("skip_nonfinite", [0, 9])
def test_float16_that_always_overflows_is_an_error(train, monkeypatch, skip_nonfinite):
    monkeypatch.setattr(running, "OVERFLOWS", 2)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, 2.0**60, enabled=enabled))
    with pytest.raises(FloatingPointError, match="3 steps to step 3 overflowed float16 in a row"):
        train(dtype="float16", max_iters=70, skip_nonfinite=skip_nonfinite)


def test_documents_do_not_see_each_other():
    """Tokens of another document in the same window change nothing."""
    torch.manual_seed(1)
    model = GPT(MODEL)
    step = Step(model, adamw(model, 1e-3), ALONE, 1.0, end=256)
    ids = torch.randint(256, (1, 17))
    ids[0, 8] = 256
    other = ids.clone()
    other[0, :8] = torch.randint(256, (8,))
    ours, theirs = ids[:, :-1].clone(), ids[:, 1:].clone()
    theirs[0, :8] = -100  # the loss of the second document alone
    changed = other[:, :-1].clone()
    assert torch.equal(step.loss(model, ours, theirs), step.loss(model, changed, theirs))
    step.end = None
    assert not torch.equal(step.loss(model, ours, theirs), step.loss(model, changed, theirs))


def test_document_mask_reaches_the_steps(train, monkeypatch):
    ends = []
    loss = Step.loss
    monkeypatch.setattr(Step, "loss", lambda self, *given: (ends.append(self.end), loss(self, *given))[1])
    train("masked", document_mask=True)
    train("open")
    half = len(ends) // 2
    assert set(ends[:half]) == {256} and set(ends[half:]) == {None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(total_batch_size=60), "60 tokens are no whole number of windows of 16"),
        (dict(cuda_graph=True), "cuda_graph is true, and a CUDA graph can't be: the device is cpu"),
        (dict(fsdp=True), "fsdp needs several processes: torchrun"),
        (dict(init_from="nowhere"), "there is no file or folder nowhere"),
    ],
)
def test_what_can_not_be_done(train, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        train(**changes)


@pytest.mark.parametrize("family", ["fastgpt", "huggingface", "checkpoint"])
def test_fine_tuning_starts_from_the_weights(train, tmp_path, family):
    if family == "checkpoint":
        start = train("before")
        source = tmp_path / "before/checkpoints/step-00000003"
    else:
        torch.manual_seed(5)
        start, source = GPT(MODEL), tmp_path / "weights"
        source.mkdir()
        save_model(start, source, "byte") if family == "fastgpt" else save_pretrained(start, source)
    close(train(init_from=str(source), learning_rate=0.0, min_lr=0.0), start, rtol=0, atol=0)


def test_fine_tuning_crops_positions_and_asks_for_the_shape(tmp_path):
    start = GPT(MODEL)
    save_pretrained(start, tmp_path)
    cropped = pretrained(str(tmp_path), block_size=8, dropout=0.3)
    assert cropped.config == dataclasses.replace(MODEL, block_size=8, dropout=0.3)
    assert torch.equal(cropped.wpe.weight, start.wpe.weight[:8])
    with pytest.raises(ValueError, match="16 positions, too few for block_size = 32"):
        pretrained(str(tmp_path), block_size=32)
    with pytest.raises(ValueError, match="is of another shape: n_head = 2, not 4"):
        pretrained(str(tmp_path), dataclasses.replace(MODEL, n_head=4))


def test_dropout_and_the_compiler_of_torch_2_13(train, monkeypatch):
    monkeypatch.setattr(running.torch, "compile", lambda model: model)
    with pytest.warns(UserWarning, match="torch 2.13 may compile dropout wrongly"):
        monkeypatch.setattr(running.torch, "__version__", "2.13.0")
        train(model=dataclasses.replace(MODEL, dropout=0.1), compile=True)


def test_auto_is_bfloat16_where_the_gpu_has_it(monkeypatch):
    for capability, dtype in {(9, 0): torch.bfloat16, (8, 0): torch.bfloat16, (7, 5): torch.float16}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, here=capability: here)
        assert autocast_dtype(TrainConfig(), torch.device("cuda")) == dtype
    assert autocast_dtype(TrainConfig(), torch.device("cpu")) is None
