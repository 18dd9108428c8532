"""Short stories in the words of a small child, as tokens that train.py reads.

hub      TinyStories (Eldan and Li, 2023, arXiv:2305.07759), streamed from the Hugging Face hub (needs the package
         datasets)
grammar  a stand-in with no network: stories that a small grammar makes up, always the same ones. They are synthetic,
         and the dataset's name, tinystories-synthetic, says so. Where they get a tokenizer of their own, it is trained
         on the docstrings of data/scientific as well, or no model of them could be adapted to a larger vocabulary
files    your own stories
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, so that this runs from anywhere

from data.docstrings import from_docstrings
from data.preparation import Recipe, main
from data.sources import HubDataset, Source
from data.tinystories.grammar import stories

RECIPE = Recipe(
    folder=Path(__file__).resolve().parent,
    about=__doc__,
    hub=HubDataset(
        id="roneneldan/TinyStories",
        column="text",
        licence="CDLA-Sharing-1.0",
        num_samples=50_000,  # of 2.1 million
        mean_bytes=900,
    ),
    offline=(
        "grammar",
        lambda: Source(
            documents=stories(),
            description="SYNTHETIC stories from data/tinystories/grammar.py, a stand-in for TinyStories",
            licence="that of this repository",
            synthetic=True,
            vocabulary=from_docstrings().documents,
        ),
    ),
)

if __name__ == "__main__":
    main(RECIPE)
