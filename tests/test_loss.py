"""loss.py and attention.py's faster ways against the plain ones, in float64 and where bfloat16 rounds."""

import pytest
import torch
from conftest import QUICK
from torch.nn import functional as F

import attention
import configurator
import loss
from distributed import Ranks
from lora import LoRAConfig, apply_lora
from model import GPT, IGNORE_INDEX, GPTConfig
from preflight import prepare_start
from train import set_up

N, C, V = 70, 24, 101  # no multiples of anything


def tensors(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(size, C, generator=generator).to(dtype).requires_grad_() for size in (N, V))
    targets = torch.randint(V, (N,), generator=generator)
    targets[3] = targets[50] = IGNORE_INDEX
    return x, weight, targets


def plain(x, weight, targets):
    logits = F.linear(x, weight)
    return F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), targets, ignore_index=IGNORE_INDEX)


def fused(x, weight, targets):
    return loss.linear_cross_entropy(x, weight, targets, IGNORE_INDEX)


@pytest.mark.parametrize("held", [1 << 26, 3 * 128, 1])  # all at once, in rounds of three rows, of one
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_loss_and_gradients_are_those_of_projection_and_cross_entropy(dtype, tolerance, held, monkeypatch):
    monkeypatch.setattr(loss, "BUFFER", held)
    monkeypatch.setattr(loss, "PART", 48)  # of 101 columns
    x, weight, targets = tensors(dtype)
    expected, found = plain(x, weight, targets), fused(x, weight, targets)
    assert found.dtype == expected.dtype and abs(found - expected) < tolerance
    pairs = [torch.autograd.grad(0.3 * value, (x, weight)) for value in (expected, found)]
    for reference, gradient in zip(*pairs, strict=True):
        assert gradient.dtype == dtype
        assert (gradient - reference).abs().max() <= tolerance * reference.abs().max()
    with torch.no_grad():
        assert abs(fused(x, weight, targets) - expected) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_sure_token_still_has_to_learn_is_not_rounded_away(dtype):
    """With weights of one, gradients of x are those of logits. bfloat16 has nothing between 0.996 and 1."""
    eye = torch.eye(V)
    for token in torch.arange(40).split(1):  # whose probabilities go from 0.01 to 1 - 3e-7
        x = (0.5 * token * eye[token]).to(dtype).requires_grad_()
        values = plain(x.double(), eye.double(), token), fused(x, eye.to(dtype), token)
        torch.testing.assert_close(*values, rtol=0.01, atol=0, check_dtype=False)
        torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in values), rtol=0.01, atol=0)


def test_a_weight_is_cast_once_as_long_as_none_changes():
    x, weight, targets = tensors(torch.float32)
    low = x.detach().bfloat16()

    def change() -> tuple[torch.Tensor, torch.Tensor]:
        before = fused(low, weight, targets)
        weight.data *= 2  # which no version counts
        return before, fused(low, weight, targets)

    with loss.unchanged_weights():
        before, after = change()
        assert after == before
        assert fused(x, weight, targets) != before  # another dtype, another cast
    before, after = change()
    assert after > before
    (gradient,) = torch.autograd.grad(after, weight)
    assert gradient.dtype == torch.float32


def test_what_is_frozen_gets_no_gradient_and_costs_none():
    x, weight, targets = tensors(torch.float32)
    (dx,) = torch.autograd.grad(fused(x, weight.detach(), targets), x)
    torch.testing.assert_close(dx, torch.autograd.grad(plain(x, weight, targets), x)[0])
    (dweight,) = torch.autograd.grad(fused(x.detach(), weight, targets), weight)
    torch.testing.assert_close(dweight, torch.autograd.grad(plain(x, weight, targets), weight)[0])


def test_a_buffer_from_inference_mode_serves_training_too():
    x, weight, targets = tensors(torch.float32)
    loss.forget_buffer()
    with torch.inference_mode():
        fused(x, weight, targets)
    fused(x, weight, targets).backward()
    assert weight.grad.isfinite().all()


def test_a_batch_without_targets_has_no_loss_and_an_impossible_target_a_finite_one():
    x, weight, targets = tensors(torch.float32)
    assert fused(x, weight, torch.full_like(targets, IGNORE_INDEX)).isnan()
    x = x.detach() * 1e4
    assert plain(x, weight, targets) > 1000 and 50 < fused(x, weight, targets) < 88  # 87 nats where p is below 1e-38
    with torch.no_grad():
        torch.testing.assert_close(fused(x, weight, targets), plain(x, weight, targets))
    assert fused(x * float("inf"), weight, targets).isnan()


