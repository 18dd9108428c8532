"""The command line that the prepare.py scripts share: pick a source, pick a tokenizer, write, say what was made."""

import argparse
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import files
import script
from data.format import FILES, SPLITS
from data.sources import UNITS, HubDataset, Source, Unreachable, from_files, from_hub
from data.tokens import write_dataset
from tokenizer import Tokenizer, gpt2, train_bpe

HUB_SECONDS = 2.5  # to wait for the hub; GPT-2's ranks, which may take five, are not asked for where it did not answer
SAMPLE_CHARACTERS = 32 << 20  # of the corpus, from its beginning, are held in memory to train a tokenizer on
GPT2_VOCAB_SIZE = 50257
FILE_OPTIONS = ("files", "split", "text_column")
HUB_OPTIONS = ("hub_dataset", "hub_config", "hub_split", "text_column")


@dataclass(frozen=True)
class Recipe:
    """What is particular to one dataset. The dataset is named after the folder it is written to."""

    folder: Path
    about: str
    hub: HubDataset
    offline: tuple[str, Callable[[], Source]] | None = None  # name and maker of a source that needs no network
    reshape: dict[str, Callable[[Iterable[str]], Iterable[str]]] = field(default_factory=dict)  # by source
    val_fraction: float = 0.05


def main(recipe: Recipe) -> NoReturn:
    """Run a prepare.py, and end with its exit code."""
    script.forgive_stdout()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unlike the default, this removes temporary files
    sys.exit(script.run("prepare.py", lambda: prepare(recipe, parse(recipe)), "nothing was changed"))


def parse(recipe: Recipe, arguments: list[str] | None = None) -> argparse.Namespace:
    command, hub = f"python data/{recipe.folder.name}/prepare.py", recipe.hub
    offline = [recipe.offline[0]] if recipe.offline else []
    parser = argparse.ArgumentParser(
        description=recipe.about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"""examples:
  {command}
      with what can be had: this is what train.py runs when the dataset is missing
  {command} --files papers/ 'more/*.jsonl.gz'
      with text of your own
  {command} --source hub --num_samples 500000
      with as many documents as you like; they are streamed
  {command} --tokenizer models/NAME
      for going on with a model that exists""",
    )
    auto = f"auto: files if --files is given, else hub if it answers, else {offline[0] if offline else 'an error'}"
    several = "what of a text file is a document; block: between blank lines (default for one file, of several: file)"
    several += "; without this, blocks are joined to passages here" if "files" in recipe.reshape else ""
    count = f"at most N documents, 0 for all (default: {hub.num_samples or 'all'} from the hub, all from elsewhere)"
    origin = "auto: gpt2 if its ranks can be had, else train, a BPE of this corpus; PATH: a model's folder, a "
    origin += "tokenizer.json or the ranks"

    add = parser.add_argument_group("source").add_argument
    add("--source", choices=["auto", "hub", *offline, "files"], default="auto", help=auto)
    add("--files", nargs="+", metavar="PATH", help=".txt .md .rst .tex .jsonl .parquet, also .gz; folders; globs")
    add("--split", choices=UNITS, help=several)
    add("--text_column", metavar="NAME", help="of .jsonl, .parquet, hub (default: text, abstract, content or the like)")
    add("--num_samples", metavar="N", type=int, help=count)
    add("--hub_dataset", metavar="ID", help=f"default: {hub.id}")
    add("--hub_config", metavar="NAME", help="configuration of the hub dataset (default: its own default)")
    add("--hub_split", metavar="NAME", help=f"default: {hub.split}")
    add = parser.add_argument_group("tokens").add_argument
    add("--tokenizer", metavar="auto|gpt2|train|PATH", default="auto", help=origin)
    add("--vocab_size", metavar="N", type=int, help=f"entries of a trained BPE (default: {GPT2_VOCAB_SIZE})")
    held_out = "share of documents that is held out (default: %(default)s)"
    add("--val_fraction", metavar="F", type=float, default=recipe.val_fraction, help=held_out)
    add(
        "--out_dir",
        metavar="DIR",
        type=files.expanded,
        default=recipe.folder,
        help="default: the folder of this script",
    )
    return parser.parse_args(arguments)


def prepare(recipe: Recipe, args: argparse.Namespace) -> None:
    """Make the dataset that the arguments ask for, and say on the way what is done and why."""
    if args.vocab_size is not None and args.vocab_size < 1:
        raise ValueError(f"--vocab_size {args.vocab_size} must be at least 1")
    started = time.monotonic()
    source, reason, offline = choose_source(recipe, args)
    print(f"source     {source.description}\n           ({reason})", flush=True)
    name = args.out_dir.resolve().name + "-synthetic" * source.synthetic
    tokenizer, reason = choose_tokenizer(args.tokenizer, args.vocab_size, download=not offline)
    print(f"tokenizer  {tokenizer.name if tokenizer else 'BPE of this corpus'} ({reason})", flush=True)
    documents = iter(source.documents)
    if not tokenizer:
        size = args.vocab_size or GPT2_VOCAB_SIZE
        tokenizer, documents = train_tokenizer(documents, f"{name}-bpe", size, source.vocabulary)
    meta = write_dataset(
        args.out_dir,
        documents,
        tokenizer,
        name=name,
        source=source.description,
        licence=source.licence,
        synthetic=source.synthetic,
        val_fraction=args.val_fraction,
        total_hint=source.total_bytes,
    )
    print(summary(args.out_dir, meta, time.monotonic() - started, args.vocab_size))


# ---- source


