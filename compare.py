"""Two models side by side: how well each predicts the same held-out text, and how each goes on from the same words.

    python compare.py models/gpt-38M-tinystories-pretrain models/gpt-38M-tinystories-to-scientific-merged
    python compare.py A B --data tinystories scientific --prompt "In this paper we" --prompt FILE:abstract.txt
    python compare.py A B --data papers --max_tokens 0 --json numbers.json --out a-and-b.png

Loss is in nats per token, perplexity its exponential, bits per byte the same per byte of UTF-8 text. Models with one
tokenizer see the same blocks of tokens; models with two see the same documents, and only bits per byte compares them.
The standard error is that of the difference, from how it varies between those blocks or documents: a difference of
less than two of them may be chance.
"""

import argparse
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import files
import script
from configurator import PRECISIONS, precision


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("a", metavar="A", help="model directory, or a ckpt.pt")
    add("b", metavar="B", help="the other one; differences are B - A")
    add("--data", nargs="+", metavar="NAME", help="folders under data/, or paths (default: what A and B trained on)")
    add("--max_tokens", type=int, default=50_000, help="held-out tokens of each dataset, 0 for all (default 50000)")
    add("--prompt", action="append", default=[], help="text, or FILE:PATH; repeatable (default: from each dataset)")
    add("--max_new_tokens", type=int, default=60, help="longest continuation, tokens (default 60)")
    add("--temperature", type=float, default=0.8, help="lower is safer, 0 is greedy (default 0.8)")
    add("--seed", type=int, default=1337, help="same seed, same continuations (default 1337)")
    add(
        "--out",
        type=files.expanded,
        metavar="FILE",
        help="the picture (default: A-vs-B.png, here, of the directories' names)",
    )
    add("--json", type=files.expanded, metavar="FILE", help="write all of it there too, for programs")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    add("--dtype", type=precision, choices=PRECISIONS, default="float32", help="of the weights (default float32)")
    add("--base", help="where the base of a LoRA directory lies now, if it was moved")
    add("--tokenizer", help="tokenizer.json, for a model that comes without one (nanoGPT's)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    script.begin()
    ARGUMENTS = parse()  # --help and mistakes do not wait for torch

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import lora
from checkpoint import CheckpointManager
from data.batches import sequences
from data.finding import find_dataset
from data.tokens import Dataset, dataset_problems
from device import DTYPES, keep_freed_memory, pick_device
from model import GPT
from model_directory import is_lora, read_about
from registry.resolve import folder_of
from sample import check_seed, read_prompt, tokenizer_for
from tokenizer import EOT, Tokenizer
from words import as_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOGITS = 1 << 25  # computed at a time: 134 MB in float32, whatever the vocabulary
WIDTH = 96  # of the continuations, characters
COLOURS = {"A": "tab:blue", "B": "tab:orange"}
PICTURE_LINES = 200  # of continuations: a picture can only be so high


@dataclass(frozen=True)
class Side:
    letter: str
    name: str
    model: GPT
    tokenizer: Tokenizer
    tokenizer_path: Path
    trained_on: str | None


@dataclass(frozen=True)
class Text:
    """Held-out text in the tokens of A and of B. The first id is only context; `units` says for each of the others
    which block or document it is part of, and the difference is averaged over these, weighted by `sizes`."""

    name: str
    beginning: str  # a few words, to go on from
    ids: tuple[np.ndarray, np.ndarray]
    units: tuple[np.ndarray, np.ndarray]
    sizes: np.ndarray  # of the blocks in tokens, of the documents in bytes
    bytes: int | None  # None where the dataset does not say whose tokens it holds
    same_tokens: bool


def main(arguments: argparse.Namespace) -> int:
    def work() -> None:
        report = compare(arguments)
        print(as_text(report), flush=True)
        if arguments.json:
            files.write_atomic(arguments.json, (json.dumps(report, indent=2) + "\n").encode())
        out = arguments.out or Path(f"{report['A']['name']}-vs-{report['B']['name']}.png")
        files.write_atomic(out, as_picture(report))
        print(f"\npicture: {out}")

    return script.run("compare.py", work)


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is to be told. Raises ValueError or OSError for what a user can cause, most of it at once."""
    check(arguments)
    check_seed(arguments.seed)
    arguments.a, arguments.b = folder_of(arguments.a), folder_of(arguments.b)
    prompts = [read_prompt(prompt) for prompt in arguments.prompt]
    keep_freed_memory()
    device, dtype = pick_device(arguments.device), DTYPES[arguments.dtype]
    bases = places_of_bases(arguments)
    if arguments.tokenizer and all(map(CheckpointManager.find_tokenizer, (arguments.a, arguments.b))):
        raise ValueError(f"--tokenizer {arguments.tokenizer}: A and B have tokenizers of their own")
    a = load("A", arguments.a, bases[0], arguments.tokenizer, device, dtype)
    b = load("B", arguments.b, bases[1], arguments.tokenizer, device, dtype)
    names = arguments.data or [side.trained_on for side in (a, b) if side.trained_on]
    if not names:
        raise ValueError("neither model says what it was trained on: name a dataset with --data")
    block_size = min(a.model.config.block_size, b.model.config.block_size)
    texts = [read_text(name, a, b, block_size, arguments.max_tokens) for name in dict.fromkeys(names)]
    total = sum(len(units) for text in texts for units in text.units)
    with tqdm(total=total, unit="tok", unit_scale=True, delay=2, disable=None, leave=False) as bar:
        results = [measure(text, a, b, block_size, bar.update) for text in texts]
    prompts = prompts or [text.beginning for text in texts]
    sampling = {key: getattr(arguments, key) for key in ("max_new_tokens", "temperature", "seed")}
    samples = [{"prompt": p} | {side.letter: continuation(side, p, **sampling) for side in (a, b)} for p in prompts]
    about = {side.letter: {"name": side.name, "parameters": side.model.num_params()} for side in (a, b)}
    return {**about, "block_size": block_size, "data": results, "sampling": sampling, "samples": samples}


def check(arguments: argparse.Namespace) -> None:
    if arguments.max_tokens < 0 or arguments.max_new_tokens < 1 or not arguments.temperature >= 0:
        raise ValueError("--max_tokens and --temperature must be at least 0, and --max_new_tokens at least 1")
    if find_spec("matplotlib") is None:
        raise ValueError("a picture needs the package matplotlib: pip install matplotlib")
    for path in (arguments.out, arguments.json):
        if path is not None and path.is_dir():
            raise ValueError(f"{path} is a folder: name a file to write to")
    if arguments.out is not None and arguments.out.suffix != ".png":
        raise ValueError(f"--out {arguments.out}: the picture is a PNG, so its name must end in .png")
    if arguments.json is not None and arguments.json.suffix == ".png":
        raise ValueError(f"--json {arguments.json}: a name in .png is for a picture (--out)")


def places_of_bases(arguments: argparse.Namespace) -> list[str | None]:
    """--base for A and for B: for whichever misses its base, or else for every LoRA directory of the two."""
    paths, places = (arguments.a, arguments.b), [None, None]
    about = [read_about(path) or {} for path in paths]
    adapted = [i for i in (0, 1) if is_lora(about[i])]
    missing = [i for i in adapted if not (paths[i] / about[i]["base"]["path"]).exists()]
    if arguments.base and not adapted:
        raise ValueError(f"--base {arguments.base}: neither A nor B is a LoRA directory")
    for i in missing or adapted:
        places[i] = arguments.base
    return places


def load(
    letter: str, path: Path, base: str | None, fallback: str | None, device: torch.device, dtype: torch.dtype
) -> Side:
    model, metadata = CheckpointManager.load_model(path, device, base=base)
    if lora.adapter_names(model):
        lora.merge_lora(model, dtype=dtype)  # as sample.py does
    tokenizer_path = CheckpointManager.find_tokenizer(path) or fallback
    tokenizer = tokenizer_for(tokenizer_path, metadata)
    trained_on = (metadata["config"] or {}).get("dataset")
    name = metadata["directory"].resolve().name
    return Side(letter, name, model.to(dtype).eval(), tokenizer, Path(tokenizer_path), trained_on)


# ---- the text


def read_text(name: str, a: Side, b: Side, block_size: int, max_tokens: int) -> Text:
    """Held-out text of a dataset: the same tokens for both models, or, where their tokenizers differ, the same text."""
    first = second = find_dataset(name, a.tokenizer_path)
    shared = a.tokenizer.fingerprint == b.tokenizer.fingerprint
    if not shared:
        if not first.meta:
            raise ValueError(f"{first.directory} does not say whose tokens it holds, and those of A and of B differ")
        second = find_dataset(name, b.tokenizer_path)
    for side, dataset in ((a, first), (b, second)):
        if problems := dataset_problems(dataset.directory, block_size=1, vocab_size=side.model.config.vocab_size):
            raise ValueError(f"{side.name} cannot read {name}: {problems[0]}")
    # The folder's name, because text of one's own bears the name of the prepare.py that was given it.
    label = files.expanded(name).resolve().name + (" (synthetic)" if first.meta.get("synthetic") else "")
    if shared:
        return same_blocks(label, first, a.tokenizer, block_size, max_tokens)
    return same_documents(label, (first, second), (a.tokenizer, b.tokenizer), max_tokens)


def same_blocks(name: str, dataset: Dataset, tokenizer: Tokenizer, block_size: int, max_tokens: int) -> Text:
    """The first max_tokens held-out tokens (0: all), in whole blocks if there is one."""
    count = min(max_tokens or len(dataset.val), len(dataset.val) - 1)
    count = count // block_size * block_size or count
    ids, units = dataset.val[: count + 1], np.arange(count) // block_size
    size = text_bytes(ids[1:], tokenizer) if dataset.meta else None
    sizes = np.bincount(units)
    return Text(name, beginning(dataset, tokenizer), (ids, ids), (units, units), sizes, size, same_tokens=True)


def same_documents(name: str, pair: tuple[Dataset, ...], tokenizers: tuple[Tokenizer, ...], max_tokens: int) -> Text:
    """As many of the first held-out documents as need at most max_tokens (0: all) of either tokenizer; at least one."""
    ends = [np.flatnonzero(dataset.val == dataset.eot) + 1 for dataset in pair]
    count = max(1, min(np.searchsorted(e, max_tokens or e[-1], side="right") for e in ends))
    # End-of-text stands before every other document, so it is put before the first one too.
    ids = [np.insert(dataset.val[: e[count - 1]], 0, dataset.eot) for dataset, e in zip(pair, ends, strict=True)]
    documents = [np.split(part[1:], e[: count - 1]) for part, e in zip(ids, ends, strict=True)]
    texts = [[t.decode_bytes(d[:-1].tolist()) for d in split] for t, split in zip(tokenizers, documents, strict=True)]
    if texts[0] != texts[1]:
        raise ValueError(f"{pair[0].directory} and {pair[1].directory} do not hold the same documents")
    units = [np.repeat(np.arange(count), list(map(len, split))) for split in documents]
    sizes = np.array(list(map(len, texts[0])))
    return Text(name, beginning(pair[0], tokenizers[0]), tuple(ids), tuple(units), sizes, sizes.sum().item(), False)


def text_bytes(ids: np.ndarray, tokenizer: Tokenizer) -> int:
    """Bytes of UTF-8 that the ids stand for; end-of-text stands for none."""
    return len(tokenizer.decode_bytes(ids[ids != tokenizer.eot].tolist()))


def beginning(dataset: Dataset, tokenizer: Tokenizer) -> str:
    """The first twelve words of the first held-out document that goes on for a while."""
    documents = tokenizer.decode(dataset.val[:4096].tolist()).split(EOT)
    chosen = next((text for text in documents if len(text.split()) >= 24), max(documents, key=len))
    return re.match(r"(\s*\S+){0,12}", chosen).group()[:200]  # not every script puts blanks between words


# ---- the numbers


def measure(text: Text, a: Side, b: Side, block_size: int, advance: Callable[[int], Any]) -> dict[str, Any]:
    """What one dataset says about both models and, as B - A, about their difference."""
    result = {"dataset": text.name, "same_tokens": text.same_tokens, "units": len(text.sizes), "bytes": text.bytes}
    log2_bytes, sums = math.log(2) * (text.bytes or 0), []
    for side, ids, units in zip((a, b), text.ids, text.units, strict=True):
        losses = token_losses(side.model, ids, block_size, advance)
        loss = losses.mean().item()
        if not loss < 700:  # nan, infinite, or more than a perplexity can be computed of
            raise ValueError(f"{side.name} has a loss of {loss} on {text.name}: its weights or --dtype are no good")
        row = {"tokens": len(losses), "loss": loss, "perplexity": math.exp(loss)}
        result[side.letter] = row | {"bits_per_byte": ratio(losses.sum().item(), log2_bytes)}
        sums.append(np.bincount(units, losses))
    names, tokens = ("difference", "standard_error"), len(text.units[0]) if text.same_tokens else 0
    for name, nats in zip(names, total_and_error(sums[1] - sums[0], text.sizes), strict=True):
        result[name] = {"loss": ratio(nats, tokens), "bits_per_byte": ratio(nats, log2_bytes)}
    return result


def ratio(value: float | None, per: float) -> float | None:
    return None if value is None or not per else value / per


@torch.inference_mode()
def token_losses(model: GPT, ids: np.ndarray, block_size: int, advance: Callable[[int], Any]) -> np.ndarray:
    """Cross-entropy of every id but the first, nats, in blocks that do not overlap and see nothing before them."""
    device, count = model.lm_head.weight.device, len(ids) - 1
    rows = max(1, LOGITS // (block_size * model.config.vocab_size))
    full = list(range(0, count - block_size + 1, block_size))
    batches = [(full[i : i + rows], block_size) for i in range(0, len(full), rows)]
    if rest := count % block_size:
        batches.append(([count - rest], rest))
    losses = []
    for starts, length in batches:
        x, y = (tensor.to(device) for tensor in sequences(ids, starts, length))
        logits, _ = model(x, y)
        losses.append(F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="none").cpu().double())
        advance(y.numel())
    return torch.cat(losses).numpy()


def total_and_error(differences: np.ndarray, sizes: np.ndarray) -> tuple[float, float | None]:
    """The sum of paired differences between units of these sizes, and its standard error if there are two or more.

    What varies is how far a unit is from its share of the sum: the error of a ratio estimate (Cochran 1977, 6.3).
    """
    count, total = len(sizes), differences.sum()
    deviations = differences - sizes * (total / sizes.sum())
    return float(total), math.sqrt(np.square(deviations).sum() * count / (count - 1)) if count > 1 else None


def continuation(side: Side, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> str:
    """What sample.py writes after a single prompt, by weights of the same dtype."""
    tokenizer, device = side.tokenizer, side.model.lm_head.weight.device
    ids = torch.tensor([tokenizer.encode(prompt) or [tokenizer.eot]], device=device)
    tokens = side.model.stream(
        ids,
        max_new_tokens,
        temperature=temperature,
        stop_tokens=tokenizer.stops,
        vocab_size=tokenizer.drawn,
        generator=torch.Generator(device).manual_seed(seed),
    )
    return tokenizer.decode(tokenizer.before_stop(token.item() for token in tokens), goes_on=True)


# ---- telling


def as_text(report: dict[str, Any]) -> str:
    lines = [f"{x}  {report[x]['name']}: {report[x]['parameters']:,} parameters" for x in COLOURS]
    for result in report["data"]:
        lines += ["", *table(result, report["block_size"])]
    lines += ["", "continuations with temperature {temperature:g} and seed {seed}:".format(**report["sampling"])]
    return "\n".join(lines + [line for _, line in sample_lines(report)])


def table(result: dict[str, Any], block_size: int) -> list[str]:
    """The heading, a row for each model, their difference, and what it is worth."""
    counts = [f"{result[x]['tokens']:,}" for x in COLOURS]
    units = f"{result['units']:,} blocks of {block_size}" if result["same_tokens"] else f"{result['units']:,} documents"
    tokens = f"{counts[0]} tokens" if result["same_tokens"] else f"{' and '.join(counts)} tokens: compare bits per byte"
    size = "unknown" if result["bytes"] is None else f"{result['bytes']:,}"
    lines = [f"{result['dataset']}, held-out text: {size} bytes, {units}, {tokens}"]
    lines.append(f"{'':14} {'loss':>9} {'perplexity':>12} {'bits per byte':>14}")
    for key, label in {"A": "A", "B": "B", "difference": "B - A", "standard_error": "standard error"}.items():
        cells = (("loss", ".4f", 9), ("perplexity", ",.6g", 12), ("bits_per_byte", ".4f", 14))
        row = [(result[key].get(column), form, width) for column, form, width in cells]
        shown = [f"{'-' if value is None else format(value, form):>{width}}" for value, form, width in row]
        lines.append(f"{label:14} {' '.join(shown)}")
    return [*lines, verdict(result)]


def verdict(result: dict[str, Any]) -> str:
    key = "loss" if result["same_tokens"] else "bits_per_byte"
    difference, error = result["difference"][key], result["standard_error"][key]
    if difference == 0:
        return "no difference"
    if not error:
        return "how much of the difference is chance cannot be told from one block or document"
    times = f"the difference is {abs(difference) / error:,.1f} standard errors"
    return f"may be chance: {times}" if abs(difference) < 2 * error else f"{'AB'[difference < 0]} is better: {times}"


def sample_lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(colour, line) of every prompt and its continuations."""
    lines = []
    for sample in report["samples"]:
        lines += [("black", line) for line in ("", *wrapped("prompt: ", sample["prompt"] or "(end of text)"))]
        for letter, colour in COLOURS.items():
            lines += [(colour, line) for line in wrapped(f"     {letter}: ", sample[letter] or "(end of text at once)")]
    return lines


def wrapped(label: str, text: str) -> list[str]:
    """Lines of at most WIDTH characters, the first one after a label; what does not print is shown as U+FFFD."""
    lines = []
    for paragraph in text.strip().splitlines():
        shown = "".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in paragraph.expandtabs(4))
        lines += textwrap.wrap(shown, WIDTH - len(label)) or [""]
    return [(label if i == 0 else " " * len(label)) + line for i, line in enumerate(lines or [""])]


