"""The same work for all, each answer in its place, and errors that say what to do."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

import embedport
from embedport.bench import bench as benches
from embedport.bench import checks, machine, runners, threads, workloads
from embedport.bench.peers import serving
from embedport.bench.rounds import Benchmark, start_cold
from embedport.cli import main
from embedport.errors import ArtifactError, CheckpointError, InputError, VerificationError
from embedport.runtimes import read_info
from embedport.texts.prompts import EmbeddingTokenizer

# A peer that gives each row the vector of its own length, and takes a while.
SCRIPT = """
import sys, time
sys.path.insert(0, {folder!r})
import numpy as np, serving

def forward(rows):
    time.sleep(0.01)
    return [np.array([len(row), row[0]], np.float32) / np.hypot(len(row), row[0]) for row in rows]

serving.serve(lambda rows, batch: serving.in_batches(rows, batch, forward), {threads})
"""


def fake(name, bits=8, threads=1, script=SCRIPT):
    code = script.format(folder=str(runners.SCRIPTS), threads=threads)
    return runners.Runner(name, (sys.executable, "-c", code), Path(__file__).parent, bits, {})


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory, real_tokenizer):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    real_tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def artifact(exported):
    return exported(precision="int8").folder


@pytest.mark.slow
def test_passages_are_of_all_lengths(tokenizer_file):
    low, high = workloads.PASSAGE_TOKENS
    mixed = workloads.passages(tokenizer_file, 100, 4)
    assert [len(part) for part in mixed.parts] == [25] * 4
    lengths = np.array([len(row) for part in mixed.parts for row in part])
    # Cut by token, then tokenized alone with an end token: a boundary may move by a few.
    assert low - 2 <= lengths.min() < 1.5 * low
    assert high / 1.1 < lengths.max() <= high + 8
    assert np.median(lengths) == pytest.approx(np.sqrt(low * high), rel=0.2)
    again = workloads.passages(tokenizer_file, 100, 4)
    assert all(map(np.array_equal, mixed.parts[3], again.parts[3]))
    texts = workloads.read_passages(EmbeddingTokenizer(tokenizer_file, 4096), 100)
    assert len(set(texts)) == 100


def test_shapes_are_full(tokenizer_file):
    shape = workloads.uniform(tokenizer_file, 8, 128)
    assert [len(row) for row in shape.part(3)] == [128] * 8
    assert workloads.uniform(tokenizer_file, 1, 32).repeats == 16


def test_pairs_share_their_query(tokenizer_file):
    pairs = workloads.reranking(tokenizer_file, 2, 5)
    for part in pairs.parts:
        rows = [row.tolist() for row in part]
        shared = next(i for i, ids in enumerate(zip(*rows, strict=False)) if len(set(ids)) > 1)
        assert shared > 50
    assert pairs.parts[0][0].tolist()[:shared] != pairs.parts[1][0].tolist()[:shared]


def test_rows_keep_their_order():
    rows = [np.arange(size) for size in (3, 9, 1, 9, 5)]
    seen = []

    def forward(batch):
        seen.append([len(row) for row in batch])
        return [np.array([len(row)]) for row in batch]

    assert serving.in_batches(rows, 2, forward).ravel().tolist() == [3, 9, 1, 9, 5]
    assert seen == [[9, 9], [5, 3], [1]]


def test_rows_survive_the_file(tmp_path):
    rows = [np.arange(4), np.arange(1), np.arange(7) * 3]
    workloads.write_rows(tmp_path / "rows.npz", rows)
    found = serving.read_rows(tmp_path / "rows.npz")
    assert [row.tolist() for row in found] == [row.tolist() for row in rows]


def test_rounds():
    parts = tuple(tuple(np.full(n, 7) for n in range(start, start + 12)) for start in (1, 20, 40))
    ragged = workloads.Workload("ragged", parts)
    first, second, wide = fake("first"), fake("second"), fake("wide", bits=32)
    with Benchmark([first, second, wide], 1, lambda stage: None) as benchmark:
        results = benchmark.run(ragged, 3)
    assert [each.rounds for each in results.values()] == [3, 3, 1]
    # A call costs the same whatever it holds: the largest batch is the fastest.
    assert results["second"].batch_rows == 8
    assert results["first"].ratio == 1
    assert results["second"].minimum_cosine == pytest.approx(1)
    assert results["second"].from_to[0] <= results["second"].tokens_per_second
    json.dumps([vars(each) for each in results.values()])


def test_a_library_that_takes_other_threads_than_it_was_told():
    with (
        pytest.raises(VerificationError, match=r"two was told to use 1 threads, .* reports 2"),
        Benchmark([fake("one"), fake("two", threads=2)], 1, lambda stage: None),
    ):
        pass


# A second session's threads are all that this process starts meanwhile: the first one's import and
# numpy's pools are there already.
SECOND_SESSION = """
import os
import onnxruntime
from onnx import TensorProto, helper
value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])
node = helper.make_node("Identity", ["a"], ["b"])
graph = helper.make_graph([node], "g", [value("a")], [value("b")])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
count = lambda: len(os.listdir("/proc/self/task"))
run = lambda: onnxruntime.InferenceSession(
    model.SerializeToString(), providers=["CPUExecutionProvider"]
)
first, before = run(), count()
second = run()
print(count() - before + 1)
"""


def test_the_default_of_onnxruntime_is_a_thread_a_physical_core():
    if serving.count_physical_cores() is None:
        pytest.skip("this machine does not tell its physical cores")
    command = [sys.executable, "-c", SECOND_SESSION]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) == serving.count_physical_cores()


def test_physical_cores(tmp_path):
    """Two sockets of two cores, each with two threads."""
    for number in range(8):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{number // 4}\n")
        (folder / "core_id").write_text(f"{number // 2 % 2}\n")
    assert serving.count_physical_cores(tmp_path) == 4
    assert serving.count_physical_cores(tmp_path / "cpu0") is None


@pytest.mark.parametrize(("system", "peak"), [("linux", 7 << 10), ("darwin", 7)])
def test_a_peak_is_in_bytes(monkeypatch, system, peak):
    monkeypatch.setattr(serving.sys, "platform", system)
    usage = SimpleNamespace(ru_maxrss=7)
    monkeypatch.setattr(serving.resource, "getrusage", lambda who: usage)
    assert serving.peak_bytes() == peak


def test_each_side_is_told_the_same_threads(monkeypatch):
    monkeypatch.setattr(serving, "count_physical_cores", lambda: 4)
    monkeypatch.setattr(threads, "core_limit", lambda: None)
    # Eight logical cores: onnxruntime's default, so that its threads stay pinned.
    monkeypatch.setattr(threads, "count_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert (threads.choose_threads(), threads.thread_variables()) == (4, {})
    assert (serving.session_threads(4), serving.session_threads(3)) == (0, 3)
    # Three of them are free for this process, which onnxruntime would not see.
    monkeypatch.setattr(threads, "count_cores", lambda: 3)
    assert (threads.choose_threads(), threads.thread_variables()) == (3, {"OMP_NUM_THREADS": "3"})
    monkeypatch.setattr(threads, "core_limit", lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert serving.session_threads(4) == 4


def test_sessions_report_what_they_were_told():
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 3
    session = SimpleNamespace(get_session_options=lambda: options)
    assert serving.threads_of(session) == 3
    options.intra_op_num_threads = 0
    assert serving.threads_of(session) == serving.count_physical_cores()


@pytest.mark.parametrize("engine", ["onnxruntime", pytest.param("torch", marks=pytest.mark.slow)])
def test_ours_obeys_a_limit(artifact, checkpoints, monkeypatch, engine):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = artifact if engine == "onnxruntime" else checkpoints("kv2")
    runner = runners.our_runner(read_info(model), threads.choose_threads())
    with Benchmark([runner], 1, lambda stage: None) as benchmark:
        assert benchmark.threads == 1


def test_ours_is_the_installed_one(artifact, tmp_path, monkeypatch):
    """Not a clone's in the current folder, which has no kernels, nor its links on Windows."""
    (tmp_path / "embedport").mkdir()
    (tmp_path / "embedport" / "__init__.py").write_text("raise SystemExit('the clone')")
    monkeypatch.chdir(tmp_path)
    command = runners.our_runner(read_info(artifact), 1).command
    done = subprocess.run(command[:-1], capture_output=True, text=True)
    assert "missing 1 required positional argument: 'task'" in done.stderr


