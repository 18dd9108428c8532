"""Every model directory is a Hugging Face directory: Transformers and PEFT open it with no flags, no network and no
warning, and compute what we do."""

import contextlib
import json
import logging
import os
import re
import socket
import stat
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import QUICK, ROOT, TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM, PeftModel
from test_families import CASES, theirs
from test_foreign_tokenizer import gemma as gemma_tokenizer
from test_foreign_tokenizer import llama3 as llama3_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import families
import family_tables
import files
import hugging_face
import lora
import merge_lora
from checkpoint import CheckpointManager
from configurator import FIELDS, RunConfig
from model import GPT, GPTConfig
from tensor_files import write_tensors
from tokenizer import EOT, Tokenizer, train_bpe

LLAMA = {"block": "llama", "activation": "silu", "bias": False}
MODELS = {
    "gpt2": {},
    "gpt2 without biases": {"bias": False},
    "gpt2 untied": {"tie_word_embeddings": False},
    "gpt2 untied without biases": {"bias": False, "tie_word_embeddings": False},
    "llama": {**LLAMA},
    "llama untied with shared keys": {**LLAMA, "tie_word_embeddings": False, "n_kv_head": 1, "n_inner": 40},
    "phi": {**LLAMA, "rotary_share": 0.5},  # Phi 3's own padding token lies outside this vocabulary
    "modern": {**LLAMA, "tie_word_embeddings": False, "n_kv_head": 1, "n_inner": 40, "qk_norm": True},
}
WRITTEN = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def tokenizer(dataset) -> Tokenizer:
    return Tokenizer.load(dataset / "tokenizer.json")


@pytest.fixture
def quiet(monkeypatch):
    """`with quiet():` no warning, nothing in Transformers' log, nobody called over the network."""

    @contextlib.contextmanager
    def quiet(*ignored: str):
        said, called, log = [], [], logging.getLogger("transformers")
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: said.append(record.getMessage())

        def refuse(*arguments):
            called.append(arguments)
            raise OSError("no network in this test")

        with monkeypatch.context() as patch, warnings.catch_warnings():
            patch.setattr(socket, "getaddrinfo", refuse)
            patch.setattr(socket.socket, "connect", refuse)
            warnings.simplefilter("error")
            # Not ours: PEFT 0.21 asks Transformers 5.23 by a name that is about to go.
            for message in (".*is_gradient_checkpointing", *ignored):
                warnings.filterwarnings("ignore", message)
            log.addHandler(handler)
            try:
                yield
            finally:
                log.removeHandler(handler)
        assert said == [] and called == []

    return quiet


