"""Finding NaN and infinity in weights, in little memory.

The test is on bits, not on values: an exponent of all ones. It costs the same for every type,
needs no conversion of the types that numpy lacks, and raises no floating-point warnings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .lazy import LazyTensor

if TYPE_CHECKING:
    import mlx.core as mx

_AT_ONCE = 1 << 20  # elements looked at together: a few MB

# type -> (bits seen as, mask of the exponent, mask of the mantissa)
_FLOATS: dict[str, tuple[str, int, int]] = {
    "F8_E5M2": ("u1", 0x7C, 0x03),
    "F16": ("<u2", 0x7C00, 0x03FF),
    "BF16": ("<u2", 0x7F80, 0x007F),
    "F32": ("<u4", 0x7F800000, 0x007FFFFF),
    "F64": ("<u8", 0x7FF0000000000000, 0x000FFFFFFFFFFFFF),
    # E4M3 has no infinity, and one NaN: exponent and mantissa all ones.
    "F8_E4M3": ("u1", 0x7F, 0x7F),
}
_NUMPY_NAMES = {"float16": "F16", "float32": "F32", "float64": "F64", "complex64": "C64"}


@dataclass(frozen=True)
class NonFinite:
    """What is wrong with a tensor: how many NaN and infinities, and where the first of them is."""

    nan: int
    inf: int
    first: tuple[int, ...]  # index of the first, in row-major order

    def __str__(self) -> str:
        counts = ((self.nan, "NaN"), (self.inf, "infinite"))
        found = " and ".join(f"{count} {kind}" for count, kind in counts if count)
        return f"{found}, first at {list(self.first)}"


def find_non_finite(tensor: LazyTensor | np.ndarray[Any, Any] | mx.array) -> NonFinite | None:
    """The NaN and infinities of a tensor, or None where every value is finite.

    A `LazyTensor` is looked at in its file, a few MB at a time, and in its stored type: an F64
    value too large for float32 is finite here. Types without NaN (integers, bool) are not read.
    The two halves of a complex value count apart.
    """
    dtype, values = _stored(tensor)
    if values is None:
        return None
    if dtype == "C64":
        halves = [_look("F32", values.real), _look("F32", values.imag)]
    else:
        halves = [_look(dtype, values)]
    found = [half for half in halves if half[2] is not None]
    if not found:
        return None
    first = min(half[2] for half in found if half[2] is not None)
    index = tuple(int(i) for i in np.unravel_index(first, values.shape))
    return NonFinite(sum(half[0] for half in found), sum(half[1] for half in found), index)


def _look(dtype: str, values: np.ndarray[Any, Any]) -> tuple[int, int, int | None]:
    """(NaN, infinities, flat position of the first or None) of stored `values` of any strides."""
    bits, exponent, mantissa = _FLOATS[dtype]
    nan = inf = seen = 0
    first: int | None = None
    # nditer walks any strides in row-major order through one small buffer.
    chunks = np.nditer(
        values.view(bits),
        flags=["external_loop", "buffered", "zerosize_ok"],
        op_flags=["readonly"],
        order="C",
        buffersize=_AT_ONCE,
    )
    for chunk in chunks:
        part = np.asarray(chunk)
        odd = (part & exponent) == exponent
        if odd.any():
            if first is None:
                first = seen + int(odd.argmax())
            not_a_number = int(np.count_nonzero(part[odd] & mantissa))
            nan += not_a_number
            inf += int(np.count_nonzero(odd)) - not_a_number
        seen += part.size
    return nan, inf, first


def _stored(tensor: Any) -> tuple[str, np.ndarray[Any, Any] | None]:
    """Canonical type and stored values; None for values that cannot be other than finite."""
    if isinstance(tensor, LazyTensor):
        known = tensor.dtype in _FLOATS or tensor.dtype == "C64"
        return tensor.dtype, tensor.stored() if known else None
    if not isinstance(tensor, np.ndarray):
        import mlx.core as mx

        if tensor.dtype == mx.bfloat16:
            return "BF16", np.asarray(tensor.view(mx.uint16))
        tensor = np.asarray(tensor)
    name = _NUMPY_NAMES.get(tensor.dtype.name)
    return ("", None) if name is None else (name, tensor)
