"""A model of Triton's Python backend: texts in, vectors or scores out.

It tokenizes as embedport does and sends batches of token ids to the graph's model. It needs the
package embedport in Triton's image; torch is not needed.
"""

import json
from itertools import groupby
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from embedport.artifact.manifest import Manifest
from embedport.errors import EmbedportError, InputError
from embedport.runtimes.batching import make_batches, pad
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
            rows = [
                self.tokenizer.encode([pair], instruction).ids[0]
                for pair, instruction in zip(pairs, instructions, strict=True)
            ]
            return rows, [0] * len(rows)
        texts = strings(request, "TEXT")
        names = strings(request, "PROMPT") or [None] * len(texts)
        rows, lengths = [], []
        for name, group in groupby(zip(names, texts, strict=True), key=lambda pair: pair[0]):
            prompt = resolve_prompt(self.manifest.inputs, name)
            ids = self.tokenizer.encode([text for _, text in group], prompt).ids
            whole = self.manifest.outputs.include_prompt
            rows += ids
            lengths += [0 if whole else self.tokenizer.prompt_length(prompt)] * len(ids)
        return rows, lengths

    def run(self, rows, prompt_lengths):
        """Results of rows in batches of similar length; one prompt length a batch."""
        results = [None] * len(rows)
        for length in set(prompt_lengths):
            members = [i for i, other in enumerate(prompt_lengths) if other == length]
            for batch in make_batches([len(rows[i]) for i in members], BATCH_TOKENS):
                numbers = [members[i] for i in batch]
                for number, result in zip(
                    numbers, self.run_graph([rows[i] for i in numbers], length), strict=True
                ):
                    results[number] = result
        return results

    def run_graph(self, rows, prompt_length):
        """Call the graph's model with one padded batch."""
        ids, mask = pad(rows)
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

    def respond(self, results):
        """A response; NaN and infinity are errors."""
        values = np.stack(results).astype(np.float32)
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
