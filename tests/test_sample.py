"""sample.py: prompts from everywhere, streaming, and refusals of one sentence."""

import io
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, ROOT, command

from checkpoint import CheckpointManager
from sample import read_prompt
from tokenizer import Tokenizer, train_bpe


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory, script) -> Path:
    out = tmp_path_factory.mktemp("sampled") / "run"
    settings = (*QUICK, "max_iters=300", "eval_interval=300", "learning_rate=3e-3")
    done = script("train.py", f"dataset={dataset}", f"out_dir={out}", *settings)
    assert done.returncode == 0, done.stderr
    return out


def test_greedy_text_is_what_the_model_generates_from_python(trained, script):
    done = script("sample.py", trained, "--prompt", "the gradient", "--temperature", 0, "--max_new_tokens", 20)
    assert done.returncode == 0, done.stderr
    model, tokenizer = CheckpointManager.load_model_for_inference(trained), Tokenizer.load(trained / "tokenizer.json")
    ids = torch.tensor([tokenizer.encode("the gradient")])
    text = tokenizer.decode(model.generate(ids, 20, temperature=0, stop_tokens=[tokenizer.eot])[0].tolist())
    assert done.stdout == text.removesuffix("<|endoftext|>") + "\n"
    assert "gradient bounds" in text or "gradient shows" in text or "gradient is" in text, (
        "the model has learned nothing"
    )


def test_the_prompt_comes_from_the_option_a_file_or_stdin(trained, script, tmp_path):
    (tmp_path / "p.txt").write_text("this paper\n", encoding="utf-8")
    option = ("--temperature", 0, "--max_new_tokens", 8)
    texts = {
        script("sample.py", trained, "--prompt", "this paper", *option).stdout,
        script("sample.py", trained, "--prompt", f"FILE:{tmp_path / 'p.txt'}", *option).stdout,
        script("sample.py", trained, *option, input="this paper\n").stdout,
        script("sample.py", trained / "ckpt.pt", *option, input="this paper").stdout,
    }
    assert len(texts) == 1 and texts.pop().startswith("this paper ")


