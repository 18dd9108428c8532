"""Two models side by side: in what they differ, and which part of one could stand where the other's does.

A part fits where its weights have the same names and shapes and mean the same: as many heads, the same rotation, the
same activation. Parts are compared with their counterpart: what has the same place in the same layer. What a difference
would change only a little, or only beyond a window, is no obstacle but is said.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from registry.specs import ModelFamily, ModelSpec, PartSpec, PartType
from words import as_table

Fact = tuple[str, Callable[[PartSpec], Any]]


def _info(key: str) -> Callable[[PartSpec], Any]:
    return lambda part: part.extra_info.get(key)


def _said(key: str) -> Callable[[PartSpec], Any]:
    """A fact that is false where nothing is said."""
    return lambda part: bool(part.extra_info.get(key))


SIZES: tuple[Fact, ...] = (("inputs", lambda part: part.input_dim), ("outputs", lambda part: part.output_dim))
INNER: tuple[Fact, ...] = (
    ("inner width", lambda part: part.intermediate_dim),
    ("activation", _info("activation")),
    ("gated", _said("gated")),
    ("experts", _info("num_experts")),
    ("experts per token", _info("experts_per_token")),
)
MEANING: dict[PartType, tuple[Fact, ...]] = {  # what must be the same
    PartType.EMBEDDING: (("place", _info("place")), ("scaled by the root of the width", _said("scaled"))),
    PartType.ATTENTION: (
        ("place", _info("place")),
        ("heads", lambda part: part.num_heads),
        ("size of a head", lambda part: part.head_dim),
        ("heads of keys and values", _info("num_kv_heads")),
        ("norms of queries and keys", _said("qk_norm")),
        ("rotation", lambda part: rope_text(part.extra_info.get("rope"))),
        ("scores divided by the root of", _info("query_scalar")),
        ("cap on scores", _info("softcap")),
    ),
    PartType.FFN: INNER,
    PartType.EXPERT: INNER,
    PartType.LAYER_NORM: (("kind", _info("norm")), ("multiplies by 1 + weight", _said("plus_one"))),
    PartType.OUTPUT_HEAD: (("cap on logits", _info("softcap")),),
}
CAVEATS: tuple[Fact, ...] = (("window", _info("sliding_window")), ("eps", _info("eps")))  # what need not


def rope_text(rope: dict[str, Any] | None) -> str:
    if not rope:
        return "none"
    others = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta")}
    kind = "" if rope["rope_type"] == "default" else f"{rope['rope_type']}, "
    return f"{kind}base {rope['rope_theta']:,.0f}" + "".join(f", {key} {value}" for key, value in others.items())


def obstacles(a: ModelSpec, part_a: PartSpec, b: ModelSpec, part_b: PartSpec) -> list[str]:
    """Why the weights of `part_b` of b would be none for `part_a` of a; nothing if they would."""
    kind = part_a.part_type
    if kind is not part_b.part_type:
        return [f"one is of type {kind.value}, the other {part_b.part_type.value}"]
    if kind is PartType.ROTARY_EMB:
        return ["it has no weights"]
    found = [
        f"{label}: {text(of(part_a))} and {text(of(part_b))}"
        for label, of in (*SIZES, *MEANING.get(kind, ()))
        if of(part_a) != of(part_b)
    ]
    classes = [part.extra_info.get("class") for part in (part_a, part_b)]
    if ModelFamily.UNKNOWN in (a.family, b.family) and classes[0] != classes[1]:
        found.append(f"of a family that is not known, so only the same class will do: {classes[0]} and {classes[1]}")
    tokenizers = [spec.extra_info.get("tokenizer") for spec in (a, b)]
    of_tokens = part_a.extra_info.get("place") in ("tokens", "logits")
    if of_tokens and None not in tokenizers and tokenizers[0] != tokenizers[1]:
        found.append("the tokenizers differ, so ids mean other tokens")
    if kind is PartType.FULL_LAYER:
        return found + _obstacles_inside(a, part_a, b, part_b)
    return found or list(_misfits(part_a.weights, part_b.weights))


def _obstacles_inside(a: ModelSpec, part_a: PartSpec, b: ModelSpec, part_b: PartSpec) -> list[str]:
    ours, theirs = (_inside(spec, part) for spec, part in ((a, part_a), (b, part_b)))
    found = [
        f"only one has {place}" for place in dict.fromkeys([*ours, *theirs]) if (place in ours) != (place in theirs)
    ]
    for place in ours.keys() & theirs.keys():
        found += [f"{place[0]}: {reason}" for reason in obstacles(a, ours[place], b, theirs[place])]
    return sorted(found)


def _inside(spec: ModelSpec, layer: PartSpec) -> dict[tuple[str, int], PartSpec]:
    within = [part for part in spec.parts.values() if part.module_path.startswith(f"{layer.module_path}.")]
    return _placed(within)


def _placed(parts: Iterable[PartSpec]) -> dict[tuple[str, int], PartSpec]:
    """Parts by place; several experts have one, and are told apart by their order."""
    seen, found = Counter(), {}
    for part in parts:
        place = part.extra_info.get("place", part.module_path)
        found[place, seen[place]] = part
        seen[place] += 1
    return found


def _misfits(ours: dict[str, list[int]], theirs: dict[str, list[int]]) -> Iterator[str]:
    for name in dict.fromkeys([*ours, *theirs]):
        shapes = [f"is {'x'.join(map(str, w[name]))}" if name in w else "is not there" for w in (ours, theirs)]
        if shapes[0] != shapes[1]:
            yield f"{name} {shapes[0]} in one and {shapes[1]} in the other"


def caveats(a: ModelSpec, part_a: PartSpec, b: ModelSpec, part_b: PartSpec) -> list[str]:
    """What differs and is no obstacle."""
    pairs = [(label, of(part_a), of(part_b)) for label, of in CAVEATS]
    pairs.append(("precision", a.extra_info.get("dtype"), b.extra_info.get("dtype")))
    return [f"{label}: {text(ours)} and {text(theirs)}" for label, ours, theirs in pairs if ours != theirs]


def text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value))
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


# ---- the comparison


def compare(a: ModelSpec, b: ModelSpec) -> dict[str, Any]:
    """model-garage's keys, each a list of two; `verdicts`, more of the same with whether they agree; and under
    `compatible_parts` lists of {type, name_a, name_b, swappable, reason}:

    - same_dim: counterparts with equal input and output sizes, whether or not their weights fit;
    - attention_compatible, ffn_compatible: those whose weights fit, so that `swap` takes them;
    - refused: all others, with what is in the way.
    """
    facts = [facts_of(spec) for spec in (a, b)]
    return {
        "models": [a.model_id, b.model_id],
        "families": [a.family.value, b.family.value],
        "hidden_dims": [a.hidden_dim, b.hidden_dim],
        "num_layers": [a.num_layers, b.num_layers],
        "num_heads": [a.num_heads, b.num_heads],
        "vocab_sizes": [a.vocab_size, b.vocab_size],
        "compatible_parts": compatible_parts(a, b),
        "verdicts": {
            key: {"values": [one[key] for one in facts], "same": facts[0][key] == facts[1][key]} for key in facts[0]
        },
    }


def compatible_parts(a: ModelSpec, b: ModelSpec) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {
        key: [] for key in ("same_dim", "attention_compatible", "ffn_compatible", "refused")
    }
    lists = {PartType.ATTENTION: "attention_compatible", PartType.FFN: "ffn_compatible"}
    for name_a, name_b in counterparts(a, b):
        part_a, part_b = a.parts[name_a], b.parts[name_b]
        reasons = obstacles(a, part_a, b, part_b)
        pair = {"type": part_a.part_type.value, "name_a": name_a, "name_b": name_b, "swappable": not reasons}
        pair["reason"] = "; ".join(reasons or [likeness(part_a), *caveats(a, part_a, b, part_b)])
        if part_a.input_dim is not None and (part_a.input_dim, part_a.output_dim) == (
            part_b.input_dim,
            part_b.output_dim,
        ):
            found["same_dim"].append(pair)
        if reasons:
            found["refused"].append(pair)
        elif part_a.part_type in lists:
            found[lists[part_a.part_type]].append(pair)
    return found


def counterparts(a: ModelSpec, b: ModelSpec) -> Iterator[tuple[str, str]]:
    """Names of the parts that have the same place in the same layer of two models."""

    def keys(spec: ModelSpec) -> dict[tuple[Any, ...], str]:
        seen, names = Counter(), {}
        for name, part in spec.parts.items():
            key = (part.part_type, part.extra_info.get("place", name), part.layer_idx)
            names[*key, seen[key]] = name
            seen[key] += 1
        return names

    ours, theirs = keys(a), keys(b)
    yield from ((ours[key], theirs[key]) for key in ours if key in theirs)


def likeness(part: PartSpec) -> str:
    """What two parts have in common that fit."""
    info = part.extra_info
    if part.part_type is PartType.ATTENTION and part.num_heads:
        keys = info.get("num_kv_heads")
        shared = f", {keys} for keys and values" if keys != part.num_heads else ""
        turned = f"; rotation {rope_text(info['rope'])}" if info.get("rope") else ""
        return f"{part.num_heads} heads of {part.head_dim}{shared}{turned}"
    if part.part_type in (PartType.FFN, PartType.EXPERT) and part.intermediate_dim:
        experts = f"{info['num_experts']} experts, " if info.get("num_experts") else ""
        gated = "gated " if info.get("gated") else ""
        return f"{experts}inner width {part.intermediate_dim:,}, {gated}{info.get('activation')}"
    if part.part_type is PartType.LAYER_NORM:
        return f"{info.get('norm')} of {text(part.input_dim)}"
    return f"{text(part.input_dim)} in, {text(part.output_dim)} out"


def facts_of(spec: ModelSpec) -> dict[str, Any]:
    """What two models can be compared in beyond model-garage's numbers; a list where layers differ."""
    attention, ffn = spec.all_attention_parts(), spec.all_ffn_parts()
    norms = [part for part in spec.parts.values() if part.part_type is PartType.LAYER_NORM]
    heads = [part for part in spec.parts.values() if part.part_type is PartType.OUTPUT_HEAD]
    windows = [part.extra_info.get("sliding_window") for part in attention]
    return {
        "parameters": spec.parameters,
        "bytes": spec.bytes,
        "dtype": spec.extra_info.get("dtype"),
        "context": spec.max_seq_len,
        "head_dim": _distinct(part.head_dim for part in attention),
        "num_kv_heads": _distinct(part.extra_info.get("num_kv_heads") for part in attention),
        "qk_norm": _distinct(bool(part.extra_info.get("qk_norm")) for part in attention),
        "qkv_bias": _distinct(part.extra_info.get("qkv_bias") for part in attention),
        "positions": spec.extra_info.get("positions"),
        "rotation": _distinct(rope_text(part.extra_info.get("rope")) for part in attention),
        "sliding_window": _distinct(window for window in windows if window),
        "layers_with_window": sum(bool(window) for window in windows),
        "intermediate_dim": _distinct(part.intermediate_dim for part in ffn),
        "activation": _distinct(part.extra_info.get("activation") for part in ffn),
        "gated": _distinct(bool(part.extra_info.get("gated")) for part in ffn),
        "experts": _distinct(part.extra_info.get("num_experts") for part in ffn),
        "norm": _distinct(part.extra_info.get("norm") for part in norms),
        "norms_per_layer": len({part.extra_info.get("place") for part in norms if part.layer_idx is not None}),
        "tied_head": any("tied_to" in part.extra_info for part in heads),
        "tokenizer": spec.extra_info.get("tokenizer"),
    }


