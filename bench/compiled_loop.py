"""The plain way to write tokens fast with PyTorch alone: a cache of a fixed size, one step that torch.compile makes a
CUDA graph of, and a loop around it. It shares nothing with fastgpt but the weights that it is given."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.machine import Machine
from fastgpt.model import GPT


class CompiledLoop(nn.Module):
    """Greedy tokens of a GPT's weights for `rows` sequences of up to `slots` tokens. Buffers, so that a graph finds
    them where they were."""

    causal: Tensor
    cache: Tensor

    def __init__(self, model: GPT, rows: int, slots: int, machine: Machine):
        super().__init__()
        config, device = model.config, machine.device
        self.heads, self.width, self.layers, self.gelu = config.n_head, config.n_embd, config.n_layer, config.gelu
        self.weights = nn.ParameterDict(
            {name.replace(".", "_"): weight.detach() for name, weight in model.state_dict().items()}
        )
        head = "wte_weight" if model.lm_head is None else "lm_head_weight"
        self.head = self.weights[head]
        shape = config.n_layer, 2, rows, config.n_head, slots, config.n_embd // config.n_head
        self.register_buffer("cache", torch.zeros(shape, dtype=self.head.dtype, device=device))
        self.register_buffer("causal", torch.ones(slots, slots, dtype=torch.bool, device=device).tril())
        mode = dict(mode="reduce-overhead") if machine.kind == "cuda" else dict(backend=machine.compiler)
        self.step = torch.compile(self._next, fullgraph=True, dynamic=False, **mode)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}_weight"], self._bias(name))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (self.width,), self.weights[f"{name}_weight"], self._bias(name))

    def _bias(self, name: str) -> Tensor | None:
        return self.weights.get(f"{name}_bias", None)

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        """ids (B, T) at places (T,) -> the logits (B, V) after the last."""
        x = self.weights["wte_weight"][ids] + self.weights["wpe_weight"][places]
        mask = self.causal[places]
        for layer in range(self.layers):
            packed = self._linear(self._norm(x, f"h_{layer}_ln_1"), f"h_{layer}_attn_c_attn")
            q, k, v = packed.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            keys, values = self.cache[layer]
            keys.index_copy_(2, places, k)
            values.index_copy_(2, places, v)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = x + self._linear(y.transpose(1, 2).flatten(2), f"h_{layer}_attn_c_proj")
            hidden = self._linear(self._norm(x, f"h_{layer}_ln_2"), f"h_{layer}_mlp_c_fc")
            x = x + self._linear(F.gelu(hidden, approximate=self.gelu), f"h_{layer}_mlp_c_proj")
        return F.linear(self._norm(x[:, -1], "ln_f"), self.head)

    def _next(self, ids: Tensor, places: Tensor) -> Tensor:
        return self(ids, places).argmax(-1, keepdim=True)

    @torch.no_grad()
    def generate(self, ids: Tensor, new: int) -> Tensor:
        """(B, T) -> (B, T + new). The prompt's pass is not compiled: its length differs from call to call."""
        places = torch.arange(ids.shape[1], device=ids.device)
        seen = [ids, self._next(ids, places)]
        place = places[-1:] + 1
        for _ in range(new - 1):
            seen.append(self.step(seen[-1], place).clone())  # a graph writes the next one over it
            place = place + 1
        return torch.cat(seen, dim=1)
