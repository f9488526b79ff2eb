# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "gptqmodel==7.7.0",
#     "optimum",
#     "sentence-transformers>=5",
#     "torch==2.15.0",
#     "transformers==5.24.0",
# ]
# ///
"""Run in a process of its own: checkpoints loaded by the libraries that own their formats.

    python reload.py jobs.json out.npz

A job is {"key", "loader", "folder", "rows", "dtype"}: rows of token ids, or of texts for
sentence-transformers; dtype is "float32" to compute in fp32 where that can be, or "auto" for the
checkpoint's own. out.npz holds an array of results by key. One job's result is its vectors,
[n, hidden], or its logits of "yes" less "no", [n]. `uv run --script` adds GPTQModel, whose pins are
its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer


def options_of(folder: Path) -> dict[str, Any]:
    """Arguments of from_pretrained: activations rounded as servers do, and GPTQ on any CPU.

    Weights alone are unpacked as config.json says: with dequantize=False transformers 5.23 makes no
    room for packed zero points.
    """
    import transformers

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    method = config["quant_method"]
    if method == "compressed-tensors" and config["config_groups"]["group_0"]["input_activations"]:
        return {"quantization_config": transformers.CompressedTensorsConfig(dequantize=False)}
    if method == "gptq":
        return {"quantization_config": transformers.GPTQConfig(bits=4, backend="torch")}
    return {}


def load(kind: str, folder: Path, dtype: str) -> Any:
    """A transformers model, none of its tensors missing."""
    import transformers

    model, info = getattr(transformers, kind).from_pretrained(
        folder, dtype=dtype, output_loading_info=True, **options_of(folder)
    )
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    assert not problems, f"{folder}: {problems}"
    return computing_in(model.eval(), dtype)


def computing_in(model: Any, dtype: str) -> Any:
    """The model in a dtype; bitsandbytes' are loaded in their own, whatever is asked for."""
    for parameter in model.parameters():
        if dtype == "float32" and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    return model


def vectors(folder: Path, rows: list[list[int]], dtype: str) -> torch.Tensor:
    """Vectors of transformers' AutoModel."""
    model = load("AutoModel", folder, dtype)
    found = [model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in rows]
    return torch.nn.functional.normalize(torch.stack(found).float(), dim=1)


def causal_logits(folder: Path, rows: list[list[int]], dtype: str) -> torch.Tensor:
    """Scores of AutoModelForCausalLM; a tied head is still the table."""
    model = load("AutoModelForCausalLM", folder, dtype)
    if model.config.tie_word_embeddings:
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    yes, no = (tokenizer.token_to_id(word) for word in ("yes", "no"))
    logits = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in rows])
    return logits[:, yes].float() - logits[:, no].float()


def classifier_logits(folder: Path, rows: list[list[int]], dtype: str) -> torch.Tensor:
    """Scores of AutoModelForSequenceClassification."""
    model = load("AutoModelForSequenceClassification", folder, dtype)
    return torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in rows]).float()


def sentence_vectors(folder: Path, texts: list[str], dtype: str) -> torch.Tensor:
    """Query vectors of sentence-transformers, opened without a quantization argument."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": dtype})
    return _query_vectors(model, texts, dtype)


def rounded_sentence_vectors(folder: Path, texts: list[str], dtype: str) -> torch.Tensor:
    """The same of compressed-tensors, opened so that activations are rounded too."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(folder), device="cpu", model_kwargs={"dtype": dtype, **options_of(folder)}
    )
    _unpack(model)
    return _query_vectors(model, texts, dtype)


def cross_encoder_logits(folder: Path, pairs: list[list[str]], dtype: str) -> torch.Tensor:
    """Scores of sentence-transformers' CrossEncoder, which renders the folder's template."""
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": dtype})
    return _pair_logits(model, pairs, dtype)


def rounded_cross_encoder_logits(folder: Path, pairs: list[list[str]], dtype: str) -> torch.Tensor:
    """The same of compressed-tensors, opened so that activations are rounded too."""
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(
        str(folder), device="cpu", model_kwargs={"dtype": dtype, **options_of(folder)}
    )
    _unpack(model)
    return _pair_logits(model, pairs, dtype)


def _unpack(model: Any) -> None:
    """compressed-tensors unpacks when a model is called; sentence-transformers calls `forward`."""
    model[0].model(input_ids=torch.zeros((1, 1), dtype=torch.int64))


def _query_vectors(model: Any, texts: list[str], dtype: str) -> torch.Tensor:
    computing_in(model[0].model, dtype)
    return model.encode(texts, prompt_name="query", batch_size=1, convert_to_tensor=True).float()


def _pair_logits(model: Any, pairs: list[list[str]], dtype: str) -> torch.Tensor:
    computing_in(model[0].model, dtype)
    scores = model.predict(
        [(query, document) for query, document in pairs], batch_size=1, convert_to_tensor=True
    )
    return torch.logit(scores.double())


LOADERS = {
    each.__name__: each
    for each in (
        vectors,
        causal_logits,
        classifier_logits,
        sentence_vectors,
        rounded_sentence_vectors,
        cross_encoder_logits,
        rounded_cross_encoder_logits,
    )
}


def main(jobs_file: str, out: str) -> None:
    """Run the jobs in turn."""
    results = {}
    with torch.no_grad():
        for job in json.loads(Path(jobs_file).read_text(encoding="utf-8")):
            run = LOADERS[job["loader"]]
            results[job["key"]] = run(Path(job["folder"]), job["rows"], job["dtype"]).numpy()
    np.savez(out, **results)


if __name__ == "__main__":
    torch.set_num_threads(1)  # small models, and other work beside
    main(*sys.argv[1:])
