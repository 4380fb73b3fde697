"""What is recorded as launched: with the card, its autocast and its allocator feigned, and against real launches."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from triton.runtime.jit import JITFunction

from bench.gates import compile as gate
from bench.gates import feign, record
from bench.gates.ways import ways
from fastgpt import ops
from fastgpt.kernels import layernorm
from tests import models


def launches(way, capability=90):
    found = gate.launches_of(way, capability)
    return {name: [launch for launch in found if launch.name == name] for name in {each.name for each in found}}


def test_training_with_defaults_launches_what_a_user_launched():
    """On an H100, with Triton 3.6.0, this one did not compile: halves come in and float32 goes out, with no dropout."""
    found = launches("train 124M")
    sums = {(launch.pointers["dout_ptr"], launch.pointers["dweight_ptr"]) for launch in found["run_sums_kernel"]}
    assert sums == {("bf16", "fp32")}
    assert not any(launch.constexprs["DROPOUT"] for launch in found["run_sums_kernel"])
    assert {launch.pointers["q_ptr"] for launch in found["attention_dq_kernel"]} == {"bf16"}
    assert {launch.pointers["pre_ptr"] for launch in launches("train, float16")["gelu_fwd_kernel"]} == {"fp16"}
    assert "spans_kernel" in launches("train, document masks")


def test_a_cards_capability_and_memory_choose_the_tiles():
    tiles = {}
    for capability in (86, 90, 100):
        (forward,) = launches("attention D 64 bfloat16", capability)["attention_fwd_kernel"]
        assert forward.capability == capability
        tiles[capability] = forward.constexprs["BLOCK_M"], forward.options.num_warps
    assert tiles[86] != tiles[90] == tiles[100]


def test_a_view_that_begins_between_multiples_of_16_bytes_is_another_launch():
    def norm(offset):
        x = torch.zeros(64 * 100 + 8, device="cuda", dtype=torch.bfloat16)[offset:][: 64 * 100].view(100, 64)
        ops.layer_norm(x, torch.zeros(64, device="cuda"))

    (aligned,), (same,), (odd,) = (record.launches(functools.partial(norm, offset), 90) for offset in (0, 8, 3))
    assert aligned.key == same.key != odd.key
    place = (aligned.kernel.arg_names.index("x_ptr"),)
    assert aligned.attributes[place] and not odd.attributes.get(place)


def test_launches_of_one_specialisation_are_noted_once():
    def norm(*rows):
        for count in rows:
            ops.layer_norm(torch.zeros(count, 64, device="cuda"), torch.zeros(64, device="cuda"))

    assert len(record.launches(lambda: norm(32, 48, 16, 32), 90)) == 1
    assert len(record.launches(lambda: norm(32, 33, 1), 90)) == 3  # a multiple of 16, none, and a constant


def test_tensors_in_memory_are_noted_as_feigned_ones_are():
    """As on a real card, whose launches go the same way, but for the memory that its allocator gives."""

    def norm(device):
        x, weight = torch.zeros(100, 64, device=device), torch.zeros(64, device=device)
        layernorm.layer_norm_fwd(x, None, weight, None, None, None, 1e-5, 0.0, x.dtype)

    with record.noted(90) as real:
        norm("cpu")
    (feigned,) = record.launches(lambda: norm("cuda"), 90)
    assert [launch.key for launch in real] == [feigned.key]


def test_a_feigned_card_casts_as_its_autocast_does():
    with feign.card(90):
        x = torch.randn(8, 16, device="cuda")
        linear, norm = torch.nn.Linear(16, 16).to("cuda"), torch.nn.LayerNorm(16).to("cuda")
        assert x.is_cuda and x.device == torch.device("cuda", 0) and type(x) is torch.Tensor
        assert type(linear.weight) is torch.nn.Parameter and linear.weight.is_cuda
        assert linear(x).dtype == torch.float32
        with torch.autocast("cuda", torch.float16):
            y = linear(x)
            dtypes = [t.dtype for t in (y, norm(y), y.pow(3), y.softmax(-1), y + y, F.gelu(y), y @ y.t())]
            wide = linear.double()(x.double())
        half, full = torch.float16, torch.float32
        assert dtypes == [half, full, full, full, half, half, half] and wide.dtype == torch.float64
        norm(y).sum().backward()
        assert norm.weight.grad.is_cuda and norm.weight.grad.shape == (16,)
    assert not torch.zeros(1).is_cuda and torch.zeros(1).device == torch.device("cpu")
    assert torch.zeros(1, device="meta").device == torch.device("meta")


def test_a_feigned_card_knows_shapes_and_strides_and_tells_the_host_zeros():
    with feign.card(80):
        assert torch.cuda.get_device_capability() == (8, 0)
        x = torch.ones(2, 3, device="cuda")
        assert x.t().stride() == (1, 3) and x[:, 1:].storage_offset() == 1 and x.t().contiguous().stride() == (2, 1)
        assert x.sum().item() == 0.0 and x.tolist() == [[0.0] * 3] * 2 and not x.any()
        y = torch.zeros(2, 3)
        assert not y.is_cuda and y.add_(1).sum().item() == 6  # a CPU's tensors are what they are
        assert x.cpu().shape == (2, 3) and not x.cpu().is_cuda and y.to("cuda").is_cuda
        buffer = torch.zeros(4, 5, device="cuda")
        torch.mm(x, torch.ones(3, 5, device="cuda"), out=buffer[:2])
        assert buffer.is_cuda and buffer[:2].mul_(2)._base is buffer


def test_a_feigned_card_adds_products_of_halves_in_float32():
    """By itself: PyTorch 2.11 asks a decomposition, which takes out_dtype for a factor."""
    library = torch.library.Library("aten", "IMPL")

    def as_in_2_11(total, a, b, beta=1, alpha=1, *, out_dtype=None, out=None):
        return beta * total

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden
        for overload in ("dtype", "dtype_out"):
            library.impl(f"addmm.{overload}", as_in_2_11, "Meta")
    try:
        with feign.card(90):
            a, b = (torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for shape in ((4, 8), (8, 6)))
            total = torch.zeros(4, 6, device="cuda")
            assert torch.addmm(total, a, b, out_dtype=torch.float32, out=total) is total
            made = torch.addmm(total, a, b, out_dtype=torch.float32)
            assert made.is_cuda and made.dtype == torch.float32 and made.shape == (4, 6)
            with pytest.raises(RuntimeError, match=r"out is torch.bfloat16 of \(4, 6\), not torch.float32 of \(4, 6\)"):
                torch.addmm(total, a, b, out_dtype=torch.float32, out=total.bfloat16())
            with pytest.raises(RuntimeError):
                torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    finally:
        library._destroy()


def test_families_launch_the_head_where_their_loss_is_asked_for():
    models.book_package("ch04")
    for family in ("Hugging Face", "nanoGPT"):
        assert "cross_entropy_kernel" not in launches(f"{family}, autocast")
        assert "cross_entropy_kernel" in launches(f"{family}, loss=True, autocast")
    plain = launches("the book, bfloat16")
    assert {launch.pointers["q_ptr"] for launch in plain["attention_dkdv_kernel"]} == {"bf16"}
    assert "decode_kernel" in launches("generate 1, the book") and "linear_kernel" in launches("generate 4, bfloat16")
    assert "linear_kernel" not in launches("generate 64, bfloat16")
    assert "greedy_kernel" not in launches("generate 1, sampled")


@pytest.mark.slow
def test_every_way_launches_something_in_ieee_arithmetic():
    models.book_package("ch04")
    found = list(gate.recorded(90))
    names = {name for name, _ in found}
    assert len(found) > 300 and "train 124M" in names
    for family in ("Hugging Face", "nanoGPT", "the book"):  # what they launch beyond what was launched before
        assert any(family in name for name in names), family
    precisions = {launch.constexprs["PRECISION"] for _, launch in found if "PRECISION" in launch.constexprs}
    assert precisions == {"ieee"}
    kernels = {launch.name for _, launch in found}
    norms = {f"layer_norm_{kind}_kernel" for kind in ("fwd", "bwd", "sums")}
    gelu = {f"gelu_{kind}_kernel" for kind in ("fwd", "bwd")}
    heads = {f"attention_{kind}_kernel" for kind in ("fwd", "dq", "dkdv")}
    heads |= {"poison_kernel", "spans_kernel", "decode_kernel", "merge_kernel"}
    steps = {"linear_kernel", "append_kernel", "greedy_kernel"}
    lookups = {"embedding_fwd_kernel", "run_sums_kernel", "join_runs_kernel"}
    assert kernels >= norms | heads | gelu | lookups | steps | {"cross_entropy_kernel"}


@pytest.mark.parametrize("name", [name for name in ways() if name.startswith("Hopper's") and "bfloat16" in name])
def test_what_gluon_compiled_before_is_noted_again_and_not_launched(name, monkeypatch):
    """As the test below does it on a card, where the tests before have launched the kernel: Gluon's launcher keeps what
    it compiled, and would launch it with the feigned card's tensors, which have no memory."""
    hopper = pytest.importorskip("fastgpt.ops.hopper")
    if not hopper.has_a_known_triton():
        pytest.skip("this Triton's Gluon is not known")
    launched = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args: launched.append(args)

    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **kwargs: Compiled())
    way = ways()[name]
    with feign.card(90):
        way.run(None)
        way.run(None)
    assert launched, "the second time it is launched past Triton"
    launched.clear()
    with record.noted(90, really=True) as real, feign.card(90):
        way.run(None)
    feigned = record.launches(functools.partial(way.run, None), 90)
    assert {(each.name, each.key) for each in real} == {(each.name, each.key) for each in feigned} != set()
    assert not launched
    with feign.card(90):
        way.run(None)
    assert launched, "and so it is again when nothing is noted any more"


