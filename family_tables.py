"""What sets Hugging Face's families apart: how the keys of each one's config.json and its tensors correspond to ours.

To add a family is to add an entry to FAMILIES; families.py reads and writes what stands here. The numbers are the
defaults of Transformers 5.23 (models/*/configuration_*.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from architecture import ORIGINAL, ROPE_OPTIONS, ROPE_TYPES


@dataclass(frozen=True)
class Family:
    architecture: str
    fields: Mapping[str, str]  # key of config.json: field of GPTConfig; two keys of one field must agree
    defaults: Mapping[str, Any]  # of these and other keys that are read, where a config.json leaves them out
    always: Mapping[str, Any] = field(default_factory=dict)  # fields of GPTConfig that no key decides
    only: Mapping[str, Any] = field(default_factory=dict)  # more such keys as in ONLY
    neutral: tuple[str, ...] = ()  # keys that change nothing; see NEUTRAL
    dropouts: tuple[str, ...] = ("attention_dropout",)  # written; not read, for dropout is a run's choice
    ropes: tuple[str, ...] = ("default", "linear", "llama3", "yarn")  # see ROPES
    partial_rotary: bool = False
    windows: Callable[[Mapping, int], bool] | None = None  # whether a layer has one, where no layer_types say it
    divisible: bool = False  # Transformers wants a width that is a multiple of the heads
    transposed: tuple[str, ...] = ()  # layers whose weights are stored (in, out)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # layer there: layers here, one below the other
    biases: bool = False  # stored even where there are none here, as zeros
    renamed: Mapping[str, str] = field(default_factory=dict)  # patterns of other names a tensor goes by
    dropped: str = r"(^|\.)rotary_emb\.inv_freq$"  # tensors left out on purpose: what is computed here


LLAMA = {
    "max_position_embeddings": "block_size",
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "hidden_size": "n_embd",
    "head_dim": "head_size",
    "intermediate_size": "n_inner",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "hidden_act": "activation",
}
GEMMA = {key: name for key, name in LLAMA.items() if key != "hidden_act"} | {
    "hidden_activation": "activation",
    "query_pre_attn_scalar": "query_scalar",
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logit_softcap",
}
NO_BIAS = {"block": "llama", "bias": False}
GEMMA_ALWAYS = NO_BIAS | dict.fromkeys(("scaled_embeddings", "norm_plus_one", "post_norms"), True)
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")


def _defaults(*sizes: Any, **others: Any) -> dict[str, Any]:
    return dict(zip(SIZES, sizes, strict=True)) | others


SUMMARY = tuple(f"summary_{key}" for key in ("type", "use_proj", "proj_to_labels", "first_dropout", "activation"))
IMAGE = ("boi_token_index", "eoi_token_index", "image_token_index")
QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
GEMMA_MORE = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}
GEMMA_MORE |= {"sliding_window": 4096, "layer_types": None}
FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd", "n_inner", "tie_word_embeddings")}
        | {"n_positions": "block_size", "layer_norm_epsilon": "norm_eps", "activation_function": "activation"}
        | {"bias": "bias"},  # not Transformers': it always has biases, which are zeros where this is false
        {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None}
        | {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "bias": True},
        only={"scale_attn_weights": True},
        neutral=("n_ctx", "task_specific_params", *SUMMARY),
        dropouts=("attn_pdrop", "resid_pdrop", "embd_pdrop"),
        ropes=(),
        transposed=("c_attn", "c_proj", "c_fc"),
        biases=True,
        dropped=r"\.attn\.(masked_)?bias$",  # the causal mask
    ),
    "llama": Family(
        "LlamaForCausalLM",
        LLAMA | {"attention_bias": "bias", "mlp_bias": "bias"},
        _defaults(32000, 4096, 11008, 32, 32, None, None, 2048, 1e-6, False, hidden_act="silu")
        | {"attention_bias": False, "mlp_bias": False},
        {"block": "llama"},
        only={"pretraining_tp": 1},
        divisible=True,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        LLAMA,
        _defaults(32000, 4096, 14336, 32, 32, 8, None, 131072, 1e-6, False, hidden_act="silu", sliding_window=4096),
        NO_BIAS,
        windows=lambda values, layer: True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        LLAMA,
        _defaults(151936, 4096, 22016, 32, 32, 32, None, 32768, 1e-6, False, hidden_act="silu", **QWEN_WINDOWS),
        NO_BIAS | {"qkv_bias": True},
        windows=lambda values, layer: layer >= values["max_window_layers"],
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        LLAMA,
        _defaults(151936, 4096, 22016, 32, 32, 32, 128, 32768, 1e-6, False, hidden_act="silu", **QWEN_WINDOWS),
        NO_BIAS | {"qk_norm": True},
        windows=lambda values, layer: layer >= values["max_window_layers"],
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        GEMMA,
        _defaults(256000, 2304, 9216, 26, 8, 4, 256, 8192, 1e-6, True, **GEMMA_MORE)
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        GEMMA_ALWAYS,
        neutral=("hidden_act", "sliding_window_size"),  # older names, which Transformers does not read
        windows=lambda values, layer: layer % 2 == 0,
        divisible=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {key: name for key, name in GEMMA.items() if key != "attn_logit_softcapping"},
        _defaults(262208, 2304, 9216, 26, 8, 4, 256, 131072, 1e-6, True, **GEMMA_MORE)
        | {"final_logit_softcapping": None, "sliding_window_pattern": 6}
        | {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        GEMMA_ALWAYS | {"qk_norm": True},
        # Transformers keeps the cap that Gemma 2 has, and does not compute it.
        neutral=("attn_logit_softcapping", "_sliding_window_pattern", "mm_tokens_per_image", *IMAGE),
        windows=lambda values, layer: (layer + 1) % values["sliding_window_pattern"] != 0,
        divisible=True,
        renamed={r"^(language_model\.model|model\.language_model)\.": "model.", r"^language_model\.lm_head": "lm_head"},
        dropped=r"(^|\.)rotary_emb\.inv_freq$|^(model\.)?(vision_tower|multi_modal_projector)\.",
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        LLAMA,
        _defaults(32064, 3072, 8192, 32, 32, None, None, 4096, 1e-5, False, hidden_act="silu", sliding_window=None)
        | {"original_max_position_embeddings": 4096},
        NO_BIAS,
        only={"full_attn_mod": 1, "interpolate_factor": 1},
        dropouts=("attention_dropout", "resid_pdrop", "embd_pdrop"),
        ropes=("default", "longrope"),
        partial_rotary=True,
        windows=lambda values, layer: True,
        fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
    ),
}
WRAPPER = "gemma3"  # with images: its text model is a gemma3_text
ONLY = {"is_causal": True}  # in every family, keys with the one value that GPT computes
NEUTRAL = {  # in any family: who made a file and how, how a training starts, what text is to be made
    "architectures", "auto_map", "_name_or_path", "transformers_version", "dtype", "torch_dtype", "model_type",
    "tokenizer_class", "problem_type", "id2label", "label2id", "_num_labels", "return_dict", "output_past", "prefix",
    "transformers.js_config", "unsloth_fixed", "unsloth_version", "predict_special_tokens", "max_sequence_length",
    "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "cache_implementation", "initializer_range",
    "_attn_implementation", "_attn_implementation_autoset", "gradient_checkpointing", "do_sample", "early_stopping",
    "is_llama_config", "output_hidden_states", "output_attentions",
    "max_length", "min_length", "max_new_tokens", "temperature", "top_k", "top_p", "num_beams", "repetition_penalty",
    "num_return_sequences", "length_penalty", "no_repeat_ngram_size",
}  # fmt: skip
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}  # there: here
ACTIVATIONS |= {"gelu_new": "gelu_tanh", "swish": "silu"}  # read, not written
ROPES = {"default": ()}  # the numbers of each kind of scaling; their names there and here are the same
ROPES |= {kind: needed + ROPE_OPTIONS[kind] for kind, needed in ROPE_TYPES.items()}
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", ORIGINAL)
