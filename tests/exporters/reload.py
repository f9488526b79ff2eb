"""Run in a process of its own: checkpoints loaded by the libraries that own their formats.

    python reload.py jobs.json out.npz

A job is {"key", "loader", "folder", "rows"}, with rows of token ids, or of texts for
sentence-transformers; out.npz holds an array of results by key. One job's result is its vectors,
[n, hidden], or its logits of "yes" less "no", [n].
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch


def load(kind, folder):
    """A transformers model, none of its tensors missing, computing in fp32 where it can."""
    import transformers

    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    options = {}
    if method == "compressed-tensors":
        # With the activations rounded, as servers round them.
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=False)
    if method == "gptq":
        options["quantization_config"] = transformers.GPTQConfig(bits=4, backend="torch")
    model, info = getattr(transformers, kind).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    assert not problems, f"{folder}: {problems}"
    return model.eval()


def vectors(folder, rows):
    model = load("AutoModel", folder)
    found = [model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in rows]
    return torch.nn.functional.normalize(torch.stack(found).float(), dim=1)


def causal_logits(folder, rows):
    model = load("AutoModelForCausalLM", folder)
    if model.config.tie_word_embeddings:
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    yes, no = word_ids(folder)
    logits = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in rows])
    return logits[:, yes].float() - logits[:, no].float()


def classifier_logits(folder, rows):
    model = load("AutoModelForSequenceClassification", folder)
    return torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in rows]).float()


def sentence_vectors(folder, texts):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    return model.encode(texts, prompt_name="query", convert_to_tensor=True).float()


def cross_encoder_logits(folder, pairs):
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    scores = model.predict([tuple(pair) for pair in pairs], convert_to_tensor=True)
    return torch.logit(scores.double())


def word_ids(folder):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer.token_to_id("yes"), tokenizer.token_to_id("no")


if __name__ == "__main__":
    torch.set_num_threads(1)  # small models, and other tests beside
    results = {}
    with torch.no_grad():
        for job in json.loads(Path(sys.argv[1]).read_text()):
            run = globals()[job["loader"]]
            results[job["key"]] = run(Path(job["folder"]), job["rows"]).numpy()
    np.savez(sys.argv[2], **results)
