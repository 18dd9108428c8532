"""The files that say what a tokenizer is: tokenizer.json, or what GPT-2 has in its place, and what lies beside."""

import json
import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

import files
from hub import read_json
from model_directory import CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG

VOCABULARY, MERGES = "vocab.json", "merges.txt"
EOT = "<|endoftext|>"
GPT2 = {"gpt2", "GPT2Tokenizer", "GPT2TokenizerFast"}
# Its special tokens where nothing says otherwise, in the order in which they are added.
SPECIAL = dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT)
SPECIAL |= dict.fromkeys(("sep_token", "pad_token", "cls_token", "mask_token"))
ENDS = ("bos_token", "eos_token")  # which tokenizer_config.json may ask for around every text
OF_BATCHES = ("pad_token", "padding_side", "chat_template")  # what is said beside a tokenizer.json and changes no ids


def find_tokenizer(folder: Path) -> Path | None:
    """What `Tokenizer.load` reads in a folder: tokenizer.json, else the vocab.json beside a merges.txt, else None."""
    if files.exists(folder / TOKENIZER):
        return folder / TOKENIZER
    return folder / VOCABULARY if all((folder / name).exists() for name in (VOCABULARY, MERGES)) else None


def no_tokenizer(folder: Path) -> str:
    """What to say where `find_tokenizer` finds none, with the remedy if there is SentencePiece's tokenizer.model."""
    others = sorted(path.name for path in folder.glob("*.model"))
    return f"{folder} has no {TOKENIZER}" + (f", only {others[0]}: {_conversion(folder)}" if others else "")


def _conversion(folder: Path) -> str:
    code = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    return f'python -c "from transformers import AutoTokenizer; {code}" writes a {TOKENIZER} there'


def from_merges(path: Path) -> dict[str, Any]:
    """The tokenizer.json that Transformers makes of a GPT-2's vocab.json and the merges.txt beside it, with all that
    the other files there say as `about`. ValueError for other models', which cut text in another way."""
    settings, config = _beside(path, TOKENIZER_CONFIG), _beside(path, CONFIG)
    said = {settings.get("tokenizer_class"), config.get("tokenizer_class"), config.get("model_type")} - {None}
    if not said or said - GPT2:
        whose = ", ".join(sorted(said - GPT2)) or "a model that nothing beside it names"
        raise ValueError(f"{path} is for {whose}, and is read only for gpt2; {_conversion(path.parent)}")
    try:
        return _as_gpt2s(path, settings)
    except Exception as error:  # the library has one exception for everything
        raise ValueError(f"{path} and the files beside it make no tokenizer: {error}") from None


def _as_gpt2s(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    stored = settings.get("added_tokens_decoder")
    if stored is None:  # as before 2023
        settings |= _beside(path, "special_tokens_map.json")
    given = {key: token for key, token in settings.items() if key.endswith("_token") and not isinstance(token, bool)}
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    given, more = (given | more, []) if isinstance(more, dict) else (given, more)
    named = {key: _special(token) for key, token in (SPECIAL | given).items()}
    special = {token.content: token for token in [*named.values(), *map(_special, more)] if token}
    if stored is None:
        added = _beside(path, "added_tokens.json").items()
        stored = {i: {"content": content, "normalized": content not in special} for content, i in added}
    tokens = [AddedToken(**fields) for _, fields in sorted(stored.items(), key=lambda item: int(item[0]))]
    for token in tokens:
        token.special = token.special or token.content in special
    known = {token.content for token in tokens}
    merges = str(path.with_name(MERGES))
    made = tokenizers.Tokenizer(
        models.BPE.from_file(str(path), merges, continuing_subword_prefix="", end_of_word_suffix="")
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space", False))
    made.decoder = decoders.ByteLevel()
    made.add_tokens(tokens + [token for content, token in special.items() if content not in known])
    begin, end = (named[key].content if settings.get(f"add_{key}") and named[key] else "" for key in ENDS)
    single, second = ([f"{part}:{n}" for part in (begin, text, end) if part] for n, text in enumerate(("$A", "$B")))
    made.post_processor = processors.TemplateProcessing(
        single=single,
        pair=single + second,
        special_tokens=[(token, made.token_to_id(token)) for token in (begin, end) if token],
    )
    content = json.loads(made.to_str())
    said = {key: token.content for key, token in named.items() if token}
    content["model"]["about"] = about(path, made.get_vocab()) | said
    return content


def _special(token: str | dict[str, Any] | None) -> AddedToken | None:
    fields = {"content": token} if isinstance(token, str) else token or {}
    fields = {key: value for key, value in fields.items() if key != "__type"} | {"special": True}
    return AddedToken(**fields) if token else None


def about(path: Path, vocabulary: dict[str, int]) -> dict[str, Any]:
    """What the files beside a tokenizer.json say: OF_BATCHES, eos_token and the like, stops (ids)."""
    names = {i: token for token, i in vocabulary.items()}
    settings = _beside(path, TOKENIZER_CONFIG)
    found = {key: _content(settings.get(key)) for key in ("bos_token", "eos_token", "unk_token")}
    ends = [_beside(path, name).get("eos_token_id") for name in (GENERATION_CONFIG, CONFIG)]
    ids = next((end if isinstance(end, list) else [end] for end in ends if end is not None), [])
    found["stops"] = [i for i in ids if i in names]
    found["eos_token"] = found["eos_token"] or next((names[i] for i in found["stops"]), None)
    return {key: value for key, value in found.items() if value} | of_batches(path)


def of_batches(path: Path) -> dict[str, Any]:
    """OF_BATCHES, as far as the files beside a tokenizer.json say them."""
    settings, template = _beside(path, TOKENIZER_CONFIG), path.with_name("chat_template.jinja")
    # Where nothing is said, Transformers' own classes for Gemma and Llama put padding on the left.
    on_the_left = re.match("Gemma|Llama", settings.get("tokenizer_class") or "")
    side = settings.get("padding_side") or ("left" if on_the_left else None)
    # Since 2025 the template is a file of its own.
    chat = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    said = zip(OF_BATCHES, (_content(settings.get("pad_token")), side, chat), strict=True)
    return {key: value for key, value in said if value}


def _content(token: str | dict[str, Any] | None) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _beside(path: Path, name: str) -> dict[str, Any]:
    """A JSON file beside another; {} where there is none."""
    return read_json(path.with_name(name)) if path.with_name(name).is_file() else {}
