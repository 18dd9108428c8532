"""adapters.py against the peft package, both ways, and against everything that must not pass in silence."""

import copy
import json
import os
import stat
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_families import gemma3_with_images
from test_families import theirs as random_model
from test_lora import VOCAB, gpt, gpt2, llama, logits, tokens, trained
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, Conv1D

from adapters import CONFIG, WEIGHTS, load_adapters, save_adapters
from checkpoint import CheckpointManager
from families import load_pretrained
from files import SaveError
from lora import (
    LoRAConfig,
    adapter_names,
    add_adapter,
    add_weighted_sum,
    apply_lora,
    lora_state_dict,
    merge_lora,
    remove_lora,
    set_active,
)
from model import GPT, GPTConfig
from registry import loading

SETTINGS = [
    {"rank": 4, "targets": ["c_attn", "c_proj"]},
    {"rank": 4, "alpha": 3, "targets": "all-linear", "use_rslora": True, "dropout": 0.1},
    {"rank": 4, "targets": "all-linear", "rank_pattern": {"c_proj": 2}, "alpha_pattern": {r"h\.1\..*": 5}},
    {"rank": 2, "targets": ["c_attn", "wte"]},
    {"rank": 2, "targets": ["c_fc", "lm_head"]},
]


def llama_settings(settings):
    names = {"c_attn": "q_proj", "c_proj": "down_proj", "c_fc": "v_proj", "wte": "embed_tokens"}
    names |= {r"h\.1\..*": r"layers\.1\..*"}
    targets = settings["targets"]
    renamed = {"targets": targets if isinstance(targets, str) else [names.get(name, name) for name in targets]}
    patterns = {
        key: {names[k]: v for k, v in settings.get(key, {}).items()} for key in ("rank_pattern", "alpha_pattern")
    }
    return {**settings, **renamed, **patterns}


CASES = [(gpt2, settings) for settings in SETTINGS] + [(llama, llama_settings(settings)) for settings in SETTINGS]


def untied(build):
    return build(tie_word_embeddings=False, **({"pad_token_id": 0} if build is llama else {}))


