"""What a few processes on this machine send each other in a training step, and hold between steps, against bench.plan.

    python -m bench sent

Bytes are those that the kernel says were acknowledged on each process's TCP connections (Linux), so they are what gloo
sent, with its own messages. Its reduce-scatter is an all-reduce of which each keeps its part, so it sends twice what
NCCL's would, and is counted so. Memory is every tensor that lives. Times here would say nothing of GPUs.
"""

import argparse
import gc
import multiprocessing
import os
import socket
import struct
from typing import NamedTuple

import torch
import torch.distributed as dist

from bench.plan import Layout
from fastgpt.model import GPT, GPTConfig
from fastgpt.training.distributed import join, leave, replicate, shard
from fastgpt.training.optimizer import adamw
from fastgpt.training.step import Step

SHAPE = GPTConfig(vocab_size=257, block_size=64, n_layer=8, n_head=4, n_embd=192)
LAYOUTS = {  # by processes
    Layout("DDP"): 2,
    Layout("FSDP2", 2): 2,
    Layout("FSDP2, resharded", 2, True): 2,
    Layout("HSDP", 2): 4,
}
STEPS = 4
_ACKNOWLEDGED = 120  # where tcpi_bytes_acked lies in Linux's struct tcp_info


class Measured(NamedTuple):
    layout: Layout
    processes: int
    batches: int
    sent: float  # bytes that a process sent in a step, the mean of all
    planned: float
    held: float  # bytes of all its tensors after a step, likewise
    planned_held: float


def measure(layout: Layout, processes: int, batches: int = 1) -> Measured:
    """A few steps of `batches` batches each, in processes of this machine."""
    context = multiprocessing.get_context("spawn")
    told, tell = context.Pipe(duplex=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = processes, port, layout, batches, tell
    started = [context.Process(target=_train, args=(rank, *given)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        raise OSError(f"sent: processes ended with {[process.exitcode for process in started]}")
    found = [told.recv() for _ in started]
    parameters = sum(parameter.numel() for parameter in GPT(SHAPE).parameters())
    sent, held = (sum(each[place] for each in found) / processes for place in (0, 1))
    kinds = layout.sent(parameters, processes, 4, 4)
    planned = sum(kinds.values()) + kinds["reduce-scatter"]
    return Measured(layout, processes, batches, sent, planned, held, layout.held(parameters, 4))


def _train(rank: int, processes: int, port: int, layout: Layout, batches: int, tell) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world, model = join("cpu"), GPT(SHAPE)
    called: torch.nn.Module = model
    if layout.shards > 1:
        shard(model, world, layout.shards, layout.reshards)
    else:
        called = replicate(model, world)
    step = Step(called, adamw(model, 1e-3), world, 1.0)
    idx = torch.randint(0, 257, (batches, 1, 64))
    for _ in range(2):
        step(idx, idx)
    dist.barrier()
    before = _acknowledged()
    for _ in range(STEPS):
        step(idx, idx)
    dist.barrier()
    tell.send(((_acknowledged() - before) / STEPS, _held()))
    leave(world)


def _acknowledged() -> int:
    """Bytes that others have got from this process, over all its TCP connections."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                    told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("<Q", told, _ACKNOWLEDGED)[0]
        except FileNotFoundError:  # the listing's own
            continue
    return total


def _held() -> int:
    """Bytes of the memory that tensors have, each once."""
    gc.collect()
    found = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter):
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def main(options: argparse.Namespace) -> int:
    """1 if what was measured is not what was planned, to a twentieth."""
    print(f"{'':20}{'processes':>10}{'batches':>9}{'sent':>12}{'planned':>12}{'held':>12}{'planned':>12}")
    fits = True
    for layout, processes in LAYOUTS.items():
        for batches in (1, 2):
            if batches > 1 and layout.reshards:
                continue  # what it scatters again for each batch is the choice
            each = measure(layout, processes, batches)
            sizes = "".join(f"{value / 1e6:>10.2f}MB" for value in each[3:])
            print(f"{layout.name:20}{processes:>10}{batches:>9}{sizes}", flush=True)
            fits = fits and abs(each.sent / each.planned - 1) < 0.05 and abs(each.held / each.planned_held - 1) < 0.05
    return int(not fits)
