"""The processes of a run."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes torchrun started; without torchrun, a group of one, for which every method does nothing."""

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        self.main = self.rank == 0
        if self.size > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(self.local)
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")

    def sum(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        """Part in order: a process that ends while another still talks to it aborts that one."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()
