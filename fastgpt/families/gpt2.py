"""Hugging Face's GPT-2: its model, block, attention and loss, and its weights by fastgpt's names.

Their door for attention functions is in huggingface.py.
"""

import functools
import inspect
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.families import (
    Swap,
    add_then_norm,
    class_forward,
    dropout_p,
    free_linear,
    linear_weight,
    own_type,
    plain,
    swap_of,
    width_of,
)
from fastgpt.families.anatomy import Anatomy, transformer_anatomy

REPLACED = ("sdpa", "fastgpt")  # implementations that attention stands in for: the others were chosen for a reason
# What may come with a call and asks for more than masked attention.
_SPECIAL = (
    *("encoder_hidden_states", "head_mask", "position_bias", "cache", "softcap", "output_attentions"),
    *("layer_past", "past_key_value"),  # names of the cache in older versions
)


# Of a subclass that has a forward of its own, calls with nothing but these are understood.
_KNOWN = {
    *("past_key_values", "cache_position", "attention_mask", "use_cache", "position_ids", "is_causal"),
    *("encoder_attention_mask", "fastgpt_key_mask", "output_hidden_states", "num_items_in_batch", *_SPECIAL),
}


def special(call: dict) -> bool:
    """Whether a call of attention, by its named arguments, asks for more than causal attention with a mask."""
    asked = any(call.get(name) is not None and call[name] is not False for name in _SPECIAL)
    return asked or call.get("is_causal") is False


def recognise(module: Any) -> Swap | str | None:
    children = module._modules
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
        return Swap(model, "model", "padding masks reach attention as (B, T)")
    if theirs is not None and own_type(module).forward is theirs.GPT2LMHeadModel.forward:
        parameters = tuple(inspect.signature(theirs.GPT2LMHeadModel.forward).parameters)[1:]
        return Swap(language_model, "loss", "linear_cross_entropy in training", parameters)
    return None


# GPT2Model: what its blocks see is a (B, 1, T, T) mask, which no longer says that it is causal and padding alone.


def model(module: Any, swap: Swap, *args, **kwargs):
    names = ("input_ids", "past_key_values", "attention_mask")
    mask = {**dict(zip(names, args, strict=False)), **kwargs}.get("attention_mask")
    padding = isinstance(mask, Tensor) and mask.dim() == 2 and getattr(module.config, "is_causal", True)
    if padding and all(_takes_ours(block) and _takes_ours(getattr(block, "attn", None)) for block in module.h):
        kwargs["fastgpt_key_mask"] = mask != 0
    return class_forward(module, *args, **kwargs)


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


def key_mask(queries: int, keys: int, mask: Tensor | None, padding: Tensor | None):
    """(whether causal attention and a key mask (B, keys) say all that `mask` says, and that key mask)."""
    if mask is None:
        return True, None
    if mask.dim() == 2:  # from huggingface.py
        return mask.shape[1] == keys, mask
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] != keys:
        return False, None
    if queries == 1:
        return True, mask[:, 0, 0]
    return padding is not None and padding.shape == (mask.shape[0], keys), padding


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
    options: dict = dict(
        scale=getattr(attn, "scaling", None),  # older ones' sdpa knew no scale but the default
        dropout_p=attn.attn_dropout.p if attn.training else 0.0,
        backend=swap.backend,
    )
    qkv, keys = attn.c_attn(x), time
    if past is not None:
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
        return ops.causal_attention_qkv(qkv, attn.num_heads, key_mask=seen, **options)
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
    x = call.pop("hidden_states", None)
    checkpointed = block.training and getattr(block, "gradient_checkpointing", False)
    understood = x is not None and (_is_theirs(block) or call.keys() <= _KNOWN)
    if not understood or call.get("encoder_hidden_states") is not None or checkpointed:
        return class_forward(block, *args, **kwargs)  # it knows how, and calls our children
    normed, attn = block.ln_1(x), block.attn
    inner, y = swap_of(attn), None
    p = dropout_p(attn.resid_dropout)
    if inner is not None and inner.function is attention and p is not None and free_linear(attn.c_proj):
        y = _heads(attn, inner, normed, call)
    if y is None:
        call.pop("encoder_attention_mask", None)
        call.pop("encoder_hidden_states", None)
        normed, x = add_then_norm(attn(normed, **call)[0], x, block.ln_2, None, 0.0)
    else:
        branch = F.linear(y, linear_weight(attn.c_proj))
        normed, x = add_then_norm(branch, x, block.ln_2, attn.c_proj.bias, p or 0.0)
    return x + block.mlp(normed)


