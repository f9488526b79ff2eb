"""Inputs and Outputs: the steps before and after a model's layers, as its files declare them.

sentence-transformers calls these steps modules; `modules` reads them. An artifact's manifest
stores both records.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

# A text to a vector, or a pair of texts to a probability.
Task = Literal["embedding", "reranker"]
TASKS: tuple[Task, ...] = get_args(Task)
# How an input is built: "text": the text or pair goes to the tokenizer as it is; "messages": the
# folder's chat template; "instruct": the template on Qwen3-Reranker's model card.
Form = Literal["text", "messages", "instruct"]
MessageFormat = Literal["flat", "structured"]
PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
POOLING_MODES: tuple[PoolingMode, ...] = get_args(PoolingMode)
Activation = Literal["identity", "sigmoid"]
# The torch.nn classes that a Dense module may apply after its matrix.
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")
# Prompt names that encode_query and encode_document of sentence-transformers use. A folder need not
# define them: an undefined one is empty.
ROLES = ("query", "document")


@dataclass(frozen=True)
class Inputs:
    """How inputs become tokens.

    Attributes:
        form: How an input is built.
        prompts: The folder's prompts: name to text.
        default_prompt: Name of the prompt used when the caller gives none.
        lower_case: Whether texts are lowercased first.
        split_special_tokens: Whether special tokens in a text are tokenized as plain text.
        truncation_side: The end at which a text that is too long is cut.
        message_format: For the form "messages": whether a message's content is a string ("flat")
            or a list of parts ("structured").
        template_values: For the form "messages": further variables of the template.
        skipped_token: A classifier ignores this token at the end of its input.
        cuts_skipped: Whether such tokens may be cut off. With attention to both sides the other
            tokens see them, and inputs that end in one are refused.
    """

    form: Form = "text"
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    lower_case: bool = False
    split_special_tokens: bool = False
    truncation_side: Literal["left", "right"] = "right"
    message_format: MessageFormat = "flat"
    template_values: Mapping[str, Any] = field(default_factory=dict)
    skipped_token: int | None = None
    cuts_skipped: bool = True

    def prompt_text(self, name: str | None) -> str | None:
        """Look a prompt up by its name, as sentence-transformers resolves it.

        Args:
            name: One of `prompts`; one of `ROLES`; None for the default prompt, if there is one.

        Returns:
            The prompt's text; None if the folder has no such prompt.
        """
        name = self.default_prompt if name is None else name
        if name is None or (name in ROLES and name not in self.prompts):
            return ""
        return self.prompts.get(name)


@dataclass(frozen=True)
class Dense:
    """A linear layer after pooling.

    Attributes:
        path: The module's folder within the checkpoint.
        in_features: Width of its input.
        out_features: Width of its output.
        bias: Whether it adds a bias.
        activation: One of `ACTIVATIONS`, applied to the output.
        residual: Whether the input is added to the output.
    """

    path: str
    in_features: int
    out_features: int
    bias: bool
    activation: str
    residual: bool = False


# A step after pooling.
Step = Dense | Literal["normalize"]


@dataclass(frozen=True)
class Outputs:
    """How the last layer's hidden states become vectors or scores.

    Attributes:
        pooling: How the states of a text become one vector; several poolings are concatenated.
        include_prompt: Whether the prompt's tokens are pooled too.
        steps: The steps after pooling, in order.
        truncate: Vectors are cut to this many values, without normalizing them again.
        similarity: The similarity function for comparing vectors.
        answers: For a reranker that scores with lm_head: token ids (yes, no); the score is
            logit(yes) - logit(no), or logit(yes) alone if no is None. None: look up the tokens
            "yes" and "no".
        activation: Applied to a reranker's score.
    """

    pooling: tuple[PoolingMode, ...] = ("lasttoken",)
    include_prompt: bool = True
    steps: tuple[Step, ...] = ("normalize",)
    truncate: int | None = None
    similarity: str = "cosine"
    answers: tuple[int, int | None] | None = None
    activation: Activation = "sigmoid"

    @property
    def last_token(self) -> bool:
        """Whether only the last token's state matters."""
        return self.pooling == ("lasttoken",)

    @property
    def unit_length(self) -> bool:
        """Whether vectors have length 1."""
        return self.truncate is None and self.steps[-1:] == ("normalize",)

    @property
    def dense(self) -> list[Dense]:
        """The Dense modules, which have weights."""
        return [step for step in self.steps if isinstance(step, Dense)]

    def width(self, hidden_size: int) -> int:
        """Width of a vector."""
        dense = self.dense
        full = dense[-1].out_features if dense else hidden_size * len(self.pooling)
        return min(full, self.truncate or full)
