"""A model by its name: `get_model`, and the constructors that people add, themselves or by a plugin.

    @register_model("two-layers")
    def two_layers(config: ModelConfig) -> nn.Module: ...

    get_model("two-layers", {"dtype": "bf16", "lora": {"enabled": True, "r": 4}}, device="cuda:0")

A package adds a model by an entry point of the group `nanoforge.models`, say in its pyproject.toml:

    [project.entry-points."nanoforge.models"]
    two-layers = "their_package.models:two_layers"

`get_model` imports the plugin that it is asked for and no other. A plugin that has a built-in model's name is shadowed:
installing a package changes nothing of what a name meant before. `register_model(..., override=True)` does.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch
from torch import nn

import model_directory
from lora import apply_lora
from model import GPT, GPTConfig
from registry import catalogue, loading, resolve
from registry.configuration import ModelConfig
from registry.entries import BUILT_IN, Entries, Entry, RegistryError, UnknownModelError, caller, matching
from words import as_table

GROUP = "nanoforge.models"

# ---- constructors

Constructor = Callable[[ModelConfig], nn.Module]


def mini_lm(config: ModelConfig) -> GPT:
    """A GPT of 31,616 parameters, the same at every call: for tests. load_config may have GPTConfig's fields."""
    unusable = ("local_path", "revision", "trust_remote_code")
    problems = [f"{key} means nothing to it" for key in unusable if getattr(config, key)]
    unknown = config.load_config.keys() - {f.name for f in fields(GPTConfig)}
    problems += [f"load_config has {key}, which GPTConfig has not" for key in sorted(unknown)]
    if problems:
        raise ValueError(f"{config.name} is made here and read from nowhere: {'; '.join(problems)}")
    sizes = {"block_size": 64, "vocab_size": 128, "n_layer": 2, "n_head": 4, "n_embd": 32}
    # Its own generator would have to be handed through model.py; a borrowed one is given back as it was.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return GPT(GPTConfig(**sizes | config.load_config))


def from_files(config: ModelConfig) -> nn.Module:
    """The constructor of every model that lies in a folder."""
    found = resolve.find_model(
        config.name,
        local_path=config.local_path,
        revision=config.revision,
        local_files_only=config.local_files_only,
    )
    spec = catalogue.find_spec(config.name)
    return loading.load(
        found.path,
        arch=spec.arch if spec and not config.local_path else None,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        load_config=config.load_config,
    )


def _given() -> dict[str, Entry]:
    """The entries that nobody has registered: what is built in, the recipes and, where these leave room, plugins."""
    entries = {catalogue.MINI_LM: Entry(catalogue.MINI_LM, mini_lm, BUILT_IN)}
    entries |= {name: Entry(name, from_files, spec.source) for name, spec in catalogue.SPECS.all().items()}
    return entries | {name: plugin.entry for name, plugin in _plugins().items() if not matching(name, entries)}


MODELS = Entries("model", _given)


def register_model(
    name: str, constructor: Constructor | None = None, *, override: bool = False
) -> Constructor | Callable[[Constructor], Constructor]:
    """Let `get_model` make this model by calling `constructor` with its ModelConfig. A decorator without one.

    Raises ConflictError, which says where the first came from, if the name is taken and not to be overridden.
    """
    source = caller()

    def register(constructor: Constructor) -> Constructor:
        if not isinstance(name, str) or not name.strip():
            raise RegistryError(f"{source}: {name!r} is no name for a model")
        if not callable(constructor):
            raise RegistryError(f"{source}: {constructor!r} makes no model: it cannot be called")
        MODELS.add(name, constructor, source, override)
        return constructor

    return register if constructor is None else register(constructor)


def unregister(name: str) -> None:
    """Take out a model that was registered; what it replaced is back. Raises RegistryError if it was not."""
    MODELS.remove(name)


