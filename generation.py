"""Text from a model that gives logits: one token at a time, drawn as asked, with a cache that never changes a token.

packed.py has TorchScript compile `draw` and what it calls.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

COLDEST = 1e-30  # a temperature below it would divide logits to infinity, and is as good as greedy


class Generation:
    """Mixed into GPT, of which it uses config.block_size, forward, new_cache and rope_changes."""

    def draw(self, *asked) -> tuple[Tensor, Tensor]:
        """As the function of that name; a packed model has it compiled."""
        return draw(*asked)

    def generate(self, idx: Tensor, max_new_tokens: int, **sampling) -> Tensor:
        """The prompt (B, T) with up to max_new_tokens more, (B, T + n). Keyword arguments are those of `stream`.

        Ends early when every row has met a stop token; a row that ended before the others repeats its stop token.
        """
        return torch.cat([idx, *(token[:, None] for token in self.stream(idx, max_new_tokens, **sampling))], dim=1)

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
        attention_mask: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield one token (B,) at a time after the prompt (B, T); temperature 0 is greedy.

        Ids from `vocab_size` on are never drawn: a model may have more rows than its tokenizer has tokens.
        `attention_mask` (B, T) is 0 where a prompt is padded, on either side. Only the last block_size tokens are seen.
        Once the context slides, every token has a new position, so cached keys would be stale: from there on each step
        reads the window anew, and the cache never changes a token.
        """
        if attention_mask is not None:
            idx, attention_mask = pad_left(idx, attention_mask)
        if idx.size(1) == 0:
            raise ValueError("an empty prompt: generation needs at least one token")
        was_training, limit = self.training, self.config.block_size
        stopped, stops = [False] * idx.size(0), frozenset(map(int, stop_tokens))
        # FSDP2 keeps what it has gathered from one pass to the next, and training cannot use what is made in this mode.
        without_gradients = torch.no_grad if hasattr(self, "unshard") else torch.inference_mode
        self.eval()
        try:
            with without_gradients():
                cache = self.new_cache(idx.size(0), min(limit, idx.size(1) + max_new_tokens)) if use_cache else None
            for _ in range(max_new_tokens):
                if self.training:  # another stream has ended meanwhile
                    was_training = True
                    self.eval()
                with without_gradients():
                    idx = idx[:, -limit:]
                    attention_mask = None if attention_mask is None else attention_mask[:, -limit:]
                    if cache is not None and cache.length == limit:
                        cache = None
                    if cache is not None and self.rope_changes(cache.length, idx.size(1)):
                        cache.length = 0
                    unseen = idx if cache is None else idx[:, cache.length :]
                    logits, _ = self(unseen, cache=cache, attention_mask=attention_mask)
                    token = sample(logits[:, -1, :vocab_size], temperature, top_k, top_p, generator, self.draw)  # (B,)
                    if any(stopped):
                        token = torch.where(torch.tensor(stopped, device=idx.device), idx[:, -1], token)
                    if stops:
                        stopped = [id in stops for id in token.tolist()]  # who had stopped repeats what stopped it
                    idx = torch.cat([idx, token[:, None]], dim=1)
                    if attention_mask is not None:
                        attention_mask = F.pad(attention_mask, (0, 1), value=1)
                yield token.clone()  # for any use
                if all(stopped):
                    return
        finally:
            self.train(was_training)


def pad_left(idx: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding of (B, T) to the left, where generation wants it, and no more of it than the longest row needs;
    the tokens keep their order."""
    idle = idx.size(1) - int(attention_mask.sum(dim=1).max())
    order = attention_mask.long().argsort(dim=1, stable=True)[:, idle:]
    return idx.gather(1, order), attention_mask.gather(1, order)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError for a setting outside its range."""
    if not temperature >= 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(
            f"sampling needs temperature >= 0, top_k >= 1 and 0 < top_p <= 1, not {temperature}, {top_k} and {top_p}"
        )


def draw(
    logits: Tensor, numbers: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor]:
    """What `sample` draws at random numbers (B, 1) between 0 and 1, (B,), and whether all were finite."""
    logits = logits.float()
    ids: Tensor | None = None  # of the logits, where these are not all there are
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = highest(logits, top_k)  # (B, k), in descending order
    logits = logits / temperature
    if top_p is not None and top_p < 1:
        if ids is None:
            logits, ids = logits.sort(descending=True)
        probabilities = logits.softmax(dim=-1)
        outside = probabilities.cumsum(dim=-1) - probabilities >= top_p  # what precedes already reaches top_p
        logits = logits.masked_fill(outside, -math.inf)
    ends = logits.softmax(dim=-1).cumsum(dim=-1, dtype=numbers.dtype)  # (B, V)
    token = torch.searchsorted(ends, numbers * ends[:, -1:], right=True).clamp_(max=ends.size(1) - 1)  # NaN is behind
    return (token if ids is None else ids.gather(1, token))[:, 0], ends[:, -1].isfinite().all()


def highest(logits: Tensor, k: int, group: int = 16) -> tuple[Tensor, Tensor]:
    """`logits.topk(k)`, on a processor in less time: they are in the k groups whose highest are the highest."""
    count = logits.size(-1) // group
    if logits.device.type != "cpu" or count < 4 * k:
        return logits.topk(k)
    groups = logits[:, : group * count].unflatten(1, (group, count)).amax(dim=1).topk(k, sorted=False).indices
    ids = (groups[:, None] + count * torch.arange(group)[:, None]).flatten(1)  # (B, group * k)
    ids = torch.cat([ids, torch.arange(group * count, logits.size(-1)).expand(len(ids), -1)], dim=1)
    found, at = logits.gather(1, ids).topk(k)
    return found, ids.gather(1, at)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    draw: Callable[..., tuple[Tensor, Tensor]] = draw,
) -> Tensor:
    """Draw one token id (B,) from logits (B, V), with Transformers' order: temperature, then top-k, then top-p.

    top_k keeps the k likeliest tokens, of equally likely ones any; top_p (Holtzman et al. 2020) the smallest set whose
    probabilities reach it. `draw` is the function of that name, compiled. Raises ValueError for settings outside their
    range, and for logits that are not finite.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        token = logits.argmax(dim=-1)  # which takes NaN for the highest
        finite = logits.gather(1, token[:, None]).isfinite().all()
    else:
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        # torch.multinomial draws a number for every id, which takes longer than all else that is done here.
        numbers = torch.rand(len(logits), 1, dtype=wide, device=logits.device, generator=generator)
        token, finite = draw(logits, numbers, max(temperature, COLDEST), top_k, top_p)
    if not finite:
        raise ValueError("the logits have numbers that are not finite: nothing can be drawn from them")
    return token
