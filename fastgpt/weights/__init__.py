"""A GPT's weights: as fastgpt's own folder, and from and to those of Hugging Face, nanoGPT and the book.

fastgpt's folder has model.safetensors with the weights and config.json with the model's shape and encoding.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastgpt.atomic import read_json, replacing
from fastgpt.families import book, gpt2, nanogpt
from fastgpt.model import GPT, GPTConfig
from fastgpt.weights.files import CHECKPOINT, CONFIG, STATE, WEIGHTS, read_weights_of, write_pickle, write_tensors

Family = Literal["huggingface", "nanogpt", "book", "fastgpt"]
FAMILIES: dict[str, Any] = {"huggingface": gpt2, "book": book, "nanogpt": nanogpt}  # fastgpt's own need no map
_FILES = {
    "huggingface": (CONFIG, WEIGHTS),
    "nanogpt": (CHECKPOINT,),
    "book": (CONFIG, STATE),
    "fastgpt": (CONFIG, WEIGHTS),
}
HUB = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}


def save_model(model: GPT, folder: Path, encoding: str, **facts) -> None:
    """Write the model's two files into `folder`; `facts` (JSON values) go into config.json beside the shape."""
    config = {"model": dataclasses.asdict(model.config), "encoding": encoding, **facts}
    with replacing(folder / WEIGHTS) as new:
        write_tensors(_apart(model.state_dict()), new)
    with replacing(folder / CONFIG) as new:
        new.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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


def load_model(folder: str | Path, **changes) -> tuple[GPT, dict]:
    """The model saved in `folder`, in eval mode on the CPU, and the whole of its config.json.

    `changes` replace fields of its GPTConfig (backend, dropout). FileNotFoundError or ValueError says what is wrong.
    """
    folder = Path(folder)
    for file in (WEIGHTS, CONFIG):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"no {file} in {folder}: train a model first, or name the folder that holds one")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config["encoding"], str):
            raise TypeError(f"encoding is {config['encoding']!r}")
        fields = GPTConfig.from_dict({**config["model"], **changes})
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder / CONFIG} is not a fastgpt configuration: {reason}") from error
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is not a whole safetensors file: {error}") from error
    return _model(fields, tensors, folder / WEIGHTS, CONFIG), config


def _model(config: GPTConfig, tensors: dict[str, Tensor], source: Path, whose: str) -> GPT:
    """A GPT in eval mode that holds `tensors` themselves; ValueError unless they are what `whose` config asks for."""
    with torch.device("meta"):  # no memory before the shapes are known to agree
        model = GPT(config)
    expected = model.state_dict()
    if wrong := sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(f"{source} and {whose} disagree about {len(wrong)} tensors, {wrong[0]} first")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, {whose} says {tuple(expected[name].shape)}"
            raise ValueError(f"{source}: {name} has shape {shapes}")
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def from_pretrained(source: str | Path, *, n_head: int | None = None, **changes) -> GPT:
    """The GPT-2 at `source`, in eval mode on the CPU: a folder or file of any family, or a name on the hub ("gpt2").

    n_head is asked for where nothing says it, as in a bare file of the book's. `changes` replace fields of the
    GPTConfig (backend, dropout, gelu); vocab_size crops the embedding or pads it with zeros. A hub's name needs
    huggingface_hub. FileNotFoundError, ValueError or, for the hub, OSError says what is wrong.
    """
    path = Path(source)
    if not path.exists():
        name = str(source)
        if name not in HUB and (name.count("/") != 1 or name.startswith((".", "/", "~")) or path.suffix in _SUFFIXES):
            raise FileNotFoundError(f"there is no file or folder {source}, and the hub's names are {', '.join(HUB)}")
        path = _download(HUB.get(name, name))
    return _read(path, n_head, changes)


_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


def _download(repository: str) -> Path:
    way_out = (
        "With no network, name a folder that holds its config.json and model.safetensors, or set HF_HOME to a cache "
        "that a machine with one has filled"
    )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{repository} is on the Hugging Face hub, which `pip install huggingface_hub` reaches. {way_out}"
        ) from error
    try:
        patterns = [CONFIG, WEIGHTS, "model-*.safetensors", f"{WEIGHTS}.index.json"]
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # it raises those of several libraries
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(f"{repository} can't be had from the Hugging Face hub: {reason}. {way_out}") from error


def _read(source: Path, n_head: int | None, changes: dict) -> GPT:
    """Any family's file or folder as a GPT."""
    tensors, settings = read_weights_of(source)
    try:
        fields: dict
        if isinstance(settings.get("model"), dict):  # fastgpt's own folder
            fields = dict(settings["model"])
            vocab_size = changes.pop("vocab_size", None)
        else:
            family: Any = next((family for family in FAMILIES.values() if family.holds(tensors)), None)
            if family is None and "wte.weight" not in tensors:
                some = ", ".join(sorted(tensors)[:3])
                raise ValueError(f"no weights of Hugging Face's GPT-2, nanoGPT, the book or fastgpt; there are {some}")
            fields = {}
            if family is not None:
                tensors, fields = family.read_weights(tensors, settings)
            vocab_size = changes.pop("vocab_size", None)
            tensors = _infer(tensors, fields)
        if n_head is not None:
            fields["n_head"] = n_head
        if "n_head" not in fields:
            raise ValueError("nothing says how many heads there are: name n_head")
        config = GPTConfig.from_dict({**fields, **changes})
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
        if isinstance(error, ValueError | KeyError):
            said = str(error) if isinstance(error, ValueError) else f"there is no {error.args[0]}"
        raise ValueError(f"{source}: {said}") from error
    if config.tie:
        tensors.pop("lm_head.weight", None)
    model = _model(config, tensors, source, "its configuration")
    return model if vocab_size is None else _with_vocabulary(model, vocab_size)


