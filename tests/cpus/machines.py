"""CPUs that are not at hand, emulated by qemu-user, and the Python that runs on each.

x86 CPUs run this environment's own Python. aarch64 needs one of its own: Debian's, unpacked beside
locked wheels into a cache folder, nothing of which is installed on the machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
MIRROR = "http://deb.debian.org/debian"
RELEASE, PYTHON = "bookworm", "3.11"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# onnxruntime's cpuinfo library reads the host's files otherwise, and ends in a segmentation fault.
CORE = """processor\t: 0
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3
"""
COMPILER = "aarch64-linux-gnu-gcc"


class MissingToolError(Exception):
    """A program that emulation needs is not there; says which package brings it."""


@dataclass(frozen=True)
class Machine:
    """A CPU.

    Attributes:
        name: What the table calls it.
        command: What a script and its arguments are put behind.
    """

    name: str
    command: tuple[str, ...]

    def run(self, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a script; both its streams are captured."""
        environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
        environment.pop("PYTHONPATH", None)
        command = [*self.command, str(script), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


NATIVE = Machine("native", (sys.executable,))


def x86_machine(cpu: str) -> Machine:
    """An x86 CPU by qemu's name."""
    return Machine(cpu, (find_tool("qemu-x86_64", "qemu-user"), "-cpu", cpu, sys.executable))


def arm_machine(cpu: str, cache: Path) -> Machine:
    """An aarch64 CPU by qemu's name, with what `make_arm` has made."""
    root, places = cache / "root", f"{cache / 'source'}:{cache / 'wheels'}"
    return Machine(
        f"aarch64 {cpu}",
        (
            find_tool("qemu-aarch64", "qemu-user"),
            *("-cpu", cpu, "-L", str(root), "-E", f"PYTHONPATH={places}"),
            str(root / "usr" / "bin" / f"python{PYTHON}"),
        ),
    )


def make_arm(cache: Path) -> str:
    """A root with Python, the locked wheels, and the package with its kernels, for aarch64.

    What an earlier call has downloaded stays.

    Args:
        cache: The folder.

    Returns:
        What became of the kernels, in words.

    Raises:
        MissingToolError: apt-get, dpkg or uv is not there.
        subprocess.CalledProcessError: A download failed.
    """
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / "root").is_dir():
        _make_root(cache)
    _install_wheels(cache)
    return _install_package(cache)


def _make_root(cache: Path) -> None:
    """Debian's packages of Python, as apt resolves them for a machine that has none yet."""
    apt, dpkg = find_tool("apt-get", "apt"), find_tool("dpkg", "dpkg")
    if not Path(KEYRING).is_file():
        raise MissingToolError(f"{KEYRING} is missing: apt-get install debian-archive-keyring")
    state = cache / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    source = state / "sources.list"
    source.write_text(f"deb [signed-by={KEYRING}] {MIRROR} {RELEASE} main\n", encoding="utf-8")
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
        "Debug::NoLocking": "true",
        "Dir::State": state,
        "Dir::State::lists": state / "lists",
        "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
        "Dir::Etc::sourcelist": source,
        "Dir::Etc::sourceparts": "/dev/null",
    }
    command = [apt, "-qq", *(f"-o{key}={value}" for key, value in options.items())]
    run_tool([*command, "update"])
    run_tool([*command, "--yes", "--download-only", "install", f"python{PYTHON}", "libstdc++6"])
    # Under its name only when it is whole: the next call would take a part for it.
    partial = cache / "root-partial"
    shutil.rmtree(partial, ignore_errors=True)
    for package in sorted((state / "cache" / "archives").glob("*.deb")):
        run_tool([dpkg, "-x", str(package), str(partial)])
    (partial / "proc").mkdir()
    (partial / "proc" / "cpuinfo").write_text(CORE, encoding="utf-8")
    cores = partial / "sys" / "devices" / "system" / "cpu"
    cores.mkdir(parents=True)
    for name in ("possible", "present", "online"):
        (cores / name).write_text("0\n", encoding="utf-8")
    partial.rename(cache / "root")


def _install_wheels(cache: Path) -> None:
    """The versions of uv.lock; uv leaves alone what is there already."""
    uv = _uv()
    locked = cache / "requirements.txt"
    exported = [uv, "export", "--quiet", "--frozen", "--no-default-groups", "--extra", "cpu"]
    options = ["--no-emit-project", "--no-hashes", "--output-file", str(locked)]
    run_tool([*exported, *options])
    target = ["--target", str(cache / "wheels"), "--python-version", PYTHON]
    platform = ["--python-platform", "aarch64-manylinux_2_28", "--only-binary", ":all:"]
    run_tool([uv, "pip", "install", "--quiet", "-r", str(locked), "--no-deps", *target, *platform])


def _install_package(cache: Path) -> str:
    """The package's own wheel, compiled for aarch64, unpacked; its name is in the answer."""
    built = cache / "built"
    shutil.rmtree(built, ignore_errors=True)
    # Without the compiler the build makes a wheel for any platform, as on a user's machine.
    environment = {"CC": COMPILER, "_PYTHON_HOST_PLATFORM": "linux-aarch64"}
    run_tool([_uv(), "build", "--quiet", "-o", str(built)], os.environ | environment)
    (wheel,) = built.glob("*.whl")
    source = cache / "source"
    shutil.rmtree(source, ignore_errors=True)
    with zipfile.ZipFile(wheel) as file:
        file.extractall(source)
    if wheel.stem.endswith("-any"):
        return f"{wheel.name}, without kernels: apt-get install gcc-aarch64-linux-gnu"
    return f"{wheel.name}, with kernels"


def _uv() -> str:
    """As `uv run` says; or make's, or one on the PATH."""
    own = REPOSITORY / ".tools" / "bin" / "uv"
    found = os.environ.get("UV") or (str(own) if own.is_file() else shutil.which("uv"))
    if found is None:
        raise MissingToolError("uv is missing: run `make test-cpus`, which fetches it")
    return found


def find_tool(program: str, package: str) -> str:
    """A program's path.

    Raises:
        MissingToolError: It is not there.
    """
    found = shutil.which(program)
    if found is None:
        raise MissingToolError(f"{program} is missing: apt-get install {package}")
    return found


def run_tool(
    command: Sequence[str],
    environment: Mapping[str, str] = os.environ,
    folder: Path = REPOSITORY,
) -> str:
    """Run a program in a folder; what it prints.

    Raises:
        MissingToolError: It failed.
    """
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=folder
    )
    if done.returncode:
        raise MissingToolError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout
