"""From named tensors to parameters, and complaints in the checkpoint's own words."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import tiny

from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.weights.assemble import assemble, check_shapes


@pytest.fixture
def tensors() -> dict[str, mx.array]:
    return {name: mx.array(tensor) for name, tensor in tiny.llava().items()}


CONFIG = ModelConfig.from_dict(tiny.llava_config())
SOME = tiny.APPLE_TOWER + "network.0.0.convffn.fc1.weight"


def test_layouts_meet(tensors: dict[str, mx.array]) -> None:
    ours = assemble(CONFIG, dict(tensors))
    for convert in (tiny.as_mlx, tiny.as_transformers):
        theirs = assemble(CONFIG, {n: mx.array(t) for n, t in convert(tiny.llava()).items()})
        assert theirs.keys() == ours.keys()
        assert all(mx.array_equal(theirs[name], ours[name]) for name in ours)


def test_language_and_projector_are_passed_on(tensors: dict[str, mx.array]) -> None:
    made = assemble(CONFIG, dict(tensors))
    for name in tiny.language():
        assert mx.array_equal(made["language_model." + name], tensors[name])
    for name in tiny.projector():
        ours = name.replace("model.mm_projector.", "mm_projector.layers.")
        assert mx.array_equal(made[ours], tensors[name])


def test_the_argument_is_emptied(tensors: dict[str, mx.array]) -> None:
    """So that the memory of a tensor can go as soon as it has been folded."""
    assemble(CONFIG, tensors)
    assert not any("network" in name and "num_batches" not in name for name in tensors)


def test_missing(tensors: dict[str, mx.array]) -> None:
    del tensors[SOME]
    with pytest.raises(CheckpointError, match=r"missing: vision_tower\.stages\.0\..*fc1\.weight"):
        assemble(CONFIG, tensors)


def test_unexpected(tensors: dict[str, mx.array]) -> None:
    strange = tiny.APPLE_TOWER + "network.0.7.layer_scale"
    tensors[strange] = mx.zeros((8, 1, 1))
    tensors["model.vision_tower.colour"] = mx.zeros((1,))
    with pytest.raises(CheckpointError) as error:
        assemble(CONFIG, tensors)
    assert f"unexpected: {strange}, model.vision_tower.colour" in str(error.value)


def test_wrong_shape(tensors: dict[str, mx.array]) -> None:
    tensors[SOME] = tensors[SOME][:-1]
    with pytest.raises(CheckpointError) as error:
        assemble(CONFIG, tensors)
    assert f"wrong shape: {SOME} (31, 1, 1, 8), expected (32, 1, 1, 8)" in str(error.value)


def test_everything_wrong_at_once(tensors: dict[str, mx.array]) -> None:
    del tensors[SOME]
    tensors["stranger"] = mx.zeros((1,))
    scale = tiny.APPLE_TOWER + "network.0.0.layer_scale"
    tensors[scale] = tensors[scale][:-1]
    with pytest.raises(CheckpointError, match=r"missing: .*; unexpected: stranger; wrong shape: "):
        assemble(CONFIG, tensors)


def test_a_long_list_is_cut() -> None:
    expected = {f"t{i}": (1,) for i in range(20)}
    with pytest.raises(CheckpointError, match=r"t7 and 12 more$"):
        check_shapes(expected, {}, {}, [])


@pytest.mark.parametrize("module", ["conv_exp", "patch_embed.1", "network.1.proj.0", "network.6"])
def test_a_convolution_that_is_wholly_missing(tensors: dict[str, mx.array], module: str) -> None:
    """Not taken for one of which training has left other branches: a gate may lie beside it."""
    gone = [
        name
        for name in tensors
        if name.startswith(tiny.APPLE_TOWER + module + ".")
        and ("reparam" in name)
        and ".0.0." not in name
    ]
    assert gone
    for name in gone:
        del tensors[name]
    with pytest.raises(CheckpointError, match=r"missing: .*reparam_conv\.weight"):
        assemble(CONFIG, tensors)


def test_no_encoder_at_all() -> None:
    tensors = {n: mx.array(t) for n, t in tiny.as_apple_mlx(tiny.llava()).items()}
    with pytest.raises(CheckpointError, match=r"no vision tower .*fastvithd\.mlpackage"):
        assemble(CONFIG, tensors)


def test_a_linear_projector(tensors: dict[str, mx.array]) -> None:
    config = replace(CONFIG, projector=replace(CONFIG.projector, kind="linear"))
    weight = tensors["model.mm_projector.0.weight"]
    for name in tiny.projector():
        del tensors[name]
    tensors["model.mm_projector.weight"] = weight
    tensors["model.mm_projector.bias"] = mx.zeros((tiny.HIDDEN,))
    made = assemble(config, tensors)
    assert mx.array_equal(made["mm_projector.layers.0.weight"], weight)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_folding_is_in_float32(tensors: dict[str, mx.array], dtype: str) -> None:
    half = {name: t.astype(getattr(mx, dtype)) for name, t in tensors.items()}
    made = assemble(CONFIG, half)
    whole = assemble(CONFIG, dict(tensors))
    for name, value in made.items():
        if name.startswith("vision_tower."):
            assert value.dtype == mx.float32
            assert np.allclose(np.array(value), np.array(whole[name]), atol=0.05, rtol=0.05)
