"""The account of a training step's launches: what is recorded, how it is counted, and that the committed lists are what
the code launches."""

import dataclasses
import re
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

import fastgpt
from bench import launches, work
from bench.__main__ import main
from bench.gates import feign
from bench.launches import operators, parts, predict, record, rows
from bench.steps.entries import BASELINE
from fastgpt import GPT, GPTConfig, ops
from tests import models

SIZES = parts.Sizes(4096, 768, 3072, 50257)
LOSS = [f"{family}, accelerate(loss=True)" for family in ("nanoGPT", "Hugging Face")]
PLAIN = [name.replace("(loss=True)", "") for name in LOSS]


def of(call, sizes=SIZES):
    """Of a call, after one that went before it: its tensors' making is not asked for."""
    with feign.card(90):
        with record.recorded(sizes) as found:
            call()
        return found


def named(found, name):
    return [launch for launch in found if launch.name == name]


def differences(name, layers=2):
    """Lines of which a step of so many layers has more or fewer than the committed account says."""
    known = launches.kept()[1][name]
    expected = {line.calls: line.a_step + layers * line.a_layer for line in known}
    found = rows.calls(name, dataclasses.replace(launches.CONFIG, n_layer=layers), launches.BATCH)
    counts = Counter(map(rows.key, found))
    more = {key: counts[key] - expected.get(key, 0) for key in expected.keys() | counts.keys()}
    return {key: number for key, number in more.items() if number}


