"""Embed a corpus shard by shard, in bounded memory; an interrupted job can be resumed.

    vectors/
      index.json      the job: model, input, options; where each shard's texts begin
      000000.npy      [rows, width], the vectors of the first texts
      000001.npy      …

A shard in Parquet has ids and perhaps texts beside its vectors. Input and output may be in an
object store: see `embedport.storage`.

A shard file gets its name only when it is complete. After a crash, every named shard is done, and
the same command continues with the rest: no row is lost or written twice. Vectors are in the order
of the texts; blank lines have none.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.spec import Task
from ..errors import InputError, require
from ..files import check_name
from ..leftovers import lock
from ..progress import progress_bar
from ..storage import ObjectPath, Place, open_to_read, writing
from ..strict_json import load_json, parse_json
from ..texts.corpus import Part
from ..texts.text_files import read_part, survey
from .embedder import Embedder, check_options, resolve_prompt
from .info import ModelInfo, choose_length, hash_json, hash_model, read_info
from .loading import load
from .shards import SHARD_FORMATS, has_size, is_complete, write_shard
from .vectors import CODECS, IN_8_BITS, quantize_vectors

logger = logging.getLogger(__name__)

INDEX = "index.json"
FORMAT_VERSION = 4
# An index of version 3 is one of version 4 with the first codec.
EARLIER_VERSION = 3
# Keys that identify our index.json, of any version, among other programs'.
OURS = frozenset({"format_version", "model_sha256", "shards"})
# Maximum bytes of an index: enough for a billion texts.
MOST_INDEX = 64 << 20
SHARD = re.compile(r"\d{6,}\.(npy|parquet)")
# Maximum texts and bytes of a shard. A shard's texts are sorted by length together; a crash costs
# at most one shard.
SHARD_ROWS = 2048
SHARD_BYTES = 4 << 20
# The fields that determine the vectors: a job resumes only if all of these are equal.
FIXED = (
    "model_sha256",
    "input_sha256",
    "prompt",
    "max_length",
    "dim",
    "precision",
    "codec",
    "ranges",
    "format",
    "with_text",
    "shards",
)


@dataclass(frozen=True)
class Job:
    """Which texts to embed, how, and where their vectors go.

    Attributes:
        model: An embedding model, as for `load`.
        input: The file of texts, as `embedport.texts.text_files` reads it.
        output: The folder for the vectors.
        format: The shards' format, "npy" or "parquet".
        with_text: Whether Parquet shards have the texts, too.
        prompt: As for `Embedder.encode`.
        dim: As for `Embedder.encode`.
        precision: As for `Embedder.encode`.
        batch_tokens: As for `Embedder.encode`.
        device: As for `load`.
        max_length: As for `load`.
        task: As for `load`.
        adapter: As for `load`.
        planned: Hashes of the model's files and of its ranges, if they count, as the index has
            them; `encode_corpus` adds them.
    """

    model: str
    input: Place
    output: Place
    format: str = "npy"
    with_text: bool = False
    prompt: str | None = None
    dim: int | None = None
    precision: str = "float32"
    batch_tokens: int | None = None
    device: str = "auto"
    max_length: int | None = None
    task: Task | None = None
    adapter: str | None = None
    planned: tuple[str, str | None] | None = None


@dataclass(frozen=True)
class Index:
    """index.json: the description of a folder of vectors.

    Attributes:
        model: The model's name.
        model_sha256: Hash of the model's files, from `hash_model`.
        input: Name of the file of texts.
        input_bytes: Its size.
        input_sha256: Its sha256.
        prompt: The text put before each text.
        max_length: Maximum tokens of a text; longer ones were cut.
        dim: Values of a vector.
        precision: The vectors' format, as for `Embedder.encode`.
        codec: The version of its codes, from `vectors.CODECS`.
        ranges: sha256 of the ranges of 8-bit vectors; None for other formats.
        dtype: numpy's name of the shards' dtype.
        width: Columns of a shard: `dim`, or ceil(dim / 8) with one bit per value.
        rows: Total number of texts.
        format: The shards' format, "npy" or "parquet".
        with_text: Whether Parquet shards have the texts, too.
        shards: Each shard's part of the texts, in order; shard i is in `shard_name(i, format)`.
        complete: Whether all shards are there.
    """

    model: str
    model_sha256: str
    input: str
    input_bytes: int
    input_sha256: str
    prompt: str
    max_length: int
    dim: int
    precision: str
    codec: int
    ranges: str | None
    dtype: str
    width: int
    rows: int
    format: str
    with_text: bool
    shards: tuple[Part, ...]
    complete: bool = False

    def to_json(self) -> str:
        """The text of index.json."""
        values = {"format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(values, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, path: Place) -> Index:
        """Read index.json.

        Raises:
            InputError: It is damaged, or has another format version.
        """
        try:
            values = _load(path)
            version = values.pop("format_version")
            if version == EARLIER_VERSION:
                version = FORMAT_VERSION
                values.setdefault("codec", 1)
            if version != FORMAT_VERSION or values.keys() != {field.name for field in fields(cls)}:
                raise ValueError(f"format version {version}")
            return cls(**values | {"shards": tuple(Part(**part) for part in values["shards"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} is not an index of this embedport ({error}); choose another folder"
            ) from error


Engine = Callable[[Job, Sequence[tuple[int, Part]], Callable[[int], None]], None]


def encode_corpus(job: Job, run: Engine, *, force: bool = False, progress: bool = False) -> Index:
    """Embed a corpus, or the rest of an interrupted job.

    Args:
        job: The job.
        run: The engine: embeds shards, each given as (number, part of the texts), and calls a
            function with the number of rows just done. `run_here` is one.
        force: Whether to start over if the folder already holds vectors, of this or another job.
        progress: Whether to show progress bars on a terminal.

    Raises:
        InputError: The job is invalid, or the folder holds something else.
    """
    with _as_input_error(job.output):
        if isinstance(job.output, Path) and job.output.exists() and not job.output.is_dir():
            raise InputError(
                f"{job.output} is a file, and shards go into a folder: choose another name, or, "
                "for one file, a name that ends with .npy, .jsonl, .parquet or .arrow"
            )
    index = plan(job, progress=progress)
    with _alone(job.output):
        planned = index.model_sha256, index.ranges
        return _encode(replace(job, planned=planned), index, run, force, progress)


def _encode(job: Job, index: Index, run: Engine, force: bool, progress: bool) -> Index:
    with _as_input_error(job.output):
        _prepare(job.output, index, force)
        missing = _missing(job.output, index)
        if missing:  # the index of an earlier run may say that all are there
            _write_index(job.output, index.to_json())
    with progress_bar("Encoding", index.rows, enabled=progress) as advance:
        advance(index.rows - sum(part.rows for _, part in missing))
        if missing:
            try:
                run(job, missing, advance)
            except KeyboardInterrupt:
                logger.warning(
                    "%s keeps the shards that are finished: the same command goes on from there",
                    job.output,
                )
                raise
    with _as_input_error(job.output):
        if missing := _missing(job.output, index):
            name = shard_name(missing[0][0], index.format)
            raise InputError(f"{job.output}: {len(missing)} shards are missing, such as {name}")
        if isinstance(job.output, Path):
            for partial in job.output.glob(".*.partial-*"):
                partial.unlink(missing_ok=True)
        index = replace(index, complete=True)
        _write_index(job.output, index.to_json())
    return index


def run_here(job: Job, shards: Sequence[tuple[int, Part]], advance: Callable[[int], None]) -> None:
    """The engine that embeds shards in this process."""
    embedder = open_embedder(job)
    for number, part in shards:
        encode_shard(embedder, job, number, part, advance)


def open_embedder(job: Job) -> Embedder:
    """Load the job's model, which `plan` has found to be an embedder."""
    embedder = load(
        job.model,
        device=job.device,
        max_length=job.max_length,
        task=job.task,
        adapter=job.adapter,
    )
    assert isinstance(embedder, Embedder)
    info = embedder.info
    if job.planned not in (None, (hash_model(info), _hash_ranges(info, job.precision))):
        raise InputError(
            f"{job.model} holds other files or ranges than when the job was planned: all machines "
            "must see one model, and it must stay as it is; the same command says whether the job "
            "can go on"
        )
    return embedder


