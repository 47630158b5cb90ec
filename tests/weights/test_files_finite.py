"""Finding NaN and infinity, in files and in arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from torch_writer import Tensor, safetensors_bytes, zip_bytes

from fastvlm_mlx.weights import finite
from fastvlm_mlx.weights.files import NonFinite, find_non_finite, open_tensors


def lazy(tmp_path: Path, dtype: str, values: np.ndarray[Any, Any]) -> Any:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({"a": (dtype, values.shape, values.tobytes())}))
    return open_tensors(path)["a"]


@pytest.mark.parametrize(("dtype", "kind"), [("F16", "<f2"), ("F32", "<f4"), ("F64", "<f8")])
def test_floats(tmp_path: Path, dtype: str, kind: str) -> None:
    values = np.ones((3, 4), kind)
    values[0, 0] = np.finfo(kind).max
    assert find_non_finite(lazy(tmp_path, dtype, values)) is None
    values[1, 2], values[2, 0], values[2, 3] = np.nan, -np.inf, np.inf
    expected = NonFinite(nan=1, inf=2, first=(1, 2))
    assert find_non_finite(lazy(tmp_path, dtype, values)) == expected
    assert find_non_finite(values) == expected
    assert str(expected) == "1 NaN and 2 infinite, first at [1, 2]"


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F8_E5M2"])
def test_the_types_numpy_lacks_agree_with_their_decoded_values(tmp_path: Path, dtype: str) -> None:
    kind = "<u2" if dtype == "BF16" else "u1"
    codes = np.arange(65536 if dtype == "BF16" else 256).astype(kind)
    tensor = lazy(tmp_path, dtype, codes)
    values = tensor.numpy()
    found = find_non_finite(tensor)
    assert found is not None
    assert (found.nan, found.inf) == (int(np.isnan(values).sum()), int(np.isinf(values).sum()))
    assert found.first == (int(np.argmin(np.isfinite(values))),)


def test_types_without_nan_are_not_read(tmp_path: Path) -> None:
    tensor = lazy(tmp_path, "I32", np.full(3, -1, "<i4"))
    (tmp_path / "x.safetensors").unlink()
    assert find_non_finite(tensor) is None


def test_complex_values(tmp_path: Path) -> None:
    values = np.ones((2, 2), "<c8")
    values[1, 0] = complex(0, np.inf)
    assert find_non_finite(lazy(tmp_path, "C64", values)) == NonFinite(0, 1, (1, 0))


def test_mlx_arrays() -> None:
    assert find_non_finite(mx.ones((2, 2))) is None
    assert find_non_finite(mx.arange(3)) is None
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        array = mx.array([[1.0, float("inf")], [float("nan"), 0.0]]).astype(dtype)
        assert find_non_finite(array) == NonFinite(1, 1, (0, 1))


def test_strides_are_followed_and_chunks_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finite, "_AT_ONCE", 16)
    values = np.ones(100, "<f4")
    values[37] = np.nan
    path = tmp_path / "x.pt"
    state = {"t": Tensor("0", 100, (10, 10), (1, 10)), "r": Tensor("0", 100, (3, 100), (0, 1))}
    path.write_bytes(zip_bytes(state, {"0": values.tobytes()}))
    with open_tensors(path) as tensors:
        assert find_non_finite(tensors["t"]) == NonFinite(1, 0, (7, 3))
        assert find_non_finite(tensors["r"]) == NonFinite(3, 0, (0, 37))


def test_empty_and_scalar(tmp_path: Path) -> None:
    assert find_non_finite(lazy(tmp_path, "F32", np.ones((0, 3), "<f4"))) is None
    assert find_non_finite(lazy(tmp_path, "F32", np.array(np.inf, "<f4"))) == NonFinite(0, 1, ())