def launched_past_triton(name, monkeypatch):
    """How often, in the second run of a way; held to what Triton was asked in the first one, by place."""
    past = []

    class Compiled:
        def __init__(self, kernel, asked):
            self.kernel, self.asked = kernel, asked

        def __getitem__(self, grid):
            assert len(grid) >= 3
            return self.launch

        def launch(self, *args):
            past.append(self.kernel.__name__)
            for label, given, asked in zip(self.kernel.signature.parameters, args, self.asked, strict=True):
                assert type(given) is type(asked), (self.kernel.__name__, label)
                if isinstance(given, torch.Tensor):
                    assert given.dtype == asked.dtype, (self.kernel.__name__, label)
                elif not isinstance(given, float):
                    assert given == asked, (self.kernel.__name__, label)

    def run(kernel, *args, grid, warmup, **named):
        asked = kernel.signature.bind(*args, **{k: v for k, v in named.items() if k in kernel.signature.parameters})
        asked.apply_defaults()
        return None if kernel.is_gluon() else Compiled(kernel, [*asked.arguments.values()])

    if "the book" in name:
        models.book_package("ch04")
    way = ways()[name]
    prepared = way.prepare()
    monkeypatch.setattr(JITFunction, "run", run)
    with record.afresh(), feign.card(90):
        for _ in range(2):
            way.run(prepared)
    return len(past)


