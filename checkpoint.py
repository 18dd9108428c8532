"""The model directory: its name, what lies in it, how it is saved and loaded.

    python checkpoint.py list                          what is in models/
    python checkpoint.py show | verify DIR             one model; every hash
    python checkpoint.py deploy DIR DESTINATION        the best weights alone, for production
    python checkpoint.py prune                         torn and superseded runs (deletes with --yes)

`ckpt.pt` holds the best weights by validation loss and is self-contained; `last/state.pt` is what a run needs to go on
exactly. A LoRA directory has `adapters/` instead of ckpt.pt, in PEFT's format, and knows where its base lies and which
sha256 that has. `export_meta.json` is the marker of files.py: it lists every file of the state in force with size and
sha256. What people may edit or what grows between saves is not in it: README.md, training_log.txt, metrics.jsonl,
loss.png.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import adapters
import files
import lora
from model import GPT, GPTConfig
from naming import ModelName

WEIGHTS = "ckpt.pt"
STATE = "last/state.pt"
ADAPTERS = "adapters"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = f"{ADAPTERS}/{adapters.CONFIG}", f"{ADAPTERS}/{adapters.WEIGHTS}"
TOKENIZER = "tokenizer.json"
MODEL_ARGS = "model_args.json"
CONFIG = "config.json"
CARD = "README.md"
LOG = "training_log.txt"
METRICS = "metrics.jsonl"
PLOT = "loss.png"
DEPLOYED = (WEIGHTS, MODEL_ARGS, CONFIG, TOKENIZER)


class CheckpointManager:
    """Saves and loads model directories. A path is the directory or its `ckpt.pt`.

    Every problem a user can cause is a ValueError of one sentence (FileNotFoundError where there is nothing), and
    nothing is ever unpickled beyond tensors and builtins.
    """

    @staticmethod
    def save_checkpoint(
        model: nn.Module,
        directory: str | Path,
        metadata: dict[str, Any],
        *,
        best: bool = True,
        training_state: dict[str, Any] | None = None,
        texts: dict[str, bytes] | None = None,
    ) -> None:
        """Save a GPT, all or nothing (files.commit).

        `metadata` needs iter_num (int), best_val_loss (float, nats per token) and config (dict of builtins); what else
        it holds (dataset, tokenizer, best: the iteration and metrics of ckpt.pt) goes into export_meta.json. With
        `best`, the weights become ckpt.pt. `training_state` (tensors and builtins) goes to last/state.pt with the
        weights. `texts` are further small files by name. Raises files.SaveError when the disk refuses; what was saved
        before is then untouched.

        Of a model with an adapter, the adapter alone is saved, and `metadata` needs base, what `base_reference` gave.
        """
        directory, model = Path(directory), bare(model)
        adapted = bool(lora.adapter_names(model))
        if adapted != ("base" in metadata):
            raise ValueError(
                f"{directory}: a model with adapters is saved with its base (CheckpointManager.base_reference), or "
                "merged first (lora.merge_lora); one without has none"
            )
        arguments = model_args(model.config)
        own = lora.lora_state_dict(model) if adapted else {}
        common = {
            "model": own or model.state_dict(),
            "model_args": arguments,
            "config": metadata["config"],
            "iter_num": int(metadata["iter_num"]),
            "best_val_loss": float(metadata["best_val_loss"]),
        }
        about = {
            "format": "nanoforge-1",
            "name": directory.resolve().name,
            "parameters": model.num_params() - lora.count_parameters(model),
            "iter_num": common["iter_num"],
            "best_val_loss": common["best_val_loss"],
            **{key: value for key, value in metadata.items() if key not in common},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__},
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        small = {
            MODEL_ARGS: _json(arguments),
            CONFIG: _json(metadata["config"]),
            **(texts or {}),
        }
        if adapted:
            about["adapter_parameters"] = sum(tensor.numel() for tensor in own.values())
        if best and adapted:
            # A GPT-2-style model's layers are Transformers' Conv1D there, which store (in, out).
            written = adapters.adapter_files(
                model,
                base=metadata["base"]["given"],
                task_type="CAUSAL_LM",
                fan_in_fan_out=model.config.block == "gpt2",
            )
            small |= {f"{ADAPTERS}/{name}": data for name, data in written.items()}
        writers = {name: _write_bytes(data) for name, data in small.items()}
        if best and not adapted:
            writers[WEIGHTS] = lambda file: torch.save(common, file)
        if training_state is not None:
            writers[STATE] = lambda file: torch.save({**common, **training_state}, file)
        files.commit(directory, writers, about)
        files.write_atomic(directory / CARD, model_card(about, arguments).encode())

    @staticmethod
    def load_model(
        path: str | Path,
        device: str | torch.device = "cpu",
        apply_lora: bool = False,
        lora_config: dict[str, Any] | None = None,
        base: str | Path | None = None,
    ) -> tuple[GPT, dict[str, Any]]:
        """The best weights of a directory, or of a nanoGPT ckpt.pt, as (model, metadata).

        metadata holds model_args, config, iter_num, best_val_loss, directory and export_meta (None for a foreign file).
        With apply_lora, the model is frozen and has a new adapter to train; `lora_config` has LoRAConfig's settings in
        any of its spellings. A LoRA directory gives its base with its adapter; `base` says where that lies now if it
        was moved. Raises ValueError for a base that is not the one the adapter was trained on.
        """
        if lora_config and not apply_lora:
            raise ValueError("lora_config is given, but apply_lora is not true")
        directory, name = _locate(path)
        marker = files.read_marker(directory)
        if is_lora(marker):
            model, checkpoint = _load_adapted(directory, marker, base, device)
        elif base:
            raise ValueError(f"{directory} holds a whole model, so it has no base ({base})")
        else:
            checkpoint = _load(directory, name, device)
            model = build_model(checkpoint, directory / name)
        if apply_lora:
            lora.apply_lora(model, lora.LoRAConfig.from_dict(lora_config or {}))
        kept = ("model_args", "config", "iter_num", "best_val_loss")
        metadata = {key: checkpoint.get(key) for key in kept}
        return model, {**metadata, "directory": directory, "export_meta": files.read_marker(directory)}

    @staticmethod
    def load_model_for_inference(
        path: str | Path, device: str | torch.device = "cpu", base: str | Path | None = None
    ) -> GPT:
        """The best weights, in eval mode, an adapter's merged into its base's."""
        model = CheckpointManager.load_model(path, device, base=base)[0].eval()
        if lora.adapter_names(model):
            lora.merge_lora(model)
        return model

    @staticmethod
    def load_training_state(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
        """What `save_checkpoint` was given as training_state, with the weights as they were at that step."""
        directory, _ = _locate(path)
        return _load(directory, STATE, device)

    @staticmethod
    def base_reference(base: str | Path, directory: str | Path) -> dict[str, str]:
        """What a LoRA run in `directory` remembers of the model it adapts: relative path and sha256 of its weights."""
        folder, name = _locate(base)
        path = os.path.relpath((folder / name).resolve(), Path(directory).resolve())
        return {"path": Path(path).as_posix(), "sha256": _sha256(folder, name), "given": str(base)}

    @staticmethod
    def load_base(
        directory: str | Path, base: str | Path | None = None, device: str | torch.device = "cpu"
    ) -> tuple[GPT, dict[str, str]]:
        """The model that a LoRA directory adapts, as the run saw it, and the reference to where it was found.

        `base` is where it lies now if it was moved. Raises FileNotFoundError or ValueError, with the path and the hash
        that were expected, if it is not there or is another.
        """
        directory = Path(directory)
        about = read_about(directory) or {}
        if not is_lora(about):
            raise ValueError(f"{directory} is no LoRA directory, so it has no base")
        expected, path = about["base"]["sha256"], Path(base) if base else directory / about["base"]["path"]
        try:
            found = _sha256(*_locate(path))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{directory} needs its base, and there is none at {path}: {Path(about['base']['path']).name} with "
                f"sha256 {expected} ({about['base']['given']} when it was trained); if it was moved, --base says where"
            ) from None
        if found != expected:
            raise ValueError(
                f"{path} is not the base of {directory}: its sha256 is {found}, and the adapter was trained on "
                f"{expected} ({about['base']['given']}); if that was moved, --base says where"
            )
        model, _ = CheckpointManager.load_model(path, device)
        with files.open_verified(directory, MODEL_ARGS) as file:
            wanted = GPTConfig(**json.load(file))
        model = reshaped(model.float(), wanted.block_size, wanted.dropout)
        reference = CheckpointManager.base_reference(path, directory)
        return model, reference if base else {**reference, "given": about["base"]["given"]}

    @staticmethod
    def find_tokenizer(path: str | Path) -> Path | None:
        """The tokenizer.json of a model directory, or None where it has none (nanoGPT's)."""
        stored = _locate(path)[0] / TOKENIZER
        return stored if stored.exists() else None

    @staticmethod
    def verify(path: str | Path) -> list[str]:
        """Every problem of a model directory: damaged or missing files, unreadable weights. Empty when it is sound."""
        directory, _ = _locate(path)
        marker = files.read_marker(directory)
        if marker is None:
            return [f"{directory} has no {files.MARKER}: it is torn, or nothing of ours"]
        problems = []
        for name in marker["files"]:
            try:
                with files.open_verified(directory, name):
                    pass
            except ValueError as error:
                problems.append(str(error))
        if not problems:
            try:
                CheckpointManager.load_model(directory, "meta")
            except (ValueError, OSError) as error:  # a LoRA directory's base may be gone
                problems.append(str(error))
        return problems


def bare(model: nn.Module) -> GPT:
    """The GPT inside torch.compile's and DistributedDataParallel's wrappers, so that no saved name remembers them."""
    while not isinstance(model, GPT):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def model_args(config: GPTConfig) -> dict[str, Any]:
    """nanoGPT's seven keys, and any other field only where it differs from its default: nanoGPT refuses keys it does
    not know, so a model it can run must not carry them."""
    first_seven = [f.name for f in fields(GPTConfig)][:7]
    defaults = GPTConfig()
    values = asdict(config)
    return {k: v for k, v in values.items() if k in first_seven or v != getattr(defaults, k)}


def is_lora(about: dict[str, Any] | None) -> bool:
    """Whether the marker of a directory is a LoRA run's, whose weights are its base's and an adapter's."""
    return "base" in (about or {})


def _sha256(directory: Path, name: str) -> str:
    """Of the weights of a directory: as its marker has it, which loading them compares, or of the file."""
    marker = files.read_marker(directory)
    if is_lora(marker):
        raise ValueError(f"{directory} is a LoRA directory: merge it first (python merge_lora.py {directory})")
    if name in (marker or {"files": {}})["files"]:
        return marker["files"][name]["sha256"]
    with open(directory / name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_adapted(
    directory: Path, about: dict[str, Any], base: str | Path | None, device: str | torch.device
) -> tuple[GPT, dict[str, Any]]:
    """The model of a LoRA directory, and what a ckpt.pt would say besides the weights."""
    model, _ = CheckpointManager.load_base(directory, base, device)
    names = (MODEL_ARGS, CONFIG, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    content = {}
    for name in names:
        with files.open_verified(directory, name) as file:
            content[name] = file.read()
    try:
        adapters.install_adapter(
            model, content[ADAPTER_CONFIG], content[ADAPTER_WEIGHTS], directory / ADAPTERS, untie=True
        )
    except ValueError as error:
        if files.read_marker(directory) == about:
            raise
        raise ValueError(f"{directory} was saved anew while it was read; try again ({error})") from None
    said = {"model_args": json.loads(content[MODEL_ARGS]), "config": json.loads(content[CONFIG])}
    return model, {
        **said,
        "iter_num": (about.get("best") or about)["iter_num"],
        "best_val_loss": about["best_val_loss"],
    }


def reshaped(model: GPT, block_size: int | None = None, dropout: float | None = None) -> GPT:
    """The same weights with another dropout and a context shortened to block_size."""
    config = replace(model.config, dropout=model.config.dropout if dropout is None else dropout)
    model = build_model({"model": model.state_dict(), "model_args": asdict(config)}, Path("the model"))
    if block_size not in (None, config.block_size):
        model.crop_block_size(block_size)
    return model


def build_model(checkpoint: dict[str, Any], source: Path) -> GPT:
    """A GPT that takes over the tensors of a checkpoint, uncopied. Raises ValueError for what does not fit."""
    arguments, weights = checkpoint["model_args"], checkpoint["model"]
    unknown = sorted(map(str, set(arguments) - {f.name for f in fields(GPTConfig)}))
    if unknown:
        raise ValueError(f"{source} describes a model this version does not know: model_args has {', '.join(unknown)}")
    if not all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in weights.items()):
        raise ValueError(f"{source} holds something other than named tensors as its model")
    state = {_plain_name(key): tensor for key, tensor in weights.items()}
    # nanoGPT's first versions stored each layer's causal mask as a buffer.
    state = {key: tensor for key, tensor in state.items() if not key.endswith((".attn.bias", ".attn.masked_bias"))}
    try:
        with torch.device("meta"):
            model = GPT(GPTConfig(**arguments))
    except TypeError as error:
        raise ValueError(f"{source} has model_args that are no numbers of a model: {error}") from None
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        _check_tied(state, source, "transformer.wte" if model.config.block == "gpt2" else "model.embed_tokens")
    problems = [f"{key} is missing" for key in expected.keys() - state.keys()]
    problems += [f"{key} is unexpected" for key in state.keys() - expected.keys()]
    problems += [
        f"{key} is {tuple(state[key].shape)} where the model has {tuple(expected[key].shape)}"
        for key in expected.keys() & state.keys()
        if state[key].shape != expected[key].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"{source} does not hold the model its model_args describe: {shown}")
    model.load_state_dict(state, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embedding.weight  # assigning has parted them
    return model


def _plain_name(key: str) -> str:
    return key.replace("_orig_mod.", "").removeprefix("module.")


def _check_tied(state: dict[str, Tensor], source: Path, tokens: str) -> None:
    wte, head = state.get(f"{tokens}.weight"), state.get("lm_head.weight")
    if wte is None or head is None:
        state.update({"lm_head.weight": wte} if head is None and wte is not None else {})
    elif wte.device.type != "meta" and wte.shape == head.shape and not torch.equal(wte, head):
        raise ValueError(f"{source} says that lm_head shares the token embedding, but its two tensors differ")


def _locate(path: str | Path) -> tuple[Path, str]:
    """(directory, file of weights) for a directory or a checkpoint file in it."""
    path = Path(path).expanduser()
    directory, name = (path.parent, path.name) if path.suffix == ".pt" and not path.is_dir() else (path, WEIGHTS)
    if path.parts[-2:] == tuple(STATE.split("/")):
        directory, name = path.parent.parent, STATE
    if not directory.is_dir():
        near = sorted(p.parent.name for p in directory.parent.glob(f"*/{WEIGHTS}"))
        raise FileNotFoundError(
            f"there is no model directory {directory}" + (f"; beside it: {', '.join(near)}" if near else "")
        )
    return directory, name


def _load(directory: Path, name: str, device: str | torch.device) -> dict[str, Any]:
    """Read a checkpoint file: verified against the marker, or, where nothing here was written by us, as it is."""
    marker = files.read_marker(directory)
    if marker is None:
        if status(directory) == "torn":
            raise ValueError(f"{directory} is torn: it has files of a run but no {files.MARKER}")
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} holds no {name}")
        with open(directory / name, "rb") as file:
            return _unpickle(file, directory / name, device)
    if name == STATE and name not in marker["files"]:
        raise FileNotFoundError(f"{directory} holds no {STATE}: it can be loaded and fine-tuned, but not resumed")
    with files.open_verified(directory, name) as file:
        return _unpickle(file, directory / name, device)


def _unpickle(file, path: Path, device: str | torch.device) -> dict[str, Any]:
    try:
        checkpoint = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # torch has no common base for what a broken or hostile file raises
        reason = (
            "it would run code when opened, or is no checkpoint"
            if "weights_only" in str(error).lower()
            else "it is cut short or no checkpoint"
        )
        raise ValueError(f"{path} is refused: {reason} ({str(error).splitlines()[0][:120]})") from None
    if (
        not isinstance(checkpoint, dict)
        or not isinstance(checkpoint.get("model"), dict)
        or not isinstance(checkpoint.get("model_args"), dict)
    ):
        raise ValueError(f"{path} is no GPT checkpoint: it needs the keys model and model_args")
    return checkpoint


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _write_bytes(data: bytes) -> Callable[[files.HashedFile], Any]:
    return lambda file: file.write(data)


def model_card(about: dict[str, Any], arguments: dict[str, Any]) -> str:
    """The README.md of a model directory."""
    dataset, best = about.get("dataset") or {}, about.get("best") or {}
    synthetic = (
        " **The text is synthetic**: generated by a grammar, for trying things out." if dataset.get("synthetic") else ""
    )
    if is_lora(about):
        kind = f"An adapter (LoRA) of {about['adapter_parameters']:,} parameters for {about['base']['given']}, a GPT of"
        file, use = f"{ADAPTERS}/", f"python merge_lora.py models/{about['name']}  # a model of its own"
    else:
        kind, file, use = "A GPT of", WEIGHTS, ""
    if merge := about.get("merge"):
        kind = f"{merge['base']['given']} and the adapter {merge['adapter']['name']} merged into one: a GPT of"
    numbers = "".join(f"| {key.replace('_', ' ')} | {value:.4f} |\n" for key, value in best.get("metrics", {}).items())
    return (
        f"# {about['name']}\n\n"
        f"{kind} {about['parameters']:,} parameters, trained with nanoforge for {about['iter_num']:,} steps on "
        f"{dataset.get('name', 'an unnamed dataset')}.{synthetic}\n\n"
        f"- Source: {dataset.get('source', 'unknown')}\n"
        f"- Licence of the text: {dataset.get('licence', 'unknown')}\n"
        f"- Architecture: {', '.join(f'{k} {v}' for k, v in arguments.items())}\n\n"
        + (f"| {file}, iteration {best['iter_num']:,} | |\n| --- | --- |\n{numbers}\n" if numbers else "")
        + "```python\nfrom checkpoint import CheckpointManager\n\n"
        f'model = CheckpointManager.load_model_for_inference("models/{about["name"]}")\n```\n'
        + (f"\n```bash\n{use}\n```\n" if use else "")
    )


def read_about(directory: Path) -> dict[str, Any] | None:
    """The marker of a model directory, or None where there is none. Raises ValueError for one that says too little."""
    marker = files.read_marker(directory)
    missing = {"name", "parameters", "iter_num", "best_val_loss"} - set(marker or {})
    if marker is not None and missing:
        raise ValueError(f"{directory / files.MARKER} is damaged: it says nothing of {', '.join(sorted(missing))}")
    return marker


def status(directory: Path) -> str:
    """complete, torn, foreign (a bare ckpt.pt of nanoGPT) or nothing of ours (""), judged by names and sizes."""
    while True:
        try:
            marker = read_about(directory)
        except ValueError:
            return "torn"
        if marker is None:
            break
        sizes = {name: entry["size"] for name, entry in marker["files"].items()}
        with contextlib.suppress(FileNotFoundError):
            if all(files.find(directory, name).stat().st_size == size for name, size in sizes.items()):
                return "complete"
        if files.read_marker(directory) == marker and not (directory / files.PENDING).exists():
            return "torn"  # and not merely being written while we looked
    if any((directory / name).exists() for name in (MODEL_ARGS, LOG)):
        return "torn"
    return "foreign" if (directory / WEIGHTS).is_file() else ""


# ---- the command line


def models_in(root: Path) -> dict[Path, str]:
    """Model directories under `root` and their status."""
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    found = {path: status(path) for path in sorted(root.iterdir()) if path.is_dir()}
    return {path: state for path, state in found.items() if state}


def size_on_disk(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a save is renaming files while we look
            total += path.stat().st_size if path.is_file() else 0
    return total


def list_models(root: Path) -> str:
    rows = [("name", "parameters", "iterations", "best val loss", "on disk", "state")]
    for path, state in models_in(root).items():
        numbers = ("", "", "")
        if state == "complete":
            about = read_about(path)
            numbers = f"{about['parameters']:,}", f"{about['iter_num']:,}", f"{about['best_val_loss']:.4f}"
        rows.append((path.name, *numbers, f"{size_on_disk(path) / 1e6:,.0f} MB", state))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


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
        raise ValueError(f"{directory} is a LoRA directory: merge it first (python merge_lora.py {directory})")
    there = read_about(destination) if destination.is_dir() else None
    if there is not None and there["name"] != about["name"]:
        raise ValueError(f"{destination} holds another model, {there['name']}: choose a new folder or remove it")
    if there is None and destination.exists() and any(destination.iterdir()):
        raise ValueError(f"{destination} is not empty and holds no model: choose a new folder")

    def copy(name: str) -> Callable[[files.HashedFile], None]:
        def write(target: files.HashedFile) -> None:
            with files.open_verified(directory, name) as source:
                shutil.copyfileobj(source, target, 1 << 20)
            if read_about(directory) != about:
                raise ValueError(f"{directory} was saved anew while it was being copied: deploy it again")

        return write

    iteration = (about.get("best") or about)["iter_num"]
    deployed = {key: value for key, value in about.items() if key != "files"} | {"iter_num": iteration}
    files.commit(destination, {name: copy(name) for name in DEPLOYED if name in about["files"]}, deployed)
    arguments = json.loads((destination / MODEL_ARGS).read_bytes())
    files.write_atomic(destination / CARD, model_card(deployed, arguments).encode())
    size = f"{size_on_disk(destination) / 1e6:,.0f} MB"
    return f"{about['name']}, best at iteration {iteration:,}, is in {destination} ({size})"


def superseded(complete: list[Path]) -> dict[Path, str]:
    """Complete models of which a newer version is complete and no worse: v2 after v1 after none, dates by date."""
    versions: dict[ModelName, list[tuple[list[int], Path]]] = {}
    for path in complete:
        with contextlib.suppress(ValueError):  # a name outside the convention has no versions
            name = ModelName.parse(path.name)
            order = [int(number) for number in re.findall(r"\d+", name.version)]
            versions.setdefault(replace(name, version=""), []).append((order, path))
    found = {}
    for group in versions.values():
        newest = max(group)[1]
        loss = read_about(newest)["best_val_loss"]
        older = (path for _, path in group if path != newest and read_about(path)["best_val_loss"] >= loss)
        found |= {path: f"superseded by {newest.name}" for path in older}
    return found


def prune(root: Path, yes: bool) -> str:
    """Say which runs are torn or superseded, and with `yes` delete them. A run being written is left alone."""
    states = models_in(root)
    complete = [path for path, state in states.items() if state == "complete"]
    doomed = {path: "torn" for path, state in states.items() if state == "torn"}
    doomed |= superseded(complete)
    lines = []
    for path in complete:
        if is_lora(about := read_about(path)):
            base = (path / about["base"]["path"]).resolve().parent
            for older in [other for other in doomed if other.resolve() == base]:
                lines.append(f"kept {older}: it is the base of {path.name}")
                del doomed[older]
    for path, reason in doomed.items():
        size = f"{size_on_disk(path) / 1e6:,.0f} MB"
        try:
            with files.lock(path):
                if yes:
                    shutil.rmtree(path)
            lines.append(f"{'deleted' if yes else 'would delete'} {path} ({reason}, {size})")
        except (ValueError, OSError) as error:
            lines.append(f"kept {path}: {error}")
    return "\n".join(lines + ([] if yes or not lines else ["nothing was deleted; --yes deletes"])) or "nothing to prune"


def main() -> int:
    parser = argparse.ArgumentParser(description="Look after model directories.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, help in (("list", "a table of the models"), ("prune", "remove torn and superseded runs")):
        sub = commands.add_parser(command, help=help)
        sub.add_argument(
            "root", nargs="?", type=Path, default=Path("models"), help="folder of models (default: models)"
        )
    sub.add_argument("--yes", action="store_true", help="delete; without it, only say what would be deleted")
    for command, help in (
        ("show", "print export_meta.json"),
        ("verify", "check every file's hash"),
        ("deploy", "copy the best weights"),
    ):
        sub = commands.add_parser(command, help=help)
        sub.add_argument("directory", type=Path)
    sub.add_argument("destination", type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.command == "verify":
            problems = CheckpointManager.verify(arguments.directory)
            print("\n".join(problems) or f"{arguments.directory} is sound")
            return 1 if problems else 0
        actions = {
            "list": lambda: list_models(arguments.root),
            "prune": lambda: prune(arguments.root, arguments.yes),
            "show": lambda: show(_locate(arguments.directory)[0]),
            "deploy": lambda: deploy(_locate(arguments.directory)[0], arguments.destination),
        }
        print(actions[arguments.command]())
    except (ValueError, OSError) as error:
        print(f"checkpoint.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
