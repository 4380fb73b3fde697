"""The benchmarks' count of flops and bytes, against PyTorch's own counter, a model, and the published arithmetic."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import work
from bench.__main__ import main
from fastgpt import GPT, GPTConfig
from fastgpt.ops import pytorch

TINY = GPTConfig(vocab_size=96, block_size=16, n_layer=2, n_head=2, n_embd=32)


def matmul_flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for op, flops in counts.items() if "mm" in str(op))


@pytest.mark.parametrize("config", [TINY, GPTConfig(vocab_size=65, n_layer=1, n_head=1, n_embd=8, bias=False)])
def test_parameters_are_those_of_the_model(config):
    assert work.parameters(config) == GPT(config).num_parameters()


def test_the_steps_matmuls_are_the_models():
    model = GPT(TINY)
    idx = torch.randint(0, 96, (3, 16))
    lines = work.train_step(TINY, 3, 16)
    counted = sum(line.times * line.work.flops for line in lines if line.kind == "matmul")
    logits_and_back = matmul_flops(lambda: model(idx).sum().backward())  # the counter can't see into the loss's own op
    assert logits_and_back == pytest.approx(counted)


def test_the_mlps_flops_both_ways():
    M, C, F = 6, 8, 24
    x, w_in, w_out = (torch.randn(shape, requires_grad=True) for shape in ((M, C), (F, C), (C, F)))
    out = pytorch.gelu_mlp(x, w_in, None, w_out)
    assert matmul_flops(lambda: pytorch.gelu_mlp(x, w_in, None, w_out)) == work.gelu_mlp_fwd(M, C, F, 4).flops
    assert matmul_flops(lambda: out.sum().backward()) == work.gelu_mlp_bwd(M, C, F, 4).flops


def test_attention_counts_the_half_below_the_diagonal():
    B, H, T, D = 2, 3, 32, 16
    q, k, v = (torch.randn(B, H, T, D) for _ in range(3))
    scores = matmul_flops(lambda: (q @ k.transpose(-1, -2)).softmax(-1) @ v)
    assert work.attention_fwd(B, H, T, D, 2).flops == scores / 2
    assert work.attention_bwd(B, H, T, D, 2).flops == 2.5 * scores / 2
    assert work.attention_fwd(B, H, T, D, 2).bytes == sum(2 * t.numel() for t in (q, k, v, q)) + 4 * B * H * T


def test_the_124m_step_has_the_published_sums():
    """Padded vocabulary, B = 32, T = 1024: 24.29 TFLOP of matmuls, 2.16 of attention, about 8 ms of memory-bound work
    at 3 TB/s if the GELU costs no pass of its own."""
    config = GPTConfig.preset("gpt2-124M", vocab_size=50304)
    lines = work.train_step(config, 32, 1024, adamw_bytes=work.ADAMW_BYTES["master"])
    flops = {kind: sum(n * w.flops for _, k, n, w in lines if k.startswith(kind)) for kind in ("matmul", "attention")}
    assert flops["matmul"] == pytest.approx(24.29e12, rel=1e-3)
    assert flops["attention"] == pytest.approx(2.16e12, rel=5e-3)
    memory = sum(n * w.bytes for part, kind, n, w in lines if kind == "memory" and "GELU" not in part)
    clipping = 2 * 2 * work.parameters(config)  # a pass of its own there, a factor of AdamW's here
    assert (memory + clipping) / 3.0e12 == pytest.approx(8.0e-3, rel=0.05)


def test_the_floor_is_the_larger_of_the_two():
    both = work.Work(10, 4)
    assert both.floor(1, 1) == 10 and both.bound(1, 1) == "flops"
    assert both.floor(5, 1) == 4 and both.bound(5, 1) == "bytes"


def test_a_cached_token_reads_every_weight_once():
    one, two = (work.generation(TINY, 1, 4, new, 2) for new in (1, 2))
    weights = work.parameters(TINY) - 16 * 32
    assert two.bytes - one.bytes == (weights + 2 * 2 * 32 * 4) * 2


def test_the_command_prints_every_part_and_the_sum(capsys):
    assert main(["bytes", "--batch", "32"]) == 0
    text = capsys.readouterr().out
    lines = work.train_step(GPTConfig.preset("gpt2-124M"), 32, 1024)
    assert all(line.part in text for line in lines)
    assert "24.29 TFLOP" in text and "as others published it" in text
    assert main(["bytes", "--time", "1025"]) == 2
    assert "time 1025" in capsys.readouterr().err
