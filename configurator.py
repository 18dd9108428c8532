"""The run configuration: one dataclass holds every setting's name, type, default and help.

Imports nothing slow: each script reads its command line above the imports of torch, which takes a second to come.

Defaults yield to configuration files, files to the command line:

    python train.py config/train_scientific.py --learning_rate=3e-4 max_iters=2000

A configuration file is Python that assigns `config = {...}` or, as nanoGPT's do, plain module-level names. All problems
are gathered and reported together, each with its source and the nearest valid name.
"""

import ast
import difflib
import math
import os
import re
import runpy
import sys
import textwrap
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, get_args

from architecture import PRESETS, GPTConfig
from lora_config import ALL, ALL_LINEAR, SPELLINGS, LoRAConfig, usual_alpha
from mesh import Mesh

PRECISIONS = ("float32", "bfloat16", "float16")  # of weights and of matrix products, as torch calls them
PRECISION_SPELLINGS = dict(zip(("fp32", "bf16", "fp16"), PRECISIONS, strict=True)) | {name: name for name in PRECISIONS}
LONGEST_UNASKED = 1024  # tokens of a training sequence where a model could read more


def precision(name: str) -> str:
    """As torch calls it: bf16 is bfloat16. What is none stays as it is."""
    return PRECISION_SPELLINGS.get(name, name)


def setting(default: Any, help: str, choices: tuple = (), resume: str = "free") -> Any:
    """A configuration field. `resume` says what a change means for a run that goes on: free, warn or refuse."""
    return field(default=default, metadata={"help": help, "choices": choices, "resume": resume})


