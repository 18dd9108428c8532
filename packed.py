"""A model to generate with on a processor: weights in 16 or 8 bits, and blocks of few operations.

Generating a token reads every weight once, so its speed is that of reading, and the fewer bytes the better. For one row
of bfloat16 PyTorch's own product reads a third of what the memory gives; FBGEMM's, which is part of PyTorch on x86,
reads all of it, takes float16 weights and float32 activations, and sums in float32. That rounds less than a model that
is bfloat16 throughout, and no activation can overflow. In 8 bits (Dettmers et al. 2022, section 2.1) the weights of a
row share a scale, and the activations are rounded to bfloat16 or, for large layers, to 16 bits that a row shares.

A token is also hundreds of operations on a row of numbers, each of which takes longer to call than to compute. So the
blocks of model.py are written anew here, for inference alone: layers that read the same row are one product, and a norm
is as few operations as there can be. All of them together are then one TorchScript function, for its interpreter calls
an operation in a fraction of the time that Python takes. What it compiles is a subset of Python: forward methods here
and the functions that they call know tensors, numbers, lists and tuples.
"""

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architecture import GPTConfig
from attention import attend, rotate, rotation_at
from device import pick_dtype, release_freed_memory
from generation import draw
from model import GPT, Block, KVCache, LlamaBlock, append
from norm import RMSNorm

LARGEST = torch.finfo(torch.float16).max
WIDE, MANY = 320, 3 << 20  # inputs and weights from which a product of integers is the faster one
STRIDE = 16  # columns that the product of int8 reads at a time, whether they are there or not
Compilable = TypeVar("Compilable", nn.Module, Callable)


class HalfLinear(nn.Module):
    """A linear layer whose weight is held as float16, in FBGEMM's order."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        bias = None if layer.bias is None else layer.bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(layer.weight.detach().float(), bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


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
        rows = x.flatten(0, -2).to(torch.bfloat16)
        rows = F.pad(rows, [0, self.missing]) if self.missing > 0 else rows
        y = torch._weight_int8pack_mm(rows, self.weight, self.ones)
        y = y.unflatten(0, x.shape[:-1]) * self.scales
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
        self.bias = None if layer.bias is None else layer.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        steps = torch.linalg.vector_norm(rows, math.inf, dim=[1], keepdim=True).clamp_(min=1e-30).div_(127.0)
        rows = rows / steps
        nearest = rows.round()
        both = torch.cat([nearest, rows.sub_(nearest).mul_(254.0)])
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(both, 1.0, 128, self.packed)
        y = torch.add(y[: len(rows)], y[len(rows) :], alpha=1 / 254).mul_(steps).unflatten(0, x.shape[:-1])
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


LINEAR = {"float16": HalfLinear, "int8": int8_linear}


def packed_layer(dtype: str, *layers: nn.Linear) -> nn.Module:
    """One layer that gives what these give of the same input, side by side, with weights as `dtype` says, or as they
    are where float16 cannot hold them."""
    layer = layers[0]
    if len(layers) > 1:
        layer = nn.Linear(layer.in_features, sum(part.out_features for part in layers), device="meta")
        layer.weight = nn.Parameter(torch.cat([part.weight for part in layers]), requires_grad=False)
        biases = [part.bias for part in layers if part.bias is not None]  # all of them or none
        layer.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return LINEAR[dtype](layer) if torch.linalg.vector_norm(layer.weight, math.inf) <= LARGEST else layer


class PackedRMSNorm(nn.Module):
    """In four operations, where PyTorch's own takes ten: x times sqrt(n) over sqrt(sum of squares + n eps). Several
    norms are one function of (B, sum of heads, T, n), each for so many heads."""

    def __init__(self, *norms: RMSNorm, heads: Sequence[int] = ()):
        super().__init__()
        n = len(norms[0].weight)
        self.scale = torch.stack([norm.weight.detach() + norm.plus_one for norm in norms]) * math.sqrt(n)
        if heads:
            self.scale = self.scale.repeat_interleave(torch.tensor(heads), dim=0)[:, None]  # (heads, 1, n)
        self.least = torch.tensor(math.sqrt(n * norms[0].eps))

    def forward(self, x: Tensor) -> Tensor:
        return x.div(torch.linalg.vector_norm(x, dim=[-1], keepdim=True).hypot_(self.least)).mul_(self.scale)


# ---- blocks


class Now(NamedTuple):
    """What all layers share in one forward pass; lists have an entry for each of GPT.kinds."""

    cache: tuple[Tensor, Tensor] | None  # keys and values as KVCache has them
    seen: int  # tokens in it
    masks: list[Tensor | None]  # as `attend` takes them
    rotations: list[tuple[Tensor, Tensor]]  # as `rotate` does


class PackedAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, kind: int):
        super().__init__()
        self.layer, self.kind, self.scale = layer, kind, (config.query_scalar or config.D) ** -0.5
        # A configuration's floats may be whole, and TorchScript takes no whole number for a float.
        self.softcap = None if config.attention_softcap is None else float(config.attention_softcap)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, now: Now) -> Tensor:
        """Queries (B, H, T, D), new keys and values (B, K, T, D) to (B, T, H * D)."""
        cache = now.cache
        if cache is not None:
            k, v = append(cache[0][self.layer], now.seen, k), append(cache[1][self.layer], now.seen, v)
        return attend(q, k, v, now.masks[self.kind], self.scale, softcap=self.softcap)


class PackedBlock(nn.Module):
    """A Block with all its layers' weights as `dtype` says."""

    def __init__(self, block: Block, kind: int, dtype: str):
        super().__init__()
        attention, mlp = block.attn, block.mlp
        self.D, self.attend = attention.config.D, PackedAttention(attention.config, attention.layer, kind)
        self.before_attention, self.before_mlp = block.ln_1, block.ln_2
        self.qkv, self.out = packed_layer(dtype, attention.c_attn), packed_layer(dtype, attention.c_proj)
        self.up, self.down = packed_layer(dtype, mlp.c_fc), packed_layer(dtype, mlp.c_proj)
        self.activation = mlp.activation

    def forward(self, x: Tensor, now: Now) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(self.before_attention(x)).view(B, T, 3, -1, self.D).permute(2, 0, 3, 1, 4).unbind()
        x = x + self.out(self.attend(q, k, v, now))
        return x + self.down(self.activation(self.up(self.before_mlp(x))))


