"""fastgpt's attention under FlashAttention's name, for training scripts that call flash_attn_func(q, k, v, causal=True,
window_size=(left, 0)), as nanochat and autoresearch do; on a GPU without FlashAttention 3, and on a CPU.

In such a script the import is all that changes:

    from flash_attn_func import flash_attn_func

Their window_size counts the keys before the query, so that (left, 0) shows left + 1 keys, the query's own included;
fastgpt's window counts the keys that are seen. -1 is no window in theirs. Shapes are (B, T, H, D), and k and v may have
fewer heads than q.
"""

import torch

from fastgpt import ops


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """q (B, Tq, H, D), k and v (B, Tk, Hkv, D) -> (B, Tq, H, D). ValueError unless attention is causal."""
    left, right = window_size
    if not causal or right not in (-1, 0):
        raise ValueError(f"fastgpt's attention is causal, and causal={causal}, window_size={window_size} is not")
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # views: strides are free
    window = None if left < 0 else left + 1
    y = ops.causal_attention(q, k, v, scale=softmax_scale, dropout_p=dropout_p, window=window)
    return y.transpose(1, 2)  # in memory as FlashAttention leaves it


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (torch.randn(2, 512, heads, 64, device=device, requires_grad=True) for heads in (6, 2, 2))
    y = flash_attn_func(q, k, v, causal=True, window_size=(127, 0))  # 128 keys each
    y.sum().backward()
    heads = (t.transpose(1, 2) for t in (q, k, v))
    print(tuple(y.shape), ops.explain(ops.causal_attention, *heads, window=128))
