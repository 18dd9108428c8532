"""From text to token files: our prepare.py beside `datasets.Dataset.map` and the writing that nanoGPT does.

    python bench/data_speed.py
    python bench/data_speed.py --files papers/ --megabytes 200 --rounds 5 --json result.json

Every contender starts from the same text in a .jsonl file, ends with the same train.bin and val.bin, which is checked,
and has GPT-2's tokenizer and all cores. Each turn is a process of its own, with empty caches of its own; they take
turns. bench/README.md says what is timed.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from string import ascii_lowercase
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, so that this runs from anywhere

import numpy as np

from bench.speed import chosen, machine, spread
from data.docstrings import from_docstrings
from data.format import SPLITS, sha256_of
from data.preparation import Recipe, parse, prepare
from data.sources import HubDataset, from_files
from data.tokens import assign_splits
from files import write_atomic
from tokenizer import EOT, Tokenizer, gpt2

VAL_FRACTION = 0.05
SHARD = 8000  # documents written at a time; nanoGPT writes its eight million in 1,024 shards


class Corpus(NamedTuple):
    """What all contenders start from."""

    folder: Path  # all.jsonl; train.jsonl and val.jsonl, the same documents as prepare.py shares them out
    bytes: int
    tokenizer: Path


# ---- the text


def varied(documents: Iterable[str], size: int) -> Iterator[str]:
    """`size` bytes of text: the documents again and again, each time with two more letters at a word in ten.

    Verbatim copies would measure how well a tokenizer remembers words.
    """
    draw, documents = random.Random(0), list(documents)
    if not any(map(str.strip, documents)):
        raise ValueError("there is no text to repeat")
    for document in itertools.cycle(documents):
        words = document.split(" ")
        for i in draw.sample(range(len(words)), -(-len(words) // 10)):
            words[i] += draw.choice(ascii_lowercase) + draw.choice("aeiou")
        text = " ".join(words)
        yield text
        size -= len(text.encode())
        if size <= 0:
            return


def write_corpus(folder: Path, documents: Iterable[str], size: int, tokenizer: Tokenizer) -> Corpus:
    documents, total = list(varied(documents, size)), 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.jsonl", "w")) for name in ("all", *SPLITS)}
        files["all"].writelines(json.dumps({"text": text}) + "\n" for text in documents)
        for split, text, length in assign_splits(documents, VAL_FRACTION):
            files[split].write(json.dumps({"text": text}) + "\n")
            total += length
    tokenizer.save(folder / "tokenizer.json")
    return Corpus(folder, total, folder / "tokenizer.json")


# ---- the contenders: each writes out/train.bin and out/val.bin, and returns the seconds that took


def ours(corpus: Corpus, out: Path) -> float:
    """All that `python data/NAME/prepare.py --files all.jsonl` does: reading and meta.json too."""
    recipe = Recipe(corpus.folder, "", HubDataset("", None, "", None), val_fraction=VAL_FRACTION)
    options = ["--files", str(corpus.folder / "all.jsonl"), "--tokenizer", str(corpus.tokenizer), "--out_dir", str(out)]
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(recipe, parse(recipe, options))
    return time.perf_counter() - start


def transformers_batched(corpus: Corpus, out: Path) -> float:
    """Dataset.map over batches of a thousand, with Transformers' fast tokenizer."""
    from transformers import PreTrainedTokenizerFast

    def encode(batch: dict[str, list]) -> dict[str, list]:
        ids = [[*ids, eot] for ids in tokenizer(batch["text"])["input_ids"]]
        return {"ids": ids, "len": list(map(len, ids))}

    dataset, start = opened(corpus), time.perf_counter()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(corpus.tokenizer))
    eot = tokenizer.convert_tokens_to_ids(EOT)
    mapped(dataset, encode, out, batched=True)
    return time.perf_counter() - start


def nanogpt(corpus: Corpus, out: Path) -> float:
    """Dataset.map over single documents, with tiktoken, as in nanoGPT's data/openwebtext/prepare.py."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    def encode(example: dict[str, str]) -> dict[str, Any]:
        ids = [*encoding.encode_ordinary(example["text"]), encoding.eot_token]
        return {"ids": ids, "len": len(ids)}

    dataset, known = opened(corpus), Tokenizer.load(corpus.tokenizer)
    ranks = {known.decode_bytes([rank]): rank for rank in range(known.eot)}
    start = time.perf_counter()
    encoding = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={EOT: known.eot})
    mapped(dataset, encode, out)
    return time.perf_counter() - start


def opened(corpus: Corpus) -> Any:
    """The corpus as `datasets` keeps it. Reading it is not in its contenders' times."""
    import datasets

    datasets.disable_progress_bars()
    files = {split: str(corpus.folder / f"{split}.jsonl") for split in SPLITS}
    return datasets.load_dataset("json", data_files=files)


