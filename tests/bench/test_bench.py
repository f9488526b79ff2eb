"""The race: the same work for all, each answer in its place, and errors that say what to do."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import embedport
from embedport.bench import bench as benches
from embedport.bench import sides, work
from embedport.bench.peers import serving
from embedport.bench.race import Race, start_cold
from embedport.cli import main
from embedport.errors import InputError, VerificationError
from embedport.prompts import EmbeddingTokenizer

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
    code = script.format(folder=str(sides.SCRIPTS), threads=threads)
    return sides.Side(name, (sys.executable, "-c", code), Path(__file__).parent, bits, {})


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory, real_tokenizer):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    real_tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, checkpoints):
    output = tmp_path_factory.mktemp("artifact") / "int8"
    embedport.export(checkpoints("kv2"), output, precision="int8")
    return output


def test_passages_are_of_all_lengths(tokenizer_file):
    low, high = work.PASSAGE_TOKENS
    mixed = work.passages(tokenizer_file, 200, 4)
    assert [len(part) for part in mixed.parts] == [50] * 4
    lengths = np.array([len(row) for part in mixed.parts for row in part])
    # Cut by token, then tokenized alone with an end token: a boundary may move by a few.
    assert low - 2 <= lengths.min() < 1.5 * low
    assert high / 1.1 < lengths.max() <= high + 8
    assert np.median(lengths) == pytest.approx(np.sqrt(low * high), rel=0.2)
    again = work.passages(tokenizer_file, 200, 4)
    assert all(map(np.array_equal, mixed.parts[3], again.parts[3]))
    texts = work.read_passages(EmbeddingTokenizer(tokenizer_file, 4096), 200)
    assert len(set(texts)) == 200


def test_shapes_are_full(tokenizer_file):
    shape = work.uniform(tokenizer_file, 8, 128)
    assert [len(row) for row in shape.part(3)] == [128] * 8
    assert work.uniform(tokenizer_file, 1, 32).repeats == 16


def test_pairs_share_their_query(tokenizer_file):
    pairs = work.reranking(tokenizer_file, 2, 5)
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
    work.write_rows(tmp_path / "rows.npz", rows)
    found = serving.read_rows(tmp_path / "rows.npz")
    assert [row.tolist() for row in found] == [row.tolist() for row in rows]


def test_race():
    parts = tuple(tuple(np.full(n, 7) for n in range(start, start + 12)) for start in (1, 20, 40))
    race_work = work.Work("ragged", parts)
    first, second, wide = fake("first"), fake("second"), fake("wide", bits=32)
    with Race([first, second, wide], lambda stage: None) as race:
        results = race.run(race_work, 3)
    assert [each.rounds for each in results.values()] == [3, 3, 1]
    # A call costs the same whatever it holds: the largest batch is the fastest.
    assert results["second"].batch_rows == 8
    assert results["first"].ratio == 1
    assert results["second"].minimum_cosine == pytest.approx(1)
    assert results["second"].from_to[0] <= results["second"].tokens_per_second
    json.dumps([vars(each) for each in results.values()])


def test_threads_must_be_equal():
    with (
        pytest.raises(VerificationError, match="different numbers of threads"),
        Race([fake("one"), fake("two", threads=2)], lambda stage: None),
    ):
        pass


def test_a_side_that_ends_says_why():
    broken = fake("broken", script="raise SystemExit('no {folder} today {threads}')")
    with pytest.raises(VerificationError, match=r"ended with 1:\nno .* today"):
        sides.Worker(broken.command)


def test_a_side_that_ends_is_left_out():
    """Of that work only: it starts again."""
    frail = SCRIPT.replace("time.sleep(0.01)", "assert len(rows[0]) < 20")
    parts = tuple((np.full(n, 7),) for n in (5, 30))
    with Race([fake("first"), fake("frail", script=frail)], lambda stage: None) as race:
        ended = race.run(work.Work("long", parts), 2)
        assert list(ended) == ["first"]
        assert "AssertionError" in race.failures["long"]["frail"]
        assert list(race.run(work.Work("short", parts[:1]), 1)) == ["first", "frail"]
    with (
        pytest.raises(VerificationError, match="AssertionError"),
        Race([fake("frail", script=frail)], lambda stage: None) as race,
    ):
        race.run(work.Work("long", parts), 2)


def test_ours(artifact, tokenizer_file):
    shape = work.uniform(artifact / "tokenizer.json", 2, 16)
    side = sides.our_side(artifact)
    with Race([side], lambda stage: None) as race:
        result = race.run(shape, 1)[side.name]
    assert (side.name, side.bits, result.batch_rows) == ("embedport int8", 8, None)
    assert side.size > 100_000
    (seconds,) = start_cold(side, shape, 1)
    assert 0 < seconds < 60


def test_peers_are_prepared_once(monkeypatch, tmp_path, checkpoints):
    ran = []
    monkeypatch.setattr(sides, "install_peer", lambda script: (("python", script), {"tool": "1"}))
    monkeypatch.setattr(sides, "_run", lambda command: ran.append(command) or "")
    peer = sides.PEERS["optimum-int8"]
    one = sides.peer_side(peer, checkpoints("kv2"), tmp_path, lambda stage: None)
    assert [command[2:4] for command in ran] == [["prepare", "fp32"], ["prepare", "int8"]]
    assert one.command[2:4] == ("serve", "int8")
    assert one.folder.is_dir()
    two = sides.peer_side(peer, checkpoints("kv2"), tmp_path, lambda stage: None)
    assert (two, len(ran)) == (one, 2)
    three = sides.peer_side(peer, checkpoints("kv1"), tmp_path, lambda stage: None)
    assert three.folder != one.folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peers": ["optimum"]}, "no peer is named 'optimum'; there are optimum-int8, "),
        ({"peers": ["optimum-int8"]}, "say which with --checkpoint"),
        ({"checkpoint": "somewhere"}, "--checkpoint is what peers serve"),
        ({"peers": ["optimum-int8"] * 2, "checkpoint": "x"}, "optimum-int8 is given twice"),
    ],
)
def test_bad_requests(artifact, options, message):
    with pytest.raises(InputError, match=message):
        benches.bench([artifact], **options)


def test_every_side_has_a_name_of_its_own(tmp_path):
    def side(folder, name="embedport int8"):
        return sides.Side(name, (), tmp_path / folder, 8, {})

    named = benches._distinct([side("a/int8"), side("b/int8"), side("c"), side("d", "other")])
    assert [each.name for each in named] == [
        f"embedport int8 ({tmp_path}/a/int8)",
        f"embedport int8 ({tmp_path}/b/int8)",
        "embedport int8 (c)",
        "other",
    ]
    with pytest.raises(InputError, match="is given twice"):
        benches._distinct([side("a"), side("a")])


def test_tasks_do_not_mix(artifact, checkpoints, tmp_path):
    embedport.export(checkpoints("kv2", "reranker"), tmp_path / "reranker")
    with pytest.raises(InputError, match="of another task"):
        benches.bench([artifact, tmp_path / "reranker"])


def test_without_uv(artifact, checkpoints, monkeypatch):
    monkeypatch.setattr(sides.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="pip install uv"):
        benches.bench([artifact], peers=["optimum-fp32"], checkpoint=checkpoints("kv2"))


def test_command_line(artifact, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        benches,
        "_works",
        lambda task, tokenizer, quick: [work.Work("tiny", ((np.arange(1, 9),),))],
    )
    out = tmp_path / "bench.json"
    monkeypatch.setattr(
        sys, "argv", ["embedport", "bench", str(artifact), "--quick", "-o", str(out), "--json"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert printed["works"]["tiny"]["embedport int8"]["rounds"] == benches.ROUNDS
    assert printed["sides"]["embedport int8"]["cold_start"][0] > 0
    assert printed["peak"]["fp32"] > 0
