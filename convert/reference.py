"""The same model in transformers and torch, for `verify(reference=True)`. Needs the parity extra.

The weights go from the source's names to those of `FastVlmForConditionalGeneration` by way of the
canonical ones (whose encoder names are timm's), so any layout can be compared; nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvlm_mlx.config import ModelConfig, VisionConfig, read_config
from fastvlm_mlx.errors import CheckpointError, UsageError
from fastvlm_mlx.loading import believe_tensors
from fastvlm_mlx.weights.files import LazyTensor, open_tensors
from fastvlm_mlx.weights.layouts import LANGUAGE, PROJECTOR, VISION, translate

if TYPE_CHECKING:
    from .verify import Trace

_IMAGE = -200
_ARCHITECTURE = "fastvit_mci3"  # the names of the others are the same; sizes come from model_args


def trace_with_transformers(folder: Path, given: Sequence[Trace], tokens: int) -> list[Trace]:
    """What transformers makes of the very pixels and prompts in `given`, in float32.

    Raises:
        UsageError: torch, transformers or timm is missing, or has no model like this one.
        CheckpointError: tensors do not fit the model there.
    """
    try:
        import timm  # noqa: F401 - transformers needs it for the encoder
        import torch
        from transformers import FastVlmForConditionalGeneration
    except ImportError as error:
        raise UsageError(
            f"comparing with transformers needs {error.name or 'it'}: "
            "pip install 'fastvlm-mlx[parity]'"
        ) from None
    config = read_config(folder)
    with open_tensors(folder) as tensors, torch.inference_mode():
        config, _ = believe_tensors(config, tensors)
        model = FastVlmForConditionalGeneration(_transformers_config(config)).eval()
        _load(model, config, tensors)
        return [_trace_one(torch, model, one, tokens) for one in given]


def _transformers_config(config: ModelConfig) -> Any:
    from transformers import FastVlmConfig

    if config.quantization:
        raise UsageError("transformers does not read MLX's quantised weights: compare the original")
    if config.projector.kind != "mlp2x_gelu" or config.text["model_type"] != "qwen2":
        raise UsageError("transformers' FastVLM has a two-layer projector and a Qwen2 model only")
    return FastVlmConfig(
        text_config=dict(config.text),
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": _ARCHITECTURE,
            "hidden_size": config.vision.feature_dim,
            "do_pooling": True,
            "global_pool": "avg",
            "num_classes": 0,
            "model_args": {"inference_mode": True, **_timm_arguments(config.vision)},
        },
        tie_word_embeddings=bool(config.text.get("tie_word_embeddings")),
    )


def _timm_arguments(vision: VisionConfig) -> dict[str, Any]:
    return {
        "layers": list(vision.depths),
        "embed_dims": list(vision.embed_dims),
        "mlp_ratios": list(vision.mlp_ratios),
    }


def _load(model: Any, config: ModelConfig, tensors: Mapping[str, LazyTensor]) -> None:
    """Copy each tensor into the module that has its name there."""
    import torch

    names = translate(tensors, config.vision)
    own = model.state_dict()
    wanted = set(own)
    for source, target in names.canonical.items():
        there = _name_there(target)
        if there == "lm_head.weight" and config.text.get("tie_word_embeddings"):
            continue
        if there not in own:
            raise CheckpointError(f"{source}: transformers has no {there}; are branches unfused?")
        values = np.asarray(tensors[source].numpy(), np.float32)
        if values.ndim == 4 and not names.layout.channels_first:
            values = values.transpose(0, 3, 1, 2)
        own[there].copy_(torch.from_numpy(np.ascontiguousarray(values)).reshape(own[there].shape))
        wanted.discard(there)
    if config.text.get("tie_word_embeddings"):
        model.tie_weights()
        wanted.discard("lm_head.weight")
    # The pooled head and BatchNorm's counters play no part.
    wanted = {name for name in wanted if not name.endswith("num_batches_tracked")}
    wanted = {name for name in wanted if ".head." not in name}
    if wanted:
        raise CheckpointError(f"transformers wants {sorted(wanted)[0]}, which the source lacks")


def _name_there(canonical: str) -> str:
    if canonical.startswith(VISION):
        return f"model.vision_tower.timm_model.{canonical.removeprefix(VISION)}"
    if canonical.startswith(PROJECTOR):
        position, part = canonical.removeprefix(PROJECTOR).split(".")
        return f"model.multi_modal_projector.linear_{int(position) // 2 + 1}.{part}"
    name = canonical.removeprefix(LANGUAGE)
    return f"model.language_model.{name.removeprefix('model.')}" if "lm_head" not in name else name


def _trace_one(torch: Any, model: Any, given: Trace, tokens: int) -> Trace:
    pixels = torch.from_numpy(np.ascontiguousarray(given.pixels.transpose(2, 0, 1)))[None]
    seen = model.model.get_image_features(pixel_values=pixels, return_dict=True)
    features = seen.last_hidden_state[0].permute(1, 2, 0)  # (c, h, w) -> (h, w, c)
    projected = seen.pooler_output[0]
    ids = torch.tensor(given.prompt)
    embeddings = model.get_input_embeddings()(torch.where(ids == _IMAGE, 0, ids))
    embeddings[ids == _IMAGE] = projected
    past, step, greedy, first = None, embeddings[None], [], None
    for _ in range(tokens):
        out = model(inputs_embeds=step, past_key_values=past, use_cache=True, logits_to_keep=1)
        logits = out.logits[0, -1]
        first = logits if first is None else first
        past = out.past_key_values
        greedy.append(int(logits.argmax()))
        step = model.get_input_embeddings()(torch.tensor([[greedy[-1]]]))
    assert first is not None
    return replace(
        given,
        features=features.double().numpy(),
        projected=projected.double().numpy(),
        logits=first.double().numpy(),
        tokens=greedy,
    )
