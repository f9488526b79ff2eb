"""`embedport validate` from the command line: what it says of recording, what does not fit."""

import shutil
import sys

import pytest

from embedport.cli import main
from embedport.texts.beir import write_candidates


@pytest.fixture
def run(monkeypatch, capsys):
    """A function (arguments) -> (exit code, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["embedport", "validate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, " ".join(capsys.readouterr().err.split())

    return call


def test_what_is_said_of_recording(run, folders, copied, tmp_path, caplog):
    made = folders("embedding")
    (tmp_path / "texts.txt").write_text("tea\nsnow\n")
    rest = ("--reference", made.checkpoint, "--input", tmp_path / "texts.txt", "--device", "cpu")
    folder = copied(made.artifact)
    code, err = run(folder, *rest)
    assert code == 0
    verdict = err.removeprefix(f"Recorded in {folder}: embedport.json and README.md ")
    assert verdict.startswith("Holds against sentence-transformers ")
    page = tmp_path / "report.md"
    found = run(folder, *rest, "--no-record", "--report", page)
    assert found == (0, f"Report: {page} {verdict}")
    snapshot = shutil.copytree(folder, tmp_path / "models--a--b" / "snapshots" / "0123")
    caplog.clear()
    code, err = run(snapshot, *rest)
    assert code == 0
    assert "Recorded in" not in err
    assert [record.getMessage() for record in caplog.records if "hub's cache" in record.msg]


def test_candidates_are_a_rerankers(run, folders, small_set):
    made = folders("embedding")
    data = small_set(400, 20)
    write_candidates(data / "mine.tsv", {})
    code, err = run(
        *(made.artifact, "--reference", made.checkpoint, "--no-record"),
        *("--retrieval", data, "--candidates", data / "mine.tsv"),
    )
    assert code == 2
    assert "--candidates are for rerankers: an embedding model searches all documents" in err
