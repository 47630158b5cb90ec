"""Safetensors files written in pieces: what other readers find in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from fastvlm_mlx.convert.writer import (
    INDEX,
    Array,
    Job,
    Spec,
    check_written,
    make_header,
    plan_shards,
    row_blocks,
    shard_names,
    write_shards,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fastvlm_mlx.errors import CheckpointError

TYPES = {"F32": np.float32, "F16": np.float16, "U32": np.uint32, "U8": np.uint8}


def job(name: str, array: Array, rows: int = 2) -> Job:
    kind = next(k for k, dtype in TYPES.items() if dtype == array.dtype)

    def pieces() -> Iterator[tuple[Array, ...]]:
        for begin in range(0, max(len(array), 1), rows):
            yield (array[begin : begin + rows],)

    return Job((Spec(name, kind, array.shape),), pieces)


def some(count: int) -> dict[str, Array]:
    rng = np.random.default_rng(count)
    kinds = list(TYPES.values())
    return {
        f"t{i}": (rng.random((i + 1, 3)) * 99).astype(kinds[i % len(kinds)]) for i in range(count)
    }


def test_files_are_what_the_safetensors_library_and_mlx_read(tmp_path: Path) -> None:
    arrays = some(9)
    jobs = [job(name, array) for name, array in arrays.items()]
    (path,) = write_shards(tmp_path, jobs, 10**9)
    for found in (load_file(path), {k: np.array(v) for k, v in mx.load(str(path)).items()}):
        assert set(found) == set(arrays)
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
    check_written(tmp_path, jobs)


def test_shards_stay_below_the_size_and_the_index_lists_all(tmp_path: Path) -> None:
    arrays = {f"t{i}": np.full((10, 10), i, np.float32) for i in range(7)}
    paths = write_shards(tmp_path, [job(n, a) for n, a in arrays.items()], 900)
    assert [path.name for path in paths] == shard_names(4)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 7 * 400
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(tmp_path / file)[name], arrays[name])


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own() -> None:
    sizes = [[len(shard)] for shard in plan_shards([job(n, a) for n, a in some(4).items()], 1)]
    assert sizes == [[1], [1], [1], [1]]


def test_tensors_made_together_are_in_one_file(tmp_path: Path) -> None:
    weight, scales = np.arange(12, dtype=np.uint32).reshape(4, 3), np.ones((4, 1), np.float16)

    def pieces() -> Iterator[tuple[Array, ...]]:
        yield weight[:3], scales[:3]
        yield weight[3:], scales[3:]

    specs = (Spec("w", "U32", (4, 3)), Spec("s", "F16", (4, 1)))
    (path,) = write_shards(tmp_path, [Job(specs, pieces)], 10)
    found = load_file(path)
    np.testing.assert_array_equal(found["w"], weight)
    np.testing.assert_array_equal(found["s"], scales)


def test_wide_types_come_first_so_that_all_are_aligned() -> None:
    specs = [Spec("a", "U8", (3,)), Spec("b", "F32", (2,)), Spec("c", "BF16", (1,))]
    header, begins = make_header(specs)
    assert len(header) % 8 == 0
    assert begins["b"] < begins["c"] < begins["a"]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_job_that_makes_less_than_planned_is_a_fault(tmp_path: Path, rows: int) -> None:
    wrong = Job((Spec("t", "F32", (2, 4)),), lambda: [(np.zeros((rows, 4), np.float32),)])
    with pytest.raises(CheckpointError, match="t has"):
        write_shards(tmp_path, [wrong], 10**9)


def test_what_was_not_written_as_planned_is_seen(tmp_path: Path) -> None:
    save_file({"t": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="t was not written"):
        check_written(tmp_path, [job("t", np.zeros(4, np.float32))])
    with pytest.raises(CheckpointError, match="1 tensors instead of 0"):
        check_written(tmp_path, [])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 10**9))
def test_blocks_cover_every_row_once(rows: int, row_bytes: int) -> None:
    end = 0
    for begin, stop in row_blocks(rows, max(row_bytes, rows * 4)):
        assert begin == end
        end = stop
        if begin > 4 * row_bytes:
            return
    assert end == rows
