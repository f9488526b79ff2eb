"""MTEB's tasks by mteb itself, over local data; its own Qwen3 loaders give the right values.

Importing mteb takes longer than the tests.
"""

import json
import random
import sys
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

import embedport
from embedport.artifact.push import prepare
from embedport.cli import main
from embedport.demo.pipeline import builtin_embedder, builtin_reranker
from embedport.errors import InputError
from embedport.texts.beir import read_beir
from embedport.validation.mteb_tasks import open_tasks

# mteb and what it imports warn of themselves.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
# Of mteb's Qwen3 reranker, for tasks without an instruction.
INSTRUCTION = "Given the user query, retrieval the relevant passages"


@pytest.fixture(scope="module")
def mteb():
    return pytest.importorskip("mteb")


@pytest.fixture(scope="module")
def tasks(mteb):
    """Tasks of mteb's classes over the demo's data: name to class."""
    from datasets import Dataset, DatasetDict
    from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
    from mteb.mocks.mock_tasks import MockClassificationTask, MockSTSTask

    facts = MockSTSTask.metadata.model_dump() | {"dataset": {"path": "own/data", "revision": "1"}}
    data = read_beir("builtin", max_queries=20)

    def describe(**changes):
        return mteb.TaskMetadata(**facts | changes)

    def texts(given):
        return Dataset.from_list([{"id": id_, "text": text} for id_, text in given.items()])

    def split(candidates, **query):
        queries = [{"id": i, "text": text, **query} for i, text in data.queries.items()]
        named = {d for documents in data.candidates.values() for d in documents[:10]}
        named |= {d for documents in data.relevance.values() for d in documents}
        return {
            "queries": Dataset.from_list(queries),
            "corpus": texts({d: data.documents[d] for d in sorted(named)}),
            "relevant_docs": {
                q: {d: int(r) for d, r in row.items()} for q, row in data.relevance.items()
            },
            "top_ranked": {q: sorted({*row[:5], *data.relevance[q]}) for q, row in candidates},
        }

    class OwnRetrieval(AbsTaskRetrieval):
        metadata = describe(
            name="OwnRetrieval",
            type="Retrieval",
            main_score="ndcg_at_10",
            prompt={"query": "Given a definition, retrieve the word"},
        )

        def load_data(self, num_proc=None, *, timer=None, **kwargs):
            self.dataset = {"default": {"test": split([]) | {"top_ranked": None}}}
            self.data_loaded = True

    class OwnReranking(AbsTaskRetrieval):
        metadata = describe(
            name="OwnReranking", type="Reranking", main_score="map_at_1000", prompt=INSTRUCTION
        )

        def load_data(self, num_proc=None, *, timer=None, **kwargs):
            self.dataset = {"default": {"test": split(data.candidates.items())}}
            self.data_loaded = True

    class InstructedReranking(OwnReranking):
        metadata = describe(
            name="InstructedReranking", type="InstructionReranking", main_score="map_at_1000"
        )

        def load_data(self, num_proc=None, *, timer=None, **kwargs):
            made = split(data.candidates.items(), instruction=INSTRUCTION)
            self.dataset = {"default": {"test": made}}
            self.data_loaded = True

    class OwnSTS(AbsTaskSTS):
        metadata = describe(
            name="OwnSTS",
            type="STS",
            main_score="cosine_spearman",
            eval_langs={"first": ["eng-Latn"], "second": ["eng-Latn"]},
        )

        def load_data(self, num_proc=None, *, timer=None, **kwargs):
            draw, documents = random.Random(0), list(data.documents.values())
            self.dataset = {}
            for subset in self.metadata.eval_langs:
                rows = []
                for document in draw.sample(documents, 30):
                    words, kept = document.split(), draw.randrange(1, 6)
                    part = " ".join(words[: max(1, len(words) * kept // 5)])
                    rows.append({"sentence1": document, "sentence2": part, "score": float(kept)})
                self.dataset[subset] = DatasetDict({"test": Dataset.from_list(rows)})
            self.data_loaded = True

    classes = (OwnRetrieval, OwnReranking, InstructedReranking, OwnSTS, MockClassificationTask)
    return {made.metadata.name: made for made in classes}


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact") / "embedder"
    return embedport.export(builtin_embedder(), folder).folder


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact") / "reranker"
    return embedport.export(builtin_reranker(), folder).folder


def evaluate(mteb, model, task, folder):
    """The task's score, and its predictions."""
    options = {"cache": None, "show_progress_bar": False, "prediction_folder": folder}
    (result,) = mteb.evaluate(model, task, **options).task_results
    predictions = json.loads((folder / task.prediction_file_name).read_text())
    del predictions["mteb_model_meta"]
    return result.get_score(), predictions


def numbers(predictions):
    """All similarities and scores in predictions, in the order of their keys."""
    if isinstance(predictions, dict):
        return [n for key in sorted(predictions) for n in numbers(predictions[key])]
    return predictions if isinstance(predictions, list) else [predictions]


@pytest.mark.parametrize("name", ["OwnRetrieval", "OwnSTS"])
def test_an_embedder_gives_what_mtebs_own_loader_gives(mteb, tasks, embedder, tmp_path, name):
    from mteb.models.model_implementations.qwen3_models import q3e_instruct_loader

    theirs: Any = q3e_instruct_loader(
        str(builtin_embedder()), revision="", model_kwargs={"dtype": "float32"}, device="cpu"
    )
    theirs.mteb_model_meta = mteb.get_model_meta("Qwen/Qwen3-Embedding-0.6B")
    ours = embedport.mteb_model(embedport.load(embedder, device="cpu"))
    assert isinstance(ours, mteb.EncoderProtocol)
    expected, right = evaluate(mteb, theirs, tasks[name](), tmp_path / "theirs")
    found, values = evaluate(mteb, ours, tasks[name](), tmp_path / "ours")
    assert found == pytest.approx(expected, abs=1e-4)
    np.testing.assert_allclose(numbers(values), numbers(right), atol=1e-5)


@pytest.mark.parametrize("name", ["OwnReranking", "InstructedReranking"])
def test_a_reranker_gives_what_mtebs_own_wrapper_gives(mteb, tasks, reranker, tmp_path, name):
    from mteb.models.model_implementations.qwen3_reranker import Qwen3RerankerWrapper

    theirs: Any = Qwen3RerankerWrapper(str(builtin_reranker()), device="cpu", dtype="float32")
    theirs.mteb_model_meta = mteb.get_model_meta("Qwen/Qwen3-Reranker-0.6B")
    ours = embedport.mteb_model(embedport.load(reranker, device="cpu"))
    assert isinstance(ours, mteb.CrossEncoderProtocol)
    if name == "InstructedReranking":
        # Their wrapper also puts the instruction behind the query.
        theirs.format_instruction = lambda instruction, query, doc: (
            Qwen3RerankerWrapper.format_instruction(
                instruction, query.removesuffix(f" {instruction}"), doc
            )
        )
    expected, right = evaluate(mteb, theirs, tasks[name](), tmp_path / "theirs")
    found, values = evaluate(mteb, ours, tasks[name](), tmp_path / "ours")
    assert found == expected
    np.testing.assert_allclose(numbers(values), numbers(right), atol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "query", "symmetric"),
    [
        ({}, "Instruct: Given a definition, retrieve the word\nQuery:", None),
        ({"query": "query: ", "document": "passage: "}, "query: ", ""),
        ({"query": "", "document": ""}, "", ""),
        ({"STS": "similar: ", "query": "Instruct: x\nQuery:"}, None, "similar: "),
        ({"OwnRetrieval-query": "own: ", "query": "Instruct: x\nQuery:"}, "own: ", None),
    ],
)
def test_prompts_of_other_models(mteb, tasks, prompts, query, symmetric):
    from embedport.validation.mteb_models import TaskEncoder, describe

    model = TaskEncoder(lambda samples: np.zeros((len(samples), 1)), prompts, describe("a", "b"))
    instructed = "Instruct: {}\nQuery:"
    retrieval, sts = (tasks[name].metadata for name in ("OwnRetrieval", "OwnSTS"))
    default = instructed.format("Given a definition, retrieve the word")
    assert model.find_prompt(retrieval, mteb.types.PromptType.query) == (
        default if query is None else query
    )
    assert model.find_prompt(sts, None) == (
        instructed.format("Retrieve semantically similar text.") if symmetric is None else symmetric
    )
    document = model.find_prompt(retrieval, mteb.types.PromptType.document)
    assert document == prompts.get("document", "")


def test_validate_at_the_command_line(tasks, tmp_path, monkeypatch, capsys):
    registry = import_module("mteb.get_tasks")._TASKS_REGISTRY
    for name in ("OwnRetrieval", "OwnSTS"):
        monkeypatch.setitem(registry, name, tasks[name])
    folder = embedport.export(builtin_embedder(), tmp_path / "int8", precision="int8").folder
    (tmp_path / "texts.txt").write_text("tea\nsnow\n")
    command = ["validate", folder, "--reference", builtin_embedder(), "--device", "cpu"]
    command += ["--input", tmp_path / "texts.txt", "--mteb", "OwnRetrieval, OwnSTS"]
    command += ["--report", tmp_path / "report.html", "--max-ndcg-loss", "0.1"]
    monkeypatch.setattr(sys, "argv", ["embedport", *map(str, command)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    output = capsys.readouterr().out
    assert "cosine_spearman" in output
    assert "95 %" in output
    manifest = json.loads((folder / "embedport.json").read_text())
    retrieval, sts = manifest["parity"]["mteb"]["rows"]
    assert (retrieval["samples"], sts["samples"]) == (20, 60)
    for row in (retrieval, sts):
        assert row["difference"] == pytest.approx(row["artifact"] - row["reference"])
        assert row["low"] <= row["difference"] <= row["high"]
        assert f"{row['reference']:.4f}" in (tmp_path / "report.html").read_text()
        assert row["reference"] > 0.1
    for text in ((folder / "README.md").read_text(), prepare(folder, "a/b").card):
        data: Any = ModelCard(text).data
        results = {result.metric_type: result for result in data.eval_results}
        assert results["ndcg_at_10"].metric_value == pytest.approx(retrieval["artifact"], abs=1e-6)
        assert results["cosine_spearman_reference"].dataset_name == "MTEB OwnSTS"
        assert "to +0." in results["cosine_spearman_difference"].metric_name


def test_what_is_lost_shows(tasks, embedder, spoil):
    def lose(runtime):
        original = runtime.embed_texts
        runtime.embed_texts = lambda texts, **options: original(
            [text[:8] for text in texts], **options
        )

    spoil(lose)
    report = embedport.validate(
        embedder,
        builtin_embedder(),
        ["tea"],
        mteb=[tasks["OwnRetrieval"]()],
        device="cpu",
        record=False,
    )
    failed = [gate.name for gate in report.gates if gate.failed]
    assert failed == ["OwnRetrieval: ndcg_at_10 loss"]


def test_nan_fails_and_the_report_remains(tasks, embedder, spoil):
    def lose(runtime):
        original = runtime.embed_texts
        runtime.embed_texts = lambda *given, **options: np.where(
            np.arange(runtime.dim) == 0, np.nan, original(*given, **options)
        )

    spoil(lose)
    report = embedport.validate(
        embedder, builtin_embedder(), ["tea"], mteb=[tasks["OwnSTS"]()], device="cpu", record=False
    )
    assert {gate.name: gate.value for gate in report.gates}["MTEB: NaN or infinity"] == 120


def test_a_task_with_one_score_has_no_interval(tasks, embedder, recwarn):
    report = embedport.validate(
        embedder,
        builtin_embedder(),
        ["tea"],
        mteb=[tasks["MockClassificationTask"]()],
        device="cpu",
        record=False,
    )
    assert report.mteb is not None
    (row,) = report.mteb.rows
    assert (row.measure, row.samples, row.low, row.high) == ("accuracy", None, None, None)
    assert "none: one score" in report.to_markdown()
    assert not [each for each in recwarn if "sklearn" in each.filename]


def test_a_reranker_validates(tasks, reranker):
    report = embedport.validate(
        reranker,
        builtin_reranker(),
        pairs=[("tea", "a hot drink")],
        mteb=[tasks["OwnReranking"]()],
        device="cpu",
        record=False,
    )
    assert report.passed
    assert report.mteb is not None
    (row,) = report.mteb.rows
    assert (row.samples, row.difference, row.low, row.high) == (20, 0, 0, 0)


def test_what_cannot_be_run_is_refused(tasks):
    with pytest.raises(InputError, match=r"no such task: .*Did you mean: 'SciFact'"):
        open_tasks(["SciFakt"], "embedding")
    with pytest.raises(InputError, match="OwnRetrieval has no candidates"):
        open_tasks([tasks["OwnRetrieval"]()], "reranker")
    with pytest.raises(InputError, match="OwnSTS has no candidates"):
        open_tasks([tasks["OwnSTS"]()], "reranker")
    with pytest.raises(InputError, match="at least one"):
        open_tasks([], "embedding")
    # The tests run offline.
    with pytest.raises(InputError, match=r"data of MTEB's NFCorpus \(mteb/nfcorpus at .*HF_HOME"):
        open_tasks(["NFCorpus"], "embedding")


def test_the_name_under_which_mteb_keeps_results(mteb, embedder, copied):
    models = [
        embedport.mteb_model(embedport.load(folder, device="cpu", max_length=length))
        for folder, length in ((embedder, None), (copied(embedder), None), (embedder, 64))
    ]
    metas = [model.mteb_model_meta for model in models]
    assert metas[0].name == "embedport/embedder"
    revisions = [meta.revision for meta in metas]
    assert revisions[0] == revisions[1] != revisions[2]
