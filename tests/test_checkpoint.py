"""checkpoint.py: names, round trips, foreign and hostile files, and the command line."""

import contextlib
import hashlib
import json
import math
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import kill_at_random_moments
from safetensors.torch import load_file
from test_families import gemma3_with_images
from torch import nn

import checkpoint
import files
import housekeeping
import lora
from checkpoint import CheckpointManager
from housekeeping import deploy, prune, superseded
from model import GPT, GPTConfig
from model_directory import only_base_of, read_about
from naming import ModelName, size_label
from weights import model_args

CONFIG = GPTConfig(block_size=16, vocab_size=61, n_layer=2, n_head=2, n_embd=16)


def model(seed=0, **changes) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**vars(CONFIG), **changes}))


def save(directory: Path, seed=0, loss=2.5, iter_num=7, **changes) -> GPT:
    saved = model(seed, **changes)
    metadata = {"config": {"batch_size": 4}, "iter_num": iter_num, "best_val_loss": loss}
    metadata["best"] = {"iter_num": iter_num, "metrics": {"val_loss": loss}}
    state = {"optimizer": {"step": iter_num}, "generators": []}
    CheckpointManager.save_checkpoint(saved, directory, metadata, training_state=state)
    return saved


def same(a: GPT, b: GPT) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---- names


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("gpt-38M-tinystories-pretrain", ("gpt", "38M", "tinystories", "pretrain", "")),
        ("gpt-38M-scientific-pretrain", ("gpt", "38M", "scientific", "pretrain", "")),
        ("gpt-38M-tinystories-to-scientific-lora", ("gpt", "38M", "tinystories-to-scientific", "lora", "")),
        ("gpt-38M-tinystories-to-scientific-merged", ("gpt", "38M", "tinystories-to-scientific", "merged", "")),
        ("gpt-38M-scientific-merged-ft", ("gpt", "38M", "scientific", "merged-ft", "")),
        ("gpt2-124M-arxiv-ft-v2", ("gpt2", "124M", "arxiv", "ft", "v2")),
        ("gpt-1.8M-tinystories-pretrain-20231213", ("gpt", "1.8M", "tinystories", "pretrain", "20231213")),
        ("gpt-tiny-my-own-papers-pretrain-v1.2", ("gpt", "tiny", "my-own-papers", "pretrain", "v1.2")),
        ("llama-1.1B-a-to-b-merged-ft-v3", ("llama", "1.1B", "a-to-b", "merged-ft", "v3")),
        ("gpt-38M-pretrain-ft", ("gpt", "38M", "pretrain", "ft", "")),
    ],
)
def test_a_name_is_parsed_into_its_parts_and_built_from_them(text, parts):
    name = ModelName.parse(text)
    assert tuple(vars(name).values()) == parts
    assert str(ModelName(*parts)) == text


@pytest.mark.parametrize(
    "text",
    [
        "model1",
        "test",
        "gpt-38M-scientific",
        "gpt-38M-pretrain",
        "gpt-38-scientific-pretrain",
        "gpt-huge-scientific-pretrain",
        "GPT-38M-scientific-pretrain",
        "gpt-38M-scientific-pretrain-final",
        "gpt-38M-a-to-b-to-c-lora",
        "gpt-38M-to-b-lora",
        "gpt-38M-two words-pretrain",
        "gpt-38M-scientific-pretrain-v1-v2",
        "",
    ],
)
def test_a_name_outside_the_convention_is_refused(text):
    with pytest.raises(ValueError, match=r"must be|is not"):
        ModelName.parse(text)


def test_parts_that_would_be_read_as_another_name_are_refused():
    with pytest.raises(ValueError, match="read as another name"):
        ModelName("gpt", "1M", "a-merged", "ft")


@pytest.mark.parametrize(
    ("count", "label"),
    [
        (38_393_920, "38M"),
        (124_337_664, "124M"),
        (354_551_808, "355M"),
        (1_800_000, "1.8M"),
        (1_100_048_384, "1.1B"),
        (999_600_000, "1B"),
        (9_960_000, "10M"),
        (7_000_000_000, "7B"),
        (45_792, "46K"),
        (900, "0.9K"),
    ],
)
def test_a_count_is_written_as_people_write_it(count, label):
    assert size_label(count) == label
    assert ModelName("gpt", label, "x", "pretrain").fits(count)


def test_a_name_fits_only_models_of_its_size():
    assert not ModelName.parse("gpt-38M-x-pretrain").fits(39_600_000)
    assert ModelName.parse("gpt-small-x-pretrain").fits(39_600_000)


# ---- round trips


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"tie_word_embeddings": False}])
def test_a_saved_model_loads_from_the_directory_and_from_its_ckpt(tmp_path, changes):
    saved = save(tmp_path / "m", **changes)
    for path in (tmp_path / "m", str(tmp_path / "m" / "ckpt.pt")):
        loaded, metadata = CheckpointManager.load_model(path)
        assert loaded.config == saved.config and same(loaded, saved) and loaded.training
        assert (
            metadata["iter_num"] == 7 and metadata["best_val_loss"] == 2.5 and metadata["config"] == {"batch_size": 4}
        )
        assert all(p.requires_grad for p in loaded.parameters())
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == saved.config.tie_word_embeddings
    assert not CheckpointManager.load_model_for_inference(tmp_path / "m").training


