"""The folder that an export writes, and what it leaves when it does not finish."""

import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections import namedtuple
from pathlib import Path

import numpy as np
import onnx
import pytest

import embedport
from embedport.artifact.folder import Artifact, record_parity, staged
from embedport.artifact.manifest import Manifest
from embedport.checkpoint.hub import fetch
from embedport.checkpoint.spec import ModelSpec
from embedport.errors import CheckpointError, InputError, VerificationError
from embedport.exporters.classifier import classifier_values
from embedport.exporters.companions import write_companions
from embedport.exporters.onnx import export as export_module
from embedport.exporters.onnx import verify
from embedport.leftovers import lock
from tests.synthetic import edit

WITNESSES = True


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_folder(artifacts, checkpoints):
    artifact = artifacts("kv2").artifact
    folder, manifest = artifact.folder, artifact.manifest
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == {*manifest.files, "embedport.json", "README.md"}
    assert repr(artifact) == f"Artifact({str(folder)!r}, task='embedding', precision='fp32')"
    assert {"onnx/model.onnx", "onnx/model.onnx_data", "tokenizer.json", "config.json"} <= found
    assert {"modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"} <= found
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert (manifest.task, manifest.format, manifest.precision) == ("embedding", "onnx", "fp32")
    assert manifest.graph is not None
    assert (manifest.graph.dialect, manifest.graph.output) == ("ort", "pooled")
    assert manifest.embedding_dim == 64
    assert manifest.source.id == str(checkpoints("kv2"))
    assert list(manifest.source.files) == ["model.safetensors"]
    assert manifest.versions["embedport"] == embedport.__version__
    card = (folder / "README.md").read_text()
    assert card.startswith(f"# {folder.name}\n")
    assert ".partial" not in card
    assert "Not validated yet" in card
    assert Manifest.from_json(folder / "embedport.json") == manifest
    assert artifact.size == sum((folder / name).stat().st_size for name in manifest.files)
    assert (folder.stat().st_mode & 0o777) == 0o777 & ~current_umask()


def test_a_rerankers_files_have_its_padding(checkpoints, copied):
    """They make it a classifier, which the library reads before its padding."""
    folder = copied(checkpoints("kv2", "reranker"))
    assert classifier_values(ModelSpec.from_checkpoint(folder))["pad_token_id"] == 1019
    edit(folder / "tokenizer_config.json", padding_side="right", pad_token="<|im_end|>")
    assert classifier_values(ModelSpec.from_checkpoint(folder))["pad_token_id"] == 1021


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_standard_dialect_is_standard(artifacts):
    for task in ("embedding", "reranker"):
        graph = artifacts("kv2", task, dialect="standard").artifact.graph
        model = onnx.load(graph, load_external_data=False)
        assert [(each.domain, each.version) for each in model.opset_import] == [("", 23)]
        onnx.checker.check_model(graph, full_check=True)


def test_from_a_cache_of_links(checkpoints, tmp_path):
    """Plain files are written even when every source file is a symbolic link."""
    source = checkpoints("kv2")
    linked = tmp_path / "snapshot"
    for path in source.rglob("*"):
        if path.is_file():
            link = linked / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    artifact = embedport.export(linked, tmp_path / "out")
    assert not any(path.is_symlink() for path in artifact.folder.rglob("*"))
    embedport.load(artifact.folder, device="cpu")


def test_existing_output(checkpoints, tmp_path):
    out = tmp_path / "out"
    embedport.export(checkpoints("kv2"), out)
    before = (out / "embedport.json").read_text()
    with pytest.raises(InputError, match="exists; choose another place or replace it with `force`"):
        embedport.export(checkpoints("kv2"), out, precision="bf16")
    assert (out / "embedport.json").read_text() == before
    embedport.export(checkpoints("kv2"), out, precision="bf16", force=True)
    assert Artifact.open(out).manifest.precision == "bf16"
    assert left_in(tmp_path) == ["out"]


