"""Recorded references: the same report and verdict, without torch and without the checkpoint."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import ByteLevel

import embedport
from embedport.artifact.folder import write_manifest
from embedport.demo.pipeline import (
    RERANKED_QUERIES,
    builtin_embedder,
    builtin_reference,
    builtin_reranker,
)
from embedport.errors import InputError
from embedport.texts.beir import read_beir
from embedport.texts.samples import Pair, Sample, builtin_pairs, builtin_samples
from embedport.validation import recorded_file
from embedport.validation.card import CardReference
from embedport.validation.library import LibraryReference
from embedport.validation.opening import open_live
from embedport.validation.recorded import describe_set
from embedport.validation.recorded_file import (
    KEY,
    is_recorded,
    read_recorded,
    write_recorded,
)
from embedport.validation.tasks import choose_inputs

PROBES = LONG = True
SAMPLES = [sample for sample in builtin_samples() if len(sample.text) < 200]
PAIRS = [pair for pair in builtin_pairs() if len(pair.document) < 200]
PAIRS += [Pair("Snow?", "It is cold.", "Find the statute")]


@pytest.fixture
def data(small_set):
    return read_beir(small_set(every=250, others=40))


@pytest.fixture(scope="session")
def recordings(tmp_path_factory, folders):
    """A function (task) -> an artifact, its checkpoint, and that one's recorded reference."""
    made = {}

    def make(task):
        if task not in made:
            there = folders(task)
            file = tmp_path_factory.mktemp("recorded") / "model.reference"
            embedport.record_reference(
                there.checkpoint, file, **inputs_of(task), task=task, device="cpu"
            )
            made[task] = SimpleNamespace(
                artifact=there.artifact, checkpoint=there.checkpoint, file=file
            )
        return made[task]

    return make


def inputs_of(task) -> dict[str, Any]:
    return {"texts": SAMPLES} if task == "embedding" else {"pairs": PAIRS}


def validate(artifact, reference, **options):
    return embedport.validate(artifact, reference, device="cpu", record=False, **options)


def rewritten(file, path, change=None, **tensors):
    """A copy of a recorded reference with other metadata or tensors."""
    with safe_open(file, "numpy") as opened:
        values = json.loads(opened.metadata()[KEY])
    values = values if change is None else change(values)
    whole = {
        name: each for name, each in {**load_file(file), **tensors}.items() if each is not None
    }
    save_file(whole, path, metadata={KEY: json.dumps(values)})
    return path


@pytest.mark.parametrize("task", ["embedding", pytest.param("reranker", marks=pytest.mark.slow)])
def test_the_same_report(folders, tmp_path, data, task):
    """In every form, the page with its layers too; of retrieval, on some of the queries as well."""
    made = folders(task)
    file = tmp_path / "model.reference"
    recorded = embedport.record_reference(
        made.checkpoint, file, **inputs_of(task), device="cpu", retrieval=data
    )
    pages = [tmp_path / name for name in ("live.html", "recorded.html")]
    queries = dict(list(data.queries.items())[::2])
    some = replace(
        data,
        queries=queries,
        relevance={query: data.relevance[query] for query in queries},
        candidates={query: data.candidates[query] for query in queries},
    )
    for given in (data, some):
        live = validate(
            made.artifact, made.checkpoint, **inputs_of(task), retrieval=given, page=pages[0]
        )
        found = validate(made.artifact, file, retrieval=given, page=pages[1])
        assert found.library == f"{live.library}, recorded {recorded.origin.recorded}"
        same = replace(found, library=live.library)
        assert same.passed
        assert same == live
        texts = [page.read_text().replace(found.library, live.library) for page in pages]
        assert texts[0] == texts[1]
        assert "Relative error after each layer" in texts[0]


