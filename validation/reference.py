r"""The reference: the checkpoint run by transformers, by the model cards' own code.

Strings, tokenization, padding and pooling are written down here again from the model cards and
shared with no other module, so that a mistake there cannot hide here.

Embedding: "Instruct: {task}\nQuery:{query}" or the bare document, left padding, the state of the
last token after the final norm, L2 norm. Reranker: prefix, body and suffix tokenized by themselves,
the body cut, left padding, softmax over the last position's logits of "no" and "yes".
https://huggingface.co/Qwen/Qwen3-Embedding-0.6B, https://huggingface.co/Qwen/Qwen3-Reranker-0.6B
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..demo.samples import Pair, Sample
from ..errors import CheckpointError, DeviceError, InputError, require
from ..files import read_json
from ..hub import fetch
from ..progress import progress_bar
from ..runtimes.batching import choose_batch_tokens, make_batches
from ..runtimes.facts import stored_float
from ..spec import ModelSpec, Task, read_spec
from ..weights import Weights

Arithmetic = Literal["fp16", "bf16", "fp32"]

TASK = "Given a web search query, retrieve relevant passages that answer the query"
PREFIX = (
    "<|im_start|>system\n"
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".'
    "<|im_end|>\n<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
# An fp32 reference must leave room on the GPU for activations.
HEADROOM = 1.25


@dataclass(frozen=True)
class Reference:
    """A checkpoint that is ready to run.

    Attributes:
        spec: What it is and where.
        tokenizer: transformers' tokenizer of it.
        max_length: Tokens after which a text is cut.
    """

    spec: ModelSpec
    tokenizer: Any
    max_length: int


def open_reference(
    checkpoint: str | Path, *, task: Task, max_length: int, revision: str | None = None
) -> Reference:
    """Find a checkpoint, check its weights' names and shapes, and load its tokenizer.

    Args:
        checkpoint: A folder, or a hub id.
        task: What the artifact does.
        max_length: Tokens after which the artifact cuts a text.
        revision: A branch, tag or commit, for a hub id.

    Raises:
        InputError: No such folder or hub id.
        CheckpointError: It is not a Qwen3 checkpoint, or not whole.
        MissingPackageError: torch or transformers is not installed.
    """
    require("torch", "torch")
    transformers = require("transformers", "torch")
    spec = read_spec(fetch(checkpoint, revision), task)
    if spec.quantization is not None:
        raise CheckpointError(
            f"{spec.source.folder / 'config.json'}: a reference should be the original in bf16, "
            f"fp16 or fp32, found one quantized by {spec.quantization.method!r}"
        )
    if spec.score_rows is not None:
        raise CheckpointError(
            f"{spec.source.folder / 'config.json'}: a reference should have the head of its own, "
            "of which the model card takes yes and no, found a sequence-classification one"
        )
    Weights(spec)  # transformers fills in a missing tensor with random numbers
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec.source.folder, padding_side="left")
    return Reference(spec, tokenizer, max_length)


def embedding_ids(reference: Reference, samples: Sequence[Sample]) -> list[list[int]]:
    """Token ids of texts, each after its prompt (a name, or the literal text)."""
    path = reference.spec.source.folder / "config_sentence_transformers.json"
    prompts = {"query": f"Instruct: {TASK}\nQuery:", "document": ""}
    if path.exists():
        prompts |= read_json(path).get("prompts") or {}
    texts = [prompts.get(sample.prompt, sample.prompt) + sample.text for sample in samples]
    tokenizer, size = reference.tokenizer, reference.max_length
    end = _single_token(reference, "<|endoftext|>")
    if tokenizer("a")["input_ids"][-1] == end:
        return tokenizer(texts, truncation=True, max_length=size)["input_ids"]
    # The first tokenizers did not end a text, and the model card's code did.
    cut = tokenizer(texts, truncation=True, max_length=size - 1)["input_ids"]
    return [[*ids, end] for ids in cut]


def reranker_ids(reference: Reference, pairs: Sequence[Pair]) -> list[list[int]]:
    """Token ids of pairs under the model card's instruction."""
    tokenizer = reference.tokenizer
    prefix = tokenizer.encode(PREFIX, add_special_tokens=False)
    suffix = tokenizer.encode(SUFFIX, add_special_tokens=False)
    bodies = [
        f"<Instruct>: {TASK}\n<Query>: {pair.query}\n<Document>: {pair.document}" for pair in pairs
    ]
    cut = tokenizer(
        bodies,
        padding=False,
        truncation="longest_first",
        return_attention_mask=False,
        max_length=reference.max_length - len(prefix) - len(suffix),
    )["input_ids"]
    return [[*prefix, *ids, *suffix] for ids in cut]


