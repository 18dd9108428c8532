"""Looking after model directories: list, show, deploy, prune (checkpoint.py's command line). Opens no weights."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import files
from model_directory import (
    A_SHARD,
    ADAPTER_WEIGHTS,
    CARD,
    DEPLOYED,
    HF_WEIGHTS,
    MODEL_ARGS,
    OF_A_RUN,
    STATE,
    WEIGHTS,
    base_folder,
    holds,
    is_lora,
    model_card,
    models_in,
    only_base_of,
    read_about,
)
from naming import ModelName
from words import as_table, merge_first

LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}  # of macOS and Windows


def contents(directory: Path) -> dict[Path, tuple[int, int]]:
    """Every file's size in bytes and time of change in nanoseconds."""
    found = {}
    for path in directory.rglob("*"):
        # A save may be renaming files while we look, and a folder may be somebody else's.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            if path.is_file():
                found[path] = path.stat().st_size, path.stat().st_mtime_ns
    return found


def size_on_disk(directory: Path) -> int:
    return sum(size for size, _ in contents(directory).values())


def list_models(root: Path) -> str:
    rows = [("name", "parameters", "iterations", "best val loss", "on disk", "state")]
    for path, state in models_in(root).items():
        numbers = ("", "", "")
        if state == "complete":
            about = read_about(path)
            numbers = f"{about['parameters']:,}", f"{about['iter_num']:,}", f"{about['best_val_loss']:.4f}"
        rows.append((path.name, *numbers, f"{size_on_disk(path) / 1e6:,.0f} MB", state))
    return as_table(rows)


def show(directory: Path) -> str:
    marker = files.read_marker(directory)
    if marker is None:
        raise ValueError(f"{directory} has no {files.MARKER}: nothing to show")
    return json.dumps(marker, indent=2)


def deploy(directory: Path, destination: Path) -> str:
    """Copy the best weights and what describes them, verified, to `destination`: a model directory without its run."""
    about = read_about(directory)
    if about is None:
        raise ValueError(f"{directory} is not a complete model directory")
    if is_lora(about):
        raise ValueError(merge_first(directory))
    there = read_about(destination) if destination.is_dir() else None
    if there is not None and (there["name"] != about["name"] or is_lora(there)):
        raise ValueError(f"{destination} holds another model, {there['name']}: choose a new folder or remove it")
    if there is not None and (STATE in there["files"] or destination.resolve() == directory.resolve()):
        raise ValueError(f"{destination} holds a run, which weights from elsewhere would end: choose a new folder")
    others = [path for path in destination.glob("*") if not path.name.endswith(files.NEW)]  # a killed one's
    if there is None and others:
        raise ValueError(f"{destination} is not empty and holds no model: choose a new folder")
    if there is not None:
        _check_replaceable(destination, there, directory, about)

    def copy(name: str) -> Callable[[files.HashedFile], None]:
        def write(target: files.HashedFile) -> None:
            with files.open_verified(directory, name) as source:
                shutil.copyfileobj(source, target, 1 << 20)
            if read_about(directory) != about:
                raise ValueError(f"{directory} was saved anew while it was being copied: deploy it again")

        return write

    names = [name for name in DEPLOYED if name in about["files"]]
    files.check_room(destination, sum(about["files"][name]["size"] for name in names))
    iteration = (about.get("best") or about)["iter_num"]
    deployed = {key: value for key, value in about.items() if key != "files"} | {"iter_num": iteration}
    with files.lock(destination):
        files.commit(destination, {name: copy(name) for name in names}, deployed)
        arguments = json.loads((destination / MODEL_ARGS).read_bytes())
        files.write_atomic(destination / CARD, model_card(deployed, arguments).encode())
    size = f"{size_on_disk(destination) / 1e6:,.0f} MB"
    return f"{about['name']}, best at iteration {iteration:,}, is in {destination} ({size})"


def _check_replaceable(destination: Path, there: dict[str, Any], directory: Path, about: dict[str, Any]) -> None:
    """Raises ValueError for weights that would be missed: better ones, or those that an adapter needs."""
    if _alike(about, there) and there["best_val_loss"] < about["best_val_loss"]:
        raise ValueError(
            f"{destination} holds better weights, with a validation loss of {there['best_val_loss']:.4f} where "
            f"{directory} has {about['best_val_loss']:.4f}: choose a new folder or remove it"
        )
    for adapter in only_base_of(destination):
        if not holds(directory, read_about(adapter)["base"]["sha256"]):
            raise ValueError(
                f"{destination} is the base of {adapter.name}, which needs its weights: choose a new folder"
            )


def superseded(complete: list[Path]) -> dict[Path, str]:
    """Complete models of which a newer version is complete and no worse: v2 after v1 after none, dates by date. Losses
    of other text, or by other tokens, say nothing of that, and a copy that cannot be resumed replaces no run."""
    versions: dict[ModelName, list[tuple[list[int], Path]]] = {}
    for path in complete:
        with contextlib.suppress(ValueError):  # a name outside the convention has no versions
            name = ModelName.parse(path.name)
            order = [int(number) for number in re.findall(r"\d+", name.version)]
            versions.setdefault(replace(name, version=""), []).append((order, path))
    found = {}
    for group in versions.values():
        versions_of_one = [(path, read_about(path)) for _, path in sorted(group)]
        for number, (path, about) in enumerate(versions_of_one):
            newer = versions_of_one[number + 1 :]
            fit = [(other, best) for other, best in newer if STATE in best["files"] or STATE not in about["files"]]
            if fit and _alike(about, fit[-1][1]) and about["best_val_loss"] >= fit[-1][1]["best_val_loss"]:
                found[path] = f"superseded by {fit[-1][0].name}"
    return found


