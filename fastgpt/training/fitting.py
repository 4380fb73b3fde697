"""fit: one training run from its plan to the trained model."""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiktoken
import torch

from fastgpt import data
from fastgpt.atomic import remove_unfinished, replacing, writable_folder
from fastgpt.data.tokenizer import Named, end_of_text
from fastgpt.model import GPT, GPTConfig
from fastgpt.training import monitor, state, tracking
from fastgpt.training.capture import out_of_memory_told, why_no_graph
from fastgpt.training.checkpoint import LOCK, Checkpoint, Checkpoints, locked
from fastgpt.training.distributed import World, join, leave
from fastgpt.training.plan import Plan, plan_run, pretrained
from fastgpt.training.run import CHECKPOINTS, Run
from fastgpt.training.settings import SETTINGS, TrainConfig, autocast_dtype, settings_text
from fastgpt.training.signals import Signals
from fastgpt.weights import CONFIG, WEIGHTS


def fit(
    model_config: GPTConfig | Mapping[str, Any],
    config: TrainConfig | Mapping[str, Any],
    encoding: tiktoken.Encoding | Named | str | None,
    source: str | Path | None,
    out: str | Path,
    overwrite: bool = False,
    resume: bool = False,
    strict_resume: bool = False,
    settings: str | Path | None = None,
) -> GPT:
    """Train a GPT on `source` (see data.load_corpus) and leave it, with all that monitor.py and state.py write, in the
    folder `out`: `train` with the plan that plan_run makes of the arguments, whose docstring says what they may be."""
    plan = plan_run(model_config, config, encoding, source, out, resume, settings)
    return train(plan, overwrite, strict_resume)


def train(plan: Plan, overwrite: bool = False, strict_resume: bool = False) -> GPT:
    """Carry out a plan; the trained model.

    plan.encoding: of the text or the tokens in plan.source; for tokens Named will do, and then no samples are written.
    plan.resume: go on from the newest whole checkpoint in plan.out, or start where there is none yet. strict_resume:
    ValueError where the newest is not whole. Under torchrun every process calls this. On Ctrl-C and SIGTERM the step is
    finished and saved before KeyboardInterrupt or SystemExit(143); a second one ends the process at once. torch's
    generators are seeded, and stay where the last step leaves them. ValueError or
    OSError before the first step for anything that would stop a later one, a folder that holds a model (without
    `overwrite` or plan.resume) included; FloatingPointError for a loss or gradient that is not finite, beyond the
    skip_nonfinite that may be passed over, before anything is updated from it.
    """
    model_config, config, encoding, source, folder, resume, weights = plan
    if (folder / WEIGHTS).exists() and not overwrite and not resume:
        raise FileExistsError(
            f"{folder / WEIGHTS} holds a trained model: choose another folder (--out) or --overwrite it"
        )
    if model_config.vocab_size < encoding.n_vocab:
        sizes = f"vocab_size = {model_config.vocab_size}, the encoding {encoding.name!r:.60} has {encoding.n_vocab} ids"
        raise ValueError(f"the model can't hold every token: {sizes}")
    config.windows(model_config.block_size)
    if config.document_mask:
        end_of_text(encoding)
    world = join(config.device, config.timeout)
    _hold_device(model_config, config, world)
    corpus = data.load_corpus(source, encoding, model_config.block_size)
    if folder.is_dir() and not data.holds_tokens(source) and source is not None and folder.samefile(source):
        raise ValueError(f"{folder} holds the texts, and the run's files would lie among them: choose another --out")
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    was_locked, held, begun = (folder / LOCK).exists(), False, False
    try:
        with contextlib.ExitStack() as stack:
            if world.rank == 0:
                stack.enter_context(locked(writable_folder(folder)))
                held = True
            signals = stack.enter_context(Signals())
            saved = _saved(_starting_point(folder, world, overwrite, resume, strict_resume), plan, corpus)
            torch.manual_seed(config.seed)
            if saved is not None or config.init_from == "scratch":
                model = _made(model_config)
            else:
                model = pretrained(config.init_from, model_config) if weights is None else weights
            run = Run(model.to(world.device), config, encoding, corpus, folder, world, signals)
            if saved is not None:
                run.restore(saved)
            if world.rank == 0:
                description = run.description()
                if saved is None and overwrite:  # only now is nothing left that could fail for want of something
                    _clear(folder)
                begun = True
                with replacing(folder / SETTINGS) as new:
                    given = None if source is None else str(source)
                    new.write_text(settings_text(model_config, config, data=given, encoding=encoding.name), "utf-8")
                print(description, flush=True)
                if isinstance(encoding, Named) and config.sample_tokens:
                    print(f"samples are left out, and all else goes on: {encoding.why}", flush=True)
            try:
                with out_of_memory_told(run.step_on.graph):
                    run.loop()
            finally:
                run.close()
    finally:
        if world.rank == 0 and not begun:  # a run that is refused leaves nothing
            if held and not was_locked:
                (folder / LOCK).unlink(missing_ok=True)
            for each in made:
                with contextlib.suppress(OSError):  # no longer empty
                    each.rmdir()
    leave(world)
    return model


def _made(config: GPTConfig) -> GPT:
    """A model in float32 on the CPU, whatever the user's defaults are: what is drawn is the same for every device."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            return GPT(config)
    finally:
        torch.set_default_dtype(dtype)


def _saved(checkpoint: Checkpoint | None, plan: Plan, corpus: data.Corpus) -> state.Saved | None:
    """What a run goes on from; ValueError where it is another model's, or of other tokens."""
    if checkpoint is None:
        return None
    saved = state.read(checkpoint, plan.model)
    if saved.facts.get("data") != corpus.facts():
        was, now = saved.facts.get("data"), corpus.facts()
        raise ValueError(f"the data changed since {plan.out} was trained on it: {was} there, {now} in {corpus.name}")
    if (kind := state.optimizer_in(saved.facts)) != plan.config.optimizer:
        kinds = f"optimizer = {kind!r}, not {plan.config.optimizer!r}"
        raise ValueError(f"{plan.out} was trained with {kinds}: the state of one is none of the other's")
    if (name := saved.facts.get("encoding")) != plan.encoding.name:
        named = f"the encoding {name!r:.60}, not of {plan.encoding.name!r:.60}"
        raise ValueError(f"{plan.out} was trained on tokens of {named}")
    return saved


def _hold_device(model_config: GPTConfig, config: TrainConfig, world: World) -> None:
    """ValueError for what can't be done with this number and kind of devices."""
    windows = config.windows(model_config.block_size)
    if windows % world.size:
        raise ValueError(f"{windows} windows a step do not divide among {world.size} processes")
    why_no_graph(model_config, config, world)
    if config.fsdp and world.size == 1:
        raise ValueError("fsdp needs several processes: torchrun --nproc_per_node N -m fastgpt train …")
    if config.fsdp and config.optimizer == "muon":
        raise ValueError("fsdp and optimizer = 'muon' do not go together: a step of Muon's needs whole matrices")
    if config.fsdp_shard is not None and world.size % config.fsdp_shard:
        raise ValueError(f"fsdp_shard = {config.fsdp_shard} does not divide {world.size} processes")
    if config.fsdp and autocast_dtype(config, world.device) == torch.float16:
        raise ValueError("fsdp and float16 do not go together: each shard would scale its own loss")


def _clear(folder: Path) -> None:
    """What an earlier run left in the folder, but for what this one replaces."""
    Checkpoints(folder / CHECKPOINTS).clear()
    for name in (monitor.SAMPLES, tracking.WANDB_ID):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / tracking.EVENTS, ignore_errors=True)


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
