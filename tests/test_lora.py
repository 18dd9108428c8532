"""lora.py against PEFT on tiny Transformers models, against float64, and against the model without it."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from architecture import PRESETS
from lora import (
    LoRAConfig,
    active_adapter,
    adapter_names,
    add_adapter,
    add_weighted_sum,
    apply_lora,
    disable_adapters,
    load_lora_state_dict,
    lora_state_dict,
    merge_lora,
    merged,
    remove_lora,
    round_frozen,
    set_active,
)
from model import GPT, GPTConfig

VOCAB = 61


def gpt(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{"block_size": 16, "vocab_size": VOCAB, "n_layer": 2, "n_head": 3, "n_embd": 24, **changes}))


def gpt2(**changes) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, **changes)).eval()


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **changes)).eval()


MODELS = pytest.mark.parametrize("build", [gpt, gpt2, llama])


def logits(model, x):
    return model(x, x)[0] if isinstance(model, GPT) else model(x).logits


def tokens(*shape, seed=0):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def trained(model, adapter=None, size=0.1, seed=1):
    """Random numbers in A and B, as if the adapter had learnt something."""
    generator = torch.Generator().manual_seed(seed)
    state = lora_state_dict(model, adapter)
    load_lora_state_dict(
        model, {key: torch.randn(t.shape, generator=generator) * size for key, t in state.items()}, adapter
    )
    return model


def adapted(model, adapter="default", **settings):
    apply_lora(model, LoRAConfig(**settings), adapter=adapter)
    return trained(model, adapter)


def deltas(model, adapter=None):
    """{path: scale * B A} in float64, from the exported tensors alone."""
    state = lora_state_dict(model, adapter)
    name = adapter or active_adapter(model)
    found = {}
    for key, a in state.items():
        for end_a, end_b in ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")):
            if key.endswith(end_a):
                path = key.removesuffix(end_a)
                found[path] = model.get_submodule(path).lora[name].scale * (state[path + end_b].double() @ a.double())
    return found


# -- the configuration


def test_alpha_is_twice_the_rank_unless_given():
    assert LoRAConfig(rank=4).alpha == 8
    assert LoRAConfig(rank=4, alpha=1).alpha == 1


def test_everything_wrong_with_a_configuration_is_one_error():
    with pytest.raises(ValueError, match=r"^impossible LoRA: ") as error:
        LoRAConfig(
            rank=0,
            alpha=-1.0,
            dropout=1.0,
            targets=(),
            exclude="(",
            rank_pattern={"c_attn": 2.5},
            alpha_pattern={"c_proj": 0, "*": 1},
        )
    for words in (
        "rank=0 must be a whole number above 0",
        "alpha=-1.0 must be a number above 0",
        "dropout=1.0 must be at least 0 and below 1",
        "targets=() and exclude='(' must be names, and targets not empty",
        "'(' is no regular expression",
        "rank_pattern['c_attn']=2.5 must be a whole number",
        "alpha_pattern['c_proj']=0 must be a number",
        "'*' is no regular expression",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    "bad", [{"rank": True}, {"rank": "8"}, {"alpha": float("nan")}, {"dropout": "0.1"}, {"targets": [1]}]
)
def test_a_setting_of_the_wrong_kind_is_refused(bad):
    with pytest.raises(ValueError, match="impossible LoRA"):
        LoRAConfig(**bad)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 4, "alpha": 3.0, "dropout": 0.1, "targets": ["c_attn"]},
        {"r": 4, "lora_alpha": 3.0, "lora_dropout": 0.1, "target_modules": ["c_attn"]},
        {"lora_rank": 4, "lora_alpha": 3.0, "lora_dropout": 0.1, "lora_targets": ["c_attn"]},
        {"lora_r": 4, "alpha": 3.0, "dropout": 0.1, "lora_module_path": ["c_attn"]},
        {"lora_r": 4, "r": 4, "alpha": 3.0, "dropout": 0.1, "targets": ["c_attn"]},
    ],
)
def test_the_fields_other_spellings_mean_the_same(settings):
    assert LoRAConfig.from_dict(settings) == LoRAConfig(rank=4, alpha=3.0, dropout=0.1, targets=["c_attn"])


def test_unknown_settings_spellings_that_disagree_and_bad_values_are_one_error():
    with pytest.raises(ValueError) as error:
        LoRAConfig.from_dict({"lora_rnk": 4, "r": 8, "lora_rank": 16, "dropout": 2})
    assert "unknown LoRA setting 'lora_rnk', the nearest are lora_rank" in str(error.value)
    assert "r=8 and lora_rank=16 give one setting two values" in str(error.value)
    assert "dropout=2 must be" in str(error.value)


# -- which layers


@pytest.mark.parametrize(
    ("targets", "matched"),
    [
        (["c_attn"], {"h.0.attn.c_attn", "h.1.attn.c_attn"}),
        (["attn.c_proj"], {"h.0.attn.c_proj", "h.1.attn.c_proj"}),
        (["transformer.h.1.mlp.c_fc", "lm_head"], {"h.1.mlp.c_fc", "lm_head"}),
        (["wpe"], {"wpe"}),
        (r".*\.(c_attn|c_fc)", {f"h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "mlp.c_fc")}),
        (".*/attn/c_attn", {"h.0.attn.c_attn", "h.1.attn.c_attn"}),
        (".*1.*proj|lm_head", {"h.1.attn.c_proj", "h.1.mlp.c_proj", "lm_head"}),
    ],
)
def test_a_list_matches_the_ends_of_paths_and_a_string_is_a_regular_expression_for_all_of_it(targets, matched):
    report = apply_lora(gpt(tie_word_embeddings=False), LoRAConfig(targets=targets))
    assert {path.removeprefix("transformer.") for path in report.matched} == matched


@pytest.mark.parametrize(
    ("targets", "leaves"),
    [
        (r"(?!.*\.mlp\.).*_proj", "q k v o"),
        (r"(?!.*/mlp/).*_proj", "q k v o"),
        (r"(?!.*q_proj).*(self_attn|attn).*", "k v o"),
        (r"(?!.*self_attn).*layers.*", "gate up down"),
        (r"(?!.*q_einsum).*/attn/.*", "k v o"),
        (r"(?!.*einsum).*layers.*", "gate up down"),
        (r".*\.attn\..*", "q k v o"),
        (".*q_einsum|.*o_proj", "q o"),
        (r".*attn\.[qv]_proj", "q v"),
        (".*attn/(q|v)_proj", "q v"),
        (r".*attn\.\w+_proj", "q k v o"),
        (r".*\battn\b.*", "q k v o"),
        (r"(?!.*attn\.).*_proj", "gate up down"),
        (r".*\.(attn|mlp)\..*", "q k v o gate up down"),
        (r".*[.](mlp|attn)[.].*", "q k v o gate up down"),
        (r".*\.(?:attn|mlp)\..*", "q k v o gate up down"),
        (r".*(attn|mlp).*proj", "q k v o gate up down"),
        (r".*(?:attn|mlp).*(q|v|up|down)_proj", "q v up down"),
        (r".*_(attn|mlp).*", "q k v o"),
        (r".+_(?:attn).+proj", "q k v o"),
        (r".*(?=attn).*_proj", "q k v o"),
        (r"(?!.*\.(attn|lm_head)).*proj", "gate up down"),
        (r".*[./]attn[./].*", "q k v o"),
        (r"model\.layers\.\d+\.(?!attn\b).*_proj", "gate up down"),
        (r".*\.\d+\.(?!attn).*_proj", "gate up down"),
        (r"model\.layers\.\d+\.(?=attn\.).*", "q k v o"),
        (r".*\.(mlp\..*|attn\..*)", "q k v o gate up down"),
        (r".*\.(?:mlp\.\w+|attn\.\w+)", "q k v o gate up down"),
        (r"(.*\.)?(attn|mlp)\..*", "q k v o gate up down"),
        (r".*\.((attn)|mlp)\..*", "q k v o gate up down"),
        (r".*\.(?P<part>attn|mlp)\..*", "q k v o gate up down"),
        (r"(?!.*\.(mlp\b|attn\b|embed|lm_head)).*layers.*|.*(?<=\.)q_einsum", "q"),
        (r"(.*)attn\.(q|v)_proj", "q v"),
        (r".*(self|encoder)[_]attn\.(q|v)_proj", "q v"),
        (r".*[a-z_]attn\.k_proj", "k"),
    ],
)
def test_an_expression_that_excludes_sees_no_other_spelling_of_a_path(targets, leaves):
    assert {path.split(".")[-1] for path in apply_lora(llama(), LoRAConfig(targets=targets)).matched} == {
        f"{leaf}_proj" for leaf in leaves.split()
    }
    with pytest.raises(ValueError, match="match no layer"):
        apply_lora(llama(), LoRAConfig(targets=r"[^.]*_proj"))


def test_an_adapter_is_on_no_layer_that_a_model_never_calls():
    sizes = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 1, "state_size": 4}
    mamba = MambaForCausalLM(MambaConfig(**sizes))
    mixer = "backbone.layers.0.mixer."
    assert {path.removeprefix(mixer) for path in apply_lora(mamba, LoRAConfig()).matched} == {
        "in_proj",
        "x_proj",
        "out_proj",
    }
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=24, d_kv=8, d_ff=40, num_layers=1, num_heads=3))
    with pytest.raises(ValueError, match="match no layer that LoRA can adapt: targets entry 'shared'"):
        apply_lora(t5, LoRAConfig(targets=["shared"]), untie=True)
    assert len(apply_lora(t5, LoRAConfig(targets=["embed_tokens"]), untie=True).matched) == 2


@pytest.mark.parametrize("attn", [r".*\.attn\.", ".*/attn/", ".*attn.", r".*\battn\."])
def test_a_module_that_is_called_attn_keeps_its_names(attn):
    sizes = {"vocab_size": VOCAB, "n_positions": 16, "n_embd": 24, "n_layer": 1, "n_head": 3, "rotary_dim": 4}
    model = GPTJForCausalLM(GPTJConfig(**sizes))
    matched = apply_lora(model, LoRAConfig(targets=f"{attn}(q|v)_proj")).matched
    assert matched == tuple(f"transformer.h.0.attn.{name}_proj" for name in "vq")


@pytest.mark.parametrize(
    ("targets", "leaves"),
    [
        (".*q_einsum|.*kv_einsum|.*gate_proj", {"q_proj", "k_proj", "v_proj", "gate_proj"}),
        (".*/attn/q_einsum", {"q_proj"}),
        (".*/attn/kv_einsum", {"k_proj", "v_proj"}),
        (".*attn_vec_einsum", {"o_proj"}),
        (["q_einsum", "up_proj"], {"q_proj", "up_proj"}),
    ],
)
def test_gemmas_names_find_the_layers_that_transformers_calls_otherwise(targets, leaves):
    report = apply_lora(llama(), LoRAConfig(targets=targets))
    assert {path.split(".")[-1] for path in report.matched} == leaves
    assert len(report.matched) == 2 * len(leaves)


@MODELS
def test_all_linear_is_every_linear_layer_but_the_output_head(build):
    model = build(tie_word_embeddings=False)
    linear = {n for n, m in model.named_modules() if type(m) is nn.Linear or type(m).__name__ == "Conv1D"}
    assert set(apply_lora(model, LoRAConfig()).matched) == linear - {"lm_head"}


@MODELS
@pytest.mark.parametrize("tied", [False, True])
def test_all_is_also_the_token_embedding_and_the_head_unless_they_share_a_weight(build, tied):
    model = build(tie_word_embeddings=tied)
    words = (
        set() if tied else {"lm_head", next(n for n, m in model.named_modules() if n.endswith(("wte", "embed_tokens")))}
    )
    linear = set(apply_lora(build(tie_word_embeddings=tied), LoRAConfig()).matched)
    assert set(apply_lora(model, LoRAConfig(targets="all")).matched) == linear | words


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_weights_in_half_precision_are_those_that_autocast_makes(tied):
    model, x = gpt(tie_word_embeddings=tied), tokens(2, 16)
    apply_lora(model, LoRAConfig(rank=2))
    trained(model)
    results = []
    for rounded in (False, True):
        if rounded:
            round_frozen(model, torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, loss = model(x, x)
        loss.backward()
        results.append([logits, loss, *(p.grad for p in model.parameters() if p.requires_grad)])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    half = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert half and all(not p.requires_grad for name, p in model.named_parameters() if name in half)
    assert ("lm_head.weight" in half) == (not tied) and "transformer.wte.weight" not in half


def test_what_is_excluded_is_not_adapted():
    model = gpt()
    report = apply_lora(model, LoRAConfig(targets=["c_proj", "c_fc"], exclude=r".*\.1\..*"))
    assert report.matched == ("transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj")
    assert apply_lora(gpt(), LoRAConfig(exclude=["mlp.c_proj", "lm_head"])).matched[-1] == "transformer.h.1.mlp.c_fc"


def test_everything_named_that_matches_nothing_is_one_error_with_the_nearest_names():
    model = gpt()
    config = LoRAConfig(
        targets=["c_attn", "c_prj", "attn.c_fc"],
        exclude=["h.9.mlp.c_fc"],
        rank_pattern={"attn.c_atn": 4},
        alpha_pattern={"c_fc": 4},
    )
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"^these match no layer that LoRA can adapt: ") as error:
        apply_lora(model, config)
    for words in (
        "targets entry 'c_prj' (nearest: c_proj",
        "targets entry 'attn.c_fc' (nearest: attn.c_",
        "exclude entry 'h.9.mlp.c_fc' (nearest: h.",
        "rank_pattern entry 'attn.c_atn' (nearest: attn.c_attn",
        "alpha_pattern entry 'c_fc'",
    ):
        assert words in str(error.value)
    assert "'c_attn'" not in str(error.value)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(p.requires_grad for p in after.values())


@pytest.mark.parametrize("targets", ["q_proj|v_proj", "c_attn", ["h.0"], ["ln_1"], ["proj"], ["c.attn"]])
def test_targets_that_match_no_layer_are_refused(targets):
    with pytest.raises(ValueError, match=r"match no layer that LoRA can adapt.*c_proj.*a list matches the ends"):
        apply_lora(gpt(), LoRAConfig(targets=targets))


def test_excluding_everything_is_refused():
    with pytest.raises(ValueError, match="leaves none of the 2 layers that targets match"):
        apply_lora(gpt(), LoRAConfig(targets=["c_fc"], exclude=["mlp.c_fc"]))


def test_a_second_application_is_refused():
    model = adapted(gpt())
    with pytest.raises(ValueError, match=r"has LoRA already \(default\): add_adapter"):
        apply_lora(model, LoRAConfig(), adapter="other")


def test_layers_whose_weight_is_read_without_calling_them_are_not_adapted():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    model = nn.ModuleDict({"encoder": encoder, "out": nn.Linear(8, 8)})
    assert apply_lora(model, LoRAConfig()).matched == ("out",)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match="out_proj"):
        apply_lora(model, LoRAConfig(targets=["out_proj"]))


def test_an_embedding_that_does_more_than_look_up_is_not_adapted():
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    with pytest.raises(ValueError, match="'embed_tokens'"):  # it scales
        apply_lora(gemma, LoRAConfig(targets=["embed_tokens"]), untie=True)
    with pytest.raises(ValueError, match="'0'"):  # it shortens long rows
        apply_lora(nn.Sequential(nn.Embedding(8, 4, max_norm=1.0), nn.Linear(4, 4)), LoRAConfig(targets=["0"]))


def test_a_linear_layer_that_gives_something_else_than_a_product_is_not_adapted():
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = PhimoeForCausalLM(PhimoeConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2))
    assert isinstance(model.model.layers[0].mlp.router, nn.Linear)  # and gives the chosen experts too
    drawn = torch.get_rng_state()
    with pytest.raises(ValueError, match="'router'"):
        apply_lora(model, LoRAConfig(targets=["router"]))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert apply_lora(model, LoRAConfig()).matched == tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo")
    model(tokens(1, 4))


def test_a_linear_layer_with_a_product_of_its_own_is_adapted():
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    falcon = FalconForCausalLM(FalconConfig(**sizes)).eval()
    assert type(falcon.transformer.h[0].mlp.dense_h_to_4h).forward is not nn.Linear.forward
    assert len(apply_lora(falcon, LoRAConfig()).matched) == 4
    x = tokens(1, 4)
    before = trained(falcon)(x).logits
    merge_lora(falcon)
    torch.testing.assert_close(falcon(x).logits, before)


def test_the_output_head_that_a_model_names_is_not_in_all_linear_whatever_it_is_called():
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = BertForMaskedLM(BertConfig(**sizes, num_attention_heads=2))
    assert model.get_output_embeddings() is model.cls.predictions.decoder
    matched = apply_lora(model, LoRAConfig()).matched
    assert "cls.predictions.transform.dense" in matched and "cls.predictions.decoder" not in matched


@pytest.mark.parametrize(("rank", "count"), [(8, 140_800), (16, 281_600)])
def test_the_small_preset_trains_the_documented_number_of_parameters(rank, count):
    with torch.device("meta"):
        model = GPT(PRESETS["small"])
    report = apply_lora(model, LoRAConfig(rank=rank, targets=["c_attn", "c_proj"]))
    assert len(report.matched) == 15
    assert report.trainable == count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.total == 38_393_920 + count == sum(p.numel() for p in model.parameters())


# -- the start


@MODELS
def test_a_fresh_adapter_changes_nothing_to_the_bit(build):
    model, x = build(), tokens(2, 16)
    expected = logits(model, x)
    apply_lora(model, LoRAConfig(dropout=0.5))
    assert torch.equal(logits(model, x), expected)


def test_a_starts_kaiming_uniform_and_b_zero_and_the_other_way_round_for_an_embedding():
    model = gpt(n_embd=192, tie_word_embeddings=False)
    apply_lora(model, LoRAConfig(rank=64, targets=["c_fc", "wte"]))
    state = lora_state_dict(model)
    a = state["transformer.h.0.mlp.c_fc.lora_A.weight"]
    bound = 192**-0.5  # sqrt(6 / ((1 + 5) * fan_in))
    assert 0.99 * bound < a.max() <= bound and a.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not state["transformer.h.0.mlp.c_fc.lora_B.weight"].any()
    assert not state["transformer.wte.lora_embedding_A"].any()
    assert state["transformer.wte.lora_embedding_B"].std().item() == pytest.approx(1, rel=0.05)


def test_a_seed_gives_the_same_adapter_in_every_dtype():
    states = []
    for dtype in (torch.float32, torch.bfloat16):
        model = gpt().to(dtype)
        torch.manual_seed(3)
        apply_lora(model, LoRAConfig())
        states.append(lora_state_dict(model))
    for key, tensor in states[0].items():
        assert torch.equal(states[1][key], tensor.bfloat16()), key


def test_adapters_are_on_their_layers_device_in_its_dtype_or_the_one_asked_for():
    model = gpt()
    model.transformer.h[0].mlp.to(torch.bfloat16)
    model.transformer.h[1].mlp.to("meta")
    apply_lora(model, LoRAConfig(targets=["c_fc", "c_attn"]))
    for path, layer in model.named_modules():
        if hasattr(layer, "lora"):
            for p in layer.lora.parameters():
                assert (p.device, p.dtype) == (layer.weight.device, layer.weight.dtype), path
    model = gpt().to(torch.bfloat16)
    apply_lora(model, LoRAConfig(), dtype=torch.float32)
    assert {t.dtype for t in lora_state_dict(model).values()} == {torch.float32}


@MODELS
def test_only_the_adapter_trains_and_the_bases_names_stay(build):
    model, x = build(), tokens(4, 16)
    base = {name: p.detach().clone() for name, p in model.state_dict().items()}
    apply_lora(model, LoRAConfig(targets=["c_attn", "c_fc"] if build is not llama else ["q_proj", "up_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(logits(model, x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    state = model.state_dict()
    assert all(torch.equal(state[name], p) for name, p in base.items())
    assert state.keys() - base.keys() == {f"{path}.lora.default.{m}" for path in deltas(model) for m in "AB"}
    assert all(t.any() for t in lora_state_dict(model).values())


def test_dropout_acts_on_the_adapter_in_training_only():
    for mode in (True, False):  # the mode the model is in when the adapter comes
        model, x = gpt().train(mode), tokens(2, 16)
        adapted(model, dropout=0.5)
        assert torch.equal(logits(model, x), logits(model, x)) is not mode
        model.train(not mode)
        assert torch.equal(logits(model, x), logits(model, x)) is mode


# -- beside PEFT

PEFT_CASES = [
    (gpt2, {"targets": ["c_attn", "c_proj"]}),
    (gpt2, {"targets": "all-linear", "rank": 3, "alpha": 7}),
    (gpt2, {"targets": ["c_fc", "wte", "wpe"], "use_rslora": True, "tied": False}),
    (llama, {"targets": ["q_proj", "v_proj"]}),
    (llama, {"targets": r".*\.(up|down)_proj", "use_rslora": True, "rank": 5}),
    (
        llama,
        {
            "targets": "all-linear",
            "exclude": ["o_proj"],
            "rank_pattern": {"self_attn.q_proj": 2, r"0\..*": 3},
            "alpha_pattern": {"down_proj": 5, r"layers\.1.*": 6},
        },
    ),
    (llama, {"targets": ["embed_tokens", "lm_head", "k_proj"], "tied": False}),
]


def beside_peft(build, settings):
    """The same model with the same random adapter twice: with our LoRA and with PEFT's."""
    model = build(tie_word_embeddings=settings.get("tied", True), **({"pad_token_id": 0} if build is llama else {}))
    config = LoRAConfig(**{key: value for key, value in settings.items() if key != "tied"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on Conv1D and on tied weights
        theirs = get_peft_model(
            copy.deepcopy(model),
            LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                target_modules=config.targets,
                exclude_modules=config.exclude or None,
                use_rslora=config.use_rslora,
                rank_pattern=dict(config.rank_pattern),
                alpha_pattern=dict(config.alpha_pattern),
                task_type="CAUSAL_LM",
            ),
        ).eval()
    apply_lora(model, config, untie=True)
    trained(model)
    result = set_peft_model_state_dict(theirs, {f"base_model.model.{k}": t for k, t in lora_state_dict(model).items()})
    assert not result.unexpected_keys
    theirs_count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert theirs_count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model, theirs


@pytest.mark.parametrize(("build", "settings"), PEFT_CASES)
def test_outputs_and_gradients_are_pefts(build, settings):
    model, theirs = (m.double() for m in beside_peft(build, settings))
    x = tokens(3, 16)
    ours, expected = logits(model, x), theirs(x).logits
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
    ours.square().mean().backward()
    expected.square().mean().backward()
    gradients = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    count = 0
    for path, layer in model.named_modules():
        if hasattr(layer, "lora"):
            for key, p in zip(layer.lora["default"].keys, layer.lora["default"].parameters(), strict=True):
                assert p.grad.any()
                torch.testing.assert_close(p.grad, gradients[f"{path}.{key}"], atol=1e-12, rtol=1e-10)
                count += 1
    assert count == len(gradients)


@pytest.mark.parametrize(("build", "settings"), PEFT_CASES)
def test_merged_weights_are_pefts_and_those_of_float64(build, settings):
    model, theirs = beside_peft(build, settings)
    exact = {}
    for path, delta in deltas(model).items():
        layer = model.get_submodule(path)
        exact[path] = layer.weight.detach().double() + (delta if isinstance(layer, nn.Linear) else delta.t())
    x = tokens(3, 16)
    before = logits(model, x)
    merge_lora(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights
        theirs = theirs.merge_and_unload()
    for path, expected in exact.items():
        weight = model.get_submodule(path).weight
        assert torch.equal(weight, expected.float()), path
        torch.testing.assert_close(weight, theirs.get_submodule(path).weight, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits(model, x), before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model, x), logits(theirs, x), atol=1e-5, rtol=1e-5)


# -- merging


@MODELS
def test_a_merged_model_is_a_plain_model_again(build):
    model, x = build(), tokens(2, 16)
    classes = {name: type(m) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    adapted(model, dropout=0.5)
    with torch.no_grad():
        expected = logits(model.eval(), x)
    report = merge_lora(model.train())
    assert len(report.merged) == 2 * (7 if build is llama else 4)
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert list(model.state_dict()) == keys and adapter_names(model) == []
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(logits(model.eval(), x), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="has no adapter"):
        merge_lora(model)
    apply_lora(model, LoRAConfig())


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.float32, 0, 1e-5), (torch.bfloat16, 1e-3, 0.2)])
@pytest.mark.parametrize("sign", [1, -1])
def test_merging_reports_the_size_of_the_delta_and_what_rounding_lost(dtype, low, high, sign):
    model = gpt().to(dtype)
    apply_lora(model, LoRAConfig(targets=["c_fc"]))
    assert merge_lora(copy.deepcopy(model)).rounding_loss == 0  # nothing to lose yet
    trained(model)
    load_lora_state_dict(model, {key: t * (sign if "B" in key else 1) for key, t in lora_state_dict(model).items()})
    exact = deltas(model)
    before = {path: model.get_submodule(path).weight.detach().double() for path in exact}
    report = merge_lora(model)
    assert report.merged == ("transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc") and report.untied == ()
    assert report.largest_delta == pytest.approx(max(d.abs().max().item() for d in exact.values()))
    lost = [model.get_submodule(path).weight.double() - before[path] - d for path, d in exact.items()]
    ratio = torch.stack(lost).norm() / torch.stack(list(exact.values())).norm()
    assert report.rounding_loss == pytest.approx(ratio.item()) and low < report.rounding_loss < high


