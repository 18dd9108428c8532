"""Several processes, one model: real ones, with gloo, on tiny models. They compute what one process computes."""

import ctypes
import json
import math
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
from collections.abc import Hashable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from conftest import QUICK, ROOT, command, documents
from torch import Tensor
from torch.nn import functional as F

import configurator
import distributed
import families
import files
import train
from architecture import PRESETS
from checkpoint import CheckpointManager
from data.tokens import load_dataset, write_dataset
from distributed import Ranks, leave
from hugging_face import write_weights
from loss_in_shares import cross_entropy_in_shares, linear_cross_entropy_in_shares
from mesh import Mesh, mesh_problems
from model import GPT, GPTConfig
from parallel import cuts
from preflight import prepare_start
from tokenizer import Tokenizer

CPU = torch.device("cpu")
MESHES = {
    2: ("[[2],['fsdp']]", "[[2],['dp']]", "[[2],['tp']]"),
    4: ("[[4],['fsdp']]", "[[2,2],['fsdp','tp']]", "[[2,2],['dp','fsdp']]", "[[4],['tp']]"),
}
STEPS = (
    *QUICK,
    "compile=false",
    "max_iters=20",
    "n_head=4",
    "n_embd=32",
    "gradient_accumulation_steps=4",
    "bias=true",
    "warmup_iters=4",
)
MODELS = {
    "gpt2 tied": ("tie_word_embeddings=true", "vocab_size=323"),
    "gpt2": ("tie_word_embeddings=false", "bias=false"),
    "llama": ("preset=modern", "tie_word_embeddings=false", "vocab_size=321", "bias=false"),
    "llama tied": ("preset=modern", "tie_word_embeddings=true", "bias=false"),
}


# ---- which meshes there can be, found without a process


def test_a_mesh_is_parsed_and_filled():
    assert Mesh.parse("", 4) == Mesh(dp=4) and Mesh.parse(None) == Mesh()
    assert Mesh.parse("[[2,2],['fsdp','tp']]") == Mesh(fsdp=2, tp=2)
    assert Mesh.parse([[-1, 2], ["fsdp", "tp"]], 8) == Mesh(fsdp=4, tp=2)
    assert Mesh.parse([[1, 1], ["fsdp", "tp"]]).devices == 1
    assert (Mesh(2, 3, 4).devices, Mesh(2, 3, 4).readers) == (24, 6)
    assert Mesh.parse(str(Mesh(2, 3, 4))) == Mesh(2, 3, 4)
    with pytest.raises(ValueError, match="-1 is what a number of processes leaves"):
        Mesh.parse([[-1], ["fsdp"]])
    with pytest.raises(
        ValueError, match=r"axis 'pp' is none of dp, fsdp, tp; tp=0 must be .*; every axis can be there"
    ):
        Mesh.parse([[0, 2, 2], ["tp", "pp", "tp"]], 4)


GEMMA = PRESETS["gemma3-1b"]


@pytest.mark.parametrize(
    ("mesh", "processes", "config", "micro_batches", "words"),
    [
        (Mesh(fsdp=2, tp=2), 4, GPTConfig(), 2, []),
        (Mesh(tp=4), 4, GEMMA, 1, []),  # its one head of keys serves all four
        (Mesh(dp=2, fsdp=4), 8, GPTConfig(), 40, []),
        (
            Mesh(fsdp=2),
            4,
            GPTConfig(),
            4,
            ["fsdp=2 is for 2 process(es), and there are 4", 'mesh_shape=[[4], ["fsdp"]]'],
        ),
        (Mesh(fsdp=2, tp=2), 6, GPTConfig(), 6, ['mesh_shape=[[3, 2], ["fsdp", "tp"]] would fit', "nproc_per_node=4"]),
        (Mesh(tp=8), 8, GPTConfig(), 1, ["tp=8 does not divide n_head=12; for this model tp can be 1, 2, 3, 4, 6, 12"]),
        (Mesh(tp=3), 3, GEMMA, 1, ["does not divide n_head=4", "tp can be 1, 2, 4"]),
        (
            Mesh(tp=4),
            4,
            replace(GEMMA, n_head=24, n_kv_head=6),
            1,
            ["tp=4 neither divides n_kv_head=6 nor is"],
        ),
        (Mesh(tp=4), 4, replace(GEMMA, n_inner=6), 1, ["does not divide the MLP's width=6", "tp can be 1, 2"]),
        (Mesh(fsdp=4), 4, GPTConfig(), 6, ["gradient_accumulation_steps=6 must be a multiple of the 4", "4 or 8"]),
        (Mesh(fsdp=3, tp=5), 4, GPTConfig(), 1, ["15 process(es)", "tp=5 does not divide", "the nearest is 3"]),
    ],
)
def test_all_that_is_wrong_with_a_mesh_is_said_with_what_would_be_right(mesh, processes, config, micro_batches, words):
    problems = mesh_problems(mesh, processes, config, micro_batches)
    assert bool(problems) == bool(words)
    assert all(word in "; ".join(problems) for word in words), problems