def _alike(about: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two models' losses are of the same text and tokens."""
    of = [[(one.get(key) or {}).get("fingerprint") for key in ("dataset", "tokenizer")] for one in (about, other)]
    return of[0] == of[1]


def _kept_though_torn(directory: Path) -> str:
    """Why a torn directory is not to be deleted: its weights are whole, or not all that is in it is a run's."""
    try:
        marker = files.read_marker(directory)
    except ValueError:  # it is none
        marker = None
    names = sorted(path.relative_to(directory).as_posix() for path in contents(directory))
    shards = [name for name in names if re.fullmatch(A_SHARD, name)]
    for name in (WEIGHTS, HF_WEIGHTS, ADAPTER_WEIGHTS, STATE, *shards):
        path, entry = files.find(directory, name), files.listed(marker).get(name)
        if entry is None and path.exists():  # no save ends like that, so what it is nobody knows
            return f"no {files.MARKER} says whether its {name} is whole: delete it by hand"
        if path.is_file() and path.stat().st_size == entry["size"]:
            return f"it is torn, but its {name} is whole"
    strange = _strange(directory, marker)
    return f"it is torn, but {strange} is no file of a run" if strange else ""


def _strange(directory: Path, marker: dict[str, Any] | None) -> str | None:
    """The name of a file in a model directory that no run has written, nor a system that looks into folders."""
    known = OF_A_RUN | files.listed(marker).keys()
    names = sorted(path.relative_to(directory).as_posix() for path in contents(directory) if path.name not in LITTER)
    foreign = (name for name in names if not (name in known or re.fullmatch(A_SHARD, name) or name.endswith(files.NEW)))
    return next(foreign, None)


def _may_need(path: Path, base: Path, doomed: bool) -> bool:
    """Whether `path` is a LoRA directory with this base, or may become one: a run has no marker to say so before its
    first save. What is doomed, and not being written, needs nothing."""
    with contextlib.suppress(ValueError, OSError):
        about = None if doomed else read_about(path)
        if about is None:
            with files.lock(path):
                return False
        if not is_lora(about):
            return False
        within = base_folder(path, about["base"]).resolve().is_relative_to(base.resolve())
        return within or holds(base, about["base"]["sha256"])
    return True  # it is being written, or nobody can read its marker


def prune(root: Path, yes: bool) -> str:
    """Say which runs are torn or superseded, and with `yes` delete them. A run being written is left alone."""
    seen = {path: contents(path) for path in models_in(root)}  # first: what is saved from here on is not judged
    doomed, lines = judge(models_in(root))
    for path, reason in doomed.items():
        if path.exists():  # else a second prune was faster, and to lock it would make it anew
            lines.append(_delete(path, reason, seen.get(path), yes))
    if not lines:
        return "nothing to prune"
    return "\n".join(lines if yes else [*lines, "nothing was deleted; --yes deletes"])


def judge(states: dict[Path, str]) -> tuple[dict[Path, str], list[str]]:
    """({directory that may go: why}, a line for each that is torn or superseded and must stay), from `models_in`."""
    own = {path: state for path, state in states.items() if not path.is_symlink()}  # a link is only another name
    doomed, lines = {}, []
    for path in [path for path, state in own.items() if state == "torn"]:
        if why := _kept_though_torn(path):
            lines.append(f"kept {path}: {why}")
        else:
            doomed[path] = "torn"
    torn = set(doomed)
    for path, reason in superseded([path for path, state in own.items() if state == "complete"]).items():
        adapters = (other for other in states if other != path and _may_need(other, path, other in torn))
        if strange := _strange(path, read_about(path)):
            lines.append(f"kept {path}: it is {reason}, but {strange} is no file of a run")
        elif adapter := next(adapters, None):
            lines.append(f"kept {path}: it is the base of {adapter.name}, or may be")
        else:
            doomed[path] = reason
    return doomed, lines


def _delete(directory: Path, reason: str, seen: dict[Path, tuple[int, int]] | None, yes: bool) -> str:
    """Delete a directory in which all is as it was `seen`; without `yes`, only say so. Returns the line to print."""
    size = f"{size_on_disk(directory) / 1e6:,.0f} MB"
    try:
        with files.lock(directory):
            if contents(directory) != seen:
                raise ValueError("it was written to meanwhile")
            if yes:  # where it cannot be moved it cannot be deleted, and stays whole
                rest = directory.rename(files.free_name(directory, ".pruned"))
                shutil.rmtree(rest, ignore_errors=True)
                size += f"; what could not be deleted is in {rest}" if rest.exists() else ""
    except (ValueError, OSError) as error:
        return f"kept {directory}: {error}"
    return f"{'deleted' if yes else 'would delete'} {directory} ({reason}, {size})"
