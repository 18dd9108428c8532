"""What updates the weights: AdamW, or Muon for the matrices inside the blocks and AdamW for the rest; and how fast."""

import math
from typing import Any

import torch
from torch import nn

from configurator import RunConfig
from model import GPT


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

    Weight decay is for matrices only. Muon's updates (Jordan et al. 2024) are scaled to the size of AdamW's (Liu et al.
    2025, arXiv 2502.16982, equation 4), so that rates and weight decay mean the same to both.
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
    muon = torch.optim.Muon(inner, lr=rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
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