def test_a_mesh_shape_is_read_from_files_and_arguments_and_its_source_is_named(tmp_path):
    file = tmp_path / "mesh.py"
    file.write_text("config = {'mesh_shape': [[2, 2], ['fsdp', 'tp']]}")
    assert Mesh.parse(configurator.load([str(file)])[0].mesh_shape) == Mesh(fsdp=2, tp=2)
    assert Mesh.parse(configurator.load(['--mesh_shape=[[4],["tp"]]'])[0].mesh_shape) == Mesh(tp=4)
    file.write_text("config = {\n'mesh_shape': [[2], ['pp']]}")
    with pytest.raises(ValueError, match=r"mesh.py:2: mesh_shape=.*axis 'pp' is none of dp, fsdp, tp"):
        configurator.load([str(file)])


def test_the_shares_of_a_fused_projection_and_of_an_odd_vocabulary_make_the_whole():
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 97, 1, 4, 8))
    found = [cuts(model, 4, rank) for rank in range(4)]
    for name, cut in found[0].items():
        whole = model.get_parameter(name).detach()
        rebuilt = torch.full_like(whole, math.nan)
        for rank in range(4):
            at = 0
            for stretch in found[rank][name].stretches:
                own = found[rank][name].of(whole).narrow(cut.dim, at, len(stretch))
                rebuilt.narrow(cut.dim, stretch.start, len(stretch)).copy_(own)
                at += len(stretch)
        assert torch.equal(rebuilt, whole), name
    assert [len(f["transformer.wte.weight"].stretches[0]) for f in found] == [24, 24, 24, 25]
    assert [s.start for s in found[1]["transformer.h.0.attn.c_attn.weight"].stretches] == [2, 10, 18]


# ---- real processes


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def started(processes: int, work, *arguments):
    """What `work(ranks, *arguments)` gives on rank 0 of so many processes."""
    port = free_port()
    start = {"nprocs": processes, "start_method": "forkserver"}  # as scripts.py has set it up
    results = torch.multiprocessing.get_context("forkserver").SimpleQueue()
    torch.multiprocessing.start_processes(_worker, (processes, port, results, work, arguments), **start)
    return results.get()


def _worker(rank, processes, port, results, work, arguments):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    ranks = Ranks()
    result = work(ranks, *arguments)
    if rank == 0:
        results.put(result)
    ranks.close()
    leave(0)


def test_gloo_announces_an_address_that_other_machines_reach(monkeypatch):
    """Where the machine's name is one of loopback, as Debian has it, to itself and in /etc/hosts."""
    own = distributed.address_towards("192.0.2.1")  # the way there is looked up and not gone
    if sys.platform != "linux" or distributed.is_loopback(own):
        pytest.skip("needs Linux and a network interface")
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "given")
    for master, found in ((own, own), ("localhost", own), ("localhost", "127.0.0.1")):
        monkeypatch.setenv("MASTER_ADDR", master)
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
        store = torch.distributed.HashStore()
        store.set(distributed.ADDRESS, found)
        distributed.announce_reachable_address(store, last=False)
        assert os.environ.get("GLOO_SOCKET_IFNAME") == (
            None if found == "127.0.0.1" else distributed.interface_with(own)
        )
    os.environ["GLOO_SOCKET_IFNAME"] = "given"
    distributed.announce_reachable_address(store, last=True)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "given" and store.get(distributed.ADDRESS) == b"127.0.0.1"


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_never_meet_say_so(monkeypatch, rank):
    place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "MEETING", timedelta(seconds=1), raising=False)
    monkeypatch.setattr(distributed, "PATIENCE", timedelta(seconds=1))
    with pytest.raises(OSError, match=f"rank {rank} of 2 does not reach the others .*GLOO_SOCKET_IFNAME"):
        Ranks()


