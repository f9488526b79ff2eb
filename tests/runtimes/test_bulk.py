"""A corpus embedded shard by shard: every row once, in order, whatever dies on the way."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embedport
from embedport.errors import InputError
from embedport.runtimes import bulk
from embedport.runtimes.bulk import INDEX, Job, encode_corpus, run_here

RAGGED = ["one", "", "two words", "long " * 90, " spaces ", "日本語 🥾", "one"] * 5
MANY = [f"text {i} of many, {'word ' * (i % 7)}" for i in range(12_000)]
COMMAND = [sys.executable, "-m", "embedport", "encode"]
# Batches differ, and so does the order of fp32 sums.
CLOSE: Any = {"atol": 2e-6, "rtol": 0}


@pytest.fixture(scope="module")
def artifact(exported):
    return exported().folder


@pytest.fixture(scope="module")
def vectors_of_many(embedder):
    return embedder.encode(MANY)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(bulk, "SHARD_ROWS", 4)


@pytest.fixture
def job(artifact, tmp_path):
    """A job over RAGGED, its texts with and without other keys, and blank lines between."""
    path = tmp_path / "corpus.jsonl"
    rows = [json.dumps({"_id": str(i), "text": text}) for i, text in enumerate(RAGGED)]
    path.write_text("\n\r\n".join(rows) + "\n\n", encoding="utf-8")
    return Job(str(artifact), path, tmp_path / "vectors")


def write_many(folder, texts=MANY):
    path = folder / "many.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def shards(folder):
    return sorted(folder.glob("*.npy"))


def stacked(folder):
    """All vectors, checked against the index."""
    index = json.loads((folder / INDEX).read_text())
    assert index["complete"]
    arrays = [np.load(path) for path in shards(folder)]
    assert [len(array) for array in arrays] == [shard["rows"] for shard in index["shards"]]
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"{i:06}.npy" for i in range(len(arrays))),
        INDEX,
    ]
    vectors = np.concatenate(arrays)
    assert vectors.shape == (index["rows"], index["width"])
    assert vectors.dtype == index["dtype"]
    return vectors


def stamps(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards(folder)}


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(
    "options",
    [{}, {"prompt": "query", "dim": 16}, {"precision": "ubinary"}, {"max_length": 8}],
    ids=str,
)
def test_vectors_are_those_of_encode(artifact, job, options):
    encode_corpus(replace(job, **options), run_here)
    max_length = options.pop("max_length", None)
    embedder = embedport.load_embedder(artifact, device="cpu", max_length=max_length)
    expected = embedder.encode(RAGGED, **options)
    np.testing.assert_allclose(stacked(job.output), expected, **CLOSE)
    assert len(shards(job.output)) == 9


@pytest.mark.usefixtures("small_shards")
def test_plain_text_and_large_lines(artifact, embedder, tmp_path, monkeypatch):
    monkeypatch.setattr(bulk, "SHARD_BYTES", 100)
    texts = [text for text in RAGGED if text.strip()]
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    encode_corpus(Job(str(artifact), path, tmp_path / "vectors"), run_here)
    np.testing.assert_allclose(stacked(tmp_path / "vectors"), embedder.encode(texts), **CLOSE)
    assert len(shards(tmp_path / "vectors")) > len(texts) // 4 + 1


@pytest.mark.usefixtures("small_shards")
def test_what_is_there_is_not_done_again(job, monkeypatch):
    encode_corpus(job, run_here)
    before, vectors = stamps(job.output), stacked(job.output)
    monkeypatch.setattr(bulk, "open_embedder", lambda job: pytest.fail("nothing is left to do"))
    encode_corpus(job, run_here)
    assert stamps(job.output) == before
    monkeypatch.undo()
    monkeypatch.setattr(bulk, "SHARD_ROWS", 4)
    lost, cut, folded, cast = shards(job.output)[2:6]
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    np.save(folded, np.load(folded).reshape(-1, 32))
    np.save(cast, np.load(cast).view(np.int32))
    (job.output / f".{lost.name}.partial-0").write_bytes(b"of a run that was killed")
    encode_corpus(job, run_here)
    np.testing.assert_array_equal(stacked(job.output), vectors)
    again = {name for name, stamp in stamps(job.output).items() if before[name] != stamp}
    assert again == {lost.name, cut.name, folded.name, cast.name}


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("force", [False, True], ids=["a shard is lost", "begun anew"])
def test_a_folder_says_that_it_is_complete_only_while_it_is(job, monkeypatch, force):
    """Killed at any deletion, and before any of the new shards is there."""
    encode_corpus(job, run_here)
    vectors = stacked(job.output)
    unlink, said = Path.unlink, []

    def watched(path, **options):
        said.append(json.loads((job.output / INDEX).read_text())["complete"])
        unlink(path, **options)

    def run(*arguments):
        assert not json.loads((job.output / INDEX).read_text())["complete"]
        raise KeyboardInterrupt

    if force:
        monkeypatch.setattr(Path, "unlink", watched)
    else:
        shards(job.output)[2].unlink()
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(job, run, force=force)
    monkeypatch.setattr(Path, "unlink", unlink)
    assert not any(said)
    assert len(said) > 9 or not force
    encode_corpus(job, run_here)
    np.testing.assert_array_equal(stacked(job.output), vectors)


@pytest.mark.usefixtures("small_shards")
def test_killed_while_another_jobs_shards_are_deleted(job, monkeypatch):
    """Those left are not taken for the new job's, of the same shape."""
    encode_corpus(job, run_here)
    queries, unlink = replace(job, prompt="query"), Path.unlink

    def killed(path, **options):
        if path.name == shards(job.output)[-1].name:
            raise KeyboardInterrupt
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(queries, run_here, force=True)
    monkeypatch.setattr(Path, "unlink", unlink)
    assert shards(job.output)
    with pytest.raises(InputError, match="whose prompt was"):
        encode_corpus(queries, run_here)
    encode_corpus(queries, run_here, force=True)
    stacked(job.output)


