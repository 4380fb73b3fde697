"""kernels/few_rows.py and decode.append against float64: a linear layer over few rows, its norm and its GELU."""

import pytest
import torch
import torch.nn.functional as F

from fastgpt.ops import reference
from fastgpt.testing import assert_accurate

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

from fastgpt.kernels import few_rows
from fastgpt.ops import autograd, decoding_steps

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


def draw(*shape, dtype, device, scale=1.0):
    return (torch.randn(shape) * scale).to(device, dtype)


def composed(x, branch, branch_bias, norm_weight, norm_bias, w, b, gelu):
    """The functions that it stands for."""
    stream = x if branch is None else x + branch + (0 if branch_bias is None else branch_bias)
    n = stream if norm_weight is None else reference.layer_norm(stream, norm_weight, norm_bias, EPS)
    y = reference.linear(n.to(w.dtype), w, b)
    return (reference.gelu(y, gelu) if gelu else y), stream


@pytest.mark.parametrize("rows", [1, 2, few_rows.MAX_ROWS])
@pytest.mark.parametrize(("channels", "units"), [(1, 1), (48, 144), (65, 3), (768, 20), (2100, 9)])
def test_a_linear_layer(rows, channels, units, device):
    for dtype in DTYPES:
        x, w = draw(rows, channels, dtype=dtype, device=device), draw(units, channels, dtype=dtype, device=device)
        for b in (None, draw(units, dtype=dtype, device=device)):
            got = autograd.few_linear(x, w, b)
            wide = [None if t is None else t.double() for t in (x, w, b)]
            size = wide[0].abs() @ wide[1].abs().T + (0 if b is None else wide[2].abs())
            assert_accurate(got, F.linear(*wide), F.linear(x, w, b), size)


@pytest.mark.parametrize("outputs", [3, 16, 50, 201])
@pytest.mark.parametrize("shape", [(5,), (7, 2)])
def test_a_head_of_any_number_of_outputs(outputs, shape, device):
    """In rows that begin at multiples of 64 outputs, where cuBLAS has fast products for odd numbers of them."""
    for bias in (None, draw(outputs, dtype=torch.float32, device=device)):
        linear = torch.nn.Linear(32, outputs, device=device)
        linear.bias = None if bias is None else torch.nn.Parameter(bias)
        steps, x = decoding_steps("triton", linear.weight), draw(*shape, 32, dtype=torch.float32, device=device)
        with torch.no_grad():
            found = steps.head(x, linear)
            torch.testing.assert_close(found, linear(x))
        assert bias is not None or outputs < 8 or found.stride(-2) * found.element_size() % 16 == 0


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("gelu", ["", "tanh", "none"])
@pytest.mark.parametrize("left_out", [(), ("branch", "branch_bias"), ("branch_bias",), ("norm_bias", "b")])
def test_a_norm_before_and_a_gelu_after(rows, gelu, left_out, device):
    for dtype in DTYPES:
        given = dict(
            x=draw(rows, 48, dtype=dtype, device=device),
            branch=draw(rows, 48, dtype=dtype, device=device),
            branch_bias=draw(48, dtype=dtype, device=device),
            norm_weight=draw(48, dtype=dtype, device=device),
            norm_bias=draw(48, dtype=dtype, device=device),
            w=draw(37, 48, dtype=dtype, device=device, scale=0.2),
            b=draw(37, dtype=dtype, device=device),
        )
        given |= dict.fromkeys(left_out)
        y, stream = autograd.few_norm_linear(
            *(given[name] for name in ("x", "branch", "branch_bias", "norm_weight", "norm_bias")),
            EPS,
            given["w"],
            given["b"],
            gelu,
        )
        wide = {name: None if t is None else t.double() for name, t in given.items()}
        exact, theirs = composed(**wide, gelu=gelu), composed(**given, gelu=gelu)
        size = exact[1].abs() + sum(t.abs() for t in (wide["x"], wide["branch"], wide["branch_bias"]) if t is not None)
        assert_accurate(stream, exact[1], theirs[1], size, name="stream")
        size = composed(**wide, gelu="")[0].abs() + wide["w"].abs().sum(1) * 2
        assert_accurate(y, exact[0], theirs[0], size, logit_max=8.0, name="y")