def test_a_model_loads_with_an_adapter_to_train(tmp_path):
    saved = save(tmp_path)
    path = tmp_path / "ckpt.pt"
    loaded, _ = CheckpointManager.load_model(path, apply_lora=True, lora_config={"rank": 4, "alpha": 8})
    trainable = sum(p.numel() for p in loaded.parameters() if p.requires_grad)
    per_layer = [(16, 48), (16, 16), (16, 64), (64, 16)]  # c_attn, attn.c_proj, c_fc, mlp.c_proj
    assert trainable == 2 * sum(4 * (i + o) for i, o in per_layer)
    x = torch.arange(16)[None]
    assert torch.equal(loaded(x, x)[0], saved(x, x)[0])
    with pytest.raises(ValueError, match="saved with its base"):
        CheckpointManager.save_checkpoint(loaded, tmp_path, {"config": {}, "iter_num": 0, "best_val_loss": 1.0})
    with pytest.raises(ValueError, match="unknown LoRA setting 'rnk'"):
        CheckpointManager.load_model(path, apply_lora=True, lora_config={"rnk": 4})
    with pytest.raises(ValueError, match="apply_lora is not true"):
        CheckpointManager.load_model(path, lora_config={"rank": 4})


def test_a_tied_model_is_stored_once(tmp_path):
    save(tmp_path / "tied", vocab_size=20_000)
    save(tmp_path / "untied", vocab_size=20_000, tie_word_embeddings=False)
    tied, untied = ((tmp_path / n / "ckpt.pt").stat().st_size for n in ("tied", "untied"))
    assert untied - tied > 0.9 * 20_000 * 16 * 4


def test_model_args_hold_only_nanogpts_seven_keys_unless_another_differs(tmp_path):
    seven = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias"}
    save(tmp_path / "tied")
    save(tmp_path / "untied", tie_word_embeddings=False)
    assert set(json.loads((tmp_path / "tied" / "model_args.json").read_text())) == seven
    assert set(json.loads((tmp_path / "untied" / "model_args.json").read_text())) == seven | {"tie_word_embeddings"}


def test_wrappers_leave_no_trace_in_saved_names(tmp_path):
    plain = model()
    wrapped = torch.nn.DataParallel(torch.compile(plain))
    CheckpointManager.save_checkpoint(wrapped, tmp_path, {"config": {}, "iter_num": 0, "best_val_loss": 1.0})
    stored = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert set(stored["model"]) == set(plain.state_dict())


def test_without_best_only_the_state_is_replaced(tmp_path):
    best = save(tmp_path, seed=0)
    later = model(seed=1)
    metadata = {"config": {}, "iter_num": 9, "best_val_loss": 2.5}
    CheckpointManager.save_checkpoint(later, tmp_path, metadata, best=False, training_state={"x": 1})
    assert same(CheckpointManager.load_model(tmp_path)[0], best)
    state = CheckpointManager.load_training_state(tmp_path)
    assert state["x"] == 1 and torch.equal(state["model"]["lm_head.weight"], later.lm_head.weight)
    assert CheckpointManager.verify(tmp_path) == []


def test_a_kill_at_two_hundred_random_moments_of_a_save_leaves_a_directory_that_loads(tmp_path):
    def save_number(n: int) -> None:
        filled = model()
        with torch.no_grad():
            for p in filled.parameters():
                p.fill_(n)
        metadata = {"config": {}, "iter_num": n, "best_val_loss": 1.0}
        CheckpointManager.save_checkpoint(filled, tmp_path, metadata, training_state={"number": n})

    def loaded_number() -> int:
        best, metadata = CheckpointManager.load_model(tmp_path)
        last = CheckpointManager.load_training_state(tmp_path)
        weights = [*best.state_dict().values(), *last["model"].values()]
        numbers = {int(x) for w in weights for x in w.unique()} | {
            metadata["iter_num"],
            last["number"],
            last["iter_num"],
        }
        assert len(numbers) == 1, f"parts of several states: {numbers}"
        return numbers.pop()

    kill_at_random_moments(save_number, loaded_number, 200)


# ---- other people's files


