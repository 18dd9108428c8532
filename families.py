"""Hugging Face's families: how their config.json and tensors correspond to GPTConfig and GPT, read in both directions.

    model = load_pretrained("/models/Qwen3-0.6B", dtype=torch.bfloat16)
    (folder / "config.json").write_text(json.dumps(hf_config(model.config)))
    write_tensors(file, hf_state(model), {"format": "pt"})  # they may be views, which safetensors refuses

What sets a family apart stands in family_tables.py. A config.json may ask for what GPT does not compute, and next
year's will. So a key is read, or is known to change no number, or has a value that switches it off; any other is an
error. The formats' source is Transformers 5.23 (models/*/configuration_*.py). The spellings of its version 4 are read
too, and are the ones written, because both versions open them.
"""

import contextlib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import files
from architecture import ORIGINAL
from family_tables import ACTIVATIONS, FAMILIES, NEUTRAL, ONLY, ROPE_KEYS, ROPES, WRAPPER, Family
from hub import find, read_json
from model import GPT, GPTConfig, on_meta
from model_directory import CONFIG, holds_adapter
from tensor_files import Stored, stored_tensors
from words import first_few, misfits

RUN_KEYS = "run_keys"  # in a config.json of ours: the names of a run's settings in it
LOADABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # dtypes of weights that are not quantised

# ---- from a config.json


def read_config(hf: Mapping[str, Any], source: str | Path, ignore: Collection[str] = ()) -> GPTConfig:
    """The model that a config.json describes, without dropout. `source` is for messages.

    `ignore` names keys that are somebody else's, and so not unknown; so does `run_keys` in the file. Of gemma3 the text
    model is taken. Raises ValueError, with every problem in one message, for what GPT does not compute exactly.
    """
    config, kind = _read(hf, source, ignore), family_of(hf, source)[1]["model_type"]
    with contextlib.suppress(ValueError):
        if hf_config(config)["model_type"] == kind:
            return config
    # By its numbers a Phi 3 may be a Mistral, and yet its files and adapters have other names.
    return replace(config, family=kind)


def _read(hf: Mapping[str, Any], source: str | Path, ignore: Collection[str] = ()) -> GPTConfig:
    family, hf = family_of(hf, source)
    values, fields = {**family.defaults, **hf}, dict(family.always)
    ignore = {RUN_KEYS, *(hf.get(RUN_KEYS) or ()), *ignore}
    problems = [f"{key}={value}" for key, value in hf.items() if key not in ignore and _is_odd(key, value, family)]
    try:
        for key, name in family.fields.items():
            value = values[key]
            if name == "activation":
                value = ACTIVATIONS.get(value)
                problems += [f"{key}={values[key]}"] if value is None else []
            if fields.setdefault(name, value) != value:
                problems.append(f"{key}={value}, but {name}={fields[name]} elsewhere")
        fields |= _read_rope(values, family, problems) | _read_windows(values, family, problems)
        if problems:
            raise ValueError(f"asks for what GPT does not compute: {'; '.join(problems)}")
        return plain(GPTConfig(**fields))
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:  # a value may be anything
        raise ValueError(f"{source}: {error}") from None


def family_of(hf: Mapping[str, Any], source: str | Path) -> tuple[Family, Mapping[str, Any]]:
    """The family of a config.json, and what that says of the text model. Raises ValueError for one not covered."""
    if hf.get("model_type") == WRAPPER:
        outer = {key: value for key, value in hf.items() if key not in ("text_config", "vision_config")}
        hf = {**(hf.get("text_config") or {}), **outer, "model_type": "gemma3_text"}
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join([*FAMILIES, WRAPPER])
        raise ValueError(f"{source} is of model_type {kind}; those that load here are {known}")
    return FAMILIES[kind], hf


def has_images(folder: Path) -> bool:
    """Whether Transformers opens a folder as a model that sees images too; our GPT is its text model alone."""
    return files.exists(folder / CONFIG) and read_json(folder / CONFIG).get("model_type") == WRAPPER


