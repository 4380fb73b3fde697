"""The small GPT that generation is tested with, and its tokens as recomputing all of it gives them."""

import torch

from fastgpt import GPT, GPTConfig

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
