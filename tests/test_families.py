"""families.py, and model.py's Llama block with it, against tiny random models of Transformers' own, one per family."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import families
from architecture import PRESETS
from lora import LoRAConfig, adapters_of, apply_lora, merge_lora
from model import GPT, GPTConfig, KVCache

V, T = 61, 23
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
# A head is not width / heads, there is one key head, and a window is shorter than the text.
SIZES = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 64,
    **NO_TOKENS,
}
GPT2 = {"vocab_size": V, "n_positions": 64, "n_embd": 24, "n_layer": 3, "n_head": 3, **NO_TOKENS}
LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0],
    "long_factor": [1, 1.5, 2.5, 4, 7, 12.0],
}
PHI = SIZES | {"hidden_size": 48, "partial_rotary_factor": 0.75, "rope_theta": 50.0}
del PHI["head_dim"]  # 16, of which 12 turn
GEMMA = SIZES | {"sliding_window": 5, "query_pre_attn_scalar": 17}
CASES = {
    "gpt2": ("GPT2", GPT2),
    "gpt2 untied": ("GPT2", GPT2 | {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "gelu"}),
    "llama 2": ("Llama", SIZES),
    "llama with biases": ("Llama", SIZES | {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama 3.1": (
        "Llama",
        SIZES
        | {"rope_theta": 50.0, "rope_scaling": LLAMA31 | {"original_max_position_embeddings": 32}}
        | {"tie_word_embeddings": True},
    ),
    "llama linear": ("Llama", SIZES | {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "mistral": ("Mistral", SIZES | {"sliding_window": 5}),
    "mistral without windows": ("Mistral", SIZES | {"sliding_window": None, "hidden_size": 25}),
    "qwen2": ("Qwen2", SIZES | {"tie_word_embeddings": True, "sliding_window": 5, "max_window_layers": 0}),  # not used
    "qwen2 windows": (
        "Qwen2",
        SIZES | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "hidden_size": 25},
    ),
    "qwen2 yarn": ("Qwen2", SIZES | {"rope_scaling": YARN, "rope_theta": 50.0}),
    "qwen2 yarn, all said": (
        "Qwen2",
        SIZES
        | {"rope_theta": 50.0}
        | {
            "rope_scaling": YARN
            | {"mscale": 1.2, "mscale_all_dim": 0.6, "beta_fast": 3, "beta_slow": 2, "truncate": False}
        },
    ),
    "qwen3": ("Qwen3", SIZES | {"tie_word_embeddings": True}),
    "qwen3 windows": ("Qwen3", SIZES | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", GEMMA | {"sliding_window_pattern": 2, "rope_theta": 80.0, "rope_local_base_freq": 20.0}),
    "gemma3 scaled": (
        "Gemma3Text",
        GEMMA
        | {
            "tie_word_embeddings": False,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 80.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
    ),
    "phi3": ("Phi3", PHI | {"sliding_window": 5, "partial_rotary_factor": 1.0, "resid_pdrop": 0.1}),
    "phi3 longrope": ("Phi3", PHI | {"original_max_position_embeddings": 16, "rope_scaling": LONG}),
    "phi3 longrope tied": (
        "Phi3",
        PHI | {"original_max_position_embeddings": 32, "rope_scaling": LONG, "tie_word_embeddings": True},
    ),
}


def theirs(name: str) -> transformers.PreTrainedModel:
    """A model in which every tensor matters: norms that are not one, biases that are not zero, logits of order one."""
    family, settings = CASES[name]
    # They change what they are given.
    config = getattr(transformers, f"{family}Config")(**json.loads(json.dumps(settings)))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() == 1 else 0.2))


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """Transformers' model and ours, loaded from what it saved."""
    reference, folder = theirs(request.param), tmp_path_factory.mktemp("model")
    reference.save_pretrained(folder)
    return reference, families.load_pretrained(folder), folder