def mapped(dataset: Any, encode: Callable, out: Path, **options: Any) -> None:
    tokenized = dataset.map(encode, remove_columns=["text"], num_proc=os.cpu_count(), **options)
    for split, part in tokenized.items():
        ids = np.memmap(out / f"{split}.bin", dtype=np.uint16, mode="w+", shape=(sum(part[:]["len"]),))
        shards, position = len(part) // SHARD + 1, 0
        for i in range(shards):
            shard = part.shard(num_shards=shards, index=i, contiguous=True).with_format("numpy")
            written = np.concatenate(shard[:]["ids"])  # shard["ids"], as nanoGPT has it, goes row by row by now
            ids[position : position + len(written)] = written
            position += len(written)
        ids.flush()


class Contender(NamedTuple):
    packages: tuple[str, ...]
    write: Callable[[Corpus, Path], float]


CONTENDERS = {
    "datasets": Contender(("datasets", "transformers"), transformers_batched),
    "nanogpt": Contender(("datasets",), nanogpt),
    "ours": Contender((), ours),
}


# ---- turns


def turn(name: str, corpus: Corpus) -> dict[str, Any]:
    """In a process of its own: what one contender needed, and what it wrote."""
    with tempfile.TemporaryDirectory(dir=corpus.folder) as folder:
        out = Path(folder, "out")
        out.mkdir()
        # Read when these libraries are imported, which they are below. A worker of `map` has one core.
        os.environ |= (
            {"HF_HOME": folder, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} if name != "ours" else {}
        )
        seconds = CONTENDERS[name].write(corpus, out)
        return {"seconds": seconds, "sha256": {split: sha256_of(out / f"{split}.bin") for split in SPLITS}}


def take_turns(names: list[str], corpus: Corpus, rounds: int) -> dict[str, list[dict[str, Any]]]:
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name in names * rounds:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            turns[name].append(pool.submit(turn, name, corpus).result())
        print(f"{name}: {corpus.bytes / 1e6 / turns[name][-1]['seconds']:.1f} MB/s", flush=True)
    return turns


def summarize(turns: dict[str, list[dict[str, Any]]], size: int) -> list[dict[str, Any]]:
    """A row for each contender. A ratio compares two turns of one round, which met the same machine."""
    seconds = {name: [turn["seconds"] for turn in own] for name, own in turns.items()}
    base, rows = next(iter(seconds.values())), []
    for name, own in seconds.items():
        speeds, ratios = [size / 1e6 / s for s in own], [b / s for b, s in zip(base, own, strict=True)]
        row = {"contender": name, "megabytes_per_second": spread(speeds), "ratio": spread(ratios)}
        rows.append(row | {"turns": turns[name]})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| contender | MB/s | min - max | ratio | min - max |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        (speed, slow, fast), (ratio, low, high) = row["megabytes_per_second"].values(), row["ratio"].values()
        lines.append(
            f"| {row['contender']} | {speed:.1f} | {slow:.1f} - {fast:.1f} | {ratio:.2f} | {low:.2f} - {high:.2f} |"
        )
    return "\n".join(lines)


def check_same(turns: dict[str, list[dict[str, Any]]]) -> None:
    """Raises ValueError where two turns wrote different token files."""
    written = {name: {json.dumps(turn["sha256"]) for turn in own} for name, own in turns.items()}
    if len(set().union(*written.values())) > 1:
        found = "; ".join(f"{name}: {', '.join(sorted(own))}" for name, own in written.items())
        raise ValueError(f"the contenders do not write the same tokens, so their speeds mean nothing: {found}")


def bench(options: argparse.Namespace) -> None:
    """Run and print it all. Raises ValueError for bad options, and for contenders that do not write the same."""
    names = chosen(CONTENDERS, options.contenders)
    if options.rounds < 1 or options.megabytes <= 0:
        raise ValueError(f"--rounds {options.rounds} and --megabytes {options.megabytes:g}: both must be above 0")
    source = from_files(options.files) if options.files else from_docstrings()
    packages = ["tiktoken", "tokenizers", *CONTENDERS["datasets"].packages]
    facts = machine() | {name: version(name) for name in packages if importlib.util.find_spec(name)}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder), source.documents, round(options.megabytes * 1e6), gpt2())
        print(f"{corpus.bytes / 1e6:,.1f} MB of text from {source.description}, varied; {options.rounds} rounds")
        turns = take_turns(names, corpus, options.rounds)
    rows = summarize(turns, corpus.bytes)
    print(f"\n{table(rows)}")
    if options.json:
        text = {"source": source.description, "bytes": corpus.bytes}
        write_atomic(
            Path(options.json), json.dumps({"machine": facts, "text": text, "contenders": rows}, indent=1).encode()
        )
    check_same(turns)
    if len(rows) > 1:
        print("\nall wrote the same token files")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", metavar="PATH", help="as for prepare.py (default: its docstrings)")
    parser.add_argument("--megabytes", type=float, default=50, help="of text, made of the files by repetition (50)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (5)")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="ratios are to the first (%(default)s)")
    parser.add_argument("--json", help="file for the raw numbers")
    try:
        bench(parser.parse_args())
        return 0
    except (ValueError, OSError, BrokenProcessPool) as error:
        print(f"data_speed.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
