"""Counter-based random numbers for dropout: the same mask on either backend, from a seed and a position alone.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a 64-bit key and a
128-bit counter to four random 32-bit words. Here the key is the seed and the counter is (col // 4, row, plane, site):
`plane` is b * H + h in attention and 0 elsewhere, `site` tells fastgpt's dropouts apart. Element `col` takes word
col % 4, and is kept where its word >= threshold = floor(p * 2**32). `fastgpt.ops.pytorch.dropout_mask` is the twin.
"""

import triton
import triton.language as tl


@triton.jit
def keep_mask(seed, rows, first_col, plane, site, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """True where dropout keeps the element: rows [BLOCK_M] by the BLOCK_N columns from first_col, a multiple of 4."""
    groups = first_col // 4 + tl.arange(0, BLOCK_N // 4)
    zeros = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, zeros + groups[None, :], zeros + rows[:, None], zeros + plane, zeros + site)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # [BLOCK_M, BLOCK_N], in the columns' order
    return words.to(tl.uint32, bitcast=True).to(tl.int64) >= threshold  # int64: p = 1 gives a threshold of 2**32
