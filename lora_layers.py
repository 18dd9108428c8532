"""Which layers of a model LoRA can adapt, and which of them a LoRAConfig selects."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_config import ALL, ALL_LINEAR, LoRAConfig, nearest

GEMMA_NAMES = {  # parts of a module's path here and in Transformers, and in Gemma's own code
    "self_attn": "attn",
    "q_proj": "q_einsum",
    "k_proj": "kv_einsum",
    "v_proj": "kv_einsum",
    "o_proj": "attn_vec_einsum",
}

# In a regular expression, `attn` where a part of a path begins, which is what Gemma's code calls self_attn: behind what
# ends the part before, and any openings of groups, lookaheads too, with the alternatives that precede it there. Behind
# a wildcard it may be the end of self_attn itself.
_SOME = r"([^()]|\([^()]*\))*"
_BEHIND_A_PART = rf"(^({_SOME}\|)?|[./](\)\??)?|\\b|\[[./\\]+\])"
WHOLE_ATTN = rf"{_BEHIND_A_PART}(\((\?([:=!]|P<\w+>))?({_SOME}\|)?)*attn\b"

# These compute with the weights of their children and never call them: an adapter on such a child would do nothing.
BYPASSING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a layer that LoRA can adapt, None of any other module."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return None  # it is computed anew each time, as by torch.nn.utils.parametrizations, and no delta would stay
    if isinstance(module, nn.Linear):
        return (module.in_features, module.out_features) if _is_product(module) else None
    if isinstance(module, nn.Embedding):
        # A subclass with a forward of its own scales or shifts what it looks up, and a delta would miss that.
        plain = getattr(module, "plain_class", type(module)).forward is nn.Embedding.forward
        return (module.num_embeddings, module.embedding_dim) if plain and module.max_norm is None else None
    if weight.dim() == 2 and getattr(module, "nf", None) == weight.size(1):
        return weight.size(0), weight.size(1)  # Transformers' Conv1D: a linear layer that stores (in, out)
    return None


def _is_product(layer: nn.Linear) -> bool:
    """Whether a layer gives (B, out) of (B, in). A subclass may have a forward of its own: Falcon's for a product
    after all, the routers of Phi 3.5 MoE and Llama 4 for a choice of experts, to which no delta can be added."""
    plain = getattr(layer, "plain_class", type(layer))
    if plain.forward is nn.Linear.forward or is_quantised(layer.weight):
        return True
    x = layer.weight.new_ones(2, layer.in_features)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # a router may draw noise
            y = plain.forward(layer, x)
    except Exception:  # it may do anything
        return False
    return isinstance(y, Tensor) and y.shape == (2, layer.out_features)


def is_quantised(weight: Tensor) -> bool:
    """Whole numbers, or those of 8 bits, which mean nothing without a scale that lies elsewhere."""
    return not weight.is_floating_point() or weight.itemsize == 1


def ties_of(model: nn.Module) -> dict[str, list[str]]:
    """For each module that shares its weight with others, their paths."""
    owners = defaultdict(list)
    for path, module in model.named_modules():
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            owners[weight].append(path)
    return {path: [p for p in paths if p != path] for paths in owners.values() for path in paths if len(paths) > 1}


def _not_linear(model: nn.Module) -> set[str]:
    """The layers that all-linear leaves out: embeddings and the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()  # Transformers' models know theirs
    layers = adaptable(model).items()
    aside = {path for path, layer in layers if isinstance(layer, nn.Embedding) or layer is head}
    return aside | {path for path, _ in layers if path.split(".")[-1] == "lm_head"}


def _positions(model: nn.Module) -> set[str]:
    """The embeddings of a language model that are not its tokens', such as GPT-2's of positions."""
    tokens = getattr(model, "get_input_embeddings", lambda: getattr(model, "embedding", None))()
    embeddings = {path for path, layer in adaptable(model).items() if isinstance(layer, nn.Embedding)}
    return {path for path in embeddings if model.get_submodule(path) is not tokens} if tokens is not None else set()


def _selection(names: str | Collection[str]) -> dict[str, str]:
    """The entries of `targets` or `exclude`, each with the regular expression that it stands for."""
    if isinstance(names, str):
        return {names: names}
    return {name: rf"(.*[./])?{re.escape(name)}" for name in names}


