"""Batches by length within a token budget."""

from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from embedport.attention import SHORT_ROW
from embedport.errors import InputError
from embedport.runtimes import batching
from embedport.runtimes.batching import make_batches, pad, run_batches
from embedport.runtimes.part_session import open_session


def test_batches_stay_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 300, 500).tolist()
    batches = make_batches(lengths, 1000)
    assert sorted(row for batch in batches for row in batch) == list(range(500))
    for batch in batches:
        assert len(batch) * max(lengths[row] for row in batch) <= 1000
    # The longest first, and like with like: hardly any padding.
    order = [lengths[row] for batch in batches for row in batch]
    assert order == sorted(lengths, reverse=True)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)


def test_a_row_beyond_the_budget_is_alone():
    assert make_batches([5, 50, 6], 12) == [[1], [2, 0]]
    assert make_batches([], 12) == []
    with pytest.raises(InputError, match="at least 1, found 0"):
        make_batches([1], 0)


def test_short_and_long_rows_are_apart():
    lengths = [SHORT_ROW + 1, 3, SHORT_ROW, SHORT_ROW + 9, 4]
    assert make_batches(lengths, 10_000) == [[3, 0], [2, 4, 1]]


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", None), ("150000 100000", 1.5), ("1600000 100000", 16), ("nonsense", None)],
)
def test_a_containers_quota_counts(tmp_path, monkeypatch, quota, cores):
    path = tmp_path / "cpu.max"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(batching, "QUOTA", path)
    assert batching.read_quota() is None
    path.write_text(quota + "\n")
    assert batching.read_quota() == cores
    monkeypatch.setattr(batching.os, "sched_getaffinity", lambda pid: range(8), raising=False)
    assert batching.count_cores() == {None: 8, 1.5: 2, 16: 8}[cores]


def test_the_usual_variable_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(batching, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(batching.os, "sched_getaffinity", lambda pid: range(8), raising=False)
    cases = {"3": (3, 3), "16": (16, 8), " 2,1": (2, 2)}
    unlimited = dict.fromkeys(("", "0", "many", "²"), (None, 8))
    for threads, (limit, cores) in (cases | unlimited).items():
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        assert (batching.core_limit(), batching.count_cores()) == (limit, cores)


def test_sessions_keep_to_the_limit(monkeypatch, tmp_path):
    """Those of parts of a graph too, in which an export verifies and calibrates."""
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=(1,))
    y = ir.val("y", dtype=ir.DataType.FLOAT, shape=(1,))
    node = ir.node("Identity", [x], outputs=[y])
    graph = ir.Graph([x], [y], nodes=[node], opset_imports={"": 21}, name="part")
    for threads in (1, 3):
        monkeypatch.setattr(batching, "core_limit", lambda threads=threads: threads)
        monkeypatch.setattr(batching, "count_cores", lambda threads=threads: threads)
        session = open_session(ir.Model(graph, ir_version=10), tmp_path, pack=True)
        assert session.get_session_options().intra_op_num_threads == threads


@pytest.mark.parametrize(("allowed", "threads"), [(range(8), 0), (range(3), 3)])
def test_sessions_keep_to_a_cpuset(monkeypatch, allowed, threads):
    """onnxruntime's default, 0, is a thread for each core of the machine, pinned to it."""
    monkeypatch.setattr(batching, "core_limit", lambda: None)
    monkeypatch.setattr(batching.os, "sched_getaffinity", lambda pid: allowed, raising=False)
    monkeypatch.setattr(batching.os, "cpu_count", lambda: 8)
    options = SimpleNamespace(intra_op_num_threads=0)
    batching.limit_threads(options)
    assert options.intra_op_num_threads == threads


def test_pad():
    ids, mask = pad([np.array([7, 8, 9]), np.array([5])])
    assert ids.tolist() == [[7, 8, 9], [5, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == np.int64


def test_results_come_back_in_order():
    rows = [np.arange(1, n + 1) for n in (3, 9, 1, 4, 4)]
    found = run_batches(
        lambda ids, mask: ids.sum(axis=1).astype(np.float32),
        rows,
        (),
        batch_tokens=8,
        description="",
        progress=False,
    )
    assert found.tolist() == [row.sum() for row in rows]
