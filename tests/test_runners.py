"""registry/loading.py, runners.py and sentences.py, against Transformers called directly on tiny random models.

The models are saved to disk with tokenizers made here, and found there: no network, no download.
"""

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_families import randomise, theirs
from test_hf_directory import gpt, save
from test_lora import trained
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

import lora
from checkpoint import CheckpointManager
from model import GPT
from registry import ModelSpec, loading, register_spec, unregister_spec
from registry.runners import DecoderModelRunner, EncoderModelRunner, Seq2SeqModelRunner, load_model
from tokenizer import train_bpe

TEXTS = ["He deposited the check at the bank.", "The bank", "the river and the bank of the river"]
WORDS = sorted({word for text in TEXTS for word in text.replace(".", " .").split()})
V = 61
ENCODER = {"vocab_size": V, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
ENCODER |= {"intermediate_size": 40, "max_position_embeddings": 32, "attention_probs_dropout_prob": 0.1}
T5 = {"vocab_size": V, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 3}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2, "tie_word_embeddings": False}
NEOX = {"vocab_size": V, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
NEOX |= {"max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None}
NEO = {"vocab_size": V, "hidden_size": 24, "num_layers": 2, "num_heads": 3, "max_position_embeddings": 64}
NEO |= {"attention_types": [[["global", "local"], 1]], "bos_token_id": None, "eos_token_id": None}
BART = {"vocab_size": V, "d_model": 24, "encoder_layers": 1, "decoder_layers": 2, "max_position_embeddings": 32}
BART |= {"encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
BART |= {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 2, "decoder_start_token_id": 3}
RWKV = {"vocab_size": V, "hidden_size": 24, "num_hidden_layers": 2, "context_length": 32}
ALL = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>", "cls_token": "<s>", "mask_token": "<mask>"}


def write_tokenizer(folder: Path, template: str = "$A", **special: str) -> PreTrainedTokenizerFast:
    """One id for a word: 0 pads, 1 is unknown, 2 ends, 3 begins, 4 is masked, 5 and on are words."""
    tokens = [*ALL.values(), *WORDS]
    library = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", 2), ("<s>", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write(folder: Path, model: transformers.PreTrainedModel, template: str = "<s> $A </s>", **special: str) -> Path:
    model.save_pretrained(folder)
    write_tokenizer(folder, template, **(special or ALL))
    return folder


def random(kind: str, settings: dict, head: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}{head}")(config).eval()
    randomise(model)
    return model


MADE = {  # name: how it is made, how its texts begin and end, whether our GPT computes it
    "bert": (lambda: random("Bert", ENCODER, "ForMaskedLM"), "<s> $A </s>", False),
    "headless bert": (lambda: random("Bert", ENCODER, "Model"), "<s> $A </s>", False),
    "xlm-r": (lambda: random("XLMRoberta", ENCODER | {"pad_token_id": 0}, "ForMaskedLM"), "<s> $A </s>", False),
    "mt5": (lambda: random("MT5", T5, "ForConditionalGeneration"), "$A </s>", False),
    "llama": (lambda: theirs("llama 2"), "<s> $A", True),
    "gpt2": (lambda: theirs("gpt2"), "$A", True),
    "gemma3": (lambda: theirs("gemma3"), "<s> $A", True),
    "qwen3": (lambda: theirs("qwen3"), "$A", True),
    "gpt-neox": (lambda: random("GPTNeoX", NEOX, "ForCausalLM"), "$A", False),
    "gpt-neo": (lambda: random("GPTNeo", NEO, "ForCausalLM"), "$A", False),  # it counts positions absolutely
}
ENCODERS, DECODERS = ("bert", "headless bert", "xlm-r"), ("llama", "gpt2", "gemma3", "qwen3", "gpt-neox", "gpt-neo")


@pytest.fixture(scope="module")
def models_of(tmp_path_factory):
    """By name, (Transformers' model, its folder), made once."""
    made = {}

    def model(name: str) -> tuple[transformers.PreTrainedModel, Path]:
        if name not in made:
            reference, template, _ = MADE[name]
            reference = reference()
            made[name] = reference, write(tmp_path_factory.mktemp("model"), reference, template)
        return made[name]

    return model


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def all_close(found, expected, real=None):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        close(*((a, b) if real is None else (a[real], b[real])))


# ---- what every architecture gives


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_gives_transformers_numbers(models_of, name):
    reference, folder = models_of(name)
    runner = load_model(folder, capture_attentions=True)
    batch = runner.tokenize(TEXTS)
    found = runner.forward(batch)
    with torch.no_grad():
        expected = reference(**batch, output_hidden_states=True, output_attentions=True)
    assert isinstance(runner, EncoderModelRunner) and runner.model.config.output_hidden_states
    assert found.input_ids.shape == found.attention_mask.shape == (3, 10) and found.attention_mask.sum() == 10 + 4 + 10
    all_close(found.encoder_hidden_states, expected.hidden_states)
    assert len(found.encoder_hidden_states) == 3 and found.decoder_hidden_states is None
    all_close(found.extra["attentions"], expected.attentions)
    if name == "headless bert":
        assert found.logits is None
        close(found.extra["pooler_output"], expected.pooler_output)
    else:
        close(found.logits, expected.logits)
        assert "pooler_output" not in found.extra


@pytest.mark.parametrize(
    ("kind", "settings", "head"),
    [("Bert", ENCODER, "ForMaskedLM"), ("Bert", ENCODER, "Model"), ("Bart", BART, "ForConditionalGeneration")],
)
def test_an_encoders_padding_may_be_on_the_left(tmp_path, kind, settings, head):
    folder = write(tmp_path, random(kind, settings, head))
    left, right = (
        load_model(folder, capture_attentions=True, tokenizer_kwargs={"padding_side": side})
        for side in ("left", "right")
    )
    batch = left.tokenize(TEXTS)
    found, real, prefix = left.forward(batch), batch["attention_mask"].bool(), "encoder_" * (kind == "Bart")
    assert not real[1, 0] and torch.equal(found.input_ids, batch["input_ids"])
    for row, text in enumerate(TEXTS):
        alone = right.forward(right.tokenize(text))
        all_close([x[row][real[row]] for x in found.encoder_hidden_states], [x[0] for x in alone.encoder_hidden_states])
        weights = [x[row][:, real[row]][:, :, real[row]] for x in found.extra[f"{prefix}attentions"]]
        all_close(weights, [x[0] for x in alone.extra[f"{prefix}attentions"]])
        if kind == "Bart":
            close(found.logits[row], alone.logits[0])
            crossed = [x[row][:, :, real[row]] for x in found.extra["cross_attentions"]]
            all_close(crossed, [x[0] for x in alone.extra["cross_attentions"]])
        elif head == "Model":
            close(found.extra["pooler_output"][row], alone.extra["pooler_output"][0])
        else:
            close(found.logits[row][real[row]], alone.logits[0])
    close(left.embed(TEXTS), right.embed(TEXTS))
    for mask in ([1, 0, 1, 1], [0, 1, 1, 1]):  # a token of the text that is masked keeps its place
        masked = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.tensor([mask])}
        with torch.no_grad():
            states = left.model(**masked, output_hidden_states=True)
        expected = states.encoder_hidden_states if kind == "Bart" else states.hidden_states
        all_close(left.forward(masked).encoder_hidden_states, expected)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_gives_transformers_numbers_wherever_the_padding_is(models_of, name, side):
    reference, folder = models_of(name)
    runner = load_model(str(folder), capture_attentions=True, tokenizer_kwargs={"padding_side": side})
    assert isinstance(runner, DecoderModelRunner) and isinstance(runner.model, GPT) == MADE[name][2]
    batch = runner.tokenize(TEXTS)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert mask[1, 0 if side == "right" else -1] == 1 and mask[1].sum() < mask.size(1)
    found = runner.forward(batch)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = reference(
            ids, attention_mask=mask, position_ids=positions, output_hidden_states=True, output_attentions=True
        )
    real = mask.bool()
    close(found.logits[real], expected.logits[real])
    all_close(found.decoder_hidden_states, expected.hidden_states, real)
    assert len(found.decoder_hidden_states) == reference.config.num_hidden_layers + 1
    assert found.encoder_hidden_states is None
    for weights, theirs_ in zip(found.extra["attentions"], expected.attentions, strict=True):
        close(weights.transpose(1, 2)[real], theirs_.transpose(1, 2)[real])
    alone = runner.forward(runner.tokenize(TEXTS[1]))
    close(alone.logits[0], found.logits[1][real[1]])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("Roberta", ENCODER | {"pad_token_id": 0, "is_decoder": True}), ("Bart", BART), ("Rwkv", RWKV)],
)
def test_a_decoder_that_counts_otherwise_or_takes_no_positions_gives_what_each_text_does_alone(
    tmp_path, side, kind, settings
):
    reference = random(kind, settings, "ForCausalLM")
    weighs = kind != "Rwkv"
    folder = write(tmp_path, reference)
    runner = load_model(folder, capture_attentions=weighs, tokenizer_kwargs={"padding_side": side})
    assert isinstance(runner, DecoderModelRunner)
    batch = runner.tokenize(TEXTS)
    found, short = runner.forward(batch), runner.forward(batch, layers=[-1], logits=False)
    assert torch.equal(found.input_ids, batch["input_ids"])
    assert torch.equal(found.attention_mask, batch["attention_mask"])
    for row, text in enumerate(TEXTS):
        real = batch["attention_mask"][row].bool()
        with torch.no_grad():
            alone = reference(
                runner.tokenize(text)["input_ids"], output_hidden_states=True, output_attentions=weighs, use_cache=False
            )
        close(found.logits[row][real], alone.logits[0])
        all_close([x[row][real] for x in found.decoder_hidden_states], [x[0] for x in alone.hidden_states])
        close(short.decoder_hidden_states[0][row][real], alone.hidden_states[-1][0])
        if weighs:
            weights = [x[row][:, real][:, :, real] for x in found.extra["attentions"]]
            all_close(weights, [x[0] for x in alone.attentions])


