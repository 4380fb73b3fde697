"""Files of weights that anyone may have written: read without running code, and held to what they claim.

A .safetensors or .pt file, or a folder with one of them, whole or in parts, and the settings beside it.
"""

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from fastgpt.atomic import read_json

WEIGHTS, CONFIG, CHECKPOINT, STATE = "model.safetensors", "config.json", "ckpt.pt", "model.pth"
_WHOLE = (WEIGHTS, "pytorch_model.bin", CHECKPOINT, STATE)
_INDEXES = (f"{WEIGHTS}.index.json", "pytorch_model.bin.index.json")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that a model computes in
_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}  # safetensors'
_PREFIXES = ("_orig_mod.", "module.")  # torch.compile's and DistributedDataParallel's
_MASK = re.compile(r"(^|\.)(attn\.(bias|masked_bias)|att\.mask)$")  # buffers of old files, which say nothing


def read_weights_of(source: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a file or folder by their own names, and the settings it came with ({} if none).

    Prefixes of wrappers are taken off and mask buffers left out. FileNotFoundError or ValueError says what is wrong.
    """
    if source.is_dir():
        tensors, settings = _read_folder(source)
    elif source.is_file():
        tensors, settings = _read_file(source)
    else:
        raise ValueError(f"{source} is neither a file nor a folder")
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = _without_prefixes(name)
        if _MASK.search(plain):
            continue
        if plain in named:
            raise ValueError(f"{source} holds {plain} twice")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{source}: {plain} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.dtype not in _DTYPES or tensor.dim() not in (1, 2):
            kind = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            numbers = "floating-point numbers of 16, 32 or 64 bits"
            raise ValueError(f"{source}: {plain} is {kind}, not a vector or matrix of {numbers}")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            shape, stored = tuple(tensor.shape), tensor.untyped_storage().nbytes()
            raise ValueError(f"{source}: {plain} claims the shape {shape} and holds {stored} bytes")
        named[plain] = tensor
    return named, settings


def holds_weights(source: Path) -> bool:
    """Whether this is a file, or a folder with a file of weights by one of the usual names."""
    return source.is_file() or any((source / name).is_file() for name in (*_WHOLE, *_INDEXES))


def _without_prefixes(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict]:
    settings = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    for name in _WHOLE:
        if (folder / name).is_file():
            tensors, inner = _read_file(folder / name)
            return tensors, {**settings, **inner}
    for name in _INDEXES:
        if (folder / name).is_file():
            return _read_parts(folder, name), settings
    raise FileNotFoundError(f"no weights in {folder}: none of {', '.join((*_WHOLE, *_INDEXES))}")


def _read_parts(folder: Path, index: str) -> dict[str, Any]:
    """The tensors of an index: its file names must be names alone, for a stranger may have written them."""
    places = read_json(folder / index).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{folder / index} has no weight_map")
    tensors: dict[str, Any] = {}
    for part in sorted({str(name) for name in places.values()}):
        if Path(part).name != part or "\\" in part or part in ("", ".", ".."):
            raise ValueError(f"{folder / index} names the file {part!r}, which is not in its folder")
        if not (folder / part).is_file():
            raise FileNotFoundError(f"{folder / index} names {part}, which is not there")
        found, _ = _read_file(folder / part)
        for name in (name for name, place in places.items() if place == part):
            if name not in found:
                raise ValueError(f"{folder / part} has no {name}, which {index} says it has")
            tensors[name] = found[name]
    return tensors


def _read_file(path: Path) -> tuple[dict[str, Any], dict]:
    """The tensors and the settings of one file; a checkpoint's state dict is found by its usual names."""
    if path.suffix == ".safetensors":
        return _parsed(path, read_tensors, "a whole safetensors file"), {}
    entries = _parsed(path, _entries, "a whole zip archive") if zipfile.is_zipfile(path) else []
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"{path} is compressed, as torch.save writes nothing")
    found = _parsed(path, _load, "a file of weights that torch.load reads without running code")
    settings: Any = {}
    if isinstance(found, dict):
        settings = found.get("model_args", {})
        for name in ("model", "model_state_dict", "state_dict"):
            if isinstance(found.get(name), dict):
                found = found[name]
                break
    if (
        not isinstance(found, dict)
        or not all(isinstance(name, str) for name in found)
        or not isinstance(settings, dict)
    ):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a state dict")
    return found, settings


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Of a .safetensors file; SafetensorError where it is none."""
    if any("\ud800" <= character <= "\udfff" for character in str(path)):  # its reader takes names of UTF-8 alone
        return load(path.read_bytes())
    return load_file(path)


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # it goes on at length about how to run code all the same
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(f"it holds {named[1]}, which is no tensor" if named else "its bytes are none") from error
    except (LookupError, EOFError, struct.error) as error:
        raise ValueError("its bytes are none") from error


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """As safetensors; OSError where the disk fails."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path.parent}: {error}") from error


def stream_tensors(
    like: Mapping[str, Tensor], load: Callable[[str], Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """As safetensors, with one tensor in memory at a time: load(name) gives it, of the shape and dtype that like[name]
    has, which may be on the meta device. OSError where the disk fails."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, tensor in like.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin where the widest number may
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in like.items():
            held = load(name).detach().cpu()
            if (held.shape, held.dtype) != (tensor.shape, tensor.dtype):
                what = f"{held.dtype} of shape {tuple(held.shape)}, not {tensor.dtype} of {tuple(tensor.shape)}"
                raise ValueError(f"stream_tensors: {name} is {what}")
            file.write(held.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_pickle(content: Any, path: Path) -> None:
    """As torch.save does, for those who read nothing else; OSError where the disk fails."""
    try:
        torch.save(content, path)
    except RuntimeError as error:  # PyTorch's word for it
        raise OSError(f"{path.parent}: {error}") from error


def _entries(path: Path) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(path) as archive:
        return archive.infolist()


def _parsed(path: Path, parse: Callable[[Path], Any], what: str) -> Any:
    """parse(path); ValueError where the file is not `what`: whatever a parser raises at bytes it did not expect."""
    with path.open("rb"):  # a file that can't be read is another error
        try:
            return parse(path)
        except MemoryError:
            raise
        except Exception as error:
            reason = str(error).splitlines()[0].partition(". ")[0][:200] if str(error) else type(error).__name__
            raise ValueError(f"{path} is not {what}: {reason}") from error
