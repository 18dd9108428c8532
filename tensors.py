"""Named tensors in one file, in the safetensors format (github.com/huggingface/safetensors), which cannot hold code.

The library's own writer makes a file of mode 0600 or a copy of everything in memory, and orders metadata anew in every
process, so that one model would have many hashes. Here the same tensors are the same bytes, written one at a time.
"""

import json
from typing import BinaryIO

import torch
from torch import Tensor

# A safetensors header names its types in letters of its own.
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES |= {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


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
