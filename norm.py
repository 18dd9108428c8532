"""The norm of Llama and its relatives, with a gradient of its own on processors.

What PyTorch derives there from the formula is some fifteen operations, each of which reads and writes all activations.
Its layer norm has one kernel for them, which serves here too.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from architecture import GPTConfig


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019 (arXiv 1910.07467), computed in float32."""

    def __init__(self, size: int, config: GPTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if config.norm_plus_one else torch.ones(size))
        self.eps, self.plus_one = config.norm_eps, config.norm_plus_one

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return OwnGradient.apply(x, self.weight, self.eps, self.plus_one)
        return _scaled(F.rms_norm(x.float(), self.weight.shape, None, self.eps), self.weight, self.plus_one, x.dtype)


def _scaled(normed: Tensor, weight: Tensor, plus_one: bool, dtype: torch.dtype) -> Tensor:
    return (normed * (1.0 + weight.float())).to(dtype) if plus_one else weight * normed.to(dtype)


class OwnGradient(torch.autograd.Function):
    """RMSNorm.forward, to the bit. It gives up second derivatives."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        wide = _wide(x)
        inverse = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.plus_one = plus_one
        return _scaled(wide * inverse, weight, plus_one, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad[:2]
        gradient, scale, n = _wide(gradient), weight.float() + ctx.plus_one, x.size(-1)
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            gradient, _wide(x), [n], torch.zeros_like(inverse), inverse, scale, None, [for_x, for_weight, False]
        )
        if for_x:  # a mean of zero was given, but it takes off what the mean's own gradient would be: back with that
            means = torch.mv(gradient.view(-1, n), scale).view_as(inverse).div_(n)
            dx = dx.add_(means.mul_(inverse)).to(x.dtype)
        return dx, dweight.to(weight.dtype) if for_weight else None, None, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32, memory_format=torch.contiguous_format)
