"""Build a calibration set of a corpus: texts for an embedder, pairs for a reranker.

The corpus is read once, and of each length as many texts are kept as the set may need: those whose
hashes are the smallest (bottom-k sampling). A text that occurs twice has one hash. So memory is
bounded, every distinct text has the same chance, and the order of the corpus does not matter.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import islice
from pathlib import Path

from .checkpoint.spec import ModelSpec, Task
from .checkpoint.tensor_files import read_headers
from .checks import check_integer
from .errors import CheckpointError, InputError
from .exporters.configuration import fetch_weights, read_configuration
from .exporters.texts import advised_tokens, encode_samples
from .runtimes import Embedder, load
from .storage import as_place
from .strict_json import write_jsonl
from .texts.prompts import EmbeddingTokenizer, RerankerTokenizer
from .texts.ranking import search, unit
from .texts.samples import Pair, Sample
from .texts.text_files import stream_rows

logger = logging.getLogger(__name__)

# Texts that are tokenized together.
BATCH = 256
# Documents that a reranker's pairs are mined from, and their tokens, which the embedder encodes.
POOL, POOL_TOKENS = 2048, 1 << 18
# A query's documents: the best one, one of the best tenth, one of the rest.
BANDS, TENTH = 3, 10
HASHES = 1 << 64


@dataclass(frozen=True)
class Calibration:
    """A calibration set that was written.

    Attributes:
        path: Its file, for `calibration` of `export` and `quantize_checkpoint`.
        texts: Number of texts, or of a reranker's pairs.
        queries: How many of the texts are queries; a reranker's distinct queries.
        tokens: Tokens in the model's template, prompts included.
    """

    path: Path
    texts: int
    queries: int
    tokens: int


@dataclass(frozen=True)
class Limit:
    """The size of a set: its most tokens, its most texts, or both."""

    tokens: int | None = None
    count: int | None = None

    def texts_of(self, tokens: int) -> int:
        """How many texts of at least so many tokens fit."""
        bounds = [self.count, None if self.tokens is None else self.tokens // tokens]
        return min(bound for bound in bounds if bound is not None)


def build_calibration(
    model: str | Path,
    corpus: str | Path,
    output: str | Path,
    *,
    tokens: int | None = None,
    count: int | None = None,
    embedder: str | Path | None = None,
    task: Task | None = None,
    seed: int = 0,
    force: bool = False,
    progress: bool = False,
) -> Calibration:
    """Build a calibration set for a model from a corpus.

    For an embedder: distinct texts, as many queries as documents if the corpus marks queries, their
    lengths distributed as in the corpus. For a reranker: pairs of a query with the document that
    `embedder` ranks first, with one of its best tenth, and with one of the others.

    Texts are compared after Unicode's NFKC normalization, without regard to case and white space.

    Args:
        model: The checkpoint to quantize, a folder or a hub id; it gives the tokenizer, the prompts
            and the task.
        corpus: A .txt, .jsonl or .parquet file, or a URI of one, as `encode` reads it; besides, a
            row may name its "prompt". A reranker's queries have the prompt "query".
        output: The .jsonl file to write.
        tokens: The most tokens of the set, prompts and templates included. Default, unless `count`
            is given: ten times the inputs of the model's largest matrix.
        count: The number of texts or pairs.
        embedder: An embedding model that ranks documents, as for `load`; for a reranker.
        task: "embedding" or "reranker", if the checkpoint's files do not tell.
        seed: Chooses among texts.
        force: Whether to replace an existing file.
        progress: Whether to show progress bars on a terminal.

    Raises:
        InputError: An option is wrong, the corpus is missing or invalid or lacks queries or
            documents, or the output exists or cannot be written.
        CheckpointError: The checkpoint's files are incomplete or damaged, or it is quantized
            already, as an artifact is.

    >>> corpus = folder / "corpus.txt"
    >>> with corpus.open("w") as file:
    ...     for number in range(100):
    ...         print("text", number, file=file)
    >>> embedport.build_calibration(checkpoint, corpus, folder / "set.jsonl", count=20).texts
    20
    """
    output = Path(output).expanduser()
    for name, value in (("tokens", tokens), ("count", count)):
        if value is not None and check_integer(name, value) < 1:
            raise InputError(f"`{name}` should be at least 1, found {value}")
    seed = check_integer("seed", seed)
    if tokens is not None and count is not None:
        raise InputError("`tokens` and `count` both say how large the set is: give one of them")
    _check_output(output, force)
    spec = read_configuration(model, None, task)
    _check_unquantized(spec)
    if (spec.task == "reranker") != (embedder is not None):
        raise InputError(
            f"{spec.source.id} is a reranker: `embedder` finds its pairs, give an embedding model"
            if embedder is None
            else f"{spec.source.id} is an embedding model: `embedder` is for a reranker's pairs"
        )
    if count is None:
        tokens = advised_tokens(spec)[2] if tokens is None else tokens
    limit = Limit(tokens, count)
    rows = _read(corpus, progress)
    if embedder is None:
        built = _build_texts(spec, str(corpus), rows, output, limit, seed)
    else:
        ranker = load(embedder)
        if not isinstance(ranker, Embedder):
            raise InputError(f"{embedder} is a reranker: give `embedder` an embedding model")
        built = _build_pairs(spec, str(corpus), rows, output, limit, seed, ranker, progress)
    noun, given = ("texts or pairs", built.texts) if tokens is None else ("tokens", built.tokens)
    wanted = count if tokens is None else tokens
    # The next text may not have fitted; that much is no lack of texts.
    if wanted is not None and given < 0.9 * wanted:
        logger.warning(
            "%s gives %s %s of the %s wanted: it has too few different texts",
            corpus,
            f"{given:,}",
            noun,
            f"{wanted:,}",
        )
    return built


def _check_unquantized(spec: ModelSpec) -> None:
    """Refuse what takes no calibration texts: a graph, or a checkpoint with codes of its own."""
    if spec.source.is_local:
        spec = fetch_weights(spec)  # names an artifact, which has no weights
        read_headers(spec.source.folder)
    if spec.quantization is not None:
        raise CheckpointError(
            f"{spec.source.folder / 'config.json'}: the checkpoint is quantized already, by "
            f"{spec.quantization.method!r}, and its own codes are taken; give the original"
        )


def _check_output(output: Path, force: bool) -> None:
    if output.suffix.lower() != ".jsonl":
        raise InputError(f"{output} should end with .jsonl")
    if not output.parent.is_dir():
        raise InputError(f"{output} cannot be written: no folder {output.parent}")
    if output.is_dir() or (output.exists() and not force):
        raise InputError(f"{output} exists; choose another place or replace it with `force`")


def _read(corpus: str | Path, progress: bool) -> Iterator[Sample]:
    place = as_place(corpus) if isinstance(corpus, str) else corpus
    for row in stream_rows(place, progress=progress):
        if row.text.strip():
            yield Sample(row.text, row.prompt)


def _build_texts(
    spec: ModelSpec, corpus: str, rows: Iterator[Sample], output: Path, limit: Limit, seed: int
) -> Calibration:
    tokenizer = EmbeddingTokenizer(
        spec.source.pipeline / "tokenizer.json", spec.max_length, spec.inputs
    )
    sampler = LengthSampler(limit, seed)
    for batch in _batches(rows):
        try:
            encoded = encode_samples(tokenizer, spec, batch)
        except InputError as error:  # an unknown prompt, or a text without a token
            raise InputError(f"{corpus}: {error}") from error
        for sample, ids in zip(batch, encoded, strict=True):
            sampler.add(sample, len(ids))
    chosen = sampler.choose()
    if not chosen:
        raise InputError(f"{corpus} holds no text that fits into {limit.tokens} tokens")
    lines = [
        {"text": sample.text}
        if sample.prompt == "document"
        else {"text": sample.text, "prompt": sample.prompt}
        for sample, _ in chosen
    ]
    write_jsonl(output, lines)
    queries = sum(sample.prompt == "query" for sample, _ in chosen)
    return Calibration(output, len(chosen), queries, sum(tokens for _, tokens in chosen))


def _build_pairs(
    spec: ModelSpec,
    corpus: str,
    rows: Iterator[Sample],
    output: Path,
    limit: Limit,
    seed: int,
    embedder: Embedder,
    progress: bool,
) -> Calibration:
    tokenizer = RerankerTokenizer(
        spec.source.pipeline / "tokenizer.json", spec.max_length, spec.inputs
    )
    most_pairs = max(1, limit.texts_of(len(tokenizer.encode([("a", "a")]).ids[0])))
    queries = LengthSampler(Limit(count=-(-most_pairs // BANDS)), seed)
    documents = LengthSampler(Limit(POOL_TOKENS, POOL), seed)
    for batch in _batches(rows):
        lengths = [len(ids) for ids in embedder.tokenizer.encode([row.text for row in batch]).ids]
        for sample, length in zip(batch, lengths, strict=True):
            if sample.prompt == "query":
                queries.add(sample, length)
            else:
                documents.add(Sample(sample.text), length)
    query_texts = [sample.text for sample, _ in queries.choose()]
    pool = [sample.text for sample, _ in documents.choose()]
    if not query_texts or len(pool) < 2:
        raise InputError(
            f"{corpus} should hold a query and two documents at least, found "
            f"{len(query_texts):,} and {len(pool):,}; a query is a line "
            'like {"text": …, "prompt": "query"} of a .jsonl file'
        )
    pairs = _mine(embedder, query_texts, pool, random.Random(seed), progress)
    encoded = tokenizer.encode([(pair.query, pair.document) for pair in pairs]).ids
    chosen, total = [], 0
    for pair, ids in zip(pairs, encoded, strict=True):
        if len(chosen) == limit.count:
            break
        if limit.tokens is None or total + len(ids) <= limit.tokens:
            chosen.append(pair)
            total += len(ids)
    if not chosen:
        raise InputError(f"{corpus} holds no pair that fits into {limit.tokens} tokens")
    write_jsonl(output, [{"query": pair.query, "document": pair.document} for pair in chosen])
    return Calibration(output, len(chosen), len({pair.query for pair in chosen}), total)


def _mine(
    embedder: Embedder,
    queries: Sequence[str],
    documents: Sequence[str],
    choose: random.Random,
    progress: bool,
) -> list[Pair]:
    """Each query with documents from three bands of its ranking, best first."""
    ranking = search(
        unit(embedder.encode(queries, prompt="query", progress=progress)),
        unit(embedder.encode(documents, prompt="document", progress=progress)),
        len(documents),
    )
    best = max(2, len(documents) // TENTH)
    pairs = []
    for query, ranked in zip(queries, ranking.tolist(), strict=True):
        places = [0, choose.randrange(1, best)]
        if best < len(documents):
            places.append(choose.randrange(best, len(documents)))
        pairs += [Pair(query, documents[ranked[place]]) for place in places]
    return pairs


@dataclass
class _Stratum:
    """The texts of one prompt and length with the smallest hashes.

    Attributes:
        capacity: The most texts kept.
        heap: (-hash, text, tokens) each, the largest hash first.
        hashes: The hashes in the heap.
    """

    capacity: int
    heap: list[tuple[int, Sample, int]] = field(default_factory=list)
    hashes: set[int] = field(default_factory=set)

    def add(self, value: int, sample: Sample, tokens: int) -> None:
        if value in self.hashes:
            return
        heappush(self.heap, (-value, sample, tokens))
        self.hashes.add(value)
        if len(self.heap) > self.capacity:
            self.hashes.remove(-heappop(self.heap)[0])

    @property
    def distinct(self) -> float:
        """The number of distinct texts seen; estimated if they were more than are kept.

        Of n hashes spread evenly, the k-th smallest is about k / n of their range
        (Bar-Yossef et al., 2002).
        """
        if len(self.heap) < self.capacity:
            return len(self.heap)
        return self.capacity * HASHES / (1 - self.heap[0][0])


class LengthSampler:
    """A sample of distinct texts, stratified by prompt and by length in powers of two.

    Args:
        limit: The size of the sample.
        seed: Changes the hashes, and so the sample.
    """

    def __init__(self, limit: Limit, seed: int) -> None:
        self._limit, self._seed = limit, seed
        self._strata: dict[tuple[str | None, int], _Stratum] = {}

    def add(self, sample: Sample, tokens: int) -> None:
        """Take a text of so many tokens into account."""
        # Lengths of 2^(octave - 1) + 1 to 2^octave tokens share a stratum.
        octave = (tokens - 1).bit_length()
        shortest = (1 << octave) // 2 + 1
        capacity = self._limit.texts_of(shortest)
        if capacity < 1:
            return
        stratum = self._strata.setdefault((sample.prompt, octave), _Stratum(capacity))
        stratum.add(_hash(sample, self._seed), sample, tokens)

    def choose(self) -> list[tuple[Sample, int]]:
        """The sample, (text, tokens) each: prompts in turn, lengths in proportion.

        The next text comes from the stratum with the largest distinct / (2 * chosen + 1) of the
        prompt that has the fewest texts (Webster's method); a stratum ends with its first text that
        no longer fits.
        """
        queues = {
            key: iter(sorted(stratum.heap, key=lambda entry: -entry[0]))
            for key, stratum in self._strata.items()
        }
        weights = {key: stratum.distinct for key, stratum in self._strata.items()}
        by_prompt: Counter[str | None] = Counter()
        by_stratum: Counter[tuple[str | None, int]] = Counter()
        taken: set[int] = set()
        chosen: list[tuple[Sample, int]] = []
        room = self._limit.tokens
        while queues and len(chosen) != self._limit.count:
            prompt = min({key[0] for key in queues}, key=lambda name: (by_prompt[name], str(name)))
            key = max(
                (key for key in queues if key[0] == prompt),
                key=lambda key: (weights[key] / (2 * by_stratum[key] + 1), -key[1]),
            )
            entry = next(queues[key], None)
            if entry is None or (room is not None and entry[2] > room):
                del queues[key]
                continue
            value, sample, tokens = entry
            if value in taken:  # the same text with other white space has another length
                continue
            taken.add(value)
            chosen.append((sample, tokens))
            by_prompt[prompt] += 1
            by_stratum[key] += 1
            room = None if room is None else room - tokens
        return chosen


def _hash(sample: Sample, seed: int) -> int:
    """64 bits of a hash that texts share if they are the same after normalization."""
    text = " ".join(unicodedata.normalize("NFKC", sample.text).casefold().split())
    data = json.dumps([seed, sample.prompt, text]).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def _batches(rows: Iterator[Sample]) -> Iterator[list[Sample]]:
    while batch := list(islice(rows, BATCH)):
        yield batch