def choose_source(recipe: Recipe, args: argparse.Namespace) -> tuple[Source, str, bool]:
    """The source that the arguments ask for, in words why it is this one, and whether the hub did not answer."""
    kind, reason = args.source, "as asked"
    if kind == "auto" and args.files:
        kind, reason = "files", "--files is given"
    elif kind == "auto" and any(getattr(args, option) is not None for option in HUB_OPTIONS):
        kind, reason = "hub", "its options are given"
    _refuse_foreign_options(kind, args)
    offline = False
    if kind in ("auto", "hub"):
        try:
            source = _hub_source(recipe.hub, args)
            kind, reason = "hub", "the hub answers" if kind == "auto" else reason
        except ValueError as error:
            if kind == "hub" or not recipe.offline:
                raise ValueError(f"{error}; with text of your own it goes without: --files PATH ...") from error
            kind, reason, offline = recipe.offline[0], f"because {error}", isinstance(error, Unreachable)
    if kind == "files":
        source = from_files(args.files or [], args.split, args.text_column)
    elif kind != "hub":
        source = recipe.offline[1]()
    documents, count = source.documents, args.num_samples
    if kind in recipe.reshape and not (args.split or args.hub_dataset):  # made for what comes without these options
        documents = recipe.reshape[kind](documents)
    if kind == "hub" and count is None:
        count = recipe.hub.num_samples
    if count:
        expected = source.total_bytes if kind == "hub" else None  # the others know only the size of all they have
        source = replace(source, total_bytes=expected)
    return replace(source, documents=itertools.islice(documents, count or None)), reason, offline


def _refuse_foreign_options(kind: str, args: argparse.Namespace) -> None:
    if args.num_samples is not None and args.num_samples < 0:
        raise ValueError(f"--num_samples is {args.num_samples}; it must be a number of documents, or 0 for all")
    own = {"files": FILE_OPTIONS, "hub": HUB_OPTIONS}.get(kind, ())
    for option in (*FILE_OPTIONS, *HUB_OPTIONS):
        if getattr(args, option) is not None and option not in own:
            raise ValueError(f"--{option} means nothing with --source {kind}")


def _hub_source(hub: HubDataset, args: argparse.Namespace) -> Source:
    """The recipe's hub dataset, or the one that the arguments name. Raises ValueError if it cannot be had."""
    if args.hub_dataset and args.hub_dataset != hub.id:  # of another dataset we know neither column nor licence
        hub = HubDataset(args.hub_dataset, column=None, licence="as stated on its page", num_samples=hub.num_samples)
    changes = {"column": args.text_column, "config": args.hub_config, "split": args.hub_split}
    hub = replace(hub, **{key: value for key, value in changes.items() if value is not None})
    return from_hub(hub, hub.num_samples if args.num_samples is None else args.num_samples, HUB_SECONDS)


# ---- tokenizer


def choose_tokenizer(spec: str, vocab_size: int | None, download: bool) -> tuple[Tokenizer | None, str]:
    """The tokenizer, or None for one trained on the corpus, and in words why it is this one.

    Raises FileNotFoundError, naming every place tried, if GPT-2's ranks are demanded and cannot be had.
    """
    if spec == "train":
        return None, "as asked"
    if spec == "auto" and vocab_size:
        return None, f"because --vocab_size {vocab_size} is given"
    if spec == "auto":
        try:
            return gpt2(download=download), "its ranks could be had"
        except FileNotFoundError:
            missing = "not on this machine" + (" and could not be downloaded" if download else "")
            return None, f"because GPT-2's ranks are {missing}; --tokenizer gpt2 says where they were looked for"
    stored = spec.endswith(".json") or (spec != "gpt2" and files.expanded(spec).is_dir())
    tokenizer = Tokenizer.load(spec) if stored else gpt2(ranks=None if spec == "gpt2" else spec)
    if vocab_size and vocab_size != tokenizer.vocab_size:
        raise ValueError(f"--vocab_size is {vocab_size}, and --tokenizer {spec} has {tokenizer.vocab_size} entries")
    return tokenizer, "as asked"


def train_tokenizer(
    documents: Iterator[str], name: str, vocab_size: int, more: Iterable[str] = ()
) -> tuple[Tokenizer, Iterator[str]]:
    """A BPE of `more` and the beginning of a stream, and the whole stream again, which can be read only once."""
    sample, size = [], 0
    for text in documents:
        sample.append(text)
        size += len(text)
        if size >= SAMPLE_CHARACTERS:
            break
    if not size:
        raise ValueError("the source gives no text")
    return train_bpe(itertools.chain(sample, more), name, vocab_size), itertools.chain(sample, documents)


# ---- summary


def summary(directory: Path, meta: dict, seconds: float, vocab_size: int | None = None) -> str:
    """What a dataset is, for people."""
    made_up = " (SYNTHETIC: made up by a program)" if meta["synthetic"] else ""
    lines = [f"dataset    {meta['name']}{made_up}; licence: {meta['licence']}"]
    for split in SPLITS:
        counts = meta[split]
        ratio = counts["bytes"] / counts["tokens"]
        lines.append(
            f"  {split:<8} {counts['documents']:>11,} documents {counts['tokens']:>14,} tokens of {ratio:.2f} bytes"
        )
    vocabulary = f"{meta['tokenizer']['name']} with {meta['vocab_size']:,} entries, ids as {meta['dtype']}"
    if vocab_size and meta["vocab_size"] < vocab_size:
        vocabulary += f"; the text has no more pairs for the {vocab_size:,} asked for"
    sizes = ", ".join(f"{file} {(directory / file).stat().st_size / 1e6:,.2f} MB" for file in FILES)
    return "\n".join(
        [*lines, f"tokens     {vocabulary}", f"files      {directory}: {sizes}", f"time       {seconds:.1f} s"]
    )
