"""The registry from a terminal: `python -m registry --help`."""

import argparse
import json
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import files
import script
from architecture import PRESETS
from configurator import LONGEST_UNASKED, PRECISIONS, RunConfig, precision
from registry.specs import PartType

EXAMPLES = """\
examples:
  python -m registry list gemma                     the names with gemma in them, and which of those are here
  python -m registry where gpt2-offline             where it lies, and where else it was looked for
  python -m registry show models/NAME               what a model of yours is made of
  python -m registry parts gpt2-offline
  python -m registry compare gemma3-270m gemma3-1b --plot two.png    presets need no files
  python -m registry memory gemma3-4b --lora_rank 64 --batch_size 8 --block_size 2048

Every command prints JSON with --json, an object with the key "error" where it fails. It exits with 1 then.
"""
MEMORY = """\
What it counts: one step of train.py, at its fullest moment, in GB of 1e9 bytes on each device. Weights are float32
while training, whatever --dtype is, and so are gradients and AdamW's two moments: 16 bytes a parameter in all. With
--lora_rank the base has no gradients and no moments, and with bf16 its linear layers take 2 bytes. Activations and
logits grow with batch_size x block_size: where a model does not fit, halve train.py's --batch_size and double its
--gradient_accumulation_steps; the step stays the same. With --activation_checkpointing true only what goes into each
block is kept for the backward pass. With --mesh_shape the numbers are those of one card, and gradients that wait for
those of further micro-batches are not divided by fsdp.

examples:
  python -m registry memory gemma3-4b --lora_rank 64 --batch_size 8 --block_size 2048
  python -m registry memory gemma3-12b --lora_rank 16 --batch_size 4 --mesh_shape "[[4, 2], ['fsdp', 'tp']]"
  python -m registry memory gemma3-4b --batch_size 1 --block_size 2048 --activation_checkpointing true
  python -m registry memory small --batch_size 16 --block_size 256 --dtype fp32
  python -m registry memory models/NAME --generate --batch_size 4
  python -m registry memory --table
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m registry",
        description="Models by name: find them, take them apart, compare, count their memory. Downloads nothing.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="every name, and whether its model is here")
    listing.add_argument("text", nargs="?", default="", metavar="TEXT", help="only names with this in them")
    where = commands.add_parser("where", help="where a model lies on this machine, and where else it was looked for")
    where.add_argument("name", metavar="NAME", help="a name of the catalogue or in models/, a path, or a hub id")
    what = "a folder, an id of a ModelRegistry, any name that `where` knows, or a preset of train.py's"
    show = commands.add_parser("show", help="what a model is made of, in a screenful")
    parts = commands.add_parser("parts", help="every part of a model: its path, sizes and parameters")
    compare = commands.add_parser("compare", help="how two models differ, and which parts of one fit in the other")
    for command in (show, parts):
        command.add_argument("name", metavar="NAME", help=what)
    parts.add_argument("--type", metavar="TYPE", help=f"only {', '.join(kind.value for kind in PartType)}")
    compare.add_argument("a", metavar="A", help=what)
    compare.add_argument("b", metavar="B", help="the other one")
    compare.add_argument("--plot", type=files.expanded, metavar="FILE.png", help="draw the two side by side")
    add_memory(commands)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", default=False, help="print JSON")
    return parser.parse_args(arguments)


def add_memory(commands: argparse._SubParsersAction) -> None:
    memory = commands.add_parser(
        "memory",
        help="what training a model, or generating with it, needs, and on which devices that fits",
        epilog=MEMORY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # so that what was not given is not there, and nothing given is ignored
    )
    names = f"one of {', '.join(PRESETS)}; or a name of the catalogue or in models/, a path, a hub id"
    memory.add_argument("name", metavar="NAME", nargs="?", help=names)
    memory.add_argument(
        "--lora_rank", type=int, help="train adapters of this rank on every linear layer; else everything"
    )
    memory.add_argument("--batch_size", type=int, help=f"sequences at once, over all devices ({RunConfig.batch_size})")
    memory.add_argument(
        "--block_size", type=int, help=f"tokens of a sequence (the model's context, {LONGEST_UNASKED} at most)"
    )
    memory.add_argument(
        "--dtype",
        type=precision,
        choices=PRECISIONS,
        help="of matrix products; with --generate of the weights (bfloat16)",
    )
    memory.add_argument(
        "--mesh_shape", help="[[sizes], [names]]; dp: copies of the model, fsdp: shares of it, tp: shares of each layer"
    )
    memory.add_argument(
        "--gradient_accumulation_steps",
        type=int,
        help="of train.py, for each process; gradients wait while others are added, so 1 needs less "
        f"({RunConfig.gradient_accumulation_steps})",
    )
    memory.add_argument(
        "--activation_checkpointing",
        choices=("true", "false"),
        help="of train.py: keep only what goes into each block, and compute the rest again in the backward pass",
    )
    memory.add_argument("--generate", action="store_true", help="count text being made, with its cache, not training")
    memory.add_argument(
        "--table", action="store_true", help="the Gemma 3 table of agent-tunix beside what is counted here"
    )


PLACES = {  # {command: the module with its run_COMMAND}
    "list": "names",
    "where": "resolve",
    "show": "parts",
    "parts": "parts",
    "compare": "parts",
    "memory": "memory_report",
}


def runner_of(command: str) -> Callable[[argparse.Namespace], tuple[str, Any]]:
    """What runs a command. Its module is imported now: most need torch, which takes a second; `where` does not."""
    return getattr(import_module(f"registry.{PLACES[command]}"), f"run_{command}")


def main(arguments: argparse.Namespace) -> int:
    try:
        text, data = runner_of(arguments.command)(arguments)
    except (ValueError, OSError) as error:
        if arguments.json:
            print(json.dumps({"error": str(error), **getattr(error, "data", {})}, indent=2))
        print(f"python -m registry {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    try:
        print(json.dumps(data, indent=2) if arguments.json else text, flush=True)
    except BrokenPipeError:  # `| head` has read enough
        sys.stdout = None
    return 0


if __name__ == "__main__":
    script.begin()
    given = parse()  # --help and mistakes do not wait for torch
    runner_of(given.command)
    script.ready()
    sys.exit(main(given))
