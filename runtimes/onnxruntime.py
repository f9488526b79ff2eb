"""The onnxruntime backend: an artifact's graph in a session, on the device that really works."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact.folder import Artifact
from ..attention import SHORT_ROW
from ..checkpoint.pooling import Head, pool
from ..errors import ArtifactError, DeviceError, InputError, require
from ..files import MANIFEST, check_name
from ..requirements import meets
from ..tables import size_words
from .batching import limit_threads
from .exact import make_exact
from .ort_custom_ops import register_kernels
from .providers import PROVIDERS, RECORD_NODES, fallen_back, list_providers

logger = logging.getLogger(__name__)

CGROUP = Path("/sys/fs/cgroup")
# Messages of onnxruntime's arena, our kernels, CUDA, and cuBLAS or cuDNN when memory is full.
FULL = re.compile(
    "failed to allocate memory|smaller than requested bytes|bad.alloc|memory is full|out of memory|"
    "ALLOC_FAILED",
    re.IGNORECASE,
)


class OnnxModel:
    """A session of an artifact's graph: token ids in, vectors or scores out.

    Args:
        artifact: The artifact.
        device: "cpu", "cuda", "tensorrt" (onnxruntime's provider, which builds engines at its first
            batches), or "auto": CUDA where it works, otherwise the CPU.
        parsed: Called once the graph is parsed. From then on onnxruntime prepares the weights
            without holding the interpreter lock, so other Python threads can run.

    Attributes:
        device: The device that the session runs on.
        precision: The precision and the arithmetic, in words.
        continues: Whether the graph takes the keys and values of a prefix: see `read`.

    Raises:
        DeviceError: The requested device is not available, has no kernels for parts of the graph,
            or has too little memory.
        ArtifactError: onnxruntime cannot load the graph.
    """

    def __init__(
        self, artifact: Artifact, device: str = "auto", parsed: Callable[[], None] | None = None
    ) -> None:
        graph = artifact.manifest.graph
        assert graph is not None
        self._graph = graph
        self._num_heads = artifact.manifest.num_heads
        self.device, self._session = _open_session(artifact, device, parsed)
        inputs = {value.name: value.shape for value in self._session.get_inputs()}
        self.continues = "past" in inputs
        expected = {"input_ids", "attention_mask"} | ({"prompt_length"} & {*graph.inputs})
        expected |= {"past", "kept", "short"} if self.continues else set()
        outputs = {value.name: value.shape for value in self._session.get_outputs()}
        if inputs.keys() != expected or not outputs.keys() >= {*graph.outputs}:
            raise ArtifactError(
                f"{artifact.graph}: the graph should take {', '.join(sorted(expected))} and give "
                f"{', '.join(graph.outputs)}, as {MANIFEST} says; found {', '.join(inputs)} and "
                f"{', '.join(outputs)}"
            )
        _check_width(artifact, outputs[graph.outputs[0]])
        if self.continues:
            layers, heads, _, width = inputs["past"]
            self._no_past = np.zeros((layers, heads, 0, width), np.float32)
        self._outputs, self._masked = artifact.manifest.outputs, graph.masked
        self._head = None
        if graph.output == "hidden":
            self._head = Head(self._outputs, artifact.folder)
        self.precision = artifact.manifest.precision
        if _is_emulated(artifact, self.device):
            self.precision += " (on a CPU: fp32 arithmetic, each result rounded)"
        logger.info("%s runs on %s in %s", artifact.folder, self.device, self.precision)

    def __call__(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        past: np.ndarray | None = None,
        *,
        prompt_length: int = 0,
    ) -> np.ndarray:
        """Run a batch.

        Args:
            input_ids: int64 [batch, sequence].
            attention_mask: int64 [batch, sequence], 1 at real tokens; padding on either side.
            past: Keys and values of a prefix that all rows continue, from `read`; None for none.
            prompt_length: Number of leading tokens to leave out of pooling, for a model that does
                not pool its prompts.

        Returns:
            float32: embeddings [batch, dim], or scores [batch].

        Raises:
            InputError: Attention would take more memory than is available, or the batch does not
                fit into the process's or the GPU's memory.
        """
        if self.device == "cpu" and (self._graph.dialect == "standard" or self._masked):
            _check_memory(*input_ids.shape, self._num_heads)
        feeds = {"input_ids": input_ids, "attention_mask": attention_mask}
        if "prompt_length" in self._graph.inputs:
            feeds["prompt_length"] = np.array([prompt_length])
        if self.continues:
            past = self._no_past if past is None else past
            size = past.shape[2] + input_ids.shape[1]
            feeds |= _prefix_inputs(past, kept=0, short=size <= SHORT_ROW)
        output = self._run(self._graph.outputs[0], feeds)
        if self._head is None:
            return output
        return self._head(pool(output, attention_mask, self._outputs, prompt_length))

    def read(self, ids: np.ndarray, *, short: bool) -> np.ndarray:
        """Compute the keys and values of a prefix; only for a graph that `continues`.

        Args:
            ids: The prefix's token ids, int64 [tokens], at least one.
            short: Whether the full rows, prefix included, have at most SHORT_ROW tokens.

        Returns:
            Keys and values, float32 [2 * layers, num_kv_heads, tokens, head_dim].
        """
        feeds = {"input_ids": ids[None], "attention_mask": np.ones_like(ids[None])}
        feeds |= _prefix_inputs(self._no_past, kept=len(ids), short=short)
        return self._run("present", feeds)

    def _run(self, output: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
        try:
            if self.device == "cpu":
                return self._session.run([output], feeds)[0]
            return run_bound(self._session, output, feeds, "cuda")
        except Exception as error:  # onnxruntime's own classes, all of them plain Exceptions
            if not FULL.search(str(error)):
                raise
            rows, tokens = feeds["input_ids"].shape
            memory = "this process's memory" if self.device == "cpu" else "the GPU's memory"
            raise InputError(
                f"a batch of {rows} x {tokens} tokens does not fit into {memory}: use a smaller "
                "`batch_tokens`, or `max_length`"
            ) from error


def _check_width(artifact: Artifact, found: Sequence[int | str]) -> None:
    """Refuse a manifest that says other vectors than the graph gives.

    Raises:
        ArtifactError: It does.
    """
    manifest, graph = artifact.manifest, artifact.manifest.graph
    assert graph is not None
    if manifest.task != "embedding":
        return
    width, given = manifest.embedding_dim, found[-1]
    if graph.output == "hidden" and given == manifest.hidden_size:  # the rest is done behind it
        given = manifest.outputs.width(manifest.hidden_size)
    if len(found) != (3 if graph.output == "hidden" else 2) or given != width:
        raise ArtifactError(
            f"{artifact.folder / MANIFEST}: embedding_dim is {width} and the graph's output "
            f"{graph.output}, and {graph.path} gives {' x '.join(map(str, found))}: one of them "
            "was changed; export it again"
        )


def _prefix_inputs(past: np.ndarray, *, kept: int, short: bool) -> dict[str, np.ndarray]:
    """The extra inputs of a graph that takes a prefix's keys and values."""
    return {"past": past, "kept": np.array([kept]), "short": np.array(short)}


