# The 38M model, about one epoch of the embedded corpus (docstrings of the scientific packages) on a CPU.
#
# For 500k arXiv abstracts (about 110M tokens): python data/scientific/prepare.py --source hub --num_samples 500000,
# then max_iters = 27_000, warmup_iters = 500, eval_interval = 1000.
# For a GPU: batch_size = 64, gradient_accumulation_steps = 1, and a fourth of the steps.
config = {
    "out_dir": "models/gpt-38M-scientific-pretrain",
    "dataset": "scientific",
    "preset": "small",
    # 4 x 256 x 4 = 4,096 tokens a step: small steps learn most from a corpus of a few million tokens
    "batch_size": 4,
    "gradient_accumulation_steps": 4,
    "max_iters": 850,
    "learning_rate": 1e-3,  # a small model stands a high rate
    "warmup_iters": 50,
    "eval_interval": 100,
}
