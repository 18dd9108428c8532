"""What a run tells: the live line, training_log.txt, metrics.jsonl and loss.png."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import files
from model_directory import LOG, METRICS
from words import as_png


class Logbook:
    """Says a thing on the terminal and keeps it in the model directory. With `speak` false (ranks above 0), nothing."""

    def __init__(self, directory: Path, speak: bool = True):
        self.directory, self.speak = directory, speak
        self.live = False  # whether an unfinished line stands on the terminal
        if speak:
            directory.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        """A line on the terminal and in training_log.txt."""
        if not self.speak:
            return
        self._print(("\r\x1b[K" if self.live else "") + text)
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._append(LOG, "".join(f"{stamp} {line}\n" for line in text.splitlines()))

    def progress(self, text: str) -> None:
        """A line that the next one overwrites; nothing where the output is a file."""
        if self.speak and sys.stdout and sys.stdout.isatty():
            self._print(f"\r\x1b[K{text}", end="")
            self.live = True

    def metric(self, record: dict[str, Any]) -> None:
        """One JSON object on one line of metrics.jsonl, in the file before this returns."""
        if self.speak:
            self._append(METRICS, json.dumps(record) + "\n")

    def rewind(self, iter_num: int) -> None:
        """Forget what was recorded after the state that a run goes on from, so that no step stands there twice."""
        if self.speak and (records := read_metrics(self.directory)):
            kept = [json.dumps(record) + "\n" for record in records if record["iter"] <= iter_num]
            files.write_atomic(self.directory / METRICS, "".join(kept).encode())

    def _append(self, name: str, text: str) -> None:
        try:
            with open(self.directory / name, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise files.save_error(self.directory / name, error) from error

    def _print(self, text: str, end: str = "\n") -> None:
        self.live = False
        try:
            print(text, end=end, flush=True)
        except OSError:
            # The reader of stdout is gone, or its disk full; the run goes on. What is still buffered goes nowhere too,
            # or the interpreter would fail on it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The records of a run, none if it has no metrics.jsonl. A line that a kill cut short, or a disk, is left out."""
    path, records = directory / METRICS, []
    if not path.exists():
        return records
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "iter" in record]


def plot_loss(records: list[dict[str, Any]], title: str) -> bytes:
    """loss.png: the training loss step by step, and both losses of every evaluation. Nats per token over steps."""
    from matplotlib.figure import Figure  # a third of a second, which the start of a run need not wait for

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "val_loss" in r]
    axes.plot([r["iter"] for r in steps], [r["loss"] for r in steps], color="0.75", linewidth=1, label="batch")
    for key, label, colour in (("train_loss", "train", "tab:blue"), ("val_loss", "validation", "tab:orange")):
        axes.plot([r["iter"] for r in evaluations], [r[key] for r in evaluations], "o-", color=colour, label=label)
    axes.set(xlabel="iteration", ylabel="loss (nats per token)")
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    return as_png(figure)


def duration(seconds: float) -> str:
    """1:05:09, 12:03 or 0:07."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
