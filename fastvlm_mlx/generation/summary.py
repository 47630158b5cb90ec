"""What a model is and what it will need, from its headers alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import hub
from ..config import ModelConfig, picture_config, read_config
from ..errors import CheckpointError
from ..loading import believe_tensors
from ..processing.processor import picture_processor
from ..weights.files import LazyTensor, open_tensors
from ..weights.layouts import translate
from ..weights.packing import Packing

Group = dict[str, LazyTensor]  # canonical name -> tensor, of one part

PARTS = ("vision_tower", "mm_projector", "language_model")

# The prompt length that the memory figure is given for.
_CONTEXT_FOR_MEMORY = 1024


@dataclass(frozen=True)
class ModelSummary:
    """Sizes by part (`vision_tower`, `mm_projector`, `language_model`) and what a picture is."""

    path: str
    layout: str
    model_type: str
    parameters: dict[str, int]
    precision: dict[str, str]
    bytes: dict[str, int]
    resolution: tuple[int, int]  # (height, width)
    visual_tokens: int
    picture_mode: str
    vocabulary: int
    context_length: int
    memory_bytes: int  # weights as stored, and the KV cache of 1,024 tokens
    quantization: dict[str, Any] | None
    repairs: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe_model(path_or_repo: str | Path | None = None) -> ModelSummary:
    """Describe a model without reading its weights.

    Raises:
        HubError, ConfigError, CheckpointError: as `load`.
    """
    folder = hub.find_model(None if path_or_repo is None else str(path_or_repo)).path
    config = read_config(folder)
    with open_tensors(folder) as tensors:
        config, repairs = believe_tensors(config, tensors)
        names = translate(tensors, config.vision)
        groups: dict[str, Group] = {part: {} for part in PARTS}
        for source, target in names.canonical.items():
            groups[target.split(".", 1)[0]][target] = tensors[source]
        height, width = picture_processor(config, picture_config(folder)).output_size
        rows, columns = config.vision.grid(height, width)
        sizes = {part: sum(t.nbytes for t in group.values()) for part, group in groups.items()}
        return ModelSummary(
            path=str(folder),
            layout=names.layout.name,
            model_type=config.model_type,
            parameters={part: _parameters(group, config) for part, group in groups.items()},
            precision={part: _precision(group, config) for part, group in groups.items()},
            bytes=sizes,
            resolution=(height, width),
            visual_tokens=rows * columns,
            picture_mode=config.aspect,
            vocabulary=config.text["vocab_size"],
            context_length=config.max_length,
            memory_bytes=sum(sizes.values()) + _kv_cache_bytes(config),
            quantization=config.quantization,
            repairs=repairs,
        )


def _parameters(group: Group, config: ModelConfig) -> int:
    """Numbers that training set: packed ones are counted unpacked, their scales not at all."""
    total = 0
    for name, tensor in group.items():
        if name.endswith((".scales", ".biases", ".running_mean", ".running_var")):
            continue
        packing = _packing(name, group, config)
        total += tensor.size * 32 // packing.bits if packing else tensor.size
    return total


def _precision(group: Group, config: ModelConfig) -> str:
    """The type that most of the bytes are in, such as "BF16" or "4-bit"."""
    by_type: dict[str, int] = {}
    for name, tensor in group.items():
        packing = _packing(name, group, config)
        kind = f"{packing.bits}-bit" if packing else tensor.dtype
        by_type[kind] = by_type.get(kind, 0) + tensor.nbytes
    return max(by_type, key=lambda kind: by_type[kind], default="none")


def _packing(name: str, group: Group, config: ModelConfig) -> Packing | None:
    """How a quantised matrix is packed; None for a tensor that is not one."""
    scales = group.get(name.removesuffix(".weight") + ".scales")
    if not name.endswith(".weight") or scales is None:
        return None
    try:
        return Packing.of(
            _columns(name, config), group[name].shape, scales.shape, scales.dtype == "U8"
        )
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None


def _columns(name: str, config: ModelConfig) -> int:
    """Input width of a matrix, from the configuration."""
    text = config.text
    if name == "mm_projector.0.weight":
        return config.projector.input_dim
    if ".down_proj." in name:
        return int(text["intermediate_size"])
    if ".o_proj." in name:
        return int(text["num_attention_heads"] * _head_dim(text))
    return int(text["hidden_size"])


def _head_dim(text: dict[str, Any]) -> int:
    return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])


def _kv_cache_bytes(config: ModelConfig) -> int:
    """Keys and values of every layer for a prompt of the stated length, in 16 bits."""
    text = config.text
    per_layer = 2 * text["num_key_value_heads"] * _head_dim(text) * 2
    return int(text["num_hidden_layers"] * per_layer * _CONTEXT_FOR_MEMORY)