def close(found, expected, tolerance=5e-5):
    """Most differ by less than 5e-6. LongRoPE's differ by 2e-5 where memory is aligned otherwise and sums reordered."""
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_logits_loss_and_every_hidden_state_are_transformers(pair):
    reference, model, _ = pair
    for length in (1, 12, T):  # below and above the window, and LongRoPE's original context
        x, states = tokens(2, length + 1, seed=length), []
        expected = reference(x, labels=x, output_hidden_states=True)
        logits, _ = model(x, x, hidden_states=states)
        close(logits, expected.logits)
        assert len(states) == len(expected.hidden_states) == model.config.n_layer + 1
        for found, state in zip(states, expected.hidden_states, strict=True):
            close(found, state)
    logits, loss = model(x[:, :-1], x[:, 1:])
    close(loss, F.cross_entropy(reference(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten()))


@torch.no_grad()
def test_greedy_text_is_transformers_token_for_token(pair):
    reference, model, _ = pair
    x = tokens(3, 9)
    real = torch.ones_like(x)  # said, or every 0 would be taken for padding
    expected = reference.generate(x, attention_mask=real, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert expected.shape == (3, 29)
    assert torch.equal(model.generate(x, 20, temperature=0), expected)
    assert torch.equal(model.generate(x, 20, temperature=0, use_cache=False), expected)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_position(pair, side):
    reference, model, _ = pair
    x, mask = tokens(3, T), torch.ones(3, T, dtype=torch.long)
    for row, padding in enumerate((0, 4, 15)):
        mask[row, slice(padding) if side == "left" else slice(T - padding, T)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = reference(x, attention_mask=mask, position_ids=positions).logits
    logits, _ = model(x, x, attention_mask=mask)
    real = mask.bool()
    close(logits[real], expected[real])
    assert logits.isfinite().all()
    if (model.config.rope_scaling or {}).get("rope_type") != "longrope":  # there the longest row decides for all
        close(logits[1][real[1]], model(x[1:2][:, real[1]], x[1:2][:, real[1]])[0][0])


@torch.no_grad()
def test_a_cache_fed_in_pieces_gives_the_logits_of_the_whole(pair):
    _, model, _ = pair
    x, mask = tokens(2, T), torch.ones(2, T, dtype=torch.long)
    mask[1, :4] = 0
    whole, _ = model(x, x, attention_mask=mask)
    cache, pieces, start = KVCache(model.config, 2, torch.device("cpu"), torch.float32, model.config.block_size), [], 0
    long = (model.config.rope_scaling or {}).get("rope_type") == "longrope"
    for end in (T,) if long else (7, 8, 9, 20, T):
        part = x[:, start:end]
        pieces.append(model(part, part, cache=cache, attention_mask=mask[:, :end])[0])
        start = end
    real = mask.bool()
    close(torch.cat(pieces, dim=1)[real], whole[real])


@torch.no_grad()
def test_padded_prompts_continue_as_they_do_alone(pair):
    _, model, _ = pair
    x = tokens(2, 12)
    mask = torch.ones_like(x)
    mask[1, 8:] = 0
    together = model.generate(x, 3, temperature=0, attention_mask=mask)[:, 12:]
    alone = [
        model.generate(row[None, : int(m.sum())], 3, temperature=0)[0, -3:] for row, m in zip(x, mask, strict=True)
    ]
    assert torch.equal(together, torch.stack(alone))
    mask[0, 10:] = 0  # no row without padding, which then counts for nothing, not for LongRoPE's switch either
    cached, fresh = (model.generate(x, 12, temperature=0, attention_mask=mask, use_cache=use) for use in (True, False))
    assert torch.equal(cached, fresh)


def test_the_spelling_of_transformers_4_is_read_as_that_of_5(pair, request):
    reference, model, folder = pair
    _, settings = CASES[request.node.callspec.params["pair"]]
    assert families.read_config({"model_type": reference.config.model_type, **settings}, "4") == model.config
    if model.config.block == "llama":
        assert "rope_parameters" in json.loads((folder / "config.json").read_text())


def write(model: GPT, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(families.hf_config(model.config) | NO_TOKENS))
    state = {name: tensor.contiguous() for name, tensor in families.hf_state(model).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def test_what_is_written_back_transformers_opens_as_the_same_model(pair, tmp_path):
    reference, model, _ = pair
    again, report = AutoModelForCausalLM.from_pretrained(write(model, tmp_path), output_loading_info=True)
    assert not any(report.values()), report
    assert again.config.model_type == reference.config.model_type
    again.set_attn_implementation("eager")
    for length in (12, T):
        close(again(tokens(2, length)).logits, reference(tokens(2, length)).logits)
    ours = families.load_pretrained(tmp_path)
    assert ours.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), model.parameters(), strict=True))


@torch.no_grad()
def test_in_bfloat16_logits_are_transformers_as_far_as_its_precision_goes(pair):
    reference, _, folder = pair
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    model = families.load_pretrained(folder, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    x = tokens(16, T)
    exact, expected, found = reference(x).logits, half(x).logits.float(), model(x, x)[0].float()
    assert (found - expected).abs().max() < 0.5 * exact.std()
    # What counts is to be no further from the exact numbers than theirs. The sums' order varies from run to run.
    assert (found - exact).square().mean() < 2 * (expected - exact).square().mean()


def test_gemma3_has_no_cap_on_attention_whatever_its_configuration_says(tmp_path):
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(**CASES["gemma3"][1], attn_logit_softcapping=1.0)
    model = transformers.Gemma3ForCausalLM(config).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    ours = families.load_pretrained(tmp_path).eval()
    assert ours.config.attention_softcap is None
    close(ours(tokens(2, T), tokens(2, T))[0], model(tokens(2, T)).logits)
    with pytest.raises(ValueError, match="no family"):
        families.hf_config(replace(ours.config, attention_softcap=1.0))


@pytest.mark.parametrize("content", [[1], {"lm_head.weight": 1.0}])
def test_a_bin_of_something_else_is_refused(copy, content):
    torch.save(content, copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="other than named tensors"):
        families.load_pretrained(copy, name="pytorch_model.bin")


@pytest.mark.parametrize("content", [[], {"lm_head.weight": 1}, None])
def test_an_index_that_names_no_files_is_refused(copy, content):
    name = "model.safetensors.index.json"
    (copy / name).write_text(json.dumps({"weight_map": content}))
    with pytest.raises(ValueError, match="is no index of weights"):
        families.load_pretrained(copy, name=name)


def gemma3_with_images() -> transformers.PreTrainedModel:
    text = json.loads(json.dumps(CASES["gemma3"][1]))
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    reference = transformers.Gemma3ForConditionalGeneration(config).eval()
    reference.set_attn_implementation("eager")
    randomise(reference)
    return reference


def test_gemma3_with_images_gives_its_text_model(tmp_path):
    reference = gemma3_with_images()
    reference.save_pretrained(tmp_path)
    model, x = families.load_pretrained(tmp_path), tokens(2, T)
    with torch.no_grad():
        close(model(x, x)[0], reference(x).logits)
    weights = load_file(tmp_path / "model.safetensors")
    assert any("vision_tower" in name for name in weights)
    newer = {name.replace("language_model.model.", "model.language_model."): w for name, w in weights.items()}
    assert newer.keys() != weights.keys()
    save_file(newer, tmp_path / "model.safetensors")
    assert same(families.load_pretrained(tmp_path), model)


def same(a: GPT, b: GPT) -> bool:
    return a.config == b.config and all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


# ---- configurations as they are published


def llama_like(kind: str, vocab: int, width: int, inner: int, layers: int, heads: int, kv: int, context: int, **more):
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings")
    sizes = dict(zip(names, (vocab, width, inner, layers, heads, kv, context), strict=True))
    usual = {"attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "use_cache": True}
    return {"model_type": kind, "initializer_range": 0.02, "torch_dtype": "bfloat16", **usual, **sizes, **more}


def gemma(
    vocab: int, width: int, inner: int, layers: int, heads: int, kv: int, context: int, kind="gemma3_text", **more
):
    soft = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "cache_implementation": "hybrid"}
    soft |= {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}
    both = llama_like(kind, vocab, width, inner, layers, heads, kv, context, rms_norm_eps=1e-6, **{**soft, **more})
    return {key: value for key, value in both.items() if key != "hidden_act"}


def gemma_with_images(**text):
    text |= {
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
        "model_type": "gemma3_text",
    }
    outer = {
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,
        "eos_token_id": [1, 106],
    }
    vision = {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model", "patch_size": 14}
    return {"model_type": "gemma3", "mm_tokens_per_image": 256, **outer, "text_config": text, "vision_config": vision}


PHI_KEYS = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
PHI_KEYS |= {"auto_map": {"AutoConfig": "x.Y"}, "original_max_position_embeddings": 4096, "attention_bias": False}
ROPE48 = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
ROPE3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
GEMMA1B = {"rope_local_base_freq": 10000, "rope_theta": 1000000, "sliding_window": 512, "rope_scaling": None}
QWEN = {"max_window_layers": 28, "use_sliding_window": False, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
PUBLISHED = {  # name: (config.json, parameters)
    "gpt2": (
        {"model_type": "gpt2", "activation_function": "gelu_new", "n_ctx": 1024, "n_embd": 768, "attn_pdrop": 0.1}
        | {"summary_type": "cls_index", "summary_first_dropout": 0.1, "task_specific_params": {"text-generation": {}}},
        124_439_808,
    ),
    "TinyLlama-1.1B": (
        llama_like("llama", 32000, 2048, 5632, 22, 32, 4, 2048, rms_norm_eps=1e-5, pretraining_tp=1, rope_scaling=None),
        1_100_048_384,
    ),
    "Llama-3.2-1B": (
        llama_like("llama", 128256, 2048, 8192, 16, 32, 8, 131072, rms_norm_eps=1e-5, rope_theta=500000.0)
        | {
            "head_dim": 64,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "rope_scaling": {**ROPE3, "rope_type": "llama3"},
        },
        1_235_814_400,
    ),
    "SmolLM2-135M": (
        llama_like("llama", 49152, 576, 1536, 30, 9, 3, 8192, rms_norm_eps=1e-5, rope_theta=100000.0)
        | {"is_llama_config": True, "rope_interleaved": False, "tie_word_embeddings": True, "pretraining_tp": 1},
        134_515_008,
    ),
    "Mistral-7B-v0.1": (
        llama_like("mistral", 32000, 4096, 14336, 32, 32, 8, 32768, rms_norm_eps=1e-5, sliding_window=4096),
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        llama_like("qwen2", 151936, 896, 4864, 24, 14, 2, 32768, tie_word_embeddings=True, use_mrope=False, **QWEN),
        494_032_768,
    ),
    "Qwen3-0.6B": (
        llama_like("qwen3", 151936, 1024, 3072, 28, 16, 8, 40960, tie_word_embeddings=True, head_dim=128, **QWEN)
        | {"sliding_window": None, "rope_scaling": None, "attention_bias": False},
        596_049_920,
    ),
    "gemma-2-2b": (
        gemma(256000, 2304, 9216, 26, 8, 4, 8192, "gemma2", attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
        | {"sliding_window": 4096, "rope_theta": 10000.0, "hidden_act": "gelu_pytorch_tanh"},
        2_614_341_888,
    ),
    "gemma3-270m": (
        gemma(262144, 640, 2048, 18, 4, 1, 32768, **GEMMA1B, use_bidirectional_attention=False)
        | {"_sliding_window_pattern": 6, "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3},
        268_098_176,
    ),
    "gemma3-1b": (gemma(262144, 1152, 6912, 26, 4, 1, 32768, **GEMMA1B, sliding_window_pattern=6), 999_885_952),
    "gemma3-4b": (gemma_with_images(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34), 3_880_263_168),
    "gemma3-12b": (
        gemma_with_images(hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16)
        | {"initializer_range": 0.02},
        11_766_034_176,
    ),
    "gemma3-27b": (
        gemma_with_images(
            head_dim=128,
            hidden_size=5376,
            intermediate_size=21504,
            num_attention_heads=32,
            num_hidden_layers=62,
            num_key_value_heads=16,
            query_pre_attn_scalar=168,
        ),
        27_009_346_304,
    ),
    "Phi-3-mini-4k": (
        llama_like("phi3", 32064, 3072, 8192, 32, 32, 32, 4096, sliding_window=2047, rope_scaling=None, **PHI_KEYS),
        3_821_079_552,
    ),
    "Phi-4-mini": (
        llama_like("phi3", 200064, 3072, 8192, 32, 24, 8, 131072, sliding_window=262144, **PHI_KEYS)
        | {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}
        | {"partial_rotary_factor": 0.75, "rope_scaling": ROPE48, "tie_word_embeddings": True},
        3_836_021_760,
    ),
}
PUBLISHED["gemma3-12b"][0]["text_config"]["num_key_value_heads"] = 8


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_read_as_transformers_reads_it(name, tmp_path):
    hf, count = PUBLISHED[name]
    config = families.read_config(hf, name)
    with torch.device("meta"):
        assert GPT(config).num_params() == count
    rest = json.loads(json.dumps({key: value for key, value in hf.items() if key != "model_type"}))
    transformers.AutoConfig.for_model(hf["model_type"], **rest).save_pretrained(tmp_path)  # as version 5 spells it
    assert families.read_config(json.loads((tmp_path / "config.json").read_text()), name) == config
    if name in PRESETS:
        assert config == families.plain(PRESETS[name])
    written = families.hf_config(config)
    assert families.read_config(json.loads(json.dumps(written)), name) == config
    transformers.AutoConfig.for_model(**written).save_pretrained(tmp_path)
    assert families.read_config(json.loads((tmp_path / "config.json").read_text()), name) == config


@pytest.mark.parametrize(
    ("name", "billions"),
    [("270m", 0.2681), ("1b", 0.9999), ("4b", 3.88), ("12b", 11.77), ("27b", 27.01)],
)
def test_the_presets_of_gemma3_have_its_sizes(name, billions):
    with torch.device("meta"):
        count = GPT(PRESETS[f"gemma3-{name}"]).num_params()
    digits = len(str(billions).split(".")[1])
    assert round(count / 1e9, digits) == billions


LLAMA = {"model_type": "llama", **SIZES}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba"}, "model_type mamba; those that load here are gpt2, llama"),
        ({"clip_qkv": 8.0, "some_switch": True, "off": False}, "clip_qkv=8.0; some_switch=True"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_act": "relu2"}, "hidden_act=relu2"),
        ({"attention_bias": True}, "mlp_bias=False, but bias=True elsewhere"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"is_causal": False}, "is_causal=False"),
        ({"sliding_window": 5}, "sliding_window=5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "rope_type=proportional"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling of type linear needs factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling of type llama3 needs low_freq_factor; rope_scaling of type llama3 needs high",
        ),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3]}}, "mrope_section"),
        ({"rope_scaling": {**YARN, "some_factor": 3}}, "a yarn scaling with some_factor=3"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 32}, "original_max_position_embeddings=32, but 16"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"num_attention_heads": "many"}, "config.json: "),
        ({"rope_scaling": [1]}, "config.json: "),
        ({"num_key_value_heads": 2}, "n_head=3 must be a multiple of n_kv_head=2"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias=True"),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["chunked_attention"] * 3}, "chunked"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2}},
            },
            "rope_parameters with rope_type=linear; rope_parameters with factor=2",
        ),
        ({"model_type": "phi3", "rope_scaling": {**LONG, "long_mscale": 1.2}}, "long_mscale=1.2"),
        ({"model_type": "phi3", "hidden_size": 48, "rope_scaling": LONG}, "short_factor has 6 numbers for 5 pairs"),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"model_type": "gpt2", "reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True"),
        (
            {"model_type": "gpt2", "add_cross_attention": True, "rope_theta": 5.0},
            "add_cross_attention=True; rope_theta",
        ),
    ],
)
def test_what_gpt_does_not_compute_is_refused_with_key_and_value(changes, words):
    with pytest.raises(ValueError, match=r"config\.json") as error:
        families.read_config(LLAMA | changes, "config.json")
    assert words in str(error.value)


