"""What a GPT is, in numbers, and the architectures that have names (PRESETS). Needs no torch, so that a configuration
can be read and refused before torch is there."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

ORIGINAL = "original_max_position_embeddings"
ROPE_TYPES = {  # kinds of scaling, and the numbers that each needs
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    "yarn": ("factor", ORIGINAL),
    "longrope": ("short_factor", "long_factor", ORIGINAL),
}
ROPE_OPTIONS = {  # and those that it may have, of which `truncate` is true or false
    "linear": (),
    "llama3": (),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "truncate"),
    "longrope": ("attention_factor",),
}
ACTIVATIONS = ("gelu", "gelu_tanh", "silu")  # of the MLP; model.py has the functions


@dataclass(frozen=True)
class GPTConfig:
    """The architecture, and nothing about training it. The first seven fields are nanoGPT's `model_args`.

    Raises ValueError, with every problem in one message, when the numbers cannot make a model.
    """

    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # probability, on attention weights, residual branches and embeddings
    bias: bool = True  # in linear layers, and in layer norms
    tie_word_embeddings: bool = True  # lm_head shares the token embedding's matrix
    block: str = "gpt2"  # layer norms, learned positions, plain MLP; or "llama": RMS norms, RoPE, gated MLP
    activation: str = "gelu"  # exact, "gelu_tanh" or "silu"
    norm_eps: float = 1e-5
    n_inner: int | None = None  # width of the MLP; None: 4 * n_embd
    family: str = ""  # whose files it came from (families.py), where the other fields do not tell; changes no number
    # from here on for llama blocks only
    n_kv_head: int | None = None  # each serves n_head / n_kv_head query heads (Ainslie et al. 2023); None: n_head
    head_size: int | None = None  # None: n_embd / n_head
    qkv_bias: bool = False  # biases for queries, keys and values where `bias` gives none (Qwen 2)
    qk_norm: bool = False  # RMS norm of every query and key (Qwen 3, Gemma 3)
    rope_theta: float = 10000.0  # base of the rotary embedding's wavelengths (Su et al. 2021)
    rope_local_theta: float | None = None  # of layers with a window, which then are not scaled (Gemma 3)
    rope_scaling: Mapping[str, Any] | None = None  # rope_type, and its numbers as Transformers calls them
    rotary_share: float = 1.0  # of a head's dimensions, the first ones, turn (Phi)
    sliding_window: int | None = None  # tokens that a query sees, its own included
    global_layers: tuple[int, ...] = ()  # layers without the window, from 0
    query_scalar: float | None = None  # scores are divided by its square root; None: head size
    attention_softcap: float | None = None  # scores become softcap * tanh(scores / softcap) (Gemma 2)
    logit_softcap: float | None = None  # the same for logits
    scaled_embeddings: bool = False  # token embeddings times sqrt(n_embd) (Gemma)
    norm_plus_one: bool = False  # RMS norms multiply by 1 + weight (Gemma)
    post_norms: bool = False  # a norm behind each branch too (Gemma 2 and 3)

    def __post_init__(self):
        object.__setattr__(self, "global_layers", tuple(self.global_layers))  # JSON knows lists only
        sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        optional = ("n_inner", "n_kv_head", "head_size", "sliding_window")
        divisors = ("rope_theta", "rope_local_theta", "query_scalar", "attention_softcap", "logit_softcap")
        given = {name: value for name in (*sizes, *optional) if (value := getattr(self, name)) is not None}
        problems = [f"{name}={getattr(self, name)!r} must be {kind}" for name, kind in self._mistyped().items()]
        problems = problems or [f"{name}={value} must be at least 1" for name, value in given.items() if value < 1]
        if not problems:
            numbers = {name: value for name in divisors if (value := getattr(self, name)) is not None}
            problems = [f"{name}={value} must be above 0" for name, value in numbers.items() if not value > 0]
        if not problems and self.head_size is None and self.n_embd % self.n_head:
            problems.append(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        elif not problems and self.n_head % self.kv_heads:
            problems.append(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        if not problems and not 0.0 <= self.dropout < 1.0:
            problems.append(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.activation not in ACTIVATIONS:
            problems.append(f"activation={self.activation} must be one of {', '.join(ACTIVATIONS)}")
        if self.block not in ("gpt2", "llama"):
            problems.append(f"block={self.block} must be gpt2 or llama")
        if self.block == "gpt2":
            fields, plain = list(vars(self)), GPTConfig.__dataclass_fields__
            idle = [name for name in fields[fields.index("n_kv_head") :] if getattr(self, name) != plain[name].default]
            problems += [f"{name}={getattr(self, name)} is for llama blocks" for name in idle]
        elif not problems and self.rotary not in range(2, self.D + 1, 2):
            problems.append(f"{self.rotary} of a head's {self.D} dimensions would turn, and they turn in pairs")
        if self.rope_scaling is not None and not problems:
            problems += self._problems_of_scaling(self.rope_scaling)
        if problems:
            raise ValueError("impossible model: " + "; ".join(problems))

    def _mistyped(self) -> dict[str, str]:
        """{field: what it must be}. A float may be whole; True is no number."""
        wrong = {}
        for name, f in GPTConfig.__dataclass_fields__.items():
            kinds = get_args(f.type) or (f.type,)
            fits = type(getattr(self, name)) in (*kinds, *((int,) if float in kinds else ()))
            if not fits and name not in ("global_layers", "rope_scaling"):
                wrong[name] = " or ".join(kind.__name__ for kind in kinds)
        if not isinstance(self.rope_scaling, Mapping | None):
            wrong["rope_scaling"] = "a mapping or None"
        return wrong

    def _problems_of_scaling(self, scaling: Mapping[str, Any]) -> list[str]:
        kind = scaling.get("rope_type")
        if kind not in ROPE_TYPES:
            return [f"rope_scaling={scaling} must have a rope_type of {', '.join(ROPE_TYPES)}"]
        problems = [f"rope_scaling of type {kind} needs {key}" for key in ROPE_TYPES[kind] if scaling.get(key) is None]
        lists = [key for key in ("short_factor", "long_factor") if scaling.get(key)]
        for key, value in scaling.items():
            if key == "rope_type" or value is None:
                continue
            numbers = value if key in lists and isinstance(value, list | tuple) else [value]
            if key not in ROPE_TYPES[kind] + ROPE_OPTIONS[kind]:
                problems.append(f"rope_scaling of type {kind} has no {key}")
            elif key != "truncate" and not all(type(number) in (int, float) and number > 0 for number in numbers):
                problems.append(
                    f"rope_scaling's {key}={value!r} must be {'numbers' if key in lists else 'a number'} above 0"
                )
        if problems:
            return problems
        if kind == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
            problems.append("rope_scaling of type llama3 needs a low_freq_factor below its high_freq_factor")
        wrong = {key: len(scaling[key]) for key in lists if len(scaling[key]) != self.rotary // 2}
        return problems + [f"{key} has {length} numbers for {self.rotary // 2} pairs" for key, length in wrong.items()]

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def D(self) -> int:
        return self.head_size or self.n_embd // self.n_head

    @property
    def rotary(self) -> int:
        """Dimensions of a head that turn."""
        return int(self.D * self.rotary_share)

    @property
    def inner(self) -> int:
        return self.n_inner or 4 * self.n_embd

    def is_local(self, layer: int) -> bool:
        return self.sliding_window is not None and layer not in self.global_layers


def gemma3(n_layer: int, n_embd: int, n_head: int, n_kv_head: int, n_inner: int, **changes) -> GPTConfig:
    """Gemma 3's text models (arXiv 2503.19786), as they are published."""
    settings = {
        "n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "n_kv_head": n_kv_head, "n_inner": n_inner,
        "block_size": 131072, "vocab_size": 262208, "head_size": 256, "query_scalar": 256,
        "sliding_window": 1024, "global_layers": range(5, n_layer, 6),
        "rope_theta": 1e6, "rope_local_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "block": "llama", "bias": False, "activation": "gelu_tanh", "norm_eps": 1e-6,
        "qk_norm": True, "scaled_embeddings": True, "norm_plus_one": True, "post_norms": True,
    }  # fmt: skip
    return GPTConfig(**{**settings, **changes})


