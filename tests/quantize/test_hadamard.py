"""Randomized Hadamard matrices against products of matrices."""

import hashlib

import numpy as np
import pytest

from embedport.quantize.hadamard import BLOCK, Rotation


def explicit(rotation):
    """The matrix by its definition: float64."""
    power = len(rotation.signs) // len(rotation.rest)
    hadamard = np.ones((1, 1))
    while len(hadamard) < power:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    return np.kron(rotation.rest, hadamard / np.sqrt(power)) * rotation.signs[:, None]


@pytest.mark.parametrize("size", [1, 2, 7, 16, 80, 96, 640])
def test_products(size):
    generator = np.random.default_rng(0)
    rotation = Rotation.random(size, generator)
    matrix = explicit(rotation)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)
    np.testing.assert_allclose(rotation.matrix(), matrix, atol=1e-6)
    for count in (1, BLOCK, BLOCK + 3):
        values = generator.standard_normal((count, size), np.float32)
        np.testing.assert_allclose(rotation.of_rows(values), values @ matrix, atol=1e-5)
        columns = np.ascontiguousarray(values.T)
        for each in (columns, values.T):  # in either order in memory
            found = rotation.of_columns(each)
            assert found.flags.c_contiguous
            np.testing.assert_allclose(found, matrix.T @ columns, atol=1e-5)
    assert np.array_equal(columns, values.T)


def test_a_row_is_the_same_beside_others():
    rotation = Rotation.random(96, np.random.default_rng(0))
    values = np.random.default_rng(1).standard_normal((200, 96), np.float32)
    whole = rotation.of_rows(values)
    assert np.array_equal(rotation.of_rows(values[70:90]), whole[70:90])


def test_the_same_bits_on_every_cpu():
    """Recorded on a CPU with AVX-512; those with AVX2 and with SSE4.2 gave the same."""
    rotation = Rotation.random(96, np.random.default_rng(0))
    values = np.random.default_rng(1).standard_normal((40, 96), np.float32)
    digest = hashlib.sha256(rotation.of_rows(values).tobytes()).hexdigest()
    assert digest[:16] == "53aae2f3175c3760"
