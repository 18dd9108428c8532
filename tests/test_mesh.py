"""Several processes, one model: real ones, with gloo, on tiny models. What they compute is what one process computes."""

import os
import socket

import pytest
import torch
import torch.multiprocessing
from conftest import QUICK

import configurator
import train
from distributed import Ranks
from mesh import Mesh
from preflight import prepare_start

CPU = torch.device("cpu")
MESHES = {
    2: ("[[2],['fsdp']]", "[[2],['dp']]", "[[2],['tp']]"),
    4: ("[[4],['fsdp']]", "[[2,2],['fsdp','tp']]", "[[2,2],['dp','fsdp']]", "[[4],['tp']]"),
}
STEPS = ("max_iters=20", "n_head=4", "n_embd=32", "gradient_accumulation_steps=4", "bias=true", "warmup_iters=4")
MODELS = {
    "gpt2 tied": ("tie_word_embeddings=true", "vocab_size=323"),
    "gpt2": ("tie_word_embeddings=false", "bias=false"),
    "llama": ("preset=modern", "tie_word_embeddings=false", "vocab_size=321", "bias=false"),
    "llama tied": ("preset=modern", "tie_word_embeddings=true"),
}


def started(processes: int, work, *arguments):
    """What `work(ranks, *arguments)` gives on rank 0 of so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    torch.multiprocessing.spawn(_worker, (processes, port, results, work, arguments), nprocs=processes)
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


def trainer(ranks: Ranks, *settings: str) -> train.Trainer:
    config, given = configurator.load(["compile=false", *QUICK, *settings])
    start = prepare_start(config, given, ranks)
    ranks.arrange(Mesh.parse(start.config.mesh_shape, ranks.size), "cpu")
    return train.Trainer(start, CPU, ranks)


def steps(ranks: Ranks, *settings: str, count: int = 20) -> list[tuple[float, float]]:
    """(loss, norm of the gradient) of every step, and the evaluation after them."""
    run = trainer(ranks, *settings)
    found = [run.step() for _ in range(count)]
    return [(loss, norm) for loss, _, norm in found] + [tuple(run.evaluate().values())[:2]]


def many(ranks: Ranks, cases: dict[str, tuple]) -> dict[str, list]:
    return {name: steps(ranks, *settings) for name, settings in cases.items()}


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return many(
        Ranks(), {name: (*STEPS, f"dataset={dataset}", f"out_dir={folder / 'x'}", *s) for name, s in MODELS.items()}
    )


@pytest.mark.parametrize("processes", MESHES)
def test_every_step_of_every_mesh_is_that_of_one_process(alone, dataset, tmp_path, processes):
    cases = {
        f"{name} {mesh}": (*STEPS, f"dataset={dataset}", f"out_dir={tmp_path / 'x'}", *settings, f"mesh_shape={mesh}")
        for name, settings in MODELS.items()
        for mesh in MESHES[processes]
    }
    for name, found in started(processes, many, cases).items():
        expected = alone[name.split(" [")[0]]
        worst = max(
            abs(a - b) for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True)
        )
        assert worst < 1e-5, (name, worst, found[:3], expected[:3])
