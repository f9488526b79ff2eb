"""A checkpoint's place: a folder or a hub id."""

import pytest

from embedport.checkpoint.hub import fetch
from embedport.errors import InputError


def test_a_folder_that_cannot_be_one():
    with pytest.raises(InputError, match="cannot be a folder: File name too long"):
        fetch("a" * 5000)
    with pytest.raises(InputError, match="no such folder"):
        fetch("a\0b")
