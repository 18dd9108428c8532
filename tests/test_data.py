"""Datasets: what is written is what is read, whatever happens in between; and the sources and scripts behind them."""

import gzip
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import files
import tokenizer as tokenizer_module
from data import docstrings, preparation, sources, tokens
from data import format as data_format
from data.finding import find_dataset
from data.preparation import train_tokenizer
from data.scientific.prepare import unwrapped
from data.shakespeare.prepare import passages
from data.sources import HubDataset, Source, from_files, from_hub
from data.tinystories.grammar import stories
from data.tinystories.prepare import RECIPE as TINYSTORIES
from data.tokens import (
    assign_splits,
    dataset_problems,
    load_dataset,
    open_retokenized,
    retokenize,
    retokenized_directory,
    verify,
    write_dataset,
)
from distributed import Ranks
from tokenizer import Tokenizer, train_bpe

ROOT = Path(__file__).resolve().parent.parent
SOURCE = {"name": "poems", "source": "the tests", "licence": "none"}
LABELS = "train.bin val.bin tokenizer.json meta.json".split()  # noqa: SIM905


def texts(count=40, seed=0):
    chance = random.Random(seed)
    words = ["sun", "moon", "naïve", "日本語", "x²", "\n\n", "<|endoftext|>", "  ", "I'll"]
    return [f"{number}: " + " ".join(chance.choices(words, k=chance.randint(1, 30))) for number in range(count)]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(texts(), "bpe-poems", vocab_size=300)


@pytest.fixture(scope="module")
def written(tmp_path_factory, bpe):
    directory = tmp_path_factory.mktemp("data") / "poems"
    write_dataset(directory, texts(), bpe, **SOURCE, val_fraction=0.2)
    return directory


@pytest.fixture
def copied(written, tmp_path):
    """A dataset to damage."""
    return Path(shutil.copytree(written, tmp_path / "poems"))


def documents_in(ids, tokenizer):
    """Cut a token file at end-of-text."""
    ids = np.asarray(ids).tolist()
    assert ids[-1] == tokenizer.eot
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eot]
    starts = [0, *(end + 1 for end in ends)]
    return [tokenizer.decode(ids[start:end]) for start, end in zip(starts, ends, strict=False)]


class FixedIds:
    """Stands for a tokenizer with a vocabulary of any size: its "text" is numbers."""

    def __init__(self, vocab_size, real):
        self.name, self.vocab_size, self.eot = "numbers", vocab_size, 0
        self.fingerprint, self.save = real.fingerprint, real.save

    def encode_documents(self, texts):
        return np.array([int(word) for text in texts for word in (*text.split(), self.eot)])


# ---- writing and reading


def test_every_document_comes_back_followed_by_end_of_text(written, bpe):
    dataset = load_dataset(written)
    train, val = documents_in(dataset.train, bpe), documents_in(dataset.val, bpe)
    assert sorted(train + val) == sorted(texts())
    assert train == [text for split, text, _ in assign_splits(texts(), 0.2) if split == "train"]  # in their order


def test_many_chunks_on_many_cores_are_written_in_the_order_of_the_documents(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK_BYTES", 500)
    monkeypatch.setattr("os.cpu_count", lambda: 5)
    write_dataset(tmp_path, texts() * 9, bpe, **SOURCE)
    dataset, assigned = load_dataset(tmp_path), list(assign_splits(texts() * 9, 0.05))
    for split in ("train", "val"):
        assert documents_in(getattr(dataset, split), bpe) == [text for own, text, _ in assigned if own == split]


def test_an_error_of_the_source_ends_the_threads_and_leaves_nothing(tmp_path, bpe, monkeypatch):
    def failing():
        yield from texts() * 9
        raise ValueError("the last file is damaged")

    monkeypatch.setattr(tokens, "CHUNK_BYTES", 500)
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="the last file is damaged"):
        write_dataset(tmp_path, failing(), bpe, **SOURCE)
    assert set(threading.enumerate()) == before and not list(tmp_path.iterdir())


def test_meta_tells_what_is_in_the_files(written, bpe):
    dataset = load_dataset(written)
    verify(written)
    for split in ("train", "val"):
        ids, meta = getattr(dataset, split), dataset.meta[split]
        documents = documents_in(ids, bpe)
        assert (meta["tokens"], meta["documents"], meta["max_id"]) == (len(ids), len(documents), int(ids.max()))
        assert meta["bytes"] == sum(len(text.encode()) for text in documents)
        assert meta["size"] == (written / f"{split}.bin").stat().st_size
    assert dataset.bytes_per_token == dataset.meta["val"]["bytes"] / dataset.meta["val"]["tokens"]
    assert (dataset.vocab_size, dataset.eot) == (bpe.vocab_size, bpe.eot)
    assert (dataset.name, dataset.meta["source"], dataset.meta["synthetic"]) == ("poems", "the tests", False)
    assert dataset.tokenizer_fingerprint == bpe.fingerprint == Tokenizer.load(dataset.tokenizer_path).fingerprint


def test_an_opened_dataset_cannot_be_written_to(written):
    with pytest.raises(ValueError, match="read-only"):
        load_dataset(written).train[0] = 1


def test_the_same_text_gives_the_same_bytes(written, bpe, tmp_path):
    write_dataset(tmp_path, texts(), bpe, **SOURCE, val_fraction=0.2)
    assert all((tmp_path / name).read_bytes() == (written / name).read_bytes() for name in LABELS)
    assert load_dataset(tmp_path).fingerprint == load_dataset(written).fingerprint


def test_the_fingerprint_is_that_of_the_tokens(written, bpe, tmp_path):
    write_dataset(tmp_path, texts(seed=1), bpe, **SOURCE, val_fraction=0.2)
    assert load_dataset(tmp_path).fingerprint != load_dataset(written).fingerprint


def test_nanogpt_reads_our_files_and_we_read_nanogpts(written, tmp_path):
    ours = load_dataset(written)
    for split in ("train", "val"):
        ids = np.memmap(written / f"{split}.bin", dtype=np.uint16, mode="r")  # what nanoGPT's get_batch does
        assert np.array_equal(ids, getattr(ours, split))
        shutil.copy(written / f"{split}.bin", tmp_path)
    theirs = load_dataset(tmp_path)
    assert np.array_equal(theirs.train, ours.train) and np.array_equal(theirs.val, ours.val)
    assert theirs.tokenizer_path is theirs.vocab_size is theirs.bytes_per_token is None


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65_535, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (70_001, "uint32")]
)
def test_the_highest_id_never_wraps(tmp_path, bpe, vocab_size, dtype):
    highest = vocab_size - 1
    write_dataset(tmp_path, [f"1 {highest} {n}" for n in range(9)], FixedIds(vocab_size, bpe), **SOURCE)
    dataset = load_dataset(tmp_path)
    assert dataset.meta["dtype"] == dataset.train.dtype.name == dtype
    assert dataset.train[1] == dataset.meta["train"]["max_id"] == highest


