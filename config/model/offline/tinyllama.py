# TinyLlama from $NANOFORGE_TINYLLAMA_PATH or another place: python -m registry where tinyllama-offline
config = {"model": "tinyllama-offline"}