def test_types_of_tokens_go_to_the_models_that_take_them_and_others_refuse_all_but_zeros(models_of, tmp_path):
    ids, types = torch.tensor([[0, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1]])
    mask = (ids != 0).long()
    xlnet = {"vocab_size": V, "d_model": 24, "n_layer": 2, "n_head": 3, "d_inner": 40}
    made = {"bert": random("Bert", ENCODER | {"is_decoder": True}, "LMHeadModel")}
    made["xlnet"] = random("XLNet", xlnet, "LMHeadModel")
    for name, reference in made.items():
        runner = load_model(write(tmp_path / name, reference))
        assert isinstance(runner, DecoderModelRunner)
        found = runner.forward({"input_ids": ids, "attention_mask": mask, "token_type_ids": types})
        with torch.no_grad():
            expected = reference(ids[:, 1:], token_type_ids=types[:, 1:]).logits
        close(found.logits[:, 1:], expected)
    write(tmp_path / "distil", random("DistilBert", {"vocab_size": V, "dim": 24, "n_heads": 3}, "ForMaskedLM"))
    for folder in (models_of("llama")[1], models_of("mt5")[1], tmp_path / "distil"):
        runner = load_model(folder)
        plain = runner.forward({"input_ids": ids})
        assert torch.equal(runner.forward({"input_ids": ids, "token_type_ids": 0 * ids}).logits, plain.logits)
        with pytest.raises(ValueError, match=r"takes no token_type_ids; tokenize\(..., return_token_type_ids=False\)"):
            runner.forward({"input_ids": ids, "token_type_ids": types})


def test_zeros_for_types_of_tokens_are_what_no_types_are(tmp_path):
    reference = random("GPTNeo", NEO, "ForCausalLM")  # it adds the embedding of id 0 for them
    ids = torch.tensor([[5, 6, 7]])
    found = load_model(write(tmp_path, reference)).forward({"input_ids": ids, "token_type_ids": 0 * ids})
    with torch.no_grad():
        close(found.logits, reference(ids).logits)


def test_seq2seq_gives_both_stacks_and_all_three_attentions(models_of):
    reference, folder = models_of("mt5")
    runner = load_model(folder, capture_attentions=True)
    assert isinstance(runner, Seq2SeqModelRunner)
    batch = runner.tokenize(TEXTS, text_target=["the river", "The bank of", "He"])
    assert batch["labels"].shape == (3, 4)
    found = runner.forward(batch)
    shifted = torch.cat([torch.zeros(3, 1, dtype=torch.long), batch["labels"][:, :-1]], dim=1)
    assert torch.equal(found.extra["decoder_input_ids"], shifted)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        expected = reference(**inputs, decoder_input_ids=shifted, output_hidden_states=True, output_attentions=True)
    close(found.logits, expected.logits)
    all_close(found.encoder_hidden_states, expected.encoder_hidden_states)
    all_close(found.decoder_hidden_states, expected.decoder_hidden_states)
    assert (len(found.encoder_hidden_states), len(found.decoder_hidden_states)) == (3, 4)
    for key in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        all_close(found.extra[key], expected[key])
    assert found.extra["cross_attentions"][0].shape == (3, 3, 4, batch["input_ids"].size(1))

    masked = dict(batch, labels=batch["labels"].masked_fill(batch["labels"] == 0, -100))
    close(runner.forward(masked).logits, found.logits)
    close(runner.forward({**inputs, "targets": batch["labels"]}).logits, found.logits)
    close(runner.forward({**inputs, "decoder_input_ids": shifted}).logits, found.logits)
    with pytest.raises(ValueError, match="one of decoder_input_ids, labels: each says"):
        runner.forward({**inputs, "decoder_input_ids": shifted, "labels": shifted})
    with pytest.raises(ValueError, match=r"labels is \(2, 4\) where input_ids are \(3, 9\)"):
        runner.forward({**inputs, "labels": shifted[:2]})
    assert runner.tokenize("The bank", text_target="the river")["labels"].shape == (1, 3)
    assert runner.forward(runner.tokenize([], text_target=[])).logits.shape == (0, 0, V)
    start = runner.forward(inputs)
    assert start.logits.shape == (3, 1, V) and start.extra["decoder_input_ids"].tolist() == [[0]] * 3
    close(start.logits, found.logits[:, :1])


