# Gemma 3 1b, adapted in every projection. What fits: python -m registry memory gemma3-1b --lora_rank 32
config = {
    "model": "gemma3-1b",
    "lora": {"enabled": True, "rank": 32, "alpha": 32},  # scale 1
    "lora_module_path": ".*q_einsum|.*kv_einsum|.*gate_proj|.*down_proj|.*up_proj|.*attn_vec_einsum",
    "batch_size": 4,
}
