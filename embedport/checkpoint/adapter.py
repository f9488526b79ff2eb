"""A LoRA adapter as PEFT saves it: adapter_config.json and adapter_model.safetensors.

It follows PEFT 0.21: `LoraConfig` for the keys, `LoraLayer.update_layer` for the scaling,
`PeftModel.merge_and_unload` for the result; `peft_names` says which modules the keys name.

    W + scaling * B @ A,  scaling = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

Other methods and variants are refused, and so is a file whose tensors do not match its
configuration. PEFT only warns about some of the mismatches.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..strict_json import read_json
from .keys import ADAPTER_NEUTRAL, ADAPTER_NOTES, ADAPTER_READ, refuse_unknown, shown
from .peft_names import MOST_NAMES, ConfiguredNames
from .tensor_files import TensorInfo, read_shard

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# PEFT's prefix of a module's name.
PREFIX = "base_model.model."
# Suffixes of the low-rank pair's names, for a linear layer and for an embedding table.
PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
}
WHOLE = re.compile(r"(.+?)(?:\.base_layer)?\.(weight|bias)")
# Initializations that leave the base unchanged. The others change the base's weights each time PEFT
# loads the adapter.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
DTYPES = ("BF16", "F16", "F32")
# Limit of a rank or an alpha; it also excludes NaN and infinity.
LARGEST = 1e9


@dataclass(frozen=True)
class Lora:
    """The low-rank update of one matrix.

    Attributes:
        a: lora_A, [rank, inputs]; for an embedding table lora_embedding_A, [rank, rows].
        b: lora_B, [outputs, rank]; for an embedding table lora_embedding_B, [columns, rank].
        scaling: The factor of B @ A, which is transposed for an embedding table.
        is_table: Whether the matrix is an embedding table.
    """

    a: TensorInfo
    b: TensorInfo
    scaling: float
    is_table: bool


@dataclass(frozen=True)
class Merge:
    """An adapter's changes to its base, by the names of `ModelSpec.tensor_shapes`.

    Attributes:
        added: Tensor name to its low-rank update.
        replaced: Tensor name to the tensor that replaces the base's.
    """

    added: Mapping[str, Lora]
    replaced: Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Adapter:
    """An adapter's configuration, and the location of its tensors.

    Attributes:
        folder: The adapter's folder.
        values: The contents of adapter_config.json.
        rank: r, the rank of modules that rank_pattern does not name.
        alpha: lora_alpha, for modules that alpha_pattern does not name.
        pairs: Module (as named in the model it was trained on) to {"A": …, "B": …}.
        whole: Tensor name in that model to its full replacement (modules_to_save).
    """

    folder: Path
    values: Mapping[str, Any]
    rank: int
    alpha: float
    pairs: Mapping[str, Mapping[str, TensorInfo]]
    whole: Mapping[str, TensorInfo]

    @property
    def _names(self) -> ConfiguredNames:
        return ConfiguredNames(self.folder / CONFIG, self.values)

    @property
    def has_prefix(self) -> bool:
        """Whether it was trained on a model with a head, whose names begin with "model."."""
        return any(
            name.startswith(("model.", "lm_head", "score")) for name in (*self.pairs, *self.whole)
        )

    @property
    def labels(self) -> int | None:
        """Rows of its classifier head; None if it has none."""
        info = self.whole.get("score.weight")
        if info is None:
            return None
        return info.shape[0] if info.shape else 0  # a scalar, which is refused

    @property
    def has_lm_head(self) -> bool:
        """Whether it replaces the base's lm_head."""
        return "lm_head.weight" in self.whole and "lm_head" not in self.pairs

    @property
    def targets(self) -> tuple[str, ...]:
        """The modules that it changes, without layer numbers, such as "q_proj" and "score"."""
        modules = {*self.pairs, *(name.rpartition(".")[0] for name in self.whole)}
        return tuple(sorted({module.rpartition(".")[2] for module in modules}))

    def plan(self, shapes: Mapping[str, tuple[int, ...]], *, embeds: bool, is_tied: bool) -> Merge:
        """Plan the merge into a base, and check each tensor.

        Args:
            shapes: Name to shape of the tensors of the base and of the adapter's own head.
            embeds: Whether the model has no head, so that changes to an lm_head are ignored.
            is_tied: Whether the base's lm_head is its embedding table.

        Raises:
            CheckpointError: A tensor is missing, unknown or has the wrong shape; or PEFT's result
                is ambiguous.
        """
        self._check_pairs(shapes)
        self._check_whole(shapes, embeds)
        replaced = {_tensor(name): info for name, info in self.whole.items()}
        added = {f"{_tensor(module)}.weight": module for module in self.pairs}
        # PEFT's merge changes the shared tensor in place, even if the head is not used.
        tied_names = {"lm_head.weight"} if embeds else {"lm_head.weight", "embed_tokens.weight"}
        if is_tied and tied_names & ({*added} if embeds else {*added, *replaced}):
            raise CheckpointError(
                f"{self.folder / WEIGHTS} changes embed_tokens or lm_head, which are one tensor in "
                "the base (tie_word_embeddings): PEFT's results differ there before and after "
                "merging; give a base that stores an lm_head of its own"
            )
        return Merge(
            {name: self._lora(added[name], shapes[name]) for name in added if name in shapes},
            {name: info for name, info in replaced.items() if name in shapes},
        )

    def _check_pairs(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse low-rank pairs that do not match the configuration's target modules."""
        modules = self._modules(shapes)
        targets = {module for module in modules if self._names.targets(module)}
        for module in sorted(targets ^ self.pairs.keys()):
            has = module in self.pairs
            note = "" if module in modules else ", and is no matrix of this model"
            raise CheckpointError(
                f"{self.folder / WEIGHTS}: {module} {'has' if has else 'should have'} lora_A and "
                f"lora_B, and target_modules of {CONFIG} {'do not name it' if has else 'name it'}"
                f"{note}: {shown(self.values['target_modules'])}"
            )

    def _check_whole(self, shapes: Mapping[str, tuple[int, ...]], embeds: bool) -> None:
        """Refuse replacement tensors that the model lacks, and missing ones of modules_to_save."""
        path = self.folder / WEIGHTS
        replacements = {_tensor(name): info for name, info in self.whole.items()}
        for tensor in shapes:
            module = self._model_name(tensor).rpartition(".")[0]
            if tensor not in replacements and self._names.saves(module):
                raise CheckpointError(
                    f"{path} lacks {PREFIX}{self._model_name(tensor)}, of the modules_to_save of "
                    f"{CONFIG}"
                )
        for tensor, info in replacements.items():
            if tensor in shapes:
                _check(info, shapes[tensor])
            elif not (tensor.startswith("lm_head.") and (embeds or "lm_head" in self.pairs)):
                raise CheckpointError(
                    f"{path}: tensor {info.name} belongs to no module of this model; the adapter "
                    "was trained on another base or task"
                )

    def _model_name(self, name: str) -> str:
        """A tensor's or module's name in the model that the adapter was trained on."""
        is_head = name.startswith(("lm_head", "score"))
        return f"model.{name}" if self.has_prefix and not is_head else name

    def _modules(self, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
        """Names of the linear layers and embedding tables of the model it was trained on."""
        names = {key.removesuffix(".weight") for key, shape in shapes.items() if len(shape) == 2}
        if not self.has_prefix:
            return names - {"lm_head", "score"}
        if "score" not in names:
            names.add("lm_head")
        return {self._model_name(module) for module in names}

    def _lora(self, module: str, shape: tuple[int, ...]) -> Lora:
        parts = self.pairs[module]
        if parts.keys() != {"A", "B"}:
            raise CheckpointError(
                f"{self.folder / WEIGHTS}: {module} should have lora_A and lora_B, found "
                f"lora_{next(iter(parts))} only"
            )
        rank = self._names.by_pattern("rank_pattern", module, self.rank)
        alpha = self._names.by_pattern("alpha_pattern", module, self.alpha)
        is_table = "lora_embedding_" in parts["A"].name
        if is_table != module.endswith("embed_tokens"):
            raise CheckpointError(
                f"{self.folder / WEIGHTS}: tensor {parts['A'].name} should be named like that of "
                f"{'a linear layer' if is_table else 'an embedding table'}"
            )
        outputs, inputs = reversed(shape) if is_table else shape
        _check(parts["A"], (rank, inputs))
        _check(parts["B"], (outputs, rank))
        scaling = alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)
        return Lora(parts["A"], parts["B"], scaling, is_table)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def read_base(folder: Path) -> tuple[str, str | None]:
    """(base, revision) from adapter_config.json; the base is a folder or hub id.

    Raises:
        CheckpointError: It names no base.
    """
    values = read_json(folder / CONFIG)
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{folder / CONFIG}: base_model_name_or_path should name the base, found "
            f"{shown(base)}; give the base, and {folder} as `adapter`"
        )
    if not isinstance(revision, str | None):
        raise CheckpointError(
            f"{folder / CONFIG}: revision should be a text, found {shown(revision)}"
        )
    return base, revision or None


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's configuration, and the names and shapes of its tensors.

    Raises:
        CheckpointError: A file is missing or damaged, or it is not a LoRA adapter, or an
            unsupported variant of LoRA.
    """
    path = folder / CONFIG
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {shown(values.get('peft_type'))}, and only 'LORA' is merged; "
            "merge it with PEFT (merge_and_unload) and give the result"
        )
    for key, neutral in ADAPTER_NEUTRAL.items():
        if values.get(key) is not None and values[key] not in neutral:
            raise CheckpointError(
                f"{path}: {key} is {shown(values[key])}, and only plain LoRA is merged; merge it "
                "with PEFT (merge_and_unload), where that can, and give the result"
            )
    refuse_unknown(values, path, ADAPTER_READ | ADAPTER_NEUTRAL.keys(), ADAPTER_NOTES)
    if values.get("init_lora_weights") not in PLAIN_INITS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {shown(values['init_lora_weights'])}, by which PEFT "
            "changes the base's weights too; convert it to plain LoRA (save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    _check_types(path, values)
    if not (folder / WEIGHTS).exists():
        pickled = next(iter(sorted(folder.glob("adapter_model.*"))), None)
        raise CheckpointError(
            f"{folder / WEIGHTS} is missing"
            + (f"; {pickled.name} is not read, save it as safetensors" if pickled else "")
        )
    pairs: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    for stored, info in read_shard(folder / WEIGHTS).items():
        name = stored.removeprefix(PREFIX)
        end = next((suffix for suffix in PARTS if name.endswith(suffix)), None)
        tensor = WHOLE.fullmatch(name)
        if name == stored or (end is None and (tensor is None or "lora_" in name)):
            raise CheckpointError(
                f"{folder / WEIGHTS}: tensor {shown(stored)} should be named {PREFIX}…lora_A, "
                "…lora_B, …lora_embedding_A, …lora_embedding_B, or as a tensor of the base"
            )
        if end is not None:
            pairs.setdefault(name.removesuffix(end), {})[PARTS[end]] = info
        elif tensor is not None:
            whole[f"{tensor[1]}.{tensor[2]}"] = info
    for name, info in whole.items():
        # PEFT moves the original tensors of an adapted layer into its base_layer.
        is_adapted, in_base = name.rpartition(".")[0] in pairs, ".base_layer." in info.name
        if is_adapted != in_base:
            raise CheckpointError(
                f"{folder / WEIGHTS}: tensor {info.name} should {'' if is_adapted else 'not '}be "
                "in base_layer"
            )
    return Adapter(
        folder, values, values.get("r") or 8, values.get("lora_alpha") or 8, pairs, whole
    )


def _check_types(path: Path, values: Mapping[str, Any]) -> None:
    """Check the types of the values that `Adapter` reads from adapter_config.json."""

    def are_names(value: object) -> bool:
        return (
            isinstance(value, list)
            and len(value) <= MOST_NAMES
            and all(isinstance(name, str) for name in value)
        )

    def is_number(value: Any, *kinds: type) -> bool:
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        return 0 < float(value) < LARGEST

    def are_numbers(value: object, *kinds: type) -> bool:
        return (
            isinstance(value, dict)
            and len(value) <= MOST_NAMES
            and all(is_number(x, *kinds) for x in value.values())
        )

    expected: dict[str, tuple[str, Any]] = {
        "r": ("a positive whole number", lambda x: is_number(x, int)),
        "lora_alpha": ("a positive number", lambda x: is_number(x, int, float)),
        "use_rslora": ("true or false", lambda x: isinstance(x, bool)),
        "rank_pattern": ("ranks by pattern", lambda x: are_numbers(x, int)),
        "alpha_pattern": ("numbers by pattern", lambda x: are_numbers(x, int, float)),
        "target_modules": ("names, or a pattern", lambda x: isinstance(x, str) or are_names(x)),
        "exclude_modules": ("names, or a pattern", lambda x: isinstance(x, str) or are_names(x)),
        "modules_to_save": ("names", are_names),
        "layers_pattern": ("names, or one", lambda x: isinstance(x, str) or are_names(x)),
        "layers_to_transform": (
            "numbers of layers",
            lambda x: (
                type(x) is int
                or (isinstance(x, list) and len(x) <= MOST_NAMES and all(type(y) is int for y in x))
            ),
        ),
        "task_type": ("a text", lambda x: isinstance(x, str)),
    }
    for key, (words, holds) in expected.items():
        value = values.get(key)
        if (value is None and key == "target_modules") or (value is not None and not holds(value)):
            raise CheckpointError(f"{path}: {key} should be {words}, found {shown(value)}")


def _tensor(name: str) -> str:
    """A tensor's or module's name as in `Qwen3Model`."""
    return name.removeprefix("model.")


def _check(info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape or info.dtype not in DTYPES:
        raise CheckpointError(
            f"{info.file}: tensor {info.name} should be {', '.join(DTYPES)} of shape "
            f"{list(shape)} by {CONFIG} and the base, found {info.dtype} of {list(info.shape)}"
        )
