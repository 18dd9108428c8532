"""LoRA (Hu et al. 2021, arXiv 2106.09685) for any `nn.Module`: add low-rank adapters, train, switch, blend, merge.

    apply_lora(model, LoRAConfig(rank=8))  # freezes the model and adds an adapter, the only part that trains
    ...
    merge_lora(model)  # a plain model again, with the adapter in its weights

A targeted layer stays the object it is, with its parameters under their old names, so that the base's checkpoints and
ties are not disturbed. It gets a child, `lora`, that holds its adapters by name (`h.0.attn.c_attn.lora.default.A`), and
while it has one, its class is a subclass whose forward adds `scale * B A x`. A forward hook would spare the subclass,
but a model compiled before the hook came would go on computing without the adapter, and say nothing.
"""

import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_config import LoRAConfig, is_number, nearest
from lora_layers import adaptable, features, is_quantised, plan_of, ties_of
from words import first_few, misfits

DEFAULT = "default"  # an adapter's name when nobody gives one; PEFT's too


class Adapter(nn.Module):
    """What one adapter adds to one layer: A (rank, in) and B (out, rank), which stand for a delta of scale * B A."""

    keys = ("lora_A.weight", "lora_B.weight")  # PEFT's names in a file

    def __init__(self, A: Tensor, B: Tensor, alpha: float, use_rslora: bool = False, dropout: float = 0.0):
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.rank, self.alpha, self.use_rslora, self.dropout = A.size(0), alpha, use_rslora, dropout
        self.scale = alpha / (math.sqrt(self.rank) if use_rslora else self.rank)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., in) to (..., out), computed in `dtype`."""
        return F.linear(self.scaled(x, dtype), self.B.to(dtype))

    def scaled(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The (..., rank) in between, which is the cheap place to scale."""
        return self.down(x, self.A.to(dtype)) * self.scale

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(F.dropout(x, self.dropout, self.training), A)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"


class EmbeddingAdapter(Adapter):
    """The same for an embedding, whose input is one token out of `in`: A x is a column of A."""

    keys = ("lora_embedding_A", "lora_embedding_B")
    padding_idx: int | None = None  # the layer's: this token's column gets no gradient

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        return F.embedding(x, A.t(), self.padding_idx)


def kind_of(layer: nn.Module) -> type[Adapter]:
    return EmbeddingAdapter if isinstance(layer, nn.Embedding) else Adapter


class Adapters(nn.ModuleDict):
    """The adapters of one layer, by name."""

    active: str | None = None  # the one that acts, if it is here

    def acting(self) -> Adapter | None:
        return self._modules.get(self.active)  # a ModuleDict has no get of its own


class Adapted:
    """Mixed into the class of a layer for as long as it has adapters."""

    def forward(self, input: Tensor) -> Tensor:  # as torch's own layers call it
        y, adapter = super().forward(input), self.lora.acting()
        return y if adapter is None else y + adapter(input, y.dtype)

    def extra(self, input: Tensor) -> tuple[Tensor, Tensor] | None:
        """The operands of the product that the acting adapter adds, (..., rank) and (out, rank), if there is one."""
        adapter = self.lora.acting()
        return None if adapter is None else (adapter.scaled(input, input.dtype), adapter.B)


@cache
def _adapted_class(plain: type) -> type:
    return type(f"LoRA{plain.__name__}", (Adapted, plain), {"plain_class": plain})


def _become(layer: nn.Module, new_class: type) -> None:
    layer.__class__ = new_class
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # before 2.13 a compiled model does not look at its modules' classes again


def change_class(layer: nn.Module, new_class: type) -> None:
    """Make a layer one of another class, beneath its adapters if it has some."""
    _become(layer, _adapted_class(new_class) if isinstance(layer, Adapted) else new_class)


def _attach(layer: nn.Module, name: str, adapter: Adapter) -> None:
    if not isinstance(layer, Adapted):
        layer.lora = Adapters()
        _become(layer, _adapted_class(type(layer)))
    if isinstance(layer, nn.Embedding):
        adapter.padding_idx = layer.padding_idx
    layer.lora[name] = adapter.train(layer.training)


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have adapters, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Adapted)}


def adapter_names(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(name for layer in _adapted(model).values() for name in layer.lora))


def count_adapter_parameters(model: nn.Module) -> int:
    """Of all adapters together."""
    return sum(p.numel() for layer in _adapted(model).values() for p in layer.lora.parameters())