def _infer(tensors: dict[str, Tensor], fields: dict) -> dict[str, Tensor]:
    """Put what the tensors tell of the shape into `fields`, where the settings may not say otherwise; returns the
    tensors in order in memory, with zeros for the biases of some layers alone."""
    vocab_size, width = tensors["wte.weight"].shape
    head, inner = tensors.get("lm_head.weight"), tensors["h.0.mlp.c_fc.weight"].shape[0]
    found = dict(
        vocab_size=vocab_size,
        n_embd=width,
        block_size=tensors["wpe.weight"].shape[0],
        n_layer=sum(name.endswith("ln_1.weight") for name in tensors),
        n_inner=None if inner == 4 * width else inner,
    )
    for name, value in found.items():
        if fields.get(name) not in (None, value) and (name, fields[name]) != ("n_inner", inner):
            raise ValueError(f"the settings say {name} = {fields[name]!r}, the tensors {value!r}")
    fields.update(found, bias=any(name.endswith(".bias") for name in tensors))
    fields["tie"] = head is None or torch.equal(head, tensors["wte.weight"])
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return gpt2.with_biases(tensors) if fields["bias"] else tensors


def _with_vocabulary(model: GPT, vocab_size: int) -> GPT:
    """The model with its first `vocab_size` tokens, or with rows of zeros after its own."""
    config = dataclasses.replace(model.config, vocab_size=vocab_size)
    tensors = model.state_dict()
    for name in {"wte.weight", "lm_head.weight"} & tensors.keys():
        rows = tensors[name][:vocab_size]
        tensors[name] = torch.cat((rows, rows.new_zeros(vocab_size - len(rows), rows.shape[1])))
    return _model(config, tensors, Path(f"a vocabulary of {vocab_size}"), "its configuration")


def save_pretrained(model: GPT, folder: str | Path) -> None:
    """Write config.json and model.safetensors that transformers' GPT2LMHeadModel.from_pretrained reads.

    A model without biases gets zeros for them, which change nothing; from_pretrained above leaves them out again.
    """
    _write(model, Path(folder), "huggingface", "", "GPTModel")


def convert(
    source: str | Path,
    target: str | Path,
    to: Family,
    *,
    n_head: int | None = None,
    vocab_size: int | None = None,
    gelu: Literal["tanh", "none"] | None = None,
    encoding: str | None = None,
    variant: str = "GPTModel",
    overwrite: bool = False,
) -> list[str]:
    """Write the weights at `source`, of any family, into the folder `target` as the family `to` keeps them.

    Hugging Face: config.json and model.safetensors. nanoGPT: ckpt.pt, as its sample.py reads it. The book: model.pth, a
    state dict for `variant` (GPTModel, GPTModelFast or cache), and cfg in config.json. fastgpt: its own folder, which
    `fastgpt generate` reads with the named encoding. vocab_size crops or pads; gelu overrides what the family implies.
    Returns notes on what the new family computes otherwise. An error is raised before anything is written.
    """
    if to not in (*FAMILIES, "fastgpt"):
        raise ValueError(f"to is {to!r}, not one of {', '.join((*FAMILIES, 'fastgpt'))}")
    changes = {name: value for name, value in (("vocab_size", vocab_size), ("gelu", gelu)) if value is not None}
    model = from_pretrained(source, n_head=n_head, **changes)
    if encoding is None:
        folder = Path(source)
        said = read_json(folder / CONFIG).get("encoding") if (folder / CONFIG).is_file() else None
        known = {257: "byte", 50257: "gpt2", 50304: "gpt2"}
        encoding = said if isinstance(said, str) else known.get(model.config.vocab_size, "unknown")
    folder, own = Path(target), _FILES[to]
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    for there in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not overwrite:
            raise ValueError(f"{folder} holds {there.name} already; overwrite=True, or --overwrite, writes over it")
        if there.name not in own:
            raise ValueError(f"{folder} holds {there.name}, which is none of what would be written, {', '.join(own)}")
    return _write(model, folder, to, encoding, variant)


def _write(model: GPT, folder: Path, to: Family, encoding: str, variant: str) -> list[str]:
    if to == "fastgpt":
        folder.mkdir(parents=True, exist_ok=True)
        save_model(model, folder, encoding)
        return []
    more = (variant,) if to == "book" else ()
    settings, tensors, notes = FAMILIES[to].write_weights(model.config, model.state_dict(), *more)
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
