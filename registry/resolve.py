"""Where a model lies on this machine: one chain of places for every name, and what was found at each.

    find_model("gpt2-offline").path

For gpt2-offline, whose folder is called gpt2, the places are, in this order:

    an explicit path                                    local_path, or the name itself if it is one
    $NANOFORGE_GPT2_PATH or $CODEX_ML_GPT2_PATH         the model's own variable, its name in capitals
    $NANOFORGE_OFFLINE_MODELS_DIR/gpt2                  and $CODEX_ML_OFFLINE_MODELS_DIR/gpt2
    artifacts/models/gpt2                               in the repository
    models/gpt2                                         where one's own runs land: here, then in the repository
    Hugging Face's cache                                by its hub id, also by the one it had before the hub moved it
    the hub                                             if local_files_only is false

Whoever gives a path or sets a variable wants that very place, so what is wrong there is an error and the chain does not
go on; an empty variable is one that is not set. A folder counts only with the whole of a model in it.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec as find_module
from pathlib import Path
from typing import Any

import files
import hub
import model_directory
from registry import catalogue
from words import as_table

ROOT = Path(__file__).resolve().parent.parent
OWNERS = ("NANOFORGE", "CODEX_ML")  # whose variables count: ours, and those of the tool that people come from
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
NOT_NEEDED = "not looked at: found above"
NOT_SET = "not set"
NOT_THERE = "there is no such folder"


@dataclass(frozen=True)
class Candidate:
    place: str
    path: Path | None  # None where the place names none
    reason: str  # why it was refused; "" for the one that is used


@dataclass(frozen=True)
class Resolution:
    name: str
    path: Path  # the model's folder
    trace: tuple[Candidate, ...]  # every place of the chain

    @property
    def place(self) -> str:
        return next(candidate.place for candidate in self.trace if not candidate.reason)

    @property
    def revision(self) -> str | None:
        """The commit on the hub, of a folder in Hugging Face's cache."""
        return self.path.name if self.path.parent.name == "snapshots" else None


class ModelNotFoundError(FileNotFoundError):
    """No place of the chain has the model. The message says why, place by place; `trace` has it as data.

    `binding`: the last place was asked for, and nothing else was tried.
    """

    def __init__(self, name: str | Path, trace: tuple[Candidate, ...], hint: str, binding: bool):
        super().__init__(f"{name} was not found\n{as_table(_rows(trace))}\n{hint}")
        self.trace, self.binding = trace, binding
        self.data = {"name": str(name), "path": None, "trace": trace_data(trace)}


@dataclass(frozen=True)
class Place:
    name: str
    path: Path | None = None
    refusal: str = ""  # known without looking
    binding: bool = False  # asked for by name: what is wrong here ends the search
    fetch: Callable[[], Path] | None = None  # finds the path, or raises FileNotFoundError

    def look(self, check: Callable[[Path], str]) -> Candidate:
        path, reason = self.path, self.refusal
        if not reason:
            try:
                path = self.fetch() if self.fetch else path
                reason = check(path)
            except (ValueError, OSError) as error:
                reason = str(error)
        return Candidate(self.name, path, reason)


def find_model(
    name: str | Path,
    *,
    local_path: str | Path | None = None,
    revision: str | None = None,
    local_files_only: bool = True,
    check: Callable[[Path], str] | None = None,
) -> Resolution:
    """The folder of the model with this name of the catalogue, name in models/, path, or hub id.

    A `revision` is a branch, tag or commit on the hub, so no other folder counts then. `check` says what is wrong with
    a folder ("" for nothing), by default what it lacks of a model. Raises ModelNotFoundError, with the whole trace.
    """
    if not str(name):
        raise ValueError("a model needs a name, and this one is empty")
    spec = catalogue.find_spec(name) if isinstance(name, str) else None
    trace: list[Candidate] = []
    found = None
    for place in _places(name, spec, local_path, revision, local_files_only):
        if found is not None:
            trace.append(Candidate(place.name, place.path, NOT_NEEDED))
            continue
        candidate = place.look(check or lacking)
        trace.append(candidate)
        if not candidate.reason:
            found = candidate.path
        elif place.binding:
            hint = "Nothing else was tried, because this very place was asked for: correct it, or leave it out"
            raise ModelNotFoundError(name, tuple(trace), hint, binding=True)
    if found is None:
        raise ModelNotFoundError(name, tuple(trace), _remedies(name, spec, local_files_only), binding=False)
    return Resolution(str(name), found, tuple(trace))


