"""Two architectures side by side as a picture: what is as large as what, which layers see how far, what fits where.

Tokens pass from below upwards. A layer is a row, a part as wide as it has parameters; embeddings and heads are as wide
as the widest layer, and as high as their parameters ask for, so that equal areas are equal numbers of parameters.
Layers of the two models stand beside each other, and lines join the parts whose weights fit (comparison.py).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import files
from naming import size_label
from registry.specs import ModelFamily, ModelSpec, PartSpec, PartType
from words import as_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "attention": "#2f6db5",
    "attention, window": "#9cc3ea",
    "feed-forward": "#e08a3c",
    "experts at rest": "#f3cfa8",
    "embedding, head": "#5a9e6f",
    "other": "#b8b8b8",
}
WIDE, HIGH, GAP = 0.9, 0.8, 0.13  # the widest row, the height of a row of 1, half of what is between the models
VISIBLE = 0.004  # of a layer: norms seldom are
SAME_SCALE = 12  # a layer may be this many times as large as the other's before each model gets its own scale


@dataclass(frozen=True)
class Box:
    """A piece of a row: from `left` of its inner end on, both in parameters."""

    kind: str
    left: int
    parameters: int


def as_picture(a: ModelSpec, b: ModelSpec, result: dict[str, Any]) -> bytes:
    """A PNG of what `comparison.compare(a, b)` says. Raises ValueError where matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a picture needs the package matplotlib: pip install matplotlib") from None
    widest = [max((part.parameters for part in layers_of(spec)), default=spec.parameters) or 1 for spec in (a, b)]
    common = max(widest) <= SAME_SCALE * min(widest)
    scales = [max(widest)] * 2 if common else widest
    extents = [extent(spec, scale) for spec, scale in zip((a, b), scales, strict=True)]
    bottom, top = min(low for low, _ in extents), max(high for _, high in extents)
    inches = min(max((top - bottom) * 0.24, 4.0), 9.5)
    figure = Figure(figsize=(11, inches + 2.0), dpi=130, facecolor="white")
    with matplotlib.rc_context({"text.parse_math": False}):  # dollar signs in names are no mathematics
        below, above = 1.05 / (inches + 2.0), 0.95 / (inches + 2.0)
        axes = figure.add_axes((0.02, below, 0.96, 1 - below - above))
        axes.set(xlim=(-1.08, 1.08), ylim=(bottom, top))
        axes.axis("off")
        for spec, scale, side in zip((a, b), scales, (-1, 1), strict=True):
            draw_model(axes, spec, scale, side)
            heading(figure, spec, 0.25 if side < 0 else 0.75, above)
        join(axes, a, b, result)
        legend(figure, (a, b), result, common)
        figure.text(0.5, 0.018, verdict(result), ha="center", va="bottom", fontsize=8.5, color="#333333")
        return as_png(figure)


def layers_of(spec: ModelSpec) -> list[PartSpec]:
    return [part for part in spec.parts.values() if part.part_type is PartType.FULL_LAYER]


def boxes(spec: ModelSpec, layer: PartSpec) -> list[Box]:
    """The pieces of a layer, attention first; of experts, those that a token uses and the others."""
    found = []
    within = [part for part in spec.parts.values() if part.module_path.startswith(f"{layer.module_path}.")]
    for part in within:
        if part.part_type is PartType.ATTENTION:
            kind = "attention, window" if part.extra_info.get("sliding_window") else "attention"
            found.append((kind, part.parameters))
        elif part.part_type is PartType.FFN:
            experts, active = part.extra_info.get("num_experts"), part.extra_info.get("experts_per_token")
            resting = 0
            if experts and active:
                one = sum(p.parameters for p in within if p.extra_info.get("place") in ("experts", "expert")) // experts
                resting = one * (experts - active)
            found += [("feed-forward", part.parameters - resting), ("experts at rest", resting)]
    found.sort(key=lambda piece: list(COLOURS).index(piece[0]))
    used = sum(parameters for _, parameters in found)
    pieces, left = [], 0
    for kind, parameters in (*found, ("other", layer.parameters - used)):
        pieces.append(Box(kind, left, parameters))
        left += parameters
    return [piece for piece in pieces if piece.parameters > layer.parameters * VISIBLE]


