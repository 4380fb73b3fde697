"""The optimizer's side of a training step: AdamW with decay groups, or Muon beside it, clipping without a pass of its
own, the whole step as one CUDA graph.

Weights and AdamW's moments stay float32, and autocast casts for the matmuls. Bytes a parameter and step:

    autocast            cast 4 + 2, gradient back 2 + 4, norm 4, AdamW 16 + 12               44
    bfloat16 weights    gradient 2 + 4, norm 4, AdamW on float32 masters 16 + 12, back 4 + 2  44

They move the same, but autocast keeps one set of weights, adds the gradients of several batches in float32, and needs
no optimizer but PyTorch's own.
"""

import contextlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.cuda_graph import captured, warmed
from fastgpt.fp8 import Fp8
from fastgpt.model import GPT
from fastgpt.private import multiply_

SCALING = ("cpu", "cuda")  # whose fused AdamW hears grad_scale and found_inf; MPS's did not in every PyTorch


def adamw(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    graph: bool = False,
) -> torch.optim.AdamW:
    """PyTorch's fused AdamW: matrices decay, biases and norms do not. graph: to be captured in a CUDA graph, which
    reads the learning rate from the device."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, learning_rate, betas, fused=True, capturable=graph)
    if graph:
        rate = torch.tensor(learning_rate, dtype=torch.float32, device=parameters[0].device)
        for group in optimizer.param_groups:
            group["lr"] = rate
    return optimizer


class MuonAdamW(torch.optim.Optimizer):
    """PyTorch's Muon and its AdamW as one optimizer: the first groups are Muon's, and there is one state."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW):
        self._parts = (muon, slice(0, len(muon.param_groups))), (adamw, slice(len(muon.param_groups), None))
        super().__init__([*muon.param_groups, *adamw.param_groups], adamw.defaults)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("MuonAdamW: step takes no closure, which would run once for each of its optimizers")
        for optimizer, groups in self._parts:  # anew each time, for load_state_dict replaces groups and state
            optimizer.param_groups, optimizer.state = self.param_groups[groups], self.state
            optimizer.step()


