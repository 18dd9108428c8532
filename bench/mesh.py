"""A step of train.py in every mesh of 1, 2 and 4 processes: its speed, memory, and what goes over the wires.

    python bench/mesh.py
    python bench/mesh.py --processes 1,2 --rounds 1 --json result.json
    python bench/mesh.py --preset large --gradient_accumulation_steps 16 --plan "[[8, 2], ['fsdp', 'tp']]"

The processes are those of torchrun on this machine, with gloo and equal parts of its threads, or with NCCL and a GPU
each. What they hand to collectives is counted where PyTorch dispatches it, and set beside a formula of the
configuration; with --plan that formula speaks alone, of meshes larger than any machine. bench/README.md says more.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, so that this runs from anywhere

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import configurator
from architecture import PRESETS
from bench import speed
from bench.contenders import our_trainer, peak_memory, random_ids, tokens_per_step
from configurator import RunConfig
from device import pick_device, pick_dtype
from distributed import Ranks
from files import write_atomic
from logbook import duration
from mesh import AXES, Mesh, mesh_problems
from model import GPT, GPTConfig, count_parameters, on_meta
from parallel import cuts, with_partial_gradients

MB = 10**6
SETTINGS = (*speed.SETTINGS, "gradient_accumulation_steps", "dtype")
MESHES = {
    1: (Mesh(),),
    2: (Mesh(dp=2), Mesh(fsdp=2), Mesh(tp=2)),
    4: (Mesh(dp=4), Mesh(fsdp=4), Mesh(tp=4), Mesh(fsdp=2, tp=2)),
}
# Of a collective: which of its arguments is what it is about as a whole, and how often a ring of n processes sends
# (n - 1) / n of that (Patarasuk and Yuan 2009).
COLLECTIVES = {"allreduce_": (0, 2), "_allgather_base_": (0, 1), "_reduce_scatter_base_": (1, 1)}


def called(mesh: Mesh) -> str:
    return " x ".join(f"{axis} {getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1) or "one process"


# ---- what goes over the wires: counted, and by the formula


class Wires(TorchDispatchMode):
    """Counts the collectives that this process takes part in, forward, backward and between, by axis and kind."""

    def __init__(self, ranks: Ranks):
        super().__init__()
        self.axes = {ranks.group(axis).group_name: axis for axis in AXES} if ranks.grid else {}
        self.calls, self.handed, self.sent = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it takes itself apart first, and what it then does comes here again
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        assert name in COLLECTIVES, f"no step was known to use {name}, and its bytes are not counted"
        position, times = COLLECTIVES[name]
        group = ProcessGroup.unbox(next(arg for arg in args if isinstance(arg, torch.ScriptObject)))
        size = sum(t.nbytes for t in ([args[position]] if isinstance(args[position], Tensor) else args[position]))
        axis = self.axes.get(group.group_name, "all")
        self.calls[f"{axis} {name.strip('_')}"] += group.size() > 1
        self.handed[f"{axis} {name.strip('_')}"] += size * (group.size() > 1)
        self.sent[axis] += times * size * (group.size() - 1) / group.size()


def by_formula(config: RunConfig, architecture: GPTConfig, mesh: Mesh) -> dict[str, float]:
    """Bytes that a process (of several that differ by a row of the vocabulary, the first) sends in a step of full
    training, along each axis. Without the loss and the gradient's norm, a number each.

    fsdp: in every micro-batch the blocks' weights are gathered twice, forward and backward, and the others once; at the
    end of the step all gradients are summed and scattered, in float32. dp: those sums are summed again. tp: each block
    sums what its two branches give, forward, and backward the gradients of what they have read, in float32; the
    embedding is summed forward, the head's input backward, and the loss takes three numbers a token. At the end of the
    step gradients are summed of which each rank has a part.
    """
    model = on_meta(architecture)
    held, in_blocks = cuts(model, mesh.tp, 0), {id(p) for p in model.blocks.parameters()}
    blocks = outside = 0  # numbers of this rank of tp; FSDP2 fills the rows of each up to a multiple of fsdp
    for name, parameter in model.named_parameters():
        shape = list(parameter.shape)
        if name in held:
            shape[held[name].dim] = sum(map(len, held[name].stretches))
        numbers = -(-shape[0] // mesh.fsdp) * mesh.fsdp * int(np.prod(shape[1:], dtype=int))
        blocks += numbers * (id(parameter) in in_blocks)
        outside += numbers * (id(parameter) not in in_blocks)
    micro = config.micro_batches // mesh.readers
    half = 2 if config.dtype == "bfloat16" else 4
    gradients, tokens = 4 * (blocks + outside), config.batch_size * config.block_size
    sent = {"dp": 2 * gradients / mesh.fsdp, "fsdp": micro * half * (2 * blocks + outside) + gradients}
    C, L = architecture.n_embd, architecture.n_layer
    parts = sum(first_share(model.get_parameter(name), mesh.fsdp) for name in with_partial_gradients(model, held))
    sent["tp"] = 2 * micro * tokens * (L * 2 * C * (half + 4) + 2 * C * half + 3 * 4) + 2 * 4 * parts
    return {axis: sent[axis] * (n - 1) / n for axis in AXES if (n := getattr(mesh, axis)) > 1}


def first_share(parameter: Tensor, fsdp: int) -> int:
    """How many of its numbers the first of the fsdp ranks has."""
    return -(-len(parameter) // fsdp) * parameter[0].numel()


def loopback() -> int | None:
    """Bytes that went over this machine's loopback interface since it started; only Linux tells."""
    try:
        return int(re.search(r"\blo:\s*(\d+)", Path("/proc/net/dev").read_text())[1])
    except OSError:
        return None


