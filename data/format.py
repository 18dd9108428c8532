"""What a dataset folder looks like on disk, and every check of one that is there.

    train.bin, val.bin   token ids, raw little-endian, one document after another, each followed by end-of-text. uint16
                         where the vocabulary has at most 65,536 entries, else uint32. The format is nanoGPT's: its
                         files can be read here, and our uint16 ones there.
    tokenizer.json       the tokenizer that made the ids
    meta.json            name, source, licence, counts, dtype and hashes, as `write_dataset` gathers them. It comes
                         last: in a folder with a tokenizer.json but no meta.json the writing was interrupted.
    NAME-1a2b3c4d/       the same documents in the tokens of the tokenizer NAME: a dataset folder like this one, whose
                         meta.json names the fingerprint of the tokens it was derived from

A check raises one sentence: what is wrong, where, the numbers, and what to do about it.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from tokenizer import Tokenizer

SPLITS = ("train", "val")
TOKENIZER = "tokenizer.json"
META = "meta.json"
FILES = (TOKENIZER, "train.bin", "val.bin", META)  # in the order in which they are put in place
SCAN_IDS = 4 << 20  # ids read at a time when a file is checked


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrower of the two dtypes if it holds every id of the vocabulary."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def dtype_of(meta: dict) -> np.dtype:
    """The dtype of token files with this meta.json; uint16 for a nanoGPT folder, which has none."""
    return np.dtype(meta.get("dtype", "uint16")).newbyteorder("<")


def find_problems(
    directory: Path, block_size: int | None = None, vocab_size: int | None = None, hashes: bool = False
) -> Iterator[Exception]:
    """The first thing that is wrong with each part of a dataset, as the exception that its check raises."""
    try:
        meta = read_meta(directory)
    except (OSError, ValueError) as problem:
        yield problem
        return
    checks = [partial(_check_tokens, directory, meta, split, block_size, vocab_size, hashes) for split in SPLITS]
    if meta:
        checks.append(partial(_check_tokenizer, directory, meta))
    for check in checks:
        try:
            check()
        except (OSError, ValueError) as problem:
            yield problem


def read_meta(directory: Path) -> dict:
    """The content of meta.json, checked to be what `write_dataset` writes; empty for a nanoGPT folder."""
    path, remedy = directory / META, _remedy(directory)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if not directory.is_dir():
            raise FileNotFoundError(f"there is no dataset folder {directory}{remedy}") from None
        if (directory / TOKENIZER).exists():
            raise ValueError(f"the preparation of {directory} was interrupted: {META} is missing{remedy}") from None
        if not remedy and not any((directory / f"{split}.bin").exists() for split in SPLITS):
            raise FileNotFoundError(f"{directory} is no dataset: {META} and train.bin are missing") from None
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error}){remedy}") from None
    text = ["name", "dtype", "tokenizer.name", "tokenizer.fingerprint", "train.sha256", "val.sha256"]
    counts = [f"{split}.{key}" for split in SPLITS for key in ("documents", "tokens", "bytes", "max_id", "size")]
    kinds = dict.fromkeys(text, str) | dict.fromkeys(["vocab_size", "eot", *counts], int)
    for key, kind in kinds.items():
        value = meta
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise ValueError(f"{path} is damaged: {key} is {value!r}, not {kind.__name__}{remedy}")
    if meta["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"{path} is damaged: dtype is {meta['dtype']!r}, not uint16 or uint32{remedy}")
    return meta


def _remedy(directory: Path) -> str:
    script = directory / "prepare.py"
    return f"; prepare it with: python {script}" if script.is_file() else ""


def _check_tokenizer(directory: Path, meta: dict) -> None:
    path, expected = directory / TOKENIZER, meta["tokenizer"]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing{_remedy(directory)}")
    stat = path.stat()
    name, fingerprint = _identity(path, stat.st_size, stat.st_mtime_ns)
    if fingerprint != expected["fingerprint"]:
        raise ValueError(
            f"{path} is {name!r} ({fingerprint[:12]}), but the tokens were made with {expected['name']!r} "
            f"({expected['fingerprint'][:12]}), as {META} says{_remedy(directory)}"
        )


@lru_cache(maxsize=16)
def _identity(path: Path, size: int, mtime_ns: int) -> tuple[str, str]:
    """Name and fingerprint of a tokenizer. The key is as that of `_max_id`."""
    tokenizer = Tokenizer.load(path)
    return tokenizer.name, tokenizer.fingerprint


def _check_tokens(
    directory: Path, meta: dict, split: str, block_size: int | None, vocab_size: int | None, hashes: bool
) -> None:
    path, remedy = directory / f"{split}.bin", _remedy(directory)
    tokens = _check_size(path, meta, meta.get(split), remedy)
    if hashes and meta and (found := sha256_of(path)) != (expected := meta[split]["sha256"]):
        raise ValueError(f"{path} is damaged: its sha256 is {found[:12]}, and {META} says {expected[:12]}{remedy}")
    if block_size is not None and tokens <= block_size:
        raise ValueError(
            f"{path} has {tokens:,} tokens, and block_size {block_size:,} needs {block_size + 1:,}: choose a smaller "
            "block_size, or prepare more text or another --val_fraction"
        )
    _check_ids(path, meta, vocab_size, remedy)


def _check_size(path: Path, meta: dict, entry: dict | None, remedy: str) -> int:
    """The number of tokens, of which there must be as many as `entry`, this split's in meta.json, says."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing{remedy}")
    size, dtype = path.stat().st_size, dtype_of(meta)
    if size == 0:
        raise ValueError(f"{path} is empty{remedy}")
    if size % dtype.itemsize:
        raise ValueError(f"{path} is damaged: {size:,} bytes are no whole number of {dtype.name} tokens{remedy}")
    tokens = size // dtype.itemsize
    if entry and (size, tokens) != (entry["size"], entry["tokens"]):
        raise ValueError(
            f"{path} has {size:,} bytes, {tokens:,} tokens as {dtype.name}, and {META} says {entry['size']:,} and "
            f"{entry['tokens']:,}: it is truncated or from another preparation{remedy}"
        )
    return tokens


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_ids(path: Path, meta: dict, vocab_size: int | None, remedy: str) -> None:
    """Compare the highest id with the dataset's vocabulary, where it has one, and with the model's."""
    if vocab_size and vocab_size > 1 << 16 and not meta:
        raise ValueError(
            f"{path} has no {META}, and uint16 is too narrow for the model's vocab_size "
            f"{vocab_size:,}: prepare the dataset with a prepare.py"
        )
    stat = path.stat()
    highest = _max_id(path, dtype_of(meta), stat.st_size, stat.st_mtime_ns)
    if meta and highest >= meta["vocab_size"]:
        raise ValueError(
            f"{path} is damaged: it has id {highest:,}, and {META} says vocab_size {meta['vocab_size']:,}{remedy}"
        )
    if vocab_size and highest >= vocab_size:
        raise ValueError(
            f"{path} has id {highest:,}, outside the model's vocab_size {vocab_size:,}: choose the model for the "
            "dataset's tokenizer, or prepare the dataset with the model's (--tokenizer)"
        )


@lru_cache(maxsize=16)
def _max_id(path: Path, dtype: np.dtype, size: int, mtime_ns: int) -> int:
    """The highest id in a token file. Size and time are part of the key: a second look at an unchanged file is free."""
    highest = -1
    with path.open("rb") as file:
        while (ids := np.fromfile(file, dtype, SCAN_IDS)).size:
            highest = max(highest, int(ids.max()))
    return highest