def as_picture(report: dict[str, Any]) -> bytes:
    """A PNG: bits per byte of each dataset and model as bars, or the loss where bytes are unknown; below, the text."""
    import matplotlib  # a third of a second, which no mistake need wait for
    from matplotlib.figure import Figure

    lines = sample_lines(report)[:PICTURE_LINES]
    heights = [3.5, 0.17 * len(lines) + 0.1]
    figure = Figure(figsize=(9, sum(heights) + 0.6), dpi=120, layout="constrained")
    with matplotlib.rc_context({"text.parse_math": False}):  # dollar signs in names and texts are no mathematics
        bars, below = figure.subplots(2, height_ratios=heights)
        draw_bars(bars, report)
        figure.legend(loc="outside upper left", frameon=False)
        below.set(ylim=(-len(lines), 0), xlim=(0, 1))
        below.axis("off")
        for i, (colour, line) in enumerate(lines):
            text = below.text(0, -i, line, color=colour, family="monospace", fontsize=8, verticalalignment="top")
            text.set_in_layout(False)
        return as_png(figure)


def draw_bars(axes: "Axes", report: dict[str, Any]) -> None:
    data = report["data"]
    known = all(result["A"]["bits_per_byte"] is not None for result in data)
    key, label = ("bits_per_byte", "bits per byte") if known else ("loss", "loss (nats per token)")
    for letter, shift in (("A", -0.2), ("B", 0.2)):
        places, heights = [i + shift for i in range(len(data))], [result[letter][key] for result in data]
        name = f"{letter}  {report[letter]['name']}"
        drawn = axes.bar(places, heights, 0.38, color=COLOURS[letter], label=name)
        axes.bar_label(drawn, fmt="%.3f", padding=2)
    errors = [f" \u00b1 {e:.4f}" if (e := result["standard_error"][key]) is not None else "" for result in data]
    changes = [f"{r['dataset']}\nB - A: {r['difference'][key]:+.4f}{e}" for r, e in zip(data, errors, strict=True)]
    axes.set_xticks(range(len(data)), changes)
    axes.set(ylabel=label, xlim=(-0.6, len(data) - 0.4))
    axes.margins(y=0.15)


if __name__ == "__main__":
    script.ready()
    sys.exit(main(ARGUMENTS))
