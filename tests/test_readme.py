"""README.md tells the truth: its settings are the code's, its files exist, its commands run as they stand there.

`python tests/test_readme.py` prints the settings table.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configurator import FIELDS  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
ON_RESUME = {"free": "free", "warn": "warns", "refuse": "refused"}


def settings_table() -> str:
    rows = ["| setting | type | default | what it does | on resume |", "| --- | --- | --- | --- | --- |"]
    for name, f in FIELDS.items():
        kind = (get_args(f.type) or (f.type,))[0].__name__
        default = "" if f.default in (None, "") else f"`{f.default}`"
        rows.append(f"| `{name}` | {kind} | {default} | {f.metadata['help']} | {ON_RESUME[f.metadata['resume']]} |")
    return "\n".join(rows)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_settings_table_is_the_codes():
    assert settings_table() in README, f"the table should be:\n\n{settings_table()}"


def test_every_file_of_the_layout_exists_and_every_script_is_in_it():
    layout = README.split("## Layout")[1].split("##")[0]
    named = re.findall(r"^    (\S+)", layout, re.M)
    assert all((ROOT / name).exists() for name in named), named
    assert {p.name for p in ROOT.glob("*.py")} <= set(named)


def test_every_link_leads_somewhere():
    assert all((ROOT / target).exists() for target in re.findall(r"\]\((?!http)([^)#]+)\)", README))


@pytest.mark.slow
def test_its_commands_run_from_a_fresh_copy(tmp_path, monkeypatch):
    """Only the number of steps, and of tokens to compare on, is made smaller; a resumed run gets one more."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setenv("NANOFORGE_REGISTRY_DIR", str(tmp_path / "registered"))
    (tmp_path / "papers").mkdir()
    for n in range(40):
        (tmp_path / "papers" / f"{n}.txt").write_text(f"Paper number {n} shows that the loss is low. " * 200, "utf-8")
    ran = []
    for line in "".join(blocks("bash")).splitlines():
        words = shlex.split(line)
        if words[0] != "python" or words[1:3] == ["-m", "pytest"]:
            continue
        if words[1] == "train.py":
            words += [f"--max_iters={2 + ('--init_from=resume' in words)}", "--eval_iters=1", "--eval_interval=2"]
        if words[1] == "compare.py":
            words += ["--max_tokens=1000"]
        done = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        ran.append(" ".join(words[1:3]) if words[1] == "-m" else words[1])
    scripts = {
        "-m registry",
        "train.py",
        "sample.py",
        "checkpoint.py",
        "merge_lora.py",
        "compare.py",
        "data/scientific/prepare.py",
    }
    assert scripts <= set(ran)
    for code in blocks("python"):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "38,393,920 parameters" in done.stdout, done.stderr


if __name__ == "__main__":
    print(settings_table())
