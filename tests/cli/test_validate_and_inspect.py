"""The verbs that look at a model: validate and inspect."""

import json
import shutil
import subprocess
import sys

import pytest

import embedport

TEXTS = ["What is the capital of China?", "Explain gravity", "日本語 🥾"]


class TestValidate:
    def test_exit_codes_and_reports(self, run, folders, checkpoints, tmp_path):
        (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
        arguments = ("validate", folders / "embedding", "--reference", checkpoints("kv2"))
        arguments += ("--input", tmp_path / "texts.txt", "--no-record")
        code, out, err = run(*arguments, "--report", tmp_path / "report.md")
        assert code == 0
        assert out.splitlines()[-1].startswith("Holds against ")
        assert "report.md" in err
        assert "**Holds" in (tmp_path / "report.md").read_text()
        code, out, _ = run(*arguments, "--min-cosine", 1, "--json")
        assert code == 1
        assert json.loads(out)["passed"] is False

    def test_the_verdict_is_on_the_screen(self, run, folders, checkpoints, small_set):
        """Beneath the gates, with each MRL dimension and input left to the report."""
        arguments = ("validate", folders / "embedding", "--reference", checkpoints("kv2"))
        arguments += ("--retrieval", small_set(400, 20), "--min-cosine", 1, "--no-record")
        code, out, err = run(*arguments)
        lines = out.splitlines()
        assert code == 1
        verdict = next(i for i, line in enumerate(lines) if line.startswith("Does not hold"))
        assert lines[verdict].endswith(": minimum cosine")
        assert all(line.startswith("  ") for line in lines[verdict + 1 :])
        assert [line.split()[-1] for line in lines if " minimum cosine " in line] == ["fails"]
        assert sum("nDCG@10 " in line for line in lines) <= 2  # the gate, and the full width
        # Two tables: the gates, and the retrieval that was asked for.
        assert sum(set(line.strip()) == {"─"} for line in lines) == 2
        assert "All figures: --report" in err

    def test_pairs(self, run, folders, checkpoints, tmp_path):
        rows = [{"query": "q", "document": text} for text in TEXTS]
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        code, out, err = run(
            *("validate", folders / "reranker", "--reference", checkpoints("kv2", "reranker")),
            *("--input", tmp_path / "pairs.jsonl", "--json"),
        )
        assert code == 0
        assert json.loads(out)["inputs"] == 3
        parity = embedport.Artifact.open(folders / "reranker").manifest.parity
        assert parity is not None
        assert parity["passed"]
        assert "README.md" in err

    def test_without_torch(self, folders, checkpoints):
        code = "import sys; sys.modules['torch'] = None\nfrom embedport.cli import main; main()"
        arguments = ("validate", folders / "embedding", "--reference", checkpoints("kv2"))
        found = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
        )
        assert found.returncode == 2
        assert found.stderr == (
            "embedport: torch is not installed: pip install 'embedport[torch]'\n"
        )


class TestInspect:
    def test_checkpoint(self, run, checkpoints):
        facts = json.loads(run("inspect", checkpoints("kv1"), "--json")[1])
        assert facts["task"] == "embedding"
        assert (facts["num_kv_heads"], facts["head_dim"]) == (1, 32)
        assert facts["weights"]["dtypes"] == ["BF16"]
        assert list(facts["weights"]["shards"]) == ["model.safetensors"]
        code, out, _ = run("inspect", checkpoints("kv1"))
        assert code == 0
        assert "4, 1 for keys and values, each of 32" in out

    @pytest.mark.parametrize("task", ["embedding", "reranker"])
    def test_estimated_size(self, run, folders, checkpoints, task):
        facts = json.loads(run("inspect", checkpoints("kv2", task), "--json")[1])
        found = json.loads(run("inspect", folders / task, "--json")[1])
        weights = found["files"]["onnx/model.onnx_data"]["size"]
        assert facts["artifact_bytes"]["fp32"] == pytest.approx(weights, rel=0.01)

    def test_configuration_only(self, run, checkpoints, copied):
        folder = copied(checkpoints("kv2"))
        (folder / "model.safetensors").unlink()
        assert "not on this disk" in run("inspect", folder)[1]

    def test_artifact(self, run, folders):
        facts = json.loads(run("inspect", folders / "embedding", "--json")[1])
        assert facts["files"].keys() >= {"onnx/model.onnx", "tokenizer.json"}
        assert facts["parity"] is None
        assert facts["precision"] == "fp32"
        assert facts["kernels_here"].startswith(
            ("embedport's for ", "none, onnxruntime's operators")
        )
        code, out, _ = run("inspect", folders / "embedding")
        assert code == 0
        assert "all as the manifest says" in out
        assert "not validated" in out

    def test_kernels_that_were_not_built(self, run, folders, monkeypatch):
        monkeypatch.setattr("embedport.runtimes.ort_custom_ops.find_library", lambda: None)
        out = " ".join(run("inspect", folders / "embedding")[1].split())
        assert "Kernels here none, onnxruntime's operators run: embedport was built without" in out

    def test_checkpoint_artifact(self, run, quantized, copied):
        folder = copied(quantized("w8a8"))
        facts = json.loads(run("inspect", folder, "--json")[1])
        assert (facts["format"], facts["precision"], facts["graph"]) == ("checkpoint", "w8a8", None)
        assert facts["weights"]["attention"]["i8"] > 0
        code, out, _ = run("inspect", folder)
        assert code == 0
        assert "all as the manifest says" in out
        # And without a manifest.
        (folder / "embedport.json").unlink()
        facts = json.loads(run("inspect", folder, "--json")[1])
        assert facts["quantization"]["precision"] == "w8a8"
        assert facts["weights"]["dtypes"] == ["BF16", "I8"]
        words = " ".join(run("inspect", folder)[1].split())
        assert "quantized by compressed-tensors: w8a8, which runs it; exported" in words
        assert facts["artifact_bytes"]["fp32"] > 0
        # One that `export` does not take.
        shutil.rmtree(folder)
        (folder := copied(quantized("bnb-int8"))).joinpath("embedport.json").unlink()
        assert json.loads(run("inspect", folder, "--json")[1])["artifact_bytes"] is None
        assert "As an artifact" not in run("inspect", folder)[1]

    def test_damage(self, run, folders, copied):
        folder = copied(folders / "embedding")
        (folder / "tokenizer.json").write_text("{}")
        code, out, err = run("inspect", folder)
        assert (code, out) == (2, "")
        assert "tokenizer.json should have" in err
