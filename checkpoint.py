"""Saving and loading model directories; what lies in one stands in model_directory.py.

    python checkpoint.py list                          what is in models/
    python checkpoint.py show | verify DIR             one model; every hash and both files of weights
    python checkpoint.py deploy DIR DESTINATION        the best weights alone, for production
    python checkpoint.py prune                         torn and superseded runs (deletes with --yes)

`ckpt.pt` holds the best weights by validation loss and is self-contained; `model.safetensors` and what hugging_face.py
adds are the same for Transformers; `last/state.pt` is what a run needs to go on exactly. A LoRA directory has, instead
of weights, `adapters/` in PEFT's format, and knows where its base lies and which sha256 that has.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import files
import script
from housekeeping import deploy, list_models, prune, show
from model_directory import (
    A_SHARD,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ADAPTERS,
    CARD,
    CONFIG,
    HF_FILES,
    HF_WEIGHTS,
    MODEL_ARGS,
    SHARDS,
    STATE,
    TOKENIZER,
    WEIGHTS,
    base_folder,
    is_lora,
    locate,
    model_card,
    read_about,
    status,
)
from words import in_shell, merge_first


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Look after model directories.")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="a table of the models")
    pruning = commands.add_parser("prune", help="remove torn and superseded runs")
    showing = commands.add_parser("show", help="print export_meta.json")
    verifying = commands.add_parser("verify", help="check every file's hash")
    deploying = commands.add_parser("deploy", help="copy the best weights")
    root = {"nargs": "?", "default": Path("models"), "help": "folder of models (default: models)"}
    for command in (listing, pruning):
        command.add_argument("root", type=files.expanded, **root)
    for command in (showing, verifying, deploying):
        command.add_argument("directory", type=files.expanded, help="a model directory")
    pruning.add_argument("--yes", action="store_true", help="delete; without it, only say what would be deleted")
    moved = "where a LoRA directory's base lies now, if it was moved"
    verifying.add_argument("--base", type=files.expanded, help=moved)
    copied = "a new folder, or where this model was deployed before"
    deploying.add_argument("destination", type=files.expanded, help=copied)
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> int:
    def verify() -> int:
        problems = CheckpointManager.verify(arguments.directory, arguments.base)
        print("\n".join(problems) or f"{arguments.directory} is sound")
        return 1 if problems else 0

    commands = {
        "list": lambda: print(list_models(arguments.root)),
        "prune": lambda: print(prune(arguments.root, arguments.yes)),
        "show": lambda: print(show(locate(arguments.directory)[0])),
        "deploy": lambda: print(deploy(locate(arguments.directory)[0], arguments.destination)),
        "verify": verify,
    }
    return script.run("checkpoint.py", commands[arguments.command])


if __name__ == "__main__":
    script.begin()
    ARGUMENTS = parse()  # --help and mistakes do not wait for torch
    if ARGUMENTS.command != "verify":  # nor do these: they open no weights
        script.ready()
        sys.exit(main(ARGUMENTS))

import numpy
import torch
from torch import nn

import adapters
import families
import hub
import hugging_face
import lora
from device import check_device
from model import GPT, GPTConfig
from tokenizer_files import find_tokenizer
from weights import build_model, check_saveable, model_args, read_checkpoint, reshaped


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
        shards: dict[str, dict[str, Any]] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Save a GPT, all or nothing (files.commit).

        `metadata` needs iter_num (int), best_val_loss (float, nats per token) and config (dict of builtins); what else
        it holds (dataset, tokenizer, best: the iteration and metrics of ckpt.pt) goes into export_meta.json. With
        `best`, the weights become ckpt.pt and model.safetensors. `training_state` (tensors and builtins) goes to
        last/state.pt with the weights. `texts` are further small files by name: the content of tokenizer.json decides
        where text ends, and what Transformers should read instead of hugging_face.py's files is written instead.
        Raises files.SaveError when the disk refuses; what was saved before is then untouched.

        Of a model with an adapter, the adapter alone is saved, and `metadata` needs base, what `base_reference` gave.

        `shards` are the files in which several processes have staged weights and optimizer state: `training_state` is
        then the rest, and of `model` nothing but what is saved needs numbers; `fingerprint` is then that of the base
        (adapters.fingerprint_of).
        """
        directory, model = Path(directory), bare(model)
        _check_before_saving(directory, model, metadata, training_state)
        adapted, arguments = "base" in metadata, model_args(model.config)
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
            "parameters": model.num_params() - lora.count_adapter_parameters(model),
            "iter_num": common["iter_num"],
            "best_val_loss": common["best_val_loss"],
            **{key: value for key, value in metadata.items() if key not in common},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__},
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        dtype, tokenizer = next(model.parameters()).dtype, (texts or {}).get(TOKENIZER)
        configurations, why_not = hugging_face.configurations(model.config, dtype, metadata["config"], tokenizer)
        if why_not:
            about["hugging_face"] = f"no: {why_not}"
        contents: dict[str, files.Content] = {name: _json(value) for name, value in configurations.items()}
        contents |= {MODEL_ARGS: _json(arguments), **(texts or {})}
        if adapted:
            about["adapter_parameters"] = sum(tensor.numel() for tensor in own.values())
        if best and adapted:
            contents |= _adapter_files(model, directory, metadata["base"], fingerprint)
        if best and not adapted:
            contents[WEIGHTS] = lambda file: torch.save(common, file)
            if not why_not:
                contents[HF_WEIGHTS] = lambda file: hugging_face.write_weights(file, model)
        if training_state is not None:
            weights = {"model": {}} if shards else {}
            contents[STATE] = lambda file: torch.save({**common, **weights, **training_state}, file)
        files.commit(directory, contents, about, shards, _superseded(directory, shards) if training_state else ())
        files.write_atomic(directory / CARD, model_card(about, arguments).encode())

    @staticmethod
    def load_model(
        path: str | Path,
        device: str | torch.device = "cpu",
        apply_lora: bool = False,
        lora_config: dict[str, Any] | None = None,
        base: str | Path | None = None,
        mapped: bool = False,
    ) -> tuple[GPT, dict[str, Any]]:
        """The best weights of a directory of ours or of Hugging Face's, or of a nanoGPT ckpt.pt, as (model, metadata).

        metadata holds model_args, config, iter_num, best_val_loss, directory and export_meta (None for a foreign file).
        With apply_lora, the model is frozen and has a new adapter to train; `lora_config` has LoRAConfig's settings in
        any of its spellings, and `untie` where a tied layer may have one. A LoRA directory gives its base with its
        adapter; `base` says where that lies now if it was moved. Weights that are `mapped` stay in their file, in its
        dtype, until somebody looks at them. Raises ValueError for a base that is not the one the adapter was trained
        on.
        """
        if lora_config and not apply_lora:
            raise ValueError("lora_config is given, but apply_lora is not true")
        check_device(device)
        directory, name = locate(path)
        if base and not is_lora(files.read_marker(directory)):
            raise ValueError(f"{directory} holds a whole model, so it has no base ({base})")
        read = partial(_load_weights, directory, name, base, device, mapped)
        (model, checkpoint), marker = files.of_one_save(directory, read)
        if apply_lora:
            settings = dict(lora_config or {})
            untie = settings.pop("untie", False)
            lora.apply_lora(model, lora.LoRAConfig.from_dict(settings), untie=untie)
        kept = ("model_args", "config", "iter_num", "best_val_loss")
        metadata = {key: checkpoint.get(key) for key in kept}
        return model, {**metadata, "directory": directory, "export_meta": marker}

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
    def load_training_state(
        path: str | Path, device: str | torch.device = "cpu", *, in_shares: bool = False
    ) -> dict[str, Any]:
        """What `save_checkpoint` was given as training_state, with the weights as they were at that step.

        With `in_shares`, for processes that will hold a part each: tensors stay in a mapped file, and of a state that
        lies in shards there are none; `shards_of` gives these.
        """
        directory, _ = locate(path)
        return files.of_one_save(directory, lambda marker: _load_state(directory, marker, device, in_shares))[0]

    @staticmethod
    def shards_of(directory: Path, part: int = 0, parts: int = 1) -> dict[str, Any] | None:
        """The index of a training state in shards, None where it is in one file. Of its files, every `parts`-th from
        `part` on is compared with its hash. Raises ValueError for a damaged one."""
        listed = files.read_marker(directory)["files"]
        for name in sorted(filter(re.compile(A_SHARD).fullmatch, listed))[part::parts]:
            with files.open_verified(directory, name):
                pass
        if SHARDS not in listed:
            return None
        content = files.read_verified(directory, SHARDS)
        try:
            return json.loads(content)
        except ValueError as error:
            raise ValueError(f"{directory / SHARDS} is no JSON: {error}") from None

    @staticmethod
    def base_reference(base: str | Path, directory: str | Path) -> dict[str, str]:
        """What a LoRA run in `directory` remembers of the model it adapts: relative path and sha256 of its weights."""
        folder, name = locate(base)
        # The file itself may be a link into a store of nameless blobs, as in Hugging Face's cache.
        path = folder.resolve() / name
        with contextlib.suppress(ValueError):  # from another drive of Windows there is no way
            path = os.path.relpath(path, Path(directory).resolve())
        return {"path": Path(path).as_posix(), "sha256": _sha256(folder, name), "given": str(base)}

    @staticmethod
    def load_base(
        directory: str | Path, base: str | Path | None = None, device: str | torch.device = "cpu", mapped: bool = False
    ) -> tuple[GPT, dict[str, str]]:
        """The model that a LoRA directory adapts, as the run saw it, and the reference to where it was found. `mapped`:
        see `load_model`.

        `base` is where it lies now if it was moved. Raises FileNotFoundError or ValueError, with the path and the hash
        that were expected, if it is not there or is another.
        """
        directory = Path(directory)
        about = read_about(directory) or {}
        if not is_lora(about):
            raise ValueError(f"{directory} is no LoRA directory, so it has no base")
        expected, path = about["base"]["sha256"], Path(base) if base else directory / about["base"]["path"]
        try:
            found = _sha256(*locate(path))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{directory} needs its base, and there is none at {path}: {Path(about['base']['path']).name} with "
                f"sha256 {expected} ({about['base']['given']} in training); if it was moved, --base says where: "
                f"python merge_lora.py {in_shell(directory)} --base PLACE makes a model that needs none"
            ) from None
        if found != expected:
            raise ValueError(
                f"{path} is not the base of {directory}: its sha256 is {found}, and the adapter was trained on "
                f"{expected} ({about['base']['given']}), which may have been trained further since; --base says where "
                "those weights lie"
            )
        model, _ = CheckpointManager.load_model(path, device, mapped=mapped)
        reference = CheckpointManager.base_reference(path, directory)
        if reference["sha256"] != expected:
            raise ValueError(f"{path} was saved anew while it was read, and is no longer the base of {directory}")
        wanted = GPTConfig(**json.loads(files.read_verified(directory, MODEL_ARGS)))
        model = reshaped(model if mapped else model.float(), wanted.block_size, wanted.dropout)
        # The same weights with another config.json, say with another rope_theta, are another model.
        if changed := [
            f"{key}={vars(model.config)[key]}"
            for key, value in vars(wanted).items()
            if value != vars(model.config)[key]
        ]:
            raise ValueError(
                f"{path} is described by other numbers than when {directory} was trained: {', '.join(changed)}"
            )
        return model, reference if base else {**reference, "given": about["base"]["given"]}

    @staticmethod
    def is_hugging_face(path: str | Path) -> bool:
        """Whether a model directory is Hugging Face's and not ours, nor nanoGPT's."""
        return locate(path)[1] in HF_FILES

    @staticmethod
    def find_tokenizer(path: str | Path) -> Path | None:
        """The tokenizer of a model directory, for `Tokenizer.load`, or None where it has none (nanoGPT's)."""
        return find_tokenizer(locate(path)[0])

    @staticmethod
    def verify(path: str | Path, base: str | Path | None = None) -> list[str]:
        """Every problem of a model directory: damaged or missing files, unreadable weights, others in model.safetensors
        than in ckpt.pt. Empty when it is sound."""
        directory, _ = locate(path)
        before, weights = files.in_force(directory), files.find(directory, HF_WEIGHTS)
        if (marker := before[0]) is None:
            return [f"{directory} has no {files.MARKER}: it is torn, or nothing of ours"]
        try:
            read_about(directory)
        except ValueError as error:
            return [str(error)]
        problems = []
        for name in marker["files"]:
            try:
                with files.open_verified(directory, name):
                    pass
            except ValueError as error:
                problems.append(str(error))
        twice = HF_WEIGHTS in marker["files"]
        if not problems:
            try:
                model, _ = CheckpointManager.load_model(directory, "cpu" if twice else "meta", base=base)
                problems += hugging_face.weight_problems(model, weights) if twice else []
            except (ValueError, OSError) as error:  # a LoRA directory's base may be gone
                problems.append(str(error))
        if problems and files.in_force(directory) != before:
            return CheckpointManager.verify(path, base)  # a run has saved meanwhile
        return problems