MODELS = {
    "gpt2": {},
    "tied": {"tie_word_embeddings": True},
    "llama": {"block": "llama", "activation": "silu", "n_kv_head": 1},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_has_the_same_loss_and_gradients_with_and_without_logits(name, dtype, monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, V, 2, 2, C, bias=False, **({"tie_word_embeddings": False} | MODELS[name])))
    x, y = torch.randint(V, (2, 3, 32))
    gradients = []
    for only_loss in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            logits, value = model(x, y, only_loss=only_loss)
        assert (logits is None) == only_loss
        value.backward()
        gradients.append([value.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    # Probabilities are rounded to bfloat16, the sum over tokens is not.
    assert abs(gradients[0][0] - gradients[1][0]) < (1e-5 if dtype == torch.float32 else 4e-4)
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * a.norm()


@pytest.mark.parametrize("spoil", ["adapter on the head", "soft cap", "float16"])
def test_a_head_that_is_more_than_a_product_is_computed_in_full(spoil):
    cap = {"block": "llama", "activation": "silu", "logit_softcap": 5.0} if spoil == "soft cap" else {}
    model = GPT(GPTConfig(32, V, 1, 2, C, bias=False, tie_word_embeddings=False, **cap))
    if spoil == "adapter on the head":
        apply_lora(model, LoRAConfig(targets=["lm_head"]))
    x, y = torch.randint(V, (2, 1, 8))
    with torch.autocast("cpu", dtype=torch.float16, enabled=spoil == "float16"):
        _, value = model(x, y, only_loss=True)
        logits, _ = model(x, y)
    torch.testing.assert_close(value, F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("K", [4, 2, 1])
def test_attention_by_products_is_as_near_to_the_exact_one_as_its_precision_allows(K):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 48, 16, generator=generator) for heads in (4, K, K))
    exact = attention.attend(q.double(), k.double(), v.double(), None, 0.25)
    q, k, v = (x.bfloat16().requires_grad_() for x in (q, k, v))
    assert attention._by_products(q) and not attention._by_products(q.float())
    found = attention.attend(q, k, v, None, 0.25)
    assert (found - exact).norm() < 0.01 * exact.norm()
    flash = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
    expected = torch.autograd.grad(flash.transpose(1, 2).flatten(2).square().sum(), (q, k, v))
    for a, b in zip(torch.autograd.grad(found.square().sum(), (q, k, v)), expected, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()
    torch.manual_seed(0)
    dropped = attention.attend(q, k, v, None, 0.25, dropout=0.5)
    assert not torch.allclose(dropped, found, atol=1e-2)


def test_attention_is_by_products_behind_norms_of_queries_in_float32(monkeypatch):
    seen, by_products = [], attention._attend_by_products
    monkeypatch.setattr(attention, "_attend_by_products", lambda *given: seen.append(given) or by_products(*given))
    block = {"block": "llama", "activation": "silu", "qk_norm": True}
    model = GPT(GPTConfig(32, V, 2, 2, C, bias=False, tie_word_embeddings=False, **block))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randint(V, (2, 16)))
    assert [{x.dtype for x in (q, k, v)} for q, k, v, *_ in seen] == [{torch.bfloat16}] * 2


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["small", "modern"])
def test_in_bfloat16_a_run_learns_as_in_float32(preset, dataset, tmp_path):
    """200 steps: the curves differ by less than those of two float32 runs with other seeds."""

    def curve(name, *settings):
        out = (f"dataset={dataset}", f"out_dir={tmp_path / name}", f"preset={preset}")
        sizes = (*QUICK, "n_head=4", "n_embd=64", *settings)  # the last of two of one key counts
        config, given = configurator.load([*out, *sizes, "learning_rate=3e-3", "max_iters=200"])
        trainer, _ = set_up(prepare_start(config, given, Ranks()), Ranks())
        return torch.tensor([trainer.step()[0] for _ in range(200)])

    reference, low = curve("a", "dtype=float32"), curve("b", "dtype=bfloat16")
    other = curve("c", "dtype=float32", "seed=7")
    assert reference[0] - reference[-20:].mean() > 1.0
    # The order of the data is the seed's, so single losses of two seeds are of other sentences: means are compared.
    means = [losses.view(10, 20).mean(dim=1) for losses in (reference, low, other)]
    assert (means[1] - means[0]).abs().max() < (means[2] - means[0]).abs().max()
    assert (low - reference).abs().mean() < 0.02