def twins():
    """A Transformers GPT-2 and our GPT with the same weights."""
    theirs = gpt2(activation_function="gelu", tie_word_embeddings=False)
    ours = GPT(GPTConfig(16, VOCAB, 2, 3, 24, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            module = theirs.get_submodule(name.rpartition(".")[0])
            weight = theirs.get_parameter(name)
            parameter.copy_(weight.t() if isinstance(module, Conv1D) and weight.dim() == 2 else weight)
    return theirs, ours


def opened_by_peft(model, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*fan_in_fan_out.*")  # GPT-2 has both kinds where the head is adapted
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")
        return PeftModel.from_pretrained(model, directory).eval()


def made_by_peft(model, settings, directory):
    """An adapter that PEFT has trained for some steps on `model`, saved by PEFT; its logits and merged logits."""
    names = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**{names.get(k, k): v for k, v in settings.items()}, task_type="CAUSAL_LM")
        theirs = get_peft_model(copy.deepcopy(model), config)
        optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5)
        for step in range(3):
            x = tokens(2, 8, seed=step)
            theirs(x, labels=x).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        theirs.save_pretrained(directory)
    return theirs.eval()


@pytest.mark.parametrize(("build", "settings"), CASES)
def test_what_we_save_peft_opens_to_the_same_logits(build, settings, tmp_path):
    base = untied(build)
    model = copy.deepcopy(base)
    apply_lora(model, LoRAConfig(**settings))
    trained(model)
    save_adapters(model, tmp_path / "new", base="the/base", task_type="CAUSAL_LM")
    x = tokens(3, 16)
    assert not torch.allclose(logits(model, x), logits(base, x), atol=1e-2)
    theirs = opened_by_peft(base, tmp_path / "new")
    torch.testing.assert_close(theirs(x).logits, logits(model.eval(), x), atol=1e-5, rtol=1e-5)
    assert theirs.peft_config["default"].base_model_name_or_path == "the/base"


@pytest.mark.parametrize(("build", "settings"), CASES)
def test_what_peft_trained_opens_here_to_the_same_logits_and_merges_to_the_same_weights(build, settings, tmp_path):
    model = untied(build)
    theirs = made_by_peft(model, settings, tmp_path)
    load_adapters(model, tmp_path)
    x = tokens(3, 16)
    torch.testing.assert_close(logits(model, x), theirs(x).logits, atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".lora." not in name)
    merge_lora(model)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(logits(model, x), merged(x).logits, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, merged.get_parameter(name), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_adapter_of_our_gpt_opens_on_transformers_gpt2_and_the_other_way_round(settings, tmp_path):
    theirs, ours = twins()
    x = tokens(3, 16)
    torch.testing.assert_close(logits(ours, x), logits(theirs, x), atol=1e-6, rtol=1e-6)
    apply_lora(ours, LoRAConfig(**settings))
    trained(ours)
    save_adapters(ours, tmp_path / "ours", fan_in_fan_out=True)
    expected = logits(ours.eval(), x)
    torch.testing.assert_close(
        opened_by_peft(copy.deepcopy(theirs), tmp_path / "ours")(x).logits, expected, atol=1e-5, rtol=1e-5
    )
    load_adapters(theirs, tmp_path / "ours")  # its fingerprint does not mind how the layers store their weights
    torch.testing.assert_close(logits(theirs, x), expected, atol=1e-5, rtol=1e-5)
    remove_lora(theirs)
    remove_lora(ours)
    peft = made_by_peft(theirs, settings, tmp_path / "peft")
    load_adapters(ours, tmp_path / "peft")
    torch.testing.assert_close(logits(ours, x), peft(x).logits, atol=1e-5, rtol=1e-5)


def phi3(folder):
    """A Transformers Phi 3, whose projections are fused, and our GPT with its weights, which has them one by one."""
    theirs = random_model("phi3")
    theirs.save_pretrained(folder)
    return theirs, load_pretrained(folder).eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 4, "targets": "all-linear"},
        {"rank": 3, "alpha": 5, "targets": ["q_proj", "v_proj", "up_proj", "embed_tokens"], "use_rslora": True},
        {"rank": 4, "targets": ["k_proj", "q_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"0\..*": 3}},
    ],
)
def test_an_adapter_of_projections_that_are_fused_elsewhere_is_one_for_the_fused_layer(settings, tmp_path):
    theirs, ours = phi3(tmp_path / "base")
    again, x = copy.deepcopy(ours), tokens(3, 16)
    apply_lora(ours, LoRAConfig(**settings))
    trained(ours)
    save_adapters(ours, tmp_path / "new")
    assert any(".qkv_proj." in name for name in load_file(tmp_path / "new" / WEIGHTS))
    expected = logits(ours.eval(), x)
    peft = opened_by_peft(copy.deepcopy(theirs), tmp_path / "new")
    torch.testing.assert_close(peft(x).logits, expected, atol=1e-5, rtol=1e-5)
    load_adapters(theirs, tmp_path / "new")  # the fingerprint is the same where the layers are fused
    torch.testing.assert_close(theirs(x).logits, expected, atol=1e-5, rtol=1e-5)
    load_adapters(again, tmp_path / "new")
    own, loaded = (lora_state_dict(model) for model in (ours, again))
    assert own.keys() == loaded.keys()
    for key in own:  # a pattern's scale may have gone into B
        torch.testing.assert_close(loaded[key], own[key], atol=0, rtol=0 if len(settings) < 4 else 1)
    torch.testing.assert_close(logits(again, x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ["qkv_proj", "o_proj"]])
def test_what_peft_trained_on_a_fused_layer_opens_here(targets, tmp_path):
    theirs, ours = phi3(tmp_path / "base")
    peft = made_by_peft(theirs, {"rank": 4, "alpha": 6, "targets": targets}, tmp_path / "peft")
    x = tokens(3, 16)
    assert not torch.allclose(peft(x).logits, theirs(x).logits, atol=1e-3)
    load_adapters(ours, tmp_path / "peft")
    torch.testing.assert_close(logits(ours, x), peft(x).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "k_proj", "v_proj", "o_proj"]])
