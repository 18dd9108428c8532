"""compare.py: its numbers against independent ones, its texts against sample.py's, and refusals of one sentence."""

import json
import math
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import documents

import compare
from checkpoint import CheckpointManager
from data.tokens import load_dataset, write_dataset
from model import GPT, GPTConfig
from tokenizer import Tokenizer, train_bpe


def save(directory: Path, dataset: Path, tokenizer: Tokenizer, seed: int, block_size: int, scale=3.0) -> Path:
    """A model that knows nothing, but is sure of it: with larger weights than usual no two tokens have one loss."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size, tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16, dropout=0.1))
    with torch.no_grad():
        model.transformer.wte.weight *= scale
    metadata = {"config": {"dataset": str(dataset)}, "iter_num": 0, "best_val_loss": 1.0}
    metadata["tokenizer"] = {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint}
    CheckpointManager.save_checkpoint(
        model, directory, metadata, texts={"tokenizer.json": tokenizer.to_json().encode()}
    )
    return directory


@pytest.fixture(scope="module")
def models(dataset, tmp_path_factory) -> dict[str, Path]:
    """a and b read the same tokens, in contexts of 32 and 16; other reads those of another tokenizer."""
    folder, own = tmp_path_factory.mktemp("compared"), Tokenizer.load(dataset / "tokenizer.json")
    other = train_bpe(["the model shows the loss"] * 9, "bpe-other", vocab_size=280)
    return {
        "a": save(folder / "a", dataset, own, seed=1, block_size=32),
        "b": save(folder / "b", dataset, own, seed=2, block_size=16),
        "other": save(folder / "other", dataset, other, seed=3, block_size=16),
    }


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run(A, B, "--seed", 3)` is (exit code, stdout, stderr, the numbers), in a folder of its own."""

    def run(*arguments):
        given = ("--json", "numbers.json", *arguments)
        monkeypatch.chdir(tmp_path)
        code = compare.main(compare.parse(list(map(str, given))))
        out, err = capsys.readouterr()
        return code, out, err, json.loads(Path("numbers.json").read_text()) if code == 0 else None

    return run


def float64_losses(directory: Path, ids: list[int], block_size: int) -> np.ndarray:
    """Nats of ids[1:], one block after another, one token after another."""
    model, losses = CheckpointManager.load_model_for_inference(directory).double(), []
    for start in range(0, len(ids) - 1, block_size):
        block = ids[start : min(start + block_size, len(ids) - 1)]
        for t in range(len(block)):
            logits, _ = model(torch.tensor([block[: t + 1]]))
            losses.append(-logits[0, -1].log_softmax(0)[ids[start + t + 1]].item())
    return np.array(losses)


def test_the_numbers_are_those_of_an_independent_computation(models, dataset, run):
    code, _, err, report = run(models["a"], models["b"], "--data", dataset, "--max_tokens", 107, "--max_new_tokens", 1)
    assert code == 0, err
    (result,) = report["data"]
    ids, tokenizer = load_dataset(dataset).val[:97].tolist(), Tokenizer.load(dataset / "tokenizer.json")
    text = tokenizer.decode(ids[1:]).replace("<|endoftext|>", "").encode()
    assert report["block_size"] == 16 and result["units"] == 6 and result["bytes"] == len(text)
    losses = {letter: float64_losses(models[letter.lower()], ids, 16) for letter in "AB"}
    for letter, expected in losses.items():
        found = result[letter]
        assert found["tokens"] == 96
        assert found["loss"] == pytest.approx(expected.mean(), abs=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(expected.mean()), rel=1e-6)
        assert found["bits_per_byte"] == pytest.approx(expected.sum() / math.log(2) / len(text), abs=1e-6)
    blocks = (losses["B"] - losses["A"]).reshape(6, 16).mean(axis=1)
    per_byte = 96 / len(text) / math.log(2)
    for name, nats in (("difference", blocks.mean()), ("standard_error", blocks.std(ddof=1) / math.sqrt(6))):
        assert result[name]["loss"] == pytest.approx(nats, abs=1e-6)
        assert result[name]["bits_per_byte"] == pytest.approx(nats * per_byte, abs=1e-6)


