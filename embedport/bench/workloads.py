"""Workloads of a benchmark: rows of token ids, the same for every runner.

Texts are real: the built-in queries, and the docstrings of Python's standard library, cut into
passages with lengths spread evenly on a logarithmic scale.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..texts.prompts import EmbeddingTokenizer, RerankerTokenizer
from ..texts.samples import builtin_samples

SHAPES = ((1, 32), (1, 512), (8, 128), (1, 4096))
QUICK_SHAPES = ((1, 32), (1, 512), (8, 128))
# Tokens of the shortest and the longest passage.
PASSAGE_TOKENS = (20, 700)
PASSAGES, PARTS = 1000, 10
QUERIES, CANDIDATES = 8, 50
# Shapes with fewer tokens than this run several times per round.
ROUND_TOKENS = 512
SEED = 0
LONGEST = 32_768


@dataclass(frozen=True)
class Workload:
    """A workload.

    Attributes:
        name: Its name in tables.
        parts: Rows of token ids, int64 [tokens] each; each round takes the next part.
        repeats: How many times a round runs its part.
    """

    name: str
    parts: tuple[tuple[np.ndarray, ...], ...]
    repeats: int = 1

    @property
    def longest(self) -> int:
        """Tokens of its longest row."""
        return max(len(row) for part in self.parts for row in part)

    def part(self, number: int) -> tuple[np.ndarray, ...]:
        """The rows of a round."""
        return self.parts[number % len(self.parts)]


def uniform(tokenizer_file: Path, batch: int, size: int) -> Workload:
    """Rows of one length, without padding."""
    tokenizer = EmbeddingTokenizer(tokenizer_file, LONGEST)
    ids = np.concatenate(tokenizer.encode([sample.text for sample in builtin_samples()]).ids)
    rows = tuple(np.resize(ids, batch * size).reshape(batch, size))
    return Workload(f"{batch} x {size}", (rows,), max(1, ROUND_TOKENS // (batch * size)))


def passages(tokenizer_file: Path, count: int = PASSAGES, parts: int = PARTS) -> Workload:
    """Passages of mixed length; every part has the same mix of lengths."""
    tokenizer = EmbeddingTokenizer(tokenizer_file, LONGEST)
    rows = tokenizer.encode(read_passages(tokenizer, count)).ids
    split = tuple(tuple(rows[start::parts]) for start in range(parts))
    return Workload(f"{count:,} passages", split)


def reranking(
    tokenizer_file: Path, queries: int = QUERIES, candidates: int = CANDIDATES
) -> Workload:
    """Pairs in the reranker's template; a part is one query with all of its passages."""
    tokenizer = RerankerTokenizer(tokenizer_file, LONGEST)
    query_texts = [sample.text for sample in builtin_samples() if sample.prompt == "query"][
        :queries
    ]
    texts = read_passages(EmbeddingTokenizer(tokenizer_file, LONGEST), queries * candidates)
    parts = tuple(
        tuple(tokenizer.encode([(query, text) for text in texts[number::queries]]).ids)
        for number, query in enumerate(query_texts)
    )
    return Workload(f"{queries} x {candidates} pairs", parts)


def read_passages(tokenizer: EmbeddingTokenizer, count: int) -> list[str]:
    """Passages of 20 to 700 tokens, each cut from one module's docstrings.

    Raises:
        InputError: The standard library has too few docstrings.
    """
    generator = np.random.default_rng(SEED)
    low, high = np.log(PASSAGE_TOKENS)
    lengths = np.exp(low + (high - low) * (np.arange(count) + 0.5) / count)
    sizes = list(generator.permutation(lengths).astype(int))
    texts: list[str] = []
    for text in _documentation():
        encoding = tokenizer.tokenizer.encode(text, add_special_tokens=False)
        start = 0
        while sizes and start + sizes[-1] <= len(encoding.ids):
            end = start + sizes.pop()
            texts.append(text[encoding.offsets[start][0] : encoding.offsets[end - 1][1]])
            start = end
        if not sizes:
            return texts
    raise InputError(
        f"the docstrings in {sysconfig.get_path('stdlib')} give only {len(texts)} of the {count} "
        "passages: use a Python that has the sources of its standard library"
    )


def _documentation() -> Iterator[str]:
    """Yield the docstrings of each module of the standard library, joined."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
    for path in sorted(root.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(root).parts):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, ValueError):
                continue
            if text := "\n\n".join(_docstrings(tree)):
                yield text


def _docstrings(tree: ast.Module) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text


def write_rows(path: Path, rows: Sequence[np.ndarray]) -> None:
    """Write rows to a file that `peers/serving.py` reads."""
    np.savez(path, ids=np.concatenate(rows), ends=np.cumsum([len(row) for row in rows]))