@pytest.mark.parametrize("excluded", [r".*attn\.[kv]_proj", r"(?!.*(mlp|[qo]_proj)).*"])
def test_what_peft_left_out_by_an_expression_is_left_out_here(targets, excluded, tmp_path):
    model = untied(llama)
    settings = {"rank": 4, "alpha": 6, "targets": targets, "exclude_modules": excluded}
    peft = made_by_peft(model, settings, tmp_path)
    report = load_adapters(model, tmp_path)
    assert {path.split(".")[-1] for path in report.matched}.isdisjoint({"k_proj", "v_proj"})
    x = tokens(3, 16)
    torch.testing.assert_close(logits(model, x), peft(x).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["v_proj", "embed_tokens"]])
def test_an_adapter_of_a_text_model_opens_on_the_model_with_images_that_holds_it(targets, tmp_path):
    gemma3_with_images().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    ours, x = load_pretrained(tmp_path / "base").eval(), tokens(2, 12)
    apply_lora(ours, LoRAConfig(rank=2, targets=targets, rank_pattern={targets[0]: 3}), untie=True)
    save_adapters(trained(ours), tmp_path / "ours", base=str(tmp_path / "base"), task_type="CAUSAL_LM")
    with torch.no_grad():
        expected = ours(x, x)[0]
    theirs = PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=x).logits, expected, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        again = load_pretrained(tmp_path / "base").eval()
        load_adapters(again, folder, untie=True)
        with torch.no_grad():
            torch.testing.assert_close(again(x, x)[0], expected)


def test_what_peft_trained_inside_a_model_with_images_opens_on_its_text_model(tmp_path):
    base = gemma3_with_images()
    base.save_pretrained(tmp_path / "base")
    made = made_by_peft(base, {"rank": 2, "targets": r".*language_model.*\.(q_proj|v_proj)"}, tmp_path / "adapter")
    model, x = load_pretrained(tmp_path / "base").eval(), tokens(2, 12)
    assert len(load_adapters(model, tmp_path / "adapter").matched) == 6
    with torch.no_grad():
        torch.testing.assert_close(model(x, x)[0], made(input_ids=x).logits, atol=1e-5, rtol=1e-5)


def test_a_base_is_the_same_one_by_itself_and_inside_a_model_with_images(tmp_path):
    gemma3_with_images().save_pretrained(tmp_path / "base")
    ours, x = load_pretrained(tmp_path / "base").eval(), tokens(2, 12)
    inside = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    for model, other in ((ours, inside), (inside, ours)):
        apply_lora(model, LoRAConfig(rank=2, targets=r".*language_model.*[qv]_proj|model\.layers.*[qv]_proj"))
        save_adapters(trained(model), tmp_path / "adapter", base=str(tmp_path / "base"))
        load_adapters(other, tmp_path / "adapter")
        with torch.no_grad():
            torch.testing.assert_close(ours(x, x)[0], inside(input_ids=x).logits, atol=1e-5, rtol=1e-5)
        for adapted in (ours, inside):
            remove_lora(adapted)


def test_the_files_hold_what_peft_needs_and_are_readable_by_others(tmp_path):
    model = gpt2()
    apply_lora(model, LoRAConfig(rank=4, targets=["c_attn"]))
    old = os.umask(0o022)
    try:
        save_adapters(trained(model), tmp_path)
    finally:
        os.umask(old)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o644}
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["peft_type"] == "LORA" and config["fan_in_fan_out"] is True and config["inference_mode"] is True
    assert config["r"] == 4 and config["lora_alpha"] == 8
    assert config["target_modules"] == [f"transformer.h.{i}.attn.c_attn" for i in range(2)]
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors.keys() == {f"base_model.model.{key}" for key in lora_state_dict(model)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_give_the_same_bits(dtype, tmp_path):
    model = llama().to(dtype)
    base = copy.deepcopy(model)
    apply_lora(model, LoRAConfig(rank=4, alpha=5, dropout=0.2, targets=["q_proj", "o_proj"]))
    save_adapters(trained(model), tmp_path)
    load_adapters(base, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), base.state_dict().values(), strict=True))
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert repr(model) == repr(base)  # which shows rank, alpha and dropout of every layer


