# What a fragment for model=NAME can say. Adapters wait until lora.enabled=true asks for them.
config = {
    "model": "sshleifer/tiny-gpt2",  # 100,000 parameters, a hub id: local_files_only=false downloads it
    "device": "cpu",
    "dtype": "float32",
    "lora": {"enabled": False, "r": 8, "alpha": 16, "dropout": 0.05, "target_modules": ["c_attn"]},
}
