"""FastVLM: a picture's features, projected, take their places among the words of a prompt.

The class follows mlx-lm's multimodal interface (`embed_inputs`, `layers`, `make_cache`, a call
that takes `input_embeddings`), so mlx-lm generates, caches, batches, quantises and serves it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..config import ModelConfig
from ..errors import ConfigError, PromptError
from ..weights.assemble import assemble
from .fastvit import FastViT
from .projector import Projector

# mlx-lm builds a model from `module.Model(module.ModelArgs.from_dict(config))`.
ModelArgs = ModelConfig


class FastVLM(nn.Module):
    """`vision_tower` + `mm_projector` + `language_model` (any of mlx-lm's, by its `model_type`)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = self.args = config
        self.model_type = config.model_type
        self.vision_tower = FastViT(config.vision)
        self.mm_projector = Projector(config.projector)
        self.language_model = build_language_model(config.text)

    def vision_features(self, pictures: Sequence[mx.array]) -> list[mx.array]:
        """Pixels (H, W, 3) of each picture -> its features (h, w, feature_dim).

        Pictures of one size go through the vision tower together.
        """
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, picture in enumerate(pictures):
            by_shape.setdefault(tuple(picture.shape), []).append(i)
        dtype = self.vision_tower.stem.layers[0].weight.dtype
        features: dict[int, mx.array] = {}
        for indices in by_shape.values():
            batch = mx.stack([pictures[i] for i in indices]).astype(dtype)
            features |= zip(indices, self.vision_tower(batch), strict=True)
        return [features[i] for i in range(len(pictures))]

    def project(self, features: Sequence[mx.array]) -> list[mx.array]:
        """Features (h, w, feature_dim) of each picture -> (h * w, hidden) tokens, row-major."""
        return [self.mm_projector(f.flatten(0, 1)) for f in features]

    def embed_inputs(
        self,
        inputs: mx.array,
        *,
        pixel_values: mx.array | Sequence[mx.array] | None = None,
        visual_tokens: Sequence[mx.array] | None = None,
    ) -> mx.array:
        """Token ids (L,) or (B, L) -> embeddings (..., L, hidden), pictures in their places.

        Every id equal to `config.image_token_id` takes the next row of visual tokens, pictures in
        reading order; a row of a batch without that id takes none. Pictures come as pixels,
        (B, H, W, 3) or a list of (H, W, 3) of any sizes, or as `visual_tokens`, a list of
        (N, hidden) that `project` made earlier.

        Raises:
            PromptError: the places and the visual tokens differ in number.
        """
        is_picture = inputs == self.config.image_token_id
        # The picture's id need not be a row of the table (-200 in LLaVA's code).
        embeddings = self.language_model.model.embed_tokens(mx.where(is_picture, 0, inputs))
        if visual_tokens is None and pixel_values is not None:
            visual_tokens = self.project(self.vision_features(list(pixel_values)))
        rows = mx.concatenate(list(visual_tokens)) if visual_tokens else None
        places = np.count_nonzero(np.array(is_picture))
        count = 0 if rows is None else rows.shape[0]
        if places != count:
            raise PromptError(f"the prompt has {places} picture tokens for {count} visual tokens")
        if rows is None:
            return embeddings
        row = mx.maximum(mx.cumsum(is_picture.flatten()) - 1, 0).reshape(inputs.shape)
        picked = rows.astype(embeddings.dtype)[row]
        return mx.where(is_picture[..., None], picked, embeddings)

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
        pixel_values: mx.array | Sequence[mx.array] | None = None,
    ) -> mx.array:
        """Token ids (B, L) or embeddings (B, L, hidden) -> logits (B, L, vocabulary)."""
        if pixel_values is not None:
            if input_embeddings is not None:
                raise ValueError("give pixel_values or input_embeddings, not both")
            input_embeddings = self.embed_inputs(inputs, pixel_values=pixel_values)
        return self.language_model(inputs, cache=cache, input_embeddings=input_embeddings)

    def sanitize(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Parameters of this module from the tensors of any published layout."""
        assembled = assemble(self.config, dict(weights))
        language = {
            name.removeprefix("language_model."): tensor
            for name, tensor in assembled.items()
            if name.startswith("language_model.")
        }
        kept = {k: v for k, v in assembled.items() if not k.startswith("language_model.")}
        if hasattr(self.language_model, "sanitize"):
            language = self.language_model.sanitize(language)
        return kept | {f"language_model.{k}": v for k, v in language.items()}

    @property
    def layers(self) -> list[nn.Module]:
        """The language model's layers, as mlx-lm's caches count them."""
        return self.language_model.layers

    def make_cache(self) -> list[Any]:
        """An empty KV cache, of the kind that the language model wants."""
        return make_prompt_cache(self.language_model)

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool]:
        """Quantise the language model alone: the encoder and the projector are small and touchy."""
        return lambda path, _: path.startswith("language_model.")


Model = FastVLM


def build_language_model(text: Mapping[str, Any]) -> nn.Module:
    """The mlx-lm model that the text configuration names (qwen2, llama, mistral, ...).

    Raises:
        ConfigError: mlx-lm has no such architecture, or its settings are incomplete.
    """
    from mlx_lm.utils import MODEL_REMAPPING

    name = MODEL_REMAPPING.get(text["model_type"], text["model_type"])
    try:
        module = importlib.import_module(f"mlx_lm.models.{name}")
    except ImportError:
        raise ConfigError(f"mlx-lm has no language model {text['model_type']!r}") from None
    try:
        return module.Model(module.ModelArgs.from_dict(dict(text)))
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"the settings of the {name} language model: {error}") from None