# test_demo validates a reranker without torch each time.
@pytest.mark.parametrize("task", ["embedding", pytest.param("reranker", marks=pytest.mark.slow)])
def test_neither_torch_nor_the_checkpoint(recordings, tmp_path, task):
    made = recordings(task)
    artifact = shutil.copytree(made.artifact, tmp_path / "artifact")
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'sentence_transformers'): sys.modules[name] = None\n"
        "from embedport.cli import main; main()\n"
    )
    command = [sys.executable, "-c", code, "validate", artifact, "--reference", made.file]
    command += ["--device", "cpu", "--report", tmp_path / "page.html"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert found.returncode == 0, found.stderr
    assert "Holds against " in found.stdout
    parity = embedport.Artifact.open(artifact).manifest.parity
    assert parity is not None
    assert parity["library"].endswith(f"recorded {read_recorded(made.file).origin.recorded}")


def test_a_spoilt_artifact_fails(recordings, spoil):
    made = recordings("embedding")

    def change(runtime):
        model = runtime.model
        runtime.model = lambda ids, mask: np.roll(model(ids, mask), 1, axis=1)

    spoil(change)
    assert "minimum cosine" in {
        gate.name for gate in validate(made.artifact, made.file).gates if gate.failed
    }


def test_a_wrong_tokenizer_fails(recordings, spoil, wrong_tokenizer):
    """On texts beside the recorded inputs, whose token ids are recorded too."""
    task, change = wrong_tokenizer
    made = recordings(task)
    spoil(lambda runtime: change(runtime.tokenizer.tokenizer))
    report = validate(made.artifact, made.file)
    (gate,) = [gate for gate in report.gates if gate.failed]
    assert gate.name == "inputs with other token ids"
    assert gate.detail.startswith("beside the inputs: ")


def test_an_added_token_that_was_not_recorded(recordings, copied):
    made = recordings("embedding")
    folder = copied(made.artifact)
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens(["unheard of"])
    tokenizer.save(str(path))
    write_manifest(folder, embedport.Artifact.open(made.artifact).manifest, folder.name)
    (gate,) = [gate for gate in validate(folder, made.file).gates if gate.failed]
    assert gate.detail == (
        "beside the inputs: the added token 'unheard of' is not one of the reference's tokenizer"
    )


def test_a_file_of_an_early_version(recordings, tmp_path):
    """It has neither texts beside the inputs, nor settings, nor the table: that is said."""
    made = recordings("embedding")
    new = ("probes", "settings")
    names = [name for name in load_file(made.file) if name.startswith(("probes.", "table."))]
    early = rewritten(
        made.file,
        tmp_path / "early",
        lambda values: {key: value for key, value in values.items() if key not in new},
        **dict.fromkeys(names),
    )
    report = validate(made.artifact, early)
    assert report.passed
    assert [gate.title for gate in report.gates if gate.passed is None] == [
        "settings that differ (not checked: this recorded reference has no settings: record it "
        "again)",
        "embedding rows that differ (not checked: this recorded reference has no embedding table: "
        "record it again)",
    ]


def test_what_is_written_is_read(recordings, tmp_path, monkeypatch):
    for task in ("embedding", "reranker"):
        found = read_recorded(recordings(task).file)
        again = replace(found, path=tmp_path / task)
        write_recorded(again)
        assert (tmp_path / task).read_bytes() == recordings(task).file.read_bytes()
        assert found.inputs == inputs_of(task)["texts" if task == "embedding" else "pairs"]
        with pytest.raises(InputError, match="has hidden states of other texts than this"):
            found.hidden_states(found.layers.rows[::-1])
        reversed_inputs: Any = found.inputs[::-1]
        with pytest.raises(InputError, match="was recorded on other inputs than these"):
            found.run(reversed_inputs, "fp32")
    monkeypatch.setattr(recorded_file, "LARGEST", 1000)
    with pytest.raises(InputError, match=r"characters, and a recorded reference holds 1,000: rec"):
        write_recorded(replace(found, path=tmp_path / "large"))
    assert not (tmp_path / "large").exists()


def test_another_checkpoint(recordings, checkpoints, tmp_path):
    other = embedport.export(checkpoints("kv2", seed=1), tmp_path / "other").folder
    with pytest.raises(InputError, match=r"model\.safetensors has the sha256 .* record a ref"):
        validate(other, recordings("embedding").file)
    wider = embedport.export(checkpoints("kv8"), tmp_path / "wider").folder
    with pytest.raises(InputError, match=r"hidden_size and vocab_size \(128"):
        validate(wider, recordings("embedding").file)
    with pytest.raises(InputError, match="whose task is embedding; the artifact's task is rer"):
        validate(recordings("reranker").artifact, recordings("embedding").file)


@pytest.mark.parametrize("size", [0, 7, 200, 5000, -1])
def test_a_truncated_file(recordings, tmp_path, size):
    made = recordings("embedding")
    path = tmp_path / "cut"
    path.write_bytes(made.file.read_bytes()[:size])
    with pytest.raises(InputError, match=f"^{path} is not a whole recorded reference"):
        validate(made.artifact, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: [], "is safetensors, and not a recorded reference"),
        (lambda v: v | {"format_version": 9}, "format version 9, and this embedport reads 1"),
        (lambda v: v | {"inputs": [["a"]]}, "is damaged"),
        (lambda v: v | {"inputs": [[1, 2]] * len(SAMPLES)}, "expected a string, found 1"),
        (lambda v: v | {"inputs": v["inputs"][:3]}, "tensor lengths should be int32"),
        (lambda v: v | {"arithmetics": ["fp8"]}, "should be some of fp16, bf16, fp32"),
        (lambda v: v | {"arithmetics": ["fp16"]}, r"results\.fp16"),
        (lambda v: v | {"origin": {}}, "missing or unknown keys of origin: device, "),
        (lambda v: v | {"origin": v["origin"] | {"hidden_size": 4}}, "layers.states should be"),
        (lambda v: v | {"origin": v["origin"] | {"versions": 4}}, "is damaged"),
        (lambda v: v | {"max_length": None}, "expected a whole number above 0, found None"),
        (lambda v: v | {"retrieval": {"name": "x"}}, "is damaged"),
        (lambda v: v | {"settings": {"prompts": {}}}, "is damaged"),
        (lambda v: v | {"settings": {"positions": 9, "max_length": 0}}, "is damaged"),
        (lambda v: v | {"settings": {"positions": 9, "layers": []}}, "layers should be an object"),
        (lambda v: v | {"probes": {"inputs": [], "added": []}}, "probes.lengths should be"),
    ],
)
def test_a_damaged_file(recordings, tmp_path, change, message):
    made = recordings("embedding")
    with pytest.raises(InputError, match=message):
        validate(made.artifact, rewritten(made.file, tmp_path / "damaged", change))