def test_models_with_two_tokenizers_read_the_same_documents(models, dataset, run):
    arguments = ("--data", dataset, "--max_tokens", 500, "--max_new_tokens", 1)
    code, out, err, report = run(models["a"], models["other"], *arguments)
    assert code == 0, err
    (result,) = report["data"]
    held_out = load_dataset(dataset)
    texts = Tokenizer.load(held_out.tokenizer_path).decode(held_out.val.tolist()).split("<|endoftext|>")
    texts, following = texts[: result["units"]], texts[result["units"]]
    sizes = np.array([len(text.encode()) for text in texts])
    bits = {}
    for letter, name in (("A", "a"), ("B", "other")):
        tokenizer = Tokenizer.load(models[name] / "tokenizer.json")
        encoded = [[*tokenizer.encode(text), tokenizer.eot] for text in texts]
        ids = [tokenizer.eot, *(i for document in encoded for i in document)]
        losses = float64_losses(models[name], ids, 16)
        ends = np.cumsum([len(document) for document in encoded])
        bits[letter] = np.array([part.sum() for part in np.split(losses, ends[:-1])]) / math.log(2)
        assert result[letter]["tokens"] == len(losses) <= 500
        assert result[letter]["bits_per_byte"] == pytest.approx(bits[letter].sum() / sizes.sum(), abs=1e-5)
    assert result["B"]["tokens"] + len(tokenizer.encode(following)) + 1 > 500, "one more document would have fitted"
    change = bits["B"] - bits["A"]
    mean = change.sum() / sizes.sum()
    error = np.std(change - mean * sizes, ddof=1) / math.sqrt(len(sizes)) / sizes.mean()
    assert result["bytes"] == sizes.sum() and result["difference"]["loss"] is None
    assert result["difference"]["bits_per_byte"] == pytest.approx(mean, abs=1e-5)
    assert result["standard_error"]["bits_per_byte"] == pytest.approx(error, rel=1e-4)
    assert "compare bits per byte" in out


def test_a_model_differs_from_itself_by_nothing_at_all(models, dataset, run):
    code, out, err, report = run(models["a"], models["a"] / "ckpt.pt", "--data", dataset, "--max_tokens", 300)
    assert code == 0, err
    (result,) = report["data"]
    assert result["A"] == result["B"] and "no difference" in out
    assert set(result["difference"].values()) == set(result["standard_error"].values()) == {0.0}
    assert all(sample["A"] == sample["B"] for sample in report["samples"])


def test_the_data_are_those_the_models_were_trained_on_and_the_prompts_begin_held_out_documents(models, dataset, run):
    code, out, err, report = run(models["a"], models["b"], "--max_tokens", 0)
    assert code == 0, err
    (result,) = report["data"]  # one, though both name it
    val, tokenizer = load_dataset(dataset).val, Tokenizer.load(dataset / "tokenizer.json")
    assert result["dataset"] == "tiny" and result["A"]["tokens"] == (len(val) - 1) // 16 * 16
    words = tokenizer.decode(val.tolist()).split()[:12]
    assert [sample["prompt"] for sample in report["samples"]] == [" ".join(words)]
    assert f"prompt: {' '.join(words)}" in out and "bits per byte" in out and "picture: a-vs-b.png" in out


def test_continuations_are_those_of_sample(models, dataset, run, script, tmp_path):
    (tmp_path / "p.txt").write_text("a model is\n")
    options = ("--seed", 7, "--temperature", 3, "--max_new_tokens", 400)
    prompts = {"the loss": "the loss", f"FILE:{tmp_path / 'p.txt'}": "a model is"}
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    code, _, err, report = run(models["a"], models["b"], "--max_tokens", 20, *options, *given)
    assert code == 0, err
    assert [sample["prompt"] for sample in report["samples"]] == list(prompts.values())
    for letter, sample in zip("AB", report["samples"], strict=True):
        alone = script("sample.py", models[letter.lower()], "--prompt", sample["prompt"], *options)
        assert sample["prompt"] + sample[letter] + "\n" == alone.stdout
    assert report["samples"][0]["A"] != report["samples"][0]["B"]
    assert len(report["samples"][0]["A"]) < 400, "this seed was chosen because it meets end-of-text early"


