"""PyTorch files, written here byte by byte: what is read, and at what values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from torch_writer import (
    Op,
    Tensor,
    call,
    encode,
    glob,
    legacy_bytes,
    pickled,
    tensor,
    zip_bytes,
)

from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.weights.files import TensorFiles, open_tensors

F6 = np.arange(6, dtype="<f4")
STORAGE = {"0": F6.tobytes()}


def opened(tmp_path: Path, data: bytes) -> TensorFiles:
    path = tmp_path / "x.bin"
    path.write_bytes(data)
    return open_tensors(path)


def both(tmp_path: Path, state: Any, storages: dict[str, tuple[int, bytes]]) -> list[TensorFiles]:
    """`state` in either container."""
    raw = {key: data for key, (_, data) in storages.items()}
    older = {k: replace(t, legacy=True) if isinstance(t, Tensor) else t for k, t in state.items()}
    (tmp_path / "zip").mkdir()
    (tmp_path / "legacy").mkdir()
    return [
        opened(tmp_path / "zip", zip_bytes(state, raw)),
        opened(tmp_path / "legacy", legacy_bytes(older, storages)),
    ]


@pytest.mark.parametrize(
    ("storage", "kind", "name", "mlx_type"),
    [
        ("DoubleStorage", "<f8", "F64", mx.float32),
        ("FloatStorage", "<f4", "F32", mx.float32),
        ("HalfStorage", "<f2", "F16", mx.float16),
        ("BFloat16Storage", "<u2", "BF16", mx.bfloat16),
        ("LongStorage", "<i8", "I64", mx.int64),
        ("IntStorage", "<i4", "I32", mx.int32),
        ("ShortStorage", "<i2", "I16", mx.int16),
        ("CharStorage", "i1", "I8", mx.int8),
        ("ByteStorage", "u1", "U8", mx.uint8),
        ("BoolStorage", "u1", "BOOL", mx.bool_),
        ("ComplexFloatStorage", "<c8", "C64", mx.complex64),
    ],
)
def test_types(tmp_path: Path, storage: str, kind: str, name: str, mlx_type: Any) -> None:
    values = np.array([[0, 1], [1, 0]]).astype(kind)
    if name == "BF16":
        values *= np.uint16(0x3F80)  # the bits of one
    state = {"a": tensor("0", values, f"torch {storage}")}
    for tensors in both(tmp_path, state, {"0": (4, values.tobytes())}):
        found = tensors["a"]
        assert (found.dtype, found.shape) == (name, (2, 2))
        assert found.read().dtype == mlx_type
        assert found.read().tolist() == [[0, 1], [1, 0]]
        assert found.numpy().tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("dtype", "kind", "name"),
    [
        ("uint16", "<u2", "U16"),
        ("uint32", "<u4", "U32"),
        ("float8_e4m3fn", "u1", "F8_E4M3"),
        ("bfloat16", "<u2", "BF16"),
    ],
)
def test_types_of_plain_storages(tmp_path: Path, dtype: str, kind: str, name: str) -> None:
    """_rebuild_tensor_v3: the storage is bytes, the tensor names the type."""
    values = np.arange(4).astype(kind)
    a = Tensor("0", values.nbytes, (2,), (1,), 2, "torch.storage UntypedStorage", f"torch {dtype}")
    for tensors in both(tmp_path, {"a": a}, {"0": (values.nbytes, values.tobytes())}):
        assert (tensors["a"].dtype, tensors["a"].shape) == (name, (2,))
        assert tensors["a"].stored().tolist() == [2, 3]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(Tensor("0", 6, (2, 3), (3, 1)), F6.reshape(2, 3), id="plain"),
        pytest.param(Tensor("0", 6, (3, 2), (1, 3)), F6.reshape(2, 3).T, id="transposed"),
        pytest.param(Tensor("0", 6, (3,), (2,), 1), F6[1::2], id="every second"),
        pytest.param(Tensor("0", 6, (4, 2), (0, 1), 4), np.tile(F6[4:], (4, 1)), id="expanded"),
        pytest.param(Tensor("0", 6, (4, 3), (1, 1)), F6[[[0, 1, 2], [1, 2, 3], [2, 3, 4],
                     [3, 4, 5]]], id="overlapping"),
        pytest.param(Tensor("0", 6, (), (), 5), np.float32(5), id="scalar"),
        pytest.param(Tensor("0", 6, (1, 6), (2**61, 1)), F6[None], id="stride of one element"),
        pytest.param(Tensor("0", 6, (0, 3), (3, 1), 2**40), F6.reshape(2, 3)[:0], id="empty"),
        pytest.param(Tensor("0", 6, (6,), (1,), parameter=True), F6, id="parameter"),
        pytest.param(Tensor("0", 6, (6,), (1,), first_version=True), F6, id="first version"),
    ],
)  # fmt: skip
def test_views(tmp_path: Path, given: Tensor, expected: Any) -> None:
    for tensors in both(tmp_path, {"a": given}, {"0": (6, F6.tobytes())}):
        assert tensors["a"].shape == expected.shape
        assert np.array_equal(tensors["a"].numpy(), expected)
        assert tensors["a"].numpy().flags.c_contiguous
        assert tensors["a"].read().tolist() == expected.tolist()


def test_a_transposed_bfloat16_is_not_scrambled(tmp_path: Path) -> None:
    bits = np.arange(6, dtype="<u2") + np.uint16(0x3F80)
    a = Tensor("0", 6, (3, 2), (1, 3), storage="torch BFloat16Storage")
    for tensors in both(tmp_path, {"a": a}, {"0": (6, bits.tobytes())}):
        found = np.array(tensors["a"].read().view(mx.uint16))
        assert np.array_equal(found, bits.reshape(2, 3).T)


def test_tensors_share_a_storage(tmp_path: Path) -> None:
    state = {"a": Tensor("0", 6, (2, 3), (3, 1)), "b": Tensor("0", 6, (2,), (1,), 4)}
    for tensors in both(tmp_path, state, {"0": (6, F6.tobytes())}):
        assert tensors["b"].numpy().tolist() == [4, 5]
        assert tensors["a"].numpy().ravel().tolist() == F6.tolist()


def test_views_of_storages_in_the_older_container(tmp_path: Path) -> None:
    state = {"a": Tensor("9", 6, (2,), (1,), 1, view=("10", 2, 3))}
    tensors = opened(tmp_path, legacy_bytes(state, {"9": (6, F6.tobytes())}))
    assert tensors["a"].numpy().tolist() == [3, 4]


def test_several_storages_in_the_older_container(tmp_path: Path) -> None:
    state = {
        "b": Tensor("200", 3, (3,), (1,), storage="torch HalfStorage", legacy=True),
        "a": Tensor("100", 6, (6,), (1,), legacy=True),
    }
    halves = np.array([1, 2, 3], "<f2").tobytes()
    data = legacy_bytes(state, {"100": (6, F6.tobytes()), "200": (3, halves)})
    tensors = opened(tmp_path, data)
    assert tensors["a"].numpy().tolist() == F6.tolist()
    assert tensors["b"].numpy().tolist() == [1, 2, 3]


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module", "model_state_dict"])
def test_wrapped_state_dicts(tmp_path: Path, wrapper: str) -> None:
    state = {"a": tensor("0", F6), "step": 3}
    outer = {"epoch": 1, wrapper: {"module": state}, "optimizer": {"lr": 0.1}, "args": None}
    tensors = opened(tmp_path, zip_bytes(outer, STORAGE))
    assert list(tensors) == ["a"]
    assert tensors.ignored == {
        "epoch": "int",
        "optimizer": "dict of 1",
        "args": "None",
        "step": "int",
    }


def test_a_wrapper_is_left_alone_beside_tensors(tmp_path: Path) -> None:
    tensors = opened(
        tmp_path, zip_bytes({"a": tensor("0", F6), "model": {"b": tensor("0", F6)}}, STORAGE)
    )
    assert list(tensors) == ["a"]
    assert tensors.ignored == {"model": "dict of 1"}


def test_what_is_no_tensor_is_reported(tmp_path: Path) -> None:
    state = {
        "a": tensor("0", F6),
        "n": 1,
        "s": "text",
        "f": 1.5,
        "none": None,
        "list": [tensor("0", F6)],
        "tuple": (1, 2),
        "type": glob("torch float16"),
        "size": call(glob("torch Size"), (1, 2)),
        "device": call(glob("torch device"), "cuda", 0),
        7: tensor("0", F6),
    }
    tensors = opened(tmp_path, zip_bytes(state, STORAGE))
    assert list(tensors) == ["a"]
    assert tensors.ignored == {
        "n": "int",
        "s": "str",
        "f": "float",
        "none": "None",
        "list": "list of 1",
        "tuple": "tuple of 2",
        "type": "dtype",
        "size": "tuple of 2",
        "device": "device",
        "<int>": "tensor",
    }


def test_the_attributes_of_a_state_dict_are_dropped(tmp_path: Path) -> None:
    """state_dict() carries `_metadata`, which pickle writes as BUILD."""
    state = Op(encode({"a": tensor("0", F6)}) + encode({"_metadata": {"": {"version": 1}}}) + b"b")
    assert list(opened(tmp_path, zip_bytes(state, STORAGE))) == ["a"]


def test_an_ordered_dict_made_of_pairs(tmp_path: Path) -> None:
    """As Python 2 wrote them."""
    state = call(glob("collections OrderedDict"), [["a", tensor("0", F6)]])
    assert list(opened(tmp_path, zip_bytes(state, STORAGE))) == ["a"]


def test_protocol_4(tmp_path: Path) -> None:
    """FRAME, MEMOIZE, STACK_GLOBAL and short text, as newer pickles have them."""

    def text(s: str) -> bytes:
        return b"\x8c" + bytes([len(s)]) + s.encode() + b"\x94"

    storage = (
        b"(" + text("storage") + text("torch") + text("FloatStorage") + b"\x93\x94"
        b"" + text("0") + text("cpu") + b"K\x06t\x94Q"
    )
    rebuilt = (
        text("torch._utils") + text("_rebuild_tensor_v2") + b"\x93\x94(" + storage
        + b"K\x00K\x06\x85K\x01\x85\x89}tR"
    )  # fmt: skip
    code = b"\x80\x04\x95" + (999).to_bytes(8, "little") + b"}\x94(" + text("a") + rebuilt + b"u."
    tensors = opened(tmp_path, zip_bytes(None, STORAGE, pickle=code))
    assert tensors["a"].numpy().tolist() == F6.tolist()


def test_the_root_of_the_archive_may_have_any_name(tmp_path: Path) -> None:
    data = zip_bytes({"a": tensor("0", F6)}, STORAGE, root="modèle-7")
    assert list(opened(tmp_path, data)) == ["a"]


# What is refused ------------------------------------------------------------------------------


def refusal(tmp_path: Path, data: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, data)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'x.bin'}: ")
    assert "\n" not in message
    return message.removeprefix(f"{tmp_path / 'x.bin'}: ")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (Tensor("0", 6, (7,), (1,)), "beyond the end of storage '0'"),
        (Tensor("0", 6, (6,), (1,), 1), "beyond the end of storage '0'"),
        (Tensor("0", 6, (2, 3), (4, 1)), "beyond the end of storage '0'"),
        (Tensor("0", 6, (2,), (2**61,)), "beyond the end of storage '0'"),
        (Tensor("0", 6, (-1,), (1,)), "a shape that is not"),
        (Tensor("0", 6, (2,), (-1,)), "a stride that is not"),
        (Tensor("0", 6, (2,), (True,)), "a stride that is not"),
        (Tensor("0", 6, (2.0,), (1,)), "a shape that is not"),
        (Tensor("0", 6, (2,), (1, 1)), "of different length"),
        (Tensor("0", 6, (2**31,), (0,)), "a dimension above"),
        (Tensor("0", 6, (2**30, 2**30, 2**30), (0, 0, 0)), "larger than any memory"),
        (Tensor("0", 6, (2**20, 2**20), (0, 0)), "repeats the 24 bytes"),
        (Tensor("0", 6, (1,) * 33, (1,) * 33), "33 dimensions"),
        (Tensor("0", 6, (1,) * 65, (1,) * 65), "a shape that is not"),
        (Tensor("0", 6, (1,), (1,), -1), "described in an unknown way"),
        (Tensor("0", -6, (1,), (1,)), "describes a storage in an unknown way"),
        (Tensor("0", 7, (1,), (1,)), "28 bytes but"),
        (Tensor("0", 6, (1,), (1,), storage="torch float9"), "refuses to run torch.float9"),
        (Tensor("0", 6, (1,), (1,), storage="torch UntypedStorage"), "an unknown way"),
        (Tensor("1", 6, (1,), (1,)), "storage '1'"),
    ],
)
def test_tensors_that_lie(tmp_path: Path, given: Tensor, reason: str) -> None:
    assert reason in refusal(tmp_path, zip_bytes({"a": given}, STORAGE))
    message = refusal(
        tmp_path, legacy_bytes({"a": replace(given, legacy=True)}, {"0": (6, STORAGE["0"])})
    )
    assert reason in message or "storage" in message


def test_conjugated_views(tmp_path: Path) -> None:
    saved = ("storage", glob("torch ComplexFloatStorage"), "0", "cpu", 3)
    arguments = (Op(encode(saved) + b"Q"), 0, (3,), (1,), False, {}, {"conj": True})
    state = {"a": call(glob("torch._utils _rebuild_tensor_v2"), *arguments)}
    assert "conjugated" in refusal(tmp_path, zip_bytes(state, STORAGE))


def test_a_name_held_twice(tmp_path: Path) -> None:
    pairs = [["a", tensor("0", F6)], ["a", tensor("0", F6)]]
    state = call(glob("collections OrderedDict"), pairs)
    assert "tensor 'a' twice" in refusal(tmp_path, zip_bytes(state, STORAGE))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([1, 2], "holds list of 2"),
        (7, "holds int"),
        (tensor("0", F6), "holds tensor, not"),
        ({}, "holds no tensor under a name (found: nothing)"),
        ({"lr": 1, "model": 2}, "(found: 'lr', 'model')"),
        ({"parts": {"a": tensor("0", F6)}}, "(found: 'parts')"),
    ],
)
def test_no_tensors_by_name(tmp_path: Path, value: Any, reason: str) -> None:
    assert reason in refusal(tmp_path, zip_bytes(value, STORAGE))


GOOD = {"a": tensor("0", F6)}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (zip_bytes(GOOD, STORAGE, compress=True), "compressed record"),
        (zip_bytes(GOOD, STORAGE, byteorder=b"big"), "big-endian"),
        (zip_bytes(GOOD, {}), "lacks the record of storage '0'"),
        (zip_bytes(GOOD, {"0": b"\0" * 23}), "takes 24 bytes but its record has 23"),
        (zip_bytes(GOOD, STORAGE, extra={"../evil": b""}), "unsafe name '../evil'"),
        (zip_bytes(GOOD, STORAGE, extra={"/etc/x": b""}), "unsafe name"),
        (zip_bytes(GOOD, STORAGE, extra={"a\\..\\x": b""}), "unsafe name"),
        (zip_bytes(GOOD, STORAGE, extra={"other/data.pkl": b"."}), "no PyTorch checkpoint"),
        (zip_bytes(GOOD, STORAGE, root="a/b"), "no PyTorch checkpoint"),
        (zip_bytes(GOOD, STORAGE, extra={"archive/constants.pkl": b"."}), "TorchScript"),
        (zip_bytes(GOOD, STORAGE)[:-30], "damaged zip archive"),
        (zip_bytes(GOOD, STORAGE).replace(b"archive/data/0", b"archive/data/1", 1), "not where"),
    ],
)
def test_damaged_archives(tmp_path: Path, data: bytes, reason: str) -> None:
    assert reason in refusal(tmp_path, data)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_record_held_twice(tmp_path: Path) -> None:
    data = zip_bytes(GOOD, STORAGE, extra={"archive/data/0": b"\0" * 24})
    assert "twice" in refusal(tmp_path, data)


def test_records_that_overlap(tmp_path: Path) -> None:
    """The directory's sizes are blown up; nothing is read by them."""
    data = bytearray(zip_bytes(GOOD, STORAGE))
    entry = data.rfind(b"PK\1\2", 0, data.rfind(b"archive/version"))
    data[entry + 20 : entry + 28] = (5000).to_bytes(4, "little") * 2
    message = refusal(tmp_path, bytes(data))
    assert "larger than the file" in message


OLD = {"a": replace(GOOD["a"], legacy=True)}
COUNTED = {"0": (6, F6.tobytes())}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (legacy_bytes(OLD, COUNTED, magic=1), "torch.save did not write"),
        (legacy_bytes(OLD, COUNTED, version=1000), "unknown version"),
        (legacy_bytes(OLD, COUNTED, little=False), "big-endian"),
        (legacy_bytes(OLD, {}), "lacks storage '0'"),
        (legacy_bytes(OLD, {**COUNTED, "1": (1, b"1234")}), "lists storage '1'"),
        (legacy_bytes(OLD, {"0": (5, F6.tobytes())}), "takes 24 bytes but 20 are written"),
        (legacy_bytes(OLD, {"0": (-6, F6.tobytes())}), "are written"),
        (legacy_bytes(OLD, COUNTED)[:-1], "cut within storage '0'"),
        (legacy_bytes(OLD, COUNTED)[:-26], "cut before storage '0'"),
        (legacy_bytes(OLD, COUNTED)[:200], "cut short"),
        (pickled({"a": 1}), "torch.save did not write"),
    ],
)
def test_damaged_older_files(tmp_path: Path, data: bytes, reason: str) -> None:
    assert reason in refusal(tmp_path, data)
