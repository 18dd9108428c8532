"""packed.py: weights of 16 and 8 bits give the numbers of a model that was rounded in the same way."""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import generation
import packed
from lora import LoRAConfig, apply_lora
from model import GPT, GPTConfig

CPU = torch.device("cpu")
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
KINDS = {
    "gpt2": GPTConfig(block_size=48, vocab_size=203, n_layer=2, n_head=2, n_embd=32),
    "llama": GPTConfig(
        block_size=48,
        vocab_size=203,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=32,
        block="llama",
        bias=False,
        qkv_bias=True,
        tie_word_embeddings=False,
        norm_plus_one=True,
        logit_softcap=30.0,
    ),
}
KINDS["gemma"] = replace(
    KINDS["llama"],
    qkv_bias=False,
    qk_norm=True,
    post_norms=True,
    scaled_embeddings=True,
    activation="gelu_tanh",
    n_inner=40,
    head_size=12,
    sliding_window=7,
    global_layers=(1,),
    rope_local_theta=500.0,
    attention_softcap=20.0,
)
KINDS["phi"] = replace(
    KINDS["llama"],
    bias=True,
    norm_plus_one=False,
    tie_word_embeddings=True,
    rotary_share=0.5,
    n_kv_head=4,
    rope_scaling={
        "rope_type": "longrope",
        "original_max_position_embeddings": 24,
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 3.0],
        "attention_factor": 1.2,
    },
)
pytestmark = pytest.mark.skipif(not packed.can_pack(CPU), reason="FBGEMM is for x86 processors")


@pytest.fixture(params=KINDS)
def model(request) -> GPT:
    torch.manual_seed(0)
    model = GPT(KINDS[request.param]).eval()
    for parameter in model.parameters():  # biases and norms that count
        nn.init.normal_(parameter, std=0.3)
    return model


