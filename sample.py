"""Text from any model directory, as it is generated.

    python sample.py models/gpt-38M-scientific-pretrain --prompt "In this paper we" --num_samples 3
    python sample.py models/gpt-38M-tinystories-to-scientific-lora --base moved/gpt-38M-tinystories-pretrain
    python sample.py models/gpt-38M-scientific-pretrain --prompt FILE:abstract.txt --temperature 0
    python sample.py models/gpt-38M-scientific-pretrain --prompt "We prove" --prompt "In this paper we" --dtype int8
    echo "In this paper we" | python sample.py models/gpt-38M-scientific-pretrain

Texts go to stdout, with a line of dashes between two of them, and everything else to stderr.
"""

import argparse
import codecs
import sys
from collections.abc import Iterator

import files
import script
from configurator import PRECISIONS, precision


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "directory", help="model directory, ckpt.pt, or a decoder's name from `python -m registry list`"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        help="text, or FILE:PATH; may be given several times; from stdin when that is no terminal; else end of text",
    )
    parser.add_argument("--num_samples", type=int, default=1, help="how many texts for each prompt (default 1)")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="longest continuation, tokens (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="lower is safer, 0 is greedy (default 0.8)")
    parser.add_argument("--top_k", type=int, help="only the k likeliest tokens (default: all)")
    parser.add_argument("--top_p", type=float, help="only the likeliest tokens that together reach p (default: all)")
    parser.add_argument("--seed", type=int, default=1337, help="same seed, same texts (default 1337)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    parser.add_argument(
        "--dtype",
        type=precision,
        choices=["auto", *PRECISIONS, "int8"],
        default="auto",
        help="of the weights; int8 is for x86 processors and says what it costs; auto (default) is float16 there, with "
        "sums in float32, and elsewhere what training would take",
    )
    parser.add_argument("--base", help="where a LoRA directory's base lies now, if it was moved")
    parser.add_argument("--tokenizer", help="tokenizer.json, for a model that comes without one (nanoGPT's)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    script.begin()
    ARGUMENTS = parse()  # --help and mistakes do not wait for torch

import torch
from torch import Tensor
from tqdm import tqdm

import lora
import packed
from checkpoint import CheckpointManager
from device import DTYPES, pick_device, release_freed_memory, use_huge_pages
from generation import check_sampling
from model import GPT
from registry.resolve import folder_of
from tokenizer import Tokenizer
from tokenizer_files import no_tokenizer

SEPARATOR = "---------------"
ROWS = 8  # texts generated at a time, for hardly more than the price of one


def main(arguments: argparse.Namespace) -> int:
    def work() -> None:
        try:
            sample(arguments)
        except BrokenPipeError:  # `| head` has read enough
            sys.stdout = None

    return script.run("sample.py", work)


def sample(arguments: argparse.Namespace) -> None:
    """Write the texts to stdout, the first one as it is generated. Raises ValueError or OSError for what a user can
    cause."""
    if arguments.num_samples < 1 or arguments.max_new_tokens < 1:
        raise ValueError("--num_samples and --max_new_tokens must be at least 1")
    check_sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    check_seed(arguments.seed)
    device = pick_device(arguments.device)
    if device.type == "cpu":
        use_huge_pages()
    model, metadata = CheckpointManager.load_model(folder_of(arguments.directory), device, base=arguments.base)
    tokenizer = tokenizer_for(arguments.tokenizer, metadata)
    prompts = [read_prompt(prompt) for prompt in arguments.prompt or [None]]
    lighten(model, arguments.dtype, tokenizer)
    generator = torch.Generator(device).manual_seed(arguments.seed)
    rows = [prompt for prompt in prompts for _ in range(arguments.num_samples)]
    for first in range(0, len(rows), ROWS):
        some = rows[first : first + ROWS]
        stream = model.stream(
            **padded([tokenizer.encode(prompt) or [tokenizer.eot] for prompt in some], device),
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            stop_tokens=tokenizer.stops,
            vocab_size=tokenizer.drawn,
            generator=generator,
        )
        show(stream, some, tokenizer, separate=first > 0)


def check_seed(seed: int) -> None:
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"--seed {seed} must be a whole number of at most 64 bits")


