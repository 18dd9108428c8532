"""Attention and rotary positions, of any model: functions of tensors and numbers that know no configuration. packed.py
has TorchScript compile `attend`, `rotation_at` and `rotate`, but for what only training needs.

B batch, T time (tokens), S time including what a cache holds, H query heads, K key and value heads, D head size
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from architecture import ORIGINAL

SHORT = 1 << 23  # scores of one layer, held for its backward pass: 16 MB in bfloat16


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    attentions: list[Tensor] | None = None,
) -> Tensor:
    """Queries (B, H, T, D), keys and values (B, K, S, D) to (B, T, H * D).

    `mask` (1 or B, 1, T, S) is true where a query sees a key; None is plain causal. To `attentions` the weights
    (B, H, T, S) are appended.
    """
    T, S = q.size(2), k.size(2)
    if attentions is None and softcap is None:
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript skips a block, but reads all of a condition
            if mask is None and T == S > 1 and _by_products(q):
                return _attend_by_products(q, k, v, scale, dropout)
        # is_causal aligns the mask with the first key, which is right only where nothing was cached.
        y = F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None and T > 1, scale=scale, enable_gqa=k.size(1) != q.size(1)
        )
    else:
        k, v = k.repeat_interleave(q.size(1) // k.size(1), dim=1), v.repeat_interleave(q.size(1) // v.size(1), dim=1)
        scores = softcapped(q @ k.transpose(2, 3) * scale, softcap)  # (B, H, T, S)
        seen = mask if mask is not None else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        weights = scores.masked_fill(~seen, -math.inf).softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        if attentions is not None:
            attentions.append(weights)
        y = F.dropout(weights, dropout) @ v
    return y.transpose(1, 2).flatten(2)


def softcapped(scores: Tensor, cap: float | None) -> Tensor:
    """Scores or logits, bent to stay within -cap and cap (Gemma 2, arXiv 2408.00118, section 2)."""
    return scores if cap is None else cap * torch.tanh(scores / cap)


def _by_products(q: Tensor) -> bool:
    """Whether whole matrix products are the faster way: on a processor with fast ones, and for sequences so short that
    holding the scores costs little. Flash attention is half as fast there as its arithmetic."""
    short = q.size(0) * q.size(1) * q.size(2) ** 2 <= SHORT
    return short and q.dtype == torch.bfloat16 and q.device.type == "cpu" and not torch.compiler.is_compiling()


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
    B, H, T, D = q.shape
    unseen = q.new_full((T, T), -math.inf).triu(1).repeat(H // k.size(1), 1)
    q, k, v = (x.reshape(B * k.size(1), -1, D) for x in (q, k, v))  # heads that share keys are rows of one product
    weights = torch.baddbmm(unseen, q, k.transpose(1, 2), alpha=scale).softmax(dim=-1)  # inside, in float32
    y = torch.bmm(F.dropout(weights, dropout), v)
    return y.view(B, H, T, D).transpose(1, 2).flatten(2)


def rope_frequencies(theta: float, scaling: Mapping[str, Any], n: int, length: int) -> tuple[Tensor, float]:
    """Radians a token for each pair of n turning dimensions, (n / 2,), and what cos and sin are multiplied by.

    `length` is that of the whole context: LongRoPE has other numbers for contexts beyond the original one.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, n, 2, dtype=torch.float32) / n)
    kind, factor, original = (scaling.get(key) for key in ("rope_type", "factor", ORIGINAL))
    attention = scaling.get("attention_factor") or 1.0
    if kind == "linear":
        frequencies = frequencies / factor
    elif kind == "llama3":  # long wavelengths are stretched, short ones kept, those between blended
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original * frequencies / (2 * math.pi)  # in the original context
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = kept * frequencies + (1 - kept) * frequencies / factor
    elif kind == "yarn":  # Peng et al. 2023, section 3.2: the same by dimension

        def dimension(rotations: float) -> float:
            return n * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, n - 1)
        stretched = ((torch.arange(n // 2) - low) / ((high - low) or 0.001)).clamp(0, 1)
        frequencies = frequencies * (1 - stretched + stretched / factor)
    elif kind == "longrope":  # Ding et al. 2024
        frequencies = frequencies / torch.tensor(scaling["long_factor" if length > original else "short_factor"])
    return frequencies, attention


def rotation_at(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """What `rotate` turns by at positions (1 or B, T): cos and sin, (1 or B, 1, T, rotary). `frequencies` has those of
    `rope_frequencies` twice, the first time with their sign changed."""
    angles = positions[:, None, :, None] * frequencies
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the first dimensions of (B, H, T, D); dimension i is paired with i + rotary / 2, and of the two sin has the
    first one's sign changed."""
    cos, sin = rotation[0].to(x.dtype), rotation[1].to(x.dtype)
    rotary = cos.size(-1)
    turning = x if rotary == x.size(-1) else x[..., :rotary]
    turned = turning * cos + turning.roll(rotary // 2, dims=-1) * sin
    return turned if rotary == x.size(-1) else torch.cat([turned, x[..., rotary:]], dim=-1)
