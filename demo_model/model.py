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

IMAGE_SIZE = 256
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

    In the fused form there is no skip branch and hardly a norm, so the token mixers start as the
    identity and the other convolutions keep the variance of what flows through them.
    """
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            fan_in = module.weight[0].numel()
            if "token_mixer.reparam_conv" in name or "pos_emb.reparam_conv" in name:
                nn.init.dirac_(module.weight, groups=module.groups)
                module.weight.add_(torch.randn_like(module.weight), alpha=0.3 / math.sqrt(fan_in))
            else:
                gain = 1.0 if ".fc2" in name or ".mlp.conv" in name else math.sqrt(2.0)
                nn.init.normal_(module.weight, std=gain / math.sqrt(fan_in))
        elif type(module).__name__ == "LayerScale2d":
            module.gamma.fill_(0.4)


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


def parameter_groups(model: nn.Module, decay: float) -> list[dict]:
    """Groups for an optimiser that multiplies its rate by each group's `scale`.

    A kernel of few inputs starts with large weights, and Adam moves every weight by about the
    rate; so the narrow convolutions need a larger rate to learn as fast as the wide ones. Weight
    decay is for matrices and dense kernels only.
    """
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        scale = 1.0
        if parameter.ndim == 4:
            scale = min(6.0, max(1.0, 24.0 / math.sqrt(parameter[0].numel())))
        dense = parameter.ndim >= 2 and parameter[0].numel() > 9
        found.setdefault((round(scale, 2), decay if dense else 0.0), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay, "scale": scale}
        for (scale, weight_decay), parameters in found.items()
    ]
