"""export.py: llama.cpp and Transformers read the GGUF file to the same logits, and its tokenizer to the same ids."""

import errno
import json
import os
import shutil

import pytest
import torch
import xllamacpp
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

import export
import files
from checkpoint import CheckpointManager
from model import GPT, GPTConfig
from tokenizer import Tokenizer

# 1,024, because Transformers reads no other context of a GPT-2 from a GGUF file
SIZES = {"block_size": 1024, "vocab_size": 330, "n_layer": 2, "n_head": 4, "n_embd": 32, "tie_word_embeddings": False}
LLAMA = {
    **SIZES,
    "bias": False,
    "block": "llama",
    "activation": "silu",
    "n_inner": 48,
    "n_kv_head": 2,
    "norm_eps": 1e-6,
}
MODELS = {
    "gpt2": {**SIZES, "activation": "gelu_tanh"},
    "gpt2 without biases": {**SIZES, "activation": "gelu_tanh", "bias": False},
    "gpt2 tied": {**SIZES, "activation": "gelu_tanh", "tie_word_embeddings": True},
    "llama": LLAMA,
    "llama tied, another head size": {**LLAMA, "head_size": 16, "tie_word_embeddings": True, "rope_theta": 5e5},
    "qwen2": {**LLAMA, "qkv_bias": True},
    "qwen3": {**LLAMA, "qk_norm": True, "head_size": 128},  # the only head size that Transformers reads a GGUF with
}