SEQ2SEQ = {"T5": (T5, "ForConditionalGeneration"), "Marian": (BART, "MTModel")}
SEQ2SEQ |= {kind: (BART, "ForConditionalGeneration") for kind in ("Bart", "MBart", "PLBart", "M2M100", "Pegasus")}


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_labels_are_shifted_as_each_models_own_loss_does_it(tmp_path, kind):
    folder = write(tmp_path, random(kind, *SEQ2SEQ[kind]))
    reference = getattr(transformers, kind + SEQ2SEQ[kind][1]).from_pretrained(folder)  # Marian's positions are unsaved
    runner = load_model(folder)
    batch = runner.tokenize(TEXTS)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for nothing in (0, -100):
        labels = torch.tensor(
            [[7, 8, 2, 11], [9, 2, 12, nothing], [10, 13, nothing, nothing]]
        )  # a language's code ends
        given = labels.clone()
        found = runner.forward({"input_ids": ids, "attention_mask": mask, "labels": given})
        assert torch.equal(given, labels)
        with torch.no_grad():
            close(found.logits, reference(ids, attention_mask=mask, labels=labels).logits)
    starts = found.extra["decoder_input_ids"][:, 0].tolist()
    assert starts == ([11, 12, 13] if kind in ("MBart", "PLBart") else [reference.config.decoder_start_token_id] * 3)
    if kind == "MBart":
        with pytest.raises(ValueError, match=r"MBart.* starts from a text's last label, and one of 3 has none"):
            runner.forward({"input_ids": ids, "labels": 0 * labels})


def test_a_decoder_whose_start_nobody_names_starts_from_the_first_token_that_is_named(tmp_path):
    reference = random("T5", {key: x for key, x in T5.items() if key != "decoder_start_token_id"}, SEQ2SEQ["T5"][1])
    found = load_model(write(tmp_path, reference)).forward(
        {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[7, 8]])}
    )
    assert found.extra["decoder_input_ids"].tolist() == [[0, 7]]


def test_states_of_what_a_model_fills_up_inside_are_left_out(tmp_path):
    bird = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 128}
    reformer = {"vocab_size": V, "hidden_size": 24, "num_attention_heads": 3, "attention_head_size": 8}
    reformer |= {"attn_layers": ["local", "local"], "local_attn_chunk_length": 4, "max_position_embeddings": 128}
    reformer |= {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [8, 16], "is_decoder": True, "pad_token_id": 0}
    made = {"bird": random("BigBird", ENCODER | bird, "ForMaskedLM")}
    made["reformer"] = random("Reformer", reformer, "ModelWithLMHead")
    ids = torch.randint(5, V, (2, 71))
    for name, reference in made.items():
        found = load_model(write(tmp_path / name, reference)).forward({"input_ids": ids})
        with torch.no_grad():
            expected = reference(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        assert expected.hidden_states[1].size(1) > 71
        all_close(found.encoder_hidden_states, [state[:, :71] for state in expected.hidden_states])
        close(found.logits, expected.logits)


def test_a_model_without_one_state_for_each_token_is_refused(tmp_path):
    pegasus = load_model(write(tmp_path / "pegasus", random("PegasusX", BART, "ForConditionalGeneration")))
    ids = torch.tensor([[5, 6, 7]])
    assert pegasus.forward({"input_ids": ids}, layers=[0]).encoder_hidden_states[0].shape == (1, 3, 24)
    funnel = {"vocab_size": V, "block_sizes": [1, 1], "d_model": 24, "n_head": 3, "d_head": 8, "d_inner": 40}
    shrinking = load_model(write(tmp_path / "funnel", random("Funnel", funnel | {"num_decoder_layers": 1}, "Model")))
    for runner, layer in ((pegasus, 1), (shrinking, 2)):
        name = type(runner.model).__name__
        with pytest.raises(ValueError, match=f"{name} has no vector for each of 3 tokens in hidden state {layer}"):
            runner.forward({"input_ids": ids})
    latent = {"vocab_size": V, "d_model": 24, "num_latents": 12, "d_latents": 24, "num_self_attends_per_block": 1}
    latent |= {"num_self_attention_heads": 3, "num_cross_attention_heads": 3, "max_position_embeddings": 32}
    perceiver = write(tmp_path / "perceiver", random("Perceiver", latent, "ForMaskedLM"))
    with pytest.raises(ValueError, match="PerceiverForMaskedLM has no embedding of tokens"):
        load_model(perceiver)


def test_attentions_are_left_out_unless_they_are_asked_for(models_of):
    for name in ("bert", "llama", "gpt-neox"):
        assert load_model(models_of(name)[1]).forward({"input_ids": torch.tensor([[5, 6]])}).extra == {}


# ---- heads


def test_a_head_that_is_named_but_not_in_the_file_is_not_made_up(models_of, tmp_path):
    _, folder = models_of("headless bert")
    write(tmp_path, random("Bert", ENCODER, "Model"))
    described = json.loads((folder / "config.json").read_text())
    for named in (["BertForMaskedLM"], None):
        (tmp_path / "config.json").write_text(json.dumps(described | {"architectures": named}))
        first, second = (load_model(tmp_path).forward({"input_ids": torch.tensor([[5, 6]])}) for _ in range(2))
        assert first.logits is None and "pooler_output" in first.extra
        all_close(first.encoder_hidden_states, second.encoder_hidden_states)


def test_a_head_that_is_in_the_file_is_found_though_no_class_is_named(models_of, tmp_path):
    reference, folder = models_of("bert")
    write(tmp_path, reference)
    described = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"architectures": None}))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        close(load_model(tmp_path).forward({"input_ids": ids}).logits, reference(ids).logits)


def test_a_pooler_that_is_not_in_the_file_is_not_made_up_either(tmp_path):
    write(tmp_path, random("Bert", ENCODER, "ForMaskedLM").bert)  # a body that was made without a pooler
    found = load_model(tmp_path).forward({"input_ids": torch.tensor([[5, 6]])})
    assert found.extra == {} and found.logits is None


