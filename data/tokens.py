"""Datasets of tokens: the one writer and the one reader of what train.py trains on. Their format is in data/format.py.

A dataset keeps the tokens that it was made with. What a model with another tokenizer needs is derived from them, by
`retokenize`, in a subfolder that can be thrown away.

A plain `ids.astype(np.uint16)` turns id 70,000 into 4,464 without a word, so ids are checked against the vocabulary
before they are cast, and again when a dataset is opened.
"""

import hashlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import files
from data.format import (
    FILES,
    META,
    SCAN_IDS,
    SPLITS,
    TOKENIZER,
    dtype_of,
    find_problems,
    read_meta,
    sha256_of,
    token_dtype,
)
from model_directory import CONFIG, HF_WEIGHTS, WEIGHTS
from tokenizer import Tokenizer

CHUNK_BYTES = 1 << 20  # text that a thread encodes at a time; a few for every core are the bound on memory


# ---- writing


def write_dataset(
    directory: str | Path,
    documents: Iterable[str],
    tokenizer: Tokenizer,
    *,
    name: str,
    source: str,
    licence: str,
    synthetic: bool = False,
    val_fraction: float = 0.05,
    total_hint: int | None = None,
) -> dict:
    """Encode `documents` into the dataset folder `directory`, replacing what is there; return the new meta.json.

    Streams: memory does not grow with the input, and what was in the folder before stays whole until the last moment.
    `total_hint` is the expected number of bytes of text, for the progress bar and for the check of the free disk.
    Raises ValueError for ids outside the vocabulary and for fewer than two documents, OSError for a disk that is full.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; it must lie between 0 and 1")
    about = {"name": name, "source": source, "licence": licence, "synthetic": synthetic}
    return _write(Path(directory), assign_splits(documents, val_fraction), tokenizer, about, total_hint)


def _write(
    directory: Path,
    assigned: Iterator[tuple[str, str, int]],
    tokenizer: Tokenizer,
    about: dict,
    total_hint: int | None,
) -> dict:
    """`write_dataset` for documents that know their split. An error of the stream, at its end too, undoes all of it."""
    dtype = token_dtype(tokenizer.vocab_size)
    with _staging(directory) as staged, ExitStack() as stack:
        _check_free_disk(directory, total_hint, dtype)
        bins = {split: stack.enter_context(_TokenFile(staged[f"{split}.bin"])) for split in SPLITS}
        bar = stack.enter_context(tqdm(total=total_hint, desc=about["name"], unit="B", unit_scale=True, disable=None))
        for chunk, encoded in _ahead(_chunks(assigned), partial(_encode, tokenizer=tokenizer, dtype=dtype)):
            for split, ids in encoded.items():
                sizes = [size for own, _, size in chunk if own == split]
                bins[split].add(ids, len(sizes), sum(sizes))
            bar.update(sum(size for *_, size in chunk))
        if not bins["val"].documents:
            raise ValueError(
                f"{about['source']}: {bins['train'].documents} document(s), and train and val need at least one each; "
                "add text, or cut it into more documents (--split block or --split line)"
            )
        meta = {**about, "dtype": dtype.name, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot}
        meta |= {"tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint}}
        meta |= {split: bins[split].summary() for split in SPLITS}
        tokenizer.save(staged[TOKENIZER])
        staged[META].write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return meta


def assign_splits(documents: Iterable[str], val_fraction: float) -> Iterator[tuple[str, str, int]]:
    """(split, text, bytes of UTF-8) of every document that is not blank.

    The split follows from a hash of the text alone: it survives reordering, and equal documents land on the same side.
    In a corpus so small that one side would stay empty, the document nearest to the border changes sides; that one is
    held back until both sides have been seen.
    """
    border = int(val_fraction * 2**64)
    held, others, both = None, False, False
    for rank, text, size in _ranked(documents):
        new = (abs(rank - border), "val" if rank < border else "train", text, size)
        if both:
            yield new[1:]
        elif held is None:
            held = new
        elif new[1] != held[1]:
            both = True
            yield from (held[1:], new[1:])
        else:
            others = True
            held, settled = (new, held) if new[0] < held[0] else (held, new)
            yield settled[1:]
    if held and not both:
        _, split, text, size = held
        moved = "train" if split == "val" or not others else "val"
        yield moved, text, size


def _ranked(documents: Iterable[str]) -> Iterator[tuple[int, str, int]]:
    """(hash as a 64-bit integer, text, bytes of UTF-8) of the documents that are not blank."""
    for text in documents:
        if text and not text.isspace():
            try:
                encoded = text.encode()
            except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                encoded = text.encode()
            digest = hashlib.blake2b(encoded, digest_size=8).digest()
            yield int.from_bytes(digest, "little"), text, len(encoded)


def _chunks(assigned: Iterator[tuple[str, str, int]]) -> Iterator[list[tuple[str, str, int]]]:
    """Group documents to about CHUNK_BYTES; even an empty one counts 100, which is what Python needs to hold it."""
    chunk, size = [], 0
    for item in assigned:
        chunk.append(item)
        size += item[2] + 100
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _ahead(chunks: Iterator[list], encode: Callable[[list], dict]) -> Iterator[tuple[list, dict]]:
    """Every chunk and what `encode` makes of it, in order. Threads are at the next ones while one is written."""
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        begun = deque()
        for chunk in chunks:
            begun.append((chunk, pool.submit(encode, chunk)))
            if len(begun) > 2 * cores:
                first, encoded = begun.popleft()
                yield first, encoded.result()
        for chunk, encoded in begun:
            yield chunk, encoded.result()


def _encode(chunk: list[tuple[str, str, int]], tokenizer: Tokenizer, dtype: np.dtype) -> dict[str, np.ndarray]:
    """What a chunk adds to the file of each split. Raises ValueError for an id outside the vocabulary."""
    encoded = {}
    for split in dict.fromkeys(split for split, *_ in chunk):
        ids = tokenizer.encode_documents([text for own, text, _ in chunk if own == split])
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= tokenizer.vocab_size:
            raise ValueError(
                f"tokenizer {tokenizer.name!r} made id {low if low < 0 else high:,}, which is outside its vocabulary "
                f"of {tokenizer.vocab_size:,}: the tokenizer is damaged"
            )
        encoded[split] = ids.astype(dtype)
    return encoded


class _TokenFile:
    """One split on its way to the disk. Counts and hashes what it writes, so that nothing has to be read back."""

    def __init__(self, path: Path):
        self.path = path
        self.documents = self.tokens = self.bytes = 0
        self.max_id = -1

    def __enter__(self) -> "_TokenFile":
        self.raw = self.path.open("wb")
        self.file = files.HashedFile(self.raw)
        return self

    def __exit__(self, *error) -> None:
        self.raw.close()

    def add(self, ids: np.ndarray, documents: int, text_bytes: int) -> None:
        """Write the ids of some documents, of which each ends with end-of-text."""
        self.file.write(ids.tobytes())
        self.raw.flush()
        self.documents += documents
        self.tokens += len(ids)
        self.bytes += text_bytes
        self.max_id = max(self.max_id, int(ids.max()))

    def summary(self) -> dict:
        counts = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes, "max_id": self.max_id}
        return counts | self.file.entry()


OF_A_MODEL = {files.MARKER, CONFIG, WEIGHTS, HF_WEIGHTS}  # ours or anybody's


@contextmanager
def _staging(directory: Path) -> Iterator[dict[str, Path]]:
    """Where to write each of FILES; renamed into place if the body succeeds, removed without a trace if it does not.

    The lock keeps two runs from mixing their files, and whoever holds it may sweep what a killed run has left.
    """
    staged = {name: files.staged_name(directory / name) for name in FILES}
    created = not directory.exists()
    try:
        names = {path.name for path in directory.glob("*")}
        if of_a_model := sorted(names & OF_A_MODEL):
            raise ValueError(
                f"{directory} has a {of_a_model[0]}, as folders of models do: choose another --out_dir for the dataset"
            )
        if "train.bin" in names and not names & {TOKENIZER, META}:  # these are the first and the last to be put there
            raise ValueError(f"the train.bin in {directory} was not made here: choose another --out_dir, or remove it")
        with files.lock(directory):
            for litter in directory.glob(f".*{files.NEW}"):
                litter.unlink()
            try:
                yield staged
                for path in staged.values():
                    with path.open("rb+") as file:
                        os.fsync(file.fileno())
                for name, path in staged.items():
                    os.replace(path, directory / name)
                files.sync_directory(directory)
            finally:
                for path in staged.values():
                    path.unlink(missing_ok=True)
                if created:
                    with suppress(OSError):  # not empty: the dataset is in it
                        directory.rmdir()
    except OSError as error:
        ours = error.errno in files.DISK_FULL or error.filename in {str(path) for path in (directory, *staged.values())}
        if ours:  # the others come from reading the source
            raise files.save_error(directory, error) from error
        raise


def _check_free_disk(directory: Path, text_bytes: int | None, dtype: np.dtype) -> None:
    """Refuse to start what cannot end. A token stands for about three bytes of text, often for more."""
    needed, free = (text_bytes or 0) // 3 * dtype.itemsize, shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(
            f"{directory} needs about {needed / 1e6:,.0f} MB for the tokens of {text_bytes / 1e6:,.0f} MB of text, and "
            f"its disk has {free / 1e6:,.0f} MB free: make room, or prepare the dataset on another disk (--out_dir)"
        )


# ---- reading


@dataclass(frozen=True)
class Dataset:
    """An opened dataset folder. What only meta.json knows is None for a nanoGPT folder, which has none."""

    directory: Path
    name: str
    meta: dict
    train: np.memmap  # token ids, read-only
    val: np.memmap
    vocab_size: int | None
    eot: int | None
    tokenizer_path: Path | None
    fingerprint: str  # of the tokens: another one is another dataset
    tokenizer_fingerprint: str | None
    bytes_per_token: float | None  # of val: loss in nats / ln 2 / bytes_per_token = bits per byte


def load_dataset(directory: str | Path) -> Dataset:
    """Open a dataset folder, or a nanoGPT folder of two uint16 files.

    Raises FileNotFoundError or ValueError with one sentence for each of the problems that `dataset_problems` lists.
    """
    directory = Path(directory)
    _raise(find_problems(directory))
    meta = read_meta(directory)
    train, val = (np.memmap(directory / f"{split}.bin", dtype_of(meta), mode="r") for split in SPLITS)
    tokenizer = meta["tokenizer"]["fingerprint"] if meta else None
    hashes = [meta[split]["sha256"] if meta else sha256_of(directory / f"{split}.bin") for split in SPLITS]
    return Dataset(
        directory=directory,
        name=meta.get("name", directory.resolve().name),
        meta=meta,
        train=train,
        val=val,
        vocab_size=meta.get("vocab_size"),
        eot=meta.get("eot"),
        tokenizer_path=directory / TOKENIZER if meta else None,
        fingerprint=hashlib.sha256("".join((*hashes, tokenizer or "")).encode()).hexdigest(),
        tokenizer_fingerprint=tokenizer,
        bytes_per_token=meta["val"]["bytes"] / meta["val"]["tokens"] if meta else None,
    )


def verify(directory: str | Path) -> None:
    """Check a dataset as `load_dataset` does, and the sha256 of its token files too. Raises as that does."""
    _raise(find_problems(Path(directory), hashes=True))


def dataset_problems(directory: str | Path, block_size: int | None = None, vocab_size: int | None = None) -> list[str]:
    """What is wrong with a dataset, a sentence a file; with block_size or vocab_size also for a model that has them."""
    return [str(problem) for problem in find_problems(Path(directory), block_size, vocab_size)]


def _raise(problems: Iterator[Exception]) -> None:
    """Raise all problems, if there are any, as one error of the first one's kind."""
    problems = list(problems)
    if problems:
        kind = FileNotFoundError if isinstance(problems[0], FileNotFoundError) else ValueError
        raise kind("\n".join(map(str, problems)))


