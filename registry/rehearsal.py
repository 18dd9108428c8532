"""A training step, or a reading of a prompt, on tensors without numbers: what is allocated, in which order, how long.

PyTorch's fake tensors (FakeTensorMode, which torch.compile traces with) have a shape, a dtype and a device, and no
memory. GPT, LoRA, autocast and autograd run on them as they run on a CPU, and every storage that an operation makes is
noted when it comes and when it goes. So nothing here knows what a layer saves for its backward pass: change model.py
and the count follows. It takes as long for any width: seconds, or with 62 layers half a minute.
"""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attention
import loss
from device import DTYPES, autocast
from lora import LoRAConfig, apply_lora, round_frozen
from model import GPT, GPTConfig

COPIES, GRADIENTS, OPTIMIZER, ACTIVATIONS = "copies", "gradients", "optimizer", "activations"
LOGITS, CACHE = "logits", "cache"
KINDS = (COPIES, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS, CACHE)


@dataclass(frozen=True)
class Rehearsal:
    """What came and went. Buffer n has `sizes[n]` bytes and is of `kinds[n]`; `moves` says in order which came (n) and
    which went (~n), and from `again` on they repeat themselves. The weights were there before, adapters among them."""

    weights: int  # bytes
    parameters: int
    trainable: int
    block: int  # parameters of one
    sizes: tuple[int, ...]
    kinds: tuple[str, ...]
    moves: tuple[int, ...]
    again: int

    def peak(self, shares: Mapping[str, float]) -> dict[str, int]:
        """Bytes of each kind at the fullest moment. Of the kinds in `shares`, this device holds only that share."""
        sizes = [int(size * shares.get(kind, 1)) for size, kind in zip(self.sizes, self.kinds, strict=True)]
        held = most = last = 0
        for i, n in enumerate(self.moves):
            held += sizes[n] if n >= 0 else -sizes[~n]
            if held > most:
                most, last = held, i
        there = set()
        for n in self.moves[: last + 1]:
            there.add(n) if n >= 0 else there.remove(~n)
        found = Counter(dict.fromkeys(KINDS, 0))
        for n in there:
            found[self.kinds[n]] += sizes[n]
        return dict(found)


def with_batch(two: Rehearsal, three: Rehearsal, batch_size: int) -> Rehearsal:
    """The rehearsal of any batch, from those of two and of three sequences: every buffer grows by a fixed amount for
    every sequence, or does not grow, and none comes earlier or later."""
    assert two.moves == three.moves, "a batch of three takes other steps than one of two"
    sizes = tuple(a + (b - a) * (batch_size - 2) for a, b in zip(two.sizes, three.sizes, strict=True))
    # A gradient is not told from activations where a matrix has as many rows as the batch has tokens.
    kinds = tuple(b if a == ACTIVATIONS else a for a, b in zip(two.kinds, three.kinds, strict=True))
    return replace(two, sizes=sizes, kinds=kinds)


class Ledger(TorchDispatchMode):
    """Sees every operation below autograd and autocast, and writes down the storages that it makes."""

    def __init__(self, model: GPT, tokens: int):
        super().__init__()
        self.weights = {id(p.untyped_storage()) for p in model.parameters()}
        self.shapes = {p.shape for p in model.parameters() if p.dim() == 2 and p.requires_grad and len(p) != tokens}
        self.logits = tokens, len(model.lm_head.weight)
        self.sizes, self.kinds, self.moves = [], [], []
        self.numbers = dict.fromkeys(self.weights, -1)  # of the storages that are there, by id

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
                continue  # rows of a gradient (make_embedding_sparse) hold only their values, which were here before
            if id(storage := tensor.untyped_storage()) not in self.numbers:
                n = self.numbers[id(storage)] = len(self.sizes)
                self.sizes.append(storage.nbytes())
                self.kinds.append(self._kind(func, args, tensor))
                self.moves.append(n)
                weakref.finalize(storage, self._gone, id(storage), n)
        return out

    def _kind(self, func, args, tensor: Tensor) -> str:
        if func is torch.ops.aten._to_copy.default and id(args[0].untyped_storage()) in self.weights:
            return COPIES
        if tensor.shape in self.shapes:  # on its way to be added to a .grad
            return GRADIENTS
        tokens, vocab_size = self.logits  # on a processor some tokens' at a time, and padded to ALIGNED columns
        wide = tensor.dim() > 1 and 0 <= tensor.size(-1) - vocab_size < loss.ALIGNED
        return LOGITS if wide and tensor.numel() <= tokens * tensor.size(-1) else ACTIVATIONS

    def _gone(self, key: int, n: int) -> None:
        del self.numbers[key]
        self.moves.append(~n)

    def label(self, tensor: Tensor, kind: str) -> None:
        self.kinds[self.numbers[id(tensor.untyped_storage())]] = kind


