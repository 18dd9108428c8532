"""One module of a model described: its sizes, heads, rotation, window, activation. And what a configuration says.

Sizes come from the shapes of the weights wherever these tell, for a configuration may leave them out or be wrong about
them; numbers that shapes do not hold (RoPE, windows, activations) come from the configuration.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

import families
import family_tables
from model import GPTConfig
from registry.specs import PartSpec, PartType

# The layers of an attention that make queries, keys and values, and the one behind it; of an FFN, the way back from
# the inner width, and what only a gated one has.
QUERIES = ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "q_attn", "query_key_value")
QUERIES += ("query", "key", "value", "q", "k", "v", "q_lin", "k_lin", "v_lin")
OUTPUTS = ("o_proj", "c_proj", "out_proj", "dense", "o", "out_lin")
DOWN = ("down_proj", "c_proj", "fc2", "w2", "dense_4h_to_h", "wo", "lin2", "linear2")
GATED = ("gate_proj", "gate_up_proj", "w3", "wi_1")
# What goes by several names has the one that families.py writes.
USUAL_NAMES = {ours: theirs for theirs, ours in reversed(family_tables.ACTIVATIONS.items())}


def attribute(module: Any, path: str) -> Any:
    """What a dotted path leads to from a module, or None."""
    for name in path.split("."):
        if isinstance(module, nn.ModuleList):
            module = module[int(name)] if name.isdigit() and int(name) < len(module) else None
        else:
            module = getattr(module, name, None)
    return module


def first_of(values: Mapping[str, Any], *keys: str) -> Any:
    return next((values[key] for key in keys if values.get(key) is not None), None)


# ---- what a configuration says


def configuration(model: nn.Module) -> dict[str, Any]:
    """The configuration of a model, of its text model if it has several, in Transformers' keys; {} if it has none."""
    config = getattr(model, "config", None)
    if isinstance(config, GPTConfig):
        return _of_gpt(config)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    if hasattr(config, "to_dict"):
        return config.to_dict()
    return dict(config) if isinstance(config, Mapping) else dict(getattr(config, "__dict__", {}))


