"""What takes the place of Hugging Face's GPT-2: of its model, block and attention, and of its loss."""

import functools
import inspect
import sys
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops, private
from fastgpt.families.gpt2 import SPECIAL, key_mask, special
from fastgpt.modules import (
    Swap,
    class_forward,
    dropout_p,
    free_linear,
    linear_weight,
    own_type,
    packed_projection,
    plain,
    swap_of,
    width_of,
    works,
)
from fastgpt.swap.stream import Stream

REPLACED = ("sdpa", "fastgpt")  # implementations that attention stands in for: the others were chosen for a reason


# Of a subclass that has a forward of its own, calls with nothing but these are understood.
_KNOWN = {
    *("past_key_values", "cache_position", "attention_mask", "use_cache", "position_ids", "is_causal"),
    *("encoder_attention_mask", "output_hidden_states", "num_items_in_batch"),
    *("fastgpt_key_mask", "fastgpt_stream", "fastgpt_forgets", *SPECIAL),
}


def recognise(module: Any) -> Swap | str | None:
    children = private.children(module)
    if {"ln_1", "attn", "ln_2", "mlp"} <= children.keys() and hasattr(children["attn"], "num_heads"):
        parameters = tuple(inspect.signature(own_type(module).forward).parameters)[1:]
        width = width_of(children["ln_1"])
        if width is None:
            return "its ln_1 has no weight"
        return Swap(block, "layer_norm", "the first residual add inside ln_2", parameters, width)
    if {"c_attn", "c_proj"} <= children.keys() and all(
        isinstance(getattr(module, name, None), int) for name in ("num_heads", "embed_dim")
    ):
        if "q_attn" in children or getattr(module, "is_cross_attention", False):
            return "it is cross-attention"
        return Swap(attention, "attention", "causal_attention_qkv", width=module.embed_dim)
    theirs: Any = sys.modules.get("transformers.models.gpt2.modeling_gpt2")
    if theirs is not None and own_type(module).forward is theirs.GPT2Model.forward:
        return Swap(model, "model", "padding masks as (B, T), residual adds inside the next block's ln_1")
    if theirs is not None and own_type(module).forward is theirs.GPT2LMHeadModel.forward:
        parameters = tuple(inspect.signature(theirs.GPT2LMHeadModel.forward).parameters)[1:]
        return Swap(language_model, "loss", "linear_cross_entropy in training", parameters)
    return None


# GPT2Model: what its blocks see is a (B, 1, T, T) mask, which no longer says that it is causal and padding alone; and
# each block's sum.


def model(module: Any, swap: Swap, *args, **kwargs):
    names = ("input_ids", "past_key_values", "attention_mask")
    mask = {**dict(zip(names, args, strict=False)), **kwargs}.get("attention_mask")
    padding = isinstance(mask, Tensor) and mask.dim() == 2 and getattr(module.config, "is_causal", True)
    if padding and all(_takes_ours(block) and _takes_ours(getattr(block, "attn", None)) for block in module.h):
        kwargs["fastgpt_key_mask"] = mask != 0
    if _only_blocks_see(module, kwargs):
        kwargs["fastgpt_stream"] = Stream(last=module.h[-1])
    return class_forward(module, *args, **kwargs)


def _only_blocks_see(module: Any, call: dict) -> bool:
    """Whether what a block hands on is seen by the next block alone, and all blocks are ours."""
    asked = ("output_hidden_states", "output_attentions", "add_cross_attention")
    if any(call.get(name) or getattr(module.config, name, False) for name in asked):
        return False
    if module.training and getattr(module, "gradient_checkpointing", False):
        return False
    swap, weight = module.__dict__.get("fastgpt_swap"), module.wte.weight
    if swap is None or swap.function is not model:
        return False
    return len(module.h) > 0 and all(works(each, block, weight) and _is_theirs(each) for each in module.h)


