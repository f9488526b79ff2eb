"""The same results on every CPU: checks run natively and on other CPUs, and a table of them.

    make test-cpus
    python tests/cpus/run.py [--cpu Haswell ...] [--check products ...] [--folder build/cpus]

Where this CPU can hide its instruction sets (see hidden.py), older kinds of x86 run at its speed:

    avx512-vnni          Cascade Lake and Ice Lake
    avx512               AVX-512 without VNNI, whose 8-bit products saturate: Skylake's servers
    avx2-vnni            VNNI in 256 bits: Alder Lake
    avx2                 AVX2 without VNNI, whose 8-bit products saturate: Haswell, Zen 1 to 3
    sse4.2               no AVX

Others are emulated. On Debian and Ubuntu, with `apt-get install qemu-user`, and
gcc-aarch64-linux-gnu for the kernels; Python for aarch64 and its wheels are downloaded into the
folder the first time (60 MB):

    Haswell              AVX2 without VNNI
    Nehalem              SSE4.2
    aarch64 cortex-a72   NEON
    aarch64 max          all that qemu knows: dot products, i8mm, SVE

qemu emulates no AVX-512. Bochs does, slowly, and a whole machine with it (see bochs.py): on Debian,
with `apt-get install bochs bochs-term bochsbios vgabios isolinux syslinux-common xorriso cpio`; a
kernel is downloaded into the folder the first time (27 MB):

    skylake-x            AVX-512 without VNNI
    icelake              AVX-512 with VNNI

They run only when they are asked for: a check takes minutes, and exports have not been tried.

A check is a script of this folder, `check_*.py`: it gets the folder, runs anywhere with numpy,
onnxruntime and what embedport needs, and writes a line of JSON for each thing it compares: name,
difference, limit. It runs natively first, and may leave there what later runs compare with. The
exit code is 1 if anything is beyond its limit or does not run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from artifacts import write_artifacts  # noqa: E402
from bochs import MODELS, BochsMachine, bochs_machine  # noqa: E402
from hidden import KINDS, CannotHideError, available_kinds, hiding_command  # noqa: E402
from machines import (  # noqa: E402
    NATIVE,
    REPOSITORY,
    Machine,
    MissingToolError,
    arm_machine,
    make_arm,
    x86_machine,
)
from products import write_cases  # noqa: E402

CHECKS = sorted(path.stem.removeprefix("check_") for path in HERE.glob("check_*.py"))
X86, ARM = ("Haswell", "Nehalem"), ("cortex-a72", "max")


@dataclass(frozen=True)
class Outcome:
    """A check on a machine.

    Attributes:
        machine: Where.
        check: The script's name.
        records: What it compared: name, difference, limit.
        seconds: Of the whole run.
        error: What it said if it failed; empty otherwise.
    """

    machine: str
    check: str
    records: list[dict]
    seconds: float
    error: str

    @property
    def beyond(self) -> list[dict]:
        """Records that are not within their limit; NaN is not."""
        return [each for each in self.records if not each["difference"] <= each["limit"]]

    @property
    def holds(self) -> bool:
        return bool(self.records) and not self.beyond and not self.error


def run_check(machine: Machine | BochsMachine, check: Path, folder: Path) -> Outcome:
    """Run a script on a machine."""
    begun = time.monotonic()
    done = machine.run(check, str(folder))
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    error = "" if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr[-2000:]}"
    seconds = time.monotonic() - begun
    return Outcome(machine.name, check.stem, list(map(json.loads, lines)), seconds, error)


def find_machines(wanted: list[str], folder: Path) -> Iterator[Machine | BochsMachine]:
    """The CPUs that are asked for: first those that this one can imitate."""
    for kind in KINDS:
        if kind in wanted:
            yield Machine(kind, (*hiding_command(kind, folder), sys.executable))
    for cpu in X86:
        if cpu in wanted:
            yield x86_machine(cpu)
    for cpu in MODELS:
        if cpu in wanted:
            yield bochs_machine(cpu, folder / "bochs")
    if any(cpu in wanted for cpu in ARM):
        cache = folder / "aarch64"
        say(f"aarch64: {make_arm(cache)}")
        for cpu in ARM:
            if cpu in wanted:
                yield arm_machine(cpu, cache)


def write_head() -> None:
    """The table's columns; see `write_row`."""
    say(f"{'CPU':20} {'check':10} {'compared':>8} {'seconds':>7}  largest difference")


def write_row(outcome: Outcome) -> None:
    """CPU, check, how many things were compared, seconds, the largest difference."""
    largest = max(outcome.records, key=lambda record: record["difference"], default=None)
    text = "failed" if largest is None else f"{largest['difference']:.1e}  {largest['name']}"
    check, count = outcome.check.removeprefix("check_"), len(outcome.records)
    say(f"{outcome.machine:20} {check:10} {count:8} {outcome.seconds:7.1f}  {text}")


def write_failures(outcomes: list[Outcome]) -> None:
    """Records beyond their limit, and the words of a check that did not run to its end."""
    for each in outcomes:
        for record in each.beyond:
            difference, limit = record["difference"], record["limit"]
            say(f"{each.machine}: {record['name']}: {difference:.3g} is beyond {limit:g}")
        if each.error:
            say(f"{each.machine}: {each.check}: {each.error}")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Prepare, run, and write the table; the exit code."""
    parser = argparse.ArgumentParser(description="The same results on every CPU.")
    parser.add_argument(
        "--cpu",
        action="append",
        choices=(*KINDS, *X86, *MODELS, *ARM),
        help=f"by default all but {' and '.join(MODELS)}",
    )
    parser.add_argument("--check", action="append", choices=CHECKS, help="all by default")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "cpus")
    options = parser.parse_args()
    folder = options.folder.absolute()
    try:
        wanted = options.cpu or [*available_kinds(), *X86, *ARM]
        machines = list(find_machines(wanted, folder))
    except (CannotHideError, MissingToolError) as error:
        say(str(error))
        return 2
    prepared = folder / "prepared"
    shutil.rmtree(prepared, ignore_errors=True)
    say("Writing products and artifacts")
    write_cases(prepared / "products")
    write_artifacts(prepared / "artifacts")
    checks = [HERE / f"check_{name}.py" for name in options.check or CHECKS]
    write_head()
    outcomes = []
    # A check's native run leaves what the others compare with.
    for check in checks:
        outcomes.append(run_check(NATIVE, check, prepared))
        write_row(outcomes[-1])
    with ThreadPoolExecutor(max_workers=2) as pool:
        waiting = [
            pool.submit(run_check, machine, check, prepared)
            for machine in machines
            for check in checks
        ]
        for each in waiting:
            outcomes.append(each.result())
            write_row(outcomes[-1])
    write_failures(outcomes)
    return 0 if all(each.holds for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
