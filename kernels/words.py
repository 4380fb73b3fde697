"""Words that the programs of one launch tell each other: 64 bits, a tag in the upper half, a payload in the lower.

A word is stored and loaded whole, so whoever finds the tag that it waits for has the payload too: a handoff is a store
and a load, with no fence, no counter and no second read (the LL protocol of NCCL, which sends flags beside the data).
Whoever needs words spins on the words themselves. Nothing is reset: tags are never used twice (token.py makes them).

A wait has an end. It can't be reached where all programs of the launch run at once and each stores its words before it
waits for those that depend on them; should it be, after TRIES looks (half a microsecond each and more: at least two
seconds) the program traps, and CUDA reports an error at the next call. Time in which another process has the card is
not counted.

ASM: the waits in PTX, each thread for its own words, with all loads of a wait in flight at once. Otherwise in plain
Triton, all threads together, by atomic operations, without that end: Triton's interpreter runs only this, and there
`sanitized(in_turns=True)` finds programs that wait for ever.
"""

import triton
import triton.language as tl

TRIES = tl.constexpr(1 << 22)


@triton.constexpr_function
def _spin(loads, outs, tag):
    """PTX: `loads` into t0…, again until all upper halves equal operand `tag`; the lower halves are the outputs."""
    lines = [*loads, *(f"mov.b64 {{${n}, f{n}}}, t{n};" for n in range(outs)), f"setp.ne.b32 p, f0, ${tag};"]
    lines += [f"setp.ne.or.b32 p, f{n}, ${tag}, p;" for n in range(1, outs)]
    lines += ["@!p bra DONE;", "add.u32 n, n, 1;", f"setp.gt.u32 q, n, {TRIES.value};", "@q trap;", "bra WAIT;"]
    registers = f".reg .pred p; .reg .pred q; .reg .u32 n; .reg .b32 f<{outs}>; .reg .b64 t<{outs}>;"
    return "\n".join(["{", registers, "mov.u32 n, 0;", "WAIT:", *lines, "DONE:", "}"])


@triton.constexpr_function
def _ptx(strides, count, pack):
    """For each of `pack` elements, `count` words from each pointer on, strides[i] bytes apart."""
    outs = len(strides) * count * pack
    loads = [
        f"ld.relaxed.gpu.global.b64 t{(i * count + j) * pack + e}, [${outs + i * pack + e} + {j * stride}];"
        for i, stride in enumerate(strides)
        for j in range(count)
        for e in range(pack)
    ]
    return _spin(loads, outs, outs + len(strides) * pack)


@triton.constexpr_function
def _ptx_of_splits(strides, count, pack):
    """The same, of which only the first so many are there as the operand after the tag says: a load of another is not
    made, and its payload is that of the first."""
    outs = len(strides) * count * pack
    tag = outs + len(strides) * pack
    loads = []
    for i, stride in enumerate(strides):
        for j in range(count):
            loads.append(f"setp.lt.s32 q, {j}, ${tag + pack};")
            for e in range(pack):
                first, n = i * count * pack + e, (i * count + j) * pack + e
                load = f"ld.relaxed.gpu.global.b64 t{n}, [${outs + i * pack + e} + {j * stride}];"
                loads += [f"mov.b64 t{n}, t{first};", f"@q {load}"] if j else [load]
    return _spin(loads, outs, tag)


@triton.constexpr_function
def _constraints(outs, pointers, numbers, pack):
    return ",".join(["=&r"] * (outs * pack) + ["l"] * (pointers * pack) + ["r"] * (numbers * pack))


@triton.constexpr_function
def _int32s(count):
    return tuple([tl.int32] * count)