def ends(spec: ModelSpec) -> tuple[list[tuple[str, PartSpec]], list[tuple[str, PartSpec]]]:
    """What is below the layers, nearest first, and above."""
    kinds = (PartType.EMBEDDING, PartType.OUTPUT_HEAD)
    outside = [(name, part) for name, part in spec.parts.items() if part.layer_idx is None and part.part_type in kinds]
    below = [
        (name, part)
        for name, part in outside
        if part.part_type is PartType.EMBEDDING and "tied_to" not in part.extra_info
    ]
    return below[::-1], [(name, part) for name, part in outside if part.part_type is PartType.OUTPUT_HEAD]


def block(part: PartSpec, scale: int) -> tuple[float, float]:
    """Width and height of an embedding or a head, whose area is to that of the widest layer as their parameters are."""
    share = part.parameters / scale
    return (WIDE, HIGH * share) if share > 1 else (WIDE * share, HIGH)


def extent(spec: ModelSpec, scale: int) -> tuple[float, float]:
    below, above = ends(spec)
    low = -sum(block(part, scale)[1] + 1.2 for _, part in below) - 0.4
    high = sum((HIGH if "tied_to" in part.extra_info else block(part, scale)[1]) + 1.2 for _, part in above)
    return low, len(layers_of(spec)) + high + 0.4


def draw_model(axes: "Axes", spec: ModelSpec, scale: int, side: int) -> None:
    """One model, left of the middle (side -1) or right of it (1)."""
    for row, layer in enumerate(layers_of(spec)):
        for piece in boxes(spec, layer):
            width = WIDE * piece.parameters / scale
            rectangle(axes, side, WIDE * piece.left / scale, row + (1 - HIGH) / 2, width, HIGH, COLOURS[piece.kind])
    below, above = ends(spec)
    low, high = -0.3, len(layers_of(spec)) + 0.3
    for name, part in below:
        width, height = block(part, scale)
        rectangle(axes, side, 0, low - height, width, height, COLOURS["embedding, head"])
        label(axes, side, low - height - 0.08, f"{name}: {sizes(part)}", "top")
        low -= height + 1.2
    for name, part in above:
        tied = part.extra_info.get("tied_to")
        width, height = block(part, scale)
        height = HIGH if tied else height
        rectangle(axes, side, 0, high, min(width, WIDE), height, COLOURS["embedding, head"], hollow=bool(tied))
        shared = f"{name}: the weights of {tied} again" if tied else f"{name}: {sizes(part)}"
        label(axes, side, high + height + 0.08, shared, "bottom")
        high += height + 1.2


def rectangle(
    axes: "Axes", side: int, left: float, low: float, width: float, height: float, colour: str, hollow: bool = False
) -> None:
    from matplotlib.patches import Rectangle

    x = side * (GAP + left) - (width if side < 0 else 0)
    style = {"facecolor": "white", "edgecolor": colour, "linestyle": (0, (3, 2)), "linewidth": 1.2}
    plain = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.6}
    axes.add_patch(Rectangle((x, low), width, height, **(style if hollow else plain)))


def label(axes: "Axes", side: int, y: float, text: str, align: str) -> None:
    axes.text(
        side * GAP, y, text, ha="left" if side > 0 else "right", va=align, fontsize=8, color="#333333", clip_on=False
    )


def sizes(part: PartSpec) -> str:
    inputs, outputs = (f"{value:,}" if value is not None else "?" for value in (part.input_dim, part.output_dim))
    return f"{inputs} to {outputs}, {size_label(part.parameters)}"