def run_bound(session: Any, output: str, feeds: dict[str, np.ndarray], memory: str) -> np.ndarray:
    """Run a session with inputs and an output bound to a device's memory.

    Each input is copied once; with `run`, every provider would copy it.

    Args:
        session: The session.
        output: The output's name.
        feeds: Inputs by name.
        memory: "cuda" or "cpu".
    """
    ort = require("onnxruntime", "gpu")
    binding = session.io_binding()
    for name, array in feeds.items():
        value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), memory, 0)
        binding.bind_ortvalue_input(name, value)
    binding.bind_output(output, memory, 0)
    session.run_with_iobinding(binding)
    return binding.copy_outputs_to_cpu()[0]


def _check_memory(batch: int, size: int, num_heads: int) -> None:
    """Refuse a batch if its attention, which holds all scores at once, would not fit in memory."""
    needed = 2 * 4 * batch * num_heads * size * size  # scores and probabilities, in fp32
    available = available_memory()
    if available is not None and needed > available:
        raise InputError(
            f"attention over {size:,} tokens takes {size_words(needed)} on a CPU in the standard "
            "dialect, or in any dialect if attention is bidirectional or has a window; "
            f"{size_words(available)} are free; load with a smaller `max_length`, or export a "
            "causal model with `dialect` ort, which takes little"
        )


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, within the container's limit.

    None if the system does not report it.
    """
    sizes = [size for size in (_read_available(), _read_container_available()) if size is not None]
    return min(sizes, default=None)


def _read_available() -> int | None:
    """The machine's available bytes; None if it does not report them."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None
    )


def _read_container_available() -> int | None:
    """Bytes that the container may still allocate (cgroup v2); None without a limit."""
    try:
        limit, used, lines = (
            (CGROUP / f"memory.{name}").read_text(encoding="ascii")
            for name in ("max", "current", "stat")
        )
        sizes = dict(line.split() for line in lines.splitlines())
        # The page cache counts as used, but the kernel frees it on demand.
        cached = int(sizes["active_file"]) + int(sizes["inactive_file"])
        return max(0, int(limit) - int(used) + cached)
    except (OSError, ValueError, KeyError):  # "max" means no limit
        return None


def check_device(device: str) -> None:
    """Check a device's name.

    Raises:
        InputError: It is unknown; the message lists the valid names.
    """
    if device not in (*PROVIDERS, "auto"):
        raise InputError(f"device should be auto, {', '.join(PROVIDERS)}; found {device!r}")


