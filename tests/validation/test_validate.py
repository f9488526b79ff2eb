"""Validation of whole artifacts: what holds, and that each gate can fail."""

import json

import numpy as np
import pytest

import embedport
from embedport.demo.samples import Pair, Sample
from embedport.errors import InputError
from embedport.runtimes import onnxruntime as adapter
from embedport.validation import compare
from embedport.validation.reference import Reference
from embedport.validation.thresholds import THRESHOLDS, find_thresholds

TEXTS = [
    Sample("What is the capital of China?", "query"),
    Sample("Explain gravity", "query"),
    Sample("The capital of China is Beijing."),
    Sample("Gravity is a force that attracts two bodies towards each other."),
    Sample("import numpy as np"),
    Sample(""),
]
PAIRS = [
    Pair("capital of China", "Beijing"),
    Pair("capital of China", "Paris"),
    Pair("capital of China", "A very long document about something else. " * 9),
    Pair("gravity", "apples fall"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, checkpoints):
    base = tmp_path_factory.mktemp("artifacts")
    for task in ("embedding", "reranker"):
        embedport.export(checkpoints("kv2", task), base / task)
    return base


def gates(report):
    return {gate.name: gate for gate in report.gates}


def test_embedding(folders, checkpoints, copied):
    folder = copied(folders / "embedding")
    report = embedport.validate(folder, checkpoints("kv2"), TEXTS, device="cpu")
    assert report.passed
    assert report.mismatch is None
    (comparison,) = report.comparisons
    assert comparison.reference == "fp32 arithmetic on fp16 weights (cpu)"
    assert comparison.figures["minimum cosine"] >= 0.99999
    assert comparison.figures["Kendall tau"] == 1
    assert list(comparison.dimensions) == [32]
    assert len(comparison.worst) == 5
    assert len(report.invariance) == 10
    recorded = embedport.Artifact.open(folder).manifest.parity
    assert recorded is not None
    assert recorded["passed"] is True
    assert recorded["comparisons"][0]["figures"] == comparison.figures
    assert "Holds: 4 of 4 gates" in (folder / "README.md").read_text()


def test_reranker(folders, checkpoints):
    pairs = [(pair.query, pair.document) for pair in PAIRS]
    report = embedport.validate(
        folders / "reranker", checkpoints("kv2", "reranker"), pairs=pairs, record=False
    )
    assert report.passed
    assert report.comparisons[0].figures["maximum score difference"] <= 1e-4
    assert embedport.Artifact.open(folders / "reranker").manifest.parity is None


def test_built_in_texts(folders, checkpoints):
    report = embedport.validate(folders / "embedding", checkpoints("kv2"), record=False)
    assert report.passed
    assert len(report.texts) == 64


def test_another_dimension(tmp_path, checkpoints):
    embedport.export(checkpoints("kv2"), tmp_path / "out", dim=48)
    assert embedport.validate(tmp_path / "out", checkpoints("kv2"), TEXTS, record=False).passed


def test_hidden_output(tmp_path, checkpoints):
    embedport.export(checkpoints("kv2"), tmp_path / "out", outputs="hidden")
    assert embedport.validate(tmp_path / "out", checkpoints("kv2"), TEXTS, record=False).passed


def perturb(monkeypatch, change):
    """Change what the artifact's session gives."""
    call = adapter.OnnxModel.__call__
    monkeypatch.setattr(
        adapter.OnnxModel, "__call__", lambda self, ids, mask: change(call(self, ids, mask), ids)
    )


def test_a_perturbed_vector_is_found(folders, checkpoints, monkeypatch):
    """Vectors turned by a known angle: the report gives its cosine."""

    def turn(vectors, ids):
        other = np.roll(vectors, 1, axis=1)
        other -= (other * vectors).sum(axis=1, keepdims=True) * vectors
        other /= np.linalg.norm(other, axis=1, keepdims=True)
        return np.cos(0.1) * vectors + np.sin(0.1) * other

    perturb(monkeypatch, turn)
    report = embedport.validate(folders / "embedding", checkpoints("kv2"), TEXTS, record=False)
    assert not report.passed
    assert gates(report)["minimum cosine"].value == pytest.approx(np.cos(0.1), abs=1e-5)
    assert report.verdict().startswith("Does not hold: minimum cosine")
    assert embedport.validate(
        folders / "embedding", checkpoints("kv2"), TEXTS, min_cosine=0.99, record=False
    ).passed


def test_nan_fails(folders, checkpoints, monkeypatch):
    def poison(vectors, ids):
        vectors[0] = np.nan
        return vectors

    perturb(monkeypatch, poison)
    report = embedport.validate(folders / "embedding", checkpoints("kv2"), TEXTS, record=False)
    failed = {gate.name for gate in report.gates if not gate.passed}
    assert failed == {"results with NaN or infinity", "minimum cosine", "batch invariance"}
    assert gates(report)["results with NaN or infinity"].value >= 1
    values = json.loads(report.to_json())
    assert values["passed"] is False
    assert values["comparisons"][0]["figures"]["minimum cosine"] is None


def test_score_difference_fails(folders, checkpoints, monkeypatch):
    perturb(monkeypatch, lambda scores, ids: scores + np.float32(0.002))
    arguments = (folders / "reranker", checkpoints("kv2", "reranker"), None, PAIRS)
    report = embedport.validate(*arguments, record=False)
    assert not report.passed
    assert gates(report)["maximum score difference"].value == pytest.approx(0.002, abs=1e-5)
    assert embedport.validate(*arguments, max_score_difference=0.003, record=False).passed


def test_token_ids_come_before_numbers(folders, checkpoints, copied, monkeypatch):
    """An artifact whose tokenizer lost the end token: found, named, and nothing is computed."""
    from tokenizers import Tokenizer

    from embedport.artifact import Manifest, write_manifest

    folder = copied(folders / "reranker")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["capital"])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_manifest(folder, Manifest.from_json(folder / "embedport.json"))
    monkeypatch.setattr(Reference, "score", lambda *_, **__: pytest.fail("a number was computed"))
    report = embedport.validate(folder, checkpoints("kv2", "reranker"), pairs=PAIRS, record=False)
    assert not report.passed
    assert report.comparisons == []
    assert [gate.name for gate in report.gates] == ["texts with other token ids"]
    assert report.mismatch is not None
    assert "capital of China | Beijing" in report.mismatch
    assert "at token" in report.mismatch


