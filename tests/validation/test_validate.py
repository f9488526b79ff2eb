"""validate() on real small artifacts, and on artifacts spoilt in known ways."""

import json
import math
from typing import Any

import numpy as np
import pytest

import embedport
from embedport.artifact.folder import Artifact
from embedport.errors import InputError
from embedport.texts.prompts import Encoded, query_prompt
from embedport.texts.ranking import unit
from embedport.texts.samples import Pair, Sample, builtin_pairs, builtin_samples
from embedport.validation import gates
from embedport.validation.card import CardReference
from embedport.validation.library import LibraryReference
from embedport.validation.tasks import EmbeddingTask, RerankerTask
from embedport.validation.thresholds import find_thresholds

LONG = True
ORDER = "documents out of order"
# Spoilt results are not those that other software gets from the same graph.
OTHERS = "graphs that differ"
SECRET = "our plan [bold]to merge[/bold] | do not publish"
QUERIES = [Sample(text, "query") for text in ("What is the capital of China?", "Explain gravity")]
DOCUMENTS = [s for s in builtin_samples() if s.prompt == "document" and len(s.text) < 500]
SAMPLES = [*QUERIES, *DOCUMENTS][:20]
PAIRS = [Pair("Explain gravity", s.text) for s in SAMPLES[2:8]]


def strict_json(text):
    """JSON without the constants NaN and Infinity that Python's json takes."""

    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def validate(folders, *args, **changes):
    options: dict[str, Any] = {"device": "cpu", "record": False, **changes}
    return embedport.validate(folders.artifact, folders.checkpoint, *args, **options)


def gate(report, name):
    (found,) = [each for each in report.gates if each.name == name]
    return found


def failed(report):
    return {each.name for each in report.gates if each.failed}


def rotate(vectors, cosine):
    """Unit vectors at this cosine to the given ones."""
    other = np.roll(vectors, 1, axis=1)
    other = unit(other - (other * vectors).sum(axis=1, keepdims=True) * vectors)
    return (cosine * vectors + math.sqrt(1 - cosine**2) * other).astype(np.float32)


def change_results(change, text=None):
    """A change to an artifact's results, of one text (or pair) or of all."""

    def apply(runtime):
        model, ids = runtime.model, None
        if isinstance(text, Sample):
            ids = runtime.tokenizer.encode([text.text], runtime.prompt_text(text.prompt)).ids[0]
        elif isinstance(text, Pair):
            ids = runtime.tokenizer.encode([(text.query, text.document)]).ids[0]

        def changed(input_ids, attention_mask):
            results = model(input_ids, attention_mask).copy()
            rows = [
                ids is None or row[mask > 0].tolist() == ids.tolist()
                for row, mask in zip(input_ids, attention_mask, strict=True)
            ]
            results[rows] = change(results[rows])
            return results

        runtime.model = changed

    return apply


GRAPHS = ("fp32", "fp16", "bf16", "int8", "int8-weight", "int4", "mixed")


@pytest.fixture(scope="module")
def recorded(checkpoints, tmp_path_factory):
    """The reference's vectors, and its scores of `every_pair`: they take longer than the rest."""
    folder = tmp_path_factory.mktemp("reference")
    places = {task: folder / f"{task}.reference" for task in ("embedding", "reranker")}
    for task, path in places.items():
        pairs = every_pair() if task == "reranker" else None
        embedport.record_reference(checkpoints("kv2", task), path, pairs=pairs)
    return places