def _distinct(values: Iterable[Any]) -> Any:
    found = list(dict.fromkeys(values))
    return found[0] if len(found) == 1 else found or None


# ---- for people


def as_text(result: dict[str, Any]) -> str:
    named = {
        "families": "family",
        "hidden_dims": "width",
        "num_layers": "layers",
        "num_heads": "heads",
        "vocab_sizes": "vocabulary",
    }
    rows = [("", *result["models"], "")]
    both = {label: result[key] for key, label in named.items()}
    both |= {key.replace("_", " "): verdict["values"] for key, verdict in result["verdicts"].items()}
    for label, (a, b) in both.items():
        if label == "tokenizer":
            a, b = (value[:8] if value else "unknown" for value in (a, b))
        rows.append((label, text(a), text(b), "" if a == b else "differs"))
    parts = result["compatible_parts"]
    fitting = [pair for pair in parts["same_dim"] if pair["swappable"]]
    lines = ["", f"fit ({len(fitting)} parts of B could stand in A):", *_grouped(fitting)]
    lines += ["", f"do not ({len(parts['refused'])}):", *_grouped(parts["refused"])]
    return "\n".join([as_table(rows), *lines])


def _grouped(pairs: list[dict[str, Any]]) -> list[str]:
    """Pairs with one reason on one line, their layers as ranges."""
    groups: dict[tuple[str, str, str], list[int | None]] = {}
    for pair in pairs:
        names, layers = [], []
        for name in (pair["name_a"], pair["name_b"]):
            stem, _, number = name.rpartition("_")
            names.append(stem if number.isdigit() else name)
            layers.append(int(number) if number.isdigit() else None)
        groups.setdefault((*names, pair["reason"]), []).append(layers[0])
    lines = []
    for (a, b, reason), numbers in groups.items():
        name = a if a == b else f"{a} / {b}"
        lines.append(f"  {name}{ranges(numbers)}: {reason}")
    return lines or ["  nothing"]


def ranges(numbers: list[int | None]) -> str:
    """0-3, 5 for [0, 1, 2, 3, 5]; nothing for [None]."""
    runs: list[list[int]] = []
    for number in sorted(number for number in numbers if number is not None):
        if runs and number <= runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "".join(f"{',' if i else ''} {a}" + (f"-{b}" if b > a else "") for i, (a, b) in enumerate(runs))
