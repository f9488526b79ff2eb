"""The kind of CPU, as Linux tells it on x86 and on ARM."""

import pytest

from embedport.machine import cpu
from embedport.machine.cpu import Cpu, read_cpu


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(cpu, "CPUINFO", path)
    return path


def test_x86(cpuinfo):
    cpuinfo.write_text("processor\t: 0\nmodel name\t: AMD EPYC 7763\nflags\t\t: fpu fma avx2 sha\n")
    assert read_cpu() == Cpu("AMD EPYC 7763", ("avx2", "fma"))


def test_arm(cpuinfo):
    """An ARM core has numbers for its maker and its model."""
    cpuinfo.write_text(
        "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"
        "CPU implementer\t: 0x41\nCPU part\t: 0xd08\n"
    )
    found = read_cpu()
    assert found.name.endswith(" 0x41:0xd08")
    assert found.instructions == ("neon", "dotprod", "i8mm")


def test_a_system_without_cpuinfo(cpuinfo):
    assert read_cpu().name
