"""What messages, tables and pictures are put together from."""

import io
import shlex
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def first_line(error: BaseException) -> str:
    """What an error says before its first line break, or what it is called if it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def first_few(problems: Iterable[str], shown: int = 5) -> str:
    """A sentence of the first problems, and how many more there are."""
    problems = list(problems)
    more = [f"and {len(problems) - shown} more"] if len(problems) > shown else []
    return "; ".join(problems[:shown] + more)


def in_shell(path: Path) -> str:
    """A path as a command takes it; a backslash would get quotes, which cmd.exe does not know."""
    return shlex.quote(path.as_posix())


def merge_first(directory: Path) -> str:
    return f"{directory} is a LoRA directory: merge it first (python merge_lora.py {in_shell(directory)})"


def misfits(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> list[str]:
    """How the tensors of a file, {name: shape}, are not those of a model."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unexpected" for name in found if name not in expected]
    return problems + [
        f"{name} is {tuple(found[name])} where the model has {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]


def as_table(rows: Iterable[tuple[str, ...]]) -> str:
    """Columns of text, the first row being their heads."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def as_png(figure: Any) -> bytes:
    """A figure of matplotlib's as the bytes of a PNG, the same ones every time."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name may have characters that the font has not
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
