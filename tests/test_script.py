"""What all scripts do on a command line, with errors as Python and PyTorch raise them."""

import pytest
import torch

import script


def too_large_to_map(folder):
    path = folder / "weights"
    with open(path, "wb") as file:
        file.truncate(1 << 43)  # a hole of 8 TB
    return torch.UntypedStorage.from_file(str(path), False, 1 << 43)


@pytest.mark.parametrize(
    "work", [lambda _: torch.empty(1 << 60, dtype=torch.uint8), too_large_to_map, lambda _: bytes(1 << 60)]
)
def test_a_want_of_memory_is_one_sentence(tmp_path, capsys, work):
    assert script.run("sample.py", lambda: work(tmp_path) and None) == 1
    said = capsys.readouterr().err
    assert said.startswith("sample.py: there is not enough memory (") and said.count("\n") == 1


def test_an_error_of_ours_is_not_taken_for_a_want_of_memory():
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        script.run("sample.py", lambda: torch.ones(2, 3) @ torch.ones(2, 3))
