"""accelerate(loss=True) on Hugging Face's GPT-2."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra `test` brings transformers")


from tests.families.huggingface import IDX  # noqa: E402
from tests.models import hugging_face  # noqa: E402
from tests.swap.swapped import accelerate  # noqa: E402


@pytest.mark.parametrize("how", [dict(), dict(num_items_in_batch=5), dict(shift_labels=IDX.roll(-1, 1))], ids=str)
def test_the_loss_without_logits(how):
    model = hugging_face().double().train()
    labels = IDX.clone()
    labels[0, 3] = -100

    def found():
        model.zero_grad()
        output = model(IDX, labels=labels, **how)
        output.loss.backward()
        return output, {"loss": output.loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}

    _, before = found()
    accelerate(model, loss=True)
    output, after = found()
    assert output.logits is None and output.past_key_values is None
    assert model(IDX, labels=labels, use_cache=True).past_key_values.get_seq_length() == IDX.shape[1]
    torch.testing.assert_close(after["loss"].double(), before["loss"].double(), rtol=1e-6, atol=0)
    for name in before:
        torch.testing.assert_close(after[name].double(), before[name].double(), rtol=1e-5, atol=1e-8)
    assert model(IDX).logits is not None and len(model(IDX, labels=labels, return_dict=False)) >= 1
    assert model.eval()(IDX, labels=labels).logits is not None, "evaluation may want them"


def test_a_cache_that_is_given_goes_on():
    """A call that brings one wants it back, whatever it says of use_cache."""
    model, found = hugging_face().double().train(), []
    for loss in (False, True):
        if loss:
            accelerate(model, loss=True)
        cache = model(IDX[:, :4], use_cache=True).past_key_values
        output = model(IDX[:, 4:], labels=IDX[:, 4:], past_key_values=cache)
        assert output.past_key_values.get_seq_length() == IDX.shape[1]
        found.append(output.loss.detach().double())
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


def test_a_loss_of_ones_own_is_left():
    model = hugging_face().train()
    accelerate(model, loss=True)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    output = model(IDX, labels=IDX)
    torch.testing.assert_close(output.loss, output.logits.sum())
