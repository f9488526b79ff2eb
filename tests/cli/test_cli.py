"""The command line as a person and as a program meet it: errors, version, help."""

import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import typer

import embedport
from embedport.cli import app, main
from embedport.cli.app import StandardError
from embedport.cli.flags import with_flags
from embedport.errors import InputError
from embedport.progress import progress_bar


class TestErrors:
    """One line on standard error, exit code 2, no traceback, nothing left behind."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["encode", "nowhere", "text"], "nowhere: no such folder"),
            (["encode", "{here}", "text"], "is neither an artifact nor a checkpoint"),
            (["encode", "{embedding}", "a", "--device", "cuda"], "has no CUDAExecutionProvider"),
            (["encode", "{embedding}", "a", "--prompt", "qurey"], "no prompt is named 'qurey'"),
            (["encode", "{embedding}", "a", "--dim", "65"], "--dim should be from 1 to 64"),
            (
                ["encode", "{embedding}", "a", "-o", "x.csv"],
                "should end with .npy, .jsonl, .parquet or .arrow",
            ),
            (["encode", "{embedding}", "a", "-o", "no/x.npy"], "no/x.npy cannot be written"),
            (["encode", "{embedding}", "a", "-o", "x.npy", "--json"], "give one of them"),
            (["encode", "{embedding}", "--input", "{here}/far.jsonl"], "far.jsonl:3 should be"),
            (["encode", "{embedding}", "a", "--precision", "int8"], "there are none"),
            (["encode", "{embedding}", "a", "--input", "b.txt"], "not both"),
            (
                ["encode", "{embedding}", "--input", "gone.txt"],
                "gone.txt cannot be read: No such file",
            ),
            (["encode", "{embedding}", "--input", "{here}/empty.txt"], "holds no text"),
            (["encode", "{embedding}", "--input", "{here}/bad.jsonl"], "(it has no 'text')"),
            (["encode", "{embedding}", "--input", "{here}/list.jsonl"], "(it is not an object)"),
            (["encode", "{embedding}", "a", "-o", "out/"], "give --input FILE"),
            (
                ["encode", "{embedding}", "--input", "b.txt", "-o", "out/", "--json"],
                "--json prints",
            ),
            (["encode", "{embedding}", "--input", "{here}/lone.jsonl"], "lone surrogate U+D800"),
            (["encode", "{embedding}", "--input", "{here}/mixed.jsonl"], "names its own prompt"),
            (["encode", "{reranker}", "a"], "use `embedport rerank`"),
            (["rerank", "{embedding}", "q", "a"], "use `embedport encode`"),
            (
                ["rerank", "{reranker}", "q", "a", "--top-k", "0"],
                "embedport: --top-k should be at least 1",
            ),
            (["export", "onnx", "{here}", "-o", "{here}/out"], "config.json is missing"),
            (["export", "onnx", "Qwen/Nowhere", "-o", "{here}/out"], "the hub cannot be reached"),
            (
                ["export", "onnx", "{kv2}", "-o", "{here}/out", "--precision", "x"],
                "--precision should",
            ),
            (["export", "onnx", "{here}/bert", "-o", "{here}/out"], "model_type should be 'qwen3'"),
            (
                ["encode", "{embedding}", "a", "--instruction", "b", "--prompt", "c"],
                "leave --prompt",
            ),
            (["inspect", "{here}"], "config.json is missing"),
            (["inspect", "{embedding}", "--revision", "main"], "has no revision 'main'"),
            (
                ["validate", "{reranker}", "--reference", "{here}", "--min-cosine", "1"],
                "a reranker gives scores, not vectors",
            ),
            (
                ["validate", "{embedding}", "--reference", "{here}", "--save-run", "no/x.tsv"],
                "no/x.tsv cannot be written",
            ),
            (
                ["validate", "{embedding}", "--reference", "{here}", "--save-run", "{here}"],
                "is a folder",
            ),
            (["validate", "{embedding}", "--reference", "{here}"], "config.json is missing"),
            (["encode", "{embedding}", "a", "-o", "x" * 252 + ".npy"], "the name is too long"),
            (["export", "onnx", "{kv2}", "-o", "x" * 300], "the name is too long"),
        ],
    )
    def test_one_line(self, run, folders, checkpoints, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty.txt").write_text("\n")
        (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txet": "?"}\n')
        (tmp_path / "list.jsonl").write_text('["text"]\n')
        (tmp_path / "far.jsonl").write_text('{"text": "fine"}\n\n{"txet": "?"}\n')
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
        assert "No such option" in err
        assert "--colour" in err

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

    def test_a_warning_is_printed_once(self):
        """huggingface_hub and datasets have handlers of their own, and pass their records on.

        A folder that is opened again warns again.
        """
        code = (
            "import logging, embedport.cli.app as app\n"
            "logging.getLogger('theirs').addHandler(logging.StreamHandler())\n"
            "names = ('theirs.part', 'embedport.part', 'other', 'embedport.part')\n"
            "app.app = app.typer.Typer()\n"
            "app.app.command()(lambda: [logging.getLogger(n).warning(n) for n in names])\n"
            "app.main()\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stderr == "theirs.part\nembedport: embedport.part\nembedport: other\n"

    def test_a_server_says_each_error_though_it_is_the_same(self, monkeypatch):
        monkeypatch.setattr(sys, "stderr", screen := io.StringIO())
        handler = StandardError()
        for level in (logging.WARNING, logging.ERROR) * 2:
            handler.emit(logging.makeLogRecord({"msg": str(level), "levelno": level}))
        assert screen.getvalue().split() == ["30", "40", "40"]

    def test_a_warning_has_a_line_of_its_own_beside_a_progress_bar(self, monkeypatch):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        handler = StandardError()  # made before the bar, as in `main`
        monkeypatch.setattr(sys, "stderr", screen := Terminal())
        monkeypatch.setenv("TERM", "xterm")
        with progress_bar("Encoding", 3):
            handler.emit(logging.makeLogRecord({"msg": "2 texts cut"}))
        lines = (
            re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").split("\n")
        )
        assert "Encoding" in screen.getvalue()
        assert "2 texts cut" in lines

    @pytest.mark.skipif(os.name == "nt", reason="names are text there")
    def test_a_name_that_is_not_utf8(self, run, folders, checkpoints, tmp_path, monkeypatch):
        """No file of ours can hold it: here index.json, elsewhere a manifest or a report."""
        path = tmp_path / os.fsdecode(b"b\xffd.txt")
        path.write_text("tea\n")
        vectors = tmp_path / "vectors"
        code, out, err = run("encode", folders / "embedding", "--input", path, "-o", f"{vectors}/")
        assert (code, out, vectors.exists()) == (2, "", False)
        name = r"'b\udcffd.txt'"
        said = "embedport: a file's or folder's name is not UTF-8, and has to be:"
        assert err == f"{said} {name}; rename it\n"
        # onnxruntime takes no such name either.
        folder = shutil.copytree(folders / "embedding", tmp_path / os.fsdecode(b"b\xffd"))
        assert run("encode", folder, "tea")[2].startswith(said)
        # And an export says so before it calibrates.
        monkeypatch.setattr("embedport.exporters.onnx.export.staged", lambda *_, **__: 1 / 0)
        checkpoint = shutil.copytree(checkpoints(), tmp_path / os.fsdecode(b"c\xff"))
        for source, out, *options in (
            (checkpoint, "out"),
            (checkpoints(), os.fsdecode(b"o\xff")),
            (checkpoints(), "out", "--precision", "fp16", "--calibration", path),
        ):
            assert run("export", "onnx", source, "-o", tmp_path / out, *options)[2].startswith(said)

    def test_arguments_in_another_encoding(self, run, monkeypatch):
        """As LC_ALL=C PYTHONUTF8=0 gives them: neither the text nor the name is at fault."""
        monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
        hint = "here: set PYTHONUTF8=1)"
        for name, named in (("nowhere", False), ("nö", True)):
            code, _, err = run("encode", name, "text")
            assert (code, hint in err, err.count("\n")) == (2, named, 1)

    def test_interrupted(self, run, folders, monkeypatch):
        from embedport import runtimes

        def interrupt(*_args, **_options):
            raise KeyboardInterrupt

        monkeypatch.setattr(runtimes, "load", interrupt)
        code, out, err = run("encode", folders / "embedding", "text")
        assert (code, out, err) == (130, "", "embedport: interrupted\n")

    @pytest.mark.parametrize(
        "moment", ["embedport.cli.app.main", "typer.core.TyperGroup.parse_args"]
    )
    def test_interrupted_before_the_verb_runs(self, run, monkeypatch, moment):
        """While modules are imported, and while typer imports what reads options."""
        monkeypatch.setattr(moment, mock.Mock(side_effect=KeyboardInterrupt))
        assert run("encode", "folder", "text") == (130, "", "embedport: interrupted\n")

    def test_terminated(self, run, checkpoints, monkeypatch, tmp_path):
        """`docker stop` and service managers send SIGTERM: no working folder is left behind."""
        from embedport.exporters.onnx import export

        def terminate(*_args, **_options):
            assert list(tmp_path.iterdir())
            signal.raise_signal(signal.SIGTERM)

        before = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(export, "verify_graph", terminate)
        code, out, err = run("export", "onnx", checkpoints(), "-o", tmp_path / "out")
        assert (code, out) == (143, "")
        assert err.endswith("embedport: terminated\n")
        assert list(tmp_path.iterdir()) == []
        assert signal.getsignal(signal.SIGTERM) == before

    def test_a_terminal_without_utf8(self, folders, monkeypatch):
        """Its lines are JSON all the same."""
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
        text = "caf\u00e9 \U0001f600"
        monkeypatch.setattr(sys, "argv", ["embedport", "encode", str(folders / "embedding"), text])
        with pytest.raises(SystemExit) as ended:
            main()
        sys.stdout.flush()
        assert not ended.value.code
        assert json.loads(written.getvalue().decode("latin-1"))["text"] == text

    def test_reader_that_goes_away(self, folders):
        command = f"yes text | head -3000 | {sys.executable} -m embedport encode "
        found = subprocess.run(
            f"({command} {folders / 'embedding'}; echo code $? >&2) | head -1 > /dev/null",
            shell=True,
            capture_output=True,
            text=True,
        )
        assert found.stderr == "code 1\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
@pytest.mark.parametrize(
    ("streams", "code", "message"),
    [
        ("> /dev/full", 2, "embedport: the output cannot be written: No space left on device\n"),
        ("<&- >&-", 0, ""),
    ],
)
def test_streams_that_are_full_or_closed(streams, code, message):
    command = f"{sys.executable} -m embedport --version {streams}"
    found = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (code, "", message)


def test_closed_streams_are_opened(monkeypatch):
    """Python has None for each; a file would get its number, and libraries' messages with it."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    app.open_closed_streams()
    streams = [sys.stdin, sys.stdout, sys.stderr]
    assert not any(stream.isatty() for stream in streams)
    assert sys.stdin.read() == ""
    sys.stderr.write("text")
    for stream in streams:
        stream.close()


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


