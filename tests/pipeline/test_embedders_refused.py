"""Folders of embedders that are refused: what they declare would not be computed."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from embedport.checkpoint.pipeline import Dense
from embedport.checkpoint.pooling import read_dense
from embedport.checkpoint.spec import ModelSpec
from embedport.errors import CheckpointError
from tests.synthetic import edit

from .conftest import LAST, MESSAGES, TANH, UNIT, messages, write_dense, write_json


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "attention"}, "pooling_mode should be one"),
        ("1_Pooling/config.json", {"pooling_mode": [[]]}, "pooling_mode should be one"),
        ("1_Pooling/config.json", {"embedding_dimension": 32}, "embedding_dimension is 32"),
        ("1_Pooling/config.json", {"layers": 2}, "the key 'layers' is not known here"),
        ("2_Dense/config.json", {"activation_function": "my.Swish"}, "activation_function should"),
        ("2_Dense/config.json", {"in_features": 32}, "in_features is 32, and only 64"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "module_input_name"),
        ("3_Normalize/config.json", {"module_input_name": "token_embeddings"}, "module_input"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "model_type is"),
        ("config_sentence_transformers.json", {"similarity_fn_name": "maxsim"}, "similarity_fn"),
        ("config_sentence_transformers.json", {"query_prefix": "q"}, "'query_prefix' is not known"),
        ("sentence_bert_config.json", {"transformer_task": ["x"]}, "transformer_task should be"),
        ("sentence_bert_config.json", {"query_length": 32}, "'query_length' is not known here"),
        ("sentence_bert_config.json", {"query_expansion": {"length": 32}}, "'query_expansion' is"),
        ("sentence_bert_config.json", {"model_args": {"subfolder": "x"}}, "model_args sets subf"),
        (
            "sentence_bert_config.json",
            {"modality_config": {"image": {"method": "forward"}}},
            "image is not supported",
        ),
        ("sentence_bert_config.json", MESSAGES, "has message, and the folder has no chat templ"),
        ("sentence_bert_config.json", {"model_kwargs": [1]}, "model_kwargs should be an object"),
        (
            "sentence_bert_config.json",
            {"transformer_task": "text-generation"},
            "with these modules",
        ),
        ("sentence_bert_config.json", {"modality_config": [1]}, "modality_config should be an obj"),
        ("sentence_bert_config.json", {"modality_config": {"text": 1}}, "text should be an object"),
        ("sentence_bert_config.json", {"modality_config": {}}, "should have text.*found none"),
        (
            "sentence_bert_config.json",
            {"modality_config": {"message": MESSAGES["modality_config"]["message"]}},
            "should have text, without which .* takes no plain texts; found message",
        ),
        (
            "sentence_bert_config.json",
            messages("text-generation") | {"transformer_task": "feature-extraction"},
            "module_output_name is 'causal_logits'",
        ),
        (
            "sentence_bert_config.json",
            {"modality_config": messages("text-generation")["modality_config"]},
            "text should take 'last_hidden_state' of 'forward', found 'logits' of 'forward'",
        ),
        (
            "sentence_bert_config.json",
            messages("feature-extraction", "parts"),
            "the format of message should be one of auto, flat, structured, found 'parts'",
        ),
        ("sentence_bert_config.json", {"processing_kwargs": [1]}, "processing_kwargs should be an"),
        (
            "sentence_bert_config.json",
            {"processing_kwargs": {"text": {"a": 1}}},
            "text is not supp",
        ),
        ("sentence_bert_config.json", {"processing_kwargs": {"chat_template": [1]}}, "an object"),
        (
            "sentence_bert_config.json",
            {"processing_kwargs": {"chat_template": {"max_length": 9}}},
            "max_length of chat_template is not supported",
        ),
        ("sentence_roberta_config.json", {"max_seq_length": 9}, "name it sentence_bert_config"),
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}, "tokenizer_class should"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": "a.B"}}, "auto_map names code"),
        ("checkpoint-9/adapter_config.json", {"r": 8}, "folder holds an adapter: give `adapter`"),
    ],
)
def test_refused(with_modules, file, changes, message):
    dense = {"in_features": 64, "out_features": 64, "bias": True, "activation_function": TANH}
    folder = with_modules(LAST, ("Dense", dense), UNIT)
    (folder / file).parent.mkdir(exist_ok=True)
    edit(folder / file, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        ModelSpec.from_checkpoint(folder)
    assert str(folder / file.split("/")[0]) in str(caught.value)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            ["Transformer", "Normalize", "Pooling"],
            "Transformer of a SentenceTransformer should",
        ),
        (["Transformer"], "should be followed by Pooling, and then Dense"),
        (["Pooling", "Normalize"], "first module should be a Transformer with the path '', found"),
        (["Transformer", "Pooling", "Transformer"], "should be followed by Pooling, and then"),
        (["Router", "Pooling"], "module Router is not supported"),
        (["my_code.Transformer", "Pooling"], "my_code.Transformer is code of the checkpoint's"),
        ([], "names no module"),
        (["Dropout"], "names no module"),
        (
            ["Transformer", f"sentence_transformers.{'b' * 300}.Pooling"],
            "should be a folder beside",
        ),
    ],
)
def test_modules_refused(with_modules, modules, message):
    folder = with_modules(LAST, UNIT)
    write_json(
        folder / "modules.json",
        [
            {
                "idx": i,
                "name": str(i),
                "path": "" if i == 0 else f"{i}_{name}",
                "type": name if "." in name else f"sentence_transformers.models.{name}",
            }
            for i, name in enumerate(modules)
        ],
    )
    with pytest.raises(CheckpointError, match=message):
        ModelSpec.from_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "0_Transformer"}, "found Transformer in '0_Transformer'; move the files"),
        ({"name": "1"}, r"each module should have a unique name, found \['1', '1', '2'\]"),
    ],
)
def test_a_first_module_refused(with_modules, changes, message):
    folder = with_modules(LAST, UNIT)
    entries = json.loads((folder / "modules.json").read_text())
    entries[0] |= changes
    write_json(folder / "modules.json", entries)
    with pytest.raises(CheckpointError, match=message):
        ModelSpec.from_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear.bias": None}, "missing or unknown: linear.bias"),
        ({"other.weight": np.ones(2)}, "missing or unknown: other.weight"),
        ({"linear.weight": np.ones((48, 32))}, r"shape \[32, 48\] in floating .* found F64 of"),
        ({"linear.bias": np.ones(32, np.int32)}, r"shape \[32\] in floating point, found I32"),
        ({"residual.weight": np.full((32, 48), np.inf)}, "residual.weight holds NaN or infinity"),
    ],
)
def test_a_damaged_dense(tmp_path, changes, message):
    config = {"in_features": 48, "out_features": 32, "use_residual": True}
    dense = Dense("2_Dense", 48, 32, bias=True, activation="Tanh", residual=True)
    path = tmp_path / "2_Dense" / "model.safetensors"
    path.parent.mkdir()
    write_dense(path.parent, config)
    assert read_dense(tmp_path, dense).weight.shape == (32, 48)
    tensors = {name: each for name, each in (load_file(path) | changes).items() if each is not None}
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"2_Dense.*{message}"):
        read_dense(tmp_path, dense)


def test_a_pooling_without_modules_json_is_refused(with_modules):
    """text-embeddings-inference reads it, and no other library."""
    folder = with_modules(("Pooling", {"embedding_dimension": 64, "pooling_mode": "mean"}), UNIT)
    (folder / "modules.json").unlink()
    with pytest.raises(CheckpointError, match=r"1_Pooling.* has the pooling mean, but there is no"):
        ModelSpec.from_checkpoint(folder, task="embedding")
    edit(folder / "1_Pooling" / "config.json", pooling_mode="lasttoken")
    assert ModelSpec.from_checkpoint(folder, task="embedding").outputs.last_token
