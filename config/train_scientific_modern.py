# The scientific corpus with what the field has learned since GPT-2: on the machine of bench/README.md a validation loss
# of 3.950 after 5.3 minutes, where train_scientific.py has 3.929 after 14 (python bench/curves.py compares two runs).
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
    "max_iters": 390,
    "optimizer": "muon",
    "learning_rate": 1.5e-2,  # of embedding and head, whose rows are seen a few times in all
    "muon_learning_rate": 3e-3,
    "schedule": "wsd",
    "warmup_iters": 10,  # Muon's steps have their size from the first one on
    "cooldown_iters": 260,
    "min_lr": 0.0,
    "eval_interval": 130,
}
