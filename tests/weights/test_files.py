"""Which files of a checkpoint are opened, what they yield, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_writer import safetensors_bytes, tensor, zip_bytes

from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.weights.files import open_tensors

F4 = np.arange(4, dtype="<f4")


def safe(*names: str, value: float = 0.0) -> bytes:
    data = (F4 + np.float32(value)).tobytes()
    return safetensors_bytes({name: ("F32", (2, 2), data) for name in names})


def torch_file(*names: str) -> bytes:
    return zip_bytes({name: tensor("0", F4) for name in names}, {"0": F4.tobytes()})


def fill(folder: Path, files: dict[str, bytes | dict[str, str]]) -> Path:
    """Write `files`; a dict stands for an index with that weight_map."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            content = json.dumps({"metadata": {"total_size": 1}, "weight_map": content}).encode()
        path.write_bytes(content)
    return folder


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_tensors(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What is picked up ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({"model.safetensors": safe("a", "b")}, "ab", id="one safetensors"),
        pytest.param({"weights.safetensors": safe("a")}, "a", id="any name"),
        pytest.param(
            {
                "model-00001-of-00002.safetensors": safe("a"),
                "model-00002-of-00002.safetensors": safe("b"),
            },
            "ab",
            id="shards without an index",
        ),
        pytest.param(
            {
                "model.safetensors.index.json": {"a": "x.safetensors", "b": "sub/y.safetensors"},
                "x.safetensors": safe("a"),
                "sub/y.safetensors": safe("b"),
                "stray.safetensors": safe("a"),
            },
            "ab",
            id="index",
        ),
        pytest.param(
            {"model.safetensors": safe("a"), "pytorch_model.bin": torch_file("p")},
            "a",
            id="safetensors first",
        ),
        pytest.param(
            {"model.safetensors": safe("a"), "consolidated.safetensors": safe("a")},
            "a",
            id="model first",
        ),
        pytest.param({"pytorch_model.bin": torch_file("a", "b")}, "ab", id="one bin"),
        pytest.param(
            {
                "pytorch_model.bin.index.json": {"a": "pytorch_model-1.bin"},
                "pytorch_model-1.bin": torch_file("a"),
            },
            "a",
            id="bin index",
        ),
        pytest.param({"encoder.pt": torch_file("a")}, "a", id="pt"),
        pytest.param({"encoder.pth": torch_file("a")}, "a", id="pth"),
        pytest.param({"pytorch_model.bin": safe("a")}, "a", id="known by content"),
        pytest.param(
            {
                "model.safetensors": safe("a"),
                "adapter_model.safetensors": safe("x"),
                "mm_projector.bin": torch_file("y"),
            },
            "a",
            id="side files",
        ),
        pytest.param(
            {
                "pytorch_model.bin": torch_file("a"),
                "mm_projector.bin": torch_file("y"),
                "non_lora_trainables.bin": torch_file("z"),
                "training_args.bin": b"\x80\x02cos\nsystem\n.",
                "optimizer.pt": b"\x80",
            },
            "a",
            id="leavings of training",
        ),
    ],
)
def test_a_folder_yields_its_main_weights(
    tmp_path: Path, files: dict[str, Any], expected: str
) -> None:
    with open_tensors(fill(tmp_path, files)) as tensors:
        assert sorted(tensors) == list(expected)
        assert tensors.nbytes == 16 * len(expected)
        for found in tensors.values():
            assert found.numpy().ravel().tolist() == F4.tolist()
            assert found.file in tensors.files


@pytest.mark.parametrize(
    "name", ["mm_projector.bin", "non_lora_trainables.bin", "adapter_model.bin"]
)
def test_a_side_file_is_read_when_named_and_is_no_model_alone(tmp_path: Path, name: str) -> None:
    fill(tmp_path, {name: torch_file("a")})
    assert list(open_tensors(tmp_path / name)) == ["a"]
    assert "holds no weights" in refusal(tmp_path)


def test_metadata_is_kept(tmp_path: Path) -> None:
    fill(tmp_path, {"model.safetensors": safetensors_bytes({}, {"format": "mlx"})})
    tensors = open_tensors(tmp_path)
    assert tensors.metadata == {"format": "mlx"}
    assert len(tensors) == 0


