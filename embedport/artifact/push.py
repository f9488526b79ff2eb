"""Publishes an artifact on the Hugging Face hub, in one commit, with the hub's metadata."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.hub import HUB_ID
from ..errors import ArtifactError, InputError
from ..files import MANIFEST
from ..strict_json import load_json
from .card import task_results
from .folder import CARD, Artifact
from .manifest import Manifest

PIPELINES = {"embedding": "sentence-similarity", "reranker": "text-ranking"}
# Consumers that are libraries on the hub, which finds their models by a tag of this name.
LIBRARIES = ("sentence-transformers", "transformers.js", "openvino")
UNQUANTIZED = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Publication:
    """The files and texts of one commit on the hub.

    Attributes:
        repo_id: The repository, "owner/name".
        files: Path in the repository to the local file.
        manifest: The text of embedport.json.
        card: The text of README.md.
        size: Bytes of the files.
    """

    repo_id: str
    files: Mapping[str, Path]
    manifest: str
    card: str
    size: int


def has_token() -> bool:
    """Whether the hub's client has a token: from `hf auth login` or HF_TOKEN."""
    from huggingface_hub import get_token

    return get_token() is not None


def prepare(folder: str | Path, repo_id: str, *, license: str | None = None) -> Publication:
    """Put together what is sent; the hub is asked for the base's license only.

    A local checkpoint or adapter that the artifact was made from or compared with is named without
    its folder: paths tell of a machine and its user.

    Args:
        folder: The artifact's folder.
        repo_id: The repository, "owner/name".
        license: The license's identifier; by default the base model's, if the hub says it.

    Raises:
        InputError: There is no such folder, or the repository's name is not of the form owner/name.
        ArtifactError: It is not an artifact, or a file is missing or changed.
    """
    if not HUB_ID.fullmatch(repo_id):
        raise InputError(f"a repository should be of the form owner/name, found {repo_id!r}")
    artifact = Artifact.open(folder)
    files = {name: artifact.folder / name for name in artifact.manifest.files}
    values = load_json(artifact.folder / MANIFEST)
    paths = _local_sources(artifact.manifest)
    values |= {key: _without_folders(values[key], paths) for key in ("source", "parity")}
    manifest = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    return Publication(repo_id, files, manifest, _card(artifact, repo_id, license), artifact.size)


def push(publication: Publication, *, private: bool | None = None) -> str:
    """Create the repository if there is none, and send everything in one commit.

    Args:
        publication: From `prepare`.
        private: Whether a new repository is private; the account's default if None.

    Returns:
        The commit's address.

    Raises:
        InputError: The hub refuses it or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(name, str(path)) for name, path in publication.files.items()]
    operations.append(CommitOperationAdd(MANIFEST, publication.manifest.encode()))
    operations.append(CommitOperationAdd(CARD, publication.card.encode()))
    api = HfApi(library_name="embedport")
    try:
        api.create_repo(publication.repo_id, private=private, exist_ok=True)
        commit = api.create_commit(
            publication.repo_id, operations, commit_message="Upload by embedport"
        )
    except Exception as error:  # network libraries raise their own classes
        said = " ".join(str(error).split())
        raise InputError(
            f"{publication.repo_id} was not pushed: {type(error).__name__}: {said}"
        ) from error
    return commit.commit_url


def _card(artifact: Artifact, repo_id: str, license: str | None) -> str:
    """The artifact's card with the hub's metadata before it."""
    from huggingface_hub import ModelCardData

    manifest = artifact.manifest
    base = _hub_bases(manifest)
    if license is None and base:
        license = _license(base[0])
    quantized = manifest.precision not in UNQUANTIZED
    try:
        results = _results(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{artifact.folder / MANIFEST}: parity is not what `embedport validate` wrote "
            f"({error!r}): validate the artifact again"
        ) from error
    data = ModelCardData(
        base_model=(base[0] if len(base) == 1 else base) or None,
        base_model_relation="quantized" if base and quantized else None,
        library_name="onnx" if manifest.graph is not None else "transformers",
        license=license,
        pipeline_tag=PIPELINES[manifest.task],
        tags=_tags(manifest),
        model_name=repo_id.partition("/")[2],
        eval_results=results or None,
    )
    path = artifact.folder / CARD
    body = path.read_text(encoding="utf-8") if path.is_file() else f"# {repo_id}\n"
    body = re.sub(r"\A---\n.*?\n---\n+", "", body, flags=re.DOTALL)
    # The card's code opens the artifact by its folder; from the hub, by its id.
    body = body.replace(f'("{artifact.folder.resolve().name}"', f'("{repo_id}"')
    body = _without_folders(body, _local_sources(manifest))
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _sources(manifest: Manifest) -> list[str]:
    """Folders or hub ids of the checkpoint and the adapter that the artifact was made from."""
    adapter = manifest.source.adapter
    return [manifest.source.id, *([] if adapter is None else [adapter.id])]


def _hub_bases(manifest: Manifest) -> list[str]:
    return list(filter(_is_on_hub, _sources(manifest)))


def _is_on_hub(name: str) -> bool:
    """Whether it is a hub id, perhaps with a revision, and no folder here."""
    id_ = name.partition("@")[0]
    return HUB_ID.fullmatch(id_) is not None and not Path(id_).exists()


def _local_sources(manifest: Manifest) -> list[str]:
    """Paths with a folder part, which tells of a machine: of sources, and of a validation's."""
    # "CHECKPOINT at REVISION with ADAPTER"
    reference = re.split(" at | with ", str((manifest.parity or {}).get("reference", "")))
    named = dict.fromkeys([*_sources(manifest), *(manifest.source.original or ()), *reference])
    return [name for name in named if len(Path(name).parts) > 1 and not _is_on_hub(name)]


def _without_folders(value: Any, paths: Sequence[str]) -> Any:
    """A JSON value whose texts have only the names of these paths."""
    if isinstance(value, str):
        for path in paths:
            value = value.replace(path, Path(path).name)
    elif isinstance(value, list):
        value = [_without_folders(item, paths) for item in value]
    elif isinstance(value, dict):
        value = {key: _without_folders(item, paths) for key, item in value.items()}
    return value


def _license(base: str) -> str | None:
    from huggingface_hub import model_info

    # Offline, gated or gone: the caller is told that none is known.
    with contextlib.suppress(Exception):
        card = model_info(base).card_data
        return None if card is None else card.license
    return None


def _tags(manifest: Manifest) -> list[str]:
    runtime = ["onnx", "onnxruntime"] if manifest.graph is not None else []
    engine = ["tensorrt"] if manifest.engine is not None else []
    shared = None if manifest.graph is None else manifest.graph.shared
    opened_by = [name for name in LIBRARIES if shared is not None and name in shared.consumers]
    return ["embedport", "qwen3", *runtime, *opened_by, *engine, manifest.precision, manifest.task]


def _results(manifest: Manifest) -> list[Any]:
    """The last validation's gates and scores as the hub's evaluation results."""
    from huggingface_hub import EvalResult

    parity = manifest.parity
    if parity is None:
        return []
    gates = [
        EvalResult(
            task_type=PIPELINES[manifest.task],
            dataset_type="parity",
            dataset_name=f"{parity['inputs']} inputs, against {parity['library']}",
            metric_type=re.sub(r"[^a-z0-9]+", "_", gate["name"].lower()).strip("_"),
            metric_name=gate["name"],
            metric_value=gate["value"],
        )
        for gate in parity["gates"]
        if gate["value"] is not None
    ]
    return gates + task_results(manifest)
