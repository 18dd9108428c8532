"""A model to generate with on a processor: weights in 16 or 8 bits, and blocks of few operations.

Generating a token reads every weight once, so its speed is that of reading, and the fewer bytes the better. For one row
of bfloat16 PyTorch's own product reads a third of what the memory gives; FBGEMM's, which is part of PyTorch on x86,
reads all of it, takes float16 weights and float32 activations, and sums in float32. That rounds less than a model that
is bfloat16 throughout, and no activation can overflow. In 8 bits (Dettmers et al. 2022, section 2.1) the weights of a
row share a scale, and the activations are rounded to bfloat16 or, for large layers, to 16 bits that a row shares.

A token is also hundreds of operations on a row of numbers, each of which takes longer to call than to compute. So the
blocks of model.py are written anew here, for inference alone: layers that read the same row are one product, a norm is
as few operations as there can be, and no module is called.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention import rotate
from device import pick_dtype
from model import GPT, Block, LlamaBlock, Pass, RMSNorm, attend_with_cache

LARGEST = torch.finfo(torch.float16).max
WIDE, MANY = 768, 3 << 20  # inputs and weights from which a product of integers is the faster one
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
        weight = layer.weight.detach().float()
        self.scales = int8_scales(weight)
        self.weight = F.pad(weight.div(self.scales[:, None]).round_().to(torch.int8), (0, self.missing))
        self.ones = torch.ones(len(weight), dtype=torch.bfloat16)  # the product's own scales would be rounded to it
        self.bias = None if layer.bias is None else layer.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).bfloat16()
        rows = F.pad(rows, (0, self.missing)) if self.missing else rows
        y = torch._weight_int8pack_mm(rows, self.weight, self.ones)
        y = y.view(*x.shape[:-1], -1) * self.scales
        return y if self.bias is None else y + self.bias


class WideInt8Linear(nn.Module):
    """The same by FBGEMM's product of integers, which takes a large layer little more than half the time. It counts an
    activation in 254 steps, so each row goes as two: the nearest steps, and what is left, in 254 steps again."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.detach().float()
        scales = int8_scales(weight)
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with warnings.catch_warnings(action="ignore"):  # torch 2.13 means to have other tensors of integers one day
            integers = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            self.packed = torch.ops.quantized.linear_prepack(integers, None)
        finally:
            torch.backends.quantized.engine = engine
        self.product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default._op
        self.bias = None if layer.bias is None else layer.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        steps = torch.linalg.vector_norm(rows, math.inf, dim=1, keepdim=True).clamp_(min=1e-30).div_(127)
        rows = rows / steps
        nearest = rows.round()
        y = self.product(torch.cat([nearest, rows.sub_(nearest).mul_(254)]), 1.0, 128, self.packed)
        y = torch.add(y[: len(rows)], y[len(rows) :], alpha=1 / 254).mul_(steps).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def int8_scales(weight: Tensor) -> Tensor:
    """What a step of int8 is worth in each row of (out, in), (out,)."""
    return torch.linalg.vector_norm(weight, math.inf, dim=1).clamp_(min=torch.finfo(torch.float32).tiny).div_(127)


def has_vnni() -> bool:
    """Whether the processor has products of integers, without which FBGEMM's sums may be cut off."""
    return torch.cpu.get_capabilities().get("avx512_vnni", False)


def int8_linear(layer: nn.Linear) -> nn.Module:
    wide = layer.in_features >= WIDE and layer.weight.numel() >= MANY and has_vnni()
    return (WideInt8Linear if wide else Int8Linear)(layer)


KINDS = {"float16": HalfLinear, "int8": int8_linear}
Function = Callable[[Tensor], Tensor]


def packed_layer(kind: str, layer: nn.Linear) -> nn.Module:
    """The layer as `kind` has it, or as it is where float16 cannot hold its weights."""
    return KINDS[kind](layer) if torch.linalg.vector_norm(layer.weight, math.inf) <= LARGEST else layer


# ---- blocks


class PackedBlock(nn.Module):
    """A Block with all its layers' weights as `kind` has them. It takes what that takes and gives what that gives."""

    def __init__(self, block: Block, kind: str):
        super().__init__()
        attention, mlp = block.attn, block.mlp
        self.config, self.layer, self.D = attention.config, attention.layer, attention.config.D
        self.before_attention, self.before_mlp = layer_norm_of(block.ln_1), layer_norm_of(block.ln_2)
        self.qkv, self.out = product_of(kind, attention.c_attn), product_of(kind, attention.c_proj)
        self.up, self.down = product_of(kind, mlp.c_fc), product_of(kind, mlp.c_proj)
        self.activation = mlp.activation

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(self.before_attention(x)).view(B, T, 3, -1, self.D).permute(2, 0, 3, 1, 4).unbind()
        x = x + self.out(attend_with_cache(q, k, v, self.config, self.layer, now, 0.0))
        return x + self.down(self.activation(self.up(self.before_mlp(x))))