def muon(
    model: GPT, learning_rate: float, weight_decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95)
) -> MuonAdamW:
    """PyTorch's Muon for the blocks' matrices, `adamw` for all else: embeddings, the head, norms and biases.

    One learning rate and one decay serve both, for a step of Muon's is scaled to the size that AdamW's have
    (match_rms_adamw). betas: AdamW's; Muon's momentum is Nesterov's, of 0.95.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if by_muon(name, p.dim())]
    others = nn.ParameterList(p for name, p in trained if not by_muon(name, p.dim()))
    first = torch.optim.Muon(matrices, learning_rate, weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return MuonAdamW(first, adamw(others, learning_rate, weight_decay, betas))


def by_muon(name: str, dims: int) -> bool:
    """Whether Muon would train the GPT's parameter of this name and so many dimensions."""
    return name.startswith("h.") and dims == 2


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Of all groups, in place where it is a tensor that a CUDA graph reads; as float32, which that tensor is, so that
    with a graph and without one the weights are the same to the bit."""
    learning_rate = torch.tensor(learning_rate, dtype=torch.float32, device="cpu").item()
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def clipped_step(optimizer: torch.optim.AdamW | MuonAdamW, max_norm: float, skip: Tensor | None = None) -> Tensor:
    """optimizer.step() with the norm of all gradients together bounded to max_norm; returns the norm that they had, a
    float32 scalar on the device. skip: a scalar there; where it is not 0, nothing is updated.

    The fused step divides gradients by a scale while it reads them anyway, so none is written again for this, and the
    host waits for nothing. For Muon, and on devices outside SCALING, a pass of its own clips, and the host waits.
    Gradients that are not finite leave weights and moments as they were; the norm tells.
    ValueError for an optimizer that is not fused.
    """
    if not optimizer.defaults.get("fused"):
        raise ValueError(
            "clipped_step: the optimizer is not fused, and only that one scales gradients as it reads them"
        )
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm: Any = torch.nn.utils.get_total_norm(gradients).float()
    if hasattr(norm, "full_tensor"):  # a DTensor, of gradients that are sharded over processes
        norm = norm.full_tensor()
    if gradients and (isinstance(optimizer, MuonAdamW) or gradients[0].device.type not in SCALING):
        if not norm.isfinite() or (skip is not None and skip != 0):
            return norm
        multiply_(gradients, (max_norm / norm).clamp(max=1))
        optimizer.step()
        return norm
    scales: Any = optimizer  # what the fused step looks for on itself, as torch.amp.GradScaler puts it there
    scales.grad_scale = (norm / max_norm).clamp(min=1)
    scales.found_inf = 1 - norm.isfinite().float()
    if skip is not None:
        scales.found_inf = torch.maximum(scales.found_inf, (skip != 0).float())
    try:
        optimizer.step()
    finally:
        del scales.grad_scale, scales.found_inf
    return norm


def _settled(model: nn.Module) -> bool:
    """Whether a graph may hold how the next pass makes its scales of 8-bit floats, if it makes any."""
    fp8 = getattr(model, "fp8", None)
    return not isinstance(fp8, Fp8) or fp8.settled


class TrainingStep:
    """One optimizer step on batches of windows: step(idx, targets) -> (loss, norm), float32 scalars on the device.

    idx, targets: (B, T), or (N, B, T) for N batches one after another whose mean loss is followed. autocast: the dtype
    of matmuls, None for the weights' own. max_norm: of all gradients together, None leaves them; the norm is then NaN.
    graph: after two calls that run as usual, with 8-bit floats some twenty until their scales are delayed, the next one
    captures the step, all N batches of it, in a CUDA graph, which it and all later ones replay: the host then launches
    once a step. Shapes must stay, the optimizer comes from adamw(graph=True), and ValueError says what stands in the
    way. The loss that is returned is overwritten by the next replay.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW | MuonAdamW,
        max_norm: float | None = 1.0,
        autocast: torch.dtype | None = None,
        graph: bool = False,
    ):
        device = next(model.parameters()).device
        if graph and device.type != "cuda":
            raise ValueError(f"TrainingStep: the model is on {device}, a CUDA graph needs an NVIDIA GPU")
        if graph and not optimizer.defaults["capturable"]:
            raise ValueError("TrainingStep: a CUDA graph needs an optimizer from adamw(graph=True)")
        self.model, self.optimizer, self.max_norm, self.autocast = model, optimizer, max_norm, autocast
        self.device, self.graph = device, graph
        self._calls = 0
        self._captured: torch.cuda.CUDAGraph | None = None
        self._inputs: Any = None  # idx and targets
        self._outputs: tuple[Tensor, Tensor]

    def __call__(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if not self.graph:
            return self._step(idx, targets)
        if self._inputs is None:  # where the graph reads them; the first steps too, which compile for how these lie
            self._inputs = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (idx, targets))
        for static, given in zip(self._inputs, (idx, targets), strict=True):
            if static.shape != given.shape:
                shapes = f"{tuple(given.shape)}, the graph is for {tuple(static.shape)}"
                raise ValueError(f"TrainingStep: a batch of shape {shapes}")
            static.copy_(given)
        if self._calls < 2 or not _settled(self.model):
            self._calls += 1
            with warnings.catch_warnings():  # that an optimizer for a graph runs without one: it is about to
                warnings.filterwarnings("ignore", "This instance was constructed with capturable=True", UserWarning)
                return warmed(self.device, lambda: self._step(*self._inputs))
        if self._captured is None:
            self._capture()
        assert self._captured is not None
        self._captured.replay()
        return self._outputs

    def _step(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if idx.dim() == 2:
            idx, targets = idx[None], targets[None]
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for number in range(len(idx)):
            with self.batch(last=number + 1 == len(idx)):
                loss = self.loss(self.model, idx[number], targets[number]) / len(idx)
                self.backward(loss)
            total += loss.detach()
        return self.update(total)

    def loss(self, model: Any, idx: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return model(idx, targets)

    def batch(self, last: bool) -> contextlib.AbstractContextManager:
        """Around the forward and the backward of one batch; `last` is the step's last one."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """The optimizer's step, from the gradients of all batches and their loss; what the whole step returns."""
        if self.max_norm is not None:
            return total, clipped_step(self.optimizer, self.max_norm)
        self.optimizer.step()
        return total, torch.full((), torch.nan, dtype=torch.float32, device=self.device)

    def _capture(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)  # the graph's own memory is to hold the gradients
        self._captured, self._outputs = captured(self.device, lambda: self._step(*self._inputs))
