r"""A checkpoint run by transformers with the model cards' own code.

Strings, tokenization, padding and pooling are copied from the model cards and shared with no other
module, so that a mistake elsewhere does not repeat itself here.

Embedding: "Instruct: {task}\nQuery:{query}" or the bare document, tokenized by the folder's
tokenizer; left padding; the last token's state after the final norm; L2 normalization.
Reranker: prefix, body and suffix tokenized separately; the body truncated; left padding; softmax
over the last position's logits of "no" and "yes".
https://huggingface.co/Qwen/Qwen3-Embedding-0.6B, https://huggingface.co/Qwen/Qwen3-Reranker-0.6B
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..checkpoint.spec import ModelSpec
from ..errors import CheckpointError, InputError, require
from ..runtimes.checkpoint import no_loading_bar
from ..strict_json import read_json
from ..texts.samples import Pair, Sample
from .live import LiveReference, cast_and_move, choose_dtype
from .reference import Arithmetic, Inputs
from .settings import Settings

TASK = "Given a web search query, retrieve relevant passages that answer the query"
PREFIX = (
    "<|im_start|>system\n"
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".'
    "<|im_end|>\n<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


class CardReference(LiveReference):
    """A checkpoint in transformers.

    Attributes:
        tokenizer: The checkpoint's tokenizer in transformers.
    """

    library = "transformers"
    packages = ("torch", "transformers")

    def __init__(self, spec: ModelSpec, max_length: int | None, device: str) -> None:
        super().__init__(spec, max_length, device)
        transformers = require("transformers", "torch")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(
            self.folder, padding_side="left"
        )
        self.answers: list[int] = []
        if spec.task == "reranker":
            self.answers = [self._single_token("no"), self._single_token("yes")]

    @property
    def own_limit(self) -> int:
        """Tokens that both the tokenizer and the model take."""
        return min(self.tokenizer.model_max_length, self.spec.max_position_embeddings)

    def gives_log_odds(self) -> bool:
        """False: the model card's code returns probabilities."""
        return False

    def token_ids(self, inputs: Inputs) -> list[list[int]]:
        """Each input's token ids, by the model card's code."""
        if self.spec.task == "reranker":
            return self._pair_ids([given for given in inputs if isinstance(given, Pair)])
        return self._text_ids([given for given in inputs if isinstance(given, Sample)])

    def _text_ids(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Token ids of texts, each after its prompt (a name, or the literal text)."""
        prompts, default = self._prompts()
        texts = []
        for sample in samples:
            name = default if sample.prompt is None else sample.prompt
            texts.append(("" if name is None else prompts.get(name, name)) + sample.text)
        return self.tokenizer(texts, truncation=True, max_length=self.limit)["input_ids"]

    def _prompts(self) -> tuple[dict[str, str], str | None]:
        """(prompts, the default one's name) of the folder's settings."""
        path = self.folder / "config_sentence_transformers.json"
        settings = read_json(path) if path.exists() else {}
        prompts = {"query": "", "document": "", **(settings.get("prompts") or {})}
        texts = {name: prompt or "" for name, prompt in prompts.items()}
        return texts, settings.get("default_prompt_name")

    def declared(self) -> Settings:
        """An embedder's prompts, which the card's code reads; a reranker has none."""
        if self.spec.task == "reranker":
            return {}
        prompts, default = self._prompts()
        return {"prompts": prompts, "default_prompt": default}

    def _pair_ids(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """Token ids of pairs with their own instruction or the model card's."""
        prefix = self.tokenizer.encode(PREFIX, add_special_tokens=False)
        suffix = self.tokenizer.encode(SUFFIX, add_special_tokens=False)
        template = len(prefix) + len(suffix)
        if template >= self.limit:
            raise InputError(
                f"`max_length` {self.limit} leaves no room: the reranker's prefix and suffix alone "
                f"take {template} tokens"
            )
        bodies = [
            f"<Instruct>: {TASK if pair.instruction is None else pair.instruction}\n"
            f"<Query>: {pair.query}\n<Document>: {pair.document}"
            for pair in pairs
        ]
        truncated = self.tokenizer(
            bodies,
            padding=False,
            truncation="longest_first",
            return_attention_mask=False,
            max_length=self.limit - template,
        )["input_ids"]
        return [[*prefix, *ids, *suffix] for ids in truncated]

    def load(self, arithmetic: Arithmetic) -> Any:
        """Load the model with transformers: see `LiveReference`."""
        transformers = require("transformers", "torch")
        kind = (
            transformers.AutoModel
            if self.spec.task == "embedding"
            else transformers.AutoModelForCausalLM
        )
        with no_loading_bar():
            model = kind.from_pretrained(
                self.folder,
                dtype=choose_dtype(self.spec, arithmetic),
                use_safetensors=True,
                trust_remote_code=False,
            )
        return cast_and_move(self.adapted(model, arithmetic), self.spec, arithmetic, self.device)

    def answer(self, model: Any, inputs: Inputs, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Run one batch: see `LiveReference`."""
        torch = require("torch", "torch")
        width = max(map(len, rows))
        # Left padding; a token that is masked may be any, and not every tokenizer names one.
        padded = {
            "input_ids": [[0] * (width - len(row)) + list(row) for row in rows],
            "attention_mask": [[0] * (width - len(row)) + [1] * len(row) for row in rows],
        }
        batch = {key: torch.tensor(each, device=self.device) for key, each in padded.items()}
        if self.answers:
            # Only the last position's logits are computed: the others are not used.
            logits = model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1, self.answers]
            return torch.log_softmax(logits.float(), dim=1)[:, 1].exp().cpu().numpy()
        states = model(**batch, use_cache=False).last_hidden_state
        return torch.nn.functional.normalize(states[:, -1].float(), p=2, dim=1).cpu().numpy()

    def run_rows(
        self, rows: Sequence[Sequence[int]], arithmetic: Arithmetic, *, progress: bool = False
    ) -> np.ndarray:
        """Like `run`, for inputs that are already tokenized."""
        inputs: Any = rows
        return self._answers(self.load(arithmetic), inputs, rows, arithmetic, progress)

    def layers_of(self, model: Any) -> Any:
        """The module with `embed_tokens` and `layers`."""
        return model.base_model

    def _single_token(self, token: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None:
            raise CheckpointError(f"{self.folder}: {token!r} should be a single token, found none")
        return token_id