class PackedLlamaBlock(nn.Module):
    """The same of a LlamaBlock."""

    def __init__(self, block: LlamaBlock, kind: str):
        super().__init__()
        attention, mlp, config = block.self_attn, block.mlp, block.self_attn.config
        self.config, self.layer, self.local = config, attention.layer, config.is_local(attention.layer)
        self.heads, self.D = [config.n_head, config.kv_heads], config.D
        self.qkv = product_of(kind, attention.q_proj, attention.k_proj, attention.v_proj)
        self.qk_norm = None
        if config.qk_norm:
            self.qk_norm = rms_norm_of(attention.q_norm, attention.k_norm, heads=self.heads)
        self.out, self.down = product_of(kind, attention.o_proj), product_of(kind, mlp.down_proj)
        self.gate_and_up, self.activation = product_of(kind, mlp.gate_proj, mlp.up_proj), mlp.activation
        norms = [block.input_layernorm, block.post_attention_layernorm]
        if config.post_norms:
            norms += [block.pre_feedforward_layernorm, block.post_feedforward_layernorm]
            self.before_attention, self.behind_attention, self.before_mlp, self.behind_mlp = map(rms_norm_of, norms)
        else:
            self.before_attention, self.before_mlp = map(rms_norm_of, norms)
        self.post_norms = config.post_norms

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(self.before_attention(x)).view(B, T, -1, self.D).transpose(1, 2)  # (B, H + 2 K, T, D)
        qk, v = qkv.split([sum(self.heads), self.heads[1]], dim=1)
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        q, k = rotate(qk, now.rotations[self.local]).split(self.heads, dim=1)
        y = self.out(attend_with_cache(q, k, v, self.config, self.layer, now, 0.0))
        x = x + (self.behind_attention(y) if self.post_norms else y)
        gate, up = self.gate_and_up(self.before_mlp(x)).chunk(2, dim=-1)
        y = self.down(self.activation(gate) * up)
        return x + (self.behind_mlp(y) if self.post_norms else y)


def product_of(kind: str, *layers: nn.Linear) -> Function:
    """A function that gives what these layers give of the same input, side by side, with weights as `kind` has."""
    layer = layers[0]
    if len(layers) > 1:
        layer = nn.Linear(layer.in_features, sum(part.out_features for part in layers), device="meta")
        layer.weight = nn.Parameter(torch.cat([part.weight for part in layers]), requires_grad=False)
        biases = [part.bias for part in layers if part.bias is not None]  # all of them or none
        layer.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return packed_layer(kind, layer).forward


def layer_norm_of(norm: nn.LayerNorm) -> Function:
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return partial(torch.layer_norm, normalized_shape=shape, weight=weight, bias=bias, eps=eps)


def rms_norm_of(*norms: RMSNorm, heads: Sequence[int] = ()) -> Function:
    """In four operations, where PyTorch's own takes ten: x times sqrt(n) over sqrt(sum of squares + n eps). Several
    norms are one function of (B, sum of heads, T, n), each for so many heads."""
    n = len(norms[0].weight)
    scale = torch.stack([norm.weight.detach() + norm.plus_one for norm in norms]) * math.sqrt(n)
    if heads:
        scale = scale.repeat_interleave(torch.tensor(heads), dim=0)[:, None]  # (heads, 1, n)
    least = torch.tensor(math.sqrt(n * norms[0].eps))

    def normalised(x: Tensor) -> Tensor:
        return x.div(torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(least)).mul_(scale)

    return normalised


# ---- the model


BLOCKS = {Block: PackedBlock, LlamaBlock: PackedLlamaBlock}


def can_pack(device: torch.device) -> bool:
    """Whether the kernels are there: on x86 processors."""
    return device.type == "cpu" and torch.backends.quantized.engine in ("fbgemm", "x86")


def pick_weight_dtype(name: str, device: torch.device) -> tuple[str, bool]:
    """What `auto` means for weights that only generate, and whether they are packed: float16 where that is possible,
    else what training would take."""
    if name == "auto":
        name = "float16" if can_pack(device) else pick_dtype("auto", device)[0]
    return name, name == "int8" or (name == "float16" and can_pack(device))


def pack(model: GPT, dtype: str = "float16") -> GPT:
    """Hold the weights of a model's linear layers as `dtype`, float16 or int8, in place; for inference only.

    What is packed is no parameter any more and cannot be saved. A layer with a weight that float16 cannot hold keeps
    it, and a block with an adapter, which is to be merged first, stays as it was. Raises ValueError where the processor
    or PyTorch has no such products.
    """
    if not can_pack(next(model.parameters()).device):
        raise ValueError(f"dtype={dtype} for weights needs FBGEMM, which PyTorch has for x86 processors only")
    model.float()
    for i, block in enumerate(model.blocks):
        plain = all(type(layer) is nn.Linear for layer in block.modules() if isinstance(layer, nn.Linear))
        if plain and type(block) in BLOCKS:
            model.blocks[i] = BLOCKS[type(block)](block, dtype)
    if type(model.lm_head) is nn.Linear:
        model.lm_head = packed_layer(dtype, model.lm_head)
    return model