LETTING_GO = """
import os, sys, warnings
import torch
import torch.distributed as dist
from distributed import leave

warnings.simplefilter("ignore")

def let_go(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    sys.group = dist.group.WORLD  # held to the end, as DTensor holds those of a mesh
    tensors = [torch.ones(4) for _ in range(20_000)]
    work = dist.all_reduce_coalesced(tensors, async_op=True)
    del tensors
    work.wait()
    del work
    dist.barrier()
    dist.destroy_process_group()
    leave(0)

for turn in range(10):
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            let_go(rank, f"{sys.argv[1]}-{turn}")
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0], (turn, codes)
"""


def test_no_process_is_aborted_by_a_thread_that_still_lets_go_of_tensors(tmp_path):
    environment = {**os.environ, "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", LETTING_GO, str(tmp_path / "store")], env=environment, check=True)


def trainer(ranks: Ranks, *settings: str) -> train.Trainer:
    config, given = configurator.load(list(settings))
    start = prepare_start(config, given, ranks)
    ranks.arrange(Mesh.parse(start.config.mesh_shape, ranks.size), "cpu")
    return train.Trainer(start, CPU, ranks)


def steps(ranks: Ranks, *settings: str, count: int = 20) -> list[tuple[float, float]]:
    """(loss, norm of the gradient) of every step, and the evaluation after them."""
    run = trainer(ranks, *settings)
    run._show_sample()  # which no step may notice
    found = [run.step() for _ in range(count)]
    return [(loss, norm) for loss, _, norm in found] + [tuple(run.evaluate().values())[:2]]


def many(ranks: Ranks, cases: dict[Hashable, tuple], count: int = 20) -> dict[Hashable, list]:
    return {name: steps(ranks, *settings, count=count) for name, settings in cases.items()}


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return many(
        Ranks(), {name: (*STEPS, f"dataset={dataset}", f"out_dir={folder / 'x'}", *s) for name, s in MODELS.items()}
    )


SOME, OTHERS = ("gpt2 tied", "llama"), ("gpt2", "llama tied")
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("processes", "models"),
    [(2, SOME), *(pytest.param(*more, marks=SLOW) for more in ((4, SOME), (2, OTHERS), (4, OTHERS)))],
)
def test_every_step_of_every_mesh_is_that_of_one_process(alone, dataset, tmp_path, processes, models):
    begin = (*STEPS, f"dataset={dataset}", f"out_dir={tmp_path / 'x'}")
    cases = {
        (name, mesh): (*begin, *MODELS[name], f"mesh_shape={mesh}") for name in models for mesh in MESHES[processes]
    }
    for (name, mesh), found in started(processes, many, cases).items():
        assert differ(found, alone[name]) < 1e-5, (name, mesh, found[:3], alone[name][:3])


def test_a_mesh_of_one_is_no_mesh(alone, dataset, tmp_path):
    begin = (*STEPS, f"dataset={dataset}", f"out_dir={tmp_path / 'x'}", *MODELS["gpt2"])
    assert steps(Ranks(), *begin, "mesh_shape=[[1,1],['fsdp','tp']]") == alone["gpt2"]


MODES = {  # and by how much it may differ from one process in the same mode: float16 and bfloat16 round their products
    "activation_checkpointing=true": 1e-5,
    "dtype=bfloat16": 1e-2,
    "dtype=float16": 1e-3,
}


@SLOW
def test_precisions_and_recomputing_do_in_a_mesh_what_they_do_in_one_process(dataset, tmp_path):
    begin = (*STEPS, f"dataset={dataset}", f"out_dir={tmp_path / 'x'}")
    cases = {
        (name, mode, mesh): (*begin, *MODELS[name], mode, f"mesh_shape={mesh}")
        for name in SOME
        for mode in MODES
        for mesh in MESHES[2]
        if "float16" not in mode or "tp" not in mesh
    }
    found = started(2, many, cases, 6)
    for (name, mode, mesh), result in found.items():
        expected = steps(Ranks(), *begin, *MODELS[name], mode, count=6)
        assert differ(losses(result), losses(expected)) < MODES[mode], (name, mode, mesh)


