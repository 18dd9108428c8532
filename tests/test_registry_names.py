"""The registry's names: every place a model may lie in, constructors, plugins, configuration, and the command line."""

import json
import shutil
import subprocess
import sys
import zipfile
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import ROOT, documents
from test_families import same, theirs
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

import registry
from checkpoint import CheckpointManager
from lora import LoRAConfig, adapters_of, apply_lora
from model import GPT, GPTConfig
from registry import ModelSpec, catalogue, find_model, get_model, get_tokenizer, names, resolve
from registry.__main__ import main, parse
from tokenizer import train_bpe

SHA = "e7da7f221d5bf496a48136c0cd264e630fe9fcc8"
# The document's configs/model/base.yaml.
BASE = {
    "name": "sshleifer/tiny-gpt2",
    "tokenizer_name": "sshleifer/tiny-gpt2",
    "dtype": "float32",
    "device": "cpu",
    "trust_remote_code": False,
    "load_config": {},
    "lora": {"enabled": False, "r": 8, "alpha": 16, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A folder of Hugging Face's with a tiny GPT-2."""
    folder = tmp_path_factory.mktemp("hf") / "gpt2"
    theirs("gpt2").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch) -> Path:
    """A machine without any model: its working folder, which has a repository, a home and a cache in it."""
    for owner, what in product(resolve.OWNERS, ("GPT2_PATH", "TINYLLAMA_PATH", "OFFLINE_MODELS_DIR")):
        monkeypatch.delenv(f"{owner}_{what}", raising=False)
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(resolve, "ROOT", tmp_path / "repository")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(model: Path, at: Path) -> Path:
    return Path(shutil.copytree(model, at))


def cache(model: Path, machine: Path, hub_id: str, sha: str = SHA) -> Path:
    """Put a model where Hugging Face's cache has it, with the branch main."""
    repository = machine / "cache" / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(sha)
    return put(model, repository / "snapshots" / sha)


# ---- finding


def _variable(name: str, folder: str = ""):
    """Fills a place that a variable names: the variable is set to a folder that has, or is, the model."""

    def fill(model, machine, monkeypatch):
        monkeypatch.setenv(name, str(machine / name))
        return put(model, machine / name / folder)

    return fill


def _folder(path: str):
    return lambda model, machine, monkeypatch: put(model, machine / path)


def _in_cache(hub_id: str):
    return lambda model, machine, monkeypatch: cache(model, machine, hub_id)


PLACES = {
    "$NANOFORGE_GPT2_PATH": _variable("NANOFORGE_GPT2_PATH"),
    "$CODEX_ML_GPT2_PATH": _variable("CODEX_ML_GPT2_PATH"),
    "$NANOFORGE_OFFLINE_MODELS_DIR/gpt2": _variable("NANOFORGE_OFFLINE_MODELS_DIR", "gpt2"),
    "$CODEX_ML_OFFLINE_MODELS_DIR/gpt2": _variable("CODEX_ML_OFFLINE_MODELS_DIR", "gpt2"),
    "artifacts/models/gpt2": _folder("repository/artifacts/models/gpt2"),
    "models/gpt2": _folder("models/gpt2"),
    "models/gpt2 of the repository": _folder("repository/models/gpt2"),
    "Hugging Face's cache (gpt2)": _in_cache("gpt2"),
    "Hugging Face's cache (openai-community/gpt2)": _in_cache("openai-community/gpt2"),
}


@pytest.mark.parametrize("first", PLACES)
def test_the_first_place_that_has_the_model_wins_and_the_trace_says_so(first, gpt2, machine, monkeypatch):
    fillers = list(PLACES)[list(PLACES).index(first) :]
    if first == "$NANOFORGE_GPT2_PATH":
        fillers.remove("$CODEX_ML_GPT2_PATH")  # the two must agree
    expected, *_ = [PLACES[place](gpt2, machine, monkeypatch) for place in fillers]
    found = find_model("gpt2-offline")
    assert found.path == expected
    assert found.place == first.removesuffix(" of the repository")
    used = [candidate.reason for candidate in found.trace].index("")
    assert all(
        c.reason in (resolve.NOT_SET, resolve.NOT_THERE) or "does not hold" in c.reason for c in found.trace[:used]
    )
    assert {c.reason for c in found.trace[used + 1 :]} == {resolve.NOT_NEEDED}
    assert len(found.trace) == 9  # both own variables are one place, and the hub is another
    assert found.revision == (SHA if "cache" in first else None)


@pytest.mark.parametrize("artifacts", [True, False])
@pytest.mark.parametrize("shared", ["unset", "empty", "good", "without", "missing"])
@pytest.mark.parametrize("own", ["unset", "empty", "good", "missing"])
def test_variables_set_empty_and_pointing_nowhere(own, shared, artifacts, gpt2, machine, monkeypatch):
    (machine / "without").mkdir()
    for state, variable, folder in ((own, "CODEX_ML_GPT2_PATH", ""), (shared, "CODEX_ML_OFFLINE_MODELS_DIR", "gpt2")):
        if state == "good":
            _variable(variable, folder)(gpt2, machine, monkeypatch)
        elif state != "unset":
            monkeypatch.setenv(variable, "" if state == "empty" else str(machine / state))
    if artifacts:
        put(gpt2, machine / "repository/artifacts/models/gpt2")
    if own == "good":
        expected = machine / "CODEX_ML_GPT2_PATH"
    elif own == "missing":
        expected = "CODEX_ML_GPT2_PATH"
    elif shared == "good":
        expected = machine / "CODEX_ML_OFFLINE_MODELS_DIR" / "gpt2"
    elif shared == "missing":
        expected = "CODEX_ML_OFFLINE_MODELS_DIR is set to"
    else:
        expected = machine / "repository/artifacts/models/gpt2" if artifacts else "Give its folder in place of the name"
    if isinstance(expected, Path):
        assert find_model("gpt2-offline").path == expected
    else:
        with pytest.raises(FileNotFoundError) as error:
            find_model("gpt2-offline")
        assert expected in str(error.value)
        assert error.value.binding == ("Give" not in expected)


def test_two_variables_of_one_model_must_agree(gpt2, machine, monkeypatch):
    monkeypatch.setenv("NANOFORGE_GPT2_PATH", str(gpt2))
    monkeypatch.setenv("CODEX_ML_GPT2_PATH", str(gpt2))
    assert find_model("gpt2-offline").path == gpt2
    monkeypatch.setenv("CODEX_ML_GPT2_PATH", str(put(gpt2, machine / "other")))
    with pytest.raises(FileNotFoundError, match=r"they differ: NANOFORGE_GPT2_PATH=.*, CODEX_ML_GPT2_PATH=.*other"):
        find_model("gpt2-offline")


@pytest.mark.parametrize(
    ("name", "variable"),
    [
        ("gpt2-offline", "NANOFORGE_GPT2_PATH"),
        ("tinyllama-offline", "NANOFORGE_TINYLLAMA_PATH"),
        ("gemma3-270m", "NANOFORGE_GEMMA3_270M_PATH"),
        ("sshleifer/tiny-gpt2", "NANOFORGE_SSHLEIFER_TINY_GPT2_PATH"),
    ],
)
def test_every_name_has_a_variable_by_one_rule(name, variable, gpt2, monkeypatch):
    with pytest.raises(FileNotFoundError, match=f"set {variable} to it"):
        find_model(name)
    monkeypatch.setenv(variable, str(gpt2))
    assert find_model(name.upper() if name in catalogue.RECIPES else name).path == gpt2


def test_every_recipe_is_looked_for_along_the_same_chain(gpt2, machine, monkeypatch):
    monkeypatch.setenv("NANOFORGE_OFFLINE_MODELS_DIR", str(machine / "all"))
    for name, spec in catalogue.RECIPES.items():
        folder = put(gpt2, machine / "all" / spec.folder)
        assert find_model(name).path == folder


def test_a_home_folder_is_expanded_once(gpt2, machine, monkeypatch):
    folder = put(gpt2, machine / "home" / "llms" / "gpt2")
    for given in ("~/llms/gpt2", Path("~/llms/gpt2")):
        assert find_model("gpt2-offline", local_path=given).path == folder
        assert find_model(given).path == folder
    monkeypatch.setenv("NANOFORGE_GPT2_PATH", "~/llms/gpt2")
    assert find_model("gpt2-offline").path == folder
    assert same(get_model("gpt2-offline"), get_model("~/llms/gpt2"))
    monkeypatch.setenv("NANOFORGE_GPT2_PATH", "~nobody-of-this-name/gpt2")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_model("gpt2-offline")


def test_a_path_that_is_given_is_the_only_place(gpt2, machine, monkeypatch):
    _variable("NANOFORGE_GPT2_PATH")(gpt2, machine, monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"nowhere.*no such folder") as error:
        find_model("gpt2-offline", local_path="nowhere")
    assert len(error.value.trace) == 1
    for path in ("./nowhere", "/no/where", "a/b/c", ".."):
        with pytest.raises(FileNotFoundError, match="this very place was asked for"):
            find_model(path)
    assert find_model("gpt2-offline", local_path="").place == "$NANOFORGE_GPT2_PATH"  # as an unset variable in a YAML
    assert find_model(gpt2 / "model.safetensors").path == gpt2
    with pytest.raises(ValueError, match="empty"):
        find_model("")


def test_a_folder_named_like_a_model_is_it_only_where_nothing_else_has_the_name(gpt2, machine):
    here = put(gpt2, machine / "my-model")
    assert find_model("my-model").path == Path("my-model") and here.is_dir()
    put(gpt2, machine / "xlmr")
    with pytest.raises(FileNotFoundError):
        find_model("xlmr")
    (machine / "bert-base-uncased").mkdir()
    with pytest.raises(FileNotFoundError, match=r"give it as \./bert-base-uncased"):
        find_model("bert-base-uncased")


def _without(*files):
    def spoil(folder):
        for file in files:
            (folder / file).unlink()

    return spoil


def _sharded(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')


SPOILT = {
    "the folder is empty": _without("config.json", "model.safetensors", "generation_config.json"),
    "it has no config.json": _without("config.json"),
    "it has none of model.safetensors": _without("model.safetensors"),
    "config.json is no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "names files that are not there: model-1.safetensors": _sharded,
    "model.safetensors is empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "is Git LFS's pointer": lambda folder: (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00"
    ),
    "is a file": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
}


@pytest.mark.parametrize("words", SPOILT)
def test_a_folder_counts_only_with_a_whole_model_in_it(words, gpt2, machine, monkeypatch):
    spoilt = put(gpt2, machine / "models" / "gpt2")
    SPOILT[words](spoilt)
    assert words in resolve.lacking(spoilt)
    good = cache(gpt2, machine, "gpt2")
    found = find_model("gpt2-offline")
    assert found.path == good
    assert next(c for c in found.trace if words in c.reason).path == spoilt
    monkeypatch.setenv("NANOFORGE_GPT2_PATH", str(spoilt))
    with pytest.raises(FileNotFoundError) as error:
        find_model("gpt2-offline")
    assert words in str(error.value)


def test_shards_and_pickled_weights_of_tensors_count_too(gpt2, machine):
    folder = put(gpt2, machine / "models" / "gpt2")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert find_model("gpt2-offline").path == folder
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-1.safetensors").rename(folder / "pytorch_model.bin")
    assert find_model("gpt2-offline").path == folder


def test_the_hub_comes_last_and_only_where_it_is_allowed(gpt2, machine, monkeypatch):
    from huggingface_hub import snapshot_download

    asked = []

    def download(hub_id, *, local_files_only, **options):
        if not local_files_only:
            asked.append(hub_id)
            if not (machine / "cache").exists():
                cache(gpt2, machine, hub_id)
        return snapshot_download(hub_id, local_files_only=True, **options)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FileNotFoundError, match=r"local_files_only is true\n.*allow the download"):
        find_model("gpt2-offline")
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "1")
            with pytest.raises(FileNotFoundError, match=f"{variable} is set"):
                find_model("gpt2-offline", local_files_only=False)
    assert asked == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    found = find_model("gpt2-offline", local_files_only=False)
    assert (found.place, found.revision, asked) == ("the hub (gpt2)", SHA, ["gpt2"])
    assert find_model("gpt2-offline", local_files_only=False).place == "Hugging Face's cache (gpt2)"
    assert asked == ["gpt2"]


