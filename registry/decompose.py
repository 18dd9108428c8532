"""Models taken apart: which module is the attention of layer 5, and what it is like.

    spec = decompose(model, "any name")  # a ModelSpec: specs.py

Where the modules of a family lie stands in LAYOUTS; one decomposer reads them all, and GenericDecomposer takes what no
layout fits. A model's family is what its configuration says (`model_type`), never what its name or its folder's does;
only for a model without a configuration is the structure looked at, the particular before the common.
"""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from model import GPT
from registry.describe import (
    attribute,
    configuration,
    context_of,
    describe,
    heads_of,
    model_type,
    oriented,
    rope_of,
    size,
    width_of,
    window_of,
)
from registry.specs import ModelFamily, ModelSpec, PartSpec, PartType

# ---- where the parts of each family lie


@dataclass(frozen=True)
class Row:
    """A part, or one in every layer `{i}`, or one for every expert `{e}` too."""

    name: str
    type: PartType
    place: str  # what it is for: parts of two models at one place in one layer are each other's counterparts
    path: str  # from the module that holds the layers; a|b: the first that there is
    needed: bool = False  # without it this is no model of the family


@dataclass(frozen=True)
class Layout:
    family: ModelFamily
    model_types: tuple[str, ...]
    rows: tuple[Row, ...]
    marks: tuple[tuple[str, ...], ...]  # without a configuration: paths in a layer that tell the family, any group
    norm_plus_one: bool = False  # norms multiply by 1 + weight


HEAD = Row("output_head", PartType.OUTPUT_HEAD, "logits", "lm_head")  # beside what holds the layers, not in it
GPT2_ROWS = (
    Row("embedding", PartType.EMBEDDING, "tokens", "wte", needed=True),
    Row("pos_embedding", PartType.EMBEDDING, "positions", "wpe", needed=True),
    Row("layer_{i}", PartType.FULL_LAYER, "layer", "h.{i}", needed=True),
    Row("ln_1_{i}", PartType.LAYER_NORM, "before attention", "h.{i}.ln_1"),
    Row("attention_{i}", PartType.ATTENTION, "attention", "h.{i}.attn", needed=True),
    Row("ln_cross_attn_{i}", PartType.LAYER_NORM, "before cross attention", "h.{i}.ln_cross_attn"),
    Row("cross_attention_{i}", PartType.ATTENTION, "cross attention", "h.{i}.crossattention"),
    Row("ln_2_{i}", PartType.LAYER_NORM, "before ffn", "h.{i}.ln_2"),
    Row("ffn_{i}", PartType.FFN, "ffn", "h.{i}.mlp", needed=True),
    Row("ln_f", PartType.LAYER_NORM, "final", "ln_f"),
)
# Older Transformers' Mixtral has block_sparse_moe with a list of experts; since version 5 they are packed in a tensor.
LLAMA_ROWS = (
    Row("embedding", PartType.EMBEDDING, "tokens", "embed_tokens", needed=True),
    Row("rotary_emb", PartType.ROTARY_EMB, "rotations", "rotary_emb"),
    Row("layer_{i}", PartType.FULL_LAYER, "layer", "layers.{i}", needed=True),
    Row("input_layernorm_{i}", PartType.LAYER_NORM, "before attention", "layers.{i}.input_layernorm"),
    Row("attention_{i}", PartType.ATTENTION, "attention", "layers.{i}.self_attn", needed=True),
    Row("q_norm_{i}", PartType.LAYER_NORM, "queries", "layers.{i}.self_attn.q_norm|layers.{i}.self_attn.q_layernorm"),
    Row("k_norm_{i}", PartType.LAYER_NORM, "keys", "layers.{i}.self_attn.k_norm|layers.{i}.self_attn.k_layernorm"),
    Row("post_attention_layernorm_{i}", PartType.LAYER_NORM, "before ffn", "layers.{i}.post_attention_layernorm"),
    Row("pre_feedforward_layernorm_{i}", PartType.LAYER_NORM, "before ffn", "layers.{i}.pre_feedforward_layernorm"),
    Row("ffn_{i}", PartType.FFN, "ffn", "layers.{i}.mlp|layers.{i}.block_sparse_moe", needed=True),
    Row(
        "gate_{i}",
        PartType.GATE,
        "gate",
        "layers.{i}.mlp.gate|layers.{i}.mlp.router|layers.{i}.block_sparse_moe.gate|layers.{i}.block_sparse_moe.router",
    ),
    Row(
        "expert_{i}_{e}",
        PartType.EXPERT,
        "expert",
        "layers.{i}.mlp.experts.{e}|layers.{i}.block_sparse_moe.experts.{e}",
    ),
    Row("experts_{i}", PartType.EXPERT, "experts", "layers.{i}.mlp.experts|layers.{i}.block_sparse_moe.experts"),
    Row("shared_expert_{i}", PartType.EXPERT, "shared expert", "layers.{i}.mlp.shared_expert"),
    Row("shared_expert_gate_{i}", PartType.GATE, "shared expert's gate", "layers.{i}.mlp.shared_expert_gate"),
    Row("post_feedforward_layernorm_{i}", PartType.LAYER_NORM, "after ffn", "layers.{i}.post_feedforward_layernorm"),
    Row("norm", PartType.LAYER_NORM, "final", "norm|final_layernorm"),
)
LAYOUTS = (
    Layout(ModelFamily.GPT2, ("gpt2",), GPT2_ROWS, (("attn.c_attn", "mlp.c_fc"),)),
    Layout(
        ModelFamily.GEMMA,
        ("gemma", "gemma2", "gemma3", "gemma3_text"),
        LLAMA_ROWS,
        (("pre_feedforward_layernorm",),),
        norm_plus_one=True,
    ),
    Layout(ModelFamily.PHI, ("phi", "phi3", "phimoe"), LLAMA_ROWS, (("mlp.gate_up_proj",), ("mlp.fc1",))),
    Layout(
        ModelFamily.QWEN,
        ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
        LLAMA_ROWS,
        (("self_attn.q_norm",), ("mlp.shared_expert",), ("self_attn.q_proj.bias", "!self_attn.o_proj.bias")),
    ),
    Layout(
        ModelFamily.MISTRAL,
        ("mistral", "mixtral", "ministral"),
        LLAMA_ROWS,
        (("block_sparse_moe",), ("mlp.experts",)),
    ),
    Layout(ModelFamily.LLAMA, ("llama",), LLAMA_ROWS, (("self_attn.q_proj", "mlp.gate_proj"),)),
)

