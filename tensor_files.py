"""Tensors in Hugging Face's files, read one by one, and written. Knows no model.

The format is safetensors (github.com/huggingface/safetensors), which cannot hold code. The library's own writer makes a
file of mode 0600 or a copy of everything in memory, and orders metadata anew in every process, so that one model would
have many hashes. Here the same tensors are the same bytes, written one at a time.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hub import weight_files
from words import first_line

# A safetensors header names its types in letters of its own.
TYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
TYPE_NAMES |= {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
TYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor of a file that is still to be read."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None for one that is none of TYPES
    read: Callable[[], Tensor]


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

    found = {}
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            for name in names:
                header = file.get_slice(name)
                found[name] = Stored(tuple(header.get_shape()), TYPES.get(header.get_dtype()), partial(read, name))
    except SafetensorError as error:
        raise ValueError(f"{path} is no sound safetensors file: {error}") from None
    return found


def _from_bin(path: Path) -> dict[str, Stored]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or an unsafe pickle raises
        raise ValueError(f"{path} does not load as tensors alone: {first_line(error)}") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} holds something other than named tensors")
    return {name: Stored(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in state.items()}


def write_tensors(file: BinaryIO, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write `tensors`, of any strides and device, to an open file. `metadata` needs format="pt" for Transformers.

    Each tensor is made contiguous on its own, so views of other tensors cost no memory beyond the largest of them.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # every tensor starts aligned
    header, end = {"__metadata__": metadata}, 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": TYPE_NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        file.write(raw_bytes(tensors[name]))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor in order. A view of them where they lie so in memory, else a copy."""
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
