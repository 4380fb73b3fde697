"""A GPT whose parts do more than their class: hooks, adapters, layers of one's own. None of them is passed by."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgpt import GPT, GPTConfig, generate
from fastgpt.generation.decoder import Decoder
from fastgpt.model import MLP, LayerNorm
from tests.generation.small_gpt import recomputed, varied
from tests.swap.swapped import batch

PATHS = ("wte", "wpe", "h.0.ln_1", "h.1.ln_1", "h.0.attn.c_attn", "h.1.attn.c_proj", "h.0.ln_2", "h.0.mlp.c_fc",
         "h.1.mlp.c_proj", "ln_f", "lm_head")  # fmt: skip


def gpt(**changes):
    shape = dict(vocab_size=31, block_size=16, n_layer=2, n_head=4, n_embd=32, tie=False)
    return varied(GPT(GPTConfig(**{**shape, **changes}))).double()


def called(model, idx, targets):
    """Logits and loss with every part called."""
    x = model.wte(idx) + model.wpe(torch.arange(idx.shape[1]))
    for block in model.h:
        x = x + block.attn(block.ln_1(x))
        normed, mlp = block.ln_2(x), block.mlp
        x = x + mlp.c_proj(F.gelu(mlp.c_fc(normed), approximate="tanh"))
    x = model.ln_f(x)
    logits = F.linear(x, model.wte.weight) if model.lm_head is None else model.lm_head(x)
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def results(model, idx, targets, forward):
    model.zero_grad()
    logits, loss = forward(model, idx, targets)
    (loss + logits.square().mean()).backward()
    grads = {name: torch.zeros(()) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return logits.detach(), loss.detach(), grads


def its_own(model, idx, targets):
    return model(idx), model(idx, targets)


def small_batch():
    idx, targets = batch(9)
    return idx % 31, torch.where(targets < 0, targets, targets % 31)


@pytest.mark.parametrize("checkpointing", ["off", "block"])
@pytest.mark.parametrize("path", PATHS)
def test_a_part_with_a_hook_is_called(path, checkpointing):
    model, ids = gpt(activation_checkpointing=checkpointing), small_batch()
    model.get_submodule(path).register_forward_hook(lambda module, args, output: output * 1.5)
    expected, found = (results(model, *ids, forward) for forward in (called, its_own))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-8)
    prompt = ids[0][:1, :5]
    assert generate(model, prompt, 6, temperature=0).tokens == [recomputed(model, prompt[0].tolist(), 6, 16)]


def test_a_hook_on_an_embedding_that_is_the_head_too():
    model, prompt = gpt(tie=True), small_batch()[0][:1, :5]
    model.wte.register_forward_hook(lambda module, args, output: output * 1.5)
    expected = [recomputed(model, prompt[0].tolist(), 6, 16)]
    decoder = Decoder(model)
    assert [generate(each, prompt, 6, temperature=0).tokens for each in (model, decoder, decoder)] == [expected] * 3


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_dropout_stays_where_it_is(p):
    """Around parts that are called too: as without the hook, which changes nothing."""
    losses = []
    for path in ("", *PATHS):
        torch.manual_seed(0)
        model, ids = gpt(dropout=p).train(), small_batch()
        if path:
            model.get_submodule(path).register_forward_hook(lambda module, args, output: output.clone())
        torch.manual_seed(1)
        losses.append(model(*ids).item())
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)


@pytest.mark.parametrize("tie", [False, True])
def test_every_adapter_works_and_learns(tie):
    peft = pytest.importorskip("peft", reason="the extra `test` brings peft")
    names = ["c_attn", "c_proj", "c_fc", "wpe"] + (["lm_head", "wte"] if not tie else [])
    config = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False)
    model, ids = gpt(tie=tie), small_batch()
    adapted = peft.get_peft_model(model, config).double()
    loss = adapted(*ids)
    loss.backward()
    adapters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * (2 * 4 + len(names) - 3) and all(p.grad.abs().sum() > 0 for p in adapters.values())
    prompt = ids[0][:1, :5]
    tokens = generate(adapted, prompt, 6, temperature=0).tokens
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(*ids), loss, rtol=1e-5, atol=0)
    assert tokens == generate(merged, prompt, 6, temperature=0).tokens


@pytest.mark.parametrize("path", ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.c_fc", "h.0.ln_2"])
def test_a_hook_that_takes_itself_away(path):
    """What is to be called is decided once: a bias is neither lost nor added twice."""
    model, ids = gpt(), small_batch()
    expected = model(ids[0])

    def once(module, args, output):
        handle.remove()

    handle = model.get_submodule(path).register_forward_hook(once)
    torch.testing.assert_close(model(ids[0]), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(model(ids[0]), expected, rtol=1e-9, atol=1e-10)


def test_a_head_with_a_bias():
    model, (idx, targets) = gpt(), small_batch()
    model.lm_head = nn.Linear(32, 31, dtype=torch.float64)
    logits, loss = called(model, idx, targets)
    torch.testing.assert_close(model(idx), logits, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(model(idx, targets).double(), loss, rtol=1e-6, atol=0)


def test_more_tokens_than_the_context_holds():
    model = gpt()
    model.wte.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ValueError, match="17 tokens are more than the context of 16"):
        model(torch.zeros(1, 17, dtype=torch.int64))


class Capped(GPT):
    def head(self, x):
        return 2 * torch.tanh(super().head(x) / 2)


class Doubled(LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(MLP):
    def forward(self, x, add_bias=True):
        return super().forward(x, add_bias) / 2


def test_norms_and_mlps_of_ones_own():
    model, ids = gpt(), small_batch()
    model.h[0].ln_2.__class__ = model.h[1].ln_1.__class__ = Doubled
    torch.testing.assert_close(model(ids[0]), called(model, *ids)[0], rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="computes something else than its parts say"):
        Decoder(model.eval())
    model = gpt()
    model.h[1].mlp.__class__ = Halved
    with pytest.raises(ValueError, match="computes something else than its parts say"):
        Decoder(model.eval())


def test_a_gpt_with_another_attention_altogether():
    model = gpt().eval()
    model.h[0].attn = nn.Identity()
    with pytest.raises(ValueError, match=r"this GPT lacks a part of a GPT: .*c_attn"):
        generate(model, [[1, 2]], 3)


class Named(GPT):
    def forward(self, idx):
        return {"logits": super().forward(idx)}


class Asking(GPT):
    def forward(self, idx, more):
        return super().forward(idx)


def test_what_a_subclass_returns_and_asks_for():
    model = varied(Named(gpt().config)).eval()
    assert len(generate(model, [[1, 2]], 3).tokens[0]) == 3
    with pytest.raises(ValueError, match=r"a trial of this Asking failed with TypeError: .*'more'"):
        generate(Asking(gpt().config).eval(), [[1, 2]], 3)


class OneWay(nn.Module):
    """Attention of another kind."""

    def __init__(self, attn):
        super().__init__()
        self.c_attn, self.c_proj = attn.c_attn, attn.c_proj

    def forward(self, x, add_bias=True, documents=None):
        return F.linear(self.c_attn(x)[..., :32], self.c_proj.weight, self.c_proj.bias if add_bias else None)


def test_a_model_of_ones_own_is_not_walked_through_as_ours():
    for model in (Capped(gpt().config).double(), gpt()):
        varied(model)
        if type(model) is GPT:
            model.h[1].attn = OneWay(model.h[1].attn)
        with pytest.raises(ValueError, match="computes something else than its parts say"):
            Decoder(model.eval())
