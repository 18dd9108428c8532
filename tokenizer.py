"""Text to ids and back: GPT-2's byte-level BPE, or one trained on your own corpus in the same layout.

GPT-2's layout is the 256 single bytes in GPT-2's order, then one token per merge in the order of the merges, then
`<|endoftext|>`. A list of merges therefore says everything, and a tokenizer of this layout is a name and that list.

The file is Hugging Face's `tokenizer.json`; the encoding is tiktoken's, many times faster. The two define BPE
differently, see `_buildable_merges` for why they cannot disagree here. Other people's tokenizers (another split
pattern, a normalizer, more special tokens) are encoded by the library that defines the format, `ForeignTokenizer`:
tiktoken would give ids that their model never saw.
"""

import base64
import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cached_property
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tiktoken.load
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

import files
from tokenizer_files import (
    EOT,
    MERGES,
    OF_BATCHES,
    VOCABULARY,
    about,
    find_tokenizer,
    from_merges,
    no_tokenizer,
    of_batches,
)

Merge = tuple[bytes, bytes]

# As GPT-2 was released with (openai/gpt-2, encoder.py). Merges never cross the pieces that it cuts the text into.
SPLIT_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same pieces in two thirds of the time: only blanks need to look ahead, which takes the slower of two engines, and
# the rest stands in a group that goes to the faster one as a whole.
FASTER_PATTERN = r"(?:'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"

# GPT-2 numbers the bytes that print as themselves first. In its files these stand for themselves, and the others for
# the code points from 256 on, so that a token has a visible spelling without spaces: " the" is "Ġthe".
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = _PRINTABLE + [byte for byte in range(256) if byte not in _PRINTABLE]
_TO_SYMBOL = {byte: 256 + n for n, byte in enumerate(_BYTES[len(_PRINTABLE) :])}
_FROM_SYMBOL = {symbol: byte for byte, symbol in _TO_SYMBOL.items()}

# Half of a UTF-16 pair: a Python string can hold one (JSON's "\ud800", surrogateescape), UTF-8 cannot.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

RANKS_VARIABLE = "NANOFORGE_GPT2_RANKS"
RANKS_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# The same merges in GPT-2's own notation: what `tiktoken.get_encoding("gpt2")`, and so nanoGPT, leaves in the cache.
MERGES_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_FINGERPRINT = "57b891d981b2d43e3ac6cd279ef3fe07b55bc17a4b370802d36a3f352e80ce4a"
DOWNLOAD_SECONDS = 5.0


class Tokenizer:
    """A byte-level BPE in GPT-2's layout. Comes from `gpt2`, `train_bpe` or `Tokenizer.load`.

    name: what people call it; travels inside tokenizer.json.
    vocab_size: number of ids; every id of a text is below it.
    drawn: the same for ids that a model may write, of which some may end a turn and stand in no text.
    eot: id of `<|endoftext|>`, which separates documents. No text encodes to it.
    stops: ids after which a model has nothing more to say; eot comes first.
    """

    def __init__(self, name: str, merges: Sequence[Merge]):
        self.name = name
        self.eot = len(_BYTES) + len(merges)
        self.vocab_size = self.drawn = self.eot + 1
        self.stops = (self.eot,)
        self._about = {}  # of OF_BATCHES, where it is another model's
        self._merges = list(merges)
        self._tokens = [*(bytes([byte]) for byte in _BYTES), *(left + right for left, right in merges)]
        self._tiktoken = tiktoken.Encoding(
            name,
            pat_str=FASTER_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(self._tokens)},
            special_tokens={EOT: self.eot},
        )

    def __repr__(self) -> str:
        return f"<Tokenizer {self.name}: {self.vocab_size} ids, fingerprint {self.fingerprint[:12]}>"

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of what decides the ids, and of nothing else: not of the name, not of the file's formatting."""
        content = {
            "tokens": [token.hex() for token in self._tokens],
            "merges": [[left.hex(), right.hex()] for left, right in self._merges],
            "special_tokens": {EOT: self.eot},
            "split_pattern": SPLIT_PATTERN,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. `<|endoftext|>` in it is ordinary text, so that no document can end itself early."""
        return self._encode(text).tolist()

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """The ids of all texts, one after another, each followed by `eot`: uint32. Other threads run meanwhile.

        tiktoken gives the others their turn between two calls, so it gets all texts in one, with `<|endoftext|>`
        between them, where none of them has that as ordinary text.
        """
        joined = EOT.join([*texts, ""])
        if joined.count(EOT) == len(texts):
            with suppress(ValueError):  # one of them needs what `_encode` does
                return self._tiktoken.encode_to_numpy(joined, allowed_special={EOT}, disallowed_special=())
        return self._with_ends(map(self._encode, texts))

    def _with_ends(self, encoded: Iterable[np.ndarray]) -> np.ndarray:
        end = np.array([self.eot], dtype=np.uint32)
        return np.concatenate([part for ids in encoded for part in (ids, end)] or [end[:0]])

    def _encode(self, text: str) -> np.ndarray:
        try:
            return self._tiktoken.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self._encode(_LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text))
        except ValueError:
            # tiktoken's regular expressions give up on a million blanks in a row; those of `tokenizers` do not.
            self._hugging_face.encode_special_tokens = True  # despite its name: takes "<|endoftext|>" as plain text
            return np.array(self._hugging_face.encode(text).ids, dtype=np.uint32)

    @cached_property
    def _hugging_face(self) -> tokenizers.Tokenizer:
        """The same tokenizer in the library that defines the file format."""
        merges = [(_to_symbols(left), _to_symbols(right)) for left, right in self._merges]
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=self._vocabulary(), merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([EOT])
        return tokenizer

    def decode(self, ids: Sequence[int], goes_on: bool = False) -> str:
        """The text of `ids`. Bytes that are no UTF-8, such as half a character at the end, become U+FFFD."""
        return self.decode_bytes(ids, goes_on).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int], goes_on: bool = False) -> bytes:
        """The bytes of `ids`: a character may begin in one token and end in the next. `goes_on`: other tokens of the
        text precede them, which some tokenizers need to know for a blank. ValueError for an unknown id."""
        try:
            return self._tiktoken.decode_bytes(ids)
        except (KeyError, OverflowError):
            unknown = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(f"id {unknown} is outside the {self.vocab_size} ids of tokenizer {self.name}") from None

    def before_stop(self, ids: Iterable[int]) -> list[int]:
        """The ids that come before the first of `stops`: what a model has written."""
        return list(takewhile(lambda i: i not in self.stops, ids))

    def spelled(self) -> tuple[list[str], list[str]]:
        """The tokens by id and the merges by rank, as GPT-2's files and llama.cpp's spell them."""
        merges = [f"{_to_symbols(left)} {_to_symbols(right)}" for left, right in self._merges]
        return [*map(_to_symbols, self._tokens), EOT], merges

    def _vocabulary(self) -> dict[str, int]:
        return {**{_to_symbols(token): rank for rank, token in enumerate(self._tokens)}, EOT: self.eot}

    def to_json(self) -> str:
        """The text of tokenizer.json, which `tokenizers.Tokenizer.from_file` and Transformers open."""
        content = json.loads(self._hugging_face.to_str())
        model = content["model"]
        model["merges"] = [" ".join(merge) for merge in model["merges"]]  # readers before 2024 know no pairs
        # Readers pass over unknown keys in here, and fail on them at the top level.
        own = {"name": self.name} | ({"about": self._about} if self._about else {})
        content["model"] = {"type": model.pop("type"), **own, **model}
        return json.dumps(content, ensure_ascii=False, indent=1) + "\n"

    def save(self, path: str | os.PathLike) -> None:
        """Write tokenizer.json to `path`, whole or not at all. OSError where it cannot be written."""
        files.write_atomic(files.expanded(path), self.to_json().encode())

    @staticmethod
    def load(path: str | os.PathLike) -> "Tokenizer":
        """Read a tokenizer.json written here, by `tokenizers` or by Transformers, or that of a folder; a GPT-2's
        vocab.json with the merges.txt beside it does as well.

        FileNotFoundError when there is none; ValueError when it is truncated, or a kind that cannot be decoded byte by
        byte. A file without our name in it becomes "gpt2", "bpe-<fingerprint>" or what its folder is called.
        """
        path = files.expanded(path)
        if path.is_dir():
            folder, path = path, find_tokenizer(path)
            if path is None:
                raise FileNotFoundError(no_tokenizer(folder))
        try:
            content = json.loads(files.read(path))
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no tokenizer at {path}") from None
        except ValueError as error:
            raise ValueError(f"{path} is truncated, or not a tokenizer.json at all: {error}") from error
        if path.name == VOCABULARY and path.with_name(MERGES).exists():
            content = from_merges(path)
        try:
            tokenizer = _from_json(content)
        except (AttributeError, KeyError, TypeError):
            raise ValueError(f"{path} is JSON, but not a tokenizer.json") from None
        except ValueError as reason:  # it is not in GPT-2's layout
            try:
                return ForeignTokenizer(content, path)
            except ValueError as error:
                raise ValueError(f"{path} cannot be used: {error} (and it is not GPT-2's: {reason})") from error
        said = content["model"].get("about") or of_batches(path)
        tokenizer._about = {key: said[key] for key in OF_BATCHES if key in said}
        return tokenizer


class ForeignTokenizer(Tokenizer):
    """Another model's tokenizer.json, encoded by Hugging Face's `tokenizers`.

    A text begins with what the tokenizer puts before every text, such as Gemma's and Llama's `<bos>`. More stands in
    other files beside it (`about`), and in our own copies in the file itself: the end-of-sequence token, which is its
    `eot`, the other special tokens, the template of a chat, and the ids at which the model stops.
    """

    def __init__(self, content: dict[str, Any], path: Path):
        self._content = content
        try:
            self._library = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library has one exception for everything
            raise ValueError(str(error)) from None
        self._library.no_truncation()
        self._library.no_padding()
        kinds = set(re.findall(r'"type": "(\w+)"', json.dumps(content.get("decoder"))))
        if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise ValueError(f"its decoder ({', '.join(sorted(kinds)) or 'none'}) says nothing about bytes")
        self._byte_level = "ByteLevel" in kinds
        self._strips = bool(kinds & {"Strip", "Metaspace"})  # the blank that it puts before a text's first word
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        self._special = {token["id"] for token in content["added_tokens"] if token["special"]}
        self._added = {token["id"]: token["content"].encode() for token in content["added_tokens"]}
        model = content["model"]
        self._about = model.get("about") or about(path, vocabulary)
        eot = model.get("eot") or self._about.get("eos_token")
        if not isinstance(eot, str) or eot not in vocabulary:
            raise ValueError(f"nothing beside it says which token ends a text: eos_token is {eot!r}")
        self.eot, self._eot_token = vocabulary[eot], eot
        self.stops = tuple(dict.fromkeys([self.eot, *self._about.get("stops", ())]))
        self.name = model.get("name") or path.resolve().parent.name or f"tokenizer-{self.fingerprint[:8]}"
        whole, bare = (self._library.encode("x", add_special_tokens=special).ids for special in (True, False))
        if whole[len(whole) - len(bare) :] != bare:
            raise ValueError("it puts tokens behind every text, as an encoder's does")
        self._prefix = np.array(whole[: len(whole) - len(bare)], dtype=np.uint32)
        # Special tokens that no text has may lie beyond the model's rows, as Gemma 3's for images do.
        ordinary = (i for i in vocabulary.values() if i not in self._special)
        self.vocab_size = 1 + max(*ordinary, self.eot, *self._prefix.tolist())
        self.drawn = max(self.vocab_size, *(1 + stop for stop in self.stops))
        self._library.encode_special_tokens = True  # despite its name: takes "</s>" in a text as plain text

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the file without what we add to it, and of `eot`."""
        model = {key: value for key, value in self._content["model"].items() if key not in ("name", "eot", "about")}
        content = json.dumps([self._content | {"model": model}, self.eot], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        return self._with_ends(self._encode_all(texts))

    def _encode(self, text: str) -> np.ndarray:
        return self._encode_all([text])[0]

    def _encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        valid = [_LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text) for text in texts]
        encoded = self._library.encode_batch_fast(valid, add_special_tokens=False)
        return [np.concatenate([self._prefix, np.array(e.ids, dtype=np.uint32)]) for e in encoded]

    def decode_bytes(self, ids: Sequence[int], goes_on: bool = False) -> bytes:
        """The bytes of `ids`, special tokens left out. ValueError for an unknown id."""
        pieces, first = b"".join(map(self._bytes, ids)), self._prefix[:1].tolist()
        opens_text = list(ids[:1]) == first if first else not goes_on
        return pieces.removeprefix(b" ") if self._strips and opens_text else pieces

    def _bytes(self, i: int) -> bytes:
        if i in self._added:
            return b"" if i in self._special else self._added[i]
        token = self._library.id_to_token(int(i)) if 0 <= i < self.vocab_size else None
        if token is None:
            raise ValueError(f"id {i} is outside the {self.vocab_size} ids of tokenizer {self.name}")
        if self._byte_level:
            return _to_bytes(token)
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()

    def to_json(self) -> str:
        own = {"name": self.name, "eot": self._eot_token, "about": self._about}
        model = {"type": self._content["model"].get("type"), **own}
        content = self._content | {"model": model | self._content["model"]}
        return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def gpt2(ranks: str | os.PathLike | None = None, download: bool = True) -> Tokenizer:
    """GPT-2's tokenizer, from the first of: the file `ranks`, $NANOFORGE_GPT2_RANKS, tiktoken's cache, a download.

    A file is r50k_base.tiktoken or vocab.bpe, known by its sha256. ValueError when one was named and is missing or
    another: going on would ignore what was asked for. FileNotFoundError when every place fails; it lists them.
    The download takes at most 5 seconds and stays in tiktoken's cache.
    """
    named = ranks or os.environ.get(RANKS_VARIABLE)
    if named:
        try:
            return Tokenizer("gpt2", _gpt2_merges(files.expanded(named).read_bytes()))
        except (OSError, ValueError) as error:
            source = "the path given" if ranks else f"${RANKS_VARIABLE}"
            raise ValueError(f"{named} ({source}) does not give GPT-2's ranks: {_reason(error)}") from error

    places = {}
    if cache := _tiktoken_cache():
        for url in (RANKS_URL, MERGES_URL):
            path = Path(cache, hashlib.sha1(url.encode()).hexdigest())
            places[f"{path}, where tiktoken caches {Path(url).name}"] = path.read_bytes
    if download:
        places[RANKS_URL] = _download_ranks
    failures = {"the argument ranks": "not given", f"${RANKS_VARIABLE}": "not set"}
    for place, read in places.items():
        try:
            return Tokenizer("gpt2", _gpt2_merges(read()))
        except (OSError, ValueError) as error:
            failures[place] = _reason(error)
    if not cache:
        failures["tiktoken's cache"] = "switched off, its variable is empty"
    if not download:
        failures[RANKS_URL] = "not tried, download is off"
    tried = "\n".join(f"  {place}: {reason}" for place, reason in failures.items())
    raise FileNotFoundError(
        f"GPT-2's ranks were not found. Tried:\n{tried}\n"
        f"Fetch {RANKS_URL} where there is a network and set {RANKS_VARIABLE} to the file,\n"
        f"or train a BPE on your own corpus, which needs no network."
    )


def train_bpe(documents: Iterable[str], name: str, vocab_size: int = 50257) -> Tokenizer:
    """Train a byte-level BPE on `documents`: a few seconds for 13 MB. The same documents give the same fingerprint.

    vocab_size counts the 256 bytes and `<|endoftext|>`; ValueError below those 257. A corpus with too few different
    pairs gives a smaller vocabulary: read it from the result.
    """
    if vocab_size <= len(_BYTES):
        raise ValueError(f"vocab_size is {vocab_size}, and the 256 bytes and {EOT} alone need {len(_BYTES) + 1}")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Each merge is replayed through every piece that holds it: one unbroken megabyte, say of base64, turns seconds into
    # minutes and would make tokens of its halves. Pieces are cut for training only, and words are shorter than this.
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence([byte_level, pre_tokenizers.FixedLength(length=256)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=1,  # the last of 50,000 merges occur once in 13 MB, and the size of the vocabulary is asked for
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    valid = (_LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", document) for document in documents)
    trained.train_from_iterator(valid, trainer)
    vocabulary = trained.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)[len(_BYTES) :]
    return Tokenizer(name, _buildable_merges(map(_to_bytes, tokens)))


def _buildable_merges(tokens: Iterable[bytes]) -> list[Merge]:
    """The pair that each token is merged from; `tokens` are those of two bytes or more, by rank. Some may be left out.

    tiktoken merges any two neighbours that together spell a token, `tokenizers` merges listed pairs only. The ids are
    the same for every text if each token X, encoded by the tokens before it, ends as exactly two parts, and these are
    X's listed pair. For if in some text two neighbours spell X, nothing was merged across their outer edges so far, and
    between those edges all went as when X is encoded alone, which knows one state of two parts. So both libraries see
    the same candidates at every step, and both take the lowest rank, leftmost first. A token that does not end as two
    parts comes out of no text and is left out; tiktoken, which looks up whole pieces first, would still find it.
    """
    single = [bytes([byte]) for byte in range(256)]
    ranks = {single[byte]: rank for rank, byte in enumerate(_BYTES)}
    unknown = float("inf")
    merges = []
    for token in tokens:
        parts = [single[byte] for byte in token]
        candidates = [ranks.get(left + right, unknown) for left, right in pairwise(parts)]
        while len(parts) > 2:
            lowest = min(candidates)
            if lowest == unknown:
                break
            i = candidates.index(lowest)
            merged = parts[i] + parts[i + 1]
            parts[i : i + 2] = [merged]
            del candidates[i]
            if i:
                candidates[i - 1] = ranks.get(parts[i - 1] + merged, unknown)
            if i < len(candidates):
                candidates[i] = ranks.get(merged + parts[i + 1], unknown)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
            ranks[token] = len(ranks)
    return merges


def _from_json(content: dict[str, Any]) -> Tokenizer:
    """The tokenizer that a parsed tokenizer.json describes; a ValueError says why it is not one that we can encode."""
    model, splitter = content["model"], content["pre_tokenizer"] or {}
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"its model is {model['type']}")
    if content["normalizer"]:
        raise ValueError(f"it changes the text first, by {content['normalizer']['type']}")
    if splitter.get("type") != "ByteLevel" or splitter.get("add_prefix_space") or not splitter.get("use_regex", True):
        raise ValueError(f"it does not cut text as GPT-2 does: {splitter or 'not at all'}")
    around = content.get("post_processor") or {"type": "ByteLevel"}
    if around["type"] != "ByteLevel" and around.get("special_tokens") != {}:
        raise ValueError(f"it puts tokens around a text, by {around['type']}")
    if model.get("dropout"):
        raise ValueError(f"it leaves out merges at random (dropout {model['dropout']})")
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    merges = [(_to_bytes(left), _to_bytes(right)) for left, right in pairs]
    tokenizer = Tokenizer(model.get("name", ""), merges)
    is_gpt2 = tokenizer.fingerprint == GPT2_FINGERPRINT
    if not is_gpt2 and merges != _buildable_merges(left + right for left, right in merges):
        raise ValueError("its merges do not follow from its tokens")
    ids = {**model["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"]}}
    if ids != tokenizer._vocabulary():
        raise ValueError(f"its ids are not the 256 bytes, the {len(merges)} merges and {EOT}, in this order")
    if not tokenizer.name:
        tokenizer.name = "gpt2" if is_gpt2 else f"bpe-{tokenizer.fingerprint[:8]}"
    return tokenizer


def _to_symbols(token: bytes) -> str:
    return token.decode("latin-1").translate(_TO_SYMBOL)


def _to_bytes(symbols: str) -> bytes:
    return symbols.translate(_FROM_SYMBOL).encode("latin-1")


def _gpt2_merges(content: bytes) -> list[Merge]:
    """GPT-2's merges from the content of r50k_base.tiktoken or vocab.bpe; a ValueError for any other content."""
    digest = hashlib.sha256(content).hexdigest()
    lines = content.split(b"\n")
    if digest == RANKS_SHA256:  # "<token in base64> <rank>", by rank
        return _buildable_merges(base64.b64decode(line.split()[0]) for line in lines[len(_BYTES) : -1])
    if digest == MERGES_SHA256:  # a version, then "<left> <right>"
        pairs = (line.decode("utf-8").split(" ") for line in lines[1:-1])
        return [(_to_bytes(left), _to_bytes(right)) for left, right in pairs]
    raise ValueError(
        f"the sha256 of its {len(content):,} bytes begins with {digest[:12]}, that of r50k_base.tiktoken with "
        f"{RANKS_SHA256[:12]} and that of vocab.bpe with {MERGES_SHA256[:12]}"
    )


def _tiktoken_cache() -> str:
    """The folder where tiktoken keeps its downloads; "" when its variable is empty, which switches the cache off."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    return os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))


def _download_ranks() -> bytes:
    """r50k_base.tiktoken, checked and cached by tiktoken itself; OSError when it did not come in DOWNLOAD_SECONDS.

    A timeout on the socket bounds neither the look-up of the host's name nor a server that drips, so it is the wait
    that is bounded. The thread is a daemon because those of an executor hold up the end of the program.
    """
    outcome = Future()

    def fetch():
        try:
            outcome.set_result(tiktoken.load.read_file_cached(RANKS_URL, RANKS_SHA256))
        except Exception as error:
            while inner := error.__cause__ or error.__context__:  # "Connection refused" is the innermost of four
                error = inner
            outcome.set_exception(OSError(_reason(error)))

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    if not outcome.done():
        raise TimeoutError(f"no answer within {DOWNLOAD_SECONDS:g} seconds")
    return outcome.result()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
