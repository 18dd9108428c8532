"""Before the loop: from a configuration to the model, data and directory of a run, or to what is in the way of one."""

import contextlib
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import families
import files
import lora
from architecture import PRESETS
from checkpoint import CheckpointManager
from configurator import LONGEST_UNASKED, RunConfig, merge_resumed, with_sources
from data.finding import find_dataset
from data.tokens import Dataset, dataset_problems
from distributed import Ranks
from mesh import Mesh, mesh_problems
from model import GPT, GPTConfig, count_parameters, on_meta
from model_directory import locate, only_base_of, read_about, strange_files
from naming import ModelName, size_label
from optimizer import inner_matrices, start_branches_at_zero
from registry.catalogue import find_spec
from registry.resolve import find_model, is_path
from tokenizer_files import no_tokenizer
from weights import build_model, reshaped
from words import in_shell, merge_first


@dataclass
class Start:
    """What a trainer starts from. `config` has its architecture and out_dir filled in; `state` is that of a resume, and
    `base` what a LoRA run remembers of the model it adapts."""

    config: RunConfig
    dataset: Dataset
    directory: Path
    model: GPT  # its numbers may be on the meta device, or in a mapped file, where several processes will share them
    state: dict[str, Any] | None = None
    base: dict[str, str] | None = None
    notes: list[str] = field(default_factory=list)


def prepare_start(config: RunConfig, given: dict[str, str], ranks: Ranks) -> Start:
    """Find or make everything a run needs. `given` maps the settings that were given to where they were.

    Raises ValueError that lists every problem, before a run's directory is touched; FileNotFoundError where a dataset
    or model is missing.
    """
    _raise_all(different_settings(ranks.gather(asdict(config))), {})
    if config.init_from == "resume":
        return _resume(config, given, ranks)
    _raise_all([f"base={config.base} is for resuming a LoRA run; init_from names a base"] if config.base else [], given)
    model = tokenizer = base = None
    if config.init_from != "scratch":
        config, base_name = located(config)
        if config.lora:
            expected = CheckpointManager.base_reference(config.init_from, "")["sha256"]
        model = base_model(config, given, ranks.size > 1)
        tokenizer = CheckpointManager.find_tokenizer(config.init_from)
    dataset = find_dataset(config.dataset, tokenizer, ranks)
    architecture = model.config if model else config.model_config(_vocab_size(config, dataset))
    name = conventional_name(architecture, config)
    directory = files.expanded(config.out_dir or Path("models") / str(name))
    problems, notes = name_problems(directory, name, count_parameters(architecture))
    if model is not None and tokenizer is None and dataset.meta and CheckpointManager.is_hugging_face(config.init_from):
        problems.append(f"{dataset.name} cannot be written in its tokens: {no_tokenizer(locate(config.init_from)[0])}")
    elif model is not None and tokenizer is None:
        notes.append(
            f"{config.init_from} has no tokenizer.json: that it knows {dataset.name}'s tokens cannot be checked"
        )
    length, misfit = sequence_length(config, architecture)
    problems += misfit + dataset_problems(dataset.directory, length, architecture.vocab_size)
    try:
        families.hf_config(architecture)
    except ValueError as error:
        notes.append(f"Transformers will not open this model: {error}")
    torch.manual_seed(config.seed)
    try:
        notes += adapt(model, config) if config.lora else []
    except ValueError as error:
        problems.append(str(error).replace("untie=True", "lora_untie=true"))
    if config.lora and config.optimizer == "muon" and not inner_matrices(model):
        targets = f"lora_targets={config.lora_targets}"
        problems.append(f"optimizer=muon is for matrices inside the blocks, and {targets} lets none of them train")
    trainable = lora.count_adapter_parameters(model) if config.lora else count_parameters(architecture)
    problems += (
        rank_problems(config, architecture, ranks)
        + occupied(directory)
        + disk_problems(directory, trainable, config.lora)
    )
    _raise_all(problems, given)
    if config.lora:
        base = CheckpointManager.base_reference(config.init_from, directory) | {"given": base_name}
        if base["sha256"] != expected:
            raise ValueError(f"{config.init_from} was saved anew while it was read: start again")
    config = config.resolved(architecture, out_dir=str(directory), block_size=length)
    if model is None:
        with torch.device("cpu" if ranks.main else "meta"):  # rank 0 shares out what it draws
            model = GPT(architecture)
        if config.zero_init:
            start_branches_at_zero(model)
    return Start(config, dataset, directory, model, None, base, notes)


