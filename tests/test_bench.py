"""The benches run, compare like with like, and notice when they do not. No test looks at a time."""

import hashlib
import json
import re
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import documents

import configurator
from bench import contenders, data_speed, mesh, speed
from distributed import Ranks
from lora import LoRAConfig
from mesh import Mesh
from model import GPT, GPTConfig
from tokenizer import Tokenizer, train_bpe

LORA = LoRAConfig(rank=3, targets=contenders.LORA_TARGETS)
TINY = ("n_layer=2", "n_head=2", "n_embd=32", "block_size=32", "vocab_size=500", "batch_size=2")


def config():
    loaded, _ = configurator.load([*TINY, "device=cpu"])
    return loaded.resolved(loaded.model_config(500))


@pytest.mark.slow
def test_the_script_measures_every_contender_and_finds_that_they_compute_the_same(script, tmp_path):
    result = tmp_path / "result.json"
    names = [name for name in contenders.CONTENDERS if "compile" not in name]  # takes the compiler ten seconds
    settings = (*TINY, "rank=4", "rounds=1", "steps=1", "new_tokens=10", f"contenders={','.join(names)}")
    options = [f"--{setting}" for setting in settings]
    done = script("bench/speed.py", *options, f"--json={result}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "LoRA trains 2,816 parameters: rank 4, alpha 8, on c_attn and c_proj\n" in done.stdout
    assert f"{len(names)} turns of 1 + 1 steps or texts, about " in done.stdout
    assert "agree, within rounding" in done.stdout and "ours-lora / peft-bf16: " in done.stdout
    full, lora, generation = (tabulated(part) for part in re.split(r"\n(?:LoRA|generation):\n", done.stdout))
    assert [row[0] for row in full] == ["nanogpt", "transformers-fp32", "transformers-bf16", "ours-fp32", "ours"]
    assert [row[0] for row in lora] == ["peft-fp32", "peft-bf16", "ours-lora-fp32", "ours-lora"]
    assert [row[0] for row in generation] == names[9:-1]
    assert full[0][4:6] == lora[0][4:6] == generation[0][4:6] == ["1.00", "1.00 - 1.00"]

    written = json.loads(result.read_text())
    assert written["machine"]["torch"] == torch.__version__ and written["machine"]["cpu"]
    assert written["config"]["n_embd"] == 32 and written["config"]["batch_size"] == 2
    assert written["lora"]["rank"] == 4
    assert list(written["contenders"]) == ["full training", "LoRA", "generation"]
    assert written["limits"][0]["products"]["float32"] > 0 and written["limits"][0]["reading"] > 0
    rows = [row for group in written["contenders"].values() for row in group]
    dtypes = {row["contender"]: row["dtype"] for row in rows}
    assert dtypes.pop("ours") in ("float32", "bfloat16")
    assert dtypes.pop("ours-lora") in ("float32", "bfloat16")
    halves = {name for name, dtype in dtypes.items() if dtype == "bfloat16"}
    assert halves == {"transformers-bf16", "peft-bf16", "transformers-generate-bf16"}
    for row in rows:
        losses = 1 if "generate" in row["contender"] else 2  # the warm-up's too
        assert [(len(turn["seconds"]), len(turn["losses"])) for turn in row["turns"]] == [(1, losses)]
        assert row["of_limit"] > 0
        assert row["peak_bytes"] > 50 << 20  # an interpreter with torch is bigger than that
    assert list(tmp_path.iterdir()) == [result]


def tabulated(text):
    header, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert all(len(row) == len(header) == 10 for row in rows)
    return rows


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_transformers_twin_trains_the_same_number_of_parameters_to_the_same_logits(tied, bias):
    model = GPT(GPTConfig(16, 50, 2, 2, 8, bias=bias, tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)  # GPT's initial weights are too small to show much
    twin = contenders.transformers_twin(model).eval()
    assert sum(p.numel() for p in twin.parameters() if p.requires_grad) == model.num_params()
    ids = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(twin(ids).logits, model(ids, ids)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_the_peft_twin_trains_the_same_adapter_with_the_same_gradients(tied):
    model = GPT(GPTConfig(16, 50, 2, 2, 8, bias=False, tie_word_embeddings=tied))
    contenders.add_adapter(model, LORA)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    twin = contenders.peft_twin(model, LORA)
    ours = {name: p for name, p in model.named_parameters() if p.requires_grad}
    theirs = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    assert len(ours) == len(theirs) == 2 * 2 * 3  # A and B, two layers, three matrices
    assert sum(p.numel() for p in ours.values()) == sum(p.numel() for p in theirs.values())
    ids = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(1))
    logits, loss = model(ids, ids)
    twins = twin(input_ids=ids, labels=ids, shift_labels=ids)
    close(twins.logits, logits)
    loss.backward()
    twins.loss.backward()
    for name, parameter in ours.items():
        path, _, letter = name.rpartition(".lora.default.")
        close(theirs[f"base_model.model.{path}.lora_{letter}.default.weight"].grad, parameter.grad)


def close(theirs, ours):
    assert ours.abs().max() > 1e-4  # zeros would agree with anything that is zero too
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5 * ours.abs().max().item())


def test_an_adapter_has_gradients_in_all_its_parts_from_the_first_step():
    model = GPT(config().model_config(500))
    contenders.add_adapter(model, LORA)
    ids = torch.randint(500, (2, 32), generator=torch.Generator().manual_seed(1))
    model(ids, ids)[1].backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def with_another_epsilon(make_twin, model):
    twin = make_twin(model)
    twin.transformer.ln_f.eps = 1e-2
    return twin


def with_another_scale(make_twin, model, lora):
    return make_twin(model, replace(lora, alpha=1.1 * lora.alpha))


@pytest.mark.parametrize(
    "contender, function, mistake",
    [
        ("transformers-fp32", "transformers_twin", with_another_epsilon),
        ("peft-fp32", "peft_twin", with_another_scale),
    ],
)
def test_a_contender_that_computes_something_else_is_found(contender, function, mistake, monkeypatch):
    right, again = (contenders.measure(contender, config(), LORA, steps=1, new_tokens=1) for _ in range(2))
    monkeypatch.setattr(contenders, function, partial(mistake, getattr(contenders, function)))
    wrong = contenders.measure(contender, config(), LORA, steps=1, new_tokens=1)
    assert speed.disagreements(speed.summarize({"a": [right], "b": [again]}, limit=None)) == []
    found = speed.disagreements(speed.summarize({"a": [right], "b": [wrong]}, limit=None))
    assert [problem.split(" of ")[0] for problem in found] == ["losses", "norms"]


def test_a_ratio_compares_turns_of_one_round():
    def turns(*seconds):
        return [{"dtype": "float32", "tokens": 60, "seconds": s, "peak_bytes": 1} for s in seconds]

    # The machine was ten times slower in the second round, for both.
    rows = speed.summarize({"a": turns([1, 2, 3], [20]), "b": turns([1], [10])}, limit=None)
    assert rows[0]["tokens_per_second"] == {"median": 25, "min": 3, "max": 60}
    assert rows[1]["ratio"] == {"median": 2, "min": 2, "max": 2}


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--contenders=ours,llm.c"], "there is no contender 'llm.c'; there are nanogpt, "),
        (["--rank=0"], "rank=0 must be a whole number above 0"),
        (["--rounds=0"], "--rounds 0, --steps 3 and --new_tokens 200: all must be at least 1"),
        (["--n_head=3"], "n_embd=320 must be a multiple of n_head=3"),
        (["--batch_size=many"], "batch_size='many' must be a whole number"),
    ],
)
def test_an_option_that_cannot_be_is_one_sentence(options, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speed.py", *options])
    assert speed.main() == 1
    assert sentence in capsys.readouterr().err


def test_what_cannot_run_on_a_device_is_left_out_there(monkeypatch, capsys):
    there = [
        name for name, contender in contenders.CONTENDERS.items() if contenders.runs(contender, torch.device("cuda"))
    ]
    assert there == [name for name in contenders.CONTENDERS if name != "ours-generate-int8"]
    monkeypatch.setattr(torch.backends.quantized, "engine", "qnnpack")  # as on ARM
    monkeypatch.setattr(sys, "argv", ["speed.py", "--contenders=ours-generate-int8"])
    assert speed.main() == 1
    assert f"no contender 'ours-generate-int8'; there are {', '.join(there)}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "missing, gone",
    [(["transformers"], "transformers|peft"), (["transformers", "peft"], "transformers|peft"), (["peft"], "peft")],
)
def test_without_a_package_it_says_what_to_install_or_leave_out(missing, gone, monkeypatch, capsys):
    rest = ",".join(name for name in contenders.CONTENDERS if not re.match(gone, name))
    for package in missing:
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", ["speed.py"])
    assert speed.main() == 1
    message = capsys.readouterr().err
    assert message.startswith(f"speed.py: {' and '.join(missing)} must be installed: pip install -r ")
    assert message.endswith(f"--contenders {rest}\n")


