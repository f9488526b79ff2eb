"""A model run layer by layer: GPTQ, AWQ, fp16 overflow, and the search of formats."""