# ---- a turn


def measure(config: RunConfig, steps: int, threads: int) -> dict[str, Any]:
    """In each process: a warm-up, `steps` timed steps, and then one in which the wires are watched."""
    torch.set_num_threads(threads)
    ranks = Ranks()
    torch.manual_seed(config.seed)
    with torch.device("cpu" if ranks.main else "meta"):  # as train.py starts
        model = GPT(config.model_config(config.vocab_size))
    trainer = our_trainer(config, model, random_ids(config, 2 + steps), ranks)
    results, times = [trainer.step()], [time.perf_counter()]
    for _ in range(steps):
        results.append(trainer.step())
        times.append(time.perf_counter())
    peak = peak_memory()
    ranks.gather(None)
    before = loopback()
    with Wires(ranks) as wires:
        trainer.step()
    ranks.gather(None)
    after = loopback()
    losses, _, norms = zip(*results, strict=True)
    turn = {"dtype": config.dtype, "tokens": tokens_per_step(config), "seconds": np.diff(times).tolist()}
    turn |= {"losses": losses, "norms": norms, "peak_bytes": peak, "threads": threads}
    turn |= {"calls": wires.calls, "handed": wires.handed, "sent": wires.sent}
    on_loopback = None if after is None or trainer.device.type == "cuda" else (after - before) / ranks.size
    ranks.close()
    return turn | {"loopback": on_loopback}


def launched(processes: int, work: Callable, *arguments) -> dict[int, Any]:
    """What `work` gives in each of so many processes of torchrun's."""
    with tempfile.TemporaryDirectory() as folder:
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id="bench",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        return elastic_launch(launch, work)(*arguments)


def in_own_processes(mesh: Mesh, config: RunConfig, steps: int) -> dict[str, Any]:
    """A turn of a mesh: rank 0's, with the peaks of all and the largest of them."""
    threads = max(1, torch.get_num_threads() // mesh.devices)
    with tempfile.TemporaryDirectory() as folder:
        turns = launched(mesh.devices, measure, replace(config, out_dir=folder, mesh_shape=str(mesh)), steps, threads)
    peaks = [turns[rank]["peak_bytes"] for rank in range(mesh.devices)]
    return turns[0] | {"peaks": peaks, "peak_bytes": max(peaks)}


# ---- the table


def summarize(turns: dict[Mesh, list[dict]], config: RunConfig, architecture: GPTConfig) -> list[dict[str, Any]]:
    rows = speed.summarize({called(mesh): own for mesh, own in turns.items()}, limit=None)
    for row, mesh in zip(rows, turns, strict=True):
        row |= {"mesh": asdict(mesh), "formula": by_formula(config, architecture, mesh)}
    return rows


SPEEDS = ("threads", "tokens/s", "min - max", "ratio", "min - max", "peak MiB")
HEADS = ("mesh", *SPEEDS, "sends, MB", "formula", "loopback")


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"| {' | '.join(HEADS)} |", f"| --- {'| ---: ' * (len(HEADS) - 1)}|"]
    for row in rows:
        (pace, slow, fast), (ratio, low, high) = row["tokens_per_second"].values(), row["ratio"].values()
        last = row["turns"][-1]
        volumes = [sum(last["sent"].values()), sum(row["formula"].values()), last["loopback"]]
        cells = [row["contender"], str(last["threads"]), f"{pace:,.0f}", f"{slow:,.0f} - {fast:,.0f}"]
        cells += [f"{ratio:.2f}", f"{low:.2f} - {high:.2f}", f"{row['peak_bytes'] / 2**20:,.0f}"]
        cells += ["" if volume is None else f"{volume / MB:,.1f}" for volume in volumes]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def collectives(rows: list[dict[str, Any]]) -> list[str]:
    """What a process hands over in a step, kind by kind."""
    lines = []
    for row in rows:
        last = row["turns"][-1]
        kinds = [f"{last['calls'][k]:,} {k} of {size / MB:,.1f} MB" for k, size in last["handed"].items() if size]
        lines += [f"{row['contender']}: {', '.join(kinds)}"] if kinds else []
    return lines


