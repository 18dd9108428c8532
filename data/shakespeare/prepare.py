"""The plays of Shakespeare, as tokens that train.py reads.

hub    the 1.1 MB known as tiny shakespeare, from the Hugging Face hub (needs the package datasets)
files  any text of the plays: python data/shakespeare/prepare.py --files input.txt

A document is a passage of several speeches, so that held-out text is whole dialogues.
"""

import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, so that this runs from anywhere

from data.preparation import Recipe, main
from data.sources import HubDataset, split_text

PASSAGE = 4000  # characters


def passages(documents: Iterable[str]) -> Iterator[str]:
    """Join consecutive speeches, which stand between blank lines, until they make a passage."""
    held, size = [], 0
    for speech in (block for text in documents for block in split_text(io.StringIO(text), "block") if block):
        held.append(speech)
        size += len(speech)
        if size >= PASSAGE:
            yield "\n\n".join(held)
            held, size = [], 0
    yield "\n\n".join(held)


RECIPE = Recipe(
    folder=Path(__file__).resolve().parent,
    about=__doc__,
    hub=HubDataset(
        id="karpathy/tiny_shakespeare",
        column="text",
        licence="public domain",
        num_samples=0,
        split="train+validation+test",
    ),
    val_fraction=0.1,
    reshape={"hub": passages, "files": passages},
)

if __name__ == "__main__":
    main(RECIPE)