def losses(found: list[tuple]) -> list[tuple]:
    return [(loss,) for loss, _ in found]


def test_recomputing_draws_the_same_dropout(dataset, tmp_path):
    settings = (*STEPS, f"dataset={dataset}", f"out_dir={tmp_path / 'x'}", "dropout=0.2")
    kept, recomputed = (steps(Ranks(), *settings, f"activation_checkpointing={b}", count=3) for b in ("false", "true"))
    assert kept == recomputed


@SLOW
def test_compiled_blocks_compute_the_same(alone, dataset, tmp_path):
    begin = (*STEPS, f"dataset={dataset}", f"out_dir={tmp_path / 'x'}", "compile=true")
    cases = {(n, mesh): (*begin, *MODELS[n], f"mesh_shape={mesh}") for n in ("gpt2", "llama") for mesh in MESHES[2]}
    for (name, mesh), found in started(2, many, cases, 4).items():
        assert differ(found[:4], alone[name][:4]) < 1e-5, (name, mesh)


def differ(found: list[tuple], expected: list[tuple]) -> float:
    pairs = zip(chain(*found), chain(*expected), strict=True)
    return max(abs(a - b) for a, b in pairs)


def losses_in_shares(ranks: Ranks, x: Tensor, weight: Tensor, targets: list[Tensor]) -> list[tuple[float, Tensor]]:
    """Of each targets, once with the projection and once of logits: the loss and rank 0's part of weight's gradient."""
    ranks.arrange(Mesh(tp=2), "cpu")
    first, found = ranks.tp_rank * len(weight) // 2, []
    own = weight[first : first + len(weight) // 2].clone().requires_grad_()
    for some in targets:
        for values in ((x, own), (x @ own.t(),)):
            function = linear_cross_entropy_in_shares if len(values) == 2 else cross_entropy_in_shares
            loss = function(*values, some, first, ranks.group("tp"), -1)
            found.append((loss.item(), torch.autograd.grad(loss, own)[0].numpy()))
    return found


def test_a_loss_in_shares_is_that_of_one_process_and_without_targets_there_is_none():
    torch.manual_seed(0)
    x, weight, targets = torch.randn(6, 8), torch.randn(10, 8, requires_grad=True), torch.tensor([0, 9, 4, -1, 5, 2])
    found = started(2, losses_in_shares, x, weight.detach(), [targets, torch.full((6,), -1)])
    loss = F.cross_entropy(x @ weight.t(), targets, ignore_index=-1)
    (gradient,) = torch.autograd.grad(loss, weight)
    for value, part in found[:2]:
        assert value == pytest.approx(loss.item(), rel=1e-6)
        torch.testing.assert_close(torch.from_numpy(part), gradient[:5])
    assert all(math.isnan(value) and not part.any() for value, part in found[2:])


# ---- saved in shares, resumed anywhere


def part_of_a_run(ranks: Ranks, count: int, *settings: str) -> list[float]:
    """The losses of so many steps more, saved then with the best weights."""
    run = trainer(ranks, *settings)
    losses = [run.step()[0] for _ in range(count)]
    run.evaluate_and_save()
    return losses


def parts_of_runs(ranks: Ranks, parts: list[tuple]) -> list[list[float]]:
    return [part_of_a_run(ranks, *part) for part in parts]


def state(directory: Path) -> dict:
    loaded = CheckpointManager.load_training_state(directory)
    return {"model": loaded["model"], "optimizer": loaded["optimizer"]["state"], "seen": loaded["samples_seen"]}


def largest_difference(a, b) -> float:
    if isinstance(a, torch.Tensor):
        assert a.shape == b.shape and a.dtype == b.dtype
        return (a - b).abs().max().item() if a.numel() else 0.0
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((largest_difference(a[key], b[key]) for key in a), default=0.0)
    return abs(a - b)


@pytest.mark.parametrize("kind", ["gpt2 tied", pytest.param("llama", marks=SLOW)])
def test_a_run_goes_on_in_another_mesh_and_in_one_process_as_it_would_have(dataset, tmp_path, kind):
    begin = (*STEPS, f"dataset={dataset}", *MODELS[kind])
    straight, out = tmp_path / "straight", tmp_path / "out"
    changed = ("weight_decay=1.0", "beta1=0.5", "beta2=0.5")  # which the saved optimizer has otherwise
    expected = part_of_a_run(Ranks(), 2, *begin, f"out_dir={straight}")
    expected += part_of_a_run(Ranks(), 10, "init_from=resume", f"out_dir={straight}", *changed)
    resume = ("init_from=resume", f"out_dir={out}")
    found = part_of_a_run(Ranks(), 2, *begin, f"out_dir={out}")
    more = [
        (2, *resume, *changed, "mesh_shape=[[2,2],['fsdp','tp']]"),
        (2, *resume, "mesh_shape=[[2,2],['dp','fsdp']]"),
    ]
    found += chain(*started(4, parts_of_runs, more))
    found += started(2, part_of_a_run, 2, *resume, "mesh_shape=[[2],['tp']]")
    assert len(list((out / "last").iterdir())) == 4  # the state, the index and two shards; those of four are gone
    assert CheckpointManager.verify(out) == []
    found += started(2, part_of_a_run, 2, *resume)
    middle = state(out)
    found += part_of_a_run(Ranks(), 2, *resume)
    assert [path.name for path in (out / "last").iterdir()] == ["state.pt"]
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-5
    assert middle["seen"] == 10 * 8 and largest_difference(state(out), state(straight)) < 1e-4
    whole, again = (CheckpointManager.load_model(path)[0].state_dict() for path in (straight, out))
    assert largest_difference(whole, again) < 1e-4


def test_a_directory_in_shards_is_looked_after_like_any_other(dataset, tmp_path, script):
    out = tmp_path / "models" / "gpt-47K-tiny-pretrain"
    started(2, part_of_a_run, 1, *STEPS, f"dataset={dataset}", f"out_dir={out}", "mesh_shape=[[2],['fsdp']]")
    assert "is sound" in script("checkpoint.py", "verify", out).stdout
    assert "complete" in script("checkpoint.py", "list", out.parent).stdout
    assert "last/shard-00001.safetensors" in script("checkpoint.py", "show", out).stdout
    assert script("checkpoint.py", "deploy", out, tmp_path / "deployed").returncode == 0
    assert not (tmp_path / "deployed" / "last").exists()
    assert not any(path.suffix == ".metadata" or path.name == ".metadata" for path in out.rglob("*"))
    state = CheckpointManager.load_training_state(out)["model"]
    assert largest_difference(CheckpointManager.load_model(out / "last" / "state.pt")[0].state_dict(), state) == 0

    damaged = out / "last" / "shard-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert "shard-00001.safetensors is damaged" in script("checkpoint.py", "verify", out).stdout
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is damaged: its sha256"):
        CheckpointManager.load_training_state(out)


def test_an_index_of_shards_that_is_none_is_refused(dataset, tmp_path):
    out = tmp_path / "x"
    started(2, part_of_a_run, 1, *STEPS, f"dataset={dataset}", f"out_dir={out}", "mesh_shape=[[2],['fsdp']]")
    for content in (b"[]", b'{"tensors": {"model.lm_head.weight": {"dtype": "float32", "shape": [1]}}}', b"no JSON"):
        files.commit(out, {"last/shards.json": lambda file, content=content: file.write(content)}, {})
        with pytest.raises(ValueError, match=r"shards.json"):
            CheckpointManager.load_training_state(out)


def straight_and_in_two(ranks: Ranks, folder: Path, meshes: tuple[str, ...], *settings: str) -> None:
    for i, mesh in enumerate(meshes):
        out = [f"out_dir={folder / str(i) / name}" for name in ("straight", "stopped")]
        part_of_a_run(ranks, 4, *settings, out[0], f"mesh_shape={mesh}")
        part_of_a_run(ranks, 2, *settings, out[1], f"mesh_shape={mesh}")
        part_of_a_run(ranks, 2, "init_from=resume", out[1])


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=SLOW)])
def test_the_same_mesh_goes_on_exactly(dataset, tmp_path, processes):
    settings = (*STEPS, f"dataset={dataset}", "dropout=0.1")
    started(processes, straight_and_in_two, tmp_path, MESHES[processes], *settings)
    for i, mesh in enumerate(MESHES[processes]):
        assert largest_difference(*(state(tmp_path / str(i) / name) for name in ("straight", "stopped"))) == 0, mesh


