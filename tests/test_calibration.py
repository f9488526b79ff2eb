"""Calibration sets: the built-in one, those built of a corpus, and too small ones."""

import json
import logging
import random
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import embedport
from embedport.calibration import LengthSampler, Limit, build_calibration
from embedport.checkpoint.spec import ModelSpec
from embedport.demo.pipeline import builtin_embedder, builtin_reranker
from embedport.errors import CheckpointError, InputError
from embedport.exporters import texts
from embedport.exporters.calibration import builtin
from embedport.exporters.checkpoints import Options as CheckpointOptions
from embedport.exporters.checkpoints import estimate_checkpoint
from embedport.exporters.configuration import read_configuration
from embedport.exporters.onnx import Options, estimate_onnx
from embedport.exporters.onnx.plan import plan_export
from embedport.exporters.texts import encode_samples
from embedport.texts.beir import read_beir
from embedport.texts.prompts import EmbeddingTokenizer
from embedport.texts.samples import (
    Sample,
    builtin_pairs,
    builtin_samples,
    read_pairs,
    read_samples,
)


def normal(text):
    return " ".join(text.casefold().split())


TEXTS = [sample.text for sample in builtin.calibration_samples()]
PAIRS = builtin.calibration_pairs()


class TestBuiltin:
    def test_size(self, real_tokenizer):
        assert len(TEXTS) == 512
        assert len(PAIRS) == 256
        queries = [each for each in builtin.calibration_samples() if each.prompt == "query"]
        assert len(queries) > 150
        tokens = sum(len(each.ids) for each in real_tokenizer.encode_batch(TEXTS))
        assert 25_000 < tokens < 40_000

    def test_each_once(self):
        assert len(set(map(normal, TEXTS))) == len(TEXTS)
        assert len({(normal(pair.query), normal(pair.document)) for pair in PAIRS}) == 256

    def test_nothing_that_judges_calibrates(self):
        """Gates would pass on the texts that a rounding was fitted to."""
        judging = {each.text for each in builtin_samples()}
        judging |= {text for pair in builtin_pairs() for text in (pair.query, pair.document)}
        data = read_beir("builtin")
        judging |= {*data.queries.values(), *data.documents.values()}
        calibrating = {*TEXTS}
        calibrating |= {text for pair in PAIRS for text in (pair.query, pair.document)}
        assert not set(map(normal, judging)) & set(map(normal, calibrating))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """240 different texts of 1 to 40 words, each twice, a tenth of them queries."""
    draw = random.Random(0)
    rows = []
    for number in range(240):
        text = " ".join([f"w{number}", *(draw.choice("abcdefgh") for _ in range(number % 40))])
        prompt = {"prompt": "query"} if number % 10 == 0 else {}
        rows += [{"text": text, **prompt}, {"text": f" {text.upper()}  ", **prompt}]
    draw.shuffle(rows)
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class TestTexts:
    def test_a_share_of_each_length(self, corpus, tmp_path):
        built = build_calibration(builtin_embedder(), corpus, tmp_path / "a.jsonl", count=100)
        samples = read_samples(built.path)
        assert built.texts == len(samples) == 100
        # As many queries as documents, of the 24 that there are.
        assert built.queries == Counter(each.prompt for each in samples)["query"] == 24

        def words(samples):
            return [len(each.text.split()) for each in samples if each.prompt == "document"]

        assert abs(np.mean(words(samples)) - np.mean(words(read_samples(corpus)))) < 2
        assert min(words(samples)) < 4
        assert len({normal(each.text) for each in samples}) == 100

    def test_tokens_are_those_of_the_export(self, corpus, tmp_path):
        built = build_calibration(builtin_embedder(), corpus, tmp_path / "a.jsonl", tokens=1500)
        spec = read_configuration(builtin_embedder(), None, None)
        tokenizer = EmbeddingTokenizer(
            spec.source.pipeline / "tokenizer.json", spec.max_length, spec.inputs
        )
        rows = encode_samples(tokenizer, spec, read_samples(built.path))
        assert built.tokens == sum(map(len, rows))
        assert 1400 <= built.tokens <= 1500
        options = Options(precision="int4", calibration=built.path)
        estimate = estimate_onnx(builtin_embedder(), tmp_path / "out", options)
        steps = " ".join(estimate.steps)
        assert f"{built.texts} calibration texts of {built.tokens:,} tokens" in steps

    def test_the_order_of_the_corpus_does_not_matter(self, corpus, tmp_path):
        lines = corpus.read_text().splitlines(keepends=True)
        other = tmp_path / "other.jsonl"
        other.write_text("".join(sorted(set(lines))))

        def built(path, name, seed=0):
            out = tmp_path / f"{name}.jsonl"
            build_calibration(builtin_embedder(), path, out, count=50, seed=seed)
            return {normal(each.text) for each in read_samples(out)}

        assert built(corpus, "a") == built(other, "b")
        assert built(corpus, "c", seed=1) != built(corpus, "d")

    def test_parquet(self, corpus, tmp_path):
        rows = [json.loads(line) for line in corpus.read_text().splitlines()]
        table = {name: [row.get(name) for row in rows] for name in ("text", "prompt")}
        pq.write_table(pa.table(table), tmp_path / "corpus.parquet", row_group_size=100)
        files = (corpus, tmp_path / "corpus.parquet")
        found = [
            build_calibration(builtin_embedder(), file, tmp_path / f"{i}.jsonl", count=50)
            for i, file in enumerate(files)
        ]
        assert found[0].path.read_bytes() == found[1].path.read_bytes()

    def test_memory_is_bounded(self):
        """However long the corpus is, each stratum keeps what may fit."""
        sampler = LengthSampler(Limit(tokens=100), 0)
        for number in range(5000):
            sampler.add(Sample(f"text {number}"), 10)
        (stratum,) = sampler._strata.values()
        assert len(stratum.heap) == len(stratum.hashes) == 100 // 9
        # The estimate of a tenth of the square root of 11 is rough.
        assert 2000 < stratum.distinct < 12_000
        assert sum(tokens for _, tokens in sampler.choose()) == 100

    def test_few_texts(self, tmp_path, caplog):
        corpus = tmp_path / "corpus.txt"
        corpus.write_text("a\nb\nA\n\n b \n")
        built = build_calibration(builtin_embedder(), corpus, tmp_path / "a.jsonl", count=9)
        assert built.texts == 2
        assert f"{corpus} gives 2 texts or pairs of the 9 wanted" in caplog.text

    @pytest.mark.parametrize(
        ("line", "options", "message"),
        [
            ('{"text": "a", "prompt": "passage"}', {}, r"no prompt is named 'passage'"),
            ('{"text": 5}', {}, r"corpus\.jsonl:1 should be UTF-8 text"),
            ('{"text": "a", "prompt": 5}', {}, r"corpus\.jsonl:1 should be UTF-8 text"),
            ("", {}, "holds no text"),
            ('{"text": "a long text of words"}', {"tokens": 1}, "fits into 1 tokens"),
            ('{"text": "a"}', {"tokens": 9, "count": 9}, "give one of them"),
            ('{"text": "a"}', {"count": 0}, "`count` should be at least 1, found 0"),
            ('{"text": "a"}', {"embedder": "x"}, "`embedder` is for a reranker's pairs"),
        ],
    )
    def test_refused(self, tmp_path, line, options, message):
        corpus = tmp_path / "corpus.jsonl"
        corpus.write_text(line)
        with pytest.raises(InputError, match=message):
            build_calibration(builtin_embedder(), corpus, tmp_path / "out.jsonl", **options)
        assert not (tmp_path / "out.jsonl").exists()

    def test_of_the_checkpoint_only(self, corpus, embedder, quantized, tmp_path):
        """An artifact is not quantized again, and neither is what has codes."""
        for model, message in (
            (embedder, "it is an artifact; give the checkpoint"),
            (quantized("gptq"), "quantized already, by 'gptq', .* give the original"),
        ):
            with pytest.raises(CheckpointError, match=message):
                build_calibration(model, corpus, tmp_path / "out.jsonl", count=3)
        assert not (tmp_path / "out.jsonl").exists()

    def test_what_exists_is_kept(self, corpus, tmp_path):
        out = tmp_path / "out.jsonl"
        out.write_text("mine")
        with pytest.raises(InputError, match="exists; choose another place"):
            build_calibration(builtin_embedder(), corpus, out)
        with pytest.raises(InputError, match=r"should end with \.jsonl"):
            build_calibration(builtin_embedder(), corpus, tmp_path / "out.txt")
        with pytest.raises(InputError, match="cannot be written: no folder"):
            build_calibration(builtin_embedder(), corpus, tmp_path / "none" / "out.jsonl")
        assert out.read_text() == "mine"
        build_calibration(builtin_embedder(), corpus, out, count=3, force=True)
        assert len(read_samples(out)) == 3


