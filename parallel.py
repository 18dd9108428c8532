"""A GPT in shares: what each process of a mesh holds of it, and how they compute it together.

Over the axes dp and fsdp it is FSDP2's (`fully_shard`), block by block: shards of the parameters, gathered for as long
as a block computes, and the gradients' mean. Over tp it is Megatron's division (Shoeybi et al. 2019, arXiv 1909.08053):
heads, the MLP's width and the vocabulary are cut, so that a block needs two sums forward and two backward. What all
ranks of tp have and each uses for its own heads, say the weights of a norm of queries, gets a part of its gradient on
each, and these are summed once a step (`with_partial_gradients`).

tp is not DTensor's `parallelize_module`. GPT-2's queries, keys and values are one matrix of which a rank needs three
stretches of rows; a vocabulary of 50,257 is cut unevenly and then cut again by fsdp; one key head of Gemma's serves
several ranks; an adapter's two matrices are cut with their layer; and the loss never gathers the logits. A plain local
parameter with a `Cut` that says what it is of the whole does all five, and FSDP2 takes it like any other.

Ranks of a tp group draw the same dropout, for what they all have must be dropped alike. So the heads of one drop what
those of another do, and a run with dropout is another one than in one process, no worse.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import lora
from attention import softcapped
from device import DTYPES
from distributed import Ranks
from loss_in_shares import cross_entropy_in_shares, linear_cross_entropy_in_shares
from model import GPT, IGNORE_INDEX, KVCache

COLUMN = ("q_proj", "k_proj", "v_proj", "c_attn", "gate_proj", "up_proj", "c_fc", "lm_head")  # cut by outputs
ROW = ("o_proj", "c_proj", "down_proj")  # cut by inputs
HEAD_NORMS = ("q_norm", "k_norm")  # one weight for all heads, of which every rank has some
BRANCHES = ("attn", "self_attn", "mlp", "lm_head")  # in which ranks compute different things, of what all have
PARTS = {"c_attn": 3}  # matrices that lie in one, each of which is cut


# ---- what goes between the ranks of a tp group


class Split(torch.autograd.Function):
    """What all ranks have goes into computations that differ: forward nothing, backward the sum of their gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _total(gradient, ctx.group), None