def _is_theirs(module: Any) -> bool:
    """Whether the class's forward is transformers' own, whose arguments are known, and not a subclass's."""
    return own_type(module).forward.__module__.startswith("transformers.")


_COVERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # torch.compile's, and distributed ones'


def _takes_ours(module: Any) -> bool:
    """Whether a call of the module with one named argument more, fastgpt_key_mask, is no error."""
    while (inside := next((getattr(module, name) for name in _COVERS if hasattr(module, name)), None)) is not None:
        module = inside
    return module is not None and _takes_any(own_type(module))


@functools.cache
def _takes_any(kind: type[nn.Module]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(kind.forward).parameters.values())


def _covered(attn: Any, x: Tensor, call: dict) -> bool:
    config, past, mask = attn.config, call.get("past_key_values"), call.get("attention_mask")
    if config._attn_implementation not in REPLACED or not getattr(config, "is_causal", True):
        return False
    if not getattr(attn, "is_causal", True):
        return False
    if special(call) or not (_is_theirs(attn) or call.keys() <= _KNOWN):
        return False
    if x.dim() != 3 or not plain(x) or hasattr(past, "self_attention_cache"):
        return False
    keys = x.shape[1] if mask is None else mask.shape[-1]
    return key_mask(x.shape[1], keys, mask, call.get("fastgpt_key_mask"))[0]


