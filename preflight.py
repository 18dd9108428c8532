"""Before the loop: from a configuration to the model, data and directory of a run, or to what is in the way of one."""

import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

import files
from checkpoint import LOG, METRICS, CheckpointManager, build_model, read_about
from configurator import RunConfig, merge_resumed
from data.tokens import Dataset, dataset_problems, load_dataset
from distributed import Ranks
from model import GPT, PRESETS, GPTConfig
from naming import ModelName, size_label
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent


@dataclass
class Start:
    """What a trainer starts from. `config` has its architecture and out_dir filled in; `state` is that of a resume."""

    config: RunConfig
    dataset: Dataset
    directory: Path
    model: GPT
    state: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def prepare_start(config: RunConfig, given: dict[str, str], ranks: Ranks) -> Start:
    """Find or make everything a run needs. `given` maps the settings that were given to where they were.

    Raises ValueError that lists every problem, before a run's directory is touched; FileNotFoundError where a dataset
    or model is missing.
    """
    if config.init_from == "resume":
        return _resume(config, given, ranks)
    stored = CheckpointManager.find_tokenizer(config.init_from) if config.init_from != "scratch" else None
    dataset = find_dataset(config.dataset, ranks, stored)
    if config.init_from == "scratch":
        model, architecture = None, config.model_config(_vocab_size(config, dataset))
    else:
        model = base_model(config, given, dataset)
        architecture = model.config
    name = conventional_name(architecture, config)
    directory = Path(config.out_dir or Path("models") / str(name)).expanduser()
    problems, notes = name_problems(directory, name, count_parameters(architecture))
    if model is not None and stored is None:
        notes.append(
            f"{config.init_from} has no tokenizer.json: that it knows {dataset.name}'s tokens cannot be checked"
        )
    problems += dataset_problems(dataset.directory, architecture.block_size, architecture.vocab_size)
    problems += rank_problems(config, ranks) + occupied(directory) + disk_problems(directory, architecture)
    _raise_all(problems)
    if model is None:
        torch.manual_seed(config.seed)
        model = GPT(architecture)
    return Start(
        replace(config, out_dir=str(directory), **asdict(architecture)), dataset, directory, model, None, notes
    )


def _resume(config: RunConfig, given: dict[str, str], ranks: Ranks) -> Start:
    if config.out_dir:
        directory = Path(config.out_dir).expanduser()
    else:
        vocab_size = _vocab_size(config, find_dataset(config.dataset, ranks))
        directory = Path("models") / str(conventional_name(config.model_config(vocab_size), config))
    state = CheckpointManager.load_training_state(directory)
    config, notes, problems = merge_resumed(config, given, state["config"])
    dataset = find_dataset(config.dataset, ranks)
    saved = state["dataset"]
    if saved["fingerprint"] != dataset.fingerprint:
        problems.append(
            f"{directory} was trained on {saved['name']} ({saved['fingerprint'][:12]}), and {dataset.directory} holds "
            f"{dataset.name} ({dataset.fingerprint[:12]}): resume needs the same tokens; --init_from={directory} with "
            "another --out_dir starts a new run from its weights"
        )
    architecture = GPTConfig(**{f.name: getattr(config, f.name) for f in fields(GPTConfig)})
    problems += rank_problems(config, ranks) + disk_problems(directory, architecture)
    _raise_all(problems)
    model = build_model({**state, "model_args": asdict(architecture)}, directory)
    if len(state["generators"]) != ranks.size:
        notes.append(
            f"{len(state['generators'])} process(es) saved this run and {ranks.size} go on: dropout draws differ"
        )
    return Start(replace(config, out_dir=str(directory)), dataset, directory, model, state, notes)


def _raise_all(problems: list[str]) -> None:
    if problems:
        raise ValueError("this run cannot start:\n" + "\n".join(f"  - {p}" for p in problems))


def find_dataset(name: str, ranks: Ranks, tokenizer: Path | None = None) -> Dataset:
    """A folder under data/ or a path. One that has a prepare.py but no token files yet is prepared first.

    `tokenizer` is the tokenizer.json to prepare it with, where the model that will read it has one already.
    """
    path, known = Path(name).expanduser(), ROOT / "data" / name
    directory = known if len(path.parts) == 1 and (known.is_dir() or not path.is_dir()) else path
    script = directory / "prepare.py"
    if ranks.main and script.is_file() and not (directory / "train.bin").exists():
        print(f"{directory} has no token files yet; running {script.name} there", flush=True)
        options = ["--tokenizer", str(tokenizer)] if tokenizer else []
        code = subprocess.run([sys.executable, str(script), *options], check=False).returncode
        if code:
            raise ValueError(f"{script} ended with exit code {code}, so there is nothing to train on")
    ranks.agree(None)  # the others wait here
    if not directory.is_dir():
        names = ", ".join(sorted(p.parent.name for p in (ROOT / "data").glob("*/prepare.py")))
        raise FileNotFoundError(f"there is no dataset {name}; data/ has {names}, and the path of a folder will do too")
    return load_dataset(directory)


def _vocab_size(config: RunConfig, dataset: Dataset) -> int:
    if not (config.vocab_size or dataset.vocab_size):
        raise ValueError(
            f"{dataset.directory} has no meta.json to say how many tokens its tokenizer has: say it with --vocab_size "
            "(GPT-2's has 50257)"
        )
    return config.vocab_size or dataset.vocab_size