def test_damaged_tensors(recordings, tmp_path):
    made = recordings("embedding")
    for name, tensor in (
        ("lengths", np.zeros(len(SAMPLES), np.int32)),
        ("ids", np.zeros(3, np.int32)),
        ("results.fp32", np.zeros((len(SAMPLES), 64), np.float64)),
        ("table.lengths", np.zeros(3, np.float32)),
        ("probes.ids", np.zeros(3, np.int32)),
    ):
        path = rewritten(made.file, tmp_path / name, **{name: tensor})
        with pytest.raises(InputError, match=f"{name} should be"):
            validate(made.artifact, path)
    save_file({"weight": np.zeros(2, np.float32)}, tmp_path / "weights")
    with pytest.raises(InputError, match="not a recorded reference: its metadata should hold"):
        validate(made.artifact, tmp_path / "weights")


def test_it_has_its_own_texts(recordings):
    made = recordings("embedding")
    with pytest.raises(
        InputError, match="holds the texts that it was recorded on: leave yours out"
    ):
        validate(made.artifact, made.file, texts=["tea"])
    with pytest.raises(InputError, match="is a file and has no revision 'main'"):
        validate(made.artifact, made.file, revision="main")
    with pytest.raises(InputError, match="is a recorded reference: record it with `adapter`"):
        validate(made.artifact, made.file, adapter="lora")


def test_inputs_cut_elsewhere(folders, tmp_path):
    made = folders("embedding")
    file = tmp_path / "short.reference"
    embedport.record_reference(
        made.checkpoint, file, ["tea", "long " * 99], device="cpu", max_length=33
    )
    with pytest.raises(InputError, match=r"cut to 33 tokens, .* `max_length` 32768"):
        validate(made.artifact, file)
    embedport.record_reference(
        made.checkpoint, file, ["tea"], device="cpu", max_length=33, force=True
    )
    assert validate(made.artifact, file).passed


