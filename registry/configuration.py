"""What can be said of a model besides its name: `ModelConfig`, read from dictionaries, checked once and all at once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from lora_config import SPELLINGS, LoRAConfig
from registry import loading

GROUPS = ("load_config", "lora")  # of settings: {"lora": {"r": 4}} is {"lora.r": 4}
LORA_KEYS = {spelling: key for key, others in SPELLINGS.items() for spelling in (key, *others)}
LORA_KEYS |= {key: key for key in ("enabled", "untie")}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class ModelConfig:
    """What a constructor gets. `from_settings` makes one of what a user gives."""

    name: str
    tokenizer_name: str | None = None  # whose tokenizer, where it is not the model's own: see get_tokenizer
    dtype: torch.dtype | None = None  # of the weights; None: as they are stored or made
    device: torch.device = CPU
    trust_remote_code: bool = False  # run the Python files that lie beside the weights
    revision: str | None = None  # branch, tag or commit on the hub
    local_files_only: bool = True
    local_path: str | Path | None = None  # the model's folder, whatever the name would find
    load_config: Mapping[str, Any] = field(default_factory=dict)  # for the loader (loading.LOAD_CONFIG) or constructor
    lora: LoRAConfig | None = None  # the adapter that get_model adds; None: none
    lora_untie: bool = False  # allow an adapter on a layer that shares its weight

    @classmethod
    def from_settings(cls, name: str, *settings: Mapping[str, Any]) -> "ModelConfig":
        """From dictionaries of which later ones win. Groups may be nested or dotted: {"lora": {"r": 4}}, {"lora.r": 4}.

        `lora` has enabled, untie and LoRAConfig's settings, in any of its spellings. Raises ValueError, with every
        problem in one message.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"a model's name is text, and this is {name!r}")
        problems: list[str] = []
        given = {key: value for one in settings for key, value in _flat(one, problems).items()}
        given["name"] = name
        groups = {group: _take(given, group) for group in GROUPS}
        values = {key: value for key, value in given.items() if not _is_unset(key, value)}
        for key, check in _CHECKS.items():
            if key in values:
                try:
                    values[key] = check(values[key])
                except ValueError as error:
                    problems.append(str(error))
        try:
            adapter = _adapter(groups["lora"])
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError(f"the configuration of model {name!r} cannot be used: {'; '.join(problems)}")
        return cls(**values, load_config=groups["load_config"], **adapter)


def _flat(settings: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Settings under their one dotted spelling, with what is wrong in them added to `problems`."""
    if not isinstance(settings, Mapping):
        raise ValueError(f"a model's configuration is a dictionary, and this is {settings!r}")
    pairs = []
    for key, value in settings.items():
        if key in GROUPS and isinstance(value, Mapping):
            pairs += [(f"{key}.{inner}", item) for inner, item in value.items()]
        elif key not in GROUPS or value is not None:
            pairs.append((str(key), value))
    flat, spelled = {}, {}
    for key, value in pairs:
        name = _known_as(key)
        if key in GROUPS:
            problems.append(f"{key}={value!r} must be a dictionary")
        elif name is None:
            known = [*_FIELDS, *(f"lora.{spelling}" for spelling in LORA_KEYS)]
            nearest = ", ".join(get_close_matches(key, known, n=2, cutoff=0))
            problems.append(f"there is no setting {key!r}; the nearest are {nearest}")
        elif name in flat and flat[name] != value:
            problems.append(f"{spelled[name]}={flat[name]!r} and {key}={value!r} give one setting two values")
        else:
            flat[name], spelled[name] = value, key
    return flat


def _known_as(key: str) -> str | None:
    group, dot, inner = key.partition(".")
    if group == "lora" and dot:
        return f"lora.{LORA_KEYS[inner]}" if inner in LORA_KEYS else None
    return key if key in _FIELDS or (group == "load_config" and inner) else None


def _take(settings: dict[str, Any], group: str) -> dict[str, Any]:
    """Remove a group's settings from all of them, and give them without its name."""
    names = [key for key in settings if key.startswith(f"{group}.")]
    return {key.removeprefix(f"{group}."): settings.pop(key) for key in names}


def _is_unset(key: str, value: Any) -> bool:
    return value is None or (value == "" and key in ("tokenizer_name", "revision", "local_path"))


def _adapter(settings: dict[str, Any]) -> dict[str, Any]:
    """ModelConfig's fields of the group `lora`. Raises ValueError for what cannot be, or would do nothing."""
    switches = {key: settings.pop(key) for key in ("enabled", "untie") if settings.get(key) is not None}
    wrong = [
        f"lora.{key}={value!r} must be true or false" for key, value in switches.items() if type(value) is not bool
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
    adapter = LoRAConfig.from_dict(settings)
    if "enabled" not in switches and (settings or switches):
        idle = ", ".join(f"lora.{key}={value!r}" for key, value in (settings | switches).items())
        raise ValueError(f"{idle} means nothing without lora.enabled=true (or false, to keep it for later)")
    return {"lora": adapter, "lora_untie": switches.get("untie", False)} if switches.get("enabled") else {}


def _of_type(key: str, kind: Any, words: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, kind):
            raise ValueError(f"{key}={value!r} must be {words}")
        return value

    return check


_FIELDS = {f.name for f in fields(ModelConfig)} - {*GROUPS, "lora_untie"}
_CHECKS = {key: _of_type(key, str, "text") for key in ("tokenizer_name", "revision")}
_CHECKS |= {key: _of_type(key, bool, "true or false") for key in ("trust_remote_code", "local_files_only")}
_CHECKS |= {"local_path": _of_type("local_path", str | Path, "a path")}
_CHECKS |= {"dtype": loading.resolve_dtype, "device": loading.coerce_device}
