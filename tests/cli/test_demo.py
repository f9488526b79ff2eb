"""The verb that shows everything at once."""

import shutil
import sys

import pytest

import embedport
from embedport.demo.pipeline import _prepare, builtin_embedder, builtin_reranker, run_demo


@pytest.fixture
def small(monkeypatch, small_set):
    """A small retrieval set: the whole takes the most time and adds nothing."""
    data = small_set(every=200, others=60)
    monkeypatch.setattr("embedport.texts.beir._builtin", lambda: data)


@pytest.fixture(scope="module")
def exported():
    """The demo's artifacts by checkpoint and precision, once they were exported."""
    return {}


@pytest.fixture
def exported_once(monkeypatch, exported, tmp_path_factory):
    """The demo exports an artifact the first time; then it gets a copy."""

    def export(checkpoint, output, precision):
        key = (checkpoint.name, precision)
        if key not in exported:
            exported[key] = tmp_path_factory.mktemp("exported") / "artifact"
            embedport.export(checkpoint, exported[key], precision=precision)
        return embedport.Artifact.open(shutil.copytree(exported[key], output))

    monkeypatch.setattr("embedport.demo.pipeline.export", export)


def test_stopped_while_it_replaces_an_earlier_one(tmp_path, monkeypatch):
    """The rest is still a demo's, and the next one replaces it."""
    folder = tmp_path / "demo"
    _prepare(folder)
    (folder / "embedding").mkdir()

    def stopped(path):
        for each in path.iterdir():
            if each.is_file():
                each.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stopped)
        with pytest.raises(KeyboardInterrupt):
            _prepare(folder)
    _prepare(folder)
    assert len([*folder.iterdir()]) == 1


def test_demo(run, tmp_path, monkeypatch, small, exported_once):
    """Against references recorded before, without torch; they are of the small set here."""
    places = {}
    for checkpoint in (builtin_embedder(), builtin_reranker()):
        places[checkpoint] = tmp_path / checkpoint.name
        embedport.record_reference(
            checkpoint, places[checkpoint], device="cpu", retrieval="builtin"
        )
    monkeypatch.setattr("embedport.demo.pipeline.builtin_reference", places.__getitem__)
    for package in ("torch", "transformers", "sentence_transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    code, out, _ = run("demo", "-o", tmp_path / "demo")
    assert code == 0, out
    assert "Three queries on" in out
    assert out.count("holds") == 4
    assert out.count("reranked") == 3
    assert out.count("nDCG@10 (of the reference)") == 2
    assert out.count("nDCG@10 before reranking") == 1
    assert "of the embedding model in sentence-transformers" in out
    assert "of the reranker model in transformers" in out
    page = tmp_path / "demo" / "embedding-fp32.html"
    assert str(page) in out
    # fp32 and int8 rerank different numbers of queries, so their columns have different references.
    assert out.count("queries of nDCG@10") == 2
    for name in ("embedding-fp32", "embedding-int8", "reranker-fp32", "reranker-int8"):
        assert "<svg" in (tmp_path / "demo" / f"{name}.html").read_text(encoding="utf-8")
        parity = embedport.Artifact.open(tmp_path / "demo" / name).manifest.parity
        assert parity is not None
        assert parity["passed"]
        assert ", recorded 20" in parity["library"]
    # An earlier demo's folder is replaced. Nothing is measured where a package is missing.
    monkeypatch.setattr("embedport.demo.pipeline.find_spec", lambda name: None)
    code, out, _ = run("demo", "-o", tmp_path / "demo")
    assert code == 0
    assert "pip install 'embedport[cpu,retrieval,report]'" in out
    parity = embedport.Artifact.open(tmp_path / "demo" / "embedding-fp32").manifest.parity
    assert parity is None


def test_a_live_demo(run, tmp_path, monkeypatch, small, exported_once):
    """The checkpoints themselves are the references."""
    with monkeypatch.context() as changes:
        changes.setitem(sys.modules, "torch", None)
        code, _, err = run("demo", "-o", tmp_path / "demo", "--live")
        assert code == 2
        assert "torch is not installed: pip install 'embedport[torch]'" in err
        assert not (tmp_path / "demo").exists()
    given = []
    monkeypatch.setattr("embedport.validation.validate", lambda *args, **_: given.append(args[1]))
    run_demo(tmp_path / "demo", lambda step: None, live=True)
    assert given == [builtin_embedder()] * 2 + [builtin_reranker()] * 2


def test_demo_replaces_only_its_own(run, tmp_path):
    code, _, err = run("demo", "-o", tmp_path)
    assert code == 2
    assert "is not an earlier demo's" in err
    assert tmp_path.is_dir()


def test_without_onnxruntime_an_earlier_demo_stays(run, tmp_path, monkeypatch):
    (tmp_path / "demo.txt").touch()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = run("demo", "-o", tmp_path)
    assert (code, err) == (
        2,
        "embedport: onnxruntime is not installed: pip install 'embedport[cpu]'\n",
    )
    assert (tmp_path / "demo.txt").exists()
    assert not (tmp_path / "demo.txt").read_text()