def test_force_never_deletes_what_is_not_an_artifact(checkpoints, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not an artifact, and is not replaced"):
        embedport.export(checkpoints("kv2"), tmp_path / "home", force=True)
    assert left_in(tmp_path / "home") == ["thesis.tex"]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("embedding", {"precision": "fp6"}, "precision should be one of fp32, fp16, bf16"),
        ("embedding", {"dialect": "latin"}, "dialect should be one of ort, standard"),
        ("embedding", {"outputs": "mean"}, "outputs should be pooled or hidden"),
        ("embedding", {"dim": 65}, "dim should be from 1 to 64, found 65"),
        ("embedding", {"dim": 8, "outputs": "hidden"}, "`outputs` hidden has none"),
        ("embedding", {"max_length": 99999}, "max_length should be from 1 to 32768"),
        ("embedding", {"max_length": 8.0}, "max_length should be an integer, found 8"),
        ("embedding", {"dim": True}, "dim should be an integer, found True"),
        ("embedding", {"precision": "fp16", "calibration": "nowhere.txt"}, "cannot be read"),
        ("reranker", {"outputs": "hidden"}, "a reranker gives scores"),
        ("reranker", {"dim": 8}, "a reranker gives scores"),
        ("reranker", {"max_length": 1}, "max_length should be from 2 to 32768, found 1"),
    ],
)
def test_bad_options(checkpoints, tmp_path, task, options, message):
    with pytest.raises(InputError, match=message):
        embedport.export(checkpoints("kv2", task), tmp_path / "out", **options)
    assert left_in(tmp_path) == []


def test_bad_checkpoint_leaves_nothing(checkpoints, copied, tmp_path):
    folder = copied(checkpoints("kv2"))
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        embedport.export(folder, tmp_path / "out")
    assert left_in(tmp_path) == ["checkpoint"]


