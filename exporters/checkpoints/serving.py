"""Files for serving: a reranker's chat template, and a guide with vLLM's command line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from ...checkpoint.spec import ModelSpec
from ..classifier import TEMPLATE, pair_template
from .config import Form, vllm_overrides

GUIDE = "vllm.md"


def write_serving_files(spec: ModelSpec, form: Form | None, folder: Path, name: str) -> None:
    """Write vllm.md and, for a reranker, chat_template.jinja.

    Args:
        spec: The source.
        form: A reranker's form; None for an embedder.
        folder: Where to write.
        name: The folder's final name.
    """
    if spec.task == "reranker" and spec.inputs.form == "instruct":
        (folder / TEMPLATE).write_bytes(pair_template().encode())
    # A template in tokenizer_config.json needs no option.
    has_template = form is not None and (folder / TEMPLATE).is_file()
    guide = _guide(spec, form, name, has_template=has_template)
    (folder / GUIDE).write_bytes(guide.encode())


def _guide(spec: ModelSpec, form: Form | None, name: str, *, has_template: bool) -> str:
    command = ["vllm", "serve", name, "--runner", "pooling"]
    if overrides := vllm_overrides(spec, form):
        command += ["--hf-overrides", json.dumps(overrides)]
    if has_template:
        command += ["--chat-template", f"{name}/{TEMPLATE}"]
    if form is None:
        request = "/v1/embeddings"
        prompt = spec.prompts.get("query", "")
        body = {"model": name, "input": [f"{prompt}What is the capital of China?"]}
        prompts = [f"`{key}`: `{text!r}`" for key, text in spec.prompts.items() if text]
        advice = (
            f"Prompts stand before a text: {'; '.join(prompts) or 'there are none'}. `dimensions` "
            "in a request takes one of `matryoshka_dimensions`."
        )
    else:
        request = "/rerank"
        body = {
            "model": name,
            "query": "What is the capital of China?",
            "documents": ["The capital of China is Beijing."],
        }
        advice = (
            "The chat template puts query and document into the text that the model was trained "
            "on. Without it the scores are noise."
            if spec.inputs.form != "text"
            else "Query and document are joined as the tokenizer joins a pair."
        )
    return (
        f"# {name} in vLLM\n\n```bash\n{shlex.join(command)}\n\n"
        f"curl http://localhost:8000{request} -H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}\n```\n\n{advice}\n"
    )