# ---- decomposers


class ModelDecomposer(ABC):
    """How the models of a kind are taken apart. `register_decomposer` adds one."""

    @abstractmethod
    def detect(self, model: nn.Module, model_id: str) -> bool:
        """Whether this is such a model."""

    @abstractmethod
    def decompose(self, model: nn.Module, model_id: str) -> ModelSpec:
        """Its parts. Weights, counts and what is uncovered need not be filled in: `decompose` below counts them."""

    def get_module(self, model: nn.Module, part: PartSpec) -> nn.Module:
        return model.get_submodule(part.module_path)


class FamilyDecomposer(ModelDecomposer):
    """The models that a row of LAYOUTS describes.

    A GPT-2 of L layers has model-garage's 5 L + 4 parts (64 for 12 layers). A Llama has its 5 L + 3 (embedding, norm,
    output_head; attention_i, ffn_i, layer_i and two norms) and beside them what model-garage leaves out: rotary_emb
    where that is a module (in Transformers' models, not in our GPT), q_norm_i and k_norm_i, Gemma's two further norms,
    gate_i, and experts_i where they are packed in one module, else expert_i_e.
    """

    def __init__(self, layout: Layout):
        self.layout = layout

    def detect(self, model: nn.Module, model_id: str = "") -> bool:
        root = self._root(model)
        if root is None:
            return False
        if kind := model_type(model):
            return kind in self.layout.model_types
        layers = next(row.path.removesuffix(".{i}") for row in self.layout.rows if row.type is PartType.FULL_LAYER)
        layer = model.get_submodule(joined(root, layers))[0]
        if isinstance(model, GPT):  # of a kind that no family of Transformers' has
            return self.layout.family in (ModelFamily.GPT2, ModelFamily.LLAMA)
        return any(
            all((attribute(layer, path.removeprefix("!")) is None) == path.startswith("!") for path in group)
            for group in self.layout.marks
        )

    def decompose(self, model: nn.Module, model_id: str) -> ModelSpec:
        root = self._root(model)
        if root is None:
            raise ValueError(f"{model_id} has no layers like those of {self.layout.family.value}")
        parts = {}
        for name, row, path, layer in self._found(model, root):
            parts[name] = describe(model, path, row.type, row.place, layer)
        for name, part in parts.items():
            if name.startswith("post_attention_layernorm") and f"pre_feedforward_layernorm_{part.layer_idx}" in parts:
                part.extra_info["place"] = "after attention"
            if part.part_type is PartType.LAYER_NORM:
                part.extra_info.setdefault("plus_one", self.layout.norm_plus_one)
        return summarised(model, model_id, self.layout.family, parts)

    def _root(self, model: nn.Module) -> str | None:
        """The path of the module that holds the embedding and the layers, also within a wrapper; None if none does."""
        needed = [row.path.split("|") for row in self.layout.rows if row.needed]
        for path, module in model.named_modules():
            if all(any(attribute(module, one.format(i=0)) is not None for one in several) for several in needed):
                return path
        return None

    def _found(self, model: nn.Module, root: str) -> Iterator[tuple[str, Row, str, int | None]]:
        """Name, row, path and layer of every part that there is, in the order in which a token passes them."""
        holder = model.get_submodule(root)
        rows = self.layout.rows
        of_layers = [row for row in rows if "{i}" in row.path]
        first, last = rows[: rows.index(of_layers[0])], rows[rows.index(of_layers[-1]) + 1 :]
        for row in first:
            yield from self._present(holder, root, row, None)
        layer = 0
        while attribute(holder, of_layers[0].path.format(i=layer)) is not None:
            for row in of_layers:
                yield from self._present(holder, root, row, layer)
            layer += 1
        for row in last:
            yield from self._present(holder, root, row, None)
        above = root
        while above:  # the head is not where the layers are, but beside that or further out
            above = above.rpartition(".")[0]
            if attribute(model, joined(above, HEAD.path)) is not None:
                yield HEAD.name, HEAD, joined(above, HEAD.path), None
                return

    def _present(
        self, holder: nn.Module, root: str, row: Row, layer: int | None
    ) -> Iterator[tuple[str, Row, str, int | None]]:
        for path in row.path.split("|"):
            if "{e}" in path:
                expert = 0
                while attribute(holder, one := path.format(i=layer, e=expert)) is not None:
                    yield row.name.format(i=layer, e=expert), row, joined(root, one), layer
                    expert += 1
                if expert:
                    return
            elif isinstance(module := attribute(holder, path.format(i=layer)), nn.Module):
                if row.place == "experts" and isinstance(module, nn.ModuleList):
                    continue  # each of them is a part
                yield row.name.format(i=layer), row, joined(root, path.format(i=layer)), layer
                return