def located(config: RunConfig) -> tuple[RunConfig, str]:
    """The configuration with the folder of the model that `init_from` names, and what others call that model."""
    if is_path(config.init_from):
        return config, config.init_from
    found, spec = find_model(config.init_from, local_files_only=config.local_files_only), find_spec(config.init_from)
    hub_id = spec.hf_id if spec else config.init_from
    return replace(config, init_from=str(found.path)), hub_id if found.revision else str(found.path)


def _resume(config: RunConfig, given: dict[str, str], ranks: Ranks) -> Start:
    directory = _to_resume(config, ranks)
    state = CheckpointManager.load_training_state(directory, in_shares=ranks.size > 1)
    config, notes, problems = merge_resumed(config, given, state["config"])
    if "mesh_shape" not in given and Mesh.parse(config.mesh_shape, ranks.size).devices != ranks.size:
        notes.append(f"mesh_shape was {config.mesh_shape} in the saved run, which is not for {ranks.size} process(es)")
        config = replace(config, mesh_shape="")
    if config.max_iters < state["iter_num"] and "max_iters" in given:
        problems.append(f"max_iters={config.max_iters} is less than the {state['iter_num']:,} steps of {directory}")
    dataset = find_dataset(config.dataset, CheckpointManager.find_tokenizer(directory), ranks)
    saved = state["dataset"]
    if saved["fingerprint"] != dataset.fingerprint:
        problems.append(
            f"{directory} was trained on {saved['name']} ({saved['fingerprint'][:12]}), and {dataset.directory} holds "
            f"{dataset.name} ({dataset.fingerprint[:12]}): resume needs the same tokens; --init_from={directory} with "
            "another --out_dir starts a new run from its weights"
        )
    architecture = GPTConfig(**{**state["model_args"], "dropout": config.dropout})
    trained = sum(tensor.numel() for tensor in state["model"].values()) or count_parameters(architecture)
    problems += rank_problems(config, architecture, ranks) + disk_problems(directory, trained, config.lora)
    if config.base and not config.lora:
        problems.append(f"base={config.base}, but {directory} is no LoRA run")
    if state["iter_num"] < config.max_iters and (adapters := [path.name for path in only_base_of(directory)]):
        problems.append(
            f"{', '.join(adapters)} adapts the weights of {directory}, which would be replaced: keep a copy beside it, "
            f"the adapter's --base from then on (python checkpoint.py deploy {in_shell(directory)} "
            f"{in_shell(files.free_name(directory.resolve(), '-base'))})"
        )
    if state.get("threads") not in (None, torch.get_num_threads()) and not torch.cuda.is_available():
        notes.append(
            f"the saved run computed with {state['threads']} threads and this one has {torch.get_num_threads()}: sums "
            "are rounded otherwise"
        )
    _raise_all(problems, given)
    base = None
    if config.lora:
        model, base = CheckpointManager.load_base(directory, config.base or None, mapped=ranks.size > 1)
        model = reshaped(model, dropout=architecture.dropout)
        notes += adapt(model, config)
        if state["model"]:
            lora.load_lora_state_dict(model, state["model"])
        config = replace(config, base="")
    elif state["model"]:
        model = build_model({**state, "model_args": asdict(architecture)}, directory)
    else:  # it lies in shards, and the trainer fills it from there
        model = on_meta(architecture)
    if len(state["generators"]) != (readers := Mesh.parse(config.mesh_shape, ranks.size).readers):
        notes.append(
            f"{len(state['generators'])} process(es) divided the batch of this run, and now {readers}: dropout draws "
            "differ"
        )
    return Start(replace(config, out_dir=str(directory)), dataset, directory, model, state, base, notes)


