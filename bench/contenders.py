"""What bench/speed.py measures: one turn of a contender, from the same weights as all others of its table.

A contender with packages is the model of Transformers, adapted by PEFT, in the loop that a user of theirs would write;
"nanogpt" is nanoGPT's model and loop as they run on a processor, llama.cpp reads what export.py writes, and ours are
what train.py and sample.py set up.
"""

import math
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import export
import packed
from configurator import RunConfig
from data.batches import BlockSampler
from data.tokens import Dataset
from device import autocast, pick_device, use_huge_pages
from distributed import Ranks
from lora import LoRAConfig, apply_lora, lora_state_dict
from model import GPT
from optimizer import build_optimizer, learning_rate
from preflight import Start
from train import Trainer, set_up

FULL, LORA, GENERATION, LIMIT = "full training", "LoRA", "generation", "limit"
LORA_TARGETS = ("c_attn", "c_proj")  # to both libraries the ends of paths: attn.c_attn, attn.c_proj, mlp.c_proj
PROMPT, TOP_K, TEMPERATURE = 16, 200, 0.8  # ids; nanoGPT's sample.py draws so
TRANSFORMERS, PEFT, LLAMA_CPP = ("transformers",), ("transformers", "peft"), ("gguf", "xllamacpp")


class Contender(NamedTuple):
    group: str  # its table; speeds and losses are compared within it
    packages: tuple[str, ...]  # whose model runs; none: this project's
    dtype: str
    plain: bool = False  # our model, which is nanoGPT's too, with nanoGPT's loop
    compile: bool = False
    rows: int = 1  # texts generated together


CONTENDERS = {
    "nanogpt": Contender(FULL, (), "float32", plain=True),
    "transformers-fp32": Contender(FULL, TRANSFORMERS, "float32"),
    "transformers-bf16": Contender(FULL, TRANSFORMERS, "bfloat16"),
    "transformers-bf16-compile": Contender(FULL, TRANSFORMERS, "bfloat16", compile=True),
    "ours-fp32": Contender(FULL, (), "float32"),
    "ours": Contender(FULL, (), "auto"),
    "peft-fp32": Contender(LORA, PEFT, "float32"),
    "peft-bf16": Contender(LORA, PEFT, "bfloat16"),
    "ours-lora-fp32": Contender(LORA, (), "float32"),
    "ours-lora": Contender(LORA, (), "auto"),
    "nanogpt-generate": Contender(GENERATION, (), "float32", plain=True),
    "transformers-generate-fp32": Contender(GENERATION, TRANSFORMERS, "float32"),
    "transformers-generate-bf16": Contender(GENERATION, TRANSFORMERS, "bfloat16"),
    "llama-cpp-generate": Contender(GENERATION, LLAMA_CPP, "float16"),
    "llama-cpp-generate-int8": Contender(GENERATION, LLAMA_CPP, "int8"),
    "ours-generate-fp32": Contender(GENERATION, (), "float32"),
    "ours-generate": Contender(GENERATION, (), "auto"),
    "ours-generate-int8": Contender(GENERATION, (), "int8"),
    "ours-generate-8-rows": Contender(GENERATION, (), "auto", rows=8),
    "machine": Contender(LIMIT, (), ""),
}
Step = Callable[[], tuple[float, float]]  # one optimizer step: loss before it, gradient norm


def runs(contender: Contender, device: torch.device) -> bool:
    """Whether it can run there: our weights of 8 bits are for processors that have their products."""
    return contender.dtype != "int8" or contender.packages == LLAMA_CPP or packed.can_pack(device)


def measure(name: str, config: RunConfig, lora: LoRAConfig, steps: int, new_tokens: int) -> dict[str, Any]:
    """One turn: what comes first, a warm-up, and then `steps` timed steps or texts.

    `seconds` are theirs, `first` those of the warm-up, `tokens` how many each has. `losses` are those before every
    step, or of the model on one text, or None; `norms` those of the gradients, or None.
    """
    contender = CONTENDERS[name]
    if contender.group == LIMIT:
        return limits(torch.device(config.device))
    config = replace(config, dtype=contender.dtype)
    if contender.group == GENERATION and not contender.packages and not contender.plain and config.device == "cpu":
        use_huge_pages()  # as sample.py does
    torch.manual_seed(config.seed)
    model = GPT(config.model_config(config.vocab_size))
    if contender.group == LORA:
        add_adapter(model, lora)
    if contender.packages not in ((), LLAMA_CPP):  # nothing holds our model from here on
        model = peft_twin(model, lora) if contender.group == LORA else transformers_twin(model)
    if contender.group == GENERATION:
        generate = llama_cpp if contender.packages == LLAMA_CPP else generation
        work, dtype, loss = generate(contender, config, model, new_tokens)
        tokens = new_tokens * contender.rows
    else:
        work, dtype = training(contender, config, model, steps)
        tokens = tokens_per_step(config)
    times, results = [time.perf_counter()], []
    for _ in range(1 + steps):
        results.append(work())
        times.append(time.perf_counter())
    peak = peak_memory()
    if contender.group == GENERATION:
        results = [(loss(), None)]
    first, *seconds = np.diff(times).tolist()
    losses, norms = zip(*results, strict=True)
    result = {"dtype": dtype, "tokens": tokens, "first": first, "seconds": seconds, "losses": losses, "norms": norms}
    return result | {"peak_bytes": peak}


