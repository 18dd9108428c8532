"""The life of an adapter: trained on a base, stopped and resumed, moved, merged into a model of its own."""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import QUICK, ROOT, TINY, command, documents, forked, kill_at_random_moments
from peft import PeftModel
from test_foreign_tokenizer import llama3
from test_tokenizer_files import gpt2
from test_train import CPU, differences, history, kill_and_go_on, refused, state, wait_for
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import configurator
import files
import lora
import merge_lora
import preflight
import train
from adapters import load_adapters
from checkpoint import CheckpointManager
from data.batches import fixed_batches, sequences
from data.finding import find_dataset
from data.tokens import load_dataset, write_dataset
from distributed import Ranks
from model import GPT, GPTConfig
from preflight import conventional_name, prepare_start
from tokenizer import Tokenizer, train_bpe

STEPS = (*QUICK[len(TINY) :], "batch_size=2", "gradient_accumulation_steps=2", "learning_rate=0.02", "weight_decay=0")
LORA = ("lora=true", "lora_rank=4", "lora_targets=c_attn,c_proj")


@pytest.fixture(scope="module")
def base(dataset, tmp_path_factory, script) -> Path:
    out = tmp_path_factory.mktemp("bases") / "gpt-46K-tiny-pretrain"
    settings = (*QUICK, "max_iters=40", "eval_interval=20", "learning_rate=0.01")
    done = script("train.py", f"dataset={dataset}", f"out_dir={out}", *settings)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def other_text(tmp_path_factory) -> Path:
    """Other words than the base has read, in another tokenizer's tokens."""
    folder = tmp_path_factory.mktemp("data") / "other"
    texts = [f"{text} Zero is the bound of every true gradient {i % 3}." for i, text in enumerate(documents(seed=9))]
    tokenizer = train_bpe(texts, "bpe-other", vocab_size=300)
    write_dataset(folder, texts, tokenizer, name="other", source="tests", licence="none", val_fraction=0.1)
    return folder


@pytest.fixture(scope="module")
def adapted(base, other_text, tmp_path_factory, script) -> Path:
    out = tmp_path_factory.mktemp("runs") / "models" / "gpt-46K-tiny-to-other-lora"
    settings = (*LORA, *STEPS, "lora_dropout=0.1", "max_iters=30", "eval_interval=10")
    done = script("train.py", f"init_from={base}", f"dataset={other_text}", f"out_dir={out}", *settings)
    assert done.returncode == 0, done.stderr
    return out


def test_a_base_is_not_trained_further_while_its_weights_lie_nowhere_else(base, dataset, tmp_path, script):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    begun = script(
        "train.py",
        f"init_from={folder}",
        f"dataset={dataset}",
        f"out_dir={tmp_path / 'run'}",
        *LORA,
        *STEPS,
        "max_iters=1",
    )
    assert begun.returncode == 0, begun.stderr
    onward = ("train.py", "init_from=resume", f"out_dir={folder}", "max_iters=41")
    before = CheckpointManager.base_reference(folder, tmp_path)["sha256"]
    (tmp_path / "base-base").mkdir()  # as an earlier copy that has adapters of its own
    done = script(*onward)
    assert done.returncode == 1 and f"run adapts the weights of {folder}, which would be replaced" in done.stderr
    assert CheckpointManager.base_reference(folder, tmp_path)["sha256"] == before
    advice = re.search(r"python (checkpoint.py deploy .+)\)", done.stderr)[1]
    assert script(*shlex.split(advice)).returncode == 0
    done = script(*onward)
    assert done.returncode == 0, done.stderr
    assert CheckpointManager.verify(tmp_path / "run", base=f"{folder}-base1") == []


def test_too_little_memory_is_one_sentence(base, dataset, tmp_path, script):
    settings = (f"init_from={base}", f"dataset={dataset}", f"out_dir={tmp_path / 'run'}", *LORA, *STEPS)
    done = script("train.py", *settings, "lora_rank=100000000000")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "there is not enough memory" in done.stderr and not (tmp_path / "run").exists()


def copied(directory: Path, to: Path) -> Path:
    """A LoRA directory somewhere else, whose base is then not where it was."""
    shutil.copytree(directory, to)
    return to


def logits(model, seed=0):
    x = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.eval()(x, x)[0]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- training


def test_a_lora_run_teaches_the_base_and_leaves_it_as_it_was(base, adapted):
    evaluations = [record["val_loss"] for record in history(adapted) if "val_loss" in record]
    assert evaluations[-1] < evaluations[0] - 0.3
    assert CheckpointManager.verify(base) == []
    assert json.loads((adapted / "export_meta.json").read_text())["base"] == {
        "path": os.path.relpath(base / "ckpt.pt", adapted),
        "sha256": sha256(base / "ckpt.pt"),
        "given": str(base),
    }


def test_a_base_on_another_drive_is_remembered_by_its_whole_path(base, tmp_path, monkeypatch):
    def no_way(path, start):
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    monkeypatch.setattr(os.path, "relpath", no_way)
    path = CheckpointManager.base_reference(base, tmp_path)["path"]
    assert path == (base.resolve() / "ckpt.pt").as_posix() == (tmp_path / path).as_posix()


def test_its_directory_holds_the_adapter_and_how_to_go_on_but_no_model(base, adapted):
    names = {path.relative_to(adapted).as_posix() for path in adapted.rglob("*") if path.is_file()}
    assert "adapters/adapter_model.safetensors" in names and "adapters/adapter_config.json" in names
    assert "ckpt.pt" not in names and "model.safetensors" not in names
    last = state(adapted)
    trained = sum(tensor.numel() for tensor in last["model"].values())
    moments = sum(t.numel() for s in last["optimizer"]["state"].values() for t in s.values() if t.dim())
    assert trained == 2 * 4 * (32 + 96 + 32 + 32 + 128 + 32) and moments == 2 * trained
    assert (adapted / "last/state.pt").stat().st_size < 4 * 4 * trained + 40_000
    about = json.loads((adapted / "export_meta.json").read_text())
    assert about["adapter_parameters"] == trained
    assert about["parameters"] == CheckpointManager.load_model(base)[0].num_params()
    assert CheckpointManager.verify(adapted) == []