def test_the_verdict_tells_a_difference_from_chance():
    def says(difference, error):
        numbers = {"difference": {"loss": difference}, "standard_error": {"loss": error}}
        return compare.verdict({"same_tokens": True, **numbers})

    assert says(-0.5, 0.1) == "B is better: the difference is 5.0 standard errors"
    assert says(0.5, 0.1).startswith("A is better")
    assert says(0.1, 0.1) == "may be chance: the difference is 1.0 standard errors"
    assert "cannot be told from one block" in says(0.1, None)


def test_the_picture_holds_bars_and_text_whatever_the_text(models, dataset, run, tmp_path, recwarn):
    odd = "costs $5 and $x_1$ or \\frac, \x1b[31m \u4e2d\u6587 \x00 " * 60
    given = ("--data", dataset, "--max_tokens", 40, "--prompt", "the loss", "--out", "deep/er/picture.png")
    code, out, err, report = run(models["a"], models["b"], *given)
    assert code == 0 and "picture: deep/er/picture.png" in out, err
    plain = matplotlib.image.imread(tmp_path / "deep" / "er" / "picture.png")
    report["samples"][0] |= {"A": odd, "B": ""}
    report["A"]["name"] = report["data"][0]["dataset"] = "$a_{$b$"
    (tmp_path / "odd.png").write_bytes(compare.as_picture(report))
    strange = matplotlib.image.imread(tmp_path / "odd.png")
    assert strange.shape[0] > plain.shape[0] and strange.shape[1] == plain.shape[1]
    for rgb in ((31, 119, 180), (255, 127, 14)):  # the bars of A and of B
        assert (np.abs(plain[:, :, :3] * 255 - rgb).max(axis=2) < 2).sum() > 10_000
    assert "\x1b" not in compare.as_text(report) and not [w for w in recwarn if "Glyph" in str(w.message)]
    assert not list(tmp_path.rglob("*nanoforge-new"))


def nanogpt_folder(dataset: Path, directory: Path) -> Path:
    directory.mkdir()
    for name in ("train.bin", "val.bin"):
        shutil.copy(dataset / name, directory / name)
    return directory


def test_a_nanogpt_folder_has_losses_and_no_bits_per_byte(models, dataset, run, tmp_path):
    folder = nanogpt_folder(dataset, tmp_path / "plain")
    code, out, err, report = run(models["a"], models["b"], "--data", folder, dataset, "--max_tokens", 96)
    assert code == 0, err
    plain, whole = report["data"]
    assert plain["A"]["loss"] == whole["A"]["loss"] and plain["A"]["bits_per_byte"] is None
    assert "unknown bytes" in out and out.count("picture: ") == 1
    code, _, err, _ = run(models["a"], models["other"], "--data", folder)
    assert code == 1 and "does not say whose tokens it holds" in err


def test_a_lora_directory_is_its_base_with_its_adapter(models, dataset, run, tmp_path):
    model, metadata = CheckpointManager.load_model(models["a"], apply_lora=True, lora_config={"r": 2})
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    about = {"config": metadata["config"], "iter_num": 0, "best_val_loss": 1.0, "best": {"iter_num": 0}}
    about["base"] = CheckpointManager.base_reference(models["a"], tmp_path / "adapted")
    tokenizer = (models["a"] / "tokenizer.json").read_bytes()
    CheckpointManager.save_checkpoint(model, tmp_path / "adapted", about, texts={"tokenizer.json": tokenizer})
    code, _, err, report = run(models["a"], tmp_path / "adapted", "--max_tokens", 320)
    assert code == 0, err
    (result,) = report["data"]
    ids = torch.from_numpy(load_dataset(dataset).val[:321].astype(np.int64))
    with torch.no_grad():
        _, loss = model.eval()(ids[:-1].view(10, 32), ids[1:].view(10, 32))
    assert result["B"]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert abs(result["difference"]["loss"]) > 1e-3
    assert report["A"]["parameters"] == report["B"]["parameters"]