class PackedLlamaBlock(nn.Module):
    """The same of a LlamaBlock."""

    def __init__(self, block: LlamaBlock, kind: int, dtype: str):
        super().__init__()
        attention, mlp, config = block.self_attn, block.mlp, block.self_attn.config
        self.heads, self.D, self.kind = [config.n_head, config.kv_heads], config.D, kind
        self.qkv = packed_layer(dtype, attention.q_proj, attention.k_proj, attention.v_proj)
        self.qk_norm = nn.Identity()
        if config.qk_norm:
            self.qk_norm = PackedRMSNorm(attention.q_norm, attention.k_norm, heads=self.heads)
        self.attend = PackedAttention(config, attention.layer, kind)
        self.out, self.down = packed_layer(dtype, attention.o_proj), packed_layer(dtype, mlp.down_proj)
        self.gate_and_up, self.activation = packed_layer(dtype, mlp.gate_proj, mlp.up_proj), mlp.activation
        self.before_attention = PackedRMSNorm(block.input_layernorm)
        self.behind_attention, self.behind_mlp = nn.Identity(), nn.Identity()
        if config.post_norms:
            self.behind_attention = PackedRMSNorm(block.post_attention_layernorm)
            self.before_mlp = PackedRMSNorm(block.pre_feedforward_layernorm)
            self.behind_mlp = PackedRMSNorm(block.post_feedforward_layernorm)
        else:
            self.before_mlp = PackedRMSNorm(block.post_attention_layernorm)

    def forward(self, x: Tensor, now: Now) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(self.before_attention(x)).view(B, T, -1, self.D).transpose(1, 2)  # (B, H + 2 K, T, D)
        qk, v = qkv.split([self.heads[0] + self.heads[1], self.heads[1]], dim=1)
        q, k = rotate(self.qk_norm(qk), now.rotations[self.kind]).split(self.heads, dim=1)
        x = x + self.behind_attention(self.out(self.attend(q, k, v, now)))
        gate, up = self.gate_and_up(self.before_mlp(x)).chunk(2, dim=-1)
        return x + self.behind_mlp(self.down(self.activation(gate) * up))


