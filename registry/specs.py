"""What a model is made of, in words: its parts, their sizes and where they are. JSON and back. Knows no model.

The names of the classes, fields and methods are those of the document this package follows (model-garage's registry);
the fields after `extra_info` are ours. A spec says nothing that its JSON does not: `from_json(to_json(spec)) == spec`.
"""

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

VERSION = 2  # of the JSON; another one may mean something else by the same words


class ModelFamily(Enum):
    GPT2 = "gpt2"
    LLAMA = "llama"
    MISTRAL = "mistral"  # and Mixtral
    GEMMA = "gemma"
    QWEN = "qwen"
    PHI = "phi"
    UNKNOWN = "unknown"


class PartType(Enum):
    EMBEDDING = "embedding"  # of tokens, and of positions where these are learned
    ATTENTION = "attention"
    FFN = "ffn"
    LAYER_NORM = "layer_norm"
    OUTPUT_HEAD = "output_head"
    ROTARY_EMB = "rotary_emb"
    GATE = "gate"  # of a mixture of experts: which of them a token goes to
    EXPERT = "expert"  # one of them, or all where they lie in one tensor
    FULL_LAYER = "full_layer"

    @classmethod
    def of(cls, kind: "PartType | str") -> "PartType":
        """From itself or its name in any case. Raises ValueError for another."""
        try:
            return kind if isinstance(kind, cls) else cls(kind.lower())
        except ValueError:
            raise ValueError(
                f"there is no type of part {kind!r}; types are {', '.join(t.value for t in cls)}"
            ) from None


@dataclass
class PartSpec:
    """One module of a model. Sizes are None where the module has no such thing, or its shapes do not tell."""

    part_type: PartType
    layer_idx: int | None  # None for what is in no layer
    module_path: str  # as in model.get_submodule
    input_dim: int | None
    output_dim: int | None
    num_heads: int | None = None
    head_dim: int | None = None
    intermediate_dim: int | None = None  # of one expert where there are several
    extra_info: dict[str, Any] = field(default_factory=dict)  # JSON-able
    parameters: int = 0  # those it shares with another part too
    bytes: int = 0
    weights: dict[str, list[int]] = field(default_factory=dict)  # shapes, matrices as (out, in); none for a FULL_LAYER


@dataclass
class ModelSpec:
    """All parts of a model. (The top level of the package has another ModelSpec: how one is loaded.)"""

    model_id: str
    family: ModelFamily
    hidden_dim: int | None
    num_layers: int
    num_heads: int | None
    vocab_size: int | None
    max_seq_len: int | None
    parts: dict[str, PartSpec] = field(default_factory=dict)
    extra_info: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0  # every one once, however many parts share it
    bytes: int = 0
    uncovered: list[str] = field(default_factory=list)  # modules in no part, or in none smaller than a layer
    directory: str | None = None  # where the model was read, if it was
    fingerprint: str | None = None  # of what describes it there

    def get_attention(self, layer_idx: int) -> PartSpec | None:
        return self.parts.get(f"attention_{layer_idx}")

    def get_ffn(self, layer_idx: int) -> PartSpec | None:
        return self.parts.get(f"ffn_{layer_idx}")

    def get_full_layer(self, layer_idx: int) -> PartSpec | None:
        return self.parts.get(f"layer_{layer_idx}")

    def all_attention_parts(self) -> list[PartSpec]:
        return [part for part in self.parts.values() if part.part_type is PartType.ATTENTION]

    def all_ffn_parts(self) -> list[PartSpec]:
        return [part for part in self.parts.values() if part.part_type is PartType.FFN]


def to_json(spec: ModelSpec) -> dict[str, Any]:
    content = {"version": VERSION, **asdict(spec), "family": spec.family.value}
    for part in content["parts"].values():
        part["part_type"] = part["part_type"].value
    return content


def from_json(content: Any) -> ModelSpec:
    """The spec of a parsed JSON file. Raises ValueError for what is none, or is of another version."""
    if not isinstance(content, dict) or not isinstance(content.get("version"), int):
        raise ValueError("it is no spec of a model")
    if content["version"] != VERSION:
        raise ValueError(
            f"it is of version {content['version']}, and this code reads {VERSION}: register the model again"
        )
    try:
        fields = {key: value for key, value in content.items() if key != "version"}
        parts = {
            name: PartSpec(**{**part, "part_type": PartType(part["part_type"])})
            for name, part in fields["parts"].items()
        }
        return ModelSpec(**{**fields, "family": ModelFamily(fields["family"]), "parts": parts})
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"it is no spec of a model: {error}") from None
