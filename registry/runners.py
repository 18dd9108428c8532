"""Models run on text: tokens in, logits, hidden states and attentions out, alike for every architecture.

    with load_model("xlmr", device="auto") as runner:
        outputs = runner.forward(runner.tokenize(["He deposited the check at the bank."]))
        outputs.encoder_hidden_states[0]  # (B, T, C); the embeddings are at 0, a layer's output at each next index
        runner.embed(["one vector", "for each text"])  # (2, C), normalised

Tensor sizes: B texts, T tokens, C width, V vocabulary, H heads, L layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import GPT
from model_directory import CONFIG
from registry import loading
from registry.base_runner import BaseModelRunner, ModelOutputs
from registry.catalogue import find_spec
from registry.loading import DECODER, ENCODER, SEQ2SEQ
from registry.resolve import find_model


class Order:
    """Moves the padding of a batch to the right, and what the model makes of it back. There each model counts positions
    as it was trained to, and causal ones that know no mask are right too: no token sees what is to its right."""

    def __init__(self, padding: Tensor):
        """True where `padding` (B, T) is."""
        order = padding.int().argsort(dim=1, stable=True)
        self.there = order if (order.diff(dim=1) < 0).any() else None  # None: it is on the right
        self.back = None if self.there is None else order.argsort(dim=1)

    def apply(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: x if self.there is None else x.gather(1, self.there) for key, x in batch.items()}

    def undo(self, x: Tensor) -> Tensor:
        """States or logits (B, T, .), or attentions (B, H, T, T)."""
        if self.back is None or x.dim() < 3:  # (B, .): of whole texts
            return x
        if x.dim() == 3:
            return x.take_along_dim(self.back[:, :, None], 1)
        x = x.take_along_dim(self.back[:, None, :, None], 2)
        return self.undo_keys(x) if x.size(3) == x.size(2) else x  # those of a window are counted from the query

    def undo_keys(self, x: Tensor) -> Tensor:
        """Attentions (B, H, U, T) of other queries."""
        return x if self.back is None else x.take_along_dim(self.back[:, None, None, :], 3)

    def undo_all(self, outputs: ModelOutputs) -> ModelOutputs:
        ids, mask = outputs.input_ids, outputs.attention_mask  # as they were given
        return replace(outputs.map(self.undo), input_ids=ids, attention_mask=mask)


class EncoderModelRunner(BaseModelRunner):
    """BERT and its relatives. extra: pooler_output where the checkpoint has a pooler and no head; attentions.

    Padding may be on either side, on the left as the tokenizer's own pad token; another token that is masked is one of
    the text and keeps its position.
    """

    arch = ENCODER

    def _run(self, batch: dict[str, Tensor], layers: Sequence[int] | None, logits: bool) -> ModelOutputs:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        order = Order((mask.cumsum(dim=1) == 0) & (ids == self.tokenizer.pad_token_id))
        found = self._call(order.apply(batch))
        extra = self._captured(attentions=getattr(found, "attentions", None))
        pooled = getattr(found, "pooler_output", None)
        outputs = ModelOutputs(
            ids,
            mask,
            getattr(found, "logits", None) if logits else None,
            self._kept(found.hidden_states, layers, ids.size(1)),
            None,
            extra | ({} if pooled is None else {"pooler_output": pooled}),
        )
        return order.undo_all(outputs)


class DecoderModelRunner(BaseModelRunner):
    """Causal language models: our GPT where it computes them, else Transformers'. extra: attentions.

    Padding, on either side, is not seen and has no position, whatever the model.
    """

    arch = DECODER

    def _run(self, batch: dict[str, Tensor], layers: Sequence[int] | None, logits: bool) -> ModelOutputs:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        ours = isinstance(self.model, GPT)
        order = Order((mask == 0) & (not ours))
        if ours:
            states: list[Tensor] = []
            weights: list[Tensor] | None = [] if self.capture_attentions else None
            self.model(ids, attention_mask=None if mask.all() else mask, hidden_states=states, attentions=weights)
            # forward projects the last position only, or computes a loss too, which would need the memory twice.
            found = self.model.project(states[-1]) if logits else None
        else:
            few = {"logits_to_keep": 1} if not logits and self._accepts("logits_to_keep") else {}
            outputs = self._call({**order.apply(batch), **few, "use_cache": False})
            states, weights = outputs.hidden_states, getattr(outputs, "attentions", None)
            found = getattr(outputs, "logits", None) if logits else None
        states, extra = self._kept(states, layers, ids.size(1)), self._captured(attentions=weights)
        return order.undo_all(ModelOutputs(ids, mask, found, None, states, extra))


class Seq2SeqModelRunner(BaseModelRunner):
    """Encoder-decoder models. Logits and the decoder's states are (B, U, .) for U decoder tokens.

    The decoder reads decoder_input_ids if the batch has them, else labels (or targets) shifted right as for the model's
    loss, else the start token alone: nothing is generated unasked. tokenize(texts, text_target=texts) makes labels.
    The encoder's padding may be on either side; the decoder reads from the left.
    extra: decoder_input_ids, and encoder_attentions, decoder_attentions and cross_attentions.
    """

    arch = SEQ2SEQ
    takes = (*BaseModelRunner.takes, "decoder_input_ids", "decoder_attention_mask", "labels", "targets")

    def _run(self, batch: dict[str, Tensor], layers: Sequence[int] | None, logits: bool) -> ModelOutputs:
        decoder = {"decoder_input_ids": self._decoder_input_ids(batch)}
        if "decoder_attention_mask" in batch:
            decoder["decoder_attention_mask"] = batch["decoder_attention_mask"]
        ids, mask = batch["input_ids"], batch["attention_mask"]
        order = Order((mask.cumsum(dim=1) == 0) & (ids == self.tokenizer.pad_token_id))
        encoder = order.apply({key: batch[key] for key in BaseModelRunner.takes if key in batch})
        found = self._call({**encoder, **decoder, "use_cache": False})
        names = ("encoder_attentions", "decoder_attentions", "cross_attentions")
        extra = decoder | self._captured(**{name: getattr(found, name, None) for name in names})
        moves = {"encoder_attentions": order.undo, "cross_attentions": order.undo_keys}
        extra |= {name: tuple(map(move, extra[name])) for name, move in moves.items() if name in extra}
        states = self._kept(found.encoder_hidden_states, layers, ids.size(1))
        return ModelOutputs(
            ids,
            mask,
            getattr(found, "logits", None) if logits else None,
            tuple(map(order.undo, states)),
            self._kept(found.decoder_hidden_states, layers, decoder["decoder_input_ids"].size(1)),
            extra,
        )

    def _decoder_input_ids(self, batch: Mapping[str, Tensor]) -> Tensor:
        given = [key for key in ("decoder_input_ids", "labels", "targets") if key in batch]
        if len(given) > 1:
            raise ValueError(f"a batch has one of {', '.join(given)}: each says what the decoder reads")
        if given == ["decoder_input_ids"]:
            return batch["decoder_input_ids"]
        shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)  # mBART starts from the last label
        if given and shift and batch[given[0]].numel():
            labels = batch[given[0]].cpu()  # on a GPU an index out of range would end the process
            try:
                return shift(labels.masked_fill(labels < 0, -100)).to(self.device)  # a copy: FSMT's changes it
            except RuntimeError:
                name = type(self.model).__name__
                raise ValueError(f"{name} starts from a text's last label, and one of {len(labels)} has none") from None
            except (AssertionError, AttributeError, TypeError, ValueError):
                pass  # config.json names no start or no padding
        config, rows = self.model.config, len(batch["input_ids"])
        ids = (getattr(config, key, None) for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
        start = next((i for i in ids if i is not None), None)
        if start is None:
            raise ValueError(
                f"{self.folder / CONFIG} names no token that a decoder starts from; give decoder_input_ids"
            )
        column = torch.full((rows, 1), start, device=self.device)
        if not given:
            return column
        labels = batch[given[0]]
        filled = labels.masked_fill(labels < 0, self.tokenizer.pad_token_id)  # -100: no loss there
        return torch.cat([column, filled[:, :-1]], dim=1)


RUNNERS = {runner.arch: runner for runner in (EncoderModelRunner, DecoderModelRunner, Seq2SeqModelRunner)}


def load_model(
    key_or_path: str | Path,
    device: str | int | torch.device | None = "cpu",
    *,
    dtype: str | torch.dtype | None = None,
    capture_attentions: bool = False,
    quantization: str | None = None,
    tokenizer_kwargs: Mapping[str, Any] | None = None,
    local_files_only: bool = True,
    revision: str | None = None,
    local_path: str | Path | None = None,
    trust_remote_code: bool = False,
    load_config: Mapping[str, Any] | None = None,
) -> BaseModelRunner:
    """The runner for a name of the catalogue, a name in models/, a folder, or a hub id; resolve.py finds it.

    dtype: as `resolve_dtype` has it; None: the recipe's, but float32 for float16 on a CPU, where that is slow, and for
    T5 a type that does not overflow. quantization: "8bit" or "4bit", through bitsandbytes; None: the recipe's; "none".
    tokenizer_kwargs: for making the tokenizer or, where they are options of its call, for every `tokenize`.
    Raises FileNotFoundError, with every place looked at, where the model is not found; ValueError, as `loading.load`.
    """
    spec = find_spec(str(key_or_path))
    folder = find_model(key_or_path, local_path=local_path, revision=revision, local_files_only=local_files_only).path
    runner = RUNNERS[loading.read_arch(folder, spec and spec.arch)]
    return runner(
        folder,
        spec,
        device=device,
        dtype=dtype,
        capture_attentions=capture_attentions,
        quantization=quantization,
        tokenizer_kwargs=tokenizer_kwargs,
        trust_remote_code=trust_remote_code,
        load_config=load_config,
    )
