"""How the processes of a run share its work: `mesh_shape`, and which shapes there can be. No process or GPU is needed.

    mesh_shape = [[2, 4], ["fsdp", "tp"]]

Every process has a place in a grid with the axes of AXES, the last one fastest, so that a `tp` group has neighbours:

    dp    replicas: each has all of the model (that the other axes leave it), and its own share of the batch
    fsdp  each has a share of the batch, and of every weight, gradient and moment of the optimizer
    tp    each computes a share of the heads, of the MLP and of the vocabulary, for the same sequences as its group

An axis of -1 gets what the number of processes leaves it. Without a mesh_shape all processes are replicas.
"""

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass

from architecture import GPTConfig

AXES = ("dp", "fsdp", "tp")
FILLED = -1


@dataclass(frozen=True)
class Mesh:
    """The size of each axis."""

    dp: int = 1
    fsdp: int = 1
    tp: int = 1

    @classmethod
    def parse(cls, shape: Sequence | str | None, processes: int | None = None) -> "Mesh":
        """From [[sizes], [names]]; an axis of -1 gets what `processes` leave it. Raises ValueError, with every problem,
        for anything else and for an axis that is none of AXES."""
        if not shape:
            return cls(dp=processes or 1)
        try:
            sizes, names = ast.literal_eval(shape) if isinstance(shape, str) else shape
            pairs = list(zip(sizes, names, strict=True))
        except (ValueError, TypeError, SyntaxError):
            raise ValueError(f"mesh_shape={shape} must be [[sizes], [names]], as [[2, 2], ['fsdp', 'tp']]") from None
        problems = [f"axis {name!r} is none of {', '.join(AXES)}" for _, name in pairs if name not in AXES]
        problems += [
            f"{name}={size!r} must be a whole number above 0, or -1 for what is left"
            for size, name in pairs
            if type(size) is not int or (size < 1 and size != FILLED)
        ]
        if len(set(map(str, names))) < len(pairs):
            problems.append("every axis can be there once")
        if [size for size, _ in pairs].count(FILLED) > 1:
            problems.append("one axis can be -1")
        if FILLED in sizes and processes is None:
            problems.append("-1 is what a number of processes leaves, and there is none")
        if problems:
            raise ValueError(f"mesh_shape={shape}: {'; '.join(problems)}")
        known = math.prod(size for size, _ in pairs if size != FILLED)
        return cls(**{name: max(1, (processes or 1) // known) if size == FILLED else size for size, name in pairs})

    def __str__(self) -> str:
        shape = {axis: getattr(self, axis) for axis in AXES if getattr(self, axis) > 1} or {"fsdp": 1}
        names = ", ".join(f'"{axis}"' for axis in shape)
        return f"[{list(shape.values())}, [{names}]]"

    @property
    def devices(self) -> int:
        return self.dp * self.fsdp * self.tp

    @property
    def readers(self) -> int:
        """Among how many a batch is divided."""
        return self.dp * self.fsdp


def mesh_problems(
    mesh: Mesh, processes: int, config: GPTConfig, micro_batches: int, lora_one_micro_batch: bool = False
) -> list[str]:
    """What keeps a model and the micro-batches of a step from being divided so: one sentence each, with the numbers and
    the nearest choice that could be."""
    problems = []
    if mesh.devices != processes:
        shape = " x ".join(f"{axis}={getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1) or "it"
        problems.append(
            f"mesh_shape: {shape} is for {mesh.devices} process(es), and there are {processes}: "
            + _fitting(mesh, processes)
        )
    misfits = tp_misfits(mesh.tp, config)
    if misfits:
        legal = [str(tp) for tp in range(1, config.n_head + 1) if not tp_misfits(tp, config)]
        problems.append(
            f"mesh_shape: tp={mesh.tp} {' and '.join(misfits)}; for this model tp can be {', '.join(legal)}"
        )
    if micro_batches % mesh.readers:
        below = micro_batches - micro_batches % mesh.readers
        nearest = " or ".join(str(n) for n in (below, below + mesh.readers) if n)
        name = "lora_one_micro_batch: 1" if lora_one_micro_batch else f"gradient_accumulation_steps={micro_batches}"
        choice = "leave that out" if lora_one_micro_batch else f"the nearest is {nearest}"
        problems.append(
            f"{name} must be a multiple of the {mesh.readers} processes that divide a step's micro-batches "
            f"(dp x fsdp): {choice}"
        )
    return problems


def tp_misfits(tp: int, config: GPTConfig) -> list[str]:
    """Where tp ranks cannot have equal shares of a model. The vocabulary's may differ by one row."""
    sizes = {"n_head": config.n_head, "the MLP's width": config.inner}
    misfits = [f"does not divide {name}={size}" for name, size in sizes.items() if size % tp]
    K = config.kv_heads
    if config.n_head > K and K % tp and tp % K:
        misfits.append(f"neither divides n_kv_head={K} nor is divided by it")
    if config.vocab_size < tp:
        misfits.append(f"is more than vocab_size={config.vocab_size}")
    return misfits


def _fitting(mesh: Mesh, processes: int) -> str:
    """What would fit: the mesh that these processes can make with as much of its tp, or as many processes."""
    tp = math.gcd(mesh.tp, processes)
    dp = math.gcd(mesh.dp, processes // tp)
    near = Mesh(dp, processes // tp // dp, tp)
    return f"mesh_shape={near} would fit, or torchrun --nproc_per_node={mesh.devices}"
