"""What updates the weights: AdamW, or Muon for the matrices inside the blocks and AdamW for the rest; and how fast."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from configurator import RunConfig
from model import GPT

QUINTIC = 3.4445, -4.775, 2.0315  # of the Newton-Schulz iteration, as Muon's authors chose them
ITERATIONS = 5
AT_ONCE = 1 << 22  # numbers in the matrices that are made orthogonal together: small ones alone leave cores idle


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal (Jordan et al. 2024), with steps of the size of AdamW's (Liu et al. 2025, arXiv
    2502.16982, equation 4), so that rates and weight decay mean the same to both.

    It is torch.optim.Muon, whose state it shares, but for two things: products are in `dtype`, which torch's has as
    bfloat16 on every processor, also where that takes forty times as long as float32, and matrices of one shape are
    multiplied together.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for shape, matrices in by_shape.items():
                n = max(1, AT_ONCE // shape.numel())
                for first in range(0, len(matrices), n):
                    self._update(matrices[first : first + n], group)

    def _update(self, matrices: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        """Of one shape."""
        rate, ahead = group["lr"], []
        for matrix in matrices:
            state = self.state[matrix]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            mean = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
            ahead.append(matrix.grad.lerp(mean, group["momentum"]))  # Nesterov's
        size = 0.2 * math.sqrt(max(matrices[0].shape))
        for matrix, update in zip(matrices, orthogonal(torch.stack(ahead), self.dtype), strict=True):
            matrix.mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-rate * size)


def orthogonal(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices (n, out, in) with the same singular vectors and values about one: 0.7 to 1.2, which serves as well."""
    x = matrices / torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True).clamp_(min=1e-7)
    tall = x.size(1) > x.size(2)
    x = (x.mT if tall else x).to(dtype, memory_format=torch.contiguous_format)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Together:
    """Several optimizers in the place of one: what the Trainer and a GradScaler ask of it, and no more. A group's
    `relative` is its rate as a multiple of the run's, 1 where there is none."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer | Together:
    """AdamW, or with `optimizer=muon` Muon for the blocks' matrices and AdamW for the rest.

    Weight decay is for matrices only.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    inner = inner_matrices(model) if config.optimizer == "muon" else []
    chosen = {id(p) for p in inner}
    rest = [p for p in trained if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
    if not inner:
        return adamw
    rate = config.filled().muon_learning_rate
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    muon = Muon(inner, rate, config.weight_decay, dtype)
    muon.param_groups[0]["relative"] = rate / config.learning_rate
    return Together(adamw, muon)


def inner_matrices(model: GPT) -> list[nn.Parameter]:
    """The matrices inside the blocks that train: those for Muon."""
    return [p for p in model.blocks.parameters() if p.requires_grad and p.dim() == 2]


def load_moments(optimizer: torch.optim.Optimizer | Together, state: dict[str, Any]) -> None:
    """Fill it with saved moments. Rates, decay and betas stay as they are: what they were is saved too, and a resumed
    run may have others."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def learning_rate(step: int, config: RunConfig) -> float:
    """Linear warm-up, then a cosine to the final rate (Loshchilov and Hutter 2016), or a constant with a linear end
    (warmup-stable-decay, Hu et al. 2024). A function of the step and the configuration alone."""
    peak, final, end = config.learning_rate, config.final_lr, config.decay_end
    if step < config.warmup_iters:
        return peak * (step + 1) / config.warmup_iters
    if step >= end:
        return final
    if config.schedule == "cosine":
        progress = (step - config.warmup_iters) / (end - config.warmup_iters)
        return final + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - final)
    return final + min(1.0, (end - step) / config.cooldown) * (peak - final)


def set_rate(optimizer: torch.optim.Optimizer | Together, rate: float) -> None:
    """The run's learning rate at a step, to every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("relative", 1.0)


def start_branches_at_zero(model: GPT) -> None:
    """So that every block begins as the identity (Zhang et al. 2019, arXiv 1901.09321)."""
    with torch.no_grad():
        for block in model.blocks:
            for layer in block.ends:
                layer.weight.zero_()