def test_a_runs_own_settings_in_a_config_json_are_ignored_when_they_are_named():
    hf = LLAMA | {"learning_rate": 1e-3, "dataset": "novels"}
    with pytest.raises(ValueError, match=r"learning_rate=0\.001; dataset=novels"):
        families.read_config(hf, "config.json")
    ours, plain = ["learning_rate", "dataset"], families.read_config(LLAMA, "config.json")
    assert families.read_config(hf, "config.json", ours) == plain
    assert families.read_config(hf | {"run_keys": ours}, "config.json") == plain


def test_a_model_that_no_family_has_is_not_written():
    for odd in ({"qk_norm": True, "qkv_bias": True}, {"rotary_share": 0.5, "qk_norm": True}, {"logit_softcap": 3.0}):
        with pytest.raises(ValueError, match=f"no family.* {next(iter(odd))}="):
            families.hf_config(GPTConfig(block="llama", activation="silu", bias=False, **odd))
    # Transformers' Phi-3 counts LongRoPE's factors by width / heads.
    config = theirs("phi3 longrope").config
    ours = families.read_config(config.to_dict() | NO_TOKENS, "config.json")
    narrow = {key: ours.rope_scaling[key][:2] for key in ("short_factor", "long_factor")}
    with pytest.raises(ValueError, match="no family"):
        families.hf_config(replace(ours, head_size=4, rotary_share=1.0, rope_scaling={**ours.rope_scaling, **narrow}))