def nanogpt(path: Path, prefix="", masks=False, **changes) -> GPT:
    """A checkpoint as nanoGPT's train.py writes it."""
    source = model(3, **changes)
    state = {prefix + k: v for k, v in source.state_dict().items()}
    if masks:
        state |= {f"{prefix}transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    arguments = {k: v for k, v in vars(source.config).items() if k != "tie_word_embeddings"}
    optimizer = torch.optim.AdamW(source.parameters()).state_dict()
    contents = {
        "model": state,
        "optimizer": optimizer,
        "model_args": arguments,
        "iter_num": 5,
        "config": {"device": "cuda"},
    }
    path.mkdir(parents=True)
    torch.save({**contents, "best_val_loss": torch.tensor(3.1)}, path / "ckpt.pt")
    return source


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod.", "module."])
@pytest.mark.parametrize("masks", [True, False])
def test_a_nanogpt_checkpoint_loads(tmp_path, bias, prefix, masks):
    source = nanogpt(tmp_path / "out", prefix, masks, bias=bias)
    loaded, metadata = CheckpointManager.load_model(tmp_path / "out" / "ckpt.pt")
    assert same(loaded, source) and loaded.lm_head.weight is loaded.transformer.wte.weight
    assert metadata["iter_num"] == 5 and metadata["export_meta"] is None


def test_a_nanogpt_checkpoint_of_any_file_name_loads(tmp_path):
    source = nanogpt(tmp_path / "out")
    (tmp_path / "out" / "ckpt.pt").rename(tmp_path / "out" / "best.pt")
    assert same(CheckpointManager.load_model(tmp_path / "out" / "best.pt")[0], source)


class Boom:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    for name, write in (("zip", torch.save), ("raw", lambda value, path: path.write_bytes(pickle.dumps(value)))):
        path = tmp_path / name / "ckpt.pt"
        path.parent.mkdir()
        write({"model": Boom(tmp_path / "boom"), "model_args": {}}, path)
        with pytest.raises(ValueError, match="is refused: it would run code"):
            CheckpointManager.load_model(path)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda d: (d / "ckpt.pt").write_bytes((d / "ckpt.pt").read_bytes()[:-100]),
            "bytes where export_meta.json says",
        ),
        (lambda d: flip(d / "ckpt.pt"), "ckpt.pt is damaged: its sha256"),
        (lambda d: (d / "ckpt.pt").unlink(), "ckpt.pt is damaged: it is missing"),
        (lambda d: (d / "export_meta.json").unlink(), "is torn"),
        (lambda d: (d / "export_meta.json").write_text("{"), "export_meta.json is damaged"),
        (lambda d: shutil.rmtree(d), "there is no model directory"),
    ],
)
def test_a_damaged_directory_is_refused_with_what_is_wrong(tmp_path, spoil, words):
    save(tmp_path / "m")
    spoil(tmp_path / "m")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        CheckpointManager.load_model(tmp_path / "m")


def flip(path: Path, position=None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1
    path.write_bytes(data)


def test_one_flipped_byte_anywhere_is_found_by_verify(tmp_path):
    save(tmp_path)
    assert CheckpointManager.verify(tmp_path) == []
    for name in files.read_marker(tmp_path)["files"]:
        for position in (0, -1):
            flip(tmp_path / name, position)
            assert CheckpointManager.verify(tmp_path) == [
                f"{tmp_path / name} is damaged: " + m for m in hash_problem(tmp_path / name)
            ]
            flip(tmp_path / name, position)
    assert CheckpointManager.verify(tmp_path) == []


def hash_problem(path: Path) -> list[str]:
    expected = files.read_marker(path.parent if path.parent.name != "last" else path.parent.parent)["files"]
    name = path.name if path.parent.name != "last" else f"last/{path.name}"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return [f"its sha256 is {digest[:12]}..., not {expected[name]['sha256'][:12]}..."]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["model"].pop("transformer.ln_f.weight"), "transformer.ln_f.weight is missing"),
        (lambda c: c["model"].update(extra=torch.ones(1)), "extra is unexpected"),
        (
            lambda c: c["model"].update({"transformer.wpe.weight": torch.ones(3, 16)}),
            r"wpe.weight is \(3, 16\) where the model has \(16, 16\)",
        ),
        (lambda c: c["model"].update({"lm_head.weight": torch.ones(61, 16)}), "its two tensors differ"),
        (lambda c: c["model_args"].update(rotary=True), "model_args has rotary"),
        (lambda c: c["model_args"].update(n_head=3), "n_embd=16 must be a multiple of n_head=3"),
        (lambda c: c["model_args"].update(n_layer="2"), "no numbers of a model"),
        (lambda c: c["model_args"].update(block="llama", rope_scaling=[1]), "must be a mapping or None"),
        (lambda c: c["model_args"].update(block="llama", rotary_share=2.0), "dimensions would turn"),
        (
            lambda c: c["model_args"].update(block="llama", rope_scaling={"rope_type": "linear", "factor": "2"}),
            "factor='2' must be a number above 0",
        ),
        (lambda c: c["model"].update(extra=3), "something other than named tensors"),
        (lambda c: c.pop("model_args"), "needs the keys model and model_args"),
    ],
)
def test_weights_that_do_not_fit_their_description_are_refused(tmp_path, change, words):
    nanogpt(tmp_path / "out")
    contents = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    change(contents)
    torch.save(contents, tmp_path / "out" / "ckpt.pt")
    with pytest.raises(ValueError, match=words):
        CheckpointManager.load_model(tmp_path / "out")


@pytest.mark.parametrize(
    "load",
    [
        lambda path: CheckpointManager.load_model(path, mapped=True)[0].state_dict(),
        lambda path: CheckpointManager.load_training_state(path, in_shares=True)["model"],
    ],
)
def test_weights_that_a_save_renames_before_they_are_mapped_are_read_again(tmp_path, monkeypatch, load):
    save(tmp_path, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(files, "recover", lambda directory: None)  # as a kill before the renames leaves it
        expected = save(tmp_path, seed=2).state_dict()
    read, renamed = checkpoint.read_checkpoint, []

    def then_renamed(file, path, *others):
        if not renamed:
            renamed.append(os.replace(file.name, path))
        return read(file, path, *others)

    monkeypatch.setattr(checkpoint, "read_checkpoint", then_renamed)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(tmp_path).items())
    assert renamed


