"""Agreement with the published PyTorch model, from weights that are functions of their names.

`golden_weights.py` and the outputs beside it were made with Apple's encoder and projector and
Hugging Face's Qwen2 in float32. Nothing is written to disk: the 0.5 B tensors are computed, put
through `FastVLM.sanitize` as mlx-lm would, and thrown away after this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
from golden_weights import picture, tensor
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerFast

from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.models.fastvlm import FastVLM

pytestmark = pytest.mark.slow

HIDDEN, LAYERS, KV, INTERMEDIATE, VOCABULARY = 896, 24, 128, 4864, 151936

CONFIG = {
    "model_type": "llava_qwen2",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": INTERMEDIATE,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": "mobileclip_l_1024",
    "image_aspect_ratio": "pad",
}


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the published 0.5 B checkpoint."""
    for entry in tiny.encoder(tiny.FASTVITHD):
        if not entry.apple.endswith("num_batches_tracked"):
            yield tiny.APPLE_TOWER + entry.apple, entry.shape
    for i, width in ((0, 3072), (2, HIDDEN)):
        yield f"model.mm_projector.{i}.weight", (HIDDEN, width)
        yield f"model.mm_projector.{i}.bias", (HIDDEN,)
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for part, rows in (("q", HIDDEN), ("k", KV), ("v", KV)):
            yield f"{layer}.self_attn.{part}_proj.weight", (rows, HIDDEN)
            yield f"{layer}.self_attn.{part}_proj.bias", (rows,)
        yield f"{layer}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield f"{layer}.mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{layer}.mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{layer}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
        yield f"{layer}.input_layernorm.weight", (HIDDEN,)
        yield f"{layer}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)


@pytest.fixture(scope="module")
def model() -> Iterator[FastVLM]:
    model = FastVLM(ModelConfig.from_dict(CONFIG))
    weights = model.sanitize({name: mx.array(tensor(name, shape)) for name, shape in shapes()})
    model.load_weights(list(weights.items()))
    del weights
    model.eval()
    mx.eval(model.parameters())
    yield model
    del model
    mx.clear_cache()


@dataclass
class Seen:
    """The reference's outputs for one picture, and ours."""

    golden: dict[str, np.ndarray[Any, Any]]
    features: mx.array  # (h, w, 3072)
    visual_tokens: mx.array  # (h * w, hidden)


@pytest.fixture(scope="module", params=[256, 1024])
def seen(model: FastVLM, request: pytest.FixtureRequest) -> Seen:
    size = request.param
    with np.load(Path(__file__).with_name(f"reference_{size}.npz")) as file:
        golden = dict(file)
    assert golden["size"].tolist() == [size, size]
    pixels = mx.array(picture(size, size)).transpose(0, 2, 3, 1)
    features = model.vision_features(list(pixels))
    visual_tokens = model.project(features)
    mx.eval(features, visual_tokens)
    return Seen(golden, features[0], visual_tokens[0])


def test_features(seen: Seen) -> None:
    expected = seen.golden["features"][0].transpose(1, 2, 0).astype(np.float32)
    # The file of the larger picture holds half precision, which adds a rounding of its own.
    rounding = 2**-11 * np.abs(expected).max() if seen.golden["features"].dtype == "f2" else 0
    assert seen.features.shape == expected.shape
    assert np.abs(np.array(seen.features) - expected).max() < 2e-3 + rounding


def test_visual_tokens(seen: Seen) -> None:
    expected = seen.golden["projected"][0].astype(np.float32)
    assert seen.visual_tokens.shape == expected.shape
    assert np.abs(np.array(seen.visual_tokens) - expected).max() < 2e-3


def test_answer(model: FastVLM, seen: Seen) -> None:
    golden, image = seen.golden, model.config.image_token_id
    places = [image] * len(seen.visual_tokens)
    ids = mx.array([*golden["pre"].tolist(), *places, *golden["post"].tolist()])
    embeddings = model.embed_inputs(ids, visual_tokens=[seen.visual_tokens])
    mx.eval(embeddings)
    rows: list[mx.array] = []

    def keep(_: mx.array, logits: mx.array) -> mx.array:
        rows.append(logits[0])
        return logits

    bytes_only = PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer())
    steps = mlx_lm.stream_generate(
        model,
        TokenizerWrapper(bytes_only),
        mx.maximum(ids, 0),
        max_tokens=len(golden["greedy"]),
        input_embeddings=embeddings,
        logits_processors=[keep],
    )
    assert [step.token for step in steps] == golden["greedy"].tolist()
    logits = np.array(rows[0])
    top = np.argsort(-logits)[: len(golden["top_ids"])]
    assert top.tolist() == golden["top_ids"].tolist()
    assert np.abs(logits[top] - golden["top_logits"]).max() < 1e-2