def _of_gpt(config: GPTConfig) -> dict[str, Any]:
    keys = {ours: theirs for theirs, ours in family_tables.GEMMA.items()}
    values = {keys[name]: value for name, value in vars(config).items() if name in keys}
    values |= {"hidden_activation": USUAL_NAMES[config.activation], "scaled_embeddings": config.scaled_embeddings}
    if config.block == "gpt2":
        return values
    local = [config.is_local(layer) for layer in range(config.n_layer)]
    wide = {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    wide |= {"partial_rotary_factor": config.rotary_share}
    narrow = {"rope_type": "default", "rope_theta": config.rope_local_theta} if config.rope_local_theta else wide
    return values | {
        "sliding_window": config.sliding_window,
        "layer_types": ["sliding_attention" if windowed else "full_attention" for windowed in local],
        "rope_parameters": {"full_attention": wide, "sliding_attention": narrow},
    }


def model_type(model: nn.Module) -> str | None:
    """What the configuration calls the model's kind; of a GPT, that of the first family that computes the same, unless
    it knows of another one (GPTConfig.family). None where nothing is said, or no family computes what a GPT does."""
    config = getattr(model, "config", None)
    if not isinstance(config, GPTConfig):
        return configuration(model).get("model_type")
    try:
        return families.hf_config(config)["model_type"]
    except ValueError:
        return None


def width_of(values: Mapping[str, Any]) -> int | None:
    return first_of(values, "hidden_size", "n_embd", "d_model", "dim")


def heads_of(values: Mapping[str, Any]) -> int | None:
    return first_of(values, "num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")


def context_of(values: Mapping[str, Any]) -> int | None:
    return first_of(values, "max_position_embeddings", "n_positions", "seq_length")


def window_of(values: Mapping[str, Any], layer: int) -> int | None:
    """How many tokens a layer's queries see, None for all."""
    kinds = first_of(values, "layer_types", "attention_layers") or ()  # the second in GPT-Neo's files
    local = layer >= len(kinds) or kinds[layer] in ("sliding_attention", "local")
    if values.get("use_sliding_window") is False or not local:
        return None
    return first_of(values, "sliding_window", "window_size" if "attention_layers" in values else "") or None


def rope_of(values: Mapping[str, Any], layer: int) -> dict[str, Any] | None:
    """The rotation of a layer's queries and keys: rope_type, rope_theta and the numbers of its scaling.

    Transformers 5 has rope_parameters, by kind of layer where kinds differ; 4 has rope_theta and rope_scaling.
    """
    rope, kinds = dict(values.get("rope_parameters") or {}), values.get("layer_types") or ()
    if any(isinstance(value, Mapping) for value in rope.values()):
        rope = dict(rope.get(kinds[layer] if layer < len(kinds) else "full_attention") or {})
    if not rope and values.get("rope_theta"):
        rope = {**(values.get("rope_scaling") or {}), "rope_theta": values["rope_theta"]}
        rope.setdefault("partial_rotary_factor", values.get("partial_rotary_factor"))
    if not rope.get("rope_theta"):
        return None
    rope = {"rope_type": rope.pop("type", "default"), **rope, "rope_theta": float(rope["rope_theta"])}
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    return {key: rope[key] for key in sorted(rope) if rope[key] is not None}


def activation_of(values: Mapping[str, Any]) -> str | None:
    keys = ("hidden_activation", "hidden_act", "activation_function", "activation", "dense_act_fn")
    name = first_of(values, *keys)
    return USUAL_NAMES.get(family_tables.ACTIVATIONS.get(name), name) if isinstance(name, str) else None


# ---- what a module is


def describe(model: nn.Module, path: str, kind: PartType, place: str, layer: int | None) -> PartSpec:
    """What can be told of the module at `path`: all but what it holds, which is counted when all parts are known."""
    module, values = model.get_submodule(path), configuration(model)
    part = PartSpec(kind, layer, path, None, None, extra_info={"place": place, "class": type(module).__name__})
    if kind is PartType.ATTENTION:
        _describe_attention(part, module, values)
    elif kind in (PartType.FFN, PartType.EXPERT):
        _describe_ffn(part, module, values)
    elif kind is PartType.LAYER_NORM:
        _describe_norm(part, module)
    elif kind is PartType.ROTARY_EMB:
        sizes = [buffer.numel() for name, buffer in module.named_buffers() if name.endswith("inv_freq")]
        part.input_dim = part.output_dim = 2 * sizes[0] if sizes else None
        ropes = [rope_of(values, layer) for layer in range(values.get("num_hidden_layers") or 1)]
        part.extra_info["ropes"] = [rope for i, rope in enumerate(ropes) if rope not in ropes[:i]]
    elif kind is PartType.EMBEDDING:
        part.input_dim, part.output_dim = features(module)
        part.extra_info["scaled"] = hasattr(module, "embed_scale") or bool(values.get("scaled_embeddings"))
    elif kind is not PartType.FULL_LAYER:  # a gate or a head
        part.input_dim, part.output_dim = features(module)
        part.extra_info["bias"] = getattr(module, "bias", None) is not None
    if kind is PartType.OUTPUT_HEAD:
        linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        if part.input_dim is None and linear:  # a head of several layers, as BERT's
            part.input_dim, part.output_dim = features(linear[0])[0], features(linear[-1])[1]
        part.extra_info["softcap"] = values.get("final_logit_softcapping")
    if part.input_dim is None and kind in (PartType.ATTENTION, PartType.FFN, PartType.EXPERT, PartType.FULL_LAYER):
        part.input_dim = part.output_dim = width_of(values)
    return part


def _describe_attention(part: PartSpec, module: nn.Module, values: Mapping[str, Any]) -> None:
    """Queries, keys and values have (H + 2 K) * D rows, together or apart, and what is behind reads H * D."""
    reads, writes = list(_called(module, QUERIES)), next(_called(module, OUTPUTS), None)
    query_norm = attribute(module, "q_norm") or attribute(module, "q_layernorm")
    heads = heads_of(vars(module)) or heads_of(values)
    info = part.extra_info
    if reads and writes is not None and None not in (*features(writes), *features(reads[0])):
        width, rows = features(writes)[0], sum(features(layer)[1] for layer in reads)
        if heads is None and query_norm is not None:
            heads = width // query_norm.weight.numel()
        part.input_dim, part.output_dim = features(reads[0])[0], features(writes)[1]
        if heads:
            part.head_dim = width // heads
            info["num_kv_heads"] = (rows - width) // (2 * part.head_dim)
        info["qkv_bias"] = any(getattr(layer, "bias", None) is not None for layer in reads)
        info["out_bias"] = getattr(writes, "bias", None) is not None
    elif heads:
        width = first_of(vars(module), "embed_dim", "hidden_size") or width_of(values)
        part.head_dim = first_of(values, "head_dim", "d_kv") or (width // heads if width else None)
        info["num_kv_heads"] = first_of(values, "num_key_value_heads", "num_kv_heads") or heads
    part.num_heads = heads
    info |= {"qk_norm": query_norm is not None, "softcap": values.get("attn_logit_softcapping")}
    scale = getattr(module, "scaling", None)  # of the scores, as Transformers computes them
    scalar = round(scale**-2, 6) if isinstance(scale, float) and scale > 0 else None
    info["query_scalar"] = scalar or values.get("query_pre_attn_scalar") or part.head_dim
    info |= {"rope": rope_of(values, part.layer_idx or 0), "sliding_window": window_of(values, part.layer_idx or 0)}


def _describe_ffn(part: PartSpec, module: nn.Module, values: Mapping[str, Any]) -> None:
    info = part.extra_info
    info["activation"] = activation_of(values)
    experts = getattr(module, "experts", None)
    one = module if experts is None else experts[0] if isinstance(experts, nn.ModuleList) else experts
    packed, down = getattr(one, "down_proj", None), next(_called(one, DOWN), None)
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    info["gated"] = any(name.rpartition(".")[2] in GATED for name, _ in (*one.named_modules(), *one.named_parameters()))
    if isinstance(packed, Tensor):
        info["num_experts"], *sizes = packed.shape  # out and in, or in and out as gpt-oss has them
        turned = sizes[1] == width_of(values) != sizes[0]
        part.output_dim, part.intermediate_dim = reversed(sizes) if turned else sizes
        part.input_dim = part.output_dim
    elif down is not None and down is not module:
        part.intermediate_dim, part.output_dim = features(down)
        part.input_dim = part.output_dim
        info["bias"] = getattr(down, "bias", None) is not None
    elif len(linear) == 1:  # half of one
        part.input_dim, part.output_dim = features(linear[0])
    if isinstance(experts, nn.ModuleList):
        info["num_experts"] = len(experts)
    if info.get("num_experts"):
        info["experts_per_token"] = first_of(values, "num_experts_per_tok", "num_experts_per_token")


def _describe_norm(part: PartSpec, module: nn.Module) -> None:
    kind, weight = type(module).__name__, getattr(module, "weight", None)
    part.input_dim = part.output_dim = weight.numel() if weight is not None else None
    root_mean_square = "RMS" in kind or kind == "T5LayerNorm"
    part.extra_info["norm"] = "rmsnorm" if root_mean_square else "layernorm" if "LayerNorm" in kind else kind
    part.extra_info["eps"] = first_of(vars(module), "eps", "variance_epsilon", "epsilon")
    part.extra_info["bias"] = getattr(module, "bias", None) is not None
    if isinstance(plus_one := getattr(module, "plus_one", None), bool):
        part.extra_info["plus_one"] = plus_one


def _called(module: nn.Module, names: Collection[str]) -> Iterator[nn.Module]:
    """The modules in `module`, however deep, whose own name is one of `names`."""
    return (child for path, child in module.named_modules() if path.rpartition(".")[2] in names)


def features(module: nn.Module) -> tuple[int | None, int | None]:
    """Input and output size of a layer with one matrix, stored as (out, in), or (in, out) as GPT-2's Conv1D has it."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(getattr(module, "in_features", None), int):  # also where weights are packed in fewer bits
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 2:
        return None, None
    return tuple(weight.shape) if is_transposed(module) else tuple(weight.shape)[::-1]


def is_transposed(module: nn.Module) -> bool:
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)  # Transformers', which may not be installed


def oriented(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a module by name, matrices as (out, in) even where they are stored turned."""
    turned = {path for path, child in module.named_modules() if is_transposed(child)}
    return {
        name: tensor.t() if name.rpartition(".")[0] in turned and tensor.dim() == 2 else tensor
        for name, tensor in module.named_parameters(remove_duplicate=False)
    }


def size(module: nn.Module) -> tuple[int, int]:
    """Parameters of a module, every one once, and their bytes."""
    tensors = list(module.parameters())
    return sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors)