# ---- starting from a model, all of it or adapters


@pytest.fixture(scope="module")
def bases(dataset, tmp_path_factory) -> dict[str, Path]:
    """Of every kind one of our directories, and the same as Hugging Face's: in bfloat16, and nothing of ours."""
    folder = tmp_path_factory.mktemp("bases")
    found = {}
    for kind, settings in MODELS.items():
        ours = folder / kind.replace(" ", "-")
        part_of_a_run(Ranks(), 2, *STEPS, f"dataset={dataset}", f"out_dir={ours}", *settings)
        theirs = folder / f"hf-{ours.name}"
        write_base(theirs, CheckpointManager.load_model(ours)[0].to(torch.bfloat16), dataset)
        found |= {kind: ours, f"hf {kind}": theirs}
    found["hf two keys"] = folder / "hf-two-keys"
    shape = {"block": "llama", "activation": "silu", "bias": False, "n_kv_head": 2}
    write_base(found["hf two keys"], GPT(GPTConfig(32, load_dataset(dataset).vocab_size, 2, 4, 32, **shape)), dataset)
    return found


def write_base(folder: Path, model: GPT, dataset: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(families.hf_config(model.config)))
    (folder / "tokenizer.json").write_bytes((dataset / "tokenizer.json").read_bytes())
    with open(folder / "model.safetensors", "wb") as file:
        write_weights(file, model)


