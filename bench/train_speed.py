"""Training speed and peak memory on the CPU, beside a plain Transformers GPT-2 of the same shape; LoRA, beside PEFT.

    python bench/train_speed.py
    python bench/train_speed.py --rounds 3 --contenders transformers-bf16,ours --json result.json

Every contender starts from the same weights, and with LoRA from the same adapter, and trains on the same random token
ids, each time in a process of its own, so that nobody meets another's allocator settings, threads or peak memory. They
take turns, so that a machine that slows down slows all of them. bench/README.md says what the columns mean and what can
be compared.
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
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import count, pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, so that this runs from anywhere

import numpy as np
import torch
from torch import nn

import configurator
from configurator import PRESETS, RunConfig
from data.batches import BlockSampler
from data.tokens import Dataset
from device import autocast
from distributed import Ranks
from files import write_atomic
from logbook import duration
from lora import LoRAConfig, apply_lora, lora_state_dict
from model import GPT
from preflight import Start, count_parameters
from train import build_optimizer, learning_rate, set_up

CPU = torch.device("cpu")
FULL, LORA = "full training", "LoRA"


class Contender(NamedTuple):
    group: str  # its table; speeds and losses are compared within it
    packages: tuple[str, ...]  # whose model runs in the plain loop; none: our model and our Trainer
    dtype: str


CONTENDERS = {
    "transformers-fp32": Contender(FULL, ("transformers",), "float32"),
    "transformers-bf16": Contender(FULL, ("transformers",), "bfloat16"),
    "ours-fp32": Contender(FULL, (), "float32"),
    "ours": Contender(FULL, (), "auto"),
    "peft-fp32": Contender(LORA, ("transformers", "peft"), "float32"),
    "peft-bf16": Contender(LORA, ("transformers", "peft"), "bfloat16"),
    "ours-lora-fp32": Contender(LORA, (), "float32"),
    "ours-lora": Contender(LORA, (), "auto"),
}
LORA_TARGETS = ("c_attn", "c_proj")  # to both libraries the ends of paths: attn.c_attn, attn.c_proj, mlp.c_proj
SETTINGS = ("preset", "n_layer", "n_head", "n_embd", "block_size", "vocab_size", "batch_size")
# How far apart, relative to the value, two ways to compute the same may be: several times what was ever seen.
TOLERANCES = {"float32": {"losses": 1e-6, "norms": 1e-4}, "bfloat16": {"losses": 1e-4, "norms": 5e-3}}
Step = Callable[[], tuple[float, float, float]]  # one optimizer step: loss before it, learning rate, gradient norm


def our_step(config: RunConfig, dataset: Dataset, model: GPT) -> tuple[Step, str]:
    """What train.py's main sets up, and the dtype it picks."""
    trainer, _ = set_up(Start(config, dataset, dataset.directory, model), Ranks())
    return trainer.step, trainer.config.dtype


def their_step(config: RunConfig, dataset: Dataset, twin: nn.Module) -> tuple[Step, str]:
    """The loop a Transformers user would write. Optimizer, schedule and batches are ours; model and loop are not."""
    twin.train()
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


def add_adapter(model: GPT, lora: LoRAConfig) -> None:
    """As if it had trained: while B is zero, as it starts, A has no gradient that could be compared."""
    apply_lora(model, lora)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.02)


def peft_twin(model: GPT, lora: LoRAConfig) -> nn.Module:
    """The Transformers twin of `model` as PEFT adapts it, with the numbers of the adapter in `model`."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    size = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    config = LoraConfig(**size, target_modules=list(lora.targets), task_type="CAUSAL_LM")
    with warnings.catch_warnings(action="ignore"):  # of Conv1D's (in, out), which PEFT sees to, and of a name it uses
        twin = get_peft_model(transformers_twin(model), config)
    state = {f"base_model.model.{key}": tensor for key, tensor in lora_state_dict(model).items()}
    unknown = set_peft_model_state_dict(twin, state).unexpected_keys
    assert not unknown, f"PEFT has no place for {unknown}"
    return twin


def measure(name: str, config: RunConfig, lora: LoRAConfig, steps: int) -> dict[str, Any]:
    """One turn: a warm-up step and `steps` timed ones, from the initial weights."""
    group, packages, dtype = CONTENDERS[name]
    config = replace(config, dtype=dtype)
    ids = np.random.default_rng(config.seed).integers(config.vocab_size, size=(1 + steps) * tokens_per_step(config) + 1)
    absent = ("eot", "tokenizer_path", "fingerprint", "tokenizer_fingerprint", "bytes_per_token")
    fields = {"name": "random", "meta": {}, "train": ids, "val": ids, "vocab_size": config.vocab_size}
    dataset = Dataset(directory=Path(config.out_dir), **fields, **dict.fromkeys(absent))
    torch.manual_seed(config.seed)
    model = GPT(config.model_config(config.vocab_size))
    if group == LORA:
        add_adapter(model, lora)
    if packages:  # nothing holds our model from here on
        model = peft_twin(model, lora) if group == LORA else transformers_twin(model)
    step, dtype = (their_step if packages else our_step)(config, dataset, model)
    results, times = [step()], [time.perf_counter()]
    for _ in range(steps):
        results.append(step())
        times.append(time.perf_counter())
    losses, _, norms = map(list, zip(*results, strict=True))
    seconds = [end - start for start, end in pairwise(times)]
    return {"dtype": dtype, "seconds": seconds, "losses": losses, "norms": norms, "peak_bytes": peak_memory()}


def in_own_process(name: str, config: RunConfig, lora: LoRAConfig, steps: int) -> dict[str, Any]:
    quiet_end = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}  # Ctrl-C: no traceback
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, context, **quiet_end) as pool:
        return pool.submit(measure, name, replace(config, out_dir=folder), lora, steps).result()


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


def expected_seconds(names: list[str], config: RunConfig, steps: int) -> float:
    """Of one round, roughly: the starts, then six operations a token and parameter at this machine's float32 speed.

    With LoRA it is four, for the base's weights get no gradient.
    """
    a = torch.ones(1024, 1024)
    a @ a
    start = time.perf_counter()
    a @ a @ a @ a @ a
    operation = (time.perf_counter() - start) / (4 * 2 * 1024**3)
    parameters = count_parameters(config.model_config(config.vocab_size))
    operations = sum(4 if CONTENDERS[name].group == LORA else 6 for name in names)
    return 6 * len(names) + (1 + steps) * operations * tokens_per_step(config) * parameters * operation


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
    packages = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name)]
    return facts | {name: version(name) for name in packages}


def check_packages(names: list[str]) -> None:
    """Raises ValueError when a contender's are not installed."""
    needed = dict.fromkeys(package for name in names for package in CONTENDERS[name].packages)
    if missing := [package for package in needed if not importlib.util.find_spec(package)]:
        rest = [name for name, contender in CONTENDERS.items() if not set(missing) & set(contender.packages)]
        hint = f"pip install -r requirements-dev.txt, or measure without: --contenders {','.join(rest)}"
        raise ValueError(f"{' and '.join(missing)} must be installed: {hint}")