def test_a_side_that_ends_says_why():
    broken = fake("broken", script="raise SystemExit('no {folder} today {threads}')")
    with pytest.raises(VerificationError, match=r"ended with 1:\nno .* today"):
        runners.Worker(broken.command)


def test_a_side_that_ends_is_left_out():
    """It is left out of that work only, and starts again for the next."""
    frail = SCRIPT.replace("time.sleep(0.01)", "assert len(rows[0]) < 20")
    parts = tuple((np.full(n, 7),) for n in (5, 30))
    with Benchmark(
        [fake("first"), fake("frail", script=frail)], 1, lambda stage: None
    ) as benchmark:
        ended = benchmark.run(workloads.Workload("long", parts), 2)
        assert list(ended) == ["first"]
        assert "AssertionError" in benchmark.failures["long"]["frail"]
        assert list(benchmark.run(workloads.Workload("short", parts[:1]), 1)) == ["first", "frail"]
    with (
        pytest.raises(VerificationError, match="AssertionError"),
        Benchmark([fake("frail", script=frail)], 1, lambda stage: None) as benchmark,
    ):
        benchmark.run(workloads.Workload("long", parts), 2)


def test_ours(artifact, tokenizer_file):
    shape = workloads.uniform(artifact / "tokenizer.json", 2, 16)
    runner = runners.our_runner(read_info(artifact), threads.choose_threads())
    with Benchmark([runner], threads.choose_threads(), lambda stage: None) as benchmark:
        result = benchmark.run(shape, 1)[runner.name]
    assert (runner.name, runner.bits, result.batch_rows) == ("embedport int8", 8, None)
    assert runner.size > 100_000
    (seconds,) = start_cold(runner, shape, 1)
    assert 0 < seconds < 60


