"""One training run in one of its processes: the steps, and what is looked at, evaluated and saved between them."""

import dataclasses
import datetime
import functools
import math
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch
from torch import Tensor, nn

from fastgpt import data, ops
from fastgpt.data.tokenizer import Named, end_of_text
from fastgpt.model import GPT
from fastgpt.training import monitor, state
from fastgpt.training.capture import why_no_graph
from fastgpt.training.checkpoint import Checkpoints
from fastgpt.training.distributed import World, leave, replicate, reshard, shard
from fastgpt.training.optimizer import adamw, muon, set_learning_rate
from fastgpt.training.saving import BackgroundSaver, Saver
from fastgpt.training.settings import TrainConfig, autocast_dtype, check_fp8
from fastgpt.training.signals import Signals
from fastgpt.training.step import Step, first_bad
from fastgpt.training.tracking import trackers

CHECKPOINTS = "checkpoints"
# Settings that change no bit of what the steps compute, or that a longer run is asked for by.
SHOWN = (
    *("init_from", "max_iters", "eval_interval", "eval_iters", "log_interval", "checkpoint_interval", "tensorboard"),
    *("wandb", "sample_tokens", "sample_prompt", "skip_nonfinite", "activation_checkpointing", "device", "cuda_graph"),
    "timeout",
)
OVERFLOWS = 100  # steps in a row that float16 may skip; its scale then is below 2^-84 of where it started