def test_less_text_than_a_block_is_one_block(models, dataset, run):
    code, out, err, report = run(models["a"], models["b"], "--data", dataset, "--max_tokens", 5)
    assert code == 0, err
    assert report["data"][0]["A"]["tokens"] == 5 and report["data"][0]["standard_error"]["loss"] is None
    assert "cannot be told from one block" in out


def test_a_first_document_longer_than_the_budget_is_read_all_the_same(models, dataset, run):
    code, _, err, report = run(models["a"], models["other"], "--data", dataset, "--max_tokens", 5)
    assert code == 0, err
    assert report["data"][0]["units"] == 1 and report["data"][0]["A"]["tokens"] > 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data", "gone"), "there is no dataset gone"),
        (("--prompt", "FILE:/nowhere.txt"), "/nowhere.txt"),
        (("--temperature", -1), "at least 0"),
        (("--temperature", "nan"), "at least 0"),
        (("--max_new_tokens", 0), "--max_new_tokens at least 1"),
        (("--max_tokens", -1), "at least 0"),
        (("--device", "cuda:7"), "device=cuda:7 cannot be used here"),
        (("--out", "picture.jpg"), "must end in .png"),
        (("--json", "picture.png"), "is for a picture"),
        (("--out", "/"), "is a folder"),
        (("--tokenizer", "/nowhere.json"), "A and B have tokenizers of their own"),
        (("--seed", 10**20), "at most 64 bits"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_exit_code_1(models, run, arguments, words):
    code, out, err, _ = run(models["a"], models["b"], *arguments)
    assert code == 1 and words in err and err.startswith("compare.py: ") and err.count("\n") == 1 and not out


def test_models_and_data_that_cannot_be_compared_are_refused(models, dataset, run, tmp_path):
    code, _, err, _ = run(models["a"], tmp_path / "gone")
    assert code == 1 and "there is no model directory" in err
    copy = tmp_path / "copy"
    shutil.copytree(models["b"], copy)
    shutil.copy(models["other"] / "tokenizer.json", copy)
    code, _, err, _ = run(models["a"], copy)
    assert code == 1 and "bpe-other" in err and "bpe-tiny" in err
    big = nanogpt_folder(dataset, tmp_path / "big")
    np.array([1, 2, 60000], "<u2").tofile(big / "val.bin")
    code, _, err, _ = run(models["a"], models["b"], "--data", big)
    assert code == 1 and "has id 60,000" in err
    np.array([1], "<u2").tofile(big / "val.bin")
    code, _, err, _ = run(models["a"], models["b"], "--data", big)
    assert code == 1 and "has 1 tokens" in err
    own = Tokenizer.load(dataset / "tokenizer.json")
    broken = save(tmp_path / "broken", dataset, own, seed=1, block_size=16, scale=1e30)
    code, _, err, _ = run(models["a"], broken)
    assert code == 1 and "broken has a loss of " in err and " on tiny: its weights" in err
    assert not list(tmp_path.glob("*.png"))


def test_other_documents_under_the_same_name_are_noticed(models, dataset, tmp_path):
    tokenizers = [Tokenizer.load(models[name] / "tokenizer.json") for name in ("a", "other")]
    write_dataset(tmp_path / "x", documents(seed=9), tokenizers[1], name="x", source="tests", licence="none")
    pair = (load_dataset(dataset), load_dataset(tmp_path / "x"))
    with pytest.raises(ValueError, match="do not hold the same documents"):
        compare.same_documents("x", pair, tokenizers, 0)


def test_it_runs_as_a_script_and_teaches_itself(models, run, script, tmp_path, capsys):
    done = script("compare.py", models["a"], models["b"], "--max_tokens", 64, "--max_new_tokens", 5, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr and (tmp_path / "a-vs-b.png").exists()
    with pytest.raises(SystemExit):
        run("--help")
    assert "python compare.py A B --data" in capsys.readouterr().out
