"""registry/parts.py and what it stands on, against tiny random models of Transformers' own, one per family, on disk."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT
from test_families import SIZES, randomise, theirs, tokens
from test_hf_directory import save
from test_lora import adapted, gpt
from torch import nn

from checkpoint import CheckpointManager
from model import GPT, GPTConfig
from registry import comparison, loading, parts, picture
from registry.__main__ import parse, runner_of
from registry.parts import (
    ModelDecomposer,
    ModelFamily,
    ModelRegistry,
    ModelSpec,
    PartSpec,
    PartType,
    decompose,
    describe_folder,
    register_decomposer,
    unregister_decomposer,
)
from registry.skeleton import skeleton
from registry.specs import VERSION

NO_HEAD_SIZE = {key: value for key, value in SIZES.items() if key != "head_dim"}
EXPERTS = SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
ENCODER = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
ENCODER |= {"intermediate_size": 40, "max_position_embeddings": 64}
T5 = {"vocab_size": 61, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3}
CAUSAL, MASKED, SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"
MODELS = {  # name: (configuration, its settings, how it is built), or a case of test_families
    "gpt2": "gpt2",
    "llama": "llama 3.1",
    "mistral": "mistral",
    "mixtral": ("Mixtral", SIZES | {"num_local_experts": 4, "rope_theta": 1e6, "sliding_window": None}, CAUSAL),
    "gemma": ("Gemma", SIZES, CAUSAL),
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "qwen2": "qwen2",
    "qwen2_moe": ("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 12}, CAUSAL),
    "qwen3": "qwen3",
    "qwen3_moe": ("Qwen3Moe", EXPERTS, CAUSAL),
    "phi": ("Phi", NO_HEAD_SIZE | {"qk_layernorm": True}, CAUSAL),
    "phi3": "phi3 longrope",
    "phimoe": ("Phimoe", NO_HEAD_SIZE | {"num_local_experts": 4}, CAUSAL),
    "bert": ("Bert", ENCODER, MASKED),
    "xlm-roberta": ("XLMRoberta", ENCODER, MASKED),
    "mt5": ("MT5", T5, SEQ2SEQ),
    "falcon": (
        "Falcon",
        {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3},
        CAUSAL,
    ),
    "gpt_neox": ("GPTNeoX", ENCODER, CAUSAL),
}
UNSUPPORTED = ("bert", "xlm-roberta", "mt5", "falcon", "gpt_neox")
FAMILIES = {"mixtral": "mistral", "phimoe": "phi", "phi3": "phi"} | dict.fromkeys(UNSUPPORTED, "unknown")


def family_of(name: str) -> ModelFamily:
    return ModelFamily(
        FAMILIES.get(name, name.rstrip("23").removesuffix("_moe").rstrip("23") if name != "gpt2" else name)
    )


def built(name: str) -> nn.Module:
    if isinstance(MODELS[name], str):
        return theirs(MODELS[name])
    family, settings, auto = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**json.loads(json.dumps(settings)))
    model = getattr(transformers, auto).from_config(config).eval()
    randomise(model)
    return model


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A home of its own for every test, and no network."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("XDG_CACHE_HOME", parts.ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every model of MODELS by name: (module, folder)."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for name in MODELS:
        model = built(name)
        model.save_pretrained(root / name)
        found[name] = model, root / name
    return found


@pytest.fixture(params=MODELS)
def one(request, saved):
    return request.param, *saved[request.param]


# ---- taking apart


def test_each_family_reports_itself_and_an_unsupported_one_is_unknown(one):
    name, model, folder = one
    assert ModelRegistry().detect_family(model, name) is family_of(name)
    assert decompose(model, "any").family is describe_folder(folder).family is family_of(name)


def test_every_path_is_a_module_and_every_module_is_in_a_part_or_listed(one):
    name, model, _ = one
    spec, modules = decompose(model, name), dict(model.named_modules())
    small = [part for part in spec.parts.values() if part.part_type is not PartType.FULL_LAYER]
    assert all(modules[part.module_path] is not model for part in spec.parts.values())
    paths = [part.module_path for part in small] + spec.uncovered
    for path, module in modules.items():
        leaf = not any(module.children())
        assert not leaf or any(f"{path}.".startswith(f"{one}.") for one in paths), path
    held = {id(p) for part in small for p in modules[part.module_path].parameters()}
    assert held == {id(p) for p in model.parameters()}  # what is uncovered here is dropout
    assert all(isinstance(modules[path], nn.Dropout) for path in spec.uncovered)


def test_parameters_and_bytes_are_counted_tied_ones_once_in_the_total(one):
    name, model, _ = one
    spec = decompose(model, name)
    assert spec.parameters == sum(p.numel() for p in model.parameters())
    assert spec.bytes == 4 * spec.parameters
    for part in spec.parts.values():
        module = model.get_submodule(part.module_path)
        assert part.parameters == sum(p.numel() for p in module.parameters()) and part.bytes == 4 * part.parameters
    tied = model.config.get_text_config().tie_word_embeddings
    assert ("tied_to" in spec.parts["output_head"].extra_info) == tied
    outermost = [
        part
        for part in spec.parts.values()
        if "tied_to" not in part.extra_info and (part.layer_idx is None or part.part_type is PartType.FULL_LAYER)
    ]
    if name != "bert" and name != "xlm-roberta":  # whose heads have more than what is tied
        assert sum(part.parameters for part in outermost) == spec.parameters


def test_a_folder_gives_what_its_loaded_model_does(one):
    name, _, folder = one
    spec, model = describe_folder(folder, name), loading.load(folder)
    assert spec.directory == str(folder)
    loaded = decompose(model, name)
    loaded.directory, loaded.fingerprint = spec.directory, spec.fingerprint
    assert loaded == spec


def test_no_weights_are_read_only_headers_or_nothing_at_all(one, tmp_path):
    name, _, folder = one
    whole, path = describe_folder(folder, name), tmp_path / "copy"
    shutil.copytree(folder, path)
    weights = path / "model.safetensors"

    def same() -> bool:
        spec = describe_folder(path, name)
        spec.directory, spec.fingerprint = whole.directory, whole.fingerprint
        return spec == whole

    with open(weights, "r+b") as file:  # zeros where the numbers were
        start, size = 8 + int.from_bytes(file.read(8), "little"), weights.stat().st_size
        file.truncate(start)
        file.truncate(size)
    assert same()
    weights.unlink()
    assert same()  # the configuration alone
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same()  # an index whose shards are not here


def test_a_file_that_holds_another_model_than_its_configuration_is_refused(saved, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(saved["llama"][1], path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 41}))
    with pytest.raises(ValueError, match=r"down_proj\.weight is \(24, 40\) where the model has \(24, 41\)"):
        describe_folder(path)
    (path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0no header at all")
    with pytest.raises(ValueError, match=r"model\.safetensors is no sound safetensors file"):
        describe_folder(path)
    (path / "model.safetensors").unlink()
    (path / "config.json").write_text(json.dumps({"model_type": "never_heard_of"}))
    with pytest.raises(ValueError, match="never_heard_of"):
        describe_folder(path)


def test_the_precision_is_that_of_the_files(saved, tmp_path):
    model = theirs("llama 3.1").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    spec, loaded = describe_folder(tmp_path), decompose(model, "")
    assert spec.extra_info["dtype"] == "bfloat16" and spec.bytes == loaded.bytes == 2 * spec.parameters
    (tmp_path / "model.safetensors").unlink()
    assert describe_folder(tmp_path).extra_info["dtype"] == "bfloat16"
    assert {p.device.type for p in skeleton(tmp_path).parameters()} == {"meta"}


LLAMA_PARTS = ("attention", "ffn", "layer", "input_layernorm", "post_attention_layernorm")


def test_a_gpt2_of_12_layers_has_the_64_documented_parts_in_both_implementations():
    layered = ("attention", "ffn", "ln_1", "ln_2", "layer")
    names = {"embedding", "pos_embedding", "ln_f", "output_head"} | {f"{x}_{i}" for x in layered for i in range(12)}
    assert len(names) == 64
    with torch.device("meta"):
        hub = transformers.GPT2LMHeadModel(transformers.GPT2Config())
        ours = GPT(GPTConfig())
    for model in (hub, ours):
        spec = decompose(model, "gpt2")
        assert spec.parts.keys() == names
        assert (spec.hidden_dim, spec.num_layers, spec.num_heads, spec.vocab_size) == (768, 12, 12, 50257)
        assert spec.max_seq_len == 1024 and spec.parameters == 124_439_808
        assert spec.parts["attention_5"].module_path == "transformer.h.5.attn"
        assert spec.parts["pos_embedding"].input_dim == 1024


def test_a_llama_has_the_documented_5L_plus_3_parts_and_its_rotation_where_that_is_a_module(saved):
    names = {"embedding", "norm", "output_head"} | {f"{x}_{i}" for x in LLAMA_PARTS for i in range(3)}
    model, folder = saved["llama"]
    assert decompose(model, "").parts.keys() == names | {"rotary_emb"}
    assert describe_folder(folder).parts.keys() == names  # our GPT turns by a function
    for other in ("mistral", "qwen2", "phi3", "gemma"):
        assert names < decompose(saved[other][0], "").parts.keys(), other


MORE = {
    "gemma2": {"pre_feedforward_layernorm", "post_feedforward_layernorm"},
    "gemma3": {"pre_feedforward_layernorm", "post_feedforward_layernorm", "q_norm", "k_norm"},
    "qwen3": {"q_norm", "k_norm"},
    "mixtral": {"gate", "experts"},
    "qwen2_moe": {"gate", "experts", "shared_expert", "shared_expert_gate"},
    "qwen3_moe": {"gate", "experts", "q_norm", "k_norm"},
    "phimoe": {"gate", "experts"},
    "phi": {"q_norm", "k_norm"},
}


@pytest.mark.parametrize("name", MORE)
def test_what_the_document_leaves_out_stands_beside_it(saved, name):
    spec = decompose(saved[name][0], name)
    layered = set(LLAMA_PARTS) - ({"post_attention_layernorm"} if name == "phi" else set())
    assert {n.rpartition("_")[0] for n, p in spec.parts.items() if p.layer_idx == 1} == layered | MORE[name]


@pytest.mark.parametrize(
    ("name", "part", "facts"),
    [
        ("gpt2", "attention_0", {"num_heads": 3, "head_dim": 8, "num_kv_heads": 3, "qkv_bias": True, "rope": None}),
        ("gpt2", "ffn_1", {"intermediate_dim": 96, "activation": "gelu_pytorch_tanh", "gated": False}),
        ("llama", "attention_2", {"num_heads": 3, "head_dim": 10, "num_kv_heads": 1, "qkv_bias": False}),
        ("llama", "ffn_0", {"input_dim": 24, "output_dim": 24, "intermediate_dim": 40, "activation": "silu"}),
        ("llama", "norm", {"norm": "rmsnorm", "eps": 1e-6, "plus_one": False, "place": "final"}),
        ("mistral", "attention_0", {"sliding_window": 5, "head_dim": 10}),
        ("mixtral", "ffn_0", {"num_experts": 4, "experts_per_token": 2, "intermediate_dim": 40, "gated": True}),
        ("mixtral", "gate_0", {"input_dim": 24, "output_dim": 4}),
        ("gemma2", "attention_0", {"sliding_window": 5, "softcap": 2.0, "query_scalar": 17}),
        ("gemma2", "attention_1", {"sliding_window": None}),
        ("gemma2", "embedding", {"scaled": True}),
        ("gemma2", "norm", {"plus_one": True}),
        ("gemma2", "post_attention_layernorm_0", {"place": "after attention"}),
        ("gemma2", "output_head", {"softcap": 3.0, "tied_to": "embedding"}),
        ("gemma3", "attention_0", {"qk_norm": True, "head_dim": 10, "rope_theta": 20.0}),
        ("gemma3", "attention_1", {"rope_theta": 80.0, "sliding_window": None}),
        ("qwen2", "attention_0", {"qkv_bias": True, "out_bias": False, "sliding_window": None}),
        ("qwen2_moe", "shared_expert_1", {"intermediate_dim": 12}),
        ("qwen3", "q_norm_0", {"input_dim": 10}),
        ("qwen3_moe", "experts_0", {"intermediate_dim": 8, "num_experts": 4}),
        ("phi", "norm", {"norm": "layernorm", "bias": True}),
        ("phi", "output_head", {"bias": True}),
        ("phi3", "attention_0", {"num_heads": 3, "head_dim": 16, "num_kv_heads": 1}),
        ("phi3", "ffn_0", {"intermediate_dim": 40, "gated": True}),
        ("bert", "attention_1", {"num_heads": 3, "head_dim": 8}),
        ("mt5", "decoder_cross_attention_1", {"num_heads": 3, "head_dim": 8}),
        ("mt5", "encoder_ffn_0", {"intermediate_dim": 40, "gated": True}),
        ("falcon", "attention_0", {"num_heads": 3, "num_kv_heads": 1}),
        ("gpt_neox", "ffn_1", {"intermediate_dim": 40}),
    ],
)
def test_sizes_are_read_where_they_really_are(saved, name, part, facts):
    spec = decompose(saved[name][0], name).parts[part]
    known = spec.extra_info | vars(spec) | {"rope_theta": (spec.extra_info.get("rope") or {}).get("rope_theta")}
    assert {key: known[key] for key in facts} == facts


def test_what_single_families_have_otherwise():
    oss = transformers.GptOssConfig(**{**SIZES, "num_local_experts": 4, "num_hidden_layers": 1})
    ffn = decompose(transformers.GptOssForCausalLM(oss), "").parts["ffn_0"]
    assert (ffn.input_dim, ffn.output_dim, ffn.intermediate_dim) == (24, 24, 40)
    sizes = {"vocab_size": 61, "hidden_size": 24, "num_layers": 2, "num_heads": 3, "window_size": 5}
    neo = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]]))
    windows = [decompose(neo, "").parts[f"attention_{i}"].extra_info["sliding_window"] for i in (0, 1)]
    assert windows == [None, 5]


@pytest.mark.parametrize("setting", [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}])
def test_attentions_of_another_scale_do_not_fit(tmp_path, setting):
    registry, sizes = ModelRegistry(tmp_path), {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 3}
    for name, settings in (("a", {}), ("b", setting)):
        registry.register(name, transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **settings)))
    with pytest.raises(ValueError, match=r"scores divided by the root of: 8\.0 and"):
        registry.swap("a", "attention_1", "b", "attention_1")


def test_scaled_rotations_are_recorded_whole(saved):
    rope = decompose(saved["llama"][0], "").parts["attention_0"].extra_info["rope"]
    assert rope["rope_type"] == "llama3" and rope["rope_theta"] == 50.0 and rope["factor"] == 8.0
    spec = decompose(saved["phi3"][0], "")
    assert spec.parts["attention_0"].extra_info["rope"]["partial_rotary_factor"] == 0.75
    assert spec.parts["rotary_emb"].input_dim == 12  # of 16
    assert (
        spec.extra_info["positions"] == "rope" and decompose(saved["gpt2"][0], "").extra_info["positions"] == "learned"
    )


def test_a_configuration_that_says_nothing_or_something_wrong_of_the_heads_does_not_mislead(saved):
    model = theirs("qwen3")
    del model.config.head_dim
    model.config.num_key_value_heads = 3
    part = decompose(model, "").parts["attention_0"]
    assert (part.head_dim, part.extra_info["num_kv_heads"]) == (10, 1)


def test_a_decoders_heads_are_its_own_where_the_encoder_has_others():
    sizes = {"vocab_size": 61, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 2}
    found = decompose(transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes)), "").parts
    for name, heads in {"encoder_attention_0": 4, "decoder_attention_0": 2, "decoder_cross_attention_0": 2}.items():
        part = found[name]
        assert (part.num_heads, part.head_dim, part.extra_info["num_kv_heads"]) == (heads, 24 // heads, heads)


def test_a_list_of_experts_as_older_versions_have_it_gives_one_part_each():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 40)

    model = built("mixtral")
    for layer in model.model.layers:
        layer.block_sparse_moe = nn.Module()
        layer.block_sparse_moe.gate = nn.Linear(24, 2, bias=False)
        layer.block_sparse_moe.experts = nn.ModuleList([Expert(), Expert()])
        del layer.mlp
    spec = decompose(model, "mixtral")
    assert spec.family is ModelFamily.MISTRAL
    assert spec.parts["expert_1_0"].module_path == "model.layers.1.block_sparse_moe.experts.0"
    assert spec.parts["expert_0_1"].intermediate_dim == 40 and spec.parts["gate_0"].output_dim == 2
    assert "experts_0" not in spec.parts and spec.parts["ffn_0"].extra_info["num_experts"] == 2
    assert not spec.uncovered


@pytest.mark.parametrize("name", ["gpt2-vs-llama", "graphite-bert", "phi/gemma"])
def test_a_name_says_nothing_of_the_family(saved, name, tmp_path):
    shutil.copytree(saved["llama"][1], tmp_path / name)
    assert describe_folder(tmp_path / name).family is ModelFamily.LLAMA
    registry = ModelRegistry(tmp_path / "cache")
    assert registry.register(name, saved["llama"][0]).family is ModelFamily.LLAMA
    assert registry.register(f"{name}-2", saved["falcon"][0]).family is ModelFamily.UNKNOWN


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "gemma2", "gemma3", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "mixtral"]
)
def test_without_a_configuration_the_structure_tells_the_particular_before_the_common(name):
    model = built(name)
    known = decompose(model, name)
    model.config = None
    spec = decompose(model, name)
    assert spec.family is family_of(name)
    assert spec.parts.keys() == known.parts.keys()
    assert spec.parts["ffn_0"].intermediate_dim == known.parts["ffn_0"].intermediate_dim
    if "norm" in known.parts and known.parts["attention_0"].extra_info["qk_norm"]:
        assert spec.num_heads == known.num_heads  # a norm of queries has the size of a head


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_a_bare_model_without_a_head_and_a_wrapped_one_are_taken_apart_too(name):
    model = built(name)
    whole = decompose(model, name)
    bare = decompose(model.base_model, name)
    assert bare.family is whole.family and bare.parts.keys() == whole.parts.keys() - {"output_head"}
    wrapper = nn.Module()
    wrapper.inner, wrapper.config = model, model.config
    wrapped = decompose(wrapper, name)
    assert wrapped.parts.keys() == whole.parts.keys() and wrapped.parameters == whole.parameters
    assert wrapped.parts["output_head"].module_path == "inner.lm_head"


def test_what_is_no_text_model_of_a_multimodal_one_is_listed():
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
    text = json.loads(json.dumps(SIZES | {"sliding_window": 5}))
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    spec = decompose(transformers.Gemma3ForConditionalGeneration(config), "")
    assert spec.family is ModelFamily.GEMMA and spec.num_layers == 3 and "attention_2" in spec.parts
    assert any("vision_tower" in path for path in spec.uncovered)
    assert all("language_model" not in path for path in spec.uncovered)


def test_a_mistral_without_a_window_is_a_mistral_though_it_computes_what_a_llama_does(tmp_path):
    config = transformers.MistralConfig(**SIZES | {"hidden_size": 24, "sliding_window": None})
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    assert describe_folder(tmp_path).family is ModelFamily.MISTRAL
    assert decompose(loading.load(tmp_path), "").family is ModelFamily.MISTRAL


def test_our_gpt_in_both_styles_and_one_that_no_family_has():
    for block, family in (("gpt2", ModelFamily.GPT2), ("llama", ModelFamily.LLAMA)):
        more = {"block": block} | ({"bias": False, "n_kv_head": 1} if block == "llama" else {})
        spec = decompose(gpt(**more), "mine")
        assert spec.family is family and spec.extra_info["class"] == "GPT"
        assert spec.parts["attention_1"].extra_info["num_kv_heads"] == (1 if block == "llama" else 3)
    odd = decompose(gpt(block="llama", bias=False, qk_norm=True, qkv_bias=True), "mine")
    assert odd.family is ModelFamily.LLAMA and odd.parts["q_norm_0"].input_dim == 8


def test_our_directories_a_lora_one_and_nanogpts_checkpoint_alone(tmp_path):
    model = gpt().eval()
    folder = save(tmp_path / "gpt-1M-x-pretrain", model, None)
    spec = describe_folder(folder, "m")
    loaded = decompose(loading.load(folder), "m")
    loaded.directory, loaded.fingerprint = spec.directory, spec.fingerprint
    assert spec == loaded and spec.family is ModelFamily.GPT2
    reference = CheckpointManager.base_reference(folder, tmp_path / "gpt-1M-x-lora")
    save(tmp_path / "gpt-1M-x-lora", adapted(gpt(), targets=["c_attn"]), None, about={"base": reference})
    assert describe_folder(tmp_path / "gpt-1M-x-lora", "m").parts == spec.parts
    (tmp_path / "nanogpt").mkdir()
    shutil.copy(folder / "ckpt.pt", tmp_path / "nanogpt")
    assert describe_folder(tmp_path / "nanogpt", "m").parts == spec.parts


def test_any_module_at_all_has_parts():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.pos = nn.Embedding(11, 8), nn.Embedding(5, 8)
            layer = nn.TransformerEncoderLayer(8, 2, 16)
            self.crossed = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
            self.head = nn.Linear(8, 11)

    spec = decompose(Plain(), "plain")
    assert spec.family is ModelFamily.UNKNOWN and spec.num_layers == 3
    assert spec.parts["attention_2"].num_heads == 2 and spec.parts["attention_2"].head_dim == 4
    assert {"embedding", "pos_embedding", "output_head", "layer_1", "norm1_0", "linear1_0"} <= spec.parts.keys()
    assert all("dropout" in path for path in spec.uncovered)
    nothing = decompose(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), "nothing")
    assert nothing.parts == {} and nothing.uncovered == ["0", "1"] and nothing.parameters == 9


def test_stacks_of_one_name_are_told_apart():
    def tower() -> nn.Module:
        tower = nn.Module()
        tower.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
        return tower

    model = nn.Module()
    model.text, model.image = tower(), tower()
    spec = decompose(model, "two towers")
    assert spec.parts["text_encoder_attention_1"].module_path == "text.encoder.layers.1.self_attn"
    assert spec.parts["image_encoder_layer_0"].layer_idx == 0
    assert (
        sum(part.parameters for part in spec.parts.values() if part.part_type is PartType.FULL_LAYER) == spec.parameters
    )
    assert spec.extra_info["stacks"] == {"text.encoder.layers": 2, "image.encoder.layers": 2}


class Halves(ModelDecomposer):
    """Knows a model of two linear layers."""

    def detect(self, model, model_id):
        return isinstance(model, nn.Sequential)

    def decompose(self, model, model_id):
        part = PartSpec(PartType.FFN, None, "0", 2, 3, extra_info={"colour": "blue"})
        return ModelSpec(model_id, ModelFamily.UNKNOWN, 2, 0, None, None, None, parts={"first": part})


def test_ones_own_decomposer_is_asked_before_the_families_or_after_them(tmp_path):
    own, model = Halves(), nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    try:
        register_decomposer(own, priority=-1)
        spec = ModelRegistry(tmp_path).register("mine", model)
        assert spec.parts["first"].parameters == 9 and spec.uncovered == ["1"]
        assert decompose(theirs("llama 3.1"), "").family is ModelFamily.LLAMA
        own.detect = lambda model, model_id: True
        assert decompose(theirs("llama 3.1"), "").family is ModelFamily.LLAMA
        unregister_decomposer(own)
        register_decomposer(own)
        with pytest.raises(ValueError, match=r"the part first would be 0, and there is no such module"):
            decompose(theirs("llama 3.1"), "")
    finally:
        unregister_decomposer(own)
    assert decompose(model, "").parts == {}
    with pytest.raises(ValueError, match="no ModelDecomposer"):
        register_decomposer(Halves)


# ---- keeping


@pytest.fixture
def registry(tmp_path) -> ModelRegistry:
    return ModelRegistry(tmp_path / "cache")


def test_the_documents_own_snippets(saved, monkeypatch, tmp_path):
    model = saved["llama"][0]
    registry = ModelRegistry()
    # Decompose and register a model
    spec = registry.register("meta-llama/Llama-2-7b-hf", model)
    # Get parts for experiments; this one has three layers
    attn_layer = registry.get_part("meta-llama/Llama-2-7b-hf", "attention_2")
    assert registry.get_part("meta-llama/Llama-2-7b-hf", "attention_5") is None
    # List all registered models
    models = registry.list_models()
    assert models == ["meta-llama/Llama-2-7b-hf"]
    # Compare architectures
    assert registry.compare("gpt2", "meta-llama/Llama-2-7b-hf") == {"error": "One or both models not registered"}
    registry.register("gpt2", saved["gpt2"][0])
    result = registry.compare("gpt2", "meta-llama/Llama-2-7b-hf")
    assert result["models"] == ["gpt2", "meta-llama/Llama-2-7b-hf"] and result["families"] == ["gpt2", "llama"]
    assert result["hidden_dims"] == [24, 24] and result["num_layers"] == [3, 3]
    assert result["num_heads"] == [3, 3] and result["vocab_sizes"] == [61, 61]
    assert {"same_dim", "attention_compatible", "ffn_compatible"} <= result["compatible_parts"].keys()

    assert registry.detect_family(model, "x") is ModelFamily.LLAMA
    assert isinstance(spec, ModelSpec) and spec == registry.get_spec("meta-llama/Llama-2-7b-hf")
    assert (spec.model_id, spec.family.value, spec.hidden_dim) == ("meta-llama/Llama-2-7b-hf", "llama", 24)
    assert (spec.num_layers, spec.num_heads, spec.vocab_size, spec.max_seq_len) == (3, 3, 61, 64)
    assert spec.get_attention(2) is spec.parts["attention_2"] == attn_layer
    assert spec.get_ffn(0) is spec.parts["ffn_0"] and spec.get_full_layer(1) is spec.parts["layer_1"]
    assert spec.get_attention(3) is spec.get_ffn(3) is spec.get_full_layer(3) is None
    assert spec.all_attention_parts() == [spec.parts[f"attention_{i}"] for i in range(3)]
    assert spec.all_ffn_parts() == [spec.parts[f"ffn_{i}"] for i in range(3)]
    assert (attn_layer.part_type, attn_layer.layer_idx) == (PartType.ATTENTION, 2)
    assert attn_layer.module_path == "model.layers.2.self_attn"
    assert (attn_layer.input_dim, attn_layer.output_dim, attn_layer.num_heads, attn_layer.head_dim) == (24, 24, 3, 10)
    assert attn_layer.intermediate_dim is None and attn_layer.extra_info["num_kv_heads"] == 1
    module = registry.get_module("meta-llama/Llama-2-7b-hf", "attention_2")
    assert module is model.model.layers[2].self_attn
    assert registry.list_parts("meta-llama/Llama-2-7b-hf", PartType.FFN) == ["ffn_0", "ffn_1", "ffn_2"]
    assert registry.list_parts("gpt2", "attention") == ["attention_0", "attention_1", "attention_2"]
    assert registry.list_parts("gpt2") == list(registry.get_spec("gpt2").parts)
    values = {"embedding", "attention", "ffn", "layer_norm", "output_head", "rotary_emb", "gate", "full_layer"}
    assert values < {kind.value for kind in PartType}
    assert [f.value for f in ModelFamily] == ["gpt2", "llama", "mistral", "gemma", "qwen", "phi", "unknown"]


def test_what_is_not_there_is_none_or_empty_or_with_strict_an_error_that_helps(registry, saved):
    assert registry.get_spec("gpt2") is registry.get_part("gpt2", "x") is registry.get_module("gpt2", "x") is None
    assert registry.list_models() == registry.list_parts("gpt2") == []
    with pytest.raises(ValueError, match="there is no model 'gpt2'; there is none yet"):
        registry.get_spec("gpt2", strict=True)
    registry.register("gpt2", saved["gpt2"][0])
    assert registry.get_part("gpt2", "attention_3") is registry.get_module("gpt2", "attention_3") is None
    for call in (registry.get_part, registry.get_module):
        with pytest.raises(ValueError, match=r"gpt2 has no part 'atention_2'; close to it: attention_2"):
            call("gpt2", "atention_2", strict=True)
    with pytest.raises(ValueError, match=r"no model 'gtp2'; close to it: gpt2"):
        registry.list_parts("gtp2", strict=True)
    with pytest.raises(ValueError, match="no model 'llama'; there is none like it"):
        registry.compare("gpt2", "llama", strict=True)
    with pytest.raises(ValueError, match=r"no type of part 'atention'; types are embedding, attention"):
        registry.list_parts("gpt2", "atention")
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        registry.register("no-such-model")


def test_specs_outlive_the_process(registry, saved):
    model, folder = saved["gemma3"]
    spec = registry.register("org/gemma", folder)
    registry.register("a module", model)
    other = ModelRegistry(registry.cache_dir)
    assert other.list_models() == ["a module", "org/gemma"]
    assert other.get_spec("org/gemma") == spec and other.get_spec("a module") == registry.get_spec("a module")
    code = "from registry.parts import ModelRegistry; print(ModelRegistry().list_models())"
    environment = os.environ | {parts.ENVIRONMENT: str(registry.cache_dir)}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout == "['a module', 'org/gemma']\n", run.stderr
    assert registry.remove("org/gemma") is True and registry.remove("org/gemma") is False
    assert registry.list_models() == ["a module"] == ModelRegistry(registry.cache_dir).list_models()


def test_the_cache_comes_into_being_with_the_first_spec_where_the_variables_say(saved, monkeypatch, tmp_path):
    def place(**variables) -> Path:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return ModelRegistry().cache_dir

    home = tmp_path / "home"
    assert place() == home / ".cache/nanoforge/registry"
    assert place(XDG_CACHE_HOME=str(tmp_path / "xdg")) == tmp_path / "xdg/nanoforge/registry"
    assert place(NANOFORGE_REGISTRY_DIR="") == tmp_path / "xdg/nanoforge/registry"
    assert place(NANOFORGE_REGISTRY_DIR="~/mine") == home / "mine"
    registry = ModelRegistry(str(tmp_path / "given"))
    assert registry.list_models() == [] and not registry.cache_dir.exists()
    registry.register("m", saved["gpt2"][0])
    assert [path.name for path in (tmp_path / "given").iterdir()] == ["m.json"]
    assert json.loads((tmp_path / "given/m.json").read_text())["version"] == VERSION


def test_ids_do_not_collide_whatever_is_in_them(registry, saved):
    ids = ["a/b", "a__b", "a%2Fb", "../escape", ".", "x" * 300, "x" * 299 + "y", "größe", "a b"]
    for i, model_id in enumerate(ids):
        spec = registry.register(model_id, saved["gpt2" if i % 2 else "llama"][0])
        assert spec.model_id == model_id
    other = ModelRegistry(registry.cache_dir)
    assert sorted(other.list_models()) == sorted(ids)
    assert all(other.get_spec(model_id) == registry.get_spec(model_id) for model_id in ids)
    assert all(path.parent == registry.cache_dir for path in registry.cache_dir.parent.rglob("*.json"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"version": 2, "mod', "Unterminated string"),
        (b"\xff\xff\xff", "decode"),
        (b"[]", "no spec of a model"),
        (b'{"version": 99}', "it is of version 99, and this code reads 2: register the model again"),
        (b'{"version": 1}', "it is of version 1, and this code reads 2"),
        (b'{"version": 2, "parts": {}}', "no spec of a model: 'family'"),
        (b'{"version": 2, "parts": {}, "family": "martian"}', "'martian' is not a valid ModelFamily"),
    ],
)
def test_a_damaged_or_newer_file_is_ignored_with_a_reason(registry, saved, content, reason):
    registry.register("good", saved["gpt2"][0])
    registry.register("bad", saved["gpt2"][0])
    path = registry.cache_dir / "bad.json"
    path.write_bytes(content)
    other = ModelRegistry(registry.cache_dir)
    assert other.list_models() == ["good"] and reason in other.ignored[path]
    assert other.get_spec("bad") is None and other.get_module("bad", "ffn_0") is None
    with pytest.raises(ValueError, match=r"no model 'bad'.*bad\.json is ignored: ") as error:
        other.get_spec("bad", strict=True)
    assert reason in str(error.value)
    other.register("bad", saved["gpt2"][0])
    assert other.list_models() == ["bad", "good"] and path not in ModelRegistry(registry.cache_dir).ignored
    shutil.copy(path, registry.cache_dir / "copy.json")
    assert other.list_models() == ["bad", "good"]
    assert "it is of bad" in other.ignored[registry.cache_dir / "copy.json"]


def test_what_an_older_version_described_is_to_be_registered_again_or_removed(registry, saved):
    registry.register("old", saved["gpt2"][1])
    path = registry.cache_dir / "old.json"
    content = json.loads(path.read_text()) | {"version": VERSION - 1}
    path.write_text(json.dumps(content))
    other = ModelRegistry(registry.cache_dir)
    with pytest.raises(ValueError, match=f"version {VERSION - 1}.*register the model again"):
        other.get_spec("old", strict=True)
    assert other.list_models() == [] and json.loads(path.read_text()) == content
    assert other.remove("old") and not other.remove("old") and not path.exists()


def test_a_spec_is_replaced_whole_or_not_at_all(registry, saved, monkeypatch):
    spec = registry.register("m", saved["gpt2"][0])

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=r"cannot write .*m\.json"):
        registry.register("m", saved["llama"][0])
    assert registry.get_spec("m") == ModelRegistry(registry.cache_dir).get_spec("m") == spec
    assert [path.name for path in registry.cache_dir.iterdir()] == ["m.json"]


def test_a_spec_that_json_cannot_hold_is_refused_before_anything_is_written(registry, monkeypatch):
    own = Halves()
    register_decomposer(own)
    try:
        odd = own.decompose(None, "m")
        odd.parts["first"].extra_info["function"] = print
        monkeypatch.setattr(own, "decompose", lambda model, model_id: odd)
        with pytest.raises(ValueError, match=r"the spec of m cannot be kept as JSON"):
            registry.register("m", nn.Sequential(nn.Linear(2, 3)))
    finally:
        unregister_decomposer(own)
    assert registry.list_models() == [] and not registry.cache_dir.exists()


def test_a_registered_folder_is_loaded_when_a_module_is_asked_for_also_by_the_next_process(registry, saved, tmp_path):
    model, original = saved["llama"]
    folder = Path(shutil.copytree(original, tmp_path / "copy"))
    registry.register("m", folder)
    registry.register("gone", model)
    other = ModelRegistry(registry.cache_dir)
    module = other.get_module("m", "ffn_1", strict=True)
    assert torch.equal(module.down_proj.weight, model.model.layers[1].mlp.down_proj.weight)
    assert other.get_module("m", "attention_0") is other.get_model("m").model.layers[0].self_attn
    assert other.get_module("gone", "ffn_1") is None
    with pytest.raises(ValueError, match="gone was registered as a module by another process"):
        other.get_module("gone", "ffn_1", strict=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    later = ModelRegistry(registry.cache_dir)
    assert later.get_module("m", "ffn_1") is None
    with pytest.raises(ValueError, match=r"copy no longer holds what was registered as m: register it again"):
        later.get_module("m", "ffn_1", strict=True)
    (folder / "model.safetensors").unlink()
    later.register("m", folder)
    assert later.get_module("m", "ffn_1").down_proj.weight.is_meta  # shapes are all that there is


def test_registering_an_id_again_replaces_its_module_too(registry, saved):
    registry.register("m", saved["gpt2"][0])
    assert registry.get_model("m") is saved["gpt2"][0]
    registry.register("m", saved["llama"][1])
    assert isinstance(registry.get_model("m"), GPT) and registry.get_spec("m").family is ModelFamily.LLAMA


@pytest.mark.parametrize("name", ["mixtral", "bert", "mt5", "phi"])
def test_a_folder_that_transformers_opens_is_loaded_with_the_paths_that_were_recorded(registry, saved, name):
    model, folder = saved[name]
    spec = registry.register(name, folder)
    for part_name, part in spec.parts.items():
        found = registry.get_module(name, part_name, strict=True).state_dict()
        expected = model.get_submodule(part.module_path).state_dict()
        assert (
            all(torch.equal(found[key], tensor) for key, tensor in expected.items()) and found.keys() == expected.keys()
        )


def test_a_name_that_the_resolution_knows_is_registered_by_itself(registry, saved, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOFORGE_GPT2_PATH", str(saved["gpt2"][1]))
    spec = registry.register("gpt2-offline")
    assert spec.model_id == "gpt2-offline" and Path(spec.directory) == saved["gpt2"][1]
    assert registry.register("here", str(saved["llama"][1])).family is ModelFamily.LLAMA


# ---- comparing


def pairs(result: dict, key: str) -> list[tuple[str, str]]:
    return [(pair["name_a"], pair["name_b"]) for pair in result["compatible_parts"][key]]


def test_compatible_parts_are_real_names_and_reasons(registry, saved):
    registry.register("a", saved["llama"][0])
    registry.register("b", theirs("llama 3.1"))
    result = registry.compare("a", "b")
    layers = [(f"attention_{i}", f"attention_{i}") for i in range(3)]
    assert pairs(result, "attention_compatible") == layers
    assert pairs(result, "ffn_compatible") == [(f"ffn_{i}", f"ffn_{i}") for i in range(3)]
    assert [pair["name_a"] for pair in result["compatible_parts"]["refused"]] == ["rotary_emb"]
    spec = registry.get_spec("a")
    for key in ("same_dim", "attention_compatible", "ffn_compatible"):
        assert all(a in spec.parts and b in spec.parts for a, b in pairs(result, key))
        assert all(pair["reason"] for pair in result["compatible_parts"][key])
    assert len(pairs(result, "same_dim")) == len(spec.parts)
    attention = result["compatible_parts"]["attention_compatible"][0]
    assert attention["reason"].startswith("3 heads of 10, 1 for keys and values; rotation llama3, base 50")
    assert all(verdict["same"] for verdict in result["verdicts"].values())
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "part", "reason"),
    [
        ({"num_attention_heads": 4}, "attention_0", "heads: 3 and 4"),
        ({"head_dim": 12}, "attention_0", "size of a head: 10 and 12"),
        ({"num_key_value_heads": 3}, "attention_0", "heads of keys and values: 1 and 3"),
        ({"rope_theta": 7e5}, "attention_0", "rotation: base 10,000 and base 700,000"),
        ({"attention_bias": True}, "attention_0", "q_proj.bias is not there in one and is 30 in the other"),
        ({"intermediate_size": 41}, "ffn_0", "inner width: 40 and 41"),
        ({"hidden_act": "gelu"}, "ffn_0", "activation: silu and gelu"),
        ({"mlp_bias": True}, "ffn_0", "gate_proj.bias is not there in one and is 40 in the other"),
        ({"hidden_size": 21}, "norm", "inputs: 24 and 21"),
        ({"vocab_size": 62}, "embedding", "inputs: 61 and 62"),
        ({"vocab_size": 62}, "output_head", "outputs: 61 and 62"),
        ({"hidden_act": "gelu"}, "layer_1", "ffn: activation: silu and gelu"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_difference(registry, changes, part, reason):
    for name, settings in (("a", SIZES), ("b", SIZES | changes)):
        with torch.device("meta"):
            registry.register(name, transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)))
    parts_ = registry.compare("a", "b")["compatible_parts"]
    refused = {pair["name_a"]: pair["reason"] for pair in parts_["refused"]}
    assert reason in refused[part]
    assert part not in [pair["name_a"] for key in ("attention_compatible", "ffn_compatible") for pair in parts_[key]]
    same = {pair["name_a"]: pair["swappable"] for pair in parts_["same_dim"]}
    assert ("inputs" in reason or "outputs" in reason) == (part not in same) and not same.get(part)
    with pytest.raises(ValueError, match=f"{part} of b does not fit as {part} of a: ") as error:
        registry.swap("a", part, "b", part)
    assert reason in str(error.value)


def test_families_that_compute_otherwise_do_not_fit_even_with_equal_shapes(registry, saved):
    for name in ("gpt2", "llama", "gemma", "mistral", "bert"):
        registry.register(name, saved[name][0])

    def refused(a, b):
        return {pair["name_a"]: pair["reason"] for pair in registry.compare(a, b)["compatible_parts"]["refused"]}

    assert "multiplies by 1 + weight: no and yes" in refused("llama", "gemma")["norm"]
    assert "scaled by the root of the width: no and yes" in refused("llama", "gemma")["embedding"]
    assert "kind: layernorm and rmsnorm" in refused("gpt2", "llama")["ln_1_0"]
    assert "rotation: none and llama3" in refused("gpt2", "llama")["attention_0"]
    assert "only the same class will do: GPT2Attention and BertAttention" in refused("gpt2", "bert")["attention_0"]
    windows = registry.compare("mistral", "llama")
    assert windows["verdicts"]["sliding_window"] == {"values": [5, None], "same": False}
    assert windows["verdicts"]["layers_with_window"]["values"] == [3, 0]


def test_a_window_is_said_and_is_no_obstacle_another_tokenizer_is_one(registry, saved, tmp_path):
    for name, window, tokenizer in (("a", 5, "{}"), ("b", 7, "{}"), ("c", 7, "{ }")):
        folder = tmp_path / name
        shutil.copytree(saved["mistral"][1], folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"sliding_window": window}))
        (folder / "tokenizer.json").write_text(tokenizer)
        registry.register(name, folder)
    found = registry.compare("a", "b")["compatible_parts"]
    assert found["attention_compatible"][0]["reason"].endswith("window: 5 and 7") and not found["refused"]
    refused = registry.compare("b", "c")["compatible_parts"]["refused"]
    assert [pair["name_a"] for pair in refused] == ["embedding", "output_head"]
    assert refused[0]["reason"] == "the tokenizers differ, so ids mean other tokens"


# ---- swapping


def answers(model: nn.Module) -> torch.Tensor:
    x = tokens(2, 12)
    with torch.no_grad():
        return model(x, x)[0] if isinstance(model, GPT) else model(x).logits


def another(name: str, seed: int = 5) -> nn.Module:
    model = built(name)
    randomise(model, seed)
    return model


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "mixtral", "phi"])
@pytest.mark.parametrize("part", ["attention_0", "ffn_1", "layer_1", "input_layernorm_0", "embedding"])
def test_after_a_swap_the_model_computes_with_the_others_part(registry, name, part):
    part = "ln_1_0" if name == "gpt2" and part.startswith("input") else part
    a, b = built(name), another(name)
    expected = copy.deepcopy(a)
    registry.register("a", a)
    registry.register("b", b)
    before, untouched = answers(a), answers(b)
    path = registry.get_part("a", part).module_path
    expected.get_submodule(path).load_state_dict(b.get_submodule(path).state_dict())
    report = registry.swap("a", part, "b", part)
    assert torch.equal(answers(a), answers(expected)) and not torch.equal(answers(a), before)
    assert torch.equal(answers(b), untouched)
    tied = part == "embedding" and a.config.tie_word_embeddings
    assert report["also_changed"] == (["output_head"] if tied else []) and report["parameters"] > 0
    assert all(p.requires_grad for p in a.parameters())


def test_a_part_goes_into_another_layer_too_and_into_its_own_model(registry):
    model = another("llama")
    registry.register("m", model)
    registry.swap("m", "attention_2", "m", "attention_0")
    layers = model.model.layers
    assert all(map(torch.equal, layers[2].self_attn.parameters(), layers[0].self_attn.parameters()))
    before = layers[0].self_attn.q_proj.weight.clone()
    with torch.no_grad():
        layers[2].self_attn.q_proj.weight.zero_()
    assert torch.equal(layers[0].self_attn.q_proj.weight, before)  # copies, not the same tensors


def test_transformers_gpt2_takes_our_gpts_parts_whose_matrices_are_stored_turned(registry):
    ours = GPT(GPTConfig(64, 61, 3, 3, 24, activation="gelu_tanh")).eval()
    randomise(ours, 3)
    model = built("gpt2")
    registry.register("ours", ours)
    registry.register("theirs", model)
    for name in registry.list_parts("theirs"):
        registry.swap("theirs", name, "ours", name)
    torch.testing.assert_close(answers(model), answers(ours), atol=1e-4, rtol=1e-4)


def test_folders_swap_their_parts_once_loaded_and_shapes_alone_do_not(registry, saved, tmp_path):
    registry.register("folder", saved["llama"][1])
    other = another("llama")
    registry.register("other", other)
    registry.swap("folder", "ffn_0", "other", "ffn_0")
    assert torch.equal(registry.get_module("folder", "ffn_0").up_proj.weight, other.model.layers[0].mlp.up_proj.weight)
    shutil.copytree(saved["llama"][1], tmp_path / "bare")
    (tmp_path / "bare/model.safetensors").unlink()
    registry.register("bare", tmp_path / "bare")
    with pytest.raises(ValueError, match="bare has no weights here, only shapes"):
        registry.swap("other", "ffn_0", "bare", "ffn_0")
    half = another("llama").bfloat16()
    registry.register("half", half)
    assert registry.swap("folder", "ffn_1", "half", "ffn_1")["notes"] == ["precision: float32 and bfloat16"]
    assert torch.equal(
        registry.get_module("folder", "ffn_1").up_proj.weight, half.model.layers[1].mlp.up_proj.weight.float()
    )
    with pytest.raises(ValueError, match="one is of type attention, the other ffn"):
        registry.swap("other", "attention_0", "folder", "ffn_0")
    with pytest.raises(ValueError, match="rotary_emb of other: it has no weights"):
        registry.swap("other", "rotary_emb", "other", "rotary_emb")
    adapted(other, targets=["up_proj"])
    with pytest.raises(ValueError, match="its weights are no longer those that were registered"):
        registry.swap("folder", "ffn_0", "other", "ffn_0")


# ---- commands and picture


def command(*arguments: str) -> tuple[str, dict]:
    chosen = parse(list(map(str, arguments)))
    text, data = runner_of(chosen.command)(chosen)
    assert isinstance(chosen.json, bool)
    return text, json.loads(json.dumps(data, allow_nan=False))


def test_a_lora_directory_is_described_with_its_adapter(registry, saved, tmp_path):
    base = saved["gpt2"][1]
    adapted, _ = CheckpointManager.load_model(base, apply_lora=True, lora_config={"targets": ["c_attn"], "rank": 2})
    metadata = {"iter_num": 1, "best_val_loss": 2.0, "config": {}}
    metadata["base"] = CheckpointManager.base_reference(base, tmp_path / "mine")
    CheckpointManager.save_checkpoint(adapted, tmp_path / "mine", metadata)
    count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    spec = registry.register("mine", tmp_path / "mine")
    assert spec.extra_info["adapter"] == {"parameters": count, "base": str(base)}
    text, _ = command("show", tmp_path / "mine")
    assert f"{spec.parameters:,} parameters" in text and f"an adapter (LoRA) of {count:,} for {base}" in text


def test_show_tells_what_a_model_is_made_of_without_writing_anything(saved):
    text, data = command("show", saved["gemma3"][1])
    assert "family gemma" in text and f"{data['parameters']:,} parameters" in text
    assert "3 heads of 10, 1 for keys and values; rotation base 80" in text  # the one layer that sees everything
    assert "window of 5 tokens" in text and "shares its weights with embedding" in text
    assert "in no part: model.layers.(0-2).dropout" in text
    assert "every module is in a part" in command("show", saved["mixtral"][1])[0]
    assert data["family"] == "gemma" and data["parts"]["attention_1"]["num_heads"] == 3
    assert "in no part: transformer.drop" in command("show", saved["gpt2"][1])[0]
    assert not ModelRegistry().cache_dir.exists()


def test_parts_lists_them_of_one_type_or_all(saved):
    text, data = command("parts", saved["mixtral"][1], "--type", "gate", "--json")
    assert list(data) == ["gate_0", "gate_1", "gate_2"] and data["gate_0"]["output_dim"] == 4
    assert len(text.splitlines()) == 4 and "model.layers.2.mlp.gate" in text
    assert len(command("parts", saved["mixtral"][1])[1]) == 4 + 3 * 7
    with pytest.raises(ValueError, match="no type of part 'gates'"):
        command("parts", saved["mixtral"][1], "--type", "gates")


def test_a_command_takes_a_registered_id_and_reads_its_folder_anew_when_that_has_changed(saved, tmp_path):
    folder = Path(shutil.copytree(saved["llama"][1], tmp_path / "copy"))
    ModelRegistry().register("kept", folder)
    ModelRegistry().register("module", saved["gpt2"][0])
    assert command("show", "module")[1]["family"] == "gpt2"
    assert command("show", "kept")[1]["max_seq_len"] == 64
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    assert command("show", "kept")[1]["max_seq_len"] == 128
    with pytest.raises(FileNotFoundError, match="nowhere"):
        command("show", "nowhere")


def test_compare_tells_and_draws(saved, tmp_path):
    text, data = command("compare", saved["llama"][1], saved["gpt2"][1], "--plot", tmp_path / "new/both.png")
    assert data["families"] == ["llama", "gpt2"]
    assert "positions" in text and "rope" in text and "learned" in text
    assert "attention 0-2: size of a head: 10 and 8; heads of keys and values: 1 and 3; rotation: llama3" in text
    assert text.endswith(f"picture: {tmp_path / 'new/both.png'}")
    assert (tmp_path / "new/both.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="its name must end in"):
        command("compare", saved["llama"][1], saved["gpt2"][1], "--plot", tmp_path / "both.jpg")
    alike = command("compare", saved["llama"][1], saved["llama"][1])[0]
    assert "attention 0-2: 3 heads of 10" in alike and "do not (0):\n  nothing" in alike


def test_in_the_picture_widths_are_parameters_and_colours_are_what_layers_see(saved):
    spec = decompose(saved["gemma3"][0], "")
    layers = picture.layers_of(spec)
    kinds = [[piece.kind for piece in picture.boxes(spec, layer)][:2] for layer in layers]
    assert kinds == [
        ["attention, window", "feed-forward"],
        ["attention", "feed-forward"],
        ["attention, window", "feed-forward"],
    ]
    attention, ffn, *_ = picture.boxes(spec, layers[0])
    assert attention.parameters == ffn.left == spec.parts["attention_0"].parameters
    assert ffn.parameters == spec.parts["ffn_0"].parameters
    mixture = decompose(saved["mixtral"][0], "")
    used, resting = picture.boxes(mixture, picture.layers_of(mixture)[0])[1:3]
    experts = mixture.parts["experts_0"].parameters
    assert (used.kind, resting.kind) == ("feed-forward", "experts at rest")
    assert resting.parameters == experts // 2 and used.parameters == experts // 2 + mixture.parts["gate_0"].parameters


def test_in_the_picture_lines_join_what_fits(saved):
    from matplotlib.figure import Figure

    a, b = (decompose(saved[name][0], name) for name in ("gemma2", "gemma3"))
    for one, other, lines in ((a, a, 6), (b, b, 6), (a, b, 3)):
        axes, result = Figure().add_subplot(), comparison.compare(one, other)
        picture.join(axes, one, other, result)
        assert len(axes.lines) == lines  # of attention and feed-forward in three layers; norms of queries part a and b
    assert picture.verdict(result).startswith("Attention fits in 0 of 3 layers (norms of queries and keys: no and yes)")


@pytest.mark.parametrize(("a", "b"), [("mt5", "bert"), ("mixtral", "phimoe"), ("falcon", "gpt2")])
def test_any_two_models_can_be_drawn(saved, a, b):
    specs = [decompose(saved[name][0], name) for name in (a, b)]
    assert picture.as_picture(*specs, comparison.compare(*specs)).startswith(b"\x89PNG")
    nothing = decompose(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), "nothing with $dollars_ and 漢字" * 3)
    assert picture.as_picture(specs[0], nothing, comparison.compare(specs[0], nothing)).startswith(b"\x89PNG")


BARE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "peft", "bitsandbytes", "matplotlib", "huggingface_hub"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from registry.parts import ModelRegistry, run_compare
import argparse, pathlib
registry = ModelRegistry()
print(registry.register("m", sys.argv[1]).family.value, registry.get_module("m", "ffn_0").down_proj.weight.shape)
try:
    run_compare(argparse.Namespace(a=sys.argv[1], b=sys.argv[1], plot=pathlib.Path("x.png")))
except ValueError as error:
    print(error)
"""


OTHER_WIDTH = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "config",
    [
        transformers.OPTConfig(**OTHER_WIDTH, word_embed_proj_dim=16, ffn_dim=40),
        transformers.ElectraConfig(**OTHER_WIDTH, embedding_size=16, intermediate_size=40),
    ],
    ids=["opt", "electra"],
)
def test_the_width_of_a_model_is_not_that_of_its_embedding(config):
    spec = decompose(transformers.AutoModel.from_config(config), "x")
    assert (spec.hidden_dim, spec.parts["embedding"].output_dim) == (32, 16)


def test_nothing_optional_is_needed_for_a_covered_family(saved):
    run = [sys.executable, "-c", BARE, str(saved["llama"][1])]
    result = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines() == [
        "llama torch.Size([24, 40])",
        "a picture needs the package matplotlib: pip install matplotlib",
    ], result.stderr


def test_a_preset_and_the_test_model_are_taken_apart_without_any_files(tmp_path):
    text, data = command("compare", "gemma3-270m", "gemma3-1b", "--plot", tmp_path / "two.png")
    assert data["num_layers"] == [18, 26] and "268,098,176" in text and (tmp_path / "two.png").stat().st_size > 10_000
    assert command("show", "MiniLM")[1]["hidden_dim"] == 32