def test_a_revision_is_the_hubs_and_no_folder_has_it(gpt2, machine, monkeypatch):
    _variable("NANOFORGE_OFFLINE_MODELS_DIR", "gpt2")(gpt2, machine, monkeypatch)
    here, older = cache(gpt2, machine, "gpt2"), cache(gpt2, machine, "gpt2", sha="0" * 40)
    assert find_model("gpt2-offline", revision=SHA).path == here
    found = find_model("gpt2-offline", revision="main")
    assert (found.path, found.revision) == (older, "0" * 40)
    with pytest.raises(FileNotFoundError, match="does not hold it at revision v9"):
        find_model("gpt2-offline", revision="v9")
    with pytest.raises(FileNotFoundError, match="a folder has no revisions, and revision=main"):
        find_model("gpt2-offline", revision="main", local_path=here)


# ---- building


def test_mini_lm_is_a_real_gpt_the_same_every_time_that_disturbs_no_random_numbers():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = get_model("MiniLM")
    assert torch.equal(torch.rand(3), expected)
    config = model.config
    assert isinstance(model, GPT) and not model.training
    sizes = (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd)
    assert sizes == (64, 128, 2, 4, 32) and model.num_params() == 31_616
    assert same(model, get_model("MiniLM"))
    assert get_model("MiniLM", load_config={"vocab_size": 99}).config.vocab_size == 99
    x = torch.randint(128, (4, 16))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(x[:, :-1], x[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"load_config": {"n_layre": 3}}, "load_config has n_layre"),
        ({"load_config": {"n_head": 5}}, "n_embd=32 must be a multiple of n_head=5"),
        ({"load_config": {"n_head": "4"}}, "n_head='4' must be int"),
        ({"local_path": "somewhere", "trust_remote_code": True}, "local_path means nothing to it; trust_remote_code"),
    ],
)
def test_what_mini_lm_cannot_heed_is_refused(settings, words):
    with pytest.raises(ValueError) as error:
        get_model("MiniLM", settings)
    assert words in str(error.value)


