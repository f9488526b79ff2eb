"""An installed wheel has kernels for this CPU, and they give the recorded vectors and scores.

    python tests/vectors/installed.py

cibuildwheel runs it beside each wheel: see pyproject.toml. Exit code 1: something is beyond its
limit; or there are no kernels.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

# Behind the installed package, which is what is tested.
sys.path.append(str(Path(__file__).parents[2]))

from embedport.runtimes.ort_custom_ops import choose_kernels
from tests.vectors.compare import LIMITS, apart, read_rows
from tests.vectors.record import CHECKPOINTS, export_demo, run_rows


def main() -> None:
    """Export the demo pair, and compare."""
    kernels, reason = choose_kernels()
    if kernels is None:
        sys.exit(f"no kernels: {reason}")
    parts = []
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for task in CHECKPOINTS:
            for precision in LIMITS:
                loaded = export_demo(task, precision, Path(folder))
                parts.append(apart(task, precision, run_rows(loaded, read_rows(task))))
                print(f"{task} {precision}, {kernels}: {parts[-1]:.4f} of the limit", flush=True)  # noqa: T201
    sys.exit(int(not all(part <= 1 for part in parts)))


if __name__ == "__main__":
    main()
