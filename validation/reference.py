"""The reference: the results that an artifact is compared with.

They come from the checkpoint, run by its own library: `library` runs the folders that
sentence-transformers opens, `card` runs the others with transformers and the model cards' code. Or
they come from a file with the results of an earlier run: `recorded`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from ..checkpoint.spec import Task
from ..texts.samples import Pair, Sample

if TYPE_CHECKING:
    from .live import LiveReference
    from .recorded import RecordedReference

# A checkpoint's own results: computed here, or read from a file.
Reference: TypeAlias = "LiveReference | RecordedReference"
Arithmetic = Literal["fp16", "bf16", "fp32"]
Inputs = Sequence[Sample] | Sequence[Pair]


@dataclass(frozen=True)
class Origin:
    """The checkpoint behind a reference, and how it was run.

    Attributes:
        id: The checkpoint's folder or hub id.
        revision: Its commit on the hub.
        task: "embedding" or "reranker".
        library: The library that ran it: "sentence-transformers" or "transformers".
        versions: Package to version: the library and the packages it runs on.
        device: The device it ran on: "cpu" or "cuda".
        hidden_size: Width of the model.
        vocab_size: Rows of the embedding table.
        stored: Dtype of the stored weights: "fp16", "bf16" or "fp32".
        files: Name of each weight file to its sha256.
        log_odds: Whether the library returns a reranker's scores as log-odds, not probabilities.
        recorded: Day of the recording, ISO 8601; None for a reference that runs here.
        adapter: The merged adapter's folder or hub id, and revision.
        sizes: Precision to the approximate bytes of an artifact's weights; empty in files recorded
            by early versions.
    """

    id: str
    revision: str | None
    task: Task
    library: str
    versions: Mapping[str, str]
    device: str
    hidden_size: int
    vocab_size: int
    stored: str
    files: Mapping[str, str]
    log_odds: bool = False
    recorded: str | None = None
    adapter: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def pinned(self) -> str:
        """The checkpoint, its revision and its adapter, for people."""
        at = f" at {self.revision}" if self.revision else ""
        return f"{self.id}{at}" + (f" with {self.adapter}" if self.adapter else "")

    @property
    def runner(self) -> str:
        """The library and its version, for people."""
        version = self.versions.get(self.library)
        text = f"{self.library} {version}" if version else self.library
        return f"{text}, recorded {self.recorded}" if self.recorded else text

    def describe(self, arithmetic: Arithmetic) -> str:
        """A run's arithmetic and device, for people."""
        text: str = arithmetic
        if arithmetic == "fp32" and self.stored != "fp32":
            text = "fp32 on fp16-rounded weights"
        return f"{text}, {self.device}"
