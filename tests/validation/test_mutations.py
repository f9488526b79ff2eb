"""validate() must notice an artifact whose checkpoint was misread.

The artifact is made from a folder without a declaration, as a reader that ignores it would, or its
reader is broken by hand; the reference is the folder with the declaration, in its own library. A
declaration that is refused by name needs no notice.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import ByteLevel, TemplateProcessing

import embedport
from embedport.errors import CheckpointError
from embedport.exporters.classifier import pair_template
from embedport.texts.prompts import Encoded
from embedport.texts.samples import Pair, Sample

SAMPLES = [
    *(Sample(text, "query") for text in ("What is TEA?", "a boat with sails")),
    *(Sample(text) for text in ("A leaf from China.", "Ships that sail", "Snow is cold.")),
    Sample("Under the default prompt", None),
]
PAIRS = [Pair("What is tea?", text) for text in ("A leaf.", "Snow is cold.", "A hot drink.")]
TOKENS, COSINE, SCORE = "inputs with other token ids", "minimum cosine", "maximum score difference"
LENGTH = "vectors' length to the reference's"


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file; it is empty where there is none."""
    values = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(change(values)))


def set_keys(name: str, **keys: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / name, lambda values: values | keys)


def end_with(token: str | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = str(folder / "tokenizer.json")
        tokenizer = Tokenizer.from_file(path)
        tokenizer.post_processor = ByteLevel(trim_offsets=False)
        if token is not None:
            tokenizer.post_processor = TemplateProcessing(
                single=f"$A {token}", special_tokens=[(token, tokenizer.token_to_id(token))]
            )
        tokenizer.save(path)

    return change


def drop_normalize(folder: Path) -> None:
    edit(folder / "modules.json", lambda modules: modules[:2])


def pool_by(mode: str) -> Callable[[Path], None]:
    def change(values: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in values.items() if not key.startswith("pooling_mode")}
        return kept | {"pooling_mode": mode}

    return lambda folder: edit(folder / "1_Pooling" / "config.json", change)


def render_messages(folder: Path) -> None:
    how = {"method": "forward", "method_output_name": "last_hidden_state"}
    modes = {"text": how, "message": {**how, "format": "flat"}}
    set_keys(
        "sentence_bert_config.json",
        transformer_task="feature-extraction",
        modality_config=modes,
        module_output_name="token_embeddings",
    )(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    )


def make_cross_encoder(*answers: str, prompt: str | None = None) -> Callable[[Path], None]:
    """A CrossEncoder with LogitScore, its answers (yes and perhaps no) being these tokens."""

    def change(folder: Path) -> None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ids = [*map(tokenizer.token_to_id, answers), None][:2]
        (folder / "chat_template.jinja").write_text(pair_template())
        base = "sentence_transformers"
        modules = (
            ("", f"{base}.base.modules.transformer.Transformer"),
            ("1_LogitScore", f"{base}.cross_encoder.modules.logit_score.LogitScore"),
        )
        edit(
            folder / "modules.json",
            lambda _: [
                {"idx": i, "name": str(i), "path": path, "type": kind}
                for i, (path, kind) in enumerate(modules)
            ],
        )
        how = {"method": "forward", "method_output_name": "logits"}
        set_keys(
            "sentence_bert_config.json",
            transformer_task="text-generation",
            modality_config={"text": how, "message": {**how, "format": "flat"}},
            module_output_name="causal_logits",
        )(folder)
        names = ("true_token_id", "false_token_id")
        set_keys("1_LogitScore/config.json", **dict(zip(names, ids, strict=True)))(folder)
        prompts = {} if prompt is None else {"own": prompt}
        set_keys(
            "config_sentence_transformers.json",
            prompts=prompts,
            default_prompt_name=next(iter(prompts), None),
            activation_fn="torch.nn.modules.activation.Sigmoid",
        )(folder)

    return change


def classify(folder: Path) -> None:
    """A classifier of one label, without a template."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("lm_head.weight", None)
    tensors["score.weight"] = tensors["model.embed_tokens.weight"][5:6]
    save_file(tensors, file, metadata={"format": "pt"})
    labels = {"id2label": {"0": "yes"}, "label2id": {"yes": 0}}
    set_keys(
        "config.json",
        architectures=["Qwen3ForSequenceClassification"],
        pad_token_id=0,
        **labels,
    )(folder)


def own_head(folder: Path) -> None:
    """A head of its own beside `tie_word_embeddings`, which transformers keeps."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def single_file(folder: Path) -> None:
    """Other weights in a single file, which transformers reads; the former ones in a shard."""
    file, shard = folder / "model.safetensors", folder / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    file.rename(shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    others = {name: tensor[..., ::-1].copy() for name, tensor in tensors.items()}
    save_file(others, file, metadata={"format": "pt"})


@dataclass(frozen=True)
class Misreading:
    """A declaration that a reader may miss.

    Attributes:
        name: Of the test.
        task: The model's.
        declare: Writes it into a folder.
        gates: Those that fail.
        geometry: Of the checkpoint.
    """

    name: str
    task: str
    declare: Callable[[Path], None]
    gates: set[str]
    geometry: str = "kv2"


SETTINGS = "config_sentence_transformers.json"
MISREADINGS = [
    Misreading("nothing appended", "embedding", end_with(None), {TOKENS}),
    Misreading("another token appended", "embedding", end_with("<|im_end|>"), {TOKENS}),
    Misreading("no prompts", "embedding", set_keys(SETTINGS, prompts={}), {TOKENS}),
    Misreading("own prompt", "embedding", set_keys(SETTINGS, prompts={"query": "q: "}), {TOKENS}),
    Misreading(
        "documents' prompt", "embedding", set_keys(SETTINGS, prompts={"document": "d: "}), {TOKENS}
    ),
    Misreading(
        "default prompt",
        "embedding",
        set_keys(SETTINGS, default_prompt_name="query"),
        {TOKENS},
    ),
    Misreading("single file", "embedding", single_file, {COSINE}),
    Misreading(
        "lower case",
        "embedding",
        set_keys("sentence_bert_config.json", do_lower_case=True),
        {TOKENS},
    ),
    Misreading("messages", "embedding", render_messages, {TOKENS}),
    Misreading("no Normalize", "embedding", drop_normalize, {LENGTH}),
    Misreading("both directions", "embedding", set_keys("config.json", is_causal=False), {COSINE}),
    Misreading("mean pooling", "embedding", pool_by("mean"), {COSINE}),
    Misreading("cls pooling", "embedding", pool_by("cls"), {COSINE}),
    Misreading("max pooling", "embedding", pool_by("max"), {COSINE}),
    Misreading("other answers", "reranker", make_cross_encoder("a", "b"), {SCORE}),
    Misreading("answers exchanged", "reranker", make_cross_encoder("no", "yes"), {SCORE}),
    Misreading("one answer", "reranker", make_cross_encoder("yes"), {SCORE}),
    Misreading(
        "own instruction",
        "reranker",
        make_cross_encoder("yes", "no", prompt="Find the statute"),
        {TOKENS},
    ),
    Misreading("classifier without template", "reranker", classify, {TOKENS}),
    Misreading("head of its own", "reranker", own_head, {SCORE}, geometry="kv1"),
]


def failed(report):
    return {gate.name for gate in report.gates if gate.failed}


def validate(folder, checkpoint, task):
    inputs: dict[str, Any] = {"texts": SAMPLES} if task == "embedding" else {"pairs": PAIRS}
    return embedport.validate(folder, checkpoint, device="cpu", record=False, **inputs)


@pytest.fixture(scope="module")
def misread(tmp_path_factory, checkpoints):
    """A function (Misreading) -> an artifact that knows nothing of the declaration, cached."""
    made = {}

    def make(row):
        key = (row.task, row.geometry)
        if key not in made:
            folder = tmp_path_factory.mktemp("misread") / "artifact"
            embedport.export(checkpoints(row.geometry, row.task), folder)
            made[key] = folder
        return made[key]

    return make


@pytest.mark.parametrize("row", MISREADINGS, ids=lambda row: row.name)
def test_a_misread_declaration_is_noticed(row, misread, checkpoints, tmp_path):
    folder = Path(shutil.copytree(checkpoints(row.geometry, row.task), tmp_path / "declared"))
    row.declare(folder)
    refusal = None
    try:
        report = validate(misread(row), folder, row.task)
    except CheckpointError as error:
        refusal = str(error)
    if refusal is None:
        assert failed(report) >= row.gates
    else:  # by our reader, not for being broken in its own library's eyes
        assert "sentence-transformers cannot" not in refusal


def append_token(runtime):
    """A token behind each input."""
    encode = runtime.tokenizer.encode

    def changed(*args):
        encoded = encode(*args)
        return Encoded([np.append(ids, 1) for ids in encoded.ids], encoded.truncated)

    runtime.tokenizer.encode = changed


def drop_last_token(runtime):
    """No token behind a text."""
    encode = runtime.tokenizer.encode

    def changed(*args):
        encoded = encode(*args)
        return Encoded([ids[:-1] for ids in encoded.ids], encoded.truncated)

    runtime.tokenizer.encode = changed


def drop_prompts(runtime):
    runtime.prompt_text = lambda prompt: ""


def change_results(change):
    def apply(runtime):
        model = runtime.model
        runtime.model = lambda ids, mask: change(model(ids, mask))

    return apply


BROKEN = [
    ("appends a token", "embedding", append_token, {TOKENS}),
    ("drops the last token", "embedding", drop_last_token, {TOKENS}),
    ("drops prompts", "embedding", drop_prompts, {TOKENS}),
    (
        "does not normalize",
        "embedding",
        change_results(lambda vectors: 8 * vectors),
        {"vectors' length to 1", SCORE},
    ),
    ("drops a value", "embedding", change_results(lambda v: v * (np.arange(64) > 0)), {COSINE}),
    ("appends a token", "reranker", append_token, {TOKENS}),
    ("exchanges the answers", "reranker", change_results(lambda scores: 1 - scores), {SCORE}),
    (
        "gives log-odds",
        "reranker",
        change_results(lambda scores: np.log(scores / (1 - scores))),
        {SCORE},
    ),
]


# Of two that the same gate notices, one is slow.
SLOW = ("embedding drops the last token", "reranker appends a token", "reranker gives log-odds")


@pytest.mark.parametrize(
    ("task", "change", "gates"),
    [
        pytest.param(
            task,
            *expected,
            id=f"{task} {name}",
            marks=[pytest.mark.slow] if f"{task} {name}" in SLOW else [],
        )
        for name, task, *expected in BROKEN
    ],
)
def test_a_broken_reader_is_noticed(folders, spoil, task, change, gates):
    made = folders(task)
    assert not failed(validate(made.artifact, made.checkpoint, task))
    spoil(change)
    assert failed(validate(made.artifact, made.checkpoint, task)) >= gates