def test_what_needs_no_missing_package_can_be_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert speed.chosen(contenders.CONTENDERS, "transformers-fp32,ours-lora") == ["transformers-fp32", "ours-lora"]


# ---- data_speed.py


@pytest.fixture
def corpus(tmp_path):
    """A tenth of a megabyte, and a tokenizer of 320 entries."""
    tokenizer = train_bpe(documents(), "bpe-tiny", vocab_size=320)
    return data_speed.write_corpus(tmp_path, documents(), 100_000, tokenizer)


@pytest.mark.slow
def test_every_contender_of_the_data_path_writes_the_same_tokens(corpus):
    turns = data_speed.take_turns(list(data_speed.CONTENDERS), corpus, rounds=1)
    data_speed.check_same(turns)
    assert all(turn["seconds"] > 0 for own in turns.values() for turn in own)
    lines = data_speed.table(data_speed.summarize(turns, corpus.bytes)).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| datasets", "| nanogpt", "| ours"]
    left = {path.name for path in corpus.folder.iterdir()}  # each turn has swept what it cached
    assert left == {"all.jsonl", "train.jsonl", "val.jsonl", "tokenizer.json"}


def test_our_turn_writes_what_the_corpus_holds(corpus):
    turn = data_speed.turn("ours", corpus)
    tokenizer, ids = Tokenizer.load(corpus.tokenizer), []
    texts = [json.loads(line)["text"] for line in (corpus.folder / "val.jsonl").read_text().splitlines()]
    for text in texts:
        ids += [*tokenizer.encode(text), tokenizer.eot]
    assert turn["sha256"]["val"] == hashlib.sha256(np.array(ids, dtype=np.uint16).tobytes()).hexdigest()
    data_speed.check_same({"ours": [turn, turn]})
    with pytest.raises(ValueError, match=r"do not write the same tokens, .*: ours: .*; theirs: "):
        data_speed.check_same({"ours": [turn], "theirs": [{**turn, "sha256": {"train": "a", "val": "b"}}]})


