"""Parity at the 0.6B geometry with Qwen3's tokenizer: every dialect and precision, both tasks."""

from __future__ import annotations

import shutil
from dataclasses import asdict

import embedport

from .checkpoint import CACHE, make
from .machine import save


def against_transformers() -> None:
    """Export, validate, record; an artifact is deleted once it is measured."""
    figures = {}
    for task in ("embedding", "reranker"):
        source = CACHE / f"parity-{task}"
        make("0.6b", str(source), task)
        for dialect in ("ort", "standard"):
            for precision in ("fp32", "fp16", "bf16"):
                out = CACHE / f"parity-{task}-{dialect}-{precision}"
                embedport.export(
                    source, out, dialect=dialect, precision=precision, force=out.exists()
                )
                report = embedport.validate(out, source, device="cpu", record=False)
                figures[f"{task} {dialect} {precision}"] = {
                    "passed": report.passed,
                    "gates": [asdict(gate) for gate in report.gates],
                }
                shutil.rmtree(out)
        shutil.rmtree(source)
    save("parity-0.6b", {"reports": figures})