def test_a_full_disk(job, monkeypatch):
    """Nothing is left of a shard, and none has its name before it is on the disk."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    def run(*arguments):
        monkeypatch.setattr(os, "fsync", full)
        run_here(*arguments)

    with pytest.raises(InputError, match=r"000000\.npy cannot be written: No space left"):
        encode_corpus(job, run)
    assert [path.name for path in job.output.iterdir()] == [INDEX]


def test_kill_9(artifact, vectors_of_many, tmp_path):
    """The process is killed in the middle of its work, and once more at another point."""
    corpus, output = write_many(tmp_path), tmp_path / "vectors"
    command = [*COMMAND, artifact, "--input", corpus, "--output", output, "--device", "cpu"]
    kept = {}
    for number in (1, 3):
        with subprocess.Popen(command) as process:
            while not (output / f"{number:06}.npy").exists():
                assert process.poll() is None, "it ended before it was killed"
                time.sleep(0.005)
            process.kill()
        found = stamps(output)
        assert kept.items() <= found.items()
        assert number < len(found) < 6
        assert not json.loads((output / INDEX).read_text())["complete"]
        kept = found
    subprocess.run(command, check=True)
    assert kept.items() <= stamps(output).items()
    np.testing.assert_allclose(stacked(output), vectors_of_many, **CLOSE)


def test_another_job(job):
    encode_corpus(job, run_here)
    vectors = stacked(job.output)
    changes = {
        "prompt": {"prompt": "query"},
        "dim": {"dim": 8},
        "precision": {"precision": "binary"},
        "max_length": {"max_length": 9},
    }
    for name, change in changes.items():
        with pytest.raises(InputError, match=f"another job, whose {name} was .*`force`"):
            encode_corpus(replace(job, **change), run_here)
    job.input.write_text('{"text": "new"}\n')
    with pytest.raises(InputError, match="whose input_sha256 was"):
        encode_corpus(job, run_here)
    np.testing.assert_array_equal(stacked(job.output), vectors)
    encode_corpus(job, run_here, force=True)
    assert stacked(job.output).shape == (1, 64)


def test_a_job_of_an_earlier_version(job, artifact, tmp_path):
    """Its 8-bit codes were rounded otherwise: one corpus has those of one version."""
    folder = Path(shutil.copytree(artifact, tmp_path / "own"))
    embedport.load_embedder(folder, device="cpu").calibrate(MANY[:20])
    for precision, codec in (("float32", 1), ("int8", 2), ("uint8", 2)):
        output = tmp_path / precision
        one = replace(job, model=str(folder), output=output, precision=precision)
        values = json.loads(encode_corpus(one, run_here).to_json())
        assert values.pop("codec") == codec
        (output / INDEX).write_text(json.dumps(values | {"format_version": 3}))
        (output / "000000.npy").unlink()
        if codec == 1:
            encode_corpus(one, run_here)
            assert len(stacked(output)) == len(RAGGED)
        else:
            with pytest.raises(InputError, match="another job, whose codec was 1, and is 2 now"):
                encode_corpus(one, run_here)
            assert not shards(output)


def test_other_ranges(job, artifact, tmp_path):
    """The model was calibrated again: codes of both would be in one corpus."""
    folder = Path(shutil.copytree(artifact, tmp_path / "own"))
    embedder = embedport.load_embedder(folder, device="cpu")
    embedder.calibrate(MANY[:20])
    job = replace(job, model=str(folder), precision="int8")
    encode_corpus(job, run_here)
    encode_corpus(replace(job, output=tmp_path / "binary", precision="binary"), run_here)
    embedder.calibrate(RAGGED)
    with pytest.raises(InputError, match="another job, whose ranges was"):
        encode_corpus(job, run_here)
    # Bits have no ranges.
    encode_corpus(replace(job, output=tmp_path / "binary", precision="binary"), run_here)


def test_another_model(job, checkpoints, tmp_path):
    encode_corpus(job, run_here)
    other = embedport.export(checkpoints("kv2"), tmp_path / "other", precision="int8").folder
    with pytest.raises(InputError, match="whose model_sha256 was"):
        encode_corpus(replace(job, model=str(other)), run_here)


def test_two_jobs_that_begin_in_one_folder(job):
    """Their shards look alike: the folder would have vectors of both, and call itself complete."""

    def meanwhile(one, shards, advance):
        with pytest.raises(InputError, match=r"another run writes into .*vectors: wait"):
            encode_corpus(replace(job, prompt="query"), run_here)
        run_here(one, shards, advance)

    index = encode_corpus(job, meanwhile)
    assert index.prompt == ""
    assert stacked(job.output).shape == (len(RAGGED), 64)


def test_a_model_that_is_replaced_meanwhile(job, artifact, checkpoints, tmp_path):
    """Between the plan and the start of a worker, perhaps on another machine."""
    model = Path(shutil.copytree(artifact, tmp_path / "model"))

    def meanwhile(one, shards, advance):
        embedport.export(checkpoints("kv2"), model, precision="int8", force=True)
        run_here(one, shards, advance)

    with pytest.raises(InputError, match="model holds other files or ranges than when"):
        encode_corpus(replace(job, model=str(model)), meanwhile)
    assert not shards(job.output)


def test_a_checkpoint_that_pools_otherwise_is_another_model(job, checkpoints, tmp_path):
    """Its weights, config.json and tokenizer.json are the same: a job must not go on with it."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints("kv2"), folder)
    job = replace(job, model=str(folder), device="cpu")
    encode_corpus(job, run_here)
    path = folder / "1_Pooling" / "config.json"
    config = json.loads(path.read_text())
    modes = {"pooling_mode_lasttoken": False, "pooling_mode_mean_tokens": True}
    path.write_text(json.dumps(config | modes))
    with pytest.raises(InputError, match="whose model_sha256 was"):
        encode_corpus(job, run_here)


