"""What people do with a model after accelerate: flags, new weights, odd gradients, generation, longer embeddings."""

import copy

import pytest
import torch

from tests.models import CONTEXT, FAMILIES, VOCAB, hugging_face, logits_and_loss, nanogpt
from tests.swap.swapped import accelerate

IDX = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


def gradients(model, idx=IDX, upstream=None):
    """Logits and every gradient; of their squares' mean, or with what `upstream` makes of the logits."""
    model.zero_grad()
    logits = logits_and_loss(model, idx, idx)[0]
    (logits.square().mean() if upstream is None else upstream(logits)).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)  # the book keeps a constant in float32


@pytest.mark.parametrize("flag", ["attention", "layer_norm", "mlp"])
def test_each_flag_alone(family, flag):
    model = family().double()
    before = gradients(model)
    report = accelerate(model, **{name: name == flag for name in ("attention", "layer_norm", "mlp")})
    swapped = {name for name, module in model.named_modules() if "fastgpt_swap" in module.__dict__}
    assert swapped == {row.name for row in report.rows} and len(swapped) >= 2
    assert {model.get_submodule(name).fastgpt_swap.flag for name in swapped} - {"model"} == {flag}
    assert_equal(gradients(model), before)


def test_weights_loaded_afterwards_are_the_ones_that_count(family):
    model, other = family().double(), family().double()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    accelerate(model)
    model.load_state_dict(other.state_dict())
    assert_equal(gradients(model), gradients(other))


UPSTREAM = {
    "every other channel": lambda logits: logits[..., ::2].sum(),
    "one position": lambda logits: logits[:, -1].square().sum(),
    "transposed": lambda logits: (logits.transpose(1, 2) @ torch.ones(logits.shape[1], 1).to(logits)).sum(),
    "joined": lambda logits: torch.cat([logits, logits * 2], dim=-1).mean(),
}


@pytest.mark.parametrize("way", UPSTREAM)
def test_gradients_that_arrive_strided_or_expanded(family, way):
    model = family().double()
    before = gradients(model, upstream=UPSTREAM[way])
    accelerate(model)
    assert_equal(gradients(model, upstream=UPSTREAM[way]), before)


@pytest.mark.parametrize("time", [1, 2, 3, 7, 15, 17, 31, CONTEXT])
def test_every_length(family, time):
    model = family().double()
    idx = torch.randint(1, VOCAB, (1, time))
    before = gradients(model, idx)
    accelerate(model)
    assert_equal(gradients(model, idx), before)


@pytest.mark.parametrize("kind", FAMILIES)
def test_twenty_five_heads(kind):
    """GPT-2 XL's, no power of two; of 4 channels each."""
    names = ("emb_dim", "n_heads") if kind.startswith("book") else ("n_embd", "n_head")
    model = FAMILIES[kind](**dict(zip(names, (100, 25), strict=True))).double()
    before = gradients(model)
    accelerate(model)
    assert_equal(gradients(model), before)


def test_frozen_layers_get_no_gradients(family):
    """As in fine-tuning: all but the last block and norm."""
    model = family().double()
    names = [name for name, _ in model.named_parameters()]
    frozen = [name for name in names if ".1." not in name and "ln_f" not in name and "final_norm" not in name]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = gradients(model)
    accelerate(model)
    after = gradients(model)
    assert frozen and not set(frozen) & set(after)
    assert_equal(after, before)


@pytest.mark.parametrize("kind", ["nanogpt", "book"])
def test_second_derivatives_pass_through_all_but_attention(kind):
    """PyTorch's own fused attention has none, ours neither; attention=False leaves the model's."""
    model = FAMILIES[kind](**dict(flash=False) if kind == "nanogpt" else {}).double()

    def penalty():
        model.zero_grad()
        logits = logits_and_loss(model, IDX, IDX)[0]
        parameters = list(model.parameters())
        first = torch.autograd.grad(logits.square().mean(), parameters, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), parameters)

    before = penalty()
    accelerate(model, attention=False)
    assert_equal(penalty(), before)


# nanoGPT's own generate


@torch.no_grad()
def sample(model, idx, count, temperature, top_k):
    """nanoGPT's loop: the context cut to block_size, the last position's logits, a multinomial draw."""
    for _ in range(count):
        logits = model(idx[:, -model.config.block_size :])[0][:, -1] / temperature
        logits[logits < logits.topk(top_k)[0][:, [-1]]] = -torch.inf
        idx = torch.cat((idx, torch.multinomial(logits.softmax(-1), 1)), dim=1)
    return idx


@pytest.mark.parametrize("flash", [True, False])
def test_nanogpts_loop_past_its_context_draws_the_same_tokens(flash):
    model, tokens = nanogpt(flash=flash).double().eval(), []
    for _ in range(2):
        torch.manual_seed(3)
        tokens.append(sample(model, IDX, CONTEXT, 0.8, 20))
        accelerate(model)
    assert torch.equal(*tokens) and tokens[0].shape[1] > CONTEXT


# Hugging Face


def test_a_batch_stops_row_by_row():
    """With an end token, rows that met it are padded while the others go on."""
    model = hugging_face().double().eval()
    options = dict(max_new_tokens=12, do_sample=True, eos_token_id=[3, 5, 7, 11, 13], pad_token_id=0)
    idx, tokens = IDX.repeat(3, 1), []
    for _ in range(2):
        torch.manual_seed(8)
        tokens.append(model.generate(idx, attention_mask=torch.ones_like(idx), **options))
        accelerate(model)
    assert torch.equal(*tokens) and (tokens[0][:, -1] == 0).any() and not (tokens[0][:, -1] == 0).all()


def test_logits_to_keep_untied_heads_and_a_longer_vocabulary():
    model = hugging_face(tie_word_embeddings=False).double()
    before = model(IDX, logits_to_keep=2).logits
    accelerate(model)
    assert before.shape[1] == 2
    assert_equal(model(IDX, logits_to_keep=2).logits, before)
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    assert_equal(model(IDX).logits[:, -2:, :VOCAB], before)


def test_a_row_of_padding_alone_makes_no_nan():
    model = hugging_face().double()
    mask = torch.ones_like(IDX)
    mask[1] = 0
    accelerate(model)
    logits = model(IDX, attention_mask=mask).logits
    (logits * mask[..., None]).square().mean().backward()
    assert logits.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())
    assert_equal(logits[0], model(IDX[:1]).logits[0])


def test_packed_documents_leak_where_they_leaked_and_nowhere_else():
    """transformers sees documents in restarted positions only with use_cache=False; accelerate changes neither."""
    model = hugging_face().double().eval()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    other = IDX[:1].clone()
    other[:, :4] = other[:, :4].flip(1)
    twin = copy.deepcopy(model)
    accelerate(twin)
    for cache in (False, True):
        seen = [m(x, position_ids=positions, use_cache=cache).logits for m in (model, twin) for x in (IDX[:1], other)]
        assert_equal(seen[2:], seen[:2])
        assert torch.allclose(seen[2][:, 4:], seen[3][:, 4:]) != cache


def test_three_dropouts_of_three_kinds():
    model = hugging_face(embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3).double().train()
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(model(IDX).logits.detach())
        accelerate(model, backend="torch")
    assert_equal(found[1], found[0])
