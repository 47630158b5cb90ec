"""The encoder: FastViTHD and its family (FastViT, MobileCLIP's MCi) from one configuration.

Shapes are channels last: b batch, h w rows and columns, c channels, n = h * w tokens.

This is the network as it runs, with everything that folds exactly already folded by
`fastvlm_mlx.weights.folding`: no BatchNorm, no layer scale, no training branches are left.
Sources: arXiv 2303.14189 (RepMixer, RepCPE), 2412.13303 section 3.2 (FastViTHD).
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..config import VisionConfig
from .cpu import GroupedConv2d, gelu


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from the channel means. (b, h, w, c) -> same."""

    def __init__(self, dim: int, bottleneck: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, bottleneck)
        self.fc2 = nn.Linear(bottleneck, dim)

    def __call__(self, x: mx.array) -> mx.array:
        gate = nn.relu(self.fc1(x.mean(axis=(1, 2))))
        return x * mx.sigmoid(self.fc2(gate))[:, None, None, :]


class Stem(nn.Module):
    """Three convolutions with GELU, stride 4 in all. (b, h, w, 3) -> (b, h/4, w/4, dim)."""

    def __init__(self, dim: int):
        super().__init__()
        self.layers = [
            nn.Conv2d(3, dim, 3, stride=2, padding=1),
            GroupedConv2d(dim, dim, 3, stride=2),
            nn.Conv2d(dim, dim, 1),
        ]

    def __call__(self, x: mx.array) -> mx.array:
        for conv in self.layers:
            x = gelu(conv(x))
        return x


class Downsample(nn.Module):
    """Large-kernel grouped convolution of stride 2, then 1x1. (b, h, w, c) -> (b, h/2, w/2, d)."""

    def __init__(self, config: VisionConfig, stage: int):
        super().__init__()
        in_dim, dim = config.embed_dims[stage - 1], config.embed_dims[stage]
        self.large = GroupedConv2d(in_dim, dim, config.downsample_kernel, stride=2)
        if config.se_downsamples[stage]:
            self.se = SqueezeExcite(dim, dim // 4)
        self.pointwise = nn.Conv2d(dim, dim, 1)
        self._act = config.downsample_act

    def __call__(self, x: mx.array) -> mx.array:
        x = self.large(x)
        if "se" in self:
            x = self.se(x)
        if self._act:
            x = gelu(x)
        return gelu(self.pointwise(x))


class ConvFFN(nn.Module):
    """7x7 depthwise, then a two-layer MLP at each position. (b, h, w, c) -> same."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.conv = GroupedConv2d(dim, dim, 7)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(gelu(self.fc1(self.conv(x))))


class Attention(nn.Module):
    """Multi-head self-attention over all positions, normalised first. (b, h, w, c) -> same."""

    def __init__(self, dim: int, config: VisionConfig):
        super().__init__()
        # Batch normalisation is affine and folds into qkv (which gains a bias from it);
        # layer normalisation stays.
        if config.attention_norm == "layer":
            self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.attention_norm == "batch")
        self.proj = nn.Linear(dim, dim)
        self._head_dim = config.head_dim

    def __call__(self, x: mx.array) -> mx.array:
        b, h, w, c = x.shape
        if "norm" in self:
            x = self.norm(x)
        qkv = self.qkv(x.reshape(b, h * w, c)).reshape(b, h * w, 3, -1, self._head_dim)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # each (b, heads, n, head_dim)
        x = mx.fast.scaled_dot_product_attention(q, k, v, scale=self._head_dim**-0.5)
        return self.proj(x.transpose(0, 2, 1, 3).reshape(b, h, w, c))


class RepMixerBlock(nn.Module):
    """Mix tokens with one depthwise convolution, then channels. The mixer holds its own skip."""

    def __init__(self, dim: int, hidden: int, config: VisionConfig):
        super().__init__()
        self.token_mixer = GroupedConv2d(dim, dim, config.repmixer_kernel)
        self.mlp = ConvFFN(dim, hidden)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.token_mixer(x)
        return x + self.mlp(x)


class AttentionBlock(nn.Module):
    """Mix tokens with attention, then channels."""

    def __init__(self, dim: int, hidden: int, config: VisionConfig):
        super().__init__()
        self.token_mixer = Attention(dim, config)
        self.mlp = ConvFFN(dim, hidden)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.token_mixer(x)
        return x + self.mlp(x)


class Stage(nn.Module):
    """Down-sample, add the conditional positional encoding, run the blocks."""

    def __init__(self, config: VisionConfig, stage: int):
        super().__init__()
        dim = config.embed_dims[stage]
        hidden = int(dim * config.mlp_ratios[stage])
        block = RepMixerBlock if config.token_mixers[stage] == "repmixer" else AttentionBlock
        if config.downsamples[stage]:
            self.downsample = Downsample(config, stage)
        if config.pos_emb_kernels[stage]:
            self.pos_emb = GroupedConv2d(dim, dim, config.pos_emb_kernels[stage])
        self.blocks = [block(dim, hidden, config) for _ in range(config.depths[stage])]

    def __call__(self, x: mx.array) -> mx.array:
        if "downsample" in self:
            x = self.downsample(x)
        if "pos_emb" in self:
            x = self.pos_emb(x)
        for block in self.blocks:
            x = block(x)
        return x


class FinalConv(nn.Module):
    """Widen each channel to `expansion` channels, gate, GELU. The features are this map."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        dim = config.embed_dims[-1]
        self.conv = GroupedConv2d(dim, config.feature_dim, 3)
        self.se = SqueezeExcite(config.feature_dim, config.se_dim)

    def __call__(self, x: mx.array) -> mx.array:
        return gelu(self.se(self.conv(x)))


class FastViT(nn.Module):
    """The vision tower: (B, H, W, 3) pixels -> (B, H / patch, W / patch, feature_dim) features.

    H and W are any multiples of `config.patch_size`, 64 for FastViTHD.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.stem = Stem(config.embed_dims[0])
        self.stages = [Stage(config, i) for i in range(len(config.depths))]
        self.final_conv = FinalConv(config)

    def __call__(self, pixels: mx.array) -> mx.array:
        _, height, width, channels = pixels.shape
        patch = self.config.patch_size
        if height % patch or width % patch or channels != 3 or not (height and width):
            raise ValueError(
                f"pixels {pixels.shape}: expected (B, H, W, 3) with H and W multiples of {patch}"
            )
        x = self.stem(pixels)
        for stage in self.stages:
            x = stage(x)
        return self.final_conv(x)