def test_an_unknown_name_is_a_key_error(tmp_path: Path) -> None:
    tensors = open_tensors(fill(tmp_path, {"model.safetensors": safe("a")}))
    assert "b" not in tensors
    with pytest.raises(KeyError):
        tensors["b"]


# What is refused ------------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    assert "holds no weights" in refusal(tmp_path)
    assert "nowhere" in refusal(tmp_path / "nowhere")


def test_every_missing_shard_is_named(tmp_path: Path) -> None:
    listed = {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"}
    fill(tmp_path, {"model.safetensors.index.json": listed, "2.safetensors": safe("b")})
    message = refusal(tmp_path)
    assert "1.safetensors, 3.safetensors" in message
    assert "download it again" in message


def test_missing_shards_are_noticed_without_an_index(tmp_path: Path) -> None:
    fill(tmp_path, {"model-00002-of-00003.safetensors": safe("a")})
    message = refusal(tmp_path)
    assert "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors" in message


def test_an_index_that_places_a_tensor_wrongly(tmp_path: Path) -> None:
    listed = {"a": "1.safetensors", "b": "1.safetensors"}
    files = {"1.safetensors": safe("a"), "2.safetensors": safe("b")}
    fill(tmp_path, {"model.safetensors.index.json": listed, **files})
    assert "tensor 'b' in '1.safetensors', which lacks it" in refusal(tmp_path)
    fill(tmp_path, {"model.safetensors.index.json": {"a": "2.safetensors", "b": "1.safetensors"}})
    assert "which lacks it" in refusal(tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    fill(tmp_path, {"model-a.safetensors": safe("x"), "model-b.safetensors": safe("x", "y")})
    message = refusal(tmp_path)
    assert "model-b.safetensors: tensor 'x' is also in" in message
    assert "model-a.safetensors" in message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": "x", "a": "y"}}',
        b'{"weight_map": {"a": "\xff"}}',
        b'{"weight_map": ' + b"[" * 100_000,
        b'{"total": ' + b"9" * 100_000 + b"}",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    ],
)
def test_a_damaged_index(tmp_path: Path, content: bytes) -> None:
    fill(tmp_path, {"model.safetensors.index.json": content})
    assert "model.safetensors.index.json: " in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../out.safetensors", "/etc/passwd", "a/../../out.safetensors", "..", "", "..\\out", "C:/x"],
)
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    fill(tmp_path, {"out.safetensors": safe("a"), "m/model.safetensors.index.json": {"a": name}})
    assert "leaves the folder" in refusal(tmp_path / "m")


def test_a_link_may_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    fill(tmp_path, {"secret": safe("a"), "m/.keep": b"", "blobs/b": safe("a")})
    link = tmp_path / "m" / "model.safetensors"
    for target in (tmp_path / "secret", "../secret", "../blobs/b", "../absent"):
        link.symlink_to(target)
        assert "a link out of the folder" in refusal(tmp_path / "m")
        link.unlink()
    link.symlink_to("model.safetensors")
    refusal(tmp_path / "m")


def test_a_folder_reached_by_links_within_a_link(tmp_path: Path) -> None:
    fill(tmp_path, {"m/inner/x.safetensors": safe("a")})
    (tmp_path / "outer").symlink_to("m")
    (tmp_path / "m" / "model.safetensors").symlink_to("inner/x.safetensors")
    assert list(open_tensors(tmp_path / "outer")) == ["a"]


@pytest.mark.parametrize("inner", ["", "sub"])
def test_links_of_the_hub_cache_are_followed(tmp_path: Path, inner: str) -> None:
    repo = fill(tmp_path / "models--apple--FastVLM", {"blobs/b": safe("a")})
    blob = repo / "blobs" / "b"
    snapshot = repo / "snapshots" / "0123" / inner
    snapshot.mkdir(parents=True)
    link = snapshot / "model.safetensors"
    link.symlink_to(os.path.relpath(blob, snapshot))
    assert list(open_tensors(snapshot)) == ["a"]
    # Another repository's blobs, and what else lies in this one, are out of bounds.
    other = fill(tmp_path / "models--x--y", {"blobs/b": safe("a")})
    link.unlink()
    link.symlink_to(other / "blobs" / "b")
    assert "a link out of the folder" in refusal(snapshot)
    fill(repo, {"refs/main": safe("a")})
    link.unlink()
    link.symlink_to(repo / "refs" / "main")
    assert "a link out of the folder" in refusal(snapshot)


