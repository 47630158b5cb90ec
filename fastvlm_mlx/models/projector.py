"""`mm_projector`: visual features to the language model's width."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..config import ProjectorConfig


class Projector(nn.Module):
    """(..., feature_dim) -> (..., hidden_size): linear layers with an exact GELU between them.

    `layers[i]` is the module that LLaVA calls `mm_projector.{i}`; activations have no weights.
    """

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.layers: list[nn.Module] = []
        dim = config.input_dim
        for i in range(config.depth):
            if i:
                self.layers.append(nn.GELU())
            self.layers.append(nn.Linear(dim, config.output_dim))
            dim = config.output_dim

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x