def test_a_task_that_is_given_counts(tmp_path, checkpoints):
    model: Any = checkpoints("kv2", "reranker")
    texts = write_many(tmp_path, ["tea", "milk"])
    job = Job(str(model), texts, tmp_path / "vectors", task="embedding", device="cpu")
    encode_corpus(job, run_here)
    embedder: Any = embedport.load(model, task="embedding", device="cpu")
    np.testing.assert_allclose(stacked(job.output), embedder.encode(["tea", "milk"]), **CLOSE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text"),
        (b"\n \n", "holds no text"),
        (b'{"text": "a"}\n\n{"txt": "b"}\n', "corpus.jsonl:3 should be UTF-8 text.*'text'"),
        (b'{"text": "a"}\n{"text": 3}', "corpus.jsonl:2 should be"),
        (b'{"text": "\\ud83d"}', "corpus.jsonl:1 .*lone surrogate"),
        (b'{"text": "\xff"}', "corpus.jsonl:1 should be UTF-8"),
        (b'{"text": "a", "prompt": "query"}', "corpus.jsonl:1 names its own prompt"),
    ],
)
def test_bad_lines_before_any_work(job, content, message):
    job.input.write_bytes(content)
    with pytest.raises(InputError, match=message):
        encode_corpus(job, run_here)
    assert not job.output.exists()


