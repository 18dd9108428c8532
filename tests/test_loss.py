"""loss.py and attention.py's faster ways against the plain ones, in float64 and where bfloat16 rounds."""

from dataclasses import replace

import pytest
import torch
from conftest import QUICK
from torch.nn import functional as F

import attention
import configurator
import loss
from distributed import Ranks
from lora import LoRAConfig, apply_lora, disable_adapters
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


def plain(x, weight, targets, extra=None):
    logits = F.linear(x, weight) if extra is None else F.linear(x, weight) + F.linear(*extra)
    return F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), targets, ignore_index=IGNORE_INDEX)


def fused(x, weight, targets, extra=None):
    return loss.linear_cross_entropy(x, weight, targets, IGNORE_INDEX, extra)


@pytest.fixture(params=["as it is", "reordered"])
def order(request, monkeypatch):
    """The order of a bfloat16 weight in products."""
    monkeypatch.setattr(loss, "MANY", 1 if request.param == "reordered" else 1 << 30)
    return request.param


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("held", [1 << 26, 3 * 128, 1])  # all at once, in rounds of three rows, of one
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_loss_and_gradients_are_those_of_projection_and_cross_entropy(dtype, tolerance, held, monkeypatch):
    monkeypatch.setattr(loss, "BUFFER", held)
    x, weight, targets = tensors(dtype)
    expected, found = plain(x, weight, targets), fused(x, weight, targets)
    assert found.dtype == expected.dtype and abs(found - expected) < tolerance
    pairs = [torch.autograd.grad(0.3 * value, (x, weight)) for value in (expected, found)]
    for reference, gradient in zip(*pairs, strict=True):
        assert gradient.dtype == dtype
        assert (gradient - reference).abs().max() <= tolerance * reference.abs().max()
    with torch.no_grad():
        assert abs(fused(x, weight, targets) - expected) < tolerance


@pytest.mark.usefixtures("order")
def test_a_sum_over_many_rounds_is_not_rounded_at_each(monkeypatch):
    x, weight, targets = tensors(torch.bfloat16)
    x, weight, targets = x.detach().repeat(20, 1), weight.double().detach().requires_grad_(), targets.repeat(20)
    (exact,) = torch.autograd.grad(plain(x.double(), weight, targets), weight)
    for held in (1 << 26, 1):
        monkeypatch.setattr(loss, "BUFFER", held)
        (found,) = torch.autograd.grad(fused(x, weight, targets), weight)
        assert (found - exact).norm() < 0.01 * exact.norm()


@pytest.mark.skipif(not loss._has_fast_bfloat16(), reason="oneDNN has no products of bfloat16 here")
def test_a_weight_is_reordered_once_for_many_tokens_of_bfloat16_alone(monkeypatch):
    reordered, loss_reordered = [], loss._reordered
    monkeypatch.setattr(loss, "_reordered", lambda weight: reordered.append(weight.shape) or loss_reordered(weight))
    monkeypatch.setattr(loss, "MANY", N)
    x, weight, targets = tensors(torch.float32)
    low = x.detach().bfloat16().requires_grad_()
    with loss.unchanged_weights():
        fused(x, weight, targets).backward()
        fused(low[1:], weight, targets[1:]).backward()
        assert not reordered
        with torch.no_grad():
            fused(low, weight, targets)
        assert not reordered
        for _ in range(2):
            fused(low, weight, targets).backward()
    assert reordered == [(C, 128)]  # padded as the logits are


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
        assert fused(low, -weight, targets) != before  # another weight, another cast
        assert fused(x, weight, targets) != before  # another dtype
    before, after = change()
    assert after > before
    (gradient,) = torch.autograd.grad(after, weight)
    assert gradient.dtype == torch.float32