def test_a_cpu_runs_some_of_the_built_in_texts(monkeypatch, caplog):
    """The first ones, whole; `builtin` asks for all."""
    monkeypatch.setattr(texts, "calibration_samples", builtin.calibration_samples)

    def plan(**options):
        spec = ModelSpec.from_checkpoint(builtin_embedder())
        return plan_export(spec, Options(precision="int4", **options))

    some, whole = plan(), plan(calibration="builtin")
    assert sum(map(len, some.rows)) <= texts.CPU_TOKENS < sum(map(len, whole.rows))
    assert len(whole.rows) == len(builtin.calibration_samples())
    for row, expected in zip(some.rows, whole.rows, strict=False):
        np.testing.assert_array_equal(row, expected)
    records = [planned.recipe_record(None)["calibration"] for planned in (some, whole)]
    assert [record["source"] for record in records] == ["built-in", "built-in"]
    assert [record["texts"] for record in records] == [len(some.rows), len(whole.rows)]
    assert len(plan(fast=True).rows) == texts.FEW


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return embedport.export(builtin_embedder(), tmp_path_factory.mktemp("embedder") / "fp32").folder


@pytest.fixture(scope="module")
def definitions(tmp_path_factory):
    """Some of the demo's queries and documents."""
    data = read_beir("builtin", max_queries=30)
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [{"text": text, "prompt": "query"} for text in data.queries.values()]
    rows += [{"text": text} for text in list(data.documents.values())[:200]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class TestPairs:
    def test_mixed_relevance(self, embedder, definitions, tmp_path):
        built = build_calibration(
            builtin_reranker(), definitions, tmp_path / "a.jsonl", count=60, embedder=embedder
        )
        pairs = read_pairs(built.path)
        assert (built.texts, built.queries, len(pairs)) == (60, 20, 60)
        model = embedport.load_embedder(embedder)
        documents = [each.text for each in read_samples(definitions) if each.prompt != "query"]
        vectors = model.encode(documents)
        places = []
        for pair in pairs:
            cosines = vectors @ model.encode([pair.query], prompt="query")[0]
            places.append((cosines > cosines[documents.index(pair.document)] + 1e-6).sum())
        best, middle, other = (np.array(places[band::3]) for band in range(3))
        assert (best == 0).all()
        assert ((middle > 0) & (middle < 20)).all()
        assert (other >= 20).all()
        again = build_calibration(
            builtin_reranker(), definitions, tmp_path / "b.jsonl", count=60, embedder=embedder
        )
        assert again.path.read_bytes() == built.path.read_bytes()

    def test_within_tokens(self, embedder, definitions, tmp_path):
        some: dict[str, Any] = {"embedder": embedder, "force": True}
        built = build_calibration(
            builtin_reranker(), definitions, tmp_path / "a.jsonl", count=7, **some
        )
        assert (built.texts, built.queries) == (7, 3)
        with pytest.raises(InputError, match="holds no pair that fits into 20 tokens"):
            build_calibration(
                builtin_reranker(), definitions, tmp_path / "a.jsonl", tokens=20, **some
            )
        built = build_calibration(
            builtin_reranker(), definitions, tmp_path / "a.jsonl", tokens=3000, **some
        )
        assert 2500 < built.tokens <= 3000
        options = Options(precision="int4", calibration=built.path)
        estimate = estimate_onnx(builtin_reranker(), tmp_path / "out", options)
        steps = " ".join(estimate.steps)
        assert f"{built.texts} calibration pairs of {built.tokens:,} tokens" in steps

    def test_two_documents_are_enough(self, embedder, tmp_path):
        corpus = tmp_path / "corpus.jsonl"
        rows = [{"text": "a hot drink", "prompt": "query"}, {"text": "tea"}, {"text": "a boat"}]
        corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
        built = build_calibration(
            builtin_reranker(), corpus, tmp_path / "a.jsonl", count=2, embedder=embedder
        )
        assert {pair.document for pair in read_pairs(built.path)} == {"tea", "a boat"}

    def test_queries_and_an_embedder_are_needed(self, embedder, tmp_path):
        corpus = tmp_path / "corpus.txt"
        corpus.write_text("a\nb\nc\n")
        with pytest.raises(InputError, match=r"should hold a query and two .* found 0 and 3"):
            build_calibration(
                builtin_reranker(), corpus, tmp_path / "a.jsonl", count=3, embedder=embedder
            )
        with pytest.raises(InputError, match="is a reranker: give `embedder` an embedding model"):
            build_calibration(
                builtin_reranker(),
                corpus,
                tmp_path / "a.jsonl",
                count=3,
                embedder=builtin_reranker(),
            )
        with pytest.raises(InputError, match="is a reranker: `embedder` finds its pairs"):
            build_calibration(builtin_reranker(), corpus, tmp_path / "a.jsonl", count=3)


class TestFewTokens:
    @pytest.fixture
    def texts(self, tmp_path):
        path = tmp_path / "texts.txt"
        path.write_text("a text about tea\n")
        return path

    def warnings(self, caplog):
        return [each.getMessage() for each in caplog.records if "advised" in each.getMessage()]

    def test_named_with_what_is_advised(self, checkpoints, tmp_path, texts, caplog):
        options: dict[str, Any] = {
            "precision": "int4",
            "algorithm": "gptq",
            "calibration": texts,
        }
        with caplog.at_level(logging.WARNING):
            embedport.export(checkpoints("kv8"), tmp_path / "out", **options)
        (message,) = self.warnings(caplog)
        assert "layers.0.self_attn.o_proj" in message or "layers.0.mlp.down_proj" in message
        assert "has 256 inputs: 2,560 tokens are advised, 10 for each" in message
        caplog.clear()
        estimate_onnx(checkpoints("kv8"), tmp_path / "dry", Options(**options))
        assert self.warnings(caplog) == [message]

    def test_not_of_a_set_that_was_built(self, tmp_path, caplog):
        """It ends before the text that would exceed what is advised."""
        (tmp_path / "corpus.txt").write_text("\n".join(map(normal, TEXTS)))
        built = tmp_path / "built.jsonl"
        build_calibration(builtin_embedder(), tmp_path / "corpus.txt", built)
        options = Options(precision="int4", algorithm="gptq", calibration=built)
        estimate_onnx(builtin_embedder(), tmp_path / "out", options)
        assert self.warnings(caplog) == []

    def test_checkpoints(self, checkpoints, tmp_path, texts, caplog):
        options = CheckpointOptions("gptq", group_size=32, calibration=texts)
        estimate_checkpoint(checkpoints("kv8"), tmp_path / "out", options)
        assert len(self.warnings(caplog)) == 1

    @pytest.mark.parametrize(
        "options",
        [
            {"precision": "int4", "algorithm": "awq"},  # means of columns, no Hessian
            {"precision": "int4", "fast": True},
            {"precision": "fp16"},
        ],
    )
    def test_only_where_it_matters(self, checkpoints, tmp_path, texts, caplog, options):
        if "fast" not in options:
            options = options | {"calibration": texts}
        estimate_onnx(checkpoints("kv8"), tmp_path / "out", Options(**options))
        assert self.warnings(caplog) == []

    def test_the_built_in_texts_are_enough_for_the_smallest_model(self, real_tokenizer):
        """Qwen3-Embedding-0.6B: 3,072 inputs."""
        query = "Instruct: Given a web search query, retrieve relevant passages that answer the "
        texts = [
            (f"{query}query\nQuery:" if each.prompt == "query" else "") + each.text
            for each in builtin.calibration_samples()
        ]
        tokens = sum(len(each.ids) + 1 for each in real_tokenizer.encode_batch(texts))
        assert tokens > 10 * 3072
