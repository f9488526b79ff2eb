"""Vectors in 8 bits and one bit, as sentence-transformers defines them."""

import json

import numpy as np
import pytest

import embedport
from embedport.errors import InputError
from embedport.runtimes.vectors import measure_ranges, quantize_vectors, shorten

TEXTS = [
    f"text number {i} about {word}" for i, word in enumerate(["tea", "snow", "law", "iron"] * 8)
]


@pytest.fixture
def embedder(checkpoints, tmp_path):
    return embedport.load(embedport.export(checkpoints("kv1"), tmp_path / "artifact").folder)


def unit(n, dim, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_bits_are_the_signs_first_value_highest():
    vectors = np.array([[0.5, -0.5, 0, 1, 1, -1, -1, -1, 0.1]], np.float32)
    found = quantize_vectors(vectors, "ubinary", None)
    assert found.dtype == np.uint8
    assert found.tolist() == [[0b10011000, 0b10000000]]
    signed = quantize_vectors(vectors, "binary", None)
    assert signed.dtype == np.int8
    assert signed.tolist() == [[0b10011000 - 128, 0]]


def test_eight_bits_are_255_steps_of_the_range():
    ranges = {"2": [[0, -255], [255, 255]]}
    vectors = np.array([[0, -255], [255, 255], [1.5, 0], [999, -999]], np.float32)
    assert quantize_vectors(vectors, "uint8", ranges).tolist() == [
        [0, 0],
        [255, 255],
        [1, 127],
        [255, 0],
    ]
    # The steps are those of "uint8", below zero too.
    assert quantize_vectors(vectors, "int8", ranges).tolist() == [
        [-128, -128],
        [127, 127],
        [-127, -1],
        [127, -128],
    ]


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_codes_are_those_of_sentence_transformers(precision):
    quantization = pytest.importorskip("sentence_transformers.util.quantization")
    ranges = measure_ranges(unit(50, 32))
    ranges["32"][1][3] = ranges["32"][0][3]  # a value that is always the same
    vectors = unit(100, 32, seed=1)
    expected = quantization.quantize_embeddings(
        vectors, precision, ranges=np.array(ranges["32"]) if "int8" in precision else None
    )
    found = quantize_vectors(vectors, precision, ranges)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_rankings_survive_eight_bits():
    vectors = unit(200, 64)
    ranges = measure_ranges(vectors)
    codes = quantize_vectors(vectors, "int8", ranges)
    low, high = np.array(ranges["64"])
    back = (codes + 128.5) * (high - low) / 255 + low
    cosines = (unit(1, 64, 1) @ vectors.T, unit(1, 64, 1) @ back.T)
    assert np.corrcoef(*np.concatenate(cosines))[0, 1] > 0.9995


def test_only_unit_vectors_are_normalized_again():
    vectors = 3 * unit(5, 96)
    np.testing.assert_array_equal(shorten(vectors, 64, unit_length=False), vectors[:, :64])
    cut = shorten(unit(5, 96), 64)
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(cut[:, 0] / cut[:, 1], vectors[:, 0] / vectors[:, 1], rtol=1e-5)
    ranges = measure_ranges(vectors, unit_length=False)
    np.testing.assert_allclose(ranges["64"][1], vectors[:, :64].max(axis=0), rtol=1e-4)


def test_ranges_are_of_each_dimension():
    vectors = unit(50, 96)
    ranges = measure_ranges(vectors)
    assert list(ranges) == ["96", "64", "32"]
    cut = shorten(vectors, 32)
    np.testing.assert_allclose(ranges["32"], [cut.min(axis=0), cut.max(axis=0)], rtol=1e-4)


def test_encode_in_every_precision(embedder):
    with pytest.raises(InputError, match=r"there are none: call `embedder\.calibrate"):
        embedder.encode(TEXTS, precision="int8")
    embedder.calibrate(iter(TEXTS))
    plain = embedder.encode(TEXTS)
    for precision, width, dtype in (
        ("int8", 96, np.int8),
        ("uint8", 96, np.uint8),
        ("binary", 12, np.int8),
        ("ubinary", 12, np.uint8),
    ):
        found = embedder.encode(TEXTS, precision=precision)
        assert (found.shape, found.dtype) == ((len(TEXTS), width), dtype)
        np.testing.assert_array_equal(found, quantize_vectors(plain, precision, embedder.ranges))
    assert embedder.encode(TEXTS, precision="int8", dim=64).shape == (len(TEXTS), 64)
    with pytest.raises(InputError, match="at 50 dimensions, and ranges are measured at 96, 64, 32"):
        embedder.encode(TEXTS, precision="int8", dim=50)
    with pytest.raises(InputError, match="precision should be one of float32"):
        embedder.encode(TEXTS, precision="int4")
    with pytest.raises(InputError, match="at least two texts"):
        embedder.calibrate(TEXTS[:1])


def test_other_ranges_are_said(embedder, caplog):
    embedder.calibrate(TEXTS)
    embedder.calibrate(TEXTS)
    assert not caplog.records
    embedder.calibrate(TEXTS[:8])
    assert "8-bit vectors from before do not compare with new ones" in caplog.text


def test_nan_is_not_hidden_in_eight_bits(embedder, monkeypatch):
    """An integer cannot say it, and one such text would ruin the ranges of all."""
    embedder.calibrate(TEXTS)
    ranges, run = embedder.ranges, embedder.embed_rows

    def spoilt(rows, **options):
        vectors = run(rows, **options)
        vectors[5, 0] = np.nan
        return vectors

    monkeypatch.setattr(embedder, "embed_rows", spoilt)
    for precision in ("int8", "ubinary"):
        with pytest.raises(InputError, match=r"1 of 32 texts gave NaN.*the first is text 5"):
            embedder.encode(TEXTS, precision=precision)
    with pytest.raises(InputError, match=r"the first is text 105"):
        embedder.encode(TEXTS, precision="int8", first=100)
    with pytest.raises(InputError, match=r"1 of 32 texts gave NaN"):
        embedder.calibrate(TEXTS)
    assert embedder.ranges == ranges
    assert np.isnan(embedder.embed_texts(TEXTS)).sum() == 1


def test_what_cannot_be_is_said_before_any_work(embedder, monkeypatch):
    monkeypatch.setattr(embedder, "embed_rows", lambda rows, **options: pytest.fail("ran"))
    with pytest.raises(InputError, match="there are none"):
        embedder.encode(TEXTS, precision="int8")


def test_ranges_are_kept_in_the_manifest(embedder):
    embedder.calibrate(TEXTS)
    folder = embedder.artifact.folder
    assert json.loads((folder / "embedport.json").read_text())["ranges"] == embedder.ranges
    again = embedport.load_embedder(folder)
    np.testing.assert_array_equal(
        again.encode(TEXTS, precision="int8"), embedder.encode(TEXTS, precision="int8")
    )
