"""A server for exported models: OpenAI's embeddings, and reranking as Cohere, Jina and TEI have it.

One thread runs the models; the event loop parses, answers and never waits for them. Texts of all
requests wait in one queue (`scheduler`), from which each batch takes what fits its token budget.
"""

from __future__ import annotations

from .app import create_app
from .limits import Limits
from .run import serve

__all__ = ["Limits", "create_app", "serve"]