def test_a_prompt_on_stdin_that_is_no_text_says_where_it_was_read(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    with pytest.raises(ValueError, match=r"the prompt on stdin .*byte 0xe9 in position 3"):
        read_prompt(None)


def test_several_samples_differ_and_a_seed_repeats_them(trained, script):
    arguments = (
        "sample.py",
        trained,
        "--prompt",
        "a model",
        "--num_samples",
        3,
        "--max_new_tokens",
        30,
        "--temperature",
        1.5,
    )
    # Forks hash alike, so one of them is a process of its own.
    first, again, other = (
        script(*arguments, "--seed", seed, env=env).stdout for seed, env in ((1, None), (1, os.environ), (2, None))
    )
    texts = first.split("---------------\n")
    assert first == again != other and len(set(texts)) == 3 and all(t.startswith("a model") for t in texts)


def test_text_streams_while_it_is_generated(trained):
    arguments = command(
        "sample.py",
        trained,
        "--prompt",
        "the loss",
        "--max_new_tokens",
        100000,
        "--temperature",
        1.2,
        "--num_samples",
        50,
    )
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    assert process.stdout.read(30).startswith(b"the loss")
    assert process.poll() is None, "it ended before anything was read"
    process.kill()
    process.wait()


def test_who_has_read_enough_may_go_and_settings_are_looked_at_before_the_model(trained, script):
    arguments = " ".join(map(str, command("sample.py", trained, "--prompt", "'the loss'", "--max_new_tokens", 300)))
    done = subprocess.run(f"{arguments} | head -c 9", shell=True, capture_output=True, text=True)
    assert done.stdout == "the loss" + done.stdout[8] and done.stderr == ""
    done = subprocess.run(f"{arguments} --num_samples 1 <&-", shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = script("sample.py", trained, "--prompt", "the loss", "--temperature", "nan")
    assert done.returncode == 1 and done.stdout == "" and "sampling needs temperature" in done.stderr


def test_a_byte_order_mark_is_no_part_of_a_prompt(trained, script, tmp_path):
    (tmp_path / "prompt.txt").write_text("\ufeffthe loss", encoding="utf-8")
    done = script("sample.py", trained, "--prompt", f"FILE:{tmp_path / 'prompt.txt'}", "--max_new_tokens", 1)
    assert done.stdout.startswith("the loss")


def test_prompts_of_different_lengths_are_told_as_each_is_alone(trained, script):
    greedy = ("--temperature", 0, "--max_new_tokens", 12)
    prompts = ["the gradient", "a model of the loss shows that", "x"]
    alone = [script("sample.py", trained, "--prompt", prompt, *greedy).stdout for prompt in prompts]
    given = (word for prompt in prompts for word in ("--prompt", prompt))
    together = script("sample.py", trained, *given, *greedy).stdout
    assert together == "---------------\n".join(alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_weights_are_held_as_asked_and_int8_says_what_it_costs(trained, script, dtype):
    options = ("--dtype", dtype, "--max_new_tokens", 10, "--top_k", 5, "--top_p", 0.9)
    done = script("sample.py", trained, "--prompt", "the loss", *options)
    assert done.returncode == 0 and done.stdout.startswith("the loss"), done.stderr
    cost = re.search(r"int8: perplexity ([\d.]+), in float32 ([\d.]+) \(([\d.]+) x\)", done.stderr)
    assert (cost is not None) == (dtype == "int8")
    if cost:
        after, before, ratio = map(float, cost.groups())
        assert before > 1 and 0.9 < ratio < 1.1 and abs(after / before - ratio) < 0.01


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--top_p", 3), "0 < top_p <= 1"),
        (("--top_k", 0), "top_k >= 1"),
        (("--temperature", -1), "temperature >= 0"),
        (("--num_samples", 0), "must be at least 1"),
        (("--prompt", "FILE:/nowhere.txt"), "/nowhere.txt"),
        (("--seed", 10**20), "at most 64 bits"),
        (("--device", "cuda:7"), "device=cuda:7 cannot be used here"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_exit_code_1(trained, script, arguments, words):
    done = script("sample.py", trained, *(("--prompt", "x") if "--prompt" not in arguments else ()), *arguments)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_a_model_is_also_found_by_its_name(trained, script):
    greedy = ("--prompt", "the", "--temperature", 0, "--max_new_tokens", 5)
    by_path, by_name = script("sample.py", trained, *greedy), script("sample.py", "run", *greedy, cwd=trained.parent)
    environment = {**os.environ, "NANOFORGE_GPT2_PATH": str(trained)}
    by_variable = script("sample.py", "gpt2-offline", *greedy, env=environment)
    assert by_path.stdout == by_name.stdout == by_variable.stdout != ""


def test_a_directory_that_is_not_there_is_one_sentence(script, tmp_path):
    done = script("sample.py", tmp_path / "gone", "--prompt", "x")
    assert done.returncode == 1 and "there is no model directory" in done.stderr and "Traceback" not in done.stderr


def test_another_tokenizer_is_refused_with_both_names(trained, script, tmp_path):
    other = tmp_path / "other.json"
    train_bpe(["some other text entirely"] * 9, "bpe-other", vocab_size=270).save(other)
    done = script("sample.py", trained, "--prompt", "x", "--tokenizer", other)
    assert done.returncode == 1 and "bpe-other" in done.stderr and "bpe-tiny" in done.stderr
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    shutil.copy(other, copy / "tokenizer.json")
    done = script("sample.py", copy, "--prompt", "x")
    assert done.returncode == 1 and "bpe-other" in done.stderr and "bpe-tiny" in done.stderr


def test_a_nanogpt_checkpoint_needs_a_tokenizer_and_then_samples(trained, script, tmp_path):
    model, metadata = CheckpointManager.load_model(trained)
    arguments = json.loads((trained / "model_args.json").read_text())
    torch.save(
        {"model": model.state_dict(), "model_args": arguments, "config": metadata["config"]}, tmp_path / "ckpt.pt"
    )
    done = script("sample.py", tmp_path, "--prompt", "x")
    assert done.returncode == 1 and "name one with --tokenizer" in done.stderr
    done = script(
        "sample.py", tmp_path, "--prompt", "the", "--tokenizer", trained / "tokenizer.json", "--max_new_tokens", 5
    )
    assert done.returncode == 0 and done.stdout.startswith("the")


README = (ROOT / "data" / "README.md").read_text(encoding="utf-8").split("## Characters")[-1].split("\n## ")[0]


def test_characters_are_tokens_as_the_readme_says(script, tmp_path):
    (tmp_path / "input.txt").write_text("ROMEO:\nIs the day so young?\n\n" * 300)
    words = shlex.split(re.search(r"```bash\npython (.*)\n```", README)[1])
    done = script(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    dataset = tmp_path / "data" / "characters"
    tokenizer, text = Tokenizer.load(dataset), "".join(map(chr, range(128)))
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == list(text)
    start = (f"dataset={dataset}", f"out_dir={tmp_path / 'run'}", *QUICK, "max_iters=60", "learning_rate=0.01")
    assert script("train.py", *start).returncode == 0
    done = script("sample.py", tmp_path / "run", "--prompt", "ROM", "--temperature", 0, "--max_new_tokens", 6)
    assert done.stdout.startswith("ROMEO:\nIs"), done.stderr


def test_nanogpts_characters_are_written_out_as_the_readme_says(script, tmp_path):
    folder, text = tmp_path / "data" / "shakespeare_char", "ROMEO:\nIs the day so young — or ♥?\n\n" * 300
    folder.mkdir(parents=True)
    stoi = {character: i for i, character in enumerate(sorted(set(text)))}
    (folder / "meta.pkl").write_bytes(pickle.dumps({"stoi": stoi, "itos": {i: c for c, i in stoi.items()}}))
    for name in ("train.bin", "val.bin"):
        np.array([stoi[character] for character in text], dtype=np.uint16).tofile(folder / name)
    start = (f"dataset={folder}", f"out_dir={tmp_path / 'out-shakespeare-char'}", f"vocab_size={len(stoi)}")
    done = script("train.py", *start, *QUICK, "max_iters=150", "learning_rate=0.01")
    assert done.returncode == 0, done.stderr
    done = script("sample.py", tmp_path / "out-shakespeare-char", "--prompt", "ROMEO:")
    assert done.returncode == 1 and "for nanoGPT's characters there is none: data/README.md" in done.stderr
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.stdout.startswith("ROMEO:") and "♥?" in done.stdout and set(done.stdout) <= set(text), done.stderr
    assert len(done.stdout) == len("ROMEO:") + 300 + 1