def test_a_spelling_is_one_model_wherever_it_is_used(gpt2, machine):
    minilm = cache(gpt2, machine, "sentence-transformers/all-MiniLM-L12-v2")
    assert find_model("minilm").path == minilm
    assert get_model("MiniLM").config.vocab_size == 128
    assert registry.get_spec("minilm").hf_id == "sentence-transformers/all-MiniLM-L12-v2"
    with pytest.raises(LookupError, match=r"no model spec is called 'MiniLM', did you mean minilm\?"):
        registry.get_spec("MiniLM")
    with pytest.raises(FileNotFoundError, match="MiniLM lies nowhere: get_model makes it"):
        find_model("MiniLM")
    with pytest.raises(ValueError, match="'MINILM' may be 'MiniLM' or 'minilm'"):
        get_model("MINILM")
    assert {"MiniLM", "minilm"} < set(registry.list_models())


def test_the_documents_configuration_builds_its_model(gpt2, machine):
    cache(gpt2, machine, BASE["name"])
    model = get_model(BASE["name"], BASE)
    assert same(model, AutoModelForCausalLM.from_pretrained(gpt2)) or isinstance(model, GPT)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # With q_proj and v_proj the original trained the whole GPT-2, silently: it has no such layers.
    with pytest.raises(ValueError, match=r"match no layer.*'q_proj'.*c_proj.*'v_proj'"):
        get_model(BASE["name"], BASE, **{"lora.enabled": True})
    adapted = get_model(BASE["name"], BASE, **{"lora.enabled": True, "lora.r": 4, "lora.target_modules": ["c_attn"]})
    adapters = adapters_of(adapted, None)
    assert len(adapters) == 3
    assert {(part.rank, part.alpha, part.dropout) for part in adapters.values()} == {(4, 16, 0.05)}
    assert {name.split(".")[-1] for name, p in adapted.named_parameters() if p.requires_grad} == {"A", "B"}


