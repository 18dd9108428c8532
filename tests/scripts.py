"""Scripts in forks of a process that has torch already, which takes two seconds to import; else as subprocess.run."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from tempfile import TemporaryDirectory

import torch

multiprocessing.set_forkserver_preload(["numpy", "torch", "safetensors.torch", "tiktoken", "tokenizers", "tqdm"])


def run(script: Path, *arguments: str, input: str = "", timeout: float = 300, cwd: str | Path = "") -> CompletedProcess:
    words = [str(script), *arguments]
    with TemporaryDirectory() as folder:
        Path(folder, "stdin").write_text(input, encoding="utf-8")
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=_run, args=(words, folder, str(cwd or os.getcwd()), dict(os.environ)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutExpired(words, timeout)
        out, err = (Path(folder, name).read_bytes().decode() for name in ("stdout", "stderr"))
        return CompletedProcess(words, process.exitcode, out, err)


def _run(words: list[str], folder: str, cwd: str, environment: dict[str, str]) -> None:
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)  # multiprocessing has put another there
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    torch.seed()  # every fork has that of the process it comes from
    here, script = Path(__file__).resolve().parent, Path(words[0])
    others = [
        path for path in sys.path[1:] if Path(path).resolve() not in (here, here.parent)
    ]  # pytest put these there
    sys.argv, sys.path = words, [str(script.parent), *others]
    runpy.run_path(words[0], run_name="__main__")
