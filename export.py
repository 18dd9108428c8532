"""A model directory in the format of other programs.

    python export.py models/gpt-38M-scientific-pretrain --to gguf
    python export.py models/NAME-merged --to gguf --dtype float16 --out name.gguf

gguf is llama.cpp's (github.com/ggml-org/ggml, docs/gguf.md): weights, architecture and tokenizer in one file, written
with the package gguf and read back before it counts. Transformers needs no export: it opens the directory itself.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import files
import script
from configurator import PRECISIONS, precision


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "directory", type=files.expanded, help="a model directory; one with an adapter is merged on the way"
    )
    parser.add_argument("--to", choices=["gguf"], required=True, help="the format")
    parser.add_argument("--out", type=files.expanded, help="the file (default: NAME.gguf, here)")
    parser.add_argument(
        "--dtype", type=precision, choices=PRECISIONS, default="float32", help="of the matrices (default float32)"
    )
    parser.add_argument("--base", type=files.expanded, help="where a LoRA directory's base lies now, if it was moved")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    script.begin()
    ARGUMENTS = parse()  # --help and mistakes do not wait for torch

import numpy as np
import torch
from torch import Tensor

from checkpoint import CheckpointManager
from device import DTYPES
from model import GPT, GPTConfig
from registry.resolve import folder_of
from tokenizer import EOT, ForeignTokenizer, Tokenizer
from tokenizer_files import no_tokenizer

CONTROL, NORMAL, UNUSED = 3, 1, 5  # token types of the format


@dataclass(frozen=True)
class Layout:
    """What llama.cpp calls an architecture, and where it wants another file than our tensors as they are."""

    name: str
    biases: bool = False  # expected even where there are none
    interleaved: bool = False  # turns neighbouring dimensions, where we turn dimension i with i + D / 2


LAYOUTS = {"gpt2": Layout("gpt2", biases=True), "llama": Layout("llama", interleaved=True)}
LAYOUTS |= {"qwen2": Layout("qwen2"), "qwen3": Layout("qwen3")}

# What gguf computes for llama blocks, beyond shapes: everything else must have GPTConfig's default.
LLAMA_FIELDS = {
    "block", "activation", "n_inner", "n_kv_head", "head_size", "rope_theta", "rope_scaling", "norm_eps", "bias"
}  # fmt: skip
SHAPE = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "tie_word_embeddings", "family"}


def main(arguments: argparse.Namespace) -> int:
    def work() -> None:
        print(to_gguf(folder_of(arguments.directory), arguments.out, arguments.dtype, arguments.base))

    return script.run("export.py", work, "nothing was written")


def to_gguf(directory: Path, out: Path | None = None, dtype: str = "float32", base: Path | None = None) -> str:
    """Write a GGUF file and read it back; returns what the script prints.

    Raises ValueError for a model or a tokenizer that the format's layouts do not hold, and if what is read back is not
    what was written; OSError where it cannot be written. An existing file is replaced, whole or not at all.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError("the package gguf is not installed: pip install gguf") from None
    model = CheckpointManager.load_model_for_inference(directory, base=base).float()
    path = CheckpointManager.find_tokenizer(directory)
    if path is None:
        raise ValueError(f"a GGUF file holds a tokenizer, and {no_tokenizer(directory)}")
    layout, tokenizer = layout_of(model.config), Tokenizer.load(path)
    out = out or Path(f"{directory.resolve().name}.gguf")
    if out.is_dir():
        raise ValueError(f"{out} is a folder: name a file to write to")
    facts = {**architecture(model.config, layout), **vocabulary(tokenizer, model.config.vocab_size)}
    facts["general.name"] = directory.resolve().name
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    files.check_room(out.parent, model.num_params() * DTYPES[dtype].itemsize)
    staged = files.staged_name(out)
    try:
        write(gguf, staged, layout, facts, tensors(model, layout), kind)
        count = read_back(gguf, staged, facts, tensors(model, layout), kind)
        os.replace(staged, out)
        files.sync_directory(out.parent)
    except OSError as error:
        raise files.save_error(out, error) from None
    finally:
        with contextlib.suppress(OSError):  # a disk that nobody may write to refuses this too
            staged.unlink()
    size = out.stat().st_size / 1e6
    lines = [f"{out}: {count} tensors in {dtype}, {tokenizer.vocab_size:,} tokens, {size:,.0f} MB; read back, the same"]
    if layout.name == "gpt2" and model.config.activation == "gelu":
        lines.append(
            "llama.cpp computes GELU by its tanh approximation and this model the exact one: logits move a little"
        )
    return "\n".join(lines)