@pytest.mark.parametrize(
    "lora",
    [
        {"lora": {"enabled": True, "r": 3, "alpha": 5, "dropout": 0.25, "target_modules": ["c_attn"]}},
        {"lora": {"enabled": True, "lora_rank": 3, "lora_alpha": 5, "lora_dropout": 0.25, "targets": ["c_attn"]}},
        {"lora.enabled": True, "lora.rank": 3, "lora.alpha": 5, "lora.dropout": 0.25, "lora.targets": ["c_attn"]},
        {"lora": {"enabled": True, "r": 3, "alpha": 5}, "lora.dropout": 0.25, "lora.lora_module_path": ".*/c_attn"},
    ],
)
def test_every_lora_setting_arrives_in_every_spelling(lora):
    model = get_model("MiniLM", lora)
    adapters = adapters_of(model, None)
    assert len(adapters) == 2
    assert {(part.rank, part.alpha, part.dropout) for part in adapters.values()} == {(3, 5, 0.25)}
    x = torch.arange(8)[None]
    assert torch.equal(model(x)[0], get_model("MiniLM")(x)[0])


def test_adapters_need_no_peft_and_fit_any_module():
    with registry.temporary_models(
        {"plain": lambda config: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))}
    ):
        model = get_model("plain", lora={"enabled": True, "r": 2, "target_modules": ["0"]})
    assert list(adapters_of(model, None)) == ["0"]


def test_a_tied_layer_is_adapted_only_where_that_is_allowed():
    wanted = {"enabled": True, "target_modules": ["lm_head"]}
    with pytest.raises(ValueError, match="shares its weight"):
        get_model("MiniLM", lora=wanted)
    assert list(adapters_of(get_model("MiniLM", lora={**wanted, "untie": True}), None)) == ["lm_head"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"devise": "cpu"}, "there is no setting 'devise'; the nearest are device"),
        ({"lora": {"enabled": True, "rang": 3}}, "there is no setting 'lora.rang'; the nearest are lora.ra"),
        ({"lora_untie": True}, "there is no setting 'lora_untie'; the nearest are lora.untie"),
        ({"lora": True}, "lora=True must be a dictionary"),
        ({"load_config": [1]}, "load_config=[1] must be a dictionary"),
        ({"lora": {"r": 4}}, "lora.rank=4 means nothing without lora.enabled=true"),
        ({"lora": {"enabled": 1}}, "lora.enabled=1 must be true or false"),
        ({"lora": {"enabled": True, "r": 4, "rank": 5}}, "lora.r=4 and lora.rank=5 give one setting two values"),
        ({"lora": {"enabled": True, "r": 0}}, "rank=0 must be a whole number above 0"),
        ({"lora": {"enabled": False, "r": 0}}, "rank=0 must be a whole number above 0"),
        ({"dtype": "float17"}, "dtype=float17"),
        ({"dtype": "int8"}, "dtype=int8"),
        ({"device": "abacus"}, "device=abacus"),
        ({"trust_remote_code": "no"}, "trust_remote_code='no' must be true or false"),
        ({"local_files_only": 1}, "local_files_only=1 must be true or false"),
        ({"revision": 3}, "revision=3 must be text"),
        ({"devise": 1, "dtype": "x", "lora": {"rang": 1}}, "'devise'"),
    ],
)
def test_a_configuration_that_cannot_be_used_says_why(settings, words):
    with pytest.raises(ValueError, match="the configuration of model 'MiniLM' cannot be used") as error:
        get_model("MiniLM", settings)
    assert words in str(error.value)


def test_every_problem_of_a_configuration_is_told_at_once():
    with pytest.raises(ValueError, match=r"'devise'.*'lora\.rang'.*dtype=x") as error:
        get_model("MiniLM", {"devise": 1, "dtype": "x", "lora": {"rang": 1}})
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="is a dictionary, and this is 'bf16'"):
        get_model("MiniLM", "bf16")


def test_arguments_win_over_the_configuration_group_by_group():
    cfg = {"dtype": "float32", "lora": {"enabled": True, "r": 4, "target_modules": ["c_attn"]}}
    model = get_model("MiniLM", cfg, dtype="bf16", lora={"rank": 2})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {part.rank for part in adapters_of(model, None).values()} == {2}
    assert cfg == {"dtype": "float32", "lora": {"enabled": True, "r": 4, "target_modules": ["c_attn"]}}
    assert get_model("MiniLM", {"name": "other", "dtype": "bf16"}, dtype=None).lm_head.weight.dtype == torch.float32


