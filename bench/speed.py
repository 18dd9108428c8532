"""Training, LoRA and generation beside nanoGPT's loop, Transformers, PEFT and llama.cpp, and what the machine can do.

    python bench/speed.py
    python bench/speed.py --rounds 3 --contenders machine,transformers-bf16,ours --json result.json
    python bench/speed.py --contenders machine,transformers-generate-bf16,ours-generate --preset medium

Every contender starts from the same weights, and with LoRA from the same adapter, and trains on the same random token
ids or continues the same prompt, each time in a process of its own, so that nobody meets another's allocator settings,
threads or peak memory. They take turns, so that a machine that slows down slows all of them. On a machine with a GPU
the same runs there, with the medium preset. bench/README.md says what the columns mean and what can be compared.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import signal
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, so that this runs from anywhere

import torch

import configurator
from architecture import PRESETS
from bench.contenders import (
    CONTENDERS,
    FULL,
    GENERATION,
    LIMIT,
    LORA,
    LORA_TARGETS,
    PROMPT,
    fastest,
    measure,
    pick,
    runs,
    tokens_per_step,
)
from configurator import RunConfig
from files import write_atomic
from logbook import duration
from lora import LoRAConfig, apply_lora
from model import GPT, GPTConfig, count_parameters, on_meta

SETTINGS = ("preset", "n_layer", "n_head", "n_embd", "block_size", "vocab_size", "batch_size")
# How far apart, relative to the value, two ways to compute the same may be: several times what was ever seen.
TOLERANCES = {
    "float32": {"losses": 1e-6, "norms": 1e-4},
    "bfloat16": {"losses": 1e-4, "norms": 5e-3},
    "float16": {"losses": 1e-4, "norms": 5e-3},
    "int8": {"losses": 1e-3},
}
PAIRS = (  # what the closing lines compare: the first beside the second
    ("ours", "nanogpt"),
    ("ours", "transformers-bf16-compile"),
    ("ours-lora", "peft-fp32"),
    ("ours-lora", "peft-bf16"),
    ("ours-generate", "nanogpt-generate"),
    ("ours-generate", "transformers-generate-fp32"),
    ("ours-generate", "transformers-generate-bf16"),
    ("ours-generate", "llama-cpp-generate"),
    ("ours-generate-int8", "llama-cpp-generate-int8"),
)


def in_own_process(name: str, config: RunConfig, lora: LoRAConfig, steps: int, new_tokens: int) -> dict[str, Any]:
    quiet_end = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}  # Ctrl-C: no traceback
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, context, **quiet_end) as pool:
        return pool.submit(measure, name, replace(config, out_dir=folder), lora, steps, new_tokens).result()


def expected_seconds(names: list[str], config: RunConfig, steps: int, new_tokens: int) -> float:
    """Of one round, roughly: the starts, and the arithmetic at this machine's float32 speed."""
    device = torch.device(config.device)
    a = torch.ones(1024, 1024, device=device)
    operation = fastest(lambda: a @ a, device) / (2 * 1024**3)
    architecture = config.model_config(config.vocab_size)
    steps_of = {FULL: tokens_per_step(config), LORA: tokens_per_step(config), GENERATION: 12 * new_tokens, LIMIT: 0}
    work = sum(
        steps_of[group] * operations(architecture, group) for group in (CONTENDERS[name].group for name in names)
    )
    return 7 * len(names) + (1 + steps) * work * operation


def weights_per_token(architecture: GPTConfig) -> int:
    """In the matrix products of one token: all matrices but the embeddings, which are looked up."""
    layers = on_meta(architecture).modules()
    return sum(layer.weight.numel() for layer in layers if isinstance(layer, torch.nn.Linear))


def operations(architecture: GPTConfig, group: str) -> int:
    """FLOP a token in matrix products, counted as in Chowdhery et al. 2022 (appendix B): forward 2 for each weight, and
    twice that backward; half of it where the weights are frozen, whose own small products (LoRA) are not counted."""
    attention = 4 * architecture.n_layer * architecture.block_size * architecture.n_embd
    weights = 2 * weights_per_token(architecture)
    return {FULL: 3 * weights + 3 * attention, LORA: 2 * weights + 3 * attention, GENERATION: weights, LIMIT: 0}[group]


def speed_limit(group: str, architecture: GPTConfig, machines: list[dict[str, Any]]) -> float | None:
    """Tokens/s if a step were its matrix products alone, at the best speed measured here; in generation, of one text,
    if a token were to read every weight once, in 16 bits. None if `machine` took no turn."""
    if not machines:
        return None
    if group == GENERATION:
        return median(turn["reading"] for turn in machines) / (2 * weights_per_token(architecture))
    return median(max(turn["products"].values()) for turn in machines) / operations(architecture, group)


