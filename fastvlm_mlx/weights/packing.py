"""How a quantised matrix is packed, read from the shapes of its tensors.

MLX keeps a matrix (out, in) as `weight` (out, in * bits / 32) of 32-bit words and `scales`
(out, in / group_size). A configuration may be silent or wrong about one layer; the shapes are not.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CheckpointError

# The modes whose scales are bytes allow one pair of (bits, group size) each.
_BYTE_SCALED = {(4, 32): "mxfp4", (4, 16): "nvfp4", (8, 32): "mxfp8"}


@dataclass(frozen=True)
class Packing:
    """The arguments of `mx.quantize` that a matrix was packed with."""

    bits: int
    group_size: int
    mode: str  # "affine", "mxfp4", "nvfp4" or "mxfp8"

    @classmethod
    def of(
        cls, in_dim: int, weight: tuple[int, ...], scales: tuple[int, ...], byte_scales: bool
    ) -> Packing:
        """The packing of a matrix of `in_dim` columns with tensors of these shapes.

        Raises:
            CheckpointError: no packing of MLX's gives such shapes.
        """
        if in_dim < 1 or not scales or not scales[-1] or in_dim % scales[-1]:
            raise CheckpointError(f"{scales} scales do not divide {in_dim} columns into groups")
        group_size = in_dim // scales[-1]
        bits = weight[-1] * 32 // in_dim
        if byte_scales:
            mode = _BYTE_SCALED.get((bits, group_size))
        else:
            mode = "affine" if bits in (2, 3, 4, 5, 6, 8) else None
        if mode is None or bits * in_dim != weight[-1] * 32:
            raise CheckpointError(
                f"{bits} bits in groups of {group_size} is no quantisation that MLX knows"
            )
        return cls(bits, group_size, mode)
