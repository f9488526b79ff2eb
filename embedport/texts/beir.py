"""Retrieval sets in the BEIR layout (arXiv:2104.08663).

    corpus.jsonl      {"_id": …, "title": …, "text": …} per line; the title is optional
    queries.jsonl     {"_id": …, "text": …} per line
    qrels/test.tsv    a header, then query-id, corpus-id and relevance, tab-separated
    candidates.tsv    for rerankers: a header, then query-id, corpus-id and rank

Texts and candidates may be compressed (corpus.jsonl.gz, queries.jsonl.gz, candidates.tsv.gz).
"""

from __future__ import annotations

import gzip
import io
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import MOST_TEXT, read_small, written
from ..strict_json import parse_json
from .corpus import describe_fault, titled_text

BUILTIN = "builtin"


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, documents, and relevance judgments.

    Attributes:
        name: Its name in reports.
        queries: Id to text, for the queries that have a relevant document.
        documents: Id to text.
        relevance: Query id to document id to relevance; above 0 is relevant.
        candidates: Query id to document ids, best first: a first stage's ranking. Empty if there
            is no such file.
    """

    name: str
    queries: Mapping[str, str]
    documents: Mapping[str, str]
    relevance: Mapping[str, Mapping[str, int]]
    candidates: Mapping[str, list[str]]


def read_beir(
    folder: str | Path, *, candidates: str | Path | None = None, max_queries: int | None = None
) -> RetrievalSet:
    """Read a retrieval set.

    Args:
        folder: The folder, or "builtin" for embedport's built-in set.
        candidates: A file to read instead of the folder's candidates.tsv.
        max_queries: Use only this many queries, always the same ones.

    Raises:
        InputError: A file is missing, or a line is invalid; names both.
    """
    name = Path(folder).name
    folder = _builtin() if str(folder) == BUILTIN else Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a retrieval set is a folder with corpus.jsonl")
    documents = _read_texts(folder, "corpus.jsonl")
    queries = _read_texts(folder, "queries.jsonl")
    relevance: dict[str, dict[str, int]] = {}
    path = folder / "qrels" / "test.tsv"
    for place, query, document, value in _read_triples(path, queries, documents):
        if value < 0:
            raise InputError(f"{place}: relevance should be 0 or more, found {value}")
        relevance.setdefault(query, {})[document] = value
    relevance = {query: judged for query, judged in relevance.items() if any(judged.values())}
    if not relevance:
        raise InputError(f"{path}: no query has a relevant document")
    whole = RetrievalSet(
        name,
        {query: text for query, text in queries.items() if query in relevance},
        documents,
        relevance,
        _read_candidates(folder, candidates, queries, documents),
    )
    return whole if max_queries is None else _subset(whole, max_queries)


def write_candidates(path: Path, ranking: Mapping[str, Iterable[str]]) -> None:
    """Write a first stage's ranking as candidates.tsv.

    Args:
        path: The file.
        ranking: Query id to document ids, best first.

    Raises:
        InputError: The file cannot be written.
    """
    lines = ["query-id\tcorpus-id\trank"]
    for query, documents in ranking.items():
        lines += [f"{query}\t{document}\t{rank}" for rank, document in enumerate(documents, 1)]
    with written(path) as file:
        file.write(("\n".join(lines) + "\n").encode())


def _builtin() -> Path:
    folder = Path(str(files("embedport") / "demo" / "retrieval"))
    if not folder.is_dir():
        raise InputError(f"{folder} is missing: this installation has no built-in retrieval set")
    return folder


def _subset(whole: RetrievalSet, count: int) -> RetrievalSet:
    if count < 1:
        raise InputError(f"max_queries should be at least 1, found {count}")
    ids = sorted(whole.queries)
    random.Random(0).shuffle(ids)
    chosen = set(ids[:count])
    return replace(
        whole,
        queries={query: text for query, text in whole.queries.items() if query in chosen},
        relevance={query: judged for query, judged in whole.relevance.items() if query in chosen},
        candidates={query: ranked for query, ranked in whole.candidates.items() if query in chosen},
    )


def _read_texts(folder: Path, name: str) -> dict[str, str]:
    path = folder / name
    if not path.is_file():
        path = folder / f"{name}.gz"
        if not path.exists():
            raise InputError(
                f"{folder} has no {name}: a retrieval set is a folder with corpus.jsonl, "
                "queries.jsonl and qrels/test.tsv"
            )
    texts: dict[str, str] = {}
    for place, line in _lines(path):
        try:
            row: dict[str, Any] = parse_json(line)
            key, text = row["_id"], titled_text(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f'{place} should be an object like {{"_id": …, "text": …}}, found {line[:80]!r} '
                f"({describe_fault(error)})"
            ) from error
        if not isinstance(text, str):
            raise InputError(f"{place}: text should be a string, found {text!r}")
        if not isinstance(key, str) or key in texts:
            raise InputError(f"{place}: _id should be a unique string, found {key!r} (again)")
        texts[key] = text
    if not texts:
        raise InputError(f"{path} holds no text")
    return texts


def _read_triples(
    path: Path, queries: Mapping[str, str], documents: Mapping[str, str]
) -> Iterator[tuple[str, str, str, int]]:
    """(place, query id, document id, integer) of each line after the header."""
    lines = _lines(path)
    place, header = next(lines, (f"{path}:1", ""))
    if header.rpartition("\t")[2].strip().isdigit():
        raise InputError(
            f"{place} should be a header, query-id, corpus-id and score, found {header[:80]!r}"
        )
    for place, line in lines:
        try:
            query, document, text = line.split("\t")
            value = int(text)
        except ValueError as error:
            raise InputError(
                f"{place} should be query-id, corpus-id and a whole number with tabs between, "
                f"found {line[:80]!r}"
            ) from error
        if query not in queries:
            raise InputError(f"{place}: no query has the id {query!r}")
        if document not in documents:
            raise InputError(f"{place}: no document has the id {document!r}")
        yield place, query, document, value


def _read_candidates(
    folder: Path,
    given: str | Path | None,
    queries: Mapping[str, str],
    documents: Mapping[str, str],
) -> dict[str, list[str]]:
    if given is not None:
        path = Path(given)
    else:
        path = folder / "candidates.tsv"
        if not path.is_file():
            path = folder / "candidates.tsv.gz"
        if not path.is_file():
            return {}
    ranked: dict[str, list[tuple[int, str]]] = {}
    for _, query, document, rank in _read_triples(path, queries, documents):
        ranked.setdefault(query, []).append((rank, document))
    return {query: [document for _, document in sorted(rows)] for query, rows in ranked.items()}


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of each line that is not empty."""
    try:
        data = read_small(path, MOST_TEXT)
        if path.suffix == ".gz":
            data = _decompress(data)
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def _decompress(data: bytes) -> bytes:
    """Like `gzip.decompress`, but limited to MOST_TEXT: a small file may expand to any size."""
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        parts, size = [], 0
        while part := file.read(1 << 20):
            parts.append(part)
            size += len(part)
            if size > MOST_TEXT:
                raise ValueError(f"it should hold {MOST_TEXT:,} bytes at most, found more")
    return b"".join(parts)
