"""Fold a checkpoint's encoder into the network that runs. Everything here is exact algebra.

Two steps, both on canonical names (`layouts`) and channels-last convolutions (o, k, k, i):

1. `fuse_branches`: the parallel branches of a training checkpoint (MobileOne, RepMixer, RepLKNet,
   RepCPE) become the one convolution that released checkpoints carry.
2. `fold`: BatchNorm into its convolution, layer scale into the layer before it.

Sums are done in float32 whatever the checkpoint's precision.
Sources: arXiv 2206.04040 (MobileOne), 2203.06717 (RepLKNet), 2303.14189 section 3.1 (RepMixer).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass, replace

import mlx.core as mx

from ..config import VisionConfig

Tensors = MutableMapping[str, mx.array]

BATCH_NORM_EPS = 1e-5  # PyTorch's default, used by every published encoder


@dataclass(frozen=True)
class FusedConv:
    """A convolution `{name}.reparam_conv` that training may hold as several branches."""

    name: str
    kind: str  # "mobileone", "repmixer", "large" or "pos_emb"
    out_dim: int
    in_per_group: int
    kernel: int
    # Branches that training always has beside those of the full kernel.
    identity: bool = False
    scale: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.out_dim, self.kernel, self.kernel, self.in_per_group)


def fused_convs(config: VisionConfig) -> Iterator[FusedConv]:
    """Every re-parameterised convolution of the encoder."""
    dim = config.embed_dims[0]
    yield FusedConv("stem.0", "mobileone", dim, 3, 3)
    yield FusedConv("stem.1", "mobileone", dim, 1, 3)
    yield FusedConv("stem.2", "mobileone", dim, dim, 1, identity=True)
    for stage, dim in enumerate(config.embed_dims):
        prefix = f"stages.{stage}"
        if config.downsamples[stage]:
            proj = f"{prefix}.downsample.proj"
            yield FusedConv(f"{proj}.0", "large", dim, 1, config.downsample_kernel)
            yield FusedConv(f"{proj}.1", "mobileone", dim, dim, 1, identity=True)
        if kernel := config.pos_emb_kernels[stage]:
            yield FusedConv(f"{prefix}.pos_emb", "pos_emb", dim, 1, kernel)
        if config.token_mixers[stage] == "repmixer":
            for block in range(config.depths[stage]):
                name = f"{prefix}.blocks.{block}.token_mixer"
                yield FusedConv(name, "repmixer", dim, 1, config.repmixer_kernel)
    yield FusedConv("final_conv", "mobileone", config.feature_dim, 1, 3, scale=True)


def expected_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Canonical names (without `vision_tower.`) and shapes of a released, fused encoder."""
    shapes: dict[str, tuple[int, ...]] = {}

    def batch_norm(name: str, dim: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (dim,)

    def pointwise(name: str, out_dim: int, in_dim: int) -> None:
        shapes[f"{name}.weight"] = (out_dim, 1, 1, in_dim)
        shapes[f"{name}.bias"] = (out_dim,)

    for conv in fused_convs(config):
        shapes[f"{conv.name}.reparam_conv.weight"] = conv.shape
        shapes[f"{conv.name}.reparam_conv.bias"] = (conv.out_dim,)
    for stage, dim in enumerate(config.embed_dims):
        hidden = int(dim * config.mlp_ratios[stage])
        attention = config.token_mixers[stage] == "attention"
        if config.se_downsamples[stage]:
            se = f"stages.{stage}.downsample.proj.0.se"
            pointwise(f"{se}.fc1", dim // 4, dim)
            pointwise(f"{se}.fc2", dim, dim // 4)
        for block in range(config.depths[stage]):
            prefix = f"stages.{stage}.blocks.{block}"
            shapes[f"{prefix}.mlp.conv.conv.weight"] = (dim, 7, 7, 1)
            batch_norm(f"{prefix}.mlp.conv.bn", dim)
            pointwise(f"{prefix}.mlp.fc1", hidden, dim)
            pointwise(f"{prefix}.mlp.fc2", dim, hidden)
            if not attention:
                shapes[f"{prefix}.layer_scale.gamma"] = (dim,)
                continue
            shapes[f"{prefix}.layer_scale_1.gamma"] = (dim,)
            shapes[f"{prefix}.layer_scale_2.gamma"] = (dim,)
            if config.attention_norm == "batch":
                batch_norm(f"{prefix}.norm", dim)
            else:
                shapes[f"{prefix}.norm.weight"] = shapes[f"{prefix}.norm.bias"] = (dim,)
            shapes[f"{prefix}.token_mixer.qkv.weight"] = (3 * dim, dim)
            shapes[f"{prefix}.token_mixer.proj.weight"] = (dim, dim)
            shapes[f"{prefix}.token_mixer.proj.bias"] = (dim,)
    pointwise("final_conv.se.fc1", config.se_dim, config.feature_dim)
    pointwise("final_conv.se.fc2", config.feature_dim, config.se_dim)
    return shapes


def fuse_branches(config: VisionConfig, tensors: Tensors) -> int:
    """Replace training branches in `tensors` by their one convolution; return how many.

    Raises:
        KeyError: a convolution has some of its branches but not all; the name of what is missing.
    """
    fused = 0
    for conv in fused_convs(config):
        if f"{conv.name}.reparam_conv.weight" in tensors:
            continue
        own, gate = f"{conv.name}.", f"{conv.name}.se."
        if not any(name.startswith(own) and not name.startswith(gate) for name in tensors):
            continue  # wholly missing: reported by the caller with the other missing tensors
        weight, bias = _FUSE[conv.kind](conv.name, conv, tensors)
        tensors[f"{conv.name}.reparam_conv.weight"] = weight
        tensors[f"{conv.name}.reparam_conv.bias"] = bias
        fused += 1
    return fused


def fold(config: VisionConfig, tensors: Tensors) -> dict[str, mx.array]:
    """Parameters of `models.fastvit.FastViT`, float32, from the fused encoder in `tensors`.

    `tensors` holds exactly the names and shapes of `expected_shapes`; it is emptied as it is
    read, so that a tensor lives no longer than needed.
    """
    folded: dict[str, mx.array] = {}

    def take(name: str) -> mx.array:
        return tensors.pop(name).astype(mx.float32)

    def move(source: str, target: str, scale: mx.array | None = None) -> None:
        weight, bias = take(f"{source}.weight"), take(f"{source}.bias")
        if weight.shape[1:3] == (1, 1) and weight.ndim == 4 and ".fc" in source:
            weight = weight[:, 0, 0, :]  # a 1x1 convolution over positions is a linear layer
        if scale is not None:
            weight, bias = _scale_rows(weight, scale), bias * scale
        folded[f"{target}.weight"], folded[f"{target}.bias"] = weight, bias

    for i in range(3):
        move(f"stem.{i}.reparam_conv", f"stem.layers.{i}")
    for stage, _ in enumerate(config.embed_dims):
        prefix = f"stages.{stage}"
        if config.downsamples[stage]:
            move(f"{prefix}.downsample.proj.0.reparam_conv", f"{prefix}.downsample.large")
            move(f"{prefix}.downsample.proj.1.reparam_conv", f"{prefix}.downsample.pointwise")
            if config.se_downsamples[stage]:
                for fc in ("fc1", "fc2"):
                    move(f"{prefix}.downsample.proj.0.se.{fc}", f"{prefix}.downsample.se.{fc}")
        if config.pos_emb_kernels[stage]:
            move(f"{prefix}.pos_emb.reparam_conv", f"{prefix}.pos_emb")
        attention = config.token_mixers[stage] == "attention"
        for block in range(config.depths[stage]):
            name = f"{prefix}.blocks.{block}"
            weight, bias = _fold_batch_norm(
                take(f"{name}.mlp.conv.conv.weight"), _take_bn(tensors, f"{name}.mlp.conv.bn")
            )
            folded[f"{name}.mlp.conv.weight"], folded[f"{name}.mlp.conv.bias"] = weight, bias
            move(f"{name}.mlp.fc1", f"{name}.mlp.fc1")
            scale = "layer_scale_2" if attention else "layer_scale"
            move(f"{name}.mlp.fc2", f"{name}.mlp.fc2", take(f"{name}.{scale}.gamma"))
            if not attention:
                move(f"{name}.token_mixer.reparam_conv", f"{name}.token_mixer")
                continue
            mixer = f"{name}.token_mixer"
            move(f"{mixer}.proj", f"{mixer}.proj", take(f"{name}.layer_scale_1.gamma"))
            qkv = take(f"{mixer}.qkv.weight")
            if config.attention_norm == "batch":
                scale_in, shift = _affine(_take_bn(tensors, f"{name}.norm"))
                folded[f"{mixer}.qkv.bias"] = qkv @ shift
                qkv = qkv * scale_in
            else:
                folded[f"{mixer}.norm.weight"] = take(f"{name}.norm.weight")
                folded[f"{mixer}.norm.bias"] = take(f"{name}.norm.bias")
            folded[f"{mixer}.qkv.weight"] = qkv
    move("final_conv.reparam_conv", "final_conv.conv")
    move("final_conv.se.fc1", "final_conv.se.fc1")
    move("final_conv.se.fc2", "final_conv.se.fc2")
    return folded


BatchNorm = tuple[mx.array, mx.array, mx.array, mx.array]  # weight, bias, mean, variance


def _take_bn(tensors: Tensors, name: str) -> BatchNorm:
    weight, bias, mean, var = (
        tensors.pop(f"{name}.{part}").astype(mx.float32)
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    return weight, bias, mean, var


def _affine(bn: BatchNorm) -> tuple[mx.array, mx.array]:
    """Scale and shift that a BatchNorm applies at inference."""
    weight, bias, mean, var = bn
    scale = weight / mx.sqrt(var + BATCH_NORM_EPS)
    return scale, bias - mean * scale


def _scale_rows(weight: mx.array, scale: mx.array) -> mx.array:
    return weight * scale.reshape(-1, *([1] * (weight.ndim - 1)))


def _fold_batch_norm(weight: mx.array, bn: BatchNorm) -> tuple[mx.array, mx.array]:
    scale, shift = _affine(bn)
    return _scale_rows(weight, scale), shift


def _identity_kernel(conv: FusedConv) -> mx.array:
    """The convolution that changes nothing: 1 at the centre of each channel's own input."""
    channel = mx.arange(conv.out_dim) % conv.in_per_group
    kernel = mx.zeros(conv.shape)
    centre = conv.kernel // 2
    kernel[mx.arange(conv.out_dim), centre, centre, channel] = 1.0
    return kernel


def _pad_kernel(weight: mx.array, kernel: int) -> mx.array:
    pad = (kernel - weight.shape[1]) // 2
    return mx.pad(weight, [(0, 0), (pad, pad), (pad, pad), (0, 0)])


def _pop_branch(name: str, conv: FusedConv, tensors: Tensors) -> tuple[mx.array, mx.array]:
    """One convolution with its BatchNorm, its kernel padded to the full size."""
    kernel = tensors.pop(f"{name}.conv.weight").astype(mx.float32)
    return _fold_batch_norm(_pad_kernel(kernel, conv.kernel), _take_bn(tensors, f"{name}.bn"))


def _pop_identity(name: str, conv: FusedConv, tensors: Tensors) -> tuple[mx.array, mx.array]:
    """A BatchNorm alone, as a convolution."""
    return _fold_batch_norm(_identity_kernel(conv), _take_bn(tensors, f"{name}.identity"))


def _add(branches: Iterable[tuple[mx.array, mx.array]]) -> tuple[mx.array, mx.array]:
    weights, biases = zip(*branches, strict=True)
    return sum(weights[1:], weights[0]), sum(biases[1:], biases[0])


def _fuse_mobileone(name: str, conv: FusedConv, tensors: Tensors) -> tuple[mx.array, mx.array]:
    """Sum of k x k branches, a 1x1 branch and an identity branch, each with its BatchNorm."""
    if f"{name}.reparam_conv.weight" in tensors:
        weight, bias = (tensors.pop(f"{name}.reparam_conv.{part}") for part in ("weight", "bias"))
        return weight.astype(mx.float32), bias.astype(mx.float32)
    branches = [_pop_branch(f"{name}.conv_kxk.0", conv, tensors)]
    while f"{name}.conv_kxk.{len(branches)}.conv.weight" in tensors:
        branches.append(_pop_branch(f"{name}.conv_kxk.{len(branches)}", conv, tensors))
    if conv.scale or f"{name}.conv_scale.conv.weight" in tensors:
        branches.append(_pop_branch(f"{name}.conv_scale", conv, tensors))
    if conv.identity:
        branches.append(_pop_identity(name, conv, tensors))
    return _add(branches)


def _fuse_repmixer(name: str, conv: FusedConv, tensors: Tensors) -> tuple[mx.array, mx.array]:
    """x + scale * (mixer(x) - norm(x)) as one depthwise convolution."""
    whole = replace(conv, identity=True, scale=True)
    mixer_w, mixer_b = _fuse_mobileone(f"{name}.mixer", whole, tensors)
    if f"{name}.norm.reparam_conv.weight" in tensors:
        norm_w, norm_b = _fuse_mobileone(f"{name}.norm", conv, tensors)
    else:
        norm_w, norm_b = _pop_identity(f"{name}.norm", conv, tensors)
    scale = tensors.pop(f"{name}.layer_scale.gamma").astype(mx.float32)
    weight = _identity_kernel(conv) + _scale_rows(mixer_w - norm_w, scale)
    return weight, (mixer_b - norm_b) * scale


def _fuse_large(name: str, conv: FusedConv, tensors: Tensors) -> tuple[mx.array, mx.array]:
    """A large kernel and a small one beside it, each with its BatchNorm."""
    parts = (f"{name}.large_conv", f"{name}.small_conv")
    return _add(_pop_branch(part, conv, tensors) for part in parts)


def _fuse_pos_emb(name: str, conv: FusedConv, tensors: Tensors) -> tuple[mx.array, mx.array]:
    """x + conv(x) as one convolution."""
    weight = tensors.pop(f"{name}.pos_enc.weight").astype(mx.float32)
    bias = tensors.pop(f"{name}.pos_enc.bias").astype(mx.float32)
    return weight + _identity_kernel(conv), bias


_FUSE = {
    "mobileone": _fuse_mobileone,
    "repmixer": _fuse_repmixer,
    "large": _fuse_large,
    "pos_emb": _fuse_pos_emb,
}