def encode_shard(
    embedder: Embedder,
    job: Job,
    number: int,
    part: Part,
    advance: Callable[[int], None] = lambda rows: None,
) -> None:
    """Embed a shard's texts, and write the shard's file.

    Raises:
        InputError: A text cannot be embedded, or the shard cannot be written.
    """
    rows = read_part(job.input, part)
    try:
        vectors = embedder.encode(
            [row.text for row in rows],
            prompt=job.prompt,
            dim=job.dim,
            precision=job.precision,
            batch_tokens=job.batch_tokens,
            progress=advance,
            first=part.first,
        )
    except InputError as error:
        raise InputError(
            f"{job.input}, {part.rows} texts from line {part.line}: {error}"
        ) from error
    with writing(job.output / shard_name(number, job.format)) as file:
        write_shard(file, job.format, rows, vectors, with_text=job.with_text)


def shard_name(number: int, form: str) -> str:
    """A shard's file name."""
    return f"{number:06}.{form}"


def plan(job: Job, *, progress: bool = False) -> Index:
    """Make the index of a job's folder, without loading the model's weights.

    Raises:
        InputError: The model, an option or a text is invalid.
    """
    info = read_info(job.model, job.task, job.adapter)
    if info.task != "embedding":
        raise InputError(f"{job.model} is a reranker: it gives scores, not vectors")
    check_options(info.dim, job.dim, job.precision)
    if job.format not in SHARD_FORMATS:
        raise InputError(
            f"format should be one of {', '.join(SHARD_FORMATS)}, found {job.format!r}"
        )
    if job.format == "parquet":
        require("pyarrow", "arrow")
    elif job.with_text:
        raise InputError("texts are written beside vectors in Parquet only: `format` parquet")
    for name in (info.name, job.input.name):
        check_name(name)
    dim = info.dim if job.dim is None else int(job.dim)
    empty = quantize_vectors(np.empty((0, dim), np.float32), job.precision, info.ranges)
    prompt = resolve_prompt(info.inputs, job.prompt)
    max_length = choose_length(info, job.max_length)
    corpus = survey(job.input, SHARD_ROWS, SHARD_BYTES, prompt=job.prompt, progress=progress)
    return Index(
        model=info.name,
        model_sha256=hash_model(info),
        input=job.input.name,
        input_bytes=corpus.size,
        input_sha256=corpus.sha256,
        prompt=prompt,
        max_length=max_length,
        dim=dim,
        precision=job.precision,
        codec=CODECS[job.precision],
        ranges=_hash_ranges(info, job.precision),
        dtype=str(empty.dtype),
        width=empty.shape[1],
        rows=corpus.rows,
        format=job.format,
        with_text=job.with_text,
        shards=corpus.parts,
    )