def rounded(model: GPT) -> GPT:
    """In float32, with the linear layers' weights that float16 leaves; a tied embedding keeps its own."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.half().float())
    return model


def test_float16_weights_give_the_logits_of_rounded_weights(model):
    idx = torch.randint(203, (3, 20))
    cache = model.new_cache(3, 20)
    with torch.no_grad():
        expected, _ = rounded(model).double()(idx, targets=idx)
        half = packed.pack(model)
        whole, loss = half(idx, targets=idx)
        half(idx[:, :19], cache=cache)
        last, _ = half(idx[:, 19:], cache=cache)
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(last[:, 0], whole[:, -1], rtol=1e-5, atol=1e-4)
    assert whole.dtype == torch.float32 and loss.isfinite() and not any(type(m) is nn.Linear for m in half.modules())


def test_float16_weights_generate_the_tokens_of_rounded_weights(model):
    idx = torch.randint(203, (2, 5))
    expected = rounded(model).generate(idx, 60, temperature=0)  # beyond the context, where the cache ends
    assert torch.equal(packed.pack(model).generate(idx, 60, temperature=0), expected)


def test_prompts_of_different_lengths_generate_together_what_they_do_alone(model):
    half = packed.pack(model)
    rows = [torch.randint(203, (1, n)) for n in (3, 7, 11)]
    alone = [half.generate(row, 12, temperature=0)[0, -12:] for row in rows]
    idx, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for i, row in enumerate(rows):
        idx[i, -row.size(1) :], mask[i, -row.size(1) :] = row[0], 1
    together = half.generate(idx, 12, temperature=0, attention_mask=mask)[:, -12:]
    assert torch.equal(together, torch.stack(alone))


def test_int8_weights_are_within_half_a_step_of_their_row(model):
    layer = model.blocks[0].mlp.get_submodule("c_fc" if model.config.block == "gpt2" else "up_proj")
    with torch.no_grad():
        layer.weight[3] = 0  # a row of nothing has no scale
    eighth = packed.Int8Linear(layer)
    error = (eighth.weight * eighth.scales[:, None] - layer.weight).abs()
    assert (error <= eighth.scales[:, None] * 0.501).all() and not eighth.weight[3].any()
    x = torch.randn(2, 3, 32)
    exact = nn.functional.linear(x.bfloat16().double(), (eighth.weight * eighth.scales[:, None]).double())
    exact += 0 if layer.bias is None else layer.bias
    torch.testing.assert_close(eighth(x).double(), exact, rtol=2**-7, atol=0.02)


@pytest.mark.parametrize("width", [1, 15, 40, 200, 1000])  # none a multiple of the 16 that the product reads at a time
def test_int8_layers_can_be_of_any_width(width):
    torch.manual_seed(0)
    for rows, outputs in ((1, 64), (1, 67), (3, 64), (8, 203)):
        layer, x = nn.Linear(width, outputs), torch.randn(rows, width)
        made = packed.Int8Linear(layer)
        exact = x.bfloat16().double() @ (made.weight[:, :width].double() * made.scales[:, None]).t() + layer.bias
        torch.testing.assert_close(made(x).double(), exact, rtol=0.01, atol=0.01)


@pytest.mark.skipif(not packed.has_vnni(), reason="the processor has no products of integers")
@pytest.mark.parametrize("width", [packed.WIDE, 1000])
def test_large_int8_layers_see_each_row_of_activations_in_16_bits(width):
    torch.manual_seed(0)
    layer, x = nn.Linear(width, packed.MANY // width + 1), torch.randn(2, 3, width)
    x[0, 0], x[0, 1], x[1, 1, 5] = 0, x[0, 1] * 1e-3, 500.0
    made = packed.int8_linear(layer)
    assert type(made) is packed.WideInt8Linear
    assert type(packed.int8_linear(nn.Linear(width, 64))) is packed.Int8Linear
    scales = layer.weight.detach().double().abs().amax(dim=1, keepdim=True) / 127
    weight = torch.ops.quantized.linear_unpack(made.packed)[0].int_repr() * scales
    assert ((weight - layer.weight.detach()).abs() <= scales / 2 * 1.0001).all()
    exact = x.double() @ weight.t() + layer.bias.detach()
    step = x.abs().amax(dim=-1, keepdim=True).double() / 127 / 254
    worst = step / 2 * weight.abs().sum(dim=1) * 1.01 + 1e-5
    assert ((made(x) - exact).abs() <= worst).all()


def test_int8_logits_stay_near_and_are_those_of_no_other_dtype(model):
    idx = torch.randint(203, (4, 30))
    with torch.no_grad():
        exact = model(idx, targets=idx)[1]
        eighth = packed.pack(model, "int8")(idx, targets=idx)[1]
    assert 0 < abs(eighth - exact) < 0.05 * exact


def test_a_weight_that_float16_cannot_hold_stays_as_it_is(model):
    idx, mlp = torch.randint(203, (2, 9)), model.blocks[1].mlp
    layers = [mlp.c_fc] if model.config.block == "gpt2" else [mlp.gate_proj, mlp.up_proj]  # which are one product
    with torch.no_grad():
        layers[-1].weight[0, 0] = 1e5
        kept = [layer.weight.clone() for layer in layers]
        expected = rounded(model)
        for layer, weight in zip(layers, kept, strict=True):
            path = next(path for path, module in model.named_modules() if module is layer)
            expected.get_submodule(path).weight = nn.Parameter(weight)
        expected = expected.double()(idx, targets=idx)[0]
        found = packed.pack(model)(idx, targets=idx)[0]
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("targets", [r".*\.0\..*proj", r".*(wte|embed_tokens)"])
def test_a_model_with_an_adapter_is_refused_before_anything_changes(model, targets):
    apply_lora(model, LoRAConfig(targets=targets), untie=True)
    idx = torch.randint(203, (2, 9))
    expected = model(idx)[0]
    with pytest.raises(ValueError, match=r"is a LoRA.*merge the model's adapters"):
        packed.pack(model)
    assert torch.equal(model(idx)[0], expected)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="nothing is compiled there")
@pytest.mark.parametrize("dtype", packed.LINEAR)
def test_what_is_compiled_gives_what_python_gives(model, dtype, monkeypatch):
    idx, mask = torch.randint(203, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    made = packed.pack(copy.deepcopy(model), dtype)
    monkeypatch.setattr(packed, "compiled", lambda module: module)
    plain = packed.pack(model, dtype)
    assert isinstance(made.layers, torch.jit.ScriptModule) and type(plain.layers) is packed.PackedLayers
    assert isinstance(made.draw, torch.jit.ScriptFunction) and plain.draw is generation.draw
    drawn = {"temperature": 0}, {"top_k": 9}, {"top_k": 60, "top_p": 0.9}, {"top_p": 0.5, "temperature": 0.8}, {}
    for settings in drawn * 3:  # it is compiled again for what it has met
        assert torch.equal(made(idx, targets=idx)[1], plain(idx, targets=idx)[1])
        seeds = (torch.Generator().manual_seed(1) for _ in range(2))
        tokens = [
            m.generate(idx, 45, attention_mask=mask, generator=seed, **settings)
            for m, seed in zip((made, plain), seeds, strict=True)
        ]
        assert torch.equal(*tokens)


@pytest.mark.parametrize("kind, whole", [("gpt2", {"norm_eps": 1}), ("gemma", {"attention_softcap": 20})])
def test_numbers_of_a_configuration_may_be_whole(kind, whole):
    torch.manual_seed(0)
    idx, model = torch.randint(203, (2, 9)), GPT(replace(KINDS[kind], **whole))
    with torch.no_grad():
        torch.testing.assert_close(packed.pack(copy.deepcopy(model))(idx)[0], rounded(model)(idx)[0])


def test_a_packed_model_refuses_what_it_does_not_have(model):
    half, idx = packed.pack(model), torch.randint(203, (2, 9))
    with pytest.raises(ValueError, match="packed already"):
        packed.pack(half)
    for asked in ({"hidden_states": []}, {"attentions": []}):
        with pytest.raises(ValueError, match="gives no hidden states and no attentions"):
            half(idx, **asked)


def test_where_every_layer_has_the_window_it_holds():
    torch.manual_seed(0)
    model = GPT(replace(KINDS["gemma"], global_layers=()))
    idx = torch.randint(203, (2, 5))
    expected = rounded(model).generate(idx, 40, temperature=0)
    assert torch.equal(packed.pack(model).generate(idx, 40, temperature=0), expected)


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(packed.__file__).parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="the kernel gives no huge pages")
def test_what_is_allocated_next_lies_in_huge_pages():
    code = (
        "import torch, device\n"
        "device.use_huge_pages()\n"
        "weights = [torch.ones(1 << 18) for _ in range(100)]\n"
        "print(*(line for line in open('/proc/self/smaps_rollup') if line.startswith('AnonHuge')))\n"
    )
    assert int(python(code).split()[1]) > 80_000  # KiB, of 102,400


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_where_addresses_are_counted_none_are_held_for_huge_pages():
    code = (
        "import mmap, resource, torch, device\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + (5 << 30),) * 2)\n"
        "device.use_huge_pages()\n"
        "mmap.mmap(-1, 2 << 30)\n"
    )
    python(code)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
@pytest.mark.parametrize("dtype", packed.LINEAR)
def test_what_packing_frees_is_given_back(dtype):
    code = (
        "import torch, device, packed, model\n"
        "def held():\n"
        "    return int(next(line for line in open('/proc/self/status') if line.startswith('VmRSS')).split()[1])\n"
        "device.use_huge_pages()\n"
        "config = model.GPTConfig(block_size=256, vocab_size=300, n_layer=12, n_head=8, n_embd=512)\n"
        "gpt = model.GPT(config)\n"
        "loaded = held()\n"
        f"packed.pack(gpt, '{dtype}')\n"
        "made = held()\n"
        "gpt.generate(torch.zeros(4, 200, dtype=torch.long), 20)\n"
        "print(loaded - made, held() - made, 4 * model.count_parameters(config) // 1024)\n"
    )
    freed, taken, weights = map(int, python(code).split())
    assert freed > 0.15 * weights  # a half or a quarter of them stays, and TorchScript takes some for itself
    assert taken < 1.2 * weights  # and does not hold the first prompt's activations of all layers
