"""From what lies in a checkpoint file to a GPT, and from a GPT to what describes it. Nothing in a file is trusted."""

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from model import GPT, GPTConfig, on_meta
from words import first_few, first_line, misfits


def read_checkpoint(file: BinaryIO, path: Path, device: str | torch.device, mapped: bool = False) -> dict[str, Any]:
    """The content of an open checkpoint file, ours or nanoGPT's; `path` is for messages. `mapped`: what is not looked
    at is not read. Raises ValueError for anything that is more than tensors and builtins, or no GPT's."""
    try:
        checkpoint = torch.load(file.name if mapped else file, map_location=device, weights_only=True, mmap=mapped)
    except Exception as error:  # torch has no common base for what a broken or hostile file raises
        reason = (
            "it would run code when opened, or is no checkpoint"
            if "weights_only" in str(error).lower()
            else "it is cut short or no checkpoint"
        )
        raise ValueError(f"{path} is refused: {reason} ({first_line(error)[:120]})") from None
    if (
        not isinstance(checkpoint, dict)
        or not isinstance(checkpoint.get("model"), dict)
        or not isinstance(checkpoint.get("model_args"), dict)
    ):
        raise ValueError(f"{path} is no GPT checkpoint: it needs the keys model and model_args")
    return checkpoint


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
    if strange := [
        key for key, tensor in state.items() if not (tensor.is_floating_point() and tensor.layout == torch.strided)
    ]:
        raise ValueError(f"{source} does not hold a model's weights: {strange[0]} is {state[strange[0]].type()}")
    try:
        model = on_meta(GPTConfig(**arguments))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} has model_args that are no numbers of a model: {error}") from None
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        _complete_tied(state, source, "transformer.wte" if model.config.block == "gpt2" else "model.embed_tokens")
    if problems := misfits(*({key: tensor.shape for key, tensor in of.items()} for of in (state, expected))):
        raise ValueError(f"{source} does not hold the model its model_args describe: {first_few(sorted(problems))}")
    model.load_state_dict(state, assign=True)
    model.tie_head()
    return model


def check_saveable(value: Any, where: str) -> None:
    """Raises ValueError for what torch.save would write and torch.load(weights_only=True) then refuse."""
    if isinstance(value, dict):
        for key, part in value.items():
            check_saveable(key, f"a key of {where}")
            check_saveable(part, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            check_saveable(part, f"{where}[{i}]")
    elif not isinstance(value, Tensor) and type(value) not in (str, int, float, bool, bytes, type(None)):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise ValueError(f"{where} is a {kind}, and a checkpoint holds tensors and Python's own values only")


def _plain_name(key: str) -> str:
    return key.replace("_orig_mod.", "").removeprefix("module.")


def _complete_tied(state: dict[str, Tensor], source: Path, tokens: str) -> None:
    """Give the head the token embedding's tensor where a file holds it once. Raises ValueError for two that differ."""
    wte, head = state.get(f"{tokens}.weight"), state.get("lm_head.weight")
    if wte is None:
        return  # which is a problem of its own
    if head is None:
        state["lm_head.weight"] = wte
    elif wte.device.type != "meta" and wte.shape == head.shape and not torch.equal(wte, head):
        raise ValueError(f"{source} says that lm_head shares the token embedding, but its two tensors differ")


def model_args(config: GPTConfig) -> dict[str, Any]:
    """nanoGPT's seven keys, and any other field only where it differs from its default: nanoGPT refuses keys it does
    not know, so a model it can run must not carry them."""
    first_seven = [f.name for f in fields(GPTConfig)][:7]
    defaults = GPTConfig()
    values = asdict(config)
    return {k: v for k, v in values.items() if k in first_seven or v != getattr(defaults, k)}
