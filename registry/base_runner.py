"""What all runners do: a model with its tokenizer, batches, hidden states, embeddings. runners.py has one for each
architecture."""

import gc
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hub import read_json
from model import GPT
from model_directory import CONFIG
from registry import loading, sentences
from registry.catalogue import ModelSpec
from registry.loading import SEQ2SEQ

States = tuple[Tensor, ...]
# What a tokenizer may add for people; no model takes it.
NOT_FOR_THE_MODEL = {"offset_mapping", "special_tokens_mask", "overflow_to_sample_mapping", "length"}
NARROW = ("t5", "mt5", "umt5")  # trained in bfloat16: their activations are beyond what float16 holds


@dataclass(frozen=True)
class ModelOutputs:
    """What a batch of texts gave. Stacks of hidden states hold the embeddings, then every layer's output: L + 1.

    `extra` may hold attentions, each a tuple of L tensors (B, H, T, T), under the names attentions or, for seq2seq,
    encoder_attentions, decoder_attentions and cross_attentions; pooler_output (B, C); and decoder_input_ids.
    """

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T), 0 for padding
    logits: Tensor | None  # (B, T, V), or as the checkpoint's own head has them; None where it has no head
    encoder_hidden_states: States | None  # each (B, T, C); None for a model without an encoder
    decoder_hidden_states: States | None
    extra: dict[str, Any] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> "ModelOutputs":
        """The same with every tensor changed."""

        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            return tuple(map(changed, value)) if isinstance(value, tuple) else value

        extra = {key: changed(value) for key, value in self.extra.items()}
        return ModelOutputs(**{name: changed(value) for name, value in vars(self).items()} | {"extra": extra})