def _open_session(
    artifact: Artifact, device: str, parsed: Callable[[], None] | None
) -> tuple[str, Any]:
    check_device(device)
    ort = require("onnxruntime", "cpu")
    needed = artifact.manifest.requires
    if needed.startswith("onnxruntime") and not meets(needed, ort.__version__):
        raise ArtifactError(
            f"{artifact.graph}: needs {needed}, found {ort.__version__}, which may take it and "
            f"compute something else: pip install '{needed}'"
        )
    available = ort.get_available_providers()
    if device == "auto":
        if PROVIDERS["cuda"] in available:
            session = _create_session(ort, artifact, "cuda", parsed)
            if session.get_providers()[0] != PROVIDERS["cuda"]:
                logger.warning(
                    "onnxruntime has CUDA built in but found no working GPU: using the CPU"
                )
            elif nodes := fallen_back(session):
                logger.warning("CUDA has no kernels for %s: using the CPU", _summarize(nodes))
            else:
                return "cuda", session
        return "cpu", _create_session(ort, artifact, "cpu", parsed)
    if PROVIDERS[device] not in available:
        raise DeviceError(
            f"this onnxruntime has no {PROVIDERS[device]} (it has {', '.join(available)}): "
            "pip uninstall onnxruntime, then pip install 'embedport[gpu]'; or use device='cpu'"
        )
    session = _create_session(ort, artifact, device, parsed)
    if session.get_providers()[0] != PROVIDERS[device]:
        raise DeviceError(
            f"{PROVIDERS[device]} could not start on this machine (no GPU, or its libraries are "
            "missing; onnxruntime's log says which); use device='cpu'"
        )
    if device != "cpu" and (nodes := fallen_back(session)):
        raise DeviceError(
            f"{artifact.graph}: {PROVIDERS[device]} has no kernels for {_summarize(nodes)}, which "
            "would run on the CPU; export with `precision` bf16 or `arithmetic` bf16 (GPUs have no "
            "int8 activations in the ort dialect), or use device='cpu'"
        )
    return device, session


def _summarize(nodes: list[str]) -> str:
    return f"{len(nodes)} nodes, such as {nodes[0]}" if len(nodes) > 1 else nodes[0]


def _create_session(
    ort: Any, artifact: Artifact, device: str, parsed: Callable[[], None] | None
) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    limit_threads(options)
    path = _choose_graph(artifact, device, ort.__version__)
    check_name(path)
    graph: str | bytes = str(path)
    if _is_emulated(artifact, device):
        graph = _emulated(artifact.graph)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(artifact.graph.parent)
        )
    if device == "cpu":
        register_kernels(options)
        make_exact(options, artifact)
    else:
        options.add_session_config_entry(RECORD_NODES, "1")
        _load_cuda(ort)
    try:
        return ort.InferenceSession(
            graph,
            options,
            providers=list_providers(device, artifact),
            disabled_optimizers=_notify_when_read(parsed),
        )
    except Exception as error:  # onnxruntime's own classes, all of them plain Exceptions
        if device != "cpu" and FULL.search(str(error)):
            raise DeviceError(
                f"{path} does not fit into the GPU's free memory; use device='cpu'"
            ) from error
        raise ArtifactError(
            f"{path}: onnxruntime {ort.__version__} does not take the graph "
            f"(it needs {artifact.manifest.requires}): {error}"
        ) from error


def _notify_when_read(parsed: Callable[[], None] | None) -> Iterator[str]:
    """An empty iterator that calls `parsed` when it is first read.

    onnxruntime reads its list of disabled optimizers after it has parsed the graph, which holds the
    interpreter lock, and before it prepares the weights, which takes longer and does not hold it.
    """
    if parsed is not None:
        parsed()
    yield from ()


def _load_cuda(ort: Any) -> None:
    """Load CUDA's libraries from where pip installs them, unless they are already loaded."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        ort.preload_dlls()
    logger.debug("onnxruntime.preload_dlls: %s", output.getvalue())


def _choose_graph(artifact: Artifact, device: str, version: str) -> Path:
    """The graph that takes a prefix, if the artifact has one and this onnxruntime supports it."""
    graph = artifact.manifest.graph
    assert graph is not None
    continuation = graph.continuation
    if device == "cpu" and continuation is not None and meets(continuation.requires, version):
        return artifact.folder / continuation.path
    return artifact.graph


def _is_emulated(artifact: Artifact, device: str) -> bool:
    graph = artifact.manifest.graph
    assert graph is not None
    return device == "cpu" and graph.arithmetic != "fp32"


def _emulated(path: Path) -> bytes:
    import onnx_ir as ir

    from ..artifact.segments import emulate_16_bits

    model = ir.load(path)
    emulate_16_bits(model)
    return ir.to_proto(model).SerializeToString()
