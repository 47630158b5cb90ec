"""The demo FastVLM's configuration, construction and initialisation.

The architecture is FastVLM's own (timm `fastvit_mci3` + two-layer GELU projector + Qwen2), only
narrow: `transformers.FastVlmForConditionalGeneration` builds it from the configuration alone.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from transformers import FastVlmConfig, FastVlmForConditionalGeneration

IMAGE_SIZE = 192
STRIDE = 64  # picture pixels per visual token, each way
TOKENS_PER_IMAGE = (IMAGE_SIZE // STRIDE) ** 2
EMBED_DIMS = (16, 32, 64, 192, 384)
DEPTHS = (1, 1, 2, 2, 1)
MLP_RATIO = 3
FEATURES = 2 * EMBED_DIMS[-1]  # channels of conv_exp's output


def build_config(vocab_size: int, special: dict[str, int]) -> FastVlmConfig:
    """Return the configuration; `special` maps the special tokens' text to their ids."""
    return FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "hidden_size": FEATURES,
            "image_size": IMAGE_SIZE,
            "model_args": {
                "inference_mode": True,
                "layers": list(DEPTHS),
                "embed_dims": list(EMBED_DIMS),
                "mlp_ratios": [MLP_RATIO] * 5,
            },
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": vocab_size,
            "hidden_size": 192,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "bos_token_id": special["<|endoftext|>"],
            "eos_token_id": special["<|im_end|>"],
            "pad_token_id": special["<|endoftext|>"],
        },
        image_token_index=special["<image>"],
        image_seq_length=TOKENS_PER_IMAGE,
        tie_word_embeddings=True,
    )


def build_model(config: FastVlmConfig) -> FastVlmForConditionalGeneration:
    """Return a model whose fused convolutions are initialised so that they train."""
    model = FastVlmForConditionalGeneration(config)
    initialise_encoder(encoder_of(model))
    return model


def encoder_of(model: FastVlmForConditionalGeneration) -> nn.Module:
    """The timm FastViTHD inside the model; `forward_features` gives (B, FEATURES, h, w)."""
    return model.model.vision_tower.timm_model


@torch.no_grad()
def initialise_encoder(encoder: nn.Module) -> None:
    """Initialise an encoder built with `inference_mode=True`.

    In the fused form the token mixers have no skip branch, so they start near the identity. The
    large depthwise kernels start as random 3x3 kernels in a field of zeros: random 7x7 kernels
    stacked this deep drown the picture in noise, and learning takes many times as long.
    """
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d):
            if "token_mixer.reparam_conv" in name or "pos_emb.reparam_conv" in name:
                nn.init.dirac_(module.weight, groups=module.groups)
                noise = 0.2 / math.sqrt(module.weight[0].numel())
                module.weight.add_(torch.randn_like(module.weight), alpha=noise)
            else:
                module.reset_parameters()
                if module.groups > 1:
                    _start_small(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif type(module).__name__ == "LayerScale2d":
            module.gamma.fill_(0.4)


def _start_small(weight: torch.Tensor) -> None:
    """Fill depthwise kernels (C, 1, k, k) with a random 3x3 centre and zeros around it."""
    middle = weight.shape[-1] // 2
    weight.zero_()
    weight[..., middle - 1 : middle + 2, middle - 1 : middle + 2].uniform_(-1 / 3, 1 / 3)


class NormedConv(nn.Sequential):
    """A fused convolution with a BatchNorm behind it while training; `fold_norms` merges them."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv, nn.BatchNorm2d(conv.out_channels))

    @torch.no_grad()
    def folded(self) -> nn.Conv2d:
        """The one convolution that does what both do in evaluation mode."""
        conv, norm = copy.deepcopy(self[0]), self[1]
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        conv.weight.mul_(scale.view(-1, 1, 1, 1))
        conv.bias.copy_(norm.bias + (conv.bias - norm.running_mean) * scale)
        return conv


class NormedLinear(nn.Module):
    """A linear layer with a BatchNorm before it while training; `fold_norms` merges them.

    Most of what the encoder puts out is the same for every picture; without the norm the
    projector would spend its time on that.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(linear.in_features)
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, N, C) -> (B, N, D)."""
        return self.linear(self.norm(x.flatten(0, 1)).view_as(x))

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """The one linear layer that does what both do in evaluation mode."""
        linear, norm = copy.deepcopy(self.linear), self.norm
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        linear.bias.add_(linear.weight @ (norm.bias - norm.running_mean * scale))
        linear.weight.mul_(scale)
        return linear


def add_norms(encoder: nn.Module) -> None:
    """Put a BatchNorm behind every fused convolution, in place: without it training is slow."""
    for module in list(encoder.modules()):
        conv = getattr(module, "reparam_conv", None)
        if isinstance(conv, nn.Conv2d):
            module.reparam_conv = NormedConv(conv)


def fold_norms(encoder: nn.Module) -> None:
    """Undo `add_norms`, exactly, so that the parameters are those of the released layout."""
    for module in list(encoder.modules()):
        conv = getattr(module, "reparam_conv", None)
        if isinstance(conv, NormedConv):
            module.reparam_conv = conv.folded()


def add_projector_norm(model: FastVlmForConditionalGeneration) -> None:
    """Put a BatchNorm before the projector, in place."""
    projector = model.model.multi_modal_projector
    projector.linear_1 = NormedLinear(projector.linear_1)


def fold_projector_norm(model: FastVlmForConditionalGeneration) -> None:
    """Undo `add_projector_norm`, exactly."""
    projector = model.model.multi_modal_projector
    projector.linear_1 = projector.linear_1.folded()


def parameter_groups(model: nn.Module, decay: float) -> list[dict]:
    """Weight decay for matrices and dense kernels only."""
    yes, no = [], []
    for parameter in model.parameters():
        (yes if parameter.ndim >= 2 and parameter[0].numel() > 9 else no).append(parameter)
    return [{"params": yes, "weight_decay": decay}, {"params": no, "weight_decay": 0.0}]
