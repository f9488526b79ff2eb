"""A recorded reference's file: written, and read with every part checked.

The file is safetensors: reading it executes no code, and a truncated file is detected at once.
Tensors hold token ids ("ids", "lengths"), results ("results.fp32"), the retrieval quality query by
query ("retrieval.fp32.256.nDCG@10"), the hidden states of a few texts ("layers.states"), a sketch
of the embedding table ("table.products"), the norms and other tensors that are not rounded
("plain.norm.weight"), and the token ids of texts that tell tokenizers apart ("probes.ids"). The
rest is one JSON text in the metadata: the inputs, the origin, including the weight files' hashes,
and the settings that the library read. Early versions wrote neither a sketch nor settings nor those
texts, and later ones no tensors and no settings of layers and tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..checkpoint.spec import Task
from ..errors import InputError
from ..files import written
from ..records import read_record
from ..strict_json import parse_json
from ..texts.samples import Pair, Sample
from .probes import Probes
from .recorded import Layers, RecordedReference, SetRecord
from .reference import Arithmetic, Origin
from .retrieval import EMBEDDER_MEASURES, RERANKER_MEASURES, SetQuality
from .settings import LAYERS, TOKENIZER, Settings
from .table import DIRECTIONS, TableSketch
from .tensors import Tensors

FORMAT_VERSION = 1
KEY = "embedport_reference"
# Before the name of a tensor that is not rounded to few bits.
PLAIN = "plain."
# Largest metadata, in characters; safetensors reads headers of at most 100 MB.
LARGEST = 20_000_000


def is_recorded(reference: str | Path) -> bool:
    """Whether a reference is a recorded file, not a checkpoint's folder or hub id."""
    try:
        return Path(reference).expanduser().is_file()
    except (OSError, RuntimeError):  # a name too long, or another user's folder: no file
        return False


def write_recorded(reference: RecordedReference) -> None:
    """Write the file; it gets its name only once it is complete.

    Raises:
        InputError: It cannot be written.
    """
    tensors = {**_packed("", reference.rows), **_packed("layers.", reference.layers.rows)}
    tensors["layers.states"] = reference.layers.states
    tensors["layers.norm"] = reference.layers.norm
    probes, sketch = reference.probes, reference.sketch
    if sketch is not None:
        tensors |= {f"table.{name}": tensor for name, tensor in vars(sketch).items()}
    tensors |= {f"{PLAIN}{name}": tensor for name, tensor in (reference.plain or {}).items()}
    if probes is not None:
        tensors |= _packed("probes.", probes.rows)
    for arithmetic, results in reference.results.items():
        tensors[f"results.{arithmetic}"] = results
    for arithmetic, quality in reference.qualities.items():
        prefix = f"retrieval.{arithmetic}"
        for dim, measures in quality.measures.items():
            for name, values in measures.items():
                tensors[f"{prefix}.{dim}.{name}"] = values
        tensors[f"{prefix}.lost"] = quality.lost
        tensors[f"{prefix}.lost_documents"] = np.array([quality.lost_documents])
        tensors[f"{prefix}.varies"] = quality.varies
    values = {
        "format_version": FORMAT_VERSION,
        "origin": asdict(reference.origin),
        "max_length": reference.max_length,
        "arithmetics": list(reference.results),
        "inputs": [list(asdict(given).values()) for given in reference.inputs],
        "retrieval": reference.data and asdict(reference.data),
        "settings": reference.declared,
        "probes": probes
        and {
            "inputs": [list(asdict(given).values()) for given in probes.inputs],
            "added": list(probes.added),
        },
    }
    text = json.dumps(values, ensure_ascii=False)
    if len(text) > LARGEST:
        raise InputError(
            f"the texts of {reference.path} have {len(text):,} characters, and a recorded "
            f"reference holds {LARGEST:,}: record fewer texts"
        )
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    with written(reference.path) as file:
        file.write(save(contiguous, metadata={KEY: text}))


