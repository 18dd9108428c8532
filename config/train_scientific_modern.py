# The scientific corpus again, with Llama's block at the size of GPT-2's: RMS norms, RoPE, a gated MLP, one head of keys
# and values for five of queries, queries and keys normalised. All else is train_scientific.py's, to compare with it.
config = {
    "out_dir": "models/llama-38M-scientific-pretrain",
    "dataset": "scientific",
    "preset": "modern",
    "batch_size": 4,
    "gradient_accumulation_steps": 4,
    "max_iters": 850,
    "learning_rate": 1e-3,
    "warmup_iters": 50,
    "eval_interval": 100,
}
