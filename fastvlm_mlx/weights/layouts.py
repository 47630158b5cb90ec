"""Which published tensor name is which of ours: one table of rules a layout.

Every layout is translated to one set of *canonical* names: the encoder under `vision_tower.` in
timm's naming (stage by stage), `mm_projector.{i}.`, and `language_model.` as mlx-lm names it.
Convolutions are channels last, (out, kernel, kernel, in / groups), from here on.

| layout | where it is found |
| --- | --- |
| `llava` | Apple's PyTorch checkpoints (`model_type: llava_qwen2`) |
| `transformers` | `FastVlmForConditionalGeneration`, encoder from timm |
| `mlx` | mlx-vlm, mlx-swift-lm and what `fastvlm-mlx convert` writes |
| `apple-mlx` | Apple's MLX exports: language model and projector only |
| `mlx-lm` | what mlx-lm's own `convert` and `fuse` save: the running model, folded |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ..config import VisionConfig
from ..errors import CheckpointError

VISION = "vision_tower."
PROJECTOR = "mm_projector."
LANGUAGE = "language_model."

# Tensors that play no part in the features or the answer.
_IGNORED = re.compile(
    r"(num_batches_tracked|rotary_emb\.inv_freq|image_newline|vision_resampler)"
    r"|(^|\.)head\.(proj|fc)|\.head_dist\."
)


@dataclass(frozen=True)
class Rule:
    """Rename what matches `pattern` (a whole-name regular expression) to `to`."""

    pattern: str
    to: str


@dataclass(frozen=True)
class Layout:
    """One source of checkpoints: how to recognise it and how its names translate."""

    name: str
    marks: tuple[str, ...]  # regular expressions; the layout is this one if any name matches
    rules: tuple[Rule, ...]
    apple_vision_names: bool = False  # encoder modules named as in Apple's mci.py
    channels_first: bool = True  # convolutions stored (out, in, kernel, kernel)
    folded: bool = False  # the encoder as `models.fastvit` runs it, not as published


LAYOUTS = (
    Layout(
        "mlx",
        marks=(r"vision_tower\.vision_model\..+",),
        rules=(
            Rule(
                r"vision_tower\.vision_model\.patch_embed\.blocks\.(.+)",
                r"vision_tower.patch_embed.\1",
            ),
            Rule(r"vision_tower\.vision_model\.(.+)", r"vision_tower.\1"),
            Rule(r"mm_projector\.([a-z]+)", r"mm_projector.0.\1"),  # a lone `linear`
            Rule(r"(mm_projector\..+)", r"\1"),
            Rule(r"(language_model\.(?:model|lm_head)\..+)", r"\1"),
        ),
        apple_vision_names=True,
        channels_first=False,
    ),
    Layout(
        "llava",
        marks=(r"model\.vision_tower\.vision_tower\.model\..+",),
        rules=(
            Rule(r"model\.vision_tower\.vision_tower\.model\.(.+)", r"vision_tower.\1"),
            Rule(r"model\.mm_projector\.([a-z]+)", r"mm_projector.0.\1"),  # a lone `linear`
            Rule(r"model\.(mm_projector\..+)", r"\1"),
            Rule(r"(model\.(?:layers|embed_tokens|norm)\..+)", r"language_model.\1"),
            Rule(r"(lm_head\..+)", r"language_model.\1"),
        ),
        apple_vision_names=True,
    ),
    Layout(
        "transformers",
        marks=(r"(?:model\.)?vision_tower\.timm_model\..+",),
        rules=(
            Rule(r"(?:model\.)?vision_tower\.timm_model\.(.+)", r"vision_tower.\1"),
            Rule(r"(?:model\.)?multi_modal_projector\.linear_1\.(.+)", r"mm_projector.0.\1"),
            Rule(r"(?:model\.)?multi_modal_projector\.linear_2\.(.+)", r"mm_projector.2.\1"),
            Rule(r"(language_model\.(?:model|lm_head)\..+)", r"\1"),
            Rule(
                r"(?:model\.)?language_model\.((?:layers|embed_tokens|norm)\..+)",
                r"language_model.model.\1",
            ),
            Rule(r"(lm_head\..+)", r"language_model.\1"),
        ),
    ),
    Layout(
        "mlx-lm",
        marks=(r"vision_tower\.stem\.layers\..+",),
        rules=(
            Rule(r"(vision_tower\..+)", r"\1"),
            Rule(r"mm_projector\.layers\.(.+)", r"mm_projector.\1"),
            Rule(r"(language_model\..+)", r"\1"),
        ),
        channels_first=False,
        folded=True,
    ),
    Layout(
        "apple-mlx",
        marks=(r"multi_modal_projector\.linear_0\..+",),
        rules=(
            Rule(r"multi_modal_projector\.linear_(\d+)\.(.+)", r"mm_projector.\1.\2"),
            Rule(r"(language_model\.(?:model|lm_head)\..+)", r"\1"),
            Rule(r"(model\.(?:layers|embed_tokens|norm)\..+)", r"language_model.\1"),
            Rule(r"(lm_head\..+)", r"language_model.\1"),
        ),
    ),
)

# Apple's module names, and timm's for the same thing.
_APPLE_TO_TIMM = (
    Rule(r"^patch_embed\.", "stem."),
    Rule(r"^conv_exp\.", "final_conv."),
    Rule(r"\.convffn\.", ".mlp."),
    Rule(r"\.rbr_conv\.", ".conv_kxk."),
    Rule(r"\.rbr_scale\.", ".conv_scale."),
    Rule(r"\.rbr_skip\.", ".identity."),
    Rule(r"\.lkb_reparam\.", ".reparam_conv."),
    Rule(r"\.lkb_origin\.", ".large_conv."),
    Rule(r"\.pe\.", ".pos_enc."),
    Rule(r"\.se\.reduce\.", ".se.fc1."),
    Rule(r"\.se\.expand\.", ".se.fc2."),
    Rule(r"\.(layer_scale(?:_\d)?)$", r".\1.gamma"),
)


@dataclass
class Names:
    """The outcome of a translation: every source name is in exactly one of these."""

    layout: Layout
    canonical: dict[str, str] = field(default_factory=dict)  # source name -> canonical name
    ignored: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def recognise(names: Iterable[str]) -> Layout:
    """The layout that a set of tensor names belongs to.

    Raises:
        CheckpointError: no FastVLM layout is recognised.
    """
    names = list(names)
    for layout in LAYOUTS:
        marks = [re.compile(mark) for mark in layout.marks]
        if any(mark.fullmatch(name) for name in names for mark in marks):
            return layout
    if any(name.startswith(("model.layers.", "language_model.")) for name in names):
        raise CheckpointError(
            "these are the weights of a language model alone: no vision tower of FastVLM is in them"
        )
    raise CheckpointError("the tensor names are not those of any FastVLM checkpoint known here")


def translate(names: Iterable[str], config: VisionConfig, layout: Layout | None = None) -> Names:
    """Translate every name of a checkpoint to its canonical name.

    `layout` is given for a part of a checkpoint, whose names alone do not tell it.
    """
    names = list(names)
    result = Names(layout or recognise(names))
    rules = [(re.compile(rule.pattern), rule.to) for rule in result.layout.rules]
    slots = list(network_slots(config))
    for name in names:
        if _IGNORED.search(name):
            result.ignored.append(name)
            continue
        target = next((m.expand(to) for p, to in rules if (m := p.fullmatch(name))), None)
        if target and target.startswith(VISION) and result.layout.apple_vision_names:
            target = _apple_vision_name(target.removeprefix(VISION), slots)
        if target is None:
            result.unknown.append(name)
        else:
            result.canonical[name] = target
    return result


def network_slots(config: VisionConfig) -> Iterator[str]:
    """What each entry of Apple's flat `network.{i}` list is, in canonical names, in order."""
    for stage, _ in enumerate(config.depths):
        if config.downsamples[stage]:
            yield f"stages.{stage}.downsample."
        if config.pos_emb_kernels[stage]:
            yield f"stages.{stage}.pos_emb."
        yield f"stages.{stage}.blocks."


def apple_network_index(config: VisionConfig) -> dict[str, int]:
    """The reverse of `network_slots`: canonical prefix -> index in `network`."""
    return {slot: i for i, slot in enumerate(network_slots(config))}


def _apple_vision_name(name: str, slots: list[str]) -> str | None:
    match = re.fullmatch(r"network\.(\d+)\.(.+)", name)
    if match:
        index = int(match[1])
        if index >= len(slots):
            return None
        name = slots[index] + match[2]
    for rule in _APPLE_TO_TIMM:
        name = re.sub(rule.pattern, rule.to, name)
    return VISION + name
