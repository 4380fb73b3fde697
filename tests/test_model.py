"""GPT: transformers' numbers at transformers' weights, GPT-2's names and sizes, and its own errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgpt import GPT, GPTConfig
from fastgpt.model import MLP, PRESETS, CausalSelfAttention

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transformers' Conv1D keeps (in, out)


def tiny(**changes):
    return GPTConfig.preset("byte-0.1M", **{"n_embd": 48, "n_head": 4, "block_size": 32, **changes})


def hugging_face(config):
    """A GPT2LMHeadModel of this shape, with every weight, bias and norm away from its default."""
    transformers = pytest.importorskip("transformers", reason="the extra `test` brings transformers")
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.05, std=0.3)
    return model.double().eval()


def convert(tensors):
    """transformers' tensors by fastgpt's names."""
    renamed = {name.removeprefix("transformer."): t for name, t in tensors.items() if name != "lm_head.weight"}
    return {name: t.t() if name.endswith(TRANSPOSED) else t for name, t in renamed.items()}


def test_a_config_that_says_nothing_is_gpt2s_smallest():
    says = GPTConfig()
    assert (says.vocab_size, says.block_size, says.n_layer, says.n_head, says.n_embd) == (50257, 1024, 12, 12, 768)
    assert says == GPTConfig.preset("gpt2-124M")


@pytest.mark.parametrize("config", [tiny(), tiny(n_embd=20, n_head=1, n_layer=3), tiny(n_embd=300, n_head=12)], ids=str)
def test_hugging_faces_weights_give_its_logits_loss_and_gradients(config):
    theirs = hugging_face(config)
    ours = GPT(config).double()
    ours.load_state_dict(convert(theirs.state_dict()))
    idx = torch.randint(0, 257, (3, 32))
    targets = torch.randint(0, 257, (3, 32)).index_put((torch.tensor(1), torch.tensor(5)), torch.tensor(-100))

    logits = theirs(idx).logits
    torch.testing.assert_close(ours(idx), logits, rtol=1e-11, atol=1e-11)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    expected.backward()
    loss = ours(idx, targets)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    grads = convert({name: p.grad for name, p in theirs.named_parameters()})
    assert grads.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, grads[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gpt2-124M", 124_439_808), ("gpt2-355M", 354_823_168), ("gpt2-774M", 774_030_080), ("gpt2-1558M", 1_557_611_200)],
)
def test_the_presets_are_the_released_models(name, parameters):
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name))
    assert model.num_parameters() == parameters
    assert set(PRESETS) >= {name}


def test_parameter_names_are_gpt2s():
    names = set(GPT(tiny(n_layer=1)).state_dict())
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    inside = {f"h.0.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert names == {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"} | inside


def test_without_biases_there_are_none():
    model = GPT(tiny(bias=False))
    assert not any(name.endswith("bias") for name in model.state_dict())
    idx = torch.randint(0, 257, (2, 9))
    model(idx, idx).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_initialisation():
    model = GPT(GPTConfig.preset("byte-10M"))
    deviation = {name: p.std().item() for name, p in model.named_parameters() if p.dim() == 2}
    scaled = 0.02 / (2 * 6) ** 0.5
    for name, value in deviation.items():
        assert value == pytest.approx(scaled if name.endswith("c_proj.weight") else 0.02, rel=0.02), name
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            expected = 1.0 if name.endswith("weight") else 0.0
            assert torch.equal(parameter, torch.full_like(parameter, expected)), name


def test_the_loss_is_that_of_the_logits():
    model = GPT(tiny())
    idx = torch.randint(0, 257, (2, 32))
    targets = torch.randint(0, 257, (2, 32))
    targets[0, :5] = -100
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(idx, targets), expected)


def test_later_tokens_change_no_bit_of_earlier_logits():
    model = GPT(tiny()).eval()
    idx = torch.randint(0, 257, (2, 32))
    other = idx.clone()
    other[:, 20:] = torch.randint(0, 257, (2, 12))
    assert torch.equal(model(idx)[:, :20], model(other)[:, :20])
    assert not torch.equal(model(idx)[:, 20:], model(other)[:, 20:])


def test_dropout_is_at_four_places_and_only_in_training():
    """Embedding, attention and both branches: each alone, the others patched away, changes the output."""
    model, idx = GPT(tiny(dropout=0.5, n_layer=1)), torch.randint(0, 257, (2, 32))
    model.eval()
    assert torch.equal(model(idx), model(idx))
    model.train()
    model.config.__dict__["dropout"] = 0.0  # the embedding's
    places = {"attention": model.h[0].attn, "attention branch": model.h[0].ln_2, "mlp branch": model.ln_f}
    for place in places.values():
        place.dropout = 0.0
    model.h[0].ln_1.dropout = 0.0
    assert torch.equal(model(idx), model(idx))
    for name, place in places.items():
        place.dropout = 0.5
        assert not torch.equal(model(idx), model(idx)), name
        place.dropout = 0.0
    model.config.__dict__["dropout"] = 0.5
    assert not torch.equal(model(idx), model(idx))


@pytest.mark.parametrize("part", [CausalSelfAttention, MLP])
def test_the_bias_left_out_is_the_last_layers(part):
    config = tiny()
    module, x = part(config), torch.randn(2, 5, 48)
    nn.init.normal_(module.c_proj.bias)
    torch.testing.assert_close(module(x), module(x, add_bias=False) + module.c_proj.bias)


@pytest.mark.parametrize(("batch", "time"), [(0, 5), (1, 1), (1, 32)])
def test_small_batches(batch, time):
    model, idx = GPT(tiny()), torch.zeros(batch, time, dtype=torch.long)
    assert model(idx).shape == (batch, time, 257)
    loss = model(idx, idx)
    loss.backward()
    assert loss.isnan() if batch == 0 else loss.isfinite()
    if batch == 0:
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(n_embd=50, n_head=4), "n_embd = 50 does not divide into n_head = 4 heads"),
        (dict(n_layer=0), "n_layer is 0"),
        (dict(vocab_size=-1), "vocab_size is -1"),
        (dict(block_size=8.5), "block_size is 8.5"),
        (dict(n_inner=0), "n_inner is 0"),
        (dict(n_inner=True), "n_inner is True, not a whole number or None"),
        (dict(dropout=1.5), "dropout is 1.5"),
        (dict(dropout="0.1"), "dropout is '0.1', not a number"),
        (dict(bias="false"), "bias is 'false', not True or False"),
        (dict(layer_norm_eps=0.0), "layer_norm_eps is 0.0"),
        (dict(gelu="relu"), "gelu is 'relu'"),
        (dict(backend="cuda"), "backend is 'cuda'"),
        (dict(n_layers=3), r"no field 'n_layers' \(did you mean 'n_layer'\?\)"),
    ],
    ids=str,
)
def test_a_shape_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig.from_dict(fields)


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown preset 'gpt2-124' \(did you mean 'gpt2-124M'\?\); there are"):
        GPTConfig.preset("gpt2-124")


def test_too_many_tokens_and_foreign_ones_are_refused():
    model = GPT(tiny())
    with pytest.raises(ValueError, match="33 tokens are more than the context of 32"):
        model(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(ValueError, match=r"token 257 at \(0, 2\) is outside a vocabulary of 257"):
        model(torch.tensor([[1, 2, 257]]))


def test_the_exact_gelu_is_another_one():
    torch.manual_seed(0)
    tanh, exact = GPT(tiny()), GPT(tiny(gelu="none"))
    exact.load_state_dict(tanh.state_dict())
    idx = torch.randint(0, 257, (2, 32))
    assert not torch.equal(tanh(idx), exact(idx))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph_a_step_equals_eager(backend):
    model = GPT(tiny(n_layer=1))
    idx = torch.randint(0, 257, (2, 32))
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        loss = call(idx, idx)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "autocast", "residual", "stream"),
    [
        (torch.float32, False, "compute", torch.float32),
        (torch.float32, True, "compute", torch.bfloat16),
        (torch.float32, True, "float32", torch.float32),
        (torch.bfloat16, False, "compute", torch.bfloat16),
        (torch.bfloat16, False, "float32", torch.float32),
    ],
)
def test_the_dtype_of_the_stream(weights, autocast, residual, stream):
    """Branches and what the head sees are in the compute dtype either way, gradients in the weights'."""
    model, idx = GPT(tiny(residual=residual)), torch.randint(0, 257, (2, 32))
    expected = model(idx, idx)
    model = model.to(weights)
    seen = []
    for block in model.h:
        block.register_forward_hook(lambda _, args, outputs: seen.append([t.dtype for t in outputs]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        features, loss = model.features(idx), model(idx, idx)
    loss.backward()
    compute = torch.bfloat16 if autocast else weights
    assert seen == [[stream, compute]] * 4 and features.dtype == compute
    assert loss.dtype == torch.float32 and all(p.grad.dtype == weights for p in model.parameters())
    torch.testing.assert_close(loss, expected, rtol=3e-3, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_changes_no_gradient(dropout):
    gradients = {}
    for choice in ("off", "mlp", "block"):
        torch.manual_seed(3)
        model = GPT(tiny(n_layer=2, dropout=dropout, activation_checkpointing=choice))
        idx = torch.randint(0, 257, (2, 32))
        model(idx, idx).backward()
        gradients[choice] = [p.grad for p in model.parameters()]
    for choice in ("mlp", "block"):
        assert all(torch.equal(a, b) for a, b in zip(gradients["off"], gradients[choice], strict=True))


def test_a_head_of_its_own():
    model = GPT(tiny(tie=False)).double()
    assert model.num_parameters() == GPT(tiny()).num_parameters() + model.wte.weight.numel()
    assert "lm_head.weight" in model.state_dict() and "lm_head.weight" not in GPT(tiny()).state_dict()
    idx, targets = torch.randint(0, 257, (2, 9)), torch.randint(0, 257, (2, 9))
    logits = model(idx)
    torch.testing.assert_close(logits, model.features(idx) @ model.lm_head.weight.T)
    expected = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), targets.flatten()), list(model.parameters()))
    loss = model(idx, targets)
    torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), expected)