@pytest.mark.parametrize(
    ("task", "precision"),
    [
        *(("embedding", precision) for precision in GRAPHS),
        *(("reranker", precision) for precision in ("fp32", "int8")),
        *(
            pytest.param("reranker", precision, marks=pytest.mark.slow)
            for precision in ("fp16", "bf16", "int8-weight", "int4", "mixed")
        ),
    ],
)
def test_an_export_passes(folders, tmp_path, recorded, task, precision):
    options = {"precision": precision}
    if precision == "mixed":
        options = {"recipe": tmp_path / "recipe.json"}
        formats = {"layers.0.self_attn.q_proj": "int8", "layers.1.mlp.gate_proj": "int8/64s"}
        options["recipe"].write_text(json.dumps({"formats": formats}))
    made, live = folders(task, **options), precision in ("fp32", "int8")
    reference = made.checkpoint if live else recorded[task]
    report = embedport.validate(made.artifact, reference, device="cpu", record=False)
    assert report.passed, report.gates
    assert (report.task, report.precision, report.device) == (task, precision, "cpu")
    # Three texts take the default prompt.
    pairs = 36 if live else len(every_pair())
    assert report.inputs == (len(builtin_samples()) + 3 if task == "embedding" else pairs)
    (comparison,) = report.comparisons
    assert comparison.reference == "fp32 on fp16-rounded weights, cpu"
    assert comparison.compared == report.inputs
    assert set(report.versions) >= {"embedport", "onnxruntime", "torch", "transformers"}
    assert len(report.invariance) == 12
    assert len(report.worst) == 10
    expected = {"mean score difference", "maximum score difference", "Kendall tau"}
    if task == "embedding":
        expected |= {"mean cosine", "1st percentile of cosine", "minimum cosine", "top-10 overlap"}
        assert set(comparison.dimensions) == {32}
    else:
        expected |= {"top-3 overlap" if live else "top-10 overlap"}
    assert set(comparison.figures) == expected
    if task == "reranker" and live:
        # Six documents a query are too few to tell a wrong order from two scores that are close.
        report = embedport.validate(made.artifact, recorded[task], device="cpu", record=False)
        (comparison,) = report.comparisons
    # Four bits of random weights reorder more texts.
    tau = comparison.figures["Kendall tau"]
    assert tau is not None
    assert tau > (0.8 if precision == "int4" else 0.9)


def every_pair():
    """Each query with each document."""
    queries = dict.fromkeys(pair.query for pair in builtin_pairs())
    return [(query, pair.document) for query in queries for pair in builtin_pairs()]


def test_a_turned_vector_fails_with_its_cosine(folders, spoil):
    spoil(change_results(lambda vectors: rotate(vectors, 0.98), SAMPLES[7]))
    report = validate(folders("embedding"), SAMPLES)
    assert failed(report) == {"minimum cosine", "maximum score difference", OTHERS}
    assert gate(report, "minimum cosine").value == pytest.approx(0.98, abs=1e-6)
    assert gate(report, "minimum cosine").limit == 0.99999
    figures = report.comparisons[0].figures
    assert figures["mean cosine"] == pytest.approx(1 - 0.02 / 20, abs=1e-6)
    assert report.worst[0].name == "text 7 (document)"
    assert report.worst[0].value == pytest.approx(0.98, abs=1e-6)
    limits = {"min_cosine": 0.97, "max_score_difference": 0.5}
    # Its graph still gives the right vector to other software.
    assert failed(validate(folders("embedding"), SAMPLES, **limits)) == {OTHERS}


def test_a_shifted_score_fails_with_its_difference(folders, spoil):
    spoil(change_results(lambda scores: scores + 0.02, PAIRS[3]))
    report = validate(folders("reranker"), pairs=PAIRS)
    assert failed(report) == {"maximum score difference", ORDER}
    found = gate(report, "maximum score difference")
    assert found.value == pytest.approx(0.02, abs=1e-5)
    assert found.limit == 1e-4
    mean = report.comparisons[0].figures["mean score difference"]
    assert mean == pytest.approx(0.02 / 6, abs=1e-5)
    assert report.worst[0].name == "pair 3"
    assert validate(folders("reranker"), pairs=PAIRS, max_score_difference=0.03).passed


def test_a_reversed_ranking_shows(folders, spoil):
    spoil(change_results(lambda scores: 1 - scores))
    report = validate(folders("reranker"), pairs=PAIRS, max_score_difference=1e-5)
    assert report.comparisons[0].figures["Kendall tau"] == -1
    assert report.comparisons[0].figures["top-3 overlap"] == 0
    found = gate(report, ORDER)
    assert found.failed
    assert f"of {found.value} pairs with scores more than 1e-05 apart" in found.title
    assert found.detail.startswith("pair ")


def order_gate(found, expected, queries):
    pairs = [Pair(query, "a document") for query in queries]
    gates = RerankerTask(pairs)._order_gate(
        np.array(found, np.float32), np.array(expected, np.float32), 0.05
    )
    return gates.value, gates.passed, gates.basis


