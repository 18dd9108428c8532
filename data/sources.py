"""Where text comes from: files and the Hugging Face hub. A source is a stream of documents, each a str.

Nothing here reads a whole input: a text file is read line by line, records one by one, the hub as it streams.
"""

import codecs
import glob
import gzip
import io
import itertools
import json
import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import files

TEXT = tuple(kind + packed for kind in (".txt", ".md", ".rst", ".tex") for packed in ("", ".gz"))
RECORDS = (".jsonl", ".jsonl.gz", ".parquet")
UNITS = ("file", "block", "line")
TEXT_COLUMNS = ("text", "abstract", "content", "story", "body")
LONGEST = 4 << 20  # characters; a longer document is cut at the end of a line, so that memory stays bounded


@dataclass(frozen=True)
class Source:
    """A stream of documents, and what meta.json and a reader want to know about it."""

    documents: Iterable[str]
    description: str
    licence: str
    synthetic: bool = False
    total_bytes: int | None = None  # of text; an expectation, where there is one
    vocabulary: Iterable[str] = ()  # further text to train a tokenizer on: what models of it may meet


# ---- files


def from_files(patterns: list[str], split: str | None = None, text_column: str | None = None) -> Source:
    """Text and record files, each named by itself, by its folder (with all that lies below) or by a glob.

    A row of .jsonl or .parquet is a document. In text files `split` says what is one: "file", "line", or "block", the
    lines between two blank ones; by default a file is one if there are several, and a block if there is one file.
    Raises FileNotFoundError or ValueError: at once for names, while streaming for what is wrong in a file.
    """
    if not patterns or not all(patterns):  # an empty one would be the folder that one happens to be in
        raise ValueError("--source files needs --files PATH ..." + (", and one is empty" if patterns else ""))
    if split not in (None, *UNITS):
        raise ValueError(f"--split {split} must be one of {', '.join(UNITS)}")
    paths, others = find_files(patterns)
    text = [path for path in paths if ending(path) in TEXT]
    if split and not text:
        raise ValueError(f"--split {split} is for text files; in {paths[0]} every row is a document")
    if text_column and len(text) == len(paths):
        raise ValueError(f"--text_column {text_column} is for .jsonl and .parquet; {paths[0]} has no columns")
    split = split or ("file" if len(text) > 1 else "block")
    plain = all(path.suffix.lower() not in (".gz", ".parquet") for path in paths)
    more = f" and {len(patterns) - 3} more" if patterns[3:] else ""
    kinds = ", ".join(sorted({path.suffix or path.name for path in others})[:9])
    left_out = f", {len(others):,} of other kinds left out: {kinds}" if others else ""
    return Source(
        documents=(document for path in paths for document in read_file(path, split, text_column)),
        description=f"files: {', '.join(patterns[:3])}{more} ({len(paths):,} read{left_out})",
        licence="not stated: the user's own files",
        total_bytes=sum(path.stat().st_size for path in paths) if plain else None,
    )


def find_files(patterns: list[str]) -> tuple[list[Path], set[Path]]:
    """The files that `patterns` name, each once, in sorted order, and those that are of no kind we can read. Raises for
    a pattern that names none that can be read."""
    readable = " ".join(TEXT + RECORDS)
    found, others = {}, set()
    for pattern in patterns:
        path = files.expanded(pattern)
        named = [path] if path.exists() else map(Path, glob.glob(str(path), recursive=True))
        matches = [match for match in (path.rglob("*") if path.is_dir() else named) if match.is_file()]
        if not matches:
            raise FileNotFoundError(f"{pattern}: no such file, no match, or an empty folder")
        known = [match for match in matches if ending(match)]
        if not known:
            raise ValueError(f"{pattern} cannot be read: of files, those count whose names end in {readable}")
        found |= {match.resolve(): match for match in known}
        others |= set(matches) - set(known)
    return sorted(found.values()), others


def ending(path: Path) -> str | None:
    """Which of TEXT and RECORDS the name ends in."""
    return next((known for known in TEXT + RECORDS if path.name.lower().endswith(known)), None)


def read_file(path: Path, split: str, text_column: str | None = None) -> Iterator[str]:
    """The documents of one file. Raises ValueError, with the place, where the content is not what the name promises."""
    if ending(path) == ".parquet":
        yield from _read_parquet(path, text_column)
        return
    try:
        with io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig") as file:
            if ending(path) in RECORDS:
                yield from _read_jsonl(path, file, text_column)
            else:
                yield from split_text(file, split)
    except UnicodeDecodeError:
        raise ValueError(_encoding_error(path)) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged, or not gzip: {error}") from None


