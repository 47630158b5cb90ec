"""LLaVA training output onto the model it was trained from: LoRA, and parts trained in full.

A run leaves `adapter_model.{safetensors,bin}` with `adapter_config.json` (peft's LoRA) and
`non_lora_trainables.bin` (whatever else was trained, in full), or `mm_projector.bin` alone. Each
LoRA pair adds scale * B @ A to its weight (arXiv 2106.09685, section 4.1), with
scale = lora_alpha / r, or lora_alpha / sqrt(r) (arXiv 2312.03732) where `use_rslora` says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_mlx.config import VisionConfig, read_json
from fastvlm_mlx.errors import CheckpointError, ConfigError
from fastvlm_mlx.weights.files import LazyTensor
from fastvlm_mlx.weights.layouts import LAYOUTS, Layout, translate
from fastvlm_mlx.weights.lazy import shown, where

LLAVA = next(layout for layout in LAYOUTS if layout.name == "llava")

ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
TRAINED_PARTS = ("non_lora_trainables.bin", "non_lora_trainables.safetensors")
PROJECTORS = ("mm_projector.bin", "mm_projector.safetensors")

_WRAPPERS = re.compile(r"^(?:base_model\.model\.)+")
_LORA = re.compile(r"(.+)\.lora_(A|B)(?:\.[^.]+)?\.weight")
# What peft can be told that changes the sum, and is not done here.
_UNSUPPORTED = (
    "use_dora",
    "fan_in_fan_out",
    "megatron_config",
    "use_qalora",
    "alora_invocation_tokens",
)


@dataclass(frozen=True)
class Delta:
    """scale * B @ A, to be added to a weight (out, in): A (r, in), B (out, r)."""

    a: LazyTensor
    b: LazyTensor
    scale: float


def plain_name(name: str) -> str:
    """A tensor's name as in a full checkpoint, without the wrappers of peft and LLaVA."""
    name = _WRAPPERS.sub("", name)
    return f"model.{name}" if name.startswith(("mm_projector.", "vision_tower.")) else name


def canonical_names(
    names: list[str], vision: VisionConfig, layout: Layout = LLAVA
) -> dict[str, str]:
    """Names of trained parts -> canonical names. Raises CheckpointError for one that has none."""
    plain = {plain_name(name): name for name in names}
    translated = translate(plain, vision, layout)
    if translated.unknown:
        raise CheckpointError(
            f"tensor {shown(plain[translated.unknown[0]])} is of no part of FastVLM"
        )
    return {plain[source]: target for source, target in translated.canonical.items()}


def read_deltas(
    folder: Path, tensors: Mapping[str, LazyTensor], vision: VisionConfig
) -> tuple[dict[str, Delta], dict[str, LazyTensor]]:
    """(canonical weight -> what to add to it, canonical name -> tensors that the adapter replaces).

    Raises CheckpointError or ConfigError naming the tensor or the setting.
    """
    path = folder / "adapter_config.json"
    settings = read_json(path)
    _refuse_unsupported(path, settings)
    pairs: dict[str, dict[str, LazyTensor]] = {}
    replaced: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        match = _LORA.fullmatch(name)
        if match:
            pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
        elif "lora_" in name:
            raise CheckpointError(
                f"{where(tensor.file)}: {shown(name)} is a kind of LoRA not known here"
            )
        else:
            saved = re.sub(r"\.modules_to_save(?:\.[^.]+)?\.", ".", name).replace(
                ".base_layer.", "."
            )
            replaced[saved] = tensor
    if not pairs:
        raise CheckpointError(f"{where(folder)}: the adapter holds no LoRA pair")
    targets = canonical_names(list(pairs), vision)
    deltas = {}
    for name, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            have = next(iter(pair.values()))
            raise CheckpointError(f"{where(have.file)}: {shown(have.name)} has no counterpart")
        deltas[targets[name]] = _delta(plain_name(name), pair["A"], pair["B"], settings)
    kept = canonical_names(list(replaced), vision)
    return deltas, {target: replaced[name] for name, target in kept.items()}


def _delta(module: str, a: LazyTensor, b: LazyTensor, settings: Mapping[str, Any]) -> Delta:
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        raise CheckpointError(
            f"{where(a.file)}: {shown(a.name)} {list(a.shape)} does not fit its B {list(b.shape)}"
        )
    rank = a.shape[0]
    alpha = settings.get("lora_alpha")
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.search(rf"(^|\.){pattern}$", module.removesuffix(".weight")):
            alpha = value
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ConfigError(f"{where(a.file.parent / 'adapter_config.json')}: has no lora_alpha")
    return Delta(a, b, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _refuse_unsupported(path: Path, settings: Mapping[str, Any]) -> None:
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise ConfigError(f"{where(path)}: a {kind} adapter cannot be merged here, LORA can")
    for name in _UNSUPPORTED:
        if settings.get(name):
            raise ConfigError(
                f"{where(path)}: {name} is set, which cannot be merged here; use peft"
            )


def find(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of `names` that is in `folder`."""
    return next((folder / name for name in names if (folder / name).is_file()), None)
