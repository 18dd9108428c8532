"""A training state that many processes hold in pieces, in files: planned by torch.distributed's checkpoint (DCP).

DCP finds out who writes what, so that nothing is written twice, and who reads what from which file, so that a state
goes on in another mesh, or in one process. What it writes itself would break two promises of a model directory: its
`.metadata` is a pickle, read by `pickle.load`, which runs whatever code is in it; and its files are written in place.
So the storage is ours: safetensors, JSON, and files.py's staging, under one marker with everything else.

    last/state.pt                  what is not cut: steps, generators, the position in the data
    last/shard-00003.safetensors   what rank 3 wrote, `NAME@OFFSET`
    last/shards.json               of every tensor its dtype, shape and parts, each with the file it is in

DCP's asynchronous save is not used: it would copy the state, and the marker would still have to wait for the disk.
"""

import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

import files
from model_directory import SHARD, SHARDS
from tensor_files import write_tensors

Plan = SavePlan | LoadPlan
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float64)}


class Pieces:
    """What this process holds of a tensor: views, and where in the whole each begins. DCP asks by `_Checkpointable`,
    its protocol for what is no tensor."""

    def __init__(self, shape: torch.Size, parts: list[tuple[tuple[int, ...], Tensor]]):
        self.shape, self.parts = torch.Size(shape), parts

    def size(self) -> torch.Size:
        return self.shape

    def fill(self, whole: Tensor) -> None:
        for offset, view in self.parts:
            view.copy_(whole[tuple(slice(at, at + n) for at, n in zip(offset, view.shape, strict=True))])

    def __create_write_items__(self, name: str, _) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(view.dtype), self.shape),
            )
            for chunk, (_, view) in zip(self.__create_chunk_list__(), self.parts, strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), view.size()) for offset, view in self.parts]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(view for offset, view in self.parts if torch.Size(offset) == index.offset)


class SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(self, state_dict: dict[str, Pieces], metadata: Metadata | None = None, *coordinates) -> None:
        """DCP's own would take what is no tensor for something else, and copy it."""
        self.state_dict, self.metadata = state_dict, metadata

    def create_local_plan(self) -> LoadPlan:
        return create_default_local_load_plan(self.state_dict, self.metadata)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


def stage(directory: Path, pieces: Mapping[str, Pieces], rank: int) -> dict[str, dict[str, Any]]:
    """Write what each process has beside its place (files.stage). Collective. On rank 0, {file: size and sha256}.

    Raises files.SaveError on all of them, with the rank's number, when one cannot write; its files are then gone.
    """
    writer = Writer(directory, rank)
    try:
        dcp.save(pieces, storage_writer=writer, planner=SavePlanner(flatten_state_dict=False))
    except CheckpointException as failure:
        writer.sweep()
        first, (error, _) = min(failure.failures.items())
        if not isinstance(error, OSError | ValueError):
            raise error from None
        raise files.SaveError(f"rank {first}: {error}") from None
    return writer.entries


def load(pieces: Mapping[str, Pieces], index: dict[str, Any], path: Callable[[str], Path], alone: bool = False) -> None:
    """Fill `pieces` from the files of a state; `path` says where each lies. Collective, unless `alone`.

    Raises ValueError for a state without these tensors, or with others of their name.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant to be
            dcp.load(dict(pieces), storage_reader=Reader(index, path), planner=LoadPlanner(), no_dist=alone)
    except CheckpointException as failure:
        first, (error, _) = min(failure.failures.items())
        if not isinstance(error, OSError | ValueError):
            raise error from None
        raise ValueError(f"the saved state cannot be read by rank {first}: {error}") from None


def put_together(
    index: dict[str, Any], path: Callable[[str], Path], names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """These tensors of a state, put together; without `names`, all of them."""
    described = Reader(index, path).read_metadata().state_dict_metadata
    wanted = {name: described[name] for name in (described if names is None else names)}
    tensors = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in wanted.items()}
    load({name: Pieces(t.shape, [((0,) * t.dim(), t)]) for name, t in tensors.items()}, index, path, alone=True)
    return tensors


class Storage:
    """What DCP asks of a storage, and of these for nothing."""

    def reset(self, checkpoint_id=None) -> None:
        pass

    def prepare_local_plan(self, plan: Plan) -> Plan:
        return plan

    def prepare_global_plan(self, plans: list[Plan]) -> list[Plan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True


class Writer(Storage, StorageWriter):
    def __init__(self, directory: Path, rank: int):
        self.directory, self.name, self.entries = directory, SHARD.format(rank), {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if not plan.items:  # others have all that this one has
            return _done([])
        tensors = {_key(item.index): planner.resolve_data(item) for item in plan.items}
        entry = files.stage(self.directory / self.name, lambda file: write_tensors(file, tensors, {"format": "pt"}))
        results = [WriteResult(item.index, tensors[_key(item.index)].nbytes, (self.name, entry)) for item in plan.items]
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, when all have written."""
        where = {}
        for result in (result for one in results for result in one):
            name, self.entries[result.storage_data[0]] = result.storage_data[0], result.storage_data[1]
            where[result.index] = name
        tensors = {
            name: {
                "dtype": str(about.properties.dtype).removeprefix("torch."),
                "shape": list(about.size),
                "parts": [
                    {"offset": list(c.offsets), "shape": list(c.sizes), "file": where[MetadataIndex(name, c.offsets)]}
                    for c in about.chunks
                ],
            }
            for name, about in metadata.state_dict_metadata.items()
        }
        content = json.dumps({"tensors": tensors}).encode()
        self.entries[SHARDS] = files.stage(self.directory / SHARDS, content)

    def sweep(self) -> None:
        for name in (self.name, SHARDS):
            files.staged_name(self.directory / name).unlink(missing_ok=True)

    def set_up_storage_writer(self, is_coordinator: bool, *args, **kwargs) -> None:
        pass


class Reader(Storage, StorageReader):
    def __init__(self, index: dict[str, Any], path: Callable[[str], Path]):
        self.index, self.path, self.files = index, path, {}

    def read_metadata(self, *args, **kwargs) -> Metadata:
        described = {}
        try:
            for name, about in self.index["tensors"].items():
                parts = [
                    (torch.Size(part["offset"]), torch.Size(part["shape"]), part["file"]) for part in about["parts"]
                ]
                self.files |= {MetadataIndex(name, offset): file for offset, _, file in parts}
                chunks = [ChunkStorageMetadata(offset, shape) for offset, shape, _ in parts]
                properties = TensorProperties(DTYPES[about["dtype"]])
                described[name] = TensorStorageMetadata(properties, torch.Size(about["shape"]), chunks)
        except (KeyError, TypeError, AttributeError) as error:  # whatever a JSON that is no index lacks
            raise ValueError(f"{self.path(SHARDS)} is no index of shards ({error!r})") from None
        return Metadata(described)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted = defaultdict(list)
        for item in plan.items:
            wanted[self.files[item.storage_index]].append(item)
        for name, items in wanted.items():
            try:
                with safe_open(self.path(name), "pt") as file:
                    for item in items:
                        at = zip(item.storage_offsets, item.lengths, strict=True)
                        part = file.get_slice(_key(item.storage_index))[tuple(slice(o, o + n) for o, n in at)]
                        planner.resolve_tensor(item).copy_(part)
            except SafetensorError as error:
                raise ValueError(f"{self.path(name)} is no sound safetensors file: {error}") from None
        return _done(None)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args, **kwargs) -> None:
        pass


def _key(index: MetadataIndex) -> str:
    return f"{index.fqn}@{','.join(map(str, index.offset))}"


def _done(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future
