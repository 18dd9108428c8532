"""What `python -m registry memory` says: what is needed, where that fits, and agent-tunix's numbers beside ours."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from architecture import PRESETS
from configurator import LONGEST_UNASKED, RunConfig
from lora import LoRAConfig
from mesh import Mesh
from model import GPT, GPTConfig, KVCache
from model_directory import CONFIG, MODEL_ARGS, WEIGHTS
from registry.memory import GB, Estimate, Fitting, Plan
from registry.resolve import find_model
from registry.skeleton import skeleton
from words import as_table

CARDS = (11, 24, 48, 80, 141)  # GB

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
    given = {key: value for key, value in vars(arguments).items() if key not in ("command", "json")}
    if given.pop("table", False):
        if given:
            idle = ", ".join(f"{key}={value}" for key, value in given.items())
            raise ValueError(f"memory --table has models and batches of its own: leave out {idle}")
        return documented_table()
    if "name" not in given:
        raise ValueError(f"memory needs a NAME, such as {', '.join(PRESETS)}, or --table")
    name, generate = given["name"], given.get("generate", False)
    config, batch_size = named_config(name), given.get("batch_size", RunConfig.batch_size)
    lora = LoRAConfig(given["lora_rank"]) if "lora_rank" in given else None
    length = given.get("block_size", min(config.block_size, LONGEST_UNASKED))
    mesh, dtype = Mesh.parse(given.get("mesh_shape")), given.get("dtype", Plan.dtype)
    steps = given.get("gradient_accumulation_steps", Plan.gradient_accumulation_steps)
    if generate and "gradient_accumulation_steps" in given:
        raise ValueError(f"gradient_accumulation_steps={steps} is for training: text that is made has no such steps")
    recompute = given.get("activation_checkpointing") == "true"
    plan = Plan(config, lora, length, dtype, mesh, steps, generate, activation_checkpointing=recompute)
    card = Fitting(plan, batch_size)
    # What fsdp and tp divide among processes on a CPU nobody has measured, and a process is not told to.
    process = Fitting(replace(plan, cuda=False), batch_size) if mesh.devices == 1 else None
    verdicts = [_verdict(f"{size} GB card", card, size * GB) for size in CARDS]
    if process and (memory := machine_memory()):
        total, free = memory
        verdicts.append(_verdict(f"this machine, {free / GB:.1f} of {total / GB:.1f} GB free", process, free))
    work = "text being made" if generate else f"LoRA rank {lora.rank}" if lora else "full training"
    again = ", activations computed again" if recompute else ""
    grid = f", {mesh.devices} devices" if mesh.devices > 1 else ""
    title = f"{name}: {work}, {batch_size} x {length:,} tokens, {dtype}{again}{grid}"
    data = {"name": name, "work": work, "batch_size": batch_size, "block_size": length}
    data |= {"dtype": plan.dtype, "lora_rank": lora and lora.rank, "mesh": vars(mesh), "verdicts": verdicts}
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


# ---- agent-tunix's numbers

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
