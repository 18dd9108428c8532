"""GPTs in plain PyTorch: `GPTConfig` (architecture.py) describes one, `GPT` computes it.

Two kinds of block, each with the parameter names of its field, share one attention routine. "gpt2" is GPT-2's (Radford
et al. 2019) as nanoGPT spells it: a nanoGPT `ckpt.pt` loads as it is, and ours opens there. "llama" is Llama's (Touvron
et al. 2023) and that of its relatives; what sets these apart is a field of the configuration, never a model's name.
Letters for tensor sizes throughout this file:

    B batch, T time (tokens), S time including what a cache holds, C width (n_embd), V vocabulary
    H query heads, K key and value heads, D head size
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from architecture import ORIGINAL, GPTConfig
from attention import attend, rope_frequencies, rotate, rotation_at, softcapped
from generation import Generation
from loss import linear_cross_entropy
from norm import RMSNorm

IGNORE_INDEX = -1  # targets with this value carry no loss; nanoGPT's choice


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": gelu_tanh, "silu": F.silu}


class Dropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training and self.p else x  # even a dropout of nothing is an operation


class KVCache:
    """Keys and values of the tokens a model has seen, allocated once for `room` of them."""

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype, room: int):
        shape = (config.n_layer, batch_size, config.kv_heads, room, config.D)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens held; GPT.forward advances it after the last layer
        self.frequencies: dict[
            bool, tuple[Tensor, float]
        ] = {}  # what GPT._new_frequencies gave, the same at every step

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put (B, K, T, D) behind what `layer` holds and return all of it, (B, K, S, D)."""
        return append(self.keys[layer], self.length, k), append(self.values[layer], self.length, v)


def append(cached: Tensor, length: int, new: Tensor) -> Tensor:
    """Put (B, K, T, D) behind the first `length` of (B, K, room, D) and return what is there now, (B, K, S, D)."""
    cached.narrow(2, length, new.size(2)).copy_(new)
    return cached.narrow(2, 0, length + new.size(2))


@dataclass
class Pass:
    """What all layers share in one forward pass. `masks` and `rotations` have an entry for layers with the window
    (True) and one for those without."""

    cache: KVCache | None
    masks: dict[bool, Tensor | None]  # (1 or B, 1, T, S), true where a query sees a key; None: plain causal
    rotations: dict[bool, tuple[Tensor, Tensor]]  # cos and sin as `rotate` takes them, (1 or B, 1, T, rotary)
    attentions: list[Tensor] | None


def attend_with_cache(
    q: Tensor, k: Tensor, v: Tensor, config: GPTConfig, layer: int, now: Pass, dropout: float
) -> Tensor:
    """Queries (B, H, T, D), new keys and values (B, K, T, D) to (B, T, H * D)."""
    if now.cache is not None:
        k, v = now.cache.extend(layer, k, v)
    scale = (config.query_scalar or config.D) ** -0.5
    mask = now.masks[config.is_local(layer)]
    return attend(q, k, v, mask, scale, dropout, config.attention_softcap, now.attentions)


