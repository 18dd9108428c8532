"""A GPT in plain PyTorch: `GPTConfig` describes it, `GPT` computes it, `PRESETS` names three of them.

The shapes and parameter names are GPT-2's (Radford et al. 2019) as nanoGPT spells them, so that a nanoGPT `ckpt.pt`
loads as it is and ours opens there. Letters used for tensor sizes throughout this file:

    B batch, T time (tokens), S time including what a cache holds, C width (n_embd), H heads, D head size, V vocabulary
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORE_INDEX = -1  # targets with this value carry no loss; nanoGPT's choice


@dataclass(frozen=True)
class GPTConfig:
    """The architecture, and nothing about training it. The first seven fields are nanoGPT's `model_args`.

    Raises ValueError, with every problem in one message, when the numbers cannot make a model.
    """

    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # probability, on attention weights, residual branches and embeddings
    bias: bool = True  # in linear layers and layer norms
    tie_word_embeddings: bool = True  # lm_head shares the token embedding's matrix

    def __post_init__(self):
        sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        problems = [f"{name}={getattr(self, name)} must be at least 1" for name in sizes if getattr(self, name) < 1]
        if not problems and self.n_embd % self.n_head:
            problems.append(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"dropout={self.dropout} must be at least 0 and below 1")
        if problems:
            raise ValueError("impossible model: " + "; ".join(problems))


# The parameter count depends on context, tying and bias, so a preset fixes those too.
PRESETS = {
    "small": GPTConfig(256, 50257, 5, 5, 320, bias=False, tie_word_embeddings=False),  # 38,393,920
    "medium": GPTConfig(1024, 50257, 12, 12, 768, bias=False),  # 124,337,664
    "large": GPTConfig(1024, 50257, 24, 16, 1024, bias=False),  # 354,551,808
}


class KVCache:
    """Keys and values of the tokens a model has seen, allocated once for its whole context."""

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype):
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_head, config.block_size, head_size)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens held; GPT.forward advances it after the last layer

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put (B, H, T, D) behind what `layer` holds and return all of it, (B, H, S, D)."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        mask = None
        if cache is not None:
            k, v = cache.extend(layer, k, v)
            S = k.size(2)
            # is_causal aligns the mask with the first key; behind a filled cache the first query is token S - T. One
            # query sees every key and needs no mask at all.
            if 1 < T < S:
                mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and T > 1,
        )
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        # nanoGPT's exact GELU. GPT-2's own weights were trained with the tanh approximation.
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, layer)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """GPT-2's initialisation. On the meta device this does nothing, and costs nothing."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):
            # Each block adds two branches to the residual stream: 2 * n_layer terms keep the variance of one. `apply`
            # visits children first, so this narrows what the lines above have just drawn.
            for branch in (module.attn, module.mlp):
                nn.init.normal_(branch.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def num_params(self) -> int:
        """Every parameter once, position embeddings included: the count in a model directory's name."""
        return sum(p.numel() for p in self.parameters())

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Token ids (B, T) to (logits, loss).

        With targets (B, T), logits are (B, T, V) and loss is the mean cross-entropy in nats per token over targets
        other than -1. Without, only the last position is projected: logits are (B, 1, V) and loss is None. With a
        cache, idx holds the tokens that follow those the cache has seen.

        Raises ValueError when the context would be longer than block_size.
        """
        seen = cache.length if cache is not None else 0
        T = idx.size(1)
        if seen + T > self.config.block_size:
            raise ValueError(f"a context of {seen + T} tokens is longer than block_size={self.config.block_size}")
        positions = torch.arange(seen, seen + T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))  # (B, T, C)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, cache, layer)
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.length += T
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
        return logits, loss

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context in place, keeping the first position embeddings. Raises ValueError for a longer one."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size={block_size} must lie between 1 and the model's {self.config.block_size}")
        self.config = replace(self.config, block_size=block_size)
        self.transformer.wpe = nn.Embedding.from_pretrained(
            self.transformer.wpe.weight[:block_size].clone(), freeze=False
        )

    def generate(self, idx: Tensor, max_new_tokens: int, **sampling) -> Tensor:
        """The prompt (B, T) with up to max_new_tokens more, (B, T + n). Keyword arguments are those of `stream`.

        Ends early when every row has met a stop token; a row that ended before the others repeats its stop token.
        """
        return torch.cat([idx, *(token[:, None] for token in self.stream(idx, max_new_tokens, **sampling))], dim=1)

    @torch.no_grad()
    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_tokens: Sequence[int] = (),
        vocab_size: int | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Iterator[Tensor]:
        """Yield one token (B,) at a time after the prompt (B, T); temperature 0 is greedy.

        Ids from `vocab_size` on are never drawn: a model may have more rows than its tokenizer has tokens.
        Only the last block_size tokens are seen. Once the context slides, every token has a new position, so cached
        keys would be stale: from there on each step reads the window anew, and the cache never changes a token.
        """
        if idx.size(1) == 0:
            raise ValueError("an empty prompt: generation needs at least one token")
        was_training = self.training
        self.eval()
        try:
            weight = self.transformer.wte.weight
            cache = KVCache(self.config, idx.size(0), weight.device, weight.dtype) if use_cache else None
            stopped = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
            stops = torch.tensor(list(stop_tokens), dtype=idx.dtype, device=idx.device)
            for step in range(max_new_tokens):
                idx = idx[:, -self.config.block_size :]
                if cache is not None and cache.length == self.config.block_size:
                    cache = None
                unseen = idx if cache is None else idx[:, cache.length :]
                logits, _ = self(unseen, cache=cache)
                token = sample(logits[:, -1, :vocab_size], temperature, top_k, top_p, generator)  # (B,)
                if step:
                    token = torch.where(stopped, idx[:, -1], token)
                stopped |= torch.isin(token, stops)
                yield token
                if stopped.all():
                    return
                idx = torch.cat([idx, token[:, None]], dim=1)
        finally:
            self.train(was_training)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token id (B,) from logits (B, V), with Transformers' order: temperature, then top-k, then top-p.

    top_p (Holtzman et al. 2020) keeps the smallest set of tokens whose probabilities reach it. Raises ValueError for
    settings outside their range.
    """
    if not temperature >= 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(
            f"sampling needs temperature >= 0, top_k >= 1 and 0 < top_p <= 1, not {temperature}, {top_k} and {top_p}"
        )
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    logits = (logits - logits.max(dim=-1, keepdim=True).values) / temperature  # however small, it overflows downwards
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(dim=-1)
        outside = probabilities.cumsum(dim=-1) - probabilities >= top_p  # what precedes already reaches top_p
        logits = logits.masked_fill(outside.scatter(1, order, outside), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
