"""A model of Triton's Python backend: texts in, vectors or scores out.

It tokenizes as embedport does and sends batches of token ids to the graph's model. It needs the
package embedport in Triton's image; torch is not needed.
"""

import json
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from embedport.artifact.manifest import Manifest
from embedport.errors import EmbedportError, InputError
from embedport.runtimes.batching import run_batches
from embedport.runtimes.embedder import check_encoded, check_pooled
from embedport.texts.prompts import EmbeddingTokenizer, RerankerTokenizer, resolve_prompt

# Tokens of a batch of the graph, padding included.
BATCH_TOKENS = 16_384


class TritonPythonModel:
    """Tokenizes texts, and runs the graph."""

    def initialize(self, args):
        """Read the tokenizer and the manifest beside this file."""
        config = json.loads(args["model_config"])
        self.graph = config["parameters"]["graph"]["string_value"]
        folder = Path(__file__).parent
        self.manifest = Manifest.from_json(folder / "embedport.json")
        self.reranks = self.manifest.task == "reranker"
        kind = RerankerTokenizer if self.reranks else EmbeddingTokenizer
        self.tokenizer = kind(
            folder / "tokenizer.json", self.manifest.max_length, self.manifest.inputs
        )

    def execute(self, requests):
        """Answer requests: each with its vectors, or with what is wrong with it."""
        rows, lengths, parts, responses = [], [], [], {}
        for number, request in enumerate(requests):
            try:
                ids, prompt_lengths = self.tokenize(request)
            except EmbedportError as error:
                responses[number] = refuse(error)
                continue
            parts.append((number, len(rows), len(rows) + len(ids)))
            rows += ids
            lengths += prompt_lengths
        results = self.run(rows, lengths)
        for number, first, last in parts:
            responses[number] = self.respond(results[first:last])
        return [responses[number] for number in range(len(requests))]

    def tokenize(self, request):
        """Token ids of a request's texts, and the lengths of their prompts."""
        if self.reranks:
            pairs = list(zip(strings(request, "QUERY"), strings(request, "DOCUMENT"), strict=True))
            instructions = strings(request, "INSTRUCTION") or [None] * len(pairs)
            rows = []
            for pair, instruction in zip(pairs, instructions, strict=True):
                rows += self.checked(self.tokenizer.encode([pair], instruction), "pair", len(rows))
            return rows, [0] * len(rows)
        texts = strings(request, "TEXT")
        names = strings(request, "PROMPT") or [None] * len(texts)
        rows, lengths = [], []
        for name, group in groupby(zip(names, texts, strict=True), key=lambda pair: pair[0]):
            prompt, outputs = resolve_prompt(self.manifest.inputs, name), self.manifest.outputs
            encoded = self.tokenizer.encode([text for _, text in group], prompt)
            ids = self.checked(encoded, "text", len(rows))
            length = 0 if outputs.include_prompt else self.tokenizer.prompt_length(prompt)
            check_pooled(ids, outputs, length, len(rows))
            rows += ids
            lengths += [length] * len(ids)
        return rows, lengths

    def checked(self, encoded, noun, first):
        """The token ids, if all are in the model's table: a GPU would take others in silence."""
        manifest = self.manifest
        check_encoded(encoded, manifest.vocab_size, manifest.max_length, noun, first)
        return encoded.ids

    def run(self, rows, prompt_lengths):
        """Results of rows in batches of similar length; one prompt length a batch."""
        width = () if self.reranks else (self.manifest.embedding_dim,)
        results = np.empty((len(rows), *width), np.float32)
        for length in set(prompt_lengths):
            members = [i for i, other in enumerate(prompt_lengths) if other == length]
            results[members] = run_batches(
                partial(self.run_graph, prompt_length=length),
                [rows[i] for i in members],
                width,
                batch_tokens=BATCH_TOKENS,
                description="",
                progress=False,
            )
        return results

    def run_graph(self, ids, mask, *, prompt_length):
        """Call the graph's model with one padded batch."""
        feeds = {"input_ids": ids, "attention_mask": mask}
        if "prompt_length" in self.manifest.graph.inputs:
            feeds["prompt_length"] = np.array([prompt_length])
        output = self.manifest.graph.outputs[0]
        response = pb_utils.InferenceRequest(
            model_name=self.graph,
            requested_output_names=[output],
            inputs=[pb_utils.Tensor(name, value) for name, value in feeds.items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if response.has_error():
            raise pb_utils.TritonModelException(response.error().message())
        return pb_utils.get_output_tensor_by_name(response, output).as_numpy()

    def respond(self, values):
        """A response; NaN and infinity are errors."""
        if not np.isfinite(values).all():
            return refuse(f"a text gave NaN or infinity in {self.manifest.precision}")
        if self.reranks:
            tensor = pb_utils.Tensor("SCORE", values[:, None])
        else:
            tensor = pb_utils.Tensor("EMBEDDING", values)
        return pb_utils.InferenceResponse(output_tensors=[tensor])


def refuse(error):
    """A response that says what is wrong."""
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error)))


def strings(request, name):
    """The strings of an input [batch, 1]; None if the request does not have it.

    Raises:
        InputError: A string is not UTF-8.
    """
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    try:
        return [value.decode("utf-8") for value in tensor.as_numpy().reshape(-1)]
    except UnicodeDecodeError as error:
        raise InputError(f"{name} should be UTF-8: {error}") from error
