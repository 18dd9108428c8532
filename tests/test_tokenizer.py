"""One question above all: do our ids, which tiktoken makes, equal those of the tokenizer.json that others will open?

Everything runs on a small BPE trained here, and on GPT-2's where its ranks are found ($NANOFORGE_GPT2_RANKS or
tiktoken's cache); nothing is downloaded.
"""

import argparse
import base64
import contextlib
import hashlib
import http.server
import itertools
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
import typing
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings

import tokenizer
from tokenizer import EOT, Tokenizer, gpt2, train_bpe

NAME = "bpe-test"
SCRIPTS = "Straße naïve 東京は日本の首都です Привет, мир! שלום 안녕하세요 😀👩‍🔬 x² ≤ ∑ᵢ αᵢ\n"
AROUND = {"type": "BertProcessing", "sep": ["!", 0], "cls": ["!", 0]}
SNAPSHOT = settings(derandomize=True, database=None, deadline=None, max_examples=150)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
# What GPT-2's split pattern and the trained merges treat specially, so that most examples reach several branches.
TRICKY_TEXT = st.text("aenrst 'lvdmLL09²½\t\n\r\u00a0\u0085\u3000é東😀\u0301\u200d_#|<>", max_size=60)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Real text that every machine has: about 0.3 MB of prose and code, and a line in many scripts."""
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, tarfile, typing)]
    return [paragraph for source in sources for paragraph in source.split("\n\n")] + [SCRIPTS] * 20


@pytest.fixture(scope="module")
def trained(documents) -> Tokenizer:
    return train_bpe(documents, NAME, vocab_size=2000)


@pytest.fixture(scope="module")
def real_gpt2() -> Tokenizer:
    try:
        return gpt2(download=False)
    except FileNotFoundError:
        pytest.skip("GPT-2's ranks are not on this machine")


@pytest.fixture(scope="module", params=["trained", "real_gpt2"])
def ours(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory) -> tokenizers.Tokenizer:
    path = tmp_path_factory.mktemp("theirs") / "tokenizer.json"
    ours.save(path)
    return tokenizers.Tokenizer.from_file(str(path))


class TestEncoding:
    @SNAPSHOT
    @given(text=ANY_TEXT | TRICKY_TEXT)
    def test_ids_are_those_of_the_json_file_and_decode_to_the_text(self, ours, theirs, text):
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids
        assert ours.decode(ids) == text
        assert max(ids, default=0) < ours.eot

    def test_real_text_gives_the_ids_of_the_json_file(self, ours, theirs, documents):
        assert ours.encode("\n\n".join(documents)) == theirs.encode("\n\n".join(documents)).ids

    def test_every_character_belongs_to_the_same_class_in_both_libraries(self, ours, theirs):
        characters = (chr(code) for code in range(0x20000) if not 0xD800 <= code < 0xE000)
        contexts = [f"a{c}a1{c}1!{c}! {c}  {c}\n" for c in characters]
        for start in range(0, len(contexts), 4096):
            text = "".join(contexts[start : start + 4096])
            assert ours.encode(text) == theirs.encode(text).ids, f"from character {start:#x} on"

    def test_the_faster_pattern_cuts_every_short_text_as_the_released_one_does(self):
        alphabet = " \n's1!é"
        texts = ["".join(text) for length in (1, 2, 3, 4, 5) for text in itertools.product(alphabet, repeat=length)]
        pieces = {text.encode() for text in texts if len(text) < 4} | {bytes([byte]) for byte in range(256)}
        ranks = {piece: rank for rank, piece in enumerate(sorted(pieces, key=len))}  # every piece has an id of its own
        released, faster = (
            tiktoken.Encoding(pattern, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
            for pattern in (tokenizer.SPLIT_PATTERN, tokenizer.FASTER_PATTERN)
        )
        for text in texts:
            assert faster.encode_ordinary(text) == released.encode_ordinary(text), repr(text)

    @SNAPSHOT
    @given(
        tokens=st.lists(st.text("abc", min_size=2, max_size=6), unique=True, max_size=40),
        texts=st.lists(st.text("abc", max_size=30), min_size=5, max_size=5),
    )
    def test_any_rank_table_whatever_gives_the_same_ids_in_both_libraries(self, tokens, texts):
        ours = Tokenizer("random", tokenizer._buildable_merges(token.encode() for token in tokens))
        theirs = tokenizers.Tokenizer.from_str(ours.to_json())
        for text in texts + tokens:
            assert ours.encode(text) == theirs.encode(text).ids

    @pytest.mark.parametrize(
        "text",
        [
            "a" * 1_000_000,
            "=" * 1_000_000,
            "東" * 400_000,
            "\n" * 1_000_001,
            " " * 1_000_001 + "x",
            " \t" * 600_000 + EOT,
        ],
        ids=["letters", "signs", "no spaces", "newlines", "blanks before a word", "mixed blanks"],
    )
    def test_a_megabyte_without_a_break_is_encoded(self, trained, text):
        theirs = tokenizers.Tokenizer.from_str(trained.to_json())
        theirs.encode_special_tokens = True
        assert trained.encode(text) == theirs.encode(text).ids

    def test_end_of_text_inside_a_document_is_ordinary_text(self, ours):
        for text in (EOT, f"a{EOT}{EOT}\n{EOT} b"):
            assert ours.eot not in ours.encode(text)
            assert ours.encode_documents(["b", text, "a"]).tolist().count(ours.eot) == 3
            assert ours.decode(ours.encode(text)) == text

    @pytest.mark.parametrize("odd", [[], ["", ""], [EOT], ["a\ud800b"], ["<|endoftext|", "|>"], [" ", "  \n"]])
    def test_documents_are_encoded_as_each_alone_with_end_of_text_behind_it(self, ours, documents, odd):
        for texts in (odd, [*documents, *odd, "end  "]):
            ids = ours.encode_documents(texts)
            assert isinstance(ids, np.ndarray) and ids.dtype == np.uint32
            assert ids.tolist() == [i for text in texts for i in (*ours.encode(text), ours.eot)]

    def test_half_a_surrogate_pair_becomes_the_replacement_character(self, ours):
        assert ours.decode(ours.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"


class TestDecoding:
    def test_bytes_of_half_a_character_are_kept_and_its_text_replaced(self, ours):
        ids = [ours.decode_bytes([i]) for i in range(256)].index(b"\xc3"), ours.encode("!")[0]
        assert ours.decode_bytes(ids) == b"\xc3!"
        assert ours.decode(ids) == "\ufffd!"

    def test_an_unknown_id_is_named(self, ours):
        for unknown in (ours.vocab_size, -1, 2**40):
            with pytest.raises(
                ValueError, match=f"id {unknown} is outside the {ours.vocab_size} ids of .* {ours.name}"
            ):
                ours.decode([0, unknown])

    def test_decoding_takes_numpy_ids(self, ours):
        assert ours.decode(np.array(ours.encode("two words"), dtype=np.uint16)) == "two words"


class TestLayout:
    def test_bytes_come_first_in_gpt2s_order_then_merges_then_end_of_text(self, ours):
        singles = [ours.decode_bytes([i]) for i in range(256)]
        assert singles[:3] == [b"!", b'"', b"#"]
        assert singles[188:191] == [b"\x00", b"\x01", b"\x02"]
        assert singles[220] == b" "
        assert {*singles} == {bytes([byte]) for byte in range(256)}
        assert all(len(ours.decode_bytes([i])) > 1 for i in range(256, ours.eot))
        assert ours.decode([ours.eot]) == EOT
        assert ours.eot == ours.vocab_size - 1

    def test_gpt2_is_gpt2(self, real_gpt2):
        assert (real_gpt2.name, real_gpt2.vocab_size, real_gpt2.eot) == ("gpt2", 50257, 50256)
        assert real_gpt2.encode("Hello world, 2024's  best!") == [15496, 995, 11, 48609, 338, 220, 1266, 0]
        assert real_gpt2.fingerprint == tokenizer.GPT2_FINGERPRINT


class TestFingerprint:
    def test_neither_name_nor_formatting_counts(self, trained, tmp_path):
        content = json.loads(trained.to_json())
        content["model"]["merges"] = [merge.split(" ") for merge in content["model"]["merges"]]
        content["model"]["name"] = "another name"
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(content, sort_keys=True), encoding="utf-8")
        assert Tokenizer.load(path).name == "another name"
        assert Tokenizer.load(path).fingerprint == trained.fingerprint

    def test_one_merge_less_counts(self, trained, documents):
        smaller = train_bpe(documents, NAME, vocab_size=trained.vocab_size - 1)
        assert smaller.vocab_size == trained.vocab_size - 1
        assert smaller.fingerprint != trained.fingerprint

    def test_the_order_of_merges_counts(self):
        one, other = Tokenizer(NAME, [(b"a", b"b"), (b"c", b"d")]), Tokenizer(NAME, [(b"c", b"d"), (b"a", b"b")])
        assert one.fingerprint != other.fingerprint

    def test_it_never_changes_because_datasets_and_checkpoints_hold_it(self):
        fingerprint = Tokenizer(NAME, [(b"a", b"b"), (b"c", b"d")]).fingerprint
        assert fingerprint == "f1181e40f3b430ff92429e482a75a0586d5f970d28498625edc3f0409442a410"


class TestFile:
    def test_name_fingerprint_and_ids_survive_a_round_trip(self, ours, tmp_path, documents):
        ours.save(tmp_path / "tokenizer.json")
        loaded = Tokenizer.load(tmp_path / "tokenizer.json")
        assert (loaded.name, loaded.vocab_size, loaded.eot) == (ours.name, ours.vocab_size, ours.eot)
        assert loaded.fingerprint == ours.fingerprint
        assert loaded.encode(documents[0]) == ours.encode(documents[0])
        assert loaded.to_json() == ours.to_json()

    def test_tokenizers_decodes_end_of_text_and_finds_it_in_a_prompt(self, ours, theirs):
        assert theirs.encode(f"a{EOT}").ids == [*ours.encode("a"), ours.eot]
        assert theirs.get_vocab_size() == ours.vocab_size

    def test_a_file_saved_again_by_tokenizers_is_the_same_tokenizer_without_its_name(self, ours, theirs, tmp_path):
        theirs.save(str(tmp_path / "tokenizer.json"))
        loaded = Tokenizer.load(tmp_path / "tokenizer.json")
        assert loaded.fingerprint == ours.fingerprint
        assert loaded.name == ("gpt2" if ours.name == "gpt2" else f"bpe-{ours.fingerprint[:8]}")

    def test_transformers_opens_it_and_what_transformers_saves_is_ours_again(self, ours, tmp_path):
        transformers = pytest.importorskip("transformers")
        ours.save(tmp_path / "tokenizer.json")
        fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
        assert fast(SCRIPTS)["input_ids"] == ours.encode(SCRIPTS)
        assert fast.decode(ours.encode(SCRIPTS)) == SCRIPTS
        fast.save_pretrained(tmp_path / "again")
        assert Tokenizer.load(tmp_path / "again" / "tokenizer.json").fingerprint == ours.fingerprint

    @pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
    def test_mode_follows_the_umask(self, trained, tmp_path, umask, mode):
        before = os.umask(umask)
        try:
            trained.save(tmp_path / "tokenizer.json")
        finally:
            os.umask(before)
        assert (tmp_path / "tokenizer.json").stat().st_mode & 0o777 == mode

    def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(self, trained, tmp_path):
        resource = pytest.importorskip("resource", reason="no file size limits on Windows")
        path = tmp_path / "tokenizer.json"
        trained.save(path)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # as a full disk: the write fails half way
        try:
            with pytest.raises(OSError):
                trained.save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert Tokenizer.load(path).fingerprint == trained.fingerprint
        assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no tokenizer at {tmp_path / 'x.json'}"):
            Tokenizer.load(tmp_path / "x.json")

    @pytest.mark.parametrize("length", [0, 1, 5_000, -3])
    def test_a_truncated_file_is_refused(self, trained, tmp_path, length):
        path = tmp_path / "tokenizer.json"
        path.write_bytes(trained.to_json().encode()[:length])
        with pytest.raises(ValueError, match=f"{path} is truncated"):
            Tokenizer.load(path)

    @pytest.mark.parametrize("content", [b"\x80\x04pickle", b"[]", b"3", b'{"model": []}', b'{"n_layer": 5}', b"null"])
    def test_a_file_of_another_kind_is_refused(self, tmp_path, content):
        path = tmp_path / "tokenizer.json"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path} is .*not a tokenizer.json"):
            Tokenizer.load(path)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda file: file["model"].update(type="Unigram"), "its model is Unigram"),
            (lambda file: file.update(normalizer={"type": "NFC"}), "it changes the text first, by NFC"),
            (lambda file: file.update(pre_tokenizer={"type": "Metaspace"}), "it does not cut text as GPT-2 does"),
            (lambda file: file.update(pre_tokenizer=None), "it does not cut text as GPT-2 does: not at all"),
            (lambda file: file["pre_tokenizer"].update(add_prefix_space=True), "it does not cut text as GPT-2 does"),
            (lambda file: file["pre_tokenizer"].update(use_regex=False), "it does not cut text as GPT-2 does"),
            (lambda file: file.update(post_processor=AROUND), "it puts tokens around a text, by BertProcessing"),
            (lambda file: file["model"].update(dropout=0.1), "it leaves out merges at random"),
            (lambda file: file["model"]["vocab"].update({"!": 1, '"': 0}), "its ids are not the 256 bytes"),
            (lambda file: file["added_tokens"].append({"id": 2000, "content": "<pad>"}), "its ids are not the 256"),
            (lambda file: file["model"]["merges"].reverse(), "its merges do not follow from its tokens"),
        ],
    )
    def test_a_tokenizer_that_tiktoken_would_encode_differently_is_refused(self, trained, tmp_path, change, reason):
        content = json.loads(trained.to_json())
        change(content)
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ValueError, match=f"{path} cannot be used: .*not GPT-2's: {reason}"):
            Tokenizer.load(path)


class TestTraining:
    def test_the_vocabulary_has_the_size_asked_for(self, trained):
        assert (trained.name, trained.vocab_size) == (NAME, 2000)

    def test_the_same_documents_give_the_same_tokenizer_in_any_order(self, trained, documents):
        assert train_bpe(reversed(documents), "other", vocab_size=2000).fingerprint == trained.fingerprint

    def test_another_process_with_other_threads_gives_the_same_tokenizer(self, trained, documents, tmp_path):
        (tmp_path / "documents.json").write_text(json.dumps(documents))
        code = (
            "import json, sys, tokenizer\n"
            "print(tokenizer.train_bpe(json.load(open(sys.argv[1])), 'other', vocab_size=2000).fingerprint)"
        )
        environment = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
        assert run(code, tmp_path / "documents.json", env=environment) == trained.fingerprint

    def test_a_corpus_too_small_gives_a_smaller_vocabulary(self):
        assert train_bpe([], "empty").vocab_size == 257
        every_merge = ["to", " to", " b", " be", " o", " or", " n", " no", " not"]
        assert train_bpe(["to be or not to be"], "small").vocab_size == 257 + len(every_merge)

    def test_a_vocabulary_below_the_bytes_is_refused(self):
        assert train_bpe(["aaaa"], "least", vocab_size=257).vocab_size == 257
        with pytest.raises(ValueError, match=r"vocab_size is 256.* need 257"):
            train_bpe(["aaaa"], "too small", vocab_size=256)

    def test_an_unbroken_run_neither_stalls_training_nor_becomes_a_token(self, documents):
        letters = np.random.default_rng(0).choice(np.frombuffer(b"acgt", dtype=np.uint8), 300_000).tobytes().decode()
        dna = train_bpe([*documents, letters, "a" * 300_000], "dna", vocab_size=20_000)
        assert max(len(dna.decode_bytes([i])) for i in range(dna.eot)) <= 256

    def test_half_a_surrogate_pair_does_not_stop_training(self):
        assert train_bpe(["a\ud800b"] * 3, "odd").encode("\ufffd") != []

    def test_an_error_while_reading_documents_is_the_callers(self):
        def broken():
            yield "text"
            raise RuntimeError("disk gone")

        with pytest.raises(RuntimeError, match="disk gone"):
            train_bpe(broken(), "never")


class TestFindingGPT2:
    @pytest.fixture(autouse=True)
    def no_ranks_anywhere(self, monkeypatch, tmp_path):
        """An empty cache, nothing in the environment, and a download address at which nobody listens."""
        for variable in (tokenizer.RANKS_VARIABLE, "DATA_GYM_CACHE_DIR"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "*")
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            monkeypatch.setattr(
                tokenizer, "RANKS_URL", f"http://127.0.0.1:{closed.getsockname()[1]}/r50k_base.tiktoken"
            )
            yield

    def test_every_place_tried_is_named_with_its_reason(self, tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            gpt2()
        lines = str(error.value).splitlines()
        assert lines[1:3] == ["  the argument ranks: not given", "  $NANOFORGE_GPT2_RANKS: not set"]
        for line, url in zip(lines[3:5], (tokenizer.RANKS_URL, tokenizer.MERGES_URL), strict=True):
            assert line.startswith(f"  {tmp_path / 'cache' / hashlib.sha1(url.encode()).hexdigest()}, ")
            assert line.endswith(": No such file or directory")
        assert lines[5] == f"  {tokenizer.RANKS_URL}: Connection refused"
        assert "NANOFORGE_GPT2_RANKS" in lines[6] and "train a BPE" in lines[7]

    def test_no_download_without_permission(self, monkeypatch):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.settimeout(0)
            monkeypatch.setattr(tokenizer, "RANKS_URL", f"http://127.0.0.1:{listening.getsockname()[1]}/ranks")
            monkeypatch.setattr(tokenizer, "DOWNLOAD_SECONDS", 0.5)
            with pytest.raises(FileNotFoundError, match="not tried, download is off"):
                gpt2(download=False)
            with pytest.raises(BlockingIOError):  # nobody is at the door
                listening.accept()

    def test_a_cache_that_is_switched_off_is_said_to_be(self, monkeypatch):
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
        with pytest.raises(FileNotFoundError, match="tiktoken's cache: switched off"):
            gpt2()

    def test_a_place_that_was_named_must_hold_the_ranks(self, monkeypatch, tmp_path):
        other = tmp_path / "other.tiktoken"
        other.write_bytes(b"IQ== 0\n")
        with pytest.raises(ValueError, match=r"gone \(the path given\) .*: No such file"):
            gpt2(tmp_path / "gone")
        with pytest.raises(ValueError, match=r"other.tiktoken \(the path given\) .*: the sha256 of its 7 bytes"):
            gpt2(other)
        monkeypatch.setenv(tokenizer.RANKS_VARIABLE, str(tmp_path / "gone"))
        with pytest.raises(ValueError, match=r"gone \(\$NANOFORGE_GPT2_RANKS\) .*: No such file"):
            gpt2()

    def test_an_empty_variable_is_an_unset_one(self, monkeypatch):
        monkeypatch.setenv(tokenizer.RANKS_VARIABLE, "")
        with pytest.raises(FileNotFoundError, match="NANOFORGE_GPT2_RANKS: not set"):
            gpt2()

    def test_a_server_that_never_answers_holds_up_neither_the_call_nor_the_exit(self):
        assert tokenizer.DOWNLOAD_SECONDS <= 5
        code = (
            "import sys, time, tokenizer\n"
            "tokenizer.RANKS_URL, tokenizer.DOWNLOAD_SECONDS = sys.argv[1], 0.5\n"
            "start = time.monotonic()\n"
            "try: tokenizer.gpt2()\n"
            "except FileNotFoundError as error:\n"
            "    print(time.monotonic() - start < 2, 'no answer within 0.5' in str(error))"
        )
        with socket.create_server(("127.0.0.1", 0)) as silent:
            assert run(code, f"http://127.0.0.1:{silent.getsockname()[1]}/r50k_base.tiktoken") == "True True"

    def test_a_download_of_something_else_is_refused_and_not_kept(self, monkeypatch, tmp_path):
        with serving(b"<html>please log in to this network</html>") as url:
            monkeypatch.setattr(tokenizer, "RANKS_URL", url)
            with pytest.raises(FileNotFoundError, match=f"{url}: Hash mismatch"):
                gpt2()
        assert not (tmp_path / "cache").exists()

    def test_a_download_is_kept_for_the_next_time(self, real_gpt2, monkeypatch):
        with serving(ranks_file(real_gpt2)) as url:
            monkeypatch.setattr(tokenizer, "RANKS_URL", url)
            assert gpt2().fingerprint == real_gpt2.fingerprint
        assert gpt2(download=False).fingerprint == real_gpt2.fingerprint

    def test_what_tiktokens_own_gpt2_leaves_in_the_cache_is_found(self, real_gpt2, monkeypatch, tmp_path):
        monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
        monkeypatch.setenv("DATA_GYM_CACHE_DIR", str(tmp_path))
        merges = json.loads(real_gpt2.to_json())["model"]["merges"]
        cached = tmp_path / hashlib.sha1(tokenizer.MERGES_URL.encode()).hexdigest()
        cached.write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        assert gpt2(download=False).fingerprint == real_gpt2.fingerprint

    def test_argument_and_variable_give_gpt2(self, real_gpt2, monkeypatch, tmp_path):
        path = tmp_path / "ranks"
        path.write_bytes(ranks_file(real_gpt2))
        assert gpt2(str(path)).fingerprint == real_gpt2.fingerprint
        monkeypatch.setenv(tokenizer.RANKS_VARIABLE, str(path))
        assert gpt2().fingerprint == real_gpt2.fingerprint


def run(code: str, *arguments, **options) -> str:
    """What `code` prints in a fresh interpreter, within 30 seconds."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    root = Path(tokenizer.__file__).parent
    return subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=30, check=True, **options
    ).stdout.strip()


def ranks_file(gpt2_tokenizer: Tokenizer) -> bytes:
    tokens = (gpt2_tokenizer.decode_bytes([i]) for i in range(gpt2_tokenizer.eot))
    return b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens))


@contextlib.contextmanager
def serving(content: bytes):
    """The address of a local web server that answers everything with `content`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/r50k_base.tiktoken"
        server.shutdown()
