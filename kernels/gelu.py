"""GELU and its derivative on a tile, for the kernels that end in one (Hendrycks, Gimpel, 2016).

    gelu(z) = z sigmoid(2u),  u = √(2/π) (z + 0.044715 z³)      "tanh"
    gelu(z) = z (1 + erf(z / √2)) / 2                           "none", the exact one

1 + tanh(u) is 2 sigmoid(2u), but the sigmoid keeps its digits in the tail and does not overflow. The card's own tanh
is one instruction where exp and a reciprocal are two, but it is only good to 2**-11 absolutely: at z = -3, where
gelu is -0.004, that is an error of a sixth, and no dtype allows it.
"""

import triton
import triton.language as tl


@triton.jit
def _exp_minus_2u(z):
    return tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z))  # 2 √(2/π)


@triton.jit
def gelu(z, TANH: tl.constexpr):
    if TANH:
        return z * (1.0 / (1.0 + _exp_minus_2u(z)))
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_derivative(z, TANH: tl.constexpr):
    z = tl.where(z > 10.0, 10.0, tl.where(z < -10.0, -10.0, z))  # 1 and 0 from there on; e could overflow
    if TANH:
        e = _exp_minus_2u(z)
        s = 1.0 / (1.0 + e)
        return s + z * s * (e * s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)  # 1 - s, which cancels, is e s
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327  # 1 / √(2π)