def test_a_directory_without_a_training_state_says_that_it_cannot_be_resumed(tmp_path):
    CheckpointManager.save_checkpoint(model(), tmp_path, {"config": {}, "iter_num": 0, "best_val_loss": 1.0})
    with pytest.raises(FileNotFoundError, match="can be loaded and fine-tuned, but not resumed"):
        CheckpointManager.load_training_state(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"config": {"learning_rate": np.float64(1e-3)}}, r"config\['learning_rate'\] is a numpy.float64"),
        ({"config": {"out": [Path("x")]}}, r"config\['out'\]\[0\] is a pathlib"),
        ({"best_val_loss": math.inf}, "a finite best_val_loss"),
        ({"training_state": {"rng": np.random.get_state()}}, r"training_state\['rng'\]\[1\] is a numpy.ndarray"),
    ],
)
def test_what_could_not_be_opened_again_replaces_nothing(tmp_path, metadata, words):
    saved = save(tmp_path)
    metadata = {"config": {}, "iter_num": 8, "best_val_loss": 1.0, **metadata}
    with pytest.raises(ValueError, match=words):
        state = metadata.pop("training_state", None)
        CheckpointManager.save_checkpoint(model(1), tmp_path, metadata, training_state=state)
    with pytest.raises(ValueError, match="metadata needs config, iter_num"):
        CheckpointManager.save_checkpoint(model(1), tmp_path, {"best_val_loss": 1.0})
    assert same(CheckpointManager.load_model(tmp_path)[0], saved)


def test_the_file_that_is_named_is_the_one_that_loads_and_is_compared_first(tmp_path):
    mine, other = save(tmp_path / "mine"), save(tmp_path / "other", seed=1)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "mine" / name, foreign)
    torch.save(load_file(tmp_path / "other" / "model.safetensors"), foreign / "pytorch_model.bin")
    assert same(CheckpointManager.load_model(foreign / "pytorch_model.bin")[0], other)
    assert same(CheckpointManager.load_model(foreign)[0], mine)
    digest = hashlib.sha256((foreign / "pytorch_model.bin").read_bytes()).hexdigest()
    assert CheckpointManager.base_reference(foreign / "pytorch_model.bin", tmp_path / "x")["sha256"] == digest

    path = tmp_path / "mine" / "model.safetensors"
    assert same(CheckpointManager.load_model(path)[0], mine)
    path.write_bytes(path.read_bytes()[:-2] + b"\1\1")
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: its sha256"):
        CheckpointManager.load_model(path)


def test_the_training_state_of_an_adapter_is_the_one_that_loads_where_it_is_named(tmp_path):
    save(tmp_path / "base")
    adapted, _ = CheckpointManager.load_model(tmp_path / "base", apply_lora=True, lora_config={"targets": ["c_attn"]})
    base = CheckpointManager.base_reference(tmp_path / "base", tmp_path / "mine")
    tensors = {"best": 0.1, "last": 0.2}
    for i, (name, value) in enumerate(tensors.items()):
        for key, tensor in lora.lora_state_dict(adapted).items():
            nn.init.constant_(tensor, value) if "lora_B" in key else None
        metadata = {"iter_num": i, "best_val_loss": 2.0, "config": {}, "base": base, "best": {"iter_num": 0}}
        best = name == "best"
        CheckpointManager.save_checkpoint(adapted, tmp_path / "mine", metadata, best=best, training_state={"x": 1})
    for path, i, value in (("mine", 0, 0.1), ("mine/last/state.pt", 1, 0.2)):
        loaded, about = CheckpointManager.load_model(tmp_path / path)
        found = [tensor for key, tensor in lora.lora_state_dict(loaded).items() if "lora_B" in key]
        assert found and all((tensor == value).all() for tensor in found), path
        assert about["iter_num"] == i


def test_a_device_that_is_not_there_is_no_fault_of_the_file(tmp_path):
    save(tmp_path)
    for load in (CheckpointManager.load_model, CheckpointManager.load_model_for_inference):
        with pytest.raises(ValueError, match="device=nonsense cannot be used here"):
            load(tmp_path, "nonsense")


def test_an_empty_file_and_tensors_that_are_no_weights_are_refused(tmp_path):
    (tmp_path / "ckpt.pt").touch()
    with pytest.raises(ValueError, match=r"ckpt.pt is refused: it is cut short or no checkpoint \(EOFError\)"):
        CheckpointManager.load_model(tmp_path)
    for change in (torch.Tensor.int, torch.Tensor.to_sparse):
        state = model().state_dict() | {"transformer.ln_f.weight": change(torch.ones(CONFIG.n_embd))}
        torch.save({"model": state, "model_args": model_args(CONFIG)}, tmp_path / "ckpt.pt")
        with pytest.raises(ValueError, match=r"ln_f.weight is torch\."):
            CheckpointManager.load_model(tmp_path)


def test_a_missing_directory_names_its_neighbours(tmp_path):
    save(tmp_path / "gpt-1K-x-pretrain")
    with pytest.raises(FileNotFoundError, match="beside it: gpt-1K-x-pretrain"):
        CheckpointManager.load_model(tmp_path / "gpt-1K-y-pretrain")


# ---- the command line


