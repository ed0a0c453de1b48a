"""Train masked diffusion language models with a memory of fast weights (MemDLM)."""