def temporary_models(
    constructors: Mapping[str, Constructor] | None = None,
) -> contextlib.AbstractContextManager[None]:
    """These models for as long as the context lasts, instead of any of their names. Then all is as before it."""
    source = caller()

    @contextlib.contextmanager
    def scope() -> Iterator[None]:
        with MODELS.restored():
            for name, constructor in (constructors or {}).items():
                MODELS.add(name, constructor, source, override=True)
            yield

    return scope()


# ---- plugins


class PluginError(RegistryError):
    """A plugin is there and cannot be used."""


@dataclass(frozen=True)
class Plugin:
    """What installed packages offer under one name: one entry point, or, by mistake, several."""

    offers: tuple[EntryPoint, ...]

    @property
    def source(self) -> str:
        return " and ".join(f"plugin {offer.value} of {_distribution(offer)}" for offer in self.offers)

    @property
    def entry(self) -> Entry:
        return Entry(self.offers[0].name, self, self.source)

    def load(self) -> Constructor:
        """The constructor. Raises PluginError, whatever importing it raises; what it prints goes to stderr."""
        if len(self.offers) > 1:
            raise PluginError(f"{self.offers[0].name!r} is offered twice: uninstall one, {self.source}")
        try:
            with contextlib.redirect_stdout(sys.stderr):
                constructor = self.offers[0].load()
        except (Exception, SystemExit) as error:
            raise PluginError(f"the {self.source} cannot be imported: {type(error).__name__}: {error}") from error
        if not callable(constructor):
            raise PluginError(f"the {self.source} is {constructor!r}, which makes no model: it cannot be called")
        return constructor

    def __call__(self, config: ModelConfig) -> nn.Module:
        return self.load()(config)


def _distribution(offer: EntryPoint) -> str:
    return f"{offer.dist.name} {offer.dist.version}" if offer.dist else "an unknown package"


def _plugins() -> dict[str, Plugin]:
    """By name, unimported."""
    offers: dict[str, list[EntryPoint]] = {}
    for offer in entry_points(group=GROUP):
        offers.setdefault((matching(offer.name, offers) or [offer.name])[0], []).append(offer)
    return {name: Plugin(tuple(several)) for name, several in offers.items()}


# ---- models


def get_model(name: str, cfg: Mapping[str, Any] | None = None, **overrides: Any) -> nn.Module:
    """The model of this name, path or hub id, in eval mode, with an adapter if one is asked for.

    `cfg` and `overrides` have ModelConfig's settings; those of `overrides` win. A recipe's dtype and use_bitsandbytes
    are for running it, and do not count here. Raises UnknownModelError for a name that nothing has,
    resolve.ModelNotFoundError for one whose files are not here, PluginError, and ValueError for a configuration that
    cannot be used.
    """
    config = ModelConfig.from_settings(name, cfg or {}, overrides)
    entry = MODELS.find(config.name)
    if entry is None or entry.value is from_files:
        model = _known_or_not(config) if entry is None else from_files(config)
    else:
        model = entry.value(config)
        if not isinstance(model, nn.Module):
            raise RegistryError(f"the model {entry.name!r} ({entry.source}) is {model!r}, which is no torch.nn.Module")
        model = model.to(config.device, config.dtype).eval()
    if config.lora:
        apply_lora(model, config.lora, untie=config.lora_untie)
    return model


def _known_or_not(config: ModelConfig) -> nn.Module:
    """The model in the folder or with the hub id that the name is, if it is one."""
    try:
        return from_files(config)
    except resolve.ModelNotFoundError as error:
        if error.binding or "/" in config.name or any(tried.path and tried.path.exists() for tried in error.trace):
            raise
        hint = "register_model(name, constructor) adds one of your own"
        raise UnknownModelError(
            f"no model is called {config.name!r}{MODELS.nearest(config.name)}; {hint}. As a folder or a hub id, {error}"
        ) from None