@pytest.mark.parametrize("id", [300, 70_000, -1])
def test_an_id_outside_the_vocabulary_is_refused_before_it_is_cast(tmp_path, bpe, id):
    with pytest.raises(ValueError, match=f"id {id:,}, which is outside its vocabulary of 300"):
        write_dataset(tmp_path, ["1", "2", f"3 {id}"], FixedIds(300, bpe), **SOURCE)
    assert not list(tmp_path.iterdir())


def test_what_utf8_cannot_hold_and_blank_documents_do_not_stop_it(tmp_path, bpe):
    write_dataset(tmp_path, ["", " \n", "half a pair \ud800.", "whole"], bpe, **SOURCE)
    dataset = load_dataset(tmp_path)
    found = documents_in(dataset.train, bpe) + documents_in(dataset.val, bpe)
    assert sorted(found) == ["half a pair \N{REPLACEMENT CHARACTER}.", "whole"]


# ---- the split


def test_the_split_does_not_depend_on_the_order_or_on_the_rest():
    documents = [f"document {n}" for n in range(2000)]
    sides = {text: split for split, text, _ in assign_splits(documents, 0.1)}
    assert 150 < list(sides.values()).count("val") < 250
    assert {text: split for split, text, _ in assign_splits(reversed(documents[500:]), 0.1)}.items() <= sides.items()


def test_equal_documents_land_on_the_same_side():
    assert len({(split, text) for split, text, _ in assign_splits([f"{n % 50}" for n in range(1000)], 0.3)}) == 50


@pytest.mark.parametrize("val_fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_no_side_stays_empty_and_nothing_is_lost(count, val_fraction):
    documents = [f"document {n}" for n in range(count)]
    given = list(assign_splits(documents, val_fraction))
    assert sorted(text for _, text, _ in given) == documents
    assert {split for split, *_ in given} == {"train", "val"}
    assert {(s, t) for s, t, _ in assign_splits(reversed(documents), val_fraction)} == {(s, t) for s, t, _ in given}


def test_one_document_cannot_be_split(tmp_path, bpe):
    with pytest.raises(ValueError, match=r"the tests: 1 document\(s\), and train and val need at least one each"):
        write_dataset(tmp_path / "new", ["alone"], bpe, **SOURCE)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("val_fraction", [0, 1, -0.1, 2])
def test_a_val_fraction_that_is_no_fraction_is_refused(tmp_path, bpe, val_fraction):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        write_dataset(tmp_path, texts(), bpe, **SOURCE, val_fraction=val_fraction)


# ---- interruptions


def interrupted(error):
    yield from texts()
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError("the hub is gone"), MemoryError])
def test_an_interruption_leaves_the_old_dataset_and_nothing_else(copied, bpe, tmp_path, error):
    before = load_dataset(copied).fingerprint
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        write_dataset(copied, interrupted(error), bpe, **SOURCE)
    verify(copied)
    assert load_dataset(copied).fingerprint == before
    assert sorted(path.name for path in copied.iterdir()) == sorted(LABELS)
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        write_dataset(tmp_path / "new", interrupted(error), bpe, **SOURCE)
    assert not (tmp_path / "new").exists()


KILLED_WRITER = """
import os, random, signal, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import test_data
from data.tokens import write_dataset
bpe = test_data.Tokenizer.load({tokenizer!r})
renames, replace = {renames}, os.replace
def killing_replace(source, target):
    global renames
    if os.path.dirname(target) == {directory!r} and os.path.basename(target)[0] != ".":
        if renames == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        renames -= 1
    replace(source, target)
os.replace = killing_replace
print("ready", flush=True)
seed = 0
while True:
    seed += 1
    write_dataset({directory!r}, test_data.texts(3000, seed), bpe, **test_data.SOURCE)
"""


def start_writer(directory, tokenizer, renames=-1):
    code = KILLED_WRITER.format(root=str(ROOT), directory=str(directory), tokenizer=str(tokenizer), renames=renames)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)


def assert_heals(directory, bpe):
    """Whatever a killed run has left is whole or refused in a sentence, and the next run makes it good and clean."""
    try:
        verify(directory)
    except (FileNotFoundError, ValueError) as problem:
        assert re.search("there is no|interrupted|missing|from another preparation|the tokens were made", str(problem))
    write_dataset(directory, texts(), bpe, **SOURCE)
    verify(directory)
    assert sorted(path.name for path in directory.iterdir()) == sorted(LABELS)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("renames", range(4))
def test_a_kill_between_two_renames_is_noticed_and_healed(tmp_path, written, bpe, renames, first):
    directory = tmp_path / "poems"
    if not first:
        write_dataset(directory, texts(), bpe, **SOURCE)
    assert start_writer(directory, written / "tokenizer.json", renames).wait(60) == -signal.SIGKILL
    problem = " ".join(dataset_problems(directory))
    if first:  # in the order tokenizer, train, val, meta
        assert ["train.bin are missing", "interrupted", "interrupted", "interrupted"][renames] in problem
    else:  # with the same tokenizer, whose renaming changes nothing
        assert bool(problem) == (renames > 1)
    (directory / "..tokenizer.json.nanoforge-new.nanoforge-new").touch()  # a kill in Tokenizer.save
    assert_heals(directory, bpe)


