"""Tests that need a GPU say why they are skipped without one."""

import pytest

from embedport.errors import DeviceError, MissingPackageError
from embedport.machine.gpu import current_device


@pytest.fixture(scope="session", autouse=True)
def present():
    try:
        return current_device()
    except (DeviceError, MissingPackageError) as error:
        pytest.skip(str(error))
