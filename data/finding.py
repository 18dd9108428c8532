"""A dataset by its name: where it lies, prepared if it is missing, and in the tokens of the model that will read it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import files
from data.tokens import Dataset, load_dataset, open_retokenized, retokenize, retokenized_directory
from distributed import Ranks
from tokenizer import Tokenizer

DATA = Path(__file__).resolve().parent


def dataset_directory(name: str) -> Path:
    """A folder under data/, or a path."""
    path, known = files.expanded(name), DATA / name
    return known if len(path.parts) == 1 and (known.is_dir() or not path.is_dir()) else path


def find_dataset(name: str, tokenizer: Path | None = None, ranks: Ranks | None = None) -> Dataset:
    """A folder under data/ or a path. One that has a prepare.py but no token files yet is prepared first.

    `tokenizer` is the tokenizer.json of the model that will read it, if there is one. Where the dataset holds tokens of
    another, its documents are written in those of this one, to a subfolder, and that is the dataset returned; what the
    model's files say beside the ids (a chat's template, where to stop) counts, not what the dataset's copy says.
    `ranks` are the processes that call this together, of which one writes.
    """
    directory, ranks = dataset_directory(name), ranks or Ranks()

    def prepare() -> None:
        script = directory / "prepare.py"
        if script.is_file() and not (directory / "train.bin").exists():
            print(f"{directory} has no token files yet; running {script.name} there", flush=True)
            code = subprocess.run([sys.executable, str(script)], check=False).returncode
            if code:
                raise ValueError(f"{script} ended with exit code {code}, so there is nothing to train on")

    ranks.main_alone(prepare)
    if not directory.is_dir():
        names = ", ".join(sorted(p.parent.name for p in DATA.glob("*/prepare.py")))
        raise FileNotFoundError(f"there is no dataset {name}; data/ has {names}, and the path of a folder will do too")
    dataset, wanted = load_dataset(directory), Tokenizer.load(tokenizer) if tokenizer else None
    if wanted is None or dataset.tokenizer_fingerprint is None:  # a nanoGPT folder
        return dataset
    target = retokenized_directory(dataset, wanted)

    def rewrite() -> None:
        if open_retokenized(dataset, wanted) is None:
            own = dataset.meta["tokenizer"]["name"]
            print(f"{directory} holds tokens of {own}; writing it in those of {wanted.name} to {target}", flush=True)
            retokenize(dataset, wanted)

    if dataset.tokenizer_fingerprint != wanted.fingerprint:
        ranks.main_alone(rewrite)
        dataset = load_dataset(target)
    return replace(dataset, tokenizer_path=Path(tokenizer))
