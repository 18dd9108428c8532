"""What makes a model directory one that Transformers opens with no flags; families.py knows what it calls things there.

    config.json              the run's settings, flat, and the model as Transformers describes it
    generation_config.json   where to stop, and which ids no token has
    tokenizer_config.json    beside tokenizer.json, which is in that format as it is
    model.safetensors        the weights

Two readers share config.json. Where both have a key (n_layer, vocab_size, ...), its value is the model's, whatever a
run asked for. One key they mean differently: `dtype` is the weights' there, and that of matrix products is the run's
`dtype` everywhere else, so here it is `compute_dtype`. `run_keys` names those that the run has set.
"""

import json
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch

import families
from model import GPT, GPTConfig
from model_directory import CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG, WEIGHTS
from tensor_files import write_tensors
from tokenizer import EOT
from words import first_few

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
RENAMED = {"dtype": "compute_dtype"}  # the run's setting: its name in config.json


def configurations(
    config: GPTConfig, dtype: torch.dtype, run: dict[str, Any], tokenizer: bytes | None = None
) -> tuple[dict[str, dict[str, Any]], str]:
    """What to write by file, for a model with weights of `dtype` made by a run with the settings `run`, and why not all
    of it: "", or what no family of Transformers computes. `tokenizer` is the content of tokenizer.json."""
    try:
        described = families.hf_config(config)
    except ValueError as error:
        return {CONFIG: config_json({}, run)}, str(error)
    vocabulary = json.loads(tokenizer) if tokenizer else None
    # The ids are said even where there are none: every family has its own defaults, and one outside the vocabulary
    # fails, while one inside would never be trained.
    described |= special_ids(config, vocabulary) if vocabulary else dict.fromkeys(IDS)
    written = {CONFIG: config_json({**described, "dtype": str(dtype).removeprefix("torch.")}, run)}
    if vocabulary:
        written[GENERATION_CONFIG] = generation_config(config, vocabulary)
        written[TOKENIZER_CONFIG] = tokenizer_config(config, vocabulary)
    return written, ""


def config_json(described: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """config.json for both of its readers."""
    ours = {RENAMED.get(key, key): value for key, value in run.items()}
    return {**ours, **described, families.RUN_KEYS: list(ours)}


def run_config(content: dict[str, Any]) -> dict[str, Any]:
    """The run's settings from a config.json, also from one written before it was Hugging Face's too."""
    names = {name: key for key, name in RENAMED.items()}
    return {names.get(key, key): content[key] for key in content.get(families.RUN_KEYS, content)}


def generation_config(config: GPTConfig, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json: `generate` ends at the end of text, and draws no id that is none of the tokenizer's."""
    ids = special_ids(config, tokenizer)
    ends = ids["eos_token_id"]
    # Rows that have ended are filled with the end of text, without a word about that to the user.
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    known = set(_vocabulary(tokenizer).values())
    idle = [i for i in range(config.vocab_size) if i not in known]
    return ids | ({"suppress_tokens": idle} if idle else {})


def tokenizer_config(config: GPTConfig, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json, with the special tokens, and the template of a chat and the side of the padding where
    another model's has them."""
    about = tokenizer["model"].get("about", {})
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # tokenizer.json as it is; the name before and after version 5
        **special_tokens(tokenizer),
        **{key: about[key] for key in ("chat_template", "padding_side") if key in about},
        "model_max_length": config.block_size,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }


def special_tokens(tokenizer: dict[str, Any]) -> dict[str, str]:
    """{"eos_token": ...} and the like, of a tokenizer.json as tokenizer.py writes it.

    Ours has GPT-2's: one that begins, ends and stands for what is unknown. None pads, unless another model's files say
    so: fine-tuning tools leave padding out of the loss, and would never teach the model to end.
    """
    about = tokenizer["model"].get("about", {})
    if "eot" in tokenizer["model"]:
        about = {"eos_token": tokenizer["model"]["eot"], **about}
    elif any(token["content"] == EOT for token in tokenizer["added_tokens"]):
        about = dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT) | about
    return {key: value for key, value in about.items() if key.endswith("_token")}


def special_ids(config: GPTConfig, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The ids of IDS, None where there is no such token or the model has no row for it; a list for several ends."""
    ids, tokens = _vocabulary(tokenizer), special_tokens(tokenizer)
    found = {key: ids.get(tokens.get(key.removesuffix("_id"))) for key in IDS}
    found = {key: i if i is not None and i < config.vocab_size else None for key, i in found.items()}
    stops = tokenizer["model"].get("about", {}).get("stops", [])
    ends = dict.fromkeys(i for i in (found["eos_token_id"], *stops) if i is not None and i < config.vocab_size)
    return found | ({"eos_token_id": list(ends)} if len(ends) > 1 else {})


def _vocabulary(tokenizer: dict[str, Any]) -> dict[str, int]:
    own = tokenizer["model"]["vocab"]
    own = {token: i for i, (token, _) in enumerate(own)} if isinstance(own, list) else own  # a Unigram's, with scores
    return {**own, **{token["content"]: token["id"] for token in tokenizer["added_tokens"]}}


def write_weights(file: BinaryIO, model: GPT) -> None:
    """model.safetensors to an open file."""
    write_tensors(file, families.hf_state(model), {"format": "pt"})


def weight_problems(model: GPT, path: Path) -> list[str]:
    """How the weights in a model.safetensors are not those of `model`."""
    expected = families.hf_state(model)
    try:
        with safetensors.safe_open(path, "pt") as found:
            names = set(found.keys())
            problems = [f"{name} is missing" for name in sorted(expected.keys() - names)]
            problems += [f"{name} is unexpected" for name in sorted(names - expected.keys())]
            for name in sorted(names & expected.keys()):
                ours, theirs = expected[name], found.get_tensor(name)
                if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
                    problems.append(f"{name} has other values")
    except safetensors.SafetensorError as error:
        problems = [f"it is no safetensors file ({error})"]
    return [f"{path} holds another model than {WEIGHTS}: {first_few(problems, 3)}"] if problems else []