def layout_of(config: GPTConfig) -> Layout:
    """The layout that computes what this model does. Raises ValueError if none does."""
    plain = GPTConfig()
    if config.block == "gpt2":
        name, own = "gpt2", SHAPE | {"bias", "activation", "n_inner", "norm_eps"}
    elif config.qk_norm:
        name, own = "qwen3", SHAPE | LLAMA_FIELDS | {"qk_norm"}
    elif config.qkv_bias:
        name, own = "qwen2", SHAPE | LLAMA_FIELDS | {"qkv_bias"}
    else:
        name, own = "llama", SHAPE | LLAMA_FIELDS
    foreign = [key for key, value in vars(config).items() if key not in own and value != getattr(plain, key)]
    scaling = (config.rope_scaling or {}).get("rope_type", "linear")
    if scaling != "linear":
        foreign.append(f"rope_scaling={scaling}")
    if config.block == "llama" and (config.activation != "silu" or config.bias):
        foreign.append(f"activation={config.activation}, bias={config.bias}")
    if config.block == "gpt2" and config.activation == "silu":
        foreign.append(f"activation={config.activation}")
    if name == "qwen2" and config.n_head * config.D != config.n_embd:
        foreign.append(f"{config.n_head} heads of {config.D} in a width of {config.n_embd}")
    if foreign:
        raise ValueError(
            f"GGUF's {name} layout does not hold {', '.join(foreign)}; the directory is a Hugging Face one, and "
            "llama.cpp's own converter knows more families"
        )
    return LAYOUTS[name]


def architecture(config: GPTConfig, layout: Layout) -> dict[str, Any]:
    """The keys that describe the model, as docs/gguf.md names them."""
    name = layout.name
    facts = {
        "general.architecture": name,
        f"{name}.context_length": config.block_size,
        f"{name}.embedding_length": config.n_embd,
        f"{name}.block_count": config.n_layer,
        f"{name}.feed_forward_length": config.inner,
        f"{name}.attention.head_count": config.n_head,
    }
    if name == "gpt2":
        return facts | {f"{name}.attention.layer_norm_epsilon": config.norm_eps}
    facts |= {
        f"{name}.attention.head_count_kv": config.kv_heads,
        f"{name}.attention.key_length": config.D,
        f"{name}.attention.value_length": config.D,
        f"{name}.attention.layer_norm_rms_epsilon": config.norm_eps,
        f"{name}.rope.dimension_count": config.D,
        f"{name}.rope.freq_base": float(config.rope_theta),
        f"{name}.vocab_size": config.vocab_size,
    }
    if config.rope_scaling:
        facts |= {
            f"{name}.rope.scaling.type": "linear",
            f"{name}.rope.scaling.factor": float(config.rope_scaling["factor"]),
        }
    return facts


