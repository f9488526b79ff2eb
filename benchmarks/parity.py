"""Parity at the 0.6B geometry with Qwen3's tokenizer: every dialect and precision, both tasks."""

from __future__ import annotations

import lzma
import shutil
from dataclasses import asdict

from tokenizers import Tokenizer

import embedport
from embedport.demo.synthetic import QWEN3_0_6B, write_checkpoint
from embedport.spec import Task

from .checkpoint import CACHE, TOKENIZER
from .machine import save

TASKS: tuple[Task, ...] = ("embedding", "reranker")


def against_transformers() -> None:
    """Export, validate, record; an artifact is deleted once it is measured."""
    figures = {}
    tokenizer = Tokenizer.from_str(lzma.decompress(TOKENIZER.read_bytes()).decode("utf-8"))
    for task in TASKS:
        source = CACHE / f"parity-{task}"
        write_checkpoint(source, QWEN3_0_6B, task, tokenizer)
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