def test_the_text_is_varied_and_as_long_as_was_asked_for():
    texts = list(data_speed.varied(["the loss of a model is low", "", "x"], 10_000))
    assert 10_000 <= sum(map(len, texts)) < 10_100
    assert len({text for text in texts if "model" in text}) > 200 and len(texts) > 800
    assert texts == list(data_speed.varied(["the loss of a model is low", "", "x"], 10_000))
    with pytest.raises(ValueError, match="no text to repeat"):
        list(data_speed.varied(["", " "], 10))


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--contenders=ours,nanochat"], "there is no contender 'nanochat'; there are datasets, nanogpt, ours"),
        (["--megabytes=0"], "--rounds 5 and --megabytes 0: both must be above 0"),
        (["--files", "no/such/folder", "--contenders=ours"], "no/such/folder"),
    ],
)
def test_an_option_of_the_data_path_that_cannot_be_is_one_sentence(options, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data_speed.py", *options])
    assert data_speed.main() == 1
    assert sentence in capsys.readouterr().err


def test_without_datasets_the_data_path_can_be_measured_alone(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(sys, "argv", ["data_speed.py"])
    assert data_speed.main() == 1
    assert capsys.readouterr().err.endswith("or measure without: --contenders ours\n")
    assert data_speed.chosen(data_speed.CONTENDERS, "ours") == ["ours"]


# ---- curves.py


def written_log(folder, *evaluations):
    folder.mkdir()
    lines = [f"2026-01-01 00:{m:02}:00 iteration {i:,}: train loss 1.0000, val loss {v:.4f}" for m, i, v in evaluations]
    (folder / "training_log.txt").write_text("\n".join(["2025-12-31 23:59:00 200 parameters", *lines, ""]))
    return folder


def test_curves_say_when_a_run_was_where_another_ended(tmp_path, script):
    slow = written_log(tmp_path / "slow", (1, 0, 9), (11, 1000, 5), (21, 2000, 4))
    fast = written_log(tmp_path / "fast", (2, 0, 9), (5, 100, 4.5), (7, 200, 3.9))
    done = script("bench/curves.py", slow, fast, "--out", tmp_path / "curves.png")
    assert done.stdout.splitlines() == [
        "slow: 4.0000 after 20.0 minutes",
        "fast: 3.9000 after 5.0 minutes; there after 5.0, 0.25 of the time",
    ]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    done = script("bench/curves.py", fast, slow)
    assert done.stdout.splitlines()[1] == "slow: 4.0000 after 20.0 minutes; not there"
    done = script("bench/curves.py", written_log(tmp_path / "one", (1, 0, 9)))
    assert done.returncode == 1 and "no evaluation before the first step and another one after it" in done.stderr


# ---- mesh.py


DIVISIBLE = ("n_layer=2", "n_head=4", "n_embd=32", "block_size=32", "batch_size=2", "gradient_accumulation_steps=4")
QUICK = ("steps=1", "rounds=1")


@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        ("1,2", ("vocab_size=501", "dtype=float32")),
        pytest.param("4", ("preset=modern", "vocab_size=503", "dtype=bfloat16"), marks=pytest.mark.slow),
    ],
)
def test_what_is_counted_on_the_wires_is_what_the_formula_says(processes, settings, script, tmp_path):
    options = [f"--{setting}" for setting in (*DIVISIBLE, *QUICK, *settings, f"processes={processes}")]
    result = tmp_path / "result.json"
    done = script("bench/mesh.py", *options, f"--json={result}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(result.read_text())["meshes"]
    assert [row["mesh"] for row in rows] == [
        vars(one) for count in processes.split(",") for one in mesh.MESHES[int(count)]
    ]
    for row in rows:
        (turn,), several = row["turns"], row["contender"] != "one process"
        assert len(turn["peaks"]) == Mesh(**row["mesh"]).devices and max(turn["peaks"]) == row["peak_bytes"] > 50 << 20
        assert bool(row["formula"]) == bool(sum(turn["sent"].values())) == several
        for axis in {*row["formula"], *turn["sent"]}:  # the loss and the gradient's norm are two numbers more
            assert 0 <= turn["sent"].get(axis, 0) - row["formula"].get(axis, 0) <= 16, (row["contender"], axis)
        if several and turn["loopback"] is not None:  # which others use too
            assert turn["loopback"] > 0.99 * sum(turn["sent"].values())
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [row["contender"] for row in rows]
    assert list(tmp_path.iterdir()) == [result]


def test_the_formula_is_that_of_rings():
    """Worked out by hand for a model whose rows every axis divides, so that nothing is filled up."""
    loaded, _ = configurator.load([*DIVISIBLE, "vocab_size=512", "dtype=float32", "tie_word_embeddings=true"])
    model = loaded.model_config(512)
    C, N, L = 32, 2 * 32, 2
    block, outside = 12 * C * C + 2 * C, 512 * C + 32 * C + C
    whole, tokens = L * block + outside, 4 * N  # of all four micro-batches
    assert mesh.by_formula(loaded, model, Mesh()) == {}
    assert mesh.by_formula(loaded, model, Mesh(dp=4)) == {"dp": 2 * 3 / 4 * 4 * whole}
    gathered = 4 * (2 * L * block + outside)
    assert mesh.by_formula(loaded, model, Mesh(fsdp=2)) == {"fsdp": (2 * gathered + 4 * whole) / 2}
    sums = 4 * C * (4 * L + 2) + 3 * 4  # a block has two each way; embedding, head, and the loss's three numbers
    assert mesh.by_formula(loaded, model, Mesh(tp=2)) == {"tp": 2 * tokens * sums / 2}
    block, outside = 6 * C * C + 2 * C, 256 * C + 32 * C + C  # tp leaves norms and positions whole
    both = {"fsdp": (2 * 4 * (2 * L * block + outside) + 4 * (L * block + outside)) / 2, "tp": tokens * sums / 2}
    assert mesh.by_formula(loaded, model, Mesh(fsdp=2, tp=2)) == both


def test_a_collective_whose_bytes_are_not_known_is_not_passed_over():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(AssertionError, match="broadcast_, and its bytes are not counted"), mesh.Wires(Ranks()):
            dist.broadcast(torch.zeros(3), 0)
    finally:
        dist.destroy_process_group()


def test_a_mesh_larger_than_this_machine_is_planned_without_a_process(monkeypatch, capsys):
    options = ["--preset=large", "--gradient_accumulation_steps=16", "--plan=[[8, 2], ['fsdp', 'tp']]"]
    monkeypatch.setattr(sys, "argv", ["mesh.py", *options])
    assert mesh.main() == 0
    said = capsys.readouterr().out
    assert "354,551,808 parameters, 16 processes as fsdp 8 x tp 2, bfloat16\n" in said
    assert "a step: 65,536 tokens, 2 x 4 x 1024 a process\n" in said and "a step: fsdp 1,7" in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--processes=2,3"], "--processes 3: there are meshes for 1, 2, 4"),
        (["--steps=0"], "--rounds 3 and --steps 0: both must be at least 1"),
        (["--preset=small"], "tp=2 does not divide n_head=5"),
        (["--gradient_accumulation_steps=2"], "must be a multiple of the 4 processes"),
        (["--plan=[[2],['pp']]"], "axis 'pp' is none of dp, fsdp, tp"),
    ],
)
def test_an_option_of_the_meshes_that_cannot_be_is_one_message(options, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mesh.py", *options])
    assert mesh.main() == 1
    assert sentence in capsys.readouterr().err
