"""A language model's last step as one operation: the projection to the vocabulary and the cross-entropy of it.

Done one after the other they hold the logits (N, V) four times: in bfloat16, in float32, as probabilities and as
gradients. For 1,024 tokens and 50,257 ids these are 620 MB, and to move them takes a processor a third as long as the
products do. Here gradients are made in the forward pass, in the one buffer where the logits were, some rows at a time
while those are in the cache. What it gives up: the logits, second derivatives, and float16, in which the probabilities
of a large vocabulary vanish before a loss scale could lift them.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

BUFFER = 1 << 26  # logits held at a time; more tokens take several rounds
ROWS = 16  # that are held in float32 at a time where they have to be: 3 MB of 50,257 ids
SURE = 0.5  # a target's probability beyond which it is counted from what the others have
PART = 12_608  # columns of a product at a time: what belongs to them stays in the cache, and two products are faster
FEW = 64  # columns of a product that are better made as rows
ALIGNED = 64  # the buffer has a multiple of this many columns, for which the weight's gradient is a quarter faster


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, extra: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """F.cross_entropy(F.linear(x, weight), targets): the mean over targets (N,) other than `ignore_index`, in nats.

    x is (N, C); weight (V, C) may be wider, and is multiplied as what x is. `extra`, (N, r) and (V, r), are operands of
    a product to add to the logits: LoRA's. The result is in float32 at least. Where gradients are wanted,
    probabilities are rounded to the dtype of x, which in bfloat16 moves a token's loss by 0.002 nats, and a target less
    likely than 1e-38 counts as 87 nats.
    """
    weights = (weight,)
    if extra is not None:  # one product of wider operands
        x, weights = torch.cat([x, extra[0]], dim=1), (weight, extra[1])
    narrow = _narrow(weights, x.dtype)
    if not torch.is_grad_enabled():  # which the function itself is not told
        x, weights = x.detach(), [weight.detach() for weight in weights]
    return LinearCrossEntropy.apply(x, narrow, targets, ignore_index, *weights)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, *masters: Tensor
    ) -> Tensor:
        """The `masters` are what `weight` (V, C) was cast from, side by side."""
        (N, _), V = x.shape, weight.size(0)
        for_x, for_masters = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        wide = torch.promote_types(x.dtype, torch.float32)
        counted = targets != ignore_index
        ids = targets.where(counted, 0)
        weight[:, 0].gather(0, ids)  # raises for an id that is no row of it; what indexes the padded buffer would not
        count = counted.sum(dtype=wide)
        read = (x * counted[:, None]).split([master.size(1) for master in masters], dim=1)
        columns = -(-V // ALIGNED) * ALIGNED
        parts = [slice(at, min(V, at + PART)) for at in range(0, V, PART)]
        buffer = _buffer(x, max(1, min(N, BUFFER // columns)), columns)
        losses_of = _losses_and_gradients if for_x or any(for_masters) else _losses
        loss, dmasters = x.new_zeros((), dtype=wide), [None] * len(masters)
        dx = torch.empty_like(x) if for_x else None
        for start in range(0, N, len(buffer)):
            rows = slice(start, start + len(buffer))
            padded = buffer[: N - start]
            padded[:, V:] = -torch.inf
            logits = padded[:, :V]
            for part in parts:
                torch.mm(x[rows], weight[part].t(), out=logits[:, part])
            # Not as a matrix product: autocast would round that.
            loss += (losses_of(padded, ids[rows], wide) * counted[rows]).sum()
            if for_x:
                total = sum(torch.mm(logits[:, part], weight[part]).to(wide) for part in parts)
                torch.mul(total, counted[rows, None], out=dx[rows])
            for i, wanted in enumerate(for_masters):
                if not wanted:
                    continue
                product = _transposed_product(padded, read[i][rows])[:V]  # of the master's shape
                if len(buffer) < N and start == 0:
                    product = product.to(wide)  # a sum over several rounds is not to be rounded at each
                dmasters[i] = product if start == 0 else dmasters[i].add_(product)
        ctx.save_for_backward(dx, *dmasters)
        ctx.share = 1 / count.clamp(min=1)  # where nothing counts the loss is no number, and the gradients are zero
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # In place: the larger one takes as long to write as it took to compute. A second call is then an error.
        dx, *dmasters = (None if made is None else made.mul_(gradient * ctx.share) for made in ctx.saved_tensors)
        return dx, None, None, None, *dmasters


_kept = threading.local()


def _buffer(like: Tensor, rows: int, columns: int) -> Tensor:
    """Uninitialised, and the same memory at every call: freed between two of them, its place would be taken by smaller
    things, and the next one would lie elsewhere. `forget_buffer` frees it."""
    held = getattr(_kept, "buffer", None)
    if held is None or held.dtype != like.dtype or held.numel() < rows * columns:
        with torch.inference_mode(False):  # what is made in that mode cannot be written to outside of it
            held = _kept.buffer = torch.empty(rows * columns, dtype=like.dtype, device=like.device)
    return held[: rows * columns].view(rows, columns)


def forget_buffer() -> None:
    _kept.buffer = None


@contextmanager
def unchanged_weights() -> Iterator[None]:
    """As long as it lasts no weight changes; one that is wider than what it is multiplied by is cast once."""
    _kept.narrow = {}
    try:
        yield
    finally:
        _kept.narrow = None


def _narrow(weights: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """In `dtype` and side by side, (V, C)."""
    held = getattr(_kept, "narrow", None)
    if held is not None and (weights, dtype) in held:
        return held[weights, dtype]
    narrow = [weight.detach().to(dtype) for weight in weights]
    narrow = torch.cat(narrow, dim=1) if len(narrow) > 1 else narrow[0]
    if held is not None:
        held[weights, dtype] = narrow
    return narrow


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """a.t() @ b, where b has many rows. Of a few columns, an adapter's, it is transposed in half the time."""
    return a.t() @ b if b.size(1) >= FEW else (b.t() @ a).t()


def _losses(logits: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """The cross-entropies (n,) of logits (n, V), in `dtype`."""
    sums = [rows.to(dtype).logsumexp(dim=1) for rows in logits.split(ROWS)]
    return torch.cat(sums) - logits.gather(1, targets[:, None])[:, 0].to(dtype)


def _losses_and_gradients(logits: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """The same, while the logits become the gradients of their sum."""
    own = torch.arange(len(logits), device=logits.device), targets
    p = torch.softmax(logits, dim=1, out=logits)[own].to(dtype)
    logits[own] = 0
    rest = _rest(logits, p)  # the logits are probabilities by now, those of the targets aside
    logits[own] = -rest.to(logits.dtype)
    return -torch.where(p > SURE, torch.log1p(-rest), p.clamp(min=torch.finfo(dtype).tiny).log())


def _rest(probabilities: Tensor, p: Tensor) -> Tensor:
    """1 - p for each target, whose probability p is coarse near one, where bfloat16 has steps of 0.004: there it is
    summed from those of the others, `probabilities` (n, V), which are not."""
    rest = 1 - p
    for rows in (p > SURE).nonzero()[:, 0].split(ROWS):
        rest[rows] = probabilities[rows].sum(dim=1, dtype=p.dtype)
    return rest