@contextmanager
def cuda_attention(dtype: str) -> Iterator[None]:
    """Lets attention be computed as on a card, with its whole matrix of weights where no fused kernel takes the call.

    Flash attention takes no mask and no float32, and the memory-efficient kernel no grouped keys (PyTorch's
    sdp_utils.cpp): grouped keys with a mask, or in float32, leave the plain formula. cuDNN has a kernel for some of
    these; whether it is taken depends on the card, so here it is not. No TorchFunctionMode does this: a block that is
    computed again, in the backward pass, is out of its reach.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, **options) -> Tensor:
        if not options["enable_gqa"] or (mask is None and dtype != "float32"):
            return plain(q, k, v, mask, 0.0, **options)  # these kernels do dropout without its matrix, the CPU's do not
        with sdpa_kernel(SDPBackend.MATH):
            return plain(q, k, v, mask, dropout, **options)

    plain, short = F.scaled_dot_product_attention, attention.SHORT
    F.scaled_dot_product_attention, attention.SHORT = attend, 0  # by products is a processor's way
    try:
        yield
    finally:
        F.scaled_dot_product_attention, attention.SHORT = plain, short


class Alone(dist.ProcessGroup):
    """A tp group with one rank that is there: what would be summed comes back at once. It is the last rank, for of a
    vocabulary that does not divide this has a row more."""

    def __init__(self, tp: int):
        super().__init__(tp - 1, tp)

    def allreduce(self, *_arguments):
        return SimpleNamespace(wait=lambda: None)

    allgather = allreduce


def _share(config: GPTConfig, lora: LoRAConfig | None, tp: int, dtype: str = "float32") -> GPT:
    """The model of one rank of tp, with adapters beside which what is frozen is in `dtype`."""
    model = GPT(config)
    if lora is not None:
        apply_lora(model, lora)
        if dtype == "bfloat16":
            round_frozen(model, torch.bfloat16)
    if tp > 1:
        from parallel import take_share  # FSDP2 takes half a second to import, which one device can do without

        take_share(model, Alone(tp))
    return model


def rehearse_step(
    config: GPTConfig,
    lora: LoRAConfig | None,
    batch_size: int,
    block_size: int,
    dtype: str,
    micro_batches: int,
    cuda: bool = False,
    tp: int = 1,
    recompute: bool = False,
) -> Rehearsal:
    """Two steps of train.py's Trainer, on one of `tp` ranks. `dtype` is one of device.DTYPES.

    The first, of one micro-batch, only leaves the optimizer's moments behind. From a step's second micro-batch on,
    gradients are there before the forward pass; so two of them show what any number needs.
    """
    with FakeTensorMode(), cuda_attention(dtype) if cuda else nullcontext(), _own_loss():
        model = _share(config, lora, tp, dtype)
        model.recompute = recompute
        if cuda:
            model._fused_loss = lambda x, targets: None  # a processor's way too
        with_kept_gradient = [] if cuda else model.make_embedding_sparse()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        frozen = {}
        with Ledger(model, batch_size * block_size) as ledger:
            for weight in with_kept_gradient:
                weight.grad = torch.zeros_like(weight)
            for passes in (1, min(micro_batches, 2)):
                again = len(ledger.moves)
                with loss.unchanged_weights(frozen), autocast(torch.device("cpu"), dtype, hold=tp == 1):
                    for _ in range(passes):
                        x, y = torch.zeros(2, batch_size, block_size, dtype=torch.long)
                        _, value = model(x, y, only_loss=True)
                        with autocast(torch.device("cpu"), "float32"):
                            value.backward()
                optimizer.step()
                kept = [weight.grad for weight in with_kept_gradient]
                for parameter in trained:
                    ledger.label(parameter.grad, GRADIENTS)
                    for moment in ("exp_avg", "exp_avg_sq"):
                        ledger.label(optimizer.state[parameter][moment], OPTIMIZER)
                optimizer.zero_grad(set_to_none=True)
                for weight, gradient in zip(with_kept_gradient, kept, strict=True):
                    weight.grad = gradient
        return _written(model, ledger, again)


@contextmanager
def _own_loss() -> Iterator[None]:
    """loss.py keeps its buffer from step to step: a rehearsal's is to be new, and no real step is to find it. Which
    tokens are sure is a matter of numbers, which a rehearsal has none of, and oneDNN's orders are of real memory."""
    loss.forget_buffer()
    replaced = {"_rest": lambda probabilities, p: 1 - p, "_reordered": torch.clone, "_linear": F.linear}
    own = {name: getattr(loss, name) for name in replaced}
    try:
        vars(loss).update(replaced)
        yield
    finally:
        vars(loss).update(own)
        loss.forget_buffer()


def rehearse_generation(
    config: GPTConfig,
    lora: LoRAConfig | None,
    batch_size: int,
    block_size: int,
    dtype: str,
    cuda: bool = False,
    tp: int = 1,
) -> Rehearsal:
    """Reading a prompt of block_size - 1 tokens into a cache with room for one more: the fullest moment of a text that
    fills the context. The weights are in `dtype`; what packed.py holds of float16 keeps the embeddings in float32."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])  # fake weights cannot be cast after they were made
    try:
        with FakeTensorMode(), torch.no_grad(), cuda_attention(dtype) if cuda else nullcontext():
            model = _share(config, lora, tp).eval()
            with Ledger(model, batch_size) as ledger:
                cache = model.new_cache(batch_size, block_size)
                prompt = torch.zeros(batch_size, max(1, block_size - 1), dtype=torch.long)
                model(prompt, cache=cache)
                for tensor in (cache.keys, cache.values):
                    ledger.label(tensor, CACHE)
            return _written(model, ledger, 0)
    finally:
        torch.set_default_dtype(usual)


def _written(model: GPT, ledger: Ledger, again: int) -> Rehearsal:
    parameters = list(model.parameters())
    return Rehearsal(
        weights=sum(p.nbytes for p in parameters),
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        block=sum(p.numel() for p in model.blocks[0].parameters()),
        sizes=tuple(ledger.sizes),
        kinds=tuple(ledger.kinds),
        moves=_ordered(ledger.moves),
        again=again,
    )


def _ordered(moves: list[int]) -> tuple[int, ...]:
    """With buffers that go together, as autocast's copies do, in the order in which they came: theirs is by address."""
    runs = groupby(moves, key=lambda n: n < 0)
    return tuple(n for gone, run in runs for n in (sorted(run, reverse=True) if gone else run))
