r"""Text to token ids, exactly as Qwen's model cards define it.

Embedding: the prompt, then the text, then `<|endoftext|>`, which the checkpoint's tokenizer.json
appends by its template (older ones lack it, and it is added here). A query's prompt is
"Instruct: {instruction}\nQuery:" with nothing after the colon; documents are bare.
Reranker: prefix ids + body ids + suffix ids, each tokenized by itself; only the body is cut.

Source of the strings: https://github.com/QwenLM/Qwen3-Embedding (README.md and examples/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.processors import Sequence as ProcessorSequence
from tokenizers.processors import TemplateProcessing

from .errors import CheckpointError, InputError
from .tokenizer import load_tokenizer, tokenizing

END_OF_TEXT = "<|endoftext|>"
DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
RERANKER_PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
RERANKER_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def query_prompt(instruction: str) -> str:
    """The prompt that turns a text into a query under a user's own instruction."""
    return f"Instruct: {instruction}\nQuery:"


def reranker_body(query: str, document: str, instruction: str = DEFAULT_INSTRUCTION) -> str:
    """The part of a reranker's input between its prefix and its suffix."""
    return f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"


def resolve_prompt(prompts: Mapping[str, str], prompt: str) -> str:
    """The text that a prompt's name stands for, or a literal prompt itself.

    Raises:
        InputError: It is no string, or one word and not a known name: a typing error would go
            unnoticed.
    """
    if not isinstance(prompt, str):
        raise InputError(f"a prompt should be a string, found {prompt!r}")
    if prompt in prompts:
        return prompts[prompt]
    if prompt and prompt.replace("_", "").replace("-", "").isalnum():
        raise InputError(
            f"no prompt is named {prompt!r}; there are {', '.join(sorted(prompts))}. A literal "
            "prompt is more than a word: embedport.query_prompt(instruction) makes one"
        )
    return prompt


@dataclass(frozen=True)
class Encoded:
    """Token ids of a list of texts.

    Attributes:
        ids: One int64 array [tokens] a text, never empty.
        truncated: Indices of the texts that were cut to the maximum length.
    """

    ids: list[np.ndarray]
    truncated: list[int]


class EmbeddingTokenizer:
    """Texts to ids for an embedding model; every row ends with `<|endoftext|>`.

    Args:
        path: The checkpoint's or artifact's tokenizer.json.
        max_length: Tokens of a row at most, the end token included; the text's end is cut.
    """

    def __init__(self, path: Path, max_length: int) -> None:
        self.tokenizer = load_tokenizer(path)
        self.end_id = append_end_of_text(self.tokenizer, path)
        self.max_length = max_length
        self.tokenizer.enable_truncation(max_length)

    def encode(self, texts: Sequence[str], prompt: str = "") -> Encoded:
        """Tokenize texts, each with `prompt` in front.

        Raises:
            InputError: A text is not a string or not valid Unicode.
        """
        return _encode(self.tokenizer, texts, lambda text: prompt + text, special=True)


class RerankerTokenizer:
    """Pairs of texts to ids for a reranker: prefix + body + suffix.

    Args:
        path: The checkpoint's or artifact's tokenizer.json.
        max_length: Tokens of a row at most; the body's end is cut, prefix and suffix never are.
    """

    def __init__(self, path: Path, max_length: int) -> None:
        self.tokenizer = load_tokenizer(path)
        self.prefix = self._ids(RERANKER_PREFIX)
        self.suffix = self._ids(RERANKER_SUFFIX)
        self.max_length = max_length
        room = max_length - len(self.prefix) - len(self.suffix)
        if room < 1:
            raise InputError(
                f"max_length {max_length} leaves no room: the reranker's prefix and suffix alone "
                f"take {len(self.prefix) + len(self.suffix)} tokens"
            )
        self.tokenizer.enable_truncation(room)

    def _ids(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def encode(
        self, pairs: Sequence[tuple[str, str]], instruction: str = DEFAULT_INSTRUCTION
    ) -> Encoded:
        """Tokenize (query, document) pairs under an instruction.

        Raises:
            InputError: A text is not a string or not valid Unicode.
        """
        if not isinstance(instruction, str):
            raise InputError(f"the instruction should be a string, found {instruction!r}")
        check_list(pairs, "pairs should be a list of (query, document)")
        bodies = [_body(i, pair, instruction) for i, pair in enumerate(pairs)]
        encoded = _encode(self.tokenizer, bodies, lambda body: body, special=False)
        rows = [np.concatenate([self.prefix, ids, self.suffix]) for ids in encoded.ids]
        return Encoded(rows, encoded.truncated)


def _body(index: int, pair: tuple[str, str], instruction: str) -> str:
    is_one = isinstance(pair, str) or not hasattr(pair, "__len__")
    if is_one or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
        raise InputError(f"pair {index} should be (query, document), two strings; found {pair!r}")
    return reranker_body(*pair, instruction)


def _encode(
    tokenizer: Tokenizer, texts: Sequence[str], complete: Callable[[str], str], *, special: bool
) -> Encoded:
    check_list(texts, "texts should be a list of strings")
    inputs = [check_text(i, complete(check_text(i, text))) for i, text in enumerate(texts)]
    with tokenizing("the tokenizer"):
        encodings = tokenizer.encode_batch_fast(inputs, add_special_tokens=special)
    for i, encoding in enumerate(encodings):
        if special and not encoding.ids:
            raise InputError(f"the tokenizer makes no token of text {i}: leave it out")
    return Encoded(
        [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings],
        [i for i, encoding in enumerate(encodings) if encoding.overflowing],
    )


def check_list(values: Iterable[object], expected: str) -> None:
    """Refuse one string for many, and what is not many.

    Raises:
        InputError: With what was expected, in words.
    """
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        found = "one string" if isinstance(values, str) else type(values).__name__
        raise InputError(f"{expected}, found {found}")


def check_text(index: int, text: str) -> str:
    """Return the text if it can be tokenized.

    Raises:
        InputError: It is not a string, or holds a lone surrogate, which no tokenizer takes.
    """
    if not isinstance(text, str):
        raise InputError(f"text {index} should be a string, found {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"text {index} is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at "
            f"character {error.start}; repair it with text.encode('utf-8', 'replace').decode()"
        ) from None
    return text


def append_end_of_text(tokenizer: Tokenizer, path: Path) -> int:
    """Make the tokenizer end every text with `<|endoftext|>` if it does not, and return its id.

    The checkpoints' first tokenizer.json did not:
    https://github.com/QwenLM/Qwen3-Embedding/issues/54
    """
    end_id = token_id(tokenizer, END_OF_TEXT, path)
    if tokenizer.encode("a").ids[-1] != end_id:
        template = TemplateProcessing(
            single=f"$A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, end_id)]
        )
        present = tokenizer.post_processor
        tokenizer.post_processor = (
            ProcessorSequence([present, template]) if present is not None else template
        )
    return end_id


def token_id(tokenizer: Tokenizer, token: str, path: Path) -> int:
    """The id of a word that must be a single token, such as "yes".

    Raises:
        CheckpointError: The vocabulary has no such token.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise CheckpointError(f"{path}: {token!r} should be a single token, found none")
    return found