def plan(mesh: Mesh, config: RunConfig, architecture: GPTConfig) -> str:
    sent = by_formula(config, architecture, mesh)
    axes = ", ".join(f"{axis} {size / MB:,.1f} MB" for axis, size in sent.items()) or "nothing"
    tokens, micro = tokens_per_step(config), config.micro_batches // mesh.readers
    return (
        f"{count_parameters(architecture):,} parameters, {mesh.devices} processes as {called(mesh)}, {config.dtype}\n"
        f"a step: {tokens:,} tokens, {micro} x {config.batch_size} x {config.block_size} a process\n"
        f"each process sends in a step: {axes}"
    )


# ---- the command


def configured(options: argparse.Namespace) -> tuple[RunConfig, GPTConfig]:
    """train.py's configuration; `auto` becomes the same dtype for all turns. The small preset gets 4 heads, for its 5
    cannot be divided."""
    if options.preset is None and options.n_head is None:
        options.n_head = 4
    given = [f"{key}={value}" for key in SETTINGS if (value := getattr(options, key)) is not None]
    config, _ = configurator.load([*given, "compile=false"])
    architecture = config.model_config(PRESETS[config.preset].vocab_size)
    if not options.plan:
        config = replace(config, dtype=pick_dtype(config.dtype, pick_device(config.device))[0])
    elif config.dtype == "auto":
        config = replace(config, dtype="bfloat16")
    return config.resolved(architecture), architecture


def chosen(options: argparse.Namespace, config: RunConfig, architecture: GPTConfig) -> list[Mesh]:
    """Raises ValueError for numbers of processes that have no meshes here, or for a model that these cannot divide."""
    if options.plan:
        meshes = [Mesh.parse(options.plan)]
    else:
        names = options.processes.split(",")
        if unknown := [name for name in names if name not in map(str, MESHES)]:
            raise ValueError(f"--processes {unknown[0]}: there are meshes for {', '.join(map(str, MESHES))}")
        meshes = [mesh for name in names for mesh in MESHES[int(name)]]
        gpus = torch.cuda.device_count() or max(MESHES)
        if (most := max(mesh.devices for mesh in meshes)) > gpus:
            raise ValueError(f"{most} processes need a GPU each, and there are {gpus}: --processes 1 needs one")
    problems = [p for mesh in meshes for p in mesh_problems(mesh, mesh.devices, architecture, config.micro_batches)]
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    return meshes


def bench(options: argparse.Namespace) -> None:
    """Run and print it all. Raises ValueError for bad options, and where the meshes do not compute the same."""
    if min(options.rounds, options.steps) < 1:
        raise ValueError(f"--rounds {options.rounds} and --steps {options.steps}: both must be at least 1")
    config, architecture = configured(options)
    meshes = chosen(options, config, architecture)
    if options.plan:
        print(plan(meshes[0], config, architecture))
        return
    print(", ".join(f"{key} {value}" for key, value in speed.machine().items()))
    size, tokens = count_parameters(architecture), tokens_per_step(config)
    print(f"{size:,} parameters, {config.dtype}, {tokens:,} random token ids a step", flush=True)
    turns: dict[Mesh, list] = {}
    began, total = time.monotonic(), options.rounds * len(meshes)
    for done, mesh in enumerate(meshes * options.rounds, 1):
        turn = in_own_processes(mesh, config, options.steps)
        turns.setdefault(mesh, []).append(turn)
        left = duration((time.monotonic() - began) * (total - done) / done)
        print(f"{done}/{total} {called(mesh)}: {speed.pace([turn])[0]:,.0f} tokens/s; {left} left", flush=True)
    rows = summarize(turns, config, architecture)
    print("", table(rows), "", *collectives(rows), sep="\n")
    if options.json:
        result = {"machine": speed.machine(), "config": asdict(config), "meshes": rows}
        write_atomic(Path(options.json), json.dumps(result, indent=1).encode())
    if different := speed.disagreements(rows):
        raise ValueError("\n".join(["the meshes do not compute the same, so their speeds mean nothing:", *different]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default=",".join(map(str, MESHES)), help="in meshes of so many (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each mesh (3)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps in a turn (3)")
    parser.add_argument("--plan", help="run nothing: what a step in this mesh_shape would send, by the formula")
    parser.add_argument("--json", help="file for the raw numbers, in bytes")
    for key in SETTINGS:
        parser.add_argument(f"--{key}", help="as for train.py")
    try:
        bench(parser.parse_args())
        return 0
    except (ValueError, OSError) as error:
        print(f"mesh.py: {error}", file=sys.stderr)
        return 1
    except ChildFailedError:
        print("mesh.py: a process has failed, for the reason above", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SignalException):
        return 130


if __name__ == "__main__":
    sys.exit(main())