def test_a_null_or_an_empty_path_is_a_setting_left_out():
    null = {"dtype": None, "device": None, "revision": None, "local_path": "", "lora": None, "load_config": None}
    assert names.ModelConfig.from_settings("x", null, {"tokenizer_name": ""}) == registry.ModelConfig("x")


def test_dtype_and_device_arrive_in_what_is_loaded_and_in_what_is_made(gpt2):
    for name, dtype in product((str(gpt2), "MiniLM"), ("bf16", "half", torch.float64, "auto")):
        model = get_model(name, dtype=dtype, device="cpu")
        wanted = {"bf16": torch.bfloat16, "half": torch.float16, "auto": torch.float32}.get(dtype, dtype)
        assert {(p.dtype, p.device.type) for p in model.parameters()} == {(wanted, "cpu")}


def test_bert_comes_from_the_cache_through_transformers(machine):
    config = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertForMaskedLM(config).save_pretrained(machine / "bert")
    with pytest.raises(FileNotFoundError, match=r"Hugging Face's cache \(google-bert/bert-base-uncased\)"):
        get_model("bert-base-uncased")
    cache(machine / "bert", machine, "bert-base-uncased")
    model = get_model("bert-base-uncased", lora={"enabled": True, "target_modules": ["query", "value"]})
    assert isinstance(model, BertForMaskedLM) and not model.training
    assert len(adapters_of(model, None)) == 4


def test_our_own_directories_are_models_by_name(machine):
    model = GPT(GPTConfig(16, 128, 1, 2, 16)).eval()
    about = {"iter_num": 3, "best_val_loss": 2.0, "config": {"dataset": "tiny"}}
    base = machine / "models" / "gpt-5K-tiny-pretrain"
    CheckpointManager.save_checkpoint(model, base, about)
    assert same(get_model("gpt-5K-tiny-pretrain"), model)
    assert same(get_model("models/gpt-5K-tiny-pretrain"), model)
    assert same(get_model("models/gpt-5K-tiny-pretrain/ckpt.pt"), model)
    apply_lora(model, LoRAConfig(rank=2))
    adapted = machine / "repository" / "models" / "gpt-5K-tiny-lora"
    reference = CheckpointManager.base_reference(base, adapted)
    CheckpointManager.save_checkpoint(model, adapted, {**about, "base": reference})
    assert find_model("gpt-5K-tiny-lora").path == adapted
    assert {"gpt-5K-tiny-pretrain", "gpt-5K-tiny-lora"} < set(registry.list_models())
    (base / "export_meta.json").unlink()
    with pytest.raises(FileNotFoundError, match="torn: files of a run"):
        get_model("gpt-5K-tiny-pretrain")
    listed = {one.name: one for one in registry.describe_models("tiny-")}
    assert (listed["gpt-5K-tiny-pretrain"].state, listed["gpt-5K-tiny-lora"].state) == ("broken", "ready")


def test_nanogpts_folder_is_a_model(machine):
    model = GPT(GPTConfig(16, 128, 1, 2, 16))
    (machine / "out").mkdir()
    args = {key: getattr(model.config, key) for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
    torch.save({"model": model.state_dict(), "model_args": args}, machine / "out" / "ckpt.pt")
    assert same(get_model("out"), model)


def test_a_tokenizer_is_the_models_own_or_the_one_that_tokenizer_name_says(gpt2, machine):
    tokenizer = train_bpe(documents(20), "bpe-tiny", vocab_size=300)
    for folder in (put(gpt2, machine / "models" / "own"), machine / "models" / "bare"):
        folder.mkdir(exist_ok=True)
        tokenizer.save(folder / "tokenizer.json")
    ids = tokenizer.encode("the loss is zero")
    for found in (
        get_tokenizer("own"),
        get_tokenizer("anything", local_path="models/own"),
        get_tokenizer("MiniLM", tokenizer_name="bare"),
        get_tokenizer("anything", local_path=gpt2, tokenizer_name="bare"),
        get_tokenizer(BASE["name"], BASE, tokenizer_name="models/bare"),
    ):
        assert found.encode("the loss is zero") == ids
    with pytest.raises(FileNotFoundError, match=r"bare.*none of model\.safetensors|it has no config\.json"):
        get_model("bare")
    with pytest.raises(LookupError, match=r"'MiniLM' \(built in\) has no tokenizer: say which, tokenizer_name"):
        get_tokenizer("MiniLM")
    with pytest.raises(FileNotFoundError, match=r"has none of tokenizer\.json"):
        get_tokenizer(str(gpt2))


def test_a_recipes_tokenizer_is_made_as_it_says(gpt2, machine, monkeypatch):
    with registry.catalogue.SPECS.restored():
        for_making, for_calling = {"padding_side": "left", "model_max_length": 9}, {"max_length": 7}
        registry.register_spec(ModelSpec("mine", "my-lab/mine", tokenizer_kwargs={**for_making, **for_calling}))
        train_bpe(documents(20), "bpe-tiny", vocab_size=300).save(put(gpt2, machine / "models/mine") / "tokenizer.json")
        tokenizer = get_tokenizer("mine")
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 9)
    assert "max_length" not in tokenizer.init_kwargs


