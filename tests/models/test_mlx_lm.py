"""mlx-lm's own tools on our model, as they are: generation, caches, quantisation, loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import tiny
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
from mlx_lm.utils import load_model, quantize_model, save_model

from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.loading import load_folder
from fastvlm_mlx.models import fastvlm
from fastvlm_mlx.models.fastvlm import FastVLM
from fastvlm_mlx.processing.processor import Processor

N = tiny.PICTURE_TOKENS
Loaded = tuple[FastVLM, Processor]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load_folder(tiny.write(tmp_path_factory.mktemp("tiny")))


def prompt_with(loaded: Loaded, pictures: int) -> tuple[mx.array, mx.array]:
    """Ids and embeddings of a question about some pictures."""
    model, processor = loaded
    ids = mx.array(processor.prompt("What?", [N] * pictures).token_ids)
    pixels = list(mx.array(tiny.pictures(pictures))) if pictures else None
    embeddings = model.embed_inputs(ids, pixel_values=pixels)
    mx.eval(embeddings)
    return ids, embeddings


def greedy_by_hand(model: FastVLM, embeddings: mx.array, count: int) -> list[int]:
    """Without a cache: the whole text again for every token."""
    table = model.language_model.model.embed_tokens
    tokens: list[int] = []
    for _ in range(count):
        logits = model(mx.zeros((1, len(embeddings)), mx.int32), input_embeddings=embeddings[None])
        tokens.append(int(np.argmax(np.array(logits[0, -1]))))
        embeddings = mx.concatenate([embeddings, table(mx.array(tokens[-1:]))])
    return tokens


def steps(model: FastVLM, ids: mx.array, embeddings: mx.array, **options: Any) -> list[int]:
    made = generate_step(ids, model, input_embeddings=embeddings, max_tokens=6, **options)
    return [int(token) for token, _ in made]


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_generation(loaded: Loaded, pictures: int) -> None:
    ids, embeddings = prompt_with(loaded, pictures)
    assert steps(loaded[0], ids, embeddings) == greedy_by_hand(loaded[0], embeddings, 6)


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_prompts_longer_than_a_prefill_step(loaded: Loaded, size: int) -> None:
    """The same scores, wherever the steps cut the prompt; inside a picture too."""
    ids, embeddings = prompt_with(loaded, 2)
    whole = next(generate_step(ids, loaded[0], input_embeddings=embeddings))[1]
    step = {"prefill_step_size": size}
    cut = next(generate_step(ids, loaded[0], input_embeddings=embeddings, **step))[1]
    assert np.allclose(np.array(cut), np.array(whole), atol=1e-4)


def test_text_through_mlx_lm_generate(loaded: Loaded) -> None:
    model, processor = loaded
    ids = processor.prompt("Tell me.").token_ids
    text = mlx_lm.generate(model, processor.tokenizer, ids, max_tokens=8)
    again = mlx_lm.stream_generate(model, processor.tokenizer, ids, max_tokens=8)
    assert text == "".join(step.text for step in again)


def test_batches_of_text(loaded: Loaded) -> None:
    """Prompts of different lengths together answer as they do alone."""
    model, processor = loaded
    prompts = [processor.prompt(text).token_ids for text in ("a", "A longer question?", "bc " * 20)]
    batch = batch_generate(model, processor.tokenizer, prompts, max_tokens=6)
    for prompt, text in zip(prompts, batch.texts, strict=True):
        assert text == mlx_lm.generate(model, processor.tokenizer, prompt, max_tokens=6)


def test_a_prompt_cache_goes_on(loaded: Loaded) -> None:
    """The picture is read once: the second question goes on from the cache of the first."""
    model, _ = loaded
    ids, embeddings = prompt_with(loaded, 1)
    tail = mx.array([5, 6, 7])
    table = model.language_model.model.embed_tokens
    whole = mx.concatenate([embeddings, table(tail)])
    expected = steps(model, mx.concatenate([ids, tail]), whole)

    cache = model.make_cache()
    model(ids[None], cache=cache, input_embeddings=embeddings[None])
    assert cache[0].offset == len(ids)
    found = [int(t) for t, _ in generate_step(tail, model, prompt_cache=cache, max_tokens=6)]
    assert found == expected


def test_a_cache_can_be_cut_back(loaded: Loaded) -> None:
    model, _ = loaded
    ids, embeddings = prompt_with(loaded, 1)
    cache = model.make_cache()
    assert can_trim_prompt_cache(cache)
    first = steps(model, ids, embeddings, prompt_cache=cache)
    trim_prompt_cache(cache, cache[0].offset - len(ids) + 1)
    assert steps(model, ids[-1:], embeddings[-1:], prompt_cache=cache) == first


@pytest.mark.parametrize("options", [{"max_kv_size": 256}, {"kv_bits": 8, "kv_group_size": 32}])
def test_other_caches(loaded: Loaded, options: dict[str, int]) -> None:
    model, processor = loaded
    if "kv_bits" in options:
        options = {**options, "quantized_kv_start": 0}
        text = {**tiny.TEXT_CONFIG, "num_attention_heads": 2, "num_key_value_heads": 1}
        assert text["hidden_size"] // 2 == 32  # the least group that a cache is packed in
        config = {**tiny.llava_config(), **text, "image_token_index": model.config.image_token_id}
        model = FastVLM(fastvlm.ModelArgs.from_dict(config))
    ids, embeddings = prompt_with((model, processor), 1)
    assert len(steps(model, ids, embeddings, **options)) == 6


# Quantisation -------------------------------------------------------------------------------------


def quantise(folder: Path, **options: Any) -> tuple[FastVLM, dict[str, Any]]:
    model, _ = load_folder(tiny.write(folder, "mlx"))
    return quantize_model(model, tiny.mlx_config(), options.pop("group_size", 32), 4, **options)


def test_only_the_language_model_is_quantised(tmp_path: Path) -> None:
    model, config = quantise(tmp_path)
    packed = {
        path
        for path, m in model.named_modules()
        if isinstance(m, nn.QuantizedLinear | nn.QuantizedEmbedding)
    }
    linear = {
        "language_model." + name.removesuffix(".weight")
        for name, shape in tiny.language().items()
        if len(shape) == 2
    }
    assert packed == linear
    assert config["quantization"]["bits"] == 4


def test_a_quantised_model_answers(tmp_path: Path) -> None:
    model, _ = quantise(tmp_path)
    tokens = mx.array([[1, *[model.config.image_token_id] * N, 2]])
    assert model(tokens, pixel_values=mx.array(tiny.pictures(1))).shape == (1, 6, tiny.VOCABULARY)


# Loading ------------------------------------------------------------------------------------------


def classes(config: dict[str, Any]) -> tuple[type, type]:
    return fastvlm.Model, fastvlm.ModelArgs


@pytest.mark.parametrize("layout", ["mlx", "llava", "transformers"])
def test_mlx_lm_loads_our_folders(loaded: Loaded, tmp_path: Path, layout: str) -> None:
    """With our classes for the names it asks for, and nothing else changed."""
    model, _ = load_model(tiny.write(tmp_path, layout, shards=2), get_model_classes=classes)
    ours = tiny.parameters(loaded[0])
    theirs = tiny.parameters(model)
    assert theirs.keys() == ours.keys()
    assert all(mx.array_equal(theirs[name], ours[name]) for name in ours)


def test_mlx_lm_loads_what_it_quantised(tmp_path: Path) -> None:
    """In the layout on disk: the encoder as published, the language model packed."""
    folder = tmp_path / "packed"
    model, config = quantise(tmp_path / "whole")
    folder.mkdir()
    tensors = {n: mx.array(t) for n, t in tiny.as_mlx(tiny.llava()).items()}
    kept = {n: t for n, t in tensors.items() if not n.startswith("language_model.")}
    packed = tiny.parameters(model.language_model)
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        kept | {f"language_model.{n}": t for n, t in packed.items()},
    )
    (folder / "config.json").write_text(json.dumps(config))
    again, _ = load_model(folder, get_model_classes=classes)
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(again(tokens), model(tokens))


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_saved_by_mlx_lm(tmp_path: Path, packed: bool) -> None:
    """Its `convert` and `fuse` write the running model, folded, under its own names."""
    if packed:
        model, config = quantise(tmp_path)
    else:
        model, config = load_folder(tiny.write(tmp_path, "mlx"))[0], tiny.mlx_config()
    (tmp_path / "model.safetensors").unlink()
    save_model(tmp_path, model)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = mx.array([[1, 2, *[model.config.image_token_id] * N, 3]])
    expected = model(tokens, pixel_values=mx.array(tiny.pictures(1)))
    theirs, _ = load_model(tmp_path, get_model_classes=classes)
    ours, _ = load_folder(tmp_path, "float32")
    assert ours.loaded_from.layout == "mlx-lm"
    for again in (theirs, ours):
        again.config = model.config
        assert mx.allclose(again(tokens, pixel_values=mx.array(tiny.pictures(1))), expected)


def test_a_model_saved_by_mlx_lm_that_lacks_a_tensor(tmp_path: Path) -> None:
    model, _ = load_folder(tiny.write(tmp_path, "mlx"))
    (tmp_path / "model.safetensors").unlink()
    tensors = tiny.parameters(model)
    del tensors["vision_tower.final_conv.se.fc1.bias"]
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    with pytest.raises(CheckpointError, match=r"missing: vision_tower\.final_conv\.se\.fc1\.bias"):
        load_folder(tmp_path)