def _heads(attn: Any, swap: Swap, x: Tensor, call: dict) -> Tensor | None:
    """The heads' result, merged, before c_proj: (B, T, C) -> (B, T, C); None, and no cache touched, if not covered."""
    if not _covered(attn, x, call):
        return None
    batch, time, _ = x.shape
    past, mask, padding = (call.get(name) for name in ("past_key_values", "attention_mask", "fastgpt_key_mask"))
    if call.get("fastgpt_forgets"):
        past = None
    options: dict = dict(
        scale=getattr(attn, "scaling", None),  # older ones' sdpa knew no scale but the default
        dropout_p=attn.attn_dropout.p if attn.training else 0.0,
        backend=swap.backend,
    )
    keys, bias = time, None
    if past is None:
        qkv, bias = packed_projection(attn.c_attn, x, swap.backend)
    else:  # what the cache keeps may have a derivative too
        qkv = attn.c_attn(x)
        q, k, v = qkv.view(batch, time, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        position = call.get("cache_position")
        more = () if position is None else ({"cache_position": position},)
        k, v = past.update(k, v, attn.layer_idx, *more)
        keys = k.shape[2]
    known, seen = key_mask(time, keys if mask is not None else time, mask, padding)
    if not known:
        given = tuple(call["attention_mask"].shape)
        raise ValueError(f"attention_mask is {given}, and the cache now holds {keys} keys")
    seen = None if seen is None else seen.expand(batch, -1)
    # transformers keeps a cache in training too, unless told not to: its first pass holds what qkv does
    if past is None or (keys == time and type(past).__name__ == "DynamicCache"):
        return ops.causal_attention_qkv(qkv, attn.num_heads, key_mask=seen, qkv_bias=bias, **options)
    if mask is None and 1 < time < keys:  # transformers' word for the first pass over a static cache
        k, v = k[:, :, :time], v[:, :, :time]
    y = ops.causal_attention(q, k, v, key_mask=seen, **options)
    return y.transpose(1, 2).reshape(batch, time, -1)


def attention(attn: Any, swap: Swap, *args, **kwargs):
    y = _heads(attn, swap, args[0], kwargs) if len(args) == 1 else None
    if y is None:
        return class_forward(attn, *args, **kwargs)
    return attn.resid_dropout(attn.c_proj(y)), None


def block(block: Any, swap: Swap, *args, **kwargs):
    call = {**dict(zip(swap.names, args, strict=False)), **kwargs}
    x, stream = call.pop("hidden_states", None), call.pop("fastgpt_stream", None)
    checkpointed = block.training and getattr(block, "gradient_checkpointing", False)
    understood = x is not None and (_is_theirs(block) or call.keys() <= _KNOWN)
    if not understood or call.get("encoder_hidden_states") is not None or checkpointed:
        if stream is not None:
            raise RuntimeError("a GPT2Block was given fastgpt's stream, and changed since")
        return class_forward(block, *args, **kwargs)  # it knows how, and calls our children
    if stream is None:
        stream = Stream(x, last=block)
    elif stream.x is None:
        stream.x = x
    attn = block.attn
    inner, y = swap_of(attn), None
    ours = inner is not None and inner.function is attention
    normed = stream.normed(block.ln_1, casts=ours)
    p = dropout_p(attn.resid_dropout)
    if inner is not None and ours and p is not None and free_linear(attn.c_proj):
        y = _heads(attn, inner, normed, call)
    if y is None:
        call.pop("encoder_attention_mask", None)
        call.pop("encoder_hidden_states", None)
        stream.add(attn(normed, **call)[0])
    else:
        stream.add(F.linear(y, linear_weight(attn.c_proj)), attn.c_proj.bias, p or 0.0)
    stream.add_mlp(block.mlp, block.ln_2, 0.0, waits=block is not stream.last)
    return stream.total() if block is stream.last else stream.x  # which is less than the sum: the next block knows


def _has_their_loss(module: Any) -> bool:
    """Whether its loss is transformers' own of causal models. Their property `loss_function` would log, which
    torch.compile can't take into a graph: what it returns is looked up."""
    losses = sys.modules["transformers.loss.loss_utils"]
    if own_type(module).loss_function is not sys.modules["transformers.modeling_utils"].PreTrainedModel.loss_function:
        return module.loss_function is losses.ForCausalLMLoss
    theirs = losses.LOSS_MAPPING.get(getattr(module, "loss_type", None), losses.ForCausalLMLoss)
    return getattr(module, "_loss_function", theirs) is losses.ForCausalLMLoss


def language_model(module: Any, swap: Swap, *args, **kwargs):
    """GPT2LMHeadModel's forward; in training, with labels, it returns no logits, and no cache that is not asked for."""
    call = {**dict(zip(swap.names, args, strict=False)), **kwargs}
    labels, head = call.pop("labels", None), module.lm_head
    if (
        not (module.training and isinstance(labels, Tensor) and free_linear(head) and head.bias is None)
        or not _has_their_loss(module)
        or isinstance(call.get("logits_to_keep", 0), Tensor)
        or call.pop("logits_to_keep", 0) != 0
    ):
        return class_forward(module, *args, **kwargs)
    return_dict = call.pop("return_dict", None)
    count, ignored = call.pop("num_items_in_batch", None), call.pop("ignore_index", -100)
    targets = call.pop("shift_labels", None)
    forgets = call.get("use_cache") is None and call.get("past_key_values") is None
    if forgets and _only_blocks_see(module.transformer, call):
        # a config's default keeps keys and values of every layer; with use_cache=False transformers would look, and
        # wait, for packed sequences
        call["fastgpt_forgets"] = True
    outputs = module.transformer(**call)
    x = outputs.last_hidden_state
    if targets is None:  # token t predicts token t + 1, and the last one nothing
        targets = F.pad(labels[:, 1:], (0, 1), value=ignored)
    loss = ops.linear_cross_entropy(
        x,
        head.weight,
        targets.to(x.device),
        ignore_index=ignored,
        reduction="mean" if count is None else "sum",
        backend=swap.backend,
    )
    if count is not None:
        loss = loss / (count.to(loss.device) if isinstance(count, Tensor) else count)
    gone = ("last_hidden_state", "past_key_values") if forgets else ("last_hidden_state",)
    kept = {name: value for name, value in outputs.items() if name not in gone}
    result = sys.modules["transformers.models.gpt2.modeling_gpt2"].CausalLMOutputWithCrossAttentions(loss=loss, **kept)
    if return_dict is False or (return_dict is None and not getattr(module.config, "return_dict", True)):
        return result.to_tuple()
    return result
