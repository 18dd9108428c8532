"""Training speed and peak memory on the CPU, beside a plain Transformers GPT-2 of the same shape.

    python bench/train_speed.py
    python bench/train_speed.py --rounds 3 --contenders transformers-bf16,ours --json result.json

Every contender trains the same weights on the same random token ids, each time in a process of its own, so that nobody
meets another's allocator settings, threads or peak memory. They take turns, so that a machine that slows down slows all
of them. bench/README.md says what the columns mean and what can be compared.
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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import count, pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, so that this runs from anywhere

import numpy as np
import torch
from torch import nn

import configurator
from configurator import RunConfig
from data.batches import BlockSampler
from data.tokens import Dataset
from device import autocast
from distributed import Ranks
from files import write_atomic
from logbook import duration
from model import GPT, PRESETS
from preflight import Start, count_parameters
from train import build_optimizer, learning_rate, set_up

CPU = torch.device("cpu")
CONTENDERS = {  # name: (whose, dtype)
    "transformers-fp32": ("transformers", "float32"),
    "transformers-bf16": ("transformers", "bfloat16"),
    "ours-fp32": ("ours", "float32"),
    "ours": ("ours", "auto"),
}
SETTINGS = ("preset", "n_layer", "n_head", "n_embd", "block_size", "vocab_size", "batch_size")
# How far apart, relative to the value, two ways to compute the same may be: several times what was ever seen.
TOLERANCES = {"float32": {"losses": 1e-6, "norms": 1e-4}, "bfloat16": {"losses": 1e-4, "norms": 5e-3}}
Step = Callable[[], tuple[float, float, float]]  # one optimizer step: loss before it, learning rate, gradient norm


def our_step(config: RunConfig, dataset: Dataset, model: GPT) -> tuple[Step, str]:
    """What train.py's main sets up, and the dtype it picks."""
    trainer, _ = set_up(Start(config, dataset, dataset.directory, model), Ranks())
    return trainer.step, trainer.config.dtype


def transformers_step(config: RunConfig, dataset: Dataset, model: GPT) -> tuple[Step, str]:
    """The loop a Transformers user would write. Optimizer, schedule and batches are ours; model and loop are not."""
    twin = transformers_twin(model).train()
    optimizer = build_optimizer(twin, config)
    sampler = BlockSampler(dataset.train, config.block_size, config.seed)
    iterations, batches = count(), count()

    def step() -> tuple[float, float, float]:
        loss_sum, rate = 0.0, learning_rate(next(iterations), config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for _ in range(config.gradient_accumulation_steps):
            x, y = sampler.batch(next(batches) * config.batch_size, config.batch_size)
            with autocast(CPU, config.dtype):
                # y is shifted already; labels=x alone would leave out the last target of each sequence
                loss = twin(input_ids=x, labels=y, shift_labels=y).loss / config.gradient_accumulation_steps
            loss.backward()
            loss_sum += loss.item()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), config.grad_clip or math.inf).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss_sum, rate, norm

    return step, config.dtype


def transformers_twin(model: GPT) -> nn.Module:
    """A GPT2LMHeadModel with the weights of `model`. Biases that `model` lacks stay zero there, and are not trained."""
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()  # it warns of special tokens outside a small vocabulary
    shape = {k: getattr(model.config, k) for k in ("vocab_size", "n_layer", "n_head", "n_embd", "tie_word_embeddings")}
    shape |= {"n_positions": model.config.block_size} | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    # The last two are to its advantage: its default GELU takes eight operations, and the cache is for generating.
    twin = GPT2LMHeadModel(GPT2Config(**shape, activation_function="gelu", use_cache=False))
    weights = model.state_dict()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name in weights:
                linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))  # stored as (in, out) there
                parameter.copy_(weights[name].T if linear else weights[name])
            else:
                parameter.zero_().requires_grad_(False)
    return twin


