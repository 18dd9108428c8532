"""The models that have a name here, and the recipe by which each is found and loaded: `ModelSpec`, one line a model.

    get_spec("xlmr").hf_id  # xlm-roberta-base
    register_spec(ModelSpec("mine", "my-lab/encoder-v3", "encoder_only", dtype="fp32"))

A recipe says nothing of where the files lie on this machine: resolve.py finds them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configurator import PRECISION_SPELLINGS
from hub import HUB_ID
from registry.entries import BUILT_IN, ConflictError, Entries, Entry, UnknownModelError, caller

MINI_LM = "MiniLM"  # a constructor's name (names.py), so spelled like this it is not the recipe minilm
DTYPE_NAMES = PRECISION_SPELLINGS | {"half": "float16", "f32": "float32", "float": "float32"}
ARCHITECTURES = ("encoder_only", "decoder_only", "seq2seq")


@dataclass(frozen=True)
class ModelSpec:
    """How a model is loaded. Raises ValueError, with every problem in one message."""

    name: str
    hf_id: str  # on the hub
    arch: str | None = None  # one of ARCHITECTURES; None: as its config.json says
    dtype: str | None = "bf16"  # that it is run in unless another is asked for; None, or auto: the checkpoint's
    use_bitsandbytes: bool = False  # loaded in 8 bits by a runner
    tokenizer_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self):
        problems = []
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            problems.append(f"name={self.name!r} must be letters, digits, `.`, `_` and `-`")
        if not re.fullmatch(HUB_ID, self.hf_id):
            problems.append(f"hf_id={self.hf_id!r} must be NAME or OWNER/NAME")
        if self.arch not in (None, *ARCHITECTURES):
            problems.append(f"arch={self.arch!r} must be one of {', '.join(ARCHITECTURES)}")
        known = ("auto", *DTYPE_NAMES)
        if self.dtype is not None and str(self.dtype).lower().removeprefix("torch.") not in known:
            problems.append(f"dtype={self.dtype!r} must be one of {', '.join(known)}")
        if problems:
            raise ValueError("impossible model spec: " + "; ".join(problems))

    @property
    def folder(self) -> str:
        """What its folder is called where models are kept: gpt2-offline lies in gpt2."""
        return self.name.removesuffix("-offline")


RECIPES = {
    spec.name: spec
    for spec in (
        ModelSpec("gpt2-offline", "gpt2", "decoder_only", "fp32"),
        ModelSpec("tinyllama-offline", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "decoder_only"),
        ModelSpec("bert-base-uncased", "bert-base-uncased", "encoder_only", "fp32"),
        ModelSpec("mbert", "bert-base-multilingual-cased", "encoder_only", "fp16"),
        ModelSpec("xlmr", "xlm-roberta-base", "encoder_only", "fp16"),
        ModelSpec("mt5", "google/mt5-small", "seq2seq", "fp16"),
        ModelSpec("llama3", "meta-llama/Meta-Llama-3-8B", "decoder_only", use_bitsandbytes=True),
        ModelSpec("labse", "sentence-transformers/LaBSE", "encoder_only", "fp16"),
        ModelSpec("minilm", "sentence-transformers/all-MiniLM-L12-v2", "encoder_only", "fp16"),
        # The pretrained ones. Of those from 4b on, which see images too, the text model is what loads.
        ModelSpec("gemma3-270m", "google/gemma-3-270m", "decoder_only"),
        ModelSpec("gemma3-1b", "google/gemma-3-1b-pt", "decoder_only"),
        ModelSpec("gemma3-4b", "google/gemma-3-4b-pt", "decoder_only"),
        ModelSpec("gemma3-12b", "google/gemma-3-12b-pt", "decoder_only"),
        ModelSpec("gemma3-27b", "google/gemma-3-27b-pt", "decoder_only"),
    )
}
# The hub has moved these, and answers to both names. A cache knows only the one that it was filled under.
MOVED = {
    "gpt2": "openai-community/gpt2",
    "bert-base-uncased": "google-bert/bert-base-uncased",
    "bert-base-multilingual-cased": "google-bert/bert-base-multilingual-cased",
    "xlm-roberta-base": "FacebookAI/xlm-roberta-base",
}
MOVED |= {new: old for old, new in MOVED.items()}

SPECS = Entries("model spec", lambda: {name: Entry(name, spec, BUILT_IN) for name, spec in RECIPES.items()})


def list_available_models() -> tuple[str, ...]:
    """The names that `get_spec` and `load_model` know, sorted."""
    return tuple(sorted(SPECS.all()))


def find_spec(name: str) -> ModelSpec | None:
    """The recipe of this name, whatever its case, or None."""
    entry = None if name == MINI_LM else SPECS.find(name)
    return entry.value if entry else None


def get_spec(name: str) -> ModelSpec:
    """As `find_spec`, but raises UnknownModelError, which lists the names there are."""
    if spec := find_spec(name):
        return spec
    raise UnknownModelError(f"no model spec is called {name!r}{SPECS.nearest(name)}; register_spec adds one")


def register_spec(spec: ModelSpec, *, override: bool = False) -> ModelSpec:
    """Add a recipe of your own. Raises ConflictError if its name is taken, unless `override` lets it replace that."""
    if spec.name == MINI_LM:
        raise ConflictError(f"{MINI_LM} is the tiny model for tests, which get_model makes: spell the spec otherwise")
    SPECS.add(spec.name, spec, caller(), override)
    return spec


def unregister_spec(name: str) -> None:
    """Take out a recipe of your own; one that it replaced is back. Raises RegistryError if there is none."""
    SPECS.remove(name)