def open_recorded(path: str | Path, task: Task, max_length: int) -> RecordedReference:
    """Read a recorded reference for an artifact.

    Args:
        path: The file.
        task: The artifact's task.
        max_length: Tokens after which the artifact cuts an input.

    Raises:
        InputError: The file is damaged, has another format version or is no recorded reference; its
            task differs; or it cuts inputs at another length than the artifact.
    """
    reference = read_recorded(path)
    if reference.origin.task != task:
        raise InputError(
            f"{path} was recorded from {reference.origin.id}, whose task is "
            f"{reference.origin.task}; the artifact's task is {task}"
        )
    longest = max(map(len, reference.rows))
    if max_length != reference.max_length and longest >= min(max_length, reference.max_length):
        raise InputError(
            f"{path} was recorded with inputs cut to {reference.max_length:,} tokens, and the "
            f"artifact cuts them to {max_length:,}: record it with `max_length` {max_length}"
        )
    return reference


def read_recorded(path: str | Path) -> RecordedReference:
    """Read a recorded reference.

    Raises:
        InputError: The file is damaged, has another format version or is no recorded reference.
    """
    path = Path(path).expanduser()
    with _opened(path) as file:
        try:
            values = parse_json((file.metadata() or {})[KEY])
            version = values["format_version"]
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"{path} is safetensors, and not a recorded reference: its metadata should hold "
                f"{KEY} ({error!r}); `embedport reference` writes one"
            ) from error
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path} has format version {version!r}, and this embedport reads "
                f"{FORMAT_VERSION}: record the reference again"
            )
        try:
            return _Reader(path, file).read(values)
        except (KeyError, ValueError, TypeError, AttributeError, SafetensorError) as error:
            raise InputError(
                f"{path} is damaged ({type(error).__name__}: {error}); record the reference again"
            ) from error


@contextmanager
def _opened(path: Path) -> Generator[Any]:
    try:
        file = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is not a whole recorded reference ({error}); record it again or copy it "
            "again, or give the original checkpoint's folder"
        ) from error
    with file:
        yield file


