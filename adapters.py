"""An adapter on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors.

    save_adapters(model, "my-adapter")  # and PeftModel.from_pretrained(base, "my-adapter") opens it
    load_adapters(base, "my-adapter")  # what PEFT has saved opens here

Phi 3's projections are one layer in Transformers and several here (families.fused_layers). An adapter of a GPT from
such files is saved for that layer: the As of the parts one below the other, their Bs along a diagonal.

A model with images, as Gemma 3's from 4b up, has its text model, of which alone a GPT is made, as a part: Transformers
calls its layers by other paths, and so do these files.

PEFT lets a setting that it does not know, a target that matches nothing or a tensor under another name pass with a
warning or with none, and the model then computes something else. Here these are errors.
"""

import hashlib
import io
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import files
import lora
import lora_layers
from families import fused_layers, has_images
from model_directory import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tensor_files import raw_bytes, write_tensors
from words import first_few

CONFIG, WEIGHTS = (Path(name).name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
OLD_WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."  # before every path: PEFT's two wrappers
FINGERPRINT = "base_fingerprint"  # in the tensor file's own metadata, where PEFT does not mind it
RANKS = "ranks_of_parts"  # there too: {fused layer: {part: rank}}, to take it apart as it was put together
# What the paths of a text model begin with inside another, and by itself: in Transformers since 4.52, and before.
INSIDE = {"model.language_model.": "model.", "language_model.": ""}

# Keys of adapter_config.json that change nothing about an adapter whose tensors are there.
NEUTRAL = {"auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "megatron_core", "peft_type"}
NEUTRAL |= {"peft_version", "qalora_group_size", "revision", "task_type", "layers_to_transform", "layers_pattern"}
NEUTRAL |= {"ensure_weight_tying", "runtime_config", "eva_config"}
READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"}
READ |= {"target_modules", "exclude_modules"}
# Of the ways to initialise an adapter, these leave the base as it was; pissa, olora and others change it.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def save_adapters(model: nn.Module, directory: str | Path, adapter: str | None = None, **description: Any) -> None:
    """Write an adapter, the active one by default, as PEFT would. `description` is that of `adapter_files`.

    Raises ValueError for numbers that are not finite and for a model of which more trains than adapters (PEFT's
    modules_to_save are not written), files.SaveError when the disk refuses. Warns of layers that have learned nothing
    where others have.
    """
    for name, data in adapter_files(model, adapter, **description).items():
        files.write_atomic(Path(directory) / name, data)
    parts = lora.adapters_of(model, adapter)
    idle = [path for path, part in parts.items() if not (part.A.any() and part.B.any())]
    if 0 < len(idle) < len(parts):
        warnings.warn(
            f"{len(idle)} of the {len(parts)} layers of the adapter in {directory} have learned nothing at all: "
            f"{first_few(idle)}; either no input has reached them, or the model uses their weights without calling "
            "them, and then LoRA does nothing there: exclude them",
            stacklevel=2,
        )


def adapter_files(
    model: nn.Module,
    adapter: str | None = None,
    *,
    base: str | None = None,
    task_type: str | None = None,
    fan_in_fan_out: bool | None = None,
    inside: bool | None = None,
    fingerprint: str | None = None,
) -> dict[str, bytes]:
    """What `save_adapters` writes, {name: content}. `fingerprint` is what `fingerprint_of` gave, for a model of which
    the adapter alone is here.

    `base` and `task_type` ("CAUSAL_LM") are for PEFT's Auto classes, which find the base by them. `fan_in_fan_out`:
    whether PEFT will meet layers that store (in, out) (default: whether these do). `inside`: whether it will meet them
    inside a model with images (default: whether `base` is the folder of one).
    """
    parts = lora.adapters_of(model, adapter)
    lora.check_frozen(model)
    first = next(iter(parts.values()))
    if broken := [path for path, part in parts.items() if not all(p.isfinite().all() for p in part.parameters())]:
        raise ValueError(f"the adapter has numbers that are not finite, first in {broken[0]}; it is not saved")
    if fan_in_fan_out is None:
        fan_in_fan_out = any(hasattr(model.get_submodule(path), "nf") for path in parts)
    parts, ranks = _fuse(model, parts)
    layers, metadata = _layers(model), {"format": "pt"} | ({RANKS: json.dumps(ranks)} if ranks else {})
    if not any(lora_layers.is_quantised(part.weight) for path in parts for part in layers[path]):  # that is no base
        metadata[FINGERPRINT] = fingerprint or base_fingerprint(model, parts)
    if inside is None:
        inside = base is not None and has_images(Path(base))
    there = {here: path for path, here in _inside(layers, next(iter(INSIDE)) if inside else None).items()}
    parts, layers = ({there[path]: x for path, x in of.items()} for of in (parts, layers))
    rank, alpha = (_commonest(getattr(part, name) for part in parts.values()) for name in ("rank", "alpha"))
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(part.dropout for part in parts.values()),
        "use_rslora": first.use_rslora,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "target_modules": _exactly(parts, layers),
        # A pattern's key would match the ends of other paths too, were it not for the anchor.
        "rank_pattern": {f"^{re.escape(path)}": part.rank for path, part in parts.items() if part.rank != rank},
        "alpha_pattern": {f"^{re.escape(path)}": part.alpha for path, part in parts.items() if part.alpha != alpha},
    }
    tensors = {
        f"{PREFIX}{path}.{key}": tensor.detach()
        for path, part in parts.items()
        for key, tensor in zip(part.keys, (part.A, part.B), strict=True)
    }
    content = io.BytesIO()
    write_tensors(content, tensors, metadata)
    # The tensors first: whoever finds the configuration finds what it describes.
    return {
        WEIGHTS: content.getvalue(),
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }


def _exactly(paths: Collection[str], layers: Collection[str]) -> list[str] | str:
    """What makes PEFT and us select these layers and no others: a list, or a regular expression if one of them is also
    the end of another layer's path."""
    ambiguous = any(layer.endswith(f".{path}") for path in paths for layer in layers if layer not in paths)
    return "|".join(map(re.escape, paths)) if ambiguous else list(paths)


@torch.no_grad()
def _fuse(
    model: nn.Module, parts: dict[str, lora.Adapter]
) -> tuple[dict[str, lora.Adapter], dict[str, dict[str, int]]]:
    """The adapters of the layers that others have where we have several, and the ranks of what went into them."""
    fused, result, ranks = fused_layers(model), dict(parts), {}
    for whole, paths in fused.items():
        inside = {path: result.pop(path) for path in paths if path in result}
        if inside:
            first, rank = next(iter(inside.values())), sum(part.rank for part in inside.values())
            alpha = first.scale * (math.sqrt(rank) if first.use_rslora else rank)
            # All scales are the first one's now, and alike unless a pattern gave the parts other ranks or alphas.
            columns = {path: part.B * (part.scale / first.scale) for path, part in inside.items()}
            B = torch.block_diag(
                *(columns.get(path, first.B.new_zeros(model.get_submodule(path).out_features, 0)) for path in paths)
            )
            A = torch.cat([part.A for part in inside.values()])
            result[whole] = lora.Adapter(A, B, alpha, first.use_rslora, max(part.dropout for part in inside.values()))
            ranks[whole] = {path: part.rank for path, part in inside.items()}
    return result, ranks


def _take_apart(
    model: nn.Module,
    parts: dict[str, tuple[Tensor, Tensor, float]],
    ranks: dict[str, dict[str, int]],
    use_rslora: bool,
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """The other way round. What `_fuse` has put together gets its ranks again; in what PEFT has trained, every part has
    all of A and its own rows of B."""
    result, fused = {}, fused_layers(model)
    for whole, (A, B, alpha) in parts.items():
        paths = fused.get(whole)
        if paths is None:
            result[whole] = A, B, alpha
            continue
        heights = [model.get_submodule(path).out_features for path in paths]
        if B.size(0) != sum(heights):
            raise ValueError(f"{whole} has {B.size(0)} outputs and the adapter {sum(heights)}")
        own, column = ranks.get(whole), 0
        for path, rows in zip(paths, B.split(heights), strict=True):
            if own is None:
                result[path] = A, rows, alpha
            elif path in own:
                to, share = column + own[path], own[path] / A.size(0)
                result[path] = A[column:to], rows[:, column:to], alpha * (math.sqrt(share) if use_rslora else share)
                column = to
    return result


def _layers(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The layers that an adapter in a file can be for: those here, or several that are one elsewhere, by its path."""
    fused = fused_layers(model)
    parts = {path for paths in fused.values() for path in paths}
    single = {path: [layer] for path, layer in lora_layers.adaptable(model).items() if path not in parts}
    return single | {path: [model.get_submodule(part) for part in paths] for path, paths in fused.items()}


def _weight(layers: list[nn.Module]) -> Tensor:
    """(out, in), or an embedding's (in, out)."""
    weights = [layer.weight.t() if hasattr(layer, "nf") else layer.weight for layer in layers]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def fingerprint_of(model: nn.Module) -> str:
    """`base_fingerprint` of what the active adapter adds to."""
    return base_fingerprint(model, _fuse(model, lora.adapters_of(model, None))[0])


@torch.no_grad()
def base_fingerprint(model: nn.Module, paths: Iterable[str], dtype: torch.dtype | None = None) -> str:
    """sha256 of the weights that an adapter adds to, and of no others: the same for one model in float32 and bfloat16,
    with nn.Linear and with Transformers' Conv1D, in our directories and in others, inside a model with images and by
    itself. `dtype`: of weights as they would be if they were rounded to it first."""
    digest, layers = hashlib.sha256(), _layers(model)
    for path in sorted(paths, key=_alone):
        weight = _weight(layers[path])
        digest.update(f"{_alone(path)} {tuple(weight.shape)}".encode())
        digest.update(raw_bytes(weight.to(dtype or weight.dtype).to(torch.bfloat16)))
    return digest.hexdigest()


def _check_base(model: nn.Module, paths: Collection[str], fingerprint: str, source: Path) -> None:
    """Raises ValueError for weights that are others than those an adapter was trained on, where that can be told."""
    layers = _layers(model)
    weights = [layer.weight for path in paths for layer in layers[path]]
    if any(weight.is_meta or lora_layers.is_quantised(weight) for weight in weights):
        return
    # It may have been trained on the same weights in float16, which are rounded twice.
    found = base_fingerprint(model, paths)
    if fingerprint == found or fingerprint == base_fingerprint(model, paths, torch.float16):
        return
    half = any(weight.dtype == torch.float16 for weight in weights)
    other = "other weights, or on these before they were rounded to float16" if half else "other weights"
    raise ValueError(
        f"{source} was trained on {other}: the layers it adapts had the fingerprint {fingerprint[:12]}..., and in this "
        f"{type(model).__name__} they have {found[:12]}...; force=True loads it all the same"
    )


def load_adapters(
    model: nn.Module,
    directory: str | Path,
    adapter: str = lora.DEFAULT,
    *,
    force: bool = False,
    untie: bool = False,
    dtype: torch.dtype | None = None,
) -> lora.LoRAReport:
    """Add the adapter of a folder to `model`, frozen for it, and make it the active one if there was none.

    It gets the layers' dtype, or `dtype`. Raises ValueError, and leaves the model alone, if anything in the folder has
    no effect here or is missing; if the adapter was trained on other weights, unless `force`; and as lora.apply_lora
    for layers with a shared weight, unless `untie`. FileNotFoundError if the folder holds no adapter.
    """
    directory = files.expanded(directory)
    if missing := [name for name in (CONFIG, WEIGHTS) if not (directory / name).is_file()]:
        old = f" ({OLD_WEIGHTS} is pickled: save it anew with PEFT)" if (directory / OLD_WEIGHTS).is_file() else ""
        raise FileNotFoundError(f"{directory} holds no adapter: {' and '.join(missing)} not found{old}")
    config, weights = ((directory / name).read_bytes() for name in (CONFIG, WEIGHTS))
    return install_adapter(model, config, weights, directory, adapter, force=force, untie=untie, dtype=dtype)


def install_adapter(
    model: nn.Module,
    config: bytes,
    weights: bytes,
    source: Path,
    adapter: str = lora.DEFAULT,
    *,
    force: bool = False,
    untie: bool = False,
    dtype: torch.dtype | None = None,
) -> lora.LoRAReport:
    """As `load_adapters`, from the contents of the two files; `source` is for messages."""
    settings = _read_config(config, source / CONFIG)
    tensors, metadata = _read_tensors(weights, source / WEIGHTS)
    fingerprint = metadata.get(FINGERPRINT)
    try:
        stored = _parts(model, tensors, settings)
        parts = _take_apart(model, stored, json.loads(metadata.get(RANKS, "{}")), settings["use_rslora"])
        lora.check_fit(model, parts)
    except ValueError as error:
        raise ValueError(f"{source} cannot be loaded: {error}") from None
    if fingerprint and not force:
        _check_base(model, stored, fingerprint, source)
    return lora.install(
        model, adapter, parts, settings["use_rslora"], settings["lora_dropout"], dtype=dtype, untie=untie
    )


def _read_config(data: bytes, source: Path) -> dict[str, Any]:
    """The settings that mean something here. Raises ValueError for one that means something only to PEFT."""
    try:
        config = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{source} is no JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{source} describes no LoRA: its peft_type must be LORA")
    start, bias = config.pop("init_lora_weights", True), config.pop("bias", "none")
    active = sorted(key for key, value in config.items() if value and key not in READ | NEUTRAL)
    active += [f"init_lora_weights={start!r}"] if start not in PLAIN_STARTS else []
    active += [f"bias={bias!r}"] if bias != "none" else []
    if active:
        raise ValueError(f"{source} asks for what this LoRA does not do: {', '.join(active)}")
    settings = {key: value for key, value in config.items() if value is not None}
    defaults = {"lora_dropout": 0.0, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    settings = defaults | {"target_modules": [], "exclude_modules": []} | settings
    try:  # LoRAConfig knows what may stand there
        lora.LoRAConfig(
            settings["r"],
            settings["lora_alpha"],
            settings["lora_dropout"],
            settings["target_modules"] or lora.ALL_LINEAR,
            settings["exclude_modules"],
            use_rslora=settings["use_rslora"],
            rank_pattern=settings["rank_pattern"],
            alpha_pattern=settings["alpha_pattern"],
        )
    except KeyError as error:
        raise ValueError(f"{source} does not say {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: {error}") from None
    return settings


def _read_tensors(data: bytes, source: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """{name: tensor}, and the file's own metadata."""
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(f"{source} is no safetensors file, or is cut short: {error}") from None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # the format: its length, then JSON
    return tensors, header.get("__metadata__", {})


def _parts(
    model: nn.Module, tensors: dict[str, Tensor], settings: dict[str, Any]
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """{path: (A, B, alpha)}. Raises ValueError for a tensor without a place here and a targeted layer without one."""
    here, sides, problems = _layers(model), {}, []
    used = (prefix for prefix in INSIDE if any(name.startswith(PREFIX + prefix) for name in tensors))
    paths = _inside(here, next(used, None))
    layers = {there: here[path] for there, path in paths.items()}
    for name, tensor in tensors.items():
        path, side = _place(name.removeprefix(PREFIX), layers)
        if not name.startswith(PREFIX) or side is None:
            problems.append(f"{name} belongs to no layer of this model")
        elif tensor.dim() != 2 or not tensor.isfinite().all():
            problems.append(f"{name} is no matrix of finite numbers")
        elif side == "base":  # PEFT saves a copy of an output head or embedding that has an adapter
            weight = _weight(layers[path])
            if not weight.is_meta and not torch.equal(tensor, weight.to("cpu", tensor.dtype)):
                problems.append(f"{name} is not what this model has there")
        else:
            sides.setdefault(path, {})[side] = tensor
    problems += [f"{path} has only its lora_{next(iter(pair))}" for path, pair in sides.items() if len(pair) < 2]
    if settings.get("layers_to_transform") in (None, []):
        wanted, unwanted = (
            {path for found in lora_layers.matches(model, settings[key], layers).values() for path in found}
            for key in ("target_modules", "exclude_modules")
        )
        problems += [f"{path} is targeted and has no tensors" for path in sorted(wanted - unwanted - sides.keys())]
    refusal = "its tensors are not an adapter of this model"
    lora.raise_some(refusal, problems)
    parts = {}
    for path, pair in sides.items():
        rank, alpha = (
            next((n for key, n in settings[pattern].items() if re.fullmatch(rf"(.*\.)?({key})", path)), settings[usual])
            for pattern, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        if pair["A"].size(0) != rank:
            problems.append(f"{path} has rank {pair['A'].size(0)} where {CONFIG} says {rank}")
        parts[paths[path]] = pair["A"], pair["B"], alpha
    lora.raise_some(refusal, problems)
    return parts


def _inside(layers: Collection[str], prefix: str | None) -> dict[str, str]:
    """{path in a model that has this one inside: path here}; the same ones where there is none, or this is it."""
    if prefix is None or any(path.startswith(prefix) for path in layers):
        return {path: path for path in layers}
    alone = INSIDE[prefix]
    return {prefix + path.removeprefix(alone) if path.startswith(alone) else path: path for path in layers}


def _alone(path: str) -> str:
    """The path of a layer as the text model by itself has it."""
    prefix = next((prefix for prefix in INSIDE if path.startswith(prefix)), "")
    return INSIDE.get(prefix, "") + path.removeprefix(prefix)


def _place(key: str, layers: dict[str, list[nn.Module]]) -> tuple[str, str | None]:
    """(path of a layer, "A", "B" or "base") for the name of a tensor; None if it is none of these."""
    path = key.rsplit(".", 1 if "lora_embedding_" in key else 2)[0]
    if path not in layers:
        return key, None
    A, B = lora.kind_of(layers[path][0]).keys
    return path, {A: "A", B: "B", "base_layer.weight": "base"}.get(key.removeprefix(f"{path}."))