def _is_odd(key: str, value: Any, family: Family) -> bool:
    """Whether a key could make Transformers compute what GPT does not."""
    only = ONLY | family.only
    if key in only:
        return value not in (only[key], None)
    read = key in family.fields or key in family.defaults or (key in ROPE_KEYS and bool(family.ropes))
    return bool(value) and not read and key not in (*family.neutral, *family.dropouts, *NEUTRAL)


def _read_rope(values: Mapping[str, Any], family: Family, problems: list[str]) -> dict[str, Any]:
    """Transformers 4 has rope_theta and rope_scaling; 5 has them in rope_parameters, Gemma 3 by kind of layer."""
    if not family.ropes:
        return {}
    old, new, fields = values.get("rope_scaling") or {}, values.get("rope_parameters") or {}, {}
    scaling = dict(old or new)
    if "rope_local_base_freq" in family.defaults:
        scaling = {**(new.get("full_attention") or {}), **old}
        local = new.get("sliding_attention") or {}
        fields["rope_local_theta"] = local.get("rope_theta", values["rope_local_base_freq"])
        odd = [(key, new[key]) for key in new if key not in ("full_attention", "sliding_attention")]
        odd += [item for item in local.items() if item[0] != "rope_theta" and item != ("rope_type", "default")]
        problems += [f"rope_parameters with {key}={value}" for key, value in odd if value]
    scaling = {key: value for key, value in scaling.items() if value is not None}
    kinds = [scaling.pop(key) for key in ("rope_type", "type") if key in scaling]
    kind = {"su": "longrope"}.get(kinds[0], kinds[0]) if kinds else "default"  # su: its name in the first Phi 3
    fields["rope_theta"] = scaling.pop("rope_theta", None) or values.get("rope_theta") or 10000.0
    fields["rotary_share"] = scaling.pop("partial_rotary_factor", None) or values.get("partial_rotary_factor") or 1.0
    if fields["rotary_share"] != 1.0 and not family.partial_rotary:
        problems.append(f"partial_rotary_factor={fields['rotary_share']}")
    if kind not in family.ropes:
        problems.append(f"rope_type={kind}, which is none of {', '.join(family.ropes)}")
        return fields
    if ORIGINAL in ROPES[kind]:
        lengths = [where[ORIGINAL] for where in (values, scaling) if where.get(ORIGINAL)]
        if len(set(lengths)) > 1:
            problems.append(f"{ORIGINAL}={lengths[0]}, but {lengths[1]} in the scaling")
        scaling[ORIGINAL] = lengths[0] if lengths else values["max_position_embeddings"]
    if "attention_factor" in ROPES[kind]:
        scaling.setdefault("attention_factor", _attention_factor(kind, scaling, values["max_position_embeddings"]))
        for key in ("mscale", "mscale_all_dim") if kind == "yarn" else ("factor",):
            scaling.pop(key, None)  # of use for that factor only
    problems += [f"a {kind} scaling with {key}={scaling[key]}" for key in scaling if key not in ROPES[kind]]
    return fields | {"rope_scaling": {"rope_type": kind, **scaling} if kind != "default" else None}


