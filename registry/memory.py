"""How much memory a run needs, before it runs, and on which devices it fits. GB are 1e9 bytes here, as on a card's box.

    python -m registry memory gemma3-4b --lora_rank 64 --batch_size 8 --block_size 2048
    python -m registry memory small --batch_size 16 --block_size 256 --dtype fp32
    python -m registry memory models/NAME --generate --batch_size 4
    python -m registry memory --table

The step of train.py is rehearsed on tensors without numbers (rehearsal.py), so what is counted is what the model, LoRA,
autocast and AdamW allocate, at the fullest moment. To that come what a process and its heap, or a card, take for
themselves. docs/memory.md has measured peaks beside the sum. It is that of eager PyTorch: what torch.compile, the
default on a GPU, saves of it is not counted.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import loss
from configurator import LONGEST_UNASKED, PRECISION_SPELLINGS, PRESETS, RunConfig
from device import DTYPES
from lora import LoRAConfig
from mesh import Mesh, mesh_problems
from model import GPT, GPTConfig, KVCache
from model_directory import CONFIG, MODEL_ARGS, WEIGHTS
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
from registry.resolve import find_model
from registry.skeleton import skeleton
from words import as_table

GB = 10**9
CARDS = (11, 24, 48, 80, 141)  # GB

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
    def shared_in_half(self) -> bool:
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
    [[sizes], [names]] with the axes of mesh.py, and `dtype` one of PRECISION_SPELLINGS. Not `cuda`: a process on a CPU.
    Raises ValueError for what cannot be.
    """
    if dtype not in PRECISION_SPELLINGS:
        raise ValueError(f"dtype={dtype} must be one of {', '.join(PRECISION_SPELLINGS)}")
    mesh = Mesh.parse(mesh_shape)
    steps, recompute, dtype = gradient_accumulation_steps, activation_checkpointing, PRECISION_SPELLINGS[dtype]
    plan = Plan(config, lora, block_size, dtype, mesh, steps, generate, cuda, recompute)
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
    found = rehearsal.peak(shares | ({COPIES: 0} if plan.shared_in_half else {}))
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
        self.pair = [plan.rehearse(sequences) for sequences in self.sizes]
        asked = with_batch(*self.pair, own) if self.steady else plan.rehearse(own)
        # Assumed the same for every batch; each would take seconds.
        self.holes = None if plan.cuda else heap_holes(plan, asked)
        self.estimate = itemised(plan, asked, self.holes)

    def needs(self, sequences: int) -> int:
        """Bytes, for so many sequences on a device."""
        if self.steady:
            return itemised(self.plan, with_batch(*self.pair, sequences), self.holes).total
        first, second = (itemised(self.plan, rehearsal, self.holes).total for rehearsal in self.pair)
        (a, b) = self.sizes
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


# ---- this machine


