"""Run artifacts and checkpoints behind one interface."""

from .comparison import Check
from .embedder import Embedder
from .info import ModelInfo, read_info
from .loading import check, load, load_embedder, load_reranker
from .reranker import Ranked, Reranker

__all__ = [
    "Check",
    "Embedder",
    "ModelInfo",
    "Ranked",
    "Reranker",
    "check",
    "load",
    "load_embedder",
    "load_reranker",
    "read_info",
]
