r"""Text to token ids, as the checkpoint's files define it; else as Qwen's model cards do.

Embedder: the prompt, the text, and the special tokens that the tokenizer adds (`<|endoftext|>` for
Qwen's own models). Their query prompt is "Instruct: {instruction}\nQuery:" with nothing after the
colon; documents have none.
Reranker by the model card: prefix ids + body ids + suffix ids, each tokenized separately; only the
body is truncated. Reranker by sentence-transformers: the folder's chat template, or the pair as the
tokenizer joins it.

Source of the strings: https://github.com/QwenLM/Qwen3-Embedding (README.md and examples/).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as Normalizers

from ..checkpoint.chat import ChatTemplate, Message
from ..checkpoint.pipeline import ROLES, Inputs
from ..checkpoint.spec import ModelSpec
from ..checkpoint.tokenizer import load_tokenizer, tokenizing
from ..checkpoint.tokens import check_as_transformers, special_tokens
from ..errors import CheckpointError, InputError

END_OF_TEXT = "<|endoftext|>"
DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
RERANKER_PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
RERANKER_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
# Inputs of models whose files declare none: plain texts, and pairs in the model card's template.
TEXTS, INSTRUCT = Inputs(), Inputs(form="instruct")


def query_prompt(instruction: str) -> str:
    r"""The query prompt for your own instruction, in Qwen3-Embedding's format.

    >>> query_prompt("Find the statute")
    'Instruct: Find the statute\nQuery:'
    """
    return f"Instruct: {instruction}\nQuery:"


def reranker_body(query: str, document: str, instruction: str = DEFAULT_INSTRUCTION) -> str:
    """The part of a reranker's input between prefix and suffix."""
    return f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"


def resolve_prompt(inputs: Inputs, prompt: str | None) -> str:
    """The text of a prompt, given by name or literally.

    Args:
        inputs: The model's inputs.
        prompt: The name of one of its prompts; "query" or "document", which are empty if the model
            does not define them; a literal prompt; or None for the model's default prompt, if any.

    Raises:
        InputError: It is not a string, or a single word that is no known name (probably a typo).
    """
    if prompt is not None and not isinstance(prompt, str):
        raise InputError(f"a prompt should be a string, found {prompt!r}")
    named = inputs.prompt_text(prompt)
    if named is not None:
        return named
    assert prompt is not None
    if re.sub("[._-]", "", prompt).isalnum():  # other models' names are like "retrieval.query"
        names = ", ".join(sorted({*inputs.prompts, *ROLES}))
        raise InputError(
            f"no prompt is named {prompt!r}; there are {names}. A literal "
            "prompt is more than a word: embedport.query_prompt(instruction) makes one, on the "
            "command line --instruction"
        )
    return prompt


@dataclass(frozen=True)
class Encoded:
    """Token ids of a list of texts.

    Attributes:
        ids: One int64 array [tokens] per text, never empty.
        truncated: Indices of the texts that were truncated to the maximum length.
    """

    ids: list[np.ndarray]
    truncated: list[int]


class _TextTokenizer:
    """A tokenizer, configured by the checkpoint's files.

    Args:
        path: The checkpoint's or artifact's tokenizer.json.
        max_length: Maximum tokens per row.
        inputs: How inputs become tokens.

    Raises:
        CheckpointError: A tokenizer file is damaged, or asks for an unsupported feature.
    """

    def __init__(self, path: Path, max_length: int, inputs: Inputs) -> None:
        self.tokenizer = load_tokenizer(path)
        check_as_transformers(self.tokenizer, path.parent)
        self.folder, self.inputs, self.max_length = path.parent, inputs, max_length
        if inputs.lower_case:
            _lower(self.tokenizer)
        self.tokenizer.encode_special_tokens = inputs.split_special_tokens
        self.chat = None
        if inputs.form == "messages":
            self.chat = ChatTemplate(path.parent, inputs.message_format, inputs.template_values)
        self._pid = os.getpid()

    def _check_process(self) -> None:
        """In a fork, do without the tokenizer's threads: they are missing there."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def _cut_to(self, length: int) -> None:
        self.tokenizer.enable_truncation(length, direction=self.inputs.truncation_side)

    def _encode_chats(
        self,
        chat: ChatTemplate,
        chats: Sequence[list[Message]],
        make: Callable[[str], list[Message]],
    ) -> Encoded:
        """Token ids of chats.

        A truncated one gets the template's ending back, because the model reads the last position.

        Args:
            chat: The template.
            chats: The messages of each chat.
            make: Makes such messages of a text, which is all that they differ in.
        """
        texts = [check_text(i, chat.render(messages)) for i, messages in enumerate(chats)]
        encoded = _encode(self.tokenizer, texts, special=False)
        if full := [ids for ids in encoded.ids if len(ids) >= self.max_length]:
            ending = self._ending(*(chat.render(make(text)) for text in ("0", "1 2 3 4")))
            ending = ending[-self.max_length :]
            for ids in full:
                ids[len(ids) - len(ending) :] = ending
        return encoded

    def _ending(self, *rendered: str) -> np.ndarray:
        """The tokens that the template puts after a text: the common ending of two renderings."""
        first, second = map(self._whole, rendered)
        shorter = min(len(first), len(second))
        same = first[len(first) - shorter :] == second[len(second) - shorter :]
        count = shorter if same.all() else int(np.argmin(same[::-1]))
        # One rendering is the other's suffix: the text was not rendered, so no ending is known.
        return first[len(first) - count :] if count < shorter else first[:0]

    def _whole(self, text: str) -> np.ndarray:
        """Token ids of a text without truncation."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        parts = [encoding, *encoding.overflowing]
        if self.inputs.truncation_side == "left":
            parts.reverse()
        return np.asarray([i for part in parts for i in part.ids], np.int64)


