"""Where the figures go: decided before anything is loaded, and never the hub's cache."""

import logging
import os
import shutil
from pathlib import Path

import pytest

import embedport
from embedport.artifact.folder import Artifact, record_parity, record_ranges
from embedport.checkpoint.hub import Source
from embedport.errors import ArtifactError, CheckpointError, InputError
from embedport.validation import parity, preconditions
from embedport.validation.library import LibraryReference
from embedport.validation.preconditions import find_recorded

COMMIT = "0123456789abcdef"


@pytest.fixture
def snapshot(folders, tmp_path):
    """An artifact as the hub's cache has it."""
    folder = tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT
    return Path(shutil.copytree(folders("embedding").artifact, folder))


def texts_of(folder):
    return {name: (folder / name).read_text() for name in ("embedport.json", "README.md")}


def test_what_takes_figures(folders, checkpoints):
    folder = folders("embedding").artifact
    assert find_recorded(folder) == folder
    assert find_recorded(checkpoints("kv2")) is None


@pytest.mark.parametrize("by_id", [True, False])
def test_the_hubs_cache_stays_as_it_is(folders, snapshot, monkeypatch, caplog, by_id):
    """Whether it is asked for by its id or by its folder."""
    artifact = "owner/name" if by_id else snapshot
    if by_id:
        source = Source("owner/name", COMMIT, snapshot)
        monkeypatch.setattr(preconditions, "fetch", lambda checkpoint: source)
        load = parity.load
        monkeypatch.setattr(parity, "load", lambda _, **options: load(snapshot, **options))
    before = texts_of(snapshot)
    with caplog.at_level(logging.WARNING):
        report = embedport.validate(
            artifact, folders("embedding").checkpoint, ["a text", "another"], device="cpu"
        )
    assert report.passed
    assert f"{artifact} is in the hub's cache, so its figures are not recorded" in caplog.text
    assert texts_of(snapshot) == before


def test_a_read_only_folder_is_refused_before_anything_is_loaded(
    folders, copied, monkeypatch, tmp_path
):
    made = folders("embedding")
    folder = copied(made.artifact)
    access = os.access
    # root may write to anything.
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode: not (Path(path) == folder and mode & os.W_OK) and access(path, mode),
    )
    load = parity.load
    monkeypatch.setattr(parity, "load", lambda *args, **options: pytest.fail("it was loaded"))
    with pytest.raises(ArtifactError, match=r"model is read-only, .*`record=False`"):
        embedport.validate(folder, made.checkpoint, device="cpu")
    monkeypatch.setattr(parity, "load", load)
    before = texts_of(folder)
    embedport.validate(folder, made.checkpoint, ["a text"], device="cpu", record=False)
    assert texts_of(folder) == before


def test_a_page_without_a_place_is_refused_before_anything_is_loaded(folders, tmp_path):
    made = folders("embedding")
    for page, message in ((tmp_path, "is a folder"), (tmp_path / "no" / "x.html", "no such fold")):
        with pytest.raises(InputError, match=message):
            embedport.validate(made.artifact, "nowhere", page=page)


def test_figures_that_cannot_be_written_leave_nothing(folders, copied):
    folder = copied(folders("embedding").artifact)
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    before = sorted(folder.iterdir())
    with pytest.raises(ArtifactError, match=r"figures cannot be recorded: .*README\.md cannot be"):
        record_parity(Artifact.open(folder), {}, "| a table |")
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    "record", [lambda made: record_parity(made, {}, ""), lambda made: record_ranges(made, {})]
)
def test_an_artifact_gets_no_figures_of_its_predecessor(folders, copied, record):
    """Another run may replace the folder while it is validated: a passed verdict is not of both."""
    folder = copied(folders("embedding").artifact)
    measured = Artifact.open(folder)
    shutil.rmtree(folder)
    shutil.copytree(folders("reranker").artifact, folder)
    before = (folder / "embedport.json").read_bytes()
    with pytest.raises(ArtifactError, match=r"are not recorded: .* was replaced while"):
        record(measured)
    assert (folder / "embedport.json").read_bytes() == before
    shutil.rmtree(folder)
    with pytest.raises(ArtifactError, match=r"cannot be recorded: .*No such file or directory"):
        record(measured)


def rewrite(path):
    """Another run writes the same bytes again."""
    path.write_bytes(path.read_bytes())


@pytest.mark.parametrize("kind", ["artifact", "checkpoint"])
def test_no_verdict_of_a_model_that_is_replaced_meanwhile(
    folders, checkpoints, copied, spoil, kind
):
    """The gates on its files would be of one, and the results of another."""
    folder = copied(folders("embedding").artifact if kind == "artifact" else checkpoints("kv2"))
    spoil(lambda runtime: rewrite(folder / "config.json"))
    error = ArtifactError if kind == "artifact" else CheckpointError
    with pytest.raises(error, match=r"config\.json was changed or replaced while"):
        embedport.validate(folder, checkpoints("kv2"), ["tea"], device="cpu", record=False)


def test_no_results_of_a_reference_that_is_replaced_meanwhile(
    folders, copied, tmp_path, monkeypatch
):
    """A recorded one would name the weights of one model beside the results of another."""
    made, run = folders("embedding"), LibraryReference.run
    folder, file = copied(made.checkpoint), tmp_path / "model.reference"

    def replaced(self, *arguments, **options):
        rewrite(folder / "model.safetensors")
        return run(self, *arguments, **options)

    monkeypatch.setattr(LibraryReference, "run", replaced)
    message = r"safetensors was changed or replaced while"
    with pytest.raises(CheckpointError, match=message):
        embedport.validate(made.artifact, folder, ["tea"], device="cpu", record=False)
    with pytest.raises(CheckpointError, match=message):
        embedport.record_reference(folder, file, ["tea"], device="cpu")
    assert not file.exists()


def test_the_page_is_there_when_recording_fails(folders, copied, monkeypatch, tmp_path):
    """A disk that is full by then must not cost what was measured."""
    made = folders("embedding")
    page = tmp_path / "report.html"

    def full(*arguments):
        raise ArtifactError("disk full")

    monkeypatch.setattr(parity, "record_parity", full)
    with pytest.raises(ArtifactError, match="disk full"):
        embedport.validate(
            copied(made.artifact), made.checkpoint, ["a text"], device="cpu", page=page
        )
    assert "<svg" in page.read_text()
