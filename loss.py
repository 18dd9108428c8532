"""A language model's last step as one operation: the projection to the vocabulary and the cross-entropy of it.

Done one after the other they hold the logits (N, V) four times: in bfloat16, in float32, as probabilities and as
gradients. For 1,024 tokens and 50,257 ids these are 620 MB, and to move them takes a processor a third as long as the
products do. Here gradients are made in the forward pass, in the one buffer where the logits were, some rows at a time
while those are in the cache. What it gives up: the logits, second derivatives, and float16, in which the probabilities
of a large vocabulary vanish before a loss scale could lift them.
"""

import threading

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

BUFFER = 1 << 26  # logits held at a time; more tokens take several rounds
ROWS = 16  # whose probabilities are held in float32 at a time: 3 MB of 50,257 ids
PART = 12_608  # columns of a product at a time: what belongs to them stays in the cache, and two products are faster
ALIGNED = 64  # the buffer has a multiple of this many columns, for which the weight's gradient is a quarter faster


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """F.cross_entropy(F.linear(x, weight), targets): the mean over targets (N,) other than `ignore_index`, in nats.

    x (N, C) and weight (V, C) have one dtype; the result is in float32 at least. While it trains, a target with a
    probability below 1e-38 counts as 87 nats.
    """
    if not torch.is_grad_enabled():  # which the function itself is not told
        x, weight = x.detach(), weight.detach()
    return LinearCrossEntropy.apply(x, weight, targets, ignore_index)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        (N, _), V = x.shape, weight.size(0)
        for_x, for_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(x.dtype, torch.float32)
        counted = targets != ignore_index
        share = counted.to(wide) / counted.sum()  # (N,): what each token's loss counts
        shared = x * share[:, None].to(x.dtype)
        columns = -(-V // ALIGNED) * ALIGNED
        parts = [slice(at, min(V, at + PART)) for at in range(0, V, PART)]
        buffer = _buffer(x, max(1, min(N, BUFFER // columns)), columns)
        buffer[:, V:] = 0
        loss, dx, dweight = x.new_zeros((), dtype=wide), torch.empty_like(x) if for_x else None, None
        for start in range(0, N, len(buffer)):
            rows = slice(start, start + len(buffer))
            padded = buffer[: N - start]
            logits = padded[:, :V]
            for part in parts:
                torch.mm(x[rows], weight[part].t(), out=logits[:, part])
            target = targets[rows].where(counted[rows], 0)
            # Not as a matrix product: autocast would round that.
            loss += (_losses(logits, target, wide, for_x or for_weight) * share[rows]).sum()
            if for_x:
                total = sum(torch.mm(logits[:, part], weight[part]).to(wide) for part in parts)
                torch.mul(total, share[rows, None], out=dx[rows])
            if for_weight:
                product = (padded.t() @ shared[rows])[:V]  # (V, C)
                if len(buffer) < N and dweight is None:
                    product = product.to(wide)  # a sum over several rounds is not to be rounded at each
                dweight = product if dweight is None else dweight.add_(product)
        ctx.save_for_backward(dx, None if dweight is None else dweight.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # In place: the larger one takes as long to write as it took to compute. A second call is then an error.
        return *(None if made is None else made.mul_(gradient) for made in ctx.saved_tensors), None, None


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


def _losses(logits: Tensor, targets: Tensor, dtype: torch.dtype, wanted: bool) -> Tensor:
    """The cross-entropies (n,) of logits (n, V) in `dtype`; `wanted`, the logits become the gradients of their sum."""
    room = torch.empty(min(ROWS, len(logits)), logits.size(1), dtype=dtype, device=logits.device)
    found, minus_one = room.new_empty(len(logits), 1), room.new_full((len(room), 1), -1.0)
    for start in range(0, len(logits), ROWS):
        rows = slice(start, start + ROWS)
        own, target = logits[rows], targets[rows, None]
        wide = room[: len(own)].copy_(own)
        if not wanted:
            found[rows] = wide.logsumexp(dim=1, keepdim=True) - wide.gather(1, target)
            continue
        p = torch.softmax(wide, dim=1, out=wide)
        found[rows] = p.gather(1, target)
        own.copy_(p.scatter_add_(1, target, minus_one[: len(own)]))
    if wanted:
        found.clamp_(min=torch.finfo(dtype).tiny).log_().neg_()
    return found[:, 0]
