"""The GELU MLP: matmuls by cuBLAS, and everything between them in one elementwise pass each way.

    pre = x w_inᵀ + b_in        act = gelu(pre)        y = act w_outᵀ + b_out

    gelu(z) = z sigmoid(2u),  u = √(2/π) (z + 0.044715 z³)      "tanh"
    gelu(z) = z (1 + erf(z / √2)) / 2                           "none", the exact one

1 + tanh(u) is 2 sigmoid(2u), but the sigmoid keeps its digits in the tail and does not overflow. The forward's pass
adds b_in, writes pre in place and act beside it: 3 M F elements. The backward's pass turns dact into
dpre = dact gelu'(pre) in place and sums its columns for b_in's gradient: 3 M F elements, 4 if act is made again
(`recompute`). The derivative is taken at pre as it was rounded. Column sums are float32 partials, one row a program,
added up by torch: the same bits every time. A matmul with the GELU in its epilogue is not here before it was measured.
(Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016.)
"""

import torch
import triton
import triton.language as tl

_BLOCK_F = 128
_NUM_WARPS = 4


def _tiles(rows: int, hidden: int, multiprocessors: int | None) -> tuple[int, int]:
    """BLOCK_M, and how many programs share the rows of one block of columns. Not measured on any GPU yet."""
    if multiprocessors is None:  # the interpreter: several of each
        return 8, 2
    columns = triton.cdiv(hidden, _BLOCK_F)
    return 16, min(triton.cdiv(rows, 16), max(1, 8 * multiprocessors // columns))


@triton.jit
def _sigmoid_2u(z):
    return 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))  # 2 √(2/π)


@triton.jit
def _gelu(z, TANH: tl.constexpr):
    if TANH:
        return z * _sigmoid_2u(z)
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _gelu_derivative(z, TANH: tl.constexpr):
    z = tl.where(z > 30.0, 30.0, tl.where(z < -30.0, -30.0, z))  # 1 and 0 from there on; z² could overflow
    if TANH:
        s = _sigmoid_2u(z)
        return s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327  # 1 / √(2π)


@triton.jit
def _bias_gelu_fwd_kernel(
    pre_ptr,  # (M, F), the bias is added in place
    bias_ptr,  # (F,)
    act_ptr,  # (M, F)
    M,
    F,
    HAS_BIAS: tl.constexpr,
    TANH: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows[:, None] < M) & (cols[None, :] < F)
    places = rows[:, None] * F + cols[None, :]
    z = tl.load(pre_ptr + places, mask, 0.0).to(ACC)  # [BLOCK_M, BLOCK_F]
    if HAS_BIAS:
        rounded = (z + tl.load(bias_ptr + cols, cols < F, 0.0).to(ACC)[None, :]).to(pre_ptr.dtype.element_ty)
        tl.store(pre_ptr + places, rounded, mask)
        z = rounded.to(ACC)
    tl.store(act_ptr + places, _gelu(z, TANH).to(act_ptr.dtype.element_ty), mask)