# ---- the model


class PackedLayers(nn.Module):
    """All of a GPT but its head. It takes the blocks away from the model."""

    def __init__(self, model: GPT, dtype: str):
        super().__init__()
        config, of_gpt2 = model.config, model.config.block == "gpt2"
        self.tokens, self.positions = model.embedding, model.transformer.wpe if of_gpt2 else None
        self.scale = config.n_embd**0.5 if config.scaled_embeddings else None
        packed, kinds = PackedBlock if of_gpt2 else PackedLlamaBlock, model.kinds
        self.blocks = nn.ModuleList()
        for layer in range(config.n_layer):  # a block's weights are not needed in float32 any more, and go
            self.blocks.append(packed(model.blocks.pop(0), kinds.index(config.is_local(layer)), dtype))
            release_freed_memory()
        self.norm = model.final_norm if of_gpt2 else PackedRMSNorm(model.final_norm)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = float(module.eps)  # as PackedAttention says

    def forward(
        self,
        idx: Tensor,
        positions: Tensor,
        cache: tuple[Tensor, Tensor] | None,
        seen: int,
        masks: list[Tensor | None],
        frequencies: list[tuple[Tensor, float]],
    ) -> Tensor:
        """Token ids (B, T) to what is behind the final norm, (B, T, C); `frequencies` are as `rotation_at` takes them,
        and all else as Now has it."""
        now = Now(cache, seen, masks, [rotation_at(positions, each[0], each[1]) for each in frequencies])
        x = self.tokens(idx)
        if self.positions is not None:
            x = x + self.positions(positions)
        if self.scale is not None:
            x = x * self.scale
        for block in self.blocks:
            x = block(x, now)
        return self.norm(x)


class PackedGPT(GPT):
    """A GPT that generates and tells losses, and nothing else: it has `layers` instead of blocks."""

    def _hidden(
        self,
        idx: Tensor,
        positions: Tensor,
        masks: dict[bool, Tensor | None],
        cache: KVCache | None,
        hidden_states: list[Tensor] | None,
        attentions: list[Tensor] | None,
    ) -> Tensor:
        if hidden_states is not None or attentions is not None:
            raise ValueError("a packed model gives no hidden states and no attentions: ask the model before packing it")
        held, seen = (None, 0) if cache is None else ((cache.keys, cache.values), cache.length)
        frequencies = list(self._frequencies(positions, cache).values())
        return self.layers(idx, positions, held, seen, [masks[kind] for kind in self.kinds], frequencies)


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

    What is packed is no parameter any more and cannot be saved, and there are no blocks. A layer with a weight that
    float16 cannot hold keeps it. Raises ValueError for a model with adapters or packed already, and where the processor
    or PyTorch has no such products.
    """
    if isinstance(model, PackedGPT):
        raise ValueError("the model is packed already")
    if not can_pack(next(model.parameters()).device):
        raise ValueError(f"dtype={dtype} for weights needs FBGEMM, which PyTorch has for x86 processors only")
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Embedding) and type(layer) not in (nn.Linear, nn.Embedding):
            raise ValueError(f"{path} is a {type(layer).__name__}: merge the model's adapters before packing it")
    model.float().eval().requires_grad_(False)
    model.layers = compiled(PackedLayers(model, dtype).eval())
    model.lm_head, model.draw = compiled(packed_layer(dtype, model.lm_head).eval()), compiled(draw)
    release_freed_memory()
    model.__class__ = PackedGPT
    with torch.inference_mode():
        for _ in range(3):  # TorchScript watches its first passes and holds what they compute: let it be little
            model(torch.zeros(1, 1, dtype=torch.long), cache=model.new_cache(1, 1))
    return model


def compiled(module: Compilable) -> Compilable:
    """As TorchScript, in a second or two. From Python 3.14 on PyTorch promises nothing of it, and the module stays as
    it is, as it does where PYTORCH_JIT=0 asks for that: the numbers are the same."""
    if sys.version_info >= (3, 14):
        return module
    with warnings.catch_warnings(action="ignore"):  # torch 2.13 has it, and means to drop it one day
        made = torch.jit.script(module)
        return torch.jit.freeze(made) if isinstance(made, torch.jit.ScriptModule) else made
