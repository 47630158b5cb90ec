"""Pickles made to harm: none runs anything, none takes long, each is refused by name."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_writer import (
    EDIT_KINDS,
    KINDS,
    Edit,
    Op,
    call,
    encode,
    glob,
    legacy_bytes,
    mutated,
    seeds,
    tensor,
    zip_bytes,
)

from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.weights.files import find_non_finite, open_tensors
from fastvlm_mlx.weights.torch_pickle import PickleFault, PickleMachine

F6 = np.arange(6, dtype="<f4")
STORAGE = {"0": F6.tobytes()}


def refusal(path: Path, data: bytes) -> str:
    path.unlink(missing_ok=True)  # some file systems wait for the disk where a file is overwritten
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        open_tensors(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fault(code: bytes) -> str:
    with pytest.raises(PickleFault) as caught:
        PickleMachine(code).load()
    assert len(str(caught.value)) < 300
    return str(caught.value)


class Evil:
    """Python's own pickle runs the command on load."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_command_leaves_no_trace(tmp_path: Path, protocol: int, container: str) -> None:
    trace = tmp_path / "trace"
    code = pickle.dumps({"a": Evil(f"touch {trace}")}, protocol)
    if container == "zip":
        data = zip_bytes(None, STORAGE, pickle=code)
    else:
        data = legacy_bytes(None, {}, pickle=code)
    message = refusal(tmp_path / "x.bin", data)
    assert "only tensors are read" in message
    if protocol >= 2:
        assert f"refuses to run {os.system.__module__}.system found in the pickle" in message
    assert not trace.exists()
    # The test has teeth: the same bytes do run under pickle.
    pickle.loads(code)
    assert trace.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "__builtin__ getattr",
        "os system",
        "torch load",
        "torch.storage _load_from_bytes",
        "torch._utils _rebuild_parameter_with_state",
        "torch._utils _rebuild_device_tensor_from_numpy",
        "torch._tensor _rebuild_from_type_v2",
        "torch _utils._rebuild_tensor_v2",
        "torch QInt8Storage",
        "torch hub.load",
        "collections defaultdict",
        "numpy dtype",
        "fastvlm_mlx.weights.files open_tensors",
    ],
)
def test_names_off_the_list(tmp_path: Path, name: str) -> None:
    state = {"a": tensor("0", F6), "b": glob(name)}
    message = refusal(tmp_path / "x.bin", zip_bytes(state, STORAGE))
    expected = f"refuses to run {name.replace(' ', '.')} found in the pickle; only tensors are read"
    assert message.endswith(expected)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        pytest.param(encode([1]) + encode({"x": 1}) + b"b.", "no container", id="BUILD on list"),
        pytest.param(glob("torch Size").code + b"}b.", "no container", id="BUILD on function"),
        pytest.param(b"(cos\nsystem\no.", "refuses to run os.system", id="OBJ"),
        pytest.param(b"(S'x'\nios\nsystem\n.", "refuses operation 0x53", id="INST"),
        pytest.param(b"}}\x81.", "refuses operation 0x81", id="NEWOBJ"),
        pytest.param(b"\x82\x01.", "refuses operation 0x82", id="EXT1"),
        pytest.param(b"I" + b"9" * 1000 + b"\n.", "refuses operation 0x49", id="INT as text"),
        pytest.param(b"\x97.", "refuses operation 0x97", id="NEXT_BUFFER"),
        pytest.param(b"K\x01)R.", "refuses to call", id="call of a number"),
        pytest.param(glob("torch FloatStorage").code + b")R.", "refuses to call", id="storage"),
        pytest.param(glob("torch Size").code + b"K\x01R.", "refuses to call", id="no arguments"),
        pytest.param(call(glob("torch Size"), [1] * 65).code + b".", "short row", id="long Size"),
        pytest.param(b"\x8b" + struct.pack("<i", 2**20) + bytes(2**20), "integer of", id="LONG4"),
        pytest.param(b"\x8b" + struct.pack("<i", -1), "integer of", id="LONG4 below zero"),
        pytest.param(b"B" + struct.pack("<I", 2**31) + b"x", "cut short", id="bytes"),
        pytest.param(b"\x8d" + struct.pack("<Q", 2**63) + b"x", "cut short", id="text"),
        pytest.param(b"X\x01\0\0\0\xff.", "damaged", id="not UTF-8"),
        pytest.param(b"\x80\x06.", "protocol 6", id="protocol"),
        pytest.param(b"c" + b"x" * 1000, "a name without an end", id="long name"),
        pytest.param(b"K\x01K\x02\x93.", "not text", id="STACK_GLOBAL of numbers"),
        pytest.param(b"h\x05.", "recalls", id="GET of nothing"),
        pytest.param(b"j\xff\xff\xff\xff.", "recalls", id="LONG_BINGET of nothing"),
        pytest.param(b"0.", "takes more", id="POP of nothing"),
        pytest.param(b"(\x85.", "takes more", id="TUPLE1 of a mark"),
        pytest.param(b"t.", "takes more", id="no mark"),
        pytest.param(b"}(K\x01u.", "without a value", id="odd items"),
        pytest.param(b"K\x01K\x02.", "disorder", id="two values"),
        pytest.param(b".", "disorder", id="no value"),
        pytest.param(b"(.", "takes more", id="a mark as value"),
        pytest.param(b"", "cut short", id="nothing"),
        pytest.param(encode("x") + b"Q.", "no storage", id="persistent text"),
        pytest.param(encode(("module", 1, 2, 3, 4)) + b"Q.", "no storage", id="module"),
        pytest.param(
            encode(("storage", 1, "0", "cpu", 4)) + b"Q.", "unknown way", id="storage of no class"
        ),
        pytest.param(
            encode(("storage", glob("torch FloatStorage"), "0", "cpu", 2**70)) + b"Q.",
            "unknown way",
            id="huge storage",
        ),
        pytest.param(
            encode(("storage", glob("torch FloatStorage"), "0", "cpu", 4, ("v", 3, 2))) + b"Q.",
            "beyond the end",
            id="view beyond its storage",
        ),
    ],
)
def test_operations_that_are_refused(code: bytes, reason: str) -> None:
    assert reason in fault(code)


