"""Run a script and list what it loads; or run it as the one process of a machine, which then ends.

bochs.py copies this file as `init`, writes `settings.json` beside it, and runs it twice: here, and
in an emulated machine that has no other files than those which the script has loaded here.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120
# Before all other imports: what Python compiles here it need not compile there.
sys.pycache_prefix = os.path.join(HERE, "cache")  # noqa: PTH118
# Nothing is read or written in the user's folder.
os.environ.update({"HOME": HERE, "ORT_DISABLE_TELEMETRY": "1"})

import ctypes  # noqa: E402
import json  # noqa: E402
import runpy  # noqa: E402
import termios  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402

POWER_OFF = 0x4321FEDC
opened: set[str] = set()


def note(event: str, about: tuple[object, ...]) -> None:
    """See sys.addaudithook: the names by which files are asked for, which may lead over links."""
    if event in ("open", "ctypes.dlopen"):
        opened.add(os.path.abspath(str(about[0])))  # noqa: PTH100


def mount() -> None:
    """Give libraries what they read of the CPU."""
    for kind, place in (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")):
        Path(place).mkdir(exist_ok=True)
        ctypes.CDLL(None).mount(b"none", place.encode(), kind.encode(), 0, None)
    Path("/tmp").mkdir(exist_ok=True)


def loaded() -> list[str]:
    """The files that this process has opened in Python or mapped, and those of its modules."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    mapped = {line.split(maxsplit=5)[5] for line in maps if "/" in line}
    modules = {str(getattr(each, "__file__", None)) for each in list(sys.modules.values())}
    names = {name for name in opened | mapped | modules if Path(name).is_file()}
    return sorted(name for name in names if not name.startswith(("/dev/", "/proc/", "/sys/")))


def run(arguments: list[str]) -> None:
    """Run the script; only a crash ends this process."""
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
        code: object = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    print(f"exit code {code}", flush=True)  # noqa: T201


settings = json.loads(Path(HERE, "settings.json").read_text(encoding="utf-8"))
sys.path[:0] = settings["path"]
sys.modules["openvino"] = None  # ty: ignore[invalid-assignment]  # slow, and not what is checked
sys.addaudithook(note)
if os.getpid() != 1:
    run(settings["arguments"])
    Path(HERE, "loaded.json").write_text(json.dumps(loaded()), encoding="utf-8")
else:
    mount()
    if os.fork():
        crashed = os.wait()[1]
        if crashed:
            print(f"signal {crashed}", flush=True)  # noqa: T201
        termios.tcdrain(1)
        ctypes.CDLL(None).reboot(POWER_OFF)
    else:
        run(settings["arguments"])