def language_model(module: Any, swap: Swap, *args, **kwargs):
    """GPT2LMHeadModel's forward; in training, with labels, it returns no logits."""
    call = {**dict(zip(swap.names, args, strict=False)), **kwargs}
    labels, head = call.pop("labels", None), module.lm_head
    losses = sys.modules["transformers.loss.loss_utils"]
    if (
        not (module.training and isinstance(labels, Tensor) and free_linear(head) and head.bias is None)
        or module.loss_function is not losses.ForCausalLMLoss
        or isinstance(call.get("logits_to_keep", 0), Tensor)
        or call.pop("logits_to_keep", 0) != 0
    ):
        return class_forward(module, *args, **kwargs)
    return_dict = call.pop("return_dict", None)
    count, ignored = call.pop("num_items_in_batch", None), call.pop("ignore_index", -100)
    targets = call.pop("shift_labels", None)
    outputs = module.transformer(**call)
    x = outputs.last_hidden_state
    if targets is None:  # token t predicts token t + 1
        x, targets = x[:, :-1], labels[:, 1:]
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
    kept = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
    result = sys.modules["transformers.models.gpt2.modeling_gpt2"].CausalLMOutputWithCrossAttentions(loss=loss, **kept)
    if return_dict is False or (return_dict is None and not getattr(module.config, "return_dict", True)):
        return result.to_tuple()
    return result


def anatomy(model: Any) -> Anatomy | None:
    """Of a GPT2LMHeadModel, or of another with its module tree."""
    found = transformer_anatomy(model, "num_heads")
    if found is not None and any(hasattr(layer.block, "crossattention") for layer in found.layers):
        raise ValueError(f"generate: this {type(model).__name__} has cross-attention, and no encoder is given")
    return found


# Weights. Theirs are fastgpt's names behind "transformer.", with the linear layers' weights transposed.

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_GELUS = {"tanh": "gelu_new", "none": "gelu"}
_FIELDS = {"n_positions": "block_size", **{n: n for n in ("n_head", "n_layer", "n_embd", "n_inner", "vocab_size")}}
_ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh", "gelu_pytorch_tanh"), "tanh"),
    **dict.fromkeys(("gelu", "gelu_python"), "none"),
}


def holds(tensors: dict[str, Tensor]) -> bool:
    """Whether these are the weights of Hugging Face's GPT-2, with or without the prefix "transformer."."""
    first = tensors.get("transformer.h.0.attn.c_attn.weight", tensors.get("h.0.attn.c_attn.weight"))
    return first is not None and first.dim() == 2 and first.shape[1] == 3 * first.shape[0]


def read_weights(tensors: dict[str, Tensor], settings: dict) -> tuple[dict[str, Tensor], dict]:
    """Their tensors and config.json -> fastgpt's tensors and fields of GPTConfig. ValueError for what that has not."""
    flags = dict(
        model_type="gpt2", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
    )
    for name, needed in flags.items():
        if settings.get(name, needed) != needed:
            raise ValueError(f"{name} is {settings[name]!r}; fastgpt's GPT has {needed!r} alone")
    activation = settings.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation_function is {activation!r}; fastgpt's GPT has {', '.join(_ACTIVATIONS)}")
    fields: dict = {"gelu": _ACTIVATIONS[activation], "layer_norm_eps": settings.get("layer_norm_epsilon", 1e-5)}
    if settings:  # the three are one in fastgpt
        fields["dropout"] = max(settings.get(name, 0.1) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"))
    for theirs, ours in _FIELDS.items():
        if theirs in settings:
            fields[ours] = settings[theirs]
    found = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    found = {name: t.t() if name.endswith(_TRANSPOSED) and t.dim() == 2 else t for name, t in found.items()}
    biases = [t for name, t in found.items() if name.endswith(".bias")]
    if settings.get("bias") is False and not any(bias.any() for bias in biases):  # as write_weights left it
        found = {name: t for name, t in found.items() if not name.endswith(".bias")}
    return found, fields


def write_weights(config: Any, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor], list[str]]:
    """fastgpt's GPTConfig and tensors -> their config.json, their tensors, and notes. Missing biases become zeros."""
    settings = dict(
        architectures=["GPT2LMHeadModel"],
        model_type="gpt2",
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_inner=config.n_inner,
        activation_function=_GELUS[config.gelu],
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        resid_pdrop=config.dropout,
        layer_norm_epsilon=config.layer_norm_eps,
        tie_word_embeddings=config.tie,
    )
    last = config.vocab_size - 1
    settings.update(bos_token_id=min(50256, last), eos_token_id=min(50256, last))
    if not config.bias:
        settings["bias"] = False
    theirs = {}
    for name, tensor in with_biases(tensors).items():
        theirs[name if name == "lm_head.weight" else f"transformer.{name}"] = (
            tensor.t() if name.endswith(_TRANSPOSED) else tensor
        )
    return settings, theirs, []


def with_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a bias of zeros for every norm and linear layer that has none."""
    complete = dict(tensors)
    for name, weight in tensors.items():
        if name.startswith(("h.", "ln_f")) and name.endswith("weight"):
            complete.setdefault(name.removesuffix("weight") + "bias", weight.new_zeros(weight.shape[0]))
    return complete