class _Reader:
    """Reads and checks the parts of a file; raises ValueError naming the wrong part."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self.file = path, file

    def read(self, values: Mapping[str, Any]) -> RecordedReference:
        origin = read_record(Origin, values["origin"], "origin")
        arithmetics = values["arithmetics"]
        if not arithmetics or not set(arithmetics) <= set(get_args(Arithmetic)):
            raise ValueError(
                f"arithmetics should be some of fp16, bf16, fp32, found {arithmetics!r}"
            )
        read_input = _read_pair if origin.task == "reranker" else _read_sample
        inputs = [read_input(*strings) for strings in values["inputs"]]
        count = len(inputs)
        rows = [row.tolist() for row in self._rows("", count)]
        layer_rows = self._rows("layers.", None)
        tokens, hidden = sum(map(len, layer_rows)), origin.hidden_size
        # A reranker has one number per input.
        shape = (count,) if origin.task == "reranker" else (count, None)
        data, qualities = None, {}
        if values["retrieval"] is not None:
            data = read_record(SetRecord, values["retrieval"], "retrieval")
            qualities = {name: self._quality(name, data, origin.task) for name in arithmetics}
        declared = values.get("settings")
        return RecordedReference(
            path=self.path,
            origin=origin,
            max_length=_whole(values["max_length"]),
            inputs=inputs,
            rows=rows,
            results={
                name: self._tensor(f"results.{name}", np.float32, shape) for name in arithmetics
            },
            layers=Layers(
                layer_rows,
                self._tensor("layers.states", np.float32, (None, tokens, hidden)),
                self._tensor("layers.norm", np.float32, (hidden,)),
            ),
            data=data,
            qualities=qualities,
            probes=self._probes(values.get("probes"), read_input),
            declared=None if declared is None else _read_settings(declared),
            sketch=self._sketch(origin),
            plain=self._plain() or None,
        )

    def _probes(
        self, values: Mapping[str, Any] | None, read_input: Callable[..., Sample | Pair]
    ) -> Probes | None:
        if values is None:
            return None
        inputs = [read_input(*strings) for strings in values["inputs"]]
        rows = [row.tolist() for row in self._rows("probes.", len(inputs))]
        return Probes(inputs, rows, [_text(name) for name in values["added"]])

    def _sketch(self, origin: Origin) -> TableSketch | None:
        if "table.products" not in self.file.keys():  # noqa: SIM118 (not a dict)
            return None
        return TableSketch(
            self._tensor("table.directions", np.float32, (origin.hidden_size, DIRECTIONS)),
            self._tensor("table.products", np.float16, (origin.vocab_size, DIRECTIONS)),
            self._tensor("table.lengths", np.float32, (origin.vocab_size,)),
        )

    def _plain(self) -> Tensors:
        return {
            name.removeprefix(PLAIN): self._tensor(name, np.float32, None)
            for name in self.file.keys()  # noqa: SIM118 (not a dict)
            if name.startswith(PLAIN)
        }

    def _rows(self, prefix: str, count: int | None) -> list[np.ndarray]:
        lengths = self._tensor(f"{prefix}lengths", np.int32, (count,))
        if not len(lengths) or lengths.min() < 1:
            raise ValueError(f"{prefix}lengths should be 1 or more, found {lengths}")
        ids = self._tensor(f"{prefix}ids", np.int32, (int(lengths.sum(dtype=np.int64)),))
        return np.split(ids.astype(np.int64), np.cumsum(lengths)[:-1])

    def _quality(self, arithmetic: str, data: SetRecord, task: Task) -> SetQuality:
        prefix, queries = f"retrieval.{arithmetic}.", len(data.queries)
        measures: dict[int, dict[str, np.ndarray]] = {}
        for name in self.file.keys():  # noqa: SIM118 (not a dict)
            dim, _, measure = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and measure:
                values = self._tensor(name, np.float64, (queries,))
                measures.setdefault(int(dim), {})[measure] = values
        names = RERANKER_MEASURES if task == "reranker" else EMBEDDER_MEASURES
        for dim, values_by_name in measures.items():
            if values_by_name.keys() != set(names):
                raise ValueError(f"{prefix}{dim} should have {', '.join(names)}")
        return SetQuality(
            dict(sorted(measures.items(), reverse=True)),
            self._tensor(f"{prefix}lost", np.int64, (queries,)),
            int(self._tensor(f"{prefix}lost_documents", np.int64, (1,))[0]),
            self._tensor(f"{prefix}varies", np.bool_, (queries,)),
        )

    def _tensor(self, name: str, dtype: Any, shape: tuple[int | None, ...] | None) -> np.ndarray:
        """A tensor of the file; a shape of None is any."""
        tensor = self.file.get_tensor(name)
        shape = tensor.shape if shape is None else shape
        fits = len(tensor.shape) == len(shape) and all(
            expected in (None, size) for expected, size in zip(shape, tensor.shape, strict=True)
        )
        if tensor.dtype != dtype or not fits:
            raise ValueError(
                f"tensor {name} should be {np.dtype(dtype)} {list(shape)}, found {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
        return tensor


def _read_sample(text: Any, prompt: Any) -> Sample:
    return Sample(_text(text), None if prompt is None else _text(prompt))


def _read_pair(query: Any, document: Any, instruction: Any = None) -> Pair:
    instruction = None if instruction is None else _text(instruction)
    return Pair(_text(query), _text(document), instruction)


def _read_settings(values: Mapping[str, Any]) -> Settings:
    _whole(values["positions"])
    if "max_length" in values:  # early versions did not record it
        _whole(values["max_length"])
    for name, prompt in values.get("prompts", {}).items():
        _text(name), _text(prompt)
    for group in (LAYERS, TOKENIZER):  # early versions did not record these either
        if not isinstance(values.get(group, {}), dict):
            raise ValueError(f"{group} should be an object, found {values[group]!r}")
    return values


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a string, found {value!r}")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"expected a whole number above 0, found {value!r}")
    return value


def _packed(prefix: str, rows: Sequence[Sequence[int] | np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of token ids as tensors: one array of all ids, and the rows' lengths."""
    return {
        f"{prefix}ids": np.concatenate([np.asarray(row, np.int32) for row in rows]),
        f"{prefix}lengths": np.array([len(row) for row in rows], np.int32),
    }