@pytest.mark.parametrize(
    "name", ["_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"]
)
@pytest.mark.parametrize("count", range(10))
def test_calls_with_nonsense(name: str, count: int) -> None:
    for value in (None, 0, "x", [], {}, (1,), glob("torch Size"), glob("torch float16")):
        fault(call(glob(f"torch._utils {name}"), *[value] * count).code + b".")


def test_a_huge_memo_slot_costs_nothing() -> None:
    """The C unpickler makes room for every slot below the one named."""
    machine = PickleMachine(b"K\x07r\xff\xff\xff\xff0j\xff\xff\xff\xff.")
    assert machine.load() == 7


def test_deep_nesting_ends(tmp_path: Path) -> None:
    depth = 60_000
    for opening, closing in ((b"(" * depth, b"t" * depth), (b"]" * depth, b"a" * (depth - 1))):
        state = Op(b"}X\1\0\0\0a" + opening + closing + b"s")
        refusal(tmp_path / "x.bin", zip_bytes(state, STORAGE))
    # Dictionaries within dictionaries, and under the names that are looked into.
    code = b"}" + b"X\5\0\0\0model}" * depth + b"s" * depth
    refusal(tmp_path / "x.bin", zip_bytes(Op(code), STORAGE))


def test_a_dictionary_within_itself(tmp_path: Path) -> None:
    code = b"}q\0X\5\0\0\0modelh\0s"
    refusal(tmp_path / "x.bin", zip_bytes(Op(code), STORAGE))


def test_values_that_stand_for_exponentially_many(tmp_path: Path) -> None:
    """Doubled 60 times: to hash it, compare it or write it out would take for ever."""
    bomb = Op(b"K\1" + b"2\x86" * 60)
    state = {"a": tensor("0", F6), "bomb": bomb, bomb: 1, "list": [bomb, bomb]}
    (tmp_path / "x.bin").write_bytes(zip_bytes(state, STORAGE))
    with open_tensors(tmp_path / "x.bin") as tensors:
        assert tensors.ignored == {"bomb": "tuple of 2", "<tuple of 2>": "int", "list": "list of 2"}
    for target in ("0", 0):
        kind = glob("torch FloatStorage")
        for saved in ((bomb, kind, "0", "cpu", 1), ("storage", kind, bomb, "cpu", target)):
            fault(encode(saved) + b"Q.")
    for name in ("torch Size", "torch._utils _rebuild_tensor"):
        fault(call(glob(name), bomb).code + b".")


def test_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm_mlx.weights.torch_pickle._MOST_OPERATIONS", 50_000)
    assert "operations" in fault(b"N0" * 30_000 + b"N.")
    # A list of 1,000 pairs copied 1,000 times is a million steps in 30 kB.
    pairs = encode([[1, 2]] * 1000) + b"q\0"
    copies = b"ccollections\nOrderedDict\nh\0\x85R0" * 1000
    assert "operations" in fault(pairs + copies + b".")


def test_the_length_of_a_pickle_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm_mlx.weights.torch_pickle.LARGEST_PICKLE", 100)
    assert "longer than 100 bytes" in fault(b"N0" * 100 + b"N.")


def test_a_directory_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    """The end record of the archive claims that nearly all of a 1 GB file is its directory."""
    size = 1 << 30
    path = tmp_path / "x.bin"
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(size - 22)
        file.seek(size - 22)
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 9, 9, size - 100, 78, 0))
    with pytest.raises(CheckpointError, match="directory of"):
        open_tensors(path)


_HONEST = seeds()
_edit = st.tuples(
    st.integers(0, EDIT_KINDS - 1), st.integers(0, 65535), st.integers(0, 65535)
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(KINDS), edits=st.lists(_edit, min_size=1, max_size=6))
def test_damaged_files_are_read_or_refused(kind: str, edits: list[Edit]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.bin"
        path.write_bytes(mutated(_HONEST, kind, edits))
        try:
            with open_tensors(path) as tensors:
                for found in tensors.values():
                    if found.nbytes < 1 << 20:
                        assert found.numpy().shape == found.shape == found.read().shape
                        find_non_finite(found)
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ")
            assert "\n" not in str(error)


@settings(max_examples=300, deadline=None)
@given(code=st.binary(max_size=60))
def test_any_bytes_as_a_pickle(code: bytes) -> None:
    with contextlib.suppress(PickleFault):
        PickleMachine(code).load()


@pytest.mark.parametrize("kind", sorted(_HONEST))
def test_every_truncation(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.bin"
    whole = _HONEST[kind]
    for length in range(0, len(whole), 5):
        refusal(path, whole[:length])
    path.unlink()
    path.write_bytes(whole)
    assert len(open_tensors(path)) >= 5
