"""A tokenizer.json run without Transformers, so that a model of our GPT needs no more packages than training one does.

It has as much of the interface of Transformers' tokenizers as a runner uses, with the same names and the same ids.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch

from hub import read_json
from model_directory import TOKENIZER, TOKENIZER_CONFIG

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
SETTINGS = (*SPECIAL, "model_max_length", "padding_side", "truncation_side")


class Batch(dict):
    """Tensors by name, and the words that the tokens came from."""

    encodings: Sequence[tokenizers.Encoding] = ()

    def word_ids(self, row: int = 0) -> list[int | None]:
        return self.encodings[row].word_ids


class PlainTokenizer:
    """The tokenizer of a folder. `options` come before its tokenizer_config.json; ValueError for an unknown one."""

    def __init__(self, folder: Path, **options: Any):
        if unknown := sorted(options.keys() - set(SETTINGS)):
            raise ValueError(f"tokenizer_kwargs: {', '.join(unknown)} needs the package transformers")
        stored = read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).exists() else {}
        try:
            self._library = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as error:  # the library has one exception for everything
            raise ValueError(f"{folder / TOKENIZER} does not open without the package transformers: {error}") from None
        self._library.no_padding()
        settings = {**stored, **options}
        named = {name: settings.get(name) for name in SPECIAL}
        named = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
        # One that the vocabulary lacks has no id, and nothing could be filled up with it.
        known = [x if x and self._library.token_to_id(x) is not None else None for x in named.values()]
        self.bos_token, self.eos_token, self.unk_token, self.pad_token = known
        self.model_max_length = settings.get("model_max_length") or int(1e30)
        self.padding_side = settings.get("padding_side") or "right"
        self.truncation_side = settings.get("truncation_side") or "right"

    @property
    def pad_token_id(self) -> int | None:
        return None if self.pad_token is None else self._library.token_to_id(self.pad_token)

    def convert_ids_to_tokens(self, i: int) -> str | None:
        return self._library.id_to_token(i)

    def __call__(
        self,
        texts: Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_offsets_mapping: bool = False,
        return_special_tokens_mask: bool = False,
    ) -> Batch:
        if truncation and max_length:
            self._library.enable_truncation(max_length, direction=self.truncation_side)
        else:
            self._library.no_truncation()
        encodings = self._library.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        length = max_length if padding == "max_length" else max(len(encoding) for encoding in encodings)
        if padding and self.pad_token_id is None:
            raise ValueError("padding needs a padding token, and the vocabulary has none of that name")
        if padding and length:
            for encoding in encodings:
                side = padding_side or self.padding_side
                encoding.pad(length, direction=side, pad_id=self.pad_token_id, pad_token=self.pad_token)
        values = {"input_ids": "ids", "attention_mask": "attention_mask"}
        values |= {"offset_mapping": "offsets"} if return_offsets_mapping else {}
        values |= {"special_tokens_mask": "special_tokens_mask"} if return_special_tokens_mask else {}
        batch = Batch({key: [getattr(encoding, name) for encoding in encodings] for key, name in values.items()})
        if return_tensors == "pt":
            try:
                batch.update({key: torch.tensor(rows) for key, rows in batch.items()})
            except ValueError:
                raise ValueError("texts of different lengths make no tensor without padding") from None
        batch.encodings = encodings
        return batch