@pytest.mark.parametrize("times", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_is_healed(tmp_path, written, bpe, times):
    chance = random.Random(times)
    for _ in range(times):
        writer = start_writer(tmp_path / "poems", written / "tokenizer.json")
        writer.stdout.readline()
        time.sleep(chance.random() * 0.3)
        writer.kill()
        writer.wait()
        assert_heals(tmp_path / "poems", bpe)


def test_a_full_disk_is_one_sentence_and_the_old_dataset_stays(copied, bpe):
    before = load_dataset(copied).fingerprint
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # the tokens are more than that
    try:
        with pytest.raises(OSError, match=rf"cannot write {copied}: File too large .*what was saved before is intact"):
            write_dataset(copied, texts(3000), bpe, **SOURCE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_dataset(copied).fingerprint == before
    assert sorted(path.name for path in copied.iterdir()) == sorted(LABELS)


def test_a_disk_that_will_not_do_is_noticed_at_the_start(tmp_path, bpe):
    with pytest.raises(OSError, match="make room, or prepare the dataset on another disk"):
        write_dataset(tmp_path, interrupted(AssertionError), bpe, **SOURCE, total_hint=10**18)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_to_is_one_sentence(tmp_path, bpe):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=f"cannot write {tmp_path / 'file'}"):
        write_dataset(tmp_path / "file", texts(), bpe, **SOURCE)


@pytest.mark.parametrize(
    ("name", "words"),
    [("config.json", "has a config.json"), ("ckpt.pt", "has a ckpt.pt"), ("train.bin", "was not made here")],
)
def test_nobody_elses_files_are_written_over(tmp_path, bpe, name, words):
    (tmp_path / name).write_bytes(b"theirs")
    with pytest.raises(ValueError, match=words):
        write_dataset(tmp_path, texts(), bpe, **SOURCE)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"theirs"]


def test_two_runs_do_not_write_to_the_same_folder(tmp_path, bpe):
    with files.lock(tmp_path), pytest.raises(ValueError, match="is being written by another process"):
        write_dataset(tmp_path, texts(), bpe, **SOURCE)


# ---- what is wrong with a dataset


def edit_meta(**changes):
    def edit(directory):
        meta = json.loads((directory / "meta.json").read_text())
        for key, value in changes.items():
            *path, last = key.split("__")
            part = meta
            for name in path:
                part = part[name]
            part[last] = value
        (directory / "meta.json").write_text(json.dumps(meta))

    return edit


def other_tokenizer(directory):
    train_bpe(texts(), "other", vocab_size=280).save(directory / "tokenizer.json")


def raise_an_id(directory):
    ids = np.memmap(directory / "val.bin", "<u2", mode="r+")
    ids[3] = 301
    ids.flush()


def shorten(name, size):
    return lambda directory: os.truncate(directory / name, size)


def remove(name):
    return lambda directory: (directory / name).unlink()


