"""Which calls Hopper's own kernels serve, on a feigned card of capability 9.0: what explain says, what is launched."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from bench.gates import feign, record
from fastgpt import ops
from fastgpt.ops import hopper

if not hopper.has_a_known_triton():
    pytest.skip("this Triton's Gluon is not known", allow_module_level=True)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def has_run(monkeypatch):
    """As it will be once the kernels have run on a card."""
    monkeypatch.setattr(hopper, "RAN", dict.fromkeys(hopper.RAN, hopper.TRITONS))


def tensor(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=True)


def qkv(batch=32, time=1024, channels=768, heads=12, dtype=BF16, **options):
    return ops.causal_attention_qkv, (tensor(batch, time, 3 * channels, dtype=dtype), heads), options


def separate(heads=lambda: tensor(32, 1024, 12, 64).transpose(1, 2), keys=None, **options):
    return ops.causal_attention, (heads(), *((keys or heads)() for _ in range(2))), options


def mlp(rows=(32, 1024), channels=768, hidden=3072, dtype=BF16, bias=True, x=None, w_in=None, **options):
    given = (
        tensor(*rows, channels, dtype=dtype) if x is None else x(),
        tensor(hidden, channels, dtype=dtype) if w_in is None else w_in(),
        tensor(hidden, dtype=dtype) if bias else None,
        tensor(channels, hidden, dtype=dtype),
    )
    return ops.gelu_mlp, given, options


def said_and_launched(call, capability=90):
    """What explain says of a call, and the names of the kernels that it and its backward launch."""
    with feign.card(capability):
        function, arguments, options = call()
        said = ops.explain(function, *arguments, **options)

    def run():
        function, arguments, options = call()
        out = function(*arguments, **options)
        out.backward(torch.ones_like(out))

    return said, {launch.name for launch in record.launches(run, capability)}


HOPPERS = {f"hopper_attention_{kind}_kernel" for kind in ("fwd", "dq", "dkdv")}
TRITONS = {name.removeprefix("hopper_") for name in HOPPERS}
SERVED = {
    "GPT-2 124M": qkv,
    "heads of 128": lambda: qkv(heads=6),
    "long": lambda: qkv(batch=8, time=4096),
    "an odd length": lambda: qkv(time=1999),
    "heads that are views": separate,
    "one batch of very many heads": lambda: separate(lambda: tensor(1, 1024, 384, 64).transpose(1, 2)),
}


@pytest.mark.parametrize("name", SERVED)
def test_attention_that_was_measured_is_served(name):
    said, launched = said_and_launched(SERVED[name])
    assert "its forward runs on Hopper's own kernel, measured at 1." in said
    assert "its backward runs on Hopper's own kernel, measured at 1." in said
    assert launched == HOPPERS


def test_the_form_is_the_one_that_was_measured():
    for shape, constants in (
        (dict(batch=32, time=1024), (64, 2)),
        (dict(batch=9, time=4095), (64, 2)),
        (dict(batch=8, time=4096), (64, 3)),
        (dict(batch=8, time=4096, heads=6), (128, 2)),
    ):

        def run(shape=shape):
            function, arguments, _ = qkv(**shape)
            function(*arguments)

        (launch,) = record.launches(run, 90)
        assert (launch.constexprs["D"], launch.constexprs["CONSUMERS"]) == constants
        assert launch.pointers == dict.fromkeys(("q_desc", "k_desc", "v_desc", "o_desc"), "bf16") | {"lse_ptr": "fp32"}


@pytest.mark.parametrize("call", [qkv, separate])
def test_a_window_of_all_keys_is_none(call):
    said, launched = said_and_launched(lambda: call(window=1024))
    assert said == said_and_launched(call)[0] and launched >= HOPPERS


MASK = lambda: torch.ones(32, 1024, dtype=torch.bool, device="cuda")  # noqa: E731
KEPT = {
    "dropout_p is 0.1": lambda: qkv(dropout_p=0.1),
    "there is a key mask": lambda: qkv(key_mask=MASK()),
    "there are documents": lambda: qkv(documents=MASK().int()),
    "there is a window of 1023 keys": lambda: qkv(window=1023),
    "there is a window of 256 keys": lambda: separate(window=256),
    "12 query heads share 4 key heads": lambda: separate(keys=lambda: tensor(32, 1024, 4, 64).transpose(1, 2)),
    "1024 queries have 1030 keys": lambda: separate(keys=lambda: tensor(32, 1030, 12, 64).transpose(1, 2)),
    "not measured for heads of 64 in torch.float16": lambda: qkv(dtype=FP16),
    "not measured for heads of 64 in torch.float32": lambda: qkv(dtype=FP32),
    "not measured for heads of 32": lambda: qkv(heads=24),
    "not measured for 1023 tokens": lambda: qkv(time=1023, batch=40),
    "not measured for 4097 tokens": lambda: qkv(time=4097),
    "380,928 queries over batch and heads are fewer than the 393,216": lambda: qkv(batch=31),
    "do not lie side by side in rows": lambda: separate(lambda: tensor(32, 12, 1024, 64)),
    "heads do not lie side by side": lambda: separate(lambda: tensor(32, 1024, 12, 68)[..., 1:65].transpose(1, 2)),
    "side by side in rows at multiples of 16 bytes": lambda: separate(
        lambda: tensor(32 * 1024 * 768 + 4)[4:].view(32, 1024, 12, 64).transpose(1, 2)
    ),
    "do not lie side by": lambda: separate(lambda: tensor(1, 1024, 12, 64).expand(32, -1, -1, -1).transpose(1, 2)),
}


@pytest.mark.parametrize("why", KEPT)
def test_other_attention_keeps_the_triton_kernel(why):
    said, launched = said_and_launched(KEPT[why])
    assert "runs on its Triton kernel on cuda:0; its forward does not take Hopper's own kernel: " in said
    assert said.count(why) == 2 and "its backward does not take Hopper's own kernel: " in said
    assert launched >= TRITONS and not launched & HOPPERS


def biased(heads=12):
    """A call with a bias; what it launches, those kernels that add up columns with a star."""

    def run():
        function, arguments, _ = qkv(heads=heads)
        out = function(*arguments, qkv_bias=tensor(3 * 768, dtype=FP32))
        out.backward(torch.ones_like(out))

    return {launch.name + "*" * ("sums_ptr" in launch.pointers) for launch in record.launches(run, 90)}


def told_of_the_bias(heads=12):
    """What explain says last of such a call."""
    with feign.card(90):
        function, arguments, _ = qkv(heads=heads)
        return ops.explain(function, *arguments, qkv_bias=tensor(3 * 768, dtype=FP32)).rpartition("; ")[2]


def test_the_sums_for_a_bias_are_served_by_themselves(monkeypatch):
    """Until those forms have run on a card, and for heads of 128, whose form has no room for them, the kernel that has
    run is launched, and its result is summed."""
    inside, after = "which sums the bias's gradient too", "the bias's gradient is summed by PyTorch after it"
    assert biased() == {"hopper_attention_fwd_kernel", "hopper_attention_dq_kernel*", "hopper_attention_dkdv_kernel*"}
    assert told_of_the_bias() == inside
    assert biased(heads=6) == HOPPERS and told_of_the_bias(heads=6) == after
    monkeypatch.setitem(hopper.RAN, "attention_bwd_sums", ())
    assert biased() == HOPPERS and told_of_the_bias() == after
    monkeypatch.setitem(hopper.RAN, "attention_bwd", ())
    assert biased() == {"hopper_attention_fwd_kernel", "attention_dq_kernel*", "attention_dkdv_kernel*"}


SIDEWAYS = {  # gradients that the copy engine can't read, by what they are of
    "a sum's, which is expanded": (qkv, lambda out: out.sum().backward()),
    "a packed result's, in other strides": (qkv, lambda out: out.backward(torch.ones_like(out.mT.contiguous()).mT)),
    "one sequence after the other in each head": (
        separate,
        lambda out: out.backward(torch.ones_like(out, memory_format=torch.contiguous_format)),
    ),
    "at an odd address": (
        qkv,
        lambda out: out.backward(torch.ones(out.numel() + 1, dtype=out.dtype, device="cuda")[1:].view(out.shape)),
    ),
}


@pytest.mark.parametrize("name", SIDEWAYS)
def test_a_gradient_that_lies_otherwise_keeps_the_triton_backward(name):
    call, differentiate = SIDEWAYS[name]

    def run():
        function, arguments, _ = call()
        differentiate(function(*arguments))

    launched = {launch.name for launch in record.launches(run, 90)}
    assert launched == {"hopper_attention_fwd_kernel", "attention_dq_kernel", "attention_dkdv_kernel"}


def test_forward_and_backward_are_served_each_by_itself(monkeypatch):
    """As on a card where one of them has run."""
    monkeypatch.setitem(hopper.RAN, "attention_bwd", ())
    for call in (qkv, separate):
        said, launched = said_and_launched(call)
        assert "its forward runs on Hopper's own kernel" in said
        assert "its backward does not take Hopper's own kernel: it has not yet run on a card with Triton" in said
        assert launched == {"hopper_attention_fwd_kernel", "attention_dq_kernel", "attention_dkdv_kernel"}
    monkeypatch.setitem(hopper.RAN, "attention_bwd", hopper.TRITONS)
    monkeypatch.setitem(hopper.RAN, "attention_fwd", ())
    assert said_and_launched(qkv)[1] == {"attention_fwd_kernel", *HOPPERS} - {"hopper_attention_fwd_kernel"}


def test_a_scale_of_one_is_the_scale_of_any_other_call():
    """Triton would make a constant of a whole number, and the launches that follow one have its scale."""

    from fastgpt.kernels.hopper import attention_backward

    def run():
        q, k, v, o, do, dq, dk, dv = torch.empty(8, 2, 70, 3, 64, dtype=BF16, device="cuda").transpose(2, 3)
        for scale in (1, 0.125):
            lse = torch.empty(2, 3, 70, device="cuda")
            attention_backward.attention_bwd(do, q, k, v, o, lse, dq, dk, dv, scale)

    assert len(record.launches(run, 90)) == 2


def test_autocasts_dtype_counts():
    with feign.card(90):
        function, arguments, _ = qkv(dtype=FP32)
        with torch.autocast("cuda", BF16):
            assert "runs on Hopper's own kernel" in ops.explain(function, *arguments)


FORWARD, BACKWARD = "hopper_linear_gelu_fwd_kernel", "hopper_linear_gelu_bwd_kernel"
MLPS = {  # what explain says, and which of the two are launched
    "measured at 1.19 to 1.25": (mlp, {FORWARD, BACKWARD}),
    "measured at 1.21 to 1.41": (lambda: mlp(rows=(40, 1001)), {FORWARD, BACKWARD}),
    "the hidden units are computed again": (lambda: mlp(recompute=True), {FORWARD}),
    "there is no bias": (lambda: mlp(bias=False), {BACKWARD}),
    "not measured for approximate='none'": (lambda: mlp(approximate="none"), set()),
    "32,767 rows are fewer than the 32,768": (lambda: mlp(rows=(32767,)), set()),
    "not measured for 1024 channels and 4096 hidden units": (lambda: mlp(channels=1024, hidden=4096), set()),
    "in torch.float16": (lambda: mlp(dtype=FP16), set()),
    "a matrix does not lie in rows": (lambda: mlp(w_in=lambda: tensor(768, 3072).t()), {BACKWARD}),
}


@pytest.mark.parametrize("why", MLPS)
def test_the_mlp(why):
    call, expected = MLPS[why]
    said, launched = said_and_launched(call)
    assert why in said
    assert launched & {FORWARD, BACKWARD} == expected
    assert ("gelu_fwd_kernel" in launched) != (FORWARD in launched)
    assert ("gelu_bwd_kernel" in launched) != (BACKWARD in launched)


@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_other_cards_have_none_and_hear_nothing_of_them(capability):
    for call in (qkv, mlp):
        said, launched = said_and_launched(call, capability)
        assert "Hopper" not in said and not any(name.startswith("hopper") for name in launched)


def test_another_triton_has_none(monkeypatch):
    monkeypatch.setattr(hopper.triton, "__version__", "3.8.0")
    for call in (qkv, mlp):
        said, launched = said_and_launched(call)
        assert "Triton is 3.8.0, it was compiled with 3.6.0 and 3.7.1 alone" in said
        assert not any(name.startswith("hopper") for name in launched)


def test_what_never_ran_on_a_card_serves_nothing(monkeypatch):
    monkeypatch.setattr(hopper, "RAN", dict.fromkeys(hopper.RAN, ()))
    for call in (qkv, mlp):
        said, launched = said_and_launched(call)
        assert f"it has not yet run on a card with Triton {hopper.triton.__version__}" in said
        assert not any(name.startswith("hopper") for name in launched)


def test_every_form_of_the_table_is_compiled_by_the_gate():
    """The ways hold each kernel in each dtype that a row could name."""
    from bench.gates import ways

    names = [name for name in ways.ways() if name.startswith("Hopper's")]
    for row in hopper.TABLE:
        kind = row.kernel.replace("_fwd", "").replace("bwd", "backward")
        dtype = str(row.dtype).removeprefix("torch.")
        found = [n for n in names if f"Hopper's {kind} " in n and n.endswith(dtype)]
        size = row.approximate or f"D {row.sizes[0]}" + (f", {row.block_m} queries" if row.block_m else " ")
        assert any(size in name for name in found), row
