"""What a training run is told, put together from what its caller gives, a settings file and the run itself."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken

from fastgpt.data import holds_tokens
from fastgpt.data.characters import PREFIX
from fastgpt.data.tokenizer import BY_SIZE, Named, Unavailable, full_name, is_local, named
from fastgpt.data.tokenizer import encoding as encoding_named
from fastgpt.data.tokens import meta_beside, meta_of
from fastgpt.fields import build, fields_of
from fastgpt.model import GPT, GPTConfig
from fastgpt.training import state
from fastgpt.training.checkpoint import Checkpoints
from fastgpt.training.run import CHECKPOINTS
from fastgpt.training.settings import SETTINGS, TrainConfig, read_settings
from fastgpt.weights import from_pretrained

PRESET = "byte-0.8M"
PYTHON_PROMPT = "def "  # for the built-in corpus: without a prompt a sample begins like its tables of characters


class Plan(NamedTuple):
    model: GPTConfig
    config: TrainConfig
    encoding: tiktoken.Encoding | Named
    source: str | Path | None  # of the text or tokens; None is the built-in corpus
    out: Path
    resume: bool
    weights: GPT | None = None  # those of config.init_from, where their shape was asked for


def plan_run(
    model: GPTConfig | Mapping[str, Any],
    config: TrainConfig | Mapping[str, Any],
    encoding: tiktoken.Encoding | Named | str | None,
    source: str | Path | None,
    out: str | Path,
    resume: bool = False,
    settings: str | Path | None = None,
) -> Plan:
    """The plan of a run in the folder `out`. A configuration is taken as it is; a mapping, of some of its fields, goes
    over the TOML file `settings`, or without one over what the resumed run in `out` keeps.

    model: what neither says comes from the weights at init_from, or from a preset that the mapping may name ("preset").
    A run that goes on keeps its own shape, for what it began with may be gone. encoding: a name, or None for the one
    that the run, the tokens or the vocabulary's size tells. source None is the run's own, or the built-in corpus.
    init_from "resume" is resume, as nanoGPT says it. ValueError or OSError for what does not fit; nothing is written.
    """
    folder = Path(out)
    told = dataclasses.asdict(config) if isinstance(config, TrainConfig) else dict(config)
    if told.get("init_from") == "resume":
        resume = True
        del told["init_from"]
    own: dict[str, Any] = {}
    if resume and (folder / SETTINGS).is_file():
        own = read_settings(folder / SETTINGS)
    base = own if settings is None else read_settings(settings)
    source = base.get("data") if source is None else source
    usual = {"sample_prompt": PYTHON_PROMPT} if source is None else {}
    train = build(TrainConfig, {**usual, **fields_of(TrainConfig, base), **told})
    meta = {} if source is None else _meta(Path(source))
    told_name: Any = encoding or base.get("encoding") or meta.get("encoding")
    weights, preset = None, ""
    if isinstance(model, GPTConfig):
        shape = model
    else:
        preset = model.get("preset", base.get("preset", PRESET))
        changes = {name: value for name, value in model.items() if name != "preset"}
        changes = {**fields_of(GPTConfig, base), **changes}
        if train.init_from == "scratch":
            if isinstance(told_name, str) and (full := full_name(told_name)).startswith(PREFIX):
                changes.setdefault("vocab_size", encoding_named(full).n_vocab)
            shape = GPTConfig.preset(preset, **changes)
        elif own and Checkpoints(folder / CHECKPOINTS).all():
            shape = GPTConfig.from_dict({**fields_of(GPTConfig, own), **changes})
        else:
            weights = pretrained(train.init_from, **changes)
            shape = weights.config
    if encoding is None or isinstance(encoding, str):
        usual_name = BY_SIZE.get(shape.vocab_size, "byte" if preset.startswith("byte") else "gpt2")
        name = told_name or usual_name
        # Asked for here and now: in a settings file that an earlier run left, everything stands.
        given = {} if isinstance(config, TrainConfig) else config
        asked = encoding or any(given.get(option) for option in ("sample_prompt", "sample_tokens"))
        encoding = _encoding(name, None if asked or not holds_tokens(source) else meta, train.sample_tokens > 0)
    return Plan(shape, train, encoding, source, folder, resume, weights)


_GIVEN = ("vocab_size", "block_size", "window", "window_pattern")  # that a model takes on with others' weights


def pretrained(source: str, shape: GPTConfig | None = None, **changes) -> GPT:
    """The weights at `source` of any family, or of a checkpoint of ours, as a GPT to train on; `changes` replace fields
    of its GPTConfig, where a smaller block_size crops the positions. ValueError if it is not of the `shape`."""
    if shape is not None:
        changes = {name: getattr(shape, name) for name in (*state.FREE, *_GIVEN)}
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


def _encoding(name: str, meta: dict | None, wanted: bool) -> tiktoken.Encoding | Named:
    """The encoding, or what can be known of it without its files, where the data are tokens.

    meta: what is told of the tokens, or None where text is needed. wanted: its files are looked for; else only an
    encoding that is here already is made.
    """
    if meta is None:
        return encoding_named(name)
    without = named(name, meta, f"the files of the encoding {name!r} were not asked for, nothing needs text")
    if not wanted and without is not None and not is_local(name):
        return without
    try:
        return encoding_named(name)
    except Unavailable as error:
        if without is None:
            raise
        return without._replace(why=str(error))


def _meta(source: Path) -> dict:
    """What is told of a folder of tokens, or of one file in it."""
    return meta_beside(source) if source.suffix == ".bin" else meta_of(source)