def show(stream: Iterator[Tensor], prompts: list[str], tokenizer: Tokenizer, separate: bool) -> None:
    """Print the text of the stream's first row as it comes, and then those of the others."""
    if separate:
        print(SEPARATOR)
    print(prompts[0], end="", flush=True)
    # A character may need several tokens, so bytes wait here until they are whole.
    text, tokens, stopped = codecs.getincrementaldecoder("utf-8")(errors="replace"), [], False
    for token in stream:
        tokens.append(token)
        stopped = stopped or token[0].item() in tokenizer.stops
        if not stopped:
            print(text.decode(tokenizer.decode_bytes(token[:1].tolist(), goes_on=True)), end="", flush=True)
    print(text.decode(b"", final=True))
    for prompt, row in zip(prompts[1:], torch.stack(tokens, dim=1)[1:].tolist(), strict=True):
        print(SEPARATOR)
        print(prompt + tokenizer.decode(tokenizer.before_stop(row), goes_on=True))


def padded(rows: list[list[int]], device: torch.device) -> dict[str, Tensor | None]:
    """Prompts of any lengths as what `stream` takes: idx (B, T), and attention_mask where some are shorter."""
    longest = max(map(len, rows))
    idx = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"idx": idx, "attention_mask": None if mask.all() else mask}


def lighten(model: GPT, dtype: str, tokenizer: Tokenizer) -> None:
    """Hold the weights as `--dtype` says, adapters merged; tell stderr what int8 costs."""
    dtype, packs = packed.pick_weight_dtype(dtype, model.final_norm.weight.device)
    whole = torch.float32 if packs else DTYPES[dtype]
    if lora.adapter_names(model):
        lora.merge_lora(model, dtype=whole)  # generates faster, and rounds once
    model.to(whole)
    release_freed_memory()
    if dtype == "int8":
        length = min(63, model.config.block_size)
        with tqdm(desc="what int8 costs", total=length + 2, delay=2, disable=None, leave=False) as bar:
            text = own_text(model, tokenizer, length, bar)
            before = perplexity(model, text)
            bar.update()
            after = perplexity(packed.pack(model, dtype), text)
        print(
            f"int8: perplexity {after:.3f}, in float32 {before:.3f} ({after / before:.4f} x), on {text.numel()} tokens "
            "that the model wrote in float32",
            file=sys.stderr,
        )
    elif packs:
        packed.pack(model, dtype)


def own_text(model: GPT, tokenizer: Tokenizer, length: int, bar: tqdm) -> Tensor:
    """Sequences (B, 1 + length) drawn from the model: there is no other text that every model has."""
    start = torch.full((8, 1), tokenizer.eot, device=model.final_norm.weight.device)
    generator = torch.Generator(start.device).manual_seed(0)
    tokens = [start[:, 0]]
    for token in model.stream(start, length, vocab_size=tokenizer.vocab_size, generator=generator):
        tokens.append(token)
        bar.update()
    return torch.stack(tokens, dim=1)


def perplexity(model: GPT, text: Tensor) -> float:
    with torch.no_grad():
        return model.eval()(text[:, :-1], text[:, 1:].contiguous(), only_loss=True)[1].exp().item()


def tokenizer_for(path: str | None, metadata: dict) -> Tokenizer:
    """The model directory's own tokenizer, checked against what the model was trained with; else the one given."""
    stored = CheckpointManager.find_tokenizer(metadata["directory"])
    if path is None and stored is None:
        foreign = CheckpointManager.is_hugging_face(metadata["directory"])
        characters = "" if foreign else "; for nanoGPT's characters there is none: data/README.md"
        raise ValueError(f"{no_tokenizer(metadata['directory'])}; name one with --tokenizer{characters}")
    tokenizer = Tokenizer.load(path or stored)
    trained_with = (metadata["export_meta"] or {}).get("tokenizer")
    if trained_with and trained_with["fingerprint"] != tokenizer.fingerprint:
        raise ValueError(
            f"{path or stored} is {tokenizer.name} ({tokenizer.fingerprint[:12]}), and the model was trained with "
            f"{trained_with['name']} ({trained_with['fingerprint'][:12]})"
        )
    if tokenizer.vocab_size > (known := metadata["model_args"]["vocab_size"]):
        raise ValueError(
            f"{tokenizer.name} has {tokenizer.vocab_size:,} tokens and {metadata['directory']} knows {known:,}: it is "
            "another model's tokenizer"
        )
    return tokenizer


def read_prompt(prompt: str | None) -> str:
    if prompt is None:
        try:
            return "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().rstrip("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"the prompt on stdin cannot be read: {error}") from None
    if prompt.startswith("FILE:"):
        path = files.expanded(prompt.removeprefix("FILE:"))
        try:
            return path.read_text(encoding="utf-8-sig").rstrip("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from None
        except OSError as error:
            raise ValueError(f"the prompt cannot be read from {path}: {error.strerror}") from None
    return prompt


if __name__ == "__main__":
    script.ready()
    sys.exit(main(ARGUMENTS))