def check_frozen(model: nn.Module) -> None:
    """Raise ValueError for a model of which more trains than adapters: saved as an adapter, it would lose the rest."""
    adapters = {p for layer in _adapted(model).values() for p in layer.lora.parameters()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and p not in adapters]
    if others:
        raise ValueError(
            f"this {type(model).__name__} trains what belongs to no adapter and would not be saved with one: "
            f"{first_few(others)}; freeze it (requires_grad_(False)) and keep what it has learned yourself, or merge "
            "(lora.merge_lora) and save the whole model"
        )


def active_adapter(model: nn.Module) -> str | None:
    return next((layer.lora.active for layer in _adapted(model).values()), None)


def adapters_of(model: nn.Module, name: str | None) -> dict[str, Adapter]:
    """{path: adapter} of the adapter called `name`, of the active one for None. Raises ValueError if there is none."""
    name = active_adapter(model) if name is None else name
    adapters = {path: layer.lora[name] for path, layer in _adapted(model).items() if name in layer.lora}
    if not adapters:
        wanted, here = name or "that is active", ", ".join(adapter_names(model)) or "none at all"
        raise ValueError(f"this {type(model).__name__} has no adapter {wanted}, it has {here}")
    return adapters


@dataclass(frozen=True)
class LoRAReport:
    matched: tuple[str, ...]  # paths of the adapted layers
    trainable: int  # parameters of the adapter
    total: int  # parameters of the model, adapters included


def apply_lora(
    model: nn.Module,
    config: LoRAConfig,
    *,
    adapter: str = DEFAULT,
    dtype: torch.dtype | None = None,
    untie: bool = False,
) -> LoRAReport:
    """Freeze the model and add an adapter, which changes nothing until it has trained: its B is zero.

    A and B get `dtype`, by default each layer's own. A layer that shares its weight with another, as a tied output head
    does, is refused unless `untie`: they share it while training, but merging gives the layer a weight of its own.
    Raises ValueError, and leaves the model alone, if it has LoRA already or something named matches no layer.
    """
    if names := adapter_names(model):
        raise ValueError(f"this {type(model).__name__} has LoRA already ({', '.join(names)}): add_adapter adds another")
    return add_adapter(model, adapter, config, dtype=dtype, untie=untie)


def add_adapter(
    model: nn.Module, adapter: str, config: LoRAConfig, *, dtype: torch.dtype | None = None, untie: bool = False
) -> LoRAReport:
    """As `apply_lora`, beside the adapters that are there, on their layers or others. `set_active` turns to it."""
    plan, parts = plan_of(model, config), {}
    _check_room(model, adapter, plan, untie)  # before a number is drawn
    for path, (rank, alpha) in plan.items():
        layer = model.get_submodule(path)
        weight, (n_in, n_out) = layer.weight, features(layer)
        # Drawn in the default dtype and then cast, so that a seed gives the same numbers in every dtype.
        A, B = torch.zeros(rank, n_in, device=weight.device), torch.zeros(n_out, rank, device=weight.device)
        if isinstance(layer, nn.Embedding):
            nn.init.normal_(B)  # and A = 0, as in the paper's code: the row of a token that never comes never moves
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        parts[path] = A, B, alpha
    return install(model, adapter, parts, config.use_rslora, config.dropout, dtype=dtype, untie=untie)


def install(
    model: nn.Module,
    adapter: str,
    parts: Mapping[str, tuple[Tensor, Tensor, float]],  # path of a layer: A (rank, in), B (out, rank), alpha
    use_rslora: bool = False,
    dropout: float = 0.0,
    *,
    dtype: torch.dtype | None = None,
    untie: bool = False,
) -> LoRAReport:
    """Freeze the model and add an adapter of which the numbers exist, say from a file.

    Raises ValueError, and leaves the model alone, for a layer that is not there or of another shape.
    """
    _check_room(model, adapter, parts, untie)
    check_fit(model, parts)
    layers, active = adaptable(model), active_adapter(model)
    for path, (A, B, alpha) in parts.items():
        layer, weight = layers[path], layers[path].weight
        to = dtype or (A.dtype if is_quantised(weight) else weight.dtype)
        A, B = (tensor.to(weight.device, to) for tensor in (A, B))
        _attach(layer, adapter, kind_of(layer)(A, B, alpha, use_rslora, dropout))
    if active is None:
        model.requires_grad_(False)
    set_active(model, active or adapter)
    trainable = sum(p.numel() for part in adapters_of(model, adapter).values() for p in part.parameters())
    return LoRAReport(tuple(parts), trainable, sum(p.numel() for p in model.parameters()))


