"""The verb that shows everything at once."""

import embedport
from embedport.demo.samples import builtin_pairs, builtin_samples


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
    assert out.count("reranked") == 3
    assert out.count("nDCG@10 (of the reference)") == 2
    assert out.count("nDCG@10 before reranking") == 1
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
