"""configurator.py: what it takes, what it refuses, and how it says so."""

import ast
import re
import subprocess
import sys
from dataclasses import fields, replace
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

import architecture
import configurator
import model
from architecture import PRESETS
from configurator import FIELDS, MODEL_FILES, RunConfig, load, merge_resumed
from lora import LoRAConfig
from model import GPTConfig
from registry import list_available_models

ROOT = Path(__file__).resolve().parent.parent


def refusal(*arguments) -> str:
    with pytest.raises(ValueError, match="the configuration cannot be used") as error:
        load(list(arguments))
    return str(error.value)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_run_that_is_named_after_its_start_goes_on_only_by_its_own_name(tmp_path):
    file = write(tmp_path / "c.py", 'config = {"init_from": "models/x"}')
    assert f"init_from=models/x ({file}:1) is named after it: give its out_dir" in refusal(file, "init_from=resume")
    assert load([file, "init_from=resume", "out_dir=models/y"])[0].init_from == "resume"
    assert load([write(tmp_path / "d.py", 'init_from = "scratch"'), "init_from=resume"])[0].init_from == "resume"


def test_a_file_may_begin_with_a_byte_order_mark_and_may_not_end_the_program(tmp_path):
    assert load([write(tmp_path / "c.py", "\ufeffmax_iters = 7")])[0].max_iters == 7
    assert "SystemExit: 0" in refusal(write(tmp_path / "d.py", "import sys\nsys.exit(0)"))


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = write(tmp_path / "c.py", 'config = {"max_iters": 70, "batch_size": 8, "warmup_iters": 3}')
    config, given = load([file, "--batch_size=2", "out_dir=somewhere"])
    assert (config.max_iters, config.batch_size, config.out_dir) == (70, 2, "somewhere")
    assert config.learning_rate == RunConfig().learning_rate
    assert given == {
        "max_iters": f"{file}:1",
        "warmup_iters": f"{file}:1",
        "batch_size": "argument --batch_size=2",
        "out_dir": "argument out_dir=somewhere",
    }


def test_a_nanogpt_style_file_of_plain_names_is_read(tmp_path):
    file = write(
        tmp_path / "c.py", "import math\n_unit = 100\nmax_iters = 5 * _unit\nlearning_rate: float = math.sqrt(1e-6)\n"
    )
    config, given = load([file])
    assert (config.max_iters, config.learning_rate) == (500, pytest.approx(1e-3))
    assert given["learning_rate"] == f"{file}:4"


def test_names_set_in_branches_by_unpacking_and_beside_a_dictionary_count(tmp_path):
    text = "n_layer, n_head = 3, 4\nif True:\n    n_embd = 64\nconfig = {'max_iters': 9}\nbatch_size = 2\n"
    config, given = load([write(tmp_path / "c.py", text)])
    assert (config.n_layer, config.n_head, config.n_embd, config.max_iters, config.batch_size) == (3, 4, 64, 9, 2)
    assert given["batch_size"].endswith(":5")
    assert "config must be a dictionary" in refusal(write(tmp_path / "d.py", "config = 3"))


def test_text_is_taken_as_it_stands():
    config, _ = load(["out_dir=1e3", "dataset=2024_01"])
    assert (config.out_dir, config.dataset) == ("1e3", "2024_01")


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.name)
def test_every_shipped_configuration_is_valid(path):
    load([str(path)])