def base_model(config: RunConfig, given: dict[str, str], dataset: Dataset) -> GPT:
    """The model of `init_from`, with this run's dropout and, where a shorter one is asked for, its block_size.

    Raises ValueError where the settings or the dataset's tokenizer contradict it.
    """
    source = Path(config.init_from)
    model = CheckpointManager.load_model(source)[0].float()  # half-precision weights would not learn small steps
    shape = ("n_layer", "n_head", "n_embd", "vocab_size", "bias", "tie_word_embeddings")
    problems = [
        f"{key}={getattr(config, key)} ({given[key]}) is not what {source} has, {getattr(model.config, key)}"
        for key in shape
        if key in given and getattr(config, key) not in (None, getattr(model.config, key))
    ]
    preset = PRESETS[config.preset]
    if "preset" in given and any(
        getattr(preset, key) != getattr(model.config, key) for key in shape if key not in given
    ):
        problems.append(f"preset={config.preset} ({given['preset']}) is another architecture than {source} has")
    stored = CheckpointManager.find_tokenizer(source)
    theirs, ours = Tokenizer.load(stored) if stored else None, dataset.tokenizer_fingerprint
    if theirs and ours and theirs.fingerprint != ours:
        problems.append(
            f"{source} reads tokens of {theirs.name} ({theirs.fingerprint[:12]}), and {dataset.directory} holds those "
            f"of {dataset.meta['tokenizer']['name']} ({ours[:12]}): prepare the data with --tokenizer {stored}"
        )
    _raise_all(problems)
    arguments = asdict(replace(model.config, dropout=config.dropout))
    model = build_model({"model": model.state_dict(), "model_args": arguments}, source)
    if config.block_size is not None:
        model.crop_block_size(config.block_size)
    return model


def conventional_name(architecture: GPTConfig, config: RunConfig) -> ModelName:
    """What the convention calls the model: after training from scratch, or after fine-tuning that of init_from."""
    size, folder = size_label(count_parameters(architecture)), Path(config.dataset).resolve().name
    words = re.split(r"[^a-z0-9_.]+", folder.lower())
    dataset = "-".join(word for word in words if word and word != "to") or "data"
    if config.init_from in ("scratch", "resume"):
        return ModelName("gpt", size, dataset, "pretrain")
    try:
        base = ModelName.parse(Path(config.init_from).resolve().name).dataset.split("-to-")[-1]
    except ValueError:
        base = "base"
    return ModelName("gpt", size, dataset if base == dataset else f"{base}-to-{dataset}", "ft")


def count_parameters(architecture: GPTConfig) -> int:
    with torch.device("meta"):
        return GPT(architecture).num_params()


def name_problems(directory: Path, proposal: ModelName, count: int) -> tuple[list[str], list[str]]:
    """(problems, notes): under models/ a name outside the convention or with another size is a problem, else a note."""
    try:
        name = ModelName.parse(directory.name)
        misfit = "" if name.fits(count) else f"{name} says {name.size}, and the model has {count:,} parameters"
    except ValueError as error:
        misfit = str(error)
    if not misfit:
        return [], []
    sentence = f"out_dir: {misfit}; the convention's name is {directory.parent / str(proposal)}"
    return ([sentence], []) if directory.resolve().parent.name == "models" else ([], [sentence])


def rank_problems(config: RunConfig, ranks: Ranks) -> list[str]:
    steps = config.gradient_accumulation_steps
    return (
        [f"gradient_accumulation_steps={steps} must be a multiple of the {ranks.size} processes"]
        if steps % ranks.size
        else []
    )


def occupied(directory: Path) -> list[str]:
    """A run that is not resumed must not write over anything: another model, or what is no model at all."""
    if not directory.is_dir():
        return [f"out_dir {directory} is a file: choose another --out_dir"] if directory.exists() else []
    about = read_about(directory)
    if about is not None:
        return [
            f"{directory} already holds a run, at iteration {about['iter_num']:,} with val loss "
            f"{about['best_val_loss']:.4f}: go on with --init_from=resume, choose another --out_dir, or remove it"
        ]
    # What a run leaves that was stopped before its first save is no loss; anything else may be.
    strange = sorted(
        p.name for p in directory.iterdir() if p.name not in (LOG, METRICS, "last") and files.NEW not in p.name
    )
    return (
        [f"{directory} holds {', '.join(strange[:3])}, not ours to write over: choose another --out_dir"]
        if strange
        else []
    )


def check_unchanged(start: Start) -> None:
    """Once the directory is locked: raise ValueError if another run has written to it since `start` was prepared."""
    if start.state is None:
        _raise_all(occupied(start.directory))
    elif read_about(start.directory)["iter_num"] != start.state["iter_num"]:
        raise ValueError(f"another run has just saved to {start.directory}: start again to go on from there")


def disk_problems(directory: Path, architecture: GPTConfig) -> list[str]:
    """Best and last weights and AdamW's two moments in float32, the new ones beside the old while they are written."""
    there = next(p for p in (directory.resolve(), *directory.resolve().parents) if p.is_dir())
    copies = 1 if (there / files.MARKER).exists() else 2  # where a run goes on, the old ones are on the disk already
    needed, free = copies * 4 * 4 * count_parameters(architecture), shutil.disk_usage(there).free
    return [f"{there} has {free / 1e6:,.0f} MB free, and saving needs {needed / 1e6:,.0f} MB"] if free < needed else []