def _hash_ranges(info: ModelInfo, precision: str) -> str | None:
    """A hash of the ranges that vectors of this precision depend on."""
    return hash_json(info.ranges) if precision in IN_8_BITS else None


@contextlib.contextmanager
def _alone(output: Place) -> Generator[None]:
    """Create the output folder, and keep other runs out of it until the block ends.

    Shards of different jobs look alike: two that begin in one folder would mix them. An object
    store has no locks.

    Raises:
        InputError: Another run writes into the folder, or it cannot be created.
    """
    descriptor = None
    with _as_input_error(output):
        output.mkdir(parents=True, exist_ok=True)
        if isinstance(output, Path):
            try:
                descriptor = lock(output)
            except BlockingIOError:
                raise InputError(
                    f"another run writes into {output}: wait for it to end, or choose another "
                    "folder"
                ) from None
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _prepare(output: Place, index: Index, force: bool) -> None:
    """Check that the output folder belongs to this job."""
    path = output / INDEX
    if path.exists():
        if not force:
            _check_same(output, Index.from_json(path), index)
            return
        # Keep the old index until all old shards are deleted: shards of different jobs look alike.
        _write_index(output, json.dumps(_read_ours(path) | {"complete": False}))
        for name in _names(output):
            if SHARD.fullmatch(name):
                (output / name).unlink()
    elif any(not name.startswith(".") for name in _names(output)):
        raise InputError(f"{output} holds other files and no {INDEX}; choose another folder")


def _names(folder: Place) -> list[str]:
    if isinstance(folder, ObjectPath):
        return list(folder.sizes())
    return [entry.name for entry in folder.iterdir()]


def _load(path: Place) -> Any:
    if isinstance(path, Path):
        return load_json(path, MOST_INDEX)
    with open_to_read(path) as file:
        return parse_json(file.read(MOST_INDEX).decode("utf-8"))


def _read_ours(path: Place) -> dict[str, Any]:
    """Read our index.json, of any version.

    Raises:
        InputError: It belongs to another program.
    """
    try:
        values = _load(path)
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict) or OURS - values.keys():
        raise InputError(f"{path} is another program's; choose another folder")
    return values


def _write_index(output: Place, text: str) -> None:
    with writing(output / INDEX) as file:
        file.write(text.encode())


def _check_same(output: Place, existing: Index, index: Index) -> None:
    for name in FIXED:
        old, new = getattr(existing, name), getattr(index, name)
        if old != new:
            was = "another" if name == "shards" else f"{old!r}, and is {new!r} now"
            raise InputError(
                f"{output} holds vectors of another job, whose {name} was {was}; choose another "
                "folder, or begin anew with `force`"
            )


def _missing(output: Place, index: Index) -> list[tuple[int, Part]]:
    """The shards that are not there, or damaged: these are embedded again."""
    sizes = output.sizes() if isinstance(output, ObjectPath) else {}

    def is_there(number: int, part: Part) -> bool:
        name = shard_name(number, index.format)
        form = (index.format, part, index.width, index.dtype)
        if isinstance(output, ObjectPath):
            return has_size(sizes.get(name, 0), *form)
        return is_complete(output / name, *form)

    return [shard for shard in enumerate(index.shards) if not is_there(*shard)]


@contextlib.contextmanager
def _as_input_error(output: Place) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error}") from error