class EmbeddingTokenizer(_TextTokenizer):
    """Texts to token ids for an embedder, special tokens included.

    Args:
        path: The checkpoint's or artifact's tokenizer.json.
        max_length: Maximum tokens per row, special tokens included; the text is truncated.
        inputs: How texts become tokens.
    """

    def __init__(self, path: Path, max_length: int, inputs: Inputs = TEXTS) -> None:
        super().__init__(path, max_length, inputs)
        self._cut_to(max_length)

    def encode(self, texts: Sequence[str], prompt: str = "") -> Encoded:
        """Tokenize texts, each after `prompt`, which a chat template gets as a system message.

        Raises:
            InputError: A text is not a string or not valid Unicode, or gives no token.
        """
        self._check_process()
        check_list(texts, "texts should be a list of strings")
        if (chat := self.chat) is not None:
            chats = [chat.text(check_text(i, text), prompt) for i, text in enumerate(texts)]
            return self._encode_chats(chat, chats, lambda text: chat.text(text, prompt))
        inputs = [check_text(i, prompt + check_text(i, text)) for i, text in enumerate(texts)]
        return _encode(self.tokenizer, inputs, special=True)

    def prompt_length(self, prompt: str) -> int:
        """Tokens of a prompt that are left out of pooling, counted as sentence-transformers does.

        A special token at the end does not count, if a file beside tokenizer.json names it. With a
        chat template it is 0.
        """
        if not prompt or self.chat is not None:
            return 0
        encoding = self.tokenizer.encode(prompt)
        _, special = special_tokens(self.folder)
        return len(encoding.ids) - sum(token in special for token in encoding.tokens[-1:])