def test_what_was_made_of_a_frozen_weight_stays_and_nothing_else():
    x, weight, targets = tensors(torch.float32)
    low, fixed, frozen, met = x.detach().bfloat16(), weight.detach(), {}, []
    extra = low[:, :4], weight[:, :4]
    for _ in range(2):
        with loss.unchanged_weights(frozen):
            losses = [fused(low, fixed, targets), fused(low, weight, targets), fused(low, fixed, targets, extra=extra)]
            assert len(frozen) == 3
        met += [losses, *frozen.items()]
        weight.data *= 2  # as training would
    ((kept, _, _), first), ((again, _, _), second) = met[1], met[3]
    assert first is second and kept[0] is again[0] is fixed and len(met) == 4
    assert met[0][0] == met[2][0] and met[0][1] < met[2][1] and met[0][2] != met[2][2]


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("held", [1 << 26, 3 * 128])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_a_second_product_is_added_to_the_logits(dtype, tolerance, held, monkeypatch):
    monkeypatch.setattr(loss, "BUFFER", held)
    x, weight, targets = tensors(dtype)
    h, B = (0.3 * operand[:, :5].detach() for operand in tensors(dtype, seed=1)[:2])
    extra = h, B = h.requires_grad_(), B.to(torch.promote_types(dtype, torch.float32)).requires_grad_()  # B is wide
    expected = plain(*(tensor.double() for tensor in (x, weight)), targets, (h.double(), B.double()))
    for trained in ((x, *extra), (x, weight, *extra), (weight,), extra[1:]):
        given = [t if any(t is other for other in trained) else t.detach() for t in (x, weight, *extra)]
        found = fused(*given[:2], targets, given[2:])
        assert abs(found - expected) < tolerance
        pairs = (torch.autograd.grad(value, trained, retain_graph=True) for value in (expected, found))
        for reference, gradient in zip(*pairs, strict=True):
            assert (gradient - reference).abs().max() <= tolerance * reference.abs().max()
    with torch.no_grad(), loss.unchanged_weights():
        assert abs(fused(x, weight, targets, extra) - expected) < tolerance
        assert abs(fused(x, weight, targets, (h, -B)) - expected) > 0.01


def test_what_is_frozen_gets_no_gradient_and_costs_none():
    x, weight, targets = tensors(torch.float32)
    (dx,) = torch.autograd.grad(fused(x, weight.detach(), targets), x)
    torch.testing.assert_close(dx, torch.autograd.grad(plain(x, weight, targets), x)[0])
    (dweight,) = torch.autograd.grad(fused(x.detach(), weight, targets), weight)
    torch.testing.assert_close(dweight, torch.autograd.grad(plain(x, weight, targets), weight)[0])


def test_a_head_with_a_bias_has_its_bias():
    model, idx = GPT(GPTConfig(16, V, 1, 2, C)), torch.randint(V, (2, 16))
    model.lm_head = torch.nn.Linear(C, V, bias=True)
    torch.testing.assert_close(model(idx, idx, only_loss=True)[1], model(idx, idx)[1])


def test_a_buffer_from_inference_mode_serves_training_too():
    x, weight, targets = tensors(torch.float32)
    loss.forget_buffer()
    with torch.inference_mode():
        fused(x, weight, targets)
    fused(x, weight, targets).backward()
    assert weight.grad.isfinite().all()


def test_a_mean_over_any_number_of_tokens_is_not_rounded():
    """bfloat16 has no 1 / 60: gradients that were multiplied by it would all be 0.3 % too long."""
    x, weight, targets = (tensor.detach() for tensor in tensors(torch.bfloat16))
    x, targets = x[4:].repeat(10, 1)[:600], targets[4:].clamp(min=0).repeat(10)[:600]
    trained = [tensor.requires_grad_() for tensor in (x, weight)]
    exact = torch.autograd.grad(plain(x.double(), weight.double(), targets), trained)
    found = torch.autograd.grad(fused(x, weight, targets), trained)
    for reference, gradient in zip(exact, found, strict=True):
        reference, gradient = reference.double(), gradient.double()
        assert (gradient * reference).sum() / reference.square().sum() == pytest.approx(1, abs=1e-3)


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [-100, -2, V, V + 5])  # the last within the columns that pad the buffer
def test_a_target_that_is_no_token_is_refused(wrong, dtype):
    x, weight, targets = tensors(dtype)
    targets[7] = wrong
    for operands in ((x, weight), (x.detach(), weight.detach())):
        with pytest.raises(RuntimeError, match=f"index {wrong} is out of bounds for dimension 0 with size {V}"):
            fused(*operands, targets)