TRAINING = tuple(s for s in STEPS if not s.startswith(("n_", "bias", "block_size")))
LORA = (*TRAINING, "block_size=32", "lora=true", "lora_rank=4", "learning_rate=1e-2")
ADAPTED = {
    "gpt2 tied": (*LORA, "lora_targets=all-linear"),
    "llama": (*LORA, "lora_targets=all"),
    "hf llama tied": (*LORA, "lora_targets=q_proj,v_proj,down_proj,lm_head", "lora_untie=true"),
    "hf gpt2": (*TRAINING, "block_size=32"),
    "hf two keys": (*LORA, "lora_targets=all-linear", "learning_rate=3e-3"),  # each of two ranks, of four
}


@pytest.mark.parametrize(
    ("processes", "models"),
    [
        (2, SOME),
        pytest.param(4, (*SOME, "hf two keys"), marks=SLOW),
        pytest.param(2, ("hf llama tied", "hf gpt2"), marks=SLOW),
    ],
)
def test_adapters_and_fine_tuning_are_what_they_are_in_one_process(bases, dataset, tmp_path, processes, models):
    here = f"dataset={dataset}", f"out_dir={tmp_path / 'x'}"
    begin = {name: (*ADAPTED[name], f"init_from={bases[name]}", *here) for name in models}
    cases = {(name, mesh): (*begin[name], f"mesh_shape={mesh}") for name in models for mesh in MESHES[processes][1:]}
    found = started(processes, many, cases)
    for name in models:
        expected = steps(Ranks(), *begin[name])
        for mesh in MESHES[processes][1:]:
            assert differ(found[name, mesh], expected) < 1e-5, (name, mesh)


def test_a_rounded_base_and_its_adapter_in_bfloat16(bases, dataset, tmp_path):
    begin = (*ADAPTED["llama"], f"init_from={bases['llama']}", f"dataset={dataset}", f"out_dir={tmp_path / 'x'}")
    cases = {mesh: (*begin, "dtype=bfloat16", f"mesh_shape={mesh}") for mesh in MESHES[2]}
    expected = steps(Ranks(), *begin, "dtype=bfloat16", count=6)
    for mesh, found in started(2, many, cases, 6).items():
        assert differ(losses(found), losses(expected)) < 1e-2, mesh


def memory_to_start(ranks: Ranks, warm: tuple[str, ...], settings: tuple[str, ...]) -> list[tuple[int, int]]:
    """For every rank: by how many bytes the process's own memory, mapped files aside, grew at most, and in the end.
    `warm` are the settings of a small run that has what every run has."""
    trainer(ranks, *warm)
    before, most, done = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, own_memory())

    watching = threading.Thread(target=watch)
    watching.start()
    kept = trainer(ranks, *settings)
    done.set()
    watching.join()
    assert kept.raw_model.config.n_layer == 12
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and is yet in the heap is nobody's
    return ranks.gather((most - before, own_memory() - before))


