"""The cross-entropy where each process of a group has the logits of its own part of the vocabulary.

The group agrees on each token's largest logit, on the sum of the exponentials and on the target's logit: three numbers
a token, while the logits, thousands of them a token, stay where they are. As in loss.py, gradients are made in the
forward pass, some tokens at a time where the projection is part of it.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

AT_A_TIME = 1 << 24  # logits of a round, in float32


def linear_cross_entropy_in_shares(
    x: Tensor, weight: Tensor, targets: Tensor, first: int, group: dist.ProcessGroup, ignore_index: int
) -> Tensor:
    """Mean cross-entropy of F.linear(x, weight), nats, for x (N, C), this rank's rows (V', C) of the vocabulary from id
    `first` on, and targets (N,). The gradient for x is this rank's part of a sum over the group."""
    if not torch.is_grad_enabled():
        x, weight = x.detach(), weight.detach()
    return LinearCrossEntropyInShares.apply(x, weight, targets, first, group, ignore_index)


def cross_entropy_in_shares(
    logits: Tensor, targets: Tensor, first: int, group: dist.ProcessGroup, ignore_index: int
) -> Tensor:
    """The same for this rank's logits (N, V')."""
    return CrossEntropyInShares.apply(logits, targets, first, group, ignore_index)


class LinearCrossEntropyInShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, targets: Tensor, first: int, group, ignore_index: int):
        for_x, for_weight = ctx.needs_input_grad[:2]
        share = _share(targets, ignore_index, torch.promote_types(x.dtype, torch.float32))
        loss = share.new_zeros(())
        dx = torch.empty_like(x) if for_x else None
        dweight = torch.zeros_like(weight, dtype=share.dtype) if for_weight else None
        count = max(1, AT_A_TIME // len(weight))
        for start in range(0, len(x), count):
            rows = slice(start, start + count)
            losses, gradient = _losses(x[rows] @ weight.t(), targets[rows], share[rows], first, group)
            loss += (losses * share[rows]).sum()
            gradient = gradient.to(weight.dtype)
            if for_x:
                torch.mm(gradient, weight, out=dx[rows])
            if for_weight:
                dweight += gradient.t() @ x[rows]
        ctx.save_for_backward(dx, None if dweight is None else dweight.to(weight.dtype))
        return loss / (share > 0).any()  # without a target no number, and no gradient

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if made is None else made * gradient for made in ctx.saved_tensors), None, None, None, None


class CrossEntropyInShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, targets: Tensor, first: int, group, ignore_index: int) -> Tensor:
        share = _share(targets, ignore_index, torch.promote_types(logits.dtype, torch.float32))
        losses, gradient = _losses(logits, targets, share, first, group)
        ctx.save_for_backward(gradient.to(logits.dtype))
        return (losses * share).sum() / (share > 0).any()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * gradient, None, None, None, None


def _share(targets: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """(N,): what each token's loss counts."""
    counted = targets != ignore_index
    return counted.to(dtype) / counted.sum().clamp(min=1)


def _losses(logits: Tensor, targets: Tensor, share: Tensor, first: int, group) -> tuple[Tensor, Tensor]:
    """The cross-entropies (n,), and the gradients of their sum by `share` for this rank's logits (n, V')."""
    wide = logits.to(share.dtype)
    largest = wide.amax(dim=1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    own = targets - first
    here = ((own >= 0) & (own < wide.size(1))).to(wide.dtype)
    column = own.clamp(0, wide.size(1) - 1)[:, None]
    shifted = wide - largest[:, None]
    target = shifted.gather(1, column)[:, 0] * here
    p = shifted.exp_()
    sums = torch.stack([p.sum(dim=1), target])
    dist.all_reduce(sums, group=group)
    losses = sums[0].log() - sums[1]
    p.mul_((share / sums[0])[:, None]).scatter_add_(1, column, -(here * share)[:, None])
    return losses, p
