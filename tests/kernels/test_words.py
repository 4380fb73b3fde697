"""kernels/words.py in the interpreter, the plain form and the PTX: what is told arrives, whole, whoever comes first."""

import contextlib

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not to be had on this platform")

import triton
import triton.language as tl

from fastgpt.kernels import words
from fastgpt.kernels.words import await_splits, await_words, counted, put, put_numbers, word
from fastgpt.sanitizer import SanitizerError, sanitized
from tests.kernels import ptx

pytestmark = pytest.mark.interpreter
FORMS = [pytest.param(False, id="plain"), pytest.param(True, id="ptx")]
OLD, NEW = 6, -7  # tags; a tag may be any 32 bits


def in_form(asm):
    return ptx.interpreted() if asm else contextlib.nullcontext()


@triton.jit
def _told_kernel(words_ptr, out_ptr, old, tag, N: tl.constexpr, NUMEL: tl.constexpr, ASM: tl.constexpr,
                 WARPS: tl.constexpr):  # fmt: skip
    """Program 0 waits for N rows of words, which the others write, the last row first, each after those of before."""
    program, lanes = tl.program_id(0), tl.arange(0, NUMEL)
    if program == 0:
        got = await_words(words_ptr + lanes, tag, N, NUMEL, NUMEL, ASM, WARPS)
        for n in tl.static_range(N):
            tl.store(out_ptr + n * NUMEL + lanes, got[n])
    else:
        for back in tl.static_range(N):
            row = N - 1 - back
            mask = lanes % 2 == program - 1
            place, number = words_ptr + row * NUMEL + lanes, row * NUMEL + lanes
            put(place, word(lanes * 0 + old, number - 1000), mask, ASM)
            put(place, word(lanes * 0 + tag, number - 5), mask, ASM)


@pytest.mark.parametrize("asm", FORMS)
@pytest.mark.parametrize(("rows", "elements", "warps"), [(1, 32, 1), (3, 64, 1), (2, 128, 1), (3, 16, 2)])
def test_words_arrive_in_any_order(rows, elements, warps, asm):
    expected = torch.arange(rows * elements).view(rows, elements).int() - 5
    for seed in range(4):
        told, out = torch.zeros(rows, elements, dtype=torch.int64), torch.zeros(rows, elements, dtype=torch.int32)
        with sanitized(order=seed, in_turns=True), in_form(asm):
            _told_kernel[(3,)](told, out, OLD, NEW, N=rows, NUMEL=elements, ASM=asm, WARPS=warps)
        assert torch.equal(out, expected)


@triton.jit
def _splits_kernel(o_ptr, lse_ptr, out_ptr, tag, splits, S: tl.constexpr, NUMEL: tl.constexpr, ASM: tl.constexpr,
                   WARPS: tl.constexpr):  # fmt: skip
    program, lanes = tl.program_id(0), tl.arange(0, NUMEL)
    if program == S:
        got = await_splits(o_ptr + lanes, lse_ptr + lanes, tag, splits, S, NUMEL, NUMEL, NUMEL, ASM, WARPS)
        for n in tl.static_range(2 * S):
            tl.store(out_ptr + n * NUMEL + lanes, got[n])
    elif program < splits:
        at = program * NUMEL + lanes
        put(lse_ptr + at, word(lanes * 0 + tag, -at), at >= 0, ASM)
        put(o_ptr + at, word(lanes * 0 + tag, at), at >= 0, ASM)


@pytest.mark.parametrize("asm", FORMS)
@pytest.mark.parametrize("elements", [32, 64])
@pytest.mark.parametrize("splits", [1, 3, 4])
def test_splits_that_are_not_there_are_the_first(splits, elements, asm):
    """And nothing is read of them, nor waited for."""
    o, lse = torch.zeros(2, splits, elements, dtype=torch.int64).unbind()
    out = torch.zeros(8, elements, dtype=torch.int32)
    with sanitized(order=splits, in_turns=True), in_form(asm):
        _splits_kernel[(5,)](o, lse, out, NEW, splits, S=4, NUMEL=elements, ASM=asm, WARPS=1)
    at = torch.tensor([n if n < splits else 0 for n in range(4)])[:, None] * elements + torch.arange(elements)
    assert torch.equal(out, torch.cat([at, -at]).int())


def never_come(asm, in_turns):
    """Waits for 32 words of which one keeps an older tag."""
    told, out = torch.full((1, 32), NEW << 32), torch.zeros(1, 32, dtype=torch.int32)
    told[0, 7] = OLD << 32
    with sanitized(in_turns=in_turns), in_form(asm):
        _told_kernel[(1,)](told, out, OLD, NEW, N=1, NUMEL=32, ASM=asm, WARPS=1)


@pytest.mark.parametrize("asm", FORMS)
def test_a_wait_for_what_nobody_writes_is_found(asm):
    with pytest.raises(SanitizerError, match="wait for what none of them writes"):
        never_come(asm, in_turns=True)


def test_on_a_card_it_traps(monkeypatch):
    monkeypatch.setattr(words, "TRIES", tl.constexpr(20))
    with pytest.raises(triton.runtime.errors.InterpreterError, match="a wait came to its end"):
        never_come(asm=True, in_turns=False)


@triton.jit
def _numbers_kernel(wide_ptr, half_ptr, count_ptr, ASM: tl.constexpr):
    lanes = tl.arange(0, 32)
    number = counted(count_ptr, ASM)
    x = (lanes - 16 + number.to(tl.int32)).to(tl.bfloat16).to(tl.float32)
    put_numbers(wide_ptr + lanes, x, lanes % 3 == 0, ASM)
    put_numbers(half_ptr + lanes, x, lanes % 2 == 0, ASM)
    put(count_ptr + tl.arange(0, 1), number + 1 + tl.arange(0, 1), tl.arange(0, 1) == 0, ASM)


@pytest.mark.parametrize("asm", FORMS)
def test_numbers_are_stored_where_the_mask_is(asm):
    wide, half, count = torch.full((32,), 99.0), torch.full((32,), 99.0).bfloat16(), torch.tensor([2**33 + 1])
    with sanitized(), in_form(asm):
        _numbers_kernel[(1,)](wide, half, count, ASM=asm)
    lanes, x = torch.arange(32), torch.arange(32.0) - 15
    assert torch.equal(wide, torch.where(lanes % 3 == 0, x, 99.0))
    assert torch.equal(half.float(), torch.where(lanes % 2 == 0, x, 99.0))
    assert count.item() == 2**33 + 2
