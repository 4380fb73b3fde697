"""Writing a GPT: as fastgpt's own folder, and as another family keeps it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastgpt.atomic import read_json, replacing
from fastgpt.data.tokenizer import BY_SIZE, END_OF_TEXT, Unavailable, full_name, has_end_of_text
from fastgpt.data.tokenizer import encoding as encoding_of
from fastgpt.model import GPT, GPTConfig
from fastgpt.weights.card import card
from fastgpt.weights.files import CHECKPOINT, CONFIG, STATE, WEIGHTS, stream_tensors, write_pickle, write_tensors
from fastgpt.weights.pretrained import FAMILIES, from_pretrained
from fastgpt.weights.tokenizer_files import TOKENIZER, tokenizer_files

Family = Literal["huggingface", "nanogpt", "book", "fastgpt"]
GENERATION, CARD = "generation_config.json", "README.md"
_FILES = {
    "huggingface": (CONFIG, WEIGHTS, *TOKENIZER, GENERATION, CARD),
    "nanogpt": (CHECKPOINT,),
    "book": (CONFIG, STATE),
    "fastgpt": (CONFIG, WEIGHTS),
}


def save_model(model: GPT, folder: Path, encoding: str, **facts) -> None:
    """Write the model's two files into `folder`; `facts` (JSON values) go into config.json beside the shape."""
    with replacing(folder / WEIGHTS) as new:
        write_tensors(_apart(model.state_dict()), new)
    _write_config(model.config, folder, encoding, facts)


def stream_model(
    config: GPTConfig, dtype: torch.dtype, load: Callable[[str], Tensor], folder: Path, encoding: str, **facts
) -> None:
    """save_model of a model that is nowhere whole: load(name) gives its tensors, one after another."""
    with replacing(folder / WEIGHTS) as new:
        stream_tensors(_shapes(config, dtype), load, new)
    _write_config(config, folder, encoding, facts)


