"""The embedding table, all of it: validated texts hold a few thousand of its 150,000 rows.

Each row is multiplied by a few random directions, and its products and length are compared with the
reference's: the difference of two rows' products is about as long as that of the rows. A recorded
reference holds the products. For a table in a rotated basis the directions are rotated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..artifact.folder import Artifact
from ..artifact.segments import EMBEDDING, ROTATION, emulate_16_bits, segments
from ..checkpoint.lora import open_floats
from ..checkpoint.spec import ModelSpec
from ..errors import ArtifactError
from ..quantize.formats import TABLE
from ..quantize.hadamard import Rotation
from ..runtimes import ModelInfo
from ..runtimes.part_session import open_session
from .graphs import F32
from .report import EXCERPT, Gate, unchecked

# Gives rows of a table, float32 [rows, hidden_size].
ReadRows = Callable[[slice], np.ndarray]

GATE = "embedding rows that differ"
DIRECTIONS = 32
# Values of a table in memory at a time.
CHUNK = 1 << 21
# How far a row may be from the reference's, in that one's length, by the table's format. Rounding
# moves rows with outliers by 0.29 at most in 4 bits, 0.033 in 8 bits, 0.004 in bf16; rows that are
# zeroed or doubled are off by 1, negated ones by 2, exchanged ones by about 1.4.
LIMITS = {"int4": 0.5, "int8": 0.1}
FLOAT_LIMIT = 0.01
# Half the distance of the smallest fp16 numbers: tiny values may be rounded to zero.
SMALLEST = 2.0**-25
# The part of the validated texts' tokens whose rows all differ in another basis.
OTHER_BASIS = 0.9
# The operator that looks up rows in OpenVINO's format, but for its number.
LOOKUP = f"{EMBEDDING}/Gather"
# Rows that are compared with each other, those with the largest errors.
FARTHEST = 512
# The part of a row's distance from its own place at which another row's is much closer.
CLOSER = 0.7
# Rows that the gate names.
NAMED = 10


@dataclass(frozen=True)
class TableSketch:
    """A reference's embedding table, reduced to what recognizes its rows.

    Attributes:
        directions: float32 [hidden_size, directions].
        products: Each row, divided by its length, times the directions: float16
            [vocab_size, directions]; 0 for a row of zeros.
        lengths: The rows' lengths, float32 [vocab_size].
    """

    directions: np.ndarray
    products: np.ndarray
    lengths: np.ndarray


def sketch_table(spec: ModelSpec) -> TableSketch:
    """Read a reference's embedding table, with its adapter if it has one, and sketch it."""
    return sketch_rows(_checkpoint_rows(spec), spec.vocab_size, spec.hidden_size)


def sketch_rows(read: ReadRows, count: int, width: int) -> TableSketch:
    """Sketch a table of `count` rows."""
    generator = np.random.default_rng(0)
    directions = generator.standard_normal((width, DIRECTIONS), np.float32)
    directions /= np.float32(DIRECTIONS**0.5)
    products = np.empty((count, DIRECTIONS), np.float16)
    lengths = np.empty(count, np.float32)
    for rows in _chunks(count, width):
        lengths[rows], units = _units(read(rows))
        products[rows] = units @ directions
    return TableSketch(directions, products, lengths)


