"""What an adapter is, in numbers. Needs no torch, as architecture.py does not."""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

ALL, ALL_LINEAR = "all", "all-linear"

SPELLINGS = {  # a setting's name here, and its names elsewhere
    "rank": ("lora_rank", "r", "lora_r"),
    "alpha": ("lora_alpha",),
    "dropout": ("lora_dropout",),
    "targets": ("lora_targets", "target_modules", "lora_module_path"),
    "exclude": ("lora_exclude", "exclude_modules"),
    "use_rslora": (),
    "rank_pattern": (),
    "alpha_pattern": (),
}


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers to adapt, and how. Raises ValueError with every problem in one message.

    `targets` and `exclude` select layers. A list matches whole paths or their dotted ends: `c_proj` is every
    `...attn.c_proj` and every `...mlp.c_proj`. A string is one regular expression that must match the whole path, with
    `.` or `/` between its parts: `.*/attn/c_(attn|proj)`. Gemma's q_einsum, kv_einsum and attn_vec_einsum find q_proj,
    k_proj with v_proj, and o_proj; an expression sees a path in the spelling that it uses itself.

    "all-linear" is every linear layer except the output head: adapting them all matters more than the rank does (QLoRA,
    arXiv 2305.14314, section 4). "all" is these, the token embedding and the output head, for text whose words the
    model does not know; layers that share their weight are left out.

    The patterns give some layers another rank or alpha. As in PEFT, their keys are regular expressions for the end of
    a path, and the first key that matches counts.
    """

    rank: int = 8
    alpha: float | None = None  # an adapter's output is scaled by alpha / rank; None becomes 2 * rank
    dropout: float = 0.0  # on what an adapter reads, while training; token ids have none
    targets: str | Collection[str] = ALL_LINEAR
    exclude: str | Collection[str] = ()
    use_rslora: bool = False  # scale by alpha / sqrt(rank) instead, made for high ranks (arXiv 2312.03732)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        ranks = {"rank": self.rank, **{f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}}
        alphas = {f"alpha_pattern[{key!r}]": alpha for key, alpha in self.alpha_pattern.items()}
        if self.alpha is not None:
            alphas["alpha"] = self.alpha
        patterns = {f"{pattern!r}": pattern for pattern in (*self.rank_pattern, *self.alpha_pattern)}
        chosen = {"targets": self.targets, "exclude": self.exclude}
        patterns |= {f"{n}={names!r}": names for n, names in chosen.items() if isinstance(names, str)}
        # type() and not isinstance(): True is an int.
        problems = [
            *(f"{n}={v!r} must be a whole number above 0" for n, v in ranks.items() if type(v) is not int or v < 1),
            *(f"{n}={v!r} must be a number above 0" for n, v in alphas.items() if not is_number(v) or not v > 0),
            *(f"{name} is no regular expression" for name, pattern in patterns.items() if not _is_regex(pattern)),
        ]
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            problems.append(f"dropout={self.dropout!r} must be at least 0 and below 1")
        if not self.targets or not all(isinstance(name, str) for name in (*self.targets, *self.exclude)):
            problems.append(
                f"targets={self.targets!r} and exclude={self.exclude!r} must be names, and targets not empty"
            )
        if problems:
            raise ValueError("impossible LoRA: " + "; ".join(problems))
        if self.alpha is None:
            object.__setattr__(self, "alpha", usual_alpha(self.rank))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "LoRAConfig":
        """From settings in any of the SPELLINGS. Raises ValueError for an unknown one, and for two that disagree."""
        names = {spelling: name for name, others in SPELLINGS.items() for spelling in (name, *others)}
        given, problems = {}, []
        for key, value in settings.items():
            if key not in names:
                problems.append(f"unknown LoRA setting {key!r}, the nearest are {nearest(str(key), names)}")
                continue
            first = given.setdefault(names[key], key)
            if settings[first] != value:
                problems.append(f"{first}={settings[first]!r} and {key}={value!r} give one setting two values")
        try:
            config = cls(**{name: settings[key] for name, key in given.items()})
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))
        return config


def usual_alpha(rank: int) -> int:
    """Where none is given."""
    return 2 * rank


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_regex(pattern: str) -> bool:
    try:
        return bool(re.compile(pattern))
    except re.error:
        return False


def nearest(entry: str, paths: Iterable[str]) -> str:
    """The ends of paths that look most like `entry` and have as many parts."""
    words = re.findall(r"\w+", entry)
    ends = dict.fromkeys(".".join(path.split(".")[-len(words) :]) for path in paths)
    return ", ".join(get_close_matches(".".join(words), ends, n=4, cutoff=0))
