"""Safetensors files, written tensor by tensor.

The header of a safetensors file comes first and lists every tensor with its place, so everything
but the values is planned before: names, types, shapes, and from them each byte's position. Values
then arrive in pieces, in any order, and are written where they belong. Memory is that of one piece.

Format: https://github.com/huggingface/safetensors, section Format.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.weights.files import open_tensors
from fastvlm_mlx.weights.lazy import itemsize

Array = np.ndarray[Any, Any]

INDEX = "model.safetensors.index.json"
_METADATA = {"format": "mlx"}
_AT_ONCE = 32 << 20  # bytes handed to the system together


@dataclass(frozen=True)
class Spec:
    """A tensor to be written: `dtype` is a safetensors type such as "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True)
class Job:
    """Tensors that are made together (a weight, its scales, its biases).

    `pieces()` yields one array a spec, each the next rows of its tensor; the arrays are written as
    the bytes they are. `source` is where the tensors come from, for messages; `reads` how many
    bytes they are there.
    """

    specs: tuple[Spec, ...]
    pieces: Callable[[], Iterable[tuple[Array, ...]]] = field(repr=False)
    source: str = ""

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


def plan_shards(jobs: Sequence[Job], shard_size: int) -> list[list[Job]]:
    """Jobs by file, in order; a file is larger than `shard_size` only if one job alone is."""
    shards: list[list[Job]] = [[]]
    size = 0
    for job in jobs:
        if shards[-1] and size + job.nbytes > shard_size:
            shards.append([])
            size = 0
        shards[-1].append(job)
        size += job.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def write_shards(
    folder: Path,
    jobs: Sequence[Job],
    shard_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Path]:
    """Write every job's tensors into `folder`, with an index. `advance(bytes)` after each piece."""
    shards = plan_shards(jobs, shard_size)
    names = shard_names(len(shards))
    places: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, advance)
        places |= {spec.name: name for job in shard for spec in job.specs}
    total = sum(job.nbytes for job in jobs)
    # With one file too: mlx-lm, mlx-vlm and mlx-swift-lm all look for it first.
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return [folder / name for name in names]


def _write_shard(path: Path, jobs: Sequence[Job], advance: Callable[[int], None]) -> None:
    specs = [spec for job in jobs for spec in job.specs]
    header, offsets = make_header(specs)
    with open(path, "xb", buffering=0) as file:
        _write(file.fileno(), memoryview(header), 0)
        for job in jobs:
            _run(file.fileno(), job, offsets, advance)
        # Sparse where a piece was never written: the check afterwards looks at sizes.
        os.ftruncate(file.fileno(), len(header) + sum(spec.nbytes for spec in specs))
        os.fsync(file.fileno())


def make_header(specs: Sequence[Spec]) -> tuple[bytes, dict[str, int]]:
    """(the header's bytes, tensor -> position in the file). Wide types first: all are aligned."""
    entries: dict[str, Any] = {"__metadata__": _METADATA}
    position = 0
    begins = {}
    for spec in sorted(specs, key=lambda spec: -itemsize(spec.dtype)):
        if spec.name in entries:
            raise CheckpointError(f"two tensors would be written as {spec.name}")
        end = position + spec.nbytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        begins[spec.name], position = position, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: start + b for n, b in begins.items()}


def _run(handle: int, job: Job, offsets: dict[str, int], advance: Callable[[int], None]) -> None:
    positions = [offsets[spec.name] for spec in job.specs]
    for piece in job.pieces():
        for i, (array, spec) in enumerate(zip(piece, job.specs, strict=True)):
            end = offsets[spec.name] + spec.nbytes
            if positions[i] + array.nbytes > end:
                raise CheckpointError(f"{spec.name} has more values than planned")  # a bug of ours
            _write(handle, bytes_of(array), positions[i])
            positions[i] += array.nbytes
            advance(array.nbytes)
    for position, spec in zip(positions, job.specs, strict=True):
        if position != offsets[spec.name] + spec.nbytes:
            raise CheckpointError(f"{spec.name} has fewer values than planned")


def bytes_of(array: Array) -> memoryview:
    """The array's own bytes, without a copy if it is contiguous."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8).data if flat.size else memoryview(b"")


def _write(handle: int, data: memoryview, position: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done : done + _AT_ONCE], position + done)


def check_written(folder: Path, jobs: Iterable[Job]) -> None:
    """Open every header again and hold it to the plan. Raises CheckpointError."""
    expected = {spec.name: spec for job in jobs for spec in job.specs}
    with open_tensors(folder) as found:
        for name, spec in expected.items():
            tensor = found.get(name)
            if tensor is None or (tensor.dtype, tensor.shape) != (spec.dtype, spec.shape):
                raise CheckpointError(f"{folder}: {name} was not written as planned")
        if len(found) != len(expected):
            raise CheckpointError(f"{folder}: {len(found)} tensors instead of {len(expected)}")


def rows_at_once(row_bytes: int) -> int:
    """Rows of a matrix to work on together: some tens of MB."""
    return max(1, (32 << 20) // max(row_bytes, 1))


def row_blocks(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(begin, end) over `rows`; one empty block where there are none."""
    step = rows_at_once(row_bytes)
    for begin in range(0, max(rows, 1), step):
        yield begin, min(begin + step, rows)
