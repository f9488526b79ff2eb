"""The reference: transformers, unpatched, along the model card's own code.

Nothing of embedport's tokenization, padding or pooling is used here, so that a mistake in one is
not repeated in the other: texts go through AutoTokenizer with padding on the left, the last hidden
state or logit at the last position is taken.

Source: https://github.com/QwenLM/Qwen3-Embedding, examples/qwen3_embedding_transformers.py and
qwen3_reranker_transformers.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import require
from ..progress import progress_bar
from ..spec import ModelSpec

BATCH_TOKENS = 4096
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


class Reference:
    """A checkpoint run by transformers.

    Args:
        spec: The checkpoint.
        precision: "fp16", "bf16", or "fp32 arithmetic on fp16 weights".
        device: "cpu" or "cuda".

    Raises:
        MissingPackageError: torch or transformers is not installed.
    """

    def __init__(self, spec: ModelSpec, precision: str, device: str) -> None:
        self.spec = spec
        self.precision = precision
        self.device = device
        self._tokenizer = _load_tokenizer(spec)
        self._model = _load_model(spec, precision, device)

    def embed(self, rows: Sequence[Sequence[int]], *, progress: bool) -> np.ndarray:
        """Embed rows of token ids: float32 [n, hidden_size], unit length."""
        import torch

        def pool(output: Any) -> torch.Tensor:
            vectors = output.last_hidden_state[:, -1].float()
            return torch.nn.functional.normalize(vectors, p=2, dim=1)

        return self._run(rows, (self.spec.hidden_size,), pool, progress)

    def score(self, rows: Sequence[Sequence[int]], *, progress: bool) -> np.ndarray:
        """Judge rows of token ids: float32 [n], the probability of "yes"."""
        import torch

        yes, no = (self._tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))

        def probability(output: Any) -> torch.Tensor:
            logits = output.logits[:, -1, [no, yes]].float()
            return torch.nn.functional.log_softmax(logits, dim=1)[:, 1].exp()

        # The logits of a whole batch would be 150,000 wide at each token.
        return self._run(rows, (), probability, progress, logits_to_keep=1)

    def _run(
        self,
        rows: Sequence[Sequence[int]],
        width: tuple[int, ...],
        result: Callable[[Any], Any],
        progress: bool,
        **options: int,
    ) -> np.ndarray:
        import torch

        results = np.empty((len(rows), *width), np.float32)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        with progress_bar("Reference", len(rows), enabled=progress) as advance, torch.no_grad():
            while order:
                count = max(1, BATCH_TOKENS // len(rows[order[0]]))
                batch, order = order[:count], order[count:]
                inputs = self._tokenizer.pad(
                    {"input_ids": [list(rows[i]) for i in batch]}, return_tensors="pt"
                ).to(self.device)
                found = result(self._model(**inputs, use_cache=False, **options))
                results[batch] = found.cpu().numpy()
                advance(len(batch))
        return results

    def embedding_ids(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Token ids of texts that already have their prompt."""
        return self._tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]

    def reranker_ids(
        self, pairs: Sequence[tuple[str, str]], instruction: str, max_length: int
    ) -> list[list[int]]:
        """Token ids of (query, document) pairs under the template."""
        tokenizer = self._tokenizer
        prefix = tokenizer.encode(PREFIX, add_special_tokens=False)
        suffix = tokenizer.encode(SUFFIX, add_special_tokens=False)
        bodies = tokenizer(
            [
                f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
                for query, document in pairs
            ],
            padding=False,
            truncation="longest_first",
            return_attention_mask=False,
            max_length=max_length - len(prefix) - len(suffix),
        )["input_ids"]
        return [prefix + body + suffix for body in bodies]


def choose_device(device: str) -> str:
    """Where the reference runs: "cuda" for a GPU device or "auto" with one, else "cpu"."""
    torch = require("torch", "torch")
    has_gpu = torch.cuda.is_available()
    return "cuda" if device != "cpu" and has_gpu else "cpu"


def _load_tokenizer(spec: ModelSpec) -> Any:
    transformers = require("transformers", "torch")
    return transformers.AutoTokenizer.from_pretrained(
        spec.source.folder, padding_side="left", trust_remote_code=False
    )


def _load_model(spec: ModelSpec, precision: str, device: str) -> Any:
    torch, transformers = require("torch", "torch"), require("transformers", "torch")
    kind = transformers.AutoModel if spec.task == "embedding" else transformers.AutoModelForCausalLM
    # transformers draws its own bar and warns of the small tokenizer's ids: neither says anything.
    transformers.utils.logging.disable_progress_bar()
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        model = kind.from_pretrained(
            spec.source.folder,
            dtype=torch.bfloat16 if precision == "bf16" else torch.float16,
            use_safetensors=True,
            trust_remote_code=False,
        )
    finally:
        logger.setLevel(level)
    if precision.startswith("fp32"):
        model = model.float()
    return model.eval().to(device)
