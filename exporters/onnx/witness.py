"""Write a graph's witness: the results of `embedport.load` for a few rows on this machine.

A session of the whole graph would copy all weights. Instead, parts run one after another, each in a
session optimized and packed as the whole one would be, over the batches that the runtime would
make. The results are bit-identical to those of `load`: tests/runtimes/test_check.py asserts it.
Sessions without packing, as in verify.py, round 8- and 4-bit products differently.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...artifact.manifest import Manifest
from ...artifact.segments import emulate_16_bits
from ...artifact.witness import WITNESS, Witness, choose_rows, describe_machine, write_witness
from ...checkpoint.pooling import Head, pool
from ...runtimes.batching import choose_batch_tokens, make_batches, pad
from ...runtimes.comparison import find_kernels
from ..graph.qwen3 import PROMPT_LENGTH
from .verify import run_parts


def make_witness(
    folder: Path, manifest: Manifest, advance: Callable[[], None] = lambda: None
) -> None:
    """Run the witness's rows through an artifact's graph on the CPU, and write the results.

    Args:
        folder: The artifact's folder, complete except for the manifest.
        manifest: Its manifest.
        advance: Called after each part of the graph.

    Raises:
        VerificationError: onnxruntime rejects a part, or outputs NaN or infinity.
    """
    graph = manifest.graph
    assert graph is not None
    rows, queries = choose_rows(
        folder, manifest.task, manifest.inputs, manifest.max_length, manifest.vocab_size
    )
    batches = make_batches([len(row) for row in rows], choose_batch_tokens(None, "cpu"))
    feeds = []
    for batch in batches:
        input_ids, attention_mask = pad([rows[i] for i in batch])
        feeds.append({"input_ids": input_ids, "attention_mask": attention_mask})
        if PROMPT_LENGTH in graph.inputs:
            feeds[-1][PROMPT_LENGTH] = np.zeros(1, np.int64)
    path = folder / graph.path
    model = ir.load(path)
    emulate_16_bits(model)
    outputs = run_parts(model, path, feeds, advance, as_loaded=True)
    shape = (len(rows), manifest.embedding_dim) if manifest.embedding_dim else (len(rows),)
    results = np.empty(shape, np.float32)
    for batch, batch_inputs, (output, *_) in zip(batches, feeds, outputs, strict=True):
        if graph.output == "hidden":
            pooled = pool(output, batch_inputs["attention_mask"], manifest.outputs)
            output = Head(manifest.outputs, folder)(pooled)
        results[batch] = output
    machine = describe_machine(kernels=find_kernels(manifest, "cpu"))
    write_witness(folder / WITNESS, Witness(rows, queries, results, machine))