@pytest.mark.parametrize("name", ["train 124M", "train, fp8 all", "generate 64, sampled"])
def test_what_goes_past_triton_is_what_triton_was_asked_for(name, monkeypatch):
    assert launched_past_triton(name, monkeypatch) > 10


@pytest.mark.slow
def test_whatever_goes_past_triton_is_what_triton_was_asked_for(monkeypatch):
    for name in ways():
        with monkeypatch.context() as patched:
            found = launched_past_triton(name, patched)
        assert found or name.startswith("Hopper's"), name


@pytest.mark.gpu
@pytest.mark.parametrize("name", ways())
def test_a_card_launches_what_was_recorded(name):
    """Dtypes, divisibility, constants and options of each launch, as Triton's own key says them."""
    major, minor = torch.cuda.get_device_capability()
    capability = 10 * major + minor
    if capability not in feign.CARDS:
        pytest.skip(f"compute capability {major}.{minor} is none that is recorded for")
    if "the book" in name:
        models.book_package("ch04")
    way = ways()[name]
    prepared = way.prepare()
    with record.noted(capability, really=True) as real:
        way.run(prepared)
    torch.cuda.synchronize()
    feigned = record.launches(functools.partial(way.run, prepared), capability)
    assert {(each.name, each.key) for each in real} == {(each.name, each.key) for each in feigned}