def _to_resume(config: RunConfig, ranks: Ranks) -> Path:
    """The directory of the run that goes on: out_dir, or what the convention calls a run with this configuration."""
    if config.out_dir:
        return files.expanded(config.out_dir)
    if config.lora:
        raise ValueError("a LoRA run's name follows from its base: say which run with --out_dir")
    models, name = Path("models"), conventional_name(config.model_config(vocab_size=1), config)
    of_any_size = f"{name.architecture}-*-{name.dataset}-{name.training_type}"
    if not any(models.glob(of_any_size)):  # to know the size, the dataset may have to be prepared
        raise FileNotFoundError(f"there is no {models / of_any_size} to go on with: say which run with --out_dir")
    vocab_size = _vocab_size(config, find_dataset(config.dataset, ranks=ranks))
    return models / str(conventional_name(config.model_config(vocab_size), config))


def adapt(model: GPT, config: RunConfig) -> list[str]:
    """Give the model its adapters, and say what matched. Raises ValueError if something named does not."""
    report = lora.apply_lora(model, config.lora_config(), dtype=torch.float32, untie=config.lora_untie)
    counts = Counter(re.sub(r".*\b(h|layers)\.\d+\.", "", path) for path in report.matched)
    layers = ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counts.items())
    share = f"{report.trainable:,} of {report.total:,} parameters train"
    notes = [f"LoRA rank {config.lora_rank} on {len(report.matched)} layers ({layers}): {share}"]
    shared = model.embedding.weight if model.config.tie_word_embeddings else None
    if config.lora_untie and not any(model.get_submodule(path).weight is shared for path in report.matched):
        notes.append(
            "lora_untie=true unties nothing: no layer of lora_targets shares its weight (all leaves these out)"
        )
    if config.lora_dropout and all(isinstance(model.get_submodule(path), nn.Embedding) for path in report.matched):
        notes.append(f"lora_dropout={config.lora_dropout} drops nothing: token ids, all that is read here, have none")
    return notes


def _raise_all(problems: list[str], given: dict[str, str]) -> None:
    if problems:
        lines = (f"  - {problem}" for problem in with_sources(problems, given))
        raise ValueError("this run cannot start:\n" + "\n".join(lines))


def _vocab_size(config: RunConfig, dataset: Dataset) -> int:
    if not (config.vocab_size or dataset.vocab_size):
        raise ValueError(
            f"{dataset.directory} has no meta.json to say how many tokens its tokenizer has: say it with --vocab_size "
            "(GPT-2's has 50257)"
        )
    return config.vocab_size or dataset.vocab_size


def base_model(config: RunConfig, given: dict[str, str], mapped: bool = False) -> GPT:
    """The model of `init_from`, with this run's dropout and, where a shorter one is asked for, its block_size.

    If it is `mapped`, weights stay in their file for now, in its dtype.
    Raises ValueError where the settings contradict it.
    """
    source = Path(config.init_from)
    model = CheckpointManager.load_model(source, mapped=mapped)[0]
    model = model if mapped else model.float()  # half-precision weights would not learn small steps
    if lora.adapter_names(model):
        raise ValueError(merge_first(source))
    shape = ("n_layer", "n_head", "n_embd", "vocab_size", "bias", "tie_word_embeddings")
    problems = [
        f"{key}={getattr(config, key)} is not what {source} has, {getattr(model.config, key)}"
        for key in shape
        if key in given and getattr(config, key) not in (None, getattr(model.config, key))
    ]
    preset = PRESETS[config.preset]
    if "preset" in given and any(
        getattr(preset, key) != getattr(model.config, key) for key in shape if key not in given
    ):
        problems.append(f"preset={config.preset} is another architecture than {source} has")
    _raise_all(problems, given)
    return reshaped(model, config.block_size if model.config.block == "gpt2" else None, config.dropout)


def sequence_length(config: RunConfig, architecture: GPTConfig) -> tuple[int, list[str]]:
    """Tokens in a training sequence, and what is wrong with it. Learned positions are cut to it; a Llama block's
    context stays what it was, and is longer than anybody trains on unless they say so."""
    if architecture.block == "gpt2" or (config.init_from == "scratch" and config.block_size):
        return architecture.block_size, []
    length, context = config.block_size or min(architecture.block_size, LONGEST_UNASKED), architecture.block_size
    fits, limit = 1 <= length <= context, f"{context}, the context of {config.init_from}"
    return length, [] if fits else [f"block_size={length} must lie between 1 and {limit}"]


