"""Training: a GPT from a corpus, on one device or many, that can be stopped anywhere and goes on to the bit."""

import contextlib
import dataclasses
import shutil
from pathlib import Path

import tiktoken
import torch

from fastgpt import data
from fastgpt.atomic import remove_unfinished, replacing, writable_folder
from fastgpt.data.tokenizer import Named, end_of_text
from fastgpt.model import GPT, GPTConfig
from fastgpt.training import monitor, state
from fastgpt.training.checkpoint import Checkpoint, Checkpoints, locked
from fastgpt.training.distributed import World, join, leave
from fastgpt.training.loop import CHECKPOINTS, Run, Signals, autocast_dtype
from fastgpt.training.settings import SETTINGS, TrainConfig, settings_text
from fastgpt.weights import CONFIG, WEIGHTS, from_pretrained

__all__ = ["CHECKPOINTS", "TrainConfig", "fit", "pretrained"]


def fit(
    model_config: GPTConfig,
    config: TrainConfig,
    encoding: tiktoken.Encoding | Named,
    source: str | Path | None,
    out: str | Path,
    overwrite: bool = False,
    resume: bool = False,
    strict_resume: bool = False,
) -> GPT:
    """Train a GPT on `source` (see data.load_corpus) and leave it, with all that monitor.py and state.py write, in the
    folder `out`.

    encoding: of the text or the tokens in `source`; for tokens Named will do, and then no samples are written.
    resume: go on from the newest whole checkpoint in `out`, or start where there is none yet. strict_resume: ValueError
    where the newest is not whole. Under torchrun every process calls this. On Ctrl-C and SIGTERM the step is finished
    and saved before KeyboardInterrupt or SystemExit(143); a second one ends the process at once. ValueError or OSError
    before the first step for anything that would stop a later one, an `out` that holds a model (without `overwrite` or
    `resume`) included; FloatingPointError for a loss or gradient that is not finite, beyond the skip_nonfinite that may
    be passed over, before anything is updated from it.
    """
    folder = Path(out)
    if (folder / WEIGHTS).exists() and not overwrite and not resume:
        raise FileExistsError(
            f"{folder / WEIGHTS} holds a trained model: choose another folder (--out) or --overwrite it"
        )
    if model_config.vocab_size < encoding.n_vocab:
        sizes = f"vocab_size = {model_config.vocab_size}, the encoding {encoding.name!r} has {encoding.n_vocab} ids"
        raise ValueError(f"the model can't hold every token: {sizes}")
    config.windows(model_config.block_size)
    if config.document_mask:
        end_of_text(encoding)
    world = join(config.device)
    _hold_device(model_config, config, world)
    corpus = data.load_corpus(source, encoding, model_config.block_size)
    with contextlib.ExitStack() as stack:
        if world.rank == 0:
            stack.enter_context(locked(writable_folder(folder)))
        signals = stack.enter_context(Signals())
        checkpoint = _starting_point(folder, world, overwrite, resume, strict_resume)
        saved = None if checkpoint is None else state.read(checkpoint, model_config)
        if saved is not None and saved.facts.get("data") != corpus.facts():
            was, now = saved.facts.get("data"), corpus.facts()
            raise ValueError(f"the data changed since {folder} was trained on it: {was} there, {now} in {corpus.name}")
        if saved is not None and saved.facts.get("encoding") != encoding.name:
            was = saved.facts.get("encoding")
            raise ValueError(f"{folder} was trained on tokens of the encoding {was!r}, not of {encoding.name!r}")
        torch.manual_seed(config.seed)
        if saved is None and config.init_from != "scratch":
            model = pretrained(config.init_from, model_config)
        else:
            model = GPT(model_config)
        run = Run(model.to(world.device), config, encoding, corpus, folder, world, signals)
        if saved is not None:
            run.restore(saved)
        if world.rank == 0:
            if saved is None and overwrite:  # only now is nothing left that could fail for want of something
                _clear(folder)
            with replacing(folder / SETTINGS) as new:
                given = None if source is None else str(source)
                new.write_text(settings_text(model_config, config, data=given, encoding=encoding.name), "utf-8")
            print(run.description(), flush=True)
            if isinstance(encoding, Named) and config.sample_tokens:
                print(f"samples are left out, and all else goes on: {encoding.why}", flush=True)
        try:
            run.loop()
        finally:
            if run.monitor is not None:
                run.monitor.close()
    leave(world)
    return model


