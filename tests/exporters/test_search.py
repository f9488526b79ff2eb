"""Choosing formats: within a size against every choice there is, and in the order of upgrades."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

import embedport
from embedport.checkpoint.spec import ModelSpec
from embedport.errors import InputError
from embedport.exporters.calibration import choice, search
from embedport.exporters.calibration.choice import (
    Level,
    _upgrades,
    choose_within,
    sort_upgrades,
)
from embedport.exporters.calibration.gptq_awq import kept_bytes
from embedport.exporters.onnx import export
from embedport.exporters.onnx.export import _needed_bytes
from embedport.exporters.onnx.plan import Options, plan_export
from embedport.texts.beir import read_beir
from embedport.texts.ranking import NDCG, candidate_pairs, measure, rank_candidates
from tests.synthetic import Geometry, write_checkpoint

GEOMETRY = Geometry(32, 2, 2, 1, 16, 64)


def random_options(generator, matrices=6):
    """Levels with more bytes and less error, one after another."""
    options = {}
    for i in range(matrices):
        sizes = np.cumsum(generator.integers(1, 40, 4)) * 64
        errors = np.sort(generator.random(4))[::-1] * generator.choice([1, 10])
        options[f"m{i}"] = [
            Level(f"f{level}", int(size), float(error))
            for level, (size, error) in enumerate(zip(sizes, errors, strict=True))
        ]
    return options


def total(options, texts, value):
    return sum(
        getattr(level, value)
        for name, levels in options.items()
        for level in levels
        if level.format == texts[name]
    )


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_is_better(seed):
    generator = np.random.default_rng(seed)
    options = random_options(generator)
    smallest = sum(levels[0].bytes for levels in options.values())
    room = int(generator.integers(0, 9000))
    texts = choose_within(options, room)
    assert list(texts) == list(options)
    assert total(options, texts, "bytes") <= smallest + room
    best = min(
        sum(level.error for level in levels)
        for levels in itertools.product(*options.values())
        if sum(level.bytes for level in levels) <= smallest + room
    )
    assert total(options, texts, "error") == pytest.approx(best)


def test_sizes_are_rounded_up_where_there_are_many(monkeypatch):
    """Never beyond the size, and little worse."""
    options = random_options(np.random.default_rng(0))
    smallest, room = sum(levels[0].bytes for levels in options.values()), 6000
    exact = choose_within(options, room)
    monkeypatch.setattr(choice, "MOST_SIZES", 40)
    texts = choose_within(options, room)
    assert total(options, texts, "bytes") <= smallest + room
    assert total(options, exact, "error") <= total(options, texts, "error")
    assert total(options, texts, "error") < total(options, exact, "error") * 1.5


def test_a_large_matrix_takes_the_place_of_many_small_ones():
    """The embedding table: in the order of error per byte the small ones would leave no room."""
    small = {f"m{i}": [Level("4", 10, 1.0), Level("8", 20, 0.4)] for i in range(10)}
    options = small | {"table": [Level("4", 100, 8.0), Level("8", 200, 3.0)]}
    texts = choose_within(options, 100)
    assert texts == dict.fromkeys(small, "8") | {"table": "4"}
    options["table"][1] = Level("8", 200, 1.0)
    assert choose_within(options, 100) == dict.fromkeys(small, "4") | {"table": "8"}


def test_upgrades_remove_ever_less_error_per_byte():
    """A level that its neighbours beat is passed over."""
    levels = [Level("a", 0, 10), Level("b", 10, 9.9), Level("c", 20, 1), Level("d", 60, 0)]
    assert [each.level for each in _upgrades("m", levels)] == ["c", "d"]
    same = [Level("a", 0, 0), Level("b", 10, 0), Level("c", 20, 0)]
    assert [each.level for each in _upgrades("m", same)] == ["b", "c"]
    options = random_options(np.random.default_rng(1))
    upgrades = sort_upgrades(options)
    rates = [upgrade.gain / upgrade.bytes for upgrade in upgrades]
    assert rates == sorted(rates, reverse=True)
    for name in options:
        steps = [upgrade.level for upgrade in upgrades if upgrade.name == name]
        assert steps == sorted(steps)
        assert steps[-1] == "f3"


class Judge(search._Judge):
    """Models keep the target from a number of upgrades on; errors are twice those predicted."""

    def __init__(self, errors, needed):
        self.errors, self.needed, self.trials = errors, needed, {}

    def keeps(self, upgrades):
        count = len(upgrades)
        self.trials[count] = search.Trial({}, 0, 1 - 2 * self.errors[count], None)
        return count >= self.needed


@pytest.mark.parametrize("needed", [0, 1, 2, 77, 199, 200])
def test_the_fewest_upgrades_are_found(needed):
    """By their predicted errors in a few trials, and by their number alone in the end too."""
    errors, upgrades = np.linspace(0.2, 0, 201), [choice.Upgrade("m", "int8", 0, 0)] * 200
    judge = Judge(errors, needed)
    limit = 1 - 2 * errors[needed] - 1e-9
    assert search._fewest(errors, limit, judge, upgrades) == needed
    assert len(judge.trials) <= 4
    judge = Judge(errors, needed)
    assert search._fewest(errors, None, judge, upgrades) == needed


def test_a_target_that_nothing_keeps():
    judge = Judge(np.linspace(0.2, 0, 5), 9)
    with pytest.raises(InputError, match=r"fp32 itself gives a cosine of 1\.0000000 and loses"):
        search._fewest(judge.errors, 0.9, judge, [choice.Upgrade("m", "int8", 0, 0)] * 4)


def test_texts_that_are_all_long():
    """Models' states are held at once: of the shortest text its end is taken."""
    rows = [np.arange(900), np.arange(700), np.arange(3)]
    assert [len(row) for row in search._select_texts(rows, 512)] == [3]
    (row,) = search._select_texts(rows[:2], 100)
    np.testing.assert_array_equal(row, np.arange(600, 700))


