"""One optimizer step of the trainer, on one device or many; and what made a step's numbers stop being finite."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastgpt.data import documents
from fastgpt.model import LayerNorm
from fastgpt.modules import free_embedding, free_linear, occupied
from fastgpt.training.distributed import World
from fastgpt.training.optimizer import MuonAdamW, TrainingStep, clipped_step


class Step(TrainingStep):
    """step(idx, targets) -> (loss, norm), float32 scalars on the device: the mean over all processes, and the norm of
    all gradients together. idx, targets: (N, B, T), this process's N batches.

    From the first loss or gradient that is not finite on, nothing is updated any more, in any process: whoever reads
    the losses later finds the weights as they were before that step. With `skips` only that step updates nothing.
    float16 scales its loss instead, and skips the steps whose scaled gradients overflow.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW | MuonAdamW,
        world: World,
        max_norm: float,
        autocast: torch.dtype | None = None,
        graph: bool = False,
        end: int | None = None,
        skips: bool = False,
    ):
        super().__init__(model, optimizer, max_norm, autocast, graph)
        self.world = world
        self.end = end  # the end-of-text token, where attention is to stop at documents
        self.skips = skips
        self.stopped = torch.zeros((), dtype=torch.float32, device=self.device)
        self.own = torch.zeros((), dtype=torch.float32, device=self.device)  # this process's loss
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=autocast == torch.float16)

    def loss(self, model: Any, idx: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return model(idx, targets) if self.end is None else model(idx, targets, documents(idx, self.end))

    def batch(self, last: bool) -> contextlib.AbstractContextManager:
        """Gradients are averaged once a step, in the last batch's backward; FSDP then keeps whole weights and gradients
        from batch to batch. Where it is not to, each batch's gradients are scattered, and added up over copies once."""
        if not last and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        model: Any = self.model
        if hasattr(model, "set_is_last_backward"):  # FSDP2's
            model.set_is_last_backward(last)
            model.set_requires_all_reduce(last)
            if not model.blocks_alone:
                model.set_requires_gradient_sync(last)
                model.set_reshard_after_backward(last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        scaled: Any = self.scaler.scale(loss)
        scaled.backward()

    def update(self, total: Tensor) -> tuple[Tensor, Tensor]:
        self.own.copy_(total)
        total = self.world.mean(total)
        return total, self._scaled_update() if self.scaler.is_enabled() else self._guarded_update(total)

    def _guarded_update(self, total: Tensor) -> Tensor:
        if self.skips:
            self.stopped.zero_()
        self.stopped += 1 - total.isfinite().float()
        norm = clipped_step(self.optimizer, self.max_norm or torch.inf, self.stopped)
        self.stopped += 1 - norm.isfinite().float()
        return norm

    def _scaled_update(self) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.max_norm or torch.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm.float()


def first_bad(step: Step, model: nn.Module, idx: Tensor, targets: Tensor, collective: bool) -> str:
    """The first tensor that is not finite, in words: of the weights; else, of a second pass over the batches
    (N, B, T), of the modules' outputs in the order of their computation, or of the gradients.

    collective: the forward is one of all processes together, so each does all of them and no backward; the gradients
    are those that the step left.
    """
    found = [f"the weight {name}" for name, parameter in model.named_parameters() if not _finite(parameter)]
    with _watched(model) as outputs:
        for number in range(len(idx)):
            if found and not collective:
                break
            with torch.set_grad_enabled(not collective):
                loss = step.loss(model, idx[number], targets[number])
            found += [f"the output of {name}" for name in outputs]
            if not loss.isfinite():
                found.append("the loss, from finite activations")
            if not found and not collective:
                step.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                found += _bad_gradients(model)
    found += _bad_gradients(model)
    return found[0] if found else "nothing that a second pass shows"


def _bad_gradients(model: nn.Module) -> list[str]:
    """The last layer's first, as the backward reaches them, nearly."""
    named = reversed(list(model.named_parameters()))
    return [f"the gradient of {name}" for name, p in named if p.grad is not None and not _finite(p.grad)]


def _finite(tensor: Any) -> bool:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return bool(local.isfinite().all())


def _only_read(name: str, module: nn.Module) -> bool:
    """Whether GPT reads the module's weights and does not call it, which it would if there were a hook on it: another
    computation than the one that failed."""
    if isinstance(module, LayerNorm):
        return occupied(module) is None
    return (free_linear(module) and not name.endswith("c_attn")) or free_embedding(module)


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Fills a list with the names of modules whose outputs are not finite."""
    found: list[str] = []

    def watch(name: str):
        def look(module, inputs, outputs):
            several = outputs if isinstance(outputs, tuple) else (outputs,)
            if any(isinstance(each, Tensor) and not _finite(each) for each in several):
                found.append(name)

        return look

    called = [(name, module) for name, module in model.named_modules() if name and not _only_read(name, module)]
    handles = [module.register_forward_hook(watch(name)) for name, module in called]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
