"""The registry from a terminal: `python -m registry --help`."""

import argparse
import json
import sys

from registry import memory, names, parts, resolve

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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m registry",
        description="Models by name: find them, take them apart, compare, count their memory. Downloads nothing.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for owner in (names, resolve, parts, memory):
        owner.add_commands(commands)
    chosen = parser.parse_args(arguments)
    try:
        text, data = chosen.run(chosen)
    except (ValueError, OSError) as error:
        if chosen.json:
            print(json.dumps({"error": str(error), **getattr(error, "data", {})}, indent=2))
        print(f"python -m registry {chosen.command}: {error}", file=sys.stderr)
        return 1
    try:
        print(json.dumps(data, indent=2) if chosen.json else text, flush=True)
    except BrokenPipeError:  # `| head` has read enough
        sys.stdout = None
    return 0


if __name__ == "__main__":
    sys.exit(main())