def test_every_setting_of_a_search_and_of_a_loader_arrives(gpt2, machine, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for settings, words in (({"revision": "v9"}, "at revision v9"), ({"local_files_only": False}, "OFFLINE is set")):
        for get in (get_model, get_tokenizer):
            with pytest.raises(FileNotFoundError, match=words):
                get("gpt2-offline", settings)
    config = {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoModelForCausalLM": "code.OwnForCausalLM"}
    (put(gpt2, machine / "own") / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"trust_remote_code=true would run code\.py"):
        get_model("own", load_config={"attn_implementation": "eager"})
    with pytest.raises(ValueError, match="does not open"):  # there is no code.py
        get_model("own", trust_remote_code=True)
    with pytest.raises(ValueError, match="attn_implementation=3"):
        get_model("own", load_config={"attn_implementation": 3})


def test_an_unknown_name_gets_close_matches_and_how_to_add_one():
    with pytest.raises(LookupError, match=r"no model is called 'gtp2-offline', did you mean gpt2-offline") as error:
        get_model("gtp2-offline")
    assert isinstance(error.value, ValueError)
    for words in (
        "register_model(name, constructor) adds one",
        "There are bert-base-uncased, gemma3-12b",
        "models/gtp2",
    ):
        assert words in str(error.value)
    with pytest.raises(FileNotFoundError, match="owner/name was not found"):
        get_model("owner/name")
    with pytest.raises(FileNotFoundError, match=r"Did you mean xlmr\?"):
        find_model("xlmr2")
    for name in (None, "", Path("models/x")):
        with pytest.raises(ValueError, match="a model's name is text, and this is"):
            get_model(name)


# ---- constructors


def tiny(config: registry.ModelConfig) -> nn.Module:
    return nn.Linear(2, 2)


def test_a_constructor_is_registered_by_a_call_or_a_decorator_and_gets_the_configuration():
    seen = []
    with registry.temporary_models():
        registry.register_model("Call", tiny)

        @registry.register_model("Decorated")
        def decorated(config):
            seen.append(config)
            return nn.Linear(config.load_config["width"], 1)

        assert decorated.__name__ == "decorated"
        assert isinstance(get_model("call"), nn.Linear)
        assert get_model("DECORATED", load_config={"width": 7}, revision="v2").in_features == 7
        assert seen == [registry.ModelConfig("DECORATED", load_config={"width": 7}, revision="v2")]
        assert {"Call", "Decorated"} < set(registry.list_models())
    assert not {"Call", "Decorated"} & set(registry.list_models())


def test_a_taken_name_is_an_error_that_says_where_the_first_came_from():
    with registry.temporary_models():
        registry.register_model("Mine", tiny)
        line = sys._getframe().f_lineno - 1
        with pytest.raises(
            ValueError, match=rf"the model 'Mine' exists \(.*test_registry_names\.py:{line}\); override"
        ):
            registry.register_model("mine", tiny)
        for name in ("MiniLM", "XLMR", "gpt2-offline"):
            with pytest.raises(registry.ConflictError, match=r"exists \(built in\)"):
                registry.register_model(name, tiny)
        registry.register_model("mine", lambda config: nn.Identity(), override=True)
        assert isinstance(get_model("Mine"), nn.Identity)


def test_an_override_hides_what_is_built_in_until_it_is_unregistered():
    with registry.temporary_models():
        registry.register_model("MiniLM", tiny, override=True)
        assert isinstance(get_model("MiniLM"), nn.Linear)
        registry.unregister("MiniLM")
        assert isinstance(get_model("MiniLM"), GPT)
        with pytest.raises(ValueError, match="'MiniLM' cannot be taken out: it is not registered, built in"):
            registry.unregister("MiniLM")
        with pytest.raises(LookupError, match="no model is called 'nothing'"):
            registry.unregister("nothing")


def test_a_temporary_scope_restores_what_was_there_also_after_an_error():
    before = registry.list_models()
    with pytest.raises(RuntimeError), registry.temporary_models({"MiniLM": tiny, "new": tiny}):
        registry.register_model("more", tiny)
        assert isinstance(get_model("MiniLM"), nn.Linear)
        raise RuntimeError
    assert registry.list_models() == before
    assert isinstance(get_model("MiniLM"), GPT)


def test_what_makes_no_model_is_refused():
    for name, constructor, words in (("a", 3, "cannot be called"), ("", tiny, "no name"), (None, tiny, "no name")):
        with pytest.raises(ValueError, match=words):
            registry.register_model(name, constructor)
    with (
        registry.temporary_models({"number": lambda config: 3}),
        pytest.raises(ValueError, match=r"'number' \(.*test_registry_names\.py:\d+\) is 3, which is no torch"),
    ):
        get_model("number")


# ---- recipes


def test_the_documents_recipes_are_as_documented():
    assert registry.get_spec("llama3") == ModelSpec(
        name="llama3",
        hf_id="meta-llama/Meta-Llama-3-8B",
        arch="decoder_only",
        dtype="bf16",
        use_bitsandbytes=True,
        tokenizer_kwargs=None,
    )
    recipes = {
        "mbert": ("bert-base-multilingual-cased", "encoder_only", "fp16"),
        "xlmr": ("xlm-roberta-base", "encoder_only", "fp16"),
        "mt5": ("google/mt5-small", "seq2seq", "fp16"),
        "labse": ("sentence-transformers/LaBSE", "encoder_only", "fp16"),
        "minilm": ("sentence-transformers/all-MiniLM-L12-v2", "encoder_only", "fp16"),
    }
    for name, expected in recipes.items():
        spec = registry.get_spec(name)
        assert (spec.hf_id, spec.arch, spec.dtype) == expected and not spec.use_bitsandbytes
    available = registry.list_available_models()
    assert available == tuple(sorted(available)) and {*recipes, "llama3", "gemma3-27b", "gpt2-offline"} <= {*available}
    with pytest.raises(ValueError, match=r"no model spec is called 'xlrm', did you mean xlmr\? There are bert-base"):
        registry.get_spec("xlrm")


def test_a_recipe_of_ones_own_is_found_listed_replaced_and_taken_out(gpt2, machine):
    spec = registry.register_spec(ModelSpec("Mine", "my-lab/tiny-gpt2", dtype="fp32"))
    try:
        cache(gpt2, machine, "my-lab/tiny-gpt2")
        assert registry.get_spec("mine") is spec and "Mine" in registry.list_available_models()
        assert isinstance(get_model("MINE"), GPT)
        with pytest.raises(ValueError, match=r"the model spec 'Mine' exists \(.*test_registry_names\.py:\d+\)"):
            registry.register_spec(ModelSpec("mine", "other/one"))
        with pytest.raises(ValueError, match="MiniLM is the tiny model for tests"):
            registry.register_spec(ModelSpec("MiniLM", "other/one"), override=True)
        with pytest.raises(ValueError, match=r"'xlmr' exists \(built in\)"):
            registry.register_spec(ModelSpec("xlmr", "other/one"))
        registry.register_spec(ModelSpec("XLMR", "other/one"), override=True)
        assert registry.get_spec("xlmr").hf_id == "other/one"
    finally:
        registry.unregister_spec("mine")
        registry.unregister_spec("xlmr")
    assert registry.get_spec("xlmr").hf_id == "xlm-roberta-base"
    assert "Mine" not in registry.list_available_models()
    with pytest.raises(ValueError, match="it is not registered"):
        registry.unregister_spec("xlmr")


def test_an_impossible_recipe_is_refused_with_every_problem():
    assert all(ModelSpec("mine", "my-lab/mine", dtype=dtype).dtype is dtype for dtype in (None, "auto", "BF16"))
    with pytest.raises(ValueError, match=r"name='a/b'.*hf_id='\.\./x'.*arch='mamba'.*dtype='bogus' must be one of"):
        ModelSpec("a/b", "../x", "mamba", "bogus")


# ---- plugins


@pytest.fixture
def install(machine, monkeypatch):
    """`install("package", code, {entry: value})`: a package of one module, installed by pip and importable."""
    before = set(sys.modules)

    def run(package: str, code: str, entries: dict[str, str]) -> None:
        about = f"{package}-1.5.dist-info"
        files = {
            f"{package}.py": code,
            f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n",
            f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{about}/entry_points.txt": "[nanoforge.models]\n" + "\n".join(f"{k} = {v}" for k, v in entries.items()),
        }
        files[f"{about}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{about}/RECORD"])
        wheel = machine / f"{package}-1.5-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        target = machine / f"site-{package}"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-cache-dir"]
        subprocess.run([*pip, "--disable-pip-version-check", "--target", target, wheel], check=True)
        monkeypatch.syspath_prepend(target)

    yield run
    for module in set(sys.modules) - before:
        if module.startswith("plugin_"):
            del sys.modules[module]


