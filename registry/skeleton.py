"""The model in a folder without its weights: the module on the meta device, in the precision of the files.

It is built from config.json (or model_args.json); of safetensors only the headers are read, which are checked against
it where the model is one of ours. So a folder with a configuration and no weights, or with an index whose shards are
elsewhere, does too. What loading.py would load as our GPT is our GPT here; anything else is Transformers' class.
Weights in a .bin have no header, and are opened where a head must be looked for. Quantised ones count as if they were
not.
"""

import contextlib
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

import families
import files
import hub
from model import GPT, GPTConfig, on_meta
from model_directory import CONFIG, MODEL_ARGS, TOKENIZER, WEIGHTS, status
from registry import loading
from tensor_files import Stored, stored_tensors
from weights import build_model, read_checkpoint
from words import first_line


def skeleton(folder: str | Path) -> nn.Module:
    """The model in a folder, without numbers. Raises FileNotFoundError or ValueError where none can be told."""
    folder = files.expanded(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if status(folder):
        return _of_ours(folder)
    hf = hub.read_json(folder / CONFIG)
    try:
        covered = loading.is_covered(folder)
    except FileNotFoundError:  # no file to look for a head in, and all else is covered
        covered = True
    stored = headers(folder)
    if not covered:
        model = _of_transformers(folder, hf)
    elif stored:
        model = _checked(folder, hf, stored)
    else:
        model = on_meta(families.read_config(hf, folder / CONFIG))
    return model.to(_dtype(hf, stored)).eval()


def fingerprint(folder: str | Path) -> str:
    """A hash of what describes the model and of the names and sizes of its weights: it changes when the model does."""
    folder, digest = Path(folder), sha256()
    for path in sorted(folder.iterdir()):
        if path.name in (CONFIG, MODEL_ARGS, TOKENIZER):
            digest.update(path.read_bytes())
        elif path.suffix in (".safetensors", ".bin", ".pt"):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()


def tokenizer_hash(folder: str | Path) -> str | None:
    path = Path(folder) / TOKENIZER
    return sha256(path.read_bytes()).hexdigest() if path.exists() else None


def headers(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder's safetensors, unread; none where they are not all there."""
    with contextlib.suppress(FileNotFoundError):
        if all(path.suffix in (".safetensors", ".json") for path in hub.weight_files(folder)):
            return stored_tensors(folder)
    return {}


def _dtype(hf: dict[str, Any], stored: dict[str, Stored]) -> torch.dtype:
    """The precision of most tensors of the files, else what the configuration says, else float32."""
    common = Counter(t.dtype for t in stored.values() if t.dtype in families.LOADABLE).most_common(1)
    places = (hf, hf.get("text_config") or {})
    name = next((where[key] for where in places for key in ("dtype", "torch_dtype") if where.get(key)), None)
    said = getattr(torch, str(name), None)
    return common[0][0] if common else said if said in families.LOADABLE else torch.float32


def _checked(folder: Path, hf: dict[str, Any], stored: dict[str, Stored]) -> GPT:
    """A GPT whose tensors have the names and shapes of a file's. Raises ValueError for a file that is another model's.

    It is loaded like any other, from tensors that are one zero each, stretched to their shape.
    """
    config = families.read_config(hf, folder / CONFIG)

    def emptied(tensor: Stored) -> Stored:
        zero = torch.zeros((), dtype=tensor.dtype or torch.int8)
        return replace(tensor, read=lambda: zero.expand(tensor.shape))

    tensors = {name: emptied(tensor) for name, tensor in stored.items()}
    return families.load_state(config, families.family_of(hf, folder)[0], tensors, folder, device="meta")


def _of_ours(folder: Path) -> GPT:
    path = folder / MODEL_ARGS
    if not files.exists(path):  # nanoGPT's ckpt.pt alone
        with open(folder / WEIGHTS, "rb") as file:
            return build_model(read_checkpoint(file, folder / WEIGHTS, "meta"), folder / WEIGHTS).eval()
    try:
        model = on_meta(GPTConfig(**hub.read_json(path)))
    except TypeError as error:
        raise ValueError(f"{path} describes a model this version does not know: {error}") from None
    hf = hub.read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    return model.to(_dtype(hf, headers(folder))).eval()


def _of_transformers(folder: Path, hf: dict[str, Any]) -> nn.Module:
    transformers = loading.import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        named = next((getattr(transformers, name, None) for name in hf.get("architectures") or ()), None)
        with torch.device("meta"):
            if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
                return named(config)
            return transformers.AutoModel.from_config(config)
    except Exception as error:  # the library has many, of its own and of others
        reason = first_line(error)
        raise ValueError(f"{folder} describes no model that Transformers or our GPT can build: {reason}") from error
