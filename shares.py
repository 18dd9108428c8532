"""What a process of a mesh has of a run: its share of the model and the optimizer, saved and restored with the others'.

parallel.py takes the model apart and computes it; state_in_shares.py writes pieces and reads them. Here is what lies
between: the gradient's norm over all shares, which pieces of which tensors a process has, and the whole model, put
together from the files that all have just staged, so that for it nothing needs to go between the processes.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import adapters
import files
import lora
import state_in_shares
from checkpoint import CheckpointManager
from configurator import RunConfig
from distributed import Ranks
from model import GPT, on_meta
from model_directory import SHARDS
from parallel import Cut, parallelize, with_partial_gradients
from state_in_shares import Pieces


class Shares:
    """What a process of a mesh has of a run's model, and what all of them do with their shares together."""

    def __init__(self, model: GPT, ranks: Ranks, device: torch.device, config: RunConfig, drawn: bool):
        """Takes `model` apart: see `parallelize`. Collective, as all methods are but those that say otherwise."""
        self.model, self.ranks, self.config = model, ranks, config
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        adapted = lora.adapter_names(model)
        self.fingerprint = adapters.fingerprint_of(model) if adapted and ranks.main else None
        compiled = config.compile == "true"
        self.held = parallelize(model, ranks, device, config.dtype, compiled=compiled, drawn=drawn)
        self.with_partial_gradients = with_partial_gradients(model, self.held) if ranks.mesh.tp > 1 else []
        # What is saved of it, by parameter: an adapter alone, under the names of `lora.lora_state_dict`.
        self.saved = {name: name for name in self.shapes}
        if adapted:
            parts = lora.adapters_of(model, None).items()
            self.saved = {
                f"{path}.lora.{adapted[0]}.{own}": f"{path}.{key}"
                for path, part in parts
                for own, key in zip("AB", part.keys, strict=True)
            }

    def parameters(self) -> dict[str, nn.Parameter]:
        """The shards, by the whole parameter's name. Not collective."""
        self.model.reshard()  # after a pass without a backward one the root is still whole
        return dict(self.model.named_parameters())

    def are_finite(self) -> bool:
        own = all(p.to_local().isfinite().all() for p in self.parameters().values())
        return all(self.ranks.gather(own))

    def clip_gradients(self, largest: float) -> float:
        """Complete the gradients, scale them so that their norm is at most `largest`, and return what it was: that of
        the whole model, in which what several ranks hold counts once."""
        trained = {name: p.grad.to_local() for name, p in self.parameters().items() if p.grad is not None}
        parts = [trained[name] for name in self.with_partial_gradients if name in trained]
        if parts:
            total = torch.cat([part.flatten() for part in parts])
            dist.all_reduce(total, group=self.ranks.group("tp"))
            for part, own in zip(parts, total.split([part.numel() for part in parts]), strict=True):
                part.copy_(own.view_as(part))
        gradients = list(trained.values())
        counted = [g for name, g in trained.items() if name in self.held or self.ranks.tp_rank == 0]
        square = torch.zeros((), device=gradients[0].device)
        if counted:
            square += torch.stack(torch._foreach_norm(counted)).square().sum()
        for axis in ("fsdp", "tp"):
            dist.all_reduce(square, group=self.ranks.group(axis))
        norm = square.sqrt()
        torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))
        return norm.item()

    def agree_on_overflow(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        """float16's scaler skips a step whose gradients overflow: on all ranks, where they do on one."""
        if scaler.is_enabled():
            for found in scaler._found_inf_per_device(optimizer).values():
                dist.all_reduce(found, dist.ReduceOp.MAX)

    # ---- state

    def stage(self, directory: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Write every process's share of weights and moments beside its place. On rank 0: {file: size and sha256}."""
        self.ranks.main_alone(lambda: files.recover(directory))
        return state_in_shares.stage(directory, {**self._weights(), **self._moments(optimizer)}, self.ranks.rank)

    def restore(self, optimizer: torch.optim.Optimizer, state: dict[str, Any], directory: Path) -> None:
        """Fill the optimizer's state, and the weights too where they lie in shards, whoever saved these."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, saved in state["optimizer"]["state"].items():
            moments = {key: torch.zeros_like(parameters[i]) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameters[i]] = {"step": saved["step"].to(parameters[i].device, copy=True), **moments}
        error, index = None, None
        try:
            index = CheckpointManager.shards_of(directory, self.ranks.rank, self.ranks.size)
        except ValueError as problem:
            error = str(problem)
        if errors := [error for error in self.ranks.gather(error) if error]:
            raise ValueError(errors[0])
        if index:
            pieces = {**self._weights(), **self._moments(optimizer)}
            state_in_shares.load(pieces, index, lambda name: files.find(directory, name))
        else:
            for name, pieces in self._moments(optimizer).items():
                _, i, key = name.split(".")
                pieces.fill(state["optimizer"]["state"][int(i)][key])

    def without_shards(self, state: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state_dict without what is cut. Not collective."""
        kept = {
            i: {key: value for key, value in of.items() if not isinstance(value, DTensor)}
            for i, of in state["state"].items()
        }
        return {**state, "state": kept}

    def consolidated(self, directory: Path, filled: bool) -> GPT:
        """On rank 0: the whole model that has just been staged, or, if not to be `filled`, one without numbers."""
        model = on_meta(self.model.config)
        if lora.adapter_names(self.model):
            lora.apply_lora(model, self.config.lora_config(), dtype=torch.float32, untie=self.config.lora_untie)
        if filled:
            index = json.loads(files.staged_name(directory / SHARDS).read_bytes())
            names = {f"model.{saved}": name for name, saved in self.saved.items()}
            tensors = state_in_shares.put_together(index, lambda name: files.staged_name(directory / name), names)
            for saved, tensor in tensors.items():
                path, _, own = names[saved].rpartition(".")
                setattr(model.get_submodule(path), own, nn.Parameter(tensor))
            model.tie_head()
        return model

    def _weights(self) -> dict[str, Pieces]:
        parameters = self.parameters()
        return {f"model.{saved}": self._pieces(name, parameters[name]) for name, saved in self.saved.items()}

    def _moments(self, optimizer: torch.optim.Optimizer) -> dict[str, Pieces]:
        """Under the numbers that `optimizer.state_dict` gives parameters, which are the same in any mesh."""
        names = {id(parameter): name for name, parameter in self.parameters().items()}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return {
            f"optimizer.{i}.{key}": self._pieces(names[id(parameter)], moment)
            for i, parameter in enumerate(parameters)
            for key, moment in optimizer.state.get(parameter, {}).items()
            if isinstance(moment, DTensor)
        }

    def _pieces(self, name: str, shard: DTensor) -> Pieces:
        fsdp_rank = self.ranks.grid.get_local_rank("fsdp")
        return pieces_of(shard, self.shapes[name], self.held.get(name), self.ranks.mesh.fsdp, fsdp_rank)


def pieces_of(shard: DTensor, shape: torch.Size, cut: Cut | None, fsdp: int, fsdp_rank: int) -> Pieces:
    """`shard` is FSDP2's of what `cut` leaves of a tensor of `shape`: some of its first dimension's rows."""
    local = shard.to_local().detach()
    rows = shard.size(0)
    first = min(rows, -(-rows // fsdp) * fsdp_rank)
    rest = (0,) * (local.dim() - 1)
    if cut is None or cut.dim == 1:
        columns = (cut.stretches[0].start,) if cut else rest
        return Pieces(shape, [((first, *columns), local)] if local.numel() else [])
    parts, at = [], 0
    for stretch in cut.stretches:
        low, high = max(first, at), min(first + local.size(0), at + len(stretch))
        if low < high:
            parts.append(((stretch.start + low - at, *rest), local[low - first : high - first]))
        at += len(stretch)
    return Pieces(shape, parts)
