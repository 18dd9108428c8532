"""What all scripts do on a command line, with errors as Python and PyTorch raise them."""

import warnings

import pytest
import torch

import script


def too_large_to_map(folder):
    path = folder / "weights"
    with open(path, "wb") as file:
        file.truncate(1 << 43)  # a hole of 8 TB
    return torch.UntypedStorage.from_file(str(path), False, 1 << 43)


def too_large_for_torchscript(folder):
    with warnings.catch_warnings(action="ignore"):
        layer = torch.jit.script(torch.nn.Upsample(scale_factor=1e8))
    layer(torch.ones(1, 1, 2, 2))


def test_what_torchscript_wanted_is_told_and_not_where(capsys):
    assert script.run("sample.py", lambda: too_large_for_torchscript(None)) == 1
    assert "can't allocate memory: you tried to allocate" in capsys.readouterr().err


@pytest.mark.parametrize(
    "work",
    [
        lambda _: torch.empty(1 << 60, dtype=torch.uint8),
        too_large_to_map,
        too_large_for_torchscript,
        lambda _: bytes(1 << 60),
    ],
)
def test_a_want_of_memory_is_one_sentence(tmp_path, capsys, work):
    assert script.run("sample.py", lambda: work(tmp_path) and None) == 1
    said = capsys.readouterr().err
    assert said.startswith("sample.py: there is not enough memory (") and said.count("\n") == 1


def test_an_error_of_ours_is_not_taken_for_a_want_of_memory():
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        script.run("sample.py", lambda: torch.ones(2, 3) @ torch.ones(2, 3))