def take_turns(names: list[str], config: RunConfig, lora: LoRAConfig, steps: int) -> dict[str, dict[str, list]]:
    """{group: {contender: its turns}}, after telling each as it comes."""
    turns: dict[str, dict[str, list]] = {}
    began = time.monotonic()
    for done, name in enumerate(names, 1):
        turn = in_own_process(name, config, lora, steps)
        turns.setdefault(CONTENDERS[name].group, {}).setdefault(name, []).append(turn)
        speed = tokens_per_step(config) / median(turn["seconds"])
        left = duration((time.monotonic() - began) * (len(names) - done) / done)
        print(f"{done}/{len(names)} {name}: {speed:,.0f} tokens/s; {left} left", flush=True)
    return turns


def bench(options: argparse.Namespace) -> None:
    """Run and print it all. Raises ValueError for bad options, and for contenders that do not compute the same."""
    names = list(dict.fromkeys(options.contenders.split(",")))
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise ValueError(f"there is no contender {unknown[0]!r}; there are {', '.join(CONTENDERS)}")
    if min(options.rounds, options.steps) < 1:
        raise ValueError(f"--rounds {options.rounds} and --steps {options.steps}: both must be at least 1")
    check_packages(names)
    given = [f"{key}={value}" for key in SETTINGS if (value := getattr(options, key)) is not None]
    config, _ = configurator.load([*given, "device=cpu"])
    architecture = config.model_config(PRESETS[config.preset].vocab_size)
    config = config.resolved(architecture)
    lora = LoRAConfig(rank=options.rank, targets=LORA_TARGETS)

    facts, tokens = machine(), tokens_per_step(config)
    total, seconds = len(names) * options.rounds, options.rounds * expected_seconds(names, config, options.steps)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"{count_parameters(architecture):,} parameters, {tokens:,} random token ids a step: {architecture}")
    if any(CONTENDERS[name].group == LORA for name in names):
        with torch.device("meta"):
            trained = apply_lora(GPT(architecture), lora).trainable
        targets = " and ".join(lora.targets)
        print(f"LoRA trains {trained:,} parameters: rank {lora.rank}, alpha {lora.alpha}, on {targets}")
    print(f"{total} turns of 1 + {options.steps} steps, about {duration(seconds)} in all", flush=True)
    turns = take_turns(names * options.rounds, config, lora, options.steps)
    tables = {group: summarize(own, tokens) for group, own in turns.items()}
    for group, rows in tables.items():
        print(f"\n{group}:\n\n{table(rows)}")
    if options.json:
        result = {"machine": facts, "config": asdict(config), "lora": asdict(lora), "contenders": tables}
        write_atomic(Path(options.json), json.dumps(result, indent=1).encode())
    if different := [problem for rows in tables.values() for problem in disagreements(rows)]:
        raise ValueError(
            "\n".join(["the contenders do not compute the same, so their speeds mean nothing:", *different])
        )
    if any(len(rows) > 1 for rows in tables.values()):
        print("\nlosses and gradient norms before and after the first update agree, within rounding")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (5)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps in a turn (3)")
    parser.add_argument(
        "--contenders", default=",".join(CONTENDERS), help="ratios are to a table's first (%(default)s)"
    )
    parser.add_argument("--rank", type=int, default=16, help="of LoRA's adapters; alpha is twice that (16)")
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
