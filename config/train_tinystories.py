# The 38M model on TinyStories; offline, on a stand-in that a grammar writes (prepare.py says which it is).
config = {
    "out_dir": "models/gpt-38M-tinystories-pretrain",
    "dataset": "tinystories",
    "preset": "small",
    "max_iters": 600,  # the stand-in has little more to teach; of the hub's 50,000 stories this is a quarter
    "learning_rate": 1e-3,
    "warmup_iters": 50,
    "eval_interval": 100,
}