PROBLEMS = {
    "no folder": (shutil.rmtree, FileNotFoundError, "there is no dataset folder {directory}"),
    "no meta": (
        remove("meta.json"),
        ValueError,
        "the preparation of {directory} was interrupted: meta.json is missing",
    ),
    "no train": (remove("train.bin"), FileNotFoundError, "{directory}/train.bin is missing"),
    "no tokenizer": (remove("tokenizer.json"), FileNotFoundError, "{directory}/tokenizer.json is missing"),
    "meta is cut": (shorten("meta.json", 40), ValueError, "{directory}/meta.json is damaged: it is not JSON"),
    "meta lacks": (edit_meta(train={}), ValueError, "meta.json is damaged: train.sha256 is None, not str"),
    "meta is odd": (edit_meta(vocab_size="9"), ValueError, "meta.json is damaged: vocab_size is '9', not int"),
    "meta dtype": (edit_meta(dtype="int8"), ValueError, "dtype is 'int8', not uint16 or uint32"),
    "empty": (shorten("val.bin", 0), ValueError, "{directory}/val.bin is empty"),
    "odd size": (
        shorten("val.bin", 41),
        ValueError,
        "val.bin is damaged: 41 bytes are no whole number of uint16 tokens",
    ),
    "truncated": (
        shorten("train.bin", 40),
        ValueError,
        r"train.bin has 40 bytes, 20 tokens as uint16, and meta.json says",
    ),
    "foreign ids": (raise_an_id, ValueError, "val.bin is damaged: it has id 301, and meta.json says vocab_size 300"),
    "foreign tokenizer": (
        other_tokenizer,
        ValueError,
        r"tokenizer.json is 'other' \(.{12}\), but .* with 'bpe-poems' \(",
    ),
    "tokenizer is cut": (shorten("tokenizer.json", 9), ValueError, "tokenizer.json is truncated, or not a"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_a_damaged_dataset_is_refused_in_one_sentence(copied, case):
    damage, kind, sentence = PROBLEMS[case]
    damage(copied)
    with pytest.raises(kind, match=sentence.replace("{directory}", str(copied))) as error:
        load_dataset(copied)
    assert dataset_problems(copied) == [str(error.value)] and "\n" not in str(error.value)


def test_a_folder_with_a_prepare_script_says_how_to_mend_it(copied):
    (copied / "prepare.py").touch()
    (copied / "val.bin").unlink()
    with pytest.raises(FileNotFoundError, match=f"prepare it with: python {copied}/prepare.py"):
        load_dataset(copied)


def test_all_problems_come_together(copied):
    os.truncate(copied / "val.bin", 3)
    other_tokenizer(copied)
    problems = dataset_problems(copied, block_size=10**6)
    assert len(problems) == 3
    assert "train.bin has" in problems[0] and "block_size 1,000,000 needs 1,000,001" in problems[0]
    with pytest.raises(ValueError) as error:
        load_dataset(copied)
    assert str(error.value).splitlines() == problems[1:]


def test_a_dataset_is_compared_with_the_model(written):
    shortest = len(load_dataset(written).val)
    assert dataset_problems(written, block_size=shortest - 1, vocab_size=300) == []
    assert "val.bin" in dataset_problems(written, block_size=shortest)[0]
    assert all("is outside the model's" in p or "outside the model's vocab_size 200" in p
               for p in dataset_problems(written, vocab_size=200))  # fmt: skip
    assert len(dataset_problems(written, vocab_size=200)) == 2


def test_a_wide_vocabulary_needs_a_meta_file(written, tmp_path):
    for split in ("train", "val"):
        shutil.copy(written / f"{split}.bin", tmp_path)
    assert (
        "uint16 is too narrow for the model's vocab_size 262,144" in dataset_problems(tmp_path, vocab_size=262_144)[0]
    )


def test_only_verify_reads_the_hashes(copied):
    ids = np.memmap(copied / "val.bin", "<u2", mode="r+")
    ids[3] ^= 1
    ids.flush()
    load_dataset(copied)
    with pytest.raises(ValueError, match="its sha256 is"):
        verify(copied)


def test_a_second_look_at_the_ids_is_free_until_the_file_changes(copied):
    assert not dataset_problems(copied)
    raise_an_id(copied)
    os.utime(copied / "val.bin", ns=(0, 0))
    assert dataset_problems(copied)


# ---- the same text in other tokens


@pytest.fixture(scope="module")
def other_bpe():
    return train_bpe(texts(seed=5), "bpe other", vocab_size=400)


def documents_by_split(dataset):
    own = Tokenizer.load(dataset.tokenizer_path)
    return {split: documents_in(getattr(dataset, split), own) for split in ("train", "val")}


def inodes(directory):
    """What changes when a file is written anew, even with the same content."""
    return {path.name: path.stat().st_ino for path in directory.iterdir()}


def test_other_tokens_hold_the_same_documents_in_the_same_split_and_order(copied, other_bpe):
    dataset = load_dataset(copied)
    other = retokenize(dataset, other_bpe)
    assert documents_by_split(other) == documents_by_split(dataset)
    assert len(documents_by_split(other)["val"]) > 4  # the split of 0.2 that it was written with
    assert (other.tokenizer_fingerprint, other.vocab_size) == (other_bpe.fingerprint, other_bpe.vocab_size)
    assert other.directory == copied / f"bpe-other-{other_bpe.fingerprint[:8]}"
    assert {path.name for path in other.directory.iterdir()} == set(LABELS)
    own = {key: other.meta[key] for key in ("name", "source", "licence", "synthetic", "derived_from")}
    assert own == {**SOURCE, "synthetic": False, "derived_from": dataset.fingerprint}
    verify(other.directory)
    verify(copied)
    assert load_dataset(copied).fingerprint == dataset.fingerprint != other.fingerprint


PIECES = [
    "<|endoftext|>",
    "<|endoftext|",
    "\r\n",
    "\n\n",
    "\r",
    "\N{REPLACEMENT CHARACTER}",
    "\ufeff",
    "\0",
    "  ",
    "日本",
    "e\u0301",
]
ANY_CHARACTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ANY_DOCUMENT = st.lists(st.sampled_from(PIECES) | ANY_CHARACTERS, max_size=6).map("".join)


@settings(derandomize=True, database=None, deadline=None, max_examples=40)
@given(documents=st.lists(ANY_DOCUMENT, max_size=8), scanned=st.integers(1, 20))
def test_any_text_survives_other_tokens(bpe, other_bpe, tmp_path_factory, documents, scanned):
    documents += ["one \r\n", "\ufeff<|endoftext|>\n\n\ufffd"]  # two that are not blank
    directory = tmp_path_factory.mktemp("any")
    write_dataset(directory, documents, bpe, **SOURCE, val_fraction=0.4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "SCAN_IDS", scanned)  # so that documents lie across its borders
        other = retokenize(load_dataset(directory), other_bpe)
    assigned = list(assign_splits(documents, 0.4))
    assert documents_by_split(other) == {split: [t for s, t, _ in assigned if s == split] for split in ("train", "val")}


def test_tokens_of_the_tokenizer_wanted_are_the_dataset_itself(copied, bpe):
    dataset = load_dataset(copied)
    assert retokenize(dataset, bpe) is dataset
    assert {path.name for path in copied.iterdir()} == set(LABELS)


def test_other_tokens_are_written_once_and_again_when_the_dataset_changes(copied, bpe, other_bpe):
    dataset = load_dataset(copied)
    assert open_retokenized(dataset, other_bpe) is None
    written = inodes(retokenize(dataset, other_bpe).directory)
    assert open_retokenized(dataset, other_bpe).meta["derived_from"] == dataset.fingerprint
    directory = retokenize(load_dataset(copied), other_bpe).directory
    assert inodes(directory) == written
    write_dataset(copied, texts(seed=3), bpe, **SOURCE)
    changed = load_dataset(copied)
    assert open_retokenized(changed, other_bpe) is None
    assert documents_by_split(retokenize(changed, other_bpe)) == documents_by_split(changed)
    assert not written.items() & inodes(directory).items()


@pytest.mark.parametrize("damage", [remove("meta.json"), shorten("val.bin", 40), other_tokenizer])
def test_other_tokens_that_are_damaged_are_written_anew(copied, other_bpe, damage):
    dataset = load_dataset(copied)
    directory = retokenize(dataset, other_bpe).directory
    damage(directory)
    assert open_retokenized(dataset, other_bpe) is None
    retokenize(dataset, other_bpe)
    verify(directory)


def test_a_folder_of_the_same_name_with_another_tokenizer_is_not_taken_for_ours(copied, bpe, other_bpe):
    dataset = load_dataset(copied)
    directory = retokenized_directory(dataset, other_bpe)
    write_dataset(directory, texts(), bpe, **SOURCE)
    edit_meta(derived_from=dataset.fingerprint)(directory)
    assert open_retokenized(dataset, other_bpe) is None


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("gpt2", "gpt2"),
        ("my org/bpe v1.2", "my-org-bpe-v1.2"),
        ("../../etc", "etc"),
        ("日本語", "tokenizer"),
        ("", "tokenizer"),
        ("a" * 300, "a" * 80),
    ],
)
def test_the_subfolder_is_named_after_the_tokenizer(written, bpe, name, folder):
    named = Tokenizer(name, bpe._merges)
    assert retokenized_directory(load_dataset(written), named) == written / f"{folder}-{bpe.fingerprint[:8]}"


