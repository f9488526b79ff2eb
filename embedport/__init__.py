"""embedport: Qwen3 embedding and reranker checkpoints, made fit for production."""
