"""The verb that records a reference, and `validate` with what it wrote."""

import json

import pytest

import embedport


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [{"text": "What is tea?", "prompt": "query"}, {"text": "A leaf."}, {"text": "Snow"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_recorded_and_used(run, checkpoints, tmp_path, texts):
    checkpoint, file, page = checkpoints("kv2"), tmp_path / "my.reference", tmp_path / "page.html"
    embedport.export(checkpoint, tmp_path / "artifact")
    command = ("reference", checkpoint, "-o", file, "--input", texts, "--device", "cpu")
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    words = " ".join(out.split())
    assert f"{file}: {checkpoint} in sentence-transformers" in words
    assert "fp32 on fp16-rounded weights, cpu, 3 texts" in words
    assert f"Next: embedport validate ARTIFACT --reference {file}" in words
    code, out, _ = run(
        *("validate", tmp_path / "artifact", "--reference", file, "--device", "cpu"),
        *("--report", page),
    )
    assert code == 0, out
    assert ", recorded 20" in page.read_text()
    code, _, err = run(*command)
    assert code == 2
    assert "exists; choose another place or replace it with --force" in err
    code, out, _ = run(*command, "--force", "--json")
    facts = json.loads(out)
    assert (code, facts["task"], facts["inputs"]) == (0, "embedding", 3)
    assert facts["files"].keys() == {"model.safetensors"}


def test_a_broken_file(run, checkpoints, tmp_path, texts):
    embedport.export(checkpoints("kv2"), tmp_path / "artifact")
    code, _, err = run("validate", tmp_path / "artifact", "--reference", texts)
    assert code == 2
    assert "is not a whole recorded reference" in err
    assert err.count("\n") == 1


def test_a_gpu_that_is_not_there(run, checkpoints, tmp_path, monkeypatch):
    """Hours on a CPU are not what was asked for."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    command = ("reference", checkpoints("kv2"), "-o", tmp_path / "file", "--device", "cuda")
    code, _, err = run(*command)
    assert (code, "has no CUDA device on this machine" in err) == (2, True)
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-queries", 3), "--candidates and --max-queries go with --retrieval"),
        (("--task", "other"), "task should be one of embedding, reranker"),
        (("--input", "nothing.txt"), "cannot be read"),
        (("--retrieval", "nothing"), "no such folder"),
        (("--device", "tensorrt"), "a checkpoint runs on auto, cpu, cuda; found device 'tensorrt'"),
        (("--retrieval", "builtin", "--candidates", "x.tsv"), "--candidates are for rerankers"),
    ],
)
def test_wrong_requests(run, checkpoints, tmp_path, options, message):
    code, out, err = run("reference", checkpoints("kv2"), "-o", tmp_path / "file", *options)
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "file").exists()
