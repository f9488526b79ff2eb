"""Profiles, and where an engine may be loaded."""

import json
from dataclasses import asdict, replace

import pytest

from embedport.errors import DeviceError, InputError
from embedport.machine.engine import Device, EngineRecord, Profile, choose_profile

H100, A100 = Device("NVIDIA H100", (9, 0)), Device("NVIDIA A100", (8, 0))
H200, T4 = Device("NVIDIA H200", (9, 0)), Device("Tesla T4", (7, 5))
RECORD = EngineRecord(
    "engine/model.plan", H100, "11.1.0.106", False, "none", (Profile.parse("1x1:8x128:32x512"),)
)


def test_parse():
    profile = Profile.parse("1x1:8x128:32x512")
    assert profile == Profile((1, 1), (8, 128), (32, 512))
    assert str(profile) == "1x1:8x128:32x512"


@pytest.mark.parametrize("text", ["", "8x128", "1x1:8x128", "1x1:8x128:32x512:1x1", "1x1:ax1:2x2"])
def test_no_profile(text):
    with pytest.raises(InputError, match="a profile should be MIN:OPT:MAX"):
        Profile.parse(text)


@pytest.mark.parametrize("text", ["8x128:1x1:32x512", "1x1:8x128:4x512", "0x1:8x128:32x512"])
def test_profile_out_of_order(text):
    with pytest.raises(InputError, match="should grow from MIN over OPT to MAX"):
        Profile.parse(text)


@pytest.mark.parametrize(
    ("batch", "chosen"),
    [((1, 16), 0), ((2, 8192), 0), ((32, 128), 1), ((200, 100), 1), ((4, 400), 1), ((8, 16), 0)],
)
def test_choose(batch, chosen):
    profiles = [Profile.parse("1x1:1x32:8x8192"), Profile.parse("1x1:32x128:256x512")]
    assert choose_profile(profiles, *batch) == chosen


def test_beyond_all_profiles():
    profiles = [Profile.parse("1x1:1x32:8x8192"), Profile.parse("1x1:32x128:256x512")]
    with pytest.raises(InputError, match="9 x 513 tokens is beyond the engine's profiles"):
        choose_profile(profiles, 9, 513)


def test_padded():
    profile = Profile.parse("2x16:8x128:32x512")
    assert profile.padded(1, 300) == (2, 300)
    assert profile.padded(8, 3) == (8, 16)


def test_record_in_json():
    assert EngineRecord.from_json(json.loads(json.dumps(asdict(RECORD)))) == RECORD
    with pytest.raises(ValueError, match="hardware_compatible is 'all'"):
        EngineRecord.from_json({**asdict(RECORD), "hardware_compatible": "all"})


@pytest.mark.parametrize(
    ("compatible", "device", "runs"),
    [
        ("none", H100, True),
        ("none", H200, False),
        ("same-capability", H200, True),
        ("same-capability", A100, False),
        ("ampere+", A100, True),
        ("ampere+", T4, False),
    ],
)
def test_devices(compatible, device, runs):
    record = replace(RECORD, hardware_compatible=compatible)
    if runs:
        record.check(device, RECORD.tensorrt)
    else:
        with pytest.raises(DeviceError, match=r"built on NVIDIA H100 \(compute capability 9.0\)"):
            record.check(device, RECORD.tensorrt)


@pytest.mark.parametrize(
    ("compatible", "version", "runs"),
    [
        (False, "11.1.0.106", True),
        (False, "11.2.0.1", False),
        (True, "11.2.0.1", True),
        (True, "11.0.0.1", False),
        (True, "12.0.0.1", False),
        (False, "10.15.1.29", False),
    ],
)
def test_versions(compatible, version, runs):
    record = replace(RECORD, version_compatible=compatible)
    if runs:
        record.check(H100, version)
    else:
        with pytest.raises(DeviceError, match=f"TensorRT 11.1.0.106; here is {version}"):
            record.check(H100, version)