def test_list_shows_complete_torn_and_foreign_directories(tmp_path, script):
    save(tmp_path / "gpt-6K-x-pretrain", loss=1.25, iter_num=1200)
    save(tmp_path / "gpt-6K-y-pretrain")
    (tmp_path / "gpt-6K-y-pretrain" / "ckpt.pt").unlink()
    nanogpt(tmp_path / "out")
    (tmp_path / "notes").mkdir()
    done = script("checkpoint.py", "list", tmp_path)
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert done.returncode == 0 and set(rows) == {"name", "gpt-6K-x-pretrain", "gpt-6K-y-pretrain", "out"}
    assert rows["gpt-6K-x-pretrain"][1:4] == [f"{model().num_params():,}", "1,200", "1.2500"]
    assert [rows[n][-1] for n in ("gpt-6K-x-pretrain", "gpt-6K-y-pretrain", "out")] == ["complete", "torn", "foreign"]


def test_show_and_verify(tmp_path, script):
    save(tmp_path / "m")
    assert json.loads(script("checkpoint.py", "show", tmp_path / "m").stdout)["iter_num"] == 7
    done = script("checkpoint.py", "verify", tmp_path / "m")
    assert done.returncode == 0 and "is sound" in done.stdout
    flip(tmp_path / "m" / "last" / "state.pt")
    done = script("checkpoint.py", "verify", tmp_path / "m")
    assert done.returncode == 1 and "last/state.pt is damaged" in done.stdout
    done = script("checkpoint.py", "show", tmp_path / "nothing")
    assert done.returncode == 1 and "there is no model directory" in done.stderr and "Traceback" not in done.stderr


def test_deploy_copies_the_best_weights_alone(tmp_path, script):
    saved, target = save(tmp_path / "m"), tmp_path / "production" / "current"
    done = script("checkpoint.py", "deploy", tmp_path / "m", target)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in target.iterdir()} == {
        "ckpt.pt",
        "model.safetensors",
        "model_args.json",
        "config.json",
        "README.md",
        "export_meta.json",
    }
    assert same(CheckpointManager.load_model_for_inference(target), saved)
    assert CheckpointManager.verify(target) == []
    newer = save(tmp_path / "m", seed=5)
    assert script("checkpoint.py", "deploy", tmp_path / "m", target).returncode == 0
    assert same(CheckpointManager.load_model(target)[0], newer)
    save(tmp_path / "other")
    done = script("checkpoint.py", "deploy", tmp_path / "other", target)
    assert done.returncode == 1 and "holds another model, m" in done.stderr
    flip(tmp_path / "m" / "ckpt.pt")
    done = script("checkpoint.py", "deploy", tmp_path / "m", target)
    assert done.returncode == 1 and "is damaged" in done.stderr
    assert same(CheckpointManager.load_model(target)[0], newer)


def test_deploy_ends_no_run(tmp_path, script):
    save(tmp_path / "m")
    there = save(tmp_path / "there" / "m", seed=1)
    for target in (tmp_path / "there" / "m", tmp_path / "m"):
        done = script("checkpoint.py", "deploy", tmp_path / "m", target)
        assert done.returncode == 1 and "holds a run" in done.stderr
    assert same(CheckpointManager.load_model(tmp_path / "there" / "m")[0], there)
    for _ in range(2):  # a deployed model may be deployed to anew, but not from itself
        assert script("checkpoint.py", "deploy", tmp_path / "m", tmp_path / "out").returncode == 0
    with files.lock(tmp_path / "out"):
        assert "written by another" in script("checkpoint.py", "deploy", tmp_path / "m", tmp_path / "out").stderr
    assert script("checkpoint.py", "deploy", tmp_path / "out", tmp_path / "out").returncode == 1


def test_prune_shows_first_deletes_with_yes_and_keeps_the_newest_complete(tmp_path, script):
    for name in ("gpt-6K-x-pretrain", "gpt-6K-x-pretrain-v2", "gpt-6K-x-pretrain-v10", "gpt-6K-y-pretrain-v1"):
        save(tmp_path / name)
    save(tmp_path / "gpt-6K-y-pretrain-v2")
    for name in ("ckpt.pt", "model.safetensors", "last/state.pt"):
        (tmp_path / "gpt-6K-y-pretrain-v2" / name).write_bytes(b"")
    nanogpt(tmp_path / "out")
    before = sorted(p.name for p in tmp_path.iterdir())
    done = script("checkpoint.py", "prune", tmp_path)
    assert "gpt-6K-x-pretrain-v2 (superseded by gpt-6K-x-pretrain-v10" in done.stdout and "--yes deletes" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert script("checkpoint.py", "prune", tmp_path, "--yes").returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpt-6K-x-pretrain-v10", "gpt-6K-y-pretrain-v1", "out"]
    assert "nothing to prune" in script("checkpoint.py", "prune", tmp_path).stdout


def test_prune_keeps_torn_directories_of_which_something_can_be_used(tmp_path, script):
    save(tmp_path / "without-state")
    (tmp_path / "without-state" / "last" / "state.pt").unlink()
    for name, file in (("a", "ckpt.pt"), ("b", "model.safetensors"), ("c", "adapters/adapter_model.safetensors")):
        save(tmp_path / name)  # nobody knows whose this is
        for path in [path for path in (tmp_path / name).rglob("*") if path.is_file()]:
            path.unlink()
        (tmp_path / name / file).parent.mkdir(exist_ok=True)
        (tmp_path / name / file).write_text("x")
        (tmp_path / name / "model_args.json").write_text("{}")
    (tmp_path / "c" / "export_meta.json").write_text("{")
    for name, file in (("notes", "my notes.txt"), ("log", "training_log.txt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "training_log.txt").write_text("x")
        (tmp_path / name / file).write_text("x")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "export_meta.json").write_text("[]")
    (tmp_path / "others" / "weights.onnx").write_text("x")
    done = script("checkpoint.py", "prune", tmp_path, "--yes")
    for reason in ("its ckpt.pt is whole", "my notes.txt is no file of a run", "weights.onnx is no file of a run"):
        assert reason in done.stdout
    assert done.stdout.count("delete it by hand") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "notes", "others", "without-state"]