def test_the_text_of_a_nanogpt_folder_cannot_be_recovered(copied, other_bpe):
    (copied / "meta.json").unlink()
    (copied / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no meta.json and no tokenizer.json.* tokenizer wanted, bpe other"):
        retokenize(load_dataset(copied), other_bpe)


def change_ids(edit):
    def change(directory):
        ids = np.memmap(directory / "train.bin", "<u2", mode="r+")
        edit(ids)
        ids.flush()

    return change


def lengthen_a_document(ids):
    ids[0] = max(ids[0], 256)  # a merge of two bytes where there was one


def end_in_the_middle(ids):
    ids[-1] = ids[0]


def break_a_character(ids):
    ids[0] = 187  # in GPT-2's order, the byte 0xff


UNRECOVERABLE = {
    "more bytes": (
        change_ids(lengthen_a_document),
        r"holds [\d,]+ documents, [\d,]+ bytes of text, and meta.json says",
    ),
    "other documents": (
        edit_meta(train__documents=99),
        r"holds [\d,]+ documents, [\d,]+ bytes of text, and meta.json says",
    ),
    "no end": (change_ids(end_in_the_middle), r"does not end with end-of-text \(299\)"),
    "no text": (change_ids(break_a_character), "document 1 is no UTF-8: 'utf-8' codec can't decode byte 0xff"),
}


@pytest.mark.parametrize("case", UNRECOVERABLE)
def test_text_that_is_not_what_was_written_is_refused_and_nothing_is_left(copied, other_bpe, case):
    damage, sentence = UNRECOVERABLE[case]
    damage(copied)
    with pytest.raises(ValueError, match=f"{copied}/train.bin cannot be put in other tokens: .*{sentence}"):
        retokenize(load_dataset(copied), other_bpe)
    assert {path.name for path in copied.iterdir()} == set(LABELS)


def test_the_memory_for_other_tokens_does_not_grow_with_the_dataset(tmp_path, bpe, other_bpe, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr("os.cpu_count", lambda: 2)  # each core has a few chunks
    for module in (tokens, data_format):
        monkeypatch.setattr(module, "SCAN_IDS", 1 << 14)
    peaks = {}
    for documents in (1000, 8000):  # 0.2 and 1.6 MB of text
        write_dataset(tmp_path / str(documents), (f"{n} " + "words " * 30 for n in range(documents)), bpe, **SOURCE)
        dataset = load_dataset(tmp_path / str(documents))
        tracemalloc.start()
        retokenize(dataset, other_bpe)
        peaks[documents] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[8000] < peaks[1000] + 100_000, peaks


# ---- the dataset of a run


def test_a_run_reads_a_dataset_in_the_tokens_of_its_model(copied, other_bpe, tmp_path, capsys):
    other_bpe.save(tmp_path / "tokenizer.json")
    own = find_dataset(str(copied))
    assert own.directory == copied
    assert find_dataset(str(copied), copied / "tokenizer.json").directory == copied
    assert not capsys.readouterr().out
    found = find_dataset(str(copied), tmp_path / "tokenizer.json")
    assert (found.tokenizer_fingerprint, found.meta["derived_from"]) == (other_bpe.fingerprint, own.fingerprint)
    said = f"{copied} holds tokens of bpe-poems; writing it in those of bpe other to {found.directory}\n"
    assert capsys.readouterr().out == said
    again = find_dataset(str(copied), tmp_path / "tokenizer.json")
    assert (again.directory, capsys.readouterr().out) == (found.directory, "")


def test_a_nanogpt_folder_is_read_as_it_is(copied, other_bpe, tmp_path):
    other_bpe.save(tmp_path / "tokenizer.json")
    (copied / "meta.json").unlink()
    (copied / "tokenizer.json").unlink()
    assert find_dataset(str(copied), tmp_path / "tokenizer.json").directory == copied


def test_a_missing_dataset_is_prepared_with_its_own_tokenizer(written, other_bpe, tmp_path):
    other_bpe.save(tmp_path / "tokenizer.json")
    directory = tmp_path / "poems"
    directory.mkdir()
    (directory / "prepare.py").write_text(
        f"""import shutil, sys
assert not sys.argv[1:]
for name in {LABELS}:
    shutil.copy({str(written)!r} + "/" + name, {str(directory)!r})
"""
    )
    found = find_dataset(str(directory), tmp_path / "tokenizer.json")
    assert found.tokenizer_fingerprint == other_bpe.fingerprint
    assert load_dataset(directory).fingerprint == load_dataset(written).fingerprint


def test_only_the_main_process_writes_other_tokens(copied, other_bpe, tmp_path, capsys):
    other_bpe.save(tmp_path / "tokenizer.json")

    class Waiting(Ranks):
        def __init__(self):
            self.main, self.size, self.meetings = False, 2, 0

        def agree(self, value):
            self.meetings += 1
            if self.meetings == 2:  # the main process comes here when it has written
                assert {path.name for path in copied.iterdir()} == set(LABELS)
                retokenize(load_dataset(copied), other_bpe)

    found = find_dataset(str(copied), tmp_path / "tokenizer.json", Waiting())
    assert found.tokenizer_fingerprint == other_bpe.fingerprint
    assert not capsys.readouterr().out


# ---- files


def read(*patterns, **options):
    return list(from_files([str(pattern) for pattern in patterns], **options).documents)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (None, ["one\ntwo", " three", "four"]),
        ("block", ["one\ntwo", " three", "four"]),
        ("line", ["one", "two", " three", "four"]),
        ("file", ["one\ntwo\n\n three\n \n\nfour"]),
    ],
)
def test_a_text_file_is_cut_as_asked(tmp_path, split, expected):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n three\n \n\nfour\n")
    assert [text for text in read(tmp_path / "a.txt", split=split) if text.strip()] == expected


def test_several_text_files_are_a_document_each(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("b\n\nb")
    (tmp_path / "deep" / "c.md").write_text("c\n\nc")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert read(tmp_path) == read(tmp_path / "b.txt", tmp_path / "*" / "*.md", tmp_path) == ["b\n\nb", "c\n\nc"]


def test_a_document_without_end_is_cut_at_the_end_of_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST", 20)
    (tmp_path / "a.txt").write_text("nine char\n" * 5 + "x" * 45)
    assert read(tmp_path / "a.txt") == ["nine char\nnine char"] * 2 + ["nine char\n" + "x" * 20, "x" * 20, "x" * 5]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize(("column", "given"), [("abstract", None), ("summary", "summary")])
def test_a_row_of_a_record_file_is_a_document(tmp_path, ending, column, given):
    rows = [{column: "one\n\nline é", "id": 1}, {column: None, "id": 2}, {column: "two", "id": 3}]
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        content = "\n".join(map(json.dumps, rows)).encode() + b"\n\n"
        path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    assert read(path, text_column=given) == ["one\n\nline é", "", "two"]


def test_a_zipped_text_file_is_read_through(tmp_path):
    (tmp_path / "A.TXT.GZ").write_bytes(gzip.compress("é\n\nb".encode()))
    assert read(tmp_path / "A.TXT.GZ") == ["é", "b"]


BAD_FILES = {
    "latin.txt": (
        b"a\n" * 9000 + b"caf\xe9 au lait",
        "latin.txt is not UTF-8: byte 0xe9 at offset 18003; convert",
    ),
    "wide.txt": ("text".encode("utf-16"), "wide.txt is UTF-16: convert it"),
    "half.txt": (b"\xc3", "half.txt is not UTF-8: it ends in the middle of a character"),
    "seam.txt": (b"x" * (2**20 - 1) + b"\xc3\xa9\xff", "seam.txt is not UTF-8: byte 0xff at offset 1048577;"),
    "cut.txt.gz": (gzip.compress(b"text" * 99)[:20], "cut.txt.gz is damaged, or not gzip"),
    "fake.txt.gz": (b"no gzip", "fake.txt.gz is damaged, or not gzip"),
    "rows.jsonl": (b'{"text": "fine"}\n\n{"text": ', "rows.jsonl, line 3: not JSON"),
    "list.jsonl": (b"[1, 2]\n", "list.jsonl, line 1: the record is no text but list"),
    "number.jsonl": (b'{"text": 5}', "number.jsonl, line 1: column 'text' is no text but int"),
    "column.jsonl": (
        b'{"title": "t", "id": 1}',
        "none of the columns text, .*, but title, id: choose one with --text_column",
    ),
    "fake.md.gz": (b"no gzip", "fake.md.gz is damaged, or not gzip"),
    "fake.parquet": (b"no parquet", "fake.parquet is damaged, or not parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_sentence_with_the_place(tmp_path, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    content, sentence = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_compressed_text_of_every_kind_is_read_with_the_rest_of_its_folder(tmp_path):
    for i, kind in enumerate(("txt", "md", "rst", "tex")):
        (tmp_path / f"{i}.{kind}.gz").write_bytes(gzip.compress(kind.encode()))
        (tmp_path / f"{i}.{kind}").write_text(kind.upper())
    assert sorted(from_files([str(tmp_path)]).documents) == ["MD", "RST", "TEX", "TXT", "md", "rst", "tex", "txt"]
    with pytest.raises(ValueError, match="--split lines must be one of file, block, line"):
        from_files([str(tmp_path)], split="lines")


def test_parquet_with_text_that_is_no_utf8_is_one_sentence(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    buffers = [None, pyarrow.py_buffer(np.array([0, 4], np.int32).tobytes()), pyarrow.py_buffer(b"caf\xe9")]
    text = pyarrow.Array.from_buffers(pyarrow.string(), 1, buffers)
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"text": text}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet, column text: not UTF-8"):
        read(tmp_path / "x.parquet")


def test_parquet_without_pyarrow_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").touch()
    with pytest.raises(ValueError, match="parquet needs pyarrow"):
        read(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"text_column": "nothing"}, "line 1: no column 'nothing', but text, id"),
        ({"split": "line"}, "--split line is for text files"),
    ],
)
def test_options_that_do_not_fit_the_files_are_refused(tmp_path, options, sentence):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "id": 1}')
    with pytest.raises(ValueError, match=sentence):
        read(tmp_path / "rows.jsonl", **options)