class Run:
    """The state of one training run, in one of its processes."""

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        encoding: tiktoken.Encoding | Named,
        corpus: data.Corpus,
        folder: Path,
        world: World,
        signals: Signals,
    ):
        check_fp8(model.config, config, world.size)
        self.model, self.config, self.encoding, self.corpus = model, config, encoding, corpus
        self.folder, self.world, self.signals, self.device = folder, world, signals, world.device
        where = Checkpoints(folder / CHECKPOINTS), folder, world, self.say
        timeout = datetime.timedelta(seconds=config.timeout)
        self.saver = BackgroundSaver(*where, timeout=timeout) if world.size > 1 else Saver(*where)
        block, autocast = model.config.block_size, autocast_dtype(config, world.device)
        self.windows = config.windows(block)  # a step, in all processes
        mine = self.windows // world.size
        self.batch = max(size for size in range(1, min(mine, config.batch_size) + 1) if mine % size == 0)
        self.order = data.Order(corpus.train, block, config.order, config.seed)
        self.end = end_of_text(encoding) if config.document_mask else None
        if config.compile and model.config.dropout and torch.__version__.startswith("2.13"):
            warnings.warn("torch 2.13 may compile dropout wrongly (pytorch issue 198333)", stacklevel=2)
        self.forward = _distributed(model, config, world)  # what a step calls; the model itself is for all else
        rates = config.learning_rate, config.weight_decay, (config.beta1, config.beta2)
        self.why_no_graph = why_no_graph(model.config, config, world, model)
        graph = self.why_no_graph is None
        self.optimizer = muon(model, *rates) if config.optimizer == "muon" else adamw(model, *rates, graph)
        how = autocast, graph, self.end, config.skip_nonfinite > 0
        self.step_on = Step(self.forward, self.optimizer, world, config.grad_clip, *how)
        torch.manual_seed(_rank_seed(config.seed, world.rank, 0))  # of dropout
        self.steps_done = 0
        self.seen = 0  # windows of the training tokens, which is the position in the data
        self.rows: list[dict] = []  # of metrics.csv: one an evaluation
        self.recent: list[float] = []  # losses since the last row
        self.seconds = 0.0  # of the processes before this one
        self.overflows = 0
        self.skipped = 0  # steps that were not finite
        self.started = time.perf_counter()
        self.monitor: monitor.Monitor | None = None
        if world.rank == 0:
            told = trackers(config.tensorboard, config.wandb)
            self.monitor = monitor.Monitor(folder, model.config, world.device, world.size, told)

    def restore(self, saved: state.Saved) -> None:
        facts = saved.facts
        state.restore(saved, self.model, self.optimizer, self.world, self.saver.group)
        self.steps_done, self.seen, self.rows = facts["step"], facts["windows"], list(facts["rows"])
        self.recent, self.seconds, self.skipped = list(facts["recent"]), facts["seconds"], facts.get("skipped", 0)
        if facts.get("scaler"):
            self.step_on.scaler.load_state_dict(facts["scaler"])
        was = {**facts["model"], **facts["train"], **facts["versions"]}
        settings = {**dataclasses.asdict(self.model.config), **dataclasses.asdict(self.config)}
        shown = (*SHOWN, "backend") if self.device.type == "cpu" else SHOWN  # where each is PyTorch
        now = {name: value for name, value in settings.items() if name not in shown}
        now.update(state.versions(self.device))
        notes = [f"{name} was {was.get(name)}, is {now[name]}" for name in now if was.get(name, now[name]) != now[name]]
        if not state.restore_generators(saved, self.world):
            torch.manual_seed(_rank_seed(self.config.seed, self.world.rank, self.steps_done))
            if facts["processes"] != self.world.size:
                notes.append(f"processes were {facts['processes']}, are {self.world.size}")
            if self.model.config.dropout:
                notes.append("dropout draws anew")
        if notes and self.world.rank == 0:
            print(f"not to the bit as an uninterrupted run: {'; '.join(notes)}", flush=True)

    def description(self) -> str:
        block, train, val = self.model.config.block_size, self.corpus.train, self.corpus.val
        serves = ops.backend_in_words(self.model.config.backend, self.model.wte.weight)
        if self.model.fp8 is not None:
            how = "simulated" if self.model.config.fp8_simulate else "by the hardware"
            serves += f", matmuls of 8-bit floats ({self.model.config.fp8}) {how}"
        where = "the CPU" if self.device.type == "cpu" else self.device
        batches = self.windows // self.world.size // self.batch
        graph = "one CUDA graph a step\n" if self.why_no_graph is None else f"no CUDA graph: {self.why_no_graph}\n"
        graph = graph if self.device.type == "cuda" else ""  # where nobody looks for one
        shares = f" in {batches} x {self.world.size} batches" if batches * self.world.size > 1 else ""
        return (
            f"{self.model.num_parameters():,} parameters, {self.config.max_iters} steps of "
            f"{self.windows} x {block} tokens{shares} on {where}, {serves}\n{graph}"
            f"{self.corpus.name}: {len(train):,} tokens to train on, {len(val):,} to validate"
        )

    def loop(self) -> None:
        config, first = self.config, self.steps_done
        tokens_a_step = self.windows * self.model.config.block_size
        self.started = time.perf_counter()
        unread: list[tuple[Tensor, Tensor, Tensor]] = []
        if first >= config.max_iters:  # it may have been stopped between its last checkpoint and its model
            self.saver.leave_model(self.model, self.facts())
        if self.monitor is not None:
            self.monitor.start(first, config.max_iters)
        while self.steps_done < config.max_iters:
            self.world.watch()
            unread.append(self.step())
            last = self.steps_done == config.max_iters
            evaluates = self.steps_done % config.eval_interval == 0 or last
            saves = last or self.steps_done % (config.checkpoint_interval or config.eval_interval) == 0
            stop = self.world.agree(self.signals.got)
            if not (stop or evaluates or saves or self.steps_done % config.log_interval == 0):
                continue
            steps = len(unread)
            losses, norm = self.read(unread)
            self.recent += losses
            speed = (self.steps_done - first) * tokens_a_step / (time.perf_counter() - self.started)
            rate = config.learning_rate_at(self.steps_done - 1)
            if self.monitor is not None:
                self.monitor.stepped(self.steps_done, steps, losses[-1] if losses else math.nan, norm, rate, speed)
            if evaluates:
                self.rows.append(
                    {
                        "step": self.steps_done,
                        "train_loss": sum(self.recent) / len(self.recent) if self.recent else math.nan,
                        "val_loss": self.evaluate(),
                        "learning_rate": rate,
                        "tokens_per_second": speed,
                        "seconds": self.seconds + time.perf_counter() - self.started,
                        "grad_norm": norm,
                    }
                )
                self.recent.clear()
            if saves or stop:
                self.save(needed=last or bool(stop))
            if evaluates:  # after the save: what only shows the run must not cost it
                self.report()
            if stop and not last:
                self.end_early(stop)

    def step(self) -> tuple[Tensor, Tensor, Tensor]:
        """One optimizer step; its loss, the norm of its gradients, and this process's own loss, all on the device."""
        set_learning_rate(self.optimizer, self.config.learning_rate_at(self.steps_done))
        if not self.model.training:  # after an evaluation: to ask every module of 124M takes 0.3 ms
            self.model.train()
        loss, norm = self.step_on(*self.batches(self.seen))
        self.steps_done += 1
        self.seen += self.windows
        return loss.clone(), norm.clone(), self.step_on.own.clone()

    def batches(self, seen: int) -> tuple[Tensor, Tensor]:
        """This process's inputs and targets (N, B, T) of the step whose first window has the number `seen`."""
        mine, block = self.windows // self.world.size, self.model.config.block_size
        starts = self.order.starts(seen + self.world.rank * mine, mine)
        idx, targets = data.windows(self.corpus.train, starts, block, self.device)
        return idx.view(-1, self.batch, block), targets.reshape(-1, self.batch, block)

    def read(self, unread: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[list[float], float]:
        """The losses of the steps since the last look, but for those that were skipped, and the last norm; waits for
        the device.

        FloatingPointError, in every process, if one of them was not finite and skip_nonfinite steps were already:
        nothing was updated from it.
        """
        found = torch.stack([torch.stack(each) for each in unread]).tolist()
        for number, (loss, norm, own) in enumerate(found):
            overflow = self.step_on.scaler.is_enabled() and not math.isfinite(norm)
            self.overflows = self.overflows + 1 if overflow else 0
            if math.isfinite(loss) and (math.isfinite(norm) or overflow) and self.overflows <= OVERFLOWS:
                continue
            before = self.steps_done - len(found) + number
            if self.skipped == self.config.skip_nonfinite or self.overflows > OVERFLOWS:
                self.fail(before, loss, norm, own)
            self.skipped += 1
            if self.monitor is not None:
                self.monitor.say(
                    f"step {before + 1} was skipped: its loss is {loss}, its gradients' norm {norm}; "
                    f"{self.skipped} of skip_nonfinite = {self.config.skip_nonfinite}"
                )
        unread.clear()
        return [loss for loss, _, _ in found if math.isfinite(loss)], found[-1][1]

    def fail(self, before: int, loss: float, norm: float, own: float) -> None:
        """Find where it came from, on the batches of the step after `before` steps, and raise."""
        seen = self.seen - (self.steps_done - before) * self.windows
        owns = [float(each) for each in self.world.gather(torch.tensor(own, dtype=torch.float64, device="cpu"))]
        ranks = [rank for rank, each in enumerate(owns) if not math.isfinite(each)]
        self.model.train()
        module = self.forward if self.config.fsdp else self.model  # FSDP's forward is all processes' together
        tensor = first_bad(self.step_on, module, *self.batches(seen), self.config.fsdp)
        what = f"the loss of step {before + 1} is {loss}"
        if math.isfinite(loss):
            what = f"the gradients of step {before + 1} have the norm {norm}"
        if self.overflows > OVERFLOWS:
            what = f"{self.overflows} steps to step {before + 1} overflowed float16 in a row"
        where = f"rank {', '.join(map(str, ranks))}" if ranks else f"rank {self.world.rank}"
        raise FloatingPointError(
            f"{what} on {where}; the first bad tensor is {tensor}; nothing was updated from it, and the checkpoints in "
            f"{self.folder} are as they were"
        )

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over eval_iters batches of windows spread evenly over the validation tokens, shared by all
        processes."""
        block, tokens, world = self.model.config.block_size, self.corpus.val, self.world
        windows = min(self.config.eval_iters * self.config.batch_size, (len(tokens) - 1) // block)
        starts = np.linspace(0, len(tokens) - block - 1, windows).astype(np.int64)
        parts = np.array_split(starts, math.ceil(windows / self.config.batch_size))
        self.model.eval()
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for first in range(0, len(parts), world.size):  # every process as often, for FSDP gathers in each forward
            mine = first + world.rank
            part = parts[min(mine, len(parts) - 1)]
            loss = self.step_on.loss(self.model, *data.windows(tokens, part, block, self.device))
            total += loss.float() * (len(part) if mine < len(parts) else 0)
        reshard(self.model)
        return world.mean(total).item() * world.size / windows

    def report(self) -> None:
        """By rank 0 alone, so nothing in it may be a collective: the others are at the next step already."""
        if self.monitor is None:
            return
        config, encoding = self.config, self.encoding
        self.monitor.evaluated(self.rows)
        if config.fsdp or isinstance(encoding, Named):  # one process can't run shards; without an encoding is no text
            return
        if config.sample_tokens:
            prompt, tokens, seed = config.sample_prompt, config.sample_tokens, config.seed
            write = functools.partial(monitor.sample, self.model, encoding, prompt, tokens, seed)
            self.monitor.sampled(self.steps_done, write)

    def save(self, needed: bool) -> None:
        """A checkpoint, and the model in the folder itself; saving.py says how."""
        self.saver.save(self.model, self.optimizer, self.facts(), needed)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of the run, all of it JSON."""
        return {
            "step": self.steps_done,
            "windows": self.seen,
            "model": dataclasses.asdict(self.model.config),
            "train": dataclasses.asdict(self.config),
            "encoding": self.encoding.name,
            "data": self.corpus.facts(),
            "rows": self.rows,
            "recent": self.recent,
            "seconds": self.seconds + time.perf_counter() - self.started,
            "skipped": self.skipped,
            "processes": self.world.size,
            "scaler": self.step_on.scaler.state_dict(),
            "versions": state.versions(self.device),
        }

    def say(self, text: str) -> None:
        if self.monitor is not None:
            self.monitor.say(text)

    def close(self) -> None:
        """However the run ended."""
        self.saver.close()
        if self.monitor is not None:
            self.monitor.close()

    def end_early(self, stop: int) -> None:
        if self.monitor is not None:
            self.monitor.close()
            done = f"{self.steps_done} of {self.config.max_iters} steps"
            print(f"interrupted after {done}; the model so far is in {self.folder}, and --resume goes on", flush=True)
        leave(self.world)
        raise KeyboardInterrupt if stop == signal.SIGINT else SystemExit(128 + stop)


def _distributed(model: GPT, config: TrainConfig, world: World) -> nn.Module:
    """The model as a step calls it: compiled, copied or sharded as configured."""
    if world.size > 1:
        _warm(model, world)
    if config.fsdp:
        shard(model, world, config.fsdp_shard, config.fsdp_reshard, autocast_dtype(config, world.device))
        if config.compile:
            model.compile()
        return model
    called: Any = torch.compile(model) if config.compile else model
    return replicate(called, world) if world.size > 1 else called


def _warm(model: GPT, world: World) -> None:
    """Compile the kernels that a step launches, so that no process waits in a collective for another's compiler."""
    idx = torch.zeros(1, model.config.block_size, dtype=torch.int64, device=world.device)
    model(idx, idx).backward()
    model.zero_grad(set_to_none=True)


def _rank_seed(seed: int, rank: int, step: int) -> int:
    """Of dropout: another one for each process, and for each place where a run is taken up by other processes."""
    mixed = np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0]
    return int(mixed >> np.uint64(1))