def tokens_per_step(config: RunConfig) -> int:
    return config.gradient_accumulation_steps * config.batch_size * config.block_size


def random_ids(config: RunConfig, steps: int) -> np.ndarray:
    """The text of so many steps."""
    return np.random.default_rng(config.seed).integers(config.vocab_size, size=steps * tokens_per_step(config) + 1)


def training(contender: Contender, config: RunConfig, model: nn.Module, steps: int) -> tuple[Step, str]:
    ids = random_ids(config, 1 + steps)
    if contender.packages or contender.plain:
        return their_step(contender, config, ids, model.to(config.device)), config.dtype
    trainer = our_trainer(config, model, ids, Ranks())

    def step() -> tuple[float, float]:
        loss, _, norm = trainer.step()
        return loss, norm

    return step, trainer.config.dtype


def our_trainer(config: RunConfig, model: nn.Module, ids: np.ndarray, ranks: Ranks) -> Trainer:
    """What train.py sets up, on these token ids."""
    return set_up(our_start(config, model, ids), ranks)[0]


def our_start(config: RunConfig, model: nn.Module, ids: np.ndarray) -> Start:
    absent = ("eot", "tokenizer_path", "fingerprint", "tokenizer_fingerprint", "bytes_per_token")
    fields = {"name": "random", "meta": {}, "train": ids, "val": ids, "vocab_size": config.vocab_size}
    dataset = Dataset(directory=Path(config.out_dir), **fields, **dict.fromkeys(absent))
    return Start(config, dataset, dataset.directory, model)


def their_step(contender: Contender, config: RunConfig, ids: np.ndarray, model: nn.Module) -> Step:
    """The loop a user would write. Optimizer, schedule and batches are ours; model and loop are not."""
    device = torch.device(config.device)
    model.train()
    optimizer = build_optimizer(model, config)
    if contender.plain and device.type == "cpu":  # where nanoGPT does not ask for the fused one
        for group in optimizer.param_groups:
            group["fused"] = None
    sampler = BlockSampler(ids, config.block_size, config.seed)
    run = torch.compile(model) if contender.compile else model
    iterations, batches = count(), count()

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        if contender.plain:
            return run(x, y)[1]
        # y is shifted already; labels=x alone would leave out the last target of each sequence
        return run(input_ids=x, labels=y, shift_labels=y).loss

    def step() -> tuple[float, float]:
        loss_sum, rate = 0.0, learning_rate(next(iterations), config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for _ in range(config.gradient_accumulation_steps):
            x, y = sampler.batch(next(batches) * config.batch_size, config.batch_size)
            with autocast(device, config.dtype):
                loss = loss_of(x.to(device), y.to(device)) / config.gradient_accumulation_steps
            loss.backward()
            loss_sum += loss.item()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss_sum, norm

    return step


def generation(
    contender: Contender, config: RunConfig, model: nn.Module, new_tokens: int
) -> tuple[Callable[[], None], str, Callable[[], float]]:
    """What generates, the dtype of its weights, and the model's loss on a fixed text, which a wrong one would miss."""
    device, dtype = torch.device(config.device), config.dtype
    ids = np.random.default_rng(config.seed).integers(config.vocab_size, size=(8, config.block_size))
    text = torch.from_numpy(ids).to(device)
    prompt = text[: contender.rows, :PROMPT]
    model = model.to(device).eval()
    dtype, packs = packed.pick_weight_dtype(dtype, device)
    if packs:
        packed.pack(model, dtype)
    else:
        model.to(getattr(torch, dtype))
    drawn = {"temperature": TEMPERATURE, "top_k": TOP_K}
    if contender.packages:
        drawn |= {"do_sample": True, "pad_token_id": 0, "min_new_tokens": new_tokens, "use_cache": True}
        drawn["attention_mask"] = torch.ones_like(prompt)
    else:
        drawn["use_cache"] = not contender.plain

    def work() -> None:
        made = model.generate(prompt, max_new_tokens=new_tokens, **drawn)
        assert made.shape == (contender.rows, PROMPT + new_tokens)

    def loss() -> float:
        with torch.no_grad():
            out = model(text)[0] if contender.packages else model(text, text)[0]
            return nn.functional.cross_entropy(out[:, :-1].float().flatten(0, 1), text[:, 1:].flatten()).item()

    return work, dtype, loss


def llama_cpp(contender: Contender, config: RunConfig, model: GPT, new_tokens: int) -> tuple[Callable, str, Callable]:
    """The same of llama.cpp, on the processor. It tells no loss of a whole text; tests/test_export.py looks at that."""
    import gguf
    import xllamacpp

    path, layout = Path(config.out_dir) / "model.gguf", export.layout_of(model.config)
    facts = export.architecture(model.config, layout) | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"<{i}>" for i in range(config.vocab_size)],
        "tokenizer.ggml.token_type": [export.NORMAL] * config.vocab_size,
        "tokenizer.ggml.merges": ["< 0"],  # it wants some
    }
    kind = {"float16": "F16", "int8": "Q8_0"}[contender.dtype]
    export.write(gguf, path, layout, facts, export.tensors(model.eval(), layout), kind)
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(path), config.block_size, 1
    settings.cpuparams.n_threads, settings.verbosity = torch.get_num_threads(), -1
    server = xllamacpp.Server(settings)
    ids = np.random.default_rng(config.seed).integers(config.vocab_size, size=PROMPT).tolist()
    asked = {"prompt": ids, "n_predict": new_tokens, "ignore_eos": True, "cache_prompt": False}
    asked |= {"temperature": TEMPERATURE, "top_k": TOP_K, "samplers": ["top_k", "temperature"]}

    def work() -> None:
        answer = server.handle_completions(asked)
        assert answer["usage"]["completion_tokens"] == new_tokens, answer

    return work, contender.dtype, lambda: None


