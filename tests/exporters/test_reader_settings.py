"""Settings that other software reads, in words that all of its versions understand."""

import json

import pytest

import embedport
from embedport.artifact.layout import turn_into_classifier
from embedport.checkpoint.modules import MODULES, SETTINGS
from embedport.checkpoint.spec import ModelSpec
from embedport.errors import InputError
from embedport.exporters.onnx.reader_settings import write_reader_settings
from tests.synthetic import append_end_of_text, edit

# As sentence-transformers 6 and transformers 5 save them.
TODAY = (
    "sentence_transformers.base.modules.transformer.Transformer",
    "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "sentence_transformers.base.modules.normalize.Normalize",
)


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture
def saved(damageable):
    """A checkpoint whose settings only today's libraries understand."""
    entries = read(damageable, "modules.json")
    for entry, kind in zip(entries, TODAY, strict=True):
        entry["type"] = kind
    (damageable / "modules.json").write_text(json.dumps(entries))
    edit(
        damageable / "tokenizer_config.json",
        tokenizer_class="TokenizersBackend",
        pad_token={"content": "<|endoftext|>", "__type": "AddedToken"},
        additional_special_tokens=["<|im_end|>"],
        extra_special_tokens=["<|im_start|>"],
        model_max_length=None,
        padding_side=None,
    )
    edit(
        damageable / "sentence_bert_config.json",
        transformer_task="feature-extraction",
        model_kwargs={"attn_implementation": "sdpa"},
        tokenizer_args={"padding_side": "left"},
    )
    return damageable


@pytest.mark.parametrize(
    ("mode", "side"), [("lasttoken", "left"), ("cls", "right"), ("weightedmean", "right")]
)
def test_settings_in_earlier_words(saved, mode, side):
    pooling = {"embedding_dimension": 64, "pooling_mode": mode, "include_prompt": False}
    (saved / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    before = ModelSpec.from_checkpoint(saved)
    write_reader_settings(before, 20, saved)
    types = [entry["type"] for entry in read(saved, "modules.json")]
    assert types == [f"sentence_transformers.models.{kind.rpartition('.')[2]}" for kind in TODAY]
    tokenizer = read(saved, "tokenizer_config.json")
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["additional_special_tokens"] == ["<|im_end|>", "<|im_start|>"]
    assert "extra_special_tokens" not in tokenizer
    assert tokenizer["pad_token"] == "<|endoftext|>"
    assert (tokenizer["model_max_length"], tokenizer["padding_side"]) == (20, side)
    transformer = read(saved, "sentence_bert_config.json")
    assert transformer == {"transformer_task": "feature-extraction", "max_seq_length": 20}
    values = read(saved, "1_Pooling/config.json")
    assert values["word_embedding_dimension"] == 64
    chosen = [key for key in values if key.startswith("pooling_mode_") and values[key]]
    assert [key.removesuffix("_tokens").removesuffix("_token") for key in chosen] == [
        f"pooling_mode_{mode}"
    ]
    after = ModelSpec.from_checkpoint(saved)  # today's libraries read the same
    assert (after.inputs, after.outputs) == (before.inputs, before.outputs)
    assert after.max_length == 20


def test_several_poolings_keep_their_order(saved):
    """The early keys would put the mean before the last token."""
    pooling = {"embedding_dimension": 64, "pooling_mode": ["lasttoken", "mean"]}
    (saved / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    spec = ModelSpec.from_checkpoint(saved)
    write_reader_settings(spec, 20, saved)
    assert read(saved, "1_Pooling/config.json") == pooling
    assert read(saved, "tokenizer_config.json")["padding_side"] == "right"


@pytest.mark.parametrize(
    ("file", "change", "consumer", "message"),
    [
        ("sentence_bert_config.json", {"do_lower_case": True}, "tei", "tei lowercases no text"),
        (
            "sentence_bert_config.json",
            {
                "modality_config": {
                    name: {"method": "forward", "method_output_name": "last_hidden_state"}
                    for name in ("text", "message")
                }
            },
            "fastembed",
            "puts no text into the model's chat template",
        ),
        (
            "tokenizer_config.json",
            {"split_special_tokens": True},
            "transformers.js",
            "splits no special token",
        ),
    ],
)
def test_texts_that_are_not_taken_as_they_are(
    damageable, tmp_path, file, change, consumer, message
):
    """fastembed, TEI and transformers.js read tokenizer.json, and would give other vectors."""
    (damageable / "chat_template.jinja").write_text("{{ messages[0].content }}")
    edit(damageable / file, **change)
    with pytest.raises(InputError, match=message):
        embedport.export(damageable, tmp_path / "out", consumers=[consumer])


@pytest.mark.parametrize("consumer", ["sentence-transformers", "openvino"])
def test_a_token_that_ends_a_pair(checkpoints, copied, small_tokenizer, tmp_path, consumer):
    """The model card's code puts it before the template's end, CrossEncoder after it."""
    from tokenizers import Tokenizer

    folder = copied(checkpoints("kv2", "reranker"))
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    append_end_of_text(tokenizer, path)
    tokenizer.save(str(path))
    with pytest.raises(InputError, match=f"{consumer} would add them after it"):
        embedport.export(folder, tmp_path / "out", consumers=[consumer])


def test_openvino_reads_whole_groups(checkpoints, tmp_path):
    """It refuses others itself, with an error of its own that no command line expects."""
    with pytest.raises(InputError, match=r"those of 64 do not divide the 160 inputs of layers\.0"):
        embedport.export(
            checkpoints("kv2"),
            tmp_path / "out",
            precision="int4",
            fast=True,
            dialect="standard",
            group_size=64,
            consumers=["openvino"],
        )


def test_the_activation_of_two_labels(tmp_path):
    """Their CrossEncoder has none; the one row that is exported takes a sigmoid, in both files."""
    sigmoid, none = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"
    edit(tmp_path / "config.json", sentence_transformers={"activation_fn": sigmoid})
    edit(tmp_path / SETTINGS, model_type="CrossEncoder", activation_fn=none)
    (tmp_path / MODULES).write_text(json.dumps([{"type": TODAY[0], "path": ""}]))
    turn_into_classifier(tmp_path)
    assert read(tmp_path, SETTINGS) == {"model_type": "CrossEncoder", "activation_fn": sigmoid}