def test_bad_requests(job, tmp_path, checkpoints):
    for change, message in (
        ({"input": tmp_path / "no.jsonl"}, "no.jsonl cannot be read: No such file"),
        ({"prompt": "qurey"}, "no prompt is named 'qurey'"),
        ({"dim": 65}, "dim should be from 1 to 64"),
        ({"precision": "int8"}, "int8 needs each value's range"),
        ({"max_length": 0}, "max_length should be"),
        ({"model": str(checkpoints("kv2", "reranker"))}, "is a reranker"),
        ({"output": tmp_path}, "holds other files and no index.json"),
        ({"format": "csv"}, "format should be one of npy, parquet, found 'csv'"),
        ({"with_text": True}, "texts are written beside vectors in Parquet only"),
    ):
        with pytest.raises(InputError, match=message):
            encode_corpus(replace(job, **change), run_here)
    (tmp_path / "broken").mkdir()
    for content in ("{}", '{"format_version": 99}', '{"format_version": 4, "rows": 1}', "["):
        (tmp_path / "broken" / INDEX).write_text(content)
        with pytest.raises(InputError, match=r"index.json is not an index"):
            encode_corpus(replace(job, output=tmp_path / "broken"), run_here)
    with pytest.raises(InputError, match="is another program's"):
        encode_corpus(replace(job, output=tmp_path / "broken"), run_here, force=True)


def test_an_engine_that_leaves_shards_out(job):
    """Nor is the folder called complete."""
    with pytest.raises(InputError, match=r"1 shards are missing, such as 000000\.npy"):
        encode_corpus(job, lambda job, shards, advance: None)
    assert not json.loads((job.output / INDEX).read_text())["complete"]


def test_a_text_that_gives_nan(job, monkeypatch):
    """The message says which, and the shard is not written."""
    run = embedport.Embedder.embed_rows

    def spoilt(self, rows, **options):
        vectors = run(self, rows, **options)
        vectors[2] = np.nan
        return vectors

    monkeypatch.setattr(embedport.Embedder, "embed_rows", spoilt)
    with pytest.raises(
        InputError, match=r"corpus\.jsonl, 35 texts from line 1: 1 of 35 .* text 2;"
    ):
        encode_corpus(job, run_here)
    assert not shards(job.output)


@pytest.mark.parametrize("change", ["shorter", "other texts, as many"])
def test_an_input_that_changes_meanwhile(job, change):
    def run(job, shards, advance):
        text = job.input.read_text(encoding="utf-8")
        changed = '{"text": "shorter"}\n' if change == "shorter" else text.replace("one", "two")
        job.input.write_text(changed, encoding="utf-8")
        run_here(job, shards, advance)

    with pytest.raises(InputError, match="the file has changed"):
        encode_corpus(job, run)