class BaseModelRunner(ABC):
    """A model with its tokenizer, from a folder. Subclasses say how their architecture is run.

    The arguments are those of `load_model`; `spec` has the defaults of dtype, quantization and tokenizer_kwargs.
    `notes` says what was decided for the model. Raises ValueError for a folder, or a spec, of another architecture.
    """

    arch: str
    takes = ("input_ids", "attention_mask", "token_type_ids")  # keys of a batch

    def __init__(
        self,
        folder: str | Path,
        spec: ModelSpec | None = None,
        *,
        device: str | int | torch.device | None = "cpu",
        dtype: str | torch.dtype | None = None,
        capture_attentions: bool = False,
        quantization: str | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        load_config: Mapping[str, Any] | None = None,
    ):
        if spec is not None and spec.arch not in (None, self.arch):
            raise ValueError(f"{type(self).__name__} runs models that are {self.arch}, and {spec.name} is {spec.arch}")
        self.folder, self.spec, self.capture_attentions = Path(folder), spec, capture_attentions
        self.device, self.notes = loading.coerce_device(device), []
        loading.read_arch(self.folder, self.arch)
        given = {**((spec and spec.tokenizer_kwargs) or {}), **(tokenizer_kwargs or {})}
        self._call_options = {key: given.pop(key) for key in loading.call_options() & given.keys()}
        self.tokenizer = loading.load_tokenizer(self.folder, trust_remote_code=trust_remote_code, **given)
        if quantization is None and spec is not None and spec.use_bitsandbytes:
            quantization = "8bit"
        self._model: nn.Module | None = loading.load(
            self.folder,
            arch=self.arch,
            dtype=self._pick_dtype(dtype),
            device=self.device,
            quantization=None if quantization == "none" else quantization,
            attentions=capture_attentions,
            trust_remote_code=trust_remote_code,
            load_config=load_config,
        )
        if not isinstance(self._model, GPT):
            self._model.config.output_hidden_states = True
        self.limit = self._longest()
        self._pad_somehow()

    # ---- what is decided for a model

    def _pick_dtype(self, dtype: str | torch.dtype | None) -> torch.dtype | None:
        """That asked for, else the recipe's unless the numbers would suffer, else the checkpoint's."""
        asked, preferred = loading.resolve_dtype(dtype), loading.resolve_dtype(self.spec and self.spec.dtype)
        if dtype is not None or preferred != torch.float16:
            return asked if dtype is not None else preferred
        cuda = self.device.type == "cuda"
        narrow = self.arch == SEQ2SEQ and read_json(self.folder / CONFIG).get("model_type") in NARROW
        if cuda and not narrow:
            return preferred
        chosen = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32
        reason = "its activations overflow in float16" if narrow else f"float16 is slow and coarse on {self.device}"
        self.notes.append(f"{self.folder.name} is in {chosen} where its recipe says float16: {reason}")
        if narrow:
            warnings.warn(self.notes[-1], stacklevel=4)
        return chosen

    def _pad_somehow(self) -> None:
        """Batches need some token to fill up with; which one does not matter, for the mask says where it is."""
        tokenizer, reason = self.tokenizer, None
        if tokenizer.pad_token is None:
            reason = "the tokenizer has no padding token"
        elif tokenizer.pad_token_id >= self._known_ids:
            reason = f"the model does not know the tokenizer's padding token {tokenizer.pad_token}"
        if reason:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
            self.notes.append(f"{reason}, so {tokenizer.pad_token} fills batches up, masked")

    @property
    def _known_ids(self) -> int:
        table = self.model.embedding if isinstance(self.model, GPT) else self.model.get_input_embeddings()
        if not hasattr(table, "num_embeddings"):  # Perceiver's layers have no states of tokens either
            raise ValueError(f"{type(self.model).__name__} has no embedding of tokens, which a runner needs")
        return table.num_embeddings

    def _longest(self) -> int | None:
        """The most tokens that the model takes, or None where there is no limit."""
        if isinstance(self.model, GPT):
            return self.model.config.block_size
        limits = [getattr(self.model.config, "max_position_embeddings", None)]
        for module in self.model.modules():
            table = getattr(module, "position_embeddings", None)
            if isinstance(table, nn.Embedding) and table.padding_idx is not None:  # RoBERTa's count from behind it
                limits.append(table.num_embeddings - table.padding_idx - 1)
        return min((limit for limit in limits if limit and limit > 0), default=None)

    @property
    def max_length(self) -> int | None:
        """Tokens that `tokenize` cuts a text to, as the model and the tokenizer say; None where neither does."""
        said = self.tokenizer.model_max_length  # a number beyond all use where it was not said
        return min((n for n in (self.limit, said) if n and n < 1e9), default=None)

    # ---- life

    @property
    def model(self) -> nn.Module:
        return self._require_open()

    def _require_open(self) -> nn.Module:
        if self._model is None:
            raise ValueError(f"the runner of {self.folder.name} is closed; load_model gives a new one")
        return self._model

    def close(self) -> None:
        """Free the model. The runner cannot be used afterwards."""
        self._model = None
        gc.collect()  # a module and its hooks can form cycles
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> "BaseModelRunner":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    # ---- tokens

    def tokenize(self, texts: str | Iterable[str], **options: Any) -> Mapping[str, Any]:
        """Texts to a batch on the CPU: input_ids and attention_mask (B, T), and whatever else the tokenizer gives.

        `options` are those of a call of Transformers' tokenizers, over the defaults: padding and truncation to what the
        model takes. return_offsets_mapping=True adds offset_mapping; the batch's `word_ids(row)` gives the words.
        """
        self._require_open()
        options = {"padding": True, "truncation": True, "return_tensors": "pt", **self._call_options, **options}
        if unknown := sorted(options.keys() - loading.call_options()):
            raise ValueError(f"tokenize has no option {', '.join(unknown)}")
        texts = [texts] if isinstance(texts, str) else list(texts)
        others = {key: [x] if isinstance(x, str) else x for key, x in options.items() if key.startswith("text_")}
        if not options.get("is_split_into_words"):
            wrong = [
                f"text {i} is a {type(text).__name__}" for i, text in enumerate(texts) if not isinstance(text, str)
            ]
            if wrong:
                raise ValueError(f"{wrong[0]}, not a string (of {len(texts)} texts)")
        if options["truncation"] and self.max_length:
            options.setdefault("max_length", self.max_length)
        if not texts:
            filler = [self.tokenizer.pad_token]
            return self._empty(self.tokenizer(filler, **options | dict.fromkeys(others, filler)))
        batch = self.tokenizer(texts, **options | others)
        if options["return_tensors"] == "pt" and not batch["input_ids"].numel():  # texts without a single token
            ids = torch.full((len(texts), 1), self.tokenizer.pad_token_id)
            return type(batch)({"input_ids": ids, "attention_mask": torch.zeros_like(ids)})
        return batch

    @staticmethod
    def _empty(batch: Mapping[str, Any]) -> Mapping[str, Any]:
        return type(batch)(
            {key: x[:0, :0] if isinstance(x, Tensor) and x.dim() > 1 else x[:0] for key, x in batch.items()}
        )

    def _checked(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What of a batch the model takes, on its device. Raises ValueError for what it cannot take."""
        unknown = batch.keys() - NOT_FOR_THE_MODEL - set(self.takes)
        if unknown:
            raise ValueError(
                f"{type(self).__name__} takes no {', '.join(sorted(unknown))}, but {', '.join(self.takes)}"
            )
        tensors = {key: torch.as_tensor(batch[key]) for key in self.takes if key in batch}
        ids = tensors.get("input_ids")
        if ids is None or ids.dim() != 2:
            raise ValueError("a batch needs input_ids, (texts, tokens); tokenize makes one")
        tensors.setdefault("attention_mask", torch.ones_like(ids))
        for key, tensor in tensors.items():
            shared = 2 if key in ("attention_mask", "token_type_ids") else 1  # a decoder has a length of its own
            if tensor.dim() != 2 or tensor.shape[:shared] != ids.shape[:shared]:
                raise ValueError(f"{key} is {tuple(tensor.shape)} where input_ids are {tuple(ids.shape)}")
        if self.limit and ids.size(1) > self.limit:
            raise ValueError(f"{ids.size(1)} tokens are more than the {self.limit} that the model takes")
        known = self._known_ids
        if ids.numel() and not 0 <= ids.min() <= ids.max() < known:
            raise ValueError(f"input_ids lie between {ids.min()} and {ids.max()}, and the model knows 0 to {known - 1}")
        types = tensors.get("token_type_ids")
        if types is not None and not types.any():
            del tensors["token_type_ids"]  # tokenizers give zeros unasked, and GPT-2 would add the embedding of id 0
        elif types is not None and not self._accepts("token_type_ids"):
            name = type(self.model).__name__
            raise ValueError(f"{name} takes no token_type_ids; tokenize(..., return_token_type_ids=False) makes none")
        return {key: tensor.to(self.device) for key, tensor in tensors.items()}

    # ---- runs

    def forward(
        self, batch: Mapping[str, Any], *, layers: Sequence[int] | None = None, logits: bool = True
    ) -> ModelOutputs:
        """Run a batch, without gradients; what comes out may be used where there are some.

        layers: indices of the hidden states to keep, in this order, from 0, the embeddings, or from the end; None keeps
        all, () none. logits=False spares their memory. An empty batch gives tensors of the same kind, without a row.
        Raises ValueError for a batch that does not fit the model, and for a layer that it does not have.
        """
        tensors = self._checked(batch)
        with torch.no_grad():
            if tensors["input_ids"].numel():
                return self._run(tensors, layers, logits)
            if len(tensors["input_ids"]):
                raise ValueError(f"{len(tensors['input_ids'])} texts without a token cannot be run; tokenize pads them")
            one = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            outputs = self._run({"input_ids": one, "attention_mask": one + 1}, layers, logits)
        return outputs.map(_without_rows)

    @abstractmethod
    def _run(self, batch: dict[str, Tensor], layers: Sequence[int] | None, logits: bool) -> ModelOutputs:
        """A batch with tokens, on the model's device, by the architecture's own way."""

    def _call(self, batch: Mapping[str, Any]) -> Any:
        """Transformers' own outputs. Raises ValueError for an id or a position beyond the model's tables."""
        options = {"output_hidden_states": True, "output_attentions": self.capture_attentions, "return_dict": True}
        try:
            return self.model(**batch, **options)
        except IndexError:  # only the model knows how many positions, types, and ids of the decoder there are
            tensors = {key: x for key, x in batch.items() if isinstance(x, Tensor)}
            given = ", ".join(f"{key} {tuple(x.shape)} from {x.min()} to {x.max()}" for key, x in tensors.items())
            raise ValueError(f"{type(self.model).__name__} has no place for some of {given}") from None

    def _accepts(self, argument: str) -> bool:
        return argument in inspect.signature(self.model.forward).parameters

    def _kept(self, states: Sequence[Tensor], layers: Sequence[int] | None, length: int) -> States:
        """The states of these layers, cut to `length` tokens: some models fill texts up to whole blocks inside."""
        layers = range(len(states)) if layers is None else layers
        wrong = [layer for layer in layers if not -len(states) <= layer < len(states)]
        if wrong:
            raise ValueError(f"layers={list(layers)}: the model has hidden states 0 to {len(states) - 1}")
        for i in layers:
            if not isinstance(states[i], Tensor) or states[i].dim() != 3 or states[i].size(1) < length:
                name = type(self.model).__name__
                raise ValueError(f"{name} has no vector for each of {length} tokens in hidden state {i}; leave it out")
        return tuple(states[layer][:, :length] for layer in layers)

    def _captured(self, **attentions: States | None) -> dict[str, States]:
        """The weights by name, if they were to be captured. Raises ValueError for a model that has none to give."""
        if not self.capture_attentions:
            return {}
        missing = [name for name, weights in attentions.items() if not weights or any(w is None for w in weights)]
        if missing:
            raise ValueError(f"{type(self.model).__name__} gives no {', '.join(missing)}")
        return {name: tuple(weights) for name, weights in attentions.items()}

    def iterate(
        self,
        texts: str | Iterable[str],
        batch_size: int = 32,
        layers: Sequence[int] | None = None,
        to_cpu: bool = True,
        *,
        logits: bool = True,
        **options: Any,
    ) -> Iterator[ModelOutputs]:
        """`forward` over any number of texts, from a generator too, batch by batch: one is held at a time.

        `options` are those of `tokenize`. How far it has come is for the caller to count.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self._require_open()

        def batches() -> Iterator[ModelOutputs]:
            rest = iter([texts] if isinstance(texts, str) else texts)
            while part := list(islice(rest, batch_size)):
                outputs = self.forward(self.tokenize(part, **options), layers=layers, logits=logits)
                outputs = outputs.map(Tensor.cpu) if to_cpu else outputs
                yield outputs
                del outputs  # or two batches would be held while the next one is made

        return batches()

    def embed(
        self,
        texts: str | Iterable[str],
        pooling: str | None = None,
        normalize: bool = True,
        layer: int = -1,
        batch_size: int = 32,
    ) -> Tensor:
        """One vector for each text, (B, C) in float32 on the CPU, from the encoder where there is one.

        pooling: "mean", "cls" (the first token) or "last" of the tokens that are no padding; None: what the model was
        trained with if sentence-transformers' files say so (with its maximal length and its dense layer), else "mean".
        normalize: to length 1. A text without tokens is a vector of zeros. layer: as in `forward`.
        """
        if pooling not in (None, *sentences.POOLINGS):
            raise ValueError(f"pooling={pooling} is none of {', '.join(sentences.POOLINGS)}")
        steps = sentences.Steps(pooling) if pooling else sentences.read_steps(self.folder)
        texts = [texts] if isinstance(texts, str) else list(texts)
        texts = [text.lower() for text in texts] if steps.lower else texts
        limits = [n for n in (steps.max_length, self.max_length) if n]
        options = {"max_length": min(limits)} if limits else {}

        def vectors(outputs: ModelOutputs) -> Tensor:
            states = outputs.encoder_hidden_states or outputs.decoder_hidden_states
            x = sentences.pool(states[0], outputs.attention_mask, steps.pooling)
            for dense in steps.dense:
                x = dense(x)
            return (F.normalize(x, dim=1) if normalize else x).cpu()

        if not texts:
            return vectors(self.forward(self.tokenize([]), layers=(layer,), logits=False))
        runs = self.iterate(texts, batch_size, (layer,), to_cpu=False, logits=False, **options)
        return torch.cat(list(map(vectors, runs)))


def _without_rows(x: Tensor) -> Tensor:
    """What a model gives for one text of one token, cut to no text and no token: what it gives for an empty batch."""
    return x[:0] if x.dim() == 2 and x.is_floating_point() else x[:0, ..., :0, :0] if x.dim() == 4 else x[:0, :0]