def find_device(device: str) -> str:
    """Where the reference runs: "cuda" if torch has a GPU, unless the artifact is to run on a CPU.

    Args:
        device: As asked for the artifact.
    """
    torch = require("torch", "torch")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def choose_arithmetics(reference: Reference, device: str) -> tuple[Arithmetic, ...]:
    """What the reference is run in, the usual one first.

    On a GPU it is fp16, with fp32 beside it or, where that does not fit, bf16: an fp16 Qwen3-8B
    gives NaN by itself. On a CPU it is fp32.

    Args:
        reference: The reference.
        device: "cuda" or "cpu".
    """
    if device == "cpu":
        return ("fp32",)
    torch = require("torch", "torch")
    release_memory(device)  # the artifact's would count as taken
    fits = reference.spec.parameters * 4 * HEADROOM <= torch.cuda.mem_get_info()[0]
    return ("fp16", "fp32" if fits else "bf16")


def release_memory(device: str) -> None:
    """Give back what torch keeps on a GPU of models that are gone.

    Args:
        device: "cuda" or "cpu".
    """
    if device == "cuda":
        gc.collect()
        require("torch", "torch").cuda.empty_cache()


def describe(reference: Reference, arithmetic: Arithmetic, device: str) -> str:
    """A run's arithmetic in words."""
    words: str = arithmetic
    if arithmetic == "fp32" and stored_float(reference.spec) != "fp32":
        words = "fp32 on fp16-rounded weights"
    return f"{words}, {device}"


def run_reference(
    reference: Reference,
    rows: Sequence[Sequence[int]],
    arithmetic: Arithmetic,
    device: str,
    *,
    progress: bool = False,
) -> np.ndarray:
    """Run the reference.

    Args:
        reference: The reference.
        rows: Token ids.
        arithmetic: "fp16", "bf16", or "fp32", which rounds 16-bit weights to fp16 first; of a
            checkpoint that stores fp32 it takes these.
        device: "cuda" or "cpu".
        progress: Whether to show a progress bar on a terminal.

    Returns:
        float32: unit vectors [rows, hidden_size], or probabilities of "yes" [rows].

    Raises:
        DeviceError: The reference does not fit into the GPU's memory.
        InputError: A batch does not.
    """
    torch = require("torch", "torch")
    model = load_model(reference, arithmetic, device)
    answers = None
    if reference.spec.task == "reranker":
        answers = [_single_token(reference, "no"), _single_token(reference, "yes")]
    width = () if answers else (reference.spec.hidden_size,)
    results = np.empty((len(rows), *width), np.float32)
    description = f"Reference in {arithmetic}"
    with (
        torch.inference_mode(),
        progress_bar(description, len(rows), enabled=progress) as advance,
    ):
        for batch in make_batches([len(row) for row in rows], choose_batch_tokens(None, device)):
            inputs = _pad(reference, [rows[i] for i in batch])
            try:
                results[batch] = _answer(torch, model, inputs.to(device), answers).cpu().numpy()
            except torch.OutOfMemoryError as error:
                raise InputError(
                    f"{reference.spec.source.folder}: a batch of {len(batch)} x "
                    f"{max(len(rows[i]) for i in batch)} tokens of the reference in {arithmetic} "
                    "does not fit into the GPU's memory: give shorter texts, or use device='cpu'"
                ) from error
            advance(len(batch))
    del model
    release_memory(device)
    return results


def _answer(torch: Any, model: Any, inputs: Any, answers: Sequence[int] | None) -> Any:
    """float32 [batch, hidden_size], or probabilities [batch] with the two answers' ids."""
    if answers:
        # Of all positions' logits only the last are used: the others are not computed.
        logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1, answers]
        return torch.log_softmax(logits.float(), dim=1)[:, 1].exp()
    states = model(**inputs, use_cache=False).last_hidden_state
    return torch.nn.functional.normalize(states[:, -1].float(), p=2, dim=1)


def load_model(reference: Reference, arithmetic: Arithmetic, device: str) -> Any:
    """The checkpoint as transformers loads it, on a device; see `run_reference`.

    Raises:
        DeviceError: It does not fit into the GPU's memory.
    """
    torch = require("torch", "torch")
    transformers = require("transformers", "torch")
    kind = (
        transformers.AutoModel
        if reference.spec.task == "embedding"
        else transformers.AutoModelForCausalLM
    )
    dtype = torch.bfloat16 if arithmetic == "bf16" else torch.float16
    if arithmetic == "fp32" and stored_float(reference.spec) == "fp32":
        dtype = torch.float32
    with _no_loading_bar(transformers):
        model = kind.from_pretrained(
            reference.spec.source.folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    if arithmetic == "fp32":
        model = model.float()
    try:
        return model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"{reference.spec.source.folder}: the reference in {arithmetic} does not fit into the "
            "GPU's free memory; use device='cpu'"
        ) from error


@contextlib.contextmanager
def _no_loading_bar(transformers: Any) -> Generator[None]:
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _pad(reference: Reference, rows: list[Sequence[int]]) -> Any:
    return reference.tokenizer.pad({"input_ids": rows}, padding=True, return_tensors="pt")


def _single_token(reference: Reference, token: str) -> int:
    found = reference.tokenizer.convert_tokens_to_ids(token)
    if found is None:
        raise CheckpointError(
            f"{reference.spec.source.folder}: {token!r} should be a single token, found none"
        )
    return found