def conventional_name(architecture: GPTConfig, config: RunConfig) -> ModelName:
    """What the convention calls the model: after training from scratch, or after fine-tuning that of init_from."""
    size, folder = size_label(count_parameters(architecture)), Path(config.dataset).resolve().name
    words = re.split(r"[^a-z0-9_.]+", folder.lower())
    dataset = "-".join(word for word in words if word and word != "to") or "data"
    kind = "gpt" if architecture.block == "gpt2" else "llama"
    if config.init_from in ("scratch", "resume"):
        return ModelName(kind, size, dataset, "pretrain")
    base, training = "base", "ft"
    with contextlib.suppress(ValueError):  # a base outside the convention
        parsed = ModelName.parse(Path(config.init_from).resolve().name)
        base = parsed.dataset.split("-to-")[-1]
        training = "merged-ft" if parsed.training_type == "merged" else "ft"
    training = "lora" if config.lora else training
    return ModelName(kind, size, dataset if base == dataset else f"{base}-to-{dataset}", training)


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


def rank_problems(config: RunConfig, architecture: GPTConfig, ranks: Ranks) -> list[str]:
    mesh = Mesh.parse(config.mesh_shape, ranks.size)
    problems = mesh_problems(mesh, ranks.size, architecture, config.micro_batches, config.lora_one_micro_batch)
    if config.optimizer == "muon" and ranks.size > 1:
        problems.append(f"optimizer=muon needs whole matrices, so it is for one process, and there are {ranks.size}")
    return problems


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
    strange = strange_files(directory)
    return (
        [f"{directory} holds {', '.join(strange[:3])}, not ours to write over: choose another --out_dir"]
        if strange
        else []
    )


PLACES = ("out_dir", "dataset", "init_from", "base")  # what is the same may be called otherwise on another machine


def different_settings(found: list[dict[str, Any]]) -> list[str]:
    """What keeps processes with these settings from being one run: each would use its own, and none notice."""
    return [
        f"{key}={values[key]} for rank {rank}, and {found[0][key]} for rank 0: every machine needs the same settings"
        for rank, values in enumerate(found)
        for key in values
        if key not in PLACES and values[key] != found[0][key]
    ]


def check_shared(start: Start, ranks: Ranks) -> None:
    """Raise ValueError, before any training, if the processes read different tokens or adapt different bases, or if
    rank 0, which puts saves together, does not see what the others write: on several machines each may have a disk of
    its own. Collective, in a locked directory."""
    if ranks.size == 1:
        return
    marks = [start.directory / f"rank-{rank}" for rank in range(ranks.size)]
    files.stage(marks[ranks.rank], b"")  # as their shards will be
    try:
        read = ranks.gather((start.dataset.fingerprint, (start.base or {}).get("sha256")))
        ranks.main_alone(lambda: _raise_all(not_shared(marks, read), {}))
    finally:
        files.staged_name(marks[ranks.rank]).unlink(missing_ok=True)


def not_shared(marks: list[Path], read: list[tuple[str, str | None]]) -> list[str]:
    """What rank 0 finds to be otherwise with other ranks, of the files that all have staged and of what they read."""
    problems = []
    for rank in range(1, len(marks)):
        if read[rank] != read[0]:
            what = "other tokens" if read[rank][0] != read[0][0] else "another base"
            problems.append(f"rank {rank} reads {what} than rank 0 does")
        if not files.staged_name(marks[rank]).exists():
            problems.append(
                f"rank {rank} writes to another {marks[0].parent} than rank 0: all machines need one out_dir, in a "
                "file system that they share"
            )
    return problems


def check_unchanged(start: Start) -> None:
    """Once the directory is locked: raise ValueError if another run has written to it since `start` was prepared."""
    if start.state is None:
        _raise_all(occupied(start.directory), {})
    elif read_about(start.directory)["iter_num"] != start.state["iter_num"]:
        raise ValueError(f"another run has just saved to {start.directory}: start again to go on from there")


def disk_problems(directory: Path, trained: int, adapters: bool = False) -> list[str]:
    """Best and last weights and AdamW's two moments in float32, the new ones beside the old while they are written; the
    best of a whole model in two formats. `trained` is how many parameters have these."""
    copies = 1 if (directory / files.MARKER).exists() else 2  # where a run goes on, the old ones are there already
    try:
        files.check_room(directory, copies * 4 * (4 if adapters else 5) * trained)
    except OSError as error:
        return [str(error)]
    return []
