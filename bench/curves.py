"""The validation losses of runs over the time they took, in one picture.

    python bench/curves.py models/gpt-38M-scientific-pretrain models/llama-38M-scientific-pretrain --out curves.png

A run's clock starts with its evaluation before the first step, as training_log.txt has it, and counts everything from
there on: steps, evaluations, saves. The first run is the one to reach: a line marks its last loss, and the text says
when the others were there.
"""

import argparse
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, so that this runs from anywhere

import files
import script
from model_directory import LOG
from words import as_png

EVALUATION = re.compile(r"^(\S+ \S+) iteration ([\d,]+): .* val loss ([\d.]+)", re.MULTILINE)


class Run(NamedTuple):
    name: str
    minutes: list[float]
    losses: list[float]  # nats per token


def read(directory: Path) -> Run:
    """Raises ValueError for a run that was stopped in between, or has fewer than two evaluations."""
    found = EVALUATION.findall((directory / LOG).read_text(encoding="utf-8"))
    if len(found) < 2 or found[0][1] != "0":
        raise ValueError(f"{directory / LOG} has no evaluation before the first step and another one after it")
    times = [datetime.fromisoformat(time) for time, _, _ in found]
    minutes = [(time - times[0]).total_seconds() / 60 for time in times]
    return Run(directory.resolve().name, minutes, [float(loss) for _, _, loss in found])


def reached(run: Run, loss: float) -> float | None:
    """Minutes until the first evaluation that is not above `loss`."""
    return next((minute for minute, own in zip(run.minutes, run.losses, strict=True) if own <= loss), None)


def told(runs: list[Run]) -> list[str]:
    goal = runs[0]
    lines = [f"{goal.name}: {goal.losses[-1]:.4f} after {goal.minutes[-1]:.1f} minutes"]
    for run in runs[1:]:
        when, end = reached(run, goal.losses[-1]), f"{run.losses[-1]:.4f} after {run.minutes[-1]:.1f} minutes"
        share = "not there" if when is None else f"there after {when:.1f}, {when / goal.minutes[-1]:.2f} of the time"
        lines.append(f"{run.name}: {end}; {share}")
    return lines


def picture(runs: list[Run]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for run in runs:
        axes.plot(run.minutes, run.losses, "o-", label=run.name)
    axes.axhline(runs[0].losses[-1], color="0.6", linewidth=1, linestyle="--")
    axes.set(xlabel="minutes", ylabel="validation loss (nats per token)")
    axes.set_ylim(top=max(run.losses[1] for run in runs) + 0.3)  # what precedes the first step would hide the rest
    axes.grid(alpha=0.3)
    axes.legend()
    return as_png(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=files.expanded, help="model directories")
    parser.add_argument("--out", type=files.expanded, help="file for the picture (PNG)")
    arguments = parser.parse_args()

    def work() -> None:
        runs = [read(directory) for directory in arguments.runs]
        print(*told(runs), sep="\n")
        if arguments.out:
            files.write_atomic(arguments.out, picture(runs))

    return script.run("curves.py", work)


if __name__ == "__main__":
    sys.exit(main())