def test_prune_keeps_the_weights_that_lie_in_shards(tmp_path):
    shard = "last/shard-00000.safetensors"
    save(tmp_path / "listed")
    about = {key: value for key, value in read_about(tmp_path / "listed").items() if key != "files"}
    files.commit(tmp_path / "listed", {shard: lambda file: file.write(b"weights")}, about)
    for name in ("ckpt.pt", "model.safetensors", "last/state.pt"):
        (tmp_path / "listed" / name).unlink()
    shutil.copytree(tmp_path / "listed", tmp_path / "unlisted")
    (tmp_path / "unlisted" / "export_meta.json").unlink()
    said = prune(tmp_path, yes=True)
    assert f"it is torn, but its {shard} is whole" in said and f"whether its {shard} is whole" in said
    assert (tmp_path / "listed" / shard).exists() and (tmp_path / "unlisted" / shard).exists()


@pytest.mark.parametrize("before", ["a log", "an older version"])
def test_prune_keeps_what_is_saved_while_it_looks(tmp_path, monkeypatch, before):
    path, size = tmp_path / "gpt-6K-x-pretrain", housekeeping.size_on_disk
    save(tmp_path / "gpt-6K-x-pretrain-v2")
    if before == "a log":
        path.mkdir()
        (path / "training_log.txt").write_text("x")
    else:
        save(path)

    def meanwhile(directory: Path) -> int:
        save(path, loss=1.0)
        return size(directory)

    monkeypatch.setattr(housekeeping, "size_on_disk", meanwhile)
    assert "it was written to meanwhile" in prune(tmp_path, yes=True)
    assert CheckpointManager.verify(path) == []


@pytest.mark.parametrize("weights", ["ckpt.pt", "model.safetensors"])
def test_a_log_beside_weights_makes_no_run_of_them(tmp_path, script, weights):
    saved = save(tmp_path / "ours")
    (tmp_path / "m").mkdir()
    for name in ("config.json", weights):
        shutil.copy(tmp_path / "ours" / name, tmp_path / "m")
    (tmp_path / "m" / "training_log.txt").write_text("x")
    assert same(CheckpointManager.load_model(tmp_path / "m")[0], saved)
    script("checkpoint.py", "prune", tmp_path, "--yes")
    assert (tmp_path / "m" / weights).exists()


@pytest.mark.parametrize("of", ["dataset", "tokenizer"])
def test_a_loss_by_other_tokens_or_of_other_text_supersedes_nothing(tmp_path, of):
    for number in (1, 2, 3):
        metadata = {"config": {}, "iter_num": 1, "best_val_loss": 5.0 - number, of: {"fingerprint": "ab"[number > 1]}}
        CheckpointManager.save_checkpoint(model(), tmp_path / f"gpt-6K-x-pretrain-v{number}", metadata)
    assert [path.name for path in superseded(sorted(tmp_path.iterdir()))] == ["gpt-6K-x-pretrain-v2"]


def test_prune_keeps_edited_directories_better_versions_and_other_peoples(tmp_path, script):
    save(tmp_path / "gpt-6K-x-pretrain", loss=2.0)
    save(tmp_path / "gpt-6K-x-pretrain-v2", loss=3.0)
    (tmp_path / "gpt-6K-x-pretrain" / "README.md").write_text("my own words")
    (tmp_path / "gpt-6K-x-pretrain" / "loss.png").write_bytes(b"redrawn")
    (tmp_path / "theirs" / "weights").mkdir(parents=True)
    (tmp_path / "theirs" / "metrics.jsonl").write_text("{}")
    done = script("checkpoint.py", "prune", tmp_path, "--yes")
    assert done.returncode == 0 and "nothing to prune" in done.stdout
    assert len(list(tmp_path.iterdir())) == 3
    assert CheckpointManager.verify(tmp_path / "gpt-6K-x-pretrain") == []


def test_a_marker_that_says_too_little_is_torn_and_breaks_no_listing(tmp_path, script):
    save(tmp_path / "good")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "ckpt.pt").write_text("x")
    whole = read_about(tmp_path / "good")
    for marker in ({"files": {}}, {"files": {"ckpt.pt": "abc"}}, whole | {"files": {"ckpt.pt": {"size": 3}}}):
        (tmp_path / "odd" / "export_meta.json").write_text(json.dumps(marker))
        done = script("checkpoint.py", "list", tmp_path)
        assert done.returncode == 0 and "torn" in done.stdout and "complete" in done.stdout
        done = script("checkpoint.py", "prune", tmp_path)
        assert done.returncode == 0 and "says whether its ckpt.pt is whole" in done.stdout, done.stderr