def test_all_problems_are_reported_together_with_their_sources(tmp_path):
    file = write(tmp_path / "c.py", 'config = {\n  "learing_rate": 1,\n  "batch_size": 2.5,\n}')
    message = refusal(file, "--dropuot=0.1", "n_head=7", "--compile", "--dtype=bfloat", "--max_iters=many")
    for words in (
        f"{file}:2: there is no setting 'learing_rate'; did you mean 'learning_rate'?",
        f"{file}:3: batch_size=2.5 must be a whole number",
        "argument --dropuot=0.1: there is no setting 'dropuot'; did you mean 'dropout'?",
        "n_embd=320 must be a multiple of n_head=7",
        "argument --compile: a setting is written --compile=value",
        "dtype=bfloat must be one of auto, float32, bfloat16, float16; did you mean bfloat16?",
        "max_iters='many' must be a whole number",
    ):
        assert words in message


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("batch_size=0", "batch_size=0 must be at least 1"),
        ("batch_size=true", "batch_size=True must be a whole number"),
        ("learning_rate=nan", "learning_rate='nan' must be a number"),
        ("learning_rate=1e999", "learning_rate=inf must be a number"),
        ("max_iters={[]}", "max_iters='{[]}' must be a whole number"),
        ("seed=" + "9" * 30, "must be a whole number"),
        ("seed=" + "9" * 400, "must be a whole number"),
        ("learning_rate=" + "9" * 400, "must be a number"),
        ("learning_rate=-1", "learning_rate=-1.0 must be above 0"),
        ("dropout=1", "dropout=1.0 must be at least 0 and below 1"),
        ("beta2=1", "beta2=1.0"),
        ("min_lr=1", "min_lr=1.0 must lie between 0 and learning_rate=0.001"),
        ("lr_decay_iters=0", "lr_decay_iters=0 must be at least 1"),
        ("max_iters=0", "argument max_iters=0: max_iters=0 must be at least 1"),
        ("cooldown_iters=0", "cooldown_iters=0 must be at least 1"),
        ("cooldown_iters=10", "cooldown_iters=10 belongs to schedule=wsd"),
        ("lr_decay_iters=100", "warmup_iters=100 must end before the decay does, at lr_decay_iters=100"),
        ("preset=smal", "did you mean small?"),
        ("bias=1", "bias=1 must be true or false"),
        ("dataset=", "argument dataset=: dataset= needs a value"),
        ("init_from=", "argument init_from=: init_from= needs a value"),
        ("nofile.py", "nofile.py: no such configuration file"),
        ("=3", "there is no setting ''"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_one_sentence(argument, words):
    assert words in refusal(argument)


def test_what_cannot_be_together_is_told_with_where_each_of_it_was_given(tmp_path):
    text = 'config = {\n  "batch_size": 0,\n  "n_head": 7,\n  "min_lr": 1.0,\n  "lora": {"r": 0, "dropout": 2},\n}'
    file = write(tmp_path / "c.py", text)
    message = refusal(file, "n_embd=321", "dropout=0.1", "zero_init=true", "model=x")
    for line in (
        f"{file}:2: batch_size=0 must be at least 1",
        f"{file}:4: min_lr=1.0 must lie between 0 and learning_rate=0.001",
        f"argument n_embd=321, {file}:3: impossible model: n_embd=321 must be a multiple of n_head=7",
        f"{file}:5: impossible LoRA: lora_rank=0 must be a whole number above 0; lora_dropout=2.0 must be at least 0 "
        "and below 1",
        f"{file}:5: lora_rank=0 means nothing without lora=true",
        "argument zero_init=true, argument model=x: zero_init=true is for training from scratch, and not with "
        "init_from=x",
    ):
        assert f"  - {line}\n" in message
    message = refusal("lora=true", "init_from=x", "lora_one_micro_batch=true", "lora.targets=(", file)
    assert "argument lora.targets=(: impossible LoRA: " in message and "lora_targets='(' is no regular exp" in message
    contradiction = refusal("lora=true", "init_from=x", "lora_one_micro_batch=true", "gradient_accumulation_steps=2")
    given = "argument gradient_accumulation_steps=2, argument lora_one_micro_batch=true: gradient_accumulation_steps=2"
    assert f"{given} contradicts lora_one_micro_batch=true" in contradiction


def test_and_so_it_is_when_a_run_goes_on():
    config, given = load(["init_from=resume", "n_head=7", "min_lr=1", "batch_size=0"])
    problems = merge_resumed(config, given, vars(RunConfig()) | {"n_head": 5})[2]
    assert problems == [
        "n_head was 5 in the saved run and is 7 now (argument n_head=7)",
        "argument batch_size=0: batch_size=0 must be at least 1",
        "argument min_lr=1: min_lr=1.0 must lie between 0 and learning_rate=0.001",
        "argument n_head=7: impossible model: n_embd=320 must be a multiple of n_head=7",
    ]


def test_the_warm_up_and_a_cooldown_that_is_asked_for_fit_into_the_schedule():
    wsd = ("schedule=wsd", "warmup_iters=8", "cooldown_iters=8")
    given = "argument warmup_iters=8, argument cooldown_iters=8"
    short = f"{given}, argument max_iters=15: warmup_iters=8 and cooldown_iters=8 do not fit into max_iters=15"
    assert short in refusal(*wsd, "max_iters=15")
    assert "cooldown_iters=8 do not fit into lr_decay_iters=10" in refusal(*wsd, "lr_decay_iters=10")
    assert "warmup_iters=100 and cooldown_iters=8 do not fit into max_iters=20" in refusal(*wsd[::2], "max_iters=20")
    assert load([*wsd, "max_iters=16"])[0].cooldown == 8
    assert [load([*wsd[:1], f"max_iters={n}"])[0].cooldown for n in (20, 110, 125, 1000)] == [1, 10, 25, 200]


def test_of_several_processes_on_a_machine_one_tells_what_is_wrong(monkeypatch):
    monkeypatch.setenv("RANK", "1")  # of another machine's, whose files may be right
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as end:
            configurator.parse(["--batchsize=4"])
        assert "'batchsize'" in end.value.code if rank == "0" else end.value.code == 1


def test_auto_is_what_it_was_when_the_run_began():
    config, given = load(["dtype=auto", "compile=auto", "device=auto"])
    saved = vars(RunConfig()) | {"dtype": "bfloat16", "compile": "false", "device": "cpu"}
    merged, warnings, problems = merge_resumed(config, given, saved)
    assert (merged.dtype, merged.compile, merged.device) == ("bfloat16", "false", "auto")
    assert problems == [] and warnings == [
        "dtype=auto (argument dtype=auto) is what it was when the run began, bfloat16",
        "compile=auto (argument compile=auto) is what it was when the run began, false",
    ]


def test_nothing_is_no_text(tmp_path):
    file = write(tmp_path / "c.py", 'config = {"out_dir": None, "dataset": None}')
    assert f"{file}:1: out_dir=None must be text" in refusal(file) and "dataset=None must be text" in refusal(file)


def test_a_precision_is_the_same_by_its_short_name():
    for short, whole in {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.items():
        assert load([f"dtype={short}"])[0].dtype == whole


def test_a_file_that_fails_is_named_with_its_error(tmp_path):
    assert "ZeroDivisionError" in refusal(write(tmp_path / "c.py", "max_iters = 1 / 0"))
    assert "SyntaxError" in refusal(write(tmp_path / "d.py", "max_iters = "))
    assert "did you mean" in refusal(str(tmp_path / "cc.py"))


def test_numbers_are_taken_as_people_write_them():
    config, _ = load(["max_iters=1e3", "learning_rate=1", "out_dir=a=b", "compile=true", "bias=false", "min_lr=None"])
    assert (config.max_iters, config.learning_rate, config.out_dir) == (1000, 1.0, "a=b")
    assert (config.compile, config.bias, config.min_lr) == ("true", False, None)
    assert type(config.max_iters) is int and type(config.learning_rate) is float


def test_the_architecture_is_the_preset_with_overrides():
    config, _ = load(["preset=medium", "n_layer=3", "bias=true", "dropout=0.1"])
    expected = GPTConfig(1024, 300, 3, 12, 768, dropout=0.1, bias=True, tie_word_embeddings=True)
    assert config.model_config(vocab_size=300) == expected
    assert load(["vocab_size=512"])[0].model_config(vocab_size=300).vocab_size == 512


def test_what_a_gpt2_block_needs_is_a_setting_and_the_rest_is_the_presets():
    assert {f.name for f in fields(GPTConfig)[:8]} <= set(FIELDS)
    config, _ = load(["preset=modern", "n_layer=2"])
    assert config.model_config(vocab_size=300) == replace(PRESETS["modern"], n_layer=2, vocab_size=300)


def test_a_resumed_run_keeps_what_was_saved_except_what_is_given():
    saved = {**vars(RunConfig()), "max_iters": 500, "n_layer": 5, "dropout": 0.2, "dtype": "float32"}
    config, given = load(["init_from=resume", "max_iters=600", "n_layer=6", "log_interval=1"])
    merged, warnings, problems = merge_resumed(config, given, saved)
    assert (merged.max_iters, merged.dropout, merged.dtype, merged.log_interval) == (600, 0.2, "float32", 1)
    assert merged.init_from == "scratch"
    assert warnings == ["max_iters was 500 in the saved run and is 600 now (argument max_iters=600)"]
    assert problems == ["n_layer was 5 in the saved run and is 6 now (argument n_layer=6)"]


def test_giving_a_resumed_run_the_value_that_was_in_force_changes_nothing():
    settings = ["init_from=x", "lora=true", "lora_rank=4", "schedule=wsd", "optimizer=muon", "max_iters=600"]
    began = load([*settings, "learning_rate=3e-4"])[0]
    same = ("lora_alpha=8", "min_lr=3e-5", "lr_decay_iters=600", "cooldown_iters=120", "muon_learning_rate=3e-4")
    config, given = load(["init_from=resume", *same])
    merged, warnings, problems = merge_resumed(config, given, vars(began))
    assert warnings == problems == [] and merged.filled() == began.filled()
    assert merged.lora_config() == began.lora_config() and merged.min_lr == 3e-4 / 10 != 3e-5

    config, given = load(["init_from=resume", "lora_alpha=9", "min_lr=1e-5", "lr_decay_iters=600", "max_iters=700"])
    merged, warnings, problems = merge_resumed(config, given, vars(began))
    assert problems == ["lora_alpha was 8 in the saved run and is 9.0 now (argument lora_alpha=9)"]
    assert warnings == [
        f"min_lr was {3e-4 / 10} in the saved run and is 1e-05 now (argument min_lr=1e-5)",
        "max_iters was 600 in the saved run and is 700 now (argument max_iters=700)",
    ]
    assert merged.lr_decay_iters == 600


def test_help_shows_every_setting_with_the_value_in_force():
    config, _ = load(["max_iters=7", "warmup_iters=2"])
    text = configurator.help_text(config)
    for name, f in FIELDS.items():
        assert re.search(rf"^  {name} \(\w+\) = ", text, re.M), name
        assert " ".join(f.metadata["help"].split()) in " ".join(text.split())
    assert "max_iters (int) = 7 (default 1000)" in text
    assert "on resume the others are as they were saved:" in text


# ---- LoRA's settings and their other spellings


@pytest.mark.parametrize(
    "arguments",
    [
        ("lora=true", "lora_rank=4", "lora_alpha=6", "lora_targets=c_attn,c_proj"),
        ("lora.enabled=true", "lora.r=4", "lora.alpha=6", "lora.target_modules=c_attn, c_proj"),
        ("lora=true", "r=4", "alpha=6", "targets=['c_attn', 'c_proj']"),
        ("--lora=true", "--rank=4", "--lora.lora_alpha=6.0", "--lora_module_path=c_attn,c_proj"),
        ("lora=true", "lora_r=4", "lora.rank=4", "alpha=6", "target_modules=c_attn,c_proj"),
    ],
)
def test_every_spelling_of_a_lora_setting_is_the_same_setting(arguments):
    config, given = load(["init_from=x", *arguments])
    assert config.lora_config() == LoRAConfig(4, 6, targets=["c_attn", "c_proj"], exclude=[])
    assert {"lora", "lora_rank", "lora_alpha", "lora_targets"} <= given.keys() <= FIELDS.keys()


def test_a_group_in_a_file_is_read_and_the_command_line_overrides_it_in_any_spelling(tmp_path):
    text = (
        """config = {"init_from": "x", "lora": {"enabled": True, "r": 4, "target_modules": ["c_fc"], "dropout": 0.1}}"""
    )
    file = write(tmp_path / "c.py", text)
    config, given = load([file, "lora_rank=2", "dropout=0.3"])
    assert (config.lora, config.lora_rank, config.lora_dropout, config.lora_targets) == (True, 2, 0.1, "c_fc")
    assert config.dropout == 0.3, "dropout without lora. is the model's own"
    assert given["lora_rank"] == "argument lora_rank=2" and given["lora_targets"] == f"{file}:1"


def test_switching_lora_off_switches_off_what_a_file_says_of_it_and_not_what_is_asked_for(tmp_path):
    file = write(tmp_path / "c.py", 'config = {"init_from": "x", "lora": True, "lora_rank": 4, "lora_targets": "c_fc"}')
    config, given = load([file, "lora=false"])
    assert config == RunConfig(init_from="x") and not given.keys() & {"lora_rank", "lora_targets"}
    assert "lora_rank=2 means nothing without lora=true" in refusal(file, "lora=false", "r=2")


@pytest.mark.parametrize("path", sorted(MODEL_FILES.rglob("*.py")), ids=lambda path: path.stem)
def test_every_file_for_a_model_is_named_by_model_and_yields_to_what_else_is_given(path):
    name = str(path.relative_to(MODEL_FILES).with_suffix(""))
    config, given = load(
        [str(ROOT / "config/finetune_lora.py"), f"model={name}", "model.lora.enabled=true", "lora.r=3"]
    )
    assert config.init_from in (*list_available_models(), "sshleifer/tiny-gpt2")
    assert (config.lora, config.lora_rank, config.max_iters) == (True, 3, 400)
    assert given["init_from"].startswith(f"{path}:") and given["lora_rank"] == "argument lora.r=3"
    assert load([f"model={name}"])[0].lora == (name == "custom" or name.startswith("gemma3"))


def test_a_model_is_also_a_group_in_a_file_and_another_name_for_init_from(tmp_path):
    text = "config = {'model': {'name': 'gpt2-offline', 'local_files_only': False, 'lora': {'enabled': True, 'r': 4}}}"
    config, _ = load([write(tmp_path / "c.py", text)])
    assert config == RunConfig(init_from="gpt2-offline", local_files_only=False, lora=True, lora_rank=4)
    assert load(["--model=some/where"])[0].init_from == "some/where"
    assert "init_from='a' and model='b' give init_from two values" in refusal("init_from=a", "model=b")
    assert "there is no setting 'model.lora.rnk'; did you mean" in refusal("model.lora.rnk=4")


def test_two_spellings_that_disagree_are_an_error_with_both(tmp_path):
    assert "argument rank=5: r='4' and rank='5' give lora_rank two values" in refusal("r=4", "rank=5")
    for text in ("{'lora': {'r': 4}, 'lora_rank': 8}", "{'lora_rank': 8, 'lora': {'r': 4}}"):
        assert "give lora_rank two values" in refusal(write(tmp_path / "c.py", f"config = {text}"))
    assert "there is no setting 'lora.rnk'; did you mean 'lora_rank'?" in refusal("lora.rnk=4")


def test_a_regular_expression_is_one_and_names_are_names():
    def targets(text):
        return load(["init_from=x", "lora=true", f"lora_targets={text}"])[0].lora_config().targets

    assert targets("c_attn,") == ["c_attn"]
    assert targets("c_attn") == ["c_attn"] and targets("h.0.attn.c_attn,c_fc") == ["h.0.attn.c_attn", "c_fc"]
    assert targets(r".*q_proj|.*v_proj") == r".*q_proj|.*v_proj" and targets("all-linear") == "all-linear"
    assert targets(r".*h\.[0-4]{1,2}\..*") == r".*h\.[0-4]{1,2}\..*"


# ---- what a command line waits for

SLOW = {"torch", "matplotlib", "numpy", "transformers"}


def imported(*words, cwd=ROOT):
    """(exit code, modules of SLOW that were imported, output) of a command of this project."""
    done = subprocess.run([sys.executable, "-X", "importtime", *words], capture_output=True, text=True, cwd=cwd)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in modules or "configurator" in modules  # the list is one
    told = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    return done.returncode, modules & SLOW, done.stdout + "\n".join(told)


@pytest.mark.parametrize(
    "command", ["train.py", "sample.py", "compare.py", "merge_lora.py", "export.py", "checkpoint.py", "-m registry"]
)
def test_help_and_mistakes_do_not_wait_for_torch(command):
    code, slow, output = imported(*command.split(), "--help")
    assert code == 0 and "--" in output and not slow
    code, slow, output = imported(*command.split(), "--no_such_option=3")
    assert code != 0 and ("no_such_option" in output or "required" in output) and not slow


def test_nor_does_a_configuration_that_cannot_be(tmp_path):
    file = write(tmp_path / "c.py", 'config = {"n_head": 7, "lora_rank": 0, "lora": True, "init_from": "x"}')
    code, slow, output = imported("train.py", file, "preset=modern")
    assert code == 1 and "n_embd=320 must be a multiple of n_head=7" in output and "rank=0" in output and not slow


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("checkpoint.py list {}", "best val loss"),
        ("checkpoint.py prune {}", "nothing to prune"),
        ("checkpoint.py show {}", "has no export_meta.json: nothing to show"),
        ("checkpoint.py deploy {} x", "is not a complete model directory"),
        ("-m registry where {}", "the folder is empty"),
    ],
)
def test_nor_does_what_looks_at_no_weights(tmp_path, command, words):
    _, slow, output = imported(*command.format(tmp_path).split())
    assert words in output and not slow


def test_a_run_imports_matplotlib_for_its_first_picture():
    code = "import train, compare, sys; assert 'torch' in sys.modules; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_activation_that_is_allowed_can_be_computed():
    assert tuple(model.ACTIVATIONS) == architecture.ACTIVATIONS


def test_imports_point_one_way():
    """Also those inside functions: no module is imported, by whatever way round, by what it imports."""
    paths = chain(ROOT.glob("*.py"), *((ROOT / folder).rglob("*.py") for folder in ("data", "registry", "bench")))
    known = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    graph = {}
    for name, path in known.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[name] = (found & known.keys()) - {name, name.partition(".")[0]}  # a package's own names are its modules'
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("configurator") < order.index("model") < order.index("checkpoint") < order.index("train")
