# GPT-2 from $NANOFORGE_GPT2_PATH or another place of this machine: python -m registry where gpt2-offline
config = {"model": "gpt2-offline"}