def test_only_adapters_are_trained_and_only_they_have_an_optimizer_state(base, dataset, tmp_path):
    arguments = [f"init_from={base}", f"dataset={dataset}", f"out_dir={tmp_path / 'x'}", *LORA, *STEPS, "max_iters=3"]
    config, given = configurator.load(arguments)
    trainer = train.Trainer(prepare_start(config, given, Ranks()), CPU, Ranks())
    names = [name for name, p in trainer.raw_model.named_parameters() if p.requires_grad]
    assert names and all(".lora.default." in name for name in names)
    before = {name: tensor.clone() for name, tensor in trainer.raw_model.state_dict().items()}
    trainer.step()
    trainer.step()
    moved = {name for name, tensor in trainer.raw_model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(names)
    assert len(trainer.optimizer.state) == len(names)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_interrupted_lora_run_equals_one_that_was_not(base, other_text, tmp_path, script, dtype):
    start = (f"init_from={base}", f"dataset={other_text}", *LORA, *STEPS, f"dtype={dtype}", "dropout=0.1")
    settings = (*start, "lora_dropout=0.2", "block_size=16", "max_iters=60", "eval_interval=20")
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    done = script("train.py", *settings, f"out_dir={straight}")
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(command("train.py", *settings, f"out_dir={stopped}"), stdout=subprocess.DEVNULL)
    wait_for(stopped, 30, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert 30 <= state(stopped)["iter_num"] < 60
    moved = copied(base, tmp_path / "moved")
    done = script("train.py", "init_from=resume", f"out_dir={stopped}", f"base={moved}")
    assert done.returncode == 0, done.stderr
    assert history(stopped) == history(straight)
    assert differences(state(stopped), state(straight)) == []
    adapters = [(d / "adapters/adapter_model.safetensors").read_bytes() for d in (stopped, straight)]
    assert adapters[0] == adapters[1]
    assert json.loads((stopped / "export_meta.json").read_text())["base"]["path"] == "../moved/ckpt.pt"


def test_a_killed_lora_run_goes_on_from_its_last_save(base, other_text, tmp_path, script):
    start = (f"init_from={base}", f"dataset={other_text}", *LORA, *STEPS)
    kill_and_go_on(tmp_path, script, *start, "lora_dropout=0.2")


def test_a_kill_at_random_moments_of_a_save_leaves_a_lora_directory_that_loads(base, tmp_path):
    directory, reference = tmp_path / "run", CheckpointManager.base_reference(base, tmp_path / "run")
    model, _ = CheckpointManager.load_model(base, apply_lora=True, lora_config={"rank": 16})

    def save_number(n: int) -> None:
        with torch.no_grad():
            for tensor in lora.lora_state_dict(model).values():
                tensor.fill_(n)
        metadata = {"config": {}, "iter_num": n, "best_val_loss": 1.0, "best": {"iter_num": n}, "base": reference}
        CheckpointManager.save_checkpoint(model, directory, metadata, training_state={"number": n})

    def loaded_number() -> int:
        best, metadata = CheckpointManager.load_model(directory)
        last = CheckpointManager.load_training_state(directory)
        tensors = [*lora.lora_state_dict(best).values(), *last["model"].values()]
        numbers = {int(x) for tensor in tensors for x in tensor.unique()} | {metadata["iter_num"], last["number"]}
        assert len(numbers) == 1, f"parts of several states: {numbers}"
        return numbers.pop()

    kill_at_random_moments(save_number, loaded_number, 100)


def test_accumulated_adapter_gradients_are_those_of_the_big_batch(base, dataset, tmp_path):
    gradients, tokens = [], []
    for number, shape in enumerate(
        (("batch_size=8", "gradient_accumulation_steps=1"), ("batch_size=2", "gradient_accumulation_steps=4"))
    ):
        out = f"out_dir={tmp_path / str(number)}"
        config, given = configurator.load([f"init_from={base}", f"dataset={dataset}", out, *LORA, *STEPS, *shape])
        trainer = train.Trainer(prepare_start(config, given, Ranks()), CPU, Ranks())
        trainer.optimizer.zero_grad = lambda **_: None
        trainer.step()
        gradients.append([p.grad for p in trainer.raw_model.parameters() if p.requires_grad])
        tokens.append(trainer.samples_per_step)
    assert tokens == [8, 8]
    for one, four in zip(*gradients, strict=True):
        torch.testing.assert_close(one, four, atol=1e-6, rtol=1e-5)


def test_one_micro_batch_a_step_is_there_for_those_who_ask(base, dataset, tmp_path, script):
    start = ("train.py", f"init_from={base}", f"dataset={dataset}", *LORA, *STEPS, "max_iters=2", "eval_interval=2")
    alone = tuple(setting for setting in start if not setting.startswith("gradient_accumulation"))
    done = script(*alone, f"out_dir={tmp_path / 'x'}", "lora_one_micro_batch=true")
    assert "64 tokens a step" in done.stdout
    done = script("train.py", "init_from=resume", f"out_dir={tmp_path / 'x'}", "max_iters=3")
    assert done.returncode == 0 and "64 tokens a step" in done.stdout
    done = script("train.py", "init_from=resume", f"out_dir={tmp_path / 'x'}", "gradient_accumulation_steps=2")
    refused(done, "gradient_accumulation_steps=2 contradicts lora_one_micro_batch=true")
    done = script(*start, f"out_dir={tmp_path / 'y'}")
    assert "128 tokens a step" in done.stdout


@pytest.mark.parametrize("file", ["", "ckpt.pt", "model.safetensors", "last/state.pt"])
def test_peft_finds_the_base_whichever_of_its_files_was_named(base, dataset, tmp_path, file):
    out, given = tmp_path / "run", base / file
    model, _ = CheckpointManager.load_model(base, apply_lora=True, lora_config={"rank": 2})
    metadata = {"config": {}, "iter_num": 1, "best_val_loss": 1.0, "base": CheckpointManager.base_reference(given, out)}
    metadata["base"]["given"] = str(given)
    CheckpointManager.save_checkpoint(model, out, metadata)
    assert json.loads((out / "adapters/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


@pytest.mark.slow
def test_two_processes_adapt_as_one_does(base, dataset, tmp_path):
    start = (f"init_from={base}", f"dataset={dataset}", *LORA, *STEPS, "max_iters=6", "eval_interval=3")
    for size in (1, 2):
        launcher = [command("x")[0], "-m", "torch.distributed.run", f"--nproc_per_node={size}", "--master_port=29612"]
        out = f"out_dir={tmp_path / str(size)}"
        done = subprocess.run([*launcher, *command("train.py", *start, out)[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for a, b in zip(*(history(tmp_path / str(size)) for size in (1, 2)), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_the_convention_names_what_comes_out(base):
    small = GPTConfig(32, 320, 2, 2, 32, bias=False, tie_word_embeddings=False)
    for start, lora_on, expected in (
        ("models/gpt-38M-tinystories-pretrain", "true", "gpt-46K-tinystories-to-scientific-lora"),
        ("models/gpt-38M-tinystories-to-scientific-merged", "false", "gpt-46K-scientific-merged-ft"),
        ("models/gpt-38M-tinystories-to-scientific-merged", "true", "gpt-46K-scientific-lora"),
        ("somewhere/else", "true", "gpt-46K-base-to-scientific-lora"),
    ):
        config, _ = configurator.load([f"init_from={start}", f"lora={lora_on}", "dataset=scientific"])
        assert str(conventional_name(small, config)) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("lora_targets=c_attn,c_porj",), ["targets entry 'c_porj' (nearest:", "c_proj"]),
        ((r"lora_targets=.*\.q_proj",), ["match no layer that LoRA can adapt"]),
        (("lora_targets=(",), ["'(' is no regular expression"]),
        (("r=4", "rank=8"), ["give lora_rank two values"]),
        (("lora.r=0",), ["rank=0 must be a whole number above 0"]),
        (("lora=false", "lora_dropout=0.1"), ["lora_rank=4 means nothing without lora=true", "lora_dropout=0.1 means"]),
        (("init_from=scratch",), ["lora=true adapts a model that exists"]),
        (("base=x",), ["argument base=x: base=x is for resuming a LoRA run"]),
        (("n_layer=3",), ["argument n_layer=3: n_layer=3 is not what"]),
        (("lora_one_micro_batch=true", "gradient_accumulation_steps=2"), ["contradicts lora_one_micro_batch=true"]),
        (
            ("optimizer=muon", "muon_learning_rate=0.5", "lora_targets=wte"),
            ["argument optimizer=muon, argument lora_targets=wte: optimizer=muon is for matrices inside the blocks"],
        ),
    ],
)
def test_what_cannot_be_adapted_is_one_sentence_and_nothing_is_written(
    base, dataset, tmp_path, script, arguments, words
):
    out = tmp_path / "x"
    refused(script("train.py", f"init_from={base}", f"dataset={dataset}", f"out_dir={out}", *LORA, *arguments), *words)
    assert not out.exists()


def test_dropout_that_nothing_reads_is_told(base, dataset, tmp_path):
    start = (f"init_from={base}", f"dataset={dataset}", *LORA, *STEPS, "lora_dropout=0.3")
    for targets, told in (("wte", True), ("wte,lm_head", False)):
        out = f"out_dir={tmp_path / targets}"
        notes = prepare_start(*configurator.load([*start, out, f"lora_targets={targets}"]), Ranks()).notes
        assert any(note.startswith("lora_dropout=0.3 drops nothing: ") for note in notes) is told


def test_tied_layers_are_adapted_only_where_that_is_allowed(dataset, tmp_path, script):
    base = tmp_path / "tied"
    settings = (f"dataset={dataset}", *QUICK, "tie_word_embeddings=true", "max_iters=2")
    assert script("train.py", *settings, f"out_dir={base}").returncode == 0
    start = ("train.py", f"init_from={base}", f"dataset={dataset}", f"out_dir={tmp_path / 'x'}", *STEPS, "lora=true")
    refused(script(*start, "lora_targets=c_attn,lm_head"), "lm_head shares its weight", "lora_untie=true")
    idle = script(*start[:3], f"out_dir={tmp_path / 'y'}", *start[4:], "lora_targets=all", "lora_untie=true")
    assert idle.returncode == 0 and "lora_untie=true unties nothing" in idle.stdout, idle.stderr
    done = script(*start, "lora_targets=c_attn,lm_head", "lora_untie=true", "max_iters=20")
    assert done.returncode == 0, done.stderr
    assert "LoRA rank 8 on 3 layers (2 x attn.c_attn, lm_head)" in done.stdout
    done = script("merge_lora.py", tmp_path / "x", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert "untied: lm_head no longer shares its weight" in done.stdout and "changes nothing" not in done.stdout
    before, after = (
        CheckpointManager.load_model(tmp_path / "x")[0],
        CheckpointManager.load_model(tmp_path / "merged")[0],
    )
    assert before.config.tie_word_embeddings and not after.config.tie_word_embeddings
    assert after.num_params() > CheckpointManager.load_model(base)[0].num_params()
    torch.testing.assert_close(logits(after), logits(before), atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "merged/export_meta.json").read_text())["merge"]["untied"] == ["lm_head"]


def test_an_adapter_is_not_adapted(adapted, dataset, tmp_path, script):
    start = ("train.py", f"init_from={adapted}", f"dataset={dataset}", f"out_dir={tmp_path / 'x'}")
    refused(script(*start, *LORA), "is a LoRA directory: merge it first (python merge_lora.py")
    refused(script(*start), "is a LoRA directory: merge it first (python merge_lora.py")


def test_an_adapter_by_itself_is_no_model_and_names_the_directory_that_is(adapted, dataset, tmp_path, script):
    words = f"{adapted / 'adapters'} is an adapter and no model: give {adapted}, the LoRA directory"
    start = ("train.py", f"init_from={adapted / 'adapters'}", f"dataset={dataset}", f"out_dir={tmp_path / 'x'}")
    refused(script(*start), words)
    refused(script(*start, *LORA), words)
    refused(script("sample.py", adapted / "adapters", "--prompt", "x"), words)


# ---- the directory and its base


def test_loading_the_directory_gives_base_and_adapter(base, adapted):
    model, metadata = CheckpointManager.load_model(adapted)
    assert lora.adapter_names(model) == ["default"] and metadata["config"]["lora_rank"] == 4
    expected = CheckpointManager.load_model(base)[0]
    plain = logits(expected)
    load_adapters(expected, adapted / "adapters")
    assert torch.equal(logits(model), logits(expected)) and not torch.allclose(logits(model), plain, atol=0.1)
    inference = CheckpointManager.load_model_for_inference(adapted)
    assert lora.adapter_names(inference) == []
    torch.testing.assert_close(logits(inference), logits(model), atol=1e-5, rtol=1e-5)


def test_what_is_loaded_is_the_best_and_what_goes_on_is_the_last(base, dataset, tmp_path, script):
    start = ("train.py", f"init_from={base}", f"dataset={dataset}", f"out_dir={tmp_path / 'x'}", *LORA, *STEPS)
    assert script(*start, "max_iters=6", "eval_interval=3", "learning_rate=50", "grad_clip=0").returncode == 0
    best, metadata = CheckpointManager.load_model(tmp_path / "x")
    assert metadata["iter_num"] == 0 and state(tmp_path / "x")["iter_num"] == 6
    assert not any(t.any() for key, t in lora.lora_state_dict(best).items() if "lora_B" in key)
    assert any(t.any() for key, t in state(tmp_path / "x")["model"].items() if "lora_B" in key)
    assert "the adapter changes nothing" in script("merge_lora.py", tmp_path / "x", tmp_path / "m").stdout


def test_a_base_that_was_moved_is_reported_with_path_and_hash_and_found_by_base(base, adapted, tmp_path, script):
    moved, here = copied(base, tmp_path / "elsewhere"), copied(adapted, tmp_path / "gpt-46K-tiny-to-other-lora")
    there = f"needs its base, and there is none at {here}/"
    for done in (
        script("sample.py", here, "--prompt", "the"),
        script("merge_lora.py", here),
        script("train.py", "init_from=resume", f"out_dir={here}"),
    ):
        refused(done, there, sha256(base / "ckpt.pt"), str(base), "--base")
        assert len(done.stderr.strip().splitlines()) == 1
    assert "needs its base" in script("checkpoint.py", "verify", here).stdout
    option = ("--prompt", "the gradient", "--temperature", "0", "--max_new_tokens", "20")
    found = script("sample.py", here, "--base", moved, *option)
    assert found.returncode == 0, found.stderr
    assert found.stdout == script("sample.py", adapted, *option).stdout
    assert script("sample.py", here, "--base", moved / "ckpt.pt", *option).stdout == found.stdout
    assert script("checkpoint.py", "verify", here, "--base", moved).stdout == f"{here} is sound\n"
    compare = ("compare.py", base, here, "--max_tokens", 64, "--max_new_tokens", 2)
    refused(script(*compare, cwd=tmp_path), there)
    done = script(*compare, "--base", moved, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    refused(script(*compare[:2], base, "--base", moved, cwd=tmp_path), "neither A nor B is a LoRA directory")


def test_another_base_is_refused(base, adapted, tmp_path, script):
    other = tmp_path / "other"
    model, metadata = CheckpointManager.load_model(base)
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] += 1
    CheckpointManager.save_checkpoint(
        model, other, {key: metadata[key] for key in ("config", "iter_num", "best_val_loss")}
    )
    done = script("merge_lora.py", adapted, tmp_path / "m", "--base", other)
    refused(done, f"{other} is not the base of", sha256(other / "ckpt.pt"), sha256(base / "ckpt.pt"))
    refused(script("merge_lora.py", adapted, tmp_path / "m", "--base", adapted), "is a LoRA directory: merge it first")
    refused(script("sample.py", base, "--base", base), "holds a whole model, so it has no base")
    assert not (tmp_path / "m").exists()


def test_a_base_without_a_marker_such_as_nanogpts_is_hashed(base, dataset, tmp_path, script):
    (tmp_path / "nano").mkdir()
    shutil.copy(base / "ckpt.pt", tmp_path / "nano")
    out = tmp_path / "x"
    start = ("train.py", f"init_from={tmp_path / 'nano'}", f"dataset={dataset}", f"out_dir={out}", *LORA, *STEPS)
    done = script(*start, "max_iters=2")
    assert done.returncode == 0, done.stderr
    CheckpointManager.load_model(out)
    with open(tmp_path / "nano/ckpt.pt", "ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match="is not the base of"):
        CheckpointManager.load_model(out)


def test_a_base_that_is_a_link_into_a_store_of_blobs_is_found_again(base, dataset, tmp_path, script):
    (tmp_path / "blobs").mkdir()
    shutil.copy(base / "ckpt.pt", tmp_path / "blobs" / "0123abcd")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "ckpt.pt").symlink_to("../blobs/0123abcd")
    start = ("train.py", f"init_from={tmp_path / 'hub'}", f"dataset={dataset}", f"out_dir={tmp_path / 'x'}")
    assert script(*start, *LORA, *STEPS, "max_iters=2").returncode == 0
    CheckpointManager.load_model(tmp_path / "x")


def test_a_base_is_found_by_its_name_and_one_on_the_hub_is_called_by_its_id(base, dataset, tmp_path, script):
    snapshot = tmp_path / "hub" / "models--lab--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, snapshot)
    (tmp_path / "hub/models--lab--tiny/refs").mkdir()
    (tmp_path / "hub/models--lab--tiny/refs/main").write_text("0" * 40)
    start = ("train.py", ROOT / "config/finetune_lora.py", f"dataset={dataset}", *STEPS, "max_iters=2")
    environment = {**os.environ, "NANOFORGE_GPT2_PATH": str(base), "HF_HUB_CACHE": str(tmp_path / "hub")}
    for name, called in (("gpt2-offline", str(base)), ("lab/tiny", "lab/tiny")):
        out = tmp_path / name
        done = script(*start, f"model={name}", f"out_dir={out}", "lora.enabled=true", "lora.r=4", env=environment)
        assert done.returncode == 0, done.stderr
        assert "LoRA rank 4" in done.stdout
        assert json.loads((out / "adapters/adapter_config.json").read_text())["base_model_name_or_path"] == called
        CheckpointManager.load_model(out)
    refused(script(*start, "model=lab/other", env=environment), "lab/other was not found", "local_files_only")
    refused(script(*start, "model=gpt2-ofline", env=environment), "Did you mean gpt2-offline?")


def test_a_base_that_is_saved_anew_while_a_run_starts_stops_it(base, dataset, tmp_path, monkeypatch):
    changing = copied(base, tmp_path / "base")
    find = preflight.find_dataset

    def slow(*arguments):
        model, metadata = CheckpointManager.load_model(changing)
        model.lm_head.weight.data += 1
        kept = {key: metadata[key] for key in ("config", "iter_num", "best_val_loss")}
        CheckpointManager.save_checkpoint(model, changing, kept)
        return find(*arguments)

    monkeypatch.setattr(preflight, "find_dataset", slow)
    config, given = configurator.load([f"init_from={changing}", f"dataset={dataset}", "lora=true", *STEPS])
    with pytest.raises(ValueError, match="was saved anew while it was read"):
        prepare_start(config, given, Ranks())


@pytest.mark.parametrize("adapted", [True, False])
def test_reading_during_saves_never_mixes_two_of_them(base, tmp_path, adapted):
    directory = tmp_path / "run"
    model, _ = CheckpointManager.load_model(base, apply_lora=adapted, lora_config={"rank": 2} if adapted else None)
    reference = {"base": CheckpointManager.base_reference(base, directory)} if adapted else {}
    tensors = lora.lora_state_dict(model).values() if adapted else model.state_dict().values()

    def save_number(n: int) -> None:
        with torch.no_grad():
            for tensor in tensors:
                tensor.fill_(n)
        metadata = {"config": {}, "iter_num": n, "best_val_loss": 1.0, "best": {"iter_num": n}, **reference}
        CheckpointManager.save_checkpoint(model, directory, metadata)
        time.sleep(0.02)  # a load takes longer than a save this small, and would hardly ever find one whole

    save_number(0)
    pid = forked(lambda: [save_number(n % 200) for n in range(1, 10**6)])
    try:
        seen, loads = set(), 0
        while loads < 60 or (len(seen) <= 5 and loads < 1000):  # on a busy machine saves are slower than loads
            loads += 1
            loaded, metadata = CheckpointManager.load_model(directory)
            weights = lora.lora_state_dict(loaded).values() if adapted else loaded.state_dict().values()
            numbers = {int(x) for tensor in weights for x in tensor.unique()}
            assert numbers == {metadata["iter_num"]} == {metadata["export_meta"]["iter_num"]}
            seen |= numbers
        assert len(seen) > 5, "nothing was saved meanwhile"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_the_tokenizer_of_a_save_cut_short_is_found_under_its_own_name(base, tmp_path, monkeypatch):
    """Its name says that it is a tokenizer.json; the temporary one is gone once the run goes on."""
    directory, text = tmp_path / "run", (base / "tokenizer.json").read_bytes()
    monkeypatch.setattr(files, "recover", lambda directory: None)
    kept = {"config": {}, "iter_num": 1, "best_val_loss": 1.0}
    CheckpointManager.save_checkpoint(
        CheckpointManager.load_model(base)[0], directory, kept, texts={"tokenizer.json": text}
    )
    assert not (directory / "tokenizer.json").exists()
    found = CheckpointManager.find_tokenizer(directory)
    assert found == directory / "tokenizer.json"
    assert Tokenizer.load(found).fingerprint == Tokenizer.load(base / "tokenizer.json").fingerprint


def test_a_damaged_adapter_is_found(adapted, base, tmp_path):
    here = copied(adapted, tmp_path / "x")
    path = here / "adapters/adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "adapter_model.safetensors is damaged" in CheckpointManager.verify(here)[0]
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
        CheckpointManager.load_model(here, base=base)


def test_a_model_with_adapters_is_saved_with_its_base_or_not_at_all(base, tmp_path):
    metadata = {"config": {}, "iter_num": 0, "best_val_loss": 1.0}
    model, _ = CheckpointManager.load_model(base, apply_lora=True)
    with pytest.raises(ValueError, match="is saved with its base"):
        CheckpointManager.save_checkpoint(model, tmp_path / "x", metadata)
    lora.add_adapter(model, "two", lora.LoRAConfig())
    with pytest.raises(ValueError, match=r"a model with one adapter.*this one has default, two"):
        CheckpointManager.save_checkpoint(model, tmp_path / "x", metadata | {"base": {"given": "y"}})
    lora.merge_lora(model, "default")
    with pytest.raises(ValueError, match="one without has none"):
        CheckpointManager.save_checkpoint(model, tmp_path / "x", metadata | {"base": {"path": "y"}})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("best", [True, False])
def test_a_model_of_which_more_trains_than_its_adapter_is_not_saved_as_one(base, tmp_path, best):
    model, _ = CheckpointManager.load_model(base, apply_lora=True)
    model.transformer.ln_f.requires_grad_(True)
    metadata = {"config": {}, "iter_num": 0, "best_val_loss": 1.0}
    metadata["base"] = CheckpointManager.base_reference(base, tmp_path / "x")
    with pytest.raises(ValueError, match=r"transformer\.ln_f\.weight; freeze it"):
        CheckpointManager.save_checkpoint(model, tmp_path / "x", metadata, best=best, training_state={})
    assert not (tmp_path / "x").exists()
    lora.merge_lora(model)
    del metadata["base"]
    CheckpointManager.save_checkpoint(model, tmp_path / "x", metadata)


def test_list_deploy_and_prune_know_what_a_lora_directory_is(base, adapted, dataset, tmp_path, script):
    root = tmp_path / "models"
    old, new = root / "gpt-46K-tiny-pretrain", root / "gpt-46K-tiny-pretrain-v2"
    shutil.copytree(base, old), shutil.copytree(base, new)
    start = ("train.py", f"init_from={old}", f"dataset={dataset}", f"out_dir={root / 'gpt-46K-tiny-lora'}")
    assert script(*start, *LORA, *STEPS, "max_iters=2").returncode == 0
    again = ("train.py", f"init_from={old}/last/state.pt", *start[2:-1], f"out_dir={root / 'gpt-46K-tiny-lora-v2'}")
    assert script(*again, *LORA, *STEPS, "max_iters=2").returncode == 0
    shutil.rmtree(root / "gpt-46K-tiny-lora")
    listed = script("checkpoint.py", "list", root).stdout
    assert "gpt-46K-tiny-lora" in listed and "torn" not in listed
    done = script("checkpoint.py", "prune", root, "--yes")
    assert f"kept {old}: it is the base of gpt-46K-tiny-lora-v2" in done.stdout and old.is_dir()
    spaced = tmp_path / "an adapter"
    spaced.symlink_to(adapted)
    done = script("checkpoint.py", "deploy", spaced, tmp_path / "d")
    refused(done, f"is a LoRA directory: merge it first (python merge_lora.py '{spaced}')")
    assert not (tmp_path / "d").exists()


# ---- merging


def test_adapter_on_equals_merged_equals_merged_saved_and_loaded(adapted, tmp_path, script):
    destination = tmp_path / "gpt-46K-tiny-to-other-merged"
    done = script("merge_lora.py", adapted, destination)
    assert done.returncode == 0, done.stderr
    on, _ = CheckpointManager.load_model(adapted)
    loaded, metadata = CheckpointManager.load_model(destination)
    expected = logits(on)
    lora.merge_lora(on)
    torch.testing.assert_close(logits(on), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
    assert type(loaded) is GPT and all(torch.equal(t, loaded.state_dict()[k]) for k, t in on.state_dict().items())
    assert CheckpointManager.verify(destination) == []
    assert metadata["best_val_loss"] == CheckpointManager.load_model(adapted)[1]["best_val_loss"]


def test_what_merging_cost_is_in_the_marker_for_every_dtype(base, adapted, tmp_path, script):
    assert script("merge_lora.py", adapted, tmp_path / "m").returncode == 0
    about = json.loads((tmp_path / "m" / "export_meta.json").read_text())["merge"]
    assert about["adapter"] == {
        "name": adapted.name,
        "sha256": sha256(adapted / "adapters/adapter_model.safetensors"),
    }
    assert about["base"] == {"given": str(base), "sha256": sha256(base / "ckpt.pt")} and about["dtype"] == "float32"
    assert about["layers"] == 6 and about["largest_delta"] > 0 and about["verified_on"].endswith("tokens of other")
    costs = about["by_dtype"]
    assert costs["float32"]["largest_logit_difference"] < 1e-4
    assert costs["float32"]["rounding_loss"] < costs["float16"]["rounding_loss"] < costs["bfloat16"]["rounding_loss"]
    exact = CheckpointManager.load_model(adapted)[0]
    data = find_dataset(json.loads((adapted / "config.json").read_text())["dataset"], adapted / "tokenizer.json")
    x, y = sequences(data.val, fixed_batches(data.val, 32, 4, 4)[0], 32)
    with torch.no_grad():
        assert costs["bfloat16"]["loss_before"] == pytest.approx(exact.eval()(x, y)[1].item(), abs=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merge_in_half_precision_rounds_once_and_stays_near(adapted, tmp_path, script, dtype):
    done = script("merge_lora.py", adapted, tmp_path / "m", "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    loaded, _ = CheckpointManager.load_model(tmp_path / "m")
    wanted = getattr(torch, dtype)
    exact = lora.merge_lora
    on, _ = CheckpointManager.load_model(adapted)
    expected = logits(on)
    exact(on)
    assert all(torch.equal(t.to(wanted), loaded.state_dict()[k]) for k, t in on.double().state_dict().items())
    about = json.loads((tmp_path / "m" / "export_meta.json").read_text())["merge"]["by_dtype"][dtype]
    difference = (logits(loaded.float()) - expected).abs().max().item()
    # 8 bits of mantissa in bfloat16, 11 in float16, through a few layers with logits up to some 10
    assert 0 < difference < {"bfloat16": 0.2, "float16": 0.02}[dtype]
    assert about["largest_logit_difference"] < {"bfloat16": 0.2, "float16": 0.02}[dtype]


def test_the_convention_places_the_merged_model_beside_and_a_second_merge_changes_nothing(base, adapted, script):
    done = script("merge_lora.py", adapted)
    assert done.returncode == 0, done.stderr
    merged = adapted.parent / "gpt-46K-tiny-to-other-merged"
    written = (merged / "export_meta.json").read_bytes()
    assert str(merged) in done.stdout and "delta lost" in done.stdout
    again = script("merge_lora.py", adapted)
    assert again.returncode == 0 and "is this merge already; nothing was changed" in again.stdout
    assert (merged / "export_meta.json").read_bytes() == written
    option = ("--prompt", "zero is", "--temperature", "0", "--max_new_tokens", "20")
    assert script("sample.py", merged, *option).stdout == script("sample.py", adapted, *option).stdout
    refused(script("merge_lora.py", adapted, "--dtype", "bfloat16"), "holds another model", "-v2")
    refused(script("merge_lora.py", merged), "is no LoRA directory")
    assert (merged / "export_meta.json").read_bytes() == written


def test_nothing_is_merged_over(base, adapted, tmp_path, script):
    theirs = copied(base, tmp_path / "theirs")
    refused(script("merge_lora.py", adapted, theirs), f"{theirs} holds another model, gpt-46K-tiny-pretrain")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("")
    refused(script("merge_lora.py", adapted, tmp_path / "notes"), "holds a.txt, not ours to write over")
    refused(script("merge_lora.py", adapted, adapted.parent / "merged"), "'merged' is not {architecture}-{size}")
    refused(script("merge_lora.py", tmp_path / "notes"), "is no LoRA directory")
    refused(script("merge_lora.py", tmp_path / "nowhere"), "is no LoRA directory")
    refused(script("merge_lora.py", copied(adapted, tmp_path / "nameless"), "--base", base), "so say where")
    assert CheckpointManager.verify(theirs) == []


def test_a_merge_that_computes_something_else_is_not_written(adapted, tmp_path, monkeypatch):
    exact = lora.merge_lora

    def wrong(model, *arguments, **options):
        report = exact(model, *arguments, **options)
        with torch.no_grad():
            model.transformer.h[1].mlp.c_proj.weight[0] += 0.1
        return report

    monkeypatch.setattr(lora, "merge_lora", wrong)
    with pytest.raises(ValueError, match="computes something else: its logits differ by up to"):
        merge_lora.merge(adapted, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_merged_model_with_numbers_that_are_none_is_not_written(adapted, tmp_path, monkeypatch):
    exact = lora.merge_lora

    def wrong(model, *arguments, **options):
        report = exact(model, *arguments, **options)
        model.lm_head.weight.data[0] = 3e38  # finite, and its logits are not
        return report

    monkeypatch.setattr(lora, "merge_lora", wrong)
    with pytest.raises(ValueError, match="computes something else"):
        merge_lora.merge(adapted, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_merge_that_has_lost_a_file_is_torn_and_a_tokenizer_is_verified(base, adapted, tmp_path, script):
    assert script("merge_lora.py", adapted, tmp_path / "m").returncode == 0
    (tmp_path / "m" / "ckpt.pt").unlink()
    refused(script("merge_lora.py", adapted, tmp_path / "m"), "is torn")
    here = copied(adapted, tmp_path / "x")
    text = (here / "tokenizer.json").read_text()
    (here / "tokenizer.json").write_text(text.replace("bpe-tiny", "bpe-tuny"))
    refused(script("merge_lora.py", here, tmp_path / "n", "--base", base), "tokenizer.json is damaged")
    (tmp_path / "file").write_text("")
    refused(script("merge_lora.py", adapted, tmp_path / "file"), "is a file: name another folder")
    assert not (tmp_path / "n").exists()


def test_without_the_runs_text_the_readme_is_read_and_without_a_tokenizer_data_is_asked_for(
    base, adapted, dataset, tmp_path, script
):
    here = copied(adapted, tmp_path / "x")
    config = json.loads((here / "config.json").read_text()) | {"dataset": str(tmp_path / "gone")}
    rewritten = json.dumps(config).encode()
    (here / "config.json").write_bytes(rewritten)
    about = json.loads((here / "export_meta.json").read_text())
    about["files"]["config.json"] = {"size": len(rewritten), "sha256": hashlib.sha256(rewritten).hexdigest()}
    (here / "export_meta.json").write_text(json.dumps(about))
    done = script("merge_lora.py", here, tmp_path / "m", "--base", base)
    assert done.returncode == 0 and "verified on 128 tokens of README.md" in done.stdout, done.stderr
    done = script("merge_lora.py", here, tmp_path / "n", "--base", base, "--data", dataset)
    assert done.returncode == 0 and "tokens of tiny" in done.stdout, done.stderr
    (here / "tokenizer.json").unlink()
    del about["files"]["tokenizer.json"]
    (here / "export_meta.json").write_text(json.dumps(about))
    refused(script("merge_lora.py", here, tmp_path / "o", "--base", base), "give --data")


def test_a_merged_model_is_trained_further_and_says_so(adapted, other_text, tmp_path, script):
    merged = tmp_path / "gpt-46K-tiny-to-other-merged"
    assert script("merge_lora.py", adapted, merged).returncode == 0
    refused(script("train.py", "init_from=resume", f"out_dir={merged}"), "it can be loaded and fine-tuned, but not")
    done = script("train.py", f"init_from={merged}", f"dataset={other_text}", *STEPS, "max_iters=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "models" / "gpt-46K-other-merged-ft" / "ckpt.pt").exists()
    first = json.loads((tmp_path / "models/gpt-46K-other-merged-ft/metrics.jsonl").read_text().splitlines()[0])
    assert first["val_loss"] == pytest.approx(CheckpointManager.load_model(merged)[1]["best_val_loss"], abs=1e-4)


def test_the_text_was_written_in_the_bases_tokens(base, adapted, other_text):
    derived = load_dataset(next(path for path in other_text.iterdir() if path.is_dir()))
    assert derived.tokenizer_fingerprint == Tokenizer.load(base / "tokenizer.json").fingerprint
    assert load_dataset(other_text).meta["tokenizer"]["name"] == "bpe-other"
    assert json.loads((adapted / "export_meta.json").read_text())["dataset"]["fingerprint"] == derived.fingerprint


# ---- models of Hugging Face


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A Llama as it lies on somebody's disk, with a tokenizer of its own kind."""
    folder = tmp_path_factory.mktemp("hub") / "tiny-llama"
    vocabulary = Tokenizer.load(llama3(folder)).vocab_size
    sizes = {"vocab_size": vocabulary + 7, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096}
    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ids)).save_pretrained(folder)
    return folder


def test_a_hugging_face_model_is_adapted_with_its_own_tokenizer_and_merged(llama, other_text, tmp_path, script):
    out = tmp_path / "models" / "gpt-46K-base-to-other-lora"
    start = ("train.py", f"init_from={llama}", f"dataset={other_text}", f"out_dir={out}", "lora=true")
    settings = (*STEPS, r"targets=.*q_proj|.*v_proj", "block_size=32", "max_iters=30", "eval_interval=10")
    done = script(*start, *settings)
    assert done.returncode == 0, done.stderr
    assert "holds tokens of bpe-other; writing it in those of tiny-llama" in done.stdout
    assert "LoRA rank 8 on 4 layers (2 x self_attn.q_proj, 2 x self_attn.v_proj)" in done.stdout
    losses = [record["val_loss"] for record in history(out) if "val_loss" in record]
    assert losses[-1] < losses[0] - 0.02
    assert CheckpointManager.load_model(out)[0].config.block_size == 4096, "only the sequences were short"
    done = script("train.py", "init_from=resume", f"out_dir={out}", "max_iters=31")
    assert done.returncode == 0, done.stderr
    merged = tmp_path / "merged"
    done = script("merge_lora.py", out, merged)
    assert done.returncode == 0, done.stderr
    theirs = AutoModelForCausalLM.from_pretrained(merged).eval()
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), out / "adapters").eval()
    ours = CheckpointManager.load_model_for_inference(merged)
    x = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, ours(x, x)[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(peft(x).logits, ours(x, x)[0], atol=1e-4, rtol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    own = Tokenizer.load(llama / "tokenizer.json")
    assert tokenizer("Zero is the bound").input_ids == own.encode("Zero is the bound")
    assert tokenizer.eos_token_id == own.eot == theirs.generation_config.eos_token_id
    option = ("--prompt", "the gradient", "--temperature", "0", "--max_new_tokens", "20")
    texts = {script("sample.py", directory, *option).stdout for directory in (out, merged)}
    assert len(texts) == 1 and texts.pop().startswith("the gradient")
    assert script("sample.py", llama, *option).returncode == 0


def test_a_hugging_face_base_that_was_moved_or_changed_is_noticed(llama, other_text, tmp_path, script):
    base = copied(llama, tmp_path / "base")
    start = ("train.py", f"init_from={base}", f"dataset={other_text}", f"out_dir={tmp_path / 'x'}", "lora=true", *STEPS)
    assert script(*start, "block_size=32", "max_iters=2").returncode == 0
    base.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="needs its base"):
        CheckpointManager.load_model(tmp_path / "x")
    CheckpointManager.load_model(tmp_path / "x", base=tmp_path / "moved")
    content = bytearray((tmp_path / "moved" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "moved" / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="is not the base of"):
        CheckpointManager.load_model(tmp_path / "x", base=tmp_path / "moved")


def test_a_whole_hugging_face_model_is_trained_further(llama, other_text, tmp_path, script):
    start = ("train.py", f"init_from={llama}", f"dataset={other_text}", f"out_dir={tmp_path / 'x'}", *STEPS)
    refused(script(*start, "block_size=5000"), "block_size=5000 must lie between 1 and 4096, the context of")
    done = script(*start, "block_size=32", "max_iters=4", "eval_interval=2", "learning_rate=0.01")
    assert done.returncode == 0, done.stderr
    done = script("train.py", "init_from=resume", f"out_dir={tmp_path / 'x'}", "max_iters=6")
    assert done.returncode == 0, done.stderr
    ours = CheckpointManager.load_model_for_inference(tmp_path / "x")
    theirs, x = AutoModelForCausalLM.from_pretrained(tmp_path / "x").eval(), torch.arange(24)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, ours(x, x)[0], atol=1e-4, rtol=1e-4)
    assert CheckpointManager.verify(tmp_path / "x") == []


@pytest.fixture(scope="module")
def older(tmp_path_factory) -> Path:
    """A GPT-2 with vocab.json and merges.txt, as it lay on the hub before there was a tokenizer.json."""
    folder = gpt2(tmp_path_factory.mktemp("hub") / "older-gpt2")
    torch.manual_seed(0)
    sizes = {"vocab_size": Tokenizer.load(folder).vocab_size, "n_positions": 64, "n_embd": 32, "n_layer": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, n_head=2, bos_token_id=None, eos_token_id=None)).save_pretrained(folder)
    return folder


def test_a_gpt2_without_a_tokenizer_json_is_adapted_sampled_and_compared(older, other_text, tmp_path, script):
    out = tmp_path / "x"
    start = ("train.py", f"model={older}", f"dataset={other_text}", f"out_dir={out}", "lora.enabled=true", *STEPS)
    done = script(*start, "block_size=32", "max_iters=2")
    assert done.returncode == 0, done.stderr
    theirs, text = AutoTokenizer.from_pretrained(older), "the gradient  of \n x² <|endoftext|>"
    again = AutoTokenizer.from_pretrained(out, tokenizer_file=str(out / "tokenizer.json"))
    assert again(text).input_ids == theirs(text).input_ids
    option = ("--prompt", "the gradient", "--temperature", 0, "--max_new_tokens", 5)
    for directory in (older, older / "model.safetensors", out):
        done = script("sample.py", directory, *option)
        assert done.returncode == 0 and done.stdout.startswith("the gradient"), done.stderr
    done = script("compare.py", older, out, "--data", other_text, "--max_tokens", 64, cwd=tmp_path)
    assert done.returncode == 0 and "bits per byte" in done.stdout, done.stderr


def test_a_tokenizer_that_only_transformers_reads_is_named_with_the_remedy(older, other_text, tmp_path, script):
    folder = copied(older, tmp_path / "sentences")
    (folder / "merges.txt").unlink()
    (folder / "vocab.json").rename(folder / "tokenizer.model")
    for arguments in (
        ("train.py", f"init_from={folder}", f"dataset={other_text}", f"out_dir={tmp_path / 'x'}", *STEPS),
        ("sample.py", folder, "--prompt", "x"),
        ("export.py", folder, "--to", "gguf"),
    ):
        done = script(*arguments)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert f"{folder} has no tokenizer.json, only tokenizer.model: python -c" in done.stderr