def vocabulary(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The keys of the tokenizer. Rows of the model that are no token of it get names that no text has."""
    if isinstance(tokenizer, ForeignTokenizer):
        raise ValueError(
            f"{tokenizer.name} is not in GPT-2's layout; llama.cpp's own converter reads the directory as it is"
        )
    tokens, merges = tokenizer.spelled()
    kinds = [CONTROL if token == EOT else NORMAL for token in tokens] + [UNUSED] * (rows - len(tokens))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens + [f"[PAD{i}]" for i in range(len(tokens), rows)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokenizer.eot,
        "tokenizer.ggml.eos_token_id": tokenizer.eot,
        "tokenizer.ggml.add_bos_token": False,
    }


NAMES = {  # ours, without .weight or .bias; * is a layer's number
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "transformer.h.*.ln_1": "blk.*.attn_norm", "transformer.h.*.attn.c_attn": "blk.*.attn_qkv",
    "transformer.h.*.attn.c_proj": "blk.*.attn_output", "transformer.h.*.ln_2": "blk.*.ffn_norm",
    "transformer.h.*.mlp.c_fc": "blk.*.ffn_up", "transformer.h.*.mlp.c_proj": "blk.*.ffn_down",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "model.layers.*.input_layernorm": "blk.*.attn_norm", "model.layers.*.post_attention_layernorm": "blk.*.ffn_norm",
    "model.layers.*.self_attn.q_proj": "blk.*.attn_q", "model.layers.*.self_attn.k_proj": "blk.*.attn_k",
    "model.layers.*.self_attn.v_proj": "blk.*.attn_v", "model.layers.*.self_attn.o_proj": "blk.*.attn_output",
    "model.layers.*.self_attn.q_norm": "blk.*.attn_q_norm", "model.layers.*.self_attn.k_norm": "blk.*.attn_k_norm",
    "model.layers.*.mlp.gate_proj": "blk.*.ffn_gate", "model.layers.*.mlp.up_proj": "blk.*.ffn_up",
    "model.layers.*.mlp.down_proj": "blk.*.ffn_down",
}  # fmt: skip


def tensors(model: GPT, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 tensor) of everything in the file, matrices as (out, in). A tied head is left out."""
    for path, module in model.named_modules():
        parts = path.split(".")
        number = next((part for part in parts if part.isdigit()), "")
        name = NAMES.get(".".join("*" if part.isdigit() else part for part in parts))
        if name is None or (path == "lm_head" and model.config.tie_word_embeddings):
            continue
        name, weight, bias = name.replace("*", number), module.weight.detach(), getattr(module, "bias", None)
        if layout.interleaved and path.endswith(("q_proj", "k_proj")):
            weight = interleave(weight, model.config.D)
        yield f"{name}.weight", weight
        if bias is not None:
            yield f"{name}.bias", bias.detach()
        elif layout.biases and path not in ("lm_head", "transformer.wte", "transformer.wpe"):
            yield f"{name}.bias", torch.zeros(weight.size(0))


def interleave(weight: Tensor, D: int) -> Tensor:
    """Reorder the rows of each head from (i, i + D / 2) pairs to neighbouring ones."""
    return weight.view(-1, 2, D // 2, weight.size(1)).transpose(1, 2).reshape(weight.shape)


def write(
    gguf, path: Path, layout: Layout, facts: dict[str, Any], state: Iterator[tuple[str, Tensor]], kind: str
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, layout.name)
    try:
        for key, value in facts.items():
            if key != "general.architecture":  # the writer has written it
                add(writer, key, value)
        for name, tensor in state:
            data, raw = stored(gguf, tensor, kind)
            writer.add_tensor(name, data, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def add(writer, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds[type(value)](key, value)


def stored(gguf, tensor: Tensor, kind: str) -> tuple[np.ndarray, Any]:
    """What is written of a tensor: vectors stay float32, as llama.cpp wants them."""
    data = tensor.float().contiguous().cpu().numpy()
    wanted = gguf.GGMLQuantizationType[kind if data.ndim > 1 else "F32"]
    return gguf.quants.quantize(data, wanted), wanted


def read_back(gguf, path: Path, facts: dict[str, Any], state: Iterator[tuple[str, Tensor]], kind: str) -> int:
    """Compare a file with what it should hold; the number of tensors. Raises ValueError for the first difference."""
    reader = gguf.GGUFReader(path)
    for key, value in facts.items():
        found = reader.fields[key].contents() if key in reader.fields else None
        same = (
            np.allclose(found, value, rtol=1e-6) if isinstance(value, float) and found is not None else found == value
        )
        if not same:
            raise ValueError(
                f"{path} was not written as it should be: {key} is {str(found)[:60]}, not {str(value)[:60]}"
            )
    there = {tensor.name: tensor for tensor in reader.tensors}
    count = 0
    for name, tensor in state:
        data, wanted = stored(gguf, tensor, kind)
        found = there.get(name)
        if (
            found is None
            or found.tensor_type != wanted
            or not np.array_equal(found.data.view(np.uint8).ravel(), data.view(np.uint8).ravel())
        ):
            raise ValueError(f"{path} was not written as it should be: {name} differs")
        count += 1
    if count != len(there):
        raise ValueError(f"{path} was not written as it should be: {len(there)} tensors instead of {count}")
    return count


if __name__ == "__main__":
    script.ready()
    sys.exit(main(ARGUMENTS))
