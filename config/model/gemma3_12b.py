# Gemma 3 12b, adapted in every projection. What fits: python -m registry memory gemma3-12b --lora_rank 64
config = {
    "model": "gemma3-12b",
    "lora": {"enabled": True, "rank": 64, "alpha": 64},  # scale 1
    "lora_module_path": ".*q_einsum|.*kv_einsum|.*gate_proj|.*down_proj|.*up_proj|.*attn_vec_einsum",
    "batch_size": 8,
}
