"""Models taken apart, kept by name: their parts found, compared, and put into one another.

    registry = ModelRegistry()
    spec = registry.register("meta-llama/Llama-2-7b-hf", model)  # or a folder, whose weights are not read for this
    registry.get_part("meta-llama/Llama-2-7b-hf", "attention_5")
    registry.compare("gpt2", "meta-llama/Llama-2-7b-hf")
    registry.swap("mine", "ffn_3", "theirs", "ffn_3")

What was registered is kept as JSON in the cache folder, one file a model, so that the next process lists and compares
it. Modules are kept in memory only. What is not there gives None, [] or {"error": ...}, as in model-garage's registry,
or with strict=True a ValueError that says what there is instead.
"""

import json
import os
import re
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import nn

import files
import hub
from architecture import PRESETS
from model import on_meta
from model_directory import is_lora, read_about, status
from registry import comparison, loading, picture
from registry.catalogue import MINI_LM
from registry.decompose import (
    Layout,
    ModelDecomposer,
    Row,
    decompose,
    decomposer_of,
    register_decomposer,
    unregister_decomposer,
)
from registry.describe import oriented
from registry.names import get_model
from registry.resolve import ModelNotFoundError, find_model
from registry.skeleton import fingerprint, skeleton, tokenizer_hash
from registry.specs import ModelFamily, ModelSpec, PartSpec, PartType, from_json, to_json
from words import as_table

__all__ = [
    "Layout",
    "ModelDecomposer",
    "ModelFamily",
    "ModelRegistry",
    "ModelSpec",
    "PartSpec",
    "PartType",
    "Row",
    "decompose",
    "register_decomposer",
    "unregister_decomposer",
]
ENVIRONMENT = "NANOFORGE_REGISTRY_DIR"
NOT_REGISTERED = "One or both models not registered"  # model-garage's words


def default_cache_dir() -> Path:
    if folder := os.environ.get(ENVIRONMENT):
        return files.expanded(folder)
    return files.expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "nanoforge" / "registry"


