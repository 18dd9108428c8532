"""Text from any model directory, as it is generated.

python sample.py models/gpt-38M-scientific-pretrain --prompt "In this paper we" --num_samples 3
python sample.py models/gpt-38M-tinystories-to-scientific-lora --base moved/gpt-38M-tinystories-pretrain
python sample.py models/gpt-38M-scientific-pretrain --prompt FILE:abstract.txt --temperature 0
echo "In this paper we" | python sample.py models/gpt-38M-scientific-pretrain
"""

import argparse
import codecs
import sys
from pathlib import Path

from configurator import PRECISIONS


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("directory", help="model directory, a ckpt.pt, or a name that `python -m registry list` has")
    parser.add_argument("--prompt", help="text, or FILE:PATH; from stdin when that is no terminal; else end of text")
    parser.add_argument("--num_samples", type=int, default=1, help="how many texts, one after another (default 1)")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="longest continuation, tokens (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="below 1 is bolder; 0 is greedy (default 0.8)")
    parser.add_argument("--top_k", type=int, help="only the k likeliest tokens (default: all)")
    parser.add_argument("--top_p", type=float, help="only the likeliest tokens that together reach p (default: all)")
    parser.add_argument("--seed", type=int, default=1337, help="same seed, same texts (default 1337)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    parser.add_argument("--dtype", choices=PRECISIONS, default="float32", help="of the weights (default float32)")
    parser.add_argument("--base", help="where a LoRA directory's base lies now, if it was moved")
    parser.add_argument("--tokenizer", help="tokenizer.json, for a model that comes without one (nanoGPT's)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    ARGUMENTS = parse()  # --help and mistakes do not wait for torch

import torch

import lora
from checkpoint import TOKENIZER, CheckpointManager
from device import DTYPES, pick_device
from registry.resolve import folder_of
from tokenizer import Tokenizer


def main(arguments: argparse.Namespace) -> int:
    try:
        sample(arguments)
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def sample(arguments: argparse.Namespace) -> None:
    """Stream `num_samples` texts to stdout. Raises ValueError or OSError for what a user can cause."""
    if arguments.num_samples < 1 or arguments.max_new_tokens < 1:
        raise ValueError("--num_samples and --max_new_tokens must be at least 1")
    device = pick_device(arguments.device)
    model, metadata = CheckpointManager.load_model(folder_of(arguments.directory), device, base=arguments.base)
    if lora.adapter_names(model):
        lora.merge_lora(model, dtype=DTYPES[arguments.dtype])  # generates faster, and rounds once
    tokenizer = find_tokenizer(arguments.tokenizer, metadata)
    model.to(DTYPES[arguments.dtype])
    prompt = read_prompt(arguments.prompt)
    ids = torch.tensor([tokenizer.encode(prompt) or [tokenizer.eot]], device=device)
    generator = torch.Generator(device).manual_seed(arguments.seed)
    for number in range(arguments.num_samples):
        if number:
            print("---------------")
        print(prompt, end="", flush=True)
        # A character may need several tokens, so bytes wait here until they are whole.
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in model.stream(
            ids,
            arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            stop_tokens=tokenizer.stops,
            vocab_size=tokenizer.vocab_size,
            generator=generator,
        ):
            if token.item() not in tokenizer.stops:
                print(text.decode(tokenizer.decode_bytes(token.tolist())), end="", flush=True)
        print(text.decode(b"", final=True))


def find_tokenizer(path: str | None, metadata: dict) -> Tokenizer:
    """The model directory's own tokenizer, checked against what the model was trained with; else the one given."""
    stored = CheckpointManager.find_tokenizer(metadata["directory"])
    if path is None and stored is None:
        raise ValueError(f"{metadata['directory']} has no {TOKENIZER}: name one with --tokenizer")
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
        return "" if sys.stdin.isatty() else sys.stdin.read().rstrip("\n")
    if prompt.startswith("FILE:"):
        path = Path(prompt.removeprefix("FILE:")).expanduser()
        try:
            return path.read_text(encoding="utf-8").rstrip("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from None
    return prompt


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