def measure(name: str, config: RunConfig, steps: int) -> dict[str, Any]:
    """One turn: a warm-up step and `steps` timed ones, from the initial weights."""
    whose, dtype = CONTENDERS[name]
    config = replace(config, dtype=dtype)
    ids = np.random.default_rng(config.seed).integers(config.vocab_size, size=(1 + steps) * tokens_per_step(config) + 1)
    absent = ("eot", "tokenizer_path", "fingerprint", "tokenizer_fingerprint", "bytes_per_token")
    fields = {"name": "random", "meta": {}, "train": ids, "val": ids, "vocab_size": config.vocab_size}
    dataset = Dataset(directory=Path(config.out_dir), **fields, **dict.fromkeys(absent))
    torch.manual_seed(config.seed)
    model = GPT(config.model_config(config.vocab_size))
    step, dtype = (our_step if whose == "ours" else transformers_step)(config, dataset, model)
    del model
    results, times = [step()], [time.perf_counter()]
    for _ in range(steps):
        results.append(step())
        times.append(time.perf_counter())
    losses, _, norms = map(list, zip(*results, strict=True))
    seconds = [end - start for start, end in pairwise(times)]
    return {"dtype": dtype, "seconds": seconds, "losses": losses, "norms": norms, "peak_bytes": peak_memory()}


def in_own_process(name: str, config: RunConfig, steps: int) -> dict[str, Any]:
    quiet_end = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}  # Ctrl-C: no traceback
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, context, **quiet_end) as pool:
        return pool.submit(measure, name, replace(config, out_dir=folder), steps).result()


def peak_memory() -> int:
    """The most this process has held in memory, bytes."""
    try:
        # Linux carries getrusage's figure over from parent to child: it could be that of whoever started us.
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    except OSError:
        import resource  # macOS, which counts bytes; Windows has neither

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def tokens_per_step(config: RunConfig) -> int:
    return config.gradient_accumulation_steps * config.batch_size * config.block_size


def expected_seconds(config: RunConfig, steps: int) -> float:
    """Of one turn, roughly: the start, then six operations a token and parameter at this machine's float32 speed."""
    a = torch.ones(1024, 1024)
    a @ a
    start = time.perf_counter()
    a @ a @ a @ a @ a
    operation = (time.perf_counter() - start) / (4 * 2 * 1024**3)
    parameters = count_parameters(config.model_config(config.vocab_size))
    return 6 + (1 + steps) * 6 * tokens_per_step(config) * parameters * operation


def summarize(turns: dict[str, list[dict]], tokens: int) -> list[dict[str, Any]]:
    """A row for each contender. A ratio compares two turns of one round, which met the same machine."""
    pace = {name: [tokens / median(turn["seconds"]) for turn in own] for name, own in turns.items()}
    base, rows = next(iter(pace.values())), []
    for name, own in turns.items():
        row = {"contender": name, "dtype": "/".join(sorted({turn["dtype"] for turn in own}))}
        speeds = [tokens / seconds for turn in own for seconds in turn["seconds"]]
        ratios = [mine / theirs for mine, theirs in zip(pace[name], base, strict=True)]
        for key, values in (("tokens_per_second", speeds), ("ratio", ratios)):
            row[key] = {"median": median(values), "min": min(values), "max": max(values)}
        rows.append(row | {"peak_bytes": max(turn["peak_bytes"] for turn in own), "turns": own})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| contender | dtype | tokens/s | min - max | ratio | min - max | peak MiB | loss | gradient norm |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        (speed, slow, fast), (ratio, low, high) = row["tokens_per_second"].values(), row["ratio"].values()
        loss, norm = row["turns"][0]["losses"][0], row["turns"][0]["norms"][0]
        lines.append(
            f"| {row['contender']} | {row['dtype']} | {speed:,.0f} | {slow:,.0f} - {fast:,.0f} | {ratio:.2f} | "
            f"{low:.2f} - {high:.2f} | {row['peak_bytes'] / 2**20:,.0f} | {loss:.5f} | {norm:.5f} |"
        )
    return "\n".join(lines)