def test_one_of_several_adapters_is_saved_by_its_name_and_loads_beside_others(tmp_path):
    model = gpt()
    base = copy.deepcopy(model)
    apply_lora(model, LoRAConfig(rank=2, targets=["c_attn"]), adapter="one")
    add_adapter(model, "two", LoRAConfig(rank=3, targets=["c_fc"]))
    trained(model, "one", seed=1), trained(model, "two", seed=2)
    add_weighted_sum(model, "sum", {"one": 0.5, "two": -2.0})
    for name in ("one", "two", "sum"):
        save_adapters(model, tmp_path / name, name)
        load_adapters(base, tmp_path / name, name)
    assert sorted(adapter_names(base)) == ["one", "sum", "two"]
    x = tokens(2, 16)
    for name in ("one", "two", "sum"):
        set_active(model, name), set_active(base, name)
        torch.testing.assert_close(logits(base, x), logits(model, x), atol=0, rtol=0)


def test_an_adapter_on_another_base_is_refused_unless_forced(tmp_path):
    model, other = gpt(), gpt()
    apply_lora(model, LoRAConfig(rank=2))
    save_adapters(trained(model), tmp_path)
    with torch.no_grad():
        other.transformer.h[1].mlp.c_fc.weight[3, 4] += 0.01
    with pytest.raises(ValueError, match=r"layers it adapts had the fingerprint [0-9a-f]{12}.*force"):
        load_adapters(other, tmp_path)
    assert adapter_names(other) == [] and all(p.requires_grad for p in other.parameters())
    load_adapters(other, tmp_path, force=True)
    assert adapter_names(other) == ["default"]


def test_the_base_in_bfloat16_is_the_same_base(tmp_path):
    model, half = gpt(), gpt().bfloat16()
    apply_lora(model, LoRAConfig(rank=2))
    save_adapters(trained(model), tmp_path)
    load_adapters(half, tmp_path, dtype=torch.float32)
    assert half.transformer.h[0].attn.c_attn.lora["default"].A.dtype == torch.float32


def test_a_base_in_float16_is_told_apart_from_another_one_as_far_as_that_can_be(tmp_path):
    model, half = gpt(), gpt().half()
    for one, folder in ((model, "whole"), (half, "half")):
        apply_lora(one, LoRAConfig(rank=2))
        save_adapters(trained(one), tmp_path / folder)
    load_adapters(gpt(), tmp_path / "half")
    load_adapters(gpt().half(), tmp_path / "half")
    with pytest.raises(ValueError, match="other weights, or on these before they were rounded to float16"):
        load_adapters(gpt().half(), tmp_path / "whole")


def test_a_tied_head_has_to_be_allowed(tmp_path):
    model = gpt()
    apply_lora(model, LoRAConfig(rank=2, targets=["lm_head"]), untie=True)
    save_adapters(trained(model), tmp_path)
    with pytest.raises(ValueError, match=r"lm_head shares its weight with transformer\.wte"):
        load_adapters(gpt(), tmp_path)
    load_adapters(gpt(), tmp_path, untie=True)


def spoil_config(**changes):
    def spoil(directory):
        config = json.loads((directory / CONFIG).read_text()) | changes
        (directory / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))

    return spoil


def spoil_tensors(change):
    def spoil(directory):
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return spoil


