"""The encoder's two slow spots on MLX's CPU backend, computed another way. No GPU comes here.

That backend runs grouped convolutions in a plain loop and calls the C library's `erf` for each
element; at 1024 x 1024 px the two take most of the encoder's time. So on a CPU, in float32:

- a grouped convolution becomes matrix products, which BLAS does: one for each channel and strip of
  columns, with the kernel spread out into a banded matrix;
- the `erf` of GELU becomes a rational function, wrong by less than 5e-7, which `mx.compile` turns
  into one loop (op by op where there is no C++ compiler).
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

# erf(z) = z * P(z^2) / Q(z^2) for |z| <= _ERF_END, fitted to math.erf by iteratively reweighted
# least squares; the largest error is 2.5e-7. Past _ERF_END, 1 - erf(z) is below 3e-8.
_ERF_END = 3.92
_P = (
    1.1283769947545572,
    0.3380211756337981,
    0.07084909636839021,
    0.00967355268595109,
    0.00034576815924078314,
)
_Q = (
    1.0,
    0.6328723958752104,
    0.17383349859534797,
    0.026896914661499998,
    0.0024581673930673285,
    1.9964029241060193e-05,
)

# Output columns of a strip. Wider strips mean larger products, and more zeros in the band.
_STRIP = 16
# Elements of the patches that are laid out at one time: 16 MiB, to bound memory and stay in cache.
_PATCH_ELEMENTS = 1 << 22


# Below these sizes the plain ways take milliseconds, and making the better ones ready takes more.
_LEAST_ELEMENTS = 1 << 18
_LEAST_WIDTH = 16


def _on_cpu(x: mx.array) -> bool:
    return x.dtype == mx.float32 and mx.default_device().type == mx.DeviceType.cpu


def _horner(u: mx.array, coefficients: tuple[float, ...]) -> mx.array:
    result = u * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        result = (result + coefficient) * u
    return result + coefficients[0]


def _gelu(x: mx.array) -> mx.array:
    z = mx.clip(x * math.sqrt(0.5), -_ERF_END, _ERF_END)
    u = z * z
    return 0.5 * x * (1.0 + z * _horner(u, _P) / _horner(u, _Q))


_compiled_gelu = mx.compile(_gelu, shapeless=True)


def gelu(x: mx.array) -> mx.array:
    """GELU, to about 2e-6 of the exact one."""
    return _compiled_gelu(x) if _on_cpu(x) and x.size >= _LEAST_ELEMENTS else nn.gelu(x)


class GroupedConv2d(nn.Conv2d):
    """(b, h, w, c) -> (b, h / stride, w / stride, d): one input channel a group, same padding.

    The parameters are those of `nn.Conv2d`.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel: int, stride: int = 1):
        super().__init__(in_dim, out_dim, kernel, stride, padding=kernel // 2, groups=in_dim)
        self._bands: tuple[mx.array, mx.array] | None = None  # the weight, and its bands

    def __call__(self, x: mx.array) -> mx.array:
        if not _on_cpu(x) or x.shape[2] < _LEAST_WIDTH:
            return super().__call__(x)
        if self._bands is None or self._bands[0] is not self.weight:
            self._bands = (self.weight, band(self.weight, self.groups, self.stride[0]))
        kernel = self.weight.shape[1]
        return grouped_conv(x, self._bands[1], kernel, self.stride[0]) + self.bias


def band(weight: mx.array, groups: int, stride: int) -> mx.array:
    """Spread kernels (groups * m, k, k, 1) into banded matrices (groups, k * window, m * strip).

    Column j of a strip's output is the kernel laid over the input columns from j * stride on;
    `window` = (strip - 1) * stride + k input columns feed a strip.
    """
    kernels = np.array(weight)[..., 0]
    out_dim, kernel, _ = kernels.shape
    window = (_STRIP - 1) * stride + kernel
    spread = np.zeros((out_dim, kernel, window, _STRIP), np.float32)
    for j in range(_STRIP):
        spread[:, :, j * stride : j * stride + kernel, j] = kernels
    matrices = spread.reshape(groups, -1, kernel * window, _STRIP).transpose(0, 2, 1, 3)
    return mx.array(matrices.reshape(groups, kernel * window, -1))


def grouped_conv(x: mx.array, bands: mx.array, kernel: int, stride: int) -> mx.array:
    """Convolve (b, h, w, c) with `bands` = `band(weight, c, stride)`; same padding, no bias."""
    b, h, w, c = x.shape
    multiplier = bands.shape[2] // _STRIP
    window = bands.shape[1] // kernel
    pad = kernel // 2
    out_h, out_w = (h + 2 * pad - kernel) // stride + 1, (w + 2 * pad - kernel) // stride + 1
    strips = -(-out_w // _STRIP)
    # Zeros around the picture, and to the right of it until the last strip is full.
    height, width = h + 2 * pad, (strips * _STRIP - 1) * stride + kernel
    x = mx.pad(x.transpose(0, 3, 1, 2), [(0, 0), (0, 0), (pad, pad), (pad, width - w - pad)])
    at_once = max(1, _PATCH_ELEMENTS // (b * strips * out_h * kernel * window))
    outputs = []
    for first in range(0, c, at_once):
        part = mx.contiguous(x[:, first : first + at_once])
        channels = part.shape[1]
        patches = mx.as_strided(
            part,
            (b, channels, strips, out_h, kernel, window),
            (channels * height * width, height * width, _STRIP * stride, stride * width, width, 1),
        ).reshape(b, channels, strips, out_h, kernel * window)
        out = patches @ bands[first : first + at_once, None]
        outputs.append(
            out.reshape(b, channels, strips, out_h, multiplier, _STRIP)
            .transpose(0, 3, 2, 5, 1, 4)
            .reshape(b, out_h, strips * _STRIP, channels * multiplier)[:, :, :out_w]
        )
    return mx.concatenate(outputs, axis=-1)
