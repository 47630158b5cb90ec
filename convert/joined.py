"""A source as a model in memory, for comparing with: also one that is no folder by itself (an
adapter on its base, an encoder from elsewhere)."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model

from fastvlm_mlx import device
from fastvlm_mlx.config import ModelConfig, picture_config
from fastvlm_mlx.loading import believe_tokenizer, cast, load_tokenizer, quantise_like
from fastvlm_mlx.models.fastvlm import FastVLM
from fastvlm_mlx.processing.processor import Processor, picture_processor
from fastvlm_mlx.weights.assemble import assemble_canonical, channels_last, check_shapes
from fastvlm_mlx.weights.layouts import Names

from .merge import LLAVA
from .plan import whole_value
from .sidecars import tokenizer_folder
from .source import Source


def load_source(source: Source, config: ModelConfig) -> tuple[FastVLM, Processor]:
    """The model as `fastvlm_mlx.load` would make it, in float32. `config` is the corrected one.

    Takes the memory of the whole model, unlike a conversion.
    """
    canonical = {
        name: channels_last(name, whole_value(origin), origin.layout)
        for name, origin in source.tensors.items()
    }
    names = Names(LLAVA, {origin.tensor.name: name for name, origin in source.tensors.items()})
    parameters = assemble_canonical(config, canonical, names)
    model: Any = FastVLM(config)
    quantised = quantise_like(model, parameters)
    own: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    expected = {name: tuple(p.shape) for name, p in own.items()}
    check_shapes(expected, {n: tuple(p.shape) for n, p in parameters.items()}, {}, [])
    model.load_weights(list(parameters.items()))
    del canonical, parameters
    if quantised and not device.on_gpu():
        model = dequantize_model(model)
    cast(model, mx.float32)
    model.eval()
    mx.eval(model.parameters())
    tokenizer = load_tokenizer(tokenizer_folder(source), config)
    config = believe_tokenizer(config, tokenizer, [])
    model.config = model.args = config
    settings = next((s for f in source.folders if (s := picture_config(f))), {})
    return model, Processor(config, picture_processor(config, settings), tokenizer)
