"""What is in a checkpoint: all that a run needs to go on as if it had never stopped.

    model/                 config.json and model.safetensors, as transformers' GPT2LMHeadModel loads them; of a model
                           with windows, which that has not, as fastgpt's own folder
    optimizer.safetensors  AdamW's moments and step counts, by parameter
    random.safetensors     the states of torch's generators, a tensor for each rank and device
    state.json             the step, the position in the data, the settings, the metrics
    manifest.json          sizes and SHA-256 of the others (checkpoint.py)

The data needs no generator's state: its order is a function of the seed and the position (data.py). Nothing is pickled.
"""

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastgpt.atomic import read_json
from fastgpt.model import GPT, GPTConfig
from fastgpt.training.checkpoint import Checkpoint
from fastgpt.training.distributed import World, placed, whole
from fastgpt.weights import from_pretrained, save_pretrained
from fastgpt.weights.files import read_tensors, write_tensors
from fastgpt.weights.saving import save_model

MODEL, OPTIMIZER, RANDOM, STATE = "model", "optimizer.safetensors", "random.safetensors", "state.json"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
FREE = ("dropout", "residual", "activation_checkpointing", "backend")  # fields of GPTConfig that a resume may change


class Snapshot(NamedTuple):
    """The tensors of a run, whole and on the CPU."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]  # h.0.attn.c_attn.weight/exp_avg, …
    random: dict[str, Tensor]  # cpu.0, cuda.0, …: uint8

    def size(self) -> int:
        """Bytes on the disk, about."""
        return sum(t.numel() * t.element_size() for part in self for t in part.values()) + (1 << 16)


def snapshot(model: GPT, optimizer: torch.optim.Optimizer, world: World) -> Snapshot:
    """Every process calls it; only rank 0 gets weights and moments."""
    moments = [
        (f"{name}/{moment}", optimizer.state[parameter][moment])
        for name, parameter in model.named_parameters()
        for moment in MOMENTS
        if optimizer.state.get(parameter)
    ]
    keep = world.rank == 0
    return Snapshot(whole(model.state_dict().items(), keep), whole(moments, keep), _generators(world))


def _generators(world: World) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(world.device)
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
    (folder / STATE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


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
    model = from_pretrained(path / MODEL, **{name: now[name] for name in FREE})
    weights = model.state_dict()
    try:
        moments, random = read_tensors(path / OPTIMIZER), read_tensors(path / RANDOM)
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error
    expected = {f"{name}/{m}": t.shape if m != "step" else torch.Size() for name, t in weights.items() for m in MOMENTS}
    if wrong := sorted(expected.keys() ^ moments.keys()):
        raise ValueError(f"{path / OPTIMIZER} and the model disagree about {len(wrong)} tensors, {wrong[0]} first")
    for name, shape in expected.items():
        if moments[name].shape != shape or moments[name].dtype != torch.float32:
            found = f"{moments[name].dtype} of shape {tuple(moments[name].shape)}"
            raise ValueError(f"{path / OPTIMIZER}: {name} is {found}, not float32 of {tuple(shape)}")
    for name, tensor in (*weights.items(), *moments.items()):
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} is not finite")
    return Saved(weights, moments, random, facts)


@torch.no_grad()
def restore(saved: Saved, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and moments in place, sharded where the model is."""
    for name, parameter in model.named_parameters():
        parameter.copy_(placed(saved.weights[name], parameter))
        state = {moment: placed(saved.moments[f"{name}/{moment}"], parameter) for moment in MOMENTS[1:]}
        step = saved.moments[f"{name}/step"].to(parameter.device)
        optimizer.state[parameter] = {"step": step, **state}


def restore_generators(saved: Saved, world: World) -> bool:
    """False if the checkpoint is of another number of processes or of another kind of device."""
    ranks = sum(name.startswith("cpu.") for name in saved.random)
    kinds = ["cpu", *(["cuda"] if world.device.type == "cuda" else [])]
    if ranks != world.size or any(f"{kind}.{world.rank}" not in saved.random for kind in kinds):
        return False
    torch.set_rng_state(saved.random[f"cpu.{world.rank}"])
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(saved.random[f"cuda.{world.rank}"], world.device)
    return True
