"""Pictures among words: where their tokens go, and what the language model then sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny

from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import ConfigError, PromptError
from fastvlm_mlx.loading import load_folder
from fastvlm_mlx.models.fastvlm import FastVLM, build_language_model
from fastvlm_mlx.models.projector import Projector

Array = np.ndarray[Any, Any]
N = tiny.PICTURE_TOKENS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FastVLM:
    return load_folder(tiny.write(tmp_path_factory.mktemp("tiny")))[0]


def splice(model: FastVLM, ids: list[int], visual: list[Array]) -> Array:
    """The reference's way: cut the ids at each mark, embed the pieces, put pictures in between.

    One id a picture, as `prepare_inputs_labels_for_multimodal` of LLaVA takes them.
    """
    table = np.array(model.language_model.model.embed_tokens.weight)
    pieces: list[Array] = []
    current: list[int] = []
    pictures = iter(visual)
    for token in ids:
        if token == -200:
            pieces += [table[current].reshape(-1, tiny.HIDDEN), next(pictures)]
            current = []
        else:
            current.append(token)
    pieces.append(table[current].reshape(-1, tiny.HIDDEN))
    return np.concatenate(pieces)


def expand(model: FastVLM, ids: list[int], counts: list[int]) -> list[int]:
    """One id a visual token, as `embed_inputs` takes them."""
    left = iter(counts)
    out: list[int] = []
    for token in ids:
        out += [model.config.image_token_id] * next(left) if token == -200 else [token]
    return out


def visual_tokens(model: FastVLM, pixels: Array) -> list[Array]:
    """Each picture through the tower on its own."""
    out = []
    for picture in pixels:
        features = model.vision_tower(mx.array(picture)[None])[0]
        tokens = model.mm_projector(features).reshape(-1, tiny.HIDDEN)
        out.append(np.array(tokens))
    return out


@pytest.mark.parametrize(
    "ids",
    [
        [5, -200, 6],
        [-200, 6, 7],
        [5, 6, -200],
        [5, -200, 6, -200, 7],
        [-200, -200],
        [1, 2, 3, -200, 4, 5, -200, 6, -200, 7, 8],
    ],
)
def test_splice(model: FastVLM, ids: list[int]) -> None:
    count = ids.count(-200)
    pixels = tiny.pictures(count)
    expected = splice(model, ids, visual_tokens(model, pixels))
    tokens = mx.array(expand(model, ids, [N] * count))
    found = np.array(model.embed_inputs(tokens, pixel_values=mx.array(pixels)))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5


def test_pictures_of_different_sizes(model: FastVLM) -> None:
    """Grouped by size for the tower, and still each in its own place."""
    pixels = [tiny.pictures(1, size, seed)[0] for seed, size in enumerate((64, 128, 64, 192))]
    visual = [visual_tokens(model, p[None])[0] for p in pixels]
    ids = [1, -200, 2, -200, 3, -200, -200, 4]
    tokens = mx.array(expand(model, ids, [len(v) for v in visual]))
    found = model.embed_inputs(tokens, pixel_values=[mx.array(p) for p in pixels])
    assert np.abs(np.array(found) - splice(model, ids, visual)).max() < 1e-5


def test_rows_of_a_batch(model: FastVLM) -> None:
    """Rows take pictures in reading order, and a row of text alone takes none."""
    pixels = tiny.pictures(3)
    visual = visual_tokens(model, pixels)
    rows = [[1, -200, *range(20, 27)], list(range(30, 42)), [-200, 2, -200, 4, 5, 6]]
    own = [[0], [], [1, 2]]
    tokens = [expand(model, row, [N] * len(i)) for row, i in zip(rows, own, strict=True)]
    found = model.embed_inputs(mx.array(tokens), pixel_values=mx.array(pixels))
    assert found.shape == (3, 12, tiny.HIDDEN)
    for row, ids, pictures in zip(np.array(found), rows, own, strict=True):
        expected = splice(model, ids, [visual[i] for i in pictures])
        assert np.abs(row - expected).max() < 1e-5


def test_ready_visual_tokens(model: FastVLM) -> None:
    pixels = mx.array(tiny.pictures(2))
    tokens = mx.array(expand(model, [1, -200, 2, -200, 3], [N, N]))
    visual = model.project(model.vision_features(list(pixels)))
    assert [v.shape for v in visual] == [(N, tiny.HIDDEN)] * 2
    ready = model.embed_inputs(tokens, visual_tokens=visual)
    assert mx.allclose(ready, model.embed_inputs(tokens, pixel_values=pixels))


@pytest.mark.parametrize("pictures", [0, 1, 3])
def test_places_and_pictures_differ(model: FastVLM, pictures: int) -> None:
    tokens = mx.array(expand(model, [1, -200, 2, -200, 3], [N, N]))
    pixels = [mx.array(p) for p in tiny.pictures(max(pictures, 1))[:pictures]]
    with pytest.raises(PromptError, match=f"8 picture tokens for {pictures * N} visual tokens"):
        model.embed_inputs(tokens, pixel_values=pixels or None)


def test_pictures_without_a_place(model: FastVLM) -> None:
    with pytest.raises(PromptError, match="0 picture tokens for 4"):
        model.embed_inputs(mx.array([1, 2]), pixel_values=mx.array(tiny.pictures(1)))


def test_text_alone(model: FastVLM) -> None:
    tokens = mx.array([[1, 2, 3]])
    table = model.language_model.model.embed_tokens
    assert mx.array_equal(model.embed_inputs(tokens), table(tokens))


@pytest.mark.parametrize("image", [-200, 10**6])
def test_an_image_id_outside_the_table(model: FastVLM, image: int) -> None:
    """It is never looked up: -200 counts from the end of a table, and 10**6 reads past it."""
    other = FastVLM(replace(model.config, image_token_id=image))
    other.update(model.parameters())
    pixels = mx.array(tiny.pictures(1))
    ids = [1, -200, 2]
    expected = model.embed_inputs(mx.array(expand(model, ids, [N])), pixel_values=pixels)
    found = other.embed_inputs(mx.array(expand(other, ids, [N])), pixel_values=pixels)
    assert mx.array_equal(found, expected)


def test_call_with_pixels(model: FastVLM) -> None:
    """`pixel_values` in the call are `embed_inputs` before it."""
    pixels = mx.array(tiny.pictures(2))
    rows = [expand(model, [1, -200, 2], [N]), expand(model, [3, -200, 4], [N])]
    tokens = mx.array(rows)
    embeddings = model.embed_inputs(tokens, pixel_values=pixels)
    expected = model(tokens, input_embeddings=embeddings)
    assert expected.shape == (2, N + 2, tiny.VOCABULARY)
    assert mx.allclose(model(tokens, pixel_values=pixels), expected, atol=1e-5)
    with pytest.raises(ValueError, match="not both"):
        model(tokens, pixel_values=pixels, input_embeddings=embeddings)


def test_the_answer_depends_on_the_picture(model: FastVLM) -> None:
    tokens = mx.array([expand(model, [1, -200, 2], [N])])
    one = model(tokens, pixel_values=mx.array(tiny.pictures(1, seed=1)))[0, -1]
    other = model(tokens, pixel_values=mx.array(tiny.pictures(1, seed=2)))[0, -1]
    assert np.abs(np.array(one) - np.array(other)).max() > 0.01


def test_a_prompt_in_steps(model: FastVLM) -> None:
    """A cache filled piece by piece ends where one filled at once does."""
    tokens = mx.array(expand(model, [1, 2, -200, 3, 4, 5], [N]))
    embeddings = model.embed_inputs(tokens, pixel_values=mx.array(tiny.pictures(1)))
    whole = model(tokens[None], cache=model.make_cache(), input_embeddings=embeddings[None])
    cache = model.make_cache()
    for i in range(0, len(tokens), 2):
        part = slice(i, i + 2)
        last = model(tokens[None, part], cache=cache, input_embeddings=embeddings[None, part])
    assert cache[0].offset == len(tokens)
    assert np.allclose(np.array(last[0, -1]), np.array(whole[0, -1]), atol=1e-4)


def test_caches_and_layers(model: FastVLM) -> None:
    assert len(model.layers) == len(model.make_cache()) == tiny.LAYERS


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "mistral"])
def test_language_models(model_type: str) -> None:
    text = {**tiny.TEXT_CONFIG, "model_type": model_type, "tie_word_embeddings": False}
    language = build_language_model(text)
    out = language(mx.array([[1, 2, 3]]))
    assert out.shape == (1, 3, tiny.VOCABULARY)


def test_an_unknown_language_model() -> None:
    with pytest.raises(ConfigError, match="no language model 'no_such_thing'"):
        build_language_model({**tiny.TEXT_CONFIG, "model_type": "no_such_thing"})


def test_settings_that_the_language_model_lacks() -> None:
    text = {**tiny.TEXT_CONFIG, "model_type": "qwen2"}
    del text["intermediate_size"]
    with pytest.raises(ConfigError, match="intermediate_size"):
        build_language_model(text)


@pytest.mark.parametrize(
    ("kind", "layers"), [("identity", 0), ("linear", 1), ("mlp1x_gelu", 1), ("mlp3x_gelu", 3)]
)
def test_projectors(kind: str, layers: int) -> None:
    config = {**tiny.llava_config(), "mm_projector_type": kind}
    projector = Projector(ModelConfig.from_dict(config).projector)
    linear = [layer for layer in projector.layers if "weight" in layer]
    assert len(linear) == layers
    out = projector(mx.ones((3, 256)))
    assert out.shape == ((3, 64) if layers else (3, 256))


def test_the_projector_has_an_exact_gelu() -> None:
    config = ModelConfig.from_dict(tiny.llava_config()).projector
    projector = Projector(config)
    first, _, second = projector.layers
    import naive

    x = np.random.default_rng(0).standard_normal((5, 256))
    hidden = naive.gelu(x @ np.array(first.weight).T + np.array(first.bias))
    expected = hidden @ np.array(second.weight).T + np.array(second.bias)
    assert np.allclose(np.array(projector(mx.array(x))), expected, atol=1e-5)


def test_sanitize_any_layout(model: FastVLM, tmp_path: Path) -> None:
    """What mlx-lm calls between reading a file and loading it."""
    wanted = {name: p.shape for name, p in tiny.parameters(model).items()}
    for convert in (dict, tiny.as_mlx, tiny.as_transformers):
        tensors = {n: mx.array(t) for n, t in convert(tiny.llava(tied=False)).items()}
        made = model.sanitize(tensors)
        assert {name: p.shape for name, p in made.items()} == wanted