def disagreements(rows: list[dict[str, Any]]) -> list[str]:
    """Where a contender's losses or gradient norms are not the first contender's, before and after the first update."""
    found, base = [], rows[0]
    for row in rows[1:]:
        exact = row["dtype"] == base["dtype"] == "float32"
        for key, tolerance in TOLERANCES["float32" if exact else "bfloat16"].items():
            theirs, mine = base["turns"][0][key][:2], row["turns"][0][key][:2]
            if not all(math.isclose(a, b, rel_tol=tolerance) for a, b in zip(theirs, mine, strict=True)):
                found.append(f"{key} of {row['contender']} are {mine}, of {base['contender']} {theirs}")
    return found


def machine() -> dict[str, Any]:
    """What the numbers depend on, and whether something else was running."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    facts = {"cpu": named[1] if named else platform.processor() or platform.machine(), "cores": os.cpu_count()}
    facts |= {"threads": torch.get_num_threads(), "load at start": round(os.getloadavg()[0], 1)}
    packages = [name for name in ("torch", "transformers") if importlib.util.find_spec(name)]
    return facts | {name: version(name) for name in packages}


def bench(options: argparse.Namespace) -> None:
    """Run and print it all. Raises ValueError for bad options, and for contenders that do not compute the same."""
    names = list(dict.fromkeys(options.contenders.split(",")))
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise ValueError(f"there is no contender {unknown[0]!r}; there are {', '.join(CONTENDERS)}")
    if min(options.rounds, options.steps) < 1:
        raise ValueError(f"--rounds {options.rounds} and --steps {options.steps}: both must be at least 1")
    if any(CONTENDERS[name][0] == "transformers" for name in names) and not importlib.util.find_spec("transformers"):
        hint = "pip install -r requirements-dev.txt, or measure without it: --contenders ours-fp32,ours"
        raise ValueError(f"the package transformers is not installed: {hint}")
    given = [f"{key}={value}" for key in SETTINGS if (value := getattr(options, key)) is not None]
    config, _ = configurator.load([*given, "device=cpu"])
    architecture = config.model_config(PRESETS[config.preset].vocab_size)
    config = replace(config, **asdict(architecture))

    facts, tokens, turns = machine(), tokens_per_step(config), {name: [] for name in names}
    total = len(names) * options.rounds
    seconds = total * expected_seconds(config, options.steps)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"{count_parameters(architecture):,} parameters, {tokens:,} random token ids a step: {architecture}")
    print(f"{total} turns of 1 + {options.steps} steps, about {duration(seconds)} in all", flush=True)
    began = time.monotonic()
    for done, name in enumerate(names * options.rounds, 1):
        turns[name].append(in_own_process(name, config, options.steps))
        speed = tokens / median(turns[name][-1]["seconds"])
        left = duration((time.monotonic() - began) * (total - done) / done)
        print(f"{done}/{total} {name}: {speed:,.0f} tokens/s; {left} left", flush=True)
    rows = summarize(turns, tokens)
    print(f"\n{table(rows)}\n")
    if options.json:
        result = {"machine": facts, "config": asdict(config), "contenders": rows}
        write_atomic(Path(options.json), json.dumps(result, indent=1).encode())
    if different := disagreements(rows):
        raise ValueError(
            "\n".join(["the contenders do not compute the same, so their speeds mean nothing:", *different])
        )
    if len(rows) > 1:
        print("losses and gradient norms before and after the first update agree, within rounding")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (5)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps in a turn (3)")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="ratios are to the first one (%(default)s)")
    parser.add_argument("--json", help="file for the raw numbers")
    for key in SETTINGS:
        parser.add_argument(f"--{key}", help="as for train.py")
    try:
        bench(parser.parse_args())
        return 0
    except (ValueError, OSError, BrokenProcessPool) as error:
        print(f"train_speed.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