def get_tokenizer(name: str, cfg: Mapping[str, Any] | None = None, **overrides: Any) -> Any:
    """The tokenizer for a model of `get_model`'s: its own, or that of `tokenizer_name`, another name, path or hub id.

    Found and opened as a model is, in a folder that needs no weights. Raises UnknownModelError where there is none.
    """
    config = ModelConfig.from_settings(name, cfg or {}, overrides)
    entry = MODELS.find(config.name)
    if entry and entry.value is not from_files and not (config.tokenizer_name or config.local_path):
        raise UnknownModelError(
            f"the model {entry.name!r} ({entry.source}) has no tokenizer: say which, tokenizer_name"
        )
    own = config.tokenizer_name is None
    wanted = config.name if own else config.tokenizer_name
    found = resolve.find_model(
        wanted,
        local_path=config.local_path if own else None,
        revision=config.revision if own else None,
        local_files_only=config.local_files_only,
        check=resolve.lacking_tokenizer,
    )
    spec = catalogue.find_spec(wanted)
    options = (spec.tokenizer_kwargs if spec else None) or {}
    for_calls = loading.call_options() - {"padding_side"}  # what calling a tokenizer takes, and making one does not
    options = {key: value for key, value in options.items() if key not in for_calls}
    return loading.load_tokenizer(found.path, trust_remote_code=config.trust_remote_code, **options)


# ---- lists


@dataclass(frozen=True)
class Listed:
    name: str
    kind: str  # constructor, plugin, model directory, or a recipe's architecture
    state: str  # ready, missing (its files), broken, shadowed
    source: str
    detail: str  # where its files lie, or what is wrong


def list_models() -> list[str]:
    """Every name that `get_model` knows: what is built in or registered, recipes, plugins and our own directories."""
    return sorted({*MODELS.all(), *_directories()}, key=lambda name: (name.casefold(), name))


def describe_models(part_of_name: str = "") -> list[Listed]:
    """As `list_models`, with the state of each: files are looked for, and plugins imported, shadowed ones too."""

    def wanted(name: str) -> bool:
        return part_of_name.casefold() in name.casefold()

    entries = MODELS.all()
    listed = [_describe(entry) for entry in entries.values() if wanted(entry.name)]
    for name, plugin in _plugins().items():
        winners = [entries[other] for other in matching(name, entries)]
        if wanted(name) and plugin.source not in [winner.source for winner in winners]:
            why = f"{winners[0].name!r}, {winners[0].source}, has the name"
            listed.append(Listed(name, "plugin", "shadowed", plugin.source, why))
    for name, path in _directories().items():
        if wanted(name):
            problem = resolve.lacking(path)
            listed.append(Listed(name, "model directory", "broken" if problem else "ready", str(path), problem))
    return sorted(listed, key=lambda one: (one.name.casefold(), one.name))


def _describe(entry: Entry) -> Listed:
    if isinstance(entry.value, Plugin):
        try:
            entry.value.load()
        except PluginError as error:
            return Listed(entry.name, "plugin", "broken", entry.source, str(error))
        return Listed(entry.name, "plugin", "ready", entry.source, "")
    if entry.value is not from_files:
        return Listed(entry.name, "constructor", "ready", entry.source, "")
    spec = catalogue.get_spec(entry.name)
    kind = spec.arch or "any architecture"
    try:
        return Listed(entry.name, kind, "ready", entry.source, str(resolve.find_model(entry.name).path))
    except resolve.ModelNotFoundError as error:
        if error.binding:
            last = error.trace[-1]
            return Listed(entry.name, kind, "broken", entry.source, f"{last.place}: {last.reason}")
        return Listed(entry.name, kind, "missing", entry.source, spec.hf_id)


def _directories() -> dict[str, Path]:
    """Our own model directories by name, torn ones too."""
    roots = [root for root in resolve.model_roots() if root.is_dir()]
    return {path.name: path for root in reversed(roots) for path in model_directory.models_in(root)}


def run_list(arguments: Any) -> tuple[str, Any]:
    listed = describe_models(arguments.text)
    rows = [(one.name, one.kind, one.state, one.detail or one.source) for one in listed]
    return as_table([("name", "kind", "state", "where"), *rows]), [asdict(one) for one in listed]