def test_a_length_without_room(checkpoints, tmp_path):
    fraction: Any = 8.0
    for task, max_length, message in (
        ("embedding", 0, "max_length should be from 1 to 32768, found 0"),
        ("embedding", 32769, "max_length should be from 1 to 32768, found 32769"),
        ("embedding", fraction, "max_length should be an integer, found 8.0"),
        ("reranker", 5, "`max_length` 5 leaves no room"),
    ):
        with pytest.raises(InputError, match=message):
            embedport.record_reference(
                checkpoints("kv2", task),
                tmp_path / "short.reference",
                task=task,
                device="cpu",
                max_length=max_length,
            )


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([""], "input 0 becomes no token"),
        ([Sample("x", "qurey")], "no prompt is named 'qurey'"),
        (["tea", "\ud800"], "text 1 is not valid Unicode: lone surrogate"),
    ],
)
def test_inputs_that_an_artifact_refuses(checkpoints, copied, tmp_path, texts, message):
    folder = copied(checkpoints("kv2"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = ByteLevel(trim_offsets=False)  # it adds nothing
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(InputError, match=message):
        embedport.record_reference(folder, tmp_path / "file", texts, device="cpu")


@pytest.mark.parametrize("name", ["a" * 300, "~nobody-of-this-name/model"])
def test_names_that_no_file_can_have(name):
    assert not is_recorded(name)


def test_another_set(folders, tmp_path, data):
    made = folders("reranker")
    file = tmp_path / "model.reference"
    embedport.record_reference(made.checkpoint, file, pairs=PAIRS[:2], retrieval=data)
    query = next(iter(data.queries))
    changed = {
        "its documents": {"documents": {**data.documents, "new": "a text"}},
        f"query '{query}'": {"queries": {**data.queries, query: "another"}},
        rf"query '{query}' of": {
            "candidates": {**data.candidates, query: data.candidates[query][::-1]}
        },
    }
    for what, change in changed.items():
        with pytest.raises(InputError, match=f"{what}.*differs: give the same set"):
            validate(made.artifact, file, retrieval=replace(data, **change))
    embedport.record_reference(made.checkpoint, file, pairs=PAIRS[:2], force=True)
    with pytest.raises(InputError, match="recorded without a retrieval set"):
        validate(made.artifact, file, retrieval=data)


def test_widths_that_were_not_recorded(folders, tmp_path, data):
    file = tmp_path / "model.reference"
    embedport.record_reference(folders("embedding").checkpoint, file, ["a"], retrieval=data)
    narrow = folders("embedding", dim=48).artifact
    with pytest.raises(InputError, match="retrieval quality at 64, 32 dimensions, not at 48"):
        validate(narrow, file, retrieval=data)
    assert validate(narrow, file).comparisons
    lacking = rewritten(file, tmp_path / "lacking", **{"retrieval.fp32.64.R@100": None})
    with pytest.raises(InputError, match=r"fp32\.64 should have nDCG@10, R@100, RR"):
        read_recorded(lacking)


def test_where_it_is_written(folders, tmp_path, monkeypatch):
    checkpoint = folders("embedding").checkpoint
    for place, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "file", "no such folder"),
    ):
        with pytest.raises(InputError, match=message):
            embedport.record_reference(checkpoint, place, ["a"])
    file = tmp_path / "model.reference"
    file.write_text("")
    with pytest.raises(InputError, match="exists; choose another place or replace it with `force`"):
        embedport.record_reference(checkpoint, file, ["a"])
    monkeypatch.setattr(LibraryReference, "run", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        embedport.record_reference(checkpoint, file, ["a"], force=True)
    assert [*tmp_path.iterdir()] == [file]
    assert file.read_text() == ""


@pytest.mark.parametrize("checkpoint", [builtin_embedder(), builtin_reranker()])
def test_the_demos_recording_is_what_its_library_gives(checkpoint):
    """All inputs; and of the set, which would take minutes, that it is the one that ships."""
    recorded = read_recorded(builtin_reference(checkpoint))
    live = open_live(checkpoint, device="cpu")
    assert type(live) is (LibraryReference if live.spec.task == "embedding" else CardReference)
    builtin = choose_inputs(live.spec.task, None, None, live.spec.prompts).inputs
    assert recorded.inputs == builtin
    assert (recorded.origin.task, recorded.max_length) == (live.spec.task, live.limit)
    assert recorded.origin.files == live.origin.files
    assert recorded.origin.library == live.origin.library
    assert recorded.rows == live.token_ids(builtin)
    short = [i for i, row in enumerate(recorded.rows) if len(row) < 200]
    inputs: Any = [builtin[i] for i in short]
    np.testing.assert_allclose(recorded.results["fp32"][short], live.run(inputs, "fp32"), atol=2e-6)
    states = live.hidden_states(recorded.layers.rows)
    for layer, found in zip(states, recorded.hidden_states(recorded.layers.rows), strict=True):
        for expected, state in zip(layer, found, strict=True):
            np.testing.assert_allclose(state, expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(recorded.final_norm(), live.final_norm())
    queries = max(RERANKED_QUERIES.values()) if live.spec.task == "reranker" else None
    assert recorded.data == describe_set(read_beir("builtin", max_queries=queries), live.spec.task)


def test_the_demos_recorded_quality():
    """The reranker's on a few queries, and the embedder's as docs/ give it."""
    recorded = read_recorded(builtin_reference(builtin_reranker()))
    data = read_beir("builtin", max_queries=2)
    found = recorded.measure(data, (0,), "fp32")
    live = open_live(builtin_reranker(), device="cpu").measure(data, (0,), "fp32")
    np.testing.assert_allclose(found.measures[0]["nDCG@10"], live.measures[0]["nDCG@10"])
    embedder = read_recorded(builtin_reference(builtin_embedder()))
    whole = embedder.measure(read_beir("builtin"), (256,), "fp32")
    assert whole.measures[256]["nDCG@10"].mean() == pytest.approx(0.2295, abs=1e-4)


def test_the_demos_files_are_small():
    sizes = [
        builtin_reference(each).stat().st_size for each in (builtin_embedder(), builtin_reranker())
    ]
    assert sum(sizes) < 4e6
