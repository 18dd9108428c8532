"""Models by name: found offline, built, run, taken apart, compared.

    from registry import find_model, get_model, load_model, register_model

    get_model("gpt2-offline", device="auto", lora={"enabled": True, "r": 4})  # an nn.Module, to train or to inspect
    load_model("xlmr").embed(["..."])                                         # a runner around one, for text
    python -m registry list | show NAME | parts NAME | compare A B | where NAME | memory NAME

This package speaks the interfaces of several tools, in which some names meant two things. Here each means one:

- A *recipe* (`ModelSpec`, catalogue.py) says which model a name is and how it is loaded. `load_model` gives a runner
  for one; `list_available_models`, `get_spec`, `register_spec` and `unregister_spec` are about recipes.
- A *constructor* (names.py) is a function that makes a model, whatever it is made of. `register_model` and `unregister`
  are about constructors. `get_model` looks among them first, then among the recipes, then for a folder or a hub id;
  `list_models` gives every name that `get_model` knows.
- What a model is *made of* is `registry.parts.ModelSpec`, and `ModelRegistry` there has its own `list_models`, of the
  models that were taken apart.

Names match whatever their case and keep their spelling. `MiniLM`, a constructor, is a tiny GPT for tests; `minilm`, a
recipe, is a sentence encoder. Spelled like this, each is itself everywhere; `get_model` refuses any third spelling.
"""

from importlib import import_module
from typing import Any

PLACES = {  # {module: its names that are public here}
    "catalogue": ("ModelSpec", "get_spec", "list_available_models", "register_spec", "unregister_spec"),
    "configuration": ("ModelConfig",),
    "entries": ("ConflictError", "RegistryError", "UnknownModelError"),
    "loading": ("coerce_device", "resolve_dtype"),
    "names": (
        "PluginError", "describe_models", "get_model", "get_tokenizer", "list_models",
        "register_model", "temporary_models", "unregister",
    ),
    "parts": (
        "ModelDecomposer", "ModelFamily", "ModelRegistry", "PartSpec", "PartType",
        "register_decomposer", "unregister_decomposer",
    ),
    "resolve": ("Candidate", "ModelNotFoundError", "Resolution", "find_model"),
    "runners": ("ModelOutputs", "load_model"),
}  # fmt: skip
MODULES = {name: f"registry.{module}" for module, names in PLACES.items() for name in names}
__all__ = sorted(MODULES)


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for (PEP 562): the scripts need one module of this package, and
    `python -m registry --help` none that imports torch."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