def test_files_that_are_not_there_or_not_readable_are_refused(tmp_path):
    (tmp_path / "paper.pdf").touch()
    (tmp_path / "empty").mkdir()
    for pattern in ("nothing.txt", "*.txt", "empty"):
        with pytest.raises(FileNotFoundError, match="no such file, no match, or an empty folder"):
            read(tmp_path / pattern)
    for pattern in ("paper.pdf", "."):
        with pytest.raises(ValueError, match="cannot be read: of files, those count whose names end in"):
            read(tmp_path / pattern)


# ---- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A dataset on disk, which the package `datasets` opens as it would one on the hub."""
    pytest.importorskip("datasets")
    monkeypatch.setattr(sources, "_ask_hub", lambda dataset_id, patience: None)
    for split, count in (("train", 5), ("test", 2)):
        rows = [json.dumps({"id": n, "abstract": f"{split} {n}"}) for n in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    return HubDataset(str(tmp_path), column="abstract", licence="none", num_samples=3, mean_bytes=10)


def test_the_hub_is_streamed_split_by_split(hub):
    source = from_hub(replace(hub, split="train+test"), 3, patience=1)
    assert list(source.documents) == ["train 0", "train 1", "train 2", "train 3", "train 4", "test 0", "test 1"]
    assert source.total_bytes == 30 and str(hub.id) in source.description


def test_what_goes_wrong_on_the_hub_is_one_sentence(hub):
    with pytest.raises(ValueError, match="no column 'text', but id, abstract"):
        from_hub(replace(hub, column="text"), 3, patience=1)
    with pytest.raises(ValueError, match=r"the hub did not give .*: .*nothing"):
        from_hub(replace(hub, split="nothing"), 3, patience=1)


@pytest.fixture
def silent_server():
    """Takes connections and never says a word, as a firewall that drops packets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_nothing_waits_for_a_network_that_does_not_answer(silent_server, tmp_path):
    pytest.importorskip("datasets")
    started = time.monotonic()
    network = {"HF_ENDPOINT": silent_server, "HTTPS_PROXY": silent_server, "HF_HUB_OFFLINE": ""}
    run = prepare("scientific", "--num_samples", 50, "--out_dir", tmp_path, **network)
    assert run.returncode == 0, run.stderr
    assert "because the hub did not answer" in run.stdout
    assert "GPT-2's ranks are not on this machine" in run.stdout and "downloaded" not in run.stdout
    assert time.monotonic() - started < 5 + 4  # four for Python and its libraries to start


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    hub_api = pytest.importorskip("huggingface_hub").HfApi
    pytest.importorskip("datasets")
    ended = threading.Event()
    monkeypatch.setattr(hub_api, "dataset_info", lambda *_, **__: ended.wait(20))
    started = time.monotonic()
    with pytest.raises(sources.Unreachable, match=r"did not answer within 0.2 seconds"):
        from_hub(HubDataset("a/b", None, "none", 0), 0, patience=0.2)
    assert time.monotonic() - started < 2
    ended.set()


def test_without_the_package_no_network_is_asked(monkeypatch):
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the package datasets is not installed") as error:
        from_hub(HubDataset("a/b", None, "none", 0), 0, patience=0.2)
    assert not isinstance(error.value, sources.Unreachable)  # so that GPT-2's ranks are still asked for


def test_what_comes_from_the_hub_is_put_in_shape_and_counted(hub, monkeypatch):
    recipe = preparation.Recipe(
        ROOT / "data" / "scientific", "", hub, reshape={"hub": lambda given: (t + "!" for t in given)}
    )
    source, reason, offline = preparation.choose_source(recipe, preparation.parse(recipe, []))
    assert (list(source.documents), source.total_bytes, reason, offline) == (
        ["train 0!", "train 1!", "train 2!"],
        30,
        "the hub answers",
        False,
    )
    arguments = preparation.parse(recipe, ["--text_column", "abstract", "--num_samples", "0"])
    assert len(list(preparation.choose_source(recipe, arguments)[0].documents)) == 5
    assert list(unwrapped(["  One\nparagraph.\n  Two\nlines.\n"])) == ["One paragraph.\n  Two lines."]
    plays = ["\n\n".join(f"WHO:\n{'word ' * 300}{n}" for n in range(7))]
    assert [text.count("WHO") for text in passages(plays)] == [3, 3, 1]
    assert "\n\n".join(passages(plays)) == plays[0]


# ---- docstrings and stories


def test_docstrings_are_found_wherever_they_stand():
    long = "a sentence that is long enough to count as documentation of something, in all its details"
    source = f'''
"""module {long}"""
if True:
    class A:
        """class {long}"""
        async def f(self):
            """function {long}

            Example:
                indented
            """
add_docstr(torch.f, r"""sum {long}""" + r"""
Args: {{input}}""".format(**common))
torch.g = _add_docstr(_g, """call {long}""")
add_newdoc("numpy", "ndarray", ("T", """method {long}"""))
print("""no docstring {long}""")
'''
    found = [text for text in docstrings.docstrings(source.encode()) if text]
    assert [text.split()[0] for text in docstrings.distinct(found)] == "module class function sum call method".split()  # noqa: SIM905
    assert f"function {long}\n\nExample:\n    indented" in found and f"sum {long}\nArgs: " in found


def test_variants_of_a_docstring_count_once():
    text = "Returns the sum of the elements along an axis, in the precision of the input. " * 4
    assert list(docstrings.distinct([text + "1d", "short", text + "2d", text.replace(" ", "\n")])) == [text + "1d"]


def test_a_source_for_another_python_is_passed_over():
    assert list(docstrings.docstrings(b"print 'two'")) == []


def test_the_docstrings_of_a_package_are_always_the_same():
    first, second = (list(docstrings.from_docstrings(["mpmath"]).documents) for _ in range(2))
    assert first == second and len(first) > 200
    assert any("Riemann zeta function" in text for text in first)


def test_packages_that_are_not_there_are_named():
    with pytest.raises(ValueError, match="none of nothing_here is installed"):
        docstrings.from_docstrings(["nothing_here"])


@pytest.mark.slow
def test_the_embedded_corpus_is_as_large_as_the_help_says():
    code = "import sys; from data.docstrings import from_docstrings; d = list(from_docstrings().documents)\n"
    code += "print(len(d), len(set(d)), sum(len(t.encode()) for t in d), *{'torch', 'sympy'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    documents, different, size = map(int, output.split())  # and nothing was imported
    assert documents == different > 15_000
    assert 12.5e6 < size < 14.5e6


def test_stories_are_many_different_and_the_same_every_time():
    told = list(stories())
    assert told == list(stories()) and len(set(told)) == len(told) == 6000
    assert told[0] != next(stories(seed=1))
    assert not any(re.search(r"[][{}|=#]|\ba [aeiou]|  |\n\n\n", text) for text in told)
    assert all(300 < len(text) < 1500 and text.count("\n\n") == 2 and text[-1] in '."' for text in told)
    assert len({word for text in told for word in text.split()}) > 1000


# ---- the scripts


def prepare(dataset, *arguments, cwd="/", **environment):
    command = [sys.executable, str(ROOT / "data" / dataset / "prepare.py"), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TIKTOKEN_CACHE_DIR": "", **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def papers(tmp_path):
    path = tmp_path / "papers.txt"
    path.write_text(
        "\n\n".join(f"Paper {n} shows that {n} is larger than {n - 1}, again and again." for n in range(400))
    )
    return path


@pytest.mark.parametrize("dataset", ["scientific", "tinystories", "shakespeare"])
def test_a_script_makes_a_dataset_of_files(dataset, papers, tmp_path):
    run = prepare(
        dataset, "--files", papers, "--out_dir", tmp_path / "out", "--tokenizer", "train", "--vocab_size", 300
    )
    assert run.returncode == 0, run.stderr
    opened = load_dataset(tmp_path / "out")
    assert (opened.name, opened.vocab_size, opened.meta["synthetic"]) == ("out", 300, False)
    assert opened.meta["tokenizer"]["name"] == "out-bpe" and "(1 read)" in opened.meta["source"]
    assert f"{opened.meta['train']['tokens']:,} tokens" in run.stdout and "(--files is given)" in run.stdout
    assert Tokenizer.load(opened.tokenizer_path).decode(opened.val[:5]).startswith("Paper")


def test_the_stand_in_is_called_synthetic_everywhere(written, tmp_path):
    run = prepare(
        "tinystories", "--out_dir", tmp_path / "stories", "--num_samples", 60, "--tokenizer", written / "tokenizer.json"
    )
    assert run.returncode == 0, run.stderr
    opened = load_dataset(tmp_path / "stories")
    assert opened.name == "stories-synthetic" and opened.meta["synthetic"] and "SYNTHETIC" in opened.meta["source"]
    assert opened.meta["train"]["documents"] + opened.meta["val"]["documents"] == 60
    assert run.stdout.count("SYNTHETIC") == 2 and "because the hub did not give roneneldan/TinyStories" in run.stdout


def test_what_is_left_out_is_told_and_a_tilde_is_the_home(papers, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "papers.txt").write_bytes(papers.read_bytes())
    for name in ("b.pdf", "c.csv", "LICENSE"):
        (tmp_path / "mine" / name).touch()
    (tmp_path / "~$draft.txt").write_text("One. Two. Three.")  # of an office program, which a shell's * names as well
    run = prepare("scientific", "--files", "~/mine", "--out_dir=~/own", "--vocab_size", 40_000)
    assert run.returncode == 0, run.stderr
    assert "(1 read, 3 of other kinds left out: .csv, .pdf, LICENSE)" in run.stdout
    assert "the text has no more pairs for the 40,000 asked for" in run.stdout
    assert load_dataset(tmp_path / "own").name == "own"
    shutil.copytree(tmp_path / "mine", tmp_path / "papéis")
    arguments = ("--files", "~$draft.txt", "papéis", "--out_dir=órgão", "--tokenizer=~/own/tokenizer.json")
    run = prepare("scientific", *arguments, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert run.returncode == 0 and "?rg?o" in run.stdout, run.stderr
    assert load_dataset(tmp_path / "órgão").meta["train"]["documents"]


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_a_tokenizer_can_be_taken_over(papers, written, bpe, tmp_path, name):
    run = prepare("scientific", "--files", papers, "--out_dir", tmp_path / "out", "--tokenizer", written / name)
    assert run.returncode == 0, run.stderr
    assert load_dataset(tmp_path / "out").tokenizer_fingerprint == bpe.fingerprint


@pytest.mark.slow
def test_a_script_without_arguments_needs_no_network(tmp_path):
    run = prepare("scientific", "--out_dir", tmp_path)
    assert run.returncode == 0, run.stderr
    assert load_dataset(tmp_path).meta["train"]["tokens"] > 3_000_000


MISTAKES = {
    "no such file": (["--files", "/nowhere.txt"], "/nowhere.txt: no such file"),
    "no files": (["--source", "files"], "--source files needs --files"),
    "an empty path": (["--files", ""], "--source files needs --files PATH ..., and one is empty"),
    "files and hub": (["--source", "hub", "--files", "x.txt"], "--files means nothing with --source hub"),
    "split and docs": (["--source", "docs", "--split", "line"], "--split means nothing with --source docs"),
    "no size": (["--vocab_size", "0", "--files", "PAPERS"], "--vocab_size 0 must be at least 1"),
    "negative": (["--num_samples", "-1"], "--num_samples is -1; it must be"),
    "no hub": (["--source", "hub"], "the hub did not give a/b: "),
    "hub options": (["--hub_dataset", "a/b"], "the hub did not give a/b: "),
    "no ranks": (["--tokenizer", "gpt2", "--files", "PAPERS"], "GPT-2's ranks were not found"),
    "no tokenizer": (
        ["--tokenizer", "/nowhere/tokenizer.json", "--files", "PAPERS"],
        "there is no tokenizer at /nowhere",
    ),
    "a folder without": (["--tokenizer", "/", "--files", "PAPERS"], "/ has no tokenizer.json"),
    "two sizes": (["--tokenizer", "TOKENIZER", "--vocab_size", "999", "--files", "PAPERS"], "--vocab_size is 999, and"),
    "fraction": (["--val_fraction", "2", "--files", "PAPERS"], "val_fraction is 2.0"),
    "one document": (["--split", "file", "--files", "PAPERS"], r"1 document\(s\), and train and val need at least one"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(case, papers, written, tmp_path, monkeypatch, capsys):
    arguments, sentence = MISTAKES[case]
    if "hub" in case:
        pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    monkeypatch.delenv(tokenizer_module.RANKS_VARIABLE, raising=False)
    monkeypatch.setattr(tokenizer_module, "DOWNLOAD_SECONDS", 0.2)
    places = {"PAPERS": papers, "TOKENIZER": written / "tokenizer.json"}
    arguments = [str(places.get(argument, argument)) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments, "--out_dir", str(tmp_path / "out")])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    recipe = preparation.Recipe(
        ROOT / "data" / "scientific", "", HubDataset("a/b", "text", "none", 5), ("docs", docstrings.from_docstrings)
    )
    with pytest.raises(SystemExit) as stop:
        preparation.main(recipe)
    assert stop.value.code == 1 and re.search(f"^prepare.py: .*{sentence}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def big_file(tmp_path):
    """25 MB: some seconds of work."""
    path = tmp_path / "big.txt"
    with path.open("w") as file:
        for n in range(20):
            file.write(
                "".join(f"Paper {n}.{m} shows that {m} is larger than {m - 1}, again.\n\n" for m in range(20_000))
            )
    return path


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_leaves_nothing_behind(big_file, written, tmp_path, number, code):
    out, script = tmp_path / "out", ROOT / "data" / "scientific" / "prepare.py"
    arguments = ["--files", big_file, "--out_dir", out, "--tokenizer", written / "tokenizer.json"]
    run = subprocess.Popen([sys.executable, script, *arguments], stderr=subprocess.PIPE, text=True)
    while not (out / ".val.bin.nanoforge-new").exists() or not (out / ".val.bin.nanoforge-new").stat().st_size:
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.02)
    run.send_signal(number)
    assert run.wait(30) == code
    assert "Traceback" not in run.stderr.read()
    assert not out.exists()


def test_a_stream_that_trains_a_tokenizer_is_still_whole(monkeypatch):
    monkeypatch.setattr(preparation, "SAMPLE_CHARACTERS", 500)
    read = []
    stream = (read.append(text) or text for text in texts(200))
    trained, documents = train_tokenizer(stream, "bpe", 300)
    assert trained.vocab_size == 300 and 500 <= sum(map(len, read)) < 1000
    assert list(documents) == texts(200)
    with pytest.raises(ValueError, match="the source gives no text"):
        train_tokenizer(iter([]), "bpe", 300)


def test_a_tokenizer_is_trained_on_the_further_vocabulary_of_its_source_too(tmp_path):
    told = Source(texts(), "tales", "none", vocabulary=["stable eigenvalues "] * 200)
    hub = HubDataset("a/b", "text", "none", 5)
    recipe = preparation.Recipe(ROOT / "data" / "tinystories", "", hub, offline=("tales", lambda: told))
    options = ["--source", "tales", "--vocab_size", "300", "--out_dir", str(tmp_path)]
    preparation.prepare(recipe, preparation.parse(recipe, options))
    trained = Tokenizer.load(tmp_path / "tokenizer.json")
    assert len(trained.encode(" eigenvalues")) == 1
    kept = documents_by_split(load_dataset(tmp_path))
    assert sorted(kept["train"] + kept["val"]) == sorted(texts())  # it is not part of the dataset itself


def test_the_stand_ins_vocabulary_is_the_docstrings():
    source = TINYSTORIES.offline[1]()
    assert not any("eigenvalues" in text for text in source.documents)
    assert any("eigenvalues" in text for text in source.vocabulary)


@pytest.mark.slow
def test_the_stand_ins_own_tokenizer_is_as_large_as_gpt2s_and_knows_science(tmp_path):
    run = prepare("tinystories", "--out_dir", tmp_path)
    assert run.returncode == 0, run.stderr
    trained = Tokenizer.load(tmp_path / "tokenizer.json")
    assert trained.vocab_size == preparation.GPT2_VOCAB_SIZE
    assert len(trained.encode(" eigenvalues")) == 1


MEASURED_WRITER = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from test_data import *
bpe = Tokenizer.load({tokenizer!r})
bpe.encode_documents = lambda texts: np.arange(sum(map(len, texts)) // 4) % 300  # as many ids, and in no time
write_dataset({directory!r}, from_files([{path!r}]).documents, bpe, **SOURCE)
status = Path("/proc/self/status").read_text()  # ru_maxrss would count the process that started this one, too
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_memory_does_not_grow_with_the_input(written, tmp_path):
    peaks = {}
    for megabytes in (10, 200):
        path = tmp_path / f"{megabytes}.txt"
        path.write_text(("words " * 200 + "\n\n") * (megabytes * 833))
        places = {"directory": str(tmp_path / "out"), "path": str(path), "tokenizer": str(written / "tokenizer.json")}
        code = MEASURED_WRITER.format(root=str(ROOT), **places)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks[megabytes] = int(run.stdout)
    assert peaks[200] < peaks[10] + 40, peaks
