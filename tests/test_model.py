"""model.py against Transformers' GPT-2, a float64 computation of its own, and itself without a cache."""

import math
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from architecture import PRESETS
from generation import highest, sample
from lora import LoRAConfig, apply_lora
from model import GPT, IGNORE_INDEX, GPTConfig, KVCache, Pass, on_meta
from norm import RMSNorm

ROOT = Path(__file__).resolve().parent.parent
TINY = {"block_size": 16, "vocab_size": 61, "n_layer": 2, "n_head": 3, "n_embd": 24}


def tiny(seed=0, **changes) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**TINY, **changes})).eval()


def randomised(model: GPT, seed=1) -> GPT:
    """Every parameter away from its initial value, so that a bias or a norm that is left out shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def tokens(*shape, vocab_size=61, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("preset", "count"), [("small", 38_393_920), ("medium", 124_337_664), ("large", 354_551_808)])
def test_a_preset_has_the_documented_number_of_parameters(preset, count):
    with torch.device("meta"):
        assert GPT(PRESETS[preset]).num_params() == count


def as_transformers(model: GPT) -> GPT2LMHeadModel:
    c = model.config
    config = GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.block_size,
        n_embd=c.n_embd,
        n_layer=c.n_layer,
        n_head=c.n_head,
        activation_function="gelu",
        tie_word_embeddings=c.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = GPT2LMHeadModel(config).eval()
    state = theirs.state_dict()
    ours = model.state_dict()
    for name, target in state.items():
        tensor = ours.get(name)
        if tensor is None:
            assert name.endswith(".bias") and not c.bias
            tensor = torch.zeros_like(target)
        conv1d = any(name.endswith(f"{part}.weight") for part in ("c_attn", "c_proj", "c_fc"))
        state[name] = tensor.t() if conv1d else tensor
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_loss_and_gradients_equal_transformers_gpt2(bias, tied):
    model = randomised(tiny(bias=bias, tie_word_embeddings=tied))
    theirs = as_transformers(model)
    x, y = tokens(3, 16), tokens(3, 16, seed=1)
    logits, loss = model(x, y)
    expected = theirs(x).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    expected_loss = F.cross_entropy(expected.flatten(0, 1), y.flatten())
    torch.testing.assert_close(loss, expected_loss)
    loss.backward()
    expected_loss.backward()
    torch.testing.assert_close(
        model.transformer.wte.weight.grad, theirs.transformer.wte.weight.grad, atol=1e-6, rtol=1e-4
    )
    ours, reference = (m.transformer.h[0].attn.c_attn.weight.grad for m in (model, theirs))
    torch.testing.assert_close(ours, reference.t(), atol=1e-6, rtol=1e-4)


def test_attention_equals_a_float64_computation_written_out():
    model = randomised(tiny())
    attention, x = model.transformer.h[0].attn, torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(0))
    C, H, D = 24, 3, 8
    weight, bias = attention.c_attn.weight.double(), attention.c_attn.bias.double()
    q, k, v = (x.double() @ weight.t() + bias).split(C, dim=2)
    heads = []
    for h in range(H):
        part = slice(h * D, (h + 1) * D)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / D**0.5
        scores = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), float("-inf"))
        heads.append(scores.softmax(-1) @ v[..., part])
    expected = torch.cat(heads, 2) @ attention.c_proj.weight.double().t() + attention.c_proj.bias.double()
    found = attention(x, Pass(None, {False: None}, {}, None))
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_no_token_sees_a_later_one():
    model = randomised(tiny())
    x = tokens(1, 16)
    changed = x.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 61
    before, after = model(x, x)[0], model(changed, x)[0]
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_without_targets_only_the_last_position_is_projected():
    model = tiny()
    x = tokens(2, 9)
    logits, loss = model(x)
    assert loss is None and logits.shape == (2, 1, 61)
    torch.testing.assert_close(logits, model(x, x)[0][:, -1:])


def test_ignored_targets_carry_no_loss():
    model, x, y = tiny(), tokens(2, 16), tokens(2, 16, seed=1)
    y[:, :8] = IGNORE_INDEX
    logits, loss = model(x, y)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, 8:].flatten(0, 1), y[:, 8:].flatten()))


def test_initialisation_is_gpt2s_with_scaled_residual_projections():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / (2 * 8) ** 0.5, rel=0.05), name
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert torch.all(p == (1.0 if "ln_" in name and name.endswith("weight") else 0.0)), name


def test_tied_embeddings_are_one_parameter_and_untied_are_two():
    tied, untied = tiny(), tiny(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert untied.num_params() - tied.num_params() == 61 * 24


def test_dropout_acts_in_training_and_not_in_evaluation():
    model, x = tiny(dropout=0.5), tokens(1, 16)
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])


@pytest.mark.parametrize("prompt_length", [1, 7, 16, 40])
def test_greedy_text_with_a_cache_is_the_text_without_one_also_when_the_context_slides(prompt_length):
    model = randomised(tiny())
    x = tokens(2, prompt_length)
    cached = model.generate(x, 40, temperature=0)
    assert torch.equal(cached, model.generate(x, 40, temperature=0, use_cache=False))
    assert torch.equal(cached[:, :prompt_length], x)
    for n in range(prompt_length, cached.size(1)):  # what "without a cache" means, written out
        logits, _ = model(cached[:, max(0, n - 16) : n])
        assert torch.equal(logits[:, -1].argmax(-1), cached[:, n])


def test_a_cache_takes_several_tokens_at_a_time():
    model = randomised(tiny())
    x = tokens(2, 12)
    cache = KVCache(model.config, 2, torch.device("cpu"), torch.float32, model.config.block_size)
    for part in (x[:, :5], x[:, 5:6], x[:, 6:]):
        logits, _ = model(part, cache=cache)
    torch.testing.assert_close(logits, model(x)[0], atol=1e-5, rtol=1e-5)


NORMS = {"float32": (torch.float32,) * 2, "half": (torch.bfloat16,) * 2, "autocast": (torch.bfloat16, torch.float32)}


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("kind", NORMS)
def test_a_norms_own_gradient_is_that_of_its_formula(kind, plus_one):
    (dtype, of_weight), n = NORMS[kind], 24
    torch.manual_seed(0)
    norm = RMSNorm(n, GPTConfig(**TINY, block="llama", activation="silu", norm_plus_one=plus_one, norm_eps=1e-3))
    norm.weight.data.add_(torch.randn(n))
    norm.to(of_weight)
    x = torch.randn(2, 7, 3, n, dtype=dtype).transpose(1, 2).requires_grad_()  # as heads lie
    factor = torch.randn(2, 3, 7, n)

    found = norm(x)
    with torch.no_grad():
        assert found.equal(norm(x)) and found.dtype == (dtype if plus_one else torch.promote_types(dtype, of_weight))
    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    exact = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-3).rsqrt() * (weight + plus_one)
    expected = torch.autograd.grad((exact * factor).sum(), (wide, weight))

    gradients = torch.autograd.grad((found * factor).sum(), (x, norm.weight), retain_graph=True)
    tolerance = 1e-6 if kind == "float32" else 0.01
    for a, b in zip(gradients, expected, strict=True):
        assert (a - b).norm() < tolerance * b.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # what leads back under it is not rounded to its dtype
        assert all(map(torch.equal, torch.autograd.grad((found * factor).sum(), (x, norm.weight)), gradients))
    for wanted, gradient in zip((x, norm.weight), gradients, strict=True):  # of one alone, the other being frozen
        norm.weight.requires_grad_(wanted is not x)
        (alone,) = torch.autograd.grad((norm(x if wanted is x else x.detach()) * factor).sum(), wanted)
        assert alone.equal(gradient)
        norm.weight.requires_grad_()


def test_under_autocast_what_several_products_read_is_cast_once():
    model, read = tiny(block="llama", activation="silu"), {}
    for name, layer in model.blocks[0].named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _, given, name=name: read.update({name: given[0]}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens(2, 16))
    assert {x.dtype for x in read.values()} == {torch.bfloat16}
    assert read["self_attn.q_proj"] is read["self_attn.k_proj"] is read["self_attn.v_proj"]
    assert read["mlp.gate_proj"] is read["mlp.up_proj"]


def test_sampling_draws_the_same_tokens_with_and_without_a_cache():
    model, x = randomised(tiny()), tokens(3, 4)
    texts = [
        model.generate(x, 30, top_k=20, top_p=0.9, generator=torch.Generator().manual_seed(7), use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (5, None), (None, 0.6), (20, 0.8), (1, None), (100, 1.0)])
def test_sampling_keeps_the_tokens_that_transformers_keeps(top_k, top_p):
    logits = torch.randn(4, 61, generator=torch.Generator().manual_seed(0)) * 3
    scores = TemperatureLogitsWarper(0.7)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(min(top_k, 61))(None, scores)
    if top_p:
        scores = TopPLogitsWarper(top_p)(None, scores)
    count, generator = 20_000, torch.Generator().manual_seed(0)
    drawn = sample(logits.repeat(count, 1), 0.7, top_k, top_p, generator).view(count, 4)
    wanted = scores.double().softmax(-1)
    for row in range(4):
        found = torch.bincount(drawn[:, row], minlength=61) / count
        assert not found[wanted[row] == 0].any()
        error = (wanted[row] * (1 - wanted[row]) / count).sqrt()  # standard deviation of a share
        assert ((found - wanted[row]).abs() <= 5 * error + 1e-12).all()


def test_generation_stops_when_every_row_has_met_a_stop_token():
    model, x = randomised(tiny()), tokens(2, 4)
    free = model.generate(x, 30, temperature=0)[:, 4:]
    stops = [free[0, 3].item(), free[1, 6].item()]
    stopped = model.generate(x, 30, temperature=0, stop_tokens=stops)[:, 4:]
    for row, text in enumerate(free.tolist()):
        end = next(i for i, token in enumerate(text) if token in stops)
        assert stopped[row, : end + 1].tolist() == text[: end + 1]
        assert set(stopped[row, end:].tolist()) == {text[end]}
    assert stopped.size(1) < 30


def test_ids_beyond_the_tokenizers_are_never_drawn():
    model, x = randomised(tiny()), tokens(4, 4)
    drawn = model.generate(x, 30, vocab_size=10, temperature=5.0, generator=torch.Generator().manual_seed(0))[:, 4:]
    assert drawn.max() < 10 and drawn.unique().numel() == 10


def test_generation_leaves_the_mode_and_the_global_generator_alone():
    model = tiny(dropout=0.5).train()
    before = torch.get_rng_state()
    model.generate(tokens(1, 4), 5, generator=torch.Generator().manual_seed(0))
    assert model.training and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_head": 5}, "n_embd=24 must be a multiple of n_head=5"),
        ({"n_layer": 0, "vocab_size": -1}, "n_layer=0 must be at least 1"),
        ({"block": "llama", "attention_softcap": 0.0}, "attention_softcap=0.0 must be above 0"),
        ({"block": "llama", "rope_theta": math.nan}, "rope_theta=nan must be above 0"),
        (
            {"block": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0, "attention_factor": 1.5}},
            "rope_scaling of type linear has no attention_factor",
        ),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_an_impossible_model_is_refused_with_its_numbers(changes, words):
    with pytest.raises(ValueError, match="impossible model") as error:
        GPTConfig(**{**TINY, **changes})
    assert words in str(error.value)


def test_a_context_longer_than_block_size_is_refused():
    with pytest.raises(ValueError, match="17 tokens is longer than block_size=16"):
        tiny()(tokens(1, 17))


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_sampling_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="sampling needs"):
        tiny().generate(tokens(1, 4), 1, **bad)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        tiny().generate(tokens(1, 0), 1)


def test_a_shorter_block_size_keeps_the_first_positions():
    model, x = randomised(tiny()), tokens(1, 8)
    before = model(x)[0]
    model.crop_block_size(8)
    assert torch.equal(model(x)[0], before)
    assert asdict(model.config)["block_size"] == 8
    with pytest.raises(ValueError, match="between 1 and the model's 8"):
        model.crop_block_size(16)


def test_a_shorter_block_size_leaves_frozen_what_is_and_drops_no_adapter():
    model = tiny()
    apply_lora(model, LoRAConfig(2, targets=["c_attn"]))
    model.crop_block_size(8)
    assert not model.transformer.wpe.weight.requires_grad
    model = tiny()
    apply_lora(model, LoRAConfig(2, targets=["wpe"]))
    with pytest.raises(ValueError, match="merge it"):
        model.crop_block_size(8)
    assert model.config.block_size == 16


def test_blocks_that_are_computed_again_have_their_attentions_once():
    model, attentions = tiny().train(), []
    model.recompute = True
    model(tokens(1, 8), tokens(1, 8), attentions=attentions)[1].backward()
    assert len(attentions) == 2


def test_streams_that_take_turns_draw_no_dropout_and_leave_the_model_as_it_was():
    model, prompts = tiny(dropout=0.5).train(), tokens(2, 4).split(1)
    expected = [model.generate(prompt, n, temperature=0)[0, 4:] for prompt, n in zip(prompts, (3, 9), strict=True)]
    before = torch.get_rng_state()
    first, second = (model.stream(prompt, n, temperature=0) for prompt, n in zip(prompts, (3, 9), strict=True))
    turns = [torch.cat(column) for column in zip(*zip(first, islice(second, 3), strict=True), strict=True)]
    assert torch.equal(turns[0], expected[0]) and torch.equal(torch.cat([turns[1], *second]), expected[1])
    assert torch.equal(torch.get_rng_state(), before) and model.training


def test_tokens_can_be_trained_on_as_they_come():
    model = tiny()
    for token in model.stream(tokens(2, 4), 3):
        model(token[:, None], token[:, None])[1].backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    generated = model.generate(tokens(2, 4), 3)
    model(generated, generated)[1].backward()


@pytest.mark.parametrize(("rows", "vocabulary", "k"), [(1, 50257, 200), (3, 1000, 7), (2, 64, 1), (1, 33, 30)])
def test_the_highest_logits_are_those_of_topk(rows, vocabulary, k):
    logits = (4 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))).round()  # many are equal
    found, ids = highest(logits, k)
    assert torch.equal(found, logits.topk(k).values) and torch.equal(logits.gather(1, ids), found)
    assert all(len(set(row)) == k for row in ids.tolist())
    logits[-1, -1] = math.nan
    assert highest(logits, k)[0][-1].isnan().any()


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0}])
@pytest.mark.parametrize("logits", [[math.nan, 1.0, 2.0], [math.inf, 1.0, 2.0], [-math.inf] * 3])
def test_nothing_is_drawn_from_what_is_no_distribution(logits, settings):
    with pytest.raises(ValueError, match="not finite"):
        sample(torch.tensor([logits, [1.0, 2.0, 3.0]]), **settings)


@pytest.mark.parametrize("preset", ["small", "modern"])
def test_a_model_on_meta_is_the_model_without_its_numbers(preset):
    config = replace(PRESETS[preset], n_layer=2, vocab_size=50)
    shapes, model = on_meta(config), GPT(config)
    assert {name: p.shape for name, p in shapes.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(p.is_meta for p in shapes.parameters())


def test_no_compiler_is_imported_for_shapes():
    code = "import sys, model; model.on_meta(model.GPTConfig(8, 9, 1, 1, 8)); sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_temperature_however_small_is_greedy():
    assert sample(torch.tensor([[1.0, 3.0, 3.0000005, -2.0]]), 1e-40).item() == 2
