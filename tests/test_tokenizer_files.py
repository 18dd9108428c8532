"""vocab.json and merges.txt in place of a tokenizer.json: the ids are those of Transformers' own tokenizer."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import tokenizers
from conftest import documents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from tokenizer import ForeignTokenizer, Tokenizer
from tokenizer_files import find_tokenizer

EOT = "<|endoftext|>"
TEXTS = [
    *documents(40),
    "",
    "  two blanks, then\n\n\tdef f(x):\n    return x  ",
    "Größe π ≈ 3.14159; x² 日本語 🙂\u200d🙂 e\u0301 \x00\x7f\ufeff",
    f"{EOT}a <pad> b<|user|> c {EOT} <mask>  d<tool>e <tool> 's I'll",
]


def gpt2(folder, settings=None, eot=True, **beside):
    """What GPT-2 has in place of a tokenizer.json, and other files by name."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    folder.mkdir(parents=True, exist_ok=True)
    made.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocabulary |= {EOT: len(vocabulary)} if eot else {}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    beside = {"config": {"model_type": "gpt2"}, "tokenizer_config": settings, **beside}
    for name, content in beside.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def stored(*tokens, **properties):
    return {str(n): {"content": token, "special": True, **properties} for n, token in tokens}


FOLDERS = {
    "alone": {},
    "a class": {"settings": {"tokenizer_class": "GPT2TokenizerFast", "model_max_length": 1024}},
    "settings and no configuration": {"settings": {"tokenizer_class": "GPT2Tokenizer"}, "config": None},
    "a blank before": {"settings": {"add_prefix_space": True}},
    "a token before": {"settings": {"add_bos_token": True}},
    "padding": {"special_tokens_map": {"pad_token": "<pad>", "eos_token": {"content": EOT, "lstrip": False}}},
    "stripping": {"special_tokens_map": {"mask_token": {"content": "<mask>", "lstrip": True, "rstrip": False}}},
    "added before 2023": {"added_tokens": {"<tool>": 402, "<pad>": 401}, "special_tokens_map": {"pad_token": "<pad>"}},
    "added since": {"settings": {"added_tokens_decoder": {
        **stored((400, EOT)), **stored((402, "<pad>")), **stored((401, "<tool>"), special=False, normalized=True)}}},
    "more": {"settings": {"additional_special_tokens": ["<|user|>"], "pad_token": "<pad>"}},
    "names of its own": {"settings": {"tool_token": "<tool>", "extra_special_tokens": {"user_token": "<|user|>"}}},
    "another end": {"settings": {"eos_token": "<|user|>", "bos_token": None}},
    "an end that is not in the vocabulary": {"eot": False},
}  # fmt: skip


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request, tmp_path_factory):
    return gpt2(tmp_path_factory.mktemp("gpt2") / "tiny-gpt2", **FOLDERS[request.param])


@pytest.fixture(scope="module")
def pair(folder):
    return Tokenizer.load(find_tokenizer(folder)), AutoTokenizer.from_pretrained(folder)


def test_the_ids_are_transformers_and_special_tokens_in_a_text_are_text(pair):
    ours, theirs = pair
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, split_special_tokens=True).input_ids
        assert (
            theirs.decode(ours.encode(text), skip_special_tokens=True).strip() == ours.decode(ours.encode(text)).strip()
        )
    assert ours.eot == theirs.eos_token_id


def test_what_we_write_is_read_to_the_ids_of_transformers_also_with_special_tokens(pair, tmp_path):
    ours, theirs = pair
    ours.save(tmp_path / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [library.encode(text).ids for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]
    again = Tokenizer.load(tmp_path)
    assert (again.fingerprint, again.eot, again.name) == (ours.fingerprint, ours.eot, ours.name)


def test_a_tokenizer_json_that_transformers_writes_later_is_the_same_tokenizer(pair, folder, tmp_path):
    pair[1].save_pretrained(tmp_path / "tiny-gpt2")
    later = Tokenizer.load(tmp_path / "tiny-gpt2")
    assert later.fingerprint == pair[0].fingerprint and later.name == pair[0].name


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_ids_of_any_text_are_transformers(pair, text):
    ours, theirs = pair
    assert ours.encode(text) == theirs(text, split_special_tokens=True).input_ids


def test_one_in_gpt2s_layout_is_as_fast_as_our_own(tmp_path):
    assert type(Tokenizer.load(gpt2(tmp_path / "a"))) is Tokenizer
    assert type(Tokenizer.load(gpt2(tmp_path / "b", FOLDERS["more"]["settings"]))) is ForeignTokenizer


def test_a_copy_keeps_the_special_tokens_that_other_files_named(tmp_path):
    special = {"pad_token": "<pad>", "mask_token": {"content": "<mask>", "lstrip": True}}
    folder = gpt2(tmp_path / "gpt2", special_tokens_map=special, generation_config={"eos_token_id": [400, 401]})
    tokenizer = Tokenizer.load(folder)
    about = json.loads(tokenizer.to_json())["model"]["about"]
    assert about["pad_token"] == "<pad>" and about["bos_token"] == about["eos_token"] == EOT
    assert tokenizer.stops == (400, 401)


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ({"config": {"model_type": "roberta"}}, "is for roberta, and is read only for gpt2"),
        ({"settings": {"tokenizer_class": "Qwen2Tokenizer"}}, "is for Qwen2Tokenizer, and is read only for gpt2"),
        ({"config": None}, "is for a model that nothing beside it names"),
        ({"settings": {"added_tokens_decoder": {"x": {"content": "y"}}}}, "make no tokenizer"),
        ({"settings": {"add_eos_token": True}}, "puts tokens behind every text"),
    ],
)
def test_other_models_have_the_same_two_files_and_are_refused(beside, words, tmp_path):
    folder = gpt2(tmp_path / "other", **beside)
    with pytest.raises(ValueError, match=re.escape(str(folder / "vocab.json"))) as caught:
        Tokenizer.load(find_tokenizer(folder))
    assert words in str(caught.value)


def test_broken_files_are_named(tmp_path):
    folder = gpt2(tmp_path / "gpt2")
    (folder / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(ValueError, match=r"vocab.json and the files beside it make no tokenizer: .*invalid at line"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text('{"add_prefix')
    with pytest.raises(ValueError, match=r"tokenizer_config.json is no JSON"):
        Tokenizer.load(folder)


def test_the_remedy_that_a_refusal_names_makes_a_tokenizer_with_the_ids_of_transformers(tmp_path):
    folder = gpt2(tmp_path / "tiny-qwen2", {"eos_token": EOT}, config={"model_type": "qwen2"})
    with pytest.raises(ValueError, match="is for qwen2") as caught:
        Tokenizer.load(folder)
    command = shlex.split(re.search(r'python -c ".*"', str(caught.value))[0])
    before = AutoTokenizer.from_pretrained(folder)
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ours = Tokenizer.load(folder)
    for text in TEXTS:
        assert ours.encode(text) == before(text, split_special_tokens=True).input_ids