def pace(turns: list[dict[str, Any]]) -> list[float]:
    return [turn["tokens"] / median(turn["seconds"]) for turn in turns]


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def ratios(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, float]:
    """Of speeds. Each compares two turns of one round, which met the same machine."""
    return spread([a / b for a, b in zip(pace(mine), pace(theirs), strict=True)])


def summarize(turns: dict[str, list[dict]], limit: float | None) -> list[dict[str, Any]]:
    """A row for each contender of a table."""
    rows, base = [], next(iter(turns.values()))
    for name, own in turns.items():
        row = {"contender": name, "dtype": "/".join(sorted({turn["dtype"] for turn in own}))}
        speed = spread([turn["tokens"] / seconds for turn in own for seconds in turn["seconds"]])
        row |= {"tokens_per_second": speed, "ratio": ratios(own, base)}
        share = None if limit is None else speed["median"] / limit
        rows.append(row | {"of_limit": share, "peak_bytes": max(turn["peak_bytes"] for turn in own), "turns": own})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    columns = ("tokens/s", "min - max", "ratio", "min - max", "of limit", "peak MiB", "loss", "gradient norm")
    lines = [f"| contender | dtype | {' | '.join(columns)} |", "| --- | --- |" + " ---: |" * len(columns)]
    for row in rows:
        (speed, slow, fast), (ratio, low, high) = row["tokens_per_second"].values(), row["ratio"].values()
        loss, norm = row["turns"][0]["losses"][0], row["turns"][0]["norms"][0]
        share = "" if row["of_limit"] is None else f"{row['of_limit']:.2f}"
        loss, norm = ("-" if number is None else f"{number:.5f}" for number in (loss, norm))
        lines.append(
            f"| {row['contender']} | {row['dtype']} | {speed:,.0f} | {slow:,.0f} - {fast:,.0f} | {ratio:.2f} | "
            f"{low:.2f} - {high:.2f} | {share} | {row['peak_bytes'] / 2**20:,.0f} | {loss} | {norm} |"
        )
    return "\n".join(lines)


def closing(turns: dict[str, list[dict]]) -> list[str]:
    lines = []
    for mine, theirs in PAIRS:
        if mine in turns and theirs in turns:
            ratio = ratios(turns[mine], turns[theirs])
            lines.append(f"{mine} / {theirs}: {ratio['median']:.2f} ({ratio['min']:.2f} - {ratio['max']:.2f})")
    return lines


def disagreements(rows: list[dict[str, Any]]) -> list[str]:
    """Where a contender's losses or gradient norms are not the first contender's, before and after the first update."""
    found, base = [], rows[0]
    for row in rows[1:]:
        coarser = row["dtype"] if base["dtype"] == "float32" else base["dtype"]
        for key, tolerance in TOLERANCES.get(coarser, TOLERANCES["bfloat16"]).items():
            theirs, mine = base["turns"][0][key][:2], row["turns"][0][key][:2]
            if None not in (*mine, *theirs) and not all(map(partial(math.isclose, rel_tol=tolerance), theirs, mine)):
                found.append(f"{key} of {row['contender']} are {mine}, of {base['contender']} {theirs}")
    return found


