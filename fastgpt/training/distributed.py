"""Training on many devices, by PyTorch's own means: torchrun starts the processes, DDP copies, FSDP2 shards.

One process on one device is the same code with a World of size 1, where every function here does nothing.
"""

import datetime
import faulthandler
import os
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastgpt.model import GPT

STALL = 300.0  # seconds without a step that are worth a look at the stacks, which ends nothing
SHARDS = "shards"  # the folder of a checkpoint that each process writes into


class World(NamedTuple):
    """The processes that train together, and this one's place among them."""

    rank: int
    size: int
    device: torch.device

    def agree(self, flag: int) -> int:
        """The largest of all processes' flags, over the hosts: no device waits for it."""
        if self.size == 1:
            return flag
        flags = torch.tensor(flag, dtype=torch.int64, device="cpu")
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return int(flags)

    def watch(self) -> None:
        """Where processes wait for each other: unless this is called again within STALL seconds, the stacks of this one
        are written to stderr, which tells who waits where. The wait itself ends with the run's timeout."""
        if self.size > 1 and sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(STALL, file=sys.__stderr__)

    def mean(self, value: Tensor) -> Tensor:
        """Of a scalar on the device, over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """One tensor of each process, by rank; they are of one shape."""
        if self.size == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor)
        return found


def join(device: str, timeout: float = 1800) -> World:
    """This process's World, from what torchrun put into the environment, or alone without it. timeout: the seconds
    after which a wait for other processes is an error. ValueError for a device that is not here."""
    size = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ and "MASTER_ADDR" in os.environ else 1
    if size == 1:
        return World(0, 1, device_named(device))
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    here = device_named(device)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    if not dist.is_initialized():  # gloo for what the hosts tell each other
        backends = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
        dist.init_process_group(backends, timeout=datetime.timedelta(seconds=timeout))
    return World(dist.get_rank(), size, here)


def leave(world: World) -> None:
    """Once all are done: a process that went earlier would look like one that died."""
    if world.size > 1:
        faulthandler.cancel_dump_traceback_later()
        dist.barrier()
        dist.destroy_process_group()


def device_named(name: str) -> torch.device:
    """The device of that name, "auto" the GPU if there is one. ValueError for one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), dtype=torch.float32, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch's CPU builds assert
        raise ValueError(f"no device {name!r} here{_why_no_mps(name)}; there is {', '.join(_devices())}") from error
    return device


def _why_no_mps(name: str) -> str:
    """What a Mac that has none, or another machine, is told."""
    if name.partition(":")[0] != "mps" or torch.backends.mps.is_available():
        return ""
    if not torch.backends.mps.is_built():
        return " (MPS is a Mac's GPU, and this PyTorch was built without it)"
    return " (PyTorch has MPS, and this machine has no GPU that it can use: that takes Apple silicon and macOS 14)"


def _devices() -> list[str]:
    """What this machine and this PyTorch have together."""
    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [*found, *(["mps"] if torch.backends.mps.is_available() else [])]


def shard(
    model: GPT, world: World, among: int | None = None, reshards: bool = False, dtype: torch.dtype | None = None
) -> None:
    """FSDP2, in place: a shard of every weight in each process, or in each of `among` neighbours, with copies of it in
    the others (HSDP). dtype: of the weights that are gathered, None their own; gradients are added up in float32.

    What a block gathered stays until its backward, unless it `reshards`, and is then gathered once more for that.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if among is None or among == world.size:
        mesh = init_device_mesh(world.device.type, (world.size,))
    else:
        names = ("copies", "shards")
        mesh = init_device_mesh(world.device.type, (world.size // among, among), mesh_dim_names=names)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32)
    for block in model.h:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshards, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    model.blocks_alone = reshards


def reshard(model: nn.Module) -> None:
    """Let go of what an evaluation gathered: only shards are the optimizer's, and go into a checkpoint."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def replicate(model: nn.Module, world: World) -> nn.Module:
    """DDP around the model: gradients are averaged over the processes while the backward still runs."""
    ids = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, told by a method of it: its module takes half a second to import, a fourth of what every
    command would begin with."""
    return hasattr(tensor, "full_tensor")


def local_part(tensor: Any) -> Tensor:
    """What this process holds of a tensor, itself where it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensors: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Tensors by name, sharded ones put together: all processes call it, those that `keep` get them, on the CPU."""
    found = {}
    for name, tensor in tensors:
        held: Any = tensor.detach()
        tensor = held.full_tensor() if is_sharded(held) else held
        if keep:
            found[name] = tensor.cpu()
    return found


def placed(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor as `like` lies: on its device, and sharded where it is."""
    if is_sharded(like):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device)
