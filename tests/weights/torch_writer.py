"""Checkpoint files put together byte by byte, without torch: honest, odd and hostile ones."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True)
class Op:
    """Raw pickle operations that leave one value."""

    code: bytes


@dataclass(frozen=True)
class Tensor:
    """A tensor as `torch._utils._rebuild_tensor_v2` is called for it."""

    key: str
    count: int  # elements of the storage
    shape: Sequence[Any]
    strides: Sequence[Any]
    offset: Any = 0
    storage: str = "torch FloatStorage"
    dtype: str | None = None  # "torch uint16": _rebuild_tensor_v3
    parameter: bool = False
    view: tuple[Any, ...] | None = None  # the older container's view of a storage
    legacy: bool = False
    first_version: bool = False  # _rebuild_tensor


def glob(name: str) -> Op:
    """GLOBAL, given as "module name"."""
    module, attribute = name.split(" ")
    return Op(f"c{module}\n{attribute}\n".encode())


def call(function: Op, *arguments: Any) -> Op:
    return Op(function.code + encode(tuple(arguments)) + b"R")


def encode(value: Any) -> bytes:
    """`value` as pickle operations; a dict becomes an OrderedDict, as state dicts are."""
    if isinstance(value, Op):
        return value.code
    if isinstance(value, Tensor):
        return _encode_tensor(value)
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        if 0 <= value < 256:
            return b"K" + bytes([value])
        size = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data
    if isinstance(value, tuple):
        return b"(" + b"".join(map(encode, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(encode, value)) + b"e"
    if isinstance(value, dict):
        items = b"".join(encode(key) + encode(item) for key, item in value.items())
        return b"ccollections\nOrderedDict\n)R(" + items + b"u"
    raise TypeError(type(value))


def _encode_tensor(t: Tensor) -> bytes:
    saved: tuple[Any, ...] = ("storage", glob(t.storage), t.key, "cpu", t.count)
    if t.legacy or t.view is not None:
        saved = (*saved, t.view)
    storage = Op(encode(saved) + b"Q")
    given = (storage, t.offset, tuple(t.shape), tuple(t.strides))
    if t.first_version:
        return call(glob("torch._utils _rebuild_tensor"), *given).code
    hooks: tuple[Any, ...] = (False, {})
    if t.dtype is not None:
        made = call(glob("torch._utils _rebuild_tensor_v3"), *given, *hooks, glob(t.dtype))
    else:
        made = call(glob("torch._utils _rebuild_tensor_v2"), *given, *hooks)
    if t.parameter:
        made = call(glob("torch._utils _rebuild_parameter"), made, True, {})
    return made.code


def pickled(value: Any) -> bytes:
    return b"\x80\x02" + encode(value) + b"."


def zip_bytes(
    value: Any,
    storages: dict[str, bytes],
    *,
    root: str = "archive",
    pickle: bytes | None = None,
    extra: dict[str, bytes] | None = None,
    compress: bool = False,
    byteorder: bytes | None = b"little",
) -> bytes:
    """What torch.save writes since 1.6."""
    out = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr(f"{root}/data.pkl", pickled(value) if pickle is None else pickle)
        if byteorder is not None:
            archive.writestr(f"{root}/byteorder", byteorder)
        for key, data in storages.items():
            archive.writestr(f"{root}/data/{key}", data)
        archive.writestr(f"{root}/version", b"3\n")
        for name, data in (extra or {}).items():
            archive.writestr(name, data)
    return out.getvalue()


def legacy_bytes(
    value: Any,
    storages: dict[str, tuple[int, bytes]],
    *,
    magic: int = MAGIC,
    version: int = 1001,
    little: bool = True,
    pickle: bytes | None = None,
) -> bytes:
    """What torch.save wrote before 1.6. `storages`: key -> (elements, bytes)."""
    facts = {"protocol_version": 1001, "little_endian": little, "type_sizes": {"int": 4}}
    parts = [pickled(magic), pickled(version), pickled(facts)]
    parts += [pickled(value) if pickle is None else pickle, pickled(list(storages))]
    parts += [struct.pack("<q", count) + data for count, data in storages.values()]
    return b"".join(parts)


def tensor(
    key: str, array: np.ndarray[Any, Any], storage: str = "torch FloatStorage", **kw: Any
) -> Tensor:
    """A row-major tensor that fills its storage."""
    strides = [step // array.itemsize for step in np.ascontiguousarray(array).strides]
    return Tensor(key, array.size, array.shape, strides, storage=storage, **kw)


def safetensors_bytes(
    tensors: Mapping[str, tuple[str, Sequence[int], bytes]], metadata: dict[str, str] | None = None
) -> bytes:
    """name -> (dtype, shape, bytes)."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    begin = 0
    for name, (dtype, shape, data) in tensors.items():
        span = [begin, begin + len(data)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
        begin = span[1]
    return with_header(json.dumps(header), b"".join(data for _, _, data in tensors.values()))


def with_header(header: str | bytes, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(raw)) + raw + data


# Mutation -------------------------------------------------------------------------------------

# (kind, place as a part of 65536, value): small enough for Hypothesis to shrink well.
Edit = tuple[int, int, int]
EDIT_KINDS = 7
_TELLING = (0, 1, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 255, 65535)


def apply_edits(data: bytes, edits: Sequence[Edit]) -> bytes:
    """`data` damaged: bytes set, bits flipped, pieces dropped, doubled, moved, numbers blown up."""
    out = bytearray(data)
    for kind, place, value in edits:
        at = place * len(out) // 65536
        if kind == 0:
            out[at : at + 1] = bytes([value & 255])
        elif kind == 1 and at < len(out):
            out[at] ^= 1 << (value & 7)
        elif kind == 2:
            del out[at : at + 1 + value % 16]
        elif kind == 3:
            out[at:at] = bytes([value & 255])
        elif kind == 4:
            del out[at:]
        elif kind == 5:
            width = (1, 2, 4, 8)[value & 3]
            number = _TELLING[(value >> 2) % len(_TELLING)] & (2 ** (8 * width) - 1)
            out[at : at + width] = number.to_bytes(width, "little")
        elif kind == 6:
            out[at:at] = out[value * len(out) // 65536 :][:32]
    return bytes(out)


def seeds() -> dict[str, bytes]:
    """One small honest file of each kind, with as much of each format in it as fits."""
    ones = np.arange(6, dtype="<f4")
    half = np.arange(4, dtype="<f2")
    state = {
        "a.weight": tensor("0", ones.reshape(2, 3)),
        "a.transposed": Tensor("0", 6, (3, 2), (1, 3)),
        "b": Tensor("1", 4, (2,), (1,), 2, "torch HalfStorage", parameter=True),
        "c": Tensor("2", 4, (2,), (1,), 0, "torch.storage UntypedStorage", dtype="torch uint16"),
        "expanded": Tensor("0", 6, (4, 3), (0, 1)),
        "step": 7,
    }
    zipped = {"state_dict": state, "epoch": 3, "note": "x", "size": [1, 2.5, None]}
    storages = {"0": ones.tobytes(), "1": half.tobytes(), "2": b"\1\0\2\0"}
    old = {
        name: replace(t, legacy=True) if isinstance(t, Tensor) else t for name, t in state.items()
    }
    old["view"] = Tensor("0", 6, (2,), (1,), 0, view=("v", 2, 3))
    counted = {"0": (6, storages["0"]), "1": (4, storages["1"]), "2": (4, storages["2"])}
    safe = {
        "a": ("F32", (2, 3), ones.tobytes()),
        "b.c": ("BF16", (2,), b"\x80\x3f\0\0"),
        "empty": ("I64", (0, 4), b""),
        "scalar": ("F64", (), np.float64(1.5).tobytes()),
        "f8": ("F8_E4M3", (3,), b"\x38\x7f\x01"),
    }
    return {
        "safetensors": safetensors_bytes(safe, {"format": "pt"}),
        "zip": zip_bytes(zipped, storages),
        "legacy": legacy_bytes(old, counted),
    }


def mutated(seeds: dict[str, bytes], kind: str, edits: Sequence[Edit]) -> bytes:
    """A damaged file. "zip-pickle" and "safetensors-header" damage the inner part only and wrap it
    correctly, so that damage gets past the container."""
    if kind == "zip-pickle":
        with zipfile.ZipFile(io.BytesIO(seeds["zip"])) as archive:
            inner = apply_edits(archive.read("archive/data.pkl"), edits)
            keys = [name for name in archive.namelist() if "/data/" in name]
            storages = {name.rsplit("/", 1)[1]: archive.read(name) for name in keys}
        return zip_bytes(None, storages, pickle=inner)
    if kind == "safetensors-header":
        data = seeds["safetensors"]
        (length,) = struct.unpack("<Q", data[:8])
        return with_header(apply_edits(data[8 : 8 + length], edits), data[8 + length :])
    return apply_edits(seeds[kind], edits)


KINDS = ("safetensors", "safetensors-header", "zip", "zip-pickle", "legacy")