def pretrained(source: str, shape: GPTConfig | None = None, **changes) -> GPT:
    """The weights at `source` of any family, or of a checkpoint of ours, as a GPT to train on; `changes` replace fields
    of its GPTConfig, where a smaller block_size crops the positions. ValueError if it is not of the `shape`."""
    path = Path(source)
    if (path / state.MODEL).is_dir():
        source = str(path / state.MODEL)
    if shape is not None:
        changes = {name: getattr(shape, name) for name in (*state.FREE, "vocab_size", "block_size")}
    block = changes.pop("block_size", None)
    model = from_pretrained(source, **changes)
    if block is not None and block != model.config.block_size:
        if block > model.config.block_size:
            raise ValueError(f"{source} has {model.config.block_size} positions, too few for block_size = {block}")
        weights = model.state_dict()
        weights["wpe.weight"] = weights["wpe.weight"][:block].clone()
        model = state.assembled(dataclasses.replace(model.config, block_size=block), weights)
    if shape is not None and model.config != shape:
        now, then = dataclasses.asdict(shape), dataclasses.asdict(model.config)
        differ = "; ".join(f"{name} = {then[name]!r}, not {now[name]!r}" for name in now if now[name] != then[name])
        raise ValueError(f"{source} is of another shape: {differ}")
    return model


def _hold_device(model_config: GPTConfig, config: TrainConfig, world: World) -> None:
    """ValueError for what can't be done with this number and kind of devices."""
    windows = config.windows(model_config.block_size)
    if windows % world.size:
        raise ValueError(f"{windows} windows a step do not divide among {world.size} processes")
    if config.cuda_graph and (world.device.type != "cuda" or world.size > 1):
        raise ValueError(f"cuda_graph needs one NVIDIA GPU, not {world.size} x {world.device.type}")
    if config.cuda_graph and autocast_dtype(config, world.device) == torch.float16:
        raise ValueError("cuda_graph and float16 do not go together: the host decides about each step's scale")
    if config.fsdp and world.size == 1:
        raise ValueError("fsdp needs several processes: torchrun --nproc_per_node N -m fastgpt train …")
    if config.fsdp and autocast_dtype(config, world.device) == torch.float16:
        raise ValueError("fsdp and float16 do not go together: each shard would scale its own loss")


def _clear(folder: Path) -> None:
    """What an earlier run left in the folder, but for what this one replaces."""
    Checkpoints(folder / CHECKPOINTS).clear()
    (folder / monitor.SAMPLES).unlink(missing_ok=True)
    shutil.rmtree(folder / monitor.EVENTS, ignore_errors=True)


def _starting_point(folder: Path, world: World, overwrite: bool, resume: bool, strict: bool) -> Checkpoint | None:
    """The checkpoint to go on from, the same one in every process; None to start."""
    checkpoints, step = Checkpoints(folder / CHECKPOINTS), -1
    if world.rank == 0:
        checkpoints.tidy()
        remove_unfinished(*(folder / name for name in (WEIGHTS, CONFIG, SETTINGS, monitor.METRICS, monitor.PLOT)))
        if resume:
            newest, passed = checkpoints.newest()
            for each, reason in passed:
                print(f"passed over {each.path}: {reason}", flush=True)
            if passed and strict:
                raise ValueError(f"strict_resume: {passed[0][0].path} is not whole: {passed[0][1]}")
            if newest is None and passed:
                raise ValueError(f"none of the {len(passed)} checkpoints in {checkpoints.folder} is whole")
            if newest is None and (folder / WEIGHTS).exists():
                raise ValueError(f"{folder} holds a model and no checkpoint to resume from; --overwrite starts anew")
            print("nothing to resume yet" if newest is None else f"resuming from {newest.path}", flush=True)
            step = -1 if newest is None else newest.step
        elif checkpoints.all() and not overwrite:
            raise FileExistsError(f"{checkpoints.folder} holds checkpoints: --resume goes on, --overwrite starts anew")
    step = world.agree(step)
    return None if step < 0 else Checkpoint(checkpoints.folder / f"step-{step:08d}", step)
