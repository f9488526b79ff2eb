"""CPUs with AVX-512, emulated by Bochs: a whole machine, which boots for a script and then ends.

Debian's kernel boots from a CD with all else in its initramfs: this environment's Python, the
script's folder, and the files that the script loads here (guest.py). What the script prints comes
out of the serial port.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from machines import REPOSITORY, MissingToolError, run_tool

HERE = Path(__file__).parent
# Our name to Bochs's.
MODELS = {"skylake-x": "corei7_skylake_x", "icelake": "corei7_icelake_u"}
KERNEL = "linux-image-cloud-amd64"
LOADER = "/usr/lib/ISOLINUX/isolinux.bin", "/usr/lib/syslinux/modules/bios/ldlinux.c32"
BIOS, VGA_BIOS = "/usr/share/bochs/BIOS-bochs-latest", "/usr/share/bochs/VGABIOS-lgpl-latest"
# Files to the packages that bring them.
NEEDED = {
    "/usr/bin/bochs": "bochs",
    "/usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so": "bochs-term",
    BIOS: "bochsbios",
    VGA_BIOS: "vgabios",
    LOADER[0]: "isolinux",
    LOADER[1]: "syslinux-common",
    "/usr/bin/xorriso": "xorriso",
    "/usr/bin/cpio": "cpio",
}
LINKER = "/lib64/ld-linux-x86-64.so.2"
OPTIONS = (
    "console=ttyS0 loglevel=1 "
    # Every instruction costs time.
    "mitigations=off nokaslr audit=0 init_on_alloc=0 cryptomgr.notests "
    # Linux turns AVX off where XSAVE's layout is not what it expects (xsavec, xsaves; pku of Ice
    # Lake), and hangs when it copies with Ice Lake's short `rep movsb` (fsrm). This hides the four
    # from the kernel alone.
    "nopku clearcpuid=xsavec,xsaves,pku,fsrm"
)
BOOT = f"DEFAULT check\nLABEL check\nKERNEL /kernel\nINITRD /files,/own\nAPPEND {OPTIONS}\n"
MACHINE = f"""display_library: term
cpu: model={{model}}, count=1, ips=100000000
memory: guest=1024, host=1024
romimage: file={BIOS}, options=fastboot
vgaromimage: file={VGA_BIOS}
pci: enabled=1, chipset=i440fx
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path=cd.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=serial
log: log
panic: action=fatal
error: action=ignore
info: action=ignore
"""
# Debian's Bochs has a debugger, which waits for a command.
COMMANDS = "continue\n"
# For a kernel that hangs. Bochs heeds no weaker signal.
LIMIT = ("timeout", "--signal=KILL", "3h")


@dataclass(frozen=True)
class BochsMachine:
    """A CPU, with the interface of `machines.Machine`.

    Attributes:
        name: Of MODELS.
        kernel: The kernel that boots.
        folder: For what a run needs; nothing stays.
    """

    name: str
    kernel: Path
    folder: Path

    def run(self, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a script; folders among its arguments are copied into the machine."""
        with TemporaryDirectory(dir=self.folder) as name:
            folder = Path(name)
            write_cd(folder, self.kernel, prepare(folder / "own", script, arguments))
            machine = MACHINE.format(model=MODELS[self.name])
            (folder / "machine").write_text(machine, encoding="utf-8")
            (folder / "commands").write_text(COMMANDS, encoding="utf-8")
            done = subprocess.run(
                [*LIMIT, "bochs", "-f", "machine", "-rc", "commands"],
                cwd=folder,
                env=os.environ | {"TERM": "vt100"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            serial = folder / "serial"
            said = serial.read_text("utf-8", "replace") if serial.exists() else done.stderr
        ended = re.search(r"^exit code (\d+)$", said, re.MULTILINE)
        return subprocess.CompletedProcess(done.args, int(ended[1]) if ended else 1, said, said)


def check_packages() -> None:
    """Raise MissingToolError, which says what to install, unless all is there."""
    missing = sorted({package for file, package in NEEDED.items() if not Path(file).is_file()})
    if missing:
        raise MissingToolError(f"Bochs needs more: apt-get install {' '.join(missing)}")


def bochs_machine(cpu: str, folder: Path) -> BochsMachine:
    """A CPU of MODELS; Debian's kernel is unpacked in the folder, and nothing is installed.

    Raises:
        MissingToolError: A package is not there, or the kernel could not be downloaded.
    """
    check_packages()
    kernel = folder / "kernel"
    kernel.mkdir(parents=True, exist_ok=True)
    if not list(kernel.glob("boot/vmlinuz-*")):
        depends = re.search(r"Depends: (\S+)", run_tool(["apt-cache", "depends", KERNEL]))
        if depends is None:
            raise MissingToolError(f"apt knows no {KERNEL}: apt-get update")
        run_tool(["apt-get", "download", depends[1]], folder=kernel)
        (package,) = kernel.glob("*.deb")
        run_tool(["dpkg", "-x", str(package), str(kernel)])
        package.unlink()
    return BochsMachine(cpu, *kernel.glob("boot/vmlinuz-*"), folder)


def prepare(own: Path, script: Path, arguments: Iterable[str]) -> set[Path]:
    """Run the script here, and make what differs there.

    Args:
        own: A folder to make, which is the machine's root.
        script: The script.
        arguments: Its arguments.

    Returns:
        The files that the machine needs beside, at their places here.
    """
    own.mkdir()
    python = Path(sys.executable).resolve()
    guest = (HERE / "guest.py").read_text(encoding="utf-8")
    (own / "init").write_text(f"#!{python} -IS\n{guest}", encoding="utf-8")
    (own / "init").chmod(0o755)
    paths = [str(script.parent), str(REPOSITORY), *filter(None, sys.path)]
    settings = {"path": paths, "arguments": [str(script), *arguments]}
    (own / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    run_tool([str(python), "-IS", str(own / "init")])
    files = {Path(LINKER), *map(Path, json.loads((own / "loaded.json").read_text("utf-8")))}
    # A library is loaded by a name with less of its version, which is a link to it.
    stems = {file.parent / file.name.partition(".so")[0] for file in files if ".so" in file.name}
    files.update(link for stem in stems for link in stem.parent.glob(f"{stem.name}.so.*"))
    files.update(file for each in arguments for file in Path(each).rglob("*"))
    # Some went when the script ended.
    return {file for file in files if file.exists() and own not in file.parents}


def write_cd(folder: Path, kernel: Path, files: Iterable[Path]) -> None:
    """A CD that boots a kernel with these files and those of the folder `own`."""
    cd, own = folder / "cd", folder / "own"
    cd.mkdir()
    shutil.copy(kernel, cd / "kernel")
    for file in LOADER:
        shutil.copy(file, cd)
    (cd / "isolinux.cfg").write_text(BOOT, encoding="utf-8")
    _archive(cd / "files", Path("/"), {part for file in files for part in (file, *file.parents)})
    _archive(cd / "own", own, own.rglob("*"))
    loading = "-b isolinux.bin -c catalogue -no-emul-boot -boot-load-size 4 -boot-info-table"
    iso = ["-o", str(folder / "cd.iso"), *loading.split(), str(cd)]
    run_tool(["xorriso", "-as", "mkisofs", "-quiet", *iso])


def _archive(archive: Path, root: Path, files: Iterable[Path]) -> None:
    """An initramfs of files and folders under `root`; links as what they lead to."""
    names = "\0".join(sorted(str(file.relative_to(root)) for file in files))
    command = ["cpio", "--create", "--format=newc", "--dereference", "--null", "--quiet"]
    with archive.open("wb") as out:
        subprocess.run(command, cwd=root, input=names.encode(), stdout=out, check=True)
