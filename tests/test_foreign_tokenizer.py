"""Other models' tokenizers: the ids are Transformers', the bytes come back, documents are written in their tokens."""

import json

import pytest
import tokenizers
from conftest import documents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data.finding import find_dataset
from data.tokens import load_dataset, retokenize, write_dataset
from tokenizer import ForeignTokenizer, Tokenizer, train_bpe

END = "<|end|>"
TEXTS = [
    *documents(40),
    "Größe π ≈ 3.14159; x² + y² = z²\n\n\tdef f(x):\n    return x",
    "日本語のテキスト 🙂🙂",
    "I'll we've 12345",
]
LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama3(folder):
    """Bytes, another split pattern than GPT-2's, a token before every text."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA_3_SPLIT), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens(["<|begin|>", "<|end|>"])
    made.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", made.token_to_id("<|begin|>"))]
    )
    return saved(made, folder, "<|end|>")


def gemma(folder):
    """Pieces in which a blank is U+2581, bytes for what has no piece, no blank of its own before a text."""
    made = sentencepiece()
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return saved(trained(made), folder, "<eos>")


def llama2(folder):
    """The same with a blank put before every text, and taken away again."""
    made = sentencepiece()
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    return saved(trained(made), folder, "<eos>")


def phi3(folder):
    """The same with nothing before a text, and an end of a turn behind other special tokens."""
    path = llama2(folder)
    content = json.loads(path.read_text())
    content["post_processor"], first = None, len(content["model"]["vocab"])
    like = next(token for token in content["added_tokens"] if token["content"] == "<eos>")
    content["added_tokens"] += [like | {"id": first, "content": "<|user|>"}, like | {"id": first + 1, "content": END}]
    path.write_text(json.dumps(content))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, first + 1]}))
    return path


def sentencepiece():
    return tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))


def trained(made):
    special = ["<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False))
    content = json.loads(made.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    made = tokenizers.Tokenizer.from_str(json.dumps(content))
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return made


def saved(made, folder, eos):
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": eos}}))
    return folder / "tokenizer.json"


KINDS = pytest.mark.parametrize("kind", [llama3, gemma, llama2, phi3])


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("foreign")
    return {kind: kind(root / kind.__name__) for kind in (llama3, gemma, llama2, phi3)}


@KINDS
def test_the_ids_are_transformers_and_the_bytes_come_back(paths, kind):
    ours, theirs = Tokenizer.load(paths[kind]), PreTrainedTokenizerFast(tokenizer_file=str(paths[kind]))
    assert isinstance(ours, ForeignTokenizer) and ours.name == kind.__name__
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids and max(ids) < ours.vocab_size
        assert ours.decode(ids) == text == theirs.decode(ids, skip_special_tokens=True)
    assert ours.encode_documents(TEXTS).tolist() == [i for text in TEXTS for i in (*ours.encode(text), ours.eot)]


@KINDS
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_any_text_comes_back_byte_by_byte(paths, kind, text):
    text = text.replace("▁", "")  # these tokenizers cannot tell it from a blank
    tokenizer = Tokenizer.load(paths[kind])
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    pieces = b"".join(tokenizer.decode_bytes([i], goes_on=at > 0) for at, i in enumerate(ids))
    assert pieces == text.encode() or (kind is llama2 and pieces in (b" " + text.encode(), text.encode()))


def test_what_goes_on_keeps_its_blank_and_may_end_at_a_token_behind_others(paths):
    tokenizer = Tokenizer.load(paths[phi3])
    ids = tokenizer.encode("a word")
    assert tokenizer.decode(ids) == "a word" and tokenizer.decode(ids, goes_on=True) == " a word"
    end = tokenizer.stops[-1]
    assert tokenizer.drawn == end + 1 > tokenizer.vocab_size == end - 1 and tokenizer.decode([*ids, end]) == "a word"
    assert tokenizer.stops == (tokenizer.eot, end) and tokenizer.eot == 2


@KINDS
def test_special_tokens_in_a_text_are_text(paths, kind):
    tokenizer = Tokenizer.load(paths[kind])
    name = {llama3: "<|end|>"}.get(kind, "<eos>")
    ids = tokenizer.encode(f"a {name} b")
    assert tokenizer.eot not in ids and tokenizer.decode(ids) == f"a {name} b"


@KINDS
def test_a_copy_knows_all_that_the_original_knew_from_the_files_beside_it(paths, kind, tmp_path):
    original = Tokenizer.load(paths[kind])
    original.save(tmp_path / "tokenizer.json")
    copy = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (copy.name, copy.eot, copy.vocab_size, copy.fingerprint) == (
        original.name,
        original.eot,
        original.vocab_size,
        original.fingerprint,
    )
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode(TEXTS[0]).ids == original.encode(TEXTS[0])
    again = tmp_path / "again.json"
    copy.save(again)
    assert again.read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


@KINDS
def test_a_dataset_is_written_anew_in_its_tokens(paths, kind, tmp_path):
    own = train_bpe(TEXTS, "own", 400)
    write_dataset(tmp_path / "d", TEXTS, own, name="d", source="tests", licence="none", val_fraction=0.2)
    original, tokenizer = load_dataset(tmp_path / "d"), Tokenizer.load(paths[kind])
    derived = retokenize(original, tokenizer)
    assert derived.tokenizer_fingerprint == tokenizer.fingerprint and derived.eot == tokenizer.eot
    assert derived.meta["train"]["bytes"] == original.meta["train"]["bytes"]
    first = derived.val[: list(derived.val).index(tokenizer.eot)].tolist()
    assert first == tokenizer.encode(own.decode(original.val[: list(original.val).index(own.eot)].tolist()))
    begin = tokenizer.encode("")
    assert first[: len(begin)] == begin


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda c, d: (d / "tokenizer_config.json").unlink(), "nothing beside it says which token ends a text"),
        (lambda c, d: (d / "tokenizer_config.json").write_text('{"eos_token": "<no>"}'), "eos_token is '<no>'"),
        (lambda c, d: c.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}), "nothing about bytes"),
        (lambda c, d: c["post_processor"]["single"].reverse(), "behind every text"),
        (lambda c, d: c["model"].update(type="Nonsense"), "cannot be used"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(spoil, words, tmp_path):
    path = llama3(tmp_path)
    content = json.loads(path.read_text())
    spoil(content, tmp_path)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="cannot be used") as caught:
        Tokenizer.load(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_the_end_of_text_is_also_found_by_its_id(tmp_path):
    path = llama3(tmp_path)
    eot = Tokenizer.load(path).eot
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [eot, 3]}))
    assert Tokenizer.load(path).eot == eot


@pytest.mark.parametrize("held", ["its own tokens", "another's"])
def test_what_a_dataset_keeps_of_a_models_tokenizer_does_not_outlive_a_change_there(held, tmp_path):
    path = gemma(tmp_path / "gemma")
    tokenizer = Tokenizer.load(path) if held == "its own tokens" else train_bpe(TEXTS, "own", 400)
    write_dataset(tmp_path / "d", TEXTS, tokenizer, name="d", source="tests", licence="none", val_fraction=0.2)
    for template in ("before", "after"):
        path.with_name("chat_template.jinja").write_text(template)
        dataset = find_dataset(str(tmp_path / "d"), path)
        about = json.loads(Tokenizer.load(dataset.tokenizer_path).to_json())["model"]["about"]
        assert about["chat_template"] == template and dataset.tokenizer_fingerprint == Tokenizer.load(path).fingerprint


def test_special_tokens_beyond_the_rows_of_a_model_do_not_count(tmp_path):
    path = llama3(tmp_path)
    before = Tokenizer.load(path)
    content = json.loads(path.read_text())
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"].append({"id": before.vocab_size, "content": "<image>", **special})
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer.load(path)
    assert tokenizer.vocab_size == before.vocab_size and tokenizer.decode_bytes([before.vocab_size]) == b""
    assert tokenizer.encode("an <image> of it") == before.encode("an <image> of it")