def saved(directory, dataset, **changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    texts = {"tokenizer.json": (dataset / "tokenizer.json").read_bytes()}
    metadata = {"config": {}, "iter_num": 1, "best_val_loss": 1.0}
    CheckpointManager.save_checkpoint(model, directory, metadata, texts=texts)
    return model.eval()


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_reads_the_file_to_the_same_logits(kind, dataset, tmp_path, script):
    model = saved(tmp_path / "model", dataset, **MODELS[kind])
    done = script("export.py", tmp_path / "model", "--to", "gguf", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "read back, the same" in done.stdout and list(tmp_path.glob("*.gguf")) == [tmp_path / "model.gguf"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    x = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, model(x, x)[0], atol=1e-4, rtol=1e-4)


def test_the_tokenizer_in_it_gives_the_same_ids_and_the_rows_without_a_token_are_named(dataset, tmp_path):
    saved(tmp_path / "model", dataset, **MODELS["gpt2"])
    export.to_gguf(tmp_path / "model", tmp_path / "m.gguf")
    ours, reader = Tokenizer.load(dataset / "tokenizer.json"), GGUFReader(tmp_path / "m.gguf")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 330 and tokens[ours.eot] == "<|endoftext|>" and tokens[-1] == "[PAD329]"
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == ours.eot
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("the gradient shows zero 3.", "Größe π\n\n  x² 🙂", "I'll  we've"):
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_reads_it_to_the_same_probabilities_of_the_same_text(kind, dtype, dataset, tmp_path):
    model, text = saved(tmp_path / "model", dataset, **MODELS[kind]), "the gradient shows  3.14\n\nGröße π x²"
    export.to_gguf(tmp_path / "model", tmp_path / "m.gguf", dtype)
    ids = Tokenizer.load(dataset / "tokenizer.json").encode(text)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0][0, -1].log_softmax(dim=0)
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.verbosity = str(tmp_path / "m.gguf"), 64, 1, -1
    server = xllamacpp.Server(settings)
    # It tells the probabilities beside a token that is a character: here an "a", and of all tokens before that rule.
    asked = {"n_predict": 1, "n_probs": 330, "temperature": 0, "grammar": 'root ::= "a"'}
    for prompt in (text, ids):
        answer = server.handle_completions({"prompt": prompt, **asked})
        assert answer["usage"]["prompt_tokens"] == len(ids)
        (drawn,) = answer["choices"][0]["logprobs"]["content"]
        found = torch.full((330,), float("nan"))
        for entry in drawn["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        # It keeps keys and values in float16, and quantises what a bfloat16 weight is multiplied by.
        torch.testing.assert_close(found, expected, atol=5e-3 if dtype == "float32" else 0.1, rtol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_matrices_are_rounded_and_vectors_are_not(dtype, dataset, tmp_path):
    model = saved(tmp_path / "model", dataset, **MODELS["llama"])
    export.to_gguf(tmp_path / "model", tmp_path / "m.gguf", dtype)
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert found["output_norm.weight"].tensor_type.name == "F32"
    weight = found["blk.0.ffn_down.weight"]
    assert weight.tensor_type.name == {"float16": "F16", "bfloat16": "BF16"}[dtype]
    expected = model.model.layers[0].mlp.down_proj.weight.detach().to(getattr(torch, dtype))
    bits = torch.from_numpy(weight.data.copy().view("int16").reshape(expected.shape))
    assert torch.equal(bits, expected.view(torch.int16))


def test_a_whole_number_as_rope_factor_is_written_as_the_format_wants_it(dataset, tmp_path):
    saved(tmp_path / "model", dataset, **LLAMA, rope_scaling={"rope_type": "linear", "factor": 2})
    export.to_gguf(tmp_path / "model", tmp_path / "m.gguf")
    factor = GGUFReader(tmp_path / "m.gguf").fields["llama.rope.scaling.factor"]
    assert factor.types[-1].name == "FLOAT32" and factor.contents() == 2.0


def test_a_family_changes_no_number_and_nothing_here():
    assert export.layout_of(GPTConfig(**LLAMA, family="mistral")).name == "llama"


def test_an_adapter_is_merged_on_the_way(dataset, tmp_path):
    import lora

    saved(tmp_path / "base", dataset, **MODELS["gpt2"])
    model, _ = CheckpointManager.load_model(tmp_path / "base", apply_lora=True)
    with torch.no_grad():
        for tensor in lora.lora_state_dict(model).values():
            tensor.normal_()
    reference = CheckpointManager.base_reference(tmp_path / "base", tmp_path / "lora")
    metadata = {"config": {}, "iter_num": 1, "best_val_loss": 1.0, "base": reference}
    texts = {"tokenizer.json": (dataset / "tokenizer.json").read_bytes()}
    CheckpointManager.save_checkpoint(model, tmp_path / "lora", metadata, texts=texts)
    export.to_gguf(tmp_path / "lora", tmp_path / "m.gguf")
    lora.merge_lora(model)
    found = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    weight = torch.from_numpy(found["blk.1.attn_qkv.weight"].copy())
    torch.testing.assert_close(weight, model.transformer.h[1].attn.c_attn.weight.detach(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({**LLAMA, "logit_softcap": 30.0, "post_norms": True}, "does not hold logit_softcap, post_norms"),
        ({**LLAMA, "activation": "gelu_tanh"}, "activation=gelu_tanh"),
        ({**LLAMA, "sliding_window": 8}, "sliding_window"),
        ({**LLAMA, "qkv_bias": True, "head_size": 16}, "4 heads of 16 in a width of 32"),
        ({"activation": "silu"}, "activation=silu"),
    ],
)
def test_what_the_format_does_not_hold_is_refused_and_nothing_is_written(changes, words, dataset, tmp_path, script):
    saved(tmp_path / "model", dataset, **changes)
    done = script("export.py", tmp_path / "model", "--to", "gguf", cwd=tmp_path)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_a_file_that_is_not_what_it_should_be_is_noticed_and_the_old_one_stays(dataset, tmp_path, monkeypatch):
    saved(tmp_path / "model", dataset, **MODELS["gpt2"])
    out = tmp_path / "m.gguf"
    out.write_bytes(b"old")
    written = export.write

    def spoilt(gguf, path, *arguments):
        written(gguf, path, *arguments)
        with open(path, "rb+") as file:
            file.seek(-8, os.SEEK_END)
            file.write(b"\x01")

    monkeypatch.setattr(export, "write", spoilt)
    with pytest.raises(ValueError, match="was not written as it should be"):
        export.to_gguf(tmp_path / "model", out)
    assert out.read_bytes() == b"old" and sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "model"]


def test_a_disk_that_nobody_may_write_to_is_one_sentence(dataset, tmp_path, monkeypatch):
    def refuse(*_, **__):  # such a disk refuses to remove even what is not there
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    saved(tmp_path / "model", dataset, **MODELS["gpt2"])
    monkeypatch.setattr(export, "write", refuse)
    monkeypatch.setattr(type(tmp_path), "unlink", refuse)
    with pytest.raises(files.SaveError, match=r"cannot write .*m\.gguf: Read-only file system"):
        export.to_gguf(tmp_path / "model", tmp_path / "m.gguf")


def test_bad_input_is_one_sentence(dataset, tmp_path, script):
    saved(tmp_path / "model", dataset, **MODELS["gpt2"])
    for arguments, words in (
        ((tmp_path / "nowhere", "--to", "gguf"), "there is no model directory"),
        ((tmp_path / "model", "--to", "gguf", "--out", tmp_path), "is a folder"),
    ):
        done = script("export.py", *arguments, cwd=tmp_path)
        assert done.returncode == 1 and words in done.stderr and len(done.stderr.splitlines()) == 1
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "nano").mkdir()
    model = GPT(GPTConfig(**SIZES))
    torch.save(
        {"model": model.state_dict(), "model_args": json.loads(json.dumps(vars(model.config)))},
        tmp_path / "nano" / "ckpt.pt",
    )
    done = script("export.py", tmp_path / "nano", "--to", "gguf", cwd=tmp_path)
    assert done.returncode == 1 and "has no tokenizer.json" in done.stderr