@triton.constexpr_function
def _per_thread(elements, warps):
    return max(1, elements // (32 * warps))


@triton.jit
def _look(ptrs):
    return tl.atomic_or(ptrs, tl.zeros_like(ptrs.to(tl.int64)))


@triton.jit
def counted(ptr, ASM: tl.constexpr):
    """The number at ptr, which a program of this launch may raise once it has words of all that depend on it."""
    if ASM:
        text: tl.constexpr = "ld.relaxed.gpu.global.b64 $0, [$1];"
        return tl.inline_asm_elementwise(text, "=l,l", [ptr.to(tl.int64)], tl.int64, is_pure=False, pack=1)
    else:
        return _look(ptr)


@triton.jit
def await_words(ptrs, tag, N: tl.constexpr, STRIDE: tl.constexpr, NUMEL: tl.constexpr, ASM: tl.constexpr,
                WARPS: tl.constexpr):  # fmt: skip
    """The payloads, int32, of N words from each of a tensor of NUMEL pointers on, STRIDE words apart; a tuple."""
    if ASM:
        # Triton clones even impure assembly for each layout that wants its result, so that a wait came out 19 times in
        # a row. Not out of a `while`, though: this one runs once, and LLVM removes it.
        pack: tl.constexpr = _per_thread(NUMEL, WARPS)
        zero = tl.zeros_like(ptrs.to(tl.int64)).to(tl.int32)
        got = (zero,)
        for _ in tl.static_range(1, N):
            got = got + (zero,)
        again = 1
        while again != 0:
            got = tl.inline_asm_elementwise(
                _ptx((STRIDE * 8,), N, pack), _constraints(N, 1, 1, pack), [ptrs.to(tl.int64), tag],
                dtype=_int32s(N), is_pure=False, pack=pack,
            )  # fmt: skip
            again = 0
        return got
    else:
        late = 1
        while late != 0:
            others = tl.zeros_like(ptrs.to(tl.int64)).to(tl.int32)
            for n in tl.static_range(N):
                others += ((_look(ptrs + n * STRIDE) >> 32).to(tl.int32) != tag).to(tl.int32)
            late = tl.max(tl.reshape(others, [NUMEL]), axis=0)
        got = (_look(ptrs).to(tl.int32),)
        for n in tl.static_range(1, N):
            got = got + (_look(ptrs + n * STRIDE).to(tl.int32),)
        return got


@triton.jit
def await_splits(o, lse, tag, splits, S: tl.constexpr, STRIDE_O: tl.constexpr, STRIDE_LSE: tl.constexpr,
                 NUMEL: tl.constexpr, ASM: tl.constexpr, WARPS: tl.constexpr):  # fmt: skip
    """S payloads from each pointer of o on, then S of lse; those from `splits` on are split 0's."""
    if ASM:
        pack: tl.constexpr = _per_thread(NUMEL, WARPS)
        zero = tl.zeros_like(o.to(tl.int64)).to(tl.int32)
        got = (zero,)
        for _ in tl.static_range(1, 2 * S):
            got = got + (zero,)
        again = 1
        while again != 0:
            got = tl.inline_asm_elementwise(
                _ptx_of_splits((STRIDE_O * 8, STRIDE_LSE * 8), S, pack), _constraints(2 * S, 2, 2, pack),
                [o.to(tl.int64), lse.to(tl.int64), tag, splits], dtype=_int32s(2 * S), is_pure=False, pack=pack,
            )  # fmt: skip
            again = 0
        return got
    else:
        got = await_words(o, tag, 1, 1, NUMEL, False, WARPS)
        for n in tl.static_range(1, S):
            got = got + await_words(o + tl.where(n < splits, n * STRIDE_O, 0), tag, 1, 1, NUMEL, False, WARPS)
        for n in tl.static_range(S):
            got = got + await_words(lse + tl.where(n < splits, n * STRIDE_LSE, 0), tag, 1, 1, NUMEL, False, WARPS)
        return got


@triton.jit
def word(tag, payload):
    return (tag.to(tl.int64) << 32) | (payload.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def put(ptrs, words, mask, ASM: tl.constexpr):
    """Words to their places. In assembly, so that they are stored from the layout that they are in: tl.store would take
    them through shared memory first. Every lane that holds a copy stores it."""
    if ASM:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.relaxed.gpu.global.b64 [$1], $2; mov.b32 $0, 0; }", "=r,l,l,r",
            [ptrs.to(tl.int64), words, mask.to(tl.int32)], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.atomic_xchg(ptrs, words, mask)


@triton.jit
def put_numbers(ptrs, values, mask, ASM: tl.constexpr):
    """As `put`, float32 numbers that no program of this launch reads, to where float32 or bfloat16 is kept."""
    if ASM:
        bits = values.to(tl.int32, bitcast=True)
        if ptrs.dtype.element_ty == tl.float32:
            tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0; }", "=r,l,r,r",
                [ptrs.to(tl.int64), bits, mask.to(tl.int32)], tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            tl.static_assert(ptrs.dtype.element_ty == tl.bfloat16)
            tl.inline_asm_elementwise(
                "{ .reg .pred p; .reg .b16 l, h; setp.ne.b32 p, $3, 0; mov.b32 {l, h}, $2; @p st.global.b16 [$1], h; "
                "mov.b32 $0, 0; }", "=r,l,r,r",
                [ptrs.to(tl.int64), bits, mask.to(tl.int32)], tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
    else:
        tl.store(ptrs, values.to(ptrs.dtype.element_ty), mask)
