"""Scientific text, as tokens that train.py reads.

hub    abstracts of arXiv papers, streamed from the Hugging Face hub (needs the package datasets)
docs   the docstrings of the scientific packages that are installed anyway (numpy, torch, sympy, mpmath, networkx): some
       13 MB of mathematics, references and worked examples, with no network
files  your own papers
"""

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, so that this runs from anywhere

from data.docstrings import from_docstrings
from data.preparation import Recipe, main
from data.sources import HubDataset


def unwrapped(abstracts: Iterable[str]) -> Iterator[str]:
    """arXiv breaks the lines of an abstract at some 80 characters, and indents the first of a paragraph."""
    for text in abstracts:
        yield re.sub(r"\n(?! )", " ", text.strip())


RECIPE = Recipe(
    folder=Path(__file__).resolve().parent,
    about=__doc__,
    hub=HubDataset(
        id="gfissore/arxiv-abstracts-2021",  # two million abstracts, to the end of 2021
        column="abstract",
        licence="CC0 1.0 (arXiv metadata)",
        num_samples=15_000,  # about as much text as docs
        mean_bytes=950,
    ),
    offline=("docs", from_docstrings),
    reshape={"hub": unwrapped},
)

if __name__ == "__main__":
    main(RECIPE)
