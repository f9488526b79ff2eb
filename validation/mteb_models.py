r"""Models behind mteb's protocols, with the prompt that each task asks for.

mteb's own loader for Qwen3-Embedding puts "Instruct: {instruction}\nQuery:" before queries, and
before both texts of a symmetric task; the instruction is the task's. Documents get none.
https://github.com/embeddings-benchmark/mteb/blob/main/mteb/models/model_implementations/qwen3_models.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from ..texts.prompts import query_prompt
from ..texts.samples import Pair, Sample

# Texts, each with its literal prompt, to float32 [texts, dim].
Embed = Callable[[list[Sample]], np.ndarray]
# Pairs, each with its instruction, to float32 [pairs].
Score = Callable[[list[Pair]], np.ndarray]
INSTRUCT = "Instruct:"


class TaskEncoder(AbsEncoder):
    """An embedding model by mteb's EncoderProtocol.

    Args:
        embed: Runs the model.
        prompts: The model's prompts, name to text. If it declares no query prompt, or one that
            begins with "Instruct:", each task's instruction is used; otherwise its own prompts.
        meta: The model's facts for mteb.
    """

    def __init__(self, embed: Embed, prompts: Mapping[str, str], meta: ModelMeta) -> None:
        self.embed, self.prompts, self.mteb_model_meta = embed, dict(prompts), meta
        query = self.prompts.get("query")
        self.takes_instructions = query is None or query.startswith(INSTRUCT)

    def encode(
        self, inputs: Any, *, task_metadata: Any, prompt_type: PromptType | None = None, **_: Any
    ) -> np.ndarray:
        """Embed the texts of a task.

        Args:
            inputs: Batches with the key "text": a torch DataLoader.
            task_metadata: mteb's TaskMetadata.
            prompt_type: Whether they are queries or documents; None in a symmetric task.

        Returns:
            float32 [texts, dim].
        """
        prompt = self.find_prompt(task_metadata, prompt_type)
        return self.embed([Sample(text, prompt) for batch in inputs for text in batch["text"]])

    def find_prompt(self, task_metadata: Any, prompt_type: PromptType | None) -> str:
        """The text to put before each input of a task.

        A prompt that the model names after the task or the task's type comes first, as in mteb.
        """
        name = get_prompt_name(self.prompts, task_metadata, prompt_type)
        own = self.prompts.get(name or "", "")
        is_document = prompt_type == PromptType.document
        if not self.takes_instructions or is_document or name not in (None, "query"):
            return own
        instruction: Any = self.get_instruction(task_metadata, prompt_type)
        if isinstance(instruction, dict):  # of a task with several, given without a prompt type
            instruction = next(iter(instruction.values()))
        return query_prompt(instruction) if instruction else ""


class TaskCrossEncoder:
    """A reranker by mteb's CrossEncoderProtocol.

    Args:
        score: Runs the model.
        takes_instructions: Whether the model's template has a place for an instruction.
        meta: The model's facts for mteb.
    """

    def __init__(self, score: Score, takes_instructions: bool, meta: ModelMeta) -> None:
        self.score, self.takes_instructions, self.mteb_model_meta = score, takes_instructions, meta

    def predict(self, inputs1: Any, inputs2: Any, *, task_metadata: Any, **_: Any) -> np.ndarray:
        """Score pairs of a task.

        The instruction is the query's own if the data set has one, otherwise the task's, otherwise
        the model's.

        Args:
            inputs1: Batches of queries, with the key "text", and "query" and "instruction" where
                the data set has instructions: a torch DataLoader.
            inputs2: Batches of as many documents, with the key "text".
            task_metadata: mteb's TaskMetadata.

        Returns:
            float32 [pairs].
        """
        prompt: Any = task_metadata.prompt
        shared = prompt.get(PromptType.query.value) if isinstance(prompt, dict) else prompt
        pairs: list[tuple[str, str | None]] = []
        for batch in inputs1:
            if self.takes_instructions and "instruction" in batch:
                pairs += zip(batch["query"], batch["instruction"], strict=True)
            else:  # "text" is the query, followed by its instruction
                pairs += ((text, shared) for text in batch["text"])
        documents = [text for batch in inputs2 for text in batch["text"]]
        return self.score(
            [
                Pair(query, document, (instruction or None) if self.takes_instructions else None)
                for (query, instruction), document in zip(pairs, documents, strict=True)
            ]
        )


def describe(name: str, revision: str, similarity: str = "cosine", **facts: Any) -> ModelMeta:
    """A model's facts for mteb, which keeps results by name and revision.

    Args:
        name: The model's name, without an owner.
        revision: Different for different weights.
        similarity: The function that compares vectors, as sentence-transformers names it.
        **facts: Further attributes of ModelMeta.
    """
    return ModelMeta.create_empty(
        {
            "name": f"embedport/{name}",
            "revision": revision,
            "similarity_fn_name": ScoringFunction(similarity),
            **facts,
        }
    )
