"""A small real dataset, a small real model, and the scripts as a user runs them."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several tests on one core wait for each other ten times as long
    os.environ["OMP_NUM_THREADS"] = "1"
import scripts
import torch

from data.tokens import write_dataset
from tokenizer import train_bpe

ROOT = Path(__file__).resolve().parent.parent
TINY = ("n_layer=2", "n_head=2", "n_embd=32", "block_size=32", "batch_size=2", "gradient_accumulation_steps=2")
QUICK = (*TINY, "warmup_iters=2", "eval_iters=2", "log_interval=1", "dtype=float32", "sample_tokens=8")


def documents(count=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    subjects, verbs, objects = (
        ("the gradient", "a model", "the loss", "this paper"),
        ("bounds", "shows", "is"),
        ("zero", "true"),
    )

    def pick(words):
        return words[torch.randint(len(words), (1,), generator=generator).item()]

    return [
        " ".join(f"{pick(subjects)} {pick(verbs)} {pick(objects)} {i % 7}." for _ in range(6)) for i in range(count)
    ]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """A dataset folder with its own tokenizer of some 300 entries."""
    directory = tmp_path_factory.mktemp("data") / "tiny"
    tokenizer = train_bpe(documents(), "bpe-tiny", vocab_size=320)
    write_dataset(directory, documents(), tokenizer, name="tiny", source="tests", licence="none", val_fraction=0.1)
    return directory


@pytest.fixture(scope="session")
def script():
    """Run one of the scripts: `script("train.py", "max_iters=3")` gives the finished process. With `env` it is a new
    one and no fork."""

    def run(name, *arguments, env=None, **options):
        if env is None:
            return scripts.run(ROOT / name, *map(str, arguments), **options)
        options = {"capture_output": True, "text": True, "timeout": 300, **options}
        return subprocess.run(command(name, *arguments), env=env, **options)

    return run


def command(name, *arguments):
    return [sys.executable, str(ROOT / name), *map(str, arguments)]


def forked(work, *arguments) -> int:
    """The id of a child process that does this work and nothing else: whatever it raises, it is no second pytest."""
    pid = os.fork()
    if pid == 0:
        try:
            work(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def kill_at_random_moments(save_number, loaded_number, times) -> None:
    """Kill a process that saves state n over state m: what loads afterwards is all of the one or all of the other."""
    save_number(0)
    start = time.perf_counter()
    os.waitpid(forked(save_number, 1), 0)
    duration, draw, outcomes = time.perf_counter() - start, random.Random(0), {"old": 0, "new": 0}
    for n in range(2, 2 + times):
        old, pid = loaded_number(), forked(save_number, n)
        time.sleep(draw.uniform(0, 1.2 * duration))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        now = loaded_number()
        assert now in (old, n)
        outcomes["new" if now == n else "old"] += 1
    assert min(outcomes.values()) > 0, outcomes


@pytest.fixture(autouse=True, scope="session")
def same_everywhere():
    """Tiny tensors gain nothing from threads, and the tests of a machine's cores run beside each other."""
    # A shell starts what runs in the background with SIGINT ignored, and children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
