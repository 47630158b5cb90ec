"""Which layer of the language model is stored in how many bits, and the arithmetic of it.

The decisions are mlx-lm's: its defaults for each mode, its rule for widths that do not divide, its
mixed recipes (built by its own function). The numbers are MLX's. Groups run along a row, so a
matrix is quantised some rows at a time with the very same result as at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.convert import mixed_quant_predicate_builder

from fastvlm_mlx.errors import CheckpointError, UsageError
from fastvlm_mlx.weights.layouts import LANGUAGE
from fastvlm_mlx.weights.packing import Packing

from .options import MODES, ConvertOptions


def as_settings(how: Packing) -> dict[str, Any]:
    """The form that config.json and `to_quantized` take."""
    return {"group_size": how.group_size, "bits": how.bits, "mode": how.mode}


def from_settings(settings: Mapping[str, Any]) -> Packing:
    return Packing(
        int(settings["bits"]), int(settings["group_size"]), str(settings.get("mode", "affine"))
    )


def quantisable_layers(model: nn.Module, prefix: str = LANGUAGE) -> dict[str, nn.Module]:
    """Path -> module of every layer that MLX can quantise."""
    leaves: list[tuple[str, Any]] = tree_flatten(  # type: ignore[assignment]
        model.leaf_modules(), is_leaf=nn.Module.is_module
    )
    return {
        prefix + path: module
        for path, module in leaves
        if hasattr(module, "to_quantized") and "weight" in module
    }


def choose(
    model: nn.Module, options: ConvertOptions, notes: list[str]
) -> tuple[dict[str, Packing], dict[str, str]]:
    """(path -> how, for the layers to quantise; path -> why not, for those that stay whole).

    `model` is the language model; its weights are not looked at, only their shapes.
    """
    default = options.settings
    group_size = int(default["group_size"])
    predicate = None
    if options.recipe is not None:
        try:
            predicate = mixed_quant_predicate_builder(options.recipe, model, group_size)
        except ValueError as error:
            raise UsageError(f"--recipe {options.recipe}: {error}") from None
    layers = quantisable_layers(model)
    _check_keep(options.keep, layers, notes)
    chosen: dict[str, Packing] = {}
    kept: dict[str, str] = {}
    for path, module in layers.items():
        width = module.weight.shape[-1]
        if any(_matches(path, item) for item in options.keep):
            kept[path] = "asked for with --keep"
        elif width % group_size:
            kept[path] = f"its width {width} is no multiple of the group size {group_size}"
        else:
            how = predicate(path.removeprefix(LANGUAGE), module) if predicate else default
            chosen[path] = from_settings(how)
    if not chosen:
        raise UsageError(
            "no layer would be quantised: " + next(iter(kept.values()), "there are none")
        )
    return chosen, kept


def _matches(path: str, item: str) -> bool:
    return fnmatchcase(path, f"*{item}*")


def _check_keep(keep: tuple[str, ...], layers: Mapping[str, Any], notes: list[str]) -> None:
    for item in keep:
        if any(_matches(path, item) for path in layers):
            continue
        if item == "lm_head":
            notes.append("--keep lm_head: this model is tied, its head is embed_tokens")
            continue
        raise UsageError(f"--keep {item}: no layer of the language model has that in its name")


def projector_packing(bits: int, width: int, options: ConvertOptions) -> Packing | None:
    """How a layer of the projector is quantised, or None where its width does not divide."""
    mode = options.mode or "affine"
    if MODES[mode][1] != bits:
        mode = "affine"
    group_size = MODES[mode][0] if mode != "affine" else int(options.group_size or 64)
    return None if width % group_size else Packing(bits, group_size, mode)


def packing(
    path: str, width: int, weight: tuple[int, ...], scales: tuple[int, ...], scale_type: str
) -> Packing:
    """How a layer of `width` columns is packed that lies on disk with these shapes.

    Raises CheckpointError: in no way that is known.
    """
    try:
        found = Packing.of(width, weight, scales, scale_type == "U8")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if len(weight) != 2 or scales != (weight[0], width // found.group_size):
        raise CheckpointError(f"{path}: {list(weight)} and scales {list(scales)} do not fit")
    return found


def quantise_rows(rows: mx.array, how: Packing) -> tuple[mx.array, ...]:
    """(n, columns) -> packed weight, scales, and biases where the mode is affine."""
    return tuple(mx.quantize(rows, how.group_size, how.bits, mode=how.mode))


def dequantise_rows(parts: tuple[mx.array, ...], how: Packing) -> mx.array:
    """The reverse, in the type of the scales; bfloat16 where those are single bytes."""
    weight, scales = parts[0], parts[1]
    biases = parts[2] if len(parts) > 2 else None
    return mx.dequantize(weight, scales, biases, how.group_size, how.bits, how.mode)


def packed_shapes(
    rows: int, width: int, how: Packing
) -> dict[str, tuple[tuple[int, int], str | None]]:
    """Part -> (shape, type) of a quantised (rows, width); type None: that of the values before."""
    scales = (rows, width // how.group_size)
    parts: dict[str, tuple[tuple[int, int], str | None]] = {
        "weight": ((rows, width * how.bits // 32), "U32"),
        "scales": (scales, None if how.mode == "affine" else "U8"),
    }
    if how.mode == "affine":
        parts["biases"] = (scales, None)
    return parts


def quantization_config(
    chosen: Mapping[str, Packing], default: Packing | None
) -> dict[str, Any] | None:
    """`quantization` of config.json: the default, and an entry for each layer that departs from it.

    A layer of the projector has two: mlx-vlm looks it up as `mm_projector.0`, mlx-swift-lm as
    `mm_projector.layers.0`.
    """
    if not chosen:
        return None
    counts: dict[Packing, int] = {}
    for path, how in chosen.items():
        if path.startswith(LANGUAGE):
            counts[how] = counts.get(how, 0) + 1
    default = default or max(
        counts or {next(iter(chosen.values())): 1}, key=lambda h: counts.get(h, 0)
    )
    entries = as_settings(default)
    for path, how in chosen.items():
        if how != default:
            entries[path] = as_settings(how)
            if path.startswith("mm_projector."):
                entries[path.replace("mm_projector.", "mm_projector.layers.")] = as_settings(how)
    return entries