def machine_memory() -> tuple[int, int] | None:
    """(bytes this machine has, bytes of them that are free). A control group's limit counts where it is lower."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:  # macOS does not say what is free, and Windows nothing
        if not hasattr(os, "sysconf"):
            return None
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total
    total, free = (1024 * int(re.search(rf"{key}:\s+(\d+)", text)[1]) for key in ("MemTotal", "MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # none, or "max"
        return total, free
    return min(total, limit), min(free, max(0, limit - used))


# ---- the command


def named_config(name: str) -> GPTConfig:
    """Of a preset or of any model that can be found. Raises ValueError where it is no GPT of ours."""
    if name in PRESETS:
        return PRESETS[name]
    model = skeleton(find_model(name, check=_describes).path)
    if not isinstance(model, GPT):
        raise ValueError(f"{name} is a {type(model).__name__}: only models that train.py can train are counted")
    return model.config


def _describes(folder: Path) -> str:
    if any((folder / name).exists() for name in (CONFIG, MODEL_ARGS, WEIGHTS)):
        return ""
    return f"it has no {CONFIG}" if folder.is_dir() else "there is no such folder"


def run_memory(arguments: Any) -> tuple[str, Any]:
    if arguments.table:
        return documented_table()
    if arguments.name is None:
        raise ValueError(f"memory needs a NAME, such as {', '.join(PRESETS)}, or --table")
    config = named_config(arguments.name)
    lora = LoRAConfig(arguments.lora_rank) if arguments.lora_rank is not None else None
    length = min(config.block_size, LONGEST_UNASKED) if arguments.block_size is None else arguments.block_size
    mesh = Mesh.parse(arguments.mesh_shape)
    dtype, recompute = PRECISION_SPELLINGS[arguments.dtype], arguments.activation_checkpointing == "true"
    steps = arguments.gradient_accumulation_steps
    plan = Plan(config, lora, length, dtype, mesh, steps, arguments.generate, activation_checkpointing=recompute)
    card = Fitting(plan, arguments.batch_size)
    # What fsdp and tp divide among processes on a CPU nobody has measured, and a process is not told to.
    process = Fitting(replace(plan, cuda=False), arguments.batch_size) if mesh.devices == 1 else None
    verdicts = [_verdict(f"{size} GB card", card, size * GB) for size in CARDS]
    if process and (memory := machine_memory()):
        total, free = memory
        verdicts.append(_verdict(f"this machine, {free / GB:.1f} of {total / GB:.1f} GB free", process, free))
    work = "text being made" if arguments.generate else f"LoRA rank {lora.rank}" if lora else "full training"
    again = ", activations computed again" if recompute else ""
    grid = f", {mesh.devices} devices" if mesh.devices > 1 else ""
    title = f"{arguments.name}: {work}, {arguments.batch_size} x {length:,} tokens, {dtype}{again}{grid}"
    data = {"name": arguments.name, "work": work, "batch_size": arguments.batch_size, "block_size": length}
    data |= {"dtype": plan.dtype, "lora_rank": arguments.lora_rank, "mesh": vars(mesh), "verdicts": verdicts}
    data |= {"activation_checkpointing": recompute, "gradient_accumulation_steps": steps}
    data |= {"card": _data(card.estimate), "process": process and _data(process.estimate)}
    return "\n\n".join([title, _items_table(card, process), _verdict_table(verdicts)]), data


def _verdict(device: str, fitting: Fitting, room: int) -> dict[str, Any]:
    needed, largest = fitting.estimate.total, fitting.largest_batch(room)
    return {"device": device, "bytes": room, "needed": needed, "fits": needed <= room, "largest_batch": largest}


def _data(found: Estimate) -> dict[str, Any]:
    items = {item.name: {"bytes": item.size, "source": item.source} for item in found.items}
    return {"total": found.total, "items": items, "parameters": found.parameters, "trainable": found.trainable}


def _items_table(card: Fitting, process: Fitting | None) -> str:
    fittings = [fitting for fitting in (card, process) if fitting]
    rows = [("GB", *(("a card", "here") if process else ("each card",)), "computed from")]
    items = {item.name: item.source for fitting in reversed(fittings) for item in fitting.estimate.items}
    for name, source in sorted(items.items(), key=lambda item: item[0] == "overhead"):
        rows.append((name, *(f"{fitting.estimate[name] / GB:.2f}" for fitting in fittings), source))
    rows.append(("total", *(f"{fitting.estimate.total / GB:.2f}" for fitting in fittings), ""))
    notes = [process.estimate.items[-1].source] if process else []
    return "\n".join([as_table(rows), *(f"overhead here: {note}" for note in notes)])


def _verdict_table(verdicts: list[dict[str, Any]]) -> str:
    rows = [("device", "needs", "verdict", "largest batch")]
    for v in verdicts:
        fits, largest = "fits" if v["fits"] else "does not fit", str(v["largest_batch"] or "none")
        rows.append((v["device"], f"{v['needed'] / GB:.1f} GB", fits, largest))
    return as_table(rows)


# ---- what a document says

# agent-tunix, docs/api/models: preset, LoRA rank, batch size, GB of video memory. It trains with GRPO (arXiv
# 2402.03300) in JAX, on prompts of 256 tokens, four answers to each, of up to 512 tokens.
DOCUMENTED = (("gemma3-270m", 32, 1, 11), ("gemma3-1b", 32, 4, 48), ("gemma3-4b", 64, 8, 80))
ANSWERS, TOKENS = 4, 256 + 512
PREALLOCATED = 0.75  # of a card, which JAX takes when it starts (docs.jax.dev, GPU memory allocation)


def documented_table() -> tuple[str, Any]:
    rows = [_documented_row(*row) for row in DOCUMENTED]
    columns = ("document", "step here", f"of {ANSWERS} answers", "+ reference", "+ cache", "sum")
    lines = [("model", "rank", "batch", *columns)] + [
        (row["name"], str(row["lora_rank"]), str(row["batch_size"]), *(f"{row[key] / GB:.1f}" for key in _COLUMNS))
        for row in rows
    ]
    return f"{as_table(lines)}\n\n{_EXPLANATION}", rows


_COLUMNS = ("documented", "step", "step_of_answers", "reference", "cache", "sum")
_EXPLANATION = f"""\
GB of 1e9 bytes, LoRA on every linear layer, bf16 products, {TOKENS} tokens a sequence.

document: what agent-tunix's documentation asks for: all the memory of the card that it names. Nothing in its code
  computes it, and JAX takes {PREALLOCATED:.0%} of a card when it starts, whether it needs that or not.
step here: a step of train.py on the document's batch, on a card.
of {ANSWERS} answers: the same with the sequences that GRPO makes of that batch, {ANSWERS} to each prompt.
+ reference: GRPO compares with the model as it was, held a second time, in bfloat16.
+ cache: it generates what it trains on; keys and values of all answers, in bfloat16.

The document's numbers are about GRPO, and a supervised step of train.py is the column `step here`. What the sum has
beyond the document is what train.py does and other programs may not do: it keeps every layer's activations rather than
compute them again, and on a card the logits of all tokens at once."""


def _documented_row(name: str, rank: int, batch_size: int, documented: int) -> dict[str, Any]:
    config = PRESETS[name]
    fitting = Fitting(Plan(config, LoRAConfig(rank), TOKENS), batch_size)
    answers = ANSWERS * batch_size
    cache = KVCache(config, answers, torch.device("meta"), torch.bfloat16, TOKENS)
    adapters, whole = fitting.estimate.trainable, fitting.estimate.parameters
    row = {"name": name, "lora_rank": rank, "batch_size": batch_size, "documented": documented * GB}
    row |= {"step": fitting.estimate.total, "step_of_answers": fitting.needs(answers)}
    row |= {"reference": 2 * (whole - adapters), "cache": cache.keys.nbytes + cache.values.nbytes}
    return row | {"sum": sum(row[key] for key in ("step_of_answers", "reference", "cache"))}
