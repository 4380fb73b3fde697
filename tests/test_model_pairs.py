"""A GPT's options two at a time: against the naive reference in float64, and against an equal run by another way."""

import pytest
import torch

from fastgpt import GPT, GPTConfig, generate
from fastgpt.testing import on_reference
from tests.generation.small_gpt import varied
from tests.models import randomised
from tests.pairs import covering, named

VOCABULARY, TIME = 31, 16
SHAPES = dict(
    bias=[True, False],
    tie=[True, False],
    gelu=["tanh", "none"],
    n_inner=[None, 24],
    layer_norm_eps=[1e-5, 0.1],
    residual=["compute", "float32"],
    activation_checkpointing=["off", "mlp", "block"],
)
STEPS = covering(
    **SHAPES,
    dropout=[0.0, 0.2],
    documents=[False, True],
    ignored=["none", "some", "row"],
    dtype=[torch.float64, torch.float32, torch.bfloat16],
    time=[1, 9, TIME],  # the last is all of the context
)
AGAIN = covering(
    **SHAPES,
    documents=[False, True],
    autocast=[False, True],
    dtype=[torch.float32, torch.bfloat16],
)
LIMITS = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.06}  # of a norm; the loss is float32


def model_of(row, dtype):
    fields = {name: value for name, value in row.items() if name in GPTConfig.__dataclass_fields__}
    shape = dict(vocab_size=VOCABULARY, block_size=TIME, n_layer=2, n_head=2, n_embd=16)
    return randomised(GPT(GPTConfig(**shape, **fields, backend="torch"))).to(dtype).train()


def batch_of(row):
    time = row.get("time", TIME)
    idx, targets = torch.randint(VOCABULARY, (2, 3, time))
    if row.get("ignored") == "some":
        targets[:, ::2] = -100
        targets[0, -1] = 5
    elif row.get("ignored") == "row":
        targets[1] = -100
    documents = torch.arange(time).expand(3, -1) // torch.tensor([[4], [7], [99]]) if row["documents"] else None
    return idx, targets, documents


def close(got, expected, limit, name):
    error, size = (got.double() - expected.double()).norm(), expected.double().norm()
    assert error <= limit * max(size, 1e-3), f"{name}: off by {error:.3g}, its norm is {size:.3g}"


@pytest.mark.parametrize("row", STEPS, ids=named)
def test_a_step_is_the_references(row):
    plain = {**row, "dropout": 0.0}
    model = model_of(plain, row["dtype"])
    twin = on_reference(model_of({**plain, "activation_checkpointing": "off"}, torch.float64)).train()
    twin.load_state_dict(model.state_dict())
    idx, targets, documents = batch_of(row)
    found = []
    for each in (model, twin):
        loss = each(idx, targets, documents)
        loss.backward()
        found.append({"loss": loss.detach(), **{name: p.grad for name, p in each.named_parameters()}})
    for name, expected in found[1].items():
        close(found[0][name], expected, LIMITS[row["dtype"]], name)


@pytest.mark.parametrize("row", STEPS, ids=named)
def test_what_is_computed_again_is_what_was_computed(row):
    """The bits of a step with checkpointing are those of one without, dropout and documents included."""
    idx, targets, documents = batch_of(row)
    found = []
    model = model_of(row, row["dtype"])
    for setting in ("off", row["activation_checkpointing"]):
        twin = model_of({**row, "activation_checkpointing": setting}, row["dtype"])
        twin.load_state_dict(model.state_dict())
        torch.manual_seed(3)
        loss = twin(idx, targets, documents)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in twin.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("row", AGAIN, ids=named)
def test_a_backward_under_autocast(row):
    """It changes no bit of a step whose forward was under it too. One whose forward was not is PyTorch's own affair:
    its linear layers' gradients are products in autocast's dtype then, and come out as exact as that allows."""
    idx, targets, documents = batch_of(row)
    model = model_of(row, row["dtype"])
    found = []
    for backward in (False, True):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=row["autocast"]):
            loss = model(idx, targets, documents)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, expected in found[0].items():
        assert found[1][name].dtype == expected.dtype
        if row["autocast"] or row["dtype"] == torch.bfloat16:
            assert torch.equal(found[1][name], expected), name
        else:
            close(found[1][name], expected, LIMITS[torch.bfloat16], name)


DECODED = covering(
    residual=["compute", "float32"],
    dtype=[None, torch.bfloat16, torch.float16, torch.float64],
    bias=[True, False],
    tie=[True, False],
    gelu=["tanh", "none"],
    num_samples=[1, 3],
    prompts=[1, 2],
    draft=[False, True],
    prompt=[1, 5],
)


@pytest.mark.parametrize("row", DECODED, ids=named)
def test_decoding_is_the_reference(row):
    """Each token's log probability is what the reference in float64 gives it after the same tokens."""
    fields = {name: row[name] for name in ("residual", "bias", "tie", "gelu")}
    shape = dict(vocab_size=VOCABULARY, block_size=12, n_layer=2, n_head=2, n_embd=16, backend="torch")
    model, draft = (varied(GPT(GPTConfig(**shape, **fields))).eval() for _ in range(2))
    prompts = torch.randint(VOCABULARY, (row["prompts"], row["prompt"]))
    options = dict(num_samples=row["num_samples"], dtype=row["dtype"], seed=4, logprobs=True)
    if row["draft"]:
        options |= dict(draft=draft, draft_tokens=2)
    new = 12 - row["prompt"] + 1  # the last token is never read: all of the context, to the last place
    result = generate(model, prompts, new, **options)
    twin = on_reference(model.double()).eval()
    limit = {None: 1e-3, torch.float64: 1e-5, torch.float16: 0.1, torch.bfloat16: 0.7}[row["dtype"]]
    prompts = prompts.repeat_interleave(row["num_samples"], 0).tolist()
    for prompt, tokens, logprobs in zip(prompts, result.tokens, result.logprobs, strict=True):
        assert len(tokens) == new
        ids = torch.tensor([[*prompt, *tokens]])
        expected = twin(ids[:, :-1])[0].log_softmax(-1)[len(prompt) - 1 :].gather(1, ids[0, len(prompt) :, None])[:, 0]
        error = (torch.tensor(logprobs, dtype=torch.float64) - expected).abs().mean()
        assert error <= limit, f"off by {error:.3g} on average"
