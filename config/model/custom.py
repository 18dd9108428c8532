# A model of your own: copy this file, and model=NAME finds it. Here a smaller adapter for Gemma 3 4b.
config = {
    "model": "gemma3-4b",  # or a model directory, a path, a hub id
    "lora": {"enabled": True, "rank": 16, "alpha": 16},
    # A regular expression for whole paths, with Gemma's own names or Hugging Face's (q_proj, o_proj, ...).
    "lora_module_path": ".*q_einsum|.*kv_einsum|.*gate_proj|.*down_proj|.*up_proj|.*attn_vec_einsum",
}