# What a module of another architecture is, by the name of its class, and where it may be; the first that fits.
KINDS = (
    (PartType.ROTARY_EMB, r"Rotary", "anywhere"),
    (PartType.LAYER_NORM, r"Norm", "anywhere"),
    (PartType.ATTENTION, r"Att(entio)?n", "in a layer"),
    (PartType.GATE, r"Router|Gate$", "in a layer"),
    (PartType.FFN, r"MLP|FFN?$|FeedForward|Intermediate|Output|(?i:moe)", "in a layer"),
    (PartType.OUTPUT_HEAD, r"Head$|Classifier", "outside"),
)
HALVES = r"(fc|lin|linear)_?[12]"  # names of an FFN's layers where it is no module of its own
HEADS = ("lm_head", "classifier", "score", "qa_outputs", "head")


class GenericDecomposer(ModelDecomposer):
    """Any model: its layers are the lists of modules with weights, and what is in them is known by names of classes.

    Parts have the usual names where there is one of a kind in a layer, else those of their modules. Models with several
    stacks of layers, as T5's encoder and decoder, have the stack's name before: encoder_attention_0.
    """

    def detect(self, model: nn.Module, model_id: str = "") -> bool:
        return True

    def decompose(self, model: nn.Module, model_id: str) -> ModelSpec:
        walked = self._walk(model, model, "", None, "")
        found = sorted(walked, key=lambda entry: entry[1] is PartType.OUTPUT_HEAD)  # last, wherever it is listed
        stacks = list(dict.fromkeys(stack for _, _, layer, stack in found if layer is not None))
        prefixes = prefixes_of(stacks)
        names = {}
        for path, kind, layer, stack in found:
            alone = sum(other[1:] == (kind, layer, stack) for other in found) == 1
            end = "" if layer is None else f"_{layer}"
            names[path] = f"{prefixes[stack]}{self._name(model, path, kind, alone and layer is not None)}{end}"
        taken, parts = Counter(names.values()), {}
        for path, kind, layer, stack in found:
            name = names[path]
            if taken[name] > 1:
                inside = path.removeprefix(f"{stack}.{layer}.").replace(".", "_")
                name = inside if layer is None else f"{prefixes[stack]}{inside}_{layer}"
                name = path if name in taken or name in parts else name
            place = name.removesuffix(f"_{layer}")
            place = {"embedding": "tokens", "pos_embedding": "positions", "output_head": "logits"}.get(place, place)
            parts[name] = describe(model, path, kind, place, layer)
        spec = summarised(model, model_id, ModelFamily.UNKNOWN, parts)
        if len(stacks) > 1:
            spec.extra_info["stacks"] = {stack: len(model.get_submodule(stack)) for stack in stacks}
        return spec

    def _walk(
        self, model: nn.Module, module: nn.Module, path: str, layer: int | None, stack: str
    ) -> Iterator[tuple[str, PartType, int | None, str]]:
        """Path, type, layer and stack of every part, the outermost module that is one, and of every layer."""
        for name, child in module.named_children():
            here = f"{path}.{name}".lstrip(".")
            if layer is None and is_stack(child):
                for i, one in enumerate(child):
                    yield f"{here}.{i}", PartType.FULL_LAYER, i, here
                    yield from self._walk(model, one, f"{here}.{i}", i, here)
            elif kind := self._kind(model, name, child, layer is not None):
                yield here, kind, layer, stack
            else:
                yield from self._walk(model, child, here, layer, stack)

    def _kind(self, model: nn.Module, name: str, module: nn.Module, inside: bool) -> PartType | None:
        if isinstance(module, nn.Embedding):
            return PartType.EMBEDDING
        if not inside and (module is output_of(model) or (name in HEADS and holds_numbers(module))):
            return PartType.OUTPUT_HEAD
        if inside and isinstance(module, nn.Linear) and re.fullmatch(HALVES, name):
            return PartType.FFN
        places = ("anywhere", "in a layer" if inside else "outside")
        kinds = (
            kind for kind, pattern, place in KINDS if place in places and re.search(pattern, type(module).__name__)
        )
        return next(kinds, None) if holds_numbers(module) else None

    def _name(self, model: nn.Module, path: str, kind: PartType, alone: bool) -> str:
        own, module = path.rpartition(".")[2], model.get_submodule(path)
        if kind is PartType.FULL_LAYER:
            return "layer"
        if kind is PartType.EMBEDDING:
            return "embedding" if module is input_of(model) else "pos_embedding" if "pos" in own else own
        if kind is PartType.ATTENTION:
            crosses = re.search("(?i)cross|encdec|encoder_attn", own + type(module).__name__)
            return "cross_attention" if crosses else "attention"
        if kind is PartType.OUTPUT_HEAD:
            return "output_head"
        if kind is PartType.FFN and alone:
            return "ffn"
        return own