def own_memory() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@SLOW
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
def test_a_base_is_never_whole_in_a_process(dataset, tmp_path):
    vocab_size = load_dataset(dataset).vocab_size
    model = GPT(GPTConfig(64, vocab_size, 12, 8, 512, block="llama", activation="silu", bias=False, n_inner=2048))
    write_base(tmp_path / "base", model, dataset)
    size, here = 4 * model.num_params(), (f"dataset={dataset}", f"out_dir={tmp_path / 'x'}")
    begin = (*TRAINING, *here, f"init_from={tmp_path / 'base'}", "lora=true")
    for mesh in ("mesh_shape=[[4],['fsdp']]", "mesh_shape=[[4],['tp']]"):
        for most, kept in started(4, memory_to_start, (*STEPS, *here, mesh), (*begin, mesh)):
            assert kept < 0.33 * size and most < 0.6 * size, (mesh, most / size, kept / size)


@SLOW
def test_an_adapter_saved_by_a_mesh_opens_and_goes_on_like_one_of_a_process(bases, dataset, tmp_path):
    begin = (*ADAPTED["llama"], f"init_from={bases['llama']}", f"dataset={dataset}")
    straight, out = tmp_path / "straight", tmp_path / "out"
    expected = part_of_a_run(Ranks(), 6, *begin, f"out_dir={straight}")
    found = started(4, part_of_a_run, 2, *begin, f"out_dir={out}", "mesh_shape=[[2,2],['fsdp','tp']]")
    assert (out / "adapters" / "adapter_model.safetensors").exists() and not (out / "ckpt.pt").exists()
    assert CheckpointManager.verify(out) == []
    found += started(2, part_of_a_run, 2, "init_from=resume", f"out_dir={out}")
    found += part_of_a_run(Ranks(), 2, "init_from=resume", f"out_dir={out}")
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-5
    assert largest_difference(state(out), state(straight)) < 1e-4
    whole, again = (CheckpointManager.load_model_for_inference(path).state_dict() for path in (straight, out))
    assert largest_difference(whole, again) < 1e-4


# ---- what goes wrong on one process