def _open_bytes(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def split_text(file: IO[str], split: str) -> Iterator[str]:
    """Cut a stream of text into documents: per "file", per "line", or per "block" of lines between blank ones."""
    held, size = [], 0
    for line in iter(partial(file.readline, LONGEST), ""):
        between = split == "block" and line.isspace()
        if not between:
            held.append(line)
            size += len(line)
        if between or split == "line" or size >= LONGEST:
            yield "".join(held).strip("\n")
            held, size = [], 0
    yield "".join(held).strip("\n")


def _read_jsonl(path: Path, lines: Iterable[str], column: str | None) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.isspace():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            yield text_of(record, column, f"{path}, line {number}")


def _read_parquet(path: Path, column: str | None) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path}: reading .parquet needs pyarrow (pip install pyarrow)") from None
    try:
        with parquet.ParquetFile(path) as file:
            column = pick_column(file.schema_arrow.names, column, str(path))
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for record in batch.to_pylist():
                    yield text_of(record, column, str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, column {column}: not UTF-8 ({error})") from None
    except ArrowException as error:
        raise ValueError(f"{path} is damaged, or not parquet: {error}") from None


def pick_column(names: Iterable[str], wanted: str | None, where: str) -> str:
    """`wanted` if it is among `names`; where nothing is wanted, the first of TEXT_COLUMNS that is."""
    names = list(names)
    column = next((name for name in ([wanted] if wanted else TEXT_COLUMNS) if name in names), None)
    if column is None:
        missing = f"no column {wanted!r}" if wanted else f"none of the columns {', '.join(TEXT_COLUMNS)}"
        raise ValueError(f"{where}: {missing}, but {', '.join(names)}: choose one with --text_column")
    return column


def text_of(record: Any, column: str | None, where: str) -> str:
    """The text of a record, which is a str, or a dict with a column of str; null is the empty text."""
    if isinstance(record, dict):
        column = pick_column(record, column, where)
        record = record[column]
    if not isinstance(record, str | None):
        place = f"column {column!r}" if column else "the record"
        raise ValueError(f"{where}: {place} is no text but {type(record).__name__}")
    return record or ""


def _encoding_error(path: Path) -> str:
    """Say where the first byte is that is not UTF-8; a text stream itself knows only the place within its buffer."""
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    with _open_bytes(path) as file:
        if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return f"{path} is UTF-16: convert it (iconv -f utf-16 -t utf-8, say) or leave it out"
        while data := file.read(1 << 20):
            carried = len(decoder.getstate()[0])  # bytes of a character that began in the previous data
            try:
                decoder.decode(data)
            except UnicodeDecodeError as error:
                return (
                    f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
                    f"{start - carried + error.start}; convert it (iconv -f latin1 -t utf-8, say) or leave it out"
                )
            start += len(data)
    return f"{path} is not UTF-8: it ends in the middle of a character"


# ---- the hub


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hugging Face hub, and how many of its documents are taken unless more are asked for."""

    id: str
    column: str | None
    licence: str
    num_samples: int  # 0: all
    mean_bytes: int = 0  # of a document, for the progress bar
    config: str | None = None
    split: str = "train"  # or several: "train+test"


class Unreachable(ValueError):
    """The hub was asked for a dataset and did not answer, or not as hoped."""


def from_hub(dataset: HubDataset, num_samples: int, patience: float) -> Source:
    """Stream a dataset, its first document at once.

    Raises Unreachable if the hub does not answer within `patience` seconds, and ValueError for what goes wrong later.
    """
    if not find_spec("datasets"):
        raise ValueError("the package datasets is not installed")
    _ask_hub(dataset.id, patience)
    documents = (text_of(row, dataset.column, dataset.id) for row in _rows(dataset))
    first = list(itertools.islice(documents, 1))
    return Source(
        documents=itertools.chain(first, documents),
        description=f"https://huggingface.co/datasets/{dataset.id}, split {dataset.split}",
        licence=dataset.licence,
        total_bytes=num_samples * dataset.mean_bytes or None,
    )


def _ask_hub(dataset_id: str, patience: float) -> None:
    """Raise Unreachable unless the hub answers for this dataset.

    It is asked in a thread that is left behind if need be: looking up a host name has no time limit of its own.
    """
    from huggingface_hub import HfApi

    problems = []

    def ask():
        try:
            HfApi().dataset_info(dataset_id, timeout=patience)
        except Exception as error:  # no name, no route, a proxy, offline mode, no such dataset: its own words are best
            problems.append(_brief(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    if thread.is_alive():
        raise Unreachable(f"the hub did not answer within {patience:g} seconds")
    if problems:
        raise Unreachable(f"the hub did not give {dataset_id}: {problems[0]}")


def _rows(dataset: HubDataset) -> Iterator[dict]:
    import datasets

    try:
        for split in dataset.split.split("+"):
            yield from datasets.load_dataset(dataset.id, dataset.config, split=split, streaming=True)
    except Exception as error:  # many libraries are at work below, each with its own errors
        raise ValueError(f"the hub did not give {dataset.id}: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