@pytest.mark.parametrize(
    ("found", "expected", "queries", "swapped"),
    [
        ([0.9, 0.5, 0.1], [0.8, 0.6, 0.2], "aaa", 0),
        ([0.5, 0.9, 0.1], [0.8, 0.6, 0.2], "aaa", 1),
        ([0.1, 0.5, 0.9], [0.8, 0.6, 0.2], "aaa", 3),
        # Within the margin there is no order; on the artifact's side there is none to be.
        ([0.1, 0.2, 0.0], [0.62, 0.6, 0.2], "aaa", 0),
        ([0.5, 0.5, 0.1], [0.8, 0.6, 0.2], "aaa", 1),
        # Documents of different queries are not compared, nor are those without a number.
        ([0.1, 0.9, 0.2, 0.95], [0.9, 0.1, 0.8, 0.2], "abcb", 0),
        ([0.5, 0.9, np.nan], [0.8, 0.6, 0.2], "aaa", 1),
        ([0.9, 0.5, 0.1], [np.nan, 0.6, 0.2], "aaa", 0),
    ],
)
def test_documents_out_of_order(found, expected, queries, swapped):
    value, passed, basis = order_gate(found, expected, queries)
    assert (value, passed) == (swapped, swapped == 0)
    assert "with scores more than 0.05 apart" in basis


@pytest.mark.parametrize(
    ("found", "expected", "queries"),
    [
        ([0.9, 0.1], [0.9, 0.1], "ab"),
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], "aaa"),
        ([0.9, 0.5], [0.50, 0.54], "aa"),
        ([0.9], [0.9], "a"),
    ],
)
def test_an_order_that_cannot_be_measured_is_no_success(found, expected, queries):
    value, passed, basis = order_gate(found, expected, queries)
    assert (value, passed) == (None, None)
    assert basis == "no query has two documents with scores more than 0.05 apart"


def test_what_is_not_measured_is_said(folders, tmp_path):
    page = tmp_path / "report.html"
    report = validate(folders("reranker"), pairs=[("a query", "a document")], page=page)
    assert report.passed
    held = len(report.gates) - 1
    assert (
        report.verdict()
        == f"Holds against {report.library}: {held} of {held} gates; not measured: {ORDER}"
    )
    assert repr(report) == f"Report({report.artifact!r}: {report.verdict()})"
    assert f"| {gate(report, ORDER).title} | not measured | ≤ 0 | not measured |" in (
        report.to_markdown()
    )
    assert "| Kendall tau | not measured |" in report.to_markdown()
    words = f"{held} gates hold against {report.library}; 1 could not be measured"
    assert words in page.read_text()
    values = strict_json(report.to_json())
    (found,) = [each for each in values["gates"] if each["name"] == ORDER]
    assert (found["value"], found["passed"]) == (None, None)


def test_the_longest_input_is_said(folders, tmp_path):
    """With the artifact's limit: a reader sees which lengths were never tried."""
    page = tmp_path / "report.html"
    made = folders("embedding")
    report = validate(made, SAMPLES, page=page)
    runtime = embedport.load_embedder(made.artifact, device="cpu")
    longest = max(map(len, EmbeddingTask(SAMPLES).artifact_ids(runtime)))
    words = f"{longest} tokens, of 32,768 that it takes"
    assert report.facts()["Longest input"] == words
    assert f"| Longest input | {words} |" in report.to_markdown()
    assert words in page.read_text()
    record = report.to_record()
    assert (record["longest"], record["max_length"]) == (longest, 32768)


def test_lengths_are_the_references():
    """Vectors of a model without Normalize keep their length; normalized ones fail."""
    generator = np.random.default_rng(0)
    expected = (8 * generator.standard_normal((5, 64))).astype(np.float32)
    task = EmbeddingTask(SAMPLES[:5])
    limits = find_thresholds("fp32")
    for found, error in ((expected, 0), (unit(expected).astype(np.float32), 1)):
        comparison = task.compare(found, expected, "reference")
        length, cosine, *_ = task.gates(comparison, found, expected, limits)
        assert length.name == "vectors' length to the reference's"
        assert length.value == pytest.approx(error, abs=0.1)
        assert (length.passed, cosine.passed) == (error == 0, True)
        # Cosines: long vectors are no better.
        assert comparison.figures["maximum score difference"] == pytest.approx(0, abs=1e-6)
    beyond = find_thresholds("fp32", min_cosine=1.1)  # no cosine reaches it
    length, cosine, *_ = task.gates(comparison, expected, expected, beyond)
    assert (length.passed, cosine.passed) == (True, False)