def bare(model: nn.Module) -> GPT:
    """The GPT inside torch.compile's and DistributedDataParallel's wrappers, so that no saved name remembers them."""
    while not isinstance(model, GPT):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def _check_before_saving(
    directory: Path, model: GPT, metadata: dict[str, Any], training_state: dict[str, Any] | None
) -> None:
    """Raise ValueError for what `save_checkpoint` could not save, or nobody could open again."""
    names = lora.adapter_names(model)
    if bool(names) != ("base" in metadata) or len(names) > 1:
        raise ValueError(
            f"{directory}: a model with one adapter is saved with its base (CheckpointManager.base_reference), or "
            f"merged first (lora.merge_lora); one without has none, and this one has {', '.join(names) or 'none'}"
        )
    if names:
        lora.check_frozen(model)
    missing = {"config", "iter_num", "best_val_loss"} - metadata.keys()
    if missing or not math.isfinite(metadata["best_val_loss"]):
        raise ValueError(f"{directory}: metadata needs {', '.join(sorted(missing)) or 'a finite best_val_loss'}")
    check_saveable(metadata["config"], "config")
    check_saveable(training_state, "training_state")


def _sha256(directory: Path, name: str) -> str:
    """The hash of a directory's weights: the marker's, which loading compares with them, or else that of the file."""
    marker = files.read_marker(directory)
    if is_lora(marker):
        raise ValueError(merge_first(directory))
    if name in files.listed(marker):
        return marker["files"][name]["sha256"]
    digests = []
    for path in hub.weight_files(directory, name) if name in HF_FILES else [directory / name]:
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _load_weights(
    directory: Path,
    name: str,
    base: str | Path | None,
    device: str | torch.device,
    mapped: bool,
    marker: dict[str, Any] | None,
) -> tuple[GPT, dict[str, Any]]:
    """The model, and what is saved with it."""
    if is_lora(marker):
        model, said = _load_adapted(directory, marker, base, device, mapped)
        if name == STATE:
            state = _load_state(directory, marker, device)
            lora.load_lora_state_dict(model, state["model"])
            said |= {key: state[key] for key in ("iter_num", "best_val_loss")}
        return model, said
    if name in HF_FILES:
        ours = name in files.listed(marker)
        with files.open_verified(directory, name) if ours else contextlib.nullcontext():
            model = families.load_pretrained(directory, device=device, mapped=mapped, name=name)
        return model, {"model_args": model_args(model.config)}
    checkpoint = _load_state(directory, marker, device) if name == STATE else _load(directory, name, device, mapped)
    return build_model(checkpoint, directory / name), checkpoint