class ModelRegistry:
    """Specs of models by id, in memory and in `cache_dir`, which comes into being with the first one saved.

    `cache_dir` is by default $NANOFORGE_REGISTRY_DIR, or nanoforge/registry in $XDG_CACHE_HOME or ~/.cache. Registering
    an id again replaces what it was. `ignored` says of files in the cache that do not read why they do not.
    """

    def __init__(self, cache_dir: str | Path | None = None):
        self.cache_dir = default_cache_dir() if cache_dir is None else files.expanded(cache_dir)
        self.specs: dict[str, ModelSpec] = {}
        self.models: dict[str, nn.Module] = {}
        self.ignored: dict[Path, str] = {}

    def detect_family(self, model: nn.Module, model_id: str = "") -> ModelFamily:
        return decomposer_of(model, model_id).decompose(model, model_id).family

    def register(self, model_id: str, model_or_directory: nn.Module | str | Path | None = None) -> ModelSpec:
        """Take a model apart and keep what it is made of: a module, a folder, or what find_model has by this name.

        Of a folder, the configuration and the headers of its weights suffice (skeleton.py). Raises ValueError or
        FileNotFoundError for what is no model, files.SaveError where the cache cannot be written.
        """
        if isinstance(model_or_directory, nn.Module):
            spec = decompose(model_or_directory, model_id)
        else:
            spec = describe_folder(model_id if model_or_directory is None else model_or_directory, model_id)
        self._save(spec)
        self.specs[model_id] = spec
        self.models.pop(model_id, None)
        if isinstance(model_or_directory, nn.Module):
            self.models[model_id] = model_or_directory
        return spec

    def remove(self, model_id: str) -> bool:
        """Forget a model, in the cache too. Says whether there was one."""
        known = self.get_spec(model_id) is not None
        unread = self._path(model_id) in self.ignored
        self.specs.pop(model_id, None)
        self.models.pop(model_id, None)
        if known or unread:
            self._path(model_id).unlink(missing_ok=True)
        return known or unread

    def get_spec(self, model_id: str, strict: bool = False) -> ModelSpec | None:
        if model_id not in self.specs and (spec := self._read(self._path(model_id), model_id)):
            self.specs[model_id] = spec
        if strict and model_id not in self.specs:
            reason = self.ignored.get(self._path(model_id))
            damaged = f"; {self._path(model_id)} is ignored: {reason}" if reason else ""
            raise ValueError(f"there is no model {model_id!r}{_instead(model_id, self.list_models())}{damaged}")
        return self.specs.get(model_id)

    def get_part(self, model_id: str, part_name: str, strict: bool = False) -> PartSpec | None:
        spec = self.get_spec(model_id, strict)
        if strict and part_name not in spec.parts:
            raise ValueError(f"{model_id} has no part {part_name!r}{_instead(part_name, spec.parts)}")
        return spec.parts.get(part_name) if spec else None

    def get_model(self, model_id: str, strict: bool = False) -> nn.Module | None:
        """The registered module; of a folder the model in it, loaded at the first call and kept, or on the meta device
        if the folder holds no weights. None, or with strict a ValueError, for what another process had as a module."""
        spec = self.get_spec(model_id, strict)
        if spec is None or model_id in self.models:
            return self.models.get(model_id)
        if spec.directory is None:
            if strict:
                raise ValueError(f"{model_id} was registered as a module by another process: register it here")
            return None
        if not Path(spec.directory).is_dir() or fingerprint(spec.directory) != spec.fingerprint:
            if strict:
                raise ValueError(
                    f"{spec.directory} no longer holds what was registered as {model_id}: register it again"
                )
            return None
        self.models[model_id] = load(Path(spec.directory))
        return self.models[model_id]

    def get_module(self, model_id: str, part_name: str, strict: bool = False) -> nn.Module | None:
        """The module that a part is: see get_model."""
        part, model = self.get_part(model_id, part_name, strict), self.get_model(model_id, strict)
        if part is None or model is None:
            return None
        try:
            return decomposer_of(model, model_id).get_module(model, part)
        except AttributeError:
            if strict:
                raise ValueError(f"{model_id} has no module {part.module_path}, where {part_name} was") from None
            return None

    def list_models(self) -> list[str]:
        """Ids: those registered here in order, then what else is in the cache."""
        cached = [spec.model_id for path in sorted(self.cache_dir.glob("*.json")) if (spec := self._read(path))]
        return list(dict.fromkeys([*self.specs, *cached]))

    def list_parts(self, model_id: str, part_type: PartType | str | None = None, strict: bool = False) -> list[str]:
        """Names of parts, of one type (as PartType has it, or its name) or all. Raises ValueError for another type."""
        spec, kind = self.get_spec(model_id, strict), None if part_type is None else PartType.of(part_type)
        return [name for name, part in (spec.parts if spec else {}).items() if kind in (None, part.part_type)]

    def compare(self, model_a: str, model_b: str, strict: bool = False) -> dict[str, Any]:
        """See comparison.compare. {"error": ...} where one is not registered."""
        a, b = (self.get_spec(model_id, strict) for model_id in (model_a, model_b))
        return comparison.compare(a, b) if a and b else {"error": NOT_REGISTERED}

    @torch.no_grad()
    def swap(self, model_a: str, part_a: str, model_b: str, part_b: str) -> dict[str, Any]:
        """Copy the weights of a part of B into a part of A, in A's module, which then computes with B's numbers.

        B stays as it is, and so does A's cached spec. What shares its weights with the part changes with it
        (`also_changed`). Raises ValueError, and changes nothing, where they do not fit (comparison.obstacles).
        """
        specs = [self.get_spec(model_id, strict=True) for model_id in (model_a, model_b)]
        parts = [self.get_part(*names, strict=True) for names in ((model_a, part_a), (model_b, part_b))]
        what = f"{part_b} of {model_b} does not fit as {part_a} of {model_a}"
        if reasons := comparison.obstacles(specs[0], parts[0], specs[1], parts[1]):
            raise ValueError(f"{what}: {'; '.join(reasons)}")
        modules = [self.get_module(*names, strict=True) for names in ((model_a, part_a), (model_b, part_b))]
        here, there = (oriented(module) for module in modules)
        if [(name, t.shape) for name, t in sorted(here.items())] != [(n, t.shape) for n, t in sorted(there.items())]:
            raise ValueError(f"{what}: its weights are no longer those that were registered, or of other names")
        for model_id, tensors in ((model_a, here), (model_b, there)):
            if any(tensor.is_meta for tensor in tensors.values()):
                raise ValueError(f"{what}: {model_id} has no weights here, only shapes")
        for name, tensor in here.items():
            tensor.copy_(there[name])
        held = {id(tensor) for tensor in modules[0].parameters()}
        also = [
            name
            for name, part in specs[0].parts.items()
            if name != part_a
            and not (part.module_path + ".").startswith(parts[0].module_path + ".")
            and not (parts[0].module_path + ".").startswith(part.module_path + ".")
            and any(id(t) in held for t in self.get_module(model_a, name, strict=True).parameters())
        ]
        return {
            "into": [model_a, part_a],
            "from": [model_b, part_b],
            "parameters": parts[0].parameters,
            "also_changed": also,
            "notes": comparison.caveats(specs[0], parts[0], specs[1], parts[1]),
        }

    # ---- the cache

    def _path(self, model_id: str) -> Path:
        """One file an id and one id a file: what is no letter, digit or -._~ is escaped, so "a/b" is not "a__b"."""
        name = quote(model_id, safe="")
        if len(name) > 150:  # a file system's limit is 255 bytes
            name = f"{name[:100]}-{sha256(model_id.encode()).hexdigest()}"
        return self.cache_dir / f"{name}.json"

    def _save(self, spec: ModelSpec) -> None:
        try:
            content = json.dumps(to_json(spec), indent=1, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the spec of {spec.model_id} cannot be kept as JSON: {error}") from None
        files.write_atomic(self._path(spec.model_id), content.encode())

    def _read(self, path: Path, model_id: str | None = None) -> ModelSpec | None:
        """The spec in a file of the cache, None for a file that is missing or ignored."""
        self.ignored.pop(path, None)
        try:
            spec = from_json(json.loads(path.read_bytes()))
            if self._path(spec.model_id) != path:
                raise ValueError(f"it is of {spec.model_id}, whose file is {self._path(spec.model_id).name}")
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            self.ignored[path] = str(error)
            return None
        return spec if model_id in (None, spec.model_id) else None


def _instead(wanted: str, names: Any) -> str:
    close = get_close_matches(wanted, list(names), n=4, cutoff=0.4)
    return (
        f"; close to it: {', '.join(close)}" if close else "; there is none like it" if names else "; there is none yet"
    )


def load(folder: Path) -> nn.Module:
    """The model of a folder with its weights, or without if it holds none."""
    try:
        whole = bool(status(folder) or hub.weight_files(folder))
    except FileNotFoundError:
        whole = False
    return loading.load(folder) if whole else skeleton(folder)


def describe_folder(name: str | Path, model_id: str | None = None) -> ModelSpec:
    """What the model in a folder, or with a name that find_model knows, is made of. A LoRA directory's is its base, and
    extra_info["adapter"] says what it adds."""
    folder = files.expanded(name)
    if not folder.is_dir():
        folder = find_model(str(name)).path
    spec = decompose(skeleton(folder), model_id or str(name))
    spec.directory, spec.fingerprint = str(folder.resolve()), fingerprint(folder)
    if tokenizer := tokenizer_hash(folder):
        spec.extra_info["tokenizer"] = tokenizer
    about = read_about(folder)
    if is_lora(about):
        spec.extra_info["adapter"] = {"parameters": about["adapter_parameters"], "base": about["base"]["given"]}
    return spec


# ---- commands


def spec_of(name: str) -> ModelSpec:
    """What a model is made of by the name a user gives: a folder first, then an id in the cache, then find_model's,
    then what is made here, a preset's architecture or MiniLM.

    Nothing new is registered. An id whose folder has changed since is taken apart anew.
    """
    if files.expanded(name).is_dir():
        return describe_folder(name)
    spec = ModelRegistry().get_spec(name)
    if spec is None:
        try:
            return describe_folder(name)
        except ModelNotFoundError as error:
            if error.binding or not (name in PRESETS or name == MINI_LM):
                raise
        return decompose(get_model(name) if name == MINI_LM else on_meta(PRESETS[name]), name)
    if spec.directory and Path(spec.directory).is_dir() and fingerprint(spec.directory) != spec.fingerprint:
        return describe_folder(spec.directory, name)
    return spec


def run_show(arguments: Any) -> tuple[str, Any]:
    spec = spec_of(arguments.name)
    return show_text(spec), to_json(spec)


def run_parts(arguments: Any) -> tuple[str, Any]:
    spec = spec_of(arguments.name)
    kind = None if arguments.type is None else PartType.of(arguments.type)
    parts = {name: part for name, part in spec.parts.items() if kind in (None, part.part_type)}
    rows = [("part", "type", "path", "in", "out", "parameters")]
    for name, part in parts.items():
        sizes = (comparison.text(value) for value in (part.input_dim, part.output_dim, part.parameters))
        rows.append((name, part.part_type.value, part.module_path, *sizes))
    as_json = to_json(spec)["parts"]
    return as_table(rows), {name: as_json[name] for name in parts}


def run_compare(arguments: Any) -> tuple[str, Any]:
    if arguments.plot and arguments.plot.suffix != ".png":
        raise ValueError(f"--plot {arguments.plot}: the picture is a PNG, so its name must end in .png")
    a, b = spec_of(arguments.a), spec_of(arguments.b)
    result = comparison.compare(a, b)
    lines = [comparison.as_text(result)]
    if arguments.plot:
        files.write_atomic(arguments.plot, picture.as_picture(a, b, result))
        lines.append(f"\npicture: {arguments.plot}")
    return "\n".join(lines), result


def show_text(spec: ModelSpec) -> str:
    facts = comparison.facts_of(spec)
    head = [
        f"{spec.model_id}: {spec.extra_info.get('class')}, family {spec.family.value}",
        f"{spec.parameters:,} parameters, {spec.bytes / 1e6:,.1f} MB in {facts['dtype']}",
    ]
    if adapter := spec.extra_info.get("adapter"):
        head[1] += f", and an adapter (LoRA) of {adapter['parameters']:,} for {adapter['base']}"
    known = {
        "width": spec.hidden_dim,
        "layers": spec.num_layers,
        "heads": spec.num_heads,
        "vocabulary": spec.vocab_size,
        "context": spec.max_seq_len,
        "positions": facts["positions"],
    }
    head.append(", ".join(f"{label} {comparison.text(value)}" for label, value in known.items() if value is not None))
    groups: dict[tuple[str, ...], list[int | None]] = {}
    for name, part in spec.parts.items():
        end = "" if part.layer_idx is None else f"_{part.layer_idx}"
        window = part.extra_info.get("sliding_window")
        about = [comparison.likeness(part), f"window of {window:,} tokens" if window else ""]
        about.append(f"shares its weights with {part.extra_info['tied_to']}" if "tied_to" in part.extra_info else "")
        row = (name.removesuffix(end), f"{part.parameters:,}", "; ".join(filter(None, about)))
        groups.setdefault(row, []).append(part.layer_idx)
    rows = [("part", "layers", "parameters", "what it is")]
    rows += [(name, comparison.ranges(layers).strip(), *rest) for (name, *rest), layers in groups.items()]
    loose: dict[tuple[str, ...], list[int | None]] = {}
    for path in spec.uncovered:  # model.layers.(0-31).dropout for 32 of them
        layer = re.search(r"\.(\d+)\.", path)
        ends = (path[: layer.start()], path[layer.end() :]) if layer else (path, "")
        loose.setdefault(ends, []).append(int(layer[1]) if layer else None)
    paths = [f"{a}.({comparison.ranges(n).strip()}).{b}" if b else a for (a, b), n in loose.items()]
    modules = f"in no part: {', '.join(paths)}" if paths else "every module is in a part"
    return "\n".join([*head, "", as_table(rows), "", modules])
