"""How much memory a run needs, before it runs, and on which devices it fits. GB are 1e9 bytes here, as on a card's box.

    python -m registry memory gemma3-4b --lora_rank 64 --batch_size 8 --block_size 2048
    python -m registry memory small --batch_size 16 --block_size 256 --dtype fp32
    python -m registry memory models/NAME --generate --batch_size 4
    python -m registry memory --table

The step of train.py is rehearsed on tensors without numbers (rehearsal.py), so what is counted is what the model, LoRA,
autocast and AdamW allocate, at the fullest moment. To that come what a process and its heap, or a card, take for
themselves. docs/memory.md has measured peaks beside the sum, which memory_report.py prints. It is that of eager
PyTorch: what torch.compile, the default on a GPU, saves of it is not counted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

import loss
from configurator import LONGEST_UNASKED, RunConfig, precision
from device import DTYPES
from lora import LoRAConfig
from mesh import Mesh, mesh_problems
from model import GPTConfig
from registry.heap import heap_peak
from registry.rehearsal import (
    ACTIVATIONS,
    CACHE,
    COPIES,
    GRADIENTS,
    LOGITS,
    OPTIMIZER,
    Rehearsal,
    rehearse_generation,
    rehearse_step,
    with_batch,
)

GB = 10**9
ALONE = Mesh()

PROCESS = 380 * 10**6  # what a process holds that has imported train.py and trained a tiny model; measured
CONTEXT = 600 * 10**6  # what CUDA and its libraries take of a card; assumed, for want of a card to measure it on
ROUNDING = 0.05  # of the buffers, what PyTorch's allocator on CUDA loses between them; assumed


@dataclass(frozen=True)
class Item:
    name: str
    size: int  # bytes, on one device
    source: str  # what it is computed from


@dataclass(frozen=True)
class Estimate:
    """What one device, or process, holds at the fullest moment."""

    items: tuple[Item, ...]
    parameters: int  # of the model, or of a rank of tp; adapters included
    trainable: int

    @property
    def total(self) -> int:
        return sum(item.size for item in self.items)

    def __getitem__(self, name: str) -> int:
        """Bytes of one item: weights, copies, gradients, optimizer, activations, logits, cache or overhead; 0 of what
        is not there at the fullest moment."""
        return sum(item.size for item in self.items if item.name == name)


@dataclass(frozen=True)
class Plan:
    """A run to count: all that an estimate depends on but the batch. Raises ValueError for what cannot be."""

    config: GPTConfig
    lora: LoRAConfig | None = None
    block_size: int = LONGEST_UNASKED  # tokens of a sequence
    dtype: str = "bfloat16"  # of matrix products while training, of the weights while generating
    mesh: Mesh = ALONE
    gradient_accumulation_steps: int = RunConfig.gradient_accumulation_steps
    generate: bool = False
    cuda: bool = True  # a card; else a process on a CPU, with its heap
    activation_checkpointing: bool = False

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype} must be one of {', '.join(DTYPES)}")
        if not 1 <= self.block_size <= self.config.block_size:
            raise ValueError(
                f"block_size={self.block_size} must lie between 1 and the model's {self.config.block_size}"
            )
        if self.gradient_accumulation_steps < 1:
            raise ValueError(f"gradient_accumulation_steps={self.gradient_accumulation_steps} must be at least 1")
        if self.generate and self.activation_checkpointing:
            raise ValueError("activation_checkpointing is for training: text that is made has no backward pass")
        if self.dtype == "float16" and self.mesh.tp > 1 and not self.generate:
            raise ValueError("dtype=float16 is too narrow for a loss in shares (tp): use bfloat16 or float32")
        micro_batches = self.gradient_accumulation_steps * self.mesh.readers
        if problems := mesh_problems(self.mesh, self.mesh.devices, self.config, micro_batches):
            raise ValueError("; ".join(problems))

    @property
    def gathers_bfloat16(self) -> bool:
        """Whether processes gather their weights in bfloat16 (parallel.py), so that autocast has none to copy."""
        return self.mesh.devices > 1 and self.dtype == "bfloat16"

    def rehearse(self, sequences: int) -> Rehearsal:
        """With so many sequences on this device."""
        config = self.config
        if config.block == "gpt2":  # its learned positions are cut to the sequences, as train.py does
            config = replace(config, block_size=self.block_size)
        arguments = (config, self.lora, sequences, self.block_size, self.dtype)
        if self.generate:
            return rehearse_generation(*arguments, self.cuda, self.mesh.tp)
        steps, recompute = self.gradient_accumulation_steps, self.activation_checkpointing
        return rehearse_step(*arguments, steps, self.cuda, self.mesh.tp, recompute)


def estimate(
    config: GPTConfig,
    *,
    lora: LoRAConfig | None = None,
    batch_size: int,
    block_size: int,
    dtype: str = "bfloat16",
    mesh_shape: Sequence | str | None = None,
    gradient_accumulation_steps: int = RunConfig.gradient_accumulation_steps,
    generate: bool = False,
    cuda: bool = True,
    activation_checkpointing: bool = False,
) -> Estimate:
    """What a device needs to train `config`, all of it or an adapter, or to `generate` with it.

    `batch_size` sequences of `block_size` tokens are a micro-batch of all devices together, `mesh_shape` is
    [[sizes], [names]] with the axes of mesh.py, and `dtype` is spelled as configurator.precision takes it. Not `cuda`:
    a process on a CPU. Raises ValueError for what cannot be.
    """
    mesh = Mesh.parse(mesh_shape)
    steps, recompute = gradient_accumulation_steps, activation_checkpointing
    plan = Plan(config, lora, block_size, precision(dtype), mesh, steps, generate, cuda, recompute)
    return itemised(plan, plan.rehearse(share_of_batch(batch_size, mesh)))


def share_of_batch(batch_size: int, mesh: Mesh) -> int:
    if batch_size < 1 or batch_size % mesh.readers:
        raise ValueError(f"batch_size={batch_size} must be a multiple of dp x fsdp = {mesh.readers}, and not 0")
    return batch_size // mesh.readers


def itemised(plan: Plan, rehearsal: Rehearsal, holes: float | None = None) -> Estimate:
    """The estimate that follows from a rehearsal. `holes`: see `heap_holes`, which is asked where it is not given."""
    mesh, whole, trained = plan.mesh, rehearsal.parameters, rehearsal.trainable
    # What several micro-batches leave is summed on each device before it is summed among them.
    shares = {OPTIMIZER: 1 / mesh.fsdp, GRADIENTS: 1 / mesh.fsdp if plan.gradient_accumulation_steps == 1 else 1}
    found = rehearsal.peak(shares | ({COPIES: 0} if plan.gathers_bfloat16 else {}))
    divided = f", / {mesh.fsdp}" if mesh.fsdp > 1 else ""
    waiting = divided if plan.gradient_accumulation_steps == 1 else ""
    kept = (
        "goes into each of {} layers, and what one computes again,"
        if plan.activation_checkpointing
        else "{} layers keep"
    )
    adapters = f", {trained:,} of them adapters'" if plan.lora else ""
    each = "4 bytes" if rehearsal.weights == 4 * whole else "2 bytes"
    if 2 * whole < rehearsal.weights < 4 * whole:
        each = "2 bytes where they are frozen and multiply, else 4,"
    sources = {
        COPIES: f"weights cast to {plan.dtype} for matrix products",
        GRADIENTS: f"4 bytes x {trained:,}{waiting}, and those that are about to be added",
        OPTIMIZER: f"AdamW's two moments: 8 bytes x {trained:,}{divided}",
        ACTIVATIONS: f"what {kept.format(plan.config.n_layer)} for the backward pass, and the moment's own buffers",
        LOGITS: f"{math.ceil(plan.config.vocab_size / mesh.tp):,} numbers a token, and what the loss makes of them",
        CACHE: f"keys and values of {plan.config.n_layer} layers for {plan.block_size:,} tokens a sequence",
    }
    if plan.generate:
        sources |= {LOGITS: "of each sequence's last token", ACTIVATIONS: "a layer that reads the prompt"}
    items = [Item("weights", rehearsal.weights // mesh.fsdp, f"{each} x {whole:,}{adapters}{divided}")]
    items += [Item(kind, found[kind], source) for kind, source in sources.items() if found[kind]]
    if gathered := _gathered(plan, rehearsal):
        source = "weights of two blocks and of what is outside them, and in full training a layer's gradients"
        items.append(Item("gathered", gathered, source))
    counted = sum(item.size for item in items)
    if plan.cuda:
        source = f"{CONTEXT / GB} GB for CUDA itself, and {ROUNDING:.0%} lost between buffers; assumed, not measured"
        items.append(Item("overhead", CONTEXT + int(ROUNDING * counted), source))
    else:
        holes = heap_holes(plan, rehearsal) if holes is None else holes
        source = f"{PROCESS / GB} GB for Python and PyTorch, and {holes:.0%} of the buffers in holes of the heap"
        items.append(Item("overhead", PROCESS + int(holes * sum(found.values())), source))
    return Estimate(tuple(items), whole, trained)


def heap_holes(plan: Plan, rehearsal: Rehearsal) -> float:
    """How much larger than its buffers the heap gets, as a share of them. Generating leaves none."""
    if plan.generate:
        return 0.0
    return heap_peak(rehearsal, plan.activation_checkpointing) / sum(rehearsal.peak({}).values()) - 1


def _gathered(plan: Plan, rehearsal: Rehearsal) -> int:
    """Of several processes (parallel.py): the weights in use, of which FSDP2 makes a copy even where one has them all;
    and the gradients that are being summed, in float32."""
    if plan.mesh.devices == 1:
        return 0
    block = rehearsal.block
    outside = rehearsal.parameters - plan.config.n_layer * block
    trains = not (plan.lora or plan.generate)
    wide = plan.dtype == "float16" and not plan.generate  # they are gathered as they are, and autocast copies them
    weights = (2 * block + outside) * (4 if wide else DTYPES[plan.dtype].itemsize)
    return weights + (4 * max(block, outside) if trains else 0)


class Fitting:
    """Estimates of a plan for any batch, from two rehearsals.

    On a CPU what a step does depends on the batch (loss.py, attention.py), and with tp too (loss_in_shares.py). There
    two large batches are rehearsed and others lie on their line; the one that is asked for is rehearsed itself.
    """

    def __init__(self, plan: Plan, batch_size: int):
        self.plan, self.batch_size = plan, batch_size
        self.steady = plan.cuda and plan.mesh.tp == 1
        own = share_of_batch(batch_size, plan.mesh)
        full = math.ceil(loss.BUFFER / plan.config.vocab_size / plan.block_size)  # sequences that fill its buffer
        self.sizes = (2, 3) if self.steady else (max(own, full), 2 * max(own, full))
        wanted = self.sizes if self.steady else (*self.sizes, own)
        bar = tqdm(wanted, "rehearsing", unit="step", delay=2, disable=None, leave=False)
        found = [plan.rehearse(sequences) for sequences in bar]
        self.pair = found[:2]
        asked = with_batch(*self.pair, own) if self.steady else found[2]
        # Assumed the same for every batch; each would take seconds.
        self.holes = None if plan.cuda else heap_holes(plan, asked)
        self.estimate = itemised(plan, asked, self.holes)

    def needs(self, sequences: int) -> int:
        """Bytes, for so many sequences on a device."""
        if self.steady:
            return itemised(self.plan, with_batch(*self.pair, sequences), self.holes).total
        first, second = (itemised(self.plan, rehearsal, self.holes).total for rehearsal in self.pair)
        a, b = self.sizes
        return first + (second - first) * (sequences - a) // (b - a)

    def largest_batch(self, room: int) -> int:
        """Of all devices together, where each has `room` bytes. 0 where not even one sequence fits."""
        fits, fails = 0, 1
        while self.needs(fails) <= room:
            fits, fails = fails, 2 * fails
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if self.needs(middle) <= room else (fits, middle)
        return fits * self.plan.mesh.readers