def _find(entries: Mapping[str, str], paths: Iterable[str]) -> dict[str, list[str]]:
    """{entry: paths} for {entry: regular expression}.

    A path is spelled as the entry spells it, and in no other way: an expression that says what a path must not hold
    would match the spelling that holds it under another name.
    """
    found, paths = {}, list(paths)
    for entry, regex in entries.items():
        ours = any(name in entry for name in GEMMA_NAMES)
        gemmas = "einsum" in entry or (not ours and re.search(WHOLE_ATTN, entry) is not None)
        between = "/" if "/" in entry else "."
        found[entry] = [
            path
            for path in paths
            if any(re.fullmatch(regex, name.replace(".", between)) for name in _spellings(path, ours, gemmas))
        ]
    return found


def _spellings(path: str, ours: bool, gemmas: bool) -> list[str]:
    """A path as an entry may spell it: with our names, with Gemma's, or, where it has some of each, either way."""
    found, parts = [], path.split(".")
    if ours or not gemmas:
        found.append(path)
    if gemmas:
        names = GEMMA_NAMES if "self_attn" in parts else {}  # elsewhere attn is what it is called
        found.append(".".join(names.get(part, part) for part in parts))
    return found


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can have adapters, by path."""
    bypassed = {child for module in model.modules() for child in _bypassed(module)}
    return {path: m for path, m in model.named_modules() if m not in bypassed and features(m)}


def _bypassed(module: nn.Module) -> list[nn.Module]:
    """The children of a module that it never calls."""
    if isinstance(module, BYPASSING):
        return list(module.children())
    if hasattr(module, "A_log") and isinstance(step := getattr(module, "dt_proj", None), nn.Linear):
        return [step]  # Mamba's (Gu and Dao 2023, arXiv 2312.00752) adds its bias elsewhere
    shared, encoder = getattr(module, "shared", None), getattr(module, "encoder", None)
    own = getattr(encoder, "embed_tokens", None)  # T5's: then it looks up here, and `shared` only ties the weights
    both = isinstance(shared, nn.Embedding) and isinstance(own, nn.Embedding)
    return [shared] if both and shared is not own and shared.weight is own.weight else []


def matches(
    model: nn.Module, names: str | Collection[str], layers: Collection[str] | None = None
) -> dict[str, list[str]]:
    """{entry: paths of the layers that it selects} for `targets` or `exclude` as LoRAConfig takes them; `layers` are
    the paths to choose from, by default of all that LoRA can adapt."""
    layers = adaptable(model) if layers is None else layers
    if names in (ALL, ALL_LINEAR):
        aside = ties_of(model).keys() | _positions(model) if names == ALL else _not_linear(model)
        return {names: [path for path in layers if path not in aside]}
    return _find(_selection(names), layers)


def plan_of(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[int, float]]:
    """{path: (rank, alpha)} of the layers to adapt. Raises ValueError for everything named that finds nothing."""
    layers, targets, exclude = adaptable(model), matches(model, config.targets), matches(model, config.exclude)
    wanted, unwanted = ({path for paths in found.values() for path in paths} for found in (targets, exclude))
    paths = [path for path in layers if path in wanted - unwanted]
    ranks, alphas = (
        _find({key: rf"(.*[./])?({key})" for key in pattern}, paths)
        for pattern in (config.rank_pattern, config.alpha_pattern)
    )
    settings = {"targets": targets, "exclude": exclude, "rank_pattern": ranks, "alpha_pattern": alphas}
    missed = [(name, entry) for name, found in settings.items() for entry, matched in found.items() if not matched]
    if missed:
        words = (f"{name} entry {entry!r} (nearest: {nearest(entry, layers)})" for name, entry in missed)
        hint = "a list matches the ends of paths, a string is one regular expression for the whole of them"
        raise ValueError("these match no layer that LoRA can adapt: " + ", ".join(words) + "; " + hint)
    if not paths:
        raise ValueError(f"exclude={config.exclude!r} leaves none of the {len(wanted)} layers that targets match")
    # The first key that matches counts: going backwards, it comes last.
    rank = {path: config.rank_pattern[key] for key in reversed(ranks) for path in ranks[key]}
    alpha = {path: config.alpha_pattern[key] for key in reversed(alphas) for path in alphas[key]}
    return {path: (rank.get(path, config.rank), alpha.get(path, config.alpha)) for path in paths}