def test_hoppers_own_attention_is_accounted_for_as_its_twin(monkeypatch):
    hopper = pytest.importorskip("fastgpt.ops.hopper")
    if not hopper.has_a_known_triton():
        pytest.skip("this Triton's Gluon is not known")

    def call():
        qkv = torch.empty(32, 1024, 3 * 768, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        out = ops.causal_attention_qkv(qkv, 12)
        out.backward(torch.empty_like(out))

    found = []
    for ran in ((), hopper.TRITONS):
        monkeypatch.setattr(hopper, "RAN", dict.fromkeys(hopper.RAN, ran))
        found.append(of(call))
    for kind in ("fwd", "dq", "dkdv"):
        (twin,), (own,) = (
            named(found[0], f"attention_{kind}_kernel"),
            named(found[1], f"hopper_attention_{kind}_kernel"),
        )
        assert (own.part, own.phase, own.work.flops) == (twin.part, twin.phase, twin.work.flops)
        assert own.work.bytes == pytest.approx(twin.work.bytes, rel=0.01)
    assert len(found[0]) == len(found[1])


def skip_other_versions():
    known, here = launches.kept()[0], launches.versions()
    if known != here:
        pytest.skip(f"the account is of {known}, here is {here}: other versions may launch other kernels")


@pytest.mark.parametrize("name", [BASELINE, *LOSS, "the book, fast, accelerate", *PLAIN])
def test_a_step_launches_what_the_account_says(name):
    """No more casts, copies and sums than were accounted for: `python -m bench launches --keep` after a change."""
    skip_other_versions()
    if "the book" in name:
        models.book_package("ch04")
    assert differences(name) == {}


def test_one_cast_more_a_layer_is_seen(monkeypatch):
    skip_other_versions()
    attention = ops.causal_attention_qkv
    monkeypatch.setattr(
        ops, "causal_attention_qkv", lambda qkv, *args, **kwargs: attention(qkv.float(), *args, **kwargs)
    )
    found = differences(BASELINE)
    cast = ("forward", "casts of activations", "copy_", "f32[32,1024,2304] bf16[32,1024,2304]")
    assert found[cast] == 2


def own_blocks():
    model = GPT(GPTConfig(vocab_size=50257, n_layer=2, n_head=12, n_embd=768, activation_checkpointing="block"))
    return model, lambda idx: model(idx, idx)


def hugging_faces():
    transformers = pytest.importorskip("transformers", reason="the extra `test` brings transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2))
    fastgpt.accelerate(model, loss=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, lambda idx: model(idx, labels=idx).loss


@pytest.mark.parametrize("make", [own_blocks, hugging_faces])
def test_a_weight_is_cast_once_a_forward_and_once_a_recompute(make):
    """Under autocast; the account says the same of all families where nothing is computed again. A copy that is kept
    longer could be stale: a fused optimizer moves no version, and a graph's replay tells Python of nothing."""
    with mock.patch.multiple(torch.Tensor, **rows._UNDRAWN):
        model, loss = make()
    shapes = Counter(frozenset(p.shape) for name, p in model.named_parameters() if ".c_" in name and p.dim() == 2)

    def call():
        model.to("cuda").train()
        idx = torch.zeros(4, 1024, dtype=torch.int64, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            out = loss(idx)
        out.backward()

    casts = Counter()
    for launch in named(of(call), "copy_"):
        match = re.fullmatch(r"bf16\[(\d+),(\d+)\]ᵀ? f32\[(\d+),(\d+)\]ᵀ?", launch.tensors)
        if match:
            casts[frozenset(map(int, match.groups()))] += 1
    head = frozenset(model.get_parameter("wte.weight" if make is own_blocks else "lm_head.weight").shape)
    assert {shape: casts[shape] for shape in (*shapes, head)} == {**{s: 2 * n for s, n in shapes.items()}, head: 1}


def test_operators_are_counted_as_a_card_launches_them():
    x, weight = (torch.randn(shape) for shape in ((4096, 768), (3072, 768)))

    with feign.card(90), record.recorded(SIZES) as found:
        a, w = x.cuda(), weight.cuda()
        found.clear()  # their copies
        y = F.linear(a.bfloat16(), w.bfloat16())  # two casts, a product; transposes and views are no launches
        torch.cat([y, y]).view(-1).t()
        F.pad(y, (0, 8))  # what is filled, then written over
        y.float().sum(0)
        torch.empty(3, 4, device="cuda").resize_(2, 2)
    names = [launch.name for launch in found]
    assert names == ["copy_", "copy_", "mm", "cat", "fill_", "copy_", "copy_", "sum"]
    cast, product = found[0], found[2]
    assert cast.part == "casts of activations" and found[1].part == "casts of weights"
    assert cast.work == work.Work(0, 4096 * 768 * 6)
    assert product.work == work.matmul(4096, 3072, 768, 2)


def test_triton_kernels_have_the_floors_of_their_operations():
    heads, time, width = 12, 1024, 64

    def call():
        qkv = torch.randn(4, time, 3 * heads * width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        ops.causal_attention_qkv(qkv, heads).backward(torch.ones(4, time, heads * width, device="cuda").bfloat16())

    def norm():
        rows = torch.randn(4096, 768, device="cuda", dtype=torch.bfloat16)
        weight = torch.ones(768, device="cuda")
        ops.add_layer_norm(rows, rows.clone(), weight)

    found = of(call)
    (forward,) = named(found, "attention_fwd_kernel")
    assert forward.work == work.attention_fwd(4, heads, time, width, 2)
    both = [launch for launch in found if launch.name in ("attention_dq_kernel", "attention_dkdv_kernel")]
    assert sum(launch.work.flops for launch in both) == work.attention_bwd(4, heads, time, width, 2).flops
    assert {launch.phase for launch in both} == {"backward"} and forward.phase == "forward"
    (added,) = named(of(norm), "layer_norm_fwd_kernel")
    least = work.add_layer_norm_fwd(4096, 768, 2).bytes
    assert least <= added.work.bytes <= 1.01 * least


def test_an_odd_vocabulary_is_told_from_a_padded_one():
    def call(columns):
        x, weight = (torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for shape in ((4096, 768), (columns, 768)))
        F.linear(x, weight)

    for columns, part in ((50257, parts.UNALIGNED), (50304, parts.MATMULS)):
        (product,) = named(of(lambda columns=columns: call(columns)), "mm")
        assert product.part == part


@pytest.mark.parametrize(
    ("sizes", "lists", "count"),
    [([1] * 110, 1, 1), ([1] * 111, 1, 2), ([65536 * 320], 1, 1), ([65536 * 320 + 1], 1, 2), ([5, 65536 * 640], 4, 3)],
)
def test_operators_of_many_tensors_launch_by_tensors_and_by_blocks(sizes, lists, count):
    tensors = [torch.empty(size, device="meta") for size in sizes]
    assert operators.multi_tensor(tensors, lists) == count


def test_scaled_dot_product_attention_is_one_kernel_a_pass_on_a_card():
    def call():
        q, k, v = (torch.randn(2, 4, 64, 64, device="cuda").bfloat16().requires_grad_() for _ in range(3))
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    products = [launch for launch in of(call) if "attention" in launch.name]
    assert [launch.part for launch in products] == ["attention, forward", "attention, backward"]


def test_the_prediction_knows_the_measured_rows_within_15_percent():
    accounts = launches.kept()[1]
    known = predict.shares(predict.without_clipping(accounts[predict.PROFILED]))
    measured = {what: (name, time) for name, there in predict.measured().items() for what, time in there.items()}
    assert len(measured) >= 9
    for what, (name, time) in measured.items():
        if name in predict.CHANGED:  # of other launches than those that were measured
            assert predict.seconds(accounts[name], known) < time, what
            continue
        assert predict.seconds(accounts[name], known) == pytest.approx(time, rel=0.15), what


def test_the_parts_add_up_to_the_profile_and_to_the_work_of_a_step():
    accounts = launches.kept()[1]
    lines = accounts[BASELINE]
    flops = sum(line.flops for line in lines if line.part == parts.MATMULS)
    padded = dataclasses.replace(launches.CONFIG, vocab_size=50304)
    counted = sum(n * w.flops for _, kind, n, w in work.train_step(padded, launches.BATCH, 1024) if kind == "matmul")
    assert flops == counted
    known = predict.shares(predict.without_clipping(accounts[predict.PROFILED]))
    assert all(0.3 < share <= 1 for share in known.values())


def test_the_command_prints_a_rows_list_and_says_what_it_does_not_know(capsys, monkeypatch):
    monkeypatch.setattr(launches, "CONFIG", dataclasses.replace(launches.CONFIG, n_layer=2))
    assert main(["launches", "--row", "fastgpt.GPT, bfloat16 weights"]) == 0
    text = capsys.readouterr().out
    assert "attention_dkdv_kernel" in text and "measured ms" in text and "58.9, one CUDA graph" in text
    assert main(["launches", "--row", "no such row"]) == 2
    assert "no row's name holds 'no such row'" in capsys.readouterr().err
    assert main(["launches", "--tflops", "0"]) == 2
    assert "--tflops is 0.0" in capsys.readouterr().err


def test_autocast_casts_no_logits_where_the_kernel_takes_them_as_they_are():
    """cross_entropy asks for log_softmax in its own dtype: on a card no cast of all logits comes before it."""

    def call():
        logits = torch.randn(64, 50257, device="cuda").bfloat16()
        found.clear()
        with torch.autocast("cuda", torch.bfloat16):
            F.cross_entropy(logits, torch.zeros(64, dtype=torch.int64, device="cuda"))
            assert logits.sum(0).dtype == torch.float32  # which a sum makes as it reads halves

    with feign.card(90), record.recorded(SIZES) as found:
        call()
    assert [launch.name for launch in found if launch.part == "cross entropy"] == [
        *("_log_softmax", "copy_", "nll_loss_forward", "sum"),
    ]