def gpt(tokenizer: Tokenizer, seed=0, extra=0, dtype=torch.float32, **changes) -> GPT:
    """Weights large enough for every part to count."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(32, tokenizer.vocab_size + extra, n_layer=2, n_head=2, n_embd=16, dropout=0.1, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval().to(dtype)


def save(directory: Path, model: GPT, tokenizer: Tokenizer | None, run=None, **options) -> Path:
    metadata = {"config": {"seed": 3} if run is None else run, "iter_num": 7, "best_val_loss": 2.5}
    texts = {"tokenizer.json": tokenizer.to_json().encode()} if tokenizer else {}
    CheckpointManager.save_checkpoint(model, directory, metadata | options.pop("about", {}), texts=texts, **options)
    return directory


def ids(model: GPT, *shape: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(theirs, ours: GPT) -> float:
    x = ids(ours, 3, 32)
    expected = ours(x, x)[0].float()
    assert expected.std() > 0.5  # else this would compare noise
    return (theirs(x).logits.float() - expected).abs().max().item()


def rewritten(directory: Path, name: str, content: bytes) -> None:
    """Put another content where the marker says that it belongs."""
    marker = files.read_marker(directory)
    metadata = {key: value for key, value in marker.items() if key != "files"}
    files.commit(directory, {name: lambda file: file.write(content)}, metadata)


# ---- the model


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_opens_the_directory_and_computes_the_same(tmp_path, tokenizer, quiet, kind):
    model = gpt(tokenizer, **MODELS[kind])
    directory = save(tmp_path / "gpt-1K-x-pretrain", model, tokenizer)
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(directory)
        assert difference(theirs, model) < 1e-4
    assert theirs.dtype == torch.float32 and not theirs.training
    assert theirs.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert CheckpointManager.verify(directory) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gpt2 without biases", "modern"])
def test_half_precision_weights_are_opened_as_such(tmp_path, tokenizer, quiet, kind, dtype):
    model = gpt(tokenizer, dtype=dtype, **MODELS[kind])
    directory = save(tmp_path / "m", model, tokenizer, run={"dtype": "float32"})
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(directory)
    assert theirs.dtype == dtype and all(p.dtype == dtype for p in theirs.parameters())
    assert difference(theirs.float(), model.float()) < 1e-4


@pytest.mark.parametrize("kind", ["gpt2 untied", "modern"])
def test_generate_goes_on_as_we_do_and_stops_at_the_end_of_text(tmp_path, tokenizer, quiet, kind):
    model = gpt(tokenizer, **MODELS[kind])
    x = ids(model, 4, 5)
    free = model.generate(x, 12, temperature=0)
    with torch.no_grad():  # let the end of text be what comes third in the first row
        third, end = free[0, 7].item(), tokenizer.eot
        model.lm_head.weight[[third, end]] = model.lm_head.weight[[end, third]]
    expected = model.generate(x, 12, temperature=0, stop_tokens=[end])
    assert (expected[0] == end).any() and not torch.equal(expected[:, : free.size(1)], free[:, : expected.size(1)])
    directory = save(tmp_path / "m", model, tokenizer)
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(directory)
        assert torch.equal(theirs.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=12), expected)
        alone = theirs.generate(x[:1], max_new_tokens=12)[0]
        assert alone[-1] == end and end not in alone[5:-1]
        begun = theirs.generate(max_new_tokens=1)[0]
        assert begun[0] == end  # documents begin after one, in training and in sample.py


def test_rows_of_a_padded_vocabulary_are_never_drawn(tmp_path, tokenizer, quiet):
    model = gpt(tokenizer, extra=13, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.vocab_size :] *= 10
    x = ids(model, 2, 5) % tokenizer.vocab_size
    assert (model.generate(x, 9, temperature=0) >= tokenizer.vocab_size).any()
    expected = model.generate(x, 9, temperature=0, stop_tokens=[tokenizer.eot], vocab_size=tokenizer.vocab_size)
    directory = save(tmp_path / "m", model, tokenizer)
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(directory)
        found = theirs.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=9)
        assert torch.equal(found, expected) and difference(theirs, model) < 1e-4


def test_every_row_without_a_token_is_suppressed():
    """50,304 rows, as nanoGPT pads."""
    tokenizer = train_bpe(["the model shows the loss"] * 9, "bpe-other", vocab_size=280)
    content = json.loads(tokenizer.to_json())
    padded = hugging_face.generation_config(GPTConfig(vocab_size=50304), content)
    assert padded["suppress_tokens"] == list(range(tokenizer.vocab_size, 50304))
    exact = hugging_face.generation_config(GPTConfig(vocab_size=tokenizer.vocab_size), content)
    assert "suppress_tokens" not in exact


@pytest.mark.parametrize("kind", ["gpt2", "llama", "modern"])
def test_a_model_without_a_tokenizer_has_no_special_tokens(tmp_path, tokenizer, quiet, kind):
    model = gpt(tokenizer, **MODELS[kind])
    directory = save(tmp_path / "m", model, None)
    assert {path.name for path in directory.iterdir()}.isdisjoint(WRITTEN - {"config.json", "model.safetensors"})
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(directory)
        assert theirs.generate(ids(model, 1, 3), max_new_tokens=4).shape == (1, 7)
    assert [theirs.config.bos_token_id, theirs.config.eos_token_id, theirs.config.pad_token_id] == [None] * 3


def test_a_model_that_no_family_is_says_so_and_stays_ours(tmp_path, tokenizer):
    model = gpt(tokenizer, block="llama", bias=True, norm_plus_one=True, qk_norm=True)
    with pytest.raises(ValueError):
        families.hf_config(model.config)
    directory = save(tmp_path / "m", model, tokenizer, run={"seed": 3, "dtype": "bfloat16"})
    assert not (directory / "model.safetensors").exists() and not (directory / "tokenizer_config.json").exists()
    assert files.read_marker(directory)["hugging_face"].startswith("no: no family of Transformers")
    assert "model_type" not in json.loads((directory / "config.json").read_text())
    assert CheckpointManager.load_model(directory)[0].config == model.config
    assert CheckpointManager.verify(directory) == []


# ---- the tokenizer


@pytest.fixture(scope="module")
def opened(tokenizer, tmp_path_factory):
    return AutoTokenizer.from_pretrained(save(tmp_path_factory.mktemp("m"), gpt(tokenizer), tokenizer))


@given(text=st.text().filter(lambda text: EOT not in text))
@settings(max_examples=500, deadline=None)
def test_ids_are_the_same_on_arbitrary_unicode(tokenizer, opened, text):
    found = opened(text).input_ids
    assert found == tokenizer.encode(text)
    assert opened.decode(found) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n  \t x",
        "don't  they're",
        "the gradient .",
        "e\u0301\u200d日本語 \U0001f469\u200d\U0001f52c",
        "\x00\x7f\ufeff",
        "a , b .",
    ],
)
def test_ids_are_the_same_where_others_clean_up(tokenizer, opened, text):
    assert opened(text).input_ids == tokenizer.encode(text) and opened.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_those_of_gpt2(tmp_path, tokenizer, quiet):
    directory = save(tmp_path / "gpt-1K-x-pretrain", gpt(tokenizer, **MODELS["modern"]), tokenizer)
    with quiet():
        opened = AutoTokenizer.from_pretrained(directory)
    assert opened.eos_token == opened.bos_token == opened.unk_token == EOT and opened.pad_token is None
    assert opened.eos_token_id == opened.bos_token_id == tokenizer.eot and opened.all_special_ids == [tokenizer.eot]
    assert opened.clean_up_tokenization_spaces is False  # some versions drop the blank in "a ," when decoding
    assert len(opened) == tokenizer.vocab_size and opened.model_max_length == 32
    text = f"the loss{EOT}a model"
    assert opened(text).input_ids.count(tokenizer.eot) == 1
    assert opened.decode(opened(text).input_ids, skip_special_tokens=True) == "the lossa model"
    assert opened(text, split_special_tokens=True).input_ids == tokenizer.encode(text)  # ours: no text ends itself


# ---- one config.json for two readers


# What a run may be set to. Where the model has the same key, the value here is another one.
AWKWARD = asdict(RunConfig()) | {
    "dtype": "float16",
    "device": "cuda:7",
    "compile": "true",
    "dropout": 0.7,
    "bias": None,
    "vocab_size": 3,
    "n_layer": 9,
    "n_head": 5,
    "n_embd": None,
    "block_size": 2,
    "lora": True,
    "base": "elsewhere",
}


@pytest.mark.parametrize("kind", MODELS)
def test_no_setting_of_a_run_changes_what_transformers_computes(tmp_path, tokenizer, quiet, kind):
    model = gpt(tokenizer, **MODELS[kind])
    run = AWKWARD | {"tie_word_embeddings": not model.config.tie_word_embeddings}
    plain, full = save(tmp_path / "plain", model, tokenizer, run={}), save(tmp_path / "full", model, tokenizer, run)
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(full)
        assert theirs.dtype == torch.float32 and difference(theirs, model) < 1e-4
        described = [AutoConfig.from_pretrained(directory).to_dict() for directory in (plain, full)]
    for content in described:
        del content["_name_or_path"], content["run_keys"]
    added = described[1].keys() - described[0].keys()
    assert added <= {"compute_dtype", *run}
    assert {key: value for key, value in described[1].items() if key not in added} == described[0]


def test_settings_and_what_transformers_knows_share_only_names_of_the_architecture():
    shared = {"vocab_size", "n_layer", "n_head", "n_embd", "tie_word_embeddings"}
    for kind in family_tables.FAMILIES:
        known = {name for name in dir(CONFIG_MAPPING[kind]()) if not name.startswith("_")}
        settings = {hugging_face.RENAMED.get(name, name) for name in FIELDS}
        assert settings & known <= shared, kind
        assert families.RUN_KEYS not in known


def test_the_settings_are_read_back_as_they_were(tokenizer):
    run = asdict(RunConfig(dtype="bfloat16", n_layer=2, n_head=2, n_embd=16, seed=5))
    config = gpt(tokenizer).config
    written, _ = hugging_face.configurations(config, torch.float32, run)
    content = json.loads(json.dumps(written["config.json"]))
    assert content["dtype"] == "float32" and content["compute_dtype"] == "bfloat16"
    shared = {key: getattr(config, key) for key in ("vocab_size", "bias", "tie_word_embeddings")}  # unset in the run
    assert hugging_face.run_config(content) == run | shared
    assert hugging_face.run_config(run) == run  # config.json before it was Hugging Face's too


def test_our_own_reader_of_other_peoples_directories_reads_ours(tmp_path, tokenizer):
    model = gpt(tokenizer, **MODELS["modern"])
    directory = save(tmp_path / "m", model, tokenizer, run=asdict(RunConfig()))
    content = json.loads((directory / "config.json").read_text())
    loaded = families.load_pretrained(directory, ignore=(*content["run_keys"], "run_keys"))
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


# ---- the files


def test_the_marker_lists_every_file(tmp_path, tokenizer):
    directory = save(tmp_path / "m", gpt(tokenizer), tokenizer, training_state={})
    assert files.read_marker(directory)["files"].keys() >= WRITTEN


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_modes_follow_the_umask(tmp_path, tokenizer, umask, mode):
    before = os.umask(umask)
    try:
        directory = save(tmp_path / "m", gpt(tokenizer), tokenizer)
    finally:
        os.umask(before)
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in directory.iterdir()} == {
        path.name: oct(mode) for path in directory.iterdir()
    }


def test_the_weights_are_those_of_the_best_step_and_one_model_is_the_same_bytes(tmp_path, tokenizer):
    directory = save(tmp_path / "a", gpt(tokenizer), tokenizer)
    best = (directory / "model.safetensors").read_bytes()
    with safetensors.safe_open(directory / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # Transformers before version 5 refuses another
    save(directory, gpt(tokenizer, seed=1), tokenizer, best=False, training_state={})
    assert (directory / "model.safetensors").read_bytes() == best
    assert (save(tmp_path / "b", gpt(tokenizer), tokenizer) / "model.safetensors").read_bytes() == best
    save(directory, gpt(tokenizer, seed=1), tokenizer)
    assert (directory / "model.safetensors").read_bytes() != best


def test_safetensors_reads_what_we_write_whatever_the_strides_and_types(tmp_path):
    a = torch.arange(24.0).view(4, 6)
    tensors = {
        "odd": torch.tensor([True, False, True]),
        "transposed": a.t(),
        "slice": a[1:3, ::2],
        "bf16": a.bfloat16()[0, :3],
        "half": a.half(),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "ids": torch.tensor([[1, 2**40]]),
    }
    with open(tmp_path / "x", "wb") as file:
        write_tensors(file, tensors, {"format": "pt"})
    found = safetensors.torch.load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with safetensors.safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    data = (tmp_path / "x").read_bytes()
    size = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name in tensors:  # whoever maps the file into memory can use it as it lies there
            assert (8 + size + entry["data_offsets"][0]) % tensors[name].itemsize == 0


def test_verify_compares_the_two_files_of_weights(tmp_path, tokenizer):
    directory = save(tmp_path / "m", gpt(tokenizer, bias=False), tokenizer)
    good = safetensors.torch.load_file(directory / "model.safetensors")
    assert CheckpointManager.verify(directory) == []
    name = "transformer.h.1.mlp.c_fc.weight"
    other = {**good, name: good[name].clone()}
    other[name][3, 5] += 1e-6
    fewer = {key: tensor for key, tensor in good.items() if key != name}
    zeros = "transformer.h.1.mlp.c_fc.bias"  # the same numbers in another type
    narrow = {**good, zeros: good[zeros].half()}
    for content, words in (
        (safetensors.torch.save(other), f"{name} has other values"),
        (safetensors.torch.save(fewer), f"{name} is missing"),
        (safetensors.torch.save({**good, "new": torch.ones(1)}), "new is unexpected"),
        (safetensors.torch.save(narrow), f"{zeros} has other values"),
        (b"nothing", "it is no safetensors file"),
    ):
        rewritten(directory, "model.safetensors", content)
        problems = CheckpointManager.verify(directory)
        assert len(problems) == 1 and problems[0].startswith(f"{directory / 'model.safetensors'} holds another model")
        assert words in problems[0]


def test_what_another_models_tokenizer_says_beyond_its_ids_is_said_again(tmp_path, quiet):
    original = tmp_path / "original"
    path = gemma_tokenizer(original)
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    config = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "chat_template": template,
        "padding_side": "left",  # as `generate` wants it of several texts
    }
    (original / "tokenizer_config.json").write_text(json.dumps(config))
    (original / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "top_k": 64}))
    theirs, tokenizer = AutoTokenizer.from_pretrained(original, local_files_only=True), Tokenizer.load(path)
    model = GPT(GPTConfig(32, tokenizer.vocab_size, 1, 2, 8, block="llama", activation="silu", bias=False))
    directory = save(tmp_path / "m", model, tokenizer)
    with quiet():
        ours, opened = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    chat = [{"role": "user", "content": "Größe?"}, {"role": "model", "content": "x² 🙂"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(ours, name) == getattr(theirs, name) is not None
    assert ours("a b c").input_ids == theirs("a b c").input_ids == tokenizer.encode("a b c")
    assert ours.padding_side == theirs.padding_side == "left"
    for described in (opened.generation_config, opened.config):
        ids = described.bos_token_id, described.eos_token_id, described.pad_token_id
        assert ids == (theirs.bos_token_id, [2, 7], theirs.pad_token_id)
    again = Tokenizer.load(directory / "tokenizer.json")
    assert again.stops == tokenizer.stops == (2, 7) and again.fingerprint == tokenizer.fingerprint
    assert save(tmp_path / "again", model, again) and again.to_json() == tokenizer.to_json()


@pytest.mark.parametrize("template", ["in a file of its own", "among the settings"])
def test_what_another_models_tokenizer_says_is_said_again_of_one_in_gpt2s_layout(template, tmp_path, quiet):
    """As DialoGPT's: a chat's template, and padding, in files beside a tokenizer.json that could be ours."""
    original, chat = tmp_path / "original", [{"role": "user", "content": "the model"}]
    original.mkdir()
    train_bpe(["the model shows the loss"] * 9, "bpe-other", vocab_size=280).save(original / "tokenizer.json")
    text = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    pad = {"__type": "AddedToken", "content": EOT}
    said = {"eos_token": EOT, "pad_token": pad, "padding_side": "left", "chat_template": text}
    if template == "in a file of its own":
        (original / "chat_template.jinja").write_text(said.pop("chat_template"))
    (original / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = Tokenizer.load(original)
    assert tokenizer.fingerprint == train_bpe(["the model shows the loss"] * 9, "x", vocab_size=280).fingerprint
    model = GPT(GPTConfig(32, tokenizer.vocab_size, 1, 2, 8))
    directory = save(tmp_path / "m", model, tokenizer)
    again = save(tmp_path / "again", model, Tokenizer.load(directory))
    with quiet():
        theirs = AutoTokenizer.from_pretrained(original)
        for ours in map(AutoTokenizer.from_pretrained, (directory, again)):
            assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
            assert ours.pad_token == theirs.pad_token == EOT and ours.padding_side == theirs.padding_side == "left"
            assert ours("the model").input_ids == tokenizer.encode("the model")
    assert (again / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()


def test_a_deployed_model_opens_too(tmp_path, tokenizer, quiet, script):
    model = gpt(tokenizer)
    directory = save(tmp_path / "m", model, tokenizer, training_state={})
    done = script("checkpoint.py", "deploy", directory, tmp_path / "production")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "production").iterdir()} >= WRITTEN
    with quiet():
        assert difference(AutoModelForCausalLM.from_pretrained(tmp_path / "production"), model) < 1e-4
        assert AutoTokenizer.from_pretrained(tmp_path / "production")("the").input_ids == tokenizer.encode("the")
    assert CheckpointManager.verify(tmp_path / "production") == []


def test_a_directory_from_before_opens_here_as_ever(tmp_path, tokenizer):
    model = gpt(tokenizer)
    directory = save(tmp_path / "m", model, tokenizer)
    marker = json.loads((directory / "export_meta.json").read_text())
    for name in ("model.safetensors", "generation_config.json", "tokenizer_config.json"):
        (directory / name).unlink()
        del marker["files"][name]
    (directory / "export_meta.json").write_text(json.dumps(marker))
    rewritten(directory, "config.json", b'{"dtype": "bfloat16"}')
    assert CheckpointManager.verify(directory) == []
    loaded, metadata = CheckpointManager.load_model(directory)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight) and metadata["config"] == {"seed": 3}


# ---- adapters, and what is merged


def adapted(tmp_path: Path, model: GPT, tokenizer: Tokenizer, targets, run=None) -> tuple[Path, Path, GPT]:
    """(base directory, LoRA directory, the model with an adapter that has learned something)."""
    base = save(tmp_path / "gpt-1K-x-pretrain", model, tokenizer)
    ours, _ = CheckpointManager.load_model(base)
    lora.apply_lora(ours, lora.LoRAConfig(4, 8, targets=targets), untie=True)
    with torch.no_grad():
        for tensor in lora.lora_state_dict(ours).values():
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)) * 0.2)
    directory = tmp_path / "gpt-1K-x-to-y-lora"
    reference = {"base": CheckpointManager.base_reference(base, directory)}
    save(directory, ours, tokenizer, run, about=reference, training_state={})
    return base, directory, ours.eval()


TIED = "Model has `tie_word_embeddings=True`"  # PEFT's advice on merging, where a tied head or embedding is adapted
MIXED = "fan_in_fan_out is set to True"  # one flag for all layers, and GPT-2's head is another kind than its blocks


@pytest.mark.parametrize(
    ("kind", "targets", "ignored"),
    [
        ("gpt2", "all-linear", ()),
        ("gpt2 untied without biases", "all-linear", ()),
        ("gpt2", ["lm_head"], (TIED,)),
        ("gpt2 untied", ["lm_head", "wte"], ()),
        ("gpt2", ["c_attn", "wte"], (TIED,)),
        ("gpt2", ["c_attn", "lm_head"], (TIED, MIXED)),
        ("gpt2 untied", ["c_fc", "wpe", "lm_head"], (MIXED,)),
        ("llama", "all-linear", ()),
        ("llama", ["embed_tokens"], (TIED,)),
        ("modern", ["q_proj", "lm_head"], ()),
    ],
)
def test_peft_opens_the_adapter_on_the_base(tmp_path, tokenizer, quiet, kind, targets, ignored):
    base, directory, ours = adapted(tmp_path, gpt(tokenizer, **MODELS[kind]), tokenizer, targets)
    with quiet(*ignored):
        theirs = AutoModelForCausalLM.from_pretrained(base)
        assert difference(theirs, ours) > 0.1
        assert difference(PeftModel.from_pretrained(theirs, directory / "adapters"), ours) < 1e-4
        assert difference(AutoPeftModelForCausalLM.from_pretrained(directory / "adapters"), ours) < 1e-4


def test_an_adapters_base_is_a_folder_for_peft_also_where_a_file_was_named(tmp_path, tokenizer, quiet):
    base, directory, ours = adapted(tmp_path, gpt(tokenizer), tokenizer, "all-linear")
    reference = {"base": CheckpointManager.base_reference(base / "ckpt.pt", directory)}
    save(directory, ours, tokenizer, about=reference)
    with quiet():
        assert difference(AutoPeftModelForCausalLM.from_pretrained(directory / "adapters"), ours) < 1e-4


def test_a_lora_directory_holds_no_model_and_says_so(tmp_path, tokenizer, quiet):
    run = asdict(RunConfig(dtype="bfloat16", n_layer=2, n_head=2, n_embd=16))
    _, directory, _ = adapted(tmp_path, gpt(tokenizer), tokenizer, "all-linear", run)
    with quiet(), pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(directory)
    with quiet():
        assert AutoTokenizer.from_pretrained(directory)("the loss").input_ids == tokenizer.encode("the loss")
    assert not (directory / "model.safetensors").exists() and CheckpointManager.verify(directory) == []
    read = CheckpointManager.load_model(directory)[1]["config"]
    assert read.keys() == run.keys() and read["dtype"] == "bfloat16" and read["seed"] == run["seed"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("kind", "targets"), [("gpt2", ["c_attn", "lm_head"]), ("modern", "all-linear")])
def test_a_merged_model_opens_in_its_dtype(tmp_path, tokenizer, dataset, quiet, kind, targets, dtype):
    run = asdict(RunConfig(dataset=str(dataset), dtype="float32", tie_word_embeddings=kind == "gpt2"))
    _, directory, _ = adapted(tmp_path, gpt(tokenizer, **MODELS[kind]), tokenizer, targets, run)
    merge_lora.merge(directory, tmp_path / "merged", dtype=dtype)
    ours = CheckpointManager.load_model_for_inference(tmp_path / "merged")
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        opened = AutoTokenizer.from_pretrained(tmp_path / "merged")
        theirs.generate(**opened("the", return_tensors="pt"), max_new_tokens=3)
    assert theirs.dtype == getattr(torch, dtype) and not theirs.config.tie_word_embeddings
    assert difference(theirs.float(), ours.float()) < 1e-4
    assert CheckpointManager.verify(tmp_path / "merged") == []


# ---- a real run


def test_what_train_writes_opens(tmp_path, dataset, tokenizer, quiet, script):
    out = tmp_path / "gpt-x"
    sizes = ("n_layer=1", "n_head=2", "n_embd=16", "block_size=32", "sample_tokens=0", "eval_iters=1", "bias=false")
    done = script("train.py", f"dataset={dataset}", f"out_dir={out}", "max_iters=3", "dtype=bfloat16", *sizes)
    assert done.returncode == 0, done.stderr
    content = json.loads((out / "config.json").read_text())
    assert content["dtype"] == "float32" and content["compute_dtype"] == "bfloat16" and content["max_iters"] == 3
    with quiet():
        theirs, opened = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        prompt = opened("the gradient", return_tensors="pt")
        ours = CheckpointManager.load_model_for_inference(out)
        expected = ours.generate(prompt.input_ids, 8, temperature=0, stop_tokens=[tokenizer.eot])
        assert torch.equal(theirs.generate(**prompt, max_new_tokens=8), expected)
    assert CheckpointManager.verify(out) == []


@pytest.mark.parametrize("case", ["qwen3", "phi3", "gpt2 untied"])
def test_a_model_from_elsewhere_is_adapted_by_the_standard_configuration_and_merged(
    case, tmp_path, dataset, quiet, script, monkeypatch
):
    folder, out = tmp_path / "models-of-others" / "Some-0.1M", tmp_path / "models"
    size = Tokenizer.load(llama3_tokenizer(folder)).vocab_size
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    monkeypatch.setitem(CASES, case, (CASES[case][0], CASES[case][1] | {"vocab_size": size}))
    theirs(case).save_pretrained(folder)
    settings = (f"--init_from={folder}", f"dataset={dataset}", *QUICK[len(TINY) :], "max_iters=30", "eval_interval=10")
    done = script("train.py", ROOT / "config/finetune_lora.py", *settings, "block_size=32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = out.iterdir()
    assert run.name.endswith("-base-to-tiny-lora")
    model, _ = CheckpointManager.load_model(run)
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
    x = ids(model, 2, 20)
    with quiet(".*fan_in_fan_out.*"), torch.no_grad():
        expected = model.eval()(x, x)[0]
        assert (base(x).logits - expected).abs().max() > 0.01
        adapted = PeftModel.from_pretrained(base, run / "adapters")
        assert (adapted(x).logits - expected).abs().max() < 1e-4
    done = script("merge_lora.py", run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (merged,) = set(out.iterdir()) - {run}
    with quiet(), torch.no_grad():
        again, opened = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
        assert again.config.model_type == base.config.model_type
        assert (again(x).logits - expected).abs().max() < 1e-4
        assert opened("the loss").input_ids == AutoTokenizer.from_pretrained(folder)("the loss").input_ids
    described = (folder / "config.json").read_text()
    (folder / "config.json").write_text(re.sub(r'(_eps(ilon)?": )1e-0\d', r"\g<1>0.1", described))
    with pytest.raises(ValueError, match=r"described by other numbers.*norm_eps=0\.1"):
        CheckpointManager.load_model(run)


def test_a_gemma_is_trained_by_its_name_with_gemmas_own_names_for_layers(tmp_path, dataset, script, monkeypatch):
    """What the document of the presets says, `model=gemma3_270m`, with a tiny model in the real one's place."""
    size = Tokenizer.load(gemma_tokenizer(tmp_path / "gemma")).vocab_size
    monkeypatch.setitem(CASES, "gemma3", (CASES["gemma3"][0], CASES["gemma3"][1] | {"vocab_size": size}))
    theirs("gemma3").save_pretrained(tmp_path / "gemma")
    settings = (f"dataset={dataset}", *QUICK[len(TINY) :], "max_iters=2", "block_size=32", f"out_dir={tmp_path / 'x'}")
    environment = {**os.environ, "NANOFORGE_GEMMA3_270M_PATH": str(tmp_path / "gemma")}
    done = script("train.py", "model=gemma3_270m", "model.lora.r=4", *settings, env=environment)
    assert done.returncode == 0, done.stderr
    assert "LoRA rank 4 on 21 layers" in done.stdout
    model, _ = CheckpointManager.load_model(tmp_path / "x")
    assert {part.alpha for part in lora.adapters_of(model, None).values()} == {32}