# ---- the same text in other tokens


def retokenize(dataset: Dataset, tokenizer: Tokenizer) -> Dataset:
    """The same documents, in the same split and order, as tokens of `tokenizer`; the dataset itself if they are.

    They are written to `retokenized_directory`, unless they are there already, and memory does not grow with them.
    Raises ValueError if the text cannot be recovered or is not what meta.json says, OSError for a disk that is full.
    """
    if not dataset.meta:
        raise ValueError(
            f"{dataset.directory} has no {META} and no {TOKENIZER}, so what text its ids stand for is not known: "
            f"prepare the text itself with the tokenizer wanted, {tokenizer.name}"
        )
    if dataset.tokenizer_fingerprint == tokenizer.fingerprint:
        return dataset
    ready = open_retokenized(dataset, tokenizer)
    if ready is None:
        about = {key: dataset.meta.get(key) for key in ("name", "source", "licence", "synthetic")}
        about["derived_from"] = dataset.fingerprint
        own, size = Tokenizer.load(dataset.tokenizer_path), sum(dataset.meta[split]["bytes"] for split in SPLITS)
        decoded = (document for split in SPLITS for document in _decoded(dataset, split, own))
        _write(retokenized_directory(dataset, tokenizer), decoded, tokenizer, about, size)
        ready = load_dataset(retokenized_directory(dataset, tokenizer))
    return ready


