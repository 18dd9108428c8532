"""A model of Hugging Face's: where its files lie, here, in the cache or on the hub, and what they are called.

Needs no torch; tensor_files.py reads and writes what is in them.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import files
from model_directory import HF_FILES

HUB_ID = r"[\w-][\w.-]*(/[\w.-]+)?"  # NAME or OWNER/NAME
# What is downloaded of a model: no weights in another format twice. A folder with a number is sentence-transformers'.
WANTED = ["*.json", "model*.safetensors", "tokenizer*", "*.txt", "*.model", "*.jinja", "[0-9]_*/*"]


def find(path_or_hub_id: str | Path, *, revision: str | None = None, local_files_only: bool = True) -> Path:
    """The folder of a model: the path itself, or that of a hub id in Hugging Face's cache.

    With local_files_only=False what is missing there is downloaded. Raises FileNotFoundError, which says so.
    """
    folder = files.expanded(path_or_hub_id)
    if folder.is_dir():
        return folder
    if not re.fullmatch(HUB_ID, str(path_or_hub_id)):
        raise FileNotFoundError(f"there is no folder {folder}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"there is no folder {folder}; hub ids need the package huggingface_hub") from None
    fetch = partial(snapshot_download, str(path_or_hub_id), revision=revision, local_files_only=local_files_only)
    try:
        folder = Path(fetch(allow_patterns=WANTED))
        if not any((folder / name).exists() for name in HF_FILES):
            fetch(allow_patterns=["pytorch_model*.bin"])
    except (OSError, ValueError) as error:
        how = "; local_files_only=False would download it" if local_files_only else f": {error}"
        raise FileNotFoundError(f"{path_or_hub_id} is no folder, nor in Hugging Face's cache{how}") from None
    return folder


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(files.read(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} has no {path.name}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object")
    return content


def weight_files(folder: Path, name: str | None = None) -> list[Path]:
    """The files that hold a model's tensors: one, or an index and the shards that it names. Safetensors come first,
    where none of HF_FILES is named."""
    name = name or next((name for name in HF_FILES if (folder / name).exists()), None)
    if name is None:
        raise FileNotFoundError(f"{folder} has none of {', '.join(HF_FILES)}")
    if not name.endswith(".index.json"):
        return [folder / name]
    shards = read_json(folder / name).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(
            f"{folder / name} is no index of weights: its weight_map does not name the file of each tensor"
        )
    shards = sorted(set(shards.values()))
    bad = [shard for shard in shards if Path(shard).name != shard or not (folder / shard).exists()]
    if bad or not shards:
        raise FileNotFoundError(f"{folder / name} names files that are not there: {', '.join(bad) or 'none at all'}")
    return [folder / name, *(folder / shard for shard in shards)]
