"""Run artifacts and checkpoints behind one interface."""

from .comparison import Check
from .embedder import Embedder
from .facts import ModelFacts, read_facts
from .loading import check, load, load_embedder, load_reranker
from .reranker import Ranked, Reranker

__all__ = [
    "Check",
    "Embedder",
    "ModelFacts",
    "Ranked",
    "Reranker",
    "check",
    "load",
    "load_embedder",
    "load_reranker",
    "read_facts",
]