PLUGIN = """
print("imported", __name__)
from torch import nn
def build(config):
    return nn.Linear(config.load_config.get("width", 3), 3)
not_callable = 5
"""


def test_a_plugin_is_a_model_and_is_imported_only_when_it_is_asked_for(install, capsys):
    install("plugin_good", PLUGIN, {"Good-Model": "plugin_good:build", "number": "plugin_good:not_callable"})
    install("plugin_bad", "import a_package_that_is_not_there", {"bad": "plugin_bad:build"})
    install("plugin_worse", "1 / 0", {"worse": "plugin_worse:build"})
    install("plugin_rude", "raise SystemExit(3)", {"rude": "plugin_rude:build"})
    install("plugin_shadow", PLUGIN, {"MiniLM": "plugin_shadow:build", "good-MODEL2": "plugin_shadow:build"})
    install("plugin_twin", PLUGIN, {"Good-model2": "plugin_twin:build"})
    assert {"Good-Model", "bad", "rude"} < set(registry.list_models())
    with pytest.raises(ValueError, match=r"the model 'bad' exists \(plugin plugin_bad:build of plugin_bad 1\.5\)"):
        registry.register_model("BAD", tiny)
    assert not [module for module in sys.modules if module.startswith("plugin_")]

    model = get_model("good-model", load_config={"width": 5}, dtype="bf16", lora={"enabled": True, "targets": ".*"})
    assert model.in_features == 5 and model.weight.dtype == torch.bfloat16 and len(adapters_of(model, None)) == 1
    assert [module for module in sys.modules if module.startswith("plugin_")] == ["plugin_good"]
    assert capsys.readouterr().out == ""

    bad = r"plugin_bad:build of plugin_bad 1\.5 cannot be imported: ModuleNotFoundError: No module named 'a_package"
    with pytest.raises(registry.PluginError, match=bad):
        get_model("bad")
    with pytest.raises(registry.PluginError, match="SystemExit: 3"):
        get_model("rude")
    with pytest.raises(registry.PluginError, match="ZeroDivisionError: division by zero"):
        get_model("worse")
    with pytest.raises(registry.PluginError, match="is 5, which makes no model"):
        get_model("number")
    with pytest.raises(registry.PluginError, match=r"offered twice.*plugin_\w+ 1\.5 and plugin plugin_"):
        get_model("good-model2")
    assert isinstance(get_model("MiniLM"), GPT)

    listed = {(one.name, one.kind): one for one in registry.describe_models()}
    states = {name: one.state for (name, kind), one in listed.items() if kind == "plugin"}
    twin = next(name for name in states if name.casefold() == "good-model2")
    assert states == {
        "Good-Model": "ready",
        "bad": "broken",
        "worse": "broken",
        "rude": "broken",
        "number": "broken",
        "MiniLM": "shadowed",
        twin: "broken",
    }
    assert "No module named 'a_package_that_is_not_there'" in listed["bad", "plugin"].detail
    assert listed["MiniLM", "plugin"].detail == "'MiniLM', built in, has the name"
    assert listed["MiniLM", "constructor"].state == "ready"
    with registry.temporary_models({"good-model": tiny}):
        listed = {(one.name, one.kind): one for one in registry.describe_models("good-model")}
        assert listed["Good-Model", "plugin"].state == "shadowed"
        assert get_model("Good-Model").in_features == 2