@dataclass
class RunConfig:
    """Every setting of train.py, in nanoGPT's spelling."""

    out_dir: str = setting("", "model directory; empty: models/ and the name the convention gives")
    init_from: str = setting(
        "scratch",
        "scratch, resume, or whose weights to start from: a model directory (ours, nanoGPT's, Hugging Face's), a "
        "decoder's name from `python -m registry list`, or a hub id; model=NAME says the same, or names a file of "
        "config/model/",
    )
    local_files_only: bool = setting(True, "look for init_from on this machine; false: download what is not here")
    dataset: str = setting(
        "scientific",
        "folder under data/, or the path of one; prepared when missing; other tokens are refused on resume",
    )
    seed: int = setting(1337, "decides weights, order of the data and dropout", resume="warn")

    preset: str = setting("small", "architecture to start from; the next seven override it", tuple(PRESETS), "refuse")
    n_layer: int | None = setting(None, "transformer blocks", resume="refuse")
    n_head: int | None = setting(None, "attention heads", resume="refuse")
    n_embd: int | None = setting(None, "width, a multiple of n_head", resume="refuse")
    block_size: int | None = setting(None, "context, tokens", resume="refuse")
    vocab_size: int | None = setting(None, "token ids; unset: as many as the dataset's tokenizer has", resume="refuse")
    bias: bool | None = setting(None, "biases in linear layers and layer norms", resume="refuse")
    tie_word_embeddings: bool | None = setting(None, "lm_head shares the token embedding", resume="refuse")
    dropout: float = setting(0.0, "probability; 0 is right while no text is seen twice", resume="warn")

    lora: bool = setting(False, "train adapters on the frozen model of init_from, not its weights", resume="refuse")
    lora_rank: int = setting(8, "rank of the adapters", resume="refuse")
    lora_alpha: float | None = setting(None, "scales them by alpha / rank; unset: 2 * lora_rank", resume="refuse")
    lora_dropout: float = setting(0.0, "probability, on what the adapters read", resume="warn")
    lora_targets: str = setting(
        "all-linear",
        "layers: ends of names with commas between, a regular expression for whole names, all-linear (not token "
        "embedding and head) or all (these too, unless they share a weight)",
        resume="refuse",
    )
    lora_exclude: str = setting("", "layers to leave out, written like lora_targets", resume="refuse")
    lora_use_rslora: bool = setting(False, "scale by alpha / sqrt(rank), made for high ranks", resume="refuse")
    lora_untie: bool = setting(
        False, "allow adapters on a tied lm_head or token embedding, which merging then unties", resume="refuse"
    )
    lora_one_micro_batch: bool = setting(
        False,
        "set gradient_accumulation_steps to 1, as some tools insist for LoRA; it only makes the step smaller, for "
        "accumulated adapter gradients equal those of the big batch",
        resume="refuse",
    )
    base: str = setting("", "where the base of a resumed LoRA run lies now, if it was moved")

    batch_size: int = setting(4, "sequences in a micro-batch", resume="warn")
    gradient_accumulation_steps: int = setting(4, "micro-batches in a step, over all processes", resume="warn")
    max_iters: int = setting(1000, "optimizer steps in all", resume="warn")
    optimizer: str = setting(
        "adamw", "adamw, or muon for the matrices inside the blocks and AdamW for the rest", ("adamw", "muon"), "refuse"
    )
    learning_rate: float = setting(1e-3, "peak of the schedule; with muon, that of AdamW's part", resume="warn")
    muon_learning_rate: float | None = setting(
        None, "peak of muon's matrices, which decays along with learning_rate; unset: learning_rate", resume="refuse"
    )
    zero_init: bool = setting(False, "from scratch: the layers that end a block's branches start at 0", resume="refuse")
    min_lr: float | None = setting(None, "where the decay ends; unset: learning_rate / 10", resume="warn")
    schedule: str = setting(
        "cosine", "decay: cosine, or wsd (constant, then linear over cooldown_iters)", ("cosine", "wsd"), "warn"
    )
    warmup_iters: int = setting(100, "steps of linear warm-up from 0", resume="warn")
    lr_decay_iters: int | None = setting(None, "step at which min_lr is reached; unset: max_iters", resume="warn")
    cooldown_iters: int | None = setting(None, "wsd's linear end; unset: 1/5 of lr_decay_iters at most", resume="warn")
    weight_decay: float = setting(0.1, "on matrices; vectors (norms, biases) have none", resume="warn")
    beta1: float = setting(0.9, "AdamW's first moment", resume="warn")
    beta2: float = setting(0.95, "AdamW's second moment", resume="warn")
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: no clipping", resume="warn")

    eval_interval: int = setting(250, "steps between evaluations; each one saves", resume="warn")
    eval_iters: int = setting(
        40, "batches of train and of val in an evaluation, the same ones each time", resume="refuse"
    )
    log_interval: int = setting(10, "steps between lines in training_log.txt and metrics.jsonl")
    save_minutes: float = setting(10.0, "also save when this long has passed since the last save; 0: never")
    sample_tokens: int = setting(60, "tokens of text to sample after each evaluation; 0: none")

    device: str = setting("auto", "auto (cuda, mps, cpu: the first there is), or cpu, cuda, cuda:1, mps, ...")
    dtype: str = setting("auto", "of matrix products; auto measures on a CPU", ("auto", *PRECISIONS), "warn")
    mesh_shape: str = setting(
        "",
        "how torchrun's processes share the work, as [[2, 2], ['fsdp', 'tp']]: dp replicas, fsdp shards of weights and "
        "batch, tp shards of heads, MLP and vocabulary; -1: what is left; empty: replicas",
    )
    activation_checkpointing: bool = setting(
        False, "keep only what goes into each block, and compute the rest again in the backward pass: less memory"
    )
    compile: str = setting("auto", "torch.compile; auto: on CUDA, where it works", ("auto", "true", "false"), "warn")

    def problems(self) -> list[str]:
        """What cannot be, whatever the data: one sentence each."""
        steps = ("batch_size", "gradient_accumulation_steps", "max_iters", "eval_interval", "eval_iters")
        at_least_one = {k: getattr(self, k) for k in (*steps, "log_interval", "lr_decay_iters", "cooldown_iters")}
        found = [f"{k}={v} must be at least 1" for k, v in at_least_one.items() if v is not None and v < 1]
        found += [f"{k}= needs a value" for k in ("init_from", "dataset") if not getattr(self, k)]
        not_negative = ("warmup_iters", "weight_decay", "grad_clip", "save_minutes", "sample_tokens", "seed")
        found += [f"{k}={getattr(self, k)} must not be negative" for k in not_negative if getattr(self, k) < 0]
        if self.learning_rate <= 0:
            found.append(f"learning_rate={self.learning_rate} must be above 0")
        if self.min_lr is not None and not 0 <= self.min_lr <= self.learning_rate:
            found.append(f"min_lr={self.min_lr} must lie between 0 and learning_rate={self.learning_rate}")
        found += [
            f"{k}={getattr(self, k)} must be at least 0 and below 1"
            for k in ("beta1", "beta2")
            if not 0 <= getattr(self, k) < 1
        ]
        if self.muon_learning_rate is not None and self.optimizer != "muon":
            found.append(f"muon_learning_rate={self.muon_learning_rate} belongs to optimizer=muon")
        elif self.muon_learning_rate is not None and self.muon_learning_rate <= 0:
            found.append(f"muon_learning_rate={self.muon_learning_rate} must be above 0")
        if self.zero_init and self.init_from not in ("scratch", "resume"):
            found.append(f"zero_init=true is for training from scratch, and not with init_from={self.init_from}")
        end = f"max_iters={self.max_iters}" if self.lr_decay_iters is None else f"lr_decay_iters={self.lr_decay_iters}"
        if self.cooldown_iters is not None and self.schedule != "wsd":
            found.append(f"cooldown_iters={self.cooldown} belongs to schedule=wsd, and schedule is {self.schedule}")
        elif self.cooldown_iters is not None and self.warmup_iters + self.cooldown > self.decay_end:
            found.append(f"warmup_iters={self.warmup_iters} and cooldown_iters={self.cooldown} do not fit into {end}")
        elif self.warmup_iters >= self.decay_end and self.decay_end < self.max_iters:
            found.append(f"warmup_iters={self.warmup_iters} must end before the decay does, at {end}")
        try:
            self.model_config(vocab_size=1)
        except ValueError as error:
            found.append(str(error))
        try:
            self.lora_config()
        except ValueError as error:
            found.append(re.sub(r"\b(rank|alpha|dropout|targets|exclude)=", r"lora_\1=", str(error)))
        return found + self._lora_problems()

    def _lora_problems(self) -> list[str]:
        if self.lora:
            needs_base = self.init_from == "scratch"
            return ["lora=true adapts a model that exists: say which with init_from"] if needs_base else []
        idle = [f for name, f in FIELDS.items() if name.startswith("lora_") and getattr(self, name) != f.default]
        return [f"{f.name}={getattr(self, f.name)} means nothing without lora=true" for f in idle]

    @property
    def micro_batches(self) -> int:
        """In a step, over all processes."""
        return 1 if self.lora_one_micro_batch else self.gradient_accumulation_steps

    @property
    def decay_end(self) -> int:
        return self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters

    @property
    def cooldown(self) -> int:
        room = self.decay_end - self.warmup_iters
        return max(1, min(self.decay_end // 5, room)) if self.cooldown_iters is None else self.cooldown_iters

    @property
    def final_lr(self) -> float:
        return self.learning_rate / 10 if self.min_lr is None else self.min_lr

    def filled(self) -> "RunConfig":
        """With what the settings stand for that are None and need no model to say it."""
        rates = {"min_lr": self.final_lr, "muon_learning_rate": self.muon_learning_rate or self.learning_rate}
        steps = {"lr_decay_iters": self.decay_end, "cooldown_iters": self.cooldown}
        alpha = usual_alpha(self.lora_rank) if self.lora_alpha is None else self.lora_alpha
        return replace(self, **rates, **steps, lora_alpha=alpha)

    def lora_config(self) -> LoRAConfig:
        targets, exclude = map(_selection, (self.lora_targets, self.lora_exclude))
        return LoRAConfig(
            self.lora_rank, self.lora_alpha, self.lora_dropout, targets, exclude, use_rslora=self.lora_use_rslora
        )

    def resolved(self, architecture: GPTConfig, **more: Any) -> "RunConfig":
        """With the settings that describe an architecture, and `more`, filled in."""
        known = {key: value for key, value in vars(architecture).items() if key in FIELDS}
        return replace(self, **{**known, **more})

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The preset with this configuration's overrides; vocab_size counts where none was given."""
        names = {f.name for f in fields(GPTConfig)}
        chosen = {name: getattr(self, name) for name in names & FIELDS.keys() if getattr(self, name) is not None}
        return GPTConfig(**{**vars(PRESETS[self.preset]), "vocab_size": vocab_size, **chosen})


FIELDS = {f.name: f for f in fields(RunConfig)}
MODEL_FILES = Path(__file__).resolve().parent / "config" / "model"
NAMES = ("lora_targets", "lora_exclude")  # lists of names, kept with commas between them
LORA_SPELLINGS = {
    spelling: f"lora_{name}"
    for name, others in SPELLINGS.items()
    if f"lora_{name}" in FIELDS
    for spelling in (name, *others)
}
IN_GROUP = LORA_SPELLINGS | {"enabled": "lora"} | {n.removeprefix("lora_"): n for n in FIELDS if n.startswith("lora_")}
ALIASES = (
    {key: name for key, name in LORA_SPELLINGS.items() if key not in FIELDS}  # `dropout` is the model's own
    | {"model": "init_from", "model.name": "init_from", "model.local_files_only": "local_files_only"}
    | {f"{group}lora.{key}": name for key, name in IN_GROUP.items() for group in ("", "model.")}
)


def parse(arguments: list[str] | None = None) -> tuple[RunConfig, dict[str, str]]:
    """`load` for a command line: with --help among the arguments, or where they cannot be, the program ends here."""
    given = sys.argv[1:] if arguments is None else arguments
    words = [argument for argument in given if argument not in ("-h", "--help")]
    try:
        config, sources = load(words)
    except ValueError as error:
        # Of several processes on a machine one says it; another machine's files may be others.
        sys.exit(f"train.py: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)
    if words != given:
        print(help_text(config))
        sys.exit()
    return config, sources


def load(arguments: list[str]) -> tuple[RunConfig, dict[str, str]]:
    """Read `[FILE ...] [--key=value | key=value ...]` into a configuration and where each given key came from.

    model=NAME is one more file where config/model/NAME.py exists.

    Raises ValueError that lists every unknown key, wrong type and impossible combination, with its source.
    """
    given: dict[str, tuple[Any, str]] = {}
    problems: list[str] = []
    files = [a for a in arguments if "=" not in a and not a.startswith("-")]
    for path in files:
        given |= _settled(_read_file(path, problems), problems)
    begun = given.get("init_from", ("scratch", ""))  # as the files have it, whatever an argument says of resuming
    entries = []
    for argument in (a for a in arguments if a not in files):
        key, equals, text = argument.removeprefix("--").partition("=")
        if key == "model" and (preset := MODEL_FILES / f"{text}.py").is_file():
            given |= _settled(_read_file(str(preset), problems), problems)
        elif equals:
            entries.append((key, text, f"argument {argument}"))
        elif _known(key, f"argument {argument}", problems):
            problems.append(f"argument {argument}: a setting is written --{key}=value")
    for key, (text, source) in _settled(entries, problems).items():
        given[key] = (text if FIELDS[key].type is str else _parse(text), source)
    if given.get("lora", (None,))[0] is False:  # all weights instead, whatever a file says of adapters
        given = {
            key: (value, source)
            for key, (value, source) in given.items()
            if not key.startswith("lora_") or source.startswith("argument")
        }
    values = {}
    for key, (value, source) in given.items():
        try:
            values[key] = _typed(key, value)
        except ValueError as error:
            problems.append(f"{source}: {error}")
    config, sources = RunConfig(**values), {key: source for key, (_, source) in given.items()}
    if config.init_from == "resume" and not config.out_dir and begun[0] not in ("scratch", "resume"):
        problems.append(
            f"the run that begins with init_from={begun[0]} ({begun[1]}) is named after it: give its out_dir"
        )
    if config.init_from != "resume":  # what was not given may yet come from the saved run: merge_resumed looks then
        problems += _problems(config, sources)
    if problems:
        raise ValueError("the configuration cannot be used:\n" + "\n".join(f"  - {p}" for p in problems))
    return config, sources


def _problems(config: RunConfig, sources: dict[str, str]) -> list[str]:
    """Those of the configuration, and what is wrong only because it was given, and not a default."""
    problems, steps = config.problems(), config.gradient_accumulation_steps
    if "gradient_accumulation_steps" in sources and config.lora_one_micro_batch and steps > 1:
        problems.append(f"gradient_accumulation_steps={steps} contradicts lora_one_micro_batch=true")
    return with_sources(problems, sources)


def with_sources(problems: list[str], sources: dict[str, str]) -> list[str]:
    """Each sentence behind where the settings were given that it names as `name=`, unless it says that itself."""
    told = []
    for sentence in problems:
        named = re.findall(r"(?<![\w.-])\w+(?==)", sentence)
        given = dict.fromkeys(sources[key] for key in named if key in sources and sources[key] not in sentence)
        told.append(f"{', '.join(given)}: {sentence}" if given else sentence)
    return told


def _read_file(path: str, problems: list[str]) -> list[tuple[str, Any, str]]:
    """(key, value, "file:line") of every assignment: run the file, and ask its syntax tree where each name stands."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8-sig"), path)
        namespace = runpy.run_path(path)
    except FileNotFoundError:
        close = difflib.get_close_matches(path, map(str, Path(path).parent.glob("*.py")), n=1)
        problems.append(f"{path}: no such configuration file" + (f"; did you mean {close[0]}?" if close else ""))
        return []
    except (Exception, SystemExit) as error:  # whatever a user's file can raise, it is that file's fault
        problems.append(f"{path}: {type(error).__name__}: {error}")
        return []
    lines: dict[str, int] = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name) and not target.id.startswith("_"):
                lines[target.id] = node.lineno
                if target.id == "config" and isinstance(node.value, ast.Dict):
                    lines |= {key.value: key.lineno for key in node.value.keys if isinstance(key, ast.Constant)}
    values = {key: value for key, value in namespace.items() if key in lines or key in FIELDS}
    config = values.pop("config", {})
    if not isinstance(config, dict):
        problems.append(f"{path}: config must be a dictionary, not {type(config).__name__}")
        return []
    # A name set inside an `if`, or by unpacking, stands in no line of its own, and counts all the same.
    named = {key: f"{path}:{lines[key]}" if key in lines else path for key in (*values, *config)}
    return [(key, value, named[key]) for key, value in {**values, **config}.items()]


def _settled(entries: list[tuple[str, Any, str]], problems: list[str]) -> dict[str, tuple[Any, str]]:
    """{setting: (value, source)} of what one file, or the command line, gives under whatever spelling."""
    settled: dict[str, tuple[Any, str]] = {}
    spelled: dict[str, tuple[str, Any]] = {}
    for key, value, source in chain.from_iterable(map(_ungrouped, entries)):
        if _known(key, source, problems):
            name = ALIASES.get(key, key)
            first, before = spelled.setdefault(name, (key, value))
            if first != key and before != value:
                problems.append(f"{source}: {first}={before!r} and {key}={value!r} give {name} two values")
            settled[name] = (value, source)
    return settled


def _ungrouped(entry: tuple[str, Any, str]) -> list[tuple[str, Any, str]]:
    """A group in a file, `"lora": {"r": 4}`, as the settings in it."""
    key, value, source = entry
    if key not in ("lora", "model", "model.lora") or not isinstance(value, dict):
        return [entry]
    return [inner for name, item in value.items() for inner in _ungrouped((f"{key}.{name}", item, source))]


def _known(key: str, source: str, problems: list[str]) -> bool:
    if key in FIELDS or key in ALIASES:
        return True
    close = difflib.get_close_matches(str(key), FIELDS, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else "--help lists the settings"
    problems.append(f"{source}: there is no setting '{key}'; {hint}")
    return False


def _parse(text: str) -> Any:
    """The Python value a command-line word spells, or the word itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _typed(key: str, value: Any) -> Any:
    """`value` as the field's type: 1 will do for a float, 1e3 for an int, but never "1" or True for either."""
    declared, choices = FIELDS[key].type, FIELDS[key].metadata["choices"]
    types = get_args(declared) or (declared,)
    if value is None and type(None) in types:
        return None
    kind = types[0]
    if key in NAMES:
        listed = _parse(value) if isinstance(value, str) and value.startswith("[") else value
        value = ",".join(map(str, listed)) if isinstance(listed, list | tuple | set) else value
    if key == "dtype" and isinstance(value, str):
        value = precision(value)
    if kind is str and value is not None:
        value = str(value).lower() if isinstance(value, bool) else str(value)
        if key == "mesh_shape":
            Mesh.parse(value, processes=1)
        if choices and value not in choices:
            close = difflib.get_close_matches(value, choices, n=1)
            raise ValueError(
                f"{key}={value} must be one of {', '.join(choices)}" + (f"; did you mean {close[0]}?" if close else "")
            )
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if (
        (kind is bool and isinstance(value, bool))
        or (kind is float and number)
        or (kind is int and number and value == int(value) and abs(value) < 2**63)
    ):
        return kind(value)
    words = {bool: "true or false", int: "a whole number below 2^63", float: "a number", str: "text"}
    raise ValueError(f"{key}={value!r} must be {words[kind]}")


def _selection(names: str) -> str | list[str]:
    """Names with commas between them as a list; a regular expression, all or all-linear as it is."""
    plain = names not in (ALL, ALL_LINEAR) and re.fullmatch(r"[\w.-]*(\s*,\s*[\w.-]*)*", names)
    return [name.strip() for name in names.split(",") if name.strip()] if plain else names


def merge_resumed(
    config: RunConfig, given: dict[str, str], saved: dict[str, Any]
) -> tuple[RunConfig, list[str], list[str]]:
    """The configuration of a run that goes on: what was saved, except what is given now.

    Returns it with (warnings, problems): one sentence for each given setting that differs and matters.
    """
    before = RunConfig(**{key: saved[key] for key in FIELDS if key in saved})
    changes = {key: getattr(config, key) for key in given if key != "init_from"}  # "resume" is not how a run begins
    merged, warnings, problems = replace(before, **changes), [], []
    for key in (key for key in changes if changes[key] != getattr(before, key)):
        source, effect = given[key], FIELDS[key].metadata["resume"]
        new, old = (getattr(run.filled(), key) for run in (merged, before))
        if new == old or (isinstance(new, float) and math.isclose(new, old)):  # what None stood for, to the last bit
            merged = replace(merged, **{key: old})
        elif new == "auto" and effect == "warn":  # what it was found to be
            merged = replace(merged, **{key: old})
            warnings.append(f"{key}=auto ({source}) is what it was when the run began, {old}")
        elif effect != "free":
            sentence = f"{key} was {old!r} in the saved run and is {new!r} now ({source})"
            (warnings if effect == "warn" else problems).append(sentence)
    return merged, warnings, problems + _problems(merged, given)


def help_text(config: RunConfig) -> str:
    """The table that --help prints: each setting, its type, the value it has now, and what it does."""
    rows = []
    for name, f in FIELDS.items():
        kind = (get_args(f.type) or (f.type,))[0].__name__
        value, default = getattr(config, name), f.default
        shown = f"{value!r}" + ("" if value == default else f" (default {default!r})")
        rows.append(
            f"  {name} ({kind}) = {shown}\n" + textwrap.indent(textwrap.fill(f.metadata["help"], 100), "      ")
        )
    return (
        "Train a GPT.\n\n"
        "  python train.py config/train_scientific.py                 a configuration file\n"
        "  python train.py config/train_scientific.py --max_iters=50  with a setting changed\n"
        "  python train.py --init_from=resume --out_dir=models/NAME   go on where a run stopped\n"
        "  python train.py config/finetune_lora.py lora.r=4           adapt a model; LoRA's other spellings will do\n"
        "  python train.py config/finetune_lora.py model=gpt2-offline    another one, by its name\n"
        "  torchrun --nproc_per_node=2 train.py FILE                  several processes, each with all of the model\n"
        '  torchrun --nproc_per_node=4 train.py FILE --mesh_shape=\'[[2,2],["fsdp","tp"]]\'    in shares\n\n'
        "Settings, with what file and arguments make of them; on resume the others are as they were saved:\n\n"
        + "\n".join(rows)
    )