@triton.jit
def _bias_gelu_bwd_kernel(
    dact_ptr,  # (M, F), overwritten by dpre
    pre_ptr,  # (M, F)
    act_ptr,  # (M, F), written if RECOMPUTE
    partials_ptr,  # (programs, F): column sums of dpre
    M,
    F,
    RECOMPUTE: tl.constexpr,
    TANH: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    sums = tl.zeros([BLOCK_M, BLOCK_F], ACC)
    for start in range(tl.program_id(0) * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows[:, None] < M) & (cols[None, :] < F)
        places = rows.to(tl.int64)[:, None] * F + cols[None, :]
        z = tl.load(pre_ptr + places, mask, 0.0).to(ACC)
        dz = tl.load(dact_ptr + places, mask, 0.0).to(ACC) * _gelu_derivative(z, TANH)
        sums += dz
        tl.store(dact_ptr + places, dz.to(dact_ptr.dtype.element_ty), mask)
        if RECOMPUTE:
            tl.store(act_ptr + places, _gelu(z, TANH).to(act_ptr.dtype.element_ty), mask)
    tl.store(partials_ptr + tl.program_id(0) * F + cols, tl.sum(sums, axis=0), cols < F)


def gelu_mlp_fwd(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor | None,
    w_out: torch.Tensor,
    b_out: torch.Tensor | None,
    tanh: bool,
    recompute: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (M, C), w_in (F, C), w_out (C, F) -> y (M, C), pre (M, F) and act (M, F), which is empty with recompute."""
    y, pre, act = gelu_mlp_fwd_outputs(x, w_in, b_in, w_out, b_out, tanh, recompute)
    rows, hidden = pre.shape
    torch.mm(x, w_in.t(), out=pre)
    full_act = torch.empty_like(pre) if recompute else act
    if pre.numel():
        block_m, _ = _tiles(rows, hidden, _multiprocessors(x))
        _bias_gelu_fwd_kernel[(triton.cdiv(rows, block_m), triton.cdiv(hidden, _BLOCK_F))](
            pre,
            pre if b_in is None else b_in.contiguous(),
            full_act,
            rows,
            hidden,
            HAS_BIAS=b_in is not None,
            TANH=tanh,
            ACC=_accumulator(x),
            BLOCK_M=block_m,
            BLOCK_F=_BLOCK_F,
            num_warps=_NUM_WARPS,
        )
    if b_out is None:
        torch.mm(full_act, w_out.t(), out=y)
    else:
        torch.addmm(b_out, full_act, w_out.t(), out=y)
    return y, pre, act


def gelu_mlp_fwd_outputs(x, w_in, b_in, w_out, b_out, tanh, recompute):
    """What gelu_mlp_fwd returns, so it serves as its fake too."""
    rows, hidden = x.shape[0], w_in.shape[0]
    pre = torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
    act = torch.empty((0,) if recompute else (rows, hidden), dtype=x.dtype, device=x.device)
    return torch.empty((rows, w_out.shape[0]), dtype=x.dtype, device=x.device), pre, act


def gelu_mlp_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    pre: torch.Tensor,
    act: torch.Tensor,
    tanh: bool,
    needs: list[bool],
) -> list[torch.Tensor]:
    """The gradients of x, w_in, b_in, w_out and b_out; empty where `needs` has False. act is empty with recompute."""
    grads = gelu_mlp_bwd_outputs(dy, x, w_in, w_out, pre, act, tanh, needs)
    dx, dw_in, db_in, dw_out, db_out = grads
    needs_x, needs_w_in, needs_b_in, needs_w_out, needs_b_out = needs
    if needs_b_out:
        torch.sum(dy, dim=0, out=db_out)
    recompute = act.numel() == 0 and needs_w_out
    if needs_x or needs_w_in or needs_b_in or recompute:
        rows, hidden = pre.shape
        dpre = torch.mm(dy, w_out)
        act = torch.empty_like(pre) if recompute else act
        block_m, programs = _tiles(rows, hidden, _multiprocessors(x))
        partials = torch.empty((programs, hidden), dtype=_statistics_dtype(x), device=x.device)
        if pre.numel():
            _bias_gelu_bwd_kernel[(programs, triton.cdiv(hidden, _BLOCK_F))](
                dpre,
                pre,
                act,
                partials,
                rows,
                hidden,
                RECOMPUTE=recompute,
                TANH=tanh,
                ACC=_accumulator(x),
                BLOCK_M=block_m,
                BLOCK_F=_BLOCK_F,
                num_warps=_NUM_WARPS,
            )
        else:
            partials.zero_()
        if needs_b_in:
            db_in.copy_(partials.sum(0))
        if needs_x:
            torch.mm(dpre, w_in, out=dx)
        if needs_w_in:
            torch.mm(dpre.t(), x, out=dw_in)
    if needs_w_out:
        torch.mm(dy.t(), act, out=dw_out)
    return grads


def gelu_mlp_bwd_outputs(dy, x, w_in, w_out, pre, act, tanh, needs):
    """What gelu_mlp_bwd returns, so it serves as its fake too."""
    shapes = (x.shape, w_in.shape, w_in.shape[:1], w_out.shape, w_out.shape[:1])
    return [
        torch.empty(shape if needed else (0,), dtype=x.dtype, device=x.device)
        for shape, needed in zip(shapes, needs, strict=True)
    ]


def _accumulator(x: torch.Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _statistics_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _multiprocessors(x: torch.Tensor) -> int | None:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else None
