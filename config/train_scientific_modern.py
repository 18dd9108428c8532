# The scientific corpus with what the field has learned since GPT-2: in less than a third of the time it is where
# train_scientific.py ends (python bench/curves.py compares two runs; README.md has the picture).
#
# Llama's block at the size of GPT-2's: RMS norms, RoPE, a gated MLP, one head of keys and values for five of queries,
# queries and keys normalised. Blocks begin as the identity. Muon for their matrices, AdamW for embedding and head.
config = {
    "out_dir": "models/llama-38M-scientific-pretrain",
    "dataset": "scientific",
    "preset": "modern",
    "zero_init": True,
    # Half of train_scientific.py's tokens a step: so early, more steps are worth more than better ones.
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_iters": 345,
    "optimizer": "muon",
    "learning_rate": 3.5e-2,  # of embedding and head, whose rows are seen a few times in all
    "muon_learning_rate": 3e-3,
    "beta2": 0.99,  # most rows have a gradient now and then only
    "weight_decay": 0.0,  # which would take from rows that no gradient meets
    "schedule": "wsd",
    "warmup_iters": 10,  # Muon's steps have their size from the first one on
    "cooldown_iters": 230,
    "min_lr": 0.0,
    "eval_interval": 115,
}
