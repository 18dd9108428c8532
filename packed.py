"""A model to generate with on a processor: weights in 16 or 8 bits, everything else as it was.

Generating a token reads every weight once, so its speed is that of reading, and the fewer bytes the better. For one row
of bfloat16 PyTorch's own product reads a third of what the memory gives; FBGEMM's, which is part of PyTorch on x86,
reads all of it, takes float16 weights and float32 activations, and sums in float32. That rounds less than a model that
is bfloat16 throughout, and no activation can overflow. In 8 bits (Dettmers et al. 2022, section 2.1) the
weights of a row share a scale, and the activations are rounded to bfloat16.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from device import pick_dtype

LARGEST = torch.finfo(torch.float16).max
STRIDE = 16  # columns that the product of int8 reads at a time, whether they are there or not


class HalfLinear(nn.Module):
    """A linear layer whose weight is held as float16, in FBGEMM's order."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        bias = None if layer.bias is None else layer.bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(layer.weight.detach().float(), bias)
        self.product = torch.ops.quantized.linear_dynamic_fp16.default._op  # without a look for modes that trace

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.packed)


class Int8Linear(nn.Module):
    """A linear layer whose weight is held as int8 with one scale a row."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.missing = -layer.in_features % STRIDE
        weight = F.pad(layer.weight.detach().float(), (0, self.missing))
        self.scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127  # (out,)
        self.weight = (weight / self.scales[:, None]).round().to(torch.int8)
        self.ones = torch.ones(len(weight), dtype=torch.bfloat16)  # the product's own scales would be rounded to it
        self.bias = None if layer.bias is None else layer.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).bfloat16()
        rows = F.pad(rows, (0, self.missing)) if self.missing else rows
        y = torch._weight_int8pack_mm(rows, self.weight, self.ones)
        y = y.view(*x.shape[:-1], -1) * self.scales
        return y if self.bias is None else y + self.bias


KINDS = {"float16": HalfLinear, "int8": Int8Linear}


def can_pack(device: torch.device) -> bool:
    """Whether the kernels are there: on x86 processors."""
    return device.type == "cpu" and torch.backends.quantized.engine in ("fbgemm", "x86")


def pick_weights(name: str, device: torch.device) -> tuple[str, bool]:
    """What `auto` means for weights that only generate, and whether they are packed: float16 where that is possible,
    else what training would take."""
    if name == "auto":
        name = "float16" if can_pack(device) else pick_dtype("auto", device)[0]
    return name, name == "int8" or (name == "float16" and can_pack(device))


def pack(model: nn.Module, dtype: str = "float16") -> nn.Module:
    """Hold the weights of a model's linear layers as `dtype`, float16 or int8, in place; for inference only.

    What is packed is no parameter any more and cannot be saved. A layer with a weight that float16 cannot hold stays as
    it was. Raises ValueError where the processor or PyTorch has no such products.
    """
    if not can_pack(next(model.parameters()).device):
        raise ValueError(f"dtype={dtype} for weights needs FBGEMM, which PyTorch has for x86 processors only")
    model.float()
    for module in list(model.modules()):
        for name, layer in module.named_children():
            # lora.py's layers are of another type: an adapter is merged first.
            if type(layer) is nn.Linear and layer.weight.abs().max() <= LARGEST:
                setattr(module, name, KINDS[dtype](layer))
    return model
