"""Canonical names to the names on disk: the reverse of `weights.layouts` for its `mlx` layout.

That layout is read by mlx-vlm, mlx-swift-lm and this package. It has Apple's module names in the
encoder, convolutions (out, k, k, in), layer scales (1, 1, C), and everything that folds kept apart.
"""

from __future__ import annotations

import re

from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.weights.layouts import VISION, apple_network_index

# The pooled projection that the features do not pass through. Both readers want it present.
HEAD = "head.proj"
HEAD_WIDTH = 768
DISK_VISION = "vision_tower.vision_model."

# timm's name of a module -> Apple's, in the order to try them in.
_TO_APPLE = (
    (re.compile(r"^stem\."), "patch_embed.blocks."),
    (re.compile(r"^final_conv\."), "conv_exp."),
    (re.compile(r"(\.proj\.0)\.reparam_conv\."), r"\1.lkb_reparam."),
    (re.compile(r"\.mlp\."), ".convffn."),
    (re.compile(r"\.conv_kxk\."), ".rbr_conv."),
    (re.compile(r"\.conv_scale\."), ".rbr_scale."),
    (re.compile(r"\.identity\."), ".rbr_skip."),
    (re.compile(r"\.large_conv\."), ".lkb_origin."),
    (re.compile(r"\.pos_enc\."), ".pe."),
    (re.compile(r"\.se\.fc1\."), ".se.reduce."),
    (re.compile(r"\.se\.fc2\."), ".se.expand."),
    (re.compile(r"\.(layer_scale(?:_\d)?)\.gamma$"), r".\1"),
)


def disk_name(canonical: str, vision: VisionConfig) -> str:
    """`vision_tower.stages.1.downsample...` -> `vision_tower.vision_model.network.1.proj...`."""
    if not canonical.startswith(VISION):
        return canonical
    name = canonical.removeprefix(VISION)
    for slot, index in apple_network_index(vision).items():
        if name.startswith(slot):
            name = f"network.{index}.{name.removeprefix(slot)}"
            break
    for pattern, to in _TO_APPLE:
        name = pattern.sub(to, name)
    return DISK_VISION + name


def disk_shape(canonical: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape on disk of a tensor that is `shape` in the channels-last canonical form."""
    if canonical.startswith(VISION) and canonical.endswith(".gamma"):
        return (1, 1, *shape)
    return shape
