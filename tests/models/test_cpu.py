"""The CPU's own ways against MLX's plain convolution, and against math.erf."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from fastvlm_mlx.models import cpu


@pytest.mark.parametrize(
    ("batch", "height", "width", "channels", "multiplier", "kernel", "stride"),
    [
        (1, 64, 64, 6, 1, 7, 1),
        (2, 26, 30, 4, 1, 3, 1),
        (1, 33, 47, 5, 2, 7, 2),
        (1, 16, 16, 3, 2, 3, 1),
        (1, 17, 128, 2, 1, 3, 2),
        (1, 1, 16, 2, 1, 7, 1),
    ],
)
def test_banded_products_equal_the_plain_convolution(
    batch, height, width, channels, multiplier, kernel, stride, monkeypatch
):
    rng = np.random.default_rng(0)
    x = mx.array(rng.standard_normal((batch, height, width, channels), np.float32))
    conv = cpu.GroupedConv2d(channels, channels * multiplier, kernel, stride)
    conv.weight = mx.array(rng.standard_normal(conv.weight.shape, np.float32))
    monkeypatch.setattr(cpu, "_PATCH_ELEMENTS", 40_000)  # several parts
    plain = nn.Conv2d.__call__(conv, x)
    ours = conv(x)
    assert ours.shape == plain.shape
    assert float(mx.abs(ours - plain).max()) < 2e-5


def test_the_band_follows_a_change_of_weights():
    conv = cpu.GroupedConv2d(2, 2, 3)
    x = mx.ones((1, 16, 16, 2))
    before = conv(x)
    conv.update({"weight": conv.weight * 2, "bias": conv.bias * 2})
    assert float(mx.abs(conv(x) - 2 * before).max()) < 1e-5


def test_gelu_is_exact_to_two_millionths():
    x = np.linspace(-12, 12, cpu._LEAST_ELEMENTS, dtype=np.float32)
    erf = np.array([math.erf(v / math.sqrt(2)) for v in x[:: 1 << 6].tolist()])
    exact = 0.5 * x[:: 1 << 6].astype(np.float64) * (1 + erf)
    assert np.abs(np.array(cpu.gelu(mx.array(x)))[:: 1 << 6] - exact).max() < 2e-6


def test_parameters_are_those_of_a_convolution():
    conv = cpu.GroupedConv2d(4, 8, 3)
    conv(mx.ones((1, 16, 16, 4)))
    assert set(conv.parameters()) == {"weight", "bias"}


def test_half_precision_takes_the_plain_way():
    conv = cpu.GroupedConv2d(2, 2, 3)
    conv.set_dtype(mx.bfloat16)
    assert conv(mx.ones((1, 16, 16, 2), dtype=mx.bfloat16)).dtype == mx.bfloat16
