"""Hugging Face's files: where a model's lie, the tensors in them read one by one, and written. Knows no model.

The format is safetensors (github.com/huggingface/safetensors), which cannot hold code. The library's own writer makes a
file of mode 0600 or a copy of everything in memory, and orders metadata anew in every process, so that one model would
have many hashes. Here the same tensors are the same bytes, written one at a time.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import files
from model_directory import HF_FILES
from naming import HUB_ID
from words import first_line

# What is downloaded of a model: no weights in another format twice. A folder with a number is sentence-transformers'.
WANTED = ["*.json", "model*.safetensors", "tokenizer*", "*.txt", "*.model", "*.jinja", "[0-9]_*/*"]

# A safetensors header names its types in letters of its own.
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES |= {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


@dataclass(frozen=True)
class Stored:
    """A tensor of a file that is still to be read."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def find(path_or_hub_id: str | Path, *, revision: str | None = None, local_files_only: bool = True) -> Path:
    """The folder of a model: the path itself, or that of a hub id in Hugging Face's cache.

    With local_files_only=False what is missing there is downloaded. Raises FileNotFoundError, which says so.
    """
    folder = files.expanded(path_or_hub_id)
    if folder.is_dir():
        return folder
    if not re.fullmatch(HUB_ID, str(path_or_hub_id)):
        raise FileNotFoundError(f"there is no folder {folder}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"there is no folder {folder}; hub ids need the package huggingface_hub") from None
    fetch = partial(snapshot_download, str(path_or_hub_id), revision=revision, local_files_only=local_files_only)
    try:
        folder = Path(fetch(allow_patterns=WANTED))
        if not any((folder / name).exists() for name in HF_FILES):
            fetch(allow_patterns=["pytorch_model*.bin"])
    except (OSError, ValueError) as error:
        how = "; local_files_only=False would download it" if local_files_only else f": {error}"
        raise FileNotFoundError(f"{path_or_hub_id} is no folder, nor in Hugging Face's cache{how}") from None
    return folder


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(files.read(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} has no {path.name}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object")
    return content


def weight_files(folder: Path, name: str | None = None) -> list[Path]:
    """The files that hold a model's tensors: one, or an index and the shards that it names. Safetensors come first,
    where none of HF_FILES is named."""
    name = name or next((name for name in HF_FILES if (folder / name).exists()), None)
    if name is None:
        raise FileNotFoundError(f"{folder} has none of {', '.join(HF_FILES)}")
    if not name.endswith(".index.json"):
        return [folder / name]
    shards = read_json(folder / name).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(
            f"{folder / name} is no index of weights: its weight_map does not name the file of each tensor"
        )
    shards = sorted(set(shards.values()))
    bad = [shard for shard in shards if Path(shard).name != shard or not (folder / shard).exists()]
    if bad or not shards:
        raise FileNotFoundError(f"{folder / name} names files that are not there: {', '.join(bad) or 'none at all'}")
    return [folder / name, *(folder / shard for shard in shards)]


def stored_tensors(folder: Path, name: str | None = None) -> dict[str, Stored]:
    """The tensors of a folder's safetensors file or shards, or else of its .bin ones, or of the one named; unread."""
    tensors = {}
    for path in weight_files(folder, name):
        if path.suffix != ".json":
            tensors |= (_from_bin if path.suffix == ".bin" else _from_safetensors)(path)
    return tensors


def _from_safetensors(path: Path) -> dict[str, Stored]:
    def read(name: str) -> Tensor:
        # Opened for every tensor, so that what was mapped for the others is not held.
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)

    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            return {name: Stored(tuple(file.get_slice(name).get_shape()), partial(read, name)) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is no sound safetensors file: {error}") from None


def _from_bin(path: Path) -> dict[str, Stored]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or an unsafe pickle raises
        raise ValueError(f"{path} does not load as tensors alone: {first_line(error)}") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} holds something other than named tensors")
    return {name: Stored(tuple(tensor.shape), partial(lambda tensor: tensor, tensor)) for name, tensor in state.items()}


def write_tensors(file: BinaryIO, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write `tensors`, of any strides and device, to an open file. `metadata` needs format="pt" for Transformers.

    Each tensor is made contiguous on its own, so views of other tensors cost no memory beyond the largest of them.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # every tensor starts aligned
    header, end = {"__metadata__": metadata}, 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        file.write(raw_bytes(tensors[name]))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor in order. A view of them where they lie so in memory, else a copy."""
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
