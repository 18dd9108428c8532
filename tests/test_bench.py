"""bench/train_speed.py runs, compares like with like, and notices when it does not. No test looks at a time."""

import json
import sys
from dataclasses import asdict, replace

import pytest
import torch

import configurator
from bench import train_speed
from model import GPT, GPTConfig

TINY = ("n_layer=2", "n_head=2", "n_embd=32", "block_size=32", "vocab_size=500", "batch_size=2")


def config():
    loaded, _ = configurator.load([*TINY, "device=cpu"])
    return replace(loaded, **asdict(loaded.model_config(500)))


@pytest.mark.slow
def test_the_script_measures_every_contender_and_finds_that_they_compute_the_same(script, tmp_path):
    result = tmp_path / "result.json"
    options = [f"--{setting}" for setting in TINY]
    done = script("bench/train_speed.py", *options, "--rounds=1", "--steps=1", f"--json={result}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 turns of 1 + 1 steps, about 0:" in done.stdout
    assert "agree, within rounding" in done.stdout
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    header, _, *rows = rows
    assert [row[0] for row in rows] == list(train_speed.CONTENDERS)
    assert all(len(row) == len(header) == 9 for row in rows)
    assert rows[0][4:6] == ["1.00", "1.00 - 1.00"]

    written = json.loads(result.read_text())
    assert written["machine"]["torch"] == torch.__version__ and written["machine"]["cpu"]
    assert written["config"]["n_embd"] == 32 and written["config"]["batch_size"] == 2
    dtypes = {row["contender"]: row["dtype"] for row in written["contenders"]}
    assert dtypes.pop("ours") in ("float32", "bfloat16")
    assert dtypes == {"transformers-fp32": "float32", "transformers-bf16": "bfloat16", "ours-fp32": "float32"}
    for row in written["contenders"]:
        assert [(len(turn["seconds"]), len(turn["losses"])) for turn in row["turns"]] == [(1, 2)]  # and the warm-up
        assert row["peak_bytes"] > 50 << 20  # an interpreter with torch is bigger than that
    assert list(tmp_path.iterdir()) == [result]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_transformers_twin_trains_the_same_number_of_parameters_to_the_same_logits(tied, bias):
    model = GPT(GPTConfig(16, 50, 2, 2, 8, bias=bias, tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)  # GPT's initial weights are too small to show much
    twin = train_speed.transformers_twin(model).eval()
    assert sum(p.numel() for p in twin.parameters() if p.requires_grad) == model.num_params()
    ids = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(twin(ids).logits, model(ids, ids)[0], rtol=1e-4, atol=1e-4)


def test_a_contender_that_computes_something_else_is_found(monkeypatch):
    make_twin = train_speed.transformers_twin

    def with_another_epsilon(model):
        twin = make_twin(model)
        twin.transformer.ln_f.eps = 1e-2
        return twin

    right, again = (train_speed.measure("transformers-fp32", config(), steps=1) for _ in range(2))
    monkeypatch.setattr(train_speed, "transformers_twin", with_another_epsilon)
    wrong = train_speed.measure("transformers-fp32", config(), steps=1)
    assert train_speed.disagreements(train_speed.summarize({"a": [right], "b": [again]}, tokens=1)) == []
    found = train_speed.disagreements(train_speed.summarize({"a": [right], "b": [wrong]}, tokens=1))
    assert [problem.split(" of ")[0] for problem in found] == ["losses", "norms"]


def test_a_ratio_compares_turns_of_one_round():
    def turns(*seconds):
        return [{"dtype": "float32", "seconds": s, "peak_bytes": 1} for s in seconds]

    # The machine was ten times slower in the second round, for both.
    rows = train_speed.summarize({"a": turns([1, 2, 3], [20]), "b": turns([1], [10])}, tokens=60)
    assert rows[0]["tokens_per_second"] == {"median": 25, "min": 3, "max": 60}
    assert rows[1]["ratio"] == {"median": 2, "min": 2, "max": 2}


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--contenders=ours,nanogpt"], "there is no contender 'nanogpt'; there are transformers-fp32, "),
        (["--rounds=0"], "--rounds 0 and --steps 3: both must be at least 1"),
        (["--n_head=3"], "n_embd=320 must be a multiple of n_head=3"),
        (["--batch_size=many"], "batch_size='many' must be a whole number"),
    ],
)
def test_an_option_that_cannot_be_is_one_sentence(options, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_speed.py", *options])
    assert train_speed.main() == 1
    assert sentence in capsys.readouterr().err


def test_without_transformers_it_says_what_to_install_or_leave_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(sys, "argv", ["train_speed.py"])
    assert train_speed.main() == 1
    message = capsys.readouterr().err
    assert "the package transformers is not installed" in message
    assert "--contenders ours-fp32,ours" in message