def test_completion():
    environment = os.environ | {
        "_EMBEDPORT_COMPLETE": "complete_bash",
        "COMP_WORDS": "embedport ser",
        "COMP_CWORD": "1",
    }
    command = [sys.executable, "-c", "from embedport.cli import main; main()"]
    command[2] = "import sys; sys.argv[0] = 'embedport'; " + command[2]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.stdout.split() == ["serve"]


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}])
def test_no_color(variables):
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm-256color"} | variables
    command = [sys.executable, "-m", "embedport", "encode", "--help"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    colors = re.findall(r"\x1b\[(?:\d+;)*3\dm", shown.stdout)
    assert bool(colors) == (not variables)


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


def test_options_are_spelled_as_flags(run, folders, tmp_path, checkpoints):
    """The library names them as keywords, since it is called from Python too."""
    with pytest.raises(InputError, match=r"^int8 has one scale .*: `group_size` goes with int8-w"):
        embedport.export(checkpoints("kv2"), tmp_path / "a", precision="int8", group_size=32)
    export = ("export", "onnx", checkpoints("kv2"), "-o", tmp_path / "a")
    for options, flags in (
        (("--precision", "int8", "--group-size", "32"), "--group-size goes with int8-weight"),
        (("--output", "hidden", "--dim", "8"), "--dim shortens the pooled .* --output hidden has"),
        (("--max-ndcg-loss", "0.1"), "--max-ndcg-loss goes with --precision auto"),
        (("--output", "mean"), "port: --output should be pooled or"),
    ):
        code, _, err = run(*export, *options)
        assert code == 2
        assert re.search(flags, err)
        assert "`" not in err


@pytest.mark.parametrize(
    ("words", "message", "spelled"),
    [
        ("quantize", "leave `form` x out", "leave --form x out"),
        ("encode", "format should be npy, `form`", "--format should be npy, --format"),
        ("--debug deploy docker", "without `outputs` hidden", "without --output hidden"),
        ("validate", "no GPU; use device='cpu', or", "no GPU; use --device cpu, or"),
        ("validate", "use `record=False`", "use --no-record"),
        (
            "export onnx",
            "x: dim should be 1, hidden_size='2'",
            "x: dim should be 1, hidden_size='2'",
        ),
    ],
)
def test_how_options_are_spelled(monkeypatch, words, message, spelled):
    """A name that two commands share is the flag of the command that runs."""
    monkeypatch.setattr(sys, "argv", ["embedport", *words.split(), "tea", "encode"])
    assert with_flags(message, typer.main.get_command(app.app)) == spelled