def test_decoders_without_a_head_have_states_but_no_logits(tmp_path):
    bodies = {"llama": theirs("llama 2").model, "gpt-neox": random("GPTNeoX", NEOX, "Model")}
    bodies["mt5"] = random("MT5", T5, "Model")
    for name, body in bodies.items():
        found = load_model(write(tmp_path / name, body)).forward({"input_ids": torch.tensor([[5, 6]])})
        assert found.logits is None and len(found.decoder_hidden_states) == 4 - (name == "gpt-neox")


def test_other_heads_are_the_checkpoints_own(tmp_path):
    reference = random("Bert", ENCODER | {"num_labels": 5}, "ForSequenceClassification")
    ids = torch.tensor([[5, 6]])
    found = load_model(write(tmp_path, reference)).forward({"input_ids": ids})
    with torch.no_grad():
        close(found.logits, reference(ids).logits)


def test_a_model_saved_with_all_heads_of_its_pretraining_gives_the_language_models(tmp_path):
    reference = random("Bert", ENCODER, "ForPreTraining")
    ids = torch.tensor([[5, 6]])
    with torch.no_grad():
        expected = reference(ids).prediction_logits
    close(load_model(write(tmp_path, reference)).forward({"input_ids": ids}).logits, expected)


def test_a_file_that_lacks_a_layer_is_refused(models_of, tmp_path):
    for name in ("bert", "gpt-neox"):
        reference, _ = models_of(name)
        folder = write(tmp_path / name, reference)
        tensors = load_file(folder / "model.safetensors")
        kept = {key: x for key, x in tensors.items() if ".1." not in key}
        assert len(kept) < len(tensors)
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"lacks \d+ tensors of the model that its config.json describes"):
            load_model(folder)


# ---- tokens


@pytest.mark.parametrize("name", ["bert", "xlm-r", "mt5", "llama", "gpt2", "gpt-neox"])
def test_one_string_is_one_text_and_no_text_is_an_empty_batch(models_of, name):
    runner = load_model(models_of(name)[1], capture_attentions=True)
    batch = runner.tokenize(TEXTS[0])
    assert batch["input_ids"].shape[0] == 1 and batch["input_ids"].dtype == torch.long
    assert torch.equal(batch["input_ids"], runner.tokenize(iter(TEXTS[:1]))["input_ids"])
    full, empty = runner.forward(batch), runner.forward(runner.tokenize([]))
    assert empty.input_ids.shape == empty.attention_mask.shape == (0, 0) and empty.input_ids.dtype == torch.long
    assert empty.logits.shape == (0, 0, V) and empty.logits.dtype == full.logits.dtype
    for stack in ("encoder_hidden_states", "decoder_hidden_states"):
        shapes = [tuple(x.shape) for x in getattr(empty, stack) or ()]
        assert shapes == [(0, 0, 24)] * len(getattr(full, stack) or ())
    assert empty.extra.keys() == full.extra.keys()
    assert all(x.shape == (0, 3, 0, 0) for key in empty.extra if "attentions" in key for x in empty.extra[key])
    assert list(runner.iterate([])) == []


def test_a_text_without_tokens_is_a_row_of_padding(models_of):
    for name in ("gpt2", "gpt-neox"):
        runner = load_model(models_of(name)[1])
        for texts in ([""], ["", "the bank"]):
            batch = runner.tokenize(texts)
            assert batch["attention_mask"][0].sum() == 0 and batch["input_ids"].dtype == torch.long
            found = runner.forward(batch)
            assert all(state.isfinite().all() for state in found.decoder_hidden_states)
            assert runner.embed(texts)[0].abs().max() == 0


def test_options_of_a_call_come_before_those_of_the_runner(models_of):
    runner = load_model(models_of("bert")[1], tokenizer_kwargs={"max_length": 5, "padding_side": "left"})
    assert runner.tokenize(TEXTS)["input_ids"].shape == (3, 5)
    assert runner.tokenize(TEXTS)["input_ids"][1, 0] == 0
    assert runner.tokenize(TEXTS, max_length=7)["input_ids"].shape == (3, 7)
    assert runner.tokenize(TEXTS, truncation=False, max_length=None)["input_ids"].shape == (3, 10)
    assert runner.tokenize(TEXTS[1], padding="max_length", max_length=9)["input_ids"].shape == (1, 9)
    assert [len(ids) for ids in runner.tokenize(TEXTS, padding=False, return_tensors=None)["input_ids"]] == [5, 4, 5]
    with pytest.raises(ValueError, match="tokenize has no option maxlength"):
        runner.tokenize(TEXTS, maxlength=3)
    with pytest.raises(ValueError, match=r"text 1 is a int, not a string \(of 2 texts\)"):
        runner.tokenize(["the", 3])


def test_options_of_a_recipe_give_way_to_those_of_the_call(models_of):
    _, folder = models_of("bert")
    register_spec(
        ModelSpec("narrow", "lab/narrow", dtype="auto", tokenizer_kwargs={"max_length": 4, "pad_token": "<unk>"})
    )
    try:
        recipe = load_model("narrow", local_path=folder)
        both = load_model("narrow", local_path=folder, tokenizer_kwargs={"max_length": 6})
    finally:
        unregister_spec("narrow")
    assert recipe.tokenize(TEXTS)["input_ids"].shape == (3, 4) and both.tokenize(TEXTS)["input_ids"].shape == (3, 6)
    assert recipe.tokenizer.pad_token == both.tokenizer.pad_token == "<unk>"


def test_offsets_and_words_come_with_a_batch_that_forward_takes(models_of):
    runner = load_model(models_of("bert")[1])
    batch = runner.tokenize(TEXTS, return_offsets_mapping=True, return_special_tokens_mask=True)
    start, end = batch["offset_mapping"][0, 2].tolist()
    assert TEXTS[0][start:end] == "deposited"
    assert batch.word_ids(1) == [None, 0, 1, None, *[None] * 6]
    close(runner.forward(batch).logits, runner.forward(runner.tokenize(TEXTS)).logits)
    assert load_model(models_of("mt5")[1]).tokenize(TEXTS, return_offsets_mapping=True)["offset_mapping"].size(2) == 2


def test_texts_are_cut_to_what_the_model_takes(models_of):
    long = " ".join(["bank"] * 100)
    for name, most in {"bert": 32, "xlm-r": 31, "llama": 64, "gpt2": 64, "gpt-neox": 64}.items():
        runner = load_model(models_of(name)[1])
        batch = runner.tokenize([long])
        assert batch["input_ids"].size(1) == most
        runner.forward(batch)
        with pytest.raises(ValueError, match=f"10\\d tokens are more than the {most} that the model takes"):
            runner.forward(runner.tokenize([long], truncation=False))
    runner = load_model(models_of("mt5")[1])  # relative positions: there is no limit
    assert runner.forward(runner.tokenize([long])).encoder_hidden_states[0].size(1) == 101


