"""The witness: an artifact's results where it was exported, for comparison on any machine.

    witness.safetensors
      input_ids   int32 [tokens], the token ids of up to 16 texts or pairs, concatenated
      lengths     int32 [rows], the number of tokens of each
      queries     int32 [rows], the number of each row's query; for a reranker only
      results     float32 [rows, dim], vectors, or float32 [rows], scores
      metadata    "machine": the machine that computed them, a JSON object (`Machine`)

It holds token ids because it compares arithmetic only, without the tokenizer or the checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.pipeline import Inputs
from ..checkpoint.spec import Task
from ..errors import ArtifactError, require
from ..machine.cpu import read_cpu
from ..records import read_record
from ..strict_json import parse_json
from ..texts.prompts import EmbeddingTokenizer, RerankerTokenizer, resolve_prompt
from ..texts.samples import builtin_pairs, builtin_samples
from ..version import __version__

if TYPE_CHECKING:
    import numpy as np

WITNESS = "witness.safetensors"
# Built-in texts: five queries and eleven documents in English, Chinese, Arabic, Hindi and mixed
# languages: prose, a table and code. With Qwen3's tokenizer two rows have over 128 tokens, and all
# together 650, which take a 0.6B model half a second to two seconds.
SAMPLES = (0, 5, 7, 12, 17, 20, 21, 25, 35, 38, 40, 46, 50, 53, 56, 62)
# Built-in pairs: four queries (English, code, German, Chinese) with four documents each.
PAIRS = (0, 1, 3, 5, 6, 7, 9, 11, 24, 25, 26, 28, 30, 31, 33, 35)
# Maximum tokens of a text, and of a pair without the template. Rows longer than SHORT_ROW would
# more than double the time of the comparison, and of a large model's export.
MAX_TOKENS, MAX_BODY = 144, 96


@dataclass(frozen=True)
class Machine:
    """The machine that computed results.

    Attributes:
        cpu: The CPU's name.
        instructions: The CPU's instruction sets that affect results: see `read_cpu`.
        kernels: Instruction set of embedport's kernels that ran, "avx512", "avx2" or "neon"; None
            if only onnxruntime's operators ran.
        onnxruntime: Version of onnxruntime.
        embedport: Version of embedport.
    """

    cpu: str
    instructions: tuple[str, ...]
    kernels: str | None
    onnxruntime: str
    embedport: str

    def __str__(self) -> str:
        sets = ", ".join(self.instructions) or "instruction sets unknown"
        kernels = f"its kernels for {self.kernels}" if self.kernels else "without its kernels"
        return (
            f"{self.cpu} ({sets}); onnxruntime {self.onnxruntime}; embedport {self.embedport}, "
            f"{kernels}"
        )


@dataclass(frozen=True)
class Witness:
    """Rows of token ids, and their results.

    Attributes:
        rows: Token ids, int64 [tokens] each.
        queries: For a reranker, the number of each row's query; None for an embedder.
        results: float32 [rows, dim], vectors of unit length, or float32 [rows], scores.
        machine: The machine that computed the results.
    """

    rows: list[np.ndarray]
    queries: list[int] | None
    results: np.ndarray
    machine: Machine


def describe_machine(*, kernels: str | None) -> Machine:
    """Describe this machine.

    Args:
        kernels: Instruction set of embedport's kernels that run in the graph; None without them.

    Raises:
        MissingPackageError: onnxruntime is not installed.
    """
    cpu = read_cpu()
    version = require("onnxruntime", "cpu").__version__
    return Machine(cpu.name, cpu.instructions, kernels, version, __version__)


def choose_rows(
    folder: Path, task: Task, inputs: Inputs, max_length: int, vocab_size: int
) -> tuple[list[np.ndarray], list[int] | None]:
    """Tokenize the texts or pairs of a witness.

    Args:
        folder: The folder with tokenizer.json.
        task: The model's task.
        inputs: How inputs become tokens.
        max_length: Maximum tokens per row.
        vocab_size: Rows with an id outside the embedding table are left out.

    Returns:
        (rows, int64 [tokens] each; the number of each row's query, or None for an embedder).
    """
    path = folder / "tokenizer.json"
    if task == "reranker":
        pairs = [builtin_pairs()[i] for i in PAIRS]
        tokenizer = RerankerTokenizer(path, max_length, inputs)
        ids = tokenizer.encode([(pair.query, pair.document) for pair in pairs]).ids
        most, tail = MAX_TOKENS, 1
        if inputs.form == "instruct":
            tail = len(tokenizer.suffix)
            most = len(tokenizer.prefix) + MAX_BODY + tail
        numbers = {query: i for i, query in enumerate(dict.fromkeys(pair.query for pair in pairs))}
        numbered = [
            (_cut(row, most, tail), numbers[pair.query])
            for row, pair in zip(ids, pairs, strict=True)
            if row.max() < vocab_size
        ]
        return [row for row, _ in numbered], [query for _, query in numbered]
    samples = [builtin_samples()[i] for i in SAMPLES]
    embedding = EmbeddingTokenizer(path, min(max_length, MAX_TOKENS), inputs)
    rows = [
        embedding.encode([sample.text], resolve_prompt(inputs, sample.prompt)).ids[0]
        for sample in samples
    ]
    return [row for row in rows if row.max() < vocab_size], None


def _cut(ids: np.ndarray, most: int, tail: int) -> np.ndarray:
    """Cut a row to `most` ids, and keep its last `tail` ids."""
    import numpy as np

    return ids if len(ids) <= most else np.concatenate([ids[: most - tail], ids[-tail:]])


def write_witness(path: Path, witness: Witness) -> None:
    """Write a witness.

    Raises:
        OSError: The file cannot be written.
    """
    import numpy as np
    from safetensors.numpy import save

    tensors = {
        "input_ids": np.concatenate(witness.rows).astype(np.int32),
        "lengths": np.array([len(row) for row in witness.rows], np.int32),
        "results": np.ascontiguousarray(witness.results, np.float32),
    }
    if witness.queries is not None:
        tensors["queries"] = np.array(witness.queries, np.int32)
    path.write_bytes(save(tensors, {"machine": json.dumps(asdict(witness.machine))}))


def read_witness(path: Path) -> Witness:
    """Read a witness.

    Raises:
        ArtifactError: The file is missing, damaged, or not a witness.
    """
    import numpy as np
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            machine = read_record(Machine, parse_json(file.metadata()["machine"]))
        for name, tensor in tensors.items():
            kinds, rank = ("f", (1, 2)) if name == "results" else ("iu", (1,))
            if tensor.dtype.kind not in kinds or tensor.ndim not in rank:
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
        ends = np.cumsum(tensors["lengths"])
        rows = np.split(tensors["input_ids"].astype(np.int64), ends[:-1])
        queries = tensors["queries"].tolist() if "queries" in tensors else None
        witness = Witness(rows, queries, tensors["results"], machine)
        sizes = {len(rows), len(witness.results), len(rows if queries is None else queries)}
        if len(sizes) != 1 or ends[-1] != len(tensors["input_ids"]) or tensors["lengths"].min() < 1:
            raise ValueError("its rows, lengths and results do not go together")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ArtifactError(f"{path} is not a witness: {error!r}; export it again") from error
    return witness
