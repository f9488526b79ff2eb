"""A corpus embedded shard by shard: bounded memory, and no row lost or done twice.

    vectors/
      index.json      the job: model, input, options; where each shard's texts begin
      000000.npy      [rows, width], the vectors of the first texts
      000001.npy      …

A shard takes its name when it is complete, so what has a name after a crash is done, and the same
command goes on with the rest. Vectors stand in the order of the texts; blank lines have none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..adapter import CONFIG as ADAPTER_CONFIG
from ..adapter import WEIGHTS as ADAPTER_WEIGHTS
from ..corpus import Part, read_part, survey
from ..errors import InputError
from ..files import load_json, written
from ..integrity import record_files
from ..progress import progress_bar
from ..spec import Task
from .embedder import Embedder, check_options, resolve_prompt
from .facts import ModelFacts, choose_length, read_facts
from .vectors import IN_8_BITS, check_ranges, quantize_vectors

INDEX = "index.json"
FORMAT_VERSION = 2
# What tells an index of any version from another program's index.json.
OURS = frozenset({"format_version", "model_sha256", "shards"})
# Bytes of an index: of a billion texts.
MOST_INDEX = 64 << 20
SHARD = re.compile(r"\d{6,}\.npy")
# Texts that are sorted by length together; what a crash costs at most.
SHARD_ROWS = 2048
SHARD_BYTES = 4 << 20
# What makes vectors what they are: a job goes on only where these are equal.
FIXED = (
    "model_sha256",
    "input_sha256",
    "prompt",
    "max_length",
    "dim",
    "precision",
    "ranges",
    "shards",
)


@dataclass(frozen=True)
class Job:
    """Which texts to embed, how, and where their vectors go.

    Attributes:
        model: An embedding model, as `load` takes it.
        input: The texts, as `embedport.corpus` reads them.
        output: A folder.
        prompt: As of `Embedder.encode`, like the next three.
        dim: Leading values to keep.
        precision: Of the vectors.
        batch_tokens: Tokens of a batch at most; by default what keeps the device busy.
        device: As of `load`, like the next two.
        max_length: Tokens after which a text is cut.
        task: For a checkpoint whose files do not tell.
        adapter: To merge into the checkpoint's weights.
    """

    model: str
    input: Path
    output: Path
    prompt: str | None = None
    dim: int | None = None
    precision: str = "float32"
    batch_tokens: int | None = None
    device: str = "auto"
    max_length: int | None = None
    task: Task | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class Index:
    """index.json: what the vectors of a folder are.

    Attributes:
        model: The model's name.
        model_sha256: Of its files.
        input: The texts' file.
        input_bytes: Its size.
        input_sha256: Of its bytes.
        prompt: The text put before each text.
        max_length: Tokens after which a text was cut.
        dim: Values of a vector.
        precision: Of the vectors.
        ranges: sha256 of the ranges of 8-bit vectors; None for others.
        dtype: numpy's name of it.
        width: Columns of a shard: `dim`, or an eighth of it where a value is a bit.
        rows: Texts in all.
        shards: What each shard holds, in order; shard i is in `shard_name(i)`.
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
    ranges: str | None
    dtype: str
    width: int
    rows: int
    shards: tuple[Part, ...]
    complete: bool = False

    def to_json(self) -> str:
        """The text of index.json."""
        values = {"format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(values, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> Index:
        """Read index.json.

        Raises:
            InputError: It is damaged, or of another format version.
        """
        try:
            values = load_json(path, MOST_INDEX)
            version = values.pop("format_version")
            if version != FORMAT_VERSION or values.keys() != {each.name for each in fields(cls)}:
                raise ValueError(f"format version {version}")
            return cls(**values | {"shards": tuple(Part(**each) for each in values["shards"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} is not an index of this embedport ({error}); choose another folder"
            ) from error


Engine = Callable[[Job, Sequence[tuple[int, Part]], Callable[[int], None]], None]


def encode_corpus(job: Job, run: Engine, *, force: bool = False, progress: bool = False) -> Index:
    """Embed a corpus, or the rest of it.

    Args:
        job: What to do.
        run: Embeds shards, each a number and its texts' place, and tells how many rows are done:
            `run_here`, or another engine.
        force: Whether to begin anew where the folder holds vectors, of this job or another one.
        progress: Whether to show progress bars on a terminal.

    Raises:
        InputError: The job is wrong, or the folder holds something else.
    """
    index = plan(job, progress=progress)
    shards = list(enumerate(index.shards))
    with _as_input_error(job.output):
        _prepare(job.output, index, force)
        missing = [each for each in shards if not _is_done(job.output, index, *each)]
        if missing:  # an earlier run may have said that all are there
            _write_index(job.output, index.to_json())
    with progress_bar("Encoding", index.rows, enabled=progress) as advance:
        advance(index.rows - sum(part.rows for _, part in missing))
        if missing:
            run(job, missing, advance)
    with _as_input_error(job.output):
        lost = [shard_name(i) for i, part in shards if not _is_done(job.output, index, i, part)]
        if lost:
            raise InputError(f"{job.output}: {len(lost)} shards are missing, such as {lost[0]}")
        for partial in job.output.glob(".*.partial-*"):
            partial.unlink(missing_ok=True)
        index = replace(index, complete=True)
        _write_index(job.output, index.to_json())
    return index


def run_here(job: Job, shards: Sequence[tuple[int, Part]], advance: Callable[[int], None]) -> None:
    """The engine that runs in this process."""
    embedder = open_embedder(job)
    for number, part in shards:
        encode_shard(embedder, job, number, part, advance)


def open_embedder(job: Job) -> Embedder:
    """The job's model.

    Raises:
        InputError: It is a reranker.
    """
    from . import load

    embedder = load(
        job.model,
        device=job.device,
        max_length=job.max_length,
        task=job.task,
        adapter=job.adapter,
    )
    if not isinstance(embedder, Embedder):
        raise InputError(f"{job.model} is a reranker: it gives scores, not vectors")
    return embedder


def encode_shard(
    embedder: Embedder,
    job: Job,
    number: int,
    part: Part,
    advance: Callable[[int], None] = lambda rows: None,
) -> None:
    """Embed a shard's texts, and put it in place.

    Raises:
        InputError: A text cannot be embedded, or the shard cannot be written.
    """
    texts = read_part(job.input, part)
    try:
        vectors = embedder.encode(
            texts,
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
    with written(job.output / shard_name(number)) as file:
        np.save(file, vectors)


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"{number:06}.npy"


def plan(job: Job, *, progress: bool = False) -> Index:
    """What the job's folder will hold; no model is loaded for it.

    Raises:
        InputError: The model, an option or a text is wrong.
    """
    facts = read_facts(job.model, job.task, job.adapter)
    if facts.task != "embedding":
        raise InputError(f"{job.model} is a reranker: it gives scores, not vectors")
    check_options(facts.dim, job.dim, job.precision)
    dim = job.dim or facts.dim
    check_ranges(job.precision, dim, facts.ranges)
    empty = quantize_vectors(np.empty((0, dim), np.float32), job.precision, facts.ranges)
    prompt = resolve_prompt(facts.inputs, job.prompt)
    max_length = choose_length(facts, job.max_length)
    corpus = survey(job.input, SHARD_ROWS, SHARD_BYTES, progress=progress)
    return Index(
        model=facts.name,
        model_sha256=hash_model(facts),
        input=job.input.name,
        input_bytes=corpus.size,
        input_sha256=corpus.sha256,
        prompt=prompt,
        max_length=max_length,
        dim=dim,
        precision=job.precision,
        ranges=_sha256(json.dumps(facts.ranges)) if job.precision in IN_8_BITS else None,
        dtype=str(empty.dtype),
        width=empty.shape[1],
        rows=corpus.rows,
        shards=corpus.parts,
    )


def hash_model(facts: ModelFacts) -> str:
    """One sha256 for all files of a model that decide its vectors."""
    if facts.artifact is not None:
        records = dict(facts.artifact.manifest.files)
    else:
        assert facts.checkpoint is not None
        source = facts.checkpoint.source
        paths = [source.folder / "config.json", source.pipeline / "tokenizer.json"]
        paths += sorted(source.folder.glob("*.safetensors"))
        if source.adapter is not None:
            paths += [source.adapter.folder / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
        records = {path.name: record for path, record in record_files(paths).items()}
    return _sha256(json.dumps({name: record.sha256 for name, record in sorted(records.items())}))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _prepare(output: Path, index: Index, force: bool) -> None:
    """Make the folder, or make sure that it is this job's."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / INDEX
    if path.exists():
        if not force:
            _check_same(output, Index.from_json(path), index)
            return
        # The index stays the old vectors' until the last of them is gone: shards look alike.
        _write_index(output, json.dumps(_read_ours(path) | {"complete": False}))
        for shard in output.iterdir():
            if SHARD.fullmatch(shard.name):
                shard.unlink()
    elif any(not each.name.startswith(".") for each in output.iterdir()):
        raise InputError(f"{output} holds other files and no {INDEX}; choose another folder")


def _read_ours(path: Path) -> dict[str, Any]:
    """The values of an index.json of ours, of any version.

    Raises:
        InputError: It is another program's.
    """
    try:
        values = load_json(path, MOST_INDEX)
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict) or OURS - values.keys():
        raise InputError(f"{path} is another program's; choose another folder")
    return values


def _write_index(output: Path, text: str) -> None:
    with written(output / INDEX) as file:
        file.write(text.encode())


def _check_same(output: Path, found: Index, index: Index) -> None:
    for name in FIXED:
        old, new = getattr(found, name), getattr(index, name)
        if old != new:
            was = "another" if name == "shards" else f"{old!r}, and is {new!r} now"
            raise InputError(
                f"{output} holds vectors of another job, whose {name} was {was}; choose another "
                "folder, or begin anew with --force"
            )


def _is_done(output: Path, index: Index, number: int, part: Part) -> bool:
    """Whether a shard is there; a damaged one counts as missing, and is made again."""
    try:
        with (output / shard_name(number)).open("rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                return False
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            size = file.tell() + part.rows * index.width * dtype.itemsize
            return (
                shape == (part.rows, index.width)
                and str(dtype) == index.dtype
                and os.fstat(file.fileno()).st_size == size
            )
    except (FileNotFoundError, ValueError):
        return False


@contextlib.contextmanager
def _as_input_error(output: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error}") from error