# ---- GPT-2's block


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)
        self.config, self.layer = config, layer

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, -1, self.config.D).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = attend_with_cache(q, k, v, self.config, self.layer, now, self.config.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.inner, bias=config.bias)
        self.c_proj = nn.Linear(config.inner, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
        self.mlp = MLP(config)

    @property
    def ends(self) -> tuple[nn.Linear, nn.Linear]:
        """The layers that write to the residual stream."""
        return self.attn.c_proj, self.mlp.c_proj

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        x = x + self.attn(self.ln_1(x), now)
        return x + self.mlp(self.ln_2(x))


# ---- Llama's block


def as_products_take_it(x: Tensor) -> Tensor:
    """What autocast would make of x for every product, made once for several."""
    cast = torch.is_autocast_enabled(x.device.type)
    return x.to(torch.get_autocast_dtype(x.device.type)) if cast else x


class LlamaAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        H, K, D, bias = config.n_head, config.kv_heads, config.D, config.bias or config.qkv_bias
        self.q_proj = nn.Linear(config.n_embd, H * D, bias=bias)
        self.k_proj = nn.Linear(config.n_embd, K * D, bias=bias)
        self.v_proj = nn.Linear(config.n_embd, K * D, bias=bias)
        self.o_proj = nn.Linear(H * D, config.n_embd, bias=config.bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(D, config), RMSNorm(D, config)
        self.config, self.layer = config, layer

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        x, heads = as_products_take_it(x), (*x.shape[:2], -1, self.config.D)
        q, k, v = (project(x).view(heads).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        rotation = now.rotations[self.config.is_local(self.layer)]
        # The norms' weights are wider than a product under autocast; attention is not to be.
        q, k = (rotate(x, rotation).type_as(v) for x in (q, k))
        y = attend_with_cache(q, k, v, self.config, self.layer, now, self.config.dropout if self.training else 0.0)
        return self.o_proj(y)


class GatedMLP(nn.Module):
    """Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.inner, bias=config.bias)
        self.up_proj = nn.Linear(config.n_embd, config.inner, bias=config.bias)
        self.down_proj = nn.Linear(config.inner, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        x = as_products_take_it(x)
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.self_attn = LlamaAttention(config, layer)
        self.mlp = GatedMLP(config)
        self.input_layernorm = RMSNorm(config.n_embd, config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config)
        if config.post_norms:  # Gemma's names: then the one above is behind the attention, not before the MLP
            self.pre_feedforward_layernorm = RMSNorm(config.n_embd, config)
            self.post_feedforward_layernorm = RMSNorm(config.n_embd, config)
        self.post_norms, self.dropout = config.post_norms, Dropout(config.dropout)

    @property
    def ends(self) -> tuple[nn.Linear, nn.Linear]:
        return self.self_attn.o_proj, self.mlp.down_proj

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), now)
        if self.post_norms:
            x = x + self.dropout(self.post_attention_layernorm(y))
            return x + self.dropout(self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))))
        x = x + self.dropout(y)
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


# ---- the model


class GPT(Generation, nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # each block's activations in the backward pass, instead of holding them
        tokens = nn.Embedding(config.vocab_size, config.n_embd)
        if config.block == "gpt2":
            self.transformer = nn.ModuleDict(
                {
                    "wte": tokens,
                    "wpe": nn.Embedding(config.block_size, config.n_embd),
                    "drop": Dropout(config.dropout),
                    "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                    "ln_f": nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias),
                }
            )
        else:
            self.model = nn.ModuleDict(
                {
                    "embed_tokens": tokens,
                    "layers": nn.ModuleList(LlamaBlock(config, layer) for layer in range(config.n_layer)),
                    "norm": RMSNorm(config.n_embd, config),
                }
            )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_head()
        self.apply(self._init_weights)

    def tie_head(self) -> None:
        """Share the token embedding's weight with the head where the configuration says so. What assigns tensors to
        parameters, as `load_state_dict(assign=True)`, separates them: call this afterwards."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight

    def _init_weights(self, module: nn.Module) -> None:
        """GPT-2's initialisation."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        # Each block adds two branches to the residual stream: 2 * n_layer terms keep the variance of one. `apply`
        # visits children first, so this narrows what the lines above have just drawn.
        if isinstance(module, Block | LlamaBlock):
            for layer in module.ends:
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    @property
    def embedding(self) -> nn.Embedding:
        """Of the tokens."""
        return self.transformer.wte if self.config.block == "gpt2" else self.model.embed_tokens

    def make_embedding_sparse(self) -> list[Tensor]:
        """Make the token embedding give its gradient as rows, one for each token of a batch, and return its weight; []
        where it is frozen, adapted or the head's too. The rows are for a `grad` that is a matrix already: as matrices
        they are mostly zeros, and to fill and add those takes 3 % of a step of the small preset."""
        embedding = self.embedding
        alone = type(embedding) is nn.Embedding and embedding.weight is not self.lm_head.weight
        embedding.sparse = alone and embedding.weight.requires_grad
        return [embedding.weight] if embedding.sparse else []

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.h if self.config.block == "gpt2" else self.model.layers

    @cached_property
    def kinds(self) -> list[bool]:
        """Whether layers have the window: [False], [True], or both where they take turns."""
        return sorted({self.config.is_local(layer) for layer in range(self.config.n_layer)})

    @property
    def final_norm(self) -> nn.Module:
        return self.transformer.ln_f if self.config.block == "gpt2" else self.model.norm

    def num_params(self) -> int:
        """Every parameter once, position embeddings included: the count in a model directory's name."""
        return sum(p.numel() for p in self.parameters())

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        attention_mask: Tensor | None = None,
        hidden_states: list[Tensor] | None = None,
        attentions: list[Tensor] | None = None,
        only_loss: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Token ids (B, T) to (logits, loss).

        With targets (B, T), logits are (B, T, V) and loss is the mean cross-entropy in nats per token over targets
        other than -1; with `only_loss`, logits are None, for then they need not be held. Without targets, only the
        last position is projected, of each row the last one that is no padding: logits are (B, 1, V) and loss is None.
        With a cache, idx holds the tokens that follow those the cache has seen.

        `attention_mask` (B, S), over the cached tokens too, is 0 for padding on either side, which is then not seen and
        has no position. To `hidden_states` are appended the embeddings and every block's output, (B, T, C), the last
        one after the final norm; to `attentions` every layer's weights, (B, H, T, S).

        Raises ValueError when the context would be longer than block_size.
        """
        seen = cache.length if cache is not None else 0
        T, S = idx.size(1), seen + idx.size(1)
        if self.config.block_size < S:
            raise ValueError(f"a context of {S} tokens is longer than block_size={self.config.block_size}")
        if attention_mask is None:
            positions = torch.arange(seen, S, device=idx.device)[None]  # (1, T)
        else:
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, seen:]  # (B, T)
        x = self._hidden(idx, positions, self._masks(seen, T, attention_mask), cache, hidden_states, attentions)
        if cache is not None:
            cache.length += T
        if targets is None:
            return self.project(x[:, -1:] if attention_mask is None else last_real(x, attention_mask[:, seen:])), None
        return self.loss(x, targets, only_loss)

    def _hidden(
        self,
        idx: Tensor,
        positions: Tensor,
        masks: dict[bool, Tensor | None],
        cache: KVCache | None,
        hidden_states: list[Tensor] | None,
        attentions: list[Tensor] | None,
    ) -> Tensor:
        """What is behind the final norm, (B, T, C)."""
        by_kind = self._frequencies(positions, cache)
        rotations = {local: rotation_at(positions, *turning) for local, turning in by_kind.items()}
        now = Pass(cache, masks, rotations, attentions)
        x = self._embed(idx, positions)  # (B, T, C)
        for block in self.blocks:
            if hidden_states is not None:
                hidden_states.append(x)
            recompute = self.recompute and torch.is_grad_enabled() and attentions is None  # which would hold as much
            x = checkpoint(block, x, now, use_reentrant=False) if recompute else block(x, now)
        x = self.final_norm(x)
        if hidden_states is not None:
            hidden_states.append(x)
        return x

    def loss(self, x: Tensor, targets: Tensor, only_loss: bool) -> tuple[Tensor | None, Tensor]:
        """(logits or None, loss) for hidden states (B, T, C) behind the final norm."""
        if only_loss and (loss := self._fused_loss(x, targets)) is not None:
            return None, loss
        logits = self.project(x)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
        return None if only_loss else logits, loss

    def _embed(self, idx: Tensor, positions: Tensor) -> Tensor:
        x = self.embedding(idx)
        if self.config.block == "gpt2":
            return self.transformer.drop(x + self.transformer.wpe(positions))
        return x * torch.tensor(self.config.n_embd**0.5, dtype=x.dtype) if self.config.scaled_embeddings else x

    def project(self, x: Tensor) -> Tensor:
        """Hidden states (B, T, C), behind the final norm, to logits (B, T, V)."""
        return softcapped(self.lm_head(x), self.config.logit_softcap)

    def _fused_loss(self, x: Tensor, targets: Tensor) -> Tensor | None:
        """The loss without logits, or None where that is not faster (loss.py) or the head is more than products."""
        kind, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        head = self.lm_head
        plain = getattr(head, "plain_class", type(head)) is nn.Linear and head.bias is None
        slower = kind != "cpu" or dtype == torch.float16 or torch.compiler.is_compiling()
        if not plain or slower or self.config.logit_softcap is not None:
            return None
        x = x.flatten(0, 1).to(dtype)
        extra = None if type(head) is nn.Linear else head.extra(x)  # LoRA's
        return linear_cross_entropy(x, head.weight, targets.flatten(), IGNORE_INDEX, extra)

    def _masks(self, seen: int, T: int, attention_mask: Tensor | None) -> dict[bool, Tensor | None]:
        S, window = seen + T, self.config.sliding_window
        masks: dict[bool, Tensor | None] = {False: None, True: None}
        for local in masks:
            narrow = local and window is not None and window < S
            # Causal from the first key on, or one query that sees all: attention knows both without a mask.
            if narrow or attention_mask is not None or (seen and T > 1):
                device = self.final_norm.weight.device
                queries, keys = torch.arange(seen, S, device=device)[:, None], torch.arange(S, device=device)
                mask = keys <= queries  # (T, S)
                if narrow:
                    mask &= keys > queries - window
                if attention_mask is not None:
                    # Padding sees itself, for a softmax over nothing is not a number.
                    mask = (mask & attention_mask.bool()[:, None]) | (keys == queries)
                masks[local] = mask[None, None] if mask.dim() == 2 else mask[:, None]
        return masks

    def _frequencies(self, positions: Tensor, cache: KVCache | None) -> dict[bool, tuple[Tensor, float]]:
        """What `rotation_at` takes, by whether a layer has the window; {} of GPT-2's block."""
        if self.config.block == "gpt2":
            return {}
        if (self.config.rope_scaling or {}).get("rope_type") == "longrope":
            return self._new_frequencies(positions.device, int(positions.max()) + 1)
        if cache is None:
            return self._new_frequencies(positions.device)
        if not cache.frequencies:
            cache.frequencies = self._new_frequencies(positions.device)
        return cache.frequencies

    def _new_frequencies(self, device: torch.device, longest: int = 0) -> dict[bool, tuple[Tensor, float]]:
        by_kind = {}
        for local in self.kinds:
            theta, scaling = self.config.rope_theta, self.config.rope_scaling
            if local and self.config.rope_local_theta is not None:
                theta, scaling = self.config.rope_local_theta, None
            frequencies, factor = rope_frequencies(theta, scaling or {}, self.config.rotary, longest)
            by_kind[local] = torch.cat([-frequencies, frequencies]).to(device), factor
        return by_kind

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context in place, keeping the first position embeddings. Raises ValueError for a longer one."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size={block_size} must lie between 1 and the model's {self.config.block_size}")
        if self.config.block == "gpt2":
            wpe = self.transformer.wpe
            if type(wpe) is not nn.Embedding:
                raise ValueError("the position embeddings have an adapter, of a row for each: merge it, then crop them")
            wpe.num_embeddings, weight = block_size, wpe.weight
            wpe.weight = nn.Parameter(weight[:block_size].detach().clone(), weight.requires_grad)
        self.config = replace(self.config, block_size=block_size)

    def new_cache(self, batch_size: int, room: int) -> KVCache:
        weight = self.final_norm.weight  # as wide as activations are, whatever holds the matrices (packed.py)
        return KVCache(self.config, batch_size, weight.device, weight.dtype, room)

    def rope_changes(self, cached: int, length: int) -> bool:
        """Whether a context of `length` tokens turns keys by other angles than those in the cache were (LongRoPE)."""
        scaling = self.config.rope_scaling or {}
        return scaling.get("rope_type") == "longrope" and cached <= scaling[ORIGINAL] < length


def last_real(x: Tensor, attention_mask: Tensor) -> Tensor:
    """Of each row of (B, T, C) the last position that is no padding, (B, 1, C)."""
    last = (attention_mask.long() * torch.arange(1, x.size(1) + 1, device=x.device)).argmax(dim=1)
    return x[torch.arange(x.size(0), device=x.device), last][:, None]


class SkipInit(TorchFunctionMode):
    """Leaves tensors as `nn.init.normal_` finds them."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        return named["tensor"] if function is nn.init.normal_ else function(*arguments, **(named or {}))


def on_meta(config: GPTConfig) -> GPT:
    """A GPT of shapes without numbers. `normal_` has none to draw here, and would first import torch's compiler: 0.7
    seconds."""
    with torch.device("meta"), SkipInit():
        return GPT(config)


def count_parameters(config: GPTConfig) -> int:
    return on_meta(config).num_params()