def test_a_batch_without_targets_has_no_loss_and_an_impossible_target_a_finite_one():
    x, weight, targets = tensors(torch.float32)
    nothing = fused(x, weight, torch.full_like(targets, IGNORE_INDEX))
    assert nothing.isnan() and not any(g.any() for g in torch.autograd.grad(nothing, (x, weight)))  # as torch has it
    x = x.detach() * 1e4
    assert plain(x, weight, targets) > 1000 and 50 < fused(x, weight, targets) < 88  # 87 nats where p is below 1e-38
    with torch.no_grad():
        torch.testing.assert_close(fused(x, weight, targets), plain(x, weight, targets))
    assert fused(x * float("inf"), weight, targets).isnan()


ADAPTED = LoRAConfig(rank=4, alpha=6, dropout=0.2, targets="all")
MODELS = {
    "gpt2": {},
    "tied": {"tie_word_embeddings": True},
    "llama": {"block": "llama", "activation": "silu", "n_kv_head": 1},
    "adapted": {},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_has_the_same_loss_and_gradients_with_and_without_logits(name, dtype):
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, V, 2, 2, C, bias=False, **({"tie_word_embeddings": False} | MODELS[name])))
    if name == "adapted":
        apply_lora(model, ADAPTED)
        for weight in list(model.parameters()):
            weight.data += 0.1 * torch.randn_like(weight)  # B is zero
    trained = [p for p in model.parameters() if p.requires_grad]
    x, y = torch.randint(V, (2, 3, 32))
    gradients = []
    for only_loss in (False, True):
        torch.manual_seed(1)  # of the adapters' dropout
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            logits, value = model(x, y, only_loss=only_loss)
        assert (logits is None) == only_loss
        value.backward()
        gradients.append([value.detach(), *(p.grad.clone() for p in trained)])
        model.zero_grad()
    # Probabilities are rounded to bfloat16, the sum over tokens is not.
    assert abs(gradients[0][0] - gradients[1][0]) < (1e-5 if dtype == torch.float32 else 4e-4)
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * a.norm()


def test_an_adapter_on_the_head_counts_while_it_is_active(monkeypatch):
    model = GPT(GPTConfig(32, V, 1, 2, C, bias=False, tie_word_embeddings=False))
    x, y = torch.randint(V, (2, 1, 8))
    base = model(x, y, only_loss=True)[1]
    apply_lora(model, replace(ADAPTED, targets=["lm_head"], dropout=0.0))
    assert model(x, y, only_loss=True)[1] == base  # B is zero
    model.lm_head.lora.default.B.data.normal_()
    monkeypatch.setattr(model, "project", None)  # it takes no logits
    assert model(x, y, only_loss=True)[1] > base + 0.01
    with disable_adapters(model):
        assert model(x, y, only_loss=True)[1] == base


class Doubled(torch.nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("spoil", ["a head of another class", "soft cap", "float16"])
def test_a_head_that_is_more_than_a_product_is_computed_in_full(spoil):
    cap = {"block": "llama", "activation": "silu", "logit_softcap": 5.0} if spoil == "soft cap" else {}
    model = GPT(GPTConfig(32, V, 1, 2, C, bias=False, tie_word_embeddings=False, **cap))
    if spoil == "a head of another class":
        model.lm_head.__class__ = Doubled
        apply_lora(model, replace(ADAPTED, targets=["lm_head"], dropout=0.0))
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