class TestDisk:
    def test_too_small(self, checkpoints, tmp_path, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
        with pytest.raises(InputError, match=r"has 1 kB free, and the artifact needs \d+ MB"):
            embedport.export(checkpoints("kv2"), tmp_path / "out")
        assert left_in(tmp_path) == []

    def test_full_while_writing(self, checkpoints, tmp_path, monkeypatch):
        """Another program took the space after the check."""
        import errno

        import onnx_ir as ir

        def full(*_args, **_options):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(ir, "save", full)
        with pytest.raises(InputError, match=r"disk full while writing.*out was not written"):
            embedport.export(checkpoints("kv2"), tmp_path / "out")
        assert left_in(tmp_path) == []

    def test_a_real_small_disk(self, checkpoints, tmp_path):
        """A tmpfs of 2 MB, where this user may mount one."""
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs needs root")
        try:
            with pytest.raises(InputError, match="B free, and the artifact needs"):
                embedport.export(checkpoints("kv2"), disk / "out")
            assert left_in(disk) == []
            # The same disk, found too small only when it is full.
            with (
                pytest.raises(InputError, match="disk full while writing"),
                staged(disk / "out", force=False, needs=0) as folder,
            ):
                (folder / "data").write_bytes(bytes(3 << 20))
            assert left_in(disk) == []
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def test_killed(checkpoints, tmp_path):
    """kill -9 leaves nothing that looks like an artifact; the next export tidies up."""
    out = tmp_path / "out"
    code = (
        "import sys, time, embedport\n"
        "def stop(stage, done, total):\n"
        "    if stage == 'verify': print('here', flush=True); time.sleep(60)\n"
        f"embedport.export({str(checkpoints('kv2'))!r}, {str(out)!r}, progress=stop)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    (partial,) = left_in(tmp_path)
    assert partial.startswith(".out.partial-")
    assert not (tmp_path / partial / "embedport.json").exists()
    embedport.export(checkpoints("kv2"), out)
    assert left_in(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "write",
    [
        embedport.export,
        lambda *_, **options: embedport.quantize_checkpoint(*_, method="bnb-int8", **options),
    ],
    ids=["export", "quantize"],
)
def test_a_checkpoint_that_is_replaced_meanwhile(checkpoints, copied, tmp_path, write):
    """The artifact would have layers of both."""
    folder = copied(checkpoints("kv2"), "checkpoint")
    weights = folder / "model.safetensors"

    def replacing(*_):
        shutil.copyfile(weights, tmp_path / "new")
        (tmp_path / "new").replace(weights)

    with pytest.raises(CheckpointError, match=r"safetensors was changed or replaced while"):
        write(folder, tmp_path / "out", progress=replacing)
    assert left_in(tmp_path) == ["checkpoint"]


def test_two_exports_at_once_do_not_tidy_each_other_up(checkpoints, tmp_path):
    there = []
    with (
        pytest.raises(InputError, match="exists; choose another place"),
        staged(tmp_path / "out", force=False, needs=0) as first,
        staged(tmp_path / "out", force=False, needs=0) as second,
    ):
        there += [first.exists(), second.exists()]
    assert there == [True, True]
    assert left_in(tmp_path) == ["out"]


def test_killed_while_replacing(tmp_path):
    """Between the two renames the earlier artifact has another name: it gets its own back."""
    earlier = tmp_path / ".out.partial-12345678-old"
    earlier.mkdir()
    (earlier / "embedport.json").write_text("earlier")
    with (
        pytest.raises(InputError, match="exists; choose another place"),
        staged(tmp_path / "out", force=False, needs=0),
    ):
        pass
    assert (tmp_path / "out" / "embedport.json").read_text() == "earlier"
    with staged(tmp_path / "out", force=True, needs=0) as folder:
        (folder / "embedport.json").write_text("new")
    assert (tmp_path / "out" / "embedport.json").read_text() == "new"
    assert left_in(tmp_path) == ["out"]


@pytest.mark.parametrize("done", [False, True])
def test_ctrl_c_while_replacing(tmp_path, monkeypatch, done):
    """There is an artifact all the time, the earlier or the new one, not only from the next run."""
    out = tmp_path / "out"
    with staged(out, force=False, needs=0) as folder:
        (folder / "embedport.json").write_text("earlier")
    rename = Path.rename

    def interrupted(path, target):
        first = target == out and not interrupts
        if done or not first:
            rename(path, target)
        if first:
            interrupts.append(path)
            raise KeyboardInterrupt

    interrupts: list[Path] = []
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), staged(out, force=True, needs=0) as folder:
        (folder / "embedport.json").write_text("new")
    assert (out / "embedport.json").read_text() == ("new" if done else "earlier")
    with staged(tmp_path / "out", force=True, needs=0) as folder:
        (folder / "embedport.json").write_text("next")
    assert left_in(tmp_path) == ["out"]


@pytest.mark.parametrize("verb", ["inspect", "load", "refused export"])
def test_killed_while_deleting_the_old_one(checkpoints, copied, tmp_path, verb):
    """Any run that looks at the artifact deletes what is left of its predecessor."""
    out = tmp_path / "out"
    embedport.export(checkpoints("kv2"), out)
    for name in (".out.partial-12345678-old", ".out.partial-0123abcd", ".out.partial-mine", ".x"):
        (tmp_path / name / "onnx").mkdir(parents=True)
    with staged(tmp_path / "other", force=False, needs=0):
        if verb == "inspect":
            fetch(out)
        elif verb == "load":
            embedport.load(out, device="cpu")
        else:
            with pytest.raises(InputError, match="exists; choose another place"):
                embedport.export(checkpoints("kv2"), out)
    assert left_in(tmp_path) == [".out.partial-mine", ".x", "other", "out"]


def test_killed_between_the_renames(checkpoints, tmp_path):
    """Its own name comes back to the earlier artifact when somebody asks for it."""
    embedport.export(checkpoints("kv2"), tmp_path / ".out.partial-12345678-old")
    embedport.load(tmp_path / "out", device="cpu")
    assert left_in(tmp_path) == ["out"]


def test_what_is_being_deleted_is_left_alone(tmp_path):
    """The old artifact is held until it is gone."""
    old = tmp_path / ".out.partial-12345678-old"
    old.mkdir()
    held = lock(old)
    assert held is not None
    with pytest.raises(InputError, match="no such folder"):
        fetch(tmp_path / "out")
    assert left_in(tmp_path) == [old.name]
    os.close(held)


def test_another_export_was_quicker(tmp_path):
    with (
        pytest.raises(InputError, match="exists; choose another place"),
        staged(tmp_path / "out", force=False, needs=0),
    ):
        (tmp_path / "out").mkdir()
    assert left_in(tmp_path) == ["out"]


def test_another_run_is_replacing_it(tmp_path):
    """No other run's artifact is put in its place meanwhile, and nothing is lost."""
    out = tmp_path / "out"
    with staged(out, force=False, needs=0) as folder:
        (folder / "embedport.json").write_text("earlier")
    held = lock(out)
    assert held is not None
    with (
        pytest.raises(InputError, match="out is being replaced by another run: try it again"),
        staged(out, force=True, needs=0),
    ):
        pass
    os.close(held)
    assert left_in(tmp_path) == ["out"]
    assert (out / "embedport.json").read_text() == "earlier"


def test_what_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="file cannot be written: "),
        staged(tmp_path / "file" / "out", force=False, needs=0),
    ):
        pass
    with (
        pytest.raises(InputError, match=r"out was not written: .*Input/output error"),
        staged(tmp_path / "out", force=False, needs=0),
    ):
        raise OSError(5, "Input/output error")
    assert left_in(tmp_path) == ["file"]


