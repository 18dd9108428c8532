"""One vector for a text from the states of its tokens, as the folder of a sentence encoder says.

sentence-transformers (Reimers and Gurevych 2019) writes modules.json, the steps from text to vector, and a folder for
each step with a config.json of its own. The first step is the model; the others here are pooling, a dense layer (LaBSE
has one) and normalisation, which is the caller's choice.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hub import read_json
from tensor_files import stored_tensors

MODULES, SETTINGS = "modules.json", "sentence_bert_config.json"
POOLINGS = ("mean", "cls", "last")
MODES = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}  # as 1_Pooling/config.json calls them
ACTIVATIONS = {"Tanh": torch.tanh, "Identity": lambda x: x, "ReLU": F.relu, "GELU": F.gelu}


@dataclass(frozen=True)
class Dense:
    weight: Tensor  # (out, in)
    bias: Tensor | None
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = (p if p is None else p.to(x) for p in (self.weight, self.bias))
        return ACTIVATIONS[self.activation](F.linear(x, weight, bias))


@dataclass(frozen=True)
class Steps:
    pooling: str = "mean"
    dense: tuple[Dense, ...] = ()
    max_length: int | None = None  # tokens
    lower: bool = False  # texts are lower-cased first


def read_steps(folder: Path) -> Steps:
    """What a folder says, or the mean where it says nothing. Raises ValueError for steps that are not computed here."""
    if not (folder / MODULES).exists():
        return Steps()
    pooling, dense = "mean", []
    try:
        for step in json.loads((folder / MODULES).read_text(encoding="utf-8")):
            kind, path = step["type"].rsplit(".", 1)[-1], folder / step["path"]
            if kind == "Pooling":
                pooling = _pooling(read_json(path / "config.json"), path)
            elif kind == "Dense":
                dense.append(_dense(path))
            elif kind not in ("Transformer", "Normalize"):
                raise ValueError(f"{kind} is a step that is not computed here")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / MODULES}: {error}; pooling={'|'.join(POOLINGS)} goes without it") from None
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    return Steps(pooling, tuple(dense), settings.get("max_seq_length"), bool(settings.get("do_lower_case")))


def _pooling(settings: dict[str, Any], path: Path) -> str:
    asked = {key.removeprefix("pooling_mode_") for key, value in settings.items() if "pooling_mode_" in key and value}
    if word := settings.get("pooling_mode"):  # in the newest files, instead
        asked = {word, f"{word}_token", f"{word}_tokens"} & {*MODES.values()} or {word}
    found = [name for name, mode in MODES.items() if asked == {mode}]
    if not found:
        raise ValueError(f"{path.name} pools by {' and '.join(sorted(asked)) or 'nothing'}, which is not computed here")
    return found[0]


def _dense(path: Path) -> Dense:
    tensors, settings = stored_tensors(path), read_json(path / "config.json")
    activation = str(settings.get("activation_function", "Identity")).rsplit(".", 1)[-1]
    if activation not in ACTIVATIONS:
        raise ValueError(f"{path.name} has the activation {activation}, which is not computed here")
    bias = tensors["linear.bias"].read() if "linear.bias" in tensors else None
    return Dense(tensors["linear.weight"].read(), bias, activation)


def pool(states: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """States (B, T, C) to (B, C) in float32. Padding, on either side, does not count; a row of padding alone is 0."""
    mask = attention_mask.to(states.device)
    states = states.float().masked_fill(mask[..., None] == 0, 0.0)
    if pooling == "mean" or not len(states):
        return states.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    order = torch.arange(1, mask.size(1) + 1, device=mask.device)
    places = mask * (order if pooling == "last" else order.flip(0))  # the largest is the one to take
    return states[torch.arange(len(states), device=states.device), places.argmax(dim=1)]