def check_fit(model: nn.Module, parts: Mapping[str, tuple[Tensor, Tensor, float]]) -> None:
    """Raise ValueError for `parts` of an adapter, as `install` takes them, that are for other layers than these."""
    layers, problems = adaptable(model), []
    for path, (A, B, _) in parts.items():
        if path not in layers:
            problems.append(f"there is no layer {path} (nearest: {nearest(path, layers)})")
        elif (A.size(1), B.size(0)) != features(layers[path]) or A.size(0) != B.size(1):
            shapes = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
            problems.append(f"{path} is (in, out) = {features(layers[path])}, which {shapes} do not fit")
    raise_some("the adapter is not for this model", problems)


def _check_room(model: nn.Module, name: str, paths: Iterable[str], untie: bool) -> None:
    """Raise ValueError for a name that cannot be this adapter's, and for shared weights that nobody has allowed."""
    # An adapter is an entry of an nn.ModuleDict, so its name must not be one of that class's own.
    if name in adapter_names(model) or not re.fullmatch(r"[\w-]+", name) or hasattr(Adapters(), name):
        raise ValueError(
            f"an adapter cannot be called {name!r}: it needs letters, digits, - and _, and a name not in use"
        )
    ties = ties_of(model)
    tied = [f"{path} shares its weight with {' and '.join(ties[path])}" for path in paths if path in ties]
    if tied and not untie:
        raise ValueError(f"{'; '.join(tied)}: merging would untie them. Leave them out, or allow it with untie=True")


def raise_some(what: str, problems: list[str]) -> None:
    """Raise ValueError with the first few problems, if there are any."""
    if problems:
        raise ValueError(f"{what}: {first_few(problems, 6)}")


def round_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold what is frozen of linear layers in the dtype that their products are computed in: the numbers that autocast
    would make of it at every step, in half the memory. A weight that is shared with another module stays as it is."""
    for parameter, layer, name in frozen_weights(model):
        setattr(layer, name, nn.Parameter(parameter.to(dtype), requires_grad=False))


def frozen_weights(model: nn.Module) -> list[tuple[nn.Parameter, nn.Module, str]]:
    """What `round_frozen` rounds: (parameter, layer, name there)."""
    ties = ties_of(model)
    return [
        (parameter, layer, name)
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and path not in ties
        for name, parameter in layer.named_parameters(recurse=False)
        if not parameter.requires_grad
    ]


def set_active(model: nn.Module, adapter: str) -> None:
    """Let this adapter act and train, and no other."""
    adapters_of(model, adapter)
    for layer in _adapted(model).values():
        layer.lora.active = adapter
        for name, other in layer.lora.items():
            other.requires_grad_(name == adapter)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The base model, for as long as the context lasts."""
    before = [(layer.lora, layer.lora.active) for layer in _adapted(model).values()]
    try:
        for adapters, _ in before:
            adapters.active = None
        yield model
    finally:
        for adapters, active in before:
            adapters.active = active


@torch.no_grad()
def add_weighted_sum(model: nn.Module, adapter: str, weights: Mapping[str, float]) -> None:
    """Add an adapter whose delta is the weighted sum of the deltas of others, and its rank the sum of their ranks.

    Stacking the As and the scaled Bs makes it exact; adding As to As and Bs to Bs would multiply across adapters.
    """
    _check_room(model, adapter, (), untie=False)
    if not weights or not all(is_number(weight) for weight in weights.values()):
        raise ValueError(f"weights={weights!r} must give a number to each adapter of the sum")
    parts = defaultdict(list)
    for name, weight in weights.items():
        for path, part in adapters_of(model, name).items():
            parts[path].append((part, weight * part.scale))
    for path, scaled in parts.items():
        # At least float32, for B takes up the scales.
        A = torch.cat([part.A.to(torch.promote_types(part.A.dtype, torch.float32)) for part, _ in scaled])
        B = torch.cat([part.B.to(A.dtype) * scale for part, scale in scaled], dim=1)
        layer = model.get_submodule(path)
        _attach(layer, adapter, kind_of(layer)(A, B, alpha=A.size(0)).requires_grad_(False))


@dataclass(frozen=True)
class MergeReport:
    merged: tuple[str, ...]  # paths of the layers whose weights took up a delta
    untied: tuple[str, ...]  # those that shared their weight with another module before
    largest_delta: float
    rounding_loss: float  # how much of the delta the weights' dtype could not hold, a ratio of Frobenius norms