def test_the_stream_may_be_wider(device):
    x, branch = draw(2, 16, dtype=torch.float32, device=device), draw(2, 16, dtype=torch.bfloat16, device=device)
    w = draw(5, 16, dtype=torch.bfloat16, device=device)
    weight = draw(16, dtype=torch.float32, device=device)
    y, stream = autograd.few_norm_linear(x, branch, None, weight, None, EPS, w, None, "")
    assert y.dtype == torch.bfloat16 and stream.dtype == torch.float32
    assert torch.equal(stream, x + branch)


def test_the_norm_sees_the_stream_as_it_is_written(device):
    """A stream of 256 and roundoffs of it, in bfloat16: rounded before it is normalised, as add_layer_norm's is."""
    x = torch.full((1, 16), 256.0, device=device).bfloat16()
    branch = torch.linspace(-0.9, 0.9, 16, device=device).bfloat16()[None]
    w, weight = torch.eye(16, device=device).bfloat16(), torch.ones(16, device=device).bfloat16()
    y, stream = autograd.few_norm_linear(x, branch, None, weight, None, EPS, w, None, "")
    expected, _ = composed(stream.double(), None, None, weight.double(), None, w.double(), None, "")
    assert_accurate(y, expected, expected.bfloat16().to(y.dtype), torch.ones_like(expected))


def test_what_fits(device):
    w = torch.empty(6, 8, device=device)
    assert few_rows.fits(1, w) and few_rows.fits(few_rows.MAX_ROWS, w)
    assert not few_rows.fits(few_rows.MAX_ROWS + 1, w) and not few_rows.fits(0, w) and not few_rows.fits(1, w.t())


@pytest.mark.parametrize("steps", [1, 3])
def test_new_keys_and_values_go_to_their_slots_and_nowhere_else(steps, device):
    """Rows of different lengths, one past the end of the cache; the caches are views with other heads between."""
    lengths = torch.tensor([steps, 5, 9, 12], device=device)
    qkv = torch.randn(4, steps, 3 * 3 * 5, device=device)
    whole = torch.zeros(2, 4, 4, 9, 5, device=device)
    k, v = whole[0, :, :3], whole[1, :, 1:]
    expected = whole.clone()
    for row, length in enumerate(lengths.tolist()):
        for step in range(steps):
            place = length - steps + step
            if place < 9:
                _, new_k, new_v = qkv[row, step].view(3, 3, 5)
                expected[0, row, :3, place], expected[1, row, 1:, place] = new_k, new_v
    autograd.append_to_cache(qkv, k, v, lengths)
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("vocab", [1, 50, 20011])
def test_the_likeliest_token_is_written_down(vocab, device):
    """The first of equal ones, at each row's length; rows that are not finite are told, and go on."""
    logits = torch.randn(5, vocab + 3, device=device)[:, :vocab]
    logits[0] = 2.0
    for row, value in ((2, float("nan")), (3, float("-inf")), (4, float("inf"))):
        logits[row, vocab // 2] = value
    history, lengths = torch.zeros(5, 9, dtype=torch.int64, device=device), torch.arange(5, device=device)
    news, last = torch.full((5, 3), 7, dtype=torch.int64, device=device), torch.full((5, 1), 7, device=device)
    expected = logits.argmax(-1)
    expected[0] = 0
    autograd.take_likeliest(logits, history, lengths, news, last)
    assert lengths.tolist() == [1, 2, 3, 4, 5]
    told = [*expected[:2].tolist(), -1, -1, -1]
    assert news.tolist() == [[told[row] if place == row % 3 else 7 for place in range(3)] for row in range(5)]
    assert last.tolist() == [[each] for each in [*expected[:2].tolist(), 0, 0, 0]]
    assert [history[row, row].item() for row in range(5)] == [*expected[:2].tolist(), 0, 0, 0]
    assert history.count_nonzero() <= 2


def test_the_likeliest_of_logits_of_16_bits(device):
    """In rows that lie apart, as the head's product gives them: of equal ones the first."""
    logits = torch.randn(3, 320, device=device).to(torch.bfloat16)[:, :301]
    history, lengths = torch.zeros(3, 9, dtype=torch.int64, device=device), torch.arange(3, device=device)
    news, last = (
        torch.zeros(3, 1, dtype=torch.int64, device=device),
        torch.zeros(3, 1, dtype=torch.int64, device=device),
    )
    autograd.take_likeliest(logits, history, lengths, news, last)
    wide = logits.float()
    assert last.tolist() == news.tolist() == [[row.eq(row.max()).nonzero()[0].item()] for row in wide]
