"""Several processes, one model: real ones, with gloo, on tiny models. They compute what one process computes."""

import json
import os
import socket
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from conftest import QUICK

import configurator
import families
import train
from checkpoint import CheckpointManager
from distributed import Ranks
from hugging_face import write_weights
from mesh import Mesh
from preflight import prepare_start

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
    config, given = configurator.load(list(settings))
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
        assert differ(found, expected) < 1e-5, (name, found[:3], expected[:3])


def differ(found: list[tuple], expected: list[tuple]) -> float:
    pairs = zip(chain(*found), chain(*expected), strict=True)
    return max(abs(a - b) for a, b in pairs)


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


@pytest.mark.parametrize("kind", ["gpt2 tied", "llama"])
def test_a_run_goes_on_in_another_mesh_and_in_one_process_as_it_would_have(dataset, tmp_path, kind):
    begin = (*STEPS, f"dataset={dataset}", *MODELS[kind])
    straight, out = tmp_path / "straight", tmp_path / "out"
    expected = part_of_a_run(Ranks(), 12, *begin, f"out_dir={straight}")
    resume = ("init_from=resume", f"out_dir={out}")
    found = part_of_a_run(Ranks(), 2, *begin, f"out_dir={out}")
    more = [(2, *resume, "mesh_shape=[[2,2],['fsdp','tp']]"), (2, *resume, "mesh_shape=[[2,2],['dp','fsdp']]")]
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


def straight_and_in_two(ranks: Ranks, folder: Path, meshes: tuple[str, ...], *settings: str) -> None:
    for i, mesh in enumerate(meshes):
        out = [f"out_dir={folder / str(i) / name}" for name in ("straight", "stopped")]
        part_of_a_run(ranks, 4, *settings, out[0], f"mesh_shape={mesh}")
        part_of_a_run(ranks, 2, *settings, out[1], f"mesh_shape={mesh}")
        part_of_a_run(ranks, 2, "init_from=resume", out[1])


@pytest.mark.parametrize("processes", MESHES)
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
        model = CheckpointManager.load_model(ours)[0].to(torch.bfloat16)
        theirs.mkdir()
        (theirs / "config.json").write_text(json.dumps(families.hf_config(model.config)))
        (theirs / "tokenizer.json").write_bytes((ours / "tokenizer.json").read_bytes())
        with open(theirs / "model.safetensors", "wb") as file:
            write_weights(file, model)
        found |= {kind: ours, f"hf {kind}": theirs}
    return found


TRAINING = tuple(s for s in STEPS if not s.startswith(("n_", "bias", "block_size")))
LORA = (*TRAINING, "block_size=32", "lora=true", "lora_rank=4", "learning_rate=1e-2")
ADAPTED = {
    "gpt2 tied": (*LORA, "lora_targets=all-linear"),
    "llama": (*LORA, "lora_targets=all"),
    "hf llama tied": (*LORA, "lora_targets=q_proj,v_proj,down_proj,lm_head", "lora_untie=true"),
    "hf gpt2": (*TRAINING, "block_size=32"),
}


@pytest.mark.parametrize("processes", MESHES)
def test_adapters_and_fine_tuning_in_a_mesh_are_what_they_are_in_one_process(bases, dataset, tmp_path, processes):
    def settings(name, mesh=""):
        return (*ADAPTED[name], f"init_from={bases[name]}", f"dataset={dataset}", f"out_dir={tmp_path / 'x'}", mesh)

    meshes = MESHES[processes][1:]
    cases = {f"{name} {mesh}": settings(name, f"mesh_shape={mesh}") for name in ADAPTED for mesh in meshes}
    found = started(processes, many, cases)
    for name in ADAPTED:
        expected = steps(Ranks(), *settings(name, "mesh_shape="))
        for mesh in meshes:
            assert differ(found[f"{name} {mesh}"], expected) < 1e-5, (name, mesh)


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
