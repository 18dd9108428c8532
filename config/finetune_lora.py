# Adapters that teach the stories' model to read scientific text: 4 MB of weights beside a base that stays as it is.
#
# For another base: --init_from=models/NAME, or the folder of a Llama, Gemma, Qwen, ... The convention names the run.
config = {
    "init_from": "models/gpt-38M-tinystories-pretrain",
    "dataset": "scientific",  # its documents are written anew in the tokens of the base's tokenizer
    "lora": True,
    "lora_rank": 8,
    # Also embeddings and head, since the stories have few of these words: without them the loss stays 2.5 nats higher.
    # Where base and data share a vocabulary, all-linear does, at a fifth of the size.
    "lora_targets": "all",
    "max_iters": 400,
    "learning_rate": 2e-3,  # adapters stand more than whole weights do
    "warmup_iters": 20,
    "weight_decay": 0.0,  # on A and B it would pull towards the base, and how hard would depend on alpha
    "eval_interval": 50,
}
