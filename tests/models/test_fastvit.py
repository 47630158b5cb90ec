"""The encoder's shapes, and what it refuses. Its values are checked in tests/weights and golden."""

from __future__ import annotations

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import tiny

from fastvlm_mlx.config import ARCHITECTURES, FASTVITHD, MCI2, ModelConfig, VisionConfig
from fastvlm_mlx.models.fastvit import FastViT
from fastvlm_mlx.weights.folding import expected_shapes

SMALL = ModelConfig.from_dict(tiny.llava_config()).vision
SMALL_MCI2 = replace(MCI2, depths=(1, 1, 1, 1), embed_dims=(8, 16, 32, 64))


@pytest.mark.parametrize(
    ("config", "size", "shape"),
    [
        (SMALL, (64, 64), (1, 1, 256)),
        (SMALL, (128, 192), (2, 3, 256)),
        (SMALL, (192, 64), (3, 1, 256)),
        (SMALL_MCI2, (32, 96), (1, 3, 128)),
    ],
)
def test_shape(config: VisionConfig, size: tuple[int, int], shape: tuple[int, ...]) -> None:
    tower = FastViT(config)
    out = tower(mx.zeros((2, *size, 3)))
    assert out.shape == (2, *shape)
    assert config.grid(*size) == shape[:2]
    assert out.shape[-1] == config.feature_dim


@pytest.mark.parametrize("shape", [(1, 64, 65, 3), (1, 0, 64, 3), (1, 64, 64, 4), (1, 32, 64, 3)])
def test_unusable_pixels(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 64"):
        FastViT(SMALL)(mx.zeros(shape))


def test_pictures_of_a_batch_do_not_meet() -> None:
    tower = FastViT(SMALL)
    pixels = mx.array(tiny.pictures(3))
    together = tower(pixels)
    for i in range(3):
        alone = tower(pixels[i : i + 1])
        assert np.allclose(np.array(alone[0]), np.array(together[i]), atol=1e-5)


@pytest.mark.parametrize(("name", "patch"), [("fastvit_mci2", 32), ("fastvit_mci3", 64)])
def test_patch_size(name: str, patch: int) -> None:
    assert ARCHITECTURES[name].patch_size == patch


def test_published_size() -> None:
    """125.07 M parameters as released: head and layer scales included, statistics not."""
    counted = {n: s for n, s in expected_shapes(FASTVITHD).items() if ".running_" not in n}
    head = 3072 * 768
    count = sum(math.prod(shape) for shape in counted.values()) + head
    assert round(count / 1e6, 2) == 125.07


def test_fastvithd() -> None:
    assert FASTVITHD.feature_dim == 3072
    assert FASTVITHD.se_dim == 192
    assert FASTVITHD.grid(1024, 768) == (16, 12)
