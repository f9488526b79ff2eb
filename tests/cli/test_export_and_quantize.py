"""The verbs that write a model: export and quantize."""

import json
import sys

import pytest

import embedport

TEXTS = ["What is the capital of China?", "Explain gravity", "日本語 🥾"]


class TestExport:
    def test_json(self, run, checkpoints, tmp_path):
        code, out, err = run(
            *("export", "onnx", checkpoints("kv2"), "-o", tmp_path / "out"),
            *("--precision", "bf16", "--dialect", "standard", "--dim", 32, "--json"),
        )
        assert (code, err) == (0, "")
        facts = json.loads(out)
        assert facts["artifact"] == str(tmp_path / "out")
        assert facts["kept_in_fp32"] == ["residual stream"]
        manifest = embedport.Artifact.open(tmp_path / "out").manifest
        assert manifest.graph is not None
        assert (manifest.precision, manifest.graph.dialect) == ("bf16", "standard")
        assert manifest.embedding_dim == 32

    def test_words(self, run, checkpoints, tmp_path):
        arguments = ("export", "onnx", checkpoints("kv2"), "-o", tmp_path / "out")
        code, out, _ = run(*arguments, "--precision", "fp16")
        assert code == 0
        assert "embedding, fp16, ort dialect" in " ".join(out.split())
        assert "Kept in fp32: nothing" in out
        assert f"embedport validate {tmp_path / 'out'} --reference {checkpoints('kv2')}" in out
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert "exists; choose another place or replace it with --force" in err
        assert run(*arguments, "--force")[0] == 0

    def test_the_reference_of_a_quantized_checkpoint_is_its_original(
        self, run, checkpoints, quantized, copied, tmp_path
    ):
        source = quantized("gptq")
        code, out, _ = run("export", "onnx", source, "-o", tmp_path / "out")
        assert code == 0
        assert f"embedport validate {tmp_path / 'out'} --reference {checkpoints('kv8')}\n" in out
        card = (tmp_path / "out" / "README.md").read_text()
        assert f"`embedport validate out --reference {checkpoints('kv8')}`" in card
        # Of a checkpoint from elsewhere nothing says what it was quantized from.
        foreign = copied(source)
        (foreign / "embedport.json").unlink()
        code, out, _ = run("export", "onnx", foreign, "-o", tmp_path / "other")
        assert f"embedport validate {tmp_path / 'other'} --reference ORIGINAL\n" in out
        assert f"ORIGINAL: the checkpoint that {foreign} was quantized from" in out

    def test_dry_run(self, run, checkpoints, tmp_path):
        source = checkpoints("kv8")
        options = ("--precision", "int4", "--group-size", 32, "--algorithm", "rtn")
        arguments = ("export", "onnx", source, "-o", tmp_path / "out", *options)
        code, out, _ = run(*arguments, "--dry-run")
        assert code == 0
        assert "quantize 14 matrices to int4 in groups of 32, with zero points by rtn" in out
        code, out, _ = run(*arguments, "--dry-run", "--json")
        estimate = json.loads(out)
        assert code == 0
        assert list(tmp_path.iterdir()) == []
        assert run(*arguments)[0] == 0
        written = (tmp_path / "out" / "onnx" / "model.onnx_data").stat().st_size
        assert abs(estimate["bytes"] - written) < 4096
        # What exists is not overwritten, and that is known before.
        code, _, err = run(*arguments, "--dry-run")
        assert code == 2
        assert "exists; choose another place" in err

    def test_path_that_looks_like_markup(self, run, checkpoints, tmp_path):
        output = tmp_path / "a model [/x]"
        code, out, _ = run("export", "onnx", checkpoints("kv2"), "-o", output)
        assert code == 0
        assert out.startswith(f"{output}: embedding, fp32")
        assert f"embedport encode '{output}' " in out

    def test_hidden(self, run, checkpoints, tmp_path):
        code, _, _ = run(
            *("export", "onnx", checkpoints("kv2"), "-o", tmp_path / "out", "--output", "hidden")
        )
        assert code == 0
        graph = embedport.Artifact.open(tmp_path / "out").manifest.graph
        assert graph is not None
        assert (graph.output, graph.outputs) == ("hidden", ("last_hidden_state",))


