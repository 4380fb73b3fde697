"""A checkpoint's tensors in shards, by torch.distributed.checkpoint: each process writes its own, any number reads all.

    shards/00000.safetensors   of rank 0: weights by name, and the optimizer's tensors as name/exp_avg, …

PyTorch's own format keeps a pickle beside its files (.metadata), and reads it with pickle.load: whoever can write there
runs code here. Its format for Hugging Face does not: each file is safetensors, and its header says where its shards lie
in the whole. So these files are read by PyTorch's reader for that, which takes any number of files for any layout, and
are planned by PyTorch's planner, which sees to it that all shards together are the whole. Only the writing itself is
done here: PyTorch's would hold each file twice more in memory on its way.
"""

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fastgpt.atomic import digest, sync
from fastgpt.training.distributed import SHARDS, is_sharded, local_part
from fastgpt.weights.files import stream_tensors

_PLACES, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # in a header, as PyTorch's reader looks for them


class Writer(dcp.FileSystemWriter):
    """Writes one file in each process. begin(), in the process that coordinates: the folder for it, None to write
    nothing; finish(SHA-256 by file), there, once all have written."""

    def __init__(self, begin: Callable[[], Path | None], finish: Callable[[dict[str, str]], None]):
        super().__init__(".")
        self._begin, self._finish = begin, finish

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        folder = self._begin()
        names = [f"{rank:05d}.safetensors" for rank in range(len(plans))]
        if folder is None:
            return [dataclasses.replace(plan, items=[], storage_data=None) for plan in plans]
        return [dataclasses.replace(plan, storage_data=folder / name) for plan, name in zip(plans, names, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written = []
        if plan.items:
            file: Path = plan.storage_data
            found = {item.index.fqn: (planner.resolve_data(item), item.index.offset) for item in plan.items}
            write_shards(found, file)
            sync(file)
            written.append(WriteResult(MetadataIndex(file.name), file.stat().st_size, digest(file)))
        future: Future[list[WriteResult]] = Future()
        future.set_result(written)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._finish({f"{SHARDS}/{each.index.fqn}": each.storage_data for found in results for each in found})


def write_shards(shards: Mapping[str, tuple[Any, Iterable[int] | None]], path: Path) -> None:
    """One file of shards, each with the place of its first element in the whole tensor."""
    tensors = {name: tensor for name, (tensor, _) in shards.items()}
    places = {name: {_OFFSETS: list(offset or [0] * tensors[name].dim())} for name, (_, offset) in shards.items()}
    stream_tensors(tensors, tensors.__getitem__, path, {_PLACES: json.dumps(places), "format": "pt"})


class Shards:
    """The tensors in a folder of shards. ValueError for a folder that is not what it should."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.reader = dcp.HuggingFaceStorageReader(str(folder))
        try:
            self.metadata = self.reader.read_metadata()
            self.storage: dict[MetadataIndex, Any] = dict(self.metadata.storage_data)
            self.tensors: dict[str, TensorStorageMetadata] = dict(self.metadata.state_dict_metadata)  # type: ignore[arg-type]
            for name, whole in self.tensors.items():
                held = sum(chunk.sizes.numel() for chunk in whole.chunks)
                if held != whole.size.numel():
                    raise ValueError(f"{name} has {held} of the {whole.size.numel()} numbers in {tuple(whole.size)}")
        except (SafetensorError, LookupError, TypeError, ValueError) as error:  # of files that a stranger may have made
            raise ValueError(f"{folder} does not hold the shards of a checkpoint: {error}") from error

    def check(self, expected: Mapping[str, torch.Size], files: Iterable[str]) -> None:
        """ValueError unless they are float32 tensors of these names and shapes, in these files."""
        there = {path.name for path in self.folder.iterdir()}
        if there != (named := {Path(name).name for name in files if Path(name).parent.name == SHARDS}):
            raise ValueError(f"{self.folder} and its manifest disagree about {', '.join(sorted(there ^ named))}")
        if wrong := sorted(expected.keys() ^ self.tensors.keys()):
            raise ValueError(f"{self.folder} and the model disagree about {len(wrong)} tensors, {wrong[0]} first")
        for name, shape in expected.items():
            found, dtype = self.tensors[name].size, self.tensors[name].properties.dtype
            if found != shape or dtype != torch.float32:
                raise ValueError(
                    f"{self.folder}: {name} is {dtype} of shape {tuple(found)}, not float32 of {tuple(shape)}"
                )

    def whole(self, name: str) -> Tensor:
        """One tensor, put together on the CPU."""
        said = self.tensors[name]
        found = torch.empty(said.size, dtype=said.properties.dtype, device="cpu")
        for chunk in said.chunks:
            with safe_open(self.storage[MetadataIndex(name, chunk.offsets)].relative_path, framework="pt") as file:
                place = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
                found[place] = file.get_tensor(name)
        return found

    def load_into(self, tensors: dict[str, Tensor], group: Any) -> None:
        """Read what each process holds of these tensors, sharded in whatever way: all of `group` call it, None is a
        process that is alone."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as it is meant to be
            dcp.load(tensors, storage_reader=self.reader, process_group=group, no_dist=group is None)


def own_share(tensors: Mapping[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """Those that this process writes: of a tensor that several hold, one does, and each of them about as much as the
    others. Shards without a number in them are nobody's."""
    loads: dict[int, list[int]] = {}  # by the number of copies: the bytes that the first, the second, … copy writes
    mine = {}
    for name, tensor in tensors.items():
        copies, copy = _copies(tensor, rank, size)
        load = loads.setdefault(copies, [0] * copies)
        chosen = load.index(min(load))
        load[chosen] += tensor.numel() * tensor.element_size()
        if copy == chosen and local_part(tensor).numel():
            mine[name] = tensor
    return mine


def _copies(tensor: Any, rank: int, size: int) -> tuple[int, int]:
    """How many processes hold the same of it, and which of them this one is."""
    if not is_sharded(tensor):
        return size, rank
    mesh, copies, copy = tensor.device_mesh, 1, 0
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            copies, copy = copies * mesh.size(axis), copy * mesh.size(axis) + mesh.get_local_rank(axis)
    return copies, copy