def merge_lora(model: nn.Module, adapter: str | None = None, dtype: torch.dtype | None = None) -> MergeReport:
    """Add an adapter's deltas to the weights and take LoRA out: the plain modules of before, all trainable.

    A sum is cast once, to its weight's dtype or to `dtype`: torch.float32 merges a bfloat16 model without rounding, and
    `model.float()` then gives it the rest in that dtype. A merged layer that shared its weight gets its own, and if the
    token embedding is one of the two, `model.config.tie_word_embeddings` becomes False, or loading would tie them
    again. Raises ValueError, and changes nothing, for a sum that is not finite, a quantised weight, or several adapters
    of which none is named.
    """
    if adapter is None and len(names := adapter_names(model)) > 1:
        raise ValueError(f"merging keeps one adapter and drops the others, so name it: {', '.join(names)}")
    parts, ties = adapters_of(model, adapter), ties_of(model)
    layers = {path: model.get_submodule(path) for path in parts}
    largest = lost = norm = 0.0
    for path, part in parts.items():  # everything is tried before anything is changed
        _, delta, error = _merge(path, layers[path], part, dtype)
        largest = max(largest, delta.abs().max().item())
        lost, norm = lost + error.square().sum().item(), norm + delta.square().sum().item()
    for path, part in parts.items():
        layers[path].weight = _merge(path, layers[path], part, dtype)[0]
    remove_lora(model)
    untied = tuple(path for path in parts if path in ties)
    shared = {p for path in untied for p in (path, *ties[path])}
    if any(isinstance(model.get_submodule(p), nn.Embedding) for p in shared):
        _unset_tie(model)
    return MergeReport(tuple(parts), untied, largest, math.sqrt(lost / norm) if norm else 0.0)


def _unset_tie(model: nn.Module) -> None:
    """Have the configuration, where there is one, no longer say that head and token embedding share a weight."""
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    try:
        config.tie_word_embeddings = False
    except FrozenInstanceError:
        model.config = replace(config, tie_word_embeddings=False)


@torch.no_grad()
def _merge(
    path: str, layer: nn.Module, adapter: Adapter, dtype: torch.dtype | None
) -> tuple[nn.Parameter, Tensor, Tensor]:
    """The merged weight, the delta in it, and the error of rounding their sum to `dtype` or the weight's own."""
    weight = layer.weight
    if is_quantised(weight):
        raise ValueError(f"{path} is quantised ({weight.dtype}): an adapter merges into dequantised weights only")
    # Autocast and TF32 round a float32 product, and leave a float64 one alone. MPS has no float64.
    exact = torch.float32 if weight.device.type == "mps" else torch.float64
    delta = adapter.scale * (adapter.B.to(exact) @ adapter.A.to(exact))  # (out, in)
    if not isinstance(layer, nn.Linear):
        delta = delta.t()  # Conv1D and embeddings store (in, out)
    total = weight.to(exact) + delta
    rounded = total.to(dtype or weight.dtype)
    if not rounded.isfinite().all():
        raise ValueError(f"{path} cannot be merged: the result has numbers that are not finite in {rounded.dtype}")
    return nn.Parameter(rounded, requires_grad=False), delta, rounded - total


def remove_lora(model: nn.Module) -> None:
    """Take LoRA out of the model and leave the weights as they are, all trainable."""
    for layer in _adapted(model).values():
        _become(layer, layer.plain_class)
        del layer.lora
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


@contextmanager
def merged(model: nn.Module, adapter: str | None = None) -> Iterator[nn.Module]:
    """The merged model for as long as the context lasts, then the unmerged one with its weights to the bit.

    Keeps the adapted layers' weights meanwhile: a delta that was rounded in cannot be subtracted out again.
    """
    parts = adapters_of(model, adapter)
    layers = {path: model.get_submodule(path) for path in parts}
    pristine = {path: layer.weight for path, layer in layers.items()}
    with disable_adapters(model):
        try:
            for path, part in parts.items():
                layers[path].weight = _merge(path, layers[path], part, None)[0]
            yield model
        finally:
            for path, weight in pristine.items():
                layers[path].weight = weight


def lora_state_dict(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """An adapter's own tensors, `<path>.lora_A.weight` (rank, in) and `<path>.lora_B.weight` (out, rank)."""
    return {
        f"{path}.{key}": tensor.detach()
        for path, part in adapters_of(model, adapter).items()
        for key, tensor in zip(part.keys, (part.A, part.B), strict=True)
    }


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor], adapter: str | None = None) -> None:
    """Fill an adapter from what `lora_state_dict` gave, cast to its dtype.

    Raises ValueError, and loads nothing, when a tensor is missing, belongs nowhere or has another shape.
    """
    own = lora_state_dict(model, adapter)
    shapes = ({key: tensor.shape for key, tensor in of.items()} for of in (state, own))
    raise_some("these tensors are not this adapter's", misfits(*shapes))
    for key, tensor in own.items():
        tensor.copy_(state[key])
