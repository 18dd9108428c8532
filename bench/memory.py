"""Peak memory of real training runs beside what `python -m registry memory` says of them.

    python bench/memory.py
    python bench/memory.py --rounds 5 --only small --json result.json

Every run is a fresh process that makes three steps of train.py's Trainer on random token ids. Its buffers are counted
from what the process held before, libraries loaded and a tiny model trained, its peak is that of the whole process.
docs/memory.md says more about the columns.
"""

import argparse
import ctypes
import json
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, so that this runs from anywhere

import torch

from architecture import PRESETS
from bench.contenders import our_start, peak_memory, random_ids
from configurator import RunConfig
from device import autocast
from distributed import Ranks
from files import write_atomic
from lora import LoRAConfig, apply_lora
from mesh import Mesh
from model import GPT, GPTConfig
from optimizer import build_optimizer
from registry.memory import Estimate, estimate
from train import Trainer, set_up

MB = 10**6
CPU = torch.device("cpu")
M_MMAP_THRESHOLD = -3  # from malloc.h


class Run(NamedTuple):
    name: str
    architecture: GPTConfig
    rank: int | None  # of LoRA; None: full training
    batch_size: int
    block_size: int
    dtype: str
    micro_batches: int = 2
    recompute: bool = False
    mesh: Mesh = Mesh()  # batch and micro-batches are those of a process

    @property
    def lora(self) -> LoRAConfig | None:
        return LoRAConfig(self.rank) if self.rank else None

    def estimate(self) -> Estimate:
        return estimate(
            self.architecture,
            lora=self.lora,
            batch_size=self.batch_size * self.mesh.readers,
            block_size=self.block_size,
            dtype=self.dtype,
            mesh_shape=str(self.mesh),
            gradient_accumulation_steps=self.micro_batches,
            cuda=False,
            activation_checkpointing=self.recompute,
        )


# Few tokens in the vocabulary, so that layers and not logits fill the memory.
DEEP = {"vocab_size": 2048, "n_layer": 8, "n_embd": 512, "n_head": 8, "block_size": 512}
DEEP_GPT2 = replace(PRESETS["small"], **DEEP)
DEEP_TIED = replace(DEEP_GPT2, tie_word_embeddings=True, bias=True)
DEEP_LLAMA = replace(PRESETS["modern"], **DEEP, n_kv_head=2, n_inner=1408)
MEDIUM = replace(PRESETS["medium"], block_size=256)
RUNS = [
    *(
        Run(preset, PRESETS[preset], rank, 4, 256, dtype)
        for preset in ("small", "modern")
        for rank in (None, 8)
        for dtype in ("float32", "bfloat16")
    ),
    Run("small", PRESETS["small"], None, 1, 256, "float32"),
    Run("small", PRESETS["small"], None, 8, 256, "bfloat16"),
    Run("small", PRESETS["small"], None, 4, 256, "bfloat16", micro_batches=1),
    Run("deep gpt2", DEEP_GPT2, None, 4, 512, "float32"),
    Run("deep gpt2", DEEP_GPT2, 8, 4, 512, "bfloat16"),
    Run("deep llama", DEEP_LLAMA, None, 4, 512, "bfloat16"),
    Run("deep llama", DEEP_LLAMA, 8, 4, 512, "float32"),
    Run("deep gpt2", DEEP_GPT2, None, 4, 512, "bfloat16", recompute=True),
    Run("deep llama", DEEP_LLAMA, 8, 4, 512, "float32", recompute=True),
    Run("medium", MEDIUM, None, 2, 256, "bfloat16"),
    Run("medium", MEDIUM, 16, 2, 256, "float32"),
    Run("gemma3-270m", PRESETS["gemma3-270m"], 8, 1, 256, "float32"),
    Run("gemma3-270m", PRESETS["gemma3-270m"], 8, 1, 256, "bfloat16"),
    Run("deep gpt2", DEEP_GPT2, None, 4, 512, "float32", mesh=Mesh(tp=2)),
    Run("deep gpt2", DEEP_TIED, None, 4, 512, "float32", 1, True, Mesh(tp=2)),
    Run("deep llama", DEEP_LLAMA, 8, 4, 512, "float32", mesh=Mesh(tp=2)),
    Run("deep gpt2", DEEP_GPT2, None, 4, 512, "float32", mesh=Mesh(fsdp=2)),
    Run("deep gpt2", DEEP_GPT2, None, 4, 512, "float32", 1, mesh=Mesh(fsdp=2)),
]