def _load_adapted(
    directory: Path, about: dict[str, Any], base: str | Path | None, device: str | torch.device, mapped: bool
) -> tuple[GPT, dict[str, Any]]:
    """The model of a LoRA directory, and what a ckpt.pt would say besides the weights."""
    model, _ = CheckpointManager.load_base(directory, base, device, mapped=mapped)
    names = (MODEL_ARGS, CONFIG, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    content = {name: files.read_verified(directory, name) for name in names}
    adapters.install_adapter(model, content[ADAPTER_CONFIG], content[ADAPTER_WEIGHTS], directory / ADAPTERS, untie=True)
    return model, {
        "model_args": json.loads(content[MODEL_ARGS]),
        "config": hugging_face.run_config(json.loads(content[CONFIG])),
        "iter_num": (about.get("best") or about)["iter_num"],
        "best_val_loss": about["best_val_loss"],
    }


def _superseded(directory: Path, shards: dict[str, Any] | None) -> list[str]:
    """The files of an earlier training state that a new one has no place for: it had other processes."""
    there = {path.relative_to(directory).as_posix() for path in (directory / STATE).parent.glob("shard*")}
    return sorted(there - (shards or {}).keys())


def _load_state(
    directory: Path, marker: dict[str, Any] | None, device: str | torch.device, in_shares: bool = False
) -> dict[str, Any]:
    """The training state, put together from its shards unless `in_shares`."""
    state = _load(directory, STATE, device, mapped=in_shares)
    if not in_shares and SHARDS in files.listed(marker):
        _put_together(directory, state, device)
    return state


def _put_together(directory: Path, state: dict[str, Any], device: str | torch.device) -> None:
    """The tensors of a training state from their shards."""
    from state_in_shares import put_together  # torch.distributed.checkpoint takes as long to import as half of torch

    index = CheckpointManager.shards_of(directory)
    for name, tensor in put_together(index, lambda file: files.find(directory, file)).items():
        kind, _, rest = name.partition(".")
        if kind == "model":
            state["model"][rest] = tensor.to(device)
        else:
            number, key = rest.split(".")
            state["optimizer"]["state"][int(number)][key] = tensor.to(device)


def _load(directory: Path, name: str, device: str | torch.device, mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint file: verified against the marker, or, where nothing here was written by us, as it is."""
    marker = files.read_marker(directory)
    if marker is None:
        if status(directory) == "torn":
            raise ValueError(
                f"{directory} is torn: it has files of a run but no {files.MARKER} to say whether they are whole. A "
                f"run that never saved is started again as before; a copy of {name} alone, elsewhere, can be opened"
            )
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} holds no {name}")
        with open(directory / name, "rb") as file:
            return read_checkpoint(file, directory / name, device, mapped)
    if name == STATE and name not in marker["files"]:
        raise FileNotFoundError(f"{directory} holds no {STATE}: it can be loaded and fine-tuned, but not resumed")
    with files.open_verified(directory, name) as file:
        return read_checkpoint(file, directory / name, device, mapped)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _adapter_files(model: GPT, directory: Path, reference: dict[str, str], fingerprint: str | None) -> dict[str, bytes]:
    """The active adapter for PEFT, which looks for the base where this run did."""
    # In Transformers, the layers of a GPT-2-style block are Conv1D, which store (in, out); the head is no Conv1D.
    transposed = model.config.block == "gpt2" and any(".h." in path for path in lora.adapters_of(model, None))
    base = reference["given"]  # which may be a hub id
    written = adapters.adapter_files(
        model,
        base=str(locate(base)[0] if files.expanded(base).exists() else base),
        task_type="CAUSAL_LM",
        fan_in_fan_out=transposed,
        inside=families.has_images(base_folder(directory, reference)),
        fingerprint=fingerprint,
    )
    return {f"{ADAPTERS}/{name}": data for name, data in written.items()}


if __name__ == "__main__":
    script.ready()
    sys.exit(main(ARGUMENTS))
