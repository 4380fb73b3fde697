"""What is in a checkpoint: all that a run needs to go on as if it had never stopped.

    model/                 config.json and model.safetensors, as transformers' GPT2LMHeadModel loads them; of a model
                           with windows, which that has not, as fastgpt's own folder
    optimizer.safetensors  AdamW's moments and step counts, Muon's momenta, by parameter
    shards/                where several processes train, in its place: each one's part of weights and moments
    fp8.safetensors        the magnitudes that scales of 8-bit floats come from, where training multiplies those
    random.safetensors     the states of torch's generators, a tensor for each rank and device
    state.json             the step, the position in the data, the settings, the metrics
    manifest.json          sizes and SHA-256 of the others (checkpoint.py)

The data needs no generator's state: its order is a function of the seed and the position (data.py). Nothing is pickled.
"""

import dataclasses
import json
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastgpt.atomic import read_json
from fastgpt.model import GPT, GPTConfig
from fastgpt.training.checkpoint import Checkpoint
from fastgpt.training.distributed import SHARDS, World, local_part, placed, whole
from fastgpt.training.optimizer import by_muon
from fastgpt.weights import from_pretrained, save_model, save_pretrained, stream_model, stream_pretrained
from fastgpt.weights.files import read_tensors, write_tensors

MODEL, OPTIMIZER, RANDOM, STATE = "model", "optimizer.safetensors", "random.safetensors", "state.json"
FP8 = "fp8.safetensors"
MOMENTS = {"adamw": ("step", "exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}
# Fields of GPTConfig that a resume may change.
FREE = ("dropout", "residual", "activation_checkpointing", "backend", "fp8", "fp8_simulate")


class Snapshot(NamedTuple):
    """The tensors of a run, whole and on the CPU."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]  # h.0.attn.c_attn.weight/exp_avg, …
    random: dict[str, Tensor]  # cpu.0, cuda.0, …: uint8
    fp8: Mapping[str, Tensor] = MappingProxyType({})  # as Fp8.state has it, where training multiplies such floats

    def size(self) -> int:
        """Bytes on the disk, about."""
        return sum(size(part.values()) for part in self) + (1 << 16)


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of them, whole where they are sharded."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def snapshot(model: GPT, optimizer: torch.optim.Optimizer, world: World) -> Snapshot:
    """Of a process that is alone."""
    moments = moments_of(model, optimizer)
    fp8 = {} if model.fp8 is None else model.fp8.state()
    return Snapshot(whole(model.state_dict().items(), True), whole(moments.items(), True), generators(world), fp8)


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors themselves, sharded as they are: h.0.attn.c_attn.weight/exp_avg, …"""
    return {
        f"{name}/{moment}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        for moment in optimizer.state.get(parameter, ())
    }


def generators(world: World) -> dict[str, Tensor]:
    states, kind = {"cpu": torch.get_rng_state()}, world.device.type
    if kind == "cuda":
        states[kind] = torch.cuda.get_rng_state(world.device)
    elif kind == "mps":
        states[kind] = torch.mps.get_rng_state()
    return {f"{kind}.{rank}": each for kind, state in states.items() for rank, each in enumerate(world.gather(state))}


def versions(device: torch.device) -> dict[str, Any]:
    """What a bit of the result may depend on."""
    named = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
    return {**named, "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}


def write(folder: Path, config: GPTConfig, taken: Snapshot, facts: dict) -> None:
    """The files of a checkpoint but for its manifest; OSError if the disk fails."""
    (folder / MODEL).mkdir()
    model = assembled(config, taken.weights)
    if any(config.windows):
        save_model(model, folder / MODEL, facts["encoding"])
    else:
        save_pretrained(model, folder / MODEL)
    write_tensors(taken.moments, folder / OPTIMIZER)
    write_tensors(taken.random, folder / RANDOM)
    if taken.fp8:
        write_tensors(dict(taken.fp8), folder / FP8)
    (folder / STATE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def write_beside_shards(
    folder: Path,
    config: GPTConfig,
    dtype: torch.dtype,
    load: Callable[[str], Tensor],
    encoding: str,
    random: dict,
    facts: str,
) -> None:
    """What a checkpoint has beside its shards, in which load(name) finds a weight; its manifest is not yet there."""
    (folder / MODEL).mkdir()
    if any(config.windows):
        stream_model(config, dtype, load, folder / MODEL, encoding)
    else:
        stream_pretrained(config, dtype, load, folder / MODEL)
    write_tensors(random, folder / RANDOM)
    (folder / STATE).write_text(facts, encoding="utf-8")


def assembled(config: GPTConfig, weights: dict[str, Tensor]) -> GPT:
    """A GPT that holds these tensors themselves."""
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(weights, assign=True)
    return model


class Saved(NamedTuple):
    """A checkpoint that was read and found to be what it should."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    random: dict[str, Tensor]
    facts: dict[str, Any]
    shards: Any = None  # a sharded.Shards, which holds weights and moments instead
    fp8: Mapping[str, Tensor] = MappingProxyType({})


def read(checkpoint: Checkpoint, config: GPTConfig) -> Saved:
    """The checkpoint for a model of this shape; its files must have been verified. ValueError says what does not fit:
    a shape that changed, by field; a tensor that is missing, of another shape or dtype, or not finite."""
    path = checkpoint.path
    facts = read_json(path / STATE)
    said = facts.get("model")
    if not isinstance(said, dict) or not isinstance(facts.get("windows"), int) or facts.get("step") != checkpoint.step:
        raise ValueError(f"{path / STATE} is not the state of a run at step {checkpoint.step}")
    now = dataclasses.asdict(config)
    said = {field.name: field.default for field in dataclasses.fields(config)} | said  # of a field that came later
    changed = [
        f"{name} = {said.get(name)!r} there, {value!r} now"
        for name, value in now.items()
        if name not in FREE and said.get(name) != value
    ]
    if changed:
        raise ValueError(f"{path} is of another model: {'; '.join(changed)}")
    if (path / SHARDS).is_dir():
        from fastgpt.training.sharded import Shards

        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
        shards = Shards(path / SHARDS)
        shards.check({**shapes, **_moments_for(shapes, facts)}, checkpoint.manifest()["files"])
        return Saved({}, {}, _read(path / RANDOM), facts, shards)
    model = from_pretrained(path / MODEL, **{name: now[name] for name in FREE})
    weights = model.state_dict()
    moments, random = _read(path / OPTIMIZER), _read(path / RANDOM)
    expected = _moments_for({name: tensor.shape for name, tensor in weights.items()}, facts)
    if wrong := sorted(expected.keys() ^ moments.keys()):
        raise ValueError(f"{path / OPTIMIZER} and the model disagree about {len(wrong)} tensors, {wrong[0]} first")
    for name, shape in expected.items():
        if moments[name].shape != shape or moments[name].dtype != torch.float32:
            found = f"{moments[name].dtype} of shape {tuple(moments[name].shape)}"
            raise ValueError(f"{path / OPTIMIZER}: {name} is {found}, not float32 of {tuple(shape)}")
    fp8 = _read(path / FP8) if (path / FP8).is_file() else {}
    for name, tensor in (*weights.items(), *moments.items(), *fp8.items()):
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} is not finite")
    return Saved(weights, moments, random, facts, fp8=fp8)


def optimizer_in(facts: dict[str, Any]) -> str:
    """TrainConfig.optimizer of the run whose state.json holds these facts; before there was a choice it was AdamW."""
    return dict(facts.get("train") or {}).get("optimizer", "adamw")


def _moments_for(shapes: Mapping[str, torch.Size], facts: dict[str, Any]) -> dict[str, torch.Size]:
    """The shapes of the optimizer's tensors, of those of the weights."""
    muon = optimizer_in(facts) == "muon"
    return {
        f"{name}/{moment}": shape if moment != "step" else torch.Size()
        for name, shape in shapes.items()
        for moment in MOMENTS["muon" if muon and by_muon(name, len(shape)) else "adamw"]
    }


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except SafetensorError as error:
        raise ValueError(f"{path.parent}: {error}") from error


@torch.no_grad()
def restore(saved: Saved, model: GPT, optimizer: torch.optim.Optimizer, world: World, group: Any = None) -> None:
    """Put weights and moments in place, sharded where the model is, and what scales of 8-bit floats come from. Of
    several processes, all call it with a group of theirs over the hosts."""
    if model.fp8 is not None:
        model.fp8.load(saved.fp8, model.wte.weight.device)
    if saved.shards is not None:
        _restore_shards(saved, model, optimizer, world, group)
        return
    for name, parameter in model.named_parameters():
        parameter.copy_(placed(saved.weights[name], parameter))
        found = {moment: saved.moments.get(f"{name}/{moment}") for kind in MOMENTS.values() for moment in kind}
        optimizer.state[parameter] = {
            moment: tensor.to(parameter.device) if moment == "step" else placed(tensor, parameter)
            for moment, tensor in found.items()
            if tensor is not None
        }


def _restore_shards(saved: Saved, model: GPT, optimizer: torch.optim.Optimizer, world: World, group: Any) -> None:
    for name, parameter in model.named_parameters():
        kinds = _moments_for({name: parameter.shape}, saved.facts)
        for key, shape in kinds.items():  # a count is a scalar everywhere
            count = torch.zeros((), dtype=torch.float32, device=parameter.device)
            optimizer.state[parameter][key.removeprefix(f"{name}/")] = torch.zeros_like(parameter) if shape else count
    tensors = {**{name: p.data for name, p in model.named_parameters()}, **moments_of(model, optimizer)}
    saved.shards.load_into(tensors, group)
    bad = [name for name, tensor in tensors.items() if not local_part(tensor).isfinite().all()]
    if world.agree(bool(bad)):
        raise ValueError(f"{saved.shards.folder}: {bad[0] if bad else 'a tensor in another process'} is not finite")


def restore_generators(saved: Saved, world: World) -> bool:
    """False if the checkpoint is of another number of processes or of another kind of device."""
    ranks = sum(name.startswith("cpu.") for name in saved.random)
    kinds = {"cpu", world.device.type}
    if ranks != world.size or any(f"{kind}.{world.rank}" not in saved.random for kind in kinds):
        return False
    torch.set_rng_state(saved.random[f"cpu.{world.rank}"])
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(saved.random[f"cuda.{world.rank}"], world.device)
    elif world.device.type == "mps":
        torch.mps.set_rng_state(saved.random[f"mps.{world.rank}"])
    return True
