"""Base and adapter in one: a LoRA directory becomes a model directory that needs neither.

    python merge_lora.py models/gpt-38M-tinystories-to-scientific-lora
    python merge_lora.py models/NAME-lora models/NAME-merged-v2 --dtype bfloat16

Before anything is written, the merged model reads real text and its logits are compared with those of base and adapter.
What merging and rounding cost is printed for every dtype and kept in the new directory's export_meta.json.
"""

import argparse
import copy
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import files
import script
from configurator import PRECISIONS, precision


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("directory", type=files.expanded, help="a LoRA directory")
    parser.add_argument(
        "destination",
        type=files.expanded,
        nargs="?",
        help="the new directory (default: beside it, ...-merged by the convention)",
    )
    parser.add_argument("--base", type=files.expanded, help="where the base lies now, if it was moved")
    parser.add_argument(
        "--dtype", type=precision, choices=PRECISIONS, default="float32", help="of the new weights (default float32)"
    )
    parser.add_argument(
        "--data", help="dataset whose validation text to compare on (default: the run's, else this project's README)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    script.begin()
    ARGUMENTS = parse()  # --help and mistakes do not wait for torch

import numpy as np
import torch
from torch import Tensor

import lora
from checkpoint import CheckpointManager
from data.batches import fixed_batches, sequences
from data.finding import dataset_directory, find_dataset
from data.tokens import dataset_problems
from device import DTYPES
from model import GPT, GPTConfig
from model_directory import ADAPTER_WEIGHTS, TOKENIZER, is_lora, read_about, status, strange_files
from naming import ModelName, size_label
from registry.resolve import folder_of
from tokenizer import Tokenizer
from words import in_shell

SEQUENCES, LENGTH = 4, 256  # tokens to compare logits on: few, for a vocabulary may have 262,144 entries
# Merging changes the order of a few sums: float32 logits move by about 1e-6 of the largest. More is a wrong merge.
LARGEST_SHARE = 1e-4
ELSEWHERE = "name another folder, say with -v2 at the end, or remove it"


def main(arguments: argparse.Namespace) -> int:
    def work() -> None:
        directory = folder_of(arguments.directory)
        print(merge(directory, arguments.destination, arguments.base, arguments.dtype, arguments.data))

    return script.run("merge_lora.py", work, "nothing was written")


def merge(
    directory: Path,
    destination: Path | None = None,
    base: Path | None = None,
    dtype: str = "float32",
    data: str | None = None,
) -> str:
    """Merge a LoRA directory into a new model directory, verified first; returns what the script prints.

    Raises ValueError or OSError, and writes nothing, for a directory without an adapter, a base that is not the
    adapter's, a destination that holds something else, and a merged model that computes something else.
    """
    if not (directory.is_dir() and is_lora(read_about(directory))):
        raise ValueError(f"{directory} is no LoRA directory: there is nothing to merge")
    model, metadata = CheckpointManager.load_model(directory, base=base)
    about, tokenizer = metadata["export_meta"], CheckpointManager.find_tokenizer(directory)
    x, y, source = real_text(data, metadata["config"].get("dataset"), tokenizer, model.config)
    before, checks = answers(model, x, y), {}
    for name in sorted(DTYPES, key=lambda name: name == dtype):  # the one that is kept comes last
        checks[name], result, report = check(model, before, x, y, DTYPES[name], last=name == dtype)
    refuse_wrong(checks, dtype)
    destination = destination or conventional_destination(directory, result.num_params())
    merge_of = {
        "base": {key: about["base"][key] for key in ("given", "sha256")},
        "adapter": {"name": about["name"], "sha256": about["files"][ADAPTER_WEIGHTS]["sha256"]},
        "dtype": dtype,
    }
    if done := already(destination, merge_of, result.num_params()):
        return done
    merge_of |= {
        "layers": len(report.merged),
        "untied": list(report.untied),
        "largest_delta": report.largest_delta,
        "verified_on": f"{x.numel():,} tokens of {source}",
        "by_dtype": {name: asdict(found) if found else None for name, found in checks.items()},
    }
    kept = {key: metadata[key] for key in ("config", "iter_num", "best_val_loss")}
    kept |= {key: about[key] for key in ("dataset", "tokenizer", "best") if key in about}
    texts = {}
    if TOKENIZER in about["files"]:
        texts[TOKENIZER] = files.read_verified(directory, TOKENIZER)
    files.check_room(destination, 2 * result.num_params() * DTYPES[dtype].itemsize)  # in two formats
    with files.lock(destination):
        already(destination, merge_of, result.num_params())  # nobody has come between
        CheckpointManager.save_checkpoint(result, destination, {**kept, "merge": merge_of}, texts=texts)
    return summary(destination, result, merge_of, checks)


def real_text(
    data: str | None, run_dataset: str | None, tokenizer: Path | None, config: GPTConfig
) -> tuple[Tensor, Tensor, str]:
    """Inputs and targets (B, T) of validation text, or of the README where the run's dataset is not here; and whose."""
    if data or (run_dataset and (dataset_directory(run_dataset) / "val.bin").exists()):
        dataset = find_dataset(data or run_dataset, tokenizer)
        length = min(config.block_size, LENGTH, len(dataset.val) - 1)
        problems = dataset_problems(dataset.directory, max(1, length), config.vocab_size)
        if problems:
            raise ValueError("\n".join(problems))
        starts = fixed_batches(dataset.val, length, SEQUENCES, SEQUENCES)[0]
        return *sequences(dataset.val, starts, length), dataset.name
    if tokenizer is None:
        raise ValueError(f"the run's dataset ({run_dataset}) is not here, nor a tokenizer for other text: give --data")
    readme = Path(__file__).resolve().with_name("README.md")
    ids = np.array(Tokenizer.load(tokenizer).encode(readme.read_text(encoding="utf-8")))
    length = min(config.block_size, LENGTH, len(ids) - 1)
    return *sequences(ids, fixed_batches(ids, length, SEQUENCES, SEQUENCES)[0], length), readme.name


@dataclass(frozen=True)
class Fidelity:
    """How near merged weights of one dtype come to base and adapter, with float32 arithmetic in both."""

    rounding_loss: float  # share of the adapter's delta that rounding loses, a ratio of Frobenius norms
    largest_logit_difference: float
    largest_logit: float
    loss_before: float  # nats per token, with the adapter
    loss_after: float  # merged


@torch.no_grad()
def answers(model: GPT, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(logits, loss) of every sequence, in eval mode."""
    return [model.eval()(row, targets) for row, targets in zip(x.split(1), y.split(1), strict=True)]


def check(
    model: GPT, before: list[tuple[Tensor, Tensor]], x: Tensor, y: Tensor, dtype: torch.dtype, last: bool
) -> tuple[Fidelity | None, GPT | None, lora.MergeReport | None]:
    """Merge the model in `dtype` and compare with its answers before. None where the dtype cannot hold it.

    A copy of the model, or where it is the `last` the model itself: there are never more than two in memory.
    """
    merged = model if last else copy.deepcopy(model)
    try:
        report = lora.merge_lora(merged, dtype=dtype)
    except ValueError:
        return None, None, None
    merged.to(dtype)
    if not all(parameter.isfinite().all() for parameter in merged.parameters()):
        return None, None, None
    wide = merged if dtype == torch.float32 else (copy.deepcopy(merged) if last else merged).float()
    after = answers(wide, x, y)
    pairs = [(expected, found) for (expected, _), (found, _) in zip(before, after, strict=True)]
    difference = torch.stack([(found - expected).abs().max() for expected, found in pairs]).max().item()
    largest = torch.stack([expected.abs().max() for expected, _ in pairs]).max().item()
    losses = [torch.stack([loss for _, loss in answer]).mean().item() for answer in (before, after)]
    return Fidelity(report.rounding_loss, difference, largest, *losses), merged if last else None, report


def refuse_wrong(checks: dict[str, Fidelity | None], dtype: str) -> None:
    exact = checks["float32"]
    if exact is None or checks[dtype] is None:
        raise ValueError(f"the merged weights are not finite in {'float32' if exact is None else dtype}")
    if not exact.largest_logit_difference <= LARGEST_SHARE * exact.largest_logit:
        raise ValueError(
            "the merged model computes something else: its logits differ by up to "
            f"{exact.largest_logit_difference:.2e} where the largest is {exact.largest_logit:.1f}; nothing was written"
        )


def conventional_destination(directory: Path, count: int) -> Path:
    """Beside the LoRA directory, ...-merged. Untying makes a model larger, and then the name says so."""
    try:
        name = replace(ModelName.parse(directory.resolve().name), training_type="merged")
    except ValueError as error:
        command = f"merge_lora.py {in_shell(directory)} NEW"
        raise ValueError(f"{error}; so say where the merged model shall go: {command}") from None
    return directory.parent / str(name if name.fits(count) else replace(name, size=size_label(count)))


def already(destination: Path, merge_of: dict[str, Any], count: int) -> str:
    """What to say if this very merge is there; empty if nothing is. Raises ValueError for anything else there."""
    if destination.is_file():
        raise ValueError(f"{destination} is a file: {ELSEWHERE}")
    there = read_about(destination) if destination.is_dir() else None
    if there and status(destination) != "complete":
        raise ValueError(f"{destination} is torn: {ELSEWHERE}")
    if there and merge_of.items() <= there.get("merge", {}).items():
        return f"{destination} is this merge already; nothing was changed"
    if there:
        raise ValueError(f"{destination} holds another model, {there['name']} (saved {there['saved_at']}): {ELSEWHERE}")
    if strange := strange_files(destination):
        raise ValueError(f"{destination} holds {', '.join(strange[:3])}, not ours to write over: {ELSEWHERE}")
    if destination.resolve().parent.name == "models":
        name = ModelName.parse(destination.name)
        if not name.fits(count):
            raise ValueError(f"{name} says {name.size}, and the merged model has {count:,} parameters")
    return ""


def summary(destination: Path, model: GPT, merge_of: dict[str, Any], checks: dict[str, Fidelity | None]) -> str:
    found = checks[merge_of["dtype"]]
    lines = [
        f"{destination}: {model.num_params():,} parameters in {merge_of['dtype']}, {merge_of['layers']} layers merged",
        f"verified on {merge_of['verified_on']}: loss {found.loss_before:.5f} with base and adapter, "
        f"{found.loss_after:.5f} merged",
        f"{'weights':<10} {'delta lost':>10} {'logits differ by':>17} {'loss':>9}",
    ]
    for name in DTYPES:
        fidelity = checks[name]
        lines.append(
            f"{name:<10} {fidelity.rounding_loss:>10.1e} {fidelity.largest_logit_difference:>17.1e} "
            f"{fidelity.loss_after:>9.5f}"
            if fidelity
            else f"{name:<10} cannot hold them"
        )
    if merge_of["largest_delta"] == 0:
        lines.append("the adapter changes nothing: it is as it was before its first step")
    if merge_of["untied"]:
        lines.append(f"untied: {', '.join(merge_of['untied'])} no longer shares its weight")
    lines.append(f'try it: python sample.py {in_shell(destination)} --prompt "In this paper we"')
    return "\n".join(lines)


if __name__ == "__main__":
    script.ready()
    sys.exit(main(ARGUMENTS))