def prefixes_of(stacks: list[str]) -> dict[str, str]:
    """What the names of a stack's parts begin with: nothing if there is one stack, its owner's name or, if two owners
    have one name, its whole path."""
    owners = {stack: stack.split(".")[:-1] for stack in stacks}
    count = Counter(owner[-1] for owner in owners.values() if owner)
    prefixes = {"": ""} | dict.fromkeys(stacks, "")
    if len(stacks) > 1:
        for stack, owner in owners.items():
            enough = owner[-1:] if owner and count[owner[-1]] == 1 else owner
            prefixes[stack] = "".join(f"{part}_" for part in enough)
    return prefixes


def is_stack(module: nn.Module) -> bool:
    """Whether these are layers: modules of one class, one behind the other, that hold more than one weight each."""
    children = list(module.children()) if isinstance(module, nn.ModuleList | nn.Sequential) else []
    return bool(children) and all(
        type(child) is type(children[0]) and any(child.children()) and holds_numbers(child) for child in children
    )


def holds_numbers(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(), *module.buffers()))


def input_of(model: nn.Module) -> nn.Module | None:
    """The embedding of tokens: the one that the model names, or the largest."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # not a Transformers model, or one without tokens
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        return max(tables, key=lambda table: table.num_embeddings, default=None)


def output_of(model: nn.Module) -> nn.Module | None:
    """The head that the model names."""
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # not a Transformers model, or one without a head
        return None


def joined(*path: str) -> str:
    return ".".join(filter(None, path))


# ---- the whole


def summarised(model: nn.Module, model_id: str, family: ModelFamily, parts: dict[str, PartSpec]) -> ModelSpec:
    """A spec whose numbers are those of its parts, where these tell, and of the configuration."""
    values = configuration(model)
    attention = next((part for part in parts.values() if part.part_type is PartType.ATTENTION), None)
    tokens = next((part for part in parts.values() if part.extra_info.get("place") == "tokens"), None)
    places = next((part for part in parts.values() if part.extra_info.get("place") == "positions"), None)
    layers = [part for part in parts.values() if part.part_type is PartType.FULL_LAYER]
    extra = {"model_type": model_type(model), "class": type(model).__name__}
    weight = next(iter(model.parameters()), None)
    extra["dtype"] = str(weight.dtype).removeprefix("torch.") if weight is not None else None
    if attention is not None:
        extra["head_dim"] = attention.head_dim
        extra["num_kv_heads"] = attention.extra_info.get("num_kv_heads")
    ropes = [rope for layer in range(len(layers)) if (rope := rope_of(values, layer))]
    windows = [window_of(values, layer) for layer in range(len(layers))]
    extra["positions"] = "learned" if places else "rope" if ropes else None
    if ropes:
        extra["rope_theta"] = max(rope["rope_theta"] for rope in ropes)  # that of layers that see everything
    if any(windows):
        extra["sliding_window"] = max(window for window in windows if window)
        extra["global_layers"] = [layer for layer, window in enumerate(windows) if not window]
    return ModelSpec(
        model_id=model_id,
        family=family,
        hidden_dim=width_of(values) or (tokens.output_dim if tokens else None),
        num_layers=len(layers),
        num_heads=attention.num_heads if attention else heads_of(values),
        vocab_size=tokens.input_dim if tokens else values.get("vocab_size"),
        max_seq_len=context_of(values) or (places.input_dim if places else None),
        parts=parts,
        extra_info=extra,
    )


def count(model: nn.Module, spec: ModelSpec) -> None:
    """Fill in what is counted: weights, parameters, bytes, what is tied to what, and the modules in no part.

    Raises ValueError where a part's path leads to nothing in the model.
    """
    modules, owners = dict(model.named_modules()), {}
    for name, part in spec.parts.items():
        if part.module_path not in modules:
            raise ValueError(
                f"{spec.model_id}: the part {name} would be {part.module_path}, and there is no such module"
            )
        module = modules[part.module_path]
        part.parameters, part.bytes = size(module)
        if part.part_type is not PartType.FULL_LAYER:
            part.weights = {key: list(tensor.shape) for key, tensor in oriented(module).items()}
        if part.part_type in (PartType.EMBEDDING, PartType.OUTPUT_HEAD):
            for tensor in module.parameters():
                if (owner := owners.setdefault(id(tensor), name)) != name:
                    part.extra_info["tied_to"] = owner
    spec.parameters, spec.bytes = size(model)
    small = {part.module_path for part in spec.parts.values() if part.part_type is not PartType.FULL_LAYER}
    held = {id(tensor) for path in small for tensor in modules[path].parameters()}
    for path, module in modules.items():
        ends = re.finditer(r"\.|$", path)
        leaf = not any(module.children()) and not isinstance(module, nn.ModuleList | nn.ModuleDict)
        own = any(id(tensor) not in held for tensor in module.parameters(recurse=False))
        if (leaf or own) and path and not any(path[: end.start()] in small for end in ends):
            spec.uncovered.append(path)


# ---- which decomposer

FALLBACK = float("-inf")
_decomposers: list[tuple[float, ModelDecomposer]] = [
    *((0, FamilyDecomposer(layout)) for layout in LAYOUTS),
    (FALLBACK, GenericDecomposer()),
]


def register_decomposer(decomposer: ModelDecomposer, priority: float = 1) -> None:
    """Have `decomposer` asked too: before the families' (priority 0) unless its priority is negative, and among equals
    the later one first. The generic one is always asked last."""
    if not isinstance(decomposer, ModelDecomposer):
        raise ValueError(f"{decomposer!r} is no ModelDecomposer: make an instance of a subclass")
    place = next(i for i, (other, _) in enumerate(_decomposers) if other <= priority)
    _decomposers.insert(place, (priority, decomposer))


def unregister_decomposer(decomposer: ModelDecomposer) -> None:
    _decomposers[:] = [entry for entry in _decomposers if entry[1] is not decomposer]


def decomposer_of(model: nn.Module, model_id: str = "") -> ModelDecomposer:
    return next(decomposer for _, decomposer in _decomposers if decomposer.detect(model, model_id))


def decompose(model: nn.Module, model_id: str) -> ModelSpec:
    """What a model is made of, with every path checked and every parameter counted. Runs nothing, reads no weights."""
    spec = decomposer_of(model, model_id).decompose(model, model_id)
    count(model, spec)
    return spec
