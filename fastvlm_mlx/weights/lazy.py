"""A tensor that is still in its file: what is known about it, and how to read it.

Nothing stays open between two reads. A read opens the file, checks that it is still the file whose
header was validated, maps the bytes of that one tensor, copies them once and lets go of the map.
Memory is therefore bounded by the tensor being read, however large the checkpoint, and a reader
that is never closed leaks nothing. (`mx.load` is lazy too, but lets tensors overlap, knows no .bin
files, and keeps what it has once read for as long as its dictionary lives.)
"""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from fastvlm_mlx.errors import CheckpointError

if TYPE_CHECKING:
    import mlx.core as mx

# Canonical names (those of the safetensors format) -> how numpy sees the stored bytes. numpy has no
# bfloat16 and no 8-bit floats: they are seen as unsigned integers and decoded in `LazyTensor`.
STORED_AS: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("u1"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
}

_MOST_DIMENSIONS = 32  # numpy 1.x; numpy 2 allows 64
_LARGEST_DIMENSION = 2**31 - 1  # mlx keeps a shape in 32-bit integers


def itemsize(dtype: str) -> int:
    """Bytes of one element of a canonical type."""
    return STORED_AS[dtype].itemsize


def shown(text: object) -> str:
    """`text` out of a file nobody vouches for, made fit for one line: escaped and cut."""
    line = str(text)
    return repr(line if len(line) <= 120 else line[:117] + "...")