def test_merging_is_exact_under_autocast():
    model = adapted(gpt())
    expected = copy.deepcopy(model)
    merge_lora(expected)
    with torch.autocast("cpu", torch.bfloat16):
        merge_lora(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, expected.get_parameter(name)), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_merge_that_is_not_finite_is_refused_by_name_and_changes_nothing(value):
    model = adapted(gpt())
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.lora["default"].B[3, 2] = value
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.c_fc cannot be merged.*not finite in torch.float32"):
        merge_lora(model)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=0, rtol=0, equal_nan=True)


def test_a_merge_that_overflows_the_weights_dtype_is_refused():
    model = adapted(gpt(), targets=["c_fc"])
    model.half()
    with torch.no_grad():
        for p in model.transformer.h[0].mlp.c_fc.lora.parameters():
            p.fill_(200)
    with pytest.raises(ValueError, match=r"not finite in torch.float16"):
        merge_lora(model)


class Int8Linear(nn.Linear):
    """Rows of whole numbers, each row with a step: how libraries quantise, in small."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.step = self.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((self.weight / self.step).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight * self.step, self.bias)


def test_a_quantised_layer_can_be_adapted_and_not_merged():
    model, x = nn.Sequential(Int8Linear(8, 4)), torch.randn(2, 8)
    base = model(x)
    adapted(model)
    torch.testing.assert_close(model(x), base + x @ deltas(model)["0"].float().t())
    with pytest.raises(ValueError, match=r"0 is quantised \(torch.int8\)"):
        merge_lora(model)
    remove_lora(model)
    assert torch.equal(model(x), base)


def test_numbers_of_eight_bits_are_quantised_too():
    model = nn.Sequential(nn.Linear(8, 4))
    model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    adapted(model)
    assert model[0].lora["default"].A.dtype == torch.float32
    with pytest.raises(ValueError, match=r"0 is quantised \(torch.float8_e4m3fn\)"):
        merge_lora(model, dtype=torch.float32)


def test_a_weight_that_is_computed_anew_each_time_cannot_take_up_a_delta():
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    assert apply_lora(model, LoRAConfig(2, targets="all-linear")).matched == ("0",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inside_merged_the_weights_are_merged_and_afterwards_they_are_the_old_ones_to_the_bit(dtype):
    model, x = adapted(gpt().to(dtype)).eval(), tokens(2, 16)
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    on = logits(model, x)
    expected = copy.deepcopy(model)
    merge_lora(expected)
    with pytest.raises(KeyboardInterrupt), merged(model):
        assert torch.equal(logits(model, x), logits(expected, x))
        raise KeyboardInterrupt
    for name, p in model.named_parameters():
        assert p is before[name][0] and torch.equal(p, before[name][1]), name
    assert torch.equal(logits(model, x), on)


@MODELS
def test_taking_lora_out_leaves_the_base(build):
    model, x = build(), tokens(2, 16)
    expected = logits(model, x)
    adapted(model)
    assert not torch.equal(logits(model, x), expected)
    remove_lora(model)
    assert torch.equal(logits(model, x), expected)
    assert adapter_names(model) == [] and all(p.requires_grad for p in model.parameters())


# -- tied weights


@pytest.mark.parametrize("build", [gpt, gpt2])
@pytest.mark.parametrize(("target", "other"), [("lm_head", "transformer.wte"), ("wte", "lm_head")])
def test_a_target_that_shares_its_weight_has_to_be_allowed(build, target, other):
    model, state = build(tie_word_embeddings=True), torch.get_rng_state()
    with pytest.raises(ValueError, match=f"{target} shares its weight with {other}: .*untie=True"):
        apply_lora(model, LoRAConfig(targets=[target]))
    assert adapter_names(model) == [] and torch.equal(torch.get_rng_state(), state)  # nothing was drawn


@pytest.mark.parametrize("build", [gpt, gpt2])
@pytest.mark.parametrize("targets", [["lm_head"], ["wte"], ["wte", "lm_head", "c_attn"]])
def test_tied_weights_stay_shared_in_training_and_are_untied_by_merging(build, targets):
    model, x = build(tie_word_embeddings=True), tokens(2, 16)
    config, shared = model.config, model.lm_head.weight
    base = shared.detach().clone()
    apply_lora(model, LoRAConfig(targets=targets), untie=True)
    trained(model)
    assert model.lm_head.weight is model.transformer.wte.weight is shared
    with torch.no_grad():
        expected = logits(model, x)
    report = merge_lora(model)
    assert {path.split(".")[-1] for path in report.untied} == set(targets) - {"c_attn"}
    assert torch.equal(model.transformer.wte.weight, base) is ("wte" not in targets)
    assert torch.equal(model.lm_head.weight, base) is ("lm_head" not in targets)
    torch.testing.assert_close(logits(model, x), expected, atol=1e-5, rtol=1e-5)
    assert model.config.tie_word_embeddings is False
    if build is gpt:
        assert config.tie_word_embeddings, "the configuration that others may hold was changed"


def test_an_untied_merge_survives_transformers_save_and_load(tmp_path):
    model, x = gpt2(tie_word_embeddings=True), tokens(2, 16)
    apply_lora(model, LoRAConfig(targets=["lm_head"]), untie=True)
    trained(model)
    merge_lora(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, x), logits(model, x), atol=1e-6, rtol=1e-6)


def test_merging_other_layers_leaves_the_tie():
    model = adapted(gpt())
    assert merge_lora(model).untied == ()
    assert model.lm_head.weight is model.transformer.wte.weight and model.config.tie_word_embeddings


def test_merged_for_a_while_restores_the_tie():
    model = gpt()
    apply_lora(model, LoRAConfig(targets=["lm_head"]), untie=True)
    trained(model)
    with merged(model):
        assert model.lm_head.weight is not model.transformer.wte.weight
    assert model.lm_head.weight is model.transformer.wte.weight and model.config.tie_word_embeddings


# -- several adapters


def test_disabled_adapters_leave_the_base_and_come_back_even_after_an_error():
    model, x = gpt().eval(), tokens(2, 16)
    base = logits(model, x)
    on = logits(adapted(model), x)
    with pytest.raises(KeyError), disable_adapters(model):
        assert torch.equal(logits(model, x), base)
        with disable_adapters(model):
            pass
        assert torch.equal(logits(model, x), base)
        raise KeyError
    assert torch.equal(logits(model, x), on) and not torch.equal(on, base)


def test_one_of_several_adapters_acts_and_trains():
    model, x = gpt().eval(), tokens(2, 16)
    alone = {}
    for name, settings in (("one", {"targets": ["c_attn"]}), ("two", {"targets": ["c_attn", "c_fc"], "rank": 3})):
        single = adapted(gpt().eval(), **settings)
        alone[name] = logits(single, x)
        if name == "one":
            adapted(model, name, **settings)
        else:
            report = add_adapter(model, name, LoRAConfig(**settings))
            assert report.trainable == sum(t.numel() for t in lora_state_dict(single).values())
            trained(model, name)
    add_adapter(model, "three", LoRAConfig(targets=["wpe"]))
    add_adapter(model, "four", LoRAConfig(targets=["wpe"]))
    assert set(adapter_names(model)) == {"one", "two", "three", "four"} and active_adapter(model) == "one"
    for name in ("one", "two", "one"):
        set_active(model, name)
        assert torch.equal(logits(model, x), alone[name])
        training = {n for n, p in model.named_parameters() if p.requires_grad}
        assert training == {n for n, _ in model.named_parameters() if f".lora.{name}." in n}


@pytest.mark.parametrize("name", ["default", "a.b", "", "keys", "active", "training"])
def test_a_name_that_cannot_be_an_adapters_is_refused(name):
    model = adapted(gpt())
    with pytest.raises(ValueError, match="cannot be called"):
        add_adapter(model, name, LoRAConfig())


def test_an_unknown_adapter_is_refused_with_those_that_exist():
    model = adapted(gpt(), "papers")
    for use in (set_active, lora_state_dict, merge_lora, lambda m, name: add_weighted_sum(m, "sum", {name: 1.0})):
        with pytest.raises(ValueError, match="this GPT has no adapter stories, it has papers"):
            use(model, "stories")
    with pytest.raises(ValueError, match="this GPT has no adapter that is active, it has none at all"):
        lora_state_dict(gpt())


def test_merging_one_of_several_needs_its_name():
    model, x = adapted(gpt(), "one").eval(), tokens(2, 16)
    add_adapter(model, "two", LoRAConfig(rank=2))
    trained(model, "two", seed=5)
    with pytest.raises(ValueError, match="name it: one, two"):
        merge_lora(model)
    set_active(model, "two")
    expected = logits(model, x)
    set_active(model, "one")
    merge_lora(model, "two")
    torch.testing.assert_close(logits(model, x), expected, atol=1e-5, rtol=1e-5)
    assert adapter_names(model) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weighted_sum_is_the_sum_of_the_deltas(dtype):
    model, x = gpt(tie_word_embeddings=False).to(dtype).eval(), tokens(2, 16)
    adapted(model, "one", targets=["c_attn", "wte"], rank=3, alpha=5)
    add_adapter(model, "two", LoRAConfig(targets=["c_attn", "c_fc"], rank=4, use_rslora=True))
    trained(model, "two", seed=2)
    add_weighted_sum(model, "sum", {"one": 0.7, "two": -1.5})
    one, two, total = (deltas(model, name) for name in ("one", "two", "sum"))
    assert total.keys() == one.keys() | two.keys()
    for path, delta in total.items():
        expected = 0.7 * one.get(path, torch.zeros_like(delta)) - 1.5 * two.get(path, torch.zeros_like(delta))
        torch.testing.assert_close(delta, expected, atol=1e-7, rtol=1e-6)
    assert lora_state_dict(model, "sum")["transformer.h.0.attn.c_attn.lora_A.weight"].shape == (7, 24)
    assert active_adapter(model) == "one"
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".lora.sum." in n)
    set_active(model, "sum")
    if dtype is torch.float32:
        acting = logits(model, x)
        merge_lora(model, "sum")
        torch.testing.assert_close(logits(model, x), acting, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", [{}, {"default": float("nan")}, {"default": "1"}])
def test_a_sum_of_nothing_or_with_impossible_weights_is_refused(weights):
    with pytest.raises(ValueError, match="must give a number to each adapter"):
        add_weighted_sum(adapted(gpt()), "sum", weights)


# -- an adapter's tensors


@MODELS
def test_an_adapters_tensors_have_pefts_names_and_shapes_and_come_back_to_the_bit(build):
    model, x = adapted(build().eval(), rank=4), tokens(2, 16)
    state = lora_state_dict(model)
    for key, tensor in state.items():
        layer = model.get_submodule(key.split(".lora_")[0])
        n_in, n_out = layer.weight.shape[:: 1 if hasattr(layer, "nf") else -1]
        assert tensor.shape == ((4, n_in) if key.endswith(".lora_A.weight") else (n_out, 4))
    other = build().eval()
    apply_lora(other, LoRAConfig(rank=4))
    load_lora_state_dict(other, state)
    assert torch.equal(logits(other, x), logits(model, x))


def test_tensors_that_are_missing_unexpected_or_misshapen_are_one_error_and_nothing_is_loaded():
    model = adapted(gpt())
    state = {key: torch.zeros_like(t) for key, t in lora_state_dict(model).items()}
    del state["transformer.h.0.mlp.c_fc.lora_A.weight"]
    state["transformer.h.7.mlp.c_fc.lora_A.weight"] = torch.zeros(8, 24)
    state["transformer.h.1.mlp.c_fc.lora_B.weight"] = torch.zeros(96, 4)
    with pytest.raises(ValueError, match="not this adapter's") as error:
        load_lora_state_dict(model, state)
    assert "transformer.h.0.mlp.c_fc.lora_A.weight is missing" in str(error.value)
    assert "transformer.h.7.mlp.c_fc.lora_A.weight is unexpected" in str(error.value)
    assert "transformer.h.1.mlp.c_fc.lora_B.weight is (96, 4) where the model has (96, 8)" in str(error.value)
    assert all(t.any() for t in lora_state_dict(model).values())


def test_a_foreign_prefix_is_an_error_of_readable_length():
    model = adapted(gpt())
    with pytest.raises(ValueError, match=r"and 26 more$"):
        load_lora_state_dict(model, {f"base_model.model.{k}": t for k, t in lora_state_dict(model).items()})


def test_a_copy_and_a_state_dict_hold_the_adapters_too():
    model, x = adapted(gpt().eval()), tokens(2, 16)
    twin = copy.deepcopy(model)
    other = gpt()
    apply_lora(other, LoRAConfig())
    other.load_state_dict(model.state_dict())
    expected = logits(model, x)
    merge_lora(model)
    for same in (twin, other.eval()):
        assert torch.equal(logits(same, x), expected)
        merge_lora(same)
        assert torch.equal(logits(same, x), logits(model, x))


# -- with the rest of PyTorch


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
def test_a_bfloat16_base_trains_and_merges(adapter_dtype):
    model, x = gpt().to(torch.bfloat16).eval(), tokens(2, 16)
    base = logits(model, x)
    apply_lora(model, LoRAConfig(), dtype=adapter_dtype)
    assert torch.equal(logits(model, x), base)
    trained(model)
    out = logits(model, x)
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)
    merge_lora(model)
    spread = (out - base).float().std()
    assert (logits(model, x) - out).float().std() < 0.05 * spread


def test_under_autocast_the_output_is_that_of_float32_to_bfloat16s_precision():
    model, x = adapted(gpt().eval()), tokens(2, 16)
    expected = logits(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        out = logits(model, x)
        loss = out.float().square().mean()
    loss.backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters() if p.requires_grad)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_accumulated_gradients_are_those_of_the_big_batch():
    model = adapted(gpt().double())
    x, y = tokens(8, 16), tokens(8, 16, seed=1)
    model(x, y)[1].backward()
    expected = gradients(model)
    model.zero_grad()
    for part_x, part_y in zip(x.split(2), y.split(2), strict=True):
        (model(part_x, part_y)[1] / 4).backward()
    found = gradients(model)
    assert len(found) == 2 * 8
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-14, rtol=1e-10)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_gradient_checkpointing_changes_no_gradient(build):
    model, x = adapted(build(), dropout=0.0).train(), tokens(2, 16)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    logits(model, x).square().mean().backward()
    expected = gradients(model)
    model.zero_grad()
    model.activation_checkpointing_enable()
    logits(model, x).square().mean().backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


def test_a_row_of_padding_is_not_trained():
    model = nn.Sequential(nn.Embedding(10, 4, padding_idx=3), nn.Linear(4, 4))
    apply_lora(model, LoRAConfig(targets=["0"]))
    trained(model)
    model(torch.arange(10)).square().sum().backward()
    gradient = model[0].lora["default"].A.grad
    assert not gradient[:, 3].any() and gradient[:, [0, 1, 2, 4]].any(dim=0).all()


def test_a_compiled_model_follows_what_happens_to_its_adapters():
    model, x = gpt().eval(), tokens(2, 16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def check():
        torch.testing.assert_close(compiled(x, x)[0], model(x, x)[0], atol=0, rtol=0)
        return compiled(x, x)[0]

    base = check()
    adapted(model)
    on = check()
    assert not torch.equal(on, base)
    with disable_adapters(model):
        assert torch.equal(check(), base)
    with merged(model):
        torch.testing.assert_close(check(), on, atol=1e-5, rtol=1e-5)
    add_adapter(model, "other", LoRAConfig(targets=["c_fc"]))
    set_active(model, "other")
    assert torch.equal(check(), base)
    set_active(model, "default")
    merge_lora(model, "default")
    torch.testing.assert_close(check(), on, atol=1e-5, rtol=1e-5)


def test_ddp_finds_every_trainable_parameter_in_use(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = adapted(gpt(), "one")
        add_adapter(model, "idle", LoRAConfig())
        ddp = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # a parameter that DDP waits for in vain fails the second step
            ddp(tokens(2, 16), tokens(2, 16))[1].backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    finally:
        torch.distributed.destroy_process_group()