def _write_config(config: GPTConfig, folder: Path, encoding: str, facts: dict) -> None:
    with replacing(folder / CONFIG) as new:
        content = {"model": dataclasses.asdict(config), "encoding": encoding, **facts}
        new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shapes(config: GPTConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """A model's tensors on the meta device, which take no memory."""
    with torch.device("meta"):
        return GPT(config).to(dtype).state_dict()


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each in one piece and in memory of its own, as safetensors wants them; a file may tie any two."""
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        place = whole.untyped_storage().data_ptr()
        found[name] = whole.clone() if place in storages else whole
        storages.add(place)
    return found


def save_pretrained(model: GPT, folder: str | Path) -> None:
    """Write config.json and model.safetensors that transformers' GPT2LMHeadModel.from_pretrained reads.

    A model without biases gets zeros for them, which change nothing; from_pretrained above leaves them out again.
    """
    write_family(model, Path(folder), "huggingface", "", "GPTModel")


def stream_pretrained(config: GPTConfig, dtype: torch.dtype, load: Callable[[str], Tensor], folder: Path) -> None:
    """save_pretrained of a model that is nowhere whole: load(name) gives its tensors, one after another."""
    _refuse_windows(config, "huggingface")
    ours, family = _shapes(config, dtype), FAMILIES["huggingface"]
    settings, like, _ = family.write_weights(config, ours)

    def theirs(name: str) -> Tensor:
        own = name.removeprefix("transformer.")
        if own not in ours:  # a bias that they have and we have not
            return torch.zeros(like[name].shape, dtype=dtype, device="cpu")
        return family.write_weights(config, {own: load(own)})[1][name]

    with replacing(folder / WEIGHTS) as new:
        stream_tensors(like, theirs, new, metadata={"format": "pt"})
    with replacing(folder / CONFIG) as new:
        new.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def convert(
    source: str | Path,
    target: str | Path,
    to: Family,
    *,
    n_head: int | None = None,
    vocab_size: int | None = None,
    gelu: Literal["tanh", "none"] | None = None,
    encoding: str | None = None,
    variant: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write the weights at `source`, of any family, into the folder `target` as the family `to` keeps them.

    Hugging Face: config.json and model.safetensors; what AutoTokenizer reads, where its tokens are sure to equal those
    of the encoding (byte, gpt2, characters); generation_config.json; and README.md, the hub's page, of what is known.
    nanoGPT: ckpt.pt, as its sample.py reads it. The book: model.pth, a state dict for `variant` (GPTModel, GPTModelFast
    or cache; None is GPTModel), and cfg in config.json. fastgpt: its own folder, which `fastgpt generate` reads with
    the named encoding. vocab_size crops or pads; gelu overrides what the family implies.
    Returns notes on what the new family computes otherwise. An error is raised before anything is written.
    """
    if to not in (*FAMILIES, "fastgpt"):
        raise ValueError(f"to is {to!r}, not one of {', '.join((*FAMILIES, 'fastgpt'))}")
    for option, value, whose in (("variant", variant, ("book",)), ("encoding", encoding, ("fastgpt", "huggingface"))):
        if value is not None and to not in whose:
            raise ValueError(f"{option} = {value!r} is for {' and '.join(whose)} alone, not for {to}")
    if encoding is not None:
        encoding = full_name(encoding)
    changes = {name: value for name, value in (("vocab_size", vocab_size), ("gelu", gelu)) if value is not None}
    model = from_pretrained(source, n_head=n_head, **changes)
    beside = Path(source) / CONFIG
    told = read_json(beside) if beside.is_file() else {}
    if encoding is None:
        said = told.get("encoding")
        encoding = said if isinstance(said, str) else BY_SIZE.get(model.config.vocab_size, "unknown")
    hub = to == "huggingface"
    files, ends, unsaid = _for_the_hub(model, encoding, told, Path(target).name) if hub else ({}, {}, [])
    folder, own = Path(target), _FILES[to]
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    for there in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not overwrite:
            raise ValueError(f"{folder} holds {there.name} already; overwrite=True, or --overwrite, writes over it")
        if there.name not in own:
            raise ValueError(f"{folder} holds {there.name}, which is none of what would be written, {', '.join(own)}")
    notes = write_family(model, folder, to, encoding, variant or "GPTModel", ends)
    for name in (*TOKENIZER, GENERATION, CARD) if hub else ():
        if name in files:
            with replacing(folder / name) as new:
                new.write_text(files[name], encoding="utf-8")
        else:  # another model's
            (folder / name).unlink(missing_ok=True)
    return notes + unsaid


def _for_the_hub(model: GPT, name: str, told: dict, folder: str) -> tuple[dict[str, str], dict, list[str]]:
    """What a folder for Hugging Face has beside its weights, by file; the ids that begin and end a text; and notes.

    name: of the encoding, or "unknown". told: the config.json that lies beside the weights.
    """
    shown = folder.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # of bytes that are no text
    page = {CARD: card(shown, model.config, sum(p.numel() for p in model.parameters()), name, told)}
    if name == "unknown":
        return page, {}, ["no tokenizer's files: nothing says which encoding the model has; --encoding does"]
    try:
        encoding = encoding_of(name)
    except Unavailable as error:
        return page, {}, [f"no tokenizer's files: {error}"]
    end = encoding.encode_single_token(END_OF_TEXT) if has_end_of_text(encoding) else None
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), end)
    page[GENERATION] = _json({**ends, "pad_token_id": end})
    files = tokenizer_files(encoding, model.config.block_size)
    if files is None:
        return page, ends, [f"no tokenizer's files: those of {name} would not be sure to give tiktoken's tokens"]
    return page | {file: _json(content) for file, content in files.items()}, ends, []


def _json(content: dict) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _refuse_windows(config: GPTConfig, to: Family) -> None:
    windowed = [(layer, window) for layer, window in enumerate(config.windows) if window is not None]
    if windowed:
        has = "layer {} has one of {} tokens".format(*windowed[0])
        raise ValueError(f"{to} has no windows, and {has}; fastgpt's own folder does")


def write_family(
    model: GPT, folder: Path, to: Family, encoding: str, variant: str, changes: dict | None = None
) -> list[str]:
    """changes: to the settings that the family's config.json would have."""
    if to == "fastgpt":
        folder.mkdir(parents=True, exist_ok=True)
        save_model(model, folder, encoding)
        return []
    _refuse_windows(model.config, to)
    more = (variant,) if to == "book" else ()
    settings, tensors, notes = FAMILIES[to].write_weights(model.config, model.state_dict(), *more)
    settings |= changes or {}
    folder.mkdir(parents=True, exist_ok=True)
    if to == "huggingface":
        with replacing(folder / WEIGHTS) as new:
            write_tensors(_apart(tensors), new, metadata={"format": "pt"})
    elif to == "nanogpt":
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        content = {"model": tensors, "model_args": settings, "iter_num": 0, "best_val_loss": 1e9, "config": {}}
        with replacing(folder / CHECKPOINT) as new:
            write_pickle(content, new)
        return notes
    else:
        with replacing(folder / STATE) as new:
            write_pickle({name: tensor.contiguous() for name, tensor in tensors.items()}, new)
    with replacing(folder / CONFIG) as new:
        new.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return notes