def measure(run: Run, kept: bool = True, steps: int = 3) -> tuple[int, int]:
    """(bytes held before, bytes more than that at the peak), in this process, which must be a fresh one.

    Not `kept`: every buffer is its own mapping, which ends when the buffer does, and nothing else fills memory.
    """
    ranks = Ranks()
    ranks.arrange(run.mesh, CPU.type)
    _train_a_tiny_model(run.dtype)
    if ranks.size > 1:
        small = {"n_layer": 1, "n_embd": 64, "n_inner": 64, "vocab_size": 64}
        _train(run._replace(architecture=replace(run.architecture, **small), block_size=8), ranks, False, 1)
    idle = _resident()
    _train(run, ranks, kept, steps)
    peak = peak_memory()
    ranks.close()
    return idle, peak - idle


def _train(run: Run, ranks: Ranks, kept: bool, steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        micro_batches = run.micro_batches * run.mesh.readers
        settings = {"batch_size": run.batch_size, "gradient_accumulation_steps": micro_batches, "out_dir": folder}
        settings |= {"dtype": run.dtype, "activation_checkpointing": run.recompute, "mesh_shape": str(run.mesh)}
        config = RunConfig(**settings, device="cpu", compile="false")
        config = config.resolved(run.architecture, block_size=run.block_size)
        if not kept:
            ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 16)
        with torch.device("cpu" if ranks.main else "meta"):  # as train.py starts
            model = GPT(run.architecture)
        if run.lora:
            apply_lora(model, run.lora)
        start = our_start(config, model, random_ids(config, steps))
        trainer = set_up(start, ranks)[0] if kept else Trainer(start, CPU, ranks)
        del model, start
        for _ in range(steps):
            trainer.step()


def _train_a_tiny_model(dtype: str) -> None:
    """Whatever is loaded at the first step is loaded now."""
    config = RunConfig(preset="modern", n_layer=1, n_head=1, n_embd=8, block_size=8)
    model = GPT(replace(config.model_config(64), n_kv_head=1))
    optimizer, ids = build_optimizer(model, config), torch.zeros(2, 8, dtype=torch.long)
    with autocast(CPU, dtype):
        _, loss = model(ids, ids)
    loss.backward()
    optimizer.step()


def _resident() -> int:
    return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def in_fresh_process(run: Run, kept: bool = True) -> tuple[int, int]:
    """`measure`'s; of several processes rank 0's."""
    if run.mesh.devices > 1:
        from bench.mesh import launched  # what it imports is not to be in the processes that are measured

        return launched(run.mesh.devices, measure, run, kept)[0]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, run, kept).result()


def compare(run: Run, rounds: int) -> dict[str, Any]:
    found = run.estimate()
    idle, buffers = in_fresh_process(run, kept=False)
    rounds = rounds if run.mesh.devices == 1 else 0  # of several processes only the buffers are counted
    peaks = [sum(in_fresh_process(run)) for _ in range(rounds)]
    return {
        "run": f"{run.name}, {f'LoRA {run.rank}' if run.rank else 'full'}, {run.dtype}"
        + ", recomputed" * run.recompute
        + "".join(f", {axis} {size}" for axis, size in vars(run.mesh).items() if size > 1),
        "batch": f"{run.micro_batches} x {run.batch_size} x {run.block_size}",
        "idle": idle,
        "buffers": buffers,
        "buffers_estimated": found.total - found["overhead"],
        "peaks": peaks,
        "peak_estimated": found.total,
    }


HEADS = ("run", "batch", "buffers, MB", "estimate", "off by", "peaks, MB", "median", "estimate", "off by")


def line(row: dict[str, Any]) -> str:
    cells = [row["run"], row["batch"], *_pair(row["buffers"], row["buffers_estimated"])]
    if row["peaks"]:
        peaks = f"{min(row['peaks']) / MB:,.0f} - {max(row['peaks']) / MB:,.0f}"
        cells += [peaks, *_pair(median(row["peaks"]), row["peak_estimated"])]
    else:
        cells += ["-"] * 4
    return f"| {' | '.join(cells)} |"


def _pair(measured: float, estimated: float) -> tuple[str, str, str]:
    return f"{measured / MB:,.0f}", f"{estimated / MB:,.0f}", f"{estimated / measured - 1:+.1%}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes for each run (3)")
    parser.add_argument("--only", default="", help="runs whose name begins like this")
    parser.add_argument("--json", help="file for the raw numbers, in bytes")
    options = parser.parse_args()
    rows = []
    print(f"| {' | '.join(HEADS)} |\n| --- | --- |{' ---: |' * 7}", flush=True)
    for run in (run for run in RUNS if run.name.startswith(options.only)):
        rows.append(compare(run, options.rounds))
        print(line(rows[-1]), flush=True)
    if options.json:
        write_atomic(Path(options.json), json.dumps(rows, indent=1).encode())
    single = [row["peak_estimated"] / peak - 1 for row in rows for peak in row["peaks"]]
    within, idle = sum(abs(error) <= 0.15 for error in single), median(row["idle"] for row in rows)
    print(
        f"\n{within} of {len(single)} peaks are within 15 % of the estimate; idle, a process holds {idle / MB:,.0f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