KEY = "base_model.model.transformer.h.0.attn.c_attn.lora_{}.weight"
COPY = "base_model.model.transformer.h.0.attn.c_attn.base_layer.weight"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_config(peft_type="LOHA"), "describes no LoRA"),
        (spoil_config(use_dora=True), "asks for what this LoRA does not do: use_dora"),
        (spoil_config(modules_to_save=["wte"], bias="all"), "modules_to_save, bias='all'"),
        (spoil_config(a_future_setting=3), "a_future_setting"),
        (spoil_config(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (spoil_config(r="absent"), "does not say 'r'"),
        (spoil_config(r=-1), "rank=-1 must be a whole number above 0"),
        (spoil_config(lora_alpha="twice"), "alpha='twice' must be a number"),
        (spoil_config(rank_pattern=3), CONFIG),
        (spoil_config(r=5), "has rank 4 where adapter_config.json says 5"),
        (spoil_config(target_modules=["c_attn", "c_fc"]), "transformer.h.0.mlp.c_fc is targeted and has no tensors"),
        (spoil_tensors(lambda t: t.pop(KEY.format("B"))), "transformer.h.0.attn.c_attn has only its lora_A"),
        (
            spoil_tensors(lambda t: [t.pop(KEY.format(s)) for s in "AB"]),
            "transformer.h.0.attn.c_attn is targeted and has no tensors",
        ),
        (
            spoil_tensors(lambda t: t.update({k.removeprefix("base_model.model."): t.pop(k) for k in list(t)})),
            "transformer.h.0.attn.c_attn.lora_A.weight belongs to no layer",
        ),
        (
            spoil_tensors(lambda t: t.update({"base_model.model.score.weight": torch.ones(2)})),
            "score.weight belongs to no layer",
        ),
        (spoil_tensors(lambda t: t.update({KEY.format("A"): torch.ones(4, 23)})), r"which A \(4, 23\) and B \(72, 4\)"),
        (spoil_tensors(lambda t: t.update({COPY: torch.ones(72, 24)})), "base_layer.weight is not what this model has"),
        (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-9]), "is no safetensors file, or is cut"),
        (lambda d: (d / CONFIG).write_text("{"), "is no JSON"),
        (spoil_config(target_modules="("), "is no regular expression"),
        (spoil_config(target_modules=[3]), "must be names"),
        (spoil_config(target_modules=3), CONFIG),
        (spoil_config(exclude_modules=5), CONFIG),
        (spoil_tensors(lambda t: t.update({KEY.format("A"): torch.ones(4)})), "is no matrix of finite numbers"),
        (spoil_tensors(lambda t: t[KEY.format("A")].fill_(float("nan"))), "is no matrix of finite numbers"),
        (lambda d: (d / WEIGHTS).rename(d / "adapter_model.bin"), "save it anew with PEFT"),
        (lambda d: (d / CONFIG).write_text("[]"), "describes no LoRA"),
        (lambda d: (d / WEIGHTS).unlink(), "holds no adapter: adapter_model.safetensors not found"),
    ],
)
def test_nothing_passes_in_silence(spoil, words, tmp_path):
    model = gpt()
    apply_lora(model, LoRAConfig(rank=4, targets=["c_attn"]))
    save_adapters(trained(model), tmp_path)
    spoil(tmp_path)
    base = gpt()
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        load_adapters(base, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert adapter_names(base) == [] and all(p.requires_grad for p in base.parameters())


def test_what_trains_beside_the_adapter_is_not_lost_in_silence(tmp_path):
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2))
    apply_lora(model, LoRAConfig(rank=2, targets=["query", "value"]))
    model.classifier.requires_grad_(True)
    with pytest.raises(ValueError, match=r"classifier\.weight; classifier\.bias; freeze it.*merge_lora"):
        save_adapters(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    model.classifier.requires_grad_(False)
    save_adapters(model, tmp_path / "new")


def test_other_adapters_and_shared_weights_are_nothing_that_trains_beside_one(tmp_path):
    model = gpt(tie_word_embeddings=True)
    apply_lora(model, LoRAConfig(rank=2, targets=["lm_head"]), untie=True)
    add_adapter(model, "two", LoRAConfig(rank=2))
    for part in model.modules():  # as if both were to train together
        if hasattr(part, "lora"):
            part.lora.requires_grad_(True)
    for name in ("default", "two"):
        save_adapters(model, tmp_path / name, name)
    add_weighted_sum(model, "both", {"default": 1, "two": 1})
    save_adapters(model, tmp_path / "both", "both")
    model.transformer.wte.requires_grad_(True)
    with pytest.raises(ValueError, match=r"saved with one: transformer\.wte\.weight; freeze"):
        save_adapters(model, tmp_path / "never", "two")
    merge_lora(model, "two")
    apply_lora(model, LoRAConfig(rank=2))
    save_adapters(model, tmp_path / "anew")


def test_a_copy_of_the_head_that_peft_saves_along_is_no_problem_where_it_is_the_models(tmp_path):
    model = untied(gpt2)
    made_by_peft(model, {"rank": 2, "targets": ["lm_head"]}, tmp_path)
    assert any(key.endswith("base_layer.weight") for key in load_file(tmp_path / WEIGHTS))
    load_adapters(model, tmp_path)


@pytest.mark.parametrize("load", [load_pretrained, CheckpointManager.load_model, loading.load])
def test_a_model_beside_an_adapter_that_transformers_adds_to_it_is_not_loaded_without(load, tmp_path):
    base, folder, x = random_model("qwen3"), tmp_path / "qwen3", tokens(2, 12)
    base.save_pretrained(folder)
    expected = logits(made_by_peft(base, {"rank": 2, "targets": ["q_proj", "v_proj"]}, folder), x)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder), x), expected)
    with pytest.raises(ValueError, match=f"{folder} has an adapter beside its weights"):
        load(folder)
    (tmp_path / "adapter").mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(tmp_path / "adapter" / name)
    with pytest.raises(FileNotFoundError, match="adapter is an adapter and no model: load its base"):
        CheckpointManager.load_model(tmp_path / "adapter")
    model = load_pretrained(folder).eval()
    load_adapters(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model, x), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_for_some_layers_only_loads(tmp_path):
    model = gpt2()
    theirs = made_by_peft(model, {"rank": 2, "targets": ["c_attn"], "layers_to_transform": [1]}, tmp_path)
    report = load_adapters(model, tmp_path)
    assert report.matched == ("transformer.h.1.attn.c_attn",)
    x = tokens(2, 16)
    torch.testing.assert_close(logits(model, x), theirs(x).logits, atol=1e-5, rtol=1e-5)