@pytest.mark.parametrize(
    ("task", "value"),
    [
        ("embedding", np.nan),
        ("reranker", np.inf),
        pytest.param("embedding", np.inf, marks=pytest.mark.slow),
        pytest.param("reranker", np.nan, marks=pytest.mark.slow),
    ],
)
def test_one_nan_fails(folders, spoil, task, value, copied):
    """And the figures are of the other texts, and everything written is JSON."""
    made = folders(task)
    folder = copied(made.artifact)
    inputs = SAMPLES if task == "embedding" else PAIRS
    name = "text 4 (document)" if task == "embedding" else "pair 4"
    spoil(change_results(lambda results: results * value, inputs[4]))
    options: dict[str, Any] = {"texts" if task == "embedding" else "pairs": inputs}
    report = embedport.validate(folder, made.checkpoint, device="cpu", **options)
    assert failed(report) == {"results with NaN or infinity"}
    assert gate(report, "results with NaN or infinity").value == 1
    assert gate(report, "results with NaN or infinity").detail == name
    assert report.worst[0].name == name
    assert report.comparisons[0].compared == report.inputs - 1
    figures = report.comparisons[0].figures.values()
    assert all(value is not None and math.isfinite(value) for value in figures)
    assert strict_json(report.to_json())["worst"][0]["value"] is None
    assert strict_json((folder / "embedport.json").read_text())["parity"]["passed"] is False


@pytest.mark.parametrize("task", ["embedding", "reranker"])
def test_nothing_but_nan_fails_every_gate_on_numbers(folders, spoil, task):
    spoil(change_results(lambda results: results * np.nan))
    report = validate(folders(task))
    expected = {"results with NaN or infinity", "batch invariance", OTHERS}
    expected |= (
        {"minimum cosine", "vectors' length to 1"}
        if task == "embedding"
        else {"maximum score difference"}
    )
    assert failed(report) == expected
    assert report.comparisons[0].compared == 0
    strict_json(report.to_json())


@pytest.mark.parametrize("task", ["embedding", "reranker"])
def test_token_ids_are_compared_before_any_number(folders, spoil, task, monkeypatch):
    changed = SAMPLES[5].text if task == "embedding" else PAIRS[5].document

    def spoil_tokenizer(runtime):
        encode = runtime.tokenizer.encode

        def wrong(texts, *args):
            ids = encode(texts, *args).ids
            for i, text in enumerate(texts):
                if changed in text:
                    ids[i] = ids[i].copy()
                    ids[i][3] += 1
            return Encoded(ids, [])

        def never(*args):
            raise AssertionError("a number was computed")

        runtime.tokenizer.encode, runtime.model = wrong, never

    spoil(spoil_tokenizer)
    for kind in (CardReference, LibraryReference):
        monkeypatch.setattr(kind, "load", None)
    options = {"texts": SAMPLES} if task == "embedding" else {"pairs": PAIRS}
    report = validate(folders(task), **options)
    assert failed(report) == {"inputs with other token ids"}
    (only,) = report.gates
    assert only.value == 1
    assert only.detail.startswith("text 5 (document), '" if task == "embedding" else "pair 5, '")
    assert ": token 3 is " in only.detail
    assert report.comparisons == ()
    assert report.invariance == {}
    assert "Does not hold" in report.to_markdown()


def test_a_row_that_is_too_short_differs():
    assert gates._first_difference([1, 2], [1, 2, 3]) == ("token 2 is nothing, in the reference 3")
    assert gates._first_difference([1, 9], [1, 2]) == "token 1 is 9, in the reference 2"


def test_vectors_that_are_not_of_unit_length_fail(folders, spoil):
    spoil(change_results(lambda vectors: vectors * 3))
    report = validate(folders("embedding"), [s for s in SAMPLES if s.prompt == "document"])
    assert failed(report) == {"vectors' length to 1", OTHERS}
    assert gate(report, "vectors' length to 1").value == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize("task", ["embedding", "reranker"])