def heading(figure: Any, spec: ModelSpec, x: float, above: float) -> None:
    attention = next(iter(spec.all_attention_parts()), None)
    ffn = next(iter(spec.all_ffn_parts()), None)
    kind = spec.extra_info.get("model_type") if spec.family is ModelFamily.UNKNOWN else spec.family.value
    about = [f"{size_label(spec.parameters)} parameters", kind or spec.extra_info["class"], f"{spec.num_layers} layers"]
    about += [f"width {spec.hidden_dim:,}"] if spec.hidden_dim else []
    more = []
    if attention is not None and attention.num_heads:
        keys = attention.extra_info.get("num_kv_heads")
        more.append(
            f"{attention.num_heads} heads of {attention.head_dim}"
            + (f", {keys} for keys" if keys != attention.num_heads else "")
        )
    if ffn is not None and ffn.intermediate_dim:
        experts = ffn.extra_info.get("num_experts")
        more.append((f"{experts} experts of " if experts else "feed-forward ") + f"{ffn.intermediate_dim:,}")
    more += [f"positions {spec.extra_info['positions']}"] if spec.extra_info.get("positions") else []
    if window := spec.extra_info.get("sliding_window"):
        more.append(f"window {window:,}")
    name = Path(spec.model_id).name if files.expanded(spec.model_id).is_dir() else spec.model_id
    name = name if len(name) <= 44 else f"...{name[-41:]}"
    figure.text(x, 1 - 0.22 * above, name, ha="center", va="center", fontsize=14, weight="bold")
    figure.text(x, 1 - 0.52 * above, ", ".join(about), ha="center", va="center", fontsize=9.5)
    figure.text(x, 1 - 0.74 * above, ", ".join(more), ha="center", va="center", fontsize=8.5, color="#555555")


def join(axes: "Axes", a: ModelSpec, b: ModelSpec, result: dict[str, Any]) -> None:
    """Lines between parts that fit: of attention above the middle of a row, of feed-forward below."""
    fitting = [
        (key, pair) for key in ("attention_compatible", "ffn_compatible") for pair in result["compatible_parts"][key]
    ]
    rows = [{part.module_path: row for row, part in enumerate(layers_of(spec))} for spec in (a, b)]
    for key, pair in fitting:
        places = []
        for spec, name, known in ((a, pair["name_a"], rows[0]), (b, pair["name_b"], rows[1])):
            path = spec.parts[name].module_path
            places.append(next((row for layer, row in known.items() if path.startswith(f"{layer}.")), None))
        if None not in places:
            shift, colour = (0.68, COLOURS["attention"]) if key.startswith("att") else (0.32, COLOURS["feed-forward"])
            ys = [row + shift for row in places]
            axes.plot([-GAP, GAP], ys, color=colour, linewidth=1.8, solid_capstyle="butt", zorder=1)
    count = max(len(known) for known in rows)
    step = 1 if count <= 40 else 4
    for row in range(0, count, step):
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
        axes.text(0, row + 0.5, str(row), ha="center", va="center", fontsize=7, color="#666666", bbox=box, zorder=2)


def legend(figure: Any, specs: tuple[ModelSpec, ModelSpec], result: dict[str, Any], common: bool) -> None:
    """Of the colours that are there, and the scale."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    seen = {piece.kind for spec in specs for layer in layers_of(spec) for piece in boxes(spec, layer)}
    seen |= {"embedding, head"} if any(any(ends(spec)) for spec in specs) else set()
    handles = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items() if kind in seen]
    lines = {"attention_compatible": "attention", "ffn_compatible": "feed-forward"}
    for key, kind in lines.items():
        if result["compatible_parts"][key]:
            handles.append(Line2D([], [], color=COLOURS[kind], linewidth=1.8, label=f"{kind} fits"))
    height = figure.get_figheight()
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.62 / height), "frameon": False, "fontsize": 8.5}
    figure.legend(handles=handles, ncols=len(handles), columnspacing=1.5, **place)
    note = "areas are parameters, " + ("to one scale" if common else "each model to its own scale")
    figure.text(0.5, 0.42 / height, note, ha="center", va="bottom", fontsize=8.5, color="#666666", style="italic")


def verdict(result: dict[str, Any]) -> str:
    """How much fits, and the first thing in the way of what does not, of attention and of feed-forward."""
    parts, sentences = result["compatible_parts"], []
    for kind, word, key in (
        ("attention", "attention", "attention_compatible"),
        ("ffn", "feed-forward", "ffn_compatible"),
    ):
        refused = [pair["reason"] for pair in parts["refused"] if pair["type"] == kind]
        of = len(parts[key]) + len(refused)
        if not of:
            sentences.append(f"no {word} has a counterpart")
        else:
            why = f" ({refused[0].split(';')[0]})" if refused else ""
            sentences.append(f"{word} fits in {len(parts[key])} of {of} layers{why}")
    return ".  ".join(sentence[0].upper() + sentence[1:] for sentence in sentences) + "."
