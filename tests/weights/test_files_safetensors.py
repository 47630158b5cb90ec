"""Safetensors files: every type, and every way in which a header can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from torch_writer import safetensors_bytes, with_header

from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.weights.files import open_tensors


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), span: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


@pytest.mark.parametrize(
    ("name", "kind", "mlx_type"),
    [
        ("U8", "u1", mx.uint8),
        ("I8", "i1", mx.int8),
        ("U16", "<u2", mx.uint16),
        ("I16", "<i2", mx.int16),
        ("U32", "<u4", mx.uint32),
        ("I32", "<i4", mx.int32),
        ("U64", "<u8", mx.uint64),
        ("I64", "<i8", mx.int64),
        ("F16", "<f2", mx.float16),
        ("F32", "<f4", mx.float32),
        ("F64", "<f8", mx.float32),
        ("C64", "<c8", mx.complex64),
    ],
)
@pytest.mark.parametrize("lead", [0, 1])  # one byte in front: nothing is aligned
def test_plain_types(tmp_path: Path, name: str, kind: str, mlx_type: Any, lead: int) -> None:
    values = np.arange(6).reshape(2, 3).astype(kind)
    front = {"front": ("U8", (lead,), b"\xff" * lead)}
    data = safetensors_bytes({**front, "a": (name, (2, 3), values.tobytes())})
    found = open_tensors(write(tmp_path, data))["a"]
    assert (found.dtype, found.shape, found.nbytes) == (name, (2, 3), values.nbytes)
    assert found.numpy().dtype == np.dtype(kind)
    assert np.array_equal(found.numpy(), values)
    assert found.read().dtype == mlx_type
    assert found.read().tolist() == values.tolist()


def test_bool(tmp_path: Path) -> None:
    data = safetensors_bytes({"a": ("BOOL", (3,), b"\0\1\2")})
    found = open_tensors(write(tmp_path, data))["a"]
    assert found.numpy().tolist() == [False, True, True]
    assert found.read().dtype == mx.bool_
    assert found.read().tolist() == [False, True, True]


def test_bfloat16_keeps_every_bit(tmp_path: Path) -> None:
    bits = np.arange(65536, dtype="<u2")
    data = safetensors_bytes({"a": ("BF16", (256, 256), bits.tobytes())})
    found = open_tensors(write(tmp_path, data))["a"]
    array = found.read()
    assert array.dtype == mx.bfloat16
    assert array.shape == (256, 256)
    assert np.array_equal(np.array(array.view(mx.uint16)).ravel(), bits)
    widened = found.numpy()
    assert widened.dtype == np.float32
    assert np.array_equal(widened.view(np.uint32).ravel(), bits.astype(np.uint32) << 16)


def test_eight_bit_floats_are_decoded_exactly(tmp_path: Path) -> None:
    codes = np.arange(256, dtype="u1").tobytes()
    data = safetensors_bytes({"a": ("F8_E4M3", (256,), codes), "b": ("F8_E5M2", (256,), codes)})
    tensors = open_tensors(write(tmp_path, data))
    e4m3, e5m2 = tensors["a"].numpy(), tensors["b"].numpy()
    # The largest, the smallest, one, and the special codes (arXiv 2209.05433, Table 1).
    assert e4m3[[0x7E, 0x01, 0x08, 0x38, 0xB8]].tolist() == [448, 2**-9, 2**-6, 1, -1]
    assert np.isnan(e4m3[[0x7F, 0xFF]]).all() and np.isfinite(e4m3).sum() == 254
    assert e5m2[[0x7B, 0x01, 0x04, 0x3C, 0xBC]].tolist() == [57344, 2**-16, 2**-14, 1, -1]
    assert e5m2[[0x7C, 0xFC]].tolist() == [np.inf, -np.inf] and np.isnan(e5m2).sum() == 6
    assert tensors["a"].read().dtype == mx.bfloat16
    assert tensors["b"].read().dtype == mx.float16
    for name, expected in (("a", e4m3), ("b", e5m2)):
        widened = np.array(tensors[name].read().astype(mx.float32))
        assert np.array_equal(widened, expected, equal_nan=True)
        assert np.array_equal(np.signbit(widened), np.signbit(expected))


def test_agrees_with_mlx_own_reader(tmp_path: Path) -> None:
    arrays = {
        "a": mx.random.normal((3, 5)).astype(mx.bfloat16),
        "b": mx.arange(7, dtype=mx.uint32),
        "c": mx.array(2.5, dtype=mx.float16),
        "d": mx.zeros((0, 3)),
    }
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), arrays, {"format": "mlx"})
    with open_tensors(path) as tensors:
        assert set(tensors) == set(arrays)
        assert tensors.metadata["format"] == "mlx"
        for name, expected in arrays.items():
            found = tensors[name].read()
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert mx.array_equal(found, expected)


def test_bytes_after_the_last_tensor_are_let_be(tmp_path: Path) -> None:
    data = with_header(json.dumps({"a": entry()}) + "   ", b"\0" * 8 + b"trailing")
    assert open_tensors(write(tmp_path, data))["a"].numpy().tolist() == [0, 0]


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": entry("F31")}, "unknown type 'F31'"),
        ({"a": entry("F4")}, "unknown type"),
        ({"a": entry(None)}, "unknown type"),
        ({"a": entry([])}, "unknown type"),
        ({"a": entry(shape=[-2])}, "shape that is not"),
        ({"a": entry(shape=[True, 2])}, "shape that is not"),
        ({"a": entry(shape=[2.0])}, "shape that is not"),
        ({"a": entry(shape="2")}, "shape that is not"),
        ({"a": entry(shape=[1] * 33)}, "33 dimensions"),
        ({"a": entry(shape=[0, 2**31], span=[0, 0])}, "a dimension above"),
        ({"a": entry(shape=[0, *[2**31 - 1] * 3], span=[0, 0])}, "larger than any memory"),
        ({"a": entry(shape=[3])}, "takes 8 bytes where F32 [3] takes 12"),
        ({"a": entry(span=[8, 0])}, "run backwards"),
        ({"a": entry(span=[-8, 0])}, "data_offsets that are not two"),
        ({"a": entry(span=[0, 8, 8])}, "data_offsets that are not two"),
        ({"a": entry(span=[0.0, 8.0])}, "data_offsets that are not two"),
        ({"a": entry(shape=[200], span=[0, 800])}, "the file is cut"),
        ({"a": entry(), "b": entry()}, "'b' overlaps another tensor"),
        ({"a": entry(), "b": entry(span=[4, 12])}, "'b' overlaps another tensor"),
        ({"a": entry(), "b": entry(shape=[1], span=[12, 16])}, "'b' leaves a hole"),
        ({"a": entry(span=[8, 16])}, "'a' leaves a hole"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "not described by"),
        ({"a": {**entry(), "more": 1}}, "not described by"),
        ({"a": [1]}, "not described by"),
        ({"a\n" + "x" * 500: 1}, "tensor 'a\\nxxx"),
        ({"__metadata__": {"a": 1}}, "__metadata__ must map"),
        ({"__metadata__": []}, "__metadata__ must map"),
        ('{"a": 1, "a": 2}', "names 'a' twice"),
        ('{"a": {"dtype": "F32", "dtype": "F32"}}', "names 'dtype' twice"),
        ('{"a": NaN}', "holds NaN"),
        ('{"a": ' + "1" * 100_000 + "}", "a number of 100000 digits"),
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
        ("{", "not valid JSON"),
        ("[]", "no JSON header"),
        ("", "no JSON header"),
        (" {}", "no JSON header"),
        (b'{"\xff": 1}', "not valid UTF-8"),
        (
            '{"\\ud800": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            "not valid Unicode",
        ),
    ],
)
def test_a_wrong_header_is_refused(tmp_path: Path, header: Any, reason: str) -> None:
    raw = json.dumps(header) if isinstance(header, dict) else header
    path = write(tmp_path, with_header(raw, b"\0" * 16))
    with pytest.raises(CheckpointError) as caught:
        open_tensors(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 250


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x01", "too short"),
        ((2**63).to_bytes(8, "little") + b"{}", "is not safetensors"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "is not safetensors"),
        ((3).to_bytes(8, "little") + b"{}", "is cut or is not safetensors"),
    ],
)
def test_a_wrong_length_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        open_tensors(write(tmp_path, data))
