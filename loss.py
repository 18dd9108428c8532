"""A language model's last step as one operation: the projection to the vocabulary and the cross-entropy of it.

Done one after the other they hold the logits (N, V) four times: in bfloat16, in float32, as probabilities and as
gradients. For 1,024 tokens and 50,257 ids these are 620 MB, and to move them takes a processor a third as long as the
products do. Here gradients are made in the forward pass, in the one buffer where the logits were, some rows at a time
while those are in the cache. What it gives up: the logits, second derivatives, and float16, in which the probabilities
of a large vocabulary vanish before a loss scale could lift them.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

BUFFER = 1 << 26  # logits held at a time; more tokens take several rounds
ROWS = 16  # that are held in float32 at a time where they have to be: 3 MB of 50,257 ids
SURE = 0.5  # a target's probability beyond which it is counted from what the others have
FEW = 64  # columns of a product that are better made as rows
ALIGNED = 64  # the logits have a multiple of this many columns, for which the weight's gradient is a quarter faster
MANY = 1024  # rows of a product from which a weight is reordered before it, even if there is no second one
PIECE = 1024  # rows of a matrix that are transposed at a time, within the cache: in half the time


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
    factor = _factor(weights, x)
    if not torch.is_grad_enabled():  # which the function itself is not told
        x, weights = x.detach(), [weight.detach() for weight in weights]
    return LinearCrossEntropy.apply(x, factor, targets, ignore_index, *weights)


_kept = threading.local()


class Factor:
    """Weights (V, C1), (V, C2), ... side by side in `dtype`, as one matrix (V, C) to multiply by."""

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype):
        narrow = [weight.to(dtype) for weight in weights]
        self.weight = torch.cat(narrow, dim=1) if len(narrow) > 1 else narrow[0]

    def logits(self, x: Tensor) -> Tensor:
        """The products of x (n, C) and every row of the weight; (n, V) and some columns of anything."""
        logits = _buffer(x, len(x), _aligned(len(self.weight)))
        torch.mm(x, self.weight.t(), out=logits[:, : len(self.weight)])
        return logits

    def back(self, gradients: Tensor) -> Tensor:
        """From gradients of the logits to those of x, (n, C)."""
        return gradients[:, : len(self.weight)] @ self.weight


class ReorderedFactor(Factor):
    """The same, faster for many rows: it lies as (C, V) does, and for the way back in the order in which oneDNN's
    kernels read a weight. Each product would bring it into that again, in an eighth of its time."""

    reordered: Tensor | None = None

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype):
        V, widths = len(weights[0]), [weight.size(1) for weight in weights]
        self.turned = weights[0].new_empty(sum(widths), _aligned(V), dtype=dtype)
        self.turned[:, V:] = 0
        self.weight = self.turned[:, :V].t()
        for columns, weight in zip(self.weight.split(widths, dim=1), weights, strict=True):
            for target, source in zip(columns.split(PIECE), weight.split(PIECE), strict=True):
                target.copy_(source.to(dtype))

    def back(self, gradients: Tensor) -> Tensor:
        if self.reordered is None:
            self.reordered = _reordered(self.turned)
        return _linear(gradients, self.reordered)


def _reordered(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _aligned(columns: int) -> int:
    return -(-columns // ALIGNED) * ALIGNED


def _buffer(like: Tensor, rows: int, columns: int) -> Tensor:
    """Uninitialised, and the same memory at every call: freed between two of them, its place would be taken by smaller
    things, and the next one would lie elsewhere. `forget_buffer` frees it."""
    held = getattr(_kept, "buffer", None)
    if held is None or held.dtype != like.dtype or held.numel() < rows * columns:
        with torch.inference_mode(False):  # what is made in that mode cannot be written to outside of it
            held = _kept.buffer = torch.empty(rows * columns, dtype=like.dtype, device=like.device)
    return held[: rows * columns].view(rows, columns)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, factor: Factor, targets: Tensor, ignore_index: int, *masters: Tensor
    ) -> Tensor:
        """The `masters` are what `factor` was made from, side by side."""
        N, V = len(x), len(masters[0])
        for_x, for_masters = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        wide = torch.promote_types(x.dtype, torch.float32)
        counted = targets != ignore_index
        ids = targets.where(counted, 0)
        masters[0][:, 0].gather(0, ids)  # raises for an id that is no row; what indexes padded logits would not
        count = counted.sum(dtype=wide)
        read = (x * counted[:, None]).split([master.size(1) for master in masters], dim=1)
        size = max(1, min(N, BUFFER // _aligned(V)))
        losses_of = _losses_and_gradients if for_x or any(for_masters) else _losses
        loss, dmasters = x.new_zeros((), dtype=wide), [None] * len(masters)
        dx = torch.empty_like(x) if for_x else None
        for start in range(0, N, size):
            rows = slice(start, start + size)
            logits = factor.logits(x[rows])
            logits[:, V:] = -torch.inf
            # Not as a matrix product: autocast would round that.
            loss += (losses_of(logits, ids[rows], wide) * counted[rows]).sum()
            if for_x:
                torch.mul(factor.back(logits), counted[rows, None], out=dx[rows])
            for i, wanted in enumerate(for_masters):
                if not wanted:
                    continue
                product = _transposed_product(logits, read[i][rows])[:V]  # of the master's shape
                if size < N and start == 0:
                    product = product.to(wide)  # a sum over several rounds is not to be rounded at each
                dmasters[i] = product if start == 0 else dmasters[i].add_(product)
        ctx.save_for_backward(dx, *dmasters)
        ctx.dtypes = [x.dtype, *(master.dtype for master in masters)]
        ctx.share = 1 / count.clamp(min=1)  # where nothing counts the loss is no number, and the gradients are zero
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # In the dtype that autograd would cast them to in any case: float32 is multiplied at several times the speed.
        # In place: the larger one takes as long to write as it took to compute. A second call is then an error.
        dx, *dmasters = (
            None if made is None else made.to(dtype).mul_(gradient * ctx.share)
            for made, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return dx, None, None, None, *dmasters


def forget_buffer() -> None:
    _kept.buffer = None


@contextmanager
def unchanged_weights(frozen: dict | None = None) -> Iterator[None]:
    """As long as it lasts no weight changes, and each is cast and brought into its order once. What was made of weights
    without a gradient stays in `frozen`, for the next time."""
    held = _kept.factors = {} if frozen is None else frozen
    try:
        yield
    finally:
        _kept.factors = None
        for key in [key for key in held if any(weight.requires_grad for weight in key[0])]:
            del held[key]


def _factor(weights: tuple[Tensor, ...], x: Tensor) -> Factor:
    """The weights in the dtype of x, side by side."""
    reorder = len(x) >= MANY and x.dtype == torch.bfloat16 and x.device.type == "cpu" and _has_fast_bfloat16()
    held = getattr(_kept, "factors", None)
    key = weights, x.dtype, reorder
    if held is not None and key in held:
        return held[key]
    factor = (ReorderedFactor if reorder else Factor)([weight.detach() for weight in weights], x.dtype)
    if held is not None:
        held[key] = factor
    return factor


def _has_fast_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


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