@pytest.mark.parametrize(("key", "value"), [("size", None), ("sha256", 5), ("best_val_loss", None), ("base", "x")])
def test_a_marker_may_say_anything(tmp_path, script, key, value):
    save(tmp_path / "m")
    marker = read_about(tmp_path / "m")
    (marker["files"]["ckpt.pt"] if key in ("size", "sha256") else marker)[key] = value
    (tmp_path / "m" / "export_meta.json").write_text(json.dumps(marker))
    assert "torn" in script("checkpoint.py", "list", tmp_path).stdout
    for command in (("verify",), ("deploy", tmp_path / "out")):
        done = script("checkpoint.py", command[0], tmp_path / "m", *command[1:])
        assert done.returncode == 1 and "Traceback" not in done.stderr


def test_a_commit_that_lost_a_file_is_torn_and_nobody_waits_for_it(tmp_path, script):
    save(tmp_path / "m")
    (tmp_path / "m" / "export_meta.json").rename(tmp_path / "m" / files.PENDING)
    assert "complete" in script("checkpoint.py", "list", tmp_path, timeout=60).stdout
    (tmp_path / "m" / "model_args.json").unlink()
    assert "torn" in script("checkpoint.py", "list", tmp_path, timeout=60).stdout


@pytest.mark.parametrize("adapter", ["whole", "torn", "begun"])
def test_prune_keeps_the_base_of_every_lora_directory(tmp_path, adapter):
    base, run = tmp_path / "gpt-6K-x-pretrain", tmp_path / "run"
    save(base)
    model_, _ = CheckpointManager.load_model(base, apply_lora=True)
    reference = CheckpointManager.base_reference(base, run)
    if adapter == "begun":
        run.mkdir()
        (run / "training_log.txt").write_text("x")
    else:
        CheckpointManager.save_checkpoint(
            model_, run, {"config": {}, "iter_num": 1, "best_val_loss": 1.0, "base": reference}
        )
    if adapter == "torn":
        (run / "adapters" / "adapter_config.json").unlink()
    save(tmp_path / "gpt-6K-x-pretrain-v2")
    with files.lock(run) if adapter == "begun" else contextlib.nullcontext():
        assert f"kept {base}: it is the base of run" in prune(tmp_path, yes=True)
    assert base.exists()
    if adapter == "begun":  # and ended before it saved
        prune(tmp_path, yes=True)
        assert not base.exists() and not run.exists()


def test_prune_takes_no_link_for_a_version_and_no_copy_for_a_run(tmp_path):
    first = tmp_path / "gpt-6K-x-pretrain"
    save(first)
    (tmp_path / "gpt-6K-x-pretrain-v2").symlink_to(first.name)
    deploy(first, tmp_path / "gpt-6K-x-pretrain-v3")
    (tmp_path / "elsewhere" / "run").mkdir(parents=True)
    (tmp_path / "elsewhere" / "run" / "training_log.txt").write_text("x")
    (tmp_path / "begun").symlink_to("elsewhere/run")
    assert prune(tmp_path, yes=True) == "nothing to prune"
    (tmp_path / "begun").unlink()
    shutil.rmtree(tmp_path / "elsewhere")
    save(tmp_path / "gpt-6K-x-pretrain-v4")
    prune(tmp_path, yes=True)
    assert sorted(path.name for path in tmp_path.iterdir() if path.exists()) == ["gpt-6K-x-pretrain-v4"]


def adapter_of(base: Path, run: Path) -> None:
    model_, _ = CheckpointManager.load_model(base, apply_lora=True)
    reference = CheckpointManager.base_reference(base, run)
    metadata = {"config": {}, "iter_num": 1, "best_val_loss": 1.0, "base": reference}
    CheckpointManager.save_checkpoint(model_, run, metadata)


def test_an_adapters_base_is_found_beside_a_link_and_beside_what_it_leads_to(tmp_path):
    disk, models = tmp_path / "disk", tmp_path / "models"
    save(disk / "run")
    models.mkdir()
    (models / "base").symlink_to(disk / "run")
    adapter_of(models / "base", models / "adapter")
    adapter_of(disk / "run", disk / "other")
    assert {path.name for path in only_base_of(models / "base")} == {"adapter", "other"}
    assert [path.name for path in only_base_of(disk / "run")] == ["other"]
    (models / "export_meta.json").mkdir()
    (models / "odd" / "export_meta.json").mkdir(parents=True)
    assert {path.name for path in only_base_of(models / "base")} == {"adapter", "other"}
    deploy(disk / "run", models / "copy")
    assert only_base_of(models / "base") == []


def test_an_adapter_of_a_copy_elsewhere_needs_no_other(tmp_path):
    save(tmp_path / "models" / "run")
    deploy(tmp_path / "models" / "run", tmp_path / "prod" / "base")
    adapter_of(tmp_path / "prod" / "base", tmp_path / "models" / "adapter")
    assert only_base_of(tmp_path / "models" / "run") == []


def test_a_copy_as_the_newest_version_keeps_no_run_that_an_older_run_supersedes(tmp_path):
    for number in (1, 2):
        save(tmp_path / f"gpt-6K-x-pretrain-v{number}")
    deploy(tmp_path / "gpt-6K-x-pretrain-v2", tmp_path / "gpt-6K-x-pretrain-v3")
    assert {path.name: why for path, why in superseded(sorted(tmp_path.iterdir())).items()} == {
        "gpt-6K-x-pretrain-v1": "superseded by gpt-6K-x-pretrain-v2"
    }