def test_titles_go_before_texts(job, embedder):
    """As BEIR has them, so that what is served is what `validate --retrieval` measures."""
    rows = ({"_id": "1", "title": "Tea", "text": "a leaf"}, {"title": "", "text": "plain"})
    job.input.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encode_corpus(job, run_here)
    expected = embedder.encode(["Tea a leaf", "plain"])
    np.testing.assert_allclose(stacked(job.output), expected, **CLOSE)


def test_another_programs_folder_is_never_begun_anew(job):
    job.output.mkdir()
    (job.output / INDEX).write_text('{"version": 2, "shards": []}')
    (job.output / "2024.npy").write_bytes(b"theirs")
    with pytest.raises(InputError, match="is another program's"):
        encode_corpus(job, run_here, force=True)
    assert (job.output / "2024.npy").read_bytes() == b"theirs"
    # An index of ours is, whatever its version.
    theirs = {"format_version": 99, "model_sha256": "", "shards": []}
    (job.output / INDEX).write_text(json.dumps(theirs))
    (job.output / "000007.npy").write_bytes(b"ours")
    encode_corpus(job, run_here, force=True)
    left = sorted(path.name for path in job.output.iterdir())
    assert left == ["000000.npy", "2024.npy", INDEX]


RAY = """
import os, signal, sys, threading, time
from pathlib import Path

import ray
from embedport.runtimes import bulk
from embedport.runtimes.ray import run_on_ray

output = Path(sys.argv[3])


def workers():
    \"""Processes of this cluster's actors.\"""
    parents, found = {}, []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
            parents[pid] = parent
            if "ShardWorker" in (stat.parent / "cmdline").read_text():
                found.append(pid)
        except OSError:
            pass
    return [pid for pid in found if parents.get(parents[pid]) == os.getpid()]


def kill_one():
    while len(list(output.glob("*.npy"))) < 2:
        time.sleep(0.01)
    found = workers()
    os.kill(found[0], signal.SIGKILL)
    print("killed one of", len(found), "after", len(list(output.glob("*.npy"))), flush=True)


def start():
    \"""Start a cluster; Ray gives its own processes 30 s, which a busy machine may exceed.\"""
    for attempt in range(3):
        try:
            return ray.init(num_cpus=2, include_dashboard=False, logging_level="warning")
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
    sys.exit("Ray does not start")


bulk.SHARD_ROWS = 200
start()
threading.Thread(target=kill_one, daemon=True).start()
rows = []


def run(job, shards, advance):
    run_on_ray(job, shards, rows.append, workers=2)


bulk.encode_corpus(bulk.Job(sys.argv[1], Path(sys.argv[2]), output, device="cpu"), run)
print("rows", sum(rows))
try:
    run_on_ray(
        bulk.Job(sys.argv[1], Path("/no"), output), [(0, bulk.Part(0, 1, 0, 1, 0))], print, 1
    )
except bulk.InputError as error:
    print("error", error)
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_ray_with_an_actor_killed(artifact, vectors_of_many, tmp_path):
    count = 8000
    corpus, output = write_many(tmp_path, MANY[:count]), tmp_path / "vectors"
    environment = os.environ | {
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_TMPDIR": "/tmp",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_register_timeout_seconds": "300",
    }
    ended = subprocess.run(
        [sys.executable, "-c", RAY, artifact, corpus, output],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ended.returncode == 0, ended.stderr
    killed = re.search(r"killed one of 2 after (\d+)", ended.stdout)
    assert killed is not None
    assert int(killed[1]) < 35, "it was killed when its work was nearly done"
    assert f"rows {count}" in ended.stdout
    assert "error /no cannot be read" in ended.stdout
    np.testing.assert_allclose(stacked(output), vectors_of_many[:count], **CLOSE)
    assert len(shards(output)) == 40
