"""From a checkpoint's tensors, whatever their layout, to the parameters of the running model.

    source names --layouts--> canonical names --folding--> parameters

Every complaint names the tensor as the checkpoint spells it.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import mlx.core as mx

from ..config import ModelConfig
from ..errors import CheckpointError
from . import folding
from .layouts import PROJECTOR, VISION, Layout, Names, translate

_SHOWN = 8  # names listed in a message before "and N more"


def assemble(config: ModelConfig, tensors: MutableMapping[str, mx.array]) -> dict[str, mx.array]:
    """Parameters of `models.fastvlm.FastVLM` from the tensors of any published layout.

    `tensors` is emptied on the way. Language-model tensors keep their values; whether they are
    complete is checked where they are loaded into mlx-lm's model.

    Raises:
        CheckpointError: an unknown layout; missing, unexpected or wrongly shaped tensors.
    """
    names = translate(tensors, config.vision)
    canonical = {
        target: channels_last(target, tensors.pop(source), names.layout)
        for source, target in names.canonical.items()
    }
    return assemble_canonical(config, canonical, names)


def assemble_canonical(
    config: ModelConfig, canonical: dict[str, mx.array], names: Names
) -> dict[str, mx.array]:
    """The same from canonical names; `names` is kept for the messages."""
    if names.layout.folded:
        check_shapes({}, {}, {}, names.unknown)
        return {parameter_name(name): tensor for name, tensor in canonical.items()}
    parameters: dict[str, mx.array] = {}
    vision: dict[str, mx.array] = {}
    for name, tensor in canonical.items():
        if name.startswith(VISION):
            vision[name.removeprefix(VISION)] = tensor
        else:
            parameters[parameter_name(name)] = tensor
    if not vision:
        raise CheckpointError(
            "no vision tower is among the tensors: Apple's MLX exports keep it beside them, as "
            "fastvithd.mlpackage; use the PyTorch checkpoint that they were made from"
        )
    source_of = {target: source for source, target in names.canonical.items()}
    try:
        folding.fuse_branches(config.vision, vision)
    except KeyError as error:
        raise CheckpointError(
            f"the encoder's training branches are incomplete: no tensor {error.args[0]!r}"
        ) from None
    check_shapes(
        {VISION + name: shape for name, shape in folding.expected_shapes(config.vision).items()},
        {VISION + name: tuple(tensor.shape) for name, tensor in vision.items()},
        source_of,
        names.unknown,
    )
    for name, tensor in folding.fold(config.vision, vision).items():
        parameters[VISION + name] = tensor
    return parameters


def parameter_name(canonical: str) -> str:
    """The model's name of a tensor that folding leaves as it is."""
    if canonical.startswith(PROJECTOR):
        return "mm_projector.layers." + canonical.removeprefix(PROJECTOR)
    return canonical


def check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    source_of: Mapping[str, str],
    unknown: list[str],
) -> None:
    """Compare names and shapes, and raise one error that lists everything that is wrong."""
    complaints = []
    missing = [name for name in expected if name not in found]
    unexpected = [source_of.get(n, n) for n in found if n not in expected] + unknown
    misshapen = [
        f"{source_of.get(n, n)} {found[n]}, expected {expected[n]}"
        for n in expected
        if n in found and found[n] != expected[n]
    ]
    for what, items in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("wrong shape", misshapen),
    ):
        if items:
            more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
            complaints.append(f"{what}: {', '.join(items[:_SHOWN])}{more}")
    if complaints:
        raise CheckpointError("the tensors do not fit the model; " + "; ".join(complaints))


def channels_last(name: str, tensor: mx.array, layout: Layout) -> mx.array:
    """A tensor of this canonical name as MLX wants it: convolutions (o, k, k, i), scales (c,)."""
    if name.endswith(".gamma"):
        return tensor.reshape(-1)  # (C, 1, 1) or (1, 1, C): a scale per channel
    if name.startswith(VISION) and tensor.ndim == 4 and layout.channels_first:
        return tensor.transpose(0, 2, 3, 1)
    return tensor