def _attention_factor(kind: str, scaling: Mapping[str, Any], length: int) -> float:
    """What Transformers multiplies cos and sin by where a file does not say. It depends on the longest context."""
    original = scaling[ORIGINAL]
    factor = scaling.get("factor") or length / original
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    up, down = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if up and down:
        return (0.1 * up * math.log(factor) + 1) / (0.1 * down * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


def _read_windows(values: Mapping[str, Any], family: Family, problems: list[str]) -> dict[str, Any]:
    window = values.get("sliding_window")
    if family.windows is None or not window or not values.get("use_sliding_window", True):
        return {}
    n_layer = values["num_hidden_layers"]
    local = [family.windows(values, layer) for layer in range(n_layer)]
    if types := values.get("layer_types"):
        local = [kind == "sliding_attention" for kind in types]
        if len(types) != n_layer or set(types) - {"sliding_attention", "full_attention"}:
            problems.append(f"layer_types={types} for {n_layer} layers")
    return {"sliding_window": window, "global_layers": [i for i, narrow in enumerate(local) if not narrow]}


def plain(config: GPTConfig) -> GPTConfig:
    """The same model, described in the one way in which every field that changes nothing has its default."""
    n_inner = None if config.inner == 4 * config.n_embd else config.inner
    if config.block == "gpt2":
        return replace(config, n_inner=n_inner)
    layers = range(config.n_layer)
    windowed = any(config.is_local(layer) for layer in layers)
    scaling, local_theta = config.rope_scaling, config.rope_local_theta
    if scaling is not None and "attention_factor" in ROPES[scaling["rope_type"]]:
        scaling = {**scaling, "attention_factor": scaling.get("attention_factor") or 1.0}
    if not windowed or (scaling is None and local_theta == config.rope_theta):
        local_theta = None
    return replace(
        config,
        n_inner=n_inner,
        n_kv_head=None if config.kv_heads == config.n_head else config.kv_heads,
        head_size=None if config.D * config.n_head == config.n_embd else config.D,
        query_scalar=None if config.query_scalar == config.D else config.query_scalar,
        qkv_bias=config.qkv_bias and not config.bias,
        sliding_window=config.sliding_window if windowed else None,
        global_layers=[layer for layer in layers if not config.is_local(layer)] if windowed else (),
        rope_scaling=scaling,
        rope_local_theta=local_theta,
    )


# ---- to a config.json


def hf_config(config: GPTConfig) -> dict[str, Any]:
    """What a config.json must say for Transformers to compute the same model, as the first family that can say it; that
    of `config.family` is asked before the others.

    Says nothing of the weights' dtype, nor of special tokens, of which every family has defaults of its own. Raises
    ValueError when no family has this combination of fields.
    """
    wanted = plain(replace(config, dropout=0.0, family=""))
    for kind, family in sorted(FAMILIES.items(), key=lambda item: item[0] != config.family):
        hf = _write(config, kind, family)
        if family.divisible and config.n_embd % config.n_head:
            continue
        # Transformers wants as many of LongRoPE's factors as width / heads has pairs, whatever head_dim says.
        if (config.rope_scaling or {}).get("rope_type") == "longrope" and config.D * config.n_head != config.n_embd:
            continue
        try:
            if _read(hf, kind) == wanted:
                return hf
        except ValueError:  # the family has a value of its own for some field, and it does not go with the others
            continue
    fields = GPTConfig.__dataclass_fields__.items()
    unusual = [f"{name}={getattr(wanted, name)}" for name, f in fields if getattr(wanted, name) != f.default]
    raise ValueError(f"no family of Transformers' is a model with {', '.join(unusual)}")


def _write(config: GPTConfig, kind: str, family: Family) -> dict[str, Any]:
    """A config.json that says of `config` as much as the family can."""
    given = {**vars(config), "n_inner": config.inner, "n_kv_head": config.kv_heads, "head_size": config.D}
    given["activation"] = next(name for name, ours in ACTIVATIONS.items() if ours == config.activation)
    given["query_scalar"] = int(config.query_scalar or config.D)  # Transformers checks these types
    given |= {name: given[name] and float(given[name]) for name in ("attention_softcap", "logit_softcap")}
    hf = {"model_type": kind, "architectures": [family.architecture]}
    hf |= {key: given[name] for key, name in family.fields.items()} | dict.fromkeys(family.dropouts, config.dropout)
    if family.windows:
        local = [config.is_local(layer) for layer in range(config.n_layer)]
        hf["sliding_window"] = config.sliding_window
        if "layer_types" in family.defaults:
            hf["layer_types"] = ["sliding_attention" if narrow else "full_attention" for narrow in local]
        if "use_sliding_window" in family.defaults:
            hf |= {"use_sliding_window": any(local), "max_window_layers": config.n_layer - sum(local)}
        elif "layer_types" in family.defaults:
            hf["sliding_window"] = config.sliding_window or config.block_size  # Gemma's must be a number
    if family.ropes:
        scaling = dict(config.rope_scaling or {})
        rope_type = scaling.get("rope_type", "default")
        if "attention_factor" in ROPES[rope_type]:
            scaling["attention_factor"] = float(scaling.get("attention_factor") or 1.0)
            if scaling["attention_factor"] == _attention_factor(rope_type, scaling, config.block_size):
                del scaling["attention_factor"]  # Transformers 4 refuses it in a Phi 3
        if family.partial_rotary:
            hf |= {ORIGINAL: scaling.pop(ORIGINAL, config.block_size), "partial_rotary_factor": config.rotary_share}
            scaling = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
        hf |= {"rope_theta": config.rope_theta, "rope_scaling": scaling or None}
        if "rope_local_base_freq" in family.defaults:
            hf["rope_local_base_freq"] = config.rope_local_theta or config.rope_theta
    return hf


# ---- tensors


def _layout(config: GPTConfig, family: Family) -> dict[str, dict[str, torch.Size]]:
    """The tensors of a file by name, and what lies in each, one below the other: our tensors' names and shapes."""
    ours = on_meta(replace(config, bias=True) if family.biases else config).state_dict()
    whole = {part: fused for fused, parts in family.fused.items() for part in parts}
    layout = {}
    for name, tensor in ours.items():
        *path, layer, kind = name.split(".")
        if not (config.tie_word_embeddings and layer == "lm_head"):
            layout.setdefault(".".join([*path, whole.get(layer, layer), kind]), {})[name] = tensor.shape
    return layout


def _is_turned(name: str, family: Family) -> bool:
    return name.split(".")[-2] in family.transposed  # true of biases too, which transposing leaves alone


def hf_state(model: GPT) -> dict[str, Tensor]:
    """The model's tensors as the family of `hf_config` names and stores them; views where they are stored alike.

    Raises ValueError for a model with tensors that no such file has: an adapter's, or a head that was untied.
    """
    config, ours = model.config, {name: tensor.detach() for name, tensor in model.state_dict().items()}
    family = FAMILIES[hf_config(config)["model_type"]]
    if config.tie_word_embeddings and ours.pop("lm_head.weight").data_ptr() != model.embedding.weight.data_ptr():
        raise ValueError("the configuration says that lm_head shares the token embedding, and it does not")
    layout = _layout(config, family)
    odd = sorted(ours.keys() - {name for parts in layout.values() for name in parts})
    if odd:
        raise ValueError(f"{family.architecture} has no {', '.join(odd[:3])} (of {len(odd)}); merge adapters first")
    state = {}
    for stored, parts in layout.items():
        tensors = [ours[name] if name in ours else model.lm_head.weight.new_zeros(parts[name]) for name in parts]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        state[stored] = tensor.t() if _is_turned(stored, family) else tensor
    return state


def fused_layers(model: nn.Module) -> dict[str, list[str]]:
    """{path of a layer in the family's own modules: paths of the layers here that lie one below the other in it}."""
    if not isinstance(model, GPT) or model.config.block == "gpt2":
        return {}
    try:
        fused = FAMILIES[hf_config(model.config)["model_type"]].fused
    except ValueError:  # of no family
        fused = {}
    found = {}
    for path, _ in model.named_modules():
        above, _, name = path.rpartition(".")
        for whole, parts in fused.items():
            if name == parts[0]:
                found[f"{above}.{whole}"] = [f"{above}.{part}" for part in parts]
    return found


def load_pretrained(
    path_or_hub_id: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    revision: str | None = None,
    local_files_only: bool = True,
    ignore: Collection[str] = (),
    mapped: bool = False,
    name: str | None = None,
) -> GPT:
    """The model in a folder of Hugging Face's format, or of a hub id: from its cache, or downloaded where allowed.

    Tensors are read one at a time, into `dtype` (None: that of the stored embedding) on `device`; if `mapped`, they
    stay in their files, as they are there, and what is not looked at is not read. `name`: that of the file of weights,
    where there are several. `ignore`: see read_config.
    Raises FileNotFoundError where there is no model, ValueError for one that would not be the same here.
    """
    folder = find(path_or_hub_id, revision=revision, local_files_only=local_files_only)
    hf = read_json(folder / CONFIG)
    if holds_adapter(folder):
        raise ValueError(
            f"{folder} has an adapter beside its weights, which Transformers would add to them: load the base from a "
            "folder without adapter_config.json and adapter_model.safetensors, then add these (adapters.load_adapters)"
        )
    config = read_config(hf, folder / CONFIG, ignore)
    return load_state(config, family_of(hf, folder)[0], stored_tensors(folder, name), folder, dtype, device, mapped)


def load_state(
    config: GPTConfig,
    family: Family,
    tensors: Mapping[str, Stored],
    source: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    mapped: bool = False,
) -> GPT:
    """A GPT with the tensors of a file of `family`'s. `source` is for messages. Raises ValueError for a misfit."""
    model = on_meta(config)
    layout, ours = _layout(config, family), model.state_dict()
    found = _by_known_names(tensors, family, "transformer." if config.block == "gpt2" else "model.")
    absent = {name for name, parts in layout.items() if not parts.keys() & ours.keys()}  # a bias-free GPT-2's biases
    head = found.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    wanted = {}
    for name in layout.keys() - (absent - found.keys()):
        rows, *rest = zip(*layout[name].values(), strict=True)
        shape = (sum(rows), *(sizes[0] for sizes in rest))
        wanted[name] = shape[::-1] if _is_turned(name, family) else shape
    if problems := misfits({name: tensor.shape for name, tensor in found.items()}, wanted):
        raise ValueError(f"{source} does not hold the model that its {CONFIG} describes: {first_few(sorted(problems))}")
    tokens = next(name for name, tensor in model.named_parameters() if tensor is model.embedding.weight)
    dtype = dtype or found[tokens].read().dtype
    if head is not None and not torch.equal(head.read(), found[tokens].read()):
        raise ValueError(f"{source} says that lm_head shares the token embedding, but its two tensors differ")
    state = {}
    for name in found:
        tensor, parts = found[name].read(), layout[name]
        if tensor.dtype not in LOADABLE:
            raise ValueError(f"{source} has {name} in {tensor.dtype}: quantised weights do not load here")
        if name in absent:
            if tensor.any():
                raise ValueError(f"{source} says that the model has no biases, but {name} is not zero")
            continue
        tensor = tensor.t() if _is_turned(name, family) else tensor
        rows = [shape[0] for shape in parts.values()]
        for ours_name, part in zip(parts, tensor.split(rows), strict=True):
            # Copied, for a mapped file may change under the model, or its disk go.
            state[ours_name] = part if mapped else torch.empty(part.shape, dtype=dtype, device=device).copy_(part)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state[tokens]
    model.load_state_dict(state, assign=True)
    model.tie_head()
    return model


def _by_known_names(tensors: Mapping[str, Stored], family: Family, prefix: str) -> dict[str, Stored]:
    """Tensors under the names they have in a whole language model's file, without those that are computed here."""
    known = {}
    for name, tensor in tensors.items():
        for pattern, usual in family.renamed.items():
            name = re.sub(pattern, usual, name)
        known[name] = tensor
    if not any(name.startswith(prefix) for name in known):  # saved without its head, as the hub's GPT-2
        known = {name if name.startswith("lm_head.") else prefix + name: tensor for name, tensor in known.items()}
    return {name: tensor for name, tensor in known.items() if not re.search(family.dropped, name)}