def where(path: Path) -> str:
    """A path as messages show it; escaped if it would break the line."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def shape_fault(shape: tuple[int, ...], dtype: str) -> str | None:
    """Why neither numpy nor mlx could hold this shape, or None.

    A zero does not excuse absurd neighbours: numpy multiplies the other dimensions too.
    """
    if len(shape) > _MOST_DIMENSIONS:
        return f"has {len(shape)} dimensions, more than {_MOST_DIMENSIONS}"
    if any(size > _LARGEST_DIMENSION for size in shape):
        return f"has a dimension above {_LARGEST_DIMENSION}, more than mlx can hold"
    if math.prod(max(size, 1) for size in shape) * itemsize(dtype) >= 2**62:
        return "is larger than any memory"
    return None


@dataclass
class SourceFile:
    """One checkpoint file, remembered by what it was when its header was read."""

    path: Path
    size: int
    stamp: tuple[int, int, int, int]
    closed: bool = False

    @classmethod
    def look_at(cls, path: Path) -> SourceFile:
        """Raises CheckpointError if there is no ordinary file at `path`."""
        try:
            state = os.stat(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{where(path)}: cannot be read ({_reason(error)})") from error
        if not stat.S_ISREG(state.st_mode):  # opening a pipe would wait for ever
            raise CheckpointError(f"{where(path)}: is not an ordinary file")
        return cls(path, state.st_size, _stamp(state))

    def open(self) -> BinaryIO:
        """The file, if it is still the one that was looked at; the caller closes it."""
        if self.closed:
            raise CheckpointError(f"{where(self.path)}: was closed; read inside the `with` block")
        try:
            file = open(self.path, "rb")  # noqa: SIM115 - handed to the caller
        except OSError as error:
            message = f"{where(self.path)}: cannot be read ({_reason(error)})"
            raise CheckpointError(message) from error
        if _stamp(os.fstat(file.fileno())) != self.stamp:
            file.close()
            # A map that reaches beyond the end of a file that has shrunk kills the process.
            raise CheckpointError(f"{where(self.path)}: has changed since it was opened")
        return file

    def map(self, offset: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """(nbytes,) from `offset`, mapped and read-only; unmapped with the last view of them."""
        if nbytes == 0:
            return np.empty(0, np.uint8)
        with self.open() as file:
            try:
                return np.asarray(np.memmap(file, np.uint8, "r", offset, (nbytes,)))
            except (OSError, ValueError) as error:
                message = f"{where(self.path)}: cannot be mapped ({_reason(error)})"
                raise CheckpointError(message) from error


def _stamp(state: os.stat_result) -> tuple[int, int, int, int]:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


@dataclass(frozen=True)
class LazyTensor:
    """A named tensor in a file; `read()` and `numpy()` fetch its values."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # canonical: a key of STORED_AS
    source: SourceFile = field(repr=False, compare=False)
    offset: int = field(repr=False)  # of the first element, in bytes from the start of the file
    # In elements; None = row-major without gaps.
    strides: tuple[int, ...] | None = field(default=None, repr=False)

    @property
    def file(self) -> Path:
        return self.source.path

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values in their stored type (torch stores an expanded tensor in fewer)."""
        return self.size * itemsize(self.dtype)

    def read(self) -> mx.array:
        """The values as mlx holds them, copied once out of the file.

        Types are kept, with two exceptions: F64 becomes float32 (Apple GPUs have no 64-bit floats;
        what is too large becomes infinity), and the 8-bit floats, which mlx has no type for, become
        a type that holds them exactly: F8_E4M3 bfloat16, F8_E5M2 float16.
        """
        import mlx.core as mx

        stored = self.stored()
        if self.dtype == "BF16":
            return mx.array(stored).view(mx.bfloat16)
        if self.dtype == "F8_E4M3":
            return mx.array(_E4M3_AS_BF16[stored]).view(mx.bfloat16)
        if self.dtype == "F8_E5M2":
            return mx.array(_e5m2_as_f16(stored))
        if self.dtype == "BOOL":
            return mx.array(stored.astype(np.bool_, order="C"))
        if self.dtype == "F64":
            with np.errstate(over="ignore"):  # beyond float32 is infinity, as documented
                return mx.array(stored.astype(np.float32))
        return mx.array(stored)

    def numpy(self) -> np.ndarray[Any, Any]:
        """The values as a fresh numpy array in row-major order.

        BF16 and the 8-bit floats, which numpy lacks, become float32, which holds them exactly.
        """
        stored = self.stored()
        if self.dtype == "BF16":
            return _bf16_as_f32(stored)
        if self.dtype == "F8_E4M3":
            return _bf16_as_f32(_E4M3_AS_BF16[stored])
        if self.dtype == "F8_E5M2":
            return _e5m2_as_f16(stored).astype(np.float32)
        if self.dtype == "BOOL":
            return stored.astype(np.bool_, order="C")
        return np.array(stored, order="C")

    def stored(self) -> np.ndarray[Any, Any]:
        """A read-only view of the map, in the type of STORED_AS; a copy only if misaligned."""
        kind = STORED_AS[self.dtype]
        if self.size == 0:
            return np.empty(self.shape, kind)
        if self.strides is None:
            mapped = self.source.map(self.offset, self.nbytes)
            view: np.ndarray[Any, Any] = mapped.view(kind).reshape(self.shape)
        else:
            # A dimension of one element never steps: whatever stride was written must not count.
            pairs = zip(self.shape, self.strides, strict=True)
            steps = [step if size > 1 else 0 for size, step in pairs]
            mapped = self.source.map(self.offset, extent(self.shape, steps) * kind.itemsize)
            in_bytes = [step * kind.itemsize for step in steps]
            # This constructor checks the strides against the buffer again; as_strided would not.
            view = np.ndarray(self.shape, kind, mapped.data, 0, in_bytes)
        return view if view.flags.aligned else view.copy()


def extent(shape: tuple[int, ...], strides: list[int] | tuple[int, ...]) -> int:
    """Elements from the first to the last that a tensor touches; 0 for an empty one."""
    if 0 in shape:
        return 0
    return sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) + 1


def _bf16_as_f32(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """bfloat16 is the upper half of a float32."""
    wide = np.empty(bits.shape, np.uint32)
    np.left_shift(bits, 16, out=wide, dtype=np.uint32)
    return wide.view(np.float32)


def _e5m2_as_f16(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """E5M2 is the upper half of a float16."""
    wide = np.empty(bits.shape, np.uint16)
    np.left_shift(bits, 8, out=wide, dtype=np.uint16)
    return wide.view(np.float16)


def _e4m3_table() -> np.ndarray[Any, np.dtype[np.uint16]]:
    """(256,) the bfloat16 bits of each E4M3 code.

    Bias 7, subnormals, no infinities, NaN at 0x7f and 0xff (arXiv 2209.05433, Table 1).
    """
    values = np.empty(256, np.float32)
    for code in range(128):
        exponent, mantissa = code >> 3, code & 7
        # Subnormal: mantissa / 8 * 2**-6. Else (1 + mantissa / 8) * 2**(exponent - 7).
        significand = mantissa if exponent == 0 else 8 + mantissa
        value = math.nan if code == 0x7F else math.ldexp(significand, max(exponent, 1) - 10)
        values[code], values[code | 0x80] = value, -value
    return (values.view(np.uint32) >> 16).astype(np.uint16)  # exact: bfloat16 has more of both


_E4M3_AS_BF16 = _e4m3_table()