class Run:
    """Processes of train.py as torchrun starts them, each with an environment and limits of its own."""

    def __init__(
        self,
        processes: int,
        *settings: str,
        largest_file: dict[int, int] | None = None,
        own: dict[int, tuple[str, ...]] | None = None,
    ):
        port = free_port()
        self.processes = []
        for rank in range(processes):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            size = (largest_file or {}).get(rank)
            limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size)) if size else None
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            words = command("train.py", *settings, *(own or {}).get(rank, ()))
            one = subprocess.Popen(words, env=environment, preexec_fn=limit, **pipes)
            self.processes.append(one)

    def ended(self, timeout: float = 90) -> tuple[list[int], str, str]:
        """(exit codes, everything on stdout, everything on stderr); no process may need longer."""
        try:
            texts = [process.communicate(timeout=timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [p.returncode for p in self.processes], *("".join(part) for part in zip(*texts, strict=True))


def wait_for(directory: Path, iteration: int, run: Run) -> None:
    deadline, path = time.monotonic() + 90, directory / "metrics.jsonl"
    while time.monotonic() < deadline and all(process.poll() is None for process in run.processes):
        if path.exists() and f'"iter": {iteration},' in path.read_text():
            return
        time.sleep(0.01)
    pytest.fail(f"iteration {iteration} was never reached: {run.ended(1)}")


def test_a_configuration_that_cannot_be_is_one_message_of_all_problems(dataset, tmp_path):
    run = Run(
        2, f"dataset={dataset}", f"out_dir={tmp_path / 'x'}", *STEPS, "n_head=1", "mesh_shape=[[1,3],['fsdp','tp']]"
    )
    codes, _, errors = run.ended()
    assert codes == [1, 1] and errors.count("train.py: rank") == 1 and "Traceback" not in errors
    assert "tp=3 is for 3 process(es), and there are 2: mesh_shape=" in errors
    assert "tp=3 does not divide n_head=1" in errors and "tp can be 1" in errors
    assert not (tmp_path / "x").exists()


def test_processes_that_are_not_one_run_end_before_they_train(dataset, tmp_path):
    """As on machines with command lines, disks or datasets of their own."""
    other, moved = tmp_path / "other", tmp_path / "moved"
    shutil.copytree(dataset, moved)
    about = {"name": "tiny", "source": "tests", "licence": "none", "val_fraction": 0.1}
    write_dataset(other, documents(seed=1), Tokenizer.load(dataset / "tokenizer.json"), **about)
    begin = (f"dataset={dataset}", f"out_dir={tmp_path / 'x'}", *STEPS, "max_iters=2")
    for own, words in (
        (("learning_rate=0.5", "max_iters=1"), ("learning_rate=0.5 for rank 1, and 0.001 for rank 0", "max_iters=1")),
        ((f"out_dir={tmp_path / 'y'}",), ("rank 1 writes to another", "one out_dir")),
        ((f"dataset={other}",), ("rank 1 reads other tokens",)),
    ):
        codes, said, errors = Run(2, *begin, own={1: own}).ended()
        assert codes == [1, 1] and errors.count("train.py:") == 1 and "Traceback" not in errors, (own, said, errors)
        assert all(word in errors for word in words) and not said, (own, said, errors)
        assert not [path for name in "xy" for path in (tmp_path / name).rglob("*")]
    codes, _, errors = Run(2, *begin, own={1: (f"dataset={moved}",)}).ended()
    assert codes == [0, 0] and CheckpointManager.verify(tmp_path / "x") == [], errors


def test_sigterm_to_one_process_stops_all_and_the_run_goes_on(dataset, tmp_path):
    out = tmp_path / "x"
    settings = (f"dataset={dataset}", f"out_dir={out}", *STEPS, "eval_interval=100000", "max_iters=100000")
    run = Run(2, *settings, "mesh_shape=[[2],['tp']]")
    wait_for(out, 3, run)
    run.processes[1].terminate()
    codes, said, errors = run.ended()
    assert codes == [143, 143] and said.count("stopped by SIGTERM") == 1 and not errors, errors
    assert CheckpointManager.verify(out) == [] and state(out)["seen"] > 0


@SLOW
def test_a_full_disk_on_one_process_stops_all_with_the_last_save_intact(dataset, tmp_path):
    out = tmp_path / "x"
    settings = (f"dataset={dataset}", f"out_dir={out}", *STEPS)
    Run(2, *settings, "max_iters=2").ended()
    before = state(out)
    for rank in (0, 1):
        run = Run(2, "init_from=resume", f"out_dir={out}", "max_iters=4", largest_file={rank: 40_000})
        codes, _, errors = run.ended()
        assert codes == [1, 1] and errors.count("train.py:") == 1, errors
        assert (
            "cannot write" in errors and f"rank {rank}" in errors and "intact" in errors and "Traceback" not in errors
        )
        assert largest_difference(state(out), before) == 0 and CheckpointManager.verify(out) == []
        assert not list(out.rglob("*.nanoforge-new"))


@SLOW
def test_killing_one_process_at_random_moments_of_saves_never_tears_a_run(dataset, tmp_path):
    out, draw, seen = tmp_path / "x", random.Random(0), []
    begin = (f"dataset={dataset}", f"out_dir={out}", *STEPS, "max_iters=100000", "eval_interval=1", "sample_tokens=0")
    for turn in range(8):
        start = len(metrics(out)) if turn else 0
        run = Run(2, *(("init_from=resume", f"out_dir={out}") if turn else begin))
        deadline = time.monotonic() + 90
        while len(metrics(out)) < start + 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        run.processes[turn % 2].kill()
        codes, _, errors = run.ended()
        assert codes[turn % 2] == -signal.SIGKILL and codes[1 - turn % 2] == 1, (codes, errors)
        assert "another process has ended" in errors and "Traceback" not in errors, errors
        assert CheckpointManager.verify(out) == []
        seen.append(state(out)["seen"])
    assert all(a < b for a, b in pairwise(seen)), seen
    assert min(sum(f.is_file() for f in (out / "last").iterdir()), 4) == 4


def metrics(directory: Path) -> list[str]:
    path = directory / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_torchrun_starts_it(dataset, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "train.py")]
    out = tmp_path / "x"
    settings = (f"dataset={dataset}", f"out_dir={out}", *STEPS, "max_iters=2", "mesh_shape=[[-1],['fsdp']]")
    done = subprocess.run([*torchrun, *settings], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert '2 process(es): mesh_shape [[2], ["fsdp"]]' in done.stdout and done.stdout.count("done: iteration 2") == 1
    assert "4 micro-batches of 2 sequences, divided among 2 processes" in done.stdout
    assert CheckpointManager.verify(out) == []
