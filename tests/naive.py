"""The encoder as its papers draw it, in plain NumPy, slow and unfolded: what ours is held against.

Channels first, one picture, float64: (c, h, w). `t`: tensors by the names of Apple's code without
their prefix. A block with `reparam_conv` is computed as released, one without as in training.
Sources: arXiv 2206.04040 figure 2 (MobileOne), 2203.06717 figure 2 (RepLKNet), 2303.14189 section
3 (RepMixer, ConvFFN, RepCPE), 2412.13303 section 3.2 (FastViTHD).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Tensors = Mapping[str, Array]

erf = np.vectorize(math.erf, otypes=[np.float64])


def conv(x: Array, weight: Array, bias: Array | None = None, stride: int = 1) -> Array:
    """'Same' padding of an odd kernel; the groups follow from the shapes."""
    out_dim, per_group, kernel, _ = weight.shape
    dim, height, width = x.shape
    groups = dim // per_group
    edge = kernel // 2
    padded = np.pad(x, ((0, 0), (edge, edge), (edge, edge)))
    rows, columns = (height - 1) // stride + 1, (width - 1) // stride + 1
    out = np.zeros((out_dim, rows, columns))
    for i in range(kernel):
        for j in range(kernel):
            seen = padded[:, i : i + height : stride, j : j + width : stride]
            taps = weight[:, :, i, j].reshape(groups, -1, per_group)
            grouped = seen.reshape(groups, per_group, -1)
            out += (taps.astype(np.float64) @ grouped).reshape(out.shape)
    return out if bias is None else out + bias[:, None, None]


def batch_norm(x: Array, t: Tensors, name: str) -> Array:
    scale = t[f"{name}.weight"] / np.sqrt(t[f"{name}.running_var"].astype(np.float64) + 1e-5)
    centred = x - t[f"{name}.running_mean"][:, None, None]
    return centred * scale[:, None, None] + t[f"{name}.bias"][:, None, None]


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def branch(x: Array, t: Tensors, name: str, stride: int = 1) -> Array:
    return batch_norm(conv(x, t[f"{name}.conv.weight"], None, stride), t, f"{name}.bn")


def plain(x: Array, t: Tensors, name: str, stride: int = 1) -> Array:
    return conv(x, t[f"{name}.weight"], t[f"{name}.bias"], stride)


def mobileone(x: Array, t: Tensors, name: str, stride: int = 1) -> Array:
    """The sum of a block's branches, before its activation."""
    if f"{name}.reparam_conv.weight" in t:
        return plain(x, t, f"{name}.reparam_conv", stride)
    out = np.zeros(())
    i = 0
    while f"{name}.rbr_conv.{i}.conv.weight" in t:
        out = out + branch(x, t, f"{name}.rbr_conv.{i}", stride)
        i += 1
    if f"{name}.rbr_scale.conv.weight" in t:
        out = out + branch(x, t, f"{name}.rbr_scale", stride)
    if f"{name}.rbr_skip.weight" in t:
        out = out + batch_norm(x, t, f"{name}.rbr_skip")
    return out


def large_kernel(x: Array, t: Tensors, name: str) -> Array:
    if f"{name}.lkb_reparam.weight" in t:
        return plain(x, t, f"{name}.lkb_reparam", 2)
    return branch(x, t, f"{name}.lkb_origin", 2) + branch(x, t, f"{name}.small_conv", 2)


def position(x: Array, t: Tensors, name: str) -> Array:
    if f"{name}.reparam_conv.weight" in t:
        return plain(x, t, f"{name}.reparam_conv")
    return x + plain(x, t, f"{name}.pe")


def repmixer(x: Array, t: Tensors, name: str) -> Array:
    if f"{name}.reparam_conv.weight" in t:
        return plain(x, t, f"{name}.reparam_conv")
    mixed = mobileone(x, t, f"{name}.mixer") - mobileone(x, t, f"{name}.norm")
    return x + t[f"{name}.layer_scale"] * mixed


def convffn(x: Array, t: Tensors, name: str) -> Array:
    x = branch(x, t, f"{name}.conv")
    return plain(gelu(plain(x, t, f"{name}.fc1")), t, f"{name}.fc2")


def attention(x: Array, t: Tensors, name: str, head_dim: int = 32) -> Array:
    dim, height, width = x.shape
    tokens = x.reshape(dim, -1).T
    q, k, v = (
        (tokens @ t[f"{name}.qkv.weight"].T.astype(np.float64))
        .reshape(len(tokens), 3, -1, head_dim)
        .transpose(1, 2, 0, 3)
    )
    scores = q @ k.transpose(0, 2, 1) / math.sqrt(head_dim)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = (weights @ v).transpose(1, 0, 2).reshape(len(tokens), dim)
    out = mixed @ t[f"{name}.proj.weight"].T + t[f"{name}.proj.bias"]
    return out.T.reshape(dim, height, width)


def channel_norm(x: Array, t: Tensors, name: str) -> Array:
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    return x * t[f"{name}.weight"][:, None, None] + t[f"{name}.bias"][:, None, None]


def squeeze_excite(x: Array, t: Tensors, name: str) -> Array:
    means = x.mean((1, 2), keepdims=True)
    gate = plain(np.maximum(plain(means, t, f"{name}.reduce"), 0), t, f"{name}.expand")
    return x * (1 + np.tanh(gate / 2)) / 2


def encode(pixels: Array, t: Tensors, depths: tuple[int, ...]) -> Array:
    """(h, w, 3) -> (h / 64, w / 64, features)."""
    x = pixels.transpose(2, 0, 1).astype(np.float64)
    for i, stride in enumerate((2, 2, 1)):
        x = gelu(mobileone(x, t, f"patch_embed.{i}", stride))
    slot = 0
    for stage, depth in enumerate(depths):
        if stage:
            x = gelu(large_kernel(x, t, f"network.{slot}.proj.0"))
            x = gelu(mobileone(x, t, f"network.{slot}.proj.1"))
            slot += 1
        if stage >= 3:
            x = position(x, t, f"network.{slot}")
            slot += 1
        for i in range(depth):
            block = f"network.{slot}.{i}"
            if stage >= 3:
                mixed = attention(channel_norm(x, t, f"{block}.norm"), t, f"{block}.token_mixer")
                x = x + t[f"{block}.layer_scale_1"] * mixed
                x = x + t[f"{block}.layer_scale_2"] * convffn(x, t, f"{block}.convffn")
            else:
                x = repmixer(x, t, f"{block}.token_mixer")
                x = x + t[f"{block}.layer_scale"] * convffn(x, t, f"{block}.convffn")
        slot += 1
    x = gelu(squeeze_excite(mobileone(x, t, "conv_exp"), t, "conv_exp.se"))
    return x.transpose(1, 2, 0)