def machine() -> dict[str, Any]:
    """What the numbers depend on, and whether something else was running."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    facts = {"cpu": named[1] if named else platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    facts |= {"threads": torch.get_num_threads(), "load at start": round(os.getloadavg()[0], 1)}
    packages = [name for name in ("torch", "transformers", "peft", "xllamacpp") if importlib.util.find_spec(name)]
    return facts | {name: version(name) for name in packages}


def chosen(contenders: dict[str, Any], asked: str) -> list[str]:
    """The names in a list with commas. Raises ValueError for one that is none, or whose packages are not installed."""
    names = list(dict.fromkeys(asked.split(",")))
    if unknown := [name for name in names if name not in contenders]:
        raise ValueError(f"there is no contender {unknown[0]!r}; there are {', '.join(contenders)}")
    needed = dict.fromkeys(package for name in names for package in contenders[name].packages)
    if missing := [package for package in needed if not importlib.util.find_spec(package)]:
        rest = [name for name, contender in contenders.items() if not set(missing) & set(contender.packages)]
        hint = f"pip install -r requirements-dev.txt, or measure without: --contenders {','.join(rest)}"
        raise ValueError(f"{' and '.join(missing)} must be installed: {hint}")
    return names


def take_turns(names: list[str], config: RunConfig, lora: LoRAConfig, options: argparse.Namespace) -> dict[str, list]:
    """{contender: its turns}, after telling each as it comes."""
    turns: dict[str, list] = {}
    began = time.monotonic()
    for done, name in enumerate(names, 1):
        turn = in_own_process(name, config, lora, options.steps, options.new_tokens)
        turns.setdefault(name, []).append(turn)
        if CONTENDERS[name].group == LIMIT:
            told = ", ".join(f"{dtype} {speed / 1e9:,.0f} GFLOP/s" for dtype, speed in turn["products"].items())
            told += f" in matrix products, {turn['reading'] / 1e9:,.0f} GB/s read"
        else:
            told = f"{pace([turn])[0]:,.0f} tokens/s"
        left = duration((time.monotonic() - began) * (len(names) - done) / done)
        print(f"{done}/{len(names)} {name}: {told}; {left} left", flush=True)
    return turns


def bench(options: argparse.Namespace) -> None:
    """Run and print it all. Raises ValueError for bad options, and for contenders that do not compute the same."""
    if min(options.rounds, options.steps, options.new_tokens) < 1:
        raise ValueError(
            f"--rounds {options.rounds}, --steps {options.steps} and --new_tokens {options.new_tokens}: all must be at "
            "least 1"
        )
    device = pick(options.device)
    there = {name: contender for name, contender in CONTENDERS.items() if runs(contender, device)}
    names = chosen(there, options.contenders or ",".join(there))
    options.preset = options.preset or ("medium" if device.type == "cuda" else None)
    given = [f"{key}={value}" for key in SETTINGS if (value := getattr(options, key)) is not None]
    config, _ = configurator.load([*given, f"device={device}"])
    architecture = config.model_config(PRESETS[config.preset].vocab_size)
    config = config.resolved(architecture)
    if PROMPT + options.new_tokens > config.block_size:
        raise ValueError(f"{PROMPT} + {options.new_tokens} tokens are more than block_size={config.block_size}")
    lora = LoRAConfig(rank=options.rank, targets=LORA_TARGETS)
    describe(names, config, architecture, lora, options)
    turns = take_turns(names * options.rounds, config, lora, options)
    tables = {}
    for group in (FULL, LORA, GENERATION):
        if own := {name: turns[name] for name in turns if CONTENDERS[name].group == group}:
            tables[group] = summarize(own, speed_limit(group, architecture, turns.get("machine", [])))
            print(f"\n{group}:\n\n{table(tables[group])}")
    print("", *closing(turns), sep="\n")
    if options.json:
        result = {"machine": machine(), "config": asdict(config), "lora": asdict(lora), "contenders": tables}
        result["limits"] = turns.get("machine", [])
        write_atomic(Path(options.json), json.dumps(result, indent=1).encode())
    if different := [problem for rows in tables.values() for problem in disagreements(rows)]:
        raise ValueError(
            "\n".join(["the contenders do not compute the same, so their speeds mean nothing:", *different])
        )
    if any(len(rows) > 1 for rows in tables.values()):
        print("losses and gradient norms before and after the first update agree, within rounding")


def describe(
    names: list[str], config: RunConfig, architecture: GPTConfig, lora: LoRAConfig, options: argparse.Namespace
) -> None:
    """What will be measured, and how long that will take."""
    total = len(names) * options.rounds
    seconds = options.rounds * expected_seconds(names, config, options.steps, options.new_tokens)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    tokens = tokens_per_step(config)
    print(f"{count_parameters(architecture):,} parameters, {tokens:,} random token ids a step: {architecture}")
    if any(CONTENDERS[name].group == LORA for name in names):
        with torch.device("meta"):
            trained = apply_lora(GPT(architecture), lora).trainable
        targets = " and ".join(lora.targets)
        print(f"LoRA trains {trained:,} parameters: rank {lora.rank}, alpha {lora.alpha}, on {targets}")
    print(f"{total} turns of 1 + {options.steps} steps or texts, about {duration(seconds)} in all", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (5)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, or texts, in a turn (3)")
    parser.add_argument("--new_tokens", type=int, default=200, help=f"in a text, after a prompt of {PROMPT} (200)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    every = f"ratios are to a table's first (all that run on the device, of {', '.join(CONTENDERS)})"
    parser.add_argument("--contenders", help=every)
    parser.add_argument("--rank", type=int, default=16, help="of LoRA's adapters; alpha is twice that (16)")
    parser.add_argument("--json", help="file for the raw numbers")
    for key in SETTINGS:
        parser.add_argument(f"--{key}", help="as for train.py")
    try:
        bench(parser.parse_args())
        return 0
    except (ValueError, OSError, BrokenProcessPool) as error:
        print(f"speed.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
