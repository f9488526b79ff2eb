"""Parity at the 0.6B geometry with Qwen3's tokenizer: both tasks, both dialects, 16 bits too."""

from __future__ import annotations

import shutil
from dataclasses import asdict

import embedport
from embedport.demo.samples import builtin_pairs, builtin_samples

from .checkpoint import CACHE, make
from .machine import save

# Each task in each dialect, and each 16-bit precision in one dialect a task: two minutes a case.
CASES = {
    "embedding": [("ort", "fp32"), ("standard", "fp32"), ("ort", "fp16"), ("ort", "bf16")],
    "reranker": [("ort", "fp32"), ("standard", "fp32"), ("standard", "fp16"), ("ort", "bf16")],
}


def against_transformers() -> None:
    """Export, validate, record; an artifact is deleted once it is measured.

    Every fourth built-in text and every third pair: 16 and 12, of all lengths and languages.
    """
    texts, pairs = builtin_samples()[::4], builtin_pairs()[::3]
    figures = {}
    for task, cases in CASES.items():
        source = CACHE / f"parity-{task}"
        make("0.6b", str(source), task)
        for dialect, precision in cases:
            out = CACHE / f"parity-{task}-{dialect}-{precision}"
            embedport.export(source, out, dialect=dialect, precision=precision, force=out.exists())
            report = embedport.validate(
                out,
                source,
                texts if task == "embedding" else None,
                pairs if task == "reranker" else None,
                device="cpu",
                record=False,
            )
            figures[f"{task} {dialect} {precision}"] = {
                "passed": report.passed,
                "gates": [asdict(gate) for gate in report.gates],
                "figures": report.comparisons[0].figures,
            }
            print(task, dialect, precision, report.verdict(), flush=True)
            shutil.rmtree(out)
        shutil.rmtree(source)
    save("parity-0.6b", {"reports": figures})
