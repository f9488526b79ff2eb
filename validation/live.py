"""A reference that runs here, in torch: the base class of `CardReference` and `LibraryReference`.

On a GPU it runs in fp16 and again in fp32, or in bf16 if fp32 does not fit: Qwen3-8B itself gives
NaN in fp16. On a CPU it runs in fp32 on weights rounded to fp16, or on the weights as they are if
any is stored in fp32.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ..checkpoint.lora import open_floats
from ..checkpoint.pooling import DENSE_FILE
from ..checkpoint.spec import ModelSpec
from ..checkpoint.tensor_files import read_shard
from ..errors import DeviceError, InputError, require
from ..integrity import record_files
from ..progress import progress_bar
from ..quantize.formats import artifact_bytes
from ..requirements import installed_versions
from ..runtimes.batching import choose_batch_tokens, make_batches
from ..runtimes.info import stored_float
from ..texts.beir import RetrievalSet
from ..texts.ranking import Vectors, candidate_pairs
from ..texts.samples import Pair, Sample
from .adapted import merge_adapter, open_folder
from .reference import Arithmetic, Inputs, Origin
from .retrieval import SetQuality, score_quality, vector_quality
from .settings import LAYERS, TOKENIZER, Settings, layer_settings, tokenizer_settings
from .table import TableSketch, sketch_table
from .tensors import Tensors, read_tensors

# An fp32 reference needs this multiple of its weights' size on the GPU, for activations.
HEADROOM = 1.25


class LiveReference(ABC):
    """A checkpoint and the library that runs it.

    Args:
        spec: The checkpoint. Only its location and sizes are used, not how it pools or prompts.
        max_length: Tokens after which an input is cut; None for the library's own limit.
        device: "cpu" or "cuda".

    Attributes:
        library: The library's name on PyPI.
        packages: The library and the packages it runs on.
        tokenizer: The checkpoint's tokenizer in transformers.
        folder: The folder that the library opens: the base's weights and the files beside them.
    """

    library: str
    packages: tuple[str, ...]
    tokenizer: Any

    def __init__(self, spec: ModelSpec, max_length: int | None, device: str) -> None:
        self.spec, self.max_length, self.device = spec, max_length, device
        self.folder = open_folder(spec, self)
        weights = open_floats(spec)  # checks names: libraries fill a missing tensor randomly
        self.origin = Origin(
            id=spec.source.id,
            revision=spec.source.revision,
            task=spec.task,
            library=self.library,
            versions=installed_versions(self.packages),
            device=device,
            hidden_size=spec.hidden_size,
            vocab_size=spec.vocab_size,
            stored=widest_float(spec),
            files={
                path.name: record.sha256 for path, record in record_files(weights.files).items()
            },
            log_odds=self.gives_log_odds(),
            adapter=None if spec.source.adapter is None else spec.source.adapter.pinned,
            sizes=artifact_bytes(spec),
        )

    @property
    @abstractmethod
    def own_limit(self) -> int:
        """Tokens after which the library cuts an input of its own accord."""

    @property
    def limit(self) -> int:
        """Tokens after which an input is cut: as requested, or the library's own limit."""
        return self.own_limit if self.max_length is None else self.max_length

    @abstractmethod
    def gives_log_odds(self) -> bool:
        """Whether the library returns a reranker's scores as log-odds."""

    @abstractmethod
    def token_ids(self, inputs: Inputs) -> list[list[int]]:
        """Each input's token ids, as the library passes them to its model."""

    @abstractmethod
    def load(self, arithmetic: Arithmetic) -> Any:
        """Load the model with the library, onto the device.

        Raises:
            DeviceError: It does not fit into the GPU's memory.
        """

    def adapted(self, model: Any, arithmetic: Arithmetic) -> Any:
        """Merge the adapter, if there is one, into transformers' model of the base, with PEFT.

        Raises:
            CheckpointError: PEFT cannot merge the adapter.
        """
        if self.spec.adapter is None:
            return model
        return merge_adapter(model.float() if arithmetic == "fp32" else model, self.spec.adapter)

    @abstractmethod
    def answer(self, model: Any, inputs: Inputs, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Run one batch: float32 vectors [inputs, dim] or probabilities [inputs].

        Args:
            model: From `load`.
            inputs: Inputs of one group.
            rows: Their token ids.
        """

    @abstractmethod
    def layers_of(self, model: Any) -> Any:
        """The module with `embed_tokens` and `layers` in a model from `load`."""

    def groups(self, inputs: Inputs) -> Iterable[list[int]]:
        """Groups of indices of inputs that may share a batch."""
        yield list(range(len(inputs)))

    def arithmetics(self) -> tuple[Arithmetic, ...]:
        """The arithmetics it runs in, the usual one first."""
        if self.device == "cpu":
            return ("fp32",)
        torch = require("torch", "torch")
        release_memory(self.device)  # memory cached for the artifact would count as used
        fits = self.spec.parameters * 4 * HEADROOM <= torch.cuda.mem_get_info()[0]
        return ("fp16", "fp32" if fits else "bf16")

    def run(self, inputs: Inputs, arithmetic: Arithmetic, *, progress: bool = False) -> np.ndarray:
        """Run the checkpoint.

        Args:
            inputs: Texts or pairs.
            arithmetic: "fp16", "bf16" or "fp32". In "fp32", weights are first rounded to fp16,
                unless any is stored in fp32.
            progress: Show a progress bar on a terminal.

        Returns:
            float32: vectors [inputs, dim], or probabilities [inputs].

        Raises:
            DeviceError: The reference does not fit into the GPU's memory.
            InputError: A batch does not fit.
        """
        answer = self.opened(arithmetic, progress=progress)
        results = answer(inputs)
        del answer
        release_memory(self.device)
        return results

    def opened(
        self, arithmetic: Arithmetic, *, progress: bool = False
    ) -> Callable[[Inputs], np.ndarray]:
        """Load the model for several runs: gives a function of the inputs, as `run` is.

        The model stays in memory as long as the function.

        Args:
            arithmetic: As for `run`.
            progress: As for `run`.
        """
        model = self.load(arithmetic)
        return lambda inputs: self._answers(
            model, inputs, self.token_ids(inputs), arithmetic, progress
        )

    def _answers(
        self,
        model: Any,
        inputs: Inputs,
        rows: Sequence[Sequence[int]],
        arithmetic: Arithmetic,
        progress: bool,
    ) -> np.ndarray:
        """Run a loaded model on all inputs, in batches."""
        torch = require("torch", "torch")
        budget = choose_batch_tokens(None, self.device)
        results: np.ndarray | None = None
        description = f"Reference in {arithmetic}"
        with (
            torch.inference_mode(),
            progress_bar(description, len(rows), enabled=progress) as advance,
        ):
            for group in self.groups(inputs):
                for positions in make_batches([len(rows[i]) for i in group], budget):
                    batch = [group[position] for position in positions]
                    batch_inputs: Any = [inputs[i] for i in batch]
                    try:
                        answers = self.answer(model, batch_inputs, [rows[i] for i in batch])
                    except torch.OutOfMemoryError as error:
                        raise InputError(
                            f"{self.folder}: a batch of {len(batch)} x "
                            f"{max(len(rows[i]) for i in batch)} tokens of the reference in "
                            f"{arithmetic} does not fit into the GPU's memory: give shorter "
                            "texts, or use device='cpu'"
                        ) from error
                    if results is None:
                        results = np.empty((len(rows), *answers.shape[1:]), np.float32)
                    results[batch] = answers
                    advance(len(batch))
        assert results is not None
        return results

    def encode_set(
        self, data: RetrievalSet, arithmetic: Arithmetic, *, progress: bool = False
    ) -> Vectors:
        """Vectors of a retrieval set: queries [n, dim] and documents [m, dim]."""
        samples = [Sample(text, "query") for text in data.queries.values()]
        samples += [Sample(text, "document") for text in data.documents.values()]
        vectors = self.run(samples, arithmetic, progress=progress)
        return vectors[: len(data.queries)], vectors[len(data.queries) :]

    def score_set(
        self, data: RetrievalSet, arithmetic: Arithmetic, *, progress: bool = False
    ) -> np.ndarray:
        """Probabilities of a retrieval set's candidates, [pairs]."""
        pairs = [Pair(*pair) for pair in candidate_pairs(data)]
        return self.run(pairs, arithmetic, progress=progress)

    def measure(
        self,
        data: RetrievalSet,
        dims: Sequence[int],
        arithmetic: Arithmetic,
        *,
        progress: bool = False,
    ) -> SetQuality:
        """Retrieval quality on a retrieval set.

        Args:
            data: The retrieval set.
            dims: MRL dimensions to rank by; (0,) for a reranker.
            arithmetic: As for `run`.
            progress: As for `run`.
        """
        if self.spec.task == "reranker":
            return score_quality(self.score_set(data, arithmetic, progress=progress), data)
        return vector_quality(self.encode_set(data, arithmetic, progress=progress), dims, data)

    def hidden_states(self, rows: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """Hidden states after the embedding table and each layer, in the last of `arithmetics()`.

        Args:
            rows: Token ids, int64 [tokens] each.

        Returns:
            A list of rows for each layer, float32 [tokens, hidden_size]; the last layer's come
            before the final norm.
        """
        model = self.load(self.arithmetics()[-1])
        states = watch_layers(self.layers_of(model), rows, self.device)
        del model
        release_memory(self.device)
        return states

    def final_norm(self) -> np.ndarray:
        """The gains of the final norm, float32 [hidden_size]."""
        return open_floats(self.spec, ["norm.weight"]).read_fp32("norm.weight")

    def settings(self) -> Settings:
        """The settings that its library read beside the weights."""
        return {
            "positions": self.spec.max_position_embeddings,
            "max_length": self.own_limit,
            LAYERS: layer_settings(self.spec),
            TOKENIZER: tokenizer_settings(self.tokenizer.backend_tokenizer),
            **self.declared(),
        }

    @abstractmethod
    def declared(self) -> Settings:
        """The settings that the library read; without those that it knows nothing of."""

    def table(self) -> TableSketch:
        """The embedding table, sketched."""
        return sketch_table(self.spec)

    def tensors(self) -> Tensors:
        """The tensors that are not rounded to few bits."""
        return read_tensors(self.spec)


def find_device(device: str) -> str:
    """The reference's device: "cuda" if torch has a GPU and the artifact's device is not "cpu".

    Args:
        device: The artifact's device, as requested.
    """
    torch = require("torch", "torch")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def release_memory(device: str) -> None:
    """Free the GPU memory that torch caches for deleted models.

    Args:
        device: "cuda" or "cpu".
    """
    if device == "cuda":
        gc.collect()
        require("torch", "torch").cuda.empty_cache()


def widest_float(spec: ModelSpec) -> str:
    """The stored dtype, "fp16", "bf16" or "fp32"; "fp32" if any tensor that runs is stored so.

    Rounded to fp16, fp32 norms beside 16-bit matrices, or a Dense module in fp32, are others.
    """
    dense = [spec.source.pipeline / module.path / DENSE_FILE for module in spec.outputs.dense]
    tensors = [*open_floats(spec, spec.tensor_shapes()).tensors.values()]
    tensors += [tensor for path in dense for tensor in read_shard(path).values()]
    is_wide = any(tensor.dtype == "F32" for tensor in tensors)
    return "fp32" if is_wide else stored_float(spec)


def choose_dtype(spec: ModelSpec, arithmetic: Arithmetic) -> Any:
    """The torch dtype in which weights are loaded; fp32 arithmetic converts them afterwards."""
    torch = require("torch", "torch")
    if arithmetic == "bf16":
        return torch.bfloat16
    if arithmetic == "fp32" and widest_float(spec) == "fp32":
        return torch.float32
    return torch.float16


def cast_and_move(model: Any, spec: ModelSpec, arithmetic: Arithmetic, device: str) -> Any:
    """Convert a loaded model to an arithmetic and move it to a device.

    Raises:
        DeviceError: It does not fit into the GPU's memory.
    """
    torch = require("torch", "torch")
    if arithmetic == "fp32":
        model = model.float()
    try:
        return model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"{spec.source.folder}: the reference in {arithmetic} does not fit into the "
            "GPU's free memory; use device='cpu'"
        ) from error


def watch_layers(base: Any, rows: Sequence[np.ndarray], device: str) -> list[list[np.ndarray]]:
    """Hidden states after the embedding table and after each layer of a transformers model.

    Forward hooks record them: transformers' `output_hidden_states` returns the last layer's states
    only after the final norm.

    Args:
        base: The module with `embed_tokens` and `layers`.
        rows: Token ids, int64 [tokens] each.
        device: The module's device.

    Returns:
        A list of rows for each layer, float32 [tokens, hidden_size].
    """
    torch = require("torch", "torch")
    modules = [base.embed_tokens, *base.layers]
    states: list[list[np.ndarray]] = [[] for _ in modules]

    def keep(layer: int, output: Any) -> None:
        # Earlier versions of transformers return a tuple.
        hidden = output[0] if isinstance(output, tuple) else output
        states[layer].append(hidden[0].float().cpu().numpy())

    for layer, module in enumerate(modules):
        module.register_forward_hook(lambda _, __, output, layer=layer: keep(layer, output))
    with torch.inference_mode():
        for ids in rows:
            base(input_ids=torch.from_numpy(ids)[None].to(device), use_cache=False)
    return states