class Join(torch.autograd.Function):
    """The sum of what the ranks have computed: what all have again. Backward, each gets the gradient as it is."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _total(x, group)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


# ---- layers in shares; a layer becomes one by its class and keeps its parameters' names, as in lora.py


class InShares:
    group: dist.ProcessGroup


class RowLinear(InShares, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        y = Join.apply(F.linear(input, self.weight), self.group)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class RowsOfEmbedding(InShares, nn.Embedding):
    first: int  # id of its first row

    def forward(self, input: Tensor) -> Tensor:
        own = input - self.first
        here = (own >= 0) & (own < self.weight.size(0))
        return Join.apply(F.embedding(own.where(here, 0), self.weight) * here[..., None], self.group)


class RowAdapter(InShares, lora.Adapter):
    def down(self, x: Tensor, A: Tensor) -> Tensor:
        return Join.apply(super().down(x, A), self.group)


class WideLayerNorm(nn.LayerNorm):
    """In the dtype of what it normalises, whatever that of its gathered weights."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.to(input.dtype) for p in (self.weight, self.bias))
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class GPTInShares(InShares, GPT):
    def project(self, x: Tensor) -> Tensor:
        """Gathered, which is for generating text: no gradient passes."""
        own = softcapped(self.lm_head(x), self.config.logit_softcap).detach()
        tp, V = dist.get_world_size(self.group), self.config.vocab_size
        padded = F.pad(own, (0, -(-V // tp) - own.size(-1)))
        shares = [torch.empty_like(padded) for _ in range(tp)]
        dist.all_gather(shares, padded, group=self.group)
        return torch.cat([share[..., : len(vocabulary_share(V, tp, i))] for i, share in enumerate(shares)], dim=-1)

    def loss(self, x: Tensor, targets: Tensor, only_loss: bool) -> tuple[Tensor | None, Tensor]:
        x, flat, first, cap = x.flatten(0, 1), targets.flatten(), self.embedding.first, self.config.logit_softcap
        if type(self.lm_head) is nn.Linear and cap is None:
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            split, weight = Split.apply(x.to(dtype), self.group), self.lm_head.weight.to(dtype)
            loss = linear_cross_entropy_in_shares(split, weight, flat, first, self.group, IGNORE_INDEX)
        else:
            logits = softcapped(self.lm_head(x), cap)
            loss = cross_entropy_in_shares(logits, flat, first, self.group, IGNORE_INDEX)
        return None if only_loss else self.project(x).view(*targets.shape, -1), loss

    def new_cache(self, batch_size: int, room: int) -> KVCache:
        tp, weight = dist.get_world_size(self.group), self.lm_head.weight
        H, K, D = self.config.n_head // tp, max(1, self.config.kv_heads // tp), self.config.D
        own = {"n_head": H, "n_embd": H * D} | (
            {"n_kv_head": K, "head_size": D} if self.config.block == "llama" else {}
        )
        return KVCache(replace(self.config, **own), batch_size, weight.device, weight.dtype, room)


def vocabulary_share(size: int, tp: int, rank: int) -> range:
    """The rows of `size` that a rank has: the shares differ by one at most."""
    return range(size * rank // tp, size * (rank + 1) // tp)


# ---- what a rank of a tp group has of each parameter


@dataclass(frozen=True)
class Cut:
    """Of one dimension of a tensor these stretches, one behind the other."""

    dim: int
    stretches: tuple[range, ...]

    def of(self, whole: Tensor) -> Tensor:
        parts = [whole.narrow(self.dim, stretch.start, len(stretch)) for stretch in self.stretches]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


def cuts(model: GPT, tp: int, rank: int) -> dict[str, Cut]:
    """{parameter: its Cut}; those that are missing are the same on all ranks of a tp group."""
    if tp == 1:
        return {}
    found = {}
    for path, layer in model.named_modules():
        name = path.split(".")[-1]
        parameters = {f"{path}.{key}": (key, p.dim()) for key, p in layer.named_parameters()}
        if layer is model.embedding:
            found[f"{path}.weight"] = Cut(0, (vocabulary_share(layer.num_embeddings, tp, rank),))
        elif name in COLUMN and not _serves_several(name, model, tp):
            part = layer.out_features // PARTS.get(name, 1)
            share = vocabulary_share(part, tp, rank)
            rows = tuple(range(at + share.start, at + share.stop) for at in range(0, layer.out_features, part))
            found |= {key: Cut(0, rows) for key, (own, _) in parameters.items() if own.split(".")[-1] != "A"}
        elif name in ROW:
            columns = (vocabulary_share(layer.in_features, tp, rank),)
            found |= {key: Cut(1, columns) for key, (own, n) in parameters.items() if n == 2 and own[-2:] != ".B"}
    return found


def with_partial_gradients(model: GPT, held: dict[str, Cut]) -> list[str]:
    """The parameters of which all ranks of a tp group have the whole and each a part of the gradient: norms of queries
    and keys, keys and values with fewer heads than ranks, and the first matrix of an adapter that is cut by outputs."""
    layers = {path: layer for path, layer in model.named_modules() if path.split(".")[-1] in (*COLUMN, *HEAD_NORMS)}
    names = [f"{path}.{own}" for path, layer in layers.items() for own, _ in layer.named_parameters()]
    return [name for name in names if name not in held]


def _serves_several(name: str, model: GPT, tp: int) -> bool:
    """Whether keys and values have fewer heads than there are ranks: each rank then computes all, and takes its own."""
    return name in ("k_proj", "v_proj") and model.config.kv_heads % tp != 0


def _share_layers(model: GPT, group: dist.ProcessGroup) -> None:
    """Give layers the classes and hooks with which they compute shares."""
    tp, rank = group.size(), group.rank()
    for path, layer in list(model.named_modules()):
        name = path.split(".")[-1]
        if name in BRANCHES:
            layer.register_forward_pre_hook(lambda _layer, given: (Split.apply(given[0], group), *given[1:]))
        if _serves_several(name, model, tp):
            layer.register_forward_hook(_own_head(model, group))
        elif layer is model.embedding:
            lora.change_class(layer, RowsOfEmbedding)
            layer.group, layer.first = group, vocabulary_share(model.config.vocab_size, tp, rank).start
        elif name in ROW:
            lora.change_class(layer, RowLinear)
            layer.group = group
            if isinstance(layer, lora.Adapted):
                for part in layer.lora.values():
                    part.__class__, part.group = RowAdapter, group
    model.__class__, model.group = GPTInShares, group


def _own_head(model: GPT, group: dist.ProcessGroup) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    """A hook behind a projection that every rank computes: of its (B, T, K * D), the head of this rank's queries."""
    D, head = model.config.D, group.rank() * model.config.kv_heads // group.size()

    def take(_layer, _input, y: Tensor) -> Tensor:
        return y[..., head * D : (head + 1) * D]

    return take


def take_share(model: GPT, group: dist.ProcessGroup) -> None:
    """Turn `model` into what this rank of a tp group has of it, in its dtypes: `parallelize` without fsdp."""
    held = cuts(model, group.size(), group.rank())
    _share_layers(model, group)
    shares: dict[nn.Parameter, nn.Parameter] = {}
    for name, whole in list(model.named_parameters(remove_duplicate=False)):
        if name in held:
            if whole not in shares:
                shares[whole] = nn.Parameter(held[name].of(whole.detach()).contiguous(), whole.requires_grad)
            path, _, key = name.rpartition(".")
            setattr(model.get_submodule(path), key, shares[whole])


# ---- the whole model


def parallelize(
    model: GPT, ranks: Ranks, device: torch.device, dtype: str, *, compiled: bool, drawn: bool
) -> dict[str, Cut]:
    """Turn `model` into this process's share of it, on `device`, and return the `Cut`s of its parameters.

    The parameters of `model` may be views of a mapped file, or on the meta device, which leaves the shares to be filled
    (state_in_shares.py); if they are `drawn`, rank 0 has them, and the others get theirs from there. One block is held
    whole at a time. With a `dtype` of bfloat16, blocks are gathered and computed in it, and gradients are summed in
    float32, like the weights, which stay so.
    """
    held = cuts(model, ranks.mesh.tp, ranks.tp_rank)
    half = DTYPES[dtype] if dtype == "bfloat16" else None
    rounded = {p for p, _, _ in lora.frozen_weights(model)} if half and lora.adapter_names(model) else ()
    if ranks.mesh.tp > 1:
        _share_layers(model, ranks.group("tp"))
    if half:
        _keep_wide(model)
    shares: dict[nn.Parameter, nn.Parameter] = {}  # of a parameter that several layers have there is one share

    def take(module: nn.Module, prefix: str) -> None:
        for path, layer in module.named_modules(prefix=prefix):
            for key, parameter in list(layer.named_parameters(recurse=False)):
                if isinstance(parameter, DTensor):  # a block's, sharded already
                    continue
                if parameter not in shares:
                    whole = _from_rank_0(parameter.detach(), ranks) if drawn else parameter.detach()
                    to = half if parameter in rounded else torch.float32
                    share = _share(whole, held.get(f"{path}.{key}"), device, to)
                    shares[parameter] = nn.Parameter(share, requires_grad=parameter.requires_grad)
                setattr(layer, key, shares[parameter])

    data = ranks.grid["dp", "fsdp"] if ranks.mesh.dp > 1 else ranks.grid["fsdp"]
    policy = MixedPrecisionPolicy(half, torch.float32 if half else None, cast_forward_inputs=False)
    blocks = next(path for path, module in model.named_modules() if module is model.blocks)
    for i, block in enumerate(model.blocks):
        take(block, f"{blocks}.{i}")
        if compiled:
            block.compile()
        fully_shard(block, mesh=data, mp_policy=policy)
        shares.clear()  # and with it the block as it was
    take(model, "")
    fully_shard(model, mesh=data, mp_policy=policy)
    return held


def _from_rank_0(tensor: Tensor, ranks: Ranks) -> Tensor:
    whole = tensor if ranks.main else torch.empty_like(tensor, device="cpu")
    dist.broadcast(whole, 0)
    return whole


def _share(whole: Tensor, cut: Cut | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    own = cut.of(whole) if cut else whole
    share = torch.empty(own.shape, dtype=dtype, device=device)
    return share if own.is_meta else share.copy_(own)


def _keep_wide(model: GPT) -> None:
    """Let what flows between blocks stay in float32 where weights are gathered in bfloat16, as under autocast."""
    for layer in model.modules():
        if type(layer) is nn.LayerNorm:
            layer.__class__ = WideLayerNorm
        elif isinstance(layer, nn.Embedding):
            layer.register_forward_hook(lambda _layer, _input, y: y.float())
