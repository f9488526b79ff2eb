"""What a checkpoint's files declare around its layers: how texts become tokens, and what follows.

sentence-transformers calls these steps modules; see `modules` for how they are read. An artifact
keeps both records in its manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

# A text to a vector, or a pair of texts to a probability.
Task = Literal["embedding", "reranker"]
TASKS: tuple[Task, ...] = get_args(Task)
# How an input is put together: "text", as the tokenizer takes a text or a pair of texts;
# "messages", by the folder's chat template; "instruct", by the template of Qwen3-Reranker's card.
Form = Literal["text", "messages", "instruct"]
MessageFormat = Literal["flat", "structured"]
PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
POOLING_MODES: tuple[PoolingMode, ...] = get_args(PoolingMode)
Activation = Literal["identity", "sigmoid"]
# Classes of torch.nn that a Dense module may have behind its matrix.
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")
# What encode_query and encode_document of sentence-transformers take, whether or not a folder names
# such a prompt: without one there is none.
ROLES = ("query", "document")


@dataclass(frozen=True)
class Inputs:
    """How inputs become tokens.

    Attributes:
        form: How an input is put together.
        prompts: Prompt name to text, as the folder names them.
        default_prompt: The name of the prompt that is used where none is given.
        lower_case: Whether texts are made lower case first.
        split_special_tokens: Whether special tokens in a text are taken for plain text.
        truncation_side: Which end of a text that is too long is cut.
        message_format: Of "messages": whether a message's content is its text, or a list of parts.
        template_values: Of "messages": further values that the template reads.
        skipped_token: A token that a classifier passes over at the end of its input.
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

    def prompt_text(self, name: str | None) -> str | None:
        """The text of a prompt by its name, a role or None: as sentence-transformers resolves it.

        Args:
            name: One of `prompts`; one of `ROLES`; None for the default prompt, if there is one.

        Returns:
            The text; None where the folder has no such prompt.
        """
        name = self.default_prompt if name is None else name
        if name is None or (name in ROLES and name not in self.prompts):
            return ""
        return self.prompts.get(name)


@dataclass(frozen=True)
class Dense:
    """A module that multiplies a vector by a matrix.

    Attributes:
        path: Its folder in the checkpoint's.
        in_features: Values it takes.
        out_features: Values it gives.
        bias: Whether it adds a bias.
        activation: What follows, one of `ACTIVATIONS`.
        residual: Whether what it takes is added to what it gives.
    """

    path: str
    in_features: int
    out_features: int
    bias: bool
    activation: str
    residual: bool = False


# What follows pooling, in order.
Step = Dense | Literal["normalize"]


@dataclass(frozen=True)
class Outputs:
    """What is made of the last layer's states.

    Attributes:
        pooling: How a text's states become one vector; several are put side by side.
        include_prompt: Whether the prompt's tokens are pooled too.
        steps: What follows pooling.
        truncate: Values of a vector that are kept, not normalized again.
        similarity: What vectors are compared by.
        answers: Of a reranker with a vocabulary's head: the tokens whose logits are subtracted,
            (yes, no); no is None where the score is the logit of one token. None where "yes" and
            "no" are to be looked up.
        activation: What a reranker's score goes through.
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
        """The modules with weights."""
        return [step for step in self.steps if isinstance(step, Dense)]

    def width(self, hidden_size: int) -> int:
        """Values of a vector."""
        dense = self.dense
        whole = dense[-1].out_features if dense else hidden_size * len(self.pooling)
        return min(whole, self.truncate or whole)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` and JSON have made of one.

        Raises:
            TypeError: Keys are missing or unknown, or it has another shape.
        """
        values = dict(record)
        values["pooling"] = tuple(values["pooling"])
        values["steps"] = tuple(
            step if step == "normalize" else Dense(**step) for step in values["steps"]
        )
        if values["answers"] is not None:
            yes, no = values["answers"]
            values["answers"] = (yes, no)
        return cls(**values)