def transformers_twin(model: GPT) -> nn.Module:
    """A GPT2LMHeadModel with the weights of `model`. Biases that `model` lacks stay zero there, and are not trained."""
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()  # it warns of special tokens outside a small vocabulary
    shape = {k: getattr(model.config, k) for k in ("vocab_size", "n_layer", "n_head", "n_embd", "tie_word_embeddings")}
    shape |= {"n_positions": model.config.block_size} | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    # The last two are to its advantage: its default GELU takes eight operations, and the cache is for generating.
    twin = GPT2LMHeadModel(GPT2Config(**shape, activation_function="gelu", use_cache=False))
    weights = model.state_dict()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name in weights:
                linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))  # stored as (in, out) there
                parameter.copy_(weights[name].T if linear else weights[name])
            else:
                parameter.zero_().requires_grad_(False)
    return twin


def add_adapter(model: GPT, lora: LoRAConfig) -> None:
    """As if it had trained: while B is zero, as it starts, A has no gradient that could be compared."""
    apply_lora(model, lora)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.02)


def peft_twin(model: GPT, lora: LoRAConfig) -> nn.Module:
    """The Transformers twin of `model` as PEFT adapts it, with the numbers of the adapter in `model`."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    size = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    config = LoraConfig(**size, target_modules=list(lora.targets), task_type="CAUSAL_LM")
    with warnings.catch_warnings(action="ignore"):  # of Conv1D's (in, out), which PEFT sees to, and of a name it uses
        twin = get_peft_model(transformers_twin(model), config)
    state = {f"base_model.model.{key}": tensor for key, tensor in lora_state_dict(model).items()}
    unknown = set_peft_model_state_dict(twin, state).unexpected_keys
    assert not unknown, f"PEFT has no place for {unknown}"
    return twin


# ---- what the machine can do


def limits(device: torch.device) -> dict[str, Any]:
    """The fastest of matrix products, FLOP/s, and of reading memory, bytes/s, that this machine shows."""
    products = {
        str(dtype).removeprefix("torch."): max(product_speeds(dtype, device))
        for dtype in (torch.float32, torch.bfloat16)
    }
    return {"products": products, "reading": reading_speed(device)}


def product_speeds(dtype: torch.dtype, device: torch.device) -> Iterator[float]:
    """FLOP/s of a few shapes that are large in every dimension; repeated, for the best is the limit."""
    scale = 4 if device.type == "cuda" else 1
    for n, k, m in ((1024, 1024, 4096), (2048, 2048, 2048), (1024, 768, 3072)):
        a = torch.randn(scale * n, scale * k, device=device).to(dtype)
        b = torch.randn(scale * m, scale * k, device=device).to(dtype).t()  # as a linear layer has it
        yield 2 * scale**3 * n * k * m / fastest(lambda a=a, b=b: a @ b, device)


def reading_speed(device: torch.device) -> float:
    """Bytes/s of a sum over more than any cache holds."""
    values = torch.ones(1 << 28, dtype=torch.float32, device=device)
    return 4 * values.numel() / fastest(values.sum, device)


def fastest(work: Callable[[], Any], device: torch.device, repeats: int = 8) -> float:
    """Seconds."""
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def peak_memory() -> int:
    """The most that this process has held in memory, or on its GPU where it used one, bytes."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    try:
        # Linux carries getrusage's figure over from parent to child: it could be that of whoever started us.
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    except OSError:
        import resource  # macOS, which counts bytes; Windows has neither

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def pick(name: str) -> torch.device:
    """As train.py would; without an index, for every turn is a process of its own."""
    return torch.device(pick_device(name).type)
