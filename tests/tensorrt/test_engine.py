"""Profiles, and where an engine may be loaded."""

import json
from dataclasses import asdict, replace

import pytest

from embedport.errors import DeviceError, InputError
from embedport.machine.engine import (
    Device,
    EngineRecord,
    Profile,
    choose_profile,
    format_capability,
    parse_capability,
)
from embedport.records import read_record

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


def test_padded():
    profile = Profile.parse("2x16:8x128:32x512")
    assert profile.padded(1, 300) == (2, 300)
    assert profile.padded(8, 3) == (8, 16)


RTX = replace(
    RECORD,
    device=None,
    library="tensorrt-rtx",
    tensorrt="1.7.1.116",
    capabilities=((8, 6), (12, 0)),
    products={"int8": 14},
)


def test_cut():
    assert str(Profile.parse("1x1:8x128:32x512").cut(100)) == "1x1:8x100:32x100"


@pytest.mark.parametrize("text", ["", "8", "sm89", "8.6.1", "8.99"])
def test_no_capability(text):
    with pytest.raises(InputError, match=r"compute capability should be like 8.9 or 12.0"):
        parse_capability(text)


def test_capability():
    assert [format_capability(parse_capability(text)) for text in ("8.9", "12.0")] == [
        "8.9",
        "12.0",
    ]


def test_built_ahead_of_time():
    RTX.check(Device("RTX 3060", (8, 6)), "1.7.1.116")
    message = r"runs on GPUs of compute capability 8.6, 12.0; here is NVIDIA H100 .*9.0\)"
    with pytest.raises(DeviceError, match=message):
        RTX.check(H100, "1.7.1.116")
    with pytest.raises(
        DeviceError, match=r"built with TensorRT for RTX 1.7.1.116; here is 1.8.0.1"
    ):
        RTX.check(Device("RTX 3060", (8, 6)), "1.8.0.1")


def test_record_in_json():
    assert read_record(EngineRecord, json.loads(json.dumps(asdict(RTX)))) == RTX
    # Early artifacts lack the library.
    early = {
        key: value
        for key, value in asdict(RECORD).items()
        if key not in ("library", "capabilities", "products")
    }
    assert read_record(EngineRecord, early) == RECORD
    with pytest.raises(
        ValueError, match="library should be tensorrt or tensorrt-rtx, found 'openvino'"
    ):
        read_record(EngineRecord, {**asdict(RECORD), "library": "openvino"})
    with pytest.raises(ValueError, match="device None does not go with library 'tensorrt'"):
        read_record(EngineRecord, {**asdict(RECORD), "device": None})
    assert read_record(EngineRecord, json.loads(json.dumps(asdict(RECORD)))) == RECORD
    with pytest.raises(ValueError, match="hardware_compatible should be one of none, ampere"):
        read_record(EngineRecord, {**asdict(RECORD), "hardware_compatible": "all"})


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
        with pytest.raises(DeviceError, match=r"runs on NVIDIA H100 \(compute capability 9.0\)"):
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
