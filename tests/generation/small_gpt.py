"""The small GPT that generation is tested with, and its tokens as recomputing all of it gives them."""

import torch

from fastgpt import GPT, GPTConfig
from tests import models

VOCABULARY, CONTEXT = 13, 8
PROMPT = torch.tensor([[3, 1, 4]])


def gpt(context=CONTEXT, **changes):
    """Matrices so large that every token counts for the next one; a last norm that keeps all of them likely."""
    shape = dict(vocab_size=VOCABULARY, block_size=context, n_layer=2, n_head=2, n_embd=16, dropout=0.5)
    model = GPT(GPTConfig(**{**shape, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=2.0)
        model.ln_f.weight.fill_(0.2)
    return model.eval()


def varied(model):
    """The model with weights under which greedy tokens vary, so that a wrong one shows."""
    last = next(parameter for name, parameter in model.named_parameters() if "ln_f." in name or "final_norm." in name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=2.0)
            else:
                norm_weight = name.endswith(("ln_1.weight", "ln_2.weight", "scale", "norm1.weight", "norm2.weight"))
                parameter.normal_(mean=float(norm_weight), std=0.1)
        last.fill_(0.2)
    return model


FAMILIES = {
    "fastgpt": lambda: gpt(128),
    "fastgpt, float32 stream, untied, no bias": lambda: gpt(128, residual="float32", tie=False, bias=False),
    "hugging face": lambda: models.hugging_face(n_positions=128, scale_attn_by_inverse_layer_idx=True),
    "nanogpt": lambda: models.nanogpt(block_size=128, bias=False),
    "book": lambda: models.book(context_length=128, drop_rate=0.1, qkv_bias=False),
    "book, fast": lambda: models.book("GPTModelFast", context_length=128),
    "book, cache": lambda: models.book(module="kv_cache.gpt2", context_length=128),
}


def logits(model, ids):
    """(B, V) after ids (B, T), by the model's own forward in eval mode."""
    training = model.training
    with torch.no_grad():
        output = model.eval()(ids)
    model.train(training)
    output = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    return output[:, -1]


def recomputed(model, prompt, count, context=CONTEXT, penalty=1.0):
    """The likeliest tokens after one prompt, each from the whole of what one pass may see."""
    ids = list(prompt)
    for _ in range(count):
        scores = logits(model, torch.tensor([ids[-context:]]))[0]
        for token in set(ids) if penalty != 1 else ():
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        ids.append(scores.argmax().item())
    return ids[len(prompt) :]