def test_an_adapter_for_a_model_with_images_has_its_paths_in_a_new_folder_too(tmp_path):
    gemma3_with_images().save_pretrained(tmp_path / "base")
    adapter_of(tmp_path / "base", tmp_path / "run")
    names = load_file(tmp_path / "run" / "adapters" / "adapter_model.safetensors")
    assert names and all(name.startswith("base_model.model.model.language_model.layers.") for name in names)


def test_prune_knows_a_base_by_its_weights_too_and_keeps_what_is_nobodys_run(tmp_path):
    base, other = tmp_path / "gpt-6K-x-pretrain-v1", tmp_path / "gpt-6K-x-pretrain-v2"
    save(base)
    save(other, seed=1)
    (other / "notes.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    reference = CheckpointManager.base_reference(base, tmp_path / "run") | {"path": "elsewhere/ckpt.pt"}
    adapted_, _ = CheckpointManager.load_model(base, apply_lora=True)
    metadata = {"config": {}, "iter_num": 1, "best_val_loss": 1.0, "base": reference}
    CheckpointManager.save_checkpoint(adapted_, tmp_path / "run", metadata)
    save(tmp_path / "gpt-6K-x-pretrain-v3", seed=2)
    said = prune(tmp_path, yes=True)
    assert f"kept {base}: it is the base of run" in said and "but notes.txt is no file of a run" in said
    assert base.exists() and (other / "notes.txt").exists()


def test_what_was_deployed_is_not_replaced_by_what_is_worse_or_breaks_an_adapter(tmp_path):
    save(tmp_path / "m", loss=2.0)
    deploy(tmp_path / "m", tmp_path / "out")
    save(tmp_path / "again" / "m", seed=1, loss=3.0)
    with pytest.raises(
        ValueError, match=r"holds better weights, with a validation loss of 2\.0000 where .* has 3\.0000"
    ):
        deploy(tmp_path / "again" / "m", tmp_path / "out")
    save(tmp_path / "again" / "m", seed=1, loss=1.0)
    adapted_, _ = CheckpointManager.load_model(tmp_path / "out", apply_lora=True)
    reference = CheckpointManager.base_reference(tmp_path / "out", tmp_path / "run")
    metadata = {"config": {}, "iter_num": 1, "best_val_loss": 1.0, "base": reference}
    CheckpointManager.save_checkpoint(adapted_, tmp_path / "run", metadata)
    deploy(tmp_path / "again" / "m", tmp_path / "out")  # the weights lie in m too
    deploy(tmp_path / "m", tmp_path / "other")
    CheckpointManager.save_checkpoint(adapted_, tmp_path / "run2", metadata)
    shutil.rmtree(tmp_path / "m")
    with pytest.raises(ValueError, match="is the base of run"):
        deploy(tmp_path / "again" / "m", tmp_path / "other")


def test_a_deployment_that_was_killed_is_no_model(tmp_path):
    save(tmp_path / "m")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".ckpt.pt.nanoforge-new").write_text("half")
    deploy(tmp_path / "m", tmp_path / "out")
    assert CheckpointManager.verify(tmp_path / "out") == []


def test_where_there_is_no_room_nothing_is_begun(tmp_path):
    files.check_room(tmp_path / "not" / "there", 1000)
    save(tmp_path / "m")
    marker = read_about(tmp_path / "m")
    marker["files"]["ckpt.pt"]["size"] = 1 << 60
    (tmp_path / "m" / files.MARKER).write_text(json.dumps(marker))
    with pytest.raises(OSError, match="MB free, and saving needs 1,152,921,50"):
        deploy(tmp_path / "m", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_prune_knows_what_a_run_has_listed_and_what_systems_leave_and_asks_nothing_of_what_goes_too(tmp_path):
    old, metadata = tmp_path / "gpt-6K-x-pretrain", {"config": {}, "iter_num": 1, "best_val_loss": 2.5}
    CheckpointManager.save_checkpoint(model(), old, metadata, texts={"LICENSE.txt": b"MIT"})
    for name in (".DS_Store", "last/.DS_Store"):
        (old / name).parent.mkdir(exist_ok=True)
        (old / name).write_bytes(b"Bud1")
    save(tmp_path / "gpt-6K-x-pretrain-v2", seed=1)
    torn = tmp_path / "other"
    torn.mkdir()
    (torn / files.MARKER).write_text("{}")
    said = prune(tmp_path, yes=False)
    assert "would delete" in said and "kept" not in said, said
    with files.lock(torn):  # it may become one that has the other for its base
        assert f"kept {old}: it is the base of other, or may be" in prune(tmp_path, yes=True)
    assert old.exists()
    prune(tmp_path, yes=True)
    assert not old.exists() and not torn.exists()


def test_prune_reads_no_folders_but_those_of_models(tmp_path, monkeypatch):
    save(tmp_path / "m")
    (tmp_path / "others" / "deep").mkdir(parents=True)
    read, contents = [], housekeeping.contents
    monkeypatch.setattr(housekeeping, "contents", lambda path: read.append(path) or contents(path))
    prune(tmp_path, yes=False)
    assert read == [tmp_path / "m"]


def test_prune_leaves_a_run_that_is_being_written_alone(tmp_path, script):
    save(tmp_path / "m")
    (tmp_path / "m" / "export_meta.json").unlink()
    with files.lock(tmp_path / "m"):
        done = script("checkpoint.py", "prune", tmp_path, "--yes")
    assert "kept" in done.stdout and (tmp_path / "m").exists()
