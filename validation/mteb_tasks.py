"""MTEB's tasks, run by mteb on the artifact and on the reference."""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from ..checkpoint.spec import Task
from ..errors import EmbedportError, InputError, require
from ..runtimes import Embedder, ModelInfo, Reranker
from ..runtimes.info import hash_json, hash_model
from ..texts.samples import Sample
from .measures import finite_rows
from .mteb_scores import Samples, TaskFacts, TaskScore
from .tasks import score_pairs

# Samples to vectors [samples, dim], or pairs to scores [pairs].
Run = Callable[[Any], np.ndarray]
# mteb's names of a retrieval task's main score to those of its results by query.
QUERY_MEASURES = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}
# The same for the pairs of an STS task, and whether only their order counts.
PAIR_MEASURES = {
    "cosine_spearman": ("cosine_scores", True),
    "cosine_pearson": ("cosine_scores", False),
    "spearman": ("similarity_scores", True),
    "pearson": ("similarity_scores", False),
}
# mteb rounds the scores of retrieval tasks to five decimals.
ROUNDING = 1e-4


def mteb_model(model: Embedder | Reranker) -> Any:
    """Give a loaded model mteb's interface, for `mteb.evaluate`.

    An embedding model gets each task's own instruction in Qwen3-Embedding's format, unless its
    folder declares a query prompt of another form: then its own prompts are used. A reranker gets
    the query's instruction, or the task's, or its own. mteb keeps results by name and revision; the
    revision is a hash of the model's files, the prompts, the device and the longest input.

    Args:
        model: From `embedport.load`.

    Returns:
        An object of mteb's EncoderProtocol, or CrossEncoderProtocol for a reranker. It raises
        InputError for a text that gives NaN.

    Raises:
        MissingPackageError: mteb is not installed.

    >>> import mteb  # doctest: +SKIP
    >>> model = mteb_model(embedport.load(embedder))  # doctest: +SKIP
    >>> results = mteb.evaluate(model, mteb.get_task("SciFact"))  # doctest: +SKIP
    """
    info = model.info
    prompts = sorted(info.prompts.items())
    facts = [hash_model(info), prompts, model.device, model.tokenizer.max_length]
    revision = hash_json(facts)[:16]
    if isinstance(model, Embedder):
        return _by_protocol(partial(_embed, model.encode), info, revision)
    return _by_protocol(partial(score_pairs, model.score), info, revision)


def runner(model: Embedder | Reranker, *, progress: bool) -> Run:
    """A function that runs a loaded model and returns NaN where the model gives it."""
    if isinstance(model, Embedder):
        return partial(_embed, partial(model.embed_texts, progress=progress))
    return partial(score_pairs, partial(model.score_pairs, progress=progress))


def _embed(embed: Callable[..., np.ndarray], samples: Sequence[Sample]) -> np.ndarray:
    """Vectors of samples, which share a prompt: float32 [samples, dim]."""
    prompt = samples[0].prompt if samples else None
    return embed([sample.text for sample in samples], prompt=prompt)


def _by_protocol(run: Run, info: ModelInfo, revision: str = "unknown") -> Any:
    """A function that runs a model, behind mteb's protocol for the model's task."""
    require("mteb", "mteb")
    from .mteb_models import TaskCrossEncoder, TaskEncoder, describe

    name = PurePath(info.name).name or info.folder.resolve().name
    if info.task == "embedding":
        meta = describe(name, revision, info.outputs.similarity, embed_dim=info.dim)
        return TaskEncoder(run, info.prompts, meta)
    takes_instructions = info.inputs.form in ("instruct", "messages")
    return TaskCrossEncoder(run, takes_instructions, describe(name, revision))


def open_tasks(tasks: Iterable[Any], task: Task) -> list[Any]:
    """Find MTEB's tasks and load their data, which mteb fetches from the hub.

    Args:
        tasks: Names, or tasks of mteb's classes.
        task: "embedding" or "reranker".

    Returns:
        Tasks of mteb's classes; an aggregate is replaced by its parts.

    Raises:
        InputError: mteb has no task of this name; its data cannot be loaded; or it is no task for
            such a model.
        MissingPackageError: mteb is not installed.
    """
    mteb = require("mteb", "mteb")
    opened: list[Any] = []
    for given in tasks:
        try:
            named = mteb.get_task(given) if isinstance(given, str) else given
        except KeyError as error:  # its message names similar tasks
            message = error.args[0].removeprefix("KeyError: ")
            raise InputError(f"mteb {mteb.__version__} has no such task: {message}") from error
        opened += getattr(named.metadata, "tasks", None) or [named]
    if not opened:
        raise InputError("give at least one of MTEB's tasks, such as STS17")
    for mteb_task in opened:
        if set(mteb_task.metadata.modalities) != {"text"}:
            raise InputError(f"{mteb_task.metadata.name} has inputs other than text")
        _load(mteb_task)
        if task == "reranker":
            _check_candidates(mteb_task)
    return opened