# ---- the command line and the import


def test_list_says_what_is_here_and_what_is_not(gpt2, machine, monkeypatch, capsys):
    monkeypatch.setenv("NANOFORGE_GPT2_PATH", str(gpt2))
    monkeypatch.setenv("NANOFORGE_TINYLLAMA_PATH", "/no/where")
    assert main(parse(["list"])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "kind", "state", "where"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert rows["gpt2-offline"] == ["decoder_only", "ready", str(gpt2)]
    assert rows["xlmr"] == ["encoder_only", "missing", "xlm-roberta-base"]
    assert rows["tinyllama-offline"][:3] == ["decoder_only", "broken", "$NANOFORGE_TINYLLAMA_PATH:"]
    assert main(parse(["list", "GEMMA", "--json"])) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in listed] == [f"gemma3-{size}" for size in ("12b", "1b", "270m", "27b", "4b")]
    assert set(listed[0]) == {"name", "kind", "state", "source", "detail"}


def test_where_prints_the_trace_and_fails_where_there_is_nothing(gpt2, machine, monkeypatch, capsys):
    assert main(parse(["where", "gpt2-offline"])) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "$CODEX_ML_OFFLINE_MODELS_DIR/gpt2" in captured.err
    assert main(parse(["where", "gpt2-offline", "--json"])) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["path"] is None and answer["error"].startswith("gpt2-offline was not found")
    assert [step["place"] for step in answer["trace"]][-1] == "the hub (gpt2)"
    folder = put(gpt2, machine / "models" / "gpt2")
    assert main(parse(["where", "gpt2-offline"])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(folder)
    assert next(line for line in lines if line.endswith("used")).startswith("models/gpt2")
    assert main(parse(["where", "gpt2-offline", "--json"])) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["path"] == str(folder)
    assert [step["reason"] for step in answer["trace"]].count("") == 1


def test_the_module_runs_and_its_help_has_examples_of_every_command():
    command = [sys.executable, "-m", "registry"]
    shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in ("list", "where", "show", "parts", "compare", "memory"):
        assert f"  python -m registry {name}" in shown
    failed = subprocess.run([*command, "where", "./no"], cwd=ROOT, capture_output=True, text=True)
    assert (failed.returncode, failed.stdout) == (1, "") and "no such folder" in failed.stderr


OPTIONAL = ("transformers", "peft", "bitsandbytes", "matplotlib", "huggingface_hub", "accelerate")
ALONE = f"""
import sys
if sys.argv[1] == "missing":
    sys.modules.update(dict.fromkeys({OPTIONAL}))  # as if these were not installed
import registry
print(sum(p.numel() for p in registry.get_model("MiniLM", lora={{"enabled": True}}).parameters()))
print(*registry.list_models())
imported = [name for name in {OPTIONAL} if sys.modules.get(name)]
assert not imported, imported
if sys.argv[1] == "missing":
    for find in (registry.find_model, registry.get_model):
        try:
            find("gpt2-offline")
        except FileNotFoundError as error:
            print(error)
"""


@pytest.mark.parametrize("how", ["missing", "installed"])
def test_importing_the_registry_needs_and_imports_no_optional_package(how, machine):
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALONE, how]
    result = subprocess.run(command, capture_output=True, text=True, cwd=machine, env=environment)
    assert result.returncode == 0, result.stderr
    assert "MiniLM" in result.stdout
    assert result.stdout.count("the package huggingface_hub is not installed") == (4 if how == "missing" else 0)


def test_every_public_name_is_there_when_asked_for():
    assert all(getattr(registry, name).__name__ == name for name in registry.__all__)
    assert set(registry.__all__) <= set(dir(registry))
    with pytest.raises(AttributeError, match="no attribute 'get_modle'"):
        _ = registry.get_modle


def test_reading_half_of_the_output_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m registry list | true", shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
