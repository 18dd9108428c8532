"""train.py: exact resume, what a stop leaves behind, and what is refused before anything is built."""

import copy
import json
import math
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, ROOT, TINY, command
from torch.utils._python_dispatch import TorchDispatchMode

import configurator
import optimizer
import train
from checkpoint import CheckpointManager
from data.batches import BlockSampler, fixed_batches
from data.tokens import load_dataset
from distributed import Ranks
from optimizer import build_optimizer, learning_rate
from preflight import check_unchanged, disk_problems, prepare_start

CPU = torch.device("cpu")


def trainer(dataset: Path, out_dir: Path, *settings) -> train.Trainer:
    config, given = configurator.load([f"dataset={dataset}", f"out_dir={out_dir}", "compile=false", *QUICK, *settings])
    return train.Trainer(prepare_start(config, given, Ranks()), CPU, Ranks())


def history(directory: Path) -> list[dict]:
    """metrics.jsonl without the one number that time decides."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]


def differences(a, b, path="") -> list[str]:
    """Where two states differ, to the last bit."""
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, dict):
        return [d for k in a.keys() | b.keys() for d in differences(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, list | tuple):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}[{i}]")]
    return [] if a == b else [path]


def state(directory: Path) -> dict:
    loaded = CheckpointManager.load_training_state(directory)
    del loaded["config"]["out_dir"]
    return loaded


def wait_for(directory: Path, iteration: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = directory / "metrics.jsonl"
        if path.exists() and any(f'"iter": {iteration},' in line for line in path.read_text().splitlines()):
            return
        time.sleep(0.01)
    pytest.fail(f"iteration {iteration} was never reached: {process.communicate()}")


# ---- exact resume


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("dtype", "optimizer"),
    [
        ("float32", "adamw"),
        ("bfloat16", "muon"),
        pytest.param("bfloat16", "adamw", marks=SLOW),
        pytest.param("float16", "adamw", marks=SLOW),
    ],
)
def test_a_run_that_was_interrupted_and_resumed_equals_one_that_was_not(dataset, tmp_path, script, dtype, optimizer):
    numbers = (f"dtype={dtype}", f"optimizer={optimizer}", "dropout=0.2")
    settings = (f"dataset={dataset}", *QUICK, *numbers, "max_iters=60", "eval_interval=20")
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    done = script("train.py", *settings, f"out_dir={straight}")
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(
        command("train.py", *settings, f"out_dir={stopped}"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(stopped, 30, process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"saved in {stopped}" in out and "--init_from=resume" in out
    assert 30 <= state(stopped)["iter_num"] < 60
    done = script("train.py", "init_from=resume", f"out_dir={stopped}")
    assert done.returncode == 0, done.stderr
    assert history(stopped) == history(straight)
    assert differences(state(stopped), state(straight)) == []
    best = [CheckpointManager.load_model(d)[0].state_dict() for d in (stopped, straight)]
    assert differences(*best) == []


def test_a_killed_run_goes_on_from_its_last_save_and_no_step_is_recorded_twice(dataset, tmp_path, script):
    kill_and_go_on(tmp_path, script, f"dataset={dataset}", *QUICK, "dropout=0.2")


def kill_and_go_on(folder: Path, script, *settings: str) -> None:
    """A run killed between two saves and resumed must equal one that was not."""
    settings = (*settings, "max_iters=40", "eval_interval=10")
    straight, killed = folder / "straight", folder / "killed"
    assert script("train.py", *settings, f"out_dir={straight}").returncode == 0
    process = subprocess.Popen(command("train.py", *settings, f"out_dir={killed}"), stdout=subprocess.DEVNULL)
    wait_for(killed, 25, process)
    process.kill()
    process.wait()
    assert script("train.py", "init_from=resume", f"out_dir={killed}").returncode == 0
    assert history(killed) == history(straight)
    assert differences(state(killed), state(straight)) == []


def test_evaluation_draws_nothing_from_the_training_generators(dataset, tmp_path):
    often, never = (
        trainer(dataset, tmp_path / n, "max_iters=8", "dropout=0.3", f"eval_interval={i}")
        for n, i in (("a", 1), ("b", 8))
    )
    for run in (often, never):
        torch.manual_seed(5)
        run.run(train.StopSignal())
    assert differences(often.raw_model.state_dict(), never.raw_model.state_dict()) == []


def test_a_run_that_was_stopped_before_it_saved_is_not_to_be_resumed(dataset, tmp_path, monkeypatch, capsys):
    config, given = configurator.load([f"dataset={dataset}", f"out_dir={tmp_path / 'x'}", "compile=false", *QUICK])
    monkeypatch.setattr(train, "announce", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert train.train(config, given, Ranks()) == 143
    assert "nothing to save\nstart it again as before" in capsys.readouterr().out
    monkeypatch.undo()
    assert train.train(replace(config, max_iters=1, sample_tokens=0), given, Ranks()) == 0


def test_a_run_goes_on_without_anybody_to_tell(dataset, tmp_path):
    arguments = " ".join(command("train.py", f"dataset={dataset}", *QUICK, "max_iters=2", f"out_dir={tmp_path}/x"))
    for stdout in (">&-", "> /dev/full"):
        done = subprocess.run(f"{arguments}/{len(stdout)} {stdout}", shell=True, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_text_that_stdout_cannot_write_ends_no_program(dataset, tmp_path, script):
    """Windows gives a redirected program such a stdout; a model that has learned nothing writes U+FFFD."""
    ascii, out = {"env": {**os.environ, "PYTHONIOENCODING": "ascii"}}, tmp_path / "m\u00f6del"
    settings = (f"dataset={dataset}", f"out_dir={out}", *QUICK, "max_iters=2", "warmup_iters=3")
    done = script("train.py", *settings, **ascii)
    assert done.returncode == 0 and "m?del" in done.stdout, done.stderr
    assert "warmup_iters=3 is longer than the run" in done.stdout
    done = script("sample.py", out, "--prompt", "\u03b1", "--max_new_tokens", 5, **ascii)
    assert done.returncode == 0 and done.stdout.startswith("?"), done.stderr
    options = ("--prompt", "\u03b1", "--max_tokens", 40, "--out", tmp_path / "p.png")
    done = script("compare.py", out, out, *options, **ascii)
    assert done.returncode == 0 and "prompt: ?" in done.stdout, done.stderr


def test_a_signal_ends_an_evaluation_and_the_run_goes_on_exactly(dataset, tmp_path, script, monkeypatch):
    settings = (*QUICK, "max_iters=6", "eval_interval=3", "eval_iters=4", "dropout=0.1")
    run, stop = trainer(dataset, tmp_path / "stopped", *settings), train.StopSignal()
    progress, seen = run.log.progress, []

    def until_the_second_evaluation(line: str) -> None:
        seen.append(line)
        stop.number = signal.SIGTERM * (run.iter_num == 3 and line.startswith("evaluating val 1/"))
        progress(line)

    monkeypatch.setattr(run.log, "progress", until_the_second_evaluation)
    assert run.run(stop) == signal.SIGTERM and "evaluating val 1/4" in seen[-1]
    assert (run.saved_at, run.evaluated_at) == (3, 0) and run.raw_model.training
    assert script("train.py", "init_from=resume", f"out_dir={tmp_path / 'stopped'}").returncode == 0
    trainer(dataset, tmp_path / "whole", *settings).run(train.StopSignal())
    assert differences(state(tmp_path / "stopped"), state(tmp_path / "whole")) == []
    assert history(tmp_path / "stopped") == history(tmp_path / "whole")


@pytest.mark.parametrize("when", ["its last evaluation", "its last save"])
def test_a_signal_at_the_very_end_stops_only_what_is_left(dataset, tmp_path, script, monkeypatch, when):
    run, stop = trainer(dataset, tmp_path / "x", *QUICK, "max_iters=2", "eval_interval=2"), train.StopSignal()
    name = "evaluate" if when == "its last evaluation" else "save"
    method = getattr(run, name)

    def interrupted(*arguments):
        stop.number = signal.SIGINT * (run.iter_num == 2)
        return method(*arguments)

    monkeypatch.setattr(run, name, interrupted)
    assert run.run(stop) == (signal.SIGINT if name == "evaluate" else 0)
    done = script("train.py", "init_from=resume", f"out_dir={tmp_path / 'x'}")
    left = "only the last evaluation" if name == "evaluate" else "nothing"
    assert done.returncode == 0 and f"{left} is left to do: the run has its 2 steps" in done.stdout
    assert state(tmp_path / "x")["evaluated_at"] == 2


def test_ctrl_c_while_torch_is_imported_is_no_traceback(dataset, tmp_path):
    arguments = command("train.py", f"dataset={dataset}", *QUICK, f"out_dir={tmp_path / 'x'}")
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    maps = Path(f"/proc/{process.pid}/maps")
    deadline = time.monotonic() + 60
    while "libtorch" not in maps.read_text() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode in (-signal.SIGINT, 130) and b"Traceback" not in output


def test_sigterm_stops_with_143_and_a_second_signal_at_once(dataset, tmp_path):
    settings = (f"dataset={dataset}", *QUICK, "max_iters=100000", "eval_interval=100000")
    process = subprocess.Popen(command("train.py", *settings, f"out_dir={tmp_path / 'a'}"), stdout=subprocess.PIPE)
    wait_for(tmp_path / "a", 3, process)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert CheckpointManager.verify(tmp_path / "a") == []

    pid = os.fork()
    if pid == 0:
        with train.StopSignal():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(train.REPEATED_SIGNAL_SECONDS + 0.1)
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130


# ---- what is saved


def test_best_only_falls_and_ckpt_holds_it_while_last_goes_on(dataset, tmp_path, monkeypatch):
    run = trainer(dataset, tmp_path / "x", "max_iters=5", "eval_interval=1")
    losses = iter([3.0, 2.0, 2.5, 1.5, 4.0, 1.7])
    weights = {}

    def scripted(self, stop):
        loss = next(losses)
        weights[loss] = self.raw_model.lm_head.weight.detach().clone()
        return {"train_loss": loss, "val_loss": loss}

    monkeypatch.setattr(train.Trainer, "evaluate", scripted)
    run.run(train.StopSignal())
    model, metadata = CheckpointManager.load_model(tmp_path / "x")
    assert metadata["best_val_loss"] == 1.5 and metadata["iter_num"] == 3
    assert torch.equal(model.lm_head.weight, weights[1.5])
    last = CheckpointManager.load_training_state(tmp_path / "x")
    assert (last["iter_num"], last["best_val_loss"]) == (5, 1.5)
    assert torch.equal(last["model"]["lm_head.weight"], weights[1.7])


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(dataset, tmp_path):
    run = trainer(dataset, tmp_path / "x", "max_iters=50", "eval_interval=2", "save_minutes=0")
    poisoned = run.sampler.batch

    def batch(first, count):
        if run.iter_num == 5:
            with torch.no_grad():
                run.raw_model.transformer.ln_f.weight.fill_(math.inf)
        return poisoned(first, count)

    run.sampler.batch = batch
    with pytest.raises(FloatingPointError) as error:
        run.run(train.StopSignal())
    message = str(error.value)
    assert "at iteration 5 with learning rate" in message and f"iteration 4 is safe in {tmp_path / 'x'}" in message
    last = CheckpointManager.load_training_state(tmp_path / "x")
    assert last["iter_num"] == 4
    assert all(torch.isfinite(t).all() for t in last["model"].values())


def test_weights_that_are_not_finite_are_never_saved_by_a_signal_either(dataset, tmp_path):
    run, stop = trainer(dataset, tmp_path / "x", "max_iters=50", "eval_interval=1000"), train.StopSignal()
    step = run.step

    def poisoned_step():
        result = step()
        with torch.no_grad():
            run.raw_model.transformer.ln_f.weight[0] = math.nan
        stop.number = signal.SIGINT
        return result

    run.step = poisoned_step
    with pytest.raises(FloatingPointError, match=r"weights are not finite at iteration 1 .* iteration 0 is safe"):
        run.run(stop)
    assert CheckpointManager.load_training_state(tmp_path / "x")["iter_num"] == 0


def test_a_run_that_has_all_its_steps_says_so(dataset, finished, script):
    done = script("train.py", "init_from=resume", f"out_dir={finished}")
    assert done.returncode == 0 and "nothing is left to do: the run has its 4 steps" in done.stdout


def test_a_torn_run_that_is_begun_anew_keeps_none_of_its_numbers(dataset, tmp_path, script):
    out = tmp_path / "x"
    settings = ("train.py", f"dataset={dataset}", f"out_dir={out}", *QUICK, "max_iters=3", "eval_interval=3")
    assert script(*settings).returncode == 0
    first = history(out)
    for path in (*out.iterdir(), *(out / "last").iterdir()):  # what is left when the first save is cut short
        if path.is_file() and path.name not in ("training_log.txt", "metrics.jsonl"):
            path.unlink()
    assert script(*settings).returncode == 0
    assert history(out) == first


def test_a_learning_rate_that_explodes_is_one_sentence_and_exit_code_1(dataset, tmp_path, script):
    done = script(
        "train.py",
        f"dataset={dataset}",
        f"out_dir={tmp_path / 'x'}",
        *QUICK,
        "max_iters=200",
        "learning_rate=1e30",
        "grad_clip=0",
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "learning rate" in done.stderr and "is safe in" in done.stderr


def test_the_first_save_comes_before_the_first_step_and_then_by_minutes(dataset, tmp_path):
    run = trainer(dataset, tmp_path / "x", "max_iters=6", "eval_interval=1000", "save_minutes=0.000001")
    saved = []
    plain = run.save
    run.save = lambda best: (saved.append(run.iter_num), plain(best))
    run.run(train.StopSignal())
    assert saved == [0, 1, 2, 3, 4, 5, 6]


def test_a_sample_that_fails_loses_no_evaluation(dataset, tmp_path, monkeypatch):
    run = trainer(dataset, tmp_path / "x", "max_iters=4")
    monkeypatch.setattr(run, "_show_sample", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.run(train.StopSignal())
    assert CheckpointManager.verify(tmp_path / "x") == [] and state(tmp_path / "x")["evaluated_at"] == 0


def test_a_run_without_matplotlib_has_everything_but_the_picture(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # an import of it then fails
    assert trainer(dataset, tmp_path / "x", "max_iters=2").run(train.StopSignal()) == 0
    assert CheckpointManager.verify(tmp_path / "x") == [] and not (tmp_path / "x" / "loss.png").exists()


def test_the_directory_of_a_run_is_complete(dataset, tmp_path, script):
    out = tmp_path / "x"
    done = script("train.py", f"dataset={dataset}", f"out_dir={out}", *QUICK, "max_iters=4", "eval_interval=2")
    assert done.returncode == 0, done.stderr
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    listed = {"ckpt.pt", "config.json", "model_args.json", "tokenizer.json", "last/state.pt"}
    listed |= {"model.safetensors", "tokenizer_config.json", "generation_config.json"}
    assert names == listed | {"export_meta.json", "README.md", "training_log.txt", "metrics.jsonl", "loss.png"}
    meta = json.loads((out / "export_meta.json").read_text())
    assert set(meta["files"]) == listed
    assert meta["dataset"]["name"] == "tiny" and meta["tokenizer"]["name"] == "bpe-tiny"
    assert {p.stat().st_mode & 0o777 for p in out.rglob("*") if p.is_file()} == {0o644}
    assert json.loads((out / "config.json").read_text())["n_embd"] == 32
    assert "iteration 4/4" in done.stdout and "tokens/s" in done.stdout and "ETA" in done.stdout
    assert "bits per byte" in done.stdout and "sample:" in done.stdout


def test_a_full_disk_stops_the_run_with_one_sentence_and_the_last_save_intact(dataset, tmp_path, script):
    out = tmp_path / "x"
    settings = (f"dataset={dataset}", f"out_dir={out}", *QUICK, "eval_interval=2")
    assert script("train.py", *settings, "max_iters=4").returncode == 0
    before = state(out)
    limited = f"ulimit -f 64; exec {' '.join(command('train.py', 'init_from=resume', f'out_dir={out}', 'max_iters=8'))}"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot write" in done.stderr and "intact" in done.stderr and "Traceback" not in done.stderr
    assert differences(state(out), before) == []
    assert CheckpointManager.verify(out) == []


# ---- data order, schedule, optimizer


def test_an_epoch_visits_every_block_once_and_the_next_in_another_order():
    tokens = np.arange(1003, dtype=np.uint16)
    sampler = BlockSampler(tokens, 10, seed=3)
    epochs = [[sampler.start(e * sampler.blocks + i) for i in range(sampler.blocks)] for e in range(3)]
    for starts in epochs:
        assert len(set(starts)) == 100 and {s % 10 for s in starts} == {starts[0] % 10}
        assert max(starts) + 10 < len(tokens)
    assert epochs[0] != epochs[1]
    x, y = sampler.batch(95, 10)
    assert torch.equal(x + 1, y) and x.shape == (10, 10)
    again = BlockSampler(tokens, 10, seed=3)
    assert [again.start(250), again.start(7)] == [epochs[2][50], epochs[0][7]]
    assert [BlockSampler(tokens, 10, seed=4).start(i) for i in range(100)] != epochs[0]


class Advice:
    """In place of a mapped file: which bytes the kernel is asked to read."""

    def __init__(self):
        self.bytes = set()

    def madvise(self, option, start, length):
        assert option == mmap.MADV_WILLNEED and start % mmap.PAGESIZE == 0
        self.bytes |= set(range(start, start + length))


@pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="this system takes no advice")
def test_the_next_batch_is_read_from_the_disk_ahead_within_its_epoch(tmp_path):
    np.arange(52_000, dtype=np.uint16).tofile(tmp_path / "t.bin")
    tokens = np.memmap(tmp_path / "t.bin", np.uint16, "r")
    plain, sampler = BlockSampler(np.array(tokens), 50, seed=3), BlockSampler(tokens, 50, seed=3)
    for first in range(0, 2100, 4):  # two epochs and a bit, of 1039 blocks
        assert all(torch.equal(a, b) for a, b in zip(sampler.batch(first, 4), plain.batch(first, 4), strict=True))
    tokens._mmap = advice = Advice()
    sampler.batch(0, 4)
    wanted = {byte for i in range(4, 8) for byte in range(2 * sampler.start(i), 2 * (sampler.start(i) + 51))}
    assert wanted <= advice.bytes and len(advice.bytes) < 4 * (102 + mmap.PAGESIZE)
    sampler.batch(1036, 3)
    assert sampler.epoch == 0 and max(advice.bytes) < 2 * len(tokens)


def test_evaluation_batches_are_fixed_spread_and_do_not_overlap():
    tokens = np.arange(1000)
    batches = fixed_batches(tokens, 10, 4, 20)
    starts = list(chain(*batches))
    assert len(batches) == 5 and len(starts) == 20 and starts[0] == 0 and starts[-1] == 989
    assert all(b - a >= 10 for a, b in pairwise(starts))
    assert sum(map(len, fixed_batches(tokens, 10, 64, 320))) == 99


def test_the_schedules_warm_up_decay_and_end_where_they_say():
    config = configurator.RunConfig(max_iters=100, warmup_iters=10, learning_rate=1.0)
    rates = [learning_rate(step, config) for step in range(120)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55) and rates[100] == rates[119] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    wsd = replace(config, schedule="wsd", cooldown_iters=20, min_lr=0.0)
    rates = [learning_rate(step, wsd) for step in range(101)]
    assert set(rates[10:81]) == {1.0} and rates[90] == pytest.approx(0.5) and rates[100] == 0.0
    short = replace(wsd, warmup_iters=90, cooldown_iters=None)  # which leaves less than a fifth
    assert [learning_rate(step, short) for step in (89, 90, 95, 100)] == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_weight_decay_is_on_matrices_only(dataset, tmp_path):
    run = trainer(dataset, tmp_path / "x", "bias=true")
    decayed, plain = run.optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and {p.dim() for p in decayed["params"]} == {2}
    assert plain["weight_decay"] == 0.0 and {p.dim() for p in plain["params"]} == {1}
    assert sum(len(g["params"]) for g in run.optimizer.param_groups) == len(list(run.raw_model.parameters()))


@pytest.mark.parametrize("clip", [0.01, 100.0])
def test_gradients_are_scaled_down_to_grad_clip_and_not_up(dataset, tmp_path, clip):
    run, seen = trainer(dataset, tmp_path / "x", f"grad_clip={clip}"), []
    weights = list(run.raw_model.parameters())
    run.optimizer.register_step_pre_hook(lambda *_: seen.append(torch.cat([p.grad.flatten() for p in weights]).norm()))
    _, _, norm = run.step()
    assert 0.01 < norm < 100 and seen[0] == pytest.approx(min(norm, clip), rel=1e-4)


class Casts(TorchDispatchMode):
    """Counts what is made of tensors of a shape in another dtype."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        cast = function is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32
        self.count += cast and args[0].shape == self.shape
        return function(*args, **(kwargs or {}))