def test_a_model_that_pools_padding_is_not_invariant(folders, spoil, task):
    """Left padding is not told to the model: alone and in equal batches nothing shows."""

    def forget_left_padding(runtime):
        model = runtime.model

        def forgetful(input_ids, attention_mask):
            mask = np.where(attention_mask[:, -1:] == 1, 1, attention_mask)
            return model(input_ids, mask)

        runtime.model = forgetful

    spoil(forget_left_padding)
    report = validate(folders(task))
    assert failed(report) == {"batch invariance"}
    assert "left padding" in gate(report, "batch invariance").detail
    limit = find_thresholds("fp32").min_invariance
    good = {case for case, value in report.invariance.items() if value in (0, 1) or value > limit}
    if task == "embedding":
        assert len(good) == 8
        assert "ragged batch, left padding" not in good


def test_a_baked_dimension_is_compared_with_the_references_prefix(folders):
    report = validate(folders("embedding", dim=48), SAMPLES)
    assert report.passed
    assert set(report.comparisons[0].dimensions) == {32}


def test_the_mrl_gate():
    """Vectors that are good at full width, bad in their first 256 values."""
    generator = np.random.default_rng(0)
    expected = generator.standard_normal((20, 1024))
    expected[:, :256] *= 0.01
    found = expected.copy()
    found[3, :256] *= -1
    found, expected = unit(found).astype(np.float32), unit(expected).astype(np.float32)
    task = EmbeddingTask(SAMPLES)
    comparison = task.compare(found, expected, "reference")
    limits = find_thresholds("fp16")
    gates = {each.name: each for each in task.gates(comparison, found, expected, limits)}
    assert gates["minimum cosine"].passed
    assert not gates["minimum cosine at 256 dimensions"].passed
    assert gates["minimum cosine at 256 dimensions"].value == pytest.approx(-1, abs=1e-6)
    assert list(comparison.dimensions) == [512, 256, 128, 64, 32]
    assert comparison.dimensions[256]["mean cosine"] == pytest.approx(0.9, abs=1e-6)


@pytest.mark.parametrize(
    ("precision", "spoilt", "first"),
    [
        ("fp16", ("fp16",), "bf16"),
        ("fp32", (), "fp32"),
        pytest.param("fp16", (), "fp16", marks=pytest.mark.slow),
        pytest.param("bf16", (), "fp16", marks=pytest.mark.slow),
    ],
)
def test_which_reference_decides(folders, monkeypatch, precision, spoilt, first):
    """On a GPU: fp16, unless it gives NaN (as Qwen3-8B does) or the artifact is fp32."""
    run = LibraryReference.run
    beside = "fp32" if precision == "fp32" else "bf16"

    def run_in_fp32(self, inputs, arithmetic, *, progress):
        results = run(self, inputs, "fp32").copy()
        if arithmetic in spoilt:
            results[2] = np.nan
        return results

    monkeypatch.setattr(LibraryReference, "arithmetics", lambda self: ("fp16", beside))
    monkeypatch.setattr(LibraryReference, "run", run_in_fp32)
    report = validate(folders("embedding", precision=precision), SAMPLES)
    assert report.passed
    deciding, other = report.comparisons
    assert deciding.reference.startswith(first)
    assert (deciding.reference_nonfinite, other.reference_nonfinite) == (0, len(spoilt))
    assert other.compared == len(SAMPLES) - len(spoilt)
    table = report.to_markdown()
    assert f"| Against | {deciding.reference} | {other.reference} |" in table


def test_a_reference_that_gives_nan_cannot_pass_anything(folders, monkeypatch):
    run = LibraryReference.run

    def spoilt(*args, **options):
        results = run(*args, **options)
        results[2] = np.inf
        return results

    monkeypatch.setattr(LibraryReference, "run", spoilt)
    assert failed(validate(folders("embedding"), SAMPLES)) == {"reference results with NaN"}


