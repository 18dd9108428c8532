# The 38M model on TinyStories; offline, on a stand-in that a grammar writes (prepare.py says which it is).
config = {
    "out_dir": "models/gpt-38M-tinystories-pretrain",
    "dataset": "tinystories",
    "preset": "small",
    "vocab_size": 50257,  # the stand-in's own tokenizer may be smaller; the name promises 38M
    "max_iters": 1000,
    "learning_rate": 1e-3,
    "warmup_iters": 50,
    "eval_interval": 100,
}