def test_a_file_given_by_name_may_be_a_link(tmp_path: Path) -> None:
    fill(tmp_path, {"a/x": safe("a"), "b/.keep": b""})
    (tmp_path / "b" / "y.safetensors").symlink_to("../a/x")
    assert list(open_tensors(tmp_path / "b" / "y.safetensors")) == ["a"]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html>", "is a web page"),
        (b"\n <HTML lang=en>", "is a web page"),
        (b"<?xml version='1.0'?><Error/>", "is a web page"),
        (b"GGUF\3\0\0\0", "is a GGUF file"),
        (b"storages".ljust(257, b"\0") + b"ustar\x0000".ljust(600, b"\0"), "is a tar archive"),
    ],
)
def test_what_lies_in_place_of_weights(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    fill(tmp_path, {name: content})
    message = refusal(tmp_path)
    assert reason in message
    assert f"{name}: " in message


def test_neither_format(tmp_path: Path) -> None:
    fill(tmp_path, {"x.bin": b"hello world, this is text"})
    assert "neither a safetensors nor a PyTorch file" in refusal(tmp_path / "x.bin")


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert "not an ordinary file" in refusal(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_forbidden_file(tmp_path: Path) -> None:
    fill(tmp_path, {"model.safetensors": safe("a")})
    (tmp_path / "model.safetensors").chmod(0)
    assert "cannot be read" in refusal(tmp_path)


# Reading later --------------------------------------------------------------------------------


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    """A file of 8 GB with a hole in place of the values opens, and its first rows are never
    needed: the second tensor is read alone."""
    header = {
        "big": {"dtype": "F32", "shape": [2048, 1024, 1024], "data_offsets": [0, 2**33]},
        "small": {"dtype": "F32", "shape": [2], "data_offsets": [2**33, 2**33 + 8]},
    }
    raw = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + 2**33)
        file.seek(0, os.SEEK_END)
        file.write(np.array([1, 2], "<f4").tobytes())
    with open_tensors(path) as tensors:
        assert tensors["big"].nbytes == 2**33
        assert tensors["small"].numpy().tolist() == [1, 2]


def test_a_closed_reader_says_so(tmp_path: Path) -> None:
    with open_tensors(fill(tmp_path, {"model.safetensors": safe("a")})) as tensors:
        kept = tensors["a"].numpy()
    assert kept.tolist() == [[0, 1], [2, 3]]
    with pytest.raises(CheckpointError, match="was closed"):
        tensors["a"].read()


@pytest.mark.parametrize("change", ["shrunk", "replaced", "removed"])
def test_a_file_that_changes_after_opening_is_noticed(tmp_path: Path, change: str) -> None:
    path = fill(tmp_path, {"model.safetensors": safe("a")}) / "model.safetensors"
    tensors = open_tensors(path)
    if change == "shrunk":
        os.truncate(path, 100)
    else:
        path.unlink()
    if change == "replaced":
        path.write_bytes(safe("a", value=1.0) + b"more")
    with pytest.raises(CheckpointError, match=r"has changed|cannot be read"):
        tensors["a"].numpy()


def test_what_was_read_outlives_the_file(tmp_path: Path) -> None:
    path = fill(tmp_path, {"model.safetensors": safe("a")}) / "model.safetensors"
    with open_tensors(path) as tensors:
        values, array = tensors["a"].numpy(), tensors["a"].read()
    path.write_bytes(b"\xff" * 500)
    assert values.tolist() == [[0, 1], [2, 3]]
    assert array.tolist() == [[0, 1], [2, 3]]
    assert values.flags.writeable