def table_gate(
    info: ModelInfo, sketch: TableSketch | None, tokenizer: Any, validated: Sequence[np.ndarray]
) -> Gate:
    """No token's row is farther from the reference's than its format explains.

    A table may be in a basis that is not known, as other tools write it. Then the rows of the
    validated texts' tokens differ like all others, and it is the texts' results that judge them.

    Args:
        info: The artifact, or the checkpoint.
        sketch: The reference's table; None if it is not known.
        tokenizer: The artifact's `tokenizers.Tokenizer`, for the names of rows.
        validated: Token ids of the validated texts, int64 [tokens] each.

    Raises:
        ArtifactError: A graph cannot look up all of its tokens.
    """
    if sketch is None:
        return unchecked(GATE, "this recorded reference has no embedding table: record it again")
    recipe = (info.artifact.manifest.recipe if info.artifact else None) or {}
    limit = LIMITS.get(str(recipe.get("formats", {}).get(TABLE))[:4], FLOAT_LIMIT)
    errors = np.zeros(len(sketch.lengths))
    if info.checkpoint is not None:
        errors = _errors(_checkpoint_rows(info.checkpoint), sketch, sketch.directions)
    else:
        assert info.artifact is not None
        tables = _graph_tables(info.artifact)
        if tables is None:
            return unchecked(GATE, f"a graph has no part of its own named {EMBEDDING}")
        for read, has_rotation in tables:
            is_rotated = has_rotation or recipe.get("rotate")
            directions = _rotated(sketch, recipe) if is_rotated else sketch.directions
            errors = np.maximum(errors, _errors(read, sketch, directions))
    # A comparison with NaN is false: it is no row within the limit.
    is_wrong = ~(errors <= limit)
    tokens = np.unique(np.concatenate(validated)).astype(np.intp)
    if is_wrong[tokens].mean() > OTHER_BASIS:
        return unchecked(GATE, "the table is in another basis, the rows of the texts' tokens too")
    wrong = np.flatnonzero(is_wrong)
    return Gate(GATE, len(wrong), "≤", 0, _name_rows(wrong, errors, tokenizer))


def _name_rows(rows: np.ndarray, errors: np.ndarray, tokenizer: Any) -> str:
    """The first rows' token ids with their texts, and how far off each is."""
    named = [
        f"{row} {tokenizer.decode([row], skip_special_tokens=False)[:EXCERPT]!r} "
        + (
            "(exchanged with another)"
            if errors[row] == np.inf
            else f"(off by about {errors[row]:.1g} of its length)"
        )
        for row in rows[:NAMED].tolist()
    ]
    rest = len(rows) - len(named)
    return ", ".join(named) + (f" and {rest:,} more" if rest else "")


def _checkpoint_rows(spec: ModelSpec) -> ReadRows:
    """Reads the rows of a checkpoint; no format of a quantized one quantizes its table."""
    name = f"{TABLE}.weight"
    weights = open_floats(spec, [name])
    return lambda rows: weights.read_fp32(name, rows)


def _graph_tables(artifact: Artifact) -> list[tuple[ReadRows, bool]] | None:
    """Each distinct table of an artifact's graphs, and whether the graph says it is rotated.

    OpenVINO's is among them where openvino is installed.

    Graphs have their weights in one file, and usually at the same place.

    Returns:
        None if no part of a graph turns token ids into rows and does nothing else.
    """
    graph = artifact.manifest.graph
    assert graph is not None
    seen, tables = [], []
    for name in graph.paths:
        path = artifact.folder / name
        model = ir.load(path)
        is_rotated = ROTATION in model.graph.initializers
        emulate_16_bits(model)
        part = next((part for scope, part in segments(model) if scope == EMBEDDING), None)
        if part is None or len(part.graph.inputs) != 1 or len(part.graph.outputs) != 1:
            return None
        places = _places(part)
        if places not in seen:
            seen.append(places)
            tables.append((_graph_rows(part, artifact, path), is_rotated))
    openvino = None if graph.shared is None else graph.shared.openvino
    if openvino is not None and find_spec("openvino") is not None:
        tables.append((_openvino_rows(artifact.folder / openvino), False))
    return tables


def _places(part: ir.Model) -> list[tuple[Any, ...]]:
    """Where the weights of a graph's part are in its data file."""
    return sorted(
        (name, str(value.location), value.offset, value.length)
        for name, initializer in part.graph.initializers.items()
        if isinstance(value := initializer.const_value, ir.ExternalTensor)
    )