def test_peers_are_prepared_once(monkeypatch, tmp_path, checkpoints):
    ran = []
    monkeypatch.setattr(runners, "_run", lambda command: ran.append(command) or "")
    installed = {"optimum_onnx.py": runners.Installed(("python", "optimum"), {"tool": "1"})}
    peer = runners.PEERS["optimum-int8"]

    def make(checkpoint):
        return runners.peer_runner(peer, installed, checkpoint, tmp_path, 2, lambda stage: None)

    one = make(checkpoints("kv2"))
    assert [command[2:4] for command in ran] == [["prepare", "fp32"], ["prepare", "int8"]]
    assert one.command == ("python", "optimum", "serve", "int8", str(one.folder), "2")
    assert one.folder.is_dir()
    assert (make(checkpoints("kv2")), len(ran)) == (one, 2)
    assert make(checkpoints("kv1")).folder != one.folder


def tiny_work(task, tokenizer, quick):
    return [workloads.Workload("tiny", ((np.arange(1, 9),),))]


@pytest.fixture
def no_peers(monkeypatch):
    """Fails where a peer is installed; there is a uv, and little workloads."""

    def install(script):
        pytest.fail(f"{script} was installed")

    monkeypatch.setattr(benches, "install_peer", install)
    monkeypatch.setattr(benches, "_workloads", tiny_work)
    monkeypatch.setattr(checks.shutil, "which", lambda name: f"/bin/{name}")


def request(artifacts, checkpoint=None, **options):
    peers = options.pop("peers", [] if checkpoint is None else ["optimum-int8"])
    return benches.bench(artifacts, peers=peers, checkpoint=checkpoint, quick=True, **options)


@pytest.mark.usefixtures("no_peers")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peers": ["optimum"]}, "no peer is named 'optimum'; there are optimum-int8, "),
        ({"peers": ["optimum-int8"]}, "give `checkpoint`, ideally"),
        ({"checkpoint": "somewhere", "peers": []}, "`checkpoint` is for peers"),
        ({"peers": ["optimum-int8"] * 2, "checkpoint": "x"}, "optimum-int8 is given twice"),
        ({"checkpoint": "no/such/folder"}, "no such folder"),
        ({"rounds": 0}, "rounds should be at least 1, found 0"),
        ({"artifacts": []}, "at least one artifact"),
    ],
)
def test_bad_requests(artifact, options, message):
    with pytest.raises(InputError, match=message):
        request(**{"artifacts": [artifact]} | options)


