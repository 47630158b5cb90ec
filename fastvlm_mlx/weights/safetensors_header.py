"""The header of a safetensors file, checked in full before a byte of any tensor is touched.

The file: 8 bytes with the length n of the header (little-endian), n bytes of JSON
{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}, then the
buffer that the offsets count from (https://github.com/huggingface/safetensors, section Format).
"""

from __future__ import annotations

import math
from typing import Any

from fastvlm_mlx.errors import CheckpointError

from .lazy import STORED_AS, LazyTensor, SourceFile, itemsize, shape_fault, shown, where
from .strict_json import LARGEST_JSON, read_strict

_FIELDS = {"dtype", "shape", "data_offsets"}


def read_safetensors(source: SourceFile) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """(tensors by name, metadata). Raises CheckpointError naming the file and the tensor.

    The tensors must fill the buffer from its start without overlap or hole, as the format asks.
    Laxer than it in one point: bytes after the last tensor are let be.
    """
    header, start = _read_header(source)
    metadata = header.pop("__metadata__", None)
    if metadata is None:  # mlx writes null where it has none
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{where(source.path)}: __metadata__ must map text to text")

    tensors: dict[str, LazyTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        fault = _entry_fault(entry) or _name_fault(name)
        if fault is None:
            begin, end = entry["data_offsets"]
            if end > source.size - start:
                fault = f"ends at byte {end} of a buffer of {source.size - start}: the file is cut"
        if fault is not None:
            raise CheckpointError(f"{where(source.path)}: tensor {shown(name)} {fault}")
        spans.append((begin, end, name))
        tensors[name] = LazyTensor(
            name, tuple(entry["shape"]), entry["dtype"], source, start + begin
        )

    filled = 0
    for begin, end, name in sorted(spans):
        if begin != filled:
            fault = "overlaps another tensor" if begin < filled else "leaves a hole before it"
            raise CheckpointError(f"{where(source.path)}: tensor {shown(name)} {fault}")
        filled = end
    return tensors, metadata


def looks_like_safetensors(head: bytes, size: int) -> bool:
    """Whether a file that begins with `head` could be one, by its length field and first brace."""
    length = int.from_bytes(head[:8], "little")
    return len(head) > 8 and head[8:9] == b"{" and 2 <= length <= size - 8


def _read_header(source: SourceFile) -> tuple[dict[str, Any], int]:
    """(the JSON object, where the buffer starts)."""
    if source.size < 8:
        raise CheckpointError(
            f"{where(source.path)}: is {source.size} bytes long, too short for safetensors"
        )
    with source.open() as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_JSON:
            raise CheckpointError(
                f"{where(source.path)}: is not safetensors (a header of {length} bytes)"
            )
        if length > source.size - 8:
            raise CheckpointError(
                f"{where(source.path)}: is cut or is not safetensors "
                f"(a header of {length} bytes in a file of {source.size})"
            )
        data = file.read(length)
    if data[:1] != b"{":
        raise CheckpointError(f"{where(source.path)}: is not safetensors (no JSON header)")
    try:
        header = read_strict(data)
    except ValueError as error:
        raise CheckpointError(f"{where(source.path)}: the header {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{where(source.path)}: the header is not a JSON object")
    return header, 8 + length


def _name_fault(name: str) -> str | None:
    try:
        name.encode()
    except UnicodeEncodeError:
        return "has a name that is not valid Unicode"
    return None


def _entry_fault(entry: Any) -> str | None:
    """What is wrong with the description of one tensor taken by itself, or None."""
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        return "is not described by dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORED_AS:
        return f"has the unknown type {shown(dtype)}"
    if not _are_counts(shape):
        return "has a shape that is not a list of non-negative integers"
    fault = shape_fault(tuple(shape), dtype)
    if fault is not None:
        return fault
    if not _are_counts(offsets) or len(offsets) != 2:
        return "has data_offsets that are not two non-negative integers"
    begin, end = offsets
    if begin > end:
        return f"has data_offsets that run backwards ({begin} to {end})"
    needed = math.prod(shape) * itemsize(dtype)
    if end - begin != needed:
        return f"takes {end - begin} bytes where {dtype} {shape} takes {needed}"
    return None


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