@pytest.mark.parametrize(
    "special",
    [{"eos_token": "</s>"}, {"unk_token": "<unk>"}, {"bos_token": "<s>"}, {"eos_token": "</s>", "pad_token": "<far>"}],
)
def test_a_tokenizer_without_a_padding_token_pads_with_another_one_masked(models_of, tmp_path, special):
    reference, _ = models_of("llama")
    folder = write(tmp_path, reference, "<s> $A </s>", **{k: v for k, v in special.items() if v != "<far>"})
    stands_in = special.get("eos_token") or special.get("unk_token") or "<pad>"  # merely the first id's
    if "pad_token" in special:  # in the tokenizer, and not among the model's embeddings
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.add_tokens([f"word{i}" for i in range(V)])
        tokenizer.add_special_tokens({"pad_token": "<far>"})
        tokenizer.save_pretrained(folder)
    runner = load_model(folder)
    batch = runner.tokenize(TEXTS)
    assert batch["attention_mask"].sum(1).tolist() == [10, 4, 10]  # the end of a text is real, though it pads too
    reason = "does not know the tokenizer's padding token <far>" if "pad_token" in special else "has no padding token"
    assert f"{reason}, so {stands_in} fills batches up, masked" in runner.notes[0]
    close(runner.forward(batch).logits[1, :4], runner.forward(runner.tokenize(TEXTS[1])).logits[0])


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"attention_mask": torch.ones(1, 2)}, "needs input_ids"),
        ({"input_ids": torch.tensor([5, 6])}, "needs input_ids, "),
        ({"input_ids": torch.tensor([[5, 61]])}, "between 5 and 61, and the model knows 0 to 60"),
        ({"input_ids": torch.tensor([[5, -1]])}, "between -1 and 5"),
        ({"input_ids": torch.tensor([[5]]), "attention_masks": torch.tensor([[1]])}, "takes no attention_masks, but "),
        ({"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 2)}, r"is \(1, 2\) where input_ids are"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "2 texts without a token"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_before_the_model_runs(models_of, batch, words):
    for name in ("bert", "llama"):
        with pytest.raises(ValueError, match=words):
            load_model(models_of(name)[1]).forward(batch)


def test_what_only_the_model_can_tell_does_not_fit_is_refused_with_its_sizes(models_of, tmp_path):
    bart = load_model(write(tmp_path, random("Bart", BART, "ForConditionalGeneration")))
    bert = load_model(models_of("bert")[1])
    ids, long, far = torch.tensor([[5, 6]]), torch.full((1, 40), 7), torch.tensor([[5, 200, 8]])
    for runner, key, value, words in (
        (bart, "labels", long, r"decoder_input_ids \(1, 40\) from 3 to 7"),
        (bart, "decoder_input_ids", long, r"decoder_input_ids \(1, 40\) from 7 to 7"),
        (bart, "labels", far, r"input_ids \(1, 2\) from 5 to 6, .*, decoder_input_ids \(1, 3\) from 3 to 200"),
        (bart, "decoder_input_ids", far, r"decoder_input_ids \(1, 3\) from 5 to 200"),
        (bert, "token_type_ids", torch.tensor([[0, 5]]), r"token_type_ids \(1, 2\) from 0 to 5"),
    ):
        with pytest.raises(ValueError, match=f"{type(runner.model).__name__} has no place for some of .*{words}"):
            runner.forward({"input_ids": ids, key: value})


# ---- outputs, batches, life


def test_outputs_may_be_used_where_there_are_gradients(models_of):
    for name in ("bert", "llama"):
        states = load_model(models_of(name)[1]).forward({"input_ids": torch.tensor([[5, 6]])})
        state = (states.encoder_hidden_states or states.decoder_hidden_states)[-1]
        assert not state.requires_grad and not state.is_inference()
        probe = torch.nn.Linear(24, 1)
        probe(state).sum().backward()
        assert probe.weight.grad.abs().sum() > 0


def test_layers_are_chosen_by_number_and_a_wrong_one_is_refused(models_of):
    for name in ("bert", "llama", "mt5"):
        runner = load_model(models_of(name)[1])
        batch = runner.tokenize(TEXTS)
        everything = runner.forward(batch)
        few = runner.forward(batch, layers=(-1, 0), logits=False)
        for stack in ("encoder_hidden_states", "decoder_hidden_states"):
            states = getattr(everything, stack)
            assert states is None or all(map(torch.equal, getattr(few, stack), (states[-1], states[0])))
        assert few.logits is None
        none = runner.forward(batch, layers=())
        assert not none.encoder_hidden_states and not none.decoder_hidden_states
        with pytest.raises(ValueError, match=r"layers=\[9\]: the model has hidden states 0 to [23]"):
            runner.forward(batch, layers=[9])


def test_iterate_takes_a_generator_holds_one_batch_and_gives_what_forward_gives(models_of):
    runner, taken, held = load_model(models_of("gpt2")[1]), [], []

    def texts():
        for i in range(7):
            taken.append(i)
            assert all(state() is None for state in held)  # the batch before is gone before the next one is made
            yield TEXTS[i % 3]

    runs = runner.iterate(texts(), batch_size=2, layers=[1])
    assert taken == []
    first = next(runs)
    assert taken == [0, 1] and len(first.decoder_hidden_states) == 1
    close(first.logits, runner.forward(runner.tokenize(TEXTS[:2])).logits)
    held.append(weakref.ref(first.decoder_hidden_states[0]))
    del first
    second = next(runs)
    assert taken == [0, 1, 2, 3]
    sizes = [len(second.input_ids), *(len(outputs.input_ids) for outputs in runs)]
    assert sizes == [2, 2, 1]
    assert next(runner.iterate("The bank")).input_ids.shape == (1, 2)
    assert next(runner.iterate(TEXTS, max_length=3, logits=False)).input_ids.shape == (3, 3)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        runner.iterate(TEXTS, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_batches_come_back_to_the_cpu_unless_they_are_to_stay(models_of):
    for name in ("bert", "llama", "mt5"):
        runner, exact = load_model(models_of(name)[1], device=0), load_model(models_of(name)[1])
        here, there = (next(runner.iterate(TEXTS, to_cpu=to_cpu)) for to_cpu in (True, False))
        assert here.logits.device.type == "cpu" and there.logits.device.type == "cuda"
        close(here.logits, exact.forward(exact.tokenize(TEXTS)).logits)
        close(runner.embed(TEXTS), exact.embed(TEXTS))


def test_a_model_that_says_minus_one_has_no_longest_text(models_of, tmp_path):
    folder = models_of("bert")[1]
    config = transformers.XLNetConfig(vocab_size=61, d_model=24, n_layer=2, n_head=3, d_inner=40)
    assert config.max_position_embeddings == -1
    transformers.XLNetModel(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    runner = load_model(tmp_path)
    assert runner.limit is None and runner.embed(TEXTS).shape == (len(TEXTS), 24)


def test_after_the_with_block_the_model_is_gone_and_says_so(models_of):
    with load_model(models_of("bert")[1]) as runner:
        model = weakref.ref(runner.model)
        batch = runner.tokenize(TEXTS)
        assert runner.forward(batch).logits is not None
    gc.collect()
    assert model() is None
    for use in (
        lambda: runner.forward(batch),
        lambda: runner.tokenize("x"),
        lambda: runner.iterate("x"),
        lambda: runner.embed("x"),
    ):
        with pytest.raises(ValueError, match=r"is closed; load_model gives a new one"):
            use()
    runner.close()  # twice is once


# ---- sentence embeddings


def write_steps(folder: Path, pooling: str, dense=None, length: int | None = None, **settings) -> None:
    steps = ["Transformer", "Pooling", *(["Dense"] if dense else []), "Normalize"]
    paths = {"Transformer": "", **{kind: f"{i}_{kind}" for i, kind in enumerate(steps) if i}}
    types = [
        {"idx": i, "path": paths[kind], "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(steps)
    ]
    (folder / "modules.json").write_text(json.dumps(types))
    for path in paths.values():
        (folder / path).mkdir(exist_ok=True)
    flags = dict.fromkeys(("cls_token", "mean_tokens", "max_tokens", "lasttoken"), False) | {pooling: True}
    flags = {f"pooling_mode_{key}": value for key, value in flags.items()}
    (folder / paths["Pooling"] / "config.json").write_text(json.dumps({"word_embedding_dimension": 24, **flags}))
    if length:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length, **settings}))
    if dense:
        save_file({"linear.weight": dense[0], "linear.bias": dense[1]}, folder / paths["Dense"] / "model.safetensors")
        described = {"in_features": 24, "out_features": 5, "bias": True}
        described["activation_function"] = "torch.nn.modules.activation.Tanh"
        (folder / paths["Dense"] / "config.json").write_text(json.dumps(described))


def last_states(reference, folder, texts, length=None):
    """Of every text alone, so that no padding can count: (T, C) each."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    with torch.no_grad():
        ids = [
            torch.tensor([tokenizer(text, truncation=length is not None, max_length=length)["input_ids"]])
            for text in texts
        ]
        return [reference(x, output_hidden_states=True).hidden_states[-1][0] for x in ids]


@pytest.mark.parametrize("side", ["left", "right"])
def test_embeddings_are_pooled_over_what_is_no_padding_and_have_length_one(models_of, side):
    reference, folder = models_of("llama")
    runner = load_model(folder, tokenizer_kwargs={"padding_side": side})
    states = last_states(reference, folder, TEXTS)
    for pooling, of in {"mean": lambda x: x.mean(0), "cls": lambda x: x[0], "last": lambda x: x[-1]}.items():
        expected = torch.stack([of(x) for x in states])
        close(runner.embed(TEXTS, pooling, normalize=False), expected)
        close(runner.embed(iter(TEXTS), pooling, batch_size=2), F.normalize(expected, dim=1))
    close(runner.embed(TEXTS), runner.embed(TEXTS, "mean"))
    assert not torch.allclose(runner.embed(TEXTS), runner.embed(TEXTS, layer=1))
    assert runner.embed("The bank").shape == (1, 24) and runner.embed([]).shape == (0, 24)
    assert runner.embed([], "cls").shape == (0, 24)
    with pytest.raises(ValueError, match="pooling=max is none of mean, cls, last"):
        runner.embed(TEXTS, "max")


def test_embeddings_of_an_encoder_follow_the_files_of_sentence_transformers(models_of, tmp_path):
    reference, _ = models_of("headless bert")
    folder = write(tmp_path, reference)
    write_steps(folder, "cls_token", length=4)
    states = last_states(reference, folder, TEXTS, length=4)
    close(load_model(folder).embed(TEXTS), F.normalize(torch.stack([x[0] for x in states]), dim=1))
    write_steps(folder, "mean_tokens", length=4)
    close(load_model(folder).embed(TEXTS), F.normalize(torch.stack([x.mean(0) for x in states]), dim=1))
    torch.manual_seed(1)
    weight, bias = torch.randn(5, 24), torch.randn(5)
    write_steps(folder, "cls_token", dense=(weight, bias), length=4)  # as LaBSE's
    expected = torch.tanh(torch.stack([x[0] for x in states]) @ weight.t() + bias)
    close(load_model(folder).embed(TEXTS, normalize=False), expected)
    assert load_model(folder).embed(TEXTS, "cls").shape == (3, 24)  # said by the caller: the plain states
    assert load_model(folder).embed([]).shape == (0, 5)
    write_steps(folder, "mean_tokens", length=9, do_lower_case=True)
    close(load_model(folder).embed("THE River"), load_model(folder).embed("the river"))
    write_steps(folder, "max_tokens")
    with pytest.raises(ValueError, match="pools by max_tokens, which is not computed here; pooling=mean"):
        load_model(folder).embed(TEXTS)


def test_embeddings_of_seq2seq_are_the_encoders(models_of):
    reference, folder = models_of("mt5")
    runner = load_model(folder)
    found = runner.embed(TEXTS, normalize=False)
    batch = runner.tokenize(TEXTS[1])
    with torch.no_grad():
        states = reference.get_encoder()(**batch).last_hidden_state[0]
    close(found[1], states.mean(0))


# ---- ours


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS * 50, "bpe-runners", vocab_size=280)


def test_a_model_directory_of_ours_runs_with_its_adapter_and_without_transformers_model(tmp_path, bpe):
    base = save(tmp_path / "base", gpt(bpe), bpe)
    runner = load_model(base)
    batch = runner.tokenize(TEXTS)
    assert [bpe.decode(ids[: int(mask.sum())].tolist()) for ids, mask in zip(*batch.values(), strict=True)] == TEXTS
    found = runner.forward(batch)
    model = CheckpointManager.load_model(base)[0].eval()
    with torch.no_grad():
        expected = model(batch["input_ids"], batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    assert torch.equal(found.logits, expected) and len(found.decoder_hidden_states) == 3

    lora.apply_lora(model, lora.LoRAConfig(rank=2))
    trained(model)
    with torch.no_grad():
        adapted = model(batch["input_ids"], batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    about = {"base": CheckpointManager.base_reference(base, tmp_path / "adapted")}
    save(tmp_path / "adapted", model, bpe, about=about)
    logits = load_model(tmp_path / "adapted").forward(batch).logits
    close(logits, adapted)
    assert (logits - expected).abs().max() > 0.1
    half = load_model(base, dtype="bf16")
    assert half.forward(batch).logits.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="quantization=8bit is Transformers' to do, and only our GPT opens"):
        load_model(tmp_path / "adapted", quantization="8bit")


@pytest.mark.parametrize("side", ["left", "right"])
def test_our_gpt_runs_without_transformers_as_with_it(models_of, tmp_path, bpe, monkeypatch, side):
    folders = [models_of("llama")[1], models_of("gpt2")[1], save(tmp_path / "ours", gpt(bpe), bpe)]
    texts, more = [*TEXTS, "", "bank </s> bank"], {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    calls = [more, {"padding": "max_length", "max_length": 9, "padding_side": "left"}, {"add_special_tokens": False}]

    def run():
        runners = [load_model(folder, tokenizer_kwargs={"padding_side": side, "max_length": 8}) for folder in folders]
        batches = [(runner.tokenize(texts, **call), runner.embed(texts)) for runner in runners for call in calls]
        return runners, batches

    with_it, expected = run()
    find = loading.importlib.util.find_spec
    monkeypatch.setattr(
        loading.importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    without, found = run()
    for (batch, vectors), (same, as_well) in zip(found, expected, strict=True):
        kept = {key: value for key, value in same.items() if key != "token_type_ids"}
        assert batch.keys() == kept.keys() and all(torch.equal(batch[key], kept[key]) for key in kept)
        assert batch.word_ids(1) == same.word_ids(1) and torch.equal(vectors, as_well)
    for a, b in zip(with_it, without, strict=True):
        assert a.notes == b.notes and a.max_length == b.max_length
        assert b.tokenize([])["input_ids"].shape == (0, 0) and b.tokenize("the")["input_ids"].dtype == torch.long
    assert len(without[0].tokenize(["the", "bank the"], padding=False, return_tensors=None)["input_ids"]) == 2
    with pytest.raises(ValueError, match="texts of different lengths make no tensor without padding"):
        without[0].tokenize(["the", "bank the"], padding=False)
    with pytest.raises(ValueError, match="tokenize has no option stride"):
        without[0].tokenize("the", stride=1)
    with pytest.raises(ValueError, match="tokenizer_kwargs: use_fast needs the package transformers"):
        load_model(folders[0], tokenizer_kwargs={"use_fast": True})
    with pytest.raises(ValueError, match="padding needs a padding token, and the vocabulary has none of that name"):
        loading.load_tokenizer(folders[0], pad_token="<far>")(["the", "bank the"], padding=True)
    runner = load_model(folders[0], tokenizer_kwargs={"pad_token": "<far>"})  # the vocabulary has no such token
    assert runner.notes == ["the tokenizer has no padding token, so </s> fills batches up, masked"]
    assert (
        runner.tokenize(texts)["attention_mask"].sum(1).tolist()
        == with_it[0].tokenize(texts, max_length=None)["attention_mask"].sum(1).tolist()
    )


def test_our_gpt_runs_where_transformers_cannot_be_imported_and_others_say_what_to_install(models_of):
    code = """
import sys
sys.modules["transformers"] = None
from registry import load_model
runner = load_model(sys.argv[1])
print(runner.forward(runner.tokenize(["the bank"])).logits.shape)
try:
    load_model(sys.argv[2])
except ValueError as error:
    print(error)
"""
    folders = [str(models_of(name)[1]) for name in ("llama", "bert")]
    run = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.splitlines() == [
        "torch.Size([1, 3, 61])",
        "a model that our own GPT does not compute needs the package transformers, which is not installed: "
        "pip install transformers",
    ], run.stderr


# ---- dtype, device, options


def test_every_name_of_a_dtype_is_known_and_no_other():
    names = {torch.float16: "fp16 float16 half FP16 torch.float16", torch.bfloat16: "bf16 bfloat16 BF16"}
    names |= {torch.float32: "fp32 float32 f32 float torch.float32 Float"}
    for dtype, spellings in names.items():
        assert all(loading.resolve_dtype(name) is dtype for name in [*spellings.split(), dtype])
    assert loading.resolve_dtype("auto") is loading.resolve_dtype(None) is None
    for wrong in ("int8", "fp8", "", torch.int8, 16, "float16 "):
        with pytest.raises(ValueError, match="there are auto, fp32, bf16, fp16, float32, bfloat16, float16, half"):
            loading.resolve_dtype(wrong)


def test_every_kind_of_device_is_known_and_one_that_is_not_there_is_refused():
    for given in ("cpu", "CPU", torch.device("cpu")):
        assert loading.coerce_device(given) == torch.device("cpu")
    assert loading.coerce_device("auto") == loading.coerce_device(None)
    gpus = torch.cuda.device_count()
    if gpus:
        assert loading.coerce_device(0) == loading.coerce_device("0") == torch.device("cuda:0")
    for wrong in (gpus, f"cuda:{gpus}", str(gpus), torch.device("cuda", gpus), -1, "tpu", "meta", 1.5, True):
        with pytest.raises(ValueError, match=r"\(here: cpu"):
            loading.coerce_device(wrong)


def test_the_dtype_is_the_one_asked_for_else_the_recipes_else_the_files(models_of, tmp_path):
    for name in ("bert", "llama", "gpt-neox"):
        reference, folder = models_of(name)
        assert next(load_model(folder).model.parameters()).dtype == torch.float32
        half = write(tmp_path / name, reference.to(torch.bfloat16))
        reference.float()
        assert {p.dtype for p in load_model(half).model.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in load_model(half, dtype="fp32").model.parameters()} == {torch.float32}
    register_spec(ModelSpec("halved", "lab/halved", dtype="bf16"))
    try:
        runner = load_model("halved", local_path=models_of("bert")[1])
        assert {p.dtype for p in runner.model.parameters()} == {torch.bfloat16}
        assert next(load_model("halved", local_path=half, dtype="auto").model.parameters()).dtype == torch.bfloat16
    finally:
        unregister_spec("halved")


def test_float16_of_a_recipe_gives_way_on_a_cpu_and_for_t5_and_both_are_said(models_of):
    runner = load_model("xlmr", local_path=models_of("xlm-r")[1])
    assert next(runner.model.parameters()).dtype == torch.float32
    assert "float16 is slow and coarse on cpu" in runner.notes[0]
    with pytest.warns(UserWarning, match="its activations overflow in float16") as caught:
        runner = load_model("mt5", local_path=models_of("mt5")[1])
    assert next(runner.model.parameters()).dtype == torch.float32 and caught[0].filename == __file__
    asked = load_model("mt5", local_path=models_of("mt5")[1], dtype="fp16")
    assert asked.notes == [] and asked.model.lm_head.weight.dtype == torch.float16


def test_options_of_the_loader_are_checked(models_of):
    _, folder = models_of("bert")
    assert load_model(folder, load_config={"attn_implementation": "sdpa"}).model.config._attn_implementation == "sdpa"
    _, llama = models_of("llama")
    assert isinstance(loading.load(llama, load_config={"use_safetensors": True}), transformers.LlamaForCausalLM)
    for wrong, words in {
        ("device", "cpu"): "device is none of attn_implementation, device_map",
        ("use_safetensors", "yes"): "use_safetensors='yes' is a str",
    }.items():
        with pytest.raises(ValueError, match=words):
            loading.load(folder, load_config=dict([wrong]))
    with pytest.raises(ValueError, match="attn_implementation=sdpa captures no attentions; eager does"):
        loading.load(folder, attentions=True, load_config={"attn_implementation": "sdpa"})
    with pytest.raises(ValueError, match="quantization=2bit is none of 8bit, 4bit"):
        load_model(folder, quantization="2bit")


def test_a_runner_of_another_architecture_is_refused(models_of):
    _, folder = models_of("bert")
    with pytest.raises(ValueError, match="holds a model that is encoder_only, not decoder_only"):
        DecoderModelRunner(folder)
    spec = ModelSpec("x", "lab/x", "seq2seq")
    with pytest.raises(ValueError, match="EncoderModelRunner runs models that are encoder_only, and x is seq2seq"):
        EncoderModelRunner(folder, spec)
    assert EncoderModelRunner(folder).forward({"input_ids": torch.tensor([[5]])}).logits.shape == (1, 1, V)
    with pytest.raises(ValueError, match="holds a model that is encoder_only, not seq2seq"):
        load_model("mt5", local_path=folder)


def test_code_that_came_with_a_model_runs_only_if_it_is_trusted_and_is_named(models_of, tmp_path):
    _, folder = models_of("bert")
    write(tmp_path, random("Bert", ENCODER, "ForMaskedLM"))
    own = {"AutoConfig": "settings_odd.OddConfig", "AutoModelForMaskedLM": "modeling_odd.OddModel"}
    described = json.loads((folder / "config.json").read_text()) | {"auto_map": own}
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert isinstance(loading.load(tmp_path), transformers.BertForMaskedLM)  # known: what came with it is not needed
    (tmp_path / "config.json").write_text(json.dumps(described | {"model_type": "odd"}))
    for name in ("settings_odd", "modeling_odd"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match=r"trust_remote_code=true would run modeling_odd\.py, settings_odd\.py"):
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "settings_odd.py").write_text(
        "from transformers import BertConfig\nclass OddConfig(BertConfig):\n    model_type = 'odd'\n"
    )
    (tmp_path / "modeling_odd.py").write_text(
        "from transformers import BertForMaskedLM\nfrom .settings_odd import OddConfig\n"
        "class OddModel(BertForMaskedLM):\n    config_class = OddConfig\n"
    )
    runner = load_model(tmp_path, trust_remote_code=True)
    assert type(runner.model).__name__ == "OddModel"
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OddTokenizer", "auto_map": {"AutoTokenizer": ["odd_tokens.Slow", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"trust_remote_code=true would run odd_tokens\.py"):
        load_model(tmp_path)


@pytest.mark.parametrize(("bits", "coarseness"), [("8bit", 0.2), ("4bit", 0.5)])
def test_quantised_models_are_near_the_exact_ones_hold_few_bytes_and_are_not_moved(
    tmp_path, monkeypatch, bits, coarseness
):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "to", lambda *_: pytest.fail("bitsandbytes cannot be moved"))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    sizes |= {"vocab_size": V, "num_key_value_heads": 4, "max_position_embeddings": 64}
    folder = write(tmp_path, random("Llama", sizes, "ForCausalLM"))
    exact = load_model(folder)
    batch = exact.tokenize(TEXTS)
    register_spec(ModelSpec("quantised", "lab/quantised", "decoder_only", "fp32", use_bitsandbytes=True))
    try:
        runner = load_model("quantised", local_path=folder, quantization=None if bits == "8bit" else bits)
        plain = load_model("quantised", local_path=folder, quantization="none")
    finally:
        unregister_spec("quantised")
    kinds = {p.dtype for name, p in runner.model.named_parameters() if "_proj" in name}
    assert kinds == {torch.int8 if bits == "8bit" else torch.uint8} and isinstance(plain.model, GPT)
    found, expected = runner.forward(batch).logits, exact.forward(batch).logits
    assert 0 < (found - expected).abs().mean() < coarseness * expected.std()


@pytest.mark.parametrize("package", ["transformers", "accelerate", "bitsandbytes"])
def test_a_package_that_is_missing_is_named_with_what_installs_it(models_of, monkeypatch, package):
    find = loading.importlib.util.find_spec
    there = {"accelerate", "bitsandbytes"} - {package}
    monkeypatch.setattr(
        loading.importlib.util, "find_spec", lambda name: None if name == package else name in there or find(name)
    )
    with pytest.raises(ValueError, match=f"needs the package {package}, which is not installed: pip install {package}"):
        loading.load(models_of("bert")[1], quantization="8bit")


def test_what_is_missing_or_broken_in_a_folder_is_said(models_of, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        loading.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        loading.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="does not say what the model is: give arch, one of encoder_only"):
        loading.load(tmp_path)
    reference, _ = models_of("bert")
    reference.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer: none of its files holds a vocabulary"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="does not open as BertForMaskedLM"):
        loading.load(tmp_path)


# ---- the document


SNIPPET = """
from registry import ModelSpec, list_available_models, load_model
from registry.runners import ModelOutputs

ModelSpec(
    name="llama3",
    hf_id="meta-llama/Meta-Llama-3-8B",
    arch="decoder_only",
    dtype="bf16",
    use_bitsandbytes=True,
    tokenizer_kwargs=None,
)

runner = load_model("xlmr", device={device!r})
batch = runner.tokenize(["He deposited the check at the bank."])
outputs = runner.forward(batch)

hidden_states = outputs.encoder_hidden_states  # tuple with embeddings at index 0
logits = outputs.logits                        # optional for LaBSE/MiniLM

assert isinstance(outputs, ModelOutputs) and outputs.input_ids.shape == outputs.attention_mask.shape == (1, 10)
assert len(hidden_states) == 3 and hidden_states[0].shape == (1, 10, 24) and logits.shape == (1, 10, 61)
assert outputs.decoder_hidden_states is None and outputs.extra == {{}}
assert runner.model.config.output_hidden_states
assert {{"mbert", "xlmr", "mt5", "llama3", "labse", "minilm"}} <= set(list_available_models())
"""


def test_the_documents_snippet_runs_with_a_model_in_hugging_faces_cache(models_of, tmp_path):
    _, folder = models_of("xlm-r")
    cached = tmp_path / "hub" / "models--xlm-roberta-base"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / ("0" * 40)).symlink_to(folder)
    places = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)}
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    run = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", SNIPPET.format(device=device)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | places,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""


def test_the_package_is_imported_without_transformers():
    code = (
        "import sys, registry.runners; print([m for m in sys.modules if m.split('.')[0] in ('transformers', 'peft')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "[]", run.stderr