def test_every_preset_is_written_also_with_whole_numbers_for_fractions(tmp_path):
    for name, config in PRESETS.items():
        assert families.read_config(families.hf_config(config), name) == families.plain(config)
    config = replace(PRESETS["gemma3-270m"], qk_norm=False, rope_local_theta=None, rope_theta=10000)
    config = replace(config, attention_softcap=50, logit_softcap=30, query_scalar=224.0)
    hf = families.hf_config(config)
    assert hf["model_type"] == "gemma2"
    assert transformers.AutoConfig.for_model(**hf).attn_logit_softcapping == 50.0


def test_a_cropped_context_does_not_change_what_scaled_rotations_are_multiplied_by(tmp_path):
    reference = theirs("phi3 longrope")
    reference.save_pretrained(tmp_path)
    model = families.load_pretrained(tmp_path)
    model.crop_block_size(24)
    again = AutoModelForCausalLM.from_pretrained(write(model, tmp_path / "cropped"), attn_implementation="eager")
    assert again.config.max_position_embeddings == 24
    with torch.no_grad():
        close(again(tokens(2, T)).logits, reference(tokens(2, T)).logits)


# ---- files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    theirs("llama 3.1").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def change(folder: Path, change) -> Path:
    """Let `change` alter the folder's tensors."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("safe", [True, False])
def test_one_file_or_shards_safetensors_or_bin_are_the_same_model(saved, tmp_path, shards, safe):
    weights, ending = load_file(saved / "model.safetensors"), "safetensors" if safe else "bin"
    stem, index = ("model" if safe else "pytorch_model"), {}
    for i in range(shards):
        part = {name: weights[name] for name in list(weights)[i::shards]}
        name = f"{stem}.{ending}" if shards == 1 else f"{stem}-{i + 1:05}-of-{shards:05}.{ending}"
        index |= dict.fromkeys(part, name)
        save_file(part, tmp_path / name) if safe else torch.save(part, tmp_path / name)
    if shards > 1:
        (tmp_path / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    shutil.copy(saved / "config.json", tmp_path)
    assert same(families.load_pretrained(tmp_path), families.load_pretrained(saved))
    if shards > 1:
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            families.load_pretrained(tmp_path)


def test_missing_unexpected_and_misshapen_tensors_are_named_together(copy):
    def spoil(weights):
        del weights["model.norm.weight"]
        weights["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
        weights["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(10, 25)

    with pytest.raises(ValueError, match="does not hold the model") as error:
        families.load_pretrained(change(copy, spoil))
    for words in (
        "model.norm.weight is missing",
        "model.layers.9.mlp.up_proj.weight is unexpected",
        "model.layers.0.self_attn.k_proj.weight is (10, 25) where the model has (10, 24)",
    ):
        assert words in str(error.value)


def test_a_second_head_of_a_tied_model_must_be_the_embedding(copy):
    model = families.load_pretrained(copy)
    embedding = model.embedding.weight.detach().clone()
    assert same(
        families.load_pretrained(change(copy, lambda weights: weights.update({"lm_head.weight": embedding}))), model
    )
    with pytest.raises(ValueError, match="lm_head shares the token embedding"):
        families.load_pretrained(change(copy, lambda weights: weights["lm_head.weight"].add_(1e-3)))


def test_buffers_of_old_files_are_left_out_on_purpose(copy):
    model = families.load_pretrained(copy)
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(5) for i in range(3)}
    assert same(families.load_pretrained(change(copy, lambda weights: weights.update(old))), model)


def test_the_hubs_gpt2_has_no_prefix_and_causal_masks_beside_its_tensors(tmp_path):
    theirs("gpt2").save_pretrained(tmp_path)
    model = families.load_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril().byte() for i in range(3)}
    weights |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    save_file(weights, tmp_path / "model.safetensors")
    assert same(families.load_pretrained(tmp_path), model)


@torch.no_grad()
def test_a_gpt2_without_biases_has_zero_ones_outside_and_none_here(tmp_path):
    model = GPT(GPTConfig(64, V, 2, 3, 24, bias=False, dropout=0.1)).eval()
    randomise(model)
    again, report = AutoModelForCausalLM.from_pretrained(write(model, tmp_path), output_loading_info=True)
    assert not any(report.values()) and again.config.resid_pdrop == 0.1
    close(again(tokens(2, T)).logits, model(tokens(2, T), tokens(2, T))[0])
    ours = families.load_pretrained(tmp_path)
    assert ours.config == replace(model.config, dropout=0.0)
    assert same(ours, GPT(ours.config)) is False and torch.equal(ours.lm_head.weight, model.lm_head.weight)
    change(tmp_path, lambda weights: weights["transformer.h.1.mlp.c_fc.bias"].add_(1))
    with pytest.raises(ValueError, match=r"no biases, but transformer\.h\.1\.mlp\.c_fc\.bias is not zero"):
        families.load_pretrained(tmp_path)


def test_the_dtype_is_the_files_unless_another_is_asked_for(saved, tmp_path):
    shutil.copy(saved / "config.json", tmp_path)
    weights = {name: tensor.half() for name, tensor in load_file(saved / "model.safetensors").items()}
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, tmp_path / "model.safetensors")
    assert {p.dtype for p in families.load_pretrained(tmp_path).parameters()} == {torch.float16}
    assert {p.dtype for p in families.load_pretrained(tmp_path, torch.float32).parameters()} == {torch.float32}
    assert {p.device.type for p in families.load_pretrained(tmp_path, device="meta").parameters()} == {"meta"}
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj\.weight in torch\.int8"):
        families.load_pretrained(tmp_path)


def test_every_parameter_is_trainable_has_memory_of_its_own_and_outlives_the_file(copy):
    model = families.load_pretrained(copy)
    before = model.embedding.weight.detach().clone()
    path = copy / "model.safetensors"
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(model.embedding.weight, before)
    parameters = list(model.parameters())
    assert all(p.requires_grad and p.is_contiguous() for p in parameters)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in parameters)
    assert model.lm_head.weight is model.embedding.weight


def test_damaged_files_are_refused_by_name(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is no sound"):
        families.load_pretrained(copy)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has none of model\.safetensors"):
        families.load_pretrained(copy)
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x02cposix\nsystem\n(X\x04\x00\x00\x00truetR.")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin does not load as tensors alone"):
        families.load_pretrained(copy)
    (copy / "config.json").write_text("[1")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        families.load_pretrained(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        families.load_pretrained(copy)


def test_an_index_that_names_files_elsewhere_is_refused(copy):
    (copy / "model.safetensors").rename(copy.parent / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"\.\./elsewhere"):
        families.load_pretrained(copy)


def test_a_hub_id_is_looked_up_in_the_cache_and_what_would_download_it_is_said(saved, monkeypatch):
    asked = []

    def snapshot_download(name, *, revision, local_files_only, allow_patterns):
        asked.append((name, revision, local_files_only))
        if name != "some/model":
            raise FileNotFoundError("not cached")
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    found = families.load_pretrained("some/model", revision="abc", local_files_only=False)
    assert same(found, families.load_pretrained(saved))
    assert asked == [("some/model", "abc", False)]
    with pytest.raises(FileNotFoundError, match=r"other/model is no folder.*local_files_only=False would download it"):
        families.load_pretrained("other/model")
    with pytest.raises(FileNotFoundError, match="there is no folder /no/such"):
        families.load_pretrained("/no/such")


MEMORY = """
import re, sys
import families
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
families.load_pretrained(sys.argv[2])  # what loading anything at all costs
before = peak()
model = families.load_pretrained(sys.argv[1])
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measured with /proc")
def test_loading_takes_little_more_memory_than_the_model(saved, tmp_path):
    model = GPT(GPTConfig(64, 4000, 4, 8, 1024, block="llama", activation="silu", bias=False)).half()  # 150 MB
    write(model, tmp_path)
    del model
    command = [sys.executable, "-c", MEMORY, str(tmp_path), str(saved)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(families.__file__).parent, check=True)
    assert 0.9 < float(result.stdout) < 1.2


# ---- LoRA


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("all-linear", 7),
        (["q_proj", "v_proj"], 2),
        (".*/attn/(q_einsum|kv_einsum|attn_vec_einsum)", 4),
        (["q_einsum", "gate_proj"], 2),
    ],
)
@pytest.mark.parametrize("case", ["llama 3.1", "gemma3"])
def test_a_loaded_model_takes_lora_learns_merges_and_is_written_back(case, targets, layers, tmp_path):
    theirs(case).save_pretrained(tmp_path)
    model, x = families.load_pretrained(tmp_path), tokens(4, T)
    apply_lora(model, LoRAConfig(rank=2, targets=targets))
    assert len(adapters_of(model, None)) == 3 * layers
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(3):
        loss = model(x[:, :-1], x[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    with pytest.raises(ValueError, match="merge adapters first"):
        families.hf_state(model)
    merge_lora(model)
    again = AutoModelForCausalLM.from_pretrained(write(model, tmp_path / "merged"), attn_implementation="eager")
    with torch.no_grad():
        close(again(x).logits, model(x, x)[0])