class RerankerTokenizer(_TextTokenizer):
    """Pairs of texts to token ids for a reranker.

    With the model card's template a row is prefix + body + suffix, each tokenized separately. The
    body alone gets the special tokens that the tokenizer adds, as in the card's code; Qwen's own
    rerankers add none.

    Args:
        path: The checkpoint's or artifact's tokenizer.json.
        max_length: Maximum tokens per row. With the model card's template only the body is
            truncated, never the prefix or suffix.
        inputs: How pairs become tokens.
    """

    def __init__(self, path: Path, max_length: int, inputs: Inputs = INSTRUCT) -> None:
        super().__init__(path, max_length, inputs)
        room = max_length
        if inputs.form == "instruct":
            self.prefix, self.suffix = self._ids(RERANKER_PREFIX), self._ids(RERANKER_SUFFIX)
            fixed = len(self.prefix) + len(self.suffix)
            room -= fixed
            if room < 1:
                raise InputError(
                    f"`max_length` {max_length} leaves no room: the reranker's prefix and suffix "
                    f"alone take {fixed} tokens"
                )
        self._cut_to(room)

    def _ids(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def encode(self, pairs: Sequence[tuple[str, str]], instruction: str | None = None) -> Encoded:
        """Tokenize (query, document) pairs under an instruction.

        Args:
            pairs: The pairs.
            instruction: The criterion of relevance; the model's own by default. If the model
                has prompts, also the name of one.

        Raises:
            InputError: A text is not a string or not valid Unicode, or a pair gives no token.
        """
        self._check_process()
        if instruction is not None and not isinstance(instruction, str):
            raise InputError(f"the instruction should be a string, found {instruction!r}")
        check_list(pairs, "pairs should be a list of (query, document)")
        checked = [_check_pair(i, pair) for i, pair in enumerate(pairs)]
        if self.inputs.form == "instruct":
            return self._encode_bodies(checked, instruction)
        prompt = self.inputs.prompts.get(instruction or "", instruction)
        if instruction is None:
            prompt = self.inputs.prompt_text(None)
        prompt = check_text(0, prompt or "")
        if (chat := self.chat) is not None:
            chats = [chat.pair(query, document, prompt) for query, document in checked]
            encoded = self._encode_chats(chat, chats, lambda text: chat.pair(text, text, prompt))
        else:
            prompted = [(prompt + query, document) for query, document in checked]
            encoded = _encode(self.tokenizer, prompted, special=True)
        if (skipped := self.inputs.skipped_token) is None:
            return encoded
        rows = [_without_end(ids, skipped) for ids in encoded.ids]
        for i, (row, ids) in enumerate(zip(rows, encoded.ids, strict=True)):
            if len(row) < len(ids) and not self.inputs.cuts_skipped:
                raise InputError(
                    f"pair {i} ends with the padding token {skipped} (pad_token_id in "
                    "config.json): a classifier skips it there, but with is_causal false its other "
                    "tokens see it, which is not supported; take it out of the text or, if the "
                    "tokenizer appends it, make another token the padding"
                )
        return Encoded(rows, encoded.truncated)

    def _encode_bodies(self, pairs: Sequence[tuple[str, str]], instruction: str | None) -> Encoded:
        instruction = DEFAULT_INSTRUCTION if instruction is None else instruction
        bodies = [check_text(i, reranker_body(*p, instruction)) for i, p in enumerate(pairs)]
        encoded = _encode(self.tokenizer, bodies, special=True)
        rows = [np.concatenate([self.prefix, ids, self.suffix]) for ids in encoded.ids]
        return Encoded(rows, encoded.truncated)


def _lower(tokenizer: Tokenizer) -> None:
    """Lowercase texts before any other normalization, unless one of the first level already does.

    As sentence-transformers: rules nested deeper do not count.
    """
    present = tokenizer.normalizer
    if isinstance(present, Normalizers):
        rules = list(present)
    else:
        rules = [] if present is None else [present]
    if not any(isinstance(rule, Lowercase) for rule in rules):
        tokenizer.normalizer = Normalizers([Lowercase(), *rules])


def _without_end(ids: np.ndarray, skipped: int) -> np.ndarray:
    """Cut trailing `skipped` tokens off a row; at least the first token stays."""
    positions = np.flatnonzero(ids != skipped)
    return ids[: positions[-1] + 1 if len(positions) else 1]


def is_pair(value: object) -> bool:
    """Whether a value is two items in order; a dict's keys are not its texts."""
    is_other = isinstance(value, str | Mapping | Set) or not isinstance(value, Sized)
    return not is_other and len(value) == 2


def _check_pair(index: int, pair: tuple[str, str]) -> tuple[str, str]:
    if not is_pair(pair) or not all(isinstance(text, str) for text in pair):
        raise InputError(f"pair {index} should be (query, document), two strings; found {pair!r}")
    query, document = pair
    return check_text(index, query), check_text(index, document)


def _encode(
    tokenizer: Tokenizer, inputs: Sequence[str] | Sequence[tuple[str, str]], *, special: bool
) -> Encoded:
    with tokenizing("the tokenizer"):
        encodings = tokenizer.encode_batch_fast(inputs, add_special_tokens=special)
    for i, encoding in enumerate(encodings):
        if not encoding.ids:
            raise InputError(
                f"input {i} becomes no token: the text is empty, and the model's tokenizer adds no "
                "special token"
            )
    return Encoded(
        [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings],
        [i for i, encoding in enumerate(encodings) if encoding.overflowing],
    )


def check_list(values: Iterable[object], expected: str) -> None:
    """Refuse a value that is not a list of items: neither a list nor anything that is read as one.

    A dict's keys, a table's column names and a set in no order would be taken for the items.

    Raises:
        InputError: With `expected` as its text.
    """
    is_list = hasattr(values, "__iter__") and getattr(values, "ndim", 1) > 0
    if not is_list or isinstance(values, str | Mapping | Set) or hasattr(values, "columns"):
        kind = "one string" if isinstance(values, str) else type(values).__name__
        raise InputError(f"{expected}, found {kind}")


def check_text(index: int, text: str) -> str:
    """Return the text if it can be tokenized.

    Raises:
        InputError: It is not a string, or contains a lone surrogate, which tokenizers reject.
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


def find_answers(spec: ModelSpec) -> tuple[int, int | None]:
    """Token ids (yes, no) of the logits that a reranker's score is computed from.

    See `Outputs.answers`.

    Raises:
        CheckpointError: "yes" or "no" is not a token.
    """
    if spec.score_rows is not None:  # a classifier has score rows instead of token ids
        return 0, 0
    if spec.outputs.answers is not None:
        return spec.outputs.answers
    path = spec.source.pipeline / "tokenizer.json"
    tokenizer = load_tokenizer(path)
    return token_id(tokenizer, "yes", path), token_id(tokenizer, "no", path)


def token_id(tokenizer: Tokenizer, token: str, path: Path) -> int:
    """Token id of a word that must be a single token, such as "yes".

    Raises:
        CheckpointError: The vocabulary has no such token.
    """
    id_ = tokenizer.token_to_id(token)
    if id_ is None:
        raise CheckpointError(f"{path}: {token!r} should be a single token, found none")
    return id_
