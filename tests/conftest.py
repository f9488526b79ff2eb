"""Checkpoints in the hub's layout: small, seeded, of several geometries, made once a session."""

import ctypes
import gc
import json
import lzma
import os
import shutil
import sys
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest

# What takes seconds to import is imported where it is used: xdist's own process runs no test.

ROOT = Path(__file__).parent.parent
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    # Dozens of processes start, and each would compile torch and transformers again.
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(ROOT / ".pytest_cache" / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "true"
# The models are tiny: a second thread waits for the first most of its time, and is busy at it.
os.environ["OMP_NUM_THREADS"] = "1"
DATA = Path(__file__).parent / "data"


def pytest_configure(config):
    """Prepare torch where tests run; xdist's own process runs none, and need not import it."""
    starts_workers = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if starts_workers or find_spec("torch") is None:
        return
    if getattr(config, "workerinput", {}).get("workerid") == "gw1":
        # Where no bytecode is yet, workers would compile the same modules at the same time. So the
        # second begins with half of them, which the first comes to last.
        for name in ("sympy", "sklearn.metrics", "pandas"):
            with suppress(ImportError):
                import_module(name)
    torch = import_module("torch")
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        # Triton's kernels run in its interpreter, which it must know before it is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("bitsandbytes") is not None:
        # Otherwise sentence-transformers imports it, and with it torch's compiler, for seconds.
        from embedport.bitsandbytes_ import importing_bitsandbytes

        with importing_bitsandbytes():
            import_module("bitsandbytes")


def pytest_collection_finish():
    """Keep the garbage collector off what stays: of torch and others that is a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def memory():
    """Give freed memory back after a module: glibc keeps hundreds of MB of it in its arenas."""
    yield
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="module", autouse=True)
def witnesses(request):
    """Exports keep a witness in modules that say WITNESSES: it is half the time of a small one."""
    if getattr(request.module, "WITNESSES", False):
        yield
    else:
        with mock.patch("embedport.exporters.onnx.export.make_witness"):
            yield


@pytest.fixture(scope="module", autouse=True)
def verified(request):
    """Exports open and run what they wrote in these folders: it is half of a small one.

    Elsewhere tests run it themselves, or are about something else. `make test-all` verifies all.
    """
    verifying = ("artifact", "cpus", "exporters", "gpu", "tensorrt", "tests", "vectors")
    runs_slow = request.config.option.markexpr != "not slow"
    if runs_slow or request.path.parent.name in verifying:
        yield
        return
    export = "embedport.exporters.onnx.export"
    with (
        mock.patch(f"{export}.verify_graph"),
        mock.patch(f"{export}.verify_continuation"),
        mock.patch(f"{export}.verify_shared"),
    ):
        yield


@pytest.fixture(scope="module", autouse=True)
def probes(request):
    """validate probes the tokenizer in modules that say PROBES: it is a third of a small one."""
    if getattr(request.module, "PROBES", False):
        yield
    else:
        from embedport.validation.report import Gate

        same = Gate("inputs with other token ids", 0, "≤", 0)
        with (
            mock.patch("embedport.validation.parity.probe_tokens", return_value=same),
            mock.patch("embedport.validation.recorder.record_probes", return_value=None),
        ):
            yield


@pytest.fixture(scope="module", autouse=True)
def short_inputs(request):
    """validate takes the short ones of its inputs in modules that do not say LONG.

    Six long texts and five long pairs are most of their tokens, and of a reference's time.
    """
    if getattr(request.module, "LONG", False):
        yield
        return
    from embedport.texts.samples import builtin_pairs, builtin_samples

    texts = [sample for sample in builtin_samples() if len(sample.text) < 200]
    pairs = [pair for pair in builtin_pairs() if len(pair.document) < 200]
    with (
        mock.patch("embedport.validation.tasks.builtin_samples", return_value=texts),
        mock.patch("embedport.validation.tasks.builtin_pairs", return_value=pairs),
    ):
        yield


@pytest.fixture(scope="session", autouse=True)
def few_texts():
    """Exports calibrate on the first built-in texts: all of them take a small model seconds."""
    from embedport.exporters.calibration.builtin import calibration_pairs, calibration_samples
    from embedport.exporters.texts import FEW

    texts, pairs = calibration_samples()[:FEW], calibration_pairs()[:FEW]
    with (
        mock.patch("embedport.exporters.texts.calibration_samples", return_value=texts),
        mock.patch("embedport.exporters.texts.calibration_pairs", return_value=pairs),
    ):
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Remembered hashes stay out of the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def small_tokenizer():
    from embedport.texts.samples import builtin_samples
    from tests.synthetic import train_tokenizer

    return train_tokenizer([sample.text for sample in builtin_samples()], 1024)


@pytest.fixture(scope="session")
def real_tokenizer():
    """Qwen3's own tokenizer."""
    from tokenizers import Tokenizer

    packed = (DATA / "qwen3-tokenizer" / "tokenizer.json.xz").read_bytes()
    return Tokenizer.from_str(lzma.decompress(packed).decode("utf-8"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, small_tokenizer):
    """A function (geometry's name, task, **options of write_checkpoint) -> folder, cached."""
    from tests.synthetic import GEOMETRIES, write_checkpoint

    made = {}

    def make(geometry="kv2", task="embedding", **options):
        key = (geometry, task, json.dumps(options))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{task}-{geometry}") / "checkpoint"
            made[key] = write_checkpoint(
                folder, GEOMETRIES[geometry], task, small_tokenizer, **options
            )
        return made[key]

    return make


@pytest.fixture(scope="session")
def exports():
    """The artifacts of `exported`."""
    return {}


@pytest.fixture(scope="module")
def exported(request, exports, tmp_path_factory, checkpoints):
    """A function (geometry, task, **options of export) -> artifact, cached; tests change copies.

    int4 is rounded to nearest: calibration has tests of its own.
    """
    import embedport

    # Other modules' have none.
    witness = getattr(request.module, "WITNESSES", False)

    def make(geometry="kv2", task="embedding", **options):
        if options.get("precision") == "int4":
            options["fast"] = True
        key = (geometry, task, witness, json.dumps(options, sort_keys=True))
        if key not in exports:
            output = tmp_path_factory.mktemp(f"{task}-{geometry}") / "artifact"
            exports[key] = embedport.export(checkpoints(geometry, task), output, **options)
        return exports[key]

    return make


@pytest.fixture(scope="module")
def folders(exported, tmp_path_factory):
    """The folder of two artifacts, "embedding" and "reranker", which a module may change."""
    base = tmp_path_factory.mktemp("folders")
    for task in ("embedding", "reranker"):
        shutil.copytree(exported(task=task).folder, base / task)
    return base


@pytest.fixture(scope="session")
def quantized(tmp_path_factory, checkpoints):
    """A function (method, task, **options of quantize_checkpoint) -> a folder, cached.

    Of "kv8": bitsandbytes on a CPU takes NF4 in rows of whole blocks of 64 only.
    """
    import embedport

    made = {}
    base = tmp_path_factory.mktemp("calibration")
    (base / "texts.txt").write_text("a text about tea\nanother one\n")
    (base / "pairs.jsonl").write_text(json.dumps({"query": "tea", "document": "a leaf"}) + "\n")

    def make(method, task="embedding", **options):
        key = (method, task, json.dumps(options))
        if key not in made:
            if method in ("bnb-nf4", "gptq", "awq", "w8a8") and not options.get("fast"):
                file = "texts.txt" if task == "embedding" else "pairs.jsonl"
                options |= {"calibration": base / file}
                options |= {"group_size": 32} if method in ("gptq", "awq") else {}
            folder = tmp_path_factory.mktemp(f"{task}-{method}") / "artifact"
            embedport.quantize_checkpoint(
                checkpoints("kv8", task), folder, method=method, **options
            )
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def rounded(tmp_path_factory, checkpoints):
    """A function ("gptq" or "awq", task) -> a folder in that format, rounded to nearest, cached."""
    from tests.synthetic import round_to_nearest

    made = {}

    def make(method, task="embedding"):
        if (method, task) not in made:
            folder = tmp_path_factory.mktemp(f"{task}-{method}") / "rounded"
            made[method, task] = round_to_nearest(
                checkpoints("kv8", task), folder, method, task, group_size=32
            )
        return made[method, task]

    return make


@pytest.fixture
def copied(tmp_path):
    """A function (folder, name) that copies a folder, so that a test may change it."""

    def copy(folder, name=None):
        return Path(shutil.copytree(folder, tmp_path / (name or folder.name)))

    return copy


@pytest.fixture
def damageable(checkpoints, copied):
    """A copy of a checkpoint, which a test may damage."""
    return copied(checkpoints())


@pytest.fixture
def small_set(tmp_path):
    """A function that writes a part of the built-in retrieval set and returns its folder.

    It takes one query of `every`, their documents and `others`; twenty candidates each.
    """
    from embedport.texts.beir import read_beir, write_candidates

    def make(every, others):
        whole = read_beir("builtin")
        queries = sorted(whole.queries)[::every]
        answers = [document for query in queries for document in whole.relevance[query]]
        documents = dict.fromkeys([*answers, *sorted(whole.documents)[:others]])
        folder = tmp_path / "retrieval"
        (folder / "qrels").mkdir(parents=True)
        texts = {
            "corpus": {key: whole.documents[key] for key in documents},
            "queries": {key: whole.queries[key] for key in queries},
        }
        for name, rows in texts.items():
            lines = [json.dumps({"_id": key, "text": text}) + "\n" for key, text in rows.items()]
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        qrels = [f"{query}\t{key}\t1" for query in queries for key in whole.relevance[query]]
        (folder / "qrels" / "test.tsv").write_text("\n".join(["header", *qrels]))
        write_candidates(folder / "candidates.tsv", dict.fromkeys(queries, answers[:20]))
        return folder

    return make