def test_fp16_reference_with_nan_does_not_decide(folders, checkpoints, monkeypatch):
    """As on a GPU with an 8B model: fp16 gives NaN, bf16 beside it decides."""
    embed = Reference.embed
    monkeypatch.setattr(compare, "REFERENCES", {"cpu": ("fp16", "fp32 arithmetic on fp16 weights")})

    def overflowing(self, rows, **options):
        vectors = embed(self, rows, **options)
        return vectors * np.nan if self.precision == "fp16" else vectors

    monkeypatch.setattr(Reference, "embed", overflowing)
    report = embedport.validate(
        folders / "embedding", checkpoints("kv2"), TEXTS, device="cpu", record=False
    )
    assert report.passed
    assert [each.reference_nonfinite for each in report.comparisons] == [0, len(TEXTS)]


def test_wrong_input(folders, checkpoints):
    embedding, reranker = folders / "embedding", folders / "reranker"
    checkpoint = checkpoints("kv2")
    with pytest.raises(InputError, match="give texts, not pairs"):
        embedport.validate(embedding, checkpoint, pairs=PAIRS)
    with pytest.raises(InputError, match="give pairs, not texts"):
        embedport.validate(reranker, checkpoint, ["text"])
    with pytest.raises(InputError, match="there is nothing to compare"):
        embedport.validate(embedding, checkpoint, [])
    with pytest.raises(InputError, match="not the artifact's reference"):
        embedport.validate(embedding, checkpoints("kv1"))


def test_thresholds():
    assert find_thresholds("fp32") == THRESHOLDS["fp32"]
    with pytest.raises(InputError, match="no thresholds for precision 'int3'; there are fp32"):
        find_thresholds("int3")


class TestReference:
    def test_weights_are_rounded_to_fp16(self, checkpoints):
        """On a CPU: fp32 arithmetic on the weights that an fp16 GPU would hold."""
        import torch

        from embedport import ModelSpec

        spec = ModelSpec.from_checkpoint(checkpoints("kv2", dtype="float32"))
        weight = Reference(spec, "fp32 arithmetic on fp16 weights", "cpu")._model.norm.weight
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, weight.half().float(), rtol=0, atol=0)
        from embedport.weights import Weights

        stored = torch.from_numpy(Weights(spec).read_fp32("norm.weight"))
        assert not torch.equal(weight, stored)
        assert torch.equal(weight, stored.half().float())

    def test_batches_change_nothing(self, checkpoints, monkeypatch):
        from embedport import ModelSpec
        from embedport.validation import reference

        spec = ModelSpec.from_checkpoint(checkpoints("kv2"))
        runner = Reference(spec, "fp32 arithmetic on fp16 weights", "cpu")
        ids = runner.embedding_ids([sample.text for sample in TEXTS], 512)
        assert all(row[-1] == ids[-1][0] for row in ids)  # each ends with <|endoftext|>
        together = runner.embed(ids, progress=False)
        monkeypatch.setattr(reference, "BATCH_TOKENS", 1)
        np.testing.assert_allclose(runner.embed(ids, progress=False), together, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


def test_report_in_a_terminal_and_in_markdown(folders, checkpoints):
    import io

    from rich.console import Console

    report = embedport.validate(folders / "embedding", checkpoints("kv2"), TEXTS, record=False)
    for width in (60, 100):
        file = io.StringIO()
        Console(file=file, width=width).print(report)
        shown = file.getvalue()
        assert shown.startswith("Holds: 4 of 4 gates")
        assert max(map(len, shown.splitlines())) <= width
        assert "import numpy as np" in shown
    markdown = report.to_markdown()
    assert markdown.startswith("**Holds: 4 of 4 gates**")
    assert (
        "| minimum cosine | 1.0000000 | ≥ 0.9999900 | holds |" in markdown or "0.99999" in markdown
    )
