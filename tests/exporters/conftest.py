"""Artifacts made once a session, and the reference that they are compared with."""

import functools
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import embedport
from embedport.texts.prompts import EmbeddingTokenizer, RerankerTokenizer
from embedport.texts.samples import builtin_pairs, builtin_samples
from tests.foreign import GEOMETRY, MATRIX, set_config
from tests.synthetic import DEFAULT_PROMPTS, write_checkpoint

TEXTS = [sample.text for sample in builtin_samples()] + [""]
PAIRS = [(pair.query, pair.document) for pair in builtin_pairs()]
# Models that stay loaded from test to test.
LOADED = 2


@pytest.fixture(scope="session")
def exported(tmp_path_factory, checkpoints):
    """A function (geometry, task, **options of export) -> an artifact's folder, cached."""
    made = {}

    def make(geometry="kv2", task="embedding", **options):
        if options.get("precision") == "int4" and "algorithm" not in options:
            options["fast"] = True  # calibration has tests of its own
        key = (geometry, task, json.dumps(options))
        if key not in made:
            output = tmp_path_factory.mktemp("artifact") / "model"
            embedport.export(checkpoints(geometry, task), output, **options)
            made[key] = output
        return made[key]

    return make


@pytest.fixture(scope="session")
def artifacts(exported):
    """A function (geometry, task, **options of export) -> loaded artifact on the CPU.

    The last few are kept: a session keeps the memory of its largest batch.
    """
    load = functools.lru_cache(maxsize=LOADED)(lambda folder: embedport.load(folder, device="cpu"))
    return lambda *model, **options: load(exported(*model, **options))


def transformers_embeddings(folder, rows):
    """Each row alone, in fp32: float32 [n, hidden_size], unit length; all tokens' states too."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    vectors, states = [], []
    with torch.no_grad():
        for ids in rows:
            hidden = model(input_ids=torch.from_numpy(ids)[None]).last_hidden_state[0]
            states.append(hidden.numpy())
            vectors.append(torch.nn.functional.normalize(hidden[-1], dim=0).numpy())
    return np.stack(vectors), states


def transformers_scores(folder, rows, yes, no):
    """Each row alone, in fp32: the probability of yes, float64 [n]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = [
            model(input_ids=torch.from_numpy(ids)[None]).logits[0, -1, [no, yes]].double()
            for ids in rows
        ]
    return torch.log_softmax(torch.stack(logits), dim=1)[:, 1].exp().numpy()


@pytest.fixture(scope="session")
def reference(checkpoints, artifacts):
    """A function (geometry, task) -> the reference's vectors of TEXTS, or scores of PAIRS."""
    made = {}

    def make(geometry, task):
        if (geometry, task) not in made:
            folder = checkpoints(geometry, task)
            loaded = artifacts(geometry, task)
            if task == "embedding":
                made[geometry, task] = transformers_embeddings(
                    folder, loaded.tokenizer.encode(TEXTS).ids
                )[0]
            else:
                tokenizer = loaded.tokenizer.tokenizer
                yes, no = tokenizer.token_to_id("yes"), tokenizer.token_to_id("no")
                made[geometry, task] = transformers_scores(
                    folder, loaded.tokenizer.encode(PAIRS).ids, yes, no
                )
        return made[geometry, task]

    return make


@pytest.fixture(scope="session")
def reference_states(checkpoints):
    """A function (geometry, rows) -> the reference's last hidden states, [tokens, hidden] each."""
    return lambda geometry, rows: transformers_embeddings(checkpoints(geometry), rows)[1]


@pytest.fixture(scope="session")
def reference_vectors():
    """A function (checkpoint, rows) -> the reference's vectors, float32 [n, hidden_size]."""
    return lambda folder, rows: transformers_embeddings(folder, rows)[0]


class Short:
    """A few short texts and pairs, for tests that run the models of every method."""

    texts = [text for text in TEXTS if 0 < len(text) < 200][:6]
    pairs = [pair for pair in PAIRS if len(pair[1]) < 200][:6]

    def file(self, task, folder):
        """A calibration file of them."""
        path = folder / "calibration.jsonl"
        if task == "embedding":
            rows = [{"text": text, "prompt": "query"} for text in self.texts]
        else:
            rows = [{"query": query, "document": document} for query, document in self.pairs]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def rows(self, folder, task):
        """Their token ids, the texts as queries."""
        path = folder / "tokenizer.json"
        if task == "embedding":
            return EmbeddingTokenizer(path, 4096).encode(self.texts, DEFAULT_PROMPTS["query"]).ids
        return RerankerTokenizer(path, 4096).encode(self.pairs).ids


@pytest.fixture(scope="session")
def short():
    return Short()


@pytest.fixture(scope="session")
def quantized(checkpoints, short, tmp_path_factory):
    """A function (method, task, geometry, **options) -> the written folder, cached."""
    made = {}

    def make(method, task="embedding", geometry="kv8", **options):
        key = (method, task, geometry, json.dumps(options))
        if key not in made:
            folder = tmp_path_factory.mktemp("quantized")
            if method in ("bnb-nf4", "gptq", "awq", "w8a8") and not options.get("fast"):
                options["calibration"] = short.file(task, folder)
            made[key] = embedport.quantize_checkpoint(
                checkpoints(geometry, task), folder / f"{task}-{method}", method=method, **options
            )
        return made[key].folder

    return make


@pytest.fixture(scope="module")
def plain(tmp_path_factory, small_tokenizer):
    """A checkpoint of one layer, in bf16."""
    folder = tmp_path_factory.mktemp("plain") / "plain"
    return write_checkpoint(folder, GEOMETRY, "embedding", small_tokenizer)


@pytest.fixture
def with_matrix(plain, tmp_path):
    """A function (parts of down_proj, quantization_config) -> the checkpoint with them."""

    def make(parts, config=None):
        folder = shutil.copytree(plain, tmp_path / f"made-{len(list(tmp_path.iterdir()))}")
        tensors = load_file(folder / "model.safetensors")
        del tensors[f"{MATRIX}.weight"]
        tensors |= {f"{MATRIX}.{part}": value for part, value in parts.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if config is not None:
            set_config(folder, config)
        return folder

    return make
