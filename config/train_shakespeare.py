# A few minutes on a laptop: 1 MB of plays, read some ten times over by a model small enough for it.
#
# The plays are not embedded: python data/shakespeare/prepare.py --files input.txt, or with the hub reachable, nothing.
config = {
    "dataset": "shakespeare",
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 256,
    "tie_word_embeddings": True,  # so little text cannot train two vocabularies
    "dropout": 0.2,  # every line is seen several times
    "max_iters": 800,
    "learning_rate": 1e-3,
    "warmup_iters": 50,
    "eval_interval": 100,
}