def retokenized_directory(dataset: Dataset, tokenizer: Tokenizer) -> Path:
    """Where `retokenize` writes: a subfolder named after the tokenizer. The name alone would not tell two apart."""
    name = re.sub(r"[^\w.-]+", "-", tokenizer.name, flags=re.ASCII)[:80].strip("-.") or "tokenizer"
    return dataset.directory / f"{name}-{tokenizer.fingerprint[:8]}"


def open_retokenized(dataset: Dataset, tokenizer: Tokenizer) -> Dataset | None:
    """What `retokenize` wrote; None if that is missing, damaged, or from what the dataset held before."""
    try:
        found = load_dataset(retokenized_directory(dataset, tokenizer))
    except (OSError, ValueError):
        return None
    origin = (found.tokenizer_fingerprint, found.meta.get("derived_from"))
    return found if origin == (tokenizer.fingerprint, dataset.fingerprint) else None


def _decoded(dataset: Dataset, split: str, tokenizer: Tokenizer) -> Iterator[tuple[str, str, int]]:
    """(split, text, bytes of UTF-8) of every document of a split. ValueError where these are not what was written."""
    path, expected, documents, size = dataset.directory / f"{split}.bin", dataset.meta[split], 0, 0
    for ids in _cut(getattr(dataset, split), tokenizer.eot, path):
        encoded = tokenizer.decode_bytes(ids.tolist())
        documents, size = documents + 1, size + len(encoded)
        try:
            text = encoded.decode()
        except UnicodeDecodeError as error:  # replacing its bytes would change the text without a word
            raise ValueError(
                f"{path} cannot be put in other tokens: document {documents:,} is no UTF-8: {error}"
            ) from None
        yield split, text, len(encoded)
    if (documents, size) != (expected["documents"], expected["bytes"]):
        raise ValueError(
            f"{path} cannot be put in other tokens: it holds {documents:,} documents, {size:,} bytes of text, and "
            f"{META} says {expected['documents']:,} and {expected['bytes']:,}"
        )


def _cut(ids: np.ndarray, eot: int, path: Path) -> Iterator[np.ndarray]:
    """The documents of a token file, each without the end-of-text that follows it."""
    ids, start = np.asarray(ids), 0  # a slice of a memmap takes many times as long as one of a plain array
    for offset in range(0, len(ids), SCAN_IDS):
        for end in np.flatnonzero(ids[offset : offset + SCAN_IDS] == eot).tolist():
            yield ids[start : offset + end]
            start = offset + end + 1
    if start < len(ids):
        raise ValueError(f"{path} cannot be put in other tokens: it does not end with end-of-text ({eot})")