def test_a_step_casts_each_weight_once(dataset, tmp_path):
    settings = (*QUICK, "gradient_accumulation_steps=3", "dtype=bfloat16")
    ours = trainer(dataset, tmp_path / "a", *settings)
    with Casts(ours.raw_model.blocks[0].mlp.c_fc.weight.shape) as casts:
        steps = [ours.step() for _ in range(2)]
    assert casts.count == 2 * ours.config.n_layer
    other = trainer(dataset, tmp_path / "b", *settings)
    torch.set_autocast_cache_enabled(False)
    try:
        with Casts(casts.shape) as casts:
            assert [other.step() for _ in range(2)] == steps
    finally:
        torch.set_autocast_cache_enabled(True)
    assert casts.count == 3 * 2 * ours.config.n_layer


def newton_schulz(gradient: torch.Tensor) -> torch.Tensor:
    x = gradient.double() / gradient.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - (4.775 * gram - 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_makes_matrices_orthogonal_as_torchs_does_and_in_float32_more_exactly(shape, dtype, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(optimizer, "AT_ONCE", 2 * math.prod(shape))  # so that three of a shape are two and one
    matrices = [torch.nn.Parameter(torch.randn(size)) for size in (shape, shape, shape, (8, 8), shape)]
    theirs, exact = copy.deepcopy(matrices), [matrix.detach().double() for matrix in matrices]
    ours = optimizer.Muon(matrices, 0.1, 0.2, dtype)
    torchs = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    means = [torch.zeros_like(matrix) for matrix in exact]
    for _ in range(3):
        for i, (a, b) in enumerate(zip(matrices[:-1], theirs, strict=False)):  # the last one has no gradient
            a.grad = b.grad = torch.randn(a.shape)
            means[i] = 0.95 * means[i] + 0.05 * a.grad
            update = newton_schulz(0.05 * a.grad + 0.95 * means[i])
            exact[i] = exact[i] * (1 - 0.1 * 0.2) - 0.1 * 0.2 * max(a.shape) ** 0.5 * update
        ours.step()
        torchs.step()
    for a, b, c in zip(matrices, theirs, exact, strict=True):
        assert (a - c).norm() < (1e-6 if dtype == torch.float32 else 0.01) * c.norm()
        assert (a - b).norm() < 0.01 * c.norm()
    before = copy.deepcopy(ours.state_dict()["state"])
    optimizer.load_moments(ours, torchs.state_dict())  # what runs saved when it was torch's
    torch.testing.assert_close(ours.state_dict()["state"], before)


def test_an_orthogonal_matrix_has_singular_values_about_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(optimizer.orthogonal(torch.randn(3, 20, 30), torch.float32))
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("preset", ["small", "modern"])
def test_muon_updates_the_matrices_of_the_blocks_and_adamw_the_rest(dataset, tmp_path, preset):
    """Beside the two optimizers, each on its own weights."""
    rates = ("learning_rate=0.002", "muon_learning_rate=0.01", "warmup_iters=4")
    run = trainer(dataset, tmp_path / "x", f"preset={preset}", "optimizer=muon", "grad_clip=0", *rates)
    run._drop_gradients = lambda: None
    twin = copy.deepcopy(run.raw_model)
    named = dict(twin.named_parameters())
    inner = {n: p for n, p in named.items() if p.dim() == 2 and (".h." in n or ".layers." in n)}
    rest = [p for n, p in named.items() if n not in inner]
    assert len(inner) == 2 * (4 if preset == "small" else 7) and "lm_head.weight" not in inner
    decay = {True: 0.1, False: 0.0}
    adamw = torch.optim.AdamW(
        [{"params": [p for p in rest if (p.dim() > 1) is m], "weight_decay": decay[m]} for m in decay],
        lr=0.002 / 4,
        betas=(0.9, 0.95),
    )
    muon = optimizer.Muon(list(inner.values()), 0.01 / 4, 0.1, torch.float32)
    _, rate, _ = run.step()
    assert rate == 0.002 / 4
    for parameter, own in zip(twin.parameters(), run.raw_model.parameters(), strict=True):
        parameter.grad = own.grad
    adamw.step()
    muon.step()
    for name, parameter in run.raw_model.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-5, atol=1e-8, msg=name)


def test_branches_that_start_at_zero_leave_the_embeddings_as_they_are(dataset, tmp_path):
    run = trainer(dataset, tmp_path / "x", "preset=modern", "zero_init=true")
    model, ids = run.raw_model, torch.arange(12)[None]
    states = []
    model(ids, hidden_states=states)
    assert torch.equal(states[0], states[1]) and model.lm_head.weight.any()
    with torch.no_grad():
        torch.testing.assert_close(states[-1], model.final_norm(states[0]))


@pytest.mark.parametrize("tied", [True, False])
def test_an_embeddings_gradient_in_rows_is_the_gradient(dataset, tmp_path, tied):
    runs = [trainer(dataset, tmp_path / name, f"tie_word_embeddings={tied}") for name in ("rows", "matrix")]
    assert runs[0].raw_model.embedding.sparse is not tied
    runs[1].raw_model.embedding.sparse = False
    for run in runs:
        run._drop_gradients = lambda: None
        run.step()
    rows, matrix = (run.raw_model.embedding.weight.grad for run in runs)
    assert rows.layout is torch.strided and rows.any()
    torch.testing.assert_close(rows, matrix, rtol=1e-5, atol=1e-8)


def test_accumulated_gradients_equal_those_of_one_big_batch(dataset, tmp_path):
    gradients = []
    for batch_size, steps in ((8, 1), (2, 4)):
        run = trainer(
            dataset,
            tmp_path / f"{steps}",
            f"batch_size={batch_size}",
            f"gradient_accumulation_steps={steps}",
            "grad_clip=0",
        )
        run._drop_gradients = lambda: None
        run.step()
        gradients.append([p.grad for p in run.raw_model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_bits_per_byte_is_the_loss_over_the_bytes_of_the_text(dataset, tmp_path):
    metrics = trainer(dataset, tmp_path / "x").evaluate()
    meta = load_dataset(dataset).meta["val"]
    expected = metrics["val_loss"] * meta["tokens"] / (math.log(2) * meta["bytes"])
    assert metrics["val_bits_per_byte"] == pytest.approx(expected)


@SLOW
def test_two_processes_train_as_one_does(dataset, tmp_path):
    settings = (f"dataset={dataset}", *QUICK, "max_iters=6", "eval_interval=3", "gradient_accumulation_steps=4")
    for size in (1, 2):
        launcher = [command("x")[0], "-m", "torch.distributed.run", f"--nproc_per_node={size}", "--master_port=29611"]
        done = subprocess.run(
            [*launcher, *command("train.py", *settings, f"out_dir={tmp_path / str(size)}")[1:]],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    for a, b in zip(*(history(tmp_path / str(size)) for size in (1, 2)), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    one, two = (state(tmp_path / str(size)) for size in (1, 2))
    for name, weight in one["model"].items():
        torch.testing.assert_close(weight, two["model"][name], atol=2e-4, rtol=1e-3)
    assert len(two["generators"]) == 2


# ---- refusals


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory, script) -> Path:
    out = tmp_path_factory.mktemp("runs") / "gpt-46K-tiny-pretrain"
    done = script(
        "train.py",
        f"dataset={dataset}",
        f"out_dir={out}",
        *QUICK,
        "max_iters=4",
        "eval_interval=2",
        "learning_rate=0.01",
    )
    assert done.returncode == 0, done.stderr
    return out


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def test_a_run_is_not_written_over(dataset, finished, script):
    before = state(finished)
    done = script("train.py", f"dataset={dataset}", f"out_dir={finished}", *QUICK)
    refused(done, "already holds a run, at iteration 4", "--init_from=resume")
    assert differences(state(finished), before) == []


def test_nothing_is_written_over_that_is_not_a_torn_start(dataset, tmp_path, script):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text("{}")
    (theirs / ".notes.new").write_text("mine")
    refused(
        script("train.py", f"dataset={dataset}", f"out_dir={theirs}", *QUICK), "config.json", "not ours to write over"
    )
    assert (theirs / "config.json").read_text() == "{}" and (theirs / ".notes.new").exists()
    refused(script("train.py", f"dataset={dataset}", f"out_dir={theirs / 'config.json'}", *QUICK), "is a file")


def test_a_state_that_another_run_has_overtaken_is_not_gone_on_from(dataset, tmp_path):
    run = trainer(dataset, tmp_path / "x", "max_iters=4", "eval_interval=2")
    run.run(train.StopSignal())
    config, given = configurator.load(["init_from=resume", f"out_dir={tmp_path / 'x'}", "max_iters=9"])
    start = prepare_start(config, given, Ranks())
    check_unchanged(start)
    run.config.max_iters = 6
    run.run(train.StopSignal())
    with pytest.raises(ValueError, match="another run has just saved"):
        check_unchanged(start)


def test_a_resumed_run_has_the_rates_decay_and_betas_that_it_is_given_and_the_moments_that_it_had(dataset, tmp_path):
    run = trainer(dataset, tmp_path / "x", "max_iters=4", "optimizer=muon", "muon_learning_rate=0.02")
    run.run(train.StopSignal())
    changed = ("learning_rate=0.0005", "weight_decay=0.3", "beta1=0.5", "beta2=0.6", "max_iters=9")
    config, given = configurator.load(["init_from=resume", f"out_dir={tmp_path / 'x'}", *changed])
    resumed = train.Trainer(prepare_start(config, given, Ranks()), CPU, Ranks())
    assert (
        differences(resumed.optimizer.state_dict()["parts"][0]["state"], run.optimizer.parts[0].state_dict()["state"])
        == []
    )
    fresh = build_optimizer(resumed.raw_model, resumed.config)
    for found, expected in zip(resumed.optimizer.param_groups, fresh.param_groups, strict=True):
        assert {**found, "params": None} == {**expected, "params": None}
    resumed.step()
    adamw, _, muon = (group["lr"] for group in resumed.optimizer.param_groups)
    assert muon == pytest.approx(40 * adamw)


def test_a_changed_batch_size_changes_neither_the_evaluation_nor_the_place_in_the_data(dataset, tmp_path):
    run = trainer(dataset, tmp_path / "x", "max_iters=5", "eval_interval=5", "eval_iters=3")
    run.run(train.StopSignal())
    config, given = configurator.load(["init_from=resume", f"out_dir={tmp_path / 'x'}", "batch_size=1", "max_iters=9"])
    resumed = train.Trainer(prepare_start(config, given, Ranks()), CPU, Ranks())
    assert sorted(chain(*resumed.evaluation["val"])) == sorted(chain(*run.evaluation["val"]))
    assert resumed.evaluate() == pytest.approx(run.evaluate(), rel=1e-6)
    assert (resumed.samples_seen, resumed.samples_per_step) == (20, 2)
    resumed.step()
    assert resumed.samples_seen == 22


def test_a_stop_before_the_first_step_saves_nothing_and_spoils_nothing(dataset, tmp_path):
    run, stop = trainer(dataset, tmp_path / "x", "max_iters=4"), train.StopSignal()
    stop.number = signal.SIGINT
    assert run.run(stop) == signal.SIGINT
    assert not (tmp_path / "x" / "export_meta.json").exists()
    assert trainer(dataset, tmp_path / "x", "max_iters=4").run(train.StopSignal()) == 0


def test_a_reader_that_goes_away_does_not_stop_the_run(dataset, tmp_path):
    arguments = command("train.py", f"dataset={dataset}", f"out_dir={tmp_path / 'x'}", *QUICK, "max_iters=40")
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(timeout=120) == 0, process.stderr.read()
    assert state(tmp_path / "x")["iter_num"] == 40


def test_a_disk_that_is_too_small_is_found_before_anything_is_built(tmp_path):
    problems = disk_problems(tmp_path, trained=10**13)
    assert len(problems) == 1 and "MB free, and saving needs" in problems[0]
    assert disk_problems(tmp_path, trained=1000) == []


def test_compile_is_obeyed(dataset, tmp_path):
    compiled, plain = (trainer(dataset, tmp_path / s, f"compile={s}").model for s in ("true", "false"))
    assert isinstance(compiled, torch._dynamo.OptimizedModule) and not isinstance(plain, torch._dynamo.OptimizedModule)


def test_a_run_whose_metrics_were_removed_still_saves(dataset, tmp_path):
    run = trainer(dataset, tmp_path / "x", "max_iters=2", "eval_interval=2")
    run.run(train.StopSignal())
    (tmp_path / "x" / "metrics.jsonl").unlink()
    run.save(best=False)
    assert CheckpointManager.verify(tmp_path / "x") == []


@SLOW
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_run_resumes_exactly_and_saves_plain_names(dataset, tmp_path, script):
    settings = (f"dataset={dataset}", *QUICK, "compile=true", "dropout=0.2", "eval_interval=3")
    assert script("train.py", *settings, "max_iters=6", f"out_dir={tmp_path / 'a'}").returncode == 0
    assert script("train.py", *settings, "max_iters=3", "lr_decay_iters=6", f"out_dir={tmp_path / 'b'}").returncode == 0
    done = script("train.py", "init_from=resume", "max_iters=6", f"out_dir={tmp_path / 'b'}")
    assert done.returncode == 0 and "compile true" in done.stdout
    one, two = state(tmp_path / "a"), state(tmp_path / "b")
    assert not any("_orig_mod" in name for name in one["model"])
    assert differences(one["model"], two["model"]) == [] and differences(one["optimizer"], two["optimizer"]) == []


def test_resume_refuses_another_architecture_and_warns_of_other_changes(finished, script):
    resume = ("train.py", "init_from=resume", f"out_dir={finished}")
    refused(script(*resume, "n_layer=3"), "n_layer was 2 in the saved run and is 3 now (argument n_layer=3)")
    done = script(*resume, "max_iters=5", "learning_rate=0.002")
    assert done.returncode == 0, done.stderr
    assert "learning_rate was 0.01 in the saved run and is 0.002 now" in done.stdout


def test_resume_tells_of_other_threads_and_reads_what_it_can_of_a_spoilt_log(finished, tmp_path, script):
    shutil.copytree(finished, tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(b"\x89PNG\n")
    arguments = ("train.py", "init_from=resume", f"out_dir={tmp_path / 'run'}", "max_iters=13")
    done = script(*arguments, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    assert "computed with 1 threads and this one has 2" in done.stdout
    assert "before the first step" not in done.stdout


def test_resume_refuses_fewer_steps_than_there_were(finished, script):
    before = (finished / "last" / "state.pt").read_bytes()
    refused(
        script("train.py", "init_from=resume", f"out_dir={finished}", "max_iters=3"), "max_iters=3 is less than the"
    )
    assert (finished / "last" / "state.pt").read_bytes() == before


def test_resume_refuses_other_tokens(dataset, finished, tmp_path, script):
    from conftest import documents

    from data.tokens import write_dataset
    from tokenizer import Tokenizer

    other = tmp_path / "other"
    tokenizer = Tokenizer.load(dataset / "tokenizer.json")
    write_dataset(other, documents(seed=9), tokenizer, name="other", source="tests", licence="none", val_fraction=0.1)
    done = script("train.py", "init_from=resume", f"out_dir={finished}", f"dataset={other}")
    refused(done, "was trained on tiny", "holds other", "resume needs the same tokens")


def test_another_models_weights_are_a_start_and_its_tokenizer_is_checked(dataset, finished, tmp_path, script):
    from conftest import documents

    from data.tokens import write_dataset
    from tokenizer import train_bpe

    start = ("train.py", f"init_from={finished}", f"out_dir={tmp_path / 'ft'}", *QUICK[len(TINY) :], "max_iters=2")
    done = script(*start, f"dataset={dataset}", "block_size=16", "dropout=0.1")
    assert done.returncode == 0, done.stderr
    model, _ = CheckpointManager.load_model(tmp_path / "ft")
    assert (model.config.block_size, model.config.dropout) == (16, 0.1)
    first = json.loads((tmp_path / "ft" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["val_loss"] < 5.5, "the weights of the base were not taken"

    other = tmp_path / "other"
    tokenizer = train_bpe(documents(seed=9), "bpe-other", vocab_size=300)
    write_dataset(other, documents(seed=9), tokenizer, name="other", source="tests", licence="none", val_fraction=0.1)
    done = script(*start, f"dataset={other}", f"out_dir={tmp_path / 'on-other'}")
    assert done.returncode == 0, done.stderr
    assert f"{other} holds tokens of bpe-other; writing it in those of bpe-tiny" in done.stdout
    refused(script(*start, f"dataset={other}"), "already holds a run")
    done = script("train.py", "init_from=resume", f"out_dir={tmp_path / 'on-other'}", "max_iters=3")
    assert done.returncode == 0, done.stderr
    refused(script(*start, f"dataset={dataset}", "n_layer=7"), "n_layer=7", "is not what")


def test_a_nanogpt_dataset_trains_resumes_and_is_known_again(tmp_path, script):
    folder = tmp_path / "shakespeare_char"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        draw.integers(0, 65, 2000).astype("<u2").tofile(folder / f"{split}.bin")
    settings = ("train.py", f"dataset={folder}", f"out_dir={tmp_path / 'x'}", *QUICK, "max_iters=3")
    refused(script(*settings), "say it with --vocab_size")
    refused(script(*settings, "vocab_size=60"), "outside the model's vocab_size 60")
    done = script(*settings, "vocab_size=65")
    assert done.returncode == 0, done.stderr
    assert script("train.py", "init_from=resume", f"out_dir={tmp_path / 'x'}", "max_iters=4").returncode == 0
    draw.integers(0, 65, 2000).astype("<u2").tofile(folder / "train.bin")
    refused(script("train.py", "init_from=resume", f"out_dir={tmp_path / 'x'}", "max_iters=5"), "needs the same tokens")


def test_everything_wrong_is_said_at_once(dataset, tmp_path, script):
    out = tmp_path / "models" / "my-model"
    done = script("train.py", f"dataset={dataset}", f"out_dir={out}", *QUICK, "block_size=100000", "vocab_size=100")
    refused(done, "'my-model' is not", "the convention's name is", "block_size 100,000 needs 100,001")
    assert not out.exists()


def test_under_models_the_name_must_be_the_models(dataset, tmp_path, script):
    wrong = tmp_path / "models" / "gpt-38M-tiny-pretrain"
    done = script("train.py", f"dataset={dataset}", f"out_dir={wrong}", *QUICK)
    refused(done, "says 38M, and the model has 45,792", "gpt-46K-tiny-pretrain")
    elsewhere = script("train.py", f"dataset={dataset}", f"out_dir={tmp_path / 'x'}", *QUICK, "max_iters=3")
    assert elsewhere.returncode == 0 and "the convention's name is" in elsewhere.stdout


def test_without_an_out_dir_the_convention_gives_one(dataset, tmp_path, script):
    done = script("train.py", f"dataset={dataset}", *QUICK, "max_iters=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["gpt-46K-tiny-pretrain"]
    done = script("train.py", f"dataset={dataset}", "init_from=resume", *QUICK, "max_iters=4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("dataset=nowhere",), "there is no dataset nowhere"),
        (("init_from=nowhere",), "nowhere"),
        (("init_from=resume", "out_dir=nowhere"), "there is no model directory nowhere"),
        (("device=cuda:9",), "device=cuda:9 cannot be used here"),
        (("batchsize=3",), "did you mean 'batch_size'?"),
        (("muon_learning_rate=0.01",), "muon_learning_rate=0.01 belongs to optimizer=muon"),
        (("optimizer=muon", "muon_learning_rate=0"), "muon_learning_rate=0.0 must be above 0"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_exit_code_1(dataset, tmp_path, script, arguments, words):
    done = script("train.py", f"dataset={dataset}", f"out_dir={tmp_path / 'x'}", *QUICK, *arguments)
    refused(done, words)


def test_nothing_is_prepared_for_a_run_that_is_not_there(tmp_path, script):
    folder = tmp_path / "words"
    folder.mkdir()
    (folder / "prepare.py").write_text("open('prepared', 'w')")
    done = script("train.py", "init_from=resume", f"dataset={folder}", cwd=tmp_path)
    refused(done, "there is no models/gpt-*-words-pretrain to go on with: say which run with --out_dir")
    assert not (tmp_path / "prepared").exists()


def test_what_makes_a_base_that_is_not_there_is_told(tmp_path, script):
    (tmp_path / "models").mkdir()
    base = "there is no model directory models/gpt-38M-tinystories-pretrain"
    done = script("train.py", ROOT / "config/finetune_lora.py", cwd=tmp_path)
    refused(done, f"{base}; python train.py config/train_tinystories.py makes it\n")
    other = script("train.py", "init_from=models/other", cwd=tmp_path)
    refused(other, "there is no model directory models/other\n")


def test_a_read_only_folder_is_one_sentence(dataset, tmp_path, script):
    folder = tmp_path / "closed"
    folder.touch()  # a file where a folder should be stops root too, whom permissions do not
    refused(script("train.py", f"dataset={dataset}", f"out_dir={folder / 'x'}", *QUICK), str(folder))


def test_two_runs_cannot_write_to_one_directory(dataset, tmp_path, script):
    settings = (f"dataset={dataset}", *QUICK, "max_iters=100000", f"out_dir={tmp_path / 'x'}")
    process = subprocess.Popen(command("train.py", *settings), stdout=subprocess.DEVNULL)
    try:
        wait_for(tmp_path / "x", 2, process)
        refused(
            script("train.py", "init_from=resume", f"out_dir={tmp_path / 'x'}"), "is being written by another process"
        )
    finally:
        process.kill()
        process.wait()