def test_interrupted(checkpoints, tmp_path):
    def stop(stage, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedport.export(checkpoints("kv2"), tmp_path / "out", progress=stop)
    assert left_in(tmp_path) == []


def test_progress(checkpoints, tmp_path):
    seen = []
    embedport.export(
        checkpoints("kv2"), tmp_path / "out", precision="fp16", progress=lambda *s: seen.append(s)
    )
    stages = dict.fromkeys(stage for stage, _, _ in seen)
    assert list(stages) == ["calibrate", "write", "verify"]
    for stage in stages:
        done = [(done, total) for name, done, total in seen if name == stage]
        assert sorted(done) == [(i + 1, done[0][1]) for i in range(done[0][1])]


class TestVerification:
    """The written graph is opened again, its data measured, and run."""

    IDS = np.array([5, 6, 7])

    @pytest.fixture
    def graph(self, artifacts, copied):
        return copied(artifacts("kv2").artifact.folder) / "onnx" / "model.onnx"

    def test_good(self, graph):
        found = verify.verify_graph(graph, self.IDS)
        expected = embedport.load(graph.parent.parent, device="cpu").model(
            self.IDS[None], np.ones((1, 3), np.int64)
        )
        np.testing.assert_allclose(found, expected, atol=1e-6)

    def test_what_no_later_part_reads_is_dropped(self, graph, monkeypatch):
        given, kept = {}, {}
        run = verify._run_part

        def watched(part, path, scope, values):
            found = run(part, path, scope, values)
            given[scope] = [weakref.ref(each) for each in found.values()]
            return found

        def advance():
            kept[[*given][-1]] = {
                name for name, refs in given.items() if any(ref() is not None for ref in refs)
            }

        monkeypatch.setattr(verify, "_run_part", watched)
        verify.verify_graph(graph, self.IDS, advance)
        assert "layers.0" in kept["layers.0"]
        assert "layers.0" not in kept["layers.1"]

    def test_short_data(self, graph):
        data = graph.with_name("model.onnx_data")
        data.write_bytes(data.read_bytes()[:-1])
        with pytest.raises(VerificationError, match=r"should be a plain file of at least"):
            verify.verify_graph(graph, self.IDS)

    def test_data_elsewhere(self, graph):
        model = onnx.load(graph, load_external_data=False)
        external = next(t for t in model.graph.initializer if t.external_data)
        for entry in external.external_data:
            if entry.key == "location":
                entry.value = "../model.onnx_data"
        graph.write_bytes(model.SerializeToString())
        with pytest.raises(VerificationError, match="not beside the graph"):
            verify.verify_graph(graph, self.IDS)

    def test_invalid_graph(self, graph):
        model = onnx.load(graph, load_external_data=False)
        model.graph.node[5].op_type = "NoSuchOperator"
        graph.write_bytes(model.SerializeToString())
        with pytest.raises(VerificationError, match="onnxruntime does not take the graph"):
            verify.verify_graph(graph, self.IDS)

    def test_invalid_by_the_standard(self, artifacts, copied):
        folder = copied(artifacts("kv2", dialect="standard").artifact.folder)
        graph = folder / "onnx" / "model.onnx"
        model = onnx.load(graph, load_external_data=False)
        model.ir_version = 99
        graph.write_bytes(model.SerializeToString())
        with pytest.raises(VerificationError, match="is not a valid ONNX graph"):
            verify.verify_graph(graph, self.IDS)

    def test_another_score_in_two_parts(self, artifacts):
        reranker = artifacts("kv2", "reranker")
        path = reranker.artifact.folder / "onnx" / "continuation.onnx"
        expected = verify.verify_graph(reranker.artifact.graph, self.IDS)
        verify.verify_continuation(path, self.IDS, expected)
        with pytest.raises(VerificationError, match="a text in two parts gives"):
            verify.verify_continuation(path, self.IDS, expected + 1e-3)


def test_a_long_text_is_not_run_whole(checkpoints, tmp_path, monkeypatch):
    """At 8,192 tokens the standard dialect's scores are gigabytes per layer."""
    texts = tmp_path / "texts.txt"
    texts.write_text("tea " * 300)
    lengths = []
    check = export_module.verify_graph

    def watched(path, ids, advance):
        lengths.append(len(ids))
        return check(path, ids, advance)

    monkeypatch.setattr(export_module, "verify_graph", watched)
    embedport.export(checkpoints("kv2"), tmp_path / "out", precision="fp16", calibration=texts)
    assert lengths == [export_module.CALIBRATION_TOKENS["embedding"]]


def test_the_file_that_cannot_be_copied_is_named(checkpoints, copied, tmp_path):
    folder = copied(checkpoints("kv2"))
    spec = ModelSpec.from_checkpoint(folder)
    (folder / "additional_chat_templates" / "tools.jinja").mkdir(parents=True)
    with pytest.raises(InputError, match=r"templates/tools\.jinja cannot be copied: "):
        write_companions(spec, tmp_path)


def test_parity_is_recorded(artifacts, copied):
    folder = copied(artifacts("kv2").artifact.folder)
    record_parity(Artifact.open(folder), {"cosine": {"minimum": 0.999}}, "| cosine | 0.999 |")
    assert Artifact.open(folder).manifest.parity == {"cosine": {"minimum": 0.999}}
    assert "| cosine | 0.999 |" in (folder / "README.md").read_text()
    assert json.loads((folder / "embedport.json").read_text())["parity"]


def test_large_tensors_are_streamed(checkpoints, tmp_path, monkeypatch):
    """In pieces of a few rows, a tensor is written as it is in one."""
    from embedport.exporters.graph import tensors

    embedport.export(checkpoints("kv2"), tmp_path / "whole")
    monkeypatch.setattr(tensors, "CHUNK_BYTES", 4 * 64 * 7)
    embedport.export(checkpoints("kv2"), tmp_path / "pieces")
    name = "onnx/model.onnx_data"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "pieces" / name).read_bytes()