def folder_of(name: str | Path) -> Path:
    """What a script's argument means: a path that is there, else what `find_model` has by this name.

    Where a path's last part alone is wrong, it stays: whoever opens it can say what lies beside.
    """
    return files.expanded(name) if is_path(name) else find_model(name).path


def is_path(name: str | Path) -> bool:
    path = files.expanded(name)
    return path.exists() or (len(path.parts) > 1 and path.parent.is_dir())


def _remedies(name: str | Path, spec: catalogue.ModelSpec | None, local_files_only: bool) -> str:
    if name == catalogue.MINI_LM:
        return f"{name} lies nowhere: get_model makes it"
    close = catalogue.SPECS.close_to(str(name)) if spec is None else []
    meant = f"Did you mean {' or '.join(close)}? " if close else ""
    variable = _variable(OWNERS[0], spec.folder if spec else str(name))
    flag = "local_files_only: in Python False, for train.py false"
    download = f", or allow the download ({flag})" if local_files_only else ""
    return f"{meant}Give its folder in place of the name, or set {variable} to it{download}"


# ---- the places


def _places(
    name: str | Path,
    spec: catalogue.ModelSpec | None,
    local_path: str | Path | None,
    revision: str | None,
    offline: bool,
) -> Iterator[Place]:
    if local_path:
        yield _at_a_folder(Place("local_path", _folder(local_path), binding=True), revision)
        return
    is_name = isinstance(name, str) and re.fullmatch(hub.HUB_ID, name) is not None
    if spec is None:  # a folder that happens to be called as a model of the catalogue is not that model
        yield _at_a_folder(Place("a path", _folder(name), binding=not is_name), revision)
    if not is_name:
        return
    folder = spec.folder if spec else name
    yield from (_at_a_folder(place, revision) for place in _folders(folder))
    hub_id = spec.hf_id if spec else name
    for known_as in filter(None, (hub_id, catalogue.MOVED.get(hub_id))):
        yield Place(f"Hugging Face's cache ({known_as})", fetch=partial(_from_hub, known_as, revision, offline=True))
    fetch = partial(_from_hub, hub_id, revision, offline=False)
    yield Place(f"the hub ({hub_id})", refusal=_why_not_online(offline), fetch=fetch)


def _folders(folder: str) -> Iterator[Place]:
    yield _own_variable(folder)
    for owner in OWNERS:
        variable = f"{owner}_OFFLINE_MODELS_DIR"
        if value := os.environ.get(variable):
            path = files.expanded(value)
            missing = "" if path.is_dir() else f"{variable} is set to {path}, which is no folder"
            yield Place(f"${variable}/{folder}", path / folder, missing, binding=bool(missing))
        else:
            yield Place(f"${variable}/{folder}", refusal=NOT_SET)
    yield Place(f"artifacts/models/{folder}", ROOT / "artifacts" / "models" / folder)
    for root in model_roots():
        yield Place(f"models/{folder}", root / folder)


def model_roots() -> list[Path]:
    """Where runs land: models/ here, and in the repository."""
    return list(dict.fromkeys((Path("models").absolute(), ROOT / "models")))


