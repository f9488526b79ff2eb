"""Texts: prompts, corpora, retrieval sets, rankings."""