def test_figures_are_recorded_and_texts_are_not(folders, copied):
    made = folders("embedding")
    folder = copied(made.artifact)
    report = embedport.validate(folder, made.checkpoint, [SECRET, *QUERIES], device="cpu")
    manifest = Artifact.open(folder).manifest
    assert manifest.parity is not None
    assert manifest.parity == json.loads(json.dumps(report.to_record()))
    assert manifest.parity["comparisons"][0]["figures"]["minimum cosine"] > 0.99999
    card = (folder / "README.md").read_text()
    assert report.to_markdown() in card
    assert "| minimum cosine | 1.0000000 | ≥ 0.9999900 | holds |" in card
    assert "Not validated yet" not in card
    for text in (card, (folder / "embedport.json").read_text()):
        assert "to merge" not in text
        assert "Explain gravity" not in text
    assert SECRET in report.to_json()


def test_the_terminal_shows_verdict_first_and_text_as_it_is(folders, spoil):
    from rich.console import Console

    spoil(change_results(lambda vectors: rotate(vectors, 0.9), Sample(SECRET)))
    report = validate(folders("embedding"), [SECRET, *QUERIES])
    console = Console(width=120)
    with console.capture() as capture:
        console.print(report)
    lines = capture.get().splitlines()
    gates = f"{OTHERS}, minimum cosine, maximum score difference"
    assert lines[0].strip() == f"Does not hold against {report.library}: {gates}"
    assert SECRET in capture.get()


def test_plain_strings_are_documents(folders):
    report = validate(folders("embedding"), ["one text", "another"])
    assert report.passed
    assert {worst.name for worst in report.worst} == {"text 0 (document)", "text 1 (document)"}
    # No queries: nothing to score or rank.
    assert set(report.comparisons[0].figures) == {
        "mean cosine",
        "1st percentile of cosine",
        "minimum cosine",
    }


def test_a_literal_prompt_makes_a_query(folders, tmp_path):
    """And an empty one a document; on the page too."""
    samples = [
        Sample("gravity", query_prompt("Find the law that applies")),
        Sample("gravity", "query"),
        Sample("Masses attract each other.", ""),
        Sample("A leaf."),
        Sample("Snow is cold."),
    ]
    task = EmbeddingTask(samples)
    assert task.is_query.tolist() == [True, True, False, False, False]
    page = tmp_path / "report.html"
    report = validate(folders("embedding"), samples, page=page, max_score_difference=0.01)
    assert report.passed
    assert gate(report, "maximum score difference").limit == 0.01
    assert "6 similarities, each of a query and a document" in page.read_text()


def test_texts_have_the_callers_numbers(folders, monkeypatch, caplog):
    """Whatever the prompts before them are."""
    samples = [Sample(f"text {i}", "query" if i % 2 else "document") for i in range(20)]
    spoilt = [*samples]
    spoilt[16] = Sample("bad \ud800")
    with pytest.raises(InputError, match=r"text 16 is not valid Unicode: .* at character 12"):
        validate(folders("embedding"), spoilt)
    spoilt[16] = Sample("an image", "<|image|>\ud800 ")
    with pytest.raises(InputError, match="text 16 is not valid Unicode"):
        validate(folders("embedding"), spoilt)
    task = EmbeddingTask([*samples[:16], Sample("word " * 99), *samples[17:]])
    embedder = embedport.load(folders("embedding").artifact, device="cpu", max_length=60)
    assert isinstance(embedder, embedport.Embedder)
    task.run(embedder, progress=False)
    assert "1 of 20 texts cut to 60 tokens, the first is text 16" in caplog.text
    monkeypatch.setattr(embedder, "model", lambda ids, mask: np.full((len(ids), 64), np.nan, "f4"))
    task.run(embedder, progress=False)
    assert "20 of 20 texts gave NaN or infinity" in caplog.text


def test_each_text_is_run_under_its_prompt(folders):
    embedder = embedport.load(folders("embedding").artifact, device="cpu")
    assert isinstance(embedder, embedport.Embedder)
    found = EmbeddingTask(SAMPLES).run(embedder, progress=False)
    for sample, vector in zip(SAMPLES, found, strict=True):
        expected = embedder.encode([sample.text], prompt=sample.prompt)[0]
        np.testing.assert_allclose(vector, expected, atol=1e-6)


def test_pairs_may_be_tuples_or_have_an_instruction(folders):
    pairs = [("a query", "a document"), Pair("b", "a document", "Find the statute")]
    report = validate(folders("reranker"), pairs=pairs)
    assert report.passed
    figures = report.comparisons[0].figures
    assert {name for name, value in figures.items() if value is not None} == {
        "mean score difference",
        "maximum score difference",
    }