def test_a_search_needs_room_for_what_it_calibrates(checkpoints):
    """Finished layers and the texts' states are kept beside the artifact."""
    spec = ModelSpec.from_checkpoint(checkpoints("kv1"))
    plans = [plan_export(spec, Options(precision="auto", fast=fast)) for fast in (True, False)]
    plain, calibrated = map(_needed_bytes, plans)
    assert calibrated - plain == kept_bytes(spec, plans[1].rows)


def test_matrices_narrower_than_their_scales(small_tokenizer, tmp_path):
    """Nothing is smaller than fp32, so nothing but the attention's output is quantized."""
    geometry = Geometry(4, 1, 1, 1, 16, 4)
    checkpoint = write_checkpoint(tmp_path / "m", geometry, "embedding", small_tokenizer)
    artifact = embedport.export(
        checkpoint, tmp_path / "auto", precision="auto", fast=True, max_bytes=20_000
    )
    recipe = artifact.manifest.recipe
    assert recipe is not None
    assert {*recipe["formats"]} <= {"layers.0.self_attn.o_proj"}


@pytest.mark.parametrize("target", [{"max_bytes": 60_000}, {"min_cosine": 0.9}])
def test_matrices_narrower_than_a_group(small_tokenizer, tmp_path, target):
    """For 32 inputs groups of 128 take more bytes than groups of 32, and 8 bits more than fp32."""
    checkpoint = write_checkpoint(tmp_path / "m", GEOMETRY, "embedding", small_tokenizer)
    artifact = embedport.export(
        checkpoint, tmp_path / "auto", precision="auto", fast=True, **target
    )
    recipe = artifact.manifest.recipe
    assert recipe is not None
    formats = recipe["formats"]
    narrow = {text for name, text in formats.items() if "down_proj" not in name}
    assert narrow <= {"int4/32"}
    found = recipe["search"]
    assert found["bytes"] <= target.get("max_bytes", found["bytes"])
    kept = [trial for trial in found["trials"] if trial["min_cosine"] >= found["min_cosine"]]
    assert found["bytes"] == min((trial["bytes"] for trial in kept), default=found["bytes"])


def test_texts_that_judge_do_not_calibrate(small_tokenizer, tmp_path, monkeypatch):
    """A trial would pass on the texts that it was fitted to. The result is fitted to all."""
    monkeypatch.setattr(search, "TRIALS", 1)
    geometry = replace(GEOMETRY, num_layers=1)
    checkpoint = write_checkpoint(tmp_path / "m", geometry, "embedding", small_tokenizer)
    (tmp_path / "texts.txt").write_text("\n".join(f"text {'a' * i}" for i in range(9)))
    judged, calibrated = [], []
    run, apply = search._run_model, export.apply_recipe

    def run_model(design, rows, folder):
        judged.append({tuple(row) for row in rows})
        return run(design, rows, folder)

    def apply_recipe(weights, recipe, formats, rows, *rest):
        calibrated.append({tuple(row) for row in rows})
        return apply(weights, recipe, formats, rows, *rest)

    monkeypatch.setattr(search, "_run_model", run_model)
    monkeypatch.setattr(export, "apply_recipe", apply_recipe)
    artifact = embedport.export(
        checkpoint,
        tmp_path / "auto",
        precision="auto",
        min_cosine=0.5,
        calibration=tmp_path / "texts.txt",
    )
    recipe = artifact.manifest.recipe
    assert recipe is not None
    assert len(calibrated) == len(recipe["search"]["trials"]) + 1 == len(judged)
    assert [len(rows) for rows in calibrated] == [6] * (len(calibrated) - 1) + [9]
    assert all(rows == calibrated[-1] - calibrated[0] for rows in judged)


@pytest.mark.slow
def test_a_reranker_keeps_its_ranking(small_tokenizer, small_set, tmp_path, monkeypatch):
    """The loss that a search records is that of the scores that the two artifacts give."""
    monkeypatch.setattr(search, "TRIALS", 1)
    geometry = replace(GEOMETRY, num_layers=1)
    checkpoint = write_checkpoint(tmp_path / "m", geometry, "reranker", small_tokenizer)
    folder = small_set(every=200, others=20)
    data = read_beir(folder)

    def ndcg(name, **options):
        artifact = embedport.export(checkpoint, tmp_path / name, **options)
        reranker = embedport.load_reranker(artifact.folder, device="cpu")
        scores = reranker.score(candidate_pairs(data))
        ranking = rank_candidates(data.candidates, scores)
        return measure(ranking, data.relevance, (NDCG,))[NDCG].mean(), artifact

    auto = {"precision": "auto", "fast": True, "retrieval": folder, "max_ndcg_loss": 1.0}
    (exact, _), (found, artifact) = ndcg("fp32"), ndcg("auto", **auto)
    recipe = artifact.manifest.recipe
    assert recipe is not None
    (trial,) = recipe["search"]["trials"]
    assert found != exact
    assert trial["ndcg_loss"] == pytest.approx(exact - found, abs=1e-6)