class TestQuantize:
    def test_json(self, run, checkpoints, tmp_path):
        command = ("quantize", checkpoints("kv8", "reranker"), "-o", tmp_path / "out", "--json")
        command += ("--method", "w8a8", "--fast")
        code, out, err = run(*command, "--form", "sequence-classification")
        assert (code, err) == (0, "")
        facts = json.loads(out)
        assert (facts["task"], facts["method"]) == ("reranker", "w8a8")
        assert facts["bytes"] == embedport.Artifact.open(tmp_path / "out").size

    def test_wrong_request(self, run, checkpoints, tmp_path):
        command = ("quantize", checkpoints("kv8"), "-o", tmp_path / "out", "--method")
        code, out, err = run(*command, "w4")
        assert (code, out) == (2, "")
        assert "method should be one of bnb-int8, bnb-nf4" in err
        assert err.count("\n") == 1


class TestExportTensorRT:
    """TensorRT for RTX needs no GPU to build; TensorRT is not installed."""

    def test_an_engine(self, run, checkpoints, tmp_path):
        pytest.importorskip("tensorrt_rtx")
        code, out, err = run(
            *("export", "tensorrt", checkpoints("blocks"), "-o", tmp_path / "out"),
            *("--for", "rtx", "--compute-capability", "8.9", "--compute-capability", "12.0"),
            *("--profile", "1x1:2x16:4x64"),
        )
        assert (code, err) == (0, "")
        assert "Engine for GPUs of compute capability 8.9, 12.0; TensorRT for RTX 1." in out
        assert "Products: 14 in bf16" in out

    def test_without_a_library(self, run, checkpoints, tmp_path, monkeypatch):
        """All but the engine is written, and said."""
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        code, out, err = run(
            *("export", "tensorrt", checkpoints("blocks"), "-o", tmp_path / "out"),
            *("--precision", "fp8", "--profile", "1x1:2x16:4x64"),
        )
        assert (code, err) == (0, "")
        assert "No engine was built: TensorRT is not installed: pip install tensorrt" in out
        assert "TensorRT for RTX is not installed: pip install 'embedport[tensorrt-rtx]'" in out
        assert f"embedport export tensorrt {tmp_path}/out -o OUT --profile 1x1:2x16:4x64" in out
        code, out, _ = run("encode", tmp_path / "out", TEXTS[0], "--device", "cpu")
        assert code == 0

    def test_json(self, run, checkpoints, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        code, out, _ = run(
            *("export", "tensorrt", checkpoints("blocks"), "-o", tmp_path / "out", "--json")
        )
        facts = json.loads(out)
        assert code == 0
        assert (facts["precision"], facts["engine"]) == ("bf16", False)
        assert "TensorRT is not installed" in facts["obstacle"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--profile", "8x128"], "a profile should be MIN:OPT:MAX"),
            (["--precision", "fp32"], "precision should be one of fp16, bf16, fp8, int8, int4"),
            (["--hardware-compatible", "any"], "--hardware-compatible should be one of none"),
            (["--for", "this-gpu"], "--for this-gpu: TensorRT is not installed"),
            (["--compute-capability", "sm89"], "a compute capability should be like 8.9"),
        ],
    )
    def test_bad_requests(self, run, checkpoints, tmp_path, options, message):
        code, _, err = run(
            "export", "tensorrt", checkpoints("blocks"), "-o", tmp_path / "out", *options
        )
        assert code == 2
        assert message in err
        assert err.count("\n") == 1


class TestCalibration:
    def test_words(self, run, checkpoints, tmp_path):
        corpus, out = tmp_path / "corpus.txt", tmp_path / "set.jsonl"
        corpus.write_text("\n".join(TEXTS))
        code, printed, err = run("calibration", checkpoints("kv2"), corpus, "-o", out, "--count", 3)
        assert (code, err) == (0, "")
        assert f"{out}: 3 texts of " in printed
        assert f"--precision int4 --calibration {out}" in printed
        assert sorted(json.loads(line)["text"] for line in out.read_text().splitlines()) == sorted(
            TEXTS
        )

    def test_errors(self, run, checkpoints, tmp_path):
        corpus = tmp_path / "corpus.txt"
        arguments = ("-o", tmp_path / "set.jsonl")
        code, _, err = run("calibration", checkpoints("kv2"), corpus, *arguments)
        assert code == 2
        assert f"{corpus} cannot be read: No such file or directory" in err
        code, _, err = run("calibration", checkpoints("kv2", "reranker"), corpus, *arguments)
        assert code == 2
        assert "is a reranker: --embedder finds its pairs" in err
        assert list(tmp_path.iterdir()) == []