def _load(task: Any) -> None:
    dataset = task.metadata.dataset
    try:
        with _quiet():
            task.load_data()
    except Exception as error:  # the hub and its libraries raise their own classes
        message = " ".join(str(error).split())
        raise InputError(
            f"the data of MTEB's {task.metadata.name} ({dataset.get('path')} at "
            f"{dataset.get('revision')}) cannot be loaded; it comes from the hub, or from the "
            "cache (HF_HOME) of a machine that has loaded it: "
            f"{type(error).__name__}: {message}"
        ) from error


def _check_candidates(task: Any) -> None:
    """Refuse a task that has no candidates for a reranker."""
    from mteb.abstasks import AbsTaskRetrieval

    if isinstance(task, AbsTaskRetrieval):
        task.convert_v1_dataset_format_to_v2(num_proc=None)
        splits = [split for subset in task.dataset.values() for split in subset.values()]
        if all(split["top_ranked"] is not None for split in splits):
            return
    raise InputError(
        f"{task.metadata.name} has no candidates for a reranker to order: give a reranking task"
    )


def task_facts(task: Any) -> TaskFacts:
    """A task's name, measure and data."""
    metadata = task.metadata
    return TaskFacts(
        task=metadata.name,
        type=metadata.type,
        measure=metadata.main_score,
        dataset=metadata.dataset["path"],
        revision=metadata.dataset["revision"],
    )


def run_tasks(tasks: Sequence[Any], run: Run, info: ModelInfo) -> list[TaskScore]:
    """Run tasks on the artifact, or on its reference with the same prompts.

    Args:
        tasks: From `open_tasks`.
        run: Runs the model; NaN and infinity count as 0, since mteb ends at the first.
        info: The artifact, or the checkpoint.

    Returns:
        Each task's result.

    Raises:
        InputError: mteb, or the model, fails on a task.
    """
    return [_run_task(task, run, info) for task in tasks]


@dataclass
class _Counting:
    """Runs a model and counts the results with NaN or infinity.

    Attributes:
        run: Runs the model.
        nonfinite: Number of such results so far.
    """

    run: Run
    nonfinite: int = field(default=0, init=False)

    def __call__(self, inputs: Any) -> np.ndarray:
        results = self.run(inputs)
        self.nonfinite += int((~finite_rows(results)).sum())
        return np.nan_to_num(results, posinf=0, neginf=0)


def _run_task(task: Any, run: Run, info: ModelInfo) -> TaskScore:
    mteb = require("mteb", "mteb")
    counting = _Counting(run)
    with tempfile.TemporaryDirectory() as folder, _quiet(), _keep_queries(task) as queries:
        try:
            results = mteb.evaluate(
                _by_protocol(counting, info),
                task,
                cache=None,
                co2_tracker=False,
                overwrite_strategy="always",
                prediction_folder=folder,
                show_progress_bar=False,
            )
        except EmbedportError:
            raise
        except Exception as error:  # a task may fail in its own way
            message = " ".join(str(error).split())
            raise InputError(
                f"MTEB's {task.metadata.name} failed: {type(error).__name__}: {message}"
            ) from error
        path = Path(folder) / task.prediction_file_name
        pairs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    score = float(results.task_results[0].get_score())
    subsets = queries or _pair_results(task, pairs)
    if subsets and abs(np.mean([samples.score for samples in subsets.values()]) - score) > ROUNDING:
        subsets = {}  # the task's score is something else
    return TaskScore(score, subsets, counting.nonfinite)


@contextlib.contextmanager
def _keep_queries(task: Any) -> Generator[dict[tuple[str, str], Samples]]:
    """Keep the main score of each query, which a retrieval task hands to `task_specific_scores`."""
    kept: dict[tuple[str, str], Samples] = {}
    original = getattr(task, "task_specific_scores", None)
    name, _, cut = task.metadata.main_score.partition("_at_")
    key = f"{QUERY_MEASURES.get(name)}_{cut}"
    if original is None:
        yield kept
        return

    def keep(scores: Any, qrels: Any, results: Any, hf_split: str, hf_subset: str) -> Any:
        if all(key in measures for measures in scores.values()):
            values = [scores[query][key] for query in sorted(scores)]
            kept[hf_split, hf_subset] = Samples(np.array(values))
        return original(scores, qrels, results, hf_split=hf_split, hf_subset=hf_subset)

    task.task_specific_scores = keep
    try:
        yield kept
    finally:
        del task.task_specific_scores


def _pair_results(task: Any, predictions: Mapping[str, Any]) -> dict[tuple[str, str], Samples]:
    """The similarities that an STS task predicted, by split and subset, with people's."""
    from mteb.abstasks import AbsTaskSTS

    name, ranked = PAIR_MEASURES.get(task.metadata.main_score, ("", False))
    if not name or not isinstance(task, AbsTaskSTS):
        return {}
    results = {}
    for subset in task.hf_subsets:
        for split, values in predictions[subset].items():
            data = task.dataset.get(subset, task.dataset)
            gold = np.array(data[split]["score"], np.float64)
            results[split, subset] = Samples(np.array(values[name], np.float64), gold, ranked)
    return results


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Hide the progress bars of data sets' library, and what scikit-learn warns of each probe."""
    datasets = require("datasets", "mteb")
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="sklearn")
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()