_SMALL_GEMMA = {"vocab_size": 262144, "block_size": 32768, "sliding_window": 512, "rope_scaling": None}
_MODERN = {"block": "llama", "activation": "silu", "n_inner": 832, "n_kv_head": 1, "qk_norm": True}
# The parameter count depends on context, tying and bias, so a preset fixes those too.
PRESETS = {
    "small": GPTConfig(256, 50257, 5, 5, 320, bias=False, tie_word_embeddings=False),  # 38,393,920
    "medium": GPTConfig(1024, 50257, 12, 12, 768, bias=False),  # 124,337,664
    "large": GPTConfig(1024, 50257, 24, 16, 1024, bias=False),  # 354,551,808
    "modern": GPTConfig(256, 50257, 6, 5, 320, bias=False, tie_word_embeddings=False, **_MODERN),  # 38,436,288
    "gemma3-270m": gemma3(18, 640, 4, 1, 2048, **_SMALL_GEMMA),
    "gemma3-1b": gemma3(26, 1152, 4, 1, 6912, **_SMALL_GEMMA),
    "gemma3-4b": gemma3(34, 2560, 8, 4, 10240),
    "gemma3-12b": gemma3(48, 3840, 16, 8, 15360),
    "gemma3-27b": gemma3(62, 5376, 32, 16, 21504, head_size=128, query_scalar=168),
}