def test_the_first_layer_alone_is_some_layers_too(tmp_path):
    model = gpt2()
    made_by_peft(model, {"rank": 2, "targets": ["c_attn"], "layers_to_transform": 0}, tmp_path)
    assert load_adapters(model, tmp_path).matched == ("transformer.h.0.attn.c_attn",)


class Nested(nn.Module):
    """Two layers of which one's path is the end of the other's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.inner = nn.Linear(4, 4), nn.Module()
        self.inner.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.inner.head(x))


@pytest.mark.parametrize("targets", [r"head", r"(inner\.)?head"])
def test_a_path_that_is_the_end_of_another_is_not_mistaken_for_it(targets, tmp_path):
    model, x = Nested(), torch.randn(3, 4)
    base = copy.deepcopy(model)
    patterns = {"rank_pattern": {"^head": 3}, "alpha_pattern": {"^head": 3, "inner.head": 5}}
    patterns = patterns if "inner" in targets else {}
    apply_lora(model, LoRAConfig(rank=2, targets=targets, **patterns))
    trained(model)
    save_adapters(model, tmp_path)
    theirs = opened_by_peft(copy.deepcopy(base), tmp_path)
    load_adapters(base, tmp_path)
    torch.testing.assert_close(base(x), model(x), atol=0, rtol=0)
    torch.testing.assert_close(theirs(x), model(x), atol=1e-6, rtol=1e-6)


class Bypassing(nn.Module):
    """Reads the weight of a layer that it never calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.unused = nn.Embedding(5, 4), nn.Embedding(5, 4)
        self.fc, self.out = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(F.linear(self.table(x), self.fc.weight).tanh())


def test_layers_that_learned_nothing_where_others_did_are_named(tmp_path):
    model = Bypassing()
    apply_lora(model, LoRAConfig(rank=2, targets="all"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapters(model, tmp_path)  # nothing has learned yet
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(torch.arange(3)).square().sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="2 of the 4 layers .* nothing at all: unused; fc; either") as caught:
        save_adapters(model, tmp_path)
    assert [warning.filename for warning in caught] == [__file__]
    assert set(load_adapters(Bypassing(), tmp_path).matched) == {"table", "unused", "fc", "out"}


def test_a_layer_may_be_called_with_its_input_by_name():
    model = nn.Linear(3, 2)
    wrapper = nn.Sequential(model)
    apply_lora(wrapper, LoRAConfig(rank=1))
    x = torch.ones(1, 3)
    assert torch.equal(wrapper[0](input=x), wrapper[0](x))


def test_any_module_will_do(tmp_path):
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    base = copy.deepcopy(model)
    apply_lora(model, LoRAConfig(rank=2))
    save_adapters(trained(model), tmp_path)
    load_adapters(base, tmp_path)
    x = torch.randn(4, 3)
    assert torch.equal(base(x), model(x))


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    model = gpt()
    apply_lora(model, LoRAConfig(rank=2))
    trained(model, size=float("inf"))
    with pytest.raises(ValueError, match="not finite, first in transformer"):
        save_adapters(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    model = gpt()
    apply_lora(model, LoRAConfig(rank=2))
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"cannot write .*file/adapter_model\.safetensors"):
        save_adapters(trained(model), tmp_path / "file")
