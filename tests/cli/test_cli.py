"""The command line as a person and as a program use it."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

import embedport
from embedport.cli import main
from embedport.demo.samples import builtin_pairs, builtin_samples

TEXTS = ["What is the capital of China?", "Explain gravity", "日本語 🥾"]
STYLE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, checkpoints):
    base = tmp_path_factory.mktemp("cli")
    for task in ("embedding", "reranker"):
        embedport.export(checkpoints("kv2", task), base / task)
    return base


@pytest.fixture
def run(monkeypatch, capsys):
    """A function (arguments, stdin) -> (exit code, standard output, standard error).

    With `terminal`, standard output is a terminal of 60 columns.
    """

    def call(*arguments, stdin=None, terminal=False):
        import io

        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        monkeypatch.setenv("COLUMNS", "60" if terminal else "80")

        monkeypatch.setattr(sys, "argv", ["embedport", *map(str, arguments)])
        buffer = io.BytesIO((stdin or "").encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(buffer, encoding="utf-8"))
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return ended.value.code or 0, STYLE.sub("", captured.out), captured.err

    return call


def json_lines(text):
    return [json.loads(line) for line in text.splitlines()]


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
        code, out, err = run(*command, "--method", "w8a8", "--form", "sequence-classification")
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


class TestEncode:
    def test_arguments_as_json(self, run, folders):
        code, out, _ = run("encode", folders / "embedding", *TEXTS, "--prompt", "query")
        assert code == 0
        rows = json_lines(out)
        assert [row["text"] for row in rows] == TEXTS
        embedder = embedport.load(folders / "embedding")
        assert isinstance(embedder, embedport.Embedder)
        expected = embedder.encode(TEXTS, prompt="query")
        np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=1e-6)

    def test_files(self, run, folders, tmp_path):
        (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
        rows = "\n".join(json.dumps({"text": text}) for text in TEXTS)
        (tmp_path / "in.jsonl").write_text(rows, encoding="utf-8")
        expected = embedport.load(folders / "embedding").encode(TEXTS, dim=16)  # ty: ignore
        for name in ("in.txt", "in.jsonl"):
            code, out, err = run(
                *("encode", folders / "embedding", "--input", tmp_path / name),
                *("--dim", 16, "-o", tmp_path / "out.npy"),
            )
            assert (code, out) == (0, "")
            assert "3 vectors of 16, on cpu" in err
            np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)
        run("encode", folders / "embedding", *TEXTS, "-o", tmp_path / "out.jsonl")
        assert len(json_lines((tmp_path / "out.jsonl").read_text())) == 3
        assert not list(tmp_path.glob(".*partial*"))

    def test_standard_input(self, run, folders):
        piped = "\n".join(TEXTS) + "\n"
        for more in ((), ("--input", "-")):
            code, out, _ = run("encode", folders / "embedding", *more, stdin=piped)
            assert code == 0
            assert [row["text"] for row in json_lines(out)] == TEXTS
        assert run("encode", folders / "embedding", stdin="") == (0, "", "")

    def test_instruction(self, run, folders):
        code, out, _ = run("encode", folders / "embedding", "noise", "--instruction", "Find it")
        literal = run("encode", folders / "embedding", "Instruct: Find it\nQuery:noise")[1]
        assert code == 0
        assert json_lines(out)[0]["embedding"] == json_lines(literal)[0]["embedding"]

        again = run(
            "encode",
            folders / "embedding",
            "noise",
            "--instruction",
            "Find it",
            "--prompt",
            "query",
        )[1]
        assert again == out

    def test_terminal(self, run, folders):
        code, out, _ = run("encode", folders / "embedding", *TEXTS, terminal=True)
        assert code == 0
        vectors = embedport.load(folders / "embedding").encode(TEXTS)  # ty: ignore
        for i, text in enumerate(TEXTS):
            values = " ".join(f"{value:+.3f}" for value in vectors[i, :4])
            line = next(line.split("  ") for line in out.splitlines() if values in line)
            assert text.startswith(line[2].strip().rstrip("…")), line
        cosines = " ".join(f"{value:.2f}" for value in vectors @ vectors[2])
        assert f"2 {cosines}" in [" ".join(line.split()) for line in out.splitlines()]
        assert max(map(len, out.splitlines())) <= 60

    def test_nan_is_null(self, run, folders, monkeypatch):
        def encode(_self, texts, **_options):
            return np.full((len(texts), 2), [np.nan, 0.5], np.float32)

        monkeypatch.setattr(embedport.Embedder, "encode", encode)
        out = run("encode", folders / "embedding", "text")[1]
        assert json.loads(out) == {"text": "text", "embedding": [None, 0.5]}

    def test_truncation_is_said(self, run, folders, tmp_path):
        command = [sys.executable, "-m", "embedport", "encode", str(folders / "embedding")]
        found = subprocess.run(
            [*command, "word " * 99, "--max-length", "8"], capture_output=True, text=True
        )
        assert found.returncode == 0
        assert found.stderr == ("embedport: 1 of 1 texts cut to 8 tokens, the first is text 0\n")


class TestRerank:
    def test_json(self, run, folders):
        code, out, _ = run("rerank", folders / "reranker", "query", *TEXTS, "--top-k", 2)
        rows = json_lines(out)
        assert code == 0
        assert len(rows) == 2
        assert rows[0]["score"] >= rows[1]["score"]
        assert TEXTS[rows[0]["index"]] == rows[0]["document"]

    def test_terminal(self, run, folders):
        documents = ["A long document, longer than a line of sixty columns can be.", "Short."]
        code, out, _ = run("rerank", folders / "reranker", "query", *documents, terminal=True)
        assert code == 0
        rows = [line.split() for line in out.splitlines() if "…" in line or "Short." in line]
        assert [row[0] for row in rows] == ["1", "2"]
        assert float(rows[0][1]) >= float(rows[1][1])
        assert {row[2] for row in rows} == {"0", "1"}

    def test_file(self, run, folders, tmp_path):
        code, out, _ = run(
            *("rerank", folders / "reranker", "query", "-o", tmp_path / "out.jsonl"),
            stdin="one\ntwo\n",
        )
        assert (code, out) == (0, "")
        found = json_lines((tmp_path / "out.jsonl").read_text())
        assert {row["document"] for row in found} == {"one", "two"}


class TestValidate:
    def test_exit_codes_and_reports(self, run, folders, checkpoints, tmp_path):
        (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
        arguments = ("validate", folders / "embedding", "--reference", checkpoints("kv2"))
        arguments += ("--input", tmp_path / "texts.txt", "--no-record")
        code, out, _ = run(*arguments, "--report", tmp_path / "report.md")
        assert code == 0
        assert out.startswith("Holds: ")
        assert "**Holds" in (tmp_path / "report.md").read_text()
        code, out, _ = run(*arguments, "--min-cosine", 1.1, "--json")
        assert code == 1
        assert json.loads(out)["passed"] is False

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


class TestCheckpoints:
    """Without an export: plain and quantized checkpoints."""

    @pytest.mark.parametrize("method", [None, "awq"])
    def test_encode(self, run, checkpoints, quantized, method):
        folder = quantized(method) if method else checkpoints("kv8")
        code, out, err = run("encode", folder, "a text", "--device", "cpu", "--json")
        assert (code, err) == (0, "")
        assert len(json.loads(out)["embedding"]) == 128

    def test_rerank(self, run, checkpoints):
        arguments = ("rerank", checkpoints("kv2", "reranker"), "query", "one", "two")
        code, out, err = run(*arguments, "--device", "cpu", "--json")
        assert (code, err) == (0, "")
        assert len(out.splitlines()) == 2

    def test_validate(self, run, checkpoints, tmp_path):
        folder = checkpoints("kv2")
        texts = tmp_path / "texts.txt"
        texts.write_text("tea\nsnow\n")
        code, _, err = run(
            *("validate", folder, "--reference", folder, "--input", texts, "--device", "cpu")
        )
        assert code == 0
        assert "Recorded" not in err


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
        code, out, _ = run("inspect", folders / "embedding")
        assert code == 0
        assert "all as the manifest says" in out
        assert "not validated" in out

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
        assert "quantized by compressed-tensors: w8a8" in words

    def test_damage(self, run, folders, copied):
        folder = copied(folders / "embedding")
        (folder / "tokenizer.json").write_text("{}")
        code, out, err = run("inspect", folder)
        assert (code, out) == (2, "")
        assert "tokenizer.json should have" in err


def test_demo(run, tmp_path, monkeypatch, small_set):
    # Long texts take the most time and add nothing to what is tested here.
    short = [sample for sample in builtin_samples() if len(sample.text) < 200]
    pairs = [pair for pair in builtin_pairs() if len(pair.document) < 200]
    monkeypatch.setattr("embedport.validation.tasks.builtin_samples", lambda: short)
    monkeypatch.setattr("embedport.validation.tasks.builtin_pairs", lambda: pairs)
    data = small_set(every=200, others=60)
    monkeypatch.setattr("embedport.beir._builtin", lambda: data)
    code, out, _ = run("demo", "-o", tmp_path / "demo")
    assert code == 0, out
    assert "Three queries on" in out
    assert out.count("holds") == 4
    assert out.count("nDCG@10 (of the reference)") == 1
    page = tmp_path / "demo" / "embedding-fp32.html"
    assert out.strip().endswith(f"The report: {page}")
    for name in ("embedding-fp32", "embedding-int8", "reranker-fp32", "reranker-int8"):
        assert "<svg" in (tmp_path / "demo" / f"{name}.html").read_text(encoding="utf-8")
        parity = embedport.Artifact.open(tmp_path / "demo" / name).manifest.parity
        assert parity is not None
        assert parity["passed"]
    # An earlier demo's folder is replaced. Without torch there is no reference.
    monkeypatch.setattr("embedport.demo.pipeline.find_spec", lambda name: None)
    code, out, _ = run("demo", "-o", tmp_path / "demo")
    assert code == 0
    assert "pip install 'embedport[cpu,torch,retrieval,report]'" in out
    parity = embedport.Artifact.open(tmp_path / "demo" / "embedding-fp32").manifest.parity
    assert parity is None


def test_demo_replaces_only_its_own(run, tmp_path):
    code, _, err = run("demo", "-o", tmp_path)
    assert code == 2
    assert "is not an earlier demo's" in err
    assert tmp_path.is_dir()


class TestErrors:
    """One line on standard error, exit code 2, no traceback, nothing left behind."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["encode", "nowhere", "text"], "nowhere: no such folder"),
            (["encode", "{here}", "text"], "is neither an artifact nor a checkpoint"),
            (["encode", "{embedding}", "a", "--device", "cuda"], "has no CUDAExecutionProvider"),
            (["encode", "{embedding}", "a", "--prompt", "qurey"], "no prompt is named 'qurey'"),
            (["encode", "{embedding}", "a", "--dim", "65"], "dim should be from 1 to 64"),
            (["encode", "{embedding}", "a", "-o", "x.csv"], "should end with .npy or .jsonl"),
            (["encode", "{embedding}", "a", "-o", "no/x.npy"], "no/x.npy cannot be written"),
            (["encode", "{embedding}", "a", "--input", "b.txt"], "not both"),
            (["encode", "{embedding}", "--input", "gone.txt"], "gone.txt cannot be read"),
            (["encode", "{embedding}", "--input", "{here}/empty.txt"], "holds no text"),
            (["encode", "{embedding}", "--input", "{here}/bad.jsonl"], "bad.jsonl:2 should be"),
            (["encode", "{embedding}", "--input", "{here}/lone.jsonl"], "lone surrogate U+D800"),
            (["encode", "{embedding}", "--input", "{here}/mixed.jsonl"], "names prompts text by"),
            (["encode", "{reranker}", "a"], "use `embedport rerank`"),
            (["rerank", "{embedding}", "q", "a"], "use `embedport encode`"),
            (["rerank", "{reranker}", "q", "a", "--top-k", "0"], "top_k should be at least 1"),
            (["export", "onnx", "{here}", "-o", "{here}/out"], "config.json is missing"),
            (["export", "onnx", "Qwen/Nowhere", "-o", "{here}/out"], "the hub cannot be reached"),
            (
                ["export", "onnx", "{kv2}", "-o", "{here}/out", "--precision", "x"],
                "precision should",
            ),
            (["export", "onnx", "{here}/bert", "-o", "{here}/out"], "model_type should be 'qwen3'"),
            (
                ["encode", "{embedding}", "a", "--instruction", "b", "--prompt", "c"],
                "leave --prompt",
            ),
            (["inspect", "{here}"], "config.json is missing"),
            (["validate", "{embedding}", "--reference", "{here}"], "config.json is missing"),
        ],
    )
    def test_one_line(self, run, folders, checkpoints, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty.txt").write_text("\n")
        (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txet": "?"}\n')
        (tmp_path / "mixed.jsonl").write_text('{"text": "a", "prompt": "query"}\n')
        (tmp_path / "lone.jsonl").write_text('{"text": "\\ud800"}\n')
        (tmp_path / "bert").mkdir()
        (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
        before = sorted(tmp_path.rglob("*"))
        places = {
            "here": tmp_path,
            "embedding": folders / "embedding",
            "reranker": folders / "reranker",
            "kv2": checkpoints("kv2"),
        }
        code, out, err = run(*(each.format(**places) for each in arguments))
        assert (code, out) == (2, "")
        assert err.startswith("embedport: ")
        assert err.count("\n") == 1
        assert message in err
        assert sorted(tmp_path.rglob("*")) == before

    def test_unknown_option(self, run):
        code, _, err = run("encode", "--colour")
        assert code == 2
        assert "No such option: --colour" in err

    def test_debug_shows_where(self, run):
        for arguments in (
            ("--debug", "encode", "nowhere", "text"),
            ("encode", "nowhere", "text", "--debug"),
        ):
            code, _, err = run(*arguments)
            assert code == 2
            assert "Traceback" in err
            last = "nowhere: no such folder, and not a hub id of the form owner/name"
            assert err.endswith(f"embedport: {last}\n")

    def test_a_bug_is_called_one(self, run, folders, monkeypatch):
        from embedport import runtimes

        def fail(*_args, **_options):
            raise ZeroDivisionError("oops")

        monkeypatch.setattr(runtimes, "load", fail)
        code, _, err = run("encode", folders / "embedding", "text")
        assert code == 1
        assert err == (
            "embedport: this is a bug: ZeroDivisionError: oops (run it again with --debug)\n"
        )

    def test_interrupted(self, run, folders, monkeypatch):
        from embedport import runtimes

        def interrupt(*_args, **_options):
            raise KeyboardInterrupt

        monkeypatch.setattr(runtimes, "load", interrupt)
        code, out, err = run("encode", folders / "embedding", "text")
        assert (code, out, err) == (130, "", "embedport: interrupted\n")

    def test_reader_that_goes_away(self, folders):
        command = f"yes text | head -3000 | {sys.executable} -m embedport encode "
        found = subprocess.run(
            f"({command} {folders / 'embedding'}; echo code $? >&2) | head -1 > /dev/null",
            shell=True,
            capture_output=True,
            text=True,
        )
        assert found.stderr == "code 1\n"


def test_version_and_help():
    def shown(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "embedport", *arguments],
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert shown("--version") == f"embedport {embedport.__version__}\n"
    for verb in ("export", "encode", "rerank", "validate", "inspect", "demo"):
        assert verb in shown("--help")
    assert "--precision" in shown("export", "onnx", "--help")


def test_help_brings_nothing_heavy():
    heavy = ("numpy", "onnx", "onnx_ir", "onnxruntime", "tokenizers", "torch")
    code = (
        "import sys; sys.argv = ['embedport', '--help']\n"
        "from embedport.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n"
        f"    sys.exit(str([m for m in {heavy!r} if m in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stderr.strip() == "[]"