def _graph_rows(part: ir.Model, artifact: Artifact, path: Any) -> ReadRows:
    """Reads the rows that a graph looks up, as it runs."""
    session = open_session(part, path.parent, pack=False, artifact=artifact)
    (name,) = (value.name for value in session.get_inputs())

    def read(rows: slice) -> np.ndarray:
        ids = np.arange(rows.start, rows.stop, dtype=np.int64)
        try:
            (states,) = session.run(None, {name: ids[None]})
        except Exception as error:
            raise ArtifactError(
                f"{path}: its embedding table has no rows for the tokens {rows.start:,} to "
                f"{rows.stop - 1:,}: {error}"
            ) from error
        return states[0].astype(np.float32)

    return read


def _openvino_rows(path: Path) -> ReadRows:
    """Reads the rows that OpenVINO's model looks up; its table is in a file of its own."""
    openvino: Any = import_module("openvino")
    core = openvino.Core()
    try:
        nodes = core.read_model(str(path)).get_ordered_ops()
        (lookup,) = (node for node in nodes if node.friendly_name.startswith(LOOKUP))
        ids = openvino.opset13.parameter([1, -1], np.int64)
        lookup.input(1).replace_source_output(ids.output(0))
        part = core.compile_model(openvino.Model([lookup.output(0)], [ids], EMBEDDING), "CPU", F32)
    except Exception as error:  # OpenVINO's own classes, all of them plain Exceptions
        raise ArtifactError(
            f"{path}: an operator {LOOKUP} should look up the tokens' rows: {error}: export it "
            "again"
        ) from error
    return lambda rows: part(np.arange(rows.start, rows.stop, dtype=np.int64)[None])[0][0]


def _errors(read: ReadRows, sketch: TableSketch, directions: np.ndarray) -> np.ndarray:
    """How far each row is from the reference's, in that one's length; NaN for a row with NaN.

    Rows that are exchanged are infinitely far, however close they are to each other.
    """
    errors = np.empty(len(sketch.lengths))
    hidden = len(directions)
    for rows in _chunks(len(errors), hidden):
        values, lengths = read(rows), sketch.lengths[rows]
        found = np.linalg.norm(values, axis=1)
        expected = sketch.products[rows].astype(np.float32) * lengths[:, None]
        apart = np.linalg.norm(values @ directions - expected, axis=1)
        # The length is exact, where the products of two far rows may be close by chance.
        apart = np.maximum(apart, np.abs(found - lengths))
        apart = np.maximum(apart - SMALLEST * hidden**0.5, 0 * apart)
        apart /= np.maximum(lengths, np.finfo(np.float32).tiny)
        # A checkpoint's own NaN, which the artifact has too, is no difference.
        errors[rows] = np.where(np.isnan(lengths) & np.isnan(found), 0, apart)
    errors[_exchanged(read, sketch, directions, np.argsort(errors)[-FARTHEST:])] = np.inf
    return errors


def _exchanged(
    read: ReadRows, sketch: TableSketch, directions: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """The rows of which each is much closer to another's place in the reference than to its own.

    Rounding never does that to both of two rows: it keeps the order of their values.
    """
    found = np.concatenate([read(slice(row, row + 1)) for row in rows.tolist()]) @ directions
    expected = sketch.products[rows].astype(np.float32) * sketch.lengths[rows, None]
    apart = np.linalg.norm(found[:, None] - expected, axis=2)
    is_closer = apart < CLOSER * np.diag(apart)[:, None]
    return rows[(is_closer & is_closer.T).any(axis=1)]


def _rotated(sketch: TableSketch, recipe: Mapping[str, Any]) -> np.ndarray:
    """The directions in the basis of a recipe's rotation: see `quantize.rotation`."""
    seed = recipe.get("seed")
    generator = np.random.default_rng(seed if isinstance(seed, int) and seed >= 0 else 0)
    rotation = Rotation.random(len(sketch.directions), generator)
    return np.ascontiguousarray(rotation.of_rows(sketch.directions.T).T)


def _units(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the lengths of rows, the rows divided by them); a row of zeros stays one."""
    lengths = np.linalg.norm(values, axis=1)
    return lengths, values / np.where(lengths > 0, lengths, 1)[:, None]


def _chunks(count: int, width: int) -> Iterator[slice]:
    """Slices of rows of this width that are in memory together."""
    step = max(1, CHUNK // width)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
