"""Reading a GPT from a folder, a file or the Hugging Face hub, whatever family wrote it."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.atomic import read_json
from fastgpt.data.tokenizer import BY_SIZE
from fastgpt.families import book, gpt2, nanogpt
from fastgpt.model import GPT, GPTConfig
from fastgpt.weights.files import CONFIG, WEIGHTS, holds_weights, read_weights_of

FAMILIES: dict[str, Any] = {"huggingface": gpt2, "book": book, "nanogpt": nanogpt}  # fastgpt's own need no map
HUB = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
RUN_MODEL, RUN_STATE = "model", "state.json"  # in a checkpoint of a training run


def load_model(folder: str | Path, **changes) -> tuple[GPT, dict]:
    """The model that fastgpt saved in `folder`, in eval mode on the CPU, and the whole of its config.json.

    `changes` replace fields of its GPTConfig (backend, dropout). FileNotFoundError or ValueError says what is wrong.
    """
    folder = Path(folder)
    for file in (WEIGHTS, CONFIG):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"no {file} in {folder}: train a model first, or name the folder that holds one")
    config = read_json(folder / CONFIG)
    for name, kind in (("model", dict), ("encoding", str)):
        if not isinstance(config.get(name), kind):
            raise ValueError(
                f"{folder / CONFIG} is not a fastgpt configuration: its {name} is {config.get(name)!r:.80}"
            )
    return _read(folder, None, changes), config


def load_named(source: str | Path, *, n_head: int | None = None) -> tuple[GPT, str | None]:
    """The model at `source`, of any family, and its encoding's name: as the files say, else as the vocabulary's size
    tells, None where neither does. Raises what load_model and from_pretrained raise, and ValueError for an n_head that
    is not the model's."""
    folder = model_folder(source)
    settings = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if "model" in settings or not ((folder.exists() and holds_weights(folder)) or str(source) in HUB):
        model, settings = load_model(folder)
    else:
        model = from_pretrained(source, n_head=n_head)
    if n_head not in (None, model.config.n_head):
        raise ValueError(f"n_head is {n_head}, and {source} says that it has {model.config.n_head} heads")
    if folder != Path(source):
        settings = read_json(Path(source, RUN_STATE))
    said = settings.get("encoding")
    return model, said if isinstance(said, str) and said != "unknown" else BY_SIZE.get(model.config.vocab_size)


def model_folder(source: str | Path) -> Path:
    """Where the weights lie: inside a checkpoint of a training run (run/checkpoints/step-…), else `source` itself."""
    path = Path(source)
    return path / RUN_MODEL if (path / RUN_MODEL).is_dir() and (path / RUN_STATE).is_file() else path


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
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1:  # a model computes in one: the widest, which changes no value
        widest = functools.reduce(torch.promote_types, dtypes)
        tensors = {name: tensor.to(widest) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def from_pretrained(source: str | Path, *, n_head: int | None = None, **changes) -> GPT:
    """The GPT-2 at `source`, in eval mode on the CPU: a folder or file of any family, or a name on the hub ("gpt2").

    n_head is asked for where nothing says it, as in a bare file of the book's. `changes` replace fields of the
    GPTConfig (backend, dropout, gelu); vocab_size crops the embedding or pads it with zeros. A hub's name needs
    huggingface_hub. FileNotFoundError, ValueError or, for the hub, OSError says what is wrong.
    """
    path = model_folder(source)
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
    """Any family's file or folder as a GPT; all who load a model come here."""
    tensors, settings = read_weights_of(source)
    own = isinstance(settings.get("model"), dict)  # fastgpt's own folder
    try:
        fields: dict
        if own:
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
        if n_head is not None and fields.setdefault("n_head", n_head) != n_head:
            raise ValueError(f"n_head is {n_head}, and its settings say {fields['n_head']}")
        if "n_head" not in fields:
            raise ValueError("nothing says how many heads there are: name n_head")
        config = GPTConfig.from_dict({**fields, **changes})
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
        if isinstance(error, ValueError | KeyError):
            said = str(error) if isinstance(error, ValueError) else f"there is no {error.args[0]}"
        raise ValueError(f"{source / CONFIG if own else source}: {said}") from error
    if config.tie:
        tensors.pop("lm_head.weight", None)
    model = _model(config, tensors, source, CONFIG if own else "its configuration")
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