def _own_variable(folder: str) -> Place:
    """Of two variables that are set, neither is ignored: they must agree."""
    variables = [_variable(owner, folder) for owner in OWNERS]
    given = {variable: files.expanded(value) for variable in variables if (value := os.environ.get(variable))}
    name = f"${' or $'.join(given or variables)}"
    if not given:
        return Place(name, refusal=NOT_SET)
    path = next(iter(given.values()))
    disagree = f"they differ: {', '.join(f'{variable}={path}' for variable, path in given.items())}"
    return Place(name, path, disagree if len(set(given.values())) > 1 else "", binding=True)


def _variable(owner: str, folder: str) -> str:
    return f"{owner}_{re.sub(r'[^A-Z0-9]+', '_', folder.upper())}_PATH"


def _at_a_folder(place: Place, revision: str | None) -> Place:
    why = f"a folder has no revisions, and revision={revision} is asked for"
    return replace(place, refusal=why) if revision and not place.refusal else place


def _from_hub(hub_id: str, revision: str | None, offline: bool) -> Path:
    if find_module("huggingface_hub") is None:
        raise FileNotFoundError("the package huggingface_hub is not installed")
    if Path(hub_id).is_dir():  # hub.find would take it, and a folder that has a hub id's name is not that model
        raise FileNotFoundError(f"the folder {hub_id} here hides it; if that is the model, give it as ./{hub_id}")
    try:
        return hub.find(hub_id, revision=revision, local_files_only=offline)
    except FileNotFoundError as error:
        if not offline:
            raise
        from huggingface_hub.constants import HF_HUB_CACHE

        at = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(f"{HF_HUB_CACHE} does not hold it{at}") from error


def _why_not_online(local_files_only: bool) -> str:
    if local_files_only:
        return "local_files_only is true"
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").lower() in ("1", "on", "yes", "true"):
            return f"{variable} is set"
    return ""


def _folder(path: str | Path) -> Path:
    """The folder that a path names: itself, or that of the file of weights it is."""
    path = files.expanded(path)
    return path.parent if path.name in (model_directory.WEIGHTS, *model_directory.HF_FILES) and path.is_file() else path


# ---- what counts as a model


def lacking(folder: Path) -> str:
    """What a folder lacks of a model, ours, nanoGPT's or Hugging Face's; "" if it is whole, by names and sizes."""
    if not folder.is_dir():
        return f"{folder} is a file" if folder.exists() else NOT_THERE
    state = model_directory.status(folder)
    if state == "torn":
        return "torn: files of a run whose export_meta.json is missing or says otherwise"
    if state:
        return ""
    if not any(folder.iterdir()):
        return "the folder is empty"
    try:
        hub.read_json(folder / model_directory.CONFIG)
        for path in hub.weight_files(folder):
            with open(path, "rb") as file:
                start = file.read(24)
            if not start:
                return f"{path.name} is empty"
            if start.startswith(b"version https://git-lfs"):
                return f"{path.name} is Git LFS's pointer to the file, not the file: git lfs pull fetches it"
    except (ValueError, OSError) as error:
        return str(error).replace(f"{folder}{os.sep}", "").replace(f"{folder} ", "it ")
    return ""


def lacking_tokenizer(folder: Path) -> str:
    """The same of a folder of which only the tokenizer is wanted."""
    if not folder.is_dir():
        return lacking(folder)
    there = any((folder / name).exists() for name in VOCABULARIES) or any(folder.glob("*.model"))
    return "" if there else f"it has none of {', '.join(VOCABULARIES)}, *.model"


# ---- for people


def _rows(trace: tuple[Candidate, ...]) -> list[tuple[str, ...]]:
    rows = ((c.place, str(c.path or ""), c.reason or "used") for c in trace)
    return [("place", "path", "verdict"), *rows]


def trace_data(trace: tuple[Candidate, ...]) -> list[dict[str, Any]]:
    return [asdict(c) | {"path": str(c.path) if c.path else None} for c in trace]


def run_where(arguments: Any) -> tuple[str, Any]:
    found = find_model(arguments.name)
    data = {"name": found.name, "path": str(found.path), "revision": found.revision, "trace": trace_data(found.trace)}
    return f"{found.path}\n\n{as_table(_rows(found.trace))}", data
