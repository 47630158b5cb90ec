"""A converted folder in mlx-vlm: the same tokens from the same pixels.

mlx-vlm builds FastViTHD in full size only, so the encoder is that, with random weights; the
language model is tiny and the picture small. Run where mlx-vlm is installed:
`pip install mlx-vlm==0.7.10`, then `pytest tests/parity/test_mlx_vlm.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny

mlx_vlm = pytest.importorskip("mlx_vlm")

from fastvlm_mlx.convert import ConvertOptions, convert  # noqa: E402
from mlx_vlm.models import cache as vlm_cache  # noqa: E402
from mlx_vlm.prompt_utils import apply_chat_template  # noqa: E402

from fastvlm_mlx import load  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

QUESTION = "What is this?"
TOKENS = 8
WAYS = {
    "plain": ConvertOptions(),
    "4 bits": ConvertOptions(bits=4, group_size=32),
    "mixed": ConvertOptions(
        recipe="mixed_3_6", group_size=32, keep=("embed_tokens",), projector_bits=8
    ),
    "mxfp4": ConvertOptions(mode="mxfp4"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch = tiny.FASTVITHD
    shapes = {tiny.APPLE_TOWER + e.apple: e.shape for e in tiny.encoder(arch)}
    shapes |= tiny.projector(arch) | tiny.language(tied=False)
    tensors = {name: tiny.value(name, shape) for name, shape in shapes.items()}
    return tiny.write(
        tmp_path_factory.mktemp("source") / "FastVLM",
        tensors=tensors,
        config={"vision_config": None, "mm_hidden_size": 3072},
    )


@pytest.mark.parametrize("way", WAYS)
def test_the_same_greedy_tokens(source: Path, tmp_path: Path, way: str) -> None:
    report = convert(source, tmp_path / "t", WAYS[way])
    assert not any("fastvlm-mlx only" in note for note in report.notes)
    picture = tiny.pictures(seed=2)[0]
    expected, prompt, wanted = with_ours(tmp_path / "t", picture)
    logits, text, tokens = with_mlx_vlm(tmp_path / "t", picture)
    assert text == prompt
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, atol=1e-4 * scale)
    assert tokens == wanted


def with_ours(folder: Path, picture: np.ndarray) -> tuple[np.ndarray, str, list[int]]:
    """(logits after the prompt, the prompt's text, greedy tokens)."""
    model, processor = load(folder)
    visual = model.project(model.vision_features([mx.array(picture)]))
    prompt = processor.prompt(QUESTION, [visual[0].shape[0]])
    embeddings = model.embed_inputs(mx.array(prompt.token_ids), visual_tokens=visual)[None]
    cache = model.make_cache()
    logits = model(mx.array([prompt.token_ids]), cache=cache, input_embeddings=embeddings)[0, -1]
    first, tokens = np.array(logits), []
    for _ in range(TOKENS):
        tokens.append(int(mx.argmax(logits).item()))
        logits = model(mx.array([[tokens[-1]]]), cache=cache)[0, -1]
    return first, prompt.text, tokens


def with_mlx_vlm(folder: Path, picture: np.ndarray) -> tuple[np.ndarray, str, list[int]]:
    model, processor = mlx_vlm.load(str(folder))
    text: Any = apply_chat_template(processor, model.config, QUESTION, num_images=1)
    ids = processor(text=text)["input_ids"]
    assert -200 in ids[0]
    stops = processor.tokenizer.stopping_criteria.eos_token_ids
    assert {tiny.IM_END, tiny.ENDOFTEXT} <= set(stops)
    pixels = mx.array(picture.transpose(2, 0, 1)[None])
    mask = mx.ones(ids.shape, mx.int32)
    embeddings = model.get_input_embeddings(mx.array(ids), pixels, mask).inputs_embeds
    language = model.language_model
    cache = vlm_cache.make_prompt_cache(language)
    logits = language(mx.array(ids), cache=cache, inputs_embeds=embeddings).logits[0, -1]
    first, tokens = np.array(logits.astype(mx.float32)), []
    for _ in range(TOKENS):
        tokens.append(int(mx.argmax(logits).item()))
        logits = language(mx.array([[tokens[-1]]]), cache=cache).logits[0, -1]
    return first, text, tokens