@pytest.mark.usefixtures("no_peers")
def test_a_checkpoint_that_peers_cannot_serve(artifact, checkpoints, quantized, copied):
    with pytest.raises(InputError, match=r"has hidden_size 96, and .* 64: peers serve"):
        request([artifact], checkpoints("kv1"))
    with pytest.raises(InputError, match="is quantized"):
        request([artifact], quantized("gptq"))
    damaged = copied(checkpoints("kv2"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        request([artifact], damaged)


@pytest.mark.usefixtures("no_peers")
def test_an_artifact_that_cannot_be_raced(artifact, checkpoints, tmp_path, copied):
    narrow = tmp_path / "narrow"
    embedport.export(checkpoints("kv2"), narrow, dim=32)
    with pytest.raises(InputError, match=r"vectors of 32 values and .* of 64"):
        request([artifact, narrow])
    with pytest.raises(InputError, match="vectors of 32 values and peers of 64"):
        request([narrow], checkpoints("kv2"))
    damaged = copied(artifact)
    graph = damaged / "onnx" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"onnx/model\.onnx"):
        request([damaged], checkpoints("kv2"))


@pytest.mark.usefixtures("no_peers")
def test_a_side_is_tried_before_peers_are_prepared(artifact, checkpoints, monkeypatch):
    broken = fake("broken", script="raise SystemExit('no {folder} today {threads}')")
    monkeypatch.setattr(benches, "our_runner", lambda info, threads: broken)
    with pytest.raises(VerificationError, match=r"ended with 1:\nno .* today"):
        request([artifact], checkpoints("kv2"))


@pytest.mark.usefixtures("no_peers")
def test_a_disk_that_is_too_small(artifact, checkpoints, monkeypatch, tmp_path):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match="optimum-fp32, optimum-int8 write at least"):
        request([artifact], checkpoints("kv2"), cache=tmp_path / "cache")


def test_work_that_a_model_does_not_take(artifact):
    info = read_info(artifact)
    long = workloads.Workload("long", ((np.zeros(info.max_position_embeddings + 1, np.int64),),))
    with pytest.raises(InputError, match=r"at most .* tokens, and the workload long has a row of"):
        checks.check_workloads([long], [info])
    foreign = workloads.Workload("foreign", ((np.array([1, info.vocab_size]),),))
    with pytest.raises(InputError, match="compare models with one tokenizer"):
        checks.check_workloads([foreign], [info])


def test_every_side_has_a_name_of_its_own(tmp_path):
    def runner(folder, name="embedport int8"):
        return runners.Runner(name, (), tmp_path / folder, 8, {})

    named = benches._distinct(
        [runner("a/int8"), runner("b/int8"), runner("c"), runner("d", "other")]
    )
    assert [each.name for each in named] == [
        f"embedport int8 ({tmp_path}/a/int8)",
        f"embedport int8 ({tmp_path}/b/int8)",
        "embedport int8 (c)",
        "other",
    ]
    with pytest.raises(InputError, match="is given twice"):
        benches._distinct([runner("a"), runner("a")])


def test_tasks_do_not_mix(artifact, checkpoints, tmp_path):
    embedport.export(checkpoints("kv2", "reranker"), tmp_path / "reranker")
    with pytest.raises(InputError, match="has another task"):
        benches.bench([artifact, tmp_path / "reranker"])


def test_without_uv(artifact, checkpoints, monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="pip install uv"):
        request([artifact], checkpoints("kv2"))


def test_the_kind_of_a_cpu():
    assert machine.cpu_kind({"cpu": "AMD EPYC 7763", "flags": ["avx2"]}) == "AMD EPYC 7763 (avx2)"


def test_command_line(artifact, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benches, "_workloads", tiny_work)
    monkeypatch.setattr(machine, "PEAK_SIZES", (256,))
    out = tmp_path / "bench.json"
    monkeypatch.setattr(
        sys, "argv", ["embedport", "bench", str(artifact), "--quick", "-o", str(out), "--json"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert printed["workloads"]["tiny"]["embedport int8"]["rounds"] == benches.ROUNDS
    assert printed["runners"]["embedport int8"]["cold_start"][0] > 0
    assert printed["peak"]["fp32"] > 0
    assert printed["threads"] == threads.choose_threads()
    assert {"cpu", "flags", "cores", "kernels"} <= printed["machine"].keys()
